"""Where a training script has left the model in its checkpoint, whatever was wrapped around it; names alone decide.

`torch.compile`, DDP, FSDP, Lightning and averages of weights put the published names behind others, in any order and
depth, and keep more than one model in a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

#: Where the model itself is looked for, in this order, "" being the file: the default where averages lie beside it.
DEFAULTS = ("model_state_dict", "model", "state_dict", "")

# Put anywhere into a name by torch.compile, FSDP and activation checkpointing, and never by a person.
_INVISIBLE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Of DDP and Lightning, and said by so many that they name nothing.
_WRAPPERS = {"module", "model"}
_TENSOR = re.compile(
    r"(?:encoder|decoder)\.[0-9]+\.(?:weight|bias)|rfsq\.layers\.[^.]+\.(?:boundaries|layernorm\.(?:weight|bias))"
)
_STARTS = {"encoder", "decoder", "rfsq"}
# Counters that averages of weights keep beside them.
_COUNTERS = {"n_averaged", "initted", "step"}
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|shadow|teacher|averaged?)(?:$|[._])", re.IGNORECASE)
# `callbacks`, the callback, its state, the names in it.
_DEPTH = 4


@dataclass(frozen=True)
class FoundState:
    """One model in a file. label: where it lies, as `--weights` names it, "" for the file itself.

    tensors: by their published names; dropped: what stood around these in the file; others: what lies beside the model
    in the same dict and is no part of it; counters: names of others that only count.
    """

    label: str
    tensors: Mapping[str, Any]
    dropped: tuple[str, ...]
    others: Mapping[str, Any]
    counters: tuple[str, ...]


def is_average(name: object) -> bool:
    """Whether people call an average of weights so."""
    return _AVERAGE.search(str(name)) is not None


def is_tensor_name(name: object) -> bool:
    """Whether this is a published name, whatever was put around it."""
    return isinstance(name, str) and _split(name) is not None


def find_states(content: Mapping[Any, Any]) -> tuple[list[FoundState], list[FoundState]]:
    """Every model in what a training script saved, in the order of the file, labels differ; and what is none.

    Where a model has grids, what lies in another dict without is none: whatever has an encoder would count.
    """
    found = list(_states(content, (), set()))
    short = [".".join((*path, *(part for part in owner if part not in _WRAPPERS))) for path, owner, _ in found]
    states = [
        replace(state, label=label if short.count(label) == 1 else ".".join((*path, *owner)))
        for (path, owner, state), label in zip(found, short, strict=True)
    ]
    gridless = [state for state in states if not _has_grids(state.tensors)]
    models = [state for state in states if _has_grids(state.tensors)]
    return (models, gridless) if models else (states, [])


def states_in(content: Mapping[str, Any], weights: str | None = None) -> list[Mapping[str, Any]]:
    """The states that the model may be in, by published names; more than one must all be the same.

    weights: the label that a build has taken, None where it took the model itself.
    """
    found, _ = find_states(content)
    chosen = [state for state in found if state.label == weights]
    chosen = chosen or [state for state in found if state.label in DEFAULTS] or found
    if chosen:
        return [{**state.tensors, **state.others} for state in chosen]
    return [content[key] for key in DEFAULTS if isinstance(content.get(key), Mapping)] or [content]


def _states(
    content: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], FoundState]]:
    """Place in the file, place in the names, and the model there; every dict is looked at once."""
    seen.add(id(content))
    models: dict[tuple[str, ...], dict[str, str]] = {}
    dropped: dict[tuple[str, ...], set[str]] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            if len(path) < _DEPTH and id(value) not in seen:
                yield from _states(value, (*path, str(name)), seen)
        elif isinstance(name, str) and (parts := _split(name)) is not None:
            owner, published, around = parts
            # Of two spellings of one name the second is left over, and refused with what is not known.
            models.setdefault(owner, {}).setdefault(published, name)
            dropped.setdefault(owner, set()).add(around)
    # Beside a model with grids, another spelling of its names is left over like everything else that is not known.
    models = {owner: names for owner, names in models.items() if _has_grids(names)} or {
        owner: names for owner, names in models.items() if "encoder.0.weight" in names
    }
    taken = {name for names in models.values() for name in names.values()}
    rest = {str(name): value for name, value in content.items() if name not in taken and not isinstance(value, Mapping)}
    counters = tuple(sorted(name for name in rest if name.rpartition(".")[2] in _COUNTERS))
    others = {name: value for name, value in rest.items() if name not in counters}
    for owner, names in models.items():
        tensors = {published: content[name] for published, name in names.items()}
        # What the file itself calls by a published name is not to be taken for the tensor that has it now.
        beside = {f"{name} (a second one)" if name in tensors else name: value for name, value in others.items()}
        yield path, owner, FoundState("", tensors, tuple(sorted(dropped[owner] - {""})), beside, counters)


def _has_grids(names: Iterable[str]) -> bool:
    return any(name.startswith("rfsq.") for name in names)


def _split(name: str) -> tuple[tuple[str, ...], str, str] | None:
    """The model that a name belongs to, the published name, and what stood around it; None for no tensor of ours."""
    parts = [part for part in name.split(".") if part not in _INVISIBLE]
    for start in (index for index, part in enumerate(parts) if part in _STARTS):
        published = ".".join(part for part in parts[start:] if part != "module")
        if _TENSOR.fullmatch(published):
            left = published.split(".")
            around = [part for part in name.split(".") if not (left and part == left[0] and left.pop(0))]
            return tuple(parts[:start]), published, ".".join(around)
    return None
