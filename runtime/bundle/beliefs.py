"""What a policy's probabilities decode to: actions, how far they may be off, and how sure the mode is."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

#: What is made of probabilities (docs/beliefs.md).
BeliefMode = Literal["expected", "likeliest mode", "sample"]
BELIEF_MODES: tuple[BeliefMode, ...] = typing.get_args(BeliefMode)

#: By how much the sum of given probabilities may differ from 1: what a softmax in bfloat16 leaves.
SUM_TOLERANCE = 2.0**-8
#: The same of an engine. It sums in another order, and must refuse nothing that was checked before.
ENGINE_SUM_TOLERANCE = SUM_TOLERANCE + 2.0**-12

Array = TypeVar("Array")


@dataclass(frozen=True)
class BeliefKind:
    """What a policy gives. fingerprint: of the tokenizer whose tokens they are; form: distributions over tokens, or
    classes and bits; length: l, of how many layers or chunk tokens; coarse: layers that are the mode, 0 of chunk
    tokens."""

    fingerprint: str
    form: Literal["tokens", "classes and bits"]
    length: int
    coarse: int

    def __str__(self) -> str:
        """Without the fingerprint."""
        return f"{self.form}, l = {self.length}" + (
            f", the first {self.coarse} of them the mode" if self.coarse else ""
        )


@dataclass(frozen=True, eq=False)
class Belief(Generic[Array]):
    """Of B chunks.

    actions: [B, T, A] in physical units; std: [B, T, A], standard deviations of these, as the probabilities have them;
    mode_probability: [B], of the likeliest mode, whatever was decoded: of its class (chunk tokens), or of the least
    certain of its coarse tokens (per-step tokens); mode: integers, the class [B], or the coarse tokens [B, T, D, c],
    that were decoded, or are the likeliest where all were.
    """

    actions: Array
    std: Array
    mode_probability: Array
    mode: Array
