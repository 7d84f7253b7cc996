"""What a policy believes, decoded: probabilities or logits of tokens to actions and how far these may be off."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from .backends.beliefs import BeliefAnswer, BeliefQuestion, belief_backend, coarse_layers, mode_shape
from .backends.contract import Backend
from .bundle.arrays import AnyArray, Float32Array, Float64Array, Int32Array
from .bundle.belief_validation import BeliefValidator, check_mode
from .bundle.beliefs import Belief, BeliefMode
from .bundle.errors import IllegalValueError
from .bundle.models import ChunkModel, ModelEntry
from .bundle.probabilities import (
    Given,
    chunk_probabilities,
    class_of_tokens,
    distributions,
    drawn,
    logits_of,
    one_hot,
    tokens_of,
)
from .bundle.validation import CheckedPair, InputValidator

#: Actions, std, the mode's probability and the mode, as a caller passes them: all but the first may be None.
Outputs = tuple[object, object, object, object]


@dataclass(frozen=True, eq=False)
class _HeldCall:
    """A call whose arrays were checked, to be known when they come again: a control loop's do.

    terms: all that is no array; pairs: of every input with an output; of the question: all but what is given.
    """

    terms: tuple[Any, ...]
    pairs: tuple[CheckedPair, ...]
    sharpness: Float32Array
    is_logits: bool
    keeps_mode: bool

    def is_of(self, given: tuple[Any, ...], outputs: Outputs) -> bool:
        """Whether these are the arrays, as they were."""
        pairs = _paired(given, outputs)
        return len(pairs) == len(self.pairs) and all(
            known.is_of(*pair) for known, pair in zip(self.pairs, pairs, strict=True)
        )


class BeliefDecoder:
    """Decodes beliefs on the backend of one tokenizer. decode: the tokenizer's own, for samples.

    Raises InvalidInputError where the backend decodes none.
    """

    def __init__(self, model: ModelEntry, backend: Backend, decode: Callable[[Int32Array], Float32Array]) -> None:
        self._model, self._decode, self._coarse = model, decode, coarse_layers(model)
        self._validator, self._outputs = BeliefValidator(model), InputValidator(model)
        self._backend = belief_backend(backend)
        self._unchecked_chunks = backend.checked_steps // model.chunk_length
        self._held: _HeldCall | None = None

    def decode(
        self, value: object, mode: BeliefMode, temperature: object, seed: int | None, *, is_logits: bool
    ) -> Belief[AnyArray]:
        """See `ActionTokenizer.decode_probabilities`."""
        check_mode(mode, seed)
        question = self._question(value, mode, temperature, is_logits=is_logits, unchecked=0)
        if mode == "sample":
            return self._sampled(question, np.random.default_rng(seed))
        return self._asked(question)

    def decode_into(
        self, value: object, outputs: Outputs, mode: BeliefMode, temperature: object, *, is_logits: bool
    ) -> None:
        """See `ActionTokenizer.decode_probabilities_into`."""
        is_pair = isinstance(value, tuple)
        held, given = self._held, cast(tuple[Any, ...], value if is_pair else (value,))
        unwanted = tuple([out is None for out in outputs])
        terms = (is_logits, mode, temperature, unwanted, is_pair and len(given))
        # Others, such as arrays, compare by rules of their own.
        is_plain = type(mode) is str and (type(temperature) is float or _are_floats(temperature))
        if held is not None and is_plain and held.terms == terms and held.is_of(given, outputs):
            # Their forms were checked a call ago.
            question = BeliefQuestion(given, held.sharpness, held.is_logits, held.keeps_mode, self._coarse)
            self._run(question, BeliefAnswer(*outputs))  # type: ignore[arg-type]  # they are arrays that it knows
            return
        check_mode(mode, None, can_draw=False)
        question = self._question(value, mode, temperature, is_logits=is_logits, unchecked=self._unchecked_chunks)
        # The inputs as they were given: a copy that validation made shares no memory with anything.
        self._run(question, self._checked(cast(Given, given), outputs, question.batch))
        if is_plain and question.batch <= self._unchecked_chunks and all(map(operator.is_, question.given, given)):
            pairs = tuple(CheckedPair(*pair) for pair in _paired(given, outputs))
            self._held = _HeldCall(terms, pairs, question.sharpness, question.is_logits, question.keeps_mode)

    def _question(
        self, value: object, mode: BeliefMode, temperature: object, *, is_logits: bool, unchecked: int
    ) -> BeliefQuestion:
        """Validated. Other temperatures than 1 make logits of probabilities."""
        given = self._validator.given(value, is_logits=is_logits, unchecked=unchecked)
        sharpness = self._validator.sharpness(temperature, given)
        if not is_logits and (sharpness != 1).any():
            self._validator.check_values(given, is_logits=False)
            given, is_logits = logits_of(given), True
        return BeliefQuestion(given, sharpness, is_logits, mode == "likeliest mode", self._coarse)

    def _checked(self, given: Given, outputs: Outputs, batch: int) -> BeliefAnswer:
        """Arrays that can be written into; all but the first, where they are wanted."""
        actions, names = self._model.actions_shape(batch), ("out", "std_out", "mode_probability_out", "mode_out")
        shapes = actions, actions, (batch,), mode_shape(self._model, batch)
        found: list[AnyArray | None] = []
        for name, out, shape in zip(names, outputs, shapes, strict=True):
            if out is None and found:
                found.append(None)
            else:
                others = (array for array in found if array is not None)
                kind = np.int32 if name == "mode_out" else np.float32
                found.append(self._outputs.output(name, out, kind, shape, *given, *others))
        return BeliefAnswer(*found)  # type: ignore[arg-type]  # the first is never None

    def _asked(self, question: BeliefQuestion) -> Belief[AnyArray]:
        """All that a backend says, in new arrays."""
        batch, model = question.batch, self._model
        actions, std = (np.empty(model.actions_shape(batch), np.float32) for _ in range(2))
        mode_probability, mode = np.empty(batch, np.float32), np.empty(mode_shape(model, batch), np.int32)
        self._run(question, BeliefAnswer(actions, std, mode_probability, mode))
        return Belief(actions, std, mode_probability, mode)

    def _run(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        if not question.batch:
            return
        try:
            self._backend.decode_belief_into(question, answer)
        except IllegalValueError:
            # Raises an error that names the value and its place.
            self._validator.check_values(question.given, is_logits=question.is_logits)
            raise

    def _sampled(self, question: BeliefQuestion, random: np.random.Generator) -> Belief[AnyArray]:
        """Tokens that were drawn, decoded; std: of what they leave open within their mode."""
        if isinstance(self._model, ChunkModel):
            tokens, mode, mode_probability, known = self._drawn_chunks(self._model, question, random)
        else:
            tokens, mode, mode_probability, known = self._drawn_steps(question, random)
        size = known[0].shape[-2] if len(known) == 1 else 1 + known[1].shape[1]
        within = BeliefQuestion(known, np.ones(size, np.float32), False, False, self._coarse)
        return Belief(self._decode(tokens), self._asked(within).std, mode_probability.astype(np.float32), mode)

    def _drawn_steps(
        self, question: BeliefQuestion, random: np.random.Generator
    ) -> tuple[Int32Array, Int32Array, Float64Array, Given]:
        """Tokens [B, T, D, l], the mode that they are of, the likeliest one's probability, and what is known when the
        mode is."""
        found = distributions(question.given[0], question.sharpness, is_logits=question.is_logits)
        tokens, coarse = drawn(found, random), self._coarse
        mode = np.ascontiguousarray(tokens[..., :coarse])
        mode_probability = found[..., :coarse, :].max(axis=-1).min(axis=(1, 2, 3))
        known = found.astype(np.float32)
        known[..., :coarse, :] = one_hot(mode, self._model.vocabulary)
        return tokens, mode, mode_probability, (known,)

    def _drawn_chunks(
        self, model: ChunkModel, question: BeliefQuestion, random: np.random.Generator
    ) -> tuple[Int32Array, Int32Array, Float64Array, Given]:
        """The same of chunk tokens [B, l]. A token is drawn whole where its distribution is given."""
        given, is_logits = question.given, question.is_logits
        found = chunk_probabilities(given, question.sharpness, model, is_logits=is_logits)
        if len(given) == 1:
            tokens = drawn(distributions(given[0], question.sharpness, is_logits=is_logits), random)
            mode = class_of_tokens(tokens, model)
            ones = found.of_class(mode)[:, 1]
        else:
            mode = drawn(found.classes, random)
            ones = found.of_class(mode)[:, 1]
            tokens = tokens_of(mode, random.random(ones.shape) < ones, model)
        known = one_hot(mode, model.num_classes), ones.astype(np.float32)
        return tokens, mode, found.classes.max(axis=1), known


def _are_floats(temperature: object) -> bool:
    return type(temperature) is tuple and set(map(type, temperature)) == {float}


def _paired(given: tuple[Any, ...], outputs: Outputs) -> list[tuple[Any, Any]]:
    """Pairs of an input and an output that is wanted, until each was in one. Actions always are."""
    wanted = [outputs[0], *(out for out in outputs[1:] if out is not None)]
    count = max(len(given), len(wanted))
    return [(given[min(place, len(given) - 1)], wanted[min(place, len(wanted) - 1)]) for place in range(count)]
