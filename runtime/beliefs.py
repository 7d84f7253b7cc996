"""What a policy believes, decoded: probabilities or logits of tokens to actions and how far these may be off."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from .backends.beliefs import BeliefAnswer, BeliefQuestion, belief_backend, coarse_layers, mode_shape, plain_question
from .backends.contract import Backend
from .backends.graph_beliefs import slice_size
from .bundle.arrays import AnyArray, Float32Array, Float64Array, Int32Array
from .bundle.belief_settings import BeliefSettings
from .bundle.belief_validation import BeliefValidator, check_mode, check_settings
from .bundle.beliefs import Belief, BeliefKind, BeliefMode
from .bundle.errors import IllegalValueError, InvalidInputError
from .bundle.models import ChunkModel, ModelEntry
from .bundle.probabilities import (
    Given,
    bit_logits,
    chunk_probabilities,
    class_of_tokens,
    distributions,
    drawn,
    logits_of,
    num_tokens,
    one_hot,
    tokens_of,
)
from .bundle.validation import CheckedPair, InputValidator

#: Actions, std and the mode's probability, as a caller passes them: the last two may be None.
Outputs = tuple[object, object, object]
#: Settings that compare by what they hold.
_PLAIN_SETTINGS = (type(None), BeliefSettings)


@dataclass(frozen=True, eq=False)
class _HeldCall:
    """A call whose arrays were checked, to be known when they come again: a control loop's do.

    terms: all that is no array; pairs: of every input with an output; of the question: all but what is given; scale: of
    std, None where it stays as it is.
    """

    terms: tuple[Any, ...]
    pairs: tuple[CheckedPair, ...]
    sharpness: Float32Array
    is_logits: bool
    keeps_mode: bool
    scale: Float32Array | None

    def is_of(self, given: tuple[Any, ...], outputs: Outputs) -> bool:
        """Whether these are the arrays, as they were."""
        pairs = _paired(given, outputs)
        return len(pairs) == len(self.pairs) and all(
            known.is_of(*pair) for known, pair in zip(self.pairs, pairs, strict=True)
        )


class BeliefDecoder:
    """Decodes beliefs on the backend of one tokenizer. fingerprint: the tokenizer's.

    Raises InvalidInputError where the backend decodes none.
    """

    def __init__(self, model: ModelEntry, fingerprint: str, backend: Backend) -> None:
        self._model, self._fingerprint, self._of_tokens = model, fingerprint, backend
        self._coarse = coarse_layers(model)
        self._validator, self._outputs = BeliefValidator(model), InputValidator(model)
        self._backend = belief_backend(backend)
        self._unchecked_chunks = backend.checked_steps // model.chunk_length
        self._held: _HeldCall | None = None

    def warmup(self, batch: int) -> None:
        """Run the graph of every number of layers once, and of chunk tokens that of all bits.

        Raises InvalidInputError where memory holds no such logits.
        """
        model = self._model
        for prefix in model.decoder_graphs:
            if isinstance(model, ChunkModel):
                shapes: tuple[tuple[int, ...], ...] = (batch, model.num_classes), (batch, model.code_bits)
            else:
                shapes = ((*model.tokens_shape(batch, prefix), model.vocabulary),)
            try:
                given = tuple(np.zeros(shape, np.float32) for shape in shapes)
            except (MemoryError, ValueError) as error:
                # ValueError: more bytes than numpy can count.
                raise InvalidInputError(f"batch is {batch}, of more logits than memory holds here: {error}") from error
            self._asked(plain_question(given, model, is_logits=True, keeps_mode=False), None)

    # What is given, and how, as a caller says it.
    def decode(  # noqa: PLR0913
        self,
        value: object,
        mode: BeliefMode,
        temperature: object,
        settings: BeliefSettings | None,
        seed: int | None,
        *,
        is_logits: bool,
    ) -> Belief[AnyArray]:
        """See `ActionTokenizer.decode_probabilities`."""
        check_mode(mode, seed)
        check_settings(settings, temperature)
        question = self._question(value, mode, temperature, settings, is_logits=is_logits)
        scale = None if settings is None else settings.scale(mode, self._model.action_dim)
        if mode == "sample":
            return self._sampled(question, np.random.default_rng(seed), scale)
        return self._asked(question, scale)

    def decode_into(  # noqa: PLR0913  # as above
        self,
        value: object,
        outputs: Outputs,
        mode: BeliefMode,
        temperature: object,
        settings: BeliefSettings | None,
        *,
        is_logits: bool,
    ) -> None:
        """See `ActionTokenizer.decode_probabilities_into`."""
        is_pair = isinstance(value, tuple)
        held, given = self._held, cast(tuple[Any, ...], value if is_pair else (value,))
        terms = (is_logits, mode, temperature, outputs[1] is None, outputs[2] is None, is_pair and len(given), settings)
        # Others, such as arrays, compare by rules of their own.
        is_plain = type(temperature) is float and type(mode) is str and type(settings) in _PLAIN_SETTINGS
        if held is not None and is_plain and held.terms == terms and held.is_of(given, outputs):
            # Their forms were checked a call ago.
            question = BeliefQuestion(given, held.sharpness, held.is_logits, held.keeps_mode, self._coarse)
            self._run(question, BeliefAnswer(*outputs), held.scale)  # type: ignore[arg-type]  # arrays that it knows
            return
        check_mode(mode, None, can_draw=False)
        check_settings(settings, temperature)
        question = self._question(
            value, mode, temperature, settings, is_logits=is_logits, unchecked=self._unchecked_chunks
        )
        is_scaled = outputs[1] is not None
        scale = settings.scale(mode, self._model.action_dim) if settings is not None and is_scaled else None
        # The inputs as they were given: a copy that validation made shares no memory with anything.
        self._run(question, self._checked(cast(Given, given), outputs, question.batch), scale)
        if is_plain and question.batch <= self._unchecked_chunks and all(map(operator.is_, question.given, given)):
            pairs = tuple(CheckedPair(*pair) for pair in _paired(given, outputs))
            self._held = _HeldCall(terms, pairs, question.sharpness, question.is_logits, question.keeps_mode, scale)

    # As above.
    def _question(  # noqa: PLR0913
        self,
        value: object,
        mode: BeliefMode,
        temperature: object,
        settings: BeliefSettings | None,
        *,
        is_logits: bool,
        unchecked: int = 0,
    ) -> BeliefQuestion:
        """Validated. Other temperatures than 1 make logits of probabilities."""
        given = self._validator.given(value, is_logits=is_logits, unchecked=unchecked)
        if settings is not None:
            form: Literal["tokens", "classes and bits"] = "tokens" if len(given) == 1 else "classes and bits"
            settings.check(BeliefKind(self._fingerprint, form, num_tokens(given, self._model), self._coarse))
            temperature = settings.temperature
        sharpness = self._validator.sharpness(temperature, given)
        if not is_logits and (sharpness != 1).any():
            self._validator.check_values(given, is_logits=False)
            given, is_logits = logits_of(given), True
        return BeliefQuestion(given, sharpness, is_logits, mode == "likeliest mode", self._coarse)

    def _checked(self, given: Given, outputs: Outputs, batch: int) -> BeliefAnswer:
        """Arrays that can be written into; the last two, where they are wanted."""
        actions = self._model.actions_shape(batch)
        named = zip(("out", "std_out", "mode_probability_out"), outputs, (actions, actions, (batch,)), strict=True)
        found: list[Float32Array | None] = []
        for place, (name, out, shape) in enumerate(named):
            if out is None and place:
                found.append(None)
            else:
                others = (array for array in found if array is not None)
                found.append(self._outputs.output(name, out, np.float32, shape, *given, *others))
        return BeliefAnswer(*found)  # type: ignore[arg-type]  # the first is never None

    def _asked(self, question: BeliefQuestion, scale: Float32Array | None) -> Belief[AnyArray]:
        """All that a backend says, in new arrays."""
        batch, model = question.batch, self._model
        actions, std = (np.empty(model.actions_shape(batch), np.float32) for _ in range(2))
        mode_probability, mode = np.empty(batch, np.float32), np.empty(mode_shape(model, batch), np.int32)
        self._run(question, BeliefAnswer(actions, std, mode_probability, mode), scale)
        return Belief(actions, std, mode_probability, mode)

    def _run(self, question: BeliefQuestion, answer: BeliefAnswer, scale: Float32Array | None = None) -> None:
        """scale: of std, where it is wanted; None leaves it as it is."""
        if not question.batch:
            return
        try:
            self._backend.decode_belief_into(question, answer)
        except IllegalValueError:
            # Raises an error that names the value and its place.
            self._validator.check_values(question.given, is_logits=question.is_logits)
            raise
        if scale is not None and answer.std is not None:
            np.multiply(answer.std, scale, out=answer.std)

    def _sampled(
        self, question: BeliefQuestion, random: np.random.Generator, scale: Float32Array | None
    ) -> Belief[AnyArray]:
        """Tokens that were drawn, decoded; std: of what they leave open within their mode."""
        batch, model, layers = question.batch, self._model, num_tokens(question.given, self._model)
        tokens, mode = (
            np.empty(shape, np.int32) for shape in (model.tokens_shape(batch, layers), mode_shape(model, batch))
        )
        std, mode_probability = np.empty(model.actions_shape(batch), np.float32), np.empty(batch, np.float32)
        size = slice_size(model, layers)
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            part = question._replace(given=tuple(array[rows] for array in question.given))
            # Chunk by chunk, as they are drawn all at once: in parts of any size they come out the same.
            found = _drawn(model, part, random)
            tokens[rows], mode[rows], mode_probability[rows] = found.tokens, found.mode, found.mode_probability
            self._run(found.within, BeliefAnswer(np.empty_like(std[rows]), std[rows]), scale)
        actions = np.empty_like(std)
        if batch:
            # All of them, since a library may sum in another order for another number of chunks.
            self._of_tokens.decode_into(tokens, None, actions)
        return Belief(actions, std, mode_probability, mode)


class _Sample(NamedTuple):
    """tokens: [B, T, D, l] or [B, l]; mode: what they are of; mode_probability: float64 [B], of the likeliest; within:
    what is open once the mode is known."""

    tokens: Int32Array
    mode: Int32Array
    mode_probability: Float64Array
    within: BeliefQuestion


def _drawn(model: ModelEntry, question: BeliefQuestion, random: np.random.Generator) -> _Sample:
    if isinstance(model, ChunkModel):
        return _drawn_chunks(model, question, random)
    found = distributions(question.given[0], question.sharpness, is_logits=question.is_logits)
    tokens, coarse = drawn(found, random.random(found.shape[:-1])), question.coarse
    mode_probability = found[..., :coarse, :].max(axis=-1).min(axis=(1, 2, 3))
    mode = np.ascontiguousarray(tokens[..., :coarse])
    known = found.astype(np.float32)
    known[..., :coarse, :] = one_hot(mode, model.vocabulary)
    return _Sample(tokens, mode, mode_probability, plain_question((known,), model, is_logits=False, keeps_mode=False))


def _drawn_chunks(model: ChunkModel, question: BeliefQuestion, random: np.random.Generator) -> _Sample:
    """A token is drawn whole where its distribution is given."""
    given, is_logits = question.given, question.is_logits
    found = chunk_probabilities(given, question.sharpness, model, is_logits=is_logits)
    if len(given) == 1:
        words = distributions(given[0], question.sharpness, is_logits=is_logits)
        tokens = drawn(words, random.random(words.shape[:-1]))
        mode = class_of_tokens(tokens, model)
        zeros, ones = found.of_class(mode).swapaxes(0, 1)
    else:
        uniform = random.random((question.batch, 1 + given[1].shape[1]))
        mode = drawn(found.classes, uniform[:, 0])
        zeros, ones = found.of_class(mode).swapaxes(0, 1)
        tokens = tokens_of(mode, uniform[:, 1:] < ones, model)
    # As logits, which tell how near to certain a bit is.
    known = logits_of((one_hot(mode, model.num_classes),))[0], bit_logits(zeros, ones)
    within = plain_question(known, model, is_logits=True, keeps_mode=False)
    return _Sample(tokens, mode, found.classes.max(axis=1), within)


def _paired(given: tuple[Any, ...], outputs: Outputs) -> list[tuple[Any, Any]]:
    """Pairs of an input and an output that is wanted, until each was in one. Actions always are."""
    wanted = [outputs[0], *(out for out in outputs[1:] if out is not None)]
    count = max(len(given), len(wanted))
    return [(given[min(place, len(given) - 1)], wanted[min(place, len(wanted) - 1)]) for place in range(count)]
