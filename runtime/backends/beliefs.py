"""The contract of backends that decode probabilities of tokens, not tokens alone."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from ..bundle.arrays import Float32Array, Int32Array
from ..bundle.errors import InvalidInputError
from ..bundle.models import ModelEntry

# Tuples, because a control loop makes both for every chunk: a frozen dataclass takes a microsecond.


class BeliefQuestion(NamedTuple):
    """What is given of tokens, and how it is taken. Arrays are C-contiguous float32.

    given: tokens' distributions alone, [B, T, D, l, K] or [B, l, V], or classes [B, C] and bits [B, n]; sharpness: 1 /
    temperature of each layer [l], token [l], or class and bit [1 + n]; is_logits: else probabilities, which have a
    sharpness of 1 and are divided by their sum; keeps_mode: whether the likeliest mode alone is decoded; coarse: layers
    that are the mode, of per-step tokens (0 for chunk tokens).
    """

    given: tuple[Float32Array, ...]
    sharpness: Float32Array
    is_logits: bool
    keeps_mode: bool
    coarse: int

    @property
    def batch(self) -> int:
        """How many chunks."""
        return len(self.given[0])


class BeliefAnswer(NamedTuple):
    """C-contiguous arrays to write into; None for what nobody wants.

    actions, std: float32 [B, T, A]; mode_probability: float32 [B], of the likeliest mode; mode: int32, the likeliest
    classes [B], or coarse tokens [B, T, D, c], which are what is decoded where the mode alone is.
    """

    actions: Float32Array
    std: Float32Array | None = None
    mode_probability: Float32Array | None = None
    mode: Int32Array | None = None


def plain_question(
    given: tuple[Float32Array, ...], model: ModelEntry, *, is_logits: bool, keeps_mode: bool
) -> BeliefQuestion:
    """With a temperature of 1."""
    size = given[0].shape[-2] if len(given) == 1 else 1 + given[1].shape[1]
    return BeliefQuestion(given, np.ones(size, np.float32), is_logits, keeps_mode, coarse_layers(model))


class DecodesBeliefs(Protocol):
    """A backend that decodes probabilities; beside `Backend`, whose promises on threads, signals and fork hold here."""

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        """Probabilities that are all 0 or 1 give exactly what `decode_into` gives, and a std of 0.

        The caller has validated all values, except in calls of at most `checked_steps` steps: there the backend raises
        IllegalValueError, with nothing written. Raises InferenceError where the library fails.
        """


def mode_shape(model: ModelEntry, batch: int) -> tuple[int, ...]:
    """Of the mode of so many chunks."""
    return model.tokens_shape(batch, coarse_layers(model)) if model.token_grid else (batch,)


def coarse_layers(model: ModelEntry) -> int:
    """How many layers of per-step tokens are the mode: the fewest that decode. 0 for chunk tokens, whose class is."""
    return model.prefixes[0] if model.token_grid else 0


def decodes_beliefs(backend: Any) -> bool:
    """Whether this backend of this bundle decodes probabilities."""
    # Of the class: a wrapper that hands unknown names on is judged itself, and not what it wraps.
    return hasattr(type(backend), "decode_belief_into") and getattr(backend, "has_beliefs", True)


def belief_backend(backend: Any) -> DecodesBeliefs:
    """The backend, as one that decodes probabilities. Raises InvalidInputError for any other."""
    if not decodes_beliefs(backend):
        raise InvalidInputError(
            f"the backend {backend.name!r} of this bundle decodes no probabilities: the bundle was built before there "
            "was a decoder of them, or this backend has none; build the bundle again, or load it with "
            "backend='c' or backend='onnxruntime'"
        )
    return cast(DecodesBeliefs, backend)
