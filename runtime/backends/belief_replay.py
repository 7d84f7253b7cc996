"""Golden beliefs replayed through a backend: does it give the definition's answers?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bundle.arrays import AnyArray, Float32Array, Int32Array
from ..bundle.comparison import action_errors, std_error
from ..bundle.errors import TokenizerError
from ..bundle.gates import BELIEF_GATES, GATES, Check
from ..bundle.golden_beliefs import KEEPS_MODE, BeliefCase, GoldenBeliefs
from ..bundle.models import ChunkModel, ModelEntry
from ..bundle.probabilities import Given, class_of_tokens, distributions, num_tokens, one_hot, softmax, tokens_of
from .beliefs import BeliefAnswer, DecodesBeliefs, belief_backend, plain_question

#: Numbers that a distribution over the words of tokens may have to be tried, where classes and bits are given.
_MOST_WORDS = 2**14
_LIMITS = dict(
    zip(
        BELIEF_GATES,
        (GATES.action_error, GATES.std_error, GATES.mode_probability_error, GATES.certain_differences),
        strict=True,
    )
)


def judge_beliefs(beliefs: GoldenBeliefs, model: ModelEntry, backend: Any, batch_size: int) -> tuple[Check, ...]:
    """One check for every gate of `BELIEF_GATES`, the worst of all cases, in batches of this size.

    A backend that raises fails that check.
    """
    worst = {gate: Check(f"beliefs: {gate}", 0.0, limit, "") for gate, limit in _LIMITS.items()}
    try:
        run = _Run(model, belief_backend(backend), batch_size)
        for case in beliefs.cases(model):
            for gate, value in run.errors(case, beliefs.mode_probability):
                where = f"{case.prefix} {model.depth_unit}, {'likeliest mode' if case.keeps_mode else 'expected'}"
                if not value <= worst[gate].value:
                    worst[gate] = replace(worst[gate], value=value, detail=where)
            if case.keeps_mode:
                continue
            # Once for each prefix.
            gate, differences = BELIEF_GATES[3], run.certain_differences(_likeliest(case.given, model), backend)
            if differences > worst[gate].value:
                worst[gate] = replace(worst[gate], value=differences, detail=f"{case.prefix} {model.depth_unit}")
    except TokenizerError as error:
        return tuple(replace(check, value=np.inf, detail=str(error)) for check in worst.values())
    # Where, if it fails.
    return tuple(replace(check, detail="") if check.passed else check for check in worst.values())


@dataclass(frozen=True, eq=False)
class _Run:
    """A backend, asked in batches of one size."""

    model: ModelEntry
    backend: DecodesBeliefs
    batch_size: int

    def errors(self, case: BeliefCase, mode_probability: AnyArray) -> Iterator[tuple[str, float]]:
        """Gate and error, of every form in which the case can be given."""
        units = self.model.action_units
        for is_logits, given in _forms(case.given, self.model):
            actions, std, found = self._decoded(given, is_logits=is_logits, keeps_mode=case.keeps_mode)
            yield BELIEF_GATES[0], action_errors(case.actions, actions, units).value
            yield BELIEF_GATES[1], std_error(case.std, std, units)
            yield BELIEF_GATES[2], action_errors(mode_probability, found, 1.0).value

    def certain_differences(self, tokens: Int32Array, backend: Any) -> int:
        """Of tokens as probabilities of 0 and 1, and as they are: how many numbers differ in any bit."""
        decoded = np.full(self.model.actions_shape(len(tokens)), np.nan, np.float32)
        for rows in self._batches(len(tokens)):
            backend.decode_into(np.array(tokens[rows], order="C"), None, decoded[rows])
        differing = 0
        for given in _certain(tokens, self.model):
            for keeps_mode in KEEPS_MODE:
                actions, std, probability = self._decoded(given, is_logits=False, keeps_mode=keeps_mode)
                # A zero has a sign, too.
                differing += int((actions.view(np.int32) != decoded.view(np.int32)).sum())
                differing += int((std != 0).sum() + (probability != 1).sum())
        return differing

    def _batches(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    def _decoded(
        self, given: Given, *, is_logits: bool, keeps_mode: bool
    ) -> tuple[Float32Array, Float32Array, Float32Array]:
        model, count = self.model, len(given[0])
        actions, std = (np.full(model.actions_shape(count), np.nan, np.float32) for _ in range(2))
        probability = np.full(count, np.nan, np.float32)
        for rows in self._batches(count):
            # A backend gets what the tokenizer would give it: arrays of its own, writable and contiguous.
            part = tuple(np.array(array[rows], order="C") for array in given)
            question = plain_question(part, model, is_logits=is_logits, keeps_mode=keeps_mode)
            self.backend.decode_belief_into(question, BeliefAnswer(actions[rows], std[rows], probability[rows]))
        return actions, std, probability


def _forms(logits: Given, model: ModelEntry) -> Iterator[tuple[bool, Given]]:
    """Whether they are logits, and what is given: the logits themselves, and probabilities of tokens.

    Not the probabilities of bits: of those near 1 a float32 does not tell how near.
    """
    yield True, logits
    if not isinstance(model, ChunkModel):
        yield False, (softmax(logits[0], 1.0).astype(np.float32),)
    elif num_tokens(logits, model) * model.vocabulary <= _MOST_WORDS:
        yield False, (_words(logits, model),)


def _words(logits: Given, model: ChunkModel) -> Float32Array:
    """Distributions [n, l, V] of tokens that are as independent as their classes and bits."""
    classes = distributions(logits[0], 1.0, is_logits=True)
    bits = logits[1].astype(np.float64)
    zeros, ones = (np.exp(-np.logaddexp(0, sign * bits)) for sign in (1, -1))
    digits = np.arange(model.vocabulary)[:, None] >> np.arange(model.token_bits - 1, -1, -1) & 1
    first = model.token_bits - model.class_bits

    def products(rows: slice, places: slice) -> AnyArray:
        """Of the words with these digits, [n, words]."""
        both = np.where(digits[:, places], ones[:, None, rows], zeros[:, None, rows])
        return np.asarray(both.prod(axis=2))

    numbers = np.zeros((len(bits), 1 << model.class_bits))
    numbers[:, : model.num_classes] = classes
    words = [numbers.repeat(1 << first, axis=1) * products(slice(0, first), slice(model.class_bits, None))]
    for start in range(first, bits.shape[1], model.token_bits):
        words.append(products(slice(start, start + model.token_bits), slice(None)))
    return np.stack(words, axis=1).astype(np.float32)


def _likeliest(logits: Given, model: ModelEntry) -> Int32Array:
    """Tokens that no encoder may give, but all of which decode."""
    likeliest = logits[0].argmax(axis=-1).astype(np.int32)
    return tokens_of(likeliest, (logits[1] > 0).astype(np.int32), model) if isinstance(model, ChunkModel) else likeliest


def _certain(tokens: Int32Array, model: ModelEntry) -> Iterator[Given]:
    """These tokens as probabilities, in every form in which they can be given."""
    if isinstance(model, ChunkModel):
        digits = tokens[..., None] >> np.arange(model.token_bits - 1, -1, -1) & 1
        bits = digits.reshape(len(tokens), -1)[:, model.class_bits :].astype(np.float32)
        yield one_hot(class_of_tokens(tokens, model), model.num_classes), bits
    if not isinstance(model, ChunkModel) or tokens.shape[1] * model.vocabulary <= _MOST_WORDS:
        yield (one_hot(tokens, model.vocabulary),)
