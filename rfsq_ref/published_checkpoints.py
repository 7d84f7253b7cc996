"""Checkpoints as others write them: torch files and bare safetensors, whatever was wrapped around the model.

Torch files are read with `weights_only=True`, so a pickle that wants to run code is refused by torch itself. The
published module names are `encoder.0/2`, `rfsq.layers.N.boundaries`, `decoder.0/2`; the published config calls the
latent dimension `hidden_dim`.
"""

import io
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.errors import CheckpointError, SettingsError
from rfsq.rfsq_ref.left_statistics import left_statistics
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.tensor_files import DamagedFileError, load_torch
from rfsq.runtime.bundle.checkpoint_layouts import GRID_NAME, GRID_TOLERANCE, UNUSED_NAME, WEIGHTS_KEY, weight_shapes
from rfsq.runtime.bundle.checkpoint_states import DEFAULTS, FoundState, find_states, is_average, is_tensor_name
from rfsq.runtime.bundle.paths import shortlist, shown

#: Facts beside the weights that become provenance.
_FACTS = ("epoch", "train_mse", "mse")


def read_torch(data: bytes, path: Path) -> Mapping[Any, Any]:
    """The dict that torch.save wrote. Raises CheckpointError for anything else, and for a pickle that runs code."""
    try:
        content = load_torch(io.BytesIO(data))
    except DamagedFileError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy or download it again") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is not a plain weights file (it holds objects that only running code could "
            "rebuild, or is no checkpoint at all). Save the state dict alone and try again. "
            f"Reason: {_reason(error)}"
        ) from error
    # The parser raises nearly anything on damaged bytes: RuntimeError, EOFError, KeyError, struct.error, ...
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint torch can read; expected a file written by torch.save, or a .safetensors file "
            f"under that suffix: check that it is the right file and whole ({_reason(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict or a dict with one")
    return content


def published_model(
    content: Mapping[Any, Any], path: Path, use_layernorm: bool | None, weights: str | None
) -> tuple[ModelConfig, Conditioning, dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Sizes, conditioning of the training, weights, provenance and remarks of the model in a file.

    weights: its label, where there are several. Raises CheckpointError.
    """
    state, remarks = _choose(content, path, weights)
    for name, tensor in state.tensors.items():
        _check_stored(name, tensor, path)
    tensors = dict(state.tensors)
    stated = {} if state.label == "" else _stated(content, path)
    config = _infer_config(tensors, stated, path)
    _take_grids(tensors, config, path)
    unused = sorted(name for name in tensors if UNUSED_NAME.fullmatch(name))
    for name in unused:
        del tensors[name]
    if unused:
        remarks.append(f"{len(unused)} layernorm parameters ignored: the published forward pass never uses them")
    taken = take_weights(tensors, config, path)
    # Around a model that was asked for by its label there may be the rest of a policy.
    require_known(tensors if weights is not None else {**tensors, **state.others}, path)
    if weights is not None and state.others:
        remarks.append(f"{len(state.others)} tensors around these weights not taken: {shortlist(sorted(state.others))}")
    left = left_statistics(content, config.action_dim)
    if left:
        remarks.append(
            f"not taken, though it may be a normaliser of the actions: {shortlist(left)}; where the model was trained "
            "behind it, write it as JSON (kind, offset, scale) and give that with --normaliser"
        )
    trained_with = _training_conditioning(stated.get("use_layernorm"), use_layernorm, path)
    provenance = {key: content[key] for key in _FACTS if state.label != "" and _is_fact(content.get(key))}
    if weights is not None or state.label not in DEFAULTS:
        provenance[WEIGHTS_KEY] = state.label
    return config, trained_with, taken, provenance, tuple(remarks)


def _is_fact(value: object) -> bool:
    """A number that JSON can keep: neither infinite nor of a thousand digits."""
    return isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max


def _choose(content: Mapping[Any, Any], path: Path, wanted: str | None) -> tuple[FoundState, list[str]]:
    """The state to take, and remarks on the choice. Raises CheckpointError."""
    found, gridless = find_states(content)
    if wanted is not None:
        state = _named(found, wanted, path)
    elif found:
        state = _default(found, path)
    else:
        state = _unrecognised(content, path)
    entries = {**state.tensors, **state.others}
    if not all(isinstance(value, Tensor) for value in entries.values()):
        others = [name for name, value in entries.items() if not isinstance(value, Tensor)]
        raise CheckpointError(
            f"{path} has no state dict of tensors; found the keys {_listed(entries)}, of which {_listed(others)} are "
            "none"
        )
    return state, list(_remarks(content, found, gridless, state))


def _named(found: Sequence[FoundState], wanted: str, path: Path) -> FoundState:
    exact = [state for state in found if state.label == wanted]
    matching = exact or [state for state in found if state.label.endswith(f".{wanted}")]
    if len(matching) != 1:
        labels = ", ".join(repr(state.label) for state in found) or "none"
        raise CheckpointError(
            f"{path} has {len(matching)} models under {wanted!r}; it has the weights {labels}: name one of them with "
            "--weights, or leave it out"
        )
    return matching[0]


def _default(found: list[FoundState], path: Path) -> FoundState:
    """The model itself, by the names in DEFAULTS; else the only one that is no average; else the only average."""
    usual = sorted((state for state in found if state.label in DEFAULTS), key=lambda state: DEFAULTS.index(state.label))
    for other in usual[1:]:
        if not _is_same(usual[0], other):
            raise CheckpointError(
                f"{path} holds both {_shown(usual[0])} and {_shown(other)}, and they differ: it is not clear which "
                "one was trained. Choose with --weights, or save the file with one of them"
            )
    plain = [state for state in found if not is_average(state.label)]
    candidates = usual[:1] or plain or found
    if len(candidates) > 1:
        labels = ", ".join(repr(state.label) for state in candidates)
        raise CheckpointError(f"{path} holds {len(candidates)} models: {labels}; choose one of them with --weights")
    return candidates[0]


def _unrecognised(content: Mapping[Any, Any], path: Path) -> FoundState:
    """A state in which no model was recognised. The checks that follow say what is wrong with it."""
    key = next((key for key in DEFAULTS if key in content), "")
    state = content[key] if key else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} has no state dict of tensors; found the keys {_listed(content)}")
    return FoundState(key, dict(state), (), {}, ())


def _remarks(
    content: Mapping[Any, Any], found: Sequence[FoundState], gridless: Sequence[FoundState], state: FoundState
) -> Iterator[str]:
    others = [other for other in found if other is not state]
    for other in others:
        if _is_same(state, other):
            yield f"holds both {_shown(state)} and {_shown(other)}, with equal tensors"
    different = [other for other in others if not _is_same(state, other)]
    if different:
        names = next((f"; --weights {other.label} takes those" for other in different if other.label), "")
        yield f"weights taken: {_shown(state)}; not taken: {', '.join(map(_shown, different))}{names}"
    elif is_average(state.label):
        yield f"weights taken: {_shown(state)}, an average over the training by its name, and the only model here"
    if gridless:
        yield f"not taken, for they have no quantiser: {', '.join(map(_shown, gridless))}"
    # Some averages are kept as a list without names.
    nameless = [
        key
        for key in content
        if is_average(key)
        and not is_tensor_name(key)
        and not any(f"{entry.label}.".startswith(f"{key}.") for entry in (*found, *gridless))
    ]
    if nameless and state.label != "":
        yield f"{_listed(nameless)} not taken: no tensors in it have the names of this model"
    if state.dropped:
        yield f"taken off the names of tensors: {shortlist(repr(around) for around in state.dropped)}"
    if state.counters:
        yield f"counters beside the weights ignored: {', '.join(state.counters)}"


def _shown(state: FoundState) -> str:
    return repr(state.label) if state.label else "the file itself"


def _listed(names: Iterable[object]) -> str:
    return f"[{shortlist(repr(str(name)) for name in names)}]"


def _stated(content: Mapping[Any, Any], path: Path) -> Mapping[str, Any]:
    """The config beside the weights. Of Lightning's `hyper_parameters`, which are the training's, one entry."""
    given = content.get("hyper_parameters")
    hyper_parameters = given if isinstance(given, Mapping) else {}
    config = content.get("config", hyper_parameters.get("config"))
    if config is None:
        return {name: hyper_parameters[name] for name in ("use_layernorm",) if name in hyper_parameters}
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path} has a config of type {type(config).__name__}; expected a dict")
    return config


def _is_same(first: FoundState, second: FoundState) -> bool:
    ours, theirs = ({**state.tensors, **state.others} for state in (first, second))
    return ours.keys() == theirs.keys() and all(
        isinstance(tensor, Tensor)
        and isinstance(theirs[name], Tensor)
        and theirs[name].dtype is tensor.dtype
        and theirs[name].layout is tensor.layout
        and theirs[name].device == tensor.device
        and torch.equal(theirs[name], tensor)
        for name, tensor in ours.items()
    )


def _reason(error: Exception) -> str:
    """One line of torch's message: the one that says what is unsupported, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "unsupported" in line.lower()] or lines or ["no message"]
    return telling[0][:200]


def _check_stored(name: str, tensor: Tensor, path: Path) -> None:
    """Raises CheckpointError for a tensor that is not plain numbers in the file; checks of others cost little."""
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        names = {"meta": tensor.is_meta, "nested": tensor.is_nested, "quantised": tensor.is_quantized}
        kind = next((name for name, is_so in names.items() if is_so), str(tensor.layout))
        raise CheckpointError(
            f"{path}: {name!r} is a {kind} tensor; expected plain numbers: save the state dict of the dense model"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name!r} has shape {tuple(tensor.shape)}, more numbers than the file holds for it; save a "
            "contiguous copy"
        )


def _infer_config(tensors: Mapping[str, Any], stated: Mapping[str, Any], path: Path) -> ModelConfig:
    """The sizes, by the shapes of the tensors. Raises CheckpointError where a stated config says otherwise."""
    first, second = tensors.get("encoder.0.weight"), tensors.get("encoder.2.weight")
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        raise CheckpointError(
            f"{path} is not an RFSQ autoencoder: 'encoder.0.weight' and 'encoder.2.weight' are missing or not "
            f"matrices; found {_listed(sorted(tensors))}"
        )
    layers = sorted(int(match[1]) for name in tensors if (match := GRID_NAME.fullmatch(name)))
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
    except SettingsError as error:
        raise CheckpointError(f"{path} is not an RFSQ autoencoder: {error}") from error
    # The published config calls the latent dimension `hidden_dim`.
    found = {**asdict(inferred), "hidden_dim": inferred.latent_dim}
    for name in ("action_dim", "hidden_dim", "num_layers", "num_levels"):
        value = stated.get(name, found[name])
        if type(value) is not int:
            raise CheckpointError(
                f"{path}: its config has a {type(value).__name__} as {name}; expected the integer {found[name]}, which "
                "its tensors have: save the config with plain numbers"
            )
        if value != found[name]:
            raise CheckpointError(
                f"{path}: its config says {name} = {shown(value)}, its tensors have {found[name]}; the file was put "
                "together from two models"
            )
    return inferred


def _take_grids(tensors: dict[str, Any], config: ModelConfig, path: Path) -> None:
    expected = torch.linspace(-1, 1, config.num_levels)
    for layer in range(config.num_layers):
        name = f"rfsq.layers.{layer}.boundaries"
        grid = tensors.pop(name).detach()
        if grid.shape != expected.shape or not grid.is_floating_point():
            raise CheckpointError(
                f"{path}: the grid of layer {layer} is of shape {tuple(grid.shape)} and type {grid.dtype}; expected "
                f"linspace(-1, 1, {config.num_levels}) as floating-point numbers"
            )
        # A model saved in half precision has the grid rounded to it.
        deviation = float((_as_double(name, grid, path) - expected.to(grid.dtype).double()).abs().max())
        if not deviation <= GRID_TOLERANCE:
            raise CheckpointError(
                f"{path}: the grid of layer {layer} is off by {deviation:.3g}; expected linspace(-1, 1, "
                f"{config.num_levels}), the only grid this project decodes"
            )


def require_known(left: Mapping[str, object], path: Path) -> None:
    """Raises CheckpointError where tensors are left that nothing has taken."""
    if left:
        raise CheckpointError(f"{path} has tensors this code does not know: {_listed(sorted(left))}")


def take_weights(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """The autoencoder's, out of all tensors of a file, by their published names. Raises CheckpointError."""
    shapes = weight_shapes(config.action_dim, config.latent_dim, config.hidden_width)
    return {name: take(tensors, name, shape, path) for name, shape in shapes.items()}


def take(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path, dtype: torch.dtype = torch.float32
) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{path} lacks the tensor {name!r}; it is incomplete or of another model")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {name!r} has shape {tuple(tensor.shape)}; expected {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {name!r} has type {tensor.dtype}; expected floating point")
    stored = _as_double(name, tensor.detach(), path)
    taken = stored.to(dtype)
    if not torch.isfinite(stored).all():
        bad = int((~torch.isfinite(stored)).sum())
        raise CheckpointError(f"{path}: {name!r} has {bad} values that are NaN or infinite; the training diverged")
    if not torch.isfinite(taken).all():
        bad = int((~torch.isfinite(taken)).sum())
        raise CheckpointError(
            f"{path}: {name!r} has {bad} values beyond {dtype}, up to {float(stored.abs().max()):.3g}, which "
            f"{tensor.dtype} can hold; expected weights of a model that runs in {dtype}: train it in that type"
        )
    return taken


def _as_double(name: str, tensor: Tensor, path: Path) -> Tensor:
    """As float64: for some types of 8 bits torch cannot tell infinities from numbers. Raises CheckpointError."""
    try:
        return tensor.double()
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: {name!r} has type {tensor.dtype}, which torch does not compute with; save it as float32"
        ) from error


def _training_conditioning(stated: Any, given: bool | None, path: Path) -> Conditioning:
    if stated is None and given is None:
        raise CheckpointError(
            f"{path} does not say whether it was trained with normalised residuals (Robust RFSQ) or without, and its "
            "tensors look the same either way; pass use_layernorm (--use-layernorm or --no-use-layernorm)"
        )
    if stated is not None and not isinstance(stated, bool):
        found = shown(stated) if isinstance(stated, str | int | float) else f"a {type(stated).__name__}"
        raise CheckpointError(f"{path}: its config says use_layernorm = {found}; expected True or False")
    if stated is not None:
        check_agreement(given, stated, path)
    return Conditioning.DYNAMIC if (given if stated is None else stated) else Conditioning.NONE


def check_agreement(given: bool | None, stated: bool, path: Path) -> None:
    if given is not None and given != stated:
        raise CheckpointError(f"{path} says use_layernorm = {stated}, the caller says {given}; drop the argument")
