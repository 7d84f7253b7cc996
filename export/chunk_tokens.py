"""Chunk tokens, as a build deploys them: a file of them, or a fit to demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfsq.calibration.chunk_fitting import chunk_parts, fit_chunk_tokens, fitted_on
from rfsq.calibration.chunk_report import class_use
from rfsq.calibration.settings import ChunkConfig
from rfsq.export.build_config import BuildConfig
from rfsq.export.c_source import CTokenizer
from rfsq.export.chunk_belief_graphs import chunk_belief_graph
from rfsq.export.chunk_c_source import c_chunk_tokenizer
from rfsq.export.chunk_cuda_source import cuda_chunk_tokenizer
from rfsq.export.chunk_graphs import chunk_decoder_graph, chunk_encoder_graph
from rfsq.export.chunk_plan import ACTION_LIMIT, ChunkPlan, plan_chunk_code
from rfsq.export.chunk_reference import ChunkReference, episode_chunks
from rfsq.export.chunk_sections import chunk_sections
from rfsq.export.deployable import checked_graph
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm
from rfsq.export.progress import phase
from rfsq.export.reference import Section
from rfsq.export.sources import MOST_HELD_OUT, BuildData
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint, load_chunk_checkpoint, save_chunk_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, load_actions, load_demonstrations
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.fingerprint import chunk_fingerprint
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.decoding import ChunkDecoding
from rfsq.runtime.bundle.manifest import GraphEntry
from rfsq.runtime.bundle.models import ChunkModel
from rfsq.runtime.bundle.paths import counted


@dataclass(frozen=True, eq=False)
class ChunkTokens:
    """A `Deployable`. file: the name of the checkpoint, or what it was fitted to; is_new: whether this build
    fitted it."""

    checkpoint: ChunkCheckpoint
    reference: ChunkReference
    data: BuildData
    file: str
    is_new: bool = False

    @cached_property
    def _plan(self) -> ChunkPlan:
        return plan_chunk_code(self.reference.model)

    @cached_property
    def fingerprint(self) -> str:
        return chunk_fingerprint(self.checkpoint)

    @cached_property
    def model(self) -> ChunkModel:
        sizes, plan, reference = self.checkpoint.sizes, self._plan, self.reference.model
        return ChunkModel(
            mode="chunk",
            chunk_length=sizes.chunk_length,
            action_dim=sizes.action_dim,
            num_classes=sizes.num_classes,
            token_bits=sizes.token_bits,
            num_tokens=sizes.num_tokens,
            num_latents=plan.num_latents,
            prefixes=tuple(range(1, sizes.num_tokens + 1)),
            budgets=reference.code.budgets,
            bounds=plan.bounds,
            action_limit=ACTION_LIMIT,
            action_units=tuple(map(float, reference.units)),
            action_offset=tuple(map(float, reference.offset)),
        )

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {"checkpoint": {**self.checkpoint.provenance, "file": self.file}}

    def graphs(self) -> Sequence[tuple[GraphEntry, bytes]]:
        """Encoder and decoder in every form, and those of probabilities. Raises GateError where one is not sound."""
        model, plan, found = self.model, self._plan, []
        for form in LinearForm:
            found.append(checked_graph(model, "encoder", model.depth, form, chunk_encoder_graph(plan, form)))
            found.append(checked_graph(model, "decoder", model.depth, form, chunk_decoder_graph(plan, form)))
        for form in BELIEF_FORMS:
            found.append(checked_graph(model, "belief", model.depth, form, chunk_belief_graph(plan, form)))
        return found

    def decoding(self) -> ChunkDecoding:
        plan = self._plan
        return ChunkDecoding(plan.mean, plan.basis, plan.width, plan.order.astype(np.int32))

    def c_source(self) -> CTokenizer:
        return c_chunk_tokenizer(self._plan, self.fingerprint)

    def cuda_source(self) -> str:
        return cuda_chunk_tokenizer(self._plan, self.fingerprint)

    def sections(self, num_steps: int) -> tuple[Section, ...]:
        return chunk_sections(self.reference.model, self.data.held_out, limit=ACTION_LIMIT, num_steps=num_steps)

    def keep_fit(self, folder: Path) -> None:
        """Beside the folder of the bundle, where this build fitted it."""
        if self.is_new:
            path = folder.with_name(f"{folder.name}-fit.safetensors")
            save_chunk_checkpoint(self.checkpoint, path)
            print(f"the fit is kept in {path}: build it with {command('build', f'--checkpoint {path} --data …')}")


def load_chunk_tokens(config: BuildConfig) -> ChunkTokens:
    """Open the file of a fit, or fit to demonstrations. Raises UnusableError."""
    checkpoint = None
    if config.checkpoint is not None:
        with phase("load checkpoint") as current:
            checkpoint = load_chunk_checkpoint(config.checkpoint)
            current.note(f"{config.checkpoint.name}: {_describe(checkpoint)}")
    with phase("load action data") as current:
        dataset = _dataset(config, checkpoint)
        current.note(
            f"{dataset.source}: {counted(len(dataset.episodes), 'episode')}" if dataset else "none: random actions only"
        )
    with phase("calibrate") as current:
        if checkpoint is None:
            assert dataset is not None  # where there is no checkpoint there are demonstrations
            checkpoint = fit_chunk_tokens(dataset, _fit_config(config))
            provenance = checkpoint.provenance
            current.note(_describe(checkpoint), fitted_on(provenance), *provenance["remarks"])
            data = _build_data(checkpoint, dataset)
            current.note(*class_use(checkpoint.model(dtype=torch.float64), data.held_out))
        else:
            data = _build_data(checkpoint, dataset)
            current.skip("nothing to fit")
    file = config.checkpoint.name if config.checkpoint else str(dataset.source if dataset else "")
    reference = ChunkReference(checkpoint.model(dtype=torch.float64))
    return ChunkTokens(checkpoint, reference, data, file, is_new=config.checkpoint is None)


def _fit_config(config: BuildConfig) -> ChunkConfig:
    chosen = config.chunk or ChunkConfig()
    if config.chunk_length is not None:
        chosen = replace(chosen, chunk_length=config.chunk_length)
    return chosen if config.normaliser is None else replace(chosen, normaliser=str(config.normaliser))


def _dataset(config: BuildConfig, checkpoint: ChunkCheckpoint | None) -> ActionDataset | None:
    """Episodes to fit to and to judge on; without a path the embedded ones, for a fit of ours alone."""
    if config.data is not None:
        dataset = load_actions(config.data, key=config.key, filter_key=config.filter_key)
    elif checkpoint is None:
        dataset = load_demonstrations()
    else:
        dataset = load_demonstrations()
        if checkpoint.provenance.get("data", {}).get("sha256") != dataset.sha256:
            return None
    if checkpoint is not None and dataset.action_dim != checkpoint.sizes.action_dim:
        raise DataError(
            f"{dataset.source} has {dataset.action_dim} dimensions, the checkpoint {checkpoint.sizes.action_dim}; give "
            "episodes of its robot"
        )
    return dataset


def _build_data(checkpoint: ChunkCheckpoint, dataset: ActionDataset | None) -> BuildData:
    """What gates and people judge on: chunks of the validation part."""
    sizes = checkpoint.sizes
    if dataset is None:
        none = np.empty((0, sizes.chunk_length, sizes.action_dim), np.float32)
        return BuildData(None, none, "none given: gates run on random actions alone", "")
    judging = chunk_parts(dataset).judging
    judged_on = "held-out episodes" if judging is not dataset else "the calibration data themselves, too few to split"
    chunks = episode_chunks(judging.episodes, sizes.chunk_length)[: MOST_HELD_OUT // sizes.chunk_length]
    described = f"{dataset.source}: {counted(len(dataset.episodes), 'episode')}; judged on {judged_on}"
    return BuildData(dataset, chunks, described, judged_on)


def _describe(checkpoint: ChunkCheckpoint) -> str:
    sizes = checkpoint.sizes
    return (
        f"T {sizes.chunk_length}, A {sizes.action_dim}, {sizes.num_tokens} tokens of {2**sizes.token_bits}, "
        f"{sizes.num_classes} classes"
    )
