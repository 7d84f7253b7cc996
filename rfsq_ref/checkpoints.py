"""Checkpoints: our own format (safetensors plus a JSON header), and all others by rfsq_ref/published_checkpoints.py."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig, Readout, RecoveredDecoder
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.normaliser import Normaliser, normaliser_from_json
from rfsq.rfsq_ref.own_format import (
    FORMATS,
    SUFFIX,
    TRAIN,
    check_hash,
    parse_header,
    read_content,
    read_safetensors,
    reading_header,
    write_own,
)
from rfsq.rfsq_ref.published_checkpoints import (
    check_agreement,
    published_model,
    read_torch,
    require_known,
    take,
    take_weights,
)
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime.bundle.advice import quoted

FORMAT = FORMATS[TokenKind.STEP]
ASSETS = Path(__file__).resolve().parent / "assets"
#: The embedded checkpoints, trained by `python rfsq_ref/train.py` on the embedded demonstrations.
NAIVE_CHECKPOINT = ASSETS / "naive.safetensors"
ROBUST_CHECKPOINT = ASSETS / "robust.safetensors"

# Without leading zeros, so that the name found is the name looked up.
_RECOVERED = re.compile(r"recovered\.(0|[1-9][0-9]{0,8})\.(?:matrix|offset)")


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what was fitted to it afterwards.

    trained_with: the conditioning of the training forward pass (`none` or `dynamic`); weights: float32 tensors by the
    names of ActionAutoencoder's state dict; constants, readout and recovered: what calibration fitted, if it did, the
    readout for the `calibrated` conditioning alone; provenance: JSON-like facts; remarks: what a person should know
    about how the file was read.
    """

    config: ModelConfig
    trained_with: Conditioning
    weights: Mapping[str, Tensor]
    constants: ConditioningConstants | None = None
    readout: Readout | None = None
    recovered: Mapping[int, RecoveredDecoder] = field(default_factory=dict)
    normaliser: Normaliser | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def model(
        self, conditioning: Conditioning | None = None, *, dtype: torch.dtype = torch.float32
    ) -> ActionAutoencoder:
        """The autoencoder, in evaluation mode.

        conditioning: the trained one by default; `calibrated` needs fitted constants (CheckpointError without).
        """
        conditioning = conditioning or self.trained_with
        if conditioning is Conditioning.CALIBRATED and self.constants is None:
            raise CheckpointError(
                "this checkpoint carries no conditioning constants; fit them with "
                f"{quoted('calibrate', '--checkpoint FILE')}"
            )
        if conditioning not in (self.trained_with, Conditioning.CALIBRATED):
            raise CheckpointError(
                f"this checkpoint was trained with conditioning {self.trained_with.value!r}; running it with "
                f"{conditioning.value!r} would give tokens it was never trained for"
            )
        model = ActionAutoencoder(
            self.config,
            conditioning,
            constants=self.constants if conditioning is Conditioning.CALIBRATED else None,
            recovered=self.recovered if conditioning is Conditioning.DYNAMIC else None,
            normaliser=self.normaliser,
        )
        weights = dict(self.weights)
        if conditioning is Conditioning.CALIBRATED and self.readout is not None:
            weights |= {"decoder.2.weight": self.readout.weight, "decoder.2.bias": self.readout.bias}
        model.load_state_dict(weights)
        return model.to(dtype).eval()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names of our own format."""
        fitted: dict[str, object] = {"calibrated": self.constants, "readout": self.readout}
        fitted |= {f"recovered.{prefix}": decoder for prefix, decoder in self.recovered.items()}
        tensors = dict(self.weights)
        for part, found in fitted.items():
            if found is not None:
                tensors |= {f"{part}.{name}": tensor for name, tensor in vars(found).items()}
        return tensors

    def with_fit(
        self,
        *,
        constants: ConditioningConstants | None = None,
        readout: Readout | None = None,
        recovered: Mapping[int, RecoveredDecoder] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Checkpoint":
        """A copy that carries what calibration fitted; what is not given stays."""
        return replace(
            self,
            constants=constants or self.constants,
            readout=readout or self.readout,
            recovered=recovered if recovered is not None else self.recovered,
            provenance={**self.provenance, **(provenance or {})},
        )


def checkpoint_of(model: ActionAutoencoder, provenance: Mapping[str, Any]) -> Checkpoint:
    """Freeze a trained model into a checkpoint."""
    weights = {name: tensor.detach().to("cpu", torch.float32).clone() for name, tensor in model.state_dict().items()}
    return Checkpoint(model.config, model.conditioning, weights, normaliser=model.normaliser, provenance=provenance)


def load_checkpoint(
    path: str | os.PathLike[str], *, use_layernorm: bool | None = None, weights: str | None = None
) -> Checkpoint:
    """Read a checkpoint in our own format, or in another's: torch files and bare state dicts in .safetensors.

    use_layernorm: how the model was trained, True = `dynamic`, False = `none`. A bare state dict does not say it,
    so it must be given there; where the file says it, the argument must agree. weights: which model in the file, such
    as `ema`; by default `model_state_dict`, `model`, `state_dict` or the file itself, and an average only where it is
    alone. `remarks` say what was not taken. Raises CheckpointError.

    >>> checkpoint = load_checkpoint(ROBUST_CHECKPOINT)
    >>> checkpoint.config.num_layers, checkpoint.trained_with.value
    (8, 'dynamic')
    """
    path, content = read_content(path, TRAIN)
    metadata: Mapping[str, str] = {}
    if path.suffix == SUFFIX:
        tensors, metadata = read_safetensors(content, path)
    if FORMATS[TokenKind.CHUNK] in metadata:
        raise CheckpointError(
            f"{path} holds chunk tokens; expected a model of per-step tokens: give one, or choose --kind chunk"
        )
    if FORMAT in metadata:
        checkpoint = _own_checkpoint(tensors, metadata[FORMAT], path)
        check_agreement(use_layernorm, checkpoint.trained_with is Conditioning.DYNAMIC, path)
        if weights is not None:
            raise CheckpointError(f"{path} was written by this project and holds one model; leave --weights out")
    else:
        entries = tensors if path.suffix == SUFFIX else read_torch(content, path)
        config, trained_with, found, facts, remarks = published_model(entries, path, use_layernorm, weights)
        checkpoint = Checkpoint(config, trained_with, found, provenance=facts, remarks=remarks)
    sha256 = hashlib.sha256(content).hexdigest()
    return replace(checkpoint, provenance={**checkpoint.provenance, "checkpoint_sha256": sha256})


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write our own format; raises as `write_own`."""
    fields = {
        "config": asdict(checkpoint.config),
        "trained_with": checkpoint.trained_with.value,
        "normaliser": checkpoint.normaliser.to_json() if checkpoint.normaliser else None,
        "provenance": dict(checkpoint.provenance),
    }
    write_own(TokenKind.STEP, fields, checkpoint.tensors(), path)


def _own_checkpoint(tensors: dict[str, Tensor], written: str, path: Path) -> Checkpoint:
    """The checkpoint in a file of our own format. written: its header, as JSON. Raises CheckpointError."""
    with reading_header(path):
        header = parse_header(written, path)
        config = ModelConfig(**header["config"])
        trained_with = Conditioning(header["trained_with"])
        normaliser = normaliser_from_json(header["normaliser"]) if header["normaliser"] is not None else None
        if trained_with is Conditioning.CALIBRATED:
            raise ValueError("trained_with is 'calibrated'; expected 'none' or 'dynamic'")
        if normaliser is not None and len(normaliser.scale) != config.action_dim:
            raise ValueError(f"normaliser for {len(normaliser.scale)} dimensions, action_dim {config.action_dim}")
    check_hash(header, tensors, path)
    constants, readout, recovered = _fitted(tensors, config, path)
    weights = take_weights(tensors, config, path)
    require_known(tensors, path)
    return Checkpoint(config, trained_with, weights, constants, readout, recovered, normaliser, header["provenance"])


def _fitted(
    tensors: dict[str, Tensor], config: ModelConfig, path: Path
) -> tuple[ConditioningConstants | None, Readout | None, dict[int, RecoveredDecoder]]:
    """Take out what calibration has added to the weights."""
    constants = None
    if "calibrated.mean" in tensors or "calibrated.scale" in tensors:
        shape = (config.num_layers, config.latent_dim)
        mean, scale = (take(tensors, f"calibrated.{name}", shape, path) for name in ("mean", "scale"))
        try:
            constants = ConditioningConstants(mean, scale)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    readout = None
    if "readout.weight" in tensors or "readout.bias" in tensors:
        shape = (config.action_dim, config.hidden_width)
        readout = Readout(take(tensors, "readout.weight", shape, path), take(tensors, "readout.bias", shape[:1], path))
    recovered = {}
    for prefix in sorted({int(match[1]) for name in tensors if (match := _RECOVERED.fullmatch(name))}):
        if not 1 <= prefix <= config.num_layers:
            raise CheckpointError(f"{path} has a decoder for {prefix} layers; the model has {config.num_layers}")
        shape = (config.latent_dim, config.latent_dim * prefix)
        recovered[prefix] = RecoveredDecoder(
            take(tensors, f"recovered.{prefix}.matrix", shape, path, torch.float64),
            take(tensors, f"recovered.{prefix}.offset", shape[:1], path, torch.float64),
        )
    return constants, readout, recovered
