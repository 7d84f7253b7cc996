"""Numbers of a plan as C and CUDA spell them, for the generators of both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rfsq.export.errors import BuildInputError
from rfsq.export.plan import DecoderPlan
from rfsq.runtime.bundle.manifest import SIZE_LIMITS

_NUMBERS_A_LINE = 6
_MOST_LEVELS = SIZE_LIMITS["num_levels"][1]

Array = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


def table(kind: str, name: str, values: Array | IntArray) -> str:
    """A constant array of one or two dimensions. kind: what stands in front of its name."""
    shape = "".join(f"[{size}]" for size in values.shape)
    if values.ndim == 1:
        return f"{kind} {name}{shape} = {{\n{_lines(values, ' ' * 4)}\n}};"
    rows = ",\n".join(f"    {{\n{_lines(row, ' ' * 8)}\n    }}" for row in values)
    return f"{kind} {name}{shape} = {{\n{rows}\n}};"


def number(value: float) -> str:
    """A float32, exactly. Raises BuildInputError for what is none, or beyond it."""
    if not abs(float(value)) <= float(np.finfo(np.float32).max):
        raise BuildInputError(
            f"a constant of the tokenizer is {value:g}, which float32 does not hold; the training diverged"
        )
    return f"{float(np.float32(value)).hex()}f"


def require_countable(num_levels: int) -> None:
    """Raises BuildInputError where float32 cannot count the levels."""
    if num_levels > _MOST_LEVELS:
        raise BuildInputError(f"{num_levels} levels are more than float32 can count; expected at most {_MOST_LEVELS}")


def own_tokens(plan: DecoderPlan) -> Array | None:
    """Weights [D, l] where every latent depends on its own tokens alone, else None."""
    assert plan.latents is not None
    weight = plan.latents.weight.reshape(plan.latent_dim, plan.latent_dim, plan.prefix)
    if weight[~np.eye(plan.latent_dim, dtype=bool)].any():
        return None
    own: Array = weight[np.arange(plan.latent_dim), np.arange(plan.latent_dim)]
    return own


def _lines(values: Array | IntArray, indent: str) -> str:
    numbers = [str(value) if isinstance(value, np.integer) else number(value) for value in values]
    starts = range(0, len(numbers), _NUMBERS_A_LINE)
    return ",\n".join(indent + ", ".join(numbers[start : start + _NUMBERS_A_LINE]) for start in starts)
