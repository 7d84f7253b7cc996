"""Per-step tokens, as a build deploys them: a checkpoint, calibrated or recovered where its mode needs that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rfsq.calibration.settings import ReadoutChoice, ReadoutConfig
from rfsq.export.belief_graphs import belief_graph
from rfsq.export.build_config import BuildConfig
from rfsq.export.c_source import CTokenizer, c_tokenizer
from rfsq.export.cuda_source import cuda_tokenizer
from rfsq.export.deployable import checked_graph
from rfsq.export.errors import BuildInputError
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm
from rfsq.export.graphs import decoder_graph, encoder_graph
from rfsq.export.plan import (
    DecoderPlan,
    DeployMode,
    EncoderPlan,
    action_limit,
    choose_prefixes,
    plan_decoder,
    plan_encoder,
    step_decoding,
)
from rfsq.export.progress import phase
from rfsq.export.reference import Reference, Section, parity_sections
from rfsq.export.sources import BuildData, choose_mode, fit_for, load_build_data, needs_fit, open_checkpoint
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint
from rfsq.rfsq_ref.fingerprint import fingerprint
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.checkpoint_layouts import HASHES_KEY, weight_hashes
from rfsq.runtime.bundle.decoding import StepDecoding
from rfsq.runtime.bundle.manifest import GraphEntry
from rfsq.runtime.bundle.models import StepModel

#: Control steps of a chunk where none are asked for.
_CHUNK_LENGTH = 8


@dataclass(frozen=True, eq=False)
class StepTokens:
    """A `Deployable`. checkpoint: with all that its mode needs; file: its name."""

    checkpoint: Checkpoint
    reference: Reference
    data: BuildData
    chunk_length: int
    file: str

    @cached_property
    def _encoder(self) -> EncoderPlan:
        return plan_encoder(self.reference.model, self.reference.mode, self.chunk_length)

    @cached_property
    def _decoders(self) -> list[DecoderPlan]:
        reference = self.reference
        return [
            plan_decoder(reference.model, reference.mode, self.chunk_length, prefix) for prefix in reference.prefixes
        ]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.checkpoint, self.reference.mode.value)

    @cached_property
    def model(self) -> StepModel:
        reference = self.reference
        return StepModel(
            mode=reference.mode.value,
            chunk_length=self.chunk_length,
            **asdict(self.checkpoint.config),
            prefixes=reference.prefixes,
            action_limit=action_limit(self._encoder),
            action_units=tuple(map(float, reference.model.units)),
            action_offset=tuple(map(float, reference.model.offset)),
        )

    @property
    def provenance(self) -> Mapping[str, Any]:
        weights = {name: part.numpy() for name, part in self.checkpoint.tensors().items()}
        return {
            "checkpoint": {**self.checkpoint.provenance, "file": self.file, HASHES_KEY: weight_hashes(weights)},
        }

    def graphs(self) -> Sequence[tuple[GraphEntry, bytes]]:
        """The encoder and one decoder for each prefix, in every form, and those of probabilities. Raises GateError
        where one is not sound."""
        model, found = self.model, []
        for form in LinearForm:
            found.append(checked_graph(model, "encoder", model.depth, form, encoder_graph(self._encoder, form)))
            for decoder in self._decoders:
                found.append(checked_graph(model, "decoder", decoder.prefix, form, decoder_graph(decoder, form)))
        for form in BELIEF_FORMS if not model.has_stats else ():
            for decoder in self._decoders:
                found.append(checked_graph(model, "belief", decoder.prefix, form, belief_graph(decoder, form)))
        return found

    def decoding(self) -> StepDecoding | None:
        return step_decoding(self._decoders)

    def c_source(self) -> CTokenizer:
        return c_tokenizer(self._encoder, self._decoders, self.fingerprint, self.reference.mode)

    def cuda_source(self) -> str:
        return cuda_tokenizer(self._encoder, self._decoders, self.fingerprint)

    def keep_fit(self, folder: Path) -> None:
        """Nothing took long."""

    def sections(self, num_steps: int) -> tuple[Section, ...]:
        model = self.model
        return parity_sections(
            self.reference.model,
            self.data.held_out,
            chunk_length=model.chunk_length,
            limit=model.action_limit,
            num_steps=num_steps,
            prefixes=model.prefixes,
        )


def load_step_tokens(config: BuildConfig) -> StepTokens:
    """Open the checkpoint, and fit what its mode needs. Raises UnusableError, BuildInputError."""
    path = config.checkpoint or ROBUST_CHECKPOINT
    with phase("load checkpoint") as current:
        checkpoint = open_checkpoint(
            path,
            use_layernorm=config.use_layernorm,
            weights=config.weights,
            normaliser_file=config.normaliser,
        )
        mode = choose_mode(checkpoint, config.conditioning)
        prefixes = choose_prefixes(config.prefixes, checkpoint.config.num_layers)
        current.note(f"{path.name}: {_describe(checkpoint)}; deployed as {mode.value!r}")
        current.note(*checkpoint.remarks)
    is_fit_needed = needs_fit(checkpoint, mode, prefixes)
    if config.readout is not ReadoutChoice.AUTO and not (is_fit_needed and mode is DeployMode.CALIBRATED):
        raise BuildInputError(
            f"readout {config.readout.value!r} is asked for, but nothing is calibrated here: the mode is "
            f"{mode.value!r}" + ("" if is_fit_needed else " and the checkpoint has what it needs") + "; leave "
            f"--readout out, or calibrate anew with {quoted('calibrate', '--readout')}"
        )
    with phase("load action data") as current:
        data = load_build_data(
            checkpoint,
            config.data,
            key=config.key,
            filter_key=config.filter_key,
            is_needed=is_fit_needed,
        )
        current.note(*data.description.splitlines())
    with phase("calibrate") as current:
        if is_fit_needed and data.dataset is not None:
            checkpoint = fit_for(checkpoint, mode, prefixes, data.dataset, ReadoutConfig(config.readout))
            facts = checkpoint.provenance[mode.value]
            current.note(f"{mode.value!r}, fitted on {facts['data']['steps']} steps")
            current.note(*facts.get("remark", "").splitlines())
        else:
            current.skip("nothing to fit")
    return StepTokens(
        checkpoint, Reference(checkpoint, mode, prefixes), data, config.chunk_length or _CHUNK_LENGTH, path.name
    )


def _describe(checkpoint: Checkpoint) -> str:
    sizes = checkpoint.config
    kind = "robust" if checkpoint.trained_with is Conditioning.DYNAMIC else "naive"
    return (
        f"{kind}, A {sizes.action_dim}, D {sizes.latent_dim}, L {sizes.num_layers}, K {sizes.num_levels}, "
        f"hidden {sizes.hidden_width}"
    )
