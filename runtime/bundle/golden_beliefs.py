"""Golden vectors of beliefs: logits, and what the definition in float64 makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .array_file import Form
from .arrays import AnyArray, Float32Array, Float64Array
from .models import ChunkModel, ModelEntry
from .probabilities import Given

#: Chunks of them in a bundle.
NUM_BELIEFS = 8
#: What their arrays are called begins so.
PREFIX = "belief_"
#: In the order of the second axis of what is expected: whether the likeliest mode alone is decoded.
KEEPS_MODE = (False, True)


@dataclass(frozen=True, eq=False)
class BeliefCase:
    """One question, and its answer. given: logits of the first `prefix` layers or tokens; actions, std: float64
    [n, T, A]."""

    prefix: int
    keeps_mode: bool
    given: Given
    actions: Float64Array
    std: Float64Array


@dataclass(frozen=True, eq=False)
class GoldenBeliefs:
    """n chunks. given: logits float32 of all layers [n, T, D, L, K], or of classes [n, C] and code bits [n, bits].

    actions, std: float64 [P, 2, n, T, A] in physical units, for each of the P prefixes of `key_prefixes`, of all that
    is possible and of the likeliest mode; mode_probability: float64 [n].
    """

    given: Given
    actions: Float64Array
    std: Float64Array
    mode_probability: Float64Array

    def cases(self, model: ModelEntry) -> Iterator[BeliefCase]:
        """Every prefix in every mode."""
        for place, prefix in enumerate(model.key_prefixes):
            for keeps_mode in KEEPS_MODE:
                answers = self.actions[place, int(keeps_mode)], self.std[place, int(keeps_mode)]
                yield BeliefCase(prefix, keeps_mode, prefix_of(self.given, model, prefix), *answers)


def prefix_of(given: Given, model: ModelEntry, prefix: int) -> Given:
    """Of all layers or code bits those of a prefix, C-contiguous."""
    if isinstance(model, ChunkModel):
        classes, bits = given
        return classes, np.ascontiguousarray(bits[:, : prefix * model.token_bits - model.class_bits])
    return (np.ascontiguousarray(given[0][..., :prefix, :]),)


def belief_arrays(beliefs: GoldenBeliefs) -> dict[str, AnyArray]:
    """By their names in a file."""
    names = ("logits",) if len(beliefs.given) == 1 else ("classes", "bits")
    found = dict(zip(names, beliefs.given, strict=True)) | {
        name: getattr(beliefs, name) for name in ("actions", "std", "mode_probability")
    }
    return {f"{PREFIX}{name}": array for name, array in found.items()}


def beliefs_of(arrays: Mapping[str, AnyArray]) -> GoldenBeliefs | None:
    """The inverse of `belief_arrays`; None where there are none."""
    found = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    if not found:
        return None
    given = (found["logits"],) if "logits" in found else (found["classes"], found["bits"])
    return GoldenBeliefs(given, found["actions"], found["std"], found["mode_probability"])


def expected_belief_arrays(model: ModelEntry) -> dict[str, Form]:
    """By name."""
    count = NUM_BELIEFS
    answers = (len(model.key_prefixes), len(KEEPS_MODE), *model.actions_shape(count))
    given: dict[str, tuple[int, ...]]
    if isinstance(model, ChunkModel):
        given = {"classes": (count, model.num_classes), "bits": (count, model.code_bits)}
    else:
        given = {"logits": (*model.tokens_shape(count), model.vocabulary)}
    arrays: dict[str, Form] = {
        **{name: (np.float32, shape) for name, shape in given.items()},
        "actions": (np.float64, answers),
        "std": (np.float64, answers),
        "mode_probability": (np.float64, (count,)),
    }
    return {f"{PREFIX}{name}": entry for name, entry in arrays.items()}


def belief_problems(beliefs: GoldenBeliefs) -> Iterator[str]:
    """What no definition can have given: vectors that cannot fail test nothing."""
    if not all(_are_logits(part) for part in beliefs.given):
        yield "logits of beliefs that are no numbers, or infinite"
    if not np.isfinite(beliefs.actions).all():
        yield "actions of beliefs that are not finite"
    # A mode may be all that a prefix has.
    is_spread = (beliefs.std[:, KEEPS_MODE.index(False)] > 0).any(axis=(1, 2, 3))
    if not (np.isfinite(beliefs.std) & (beliefs.std >= 0)).all() or not is_spread.all():
        yield "deviations of beliefs that are negative, not finite, or all 0"
    if not ((beliefs.mode_probability > 0) & (beliefs.mode_probability <= 1)).all():
        yield "probabilities of modes that are not above 0 and at most 1"


def _are_logits(values: Float32Array) -> bool:
    return bool((values < np.inf).all())
