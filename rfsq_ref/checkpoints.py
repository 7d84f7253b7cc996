"""Checkpoints: the layouts found in the wild, and our own (safetensors plus a JSON header).

Published layouts are read with `weights_only=True`, so a pickle that wants to run code is refused by torch
itself. Their module names are `encoder.0/2`, `rfsq.layers.N.boundaries`, `decoder.0/2`; their config calls the
latent dimension `hidden_dim`.
"""

import hashlib
import io
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig, Readout, RecoveredDecoder
from rfsq_ref.errors import CheckpointError
from rfsq_ref.files import replacing
from rfsq_ref.normaliser import Normaliser, normaliser_from_json
from rfsq_ref.quantizer import Conditioning, ConditioningConstants

FORMAT = "rfsq-checkpoint"
FORMAT_VERSION = 1
#: Of our own format; any other is taken for a torch file.
SUFFIX = ".safetensors"
ASSETS = Path(__file__).resolve().parent / "assets"
#: The embedded checkpoints, trained by `python rfsq_ref/train.py` on the embedded demonstrations.
NAIVE_CHECKPOINT = ASSETS / "naive.safetensors"
ROBUST_CHECKPOINT = ASSETS / "robust.safetensors"

_WEIGHTS = tuple(
    f"{part}.{index}.{kind}" for part in ("encoder", "decoder") for index in (0, 2) for kind in ("weight", "bias")
)
# Numbers as they are written, so that the name found is the name looked up.
_NUMBER = "(0|[1-9][0-9]{0,8})"
_BOUNDARIES = re.compile(rf"rfsq\.layers\.{_NUMBER}\.boundaries")
_RECOVERED = re.compile(rf"recovered\.{_NUMBER}\.(?:matrix|offset)")
_UNUSED_LAYERNORM = re.compile(rf"rfsq\.layers\.{_NUMBER}\.layernorm\.(weight|bias)")
#: The published grid is a float32 linspace; anything further off than its rounding is another grid.
_GRID_TOLERANCE = 1e-6


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
                "`python calibration/fit.py --checkpoint FILE`"
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
        """All of them, by the names of our own format."""
        tensors: dict[str, Tensor] = dict(self.weights)
        if self.constants is not None:
            tensors["calibrated.mean"] = self.constants.mean
            tensors["calibrated.scale"] = self.constants.scale
        if self.readout is not None:
            tensors["readout.weight"] = self.readout.weight
            tensors["readout.bias"] = self.readout.bias
        for prefix, recovered in self.recovered.items():
            tensors[f"recovered.{prefix}.matrix"] = recovered.matrix
            tensors[f"recovered.{prefix}.offset"] = recovered.offset
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


def load_checkpoint(path: str | Path, *, use_layernorm: bool | None = None) -> Checkpoint:
    """Read a checkpoint in our own format (.safetensors) or in one of the published ones (torch files).

    use_layernorm: how the model was trained, True = `dynamic`, False = `none`. A bare state dict does not say it,
    so it must be given there; where the file says it, the argument must agree. Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; train one with `python rfsq_ref/train.py`")
    try:
        # Once: what is hashed is what is parsed, even where the file is replaced meanwhile.
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if path.suffix == SUFFIX:
        checkpoint = _load_safetensors(content, path)
        _check_agreement(use_layernorm, checkpoint.trained_with is Conditioning.DYNAMIC, path)
    else:
        checkpoint = _load_published(content, path, use_layernorm)
    sha256 = hashlib.sha256(content).hexdigest()
    return replace(checkpoint, provenance={**checkpoint.provenance, "checkpoint_sha256": sha256})


def check_output(path: str | Path) -> None:
    """Raise CheckpointError for a name that load_checkpoint would take for another layout."""
    if Path(path).suffix != SUFFIX:
        raise CheckpointError(
            f"{path} does not end with {SUFFIX!r}, and would not be read again as what it is; expected a name like "
            f"{Path(path).stem}{SUFFIX}"
        )


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write our own format, through a temporary sibling that is renamed: the old file stays whole until then.

    Raises CheckpointError when the name does not end with SUFFIX or the file cannot be written; nothing is left behind.
    """
    check_output(path)
    tensors = checkpoint.tensors()
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": asdict(checkpoint.config),
        "trained_with": checkpoint.trained_with.value,
        "normaliser": checkpoint.normaliser.to_json() if checkpoint.normaliser else None,
        "provenance": dict(checkpoint.provenance),
    }
    path = Path(path)
    try:
        with replacing(path) as temporary:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            # Not save_file: it makes a private file (0600), whatever the umask.
            temporary.write_bytes(
                safetensors.torch.save(contiguous, metadata={FORMAT: json.dumps(header, sort_keys=True)})
            )
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; choose a writable folder") from error


def _load_safetensors(content: bytes, path: Path) -> Checkpoint:
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; copy or write it again") from error
    except KeyError as error:
        raise CheckpointError(f"{path} has tensors of type {error}, which torch lacks; expected float32") from error
    # Only safe_open, which takes a path, gives the metadata; the layout is fixed: its length, then the JSON header.
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if FORMAT not in metadata:
        raise CheckpointError(f"{path} has no {FORMAT!r} header; expected a file written by this project")
    try:
        header = json.loads(metadata[FORMAT])
        if header["version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {header['version']}; this code reads {FORMAT_VERSION}")
        config = ModelConfig(**header["config"])
        trained_with = Conditioning(header["trained_with"])
        normaliser = normaliser_from_json(header["normaliser"]) if header["normaliser"] else None
        provenance = dict(header["provenance"])
        if trained_with is Conditioning.CALIBRATED:
            raise ValueError("trained_with is 'calibrated'; expected 'none' or 'dynamic'")
        if normaliser is not None and len(normaliser.scale) != config.action_dim:
            raise ValueError(f"normaliser for {len(normaliser.scale)} dimensions, action_dim {config.action_dim}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a broken header: {error!r}; save the checkpoint again") from error
    constants = None
    if "calibrated.mean" in tensors or "calibrated.scale" in tensors:
        shape = (config.num_layers, config.latent_dim)
        mean, scale = (_take(tensors, f"calibrated.{name}", shape, path) for name in ("mean", "scale"))
        try:
            constants = ConditioningConstants(mean, scale)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    readout = None
    if "readout.weight" in tensors or "readout.bias" in tensors:
        shape = (config.action_dim, config.hidden_width)
        readout = Readout(
            _take(tensors, "readout.weight", shape, path), _take(tensors, "readout.bias", shape[:1], path)
        )
    recovered = {}
    for prefix in sorted({int(match[1]) for name in tensors if (match := _RECOVERED.fullmatch(name))}):
        if not 1 <= prefix <= config.num_layers:
            raise CheckpointError(f"{path} has a decoder for {prefix} layers; the model has {config.num_layers}")
        shape = (config.latent_dim, config.latent_dim * prefix)
        recovered[prefix] = RecoveredDecoder(
            _take(tensors, f"recovered.{prefix}.matrix", shape, path, torch.float64),
            _take(tensors, f"recovered.{prefix}.offset", shape[:1], path, torch.float64),
        )
    weights = _take_weights(tensors, config, path)
    if tensors:
        raise CheckpointError(f"{path} has tensors this code does not know: {sorted(tensors)}")
    return Checkpoint(config, trained_with, weights, constants, readout, recovered, normaliser, provenance)


def _load_published(data: bytes, path: Path, use_layernorm: bool | None) -> Checkpoint:
    content = _torch_load(data, path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict or a dict with one")
    keys = [key for key in ("model_state_dict", "model") if key in content]
    remarks: list[str] = []
    state = content[keys[0]] if keys else content
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} has no state dict of tensors; found the keys {sorted(map(str, content))}")
    for name, tensor in state.items():
        _check_stored(name, tensor, path)
    if len(keys) == 2:
        _check_same_states(content, keys, path)
        remarks.append("holds both 'model_state_dict' and 'model', with equal tensors")
    stated = content.get("config", {}) if keys else {}
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"{path} has a config of type {type(stated).__name__}; expected a dict")
    tensors = dict(state)
    config = _infer_config(tensors, stated, path)
    _take_grids(tensors, config, path)
    unused = sorted(name for name in tensors if _UNUSED_LAYERNORM.fullmatch(name))
    for name in unused:
        del tensors[name]
    if unused:
        remarks.append(f"{len(unused)} layernorm parameters ignored: the published forward pass never uses them")
    weights = _take_weights(tensors, config, path)
    if tensors:
        raise CheckpointError(f"{path} has tensors this code does not know: {sorted(tensors)}")
    trained_with = _training_conditioning(stated.get("use_layernorm"), use_layernorm, path)
    provenance = {
        key: content[key] for key in ("epoch", "train_mse", "mse") if keys and isinstance(content.get(key), int | float)
    }
    return Checkpoint(config, trained_with, weights, provenance=provenance, remarks=tuple(remarks))


def _torch_load(data: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is not a plain weights file (it holds objects that only running code could "
            "rebuild, or is no checkpoint at all). Save the state dict alone and try again. "
            f"Reason: {_reason(error)}"
        ) from error
    # The parser raises nearly anything on damaged bytes: RuntimeError, EOFError, KeyError, struct.error, ...
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint torch can read; expected a file written by torch.save, or a {SUFFIX} file of "
            f"this project under that suffix: check that it is the right file and whole ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """One line: what torch does not support, where it says so below its advice, else what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "unsupported" in line.lower()] or lines or ["no message"]
    return f"{type(error).__name__}: {telling[0][:200]}"


def _check_stored(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse tensors that are not plain numbers in the file, so that any later check costs no more than the file."""
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise CheckpointError(
            f"{path}: {name!r} is a {kind} tensor; expected plain numbers: save the state dict of the dense model"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name!r} has shape {tuple(tensor.shape)}, more numbers than the file holds for it; save a "
            "contiguous copy"
        )


def _check_same_states(content: Mapping[str, Any], keys: list[str], path: Path) -> None:
    first, second = content[keys[0]], content[keys[1]]
    same = (
        isinstance(second, Mapping)
        and first.keys() == second.keys()
        and all(
            isinstance(second[name], Tensor)
            and second[name].dtype is tensor.dtype
            and second[name].layout is tensor.layout
            and second[name].device == tensor.device
            and torch.equal(second[name], tensor)
            for name, tensor in first.items()
        )
    )
    if not same:
        raise CheckpointError(
            f"{path} holds both {keys[0]!r} and {keys[1]!r}, and they differ: it is not clear which one was trained. "
            "Save the file with one of them"
        )


def _infer_config(tensors: Mapping[str, Any], stated: Mapping[str, Any], path: Path) -> ModelConfig:
    """Sizes from the shapes; a stated config must agree."""
    first, second = tensors.get("encoder.0.weight"), tensors.get("encoder.2.weight")
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        raise CheckpointError(
            f"{path} is not an RFSQ autoencoder: 'encoder.0.weight' and 'encoder.2.weight' are missing or not "
            f"matrices; found {sorted(tensors)[:8]}"
        )
    layers = sorted(int(match[1]) for name in tensors if (match := _BOUNDARIES.fullmatch(name)))
    if not layers or layers != list(range(len(layers))):
        raise CheckpointError(
            f"{path} has the quantiser layers {layers}; expected 'rfsq.layers.N.boundaries' for N = 0, 1, 2, ... "
            "without gaps"
        )
    try:
        inferred = ModelConfig(
            action_dim=first.shape[1],
            latent_dim=second.shape[0],
            hidden_width=first.shape[0],
            num_layers=len(layers),
            num_levels=tensors["rfsq.layers.0.boundaries"].numel(),
        )
    except ValueError as error:
        raise CheckpointError(f"{path} is not an RFSQ autoencoder: {error}") from error
    # The published config calls the latent dimension `hidden_dim`.
    names = {
        "action_dim": "action_dim",
        "hidden_dim": "latent_dim",
        "num_layers": "num_layers",
        "num_levels": "num_levels",
    }
    for theirs, ours in names.items():
        if theirs not in stated:
            continue
        if not isinstance(stated[theirs], int):
            raise CheckpointError(
                f"{path}: its config has a {type(stated[theirs]).__name__} as {theirs}; expected the integer "
                f"{getattr(inferred, ours)}, which its tensors have: save the config with plain numbers"
            )
        if stated[theirs] != getattr(inferred, ours):
            raise CheckpointError(
                f"{path}: its config says {theirs} = {stated[theirs]}, its tensors have {getattr(inferred, ours)}; "
                "the file was put together from two models"
            )
    return inferred


def _take_grids(tensors: dict[str, Any], config: ModelConfig, path: Path) -> None:
    expected = torch.linspace(-1, 1, config.num_levels)
    for layer in range(config.num_layers):
        grid = tensors.pop(f"rfsq.layers.{layer}.boundaries")
        if grid.shape != expected.shape or not grid.is_floating_point():
            raise CheckpointError(
                f"{path}: the grid of layer {layer} is of shape {tuple(grid.shape)} and type {grid.dtype}; expected "
                f"linspace(-1, 1, {config.num_levels}) as floating-point numbers"
            )
        # A model saved in half precision has the grid rounded to it.
        deviation = float((grid.double() - expected.to(grid.dtype).double()).abs().max())
        if not deviation <= _GRID_TOLERANCE:
            raise CheckpointError(
                f"{path}: the grid of layer {layer} is off by {deviation:.3g}; expected linspace(-1, 1, "
                f"{config.num_levels}), the only grid this project decodes"
            )


def _take_weights(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    sizes = {
        "encoder.0": (config.hidden_width, config.action_dim),
        "encoder.2": (config.latent_dim, config.hidden_width),
        "decoder.0": (config.hidden_width, config.latent_dim),
        "decoder.2": (config.action_dim, config.hidden_width),
    }
    weights = {}
    for name in _WEIGHTS:
        module, _, kind = name.rpartition(".")
        shape = sizes[module] if kind == "weight" else sizes[module][:1]
        weights[name] = _take(tensors, name, shape, path)
    return weights


def _take(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path, dtype: torch.dtype = torch.float32
) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{path} lacks the tensor {name!r}; it is incomplete or of another model")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {name!r} has shape {tuple(tensor.shape)}; expected {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {name!r} has type {tensor.dtype}; expected floating point")
    tensor = tensor.detach().to(dtype)
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{path}: {name!r} has {bad} values that are NaN or infinite; the training diverged")
    return tensor


def _training_conditioning(stated: Any, given: bool | None, path: Path) -> Conditioning:
    if stated is None and given is None:
        raise CheckpointError(
            f"{path} does not say whether it was trained with normalised residuals (Robust RFSQ) or without, and its "
            "tensors look the same either way; pass use_layernorm (--use-layernorm or --no-use-layernorm)"
        )
    if stated is not None and not isinstance(stated, bool):
        shown = repr(stated) if isinstance(stated, str | int | float) else f"a {type(stated).__name__}"
        raise CheckpointError(f"{path}: its config says use_layernorm = {shown}; expected True or False")
    if stated is not None:
        _check_agreement(given, stated, path)
    return Conditioning.DYNAMIC if (given if stated is None else stated) else Conditioning.NONE


def _check_agreement(given: bool | None, stated: bool, path: Path) -> None:
    if given is not None and given != stated:
        raise CheckpointError(f"{path} says use_layernorm = {stated}, the caller says {given}; drop the argument")
