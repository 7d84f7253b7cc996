"""Whether a state dict belongs to the tokenizer of a bundle: by the fingerprint in it, or weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bundle.advice import quoted
from ..bundle.checkpoint_layouts import StateComparison, compare_state, is_grid, recorded_hashes
from .adapter_calls import Engines, is_plain

#: The only entry of the adapter's own state dict: the fingerprint's 32 bytes, as float32 numbers.
FINGERPRINT_KEY = "tokenizer_fingerprint"
#: Averaging the weights of policies averages these numbers too, and each may then be off by so much. All 32 numbers of
#: another fingerprint are so near with a chance of (9 / 256)^32.
_ROUNDING = 4


def compare_with(engines: Engines, state: Mapping[str, Any]) -> StateComparison:
    """How `state`, the adapter's own or a published one, differs from the bundle's."""
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and is_plain(value)}
    if len(tensors) < len(state):
        others = sorted(str(name) for name in state if name not in tensors)
        return _is_none(f"it is no state dict of plain tensors: {', '.join(others[:8])} are none")
    if FINGERPRINT_KEY in tensors:
        unexpected = tuple(sorted(tensors.keys() - {FINGERPRINT_KEY}))
        return StateComparison((), unexpected, differences_from(engines.numbers, tensors[FINGERPRINT_KEY]))
    hashes = recorded_hashes(engines.on_host.manifest)
    if hashes is None:
        return _is_none(
            "the bundle does not say which tensors it was built from: leave load_state_dict out, since the bundle "
            "brings its weights, or build it again"
        )
    grids = [value.dtype for name, value in tensors.items() if is_grid(name) and value.is_floating_point()]
    try:
        arrays = {name: value.detach().cpu().float().numpy() for name, value in tensors.items()}
    except RuntimeError as error:
        # Nested tensors, and types that torch stores but does not compute with.
        return _is_none(f"it is no state dict of plain tensors: {error}")
    resolution = max((torch.finfo(dtype).eps for dtype in grids), default=0.0)
    return compare_state(arrays, hashes, engines.model, resolution=resolution)


def differences_from(own: Tensor, numbers: Tensor) -> tuple[str, ...]:
    """How the numbers of a fingerprint differ from the bundle's own: one line, or none."""
    found = numbers.detach().cpu().float()
    if found.shape == own.shape and bool(((found - own).abs() <= _ROUNDING).all()):
        return ()
    levels = [round(number) if math.isfinite(number) else -1 for number in found.flatten().tolist()]
    if len(levels) != len(own) or not all(0 <= level <= 255 for level in levels):
        return (
            f"its {FINGERPRINT_KEY} holds none: the checkpoint is damaged, or of a policy without a tokenizer, and "
            "what loaded it has left this memory unwritten; then call reset_parameters() on the tokenizer",
        )
    return (f"it was saved with the tokenizer {bytes(levels).hex()}",)


def speaks_otherwise(engines: Engines, state: Mapping[str, Any]) -> bool:
    """Whether a published model with this state makes other tokens than the bundle."""
    is_published = FINGERPRINT_KEY not in state and "calibrated.mean" not in state
    return is_published and engines.model.mode == "calibrated"


def refusal(engines: Engines, problems: Sequence[str]) -> str:
    """The message for a state that is not the bundle's: what differs, and what to do."""
    model = engines.model
    lines = "\n".join(f"  {problem}" for problem in problems)
    data = " --data EPISODES" if model.mode in ("calibrated", "recovered") else ""
    given = f"--checkpoint FILE --conditioning {model.mode} --chunk-length {model.chunk_length}{data} --output DIR"
    return (
        f"this state is not shown to be what {engines.path} ({engines.fingerprint}) was built from:\n"
        f"{lines}\n"
        f"load the bundle that belongs to it, or build one: {quoted('build', given)}"
    )


def _is_none(problem: str) -> StateComparison:
    return StateComparison((), (), (problem,))
