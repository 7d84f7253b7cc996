"""Beliefs that lie on the GPU already, and the calls of an `ActionTokenizer` on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from ...bundle.arrays import Float32Array
from ...bundle.belief_validation import BeliefValidator, check_mode
from ...bundle.beliefs import Belief, BeliefMode
from ...bundle.errors import InvalidInputError
from ...bundle.models import ModelEntry
from ..beliefs import BeliefQuestion, belief_backend, coarse_layers, mode_shape
from ..contract import Backend, BoundCall
from .arrays import FLOAT32, GpuArray, GpuResult, GpuStream, bindable, checked, gpu_input, gpu_output, stream_of

#: Actions, std, the mode's probability and the mode, as a caller passes them: all but the first may be None.
Outputs = tuple[object, object, object, object]
_NAMES = ("out", "std_out", "mode_probability_out", "mode_out")
_BoundQuestion = tuple["BeliefTerms", list[GpuArray], GpuStream]


@dataclass(frozen=True)
class BeliefTerms:
    """A question to a backend but for the numbers themselves.

    shapes: of what is given, without the batch; sharpness: float32, or nothing where all of it is 1; the rest as in
    `BeliefQuestion`. wanted: outputs beside the actions that are written: std, mode_probability, mode.
    """

    shapes: tuple[tuple[int, ...], ...]
    sharpness: bytes
    is_logits: bool
    keeps_mode: bool
    coarse: int
    wanted: tuple[bool, bool, bool]


def belief_terms(question: BeliefQuestion, others: Sequence[object]) -> BeliefTerms:
    """others: outputs beside the actions, None for what nobody wants."""
    has_std, has_probability, has_mode = (output is not None for output in others)
    return BeliefTerms(
        tuple(array.shape[1:] for array in question.given),
        b"" if (question.sharpness == 1).all() else question.sharpness.tobytes(),
        question.is_logits,
        question.keeps_mode,
        question.coarse,
        (has_std, has_probability, has_mode),
    )


class TakesGpuBeliefs(Protocol):
    """What a backend that decodes beliefs where they lie on the GPU has beside `DecodesBeliefs`.

    arrays: what is given, actions, and the outputs that are wanted. What is no distribution is marked: all actions and
    std of its chunk and its mode's probability become NaN, its mode -1.
    """

    def decode_belief_on_gpu(self, terms: BeliefTerms, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def bind_decode_belief(self, terms: BeliefTerms, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...


class GpuBeliefCalls:
    """Decodes beliefs where the arrays lie, on the caller's stream.

    Raises InvalidInputError where the backend decodes none, or those of numpy arrays alone.
    """

    def __init__(self, model: ModelEntry, backend: Backend) -> None:
        if not hasattr(type(belief_backend(backend)), "decode_belief_on_gpu"):
            raise InvalidInputError(
                f"the arrays lie on the GPU, and the backend {backend.name!r} decodes beliefs of numpy arrays alone; "
                "load the bundle with backend='cuda', or pass numpy arrays"
            )
        self._model, self._backend, self._validator = model, cast(TakesGpuBeliefs, backend), BeliefValidator(model)

    # What is given, and how.
    def decode(
        self, value: object, mode: BeliefMode, temperature: object, stream: object, *, is_logits: bool
    ) -> Belief[GpuResult]:
        """See `ActionTokenizer.decode_logits`."""
        given = self._given(value, is_logits=is_logits)
        own, batch, model = stream_of(stream, given), next(iter(given.values())).shape[0], self._model
        actions, std = (GpuResult(model.actions_shape(batch), FLOAT32, own) for _ in range(2))
        probability, chosen = GpuResult((batch,), FLOAT32, own), GpuResult(mode_shape(model, batch), np.int32, own)
        outputs = actions, std, probability, chosen
        source = tuple(given.values()) if len(given) > 1 else next(iter(given.values()))
        self.decode_into(source, outputs, mode, temperature, own, is_logits=is_logits)
        return Belief(*outputs)

    def decode_into(  # noqa: PLR0913  # what is given, into which arrays, and how
        self, value: object, outputs: Outputs, mode: object, temperature: object, stream: object, *, is_logits: bool
    ) -> None:
        """Into arrays of the GPU."""
        terms, arrays, own = self._question(value, outputs, mode, temperature, stream, is_logits=is_logits)
        if arrays[0].shape[0]:
            self._backend.decode_belief_on_gpu(terms, arrays, own)

    def bind(  # noqa: PLR0913  # as above
        self, value: object, outputs: Outputs, mode: object, temperature: object, stream: object, *, is_logits: bool
    ) -> BoundCall:
        """`decode_into`, captured."""
        terms, arrays, own = self._question(value, outputs, mode, temperature, stream, is_logits=is_logits)
        return self._backend.bind_decode_belief(terms, *bindable((arrays, own)))

    def _question(  # noqa: PLR0913  # as above
        self, value: object, outputs: Outputs, mode: object, temperature: object, stream: object, *, is_logits: bool
    ) -> _BoundQuestion:
        if isinstance(mode, str) and mode == "sample":
            raise InvalidInputError(
                "mode is 'sample', and the arrays lie on the GPU; expected 'expected' or 'likeliest mode': samples are "
                "drawn of numpy arrays alone"
            )
        check_mode(mode, None)
        given = self._given(value, is_logits=is_logits)
        arrays, model = tuple(given.values()), self._model
        sharpness = self._validator.sharpness(temperature, cast(tuple[Float32Array, ...], arrays))
        if not is_logits and (sharpness != 1).any():
            raise InvalidInputError(
                "a temperature was given for probabilities on the GPU, where logits alone take one; pass their "
                "logarithms to decode_logits"
            )
        batch = arrays[0].shape[0]
        actions = model.actions_shape(batch)
        shapes, types = (actions, actions, (batch,), mode_shape(model, batch)), ("float32",) * 3 + ("int32",)
        named: dict[str, GpuArray] = dict(given)
        for name, output, shape, dtype in zip(_NAMES, outputs, shapes, types, strict=True):
            if output is not None or name == _NAMES[0]:
                named[name] = gpu_output(name, output, (np.dtype(dtype),), shape)
        question = BeliefQuestion(
            cast(Any, arrays), sharpness, is_logits, mode == "likeliest mode", coarse_layers(model)
        )
        return belief_terms(question, outputs[1:]), *checked(named, stream)

    def _given(self, value: object, *, is_logits: bool) -> dict[str, GpuArray]:
        """By their names in messages."""
        name = "logits" if is_logits else "probabilities"
        if self._validator.is_pair(name, value):
            parts = zip(("classes", "bits"), cast(tuple[object, ...], value), strict=True)
            pair = {part: gpu_input(part, array, (FLOAT32,)) for part, array in parts}
            self._validator.check_pair(pair["classes"].shape, pair["bits"].shape)
            return pair
        found = gpu_input(name, value, (FLOAT32,))
        self._validator.check_distributions(name, found.shape)
        return {name: found}
