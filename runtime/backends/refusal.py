"""Whether a backend refuses what is illegal, or marks it, where it promises to: judged with illegal values themselves.

For these calls nobody else checks the values, and right answers to legal values do not show that illegal ones are
noticed. A check may be missing for one kind of value, one element, one step, the last of a vector or one batch size, so
values and places take turns; a call takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..bundle.arrays import AnyArray, BoolArray, unravel
from ..bundle.errors import IllegalValueError, TokenizerError
from ..bundle.gates import ACCEPTED, GATES, NOT_MARKED, Check
from ..bundle.models import ModelEntry
from ..bundle.validation import STATS_LIMIT
from .contract import Backend, MarksIllegalValues

#: Stands in every output before a call, and no answer has it.
_UNTOUCHED_TOKEN, _UNTOUCHED_ACTION = -(2**30) - 1, np.float32(-1.2345e-30)
#: Chunks of a call that are to be marked: units for many threads, and a last block that is not full.
_MARKED_BATCHES = (1, 2, 37)
#: Of three units one is legal and must not be marked.
_LEGAL_EVERY = 3


def judge_refusal(model: ModelEntry, backend: Backend, *, is_thorough: bool = False) -> tuple[Check, ...]:
    """A check of the encoder and each decoder of a backend that promises to check values; none for others.

    is_thorough: in every place, as a build can afford; a robot waits a hundredth of a second for the others.
    """
    if hasattr(type(backend), "token_types"):
        token_type = cast(MarksIllegalValues, backend).token_types[0]
        return tuple(_check(call, NOT_MARKED, _unmarked(call, token_type)) for call in _calls(model, backend))
    most = backend.checked_steps // model.chunk_length
    if most == 0:
        return ()
    batches = sorted({size for size in (1, 2, 3, most - 1, most) if 1 <= size <= most})
    return tuple(_check(call, ACCEPTED, _accepted(call, batches, is_thorough)) for call in _calls(model, backend))


@dataclass(frozen=True)
class _Call:
    """One function of a backend: `run` takes the inputs, then the outputs.

    inputs: one legal chunk of each; outputs: what one chunk of each holds before a call; illegal: for each input, the
    illegal values that a place in it may hold; is_mark: which elements of the first output mark something illegal;
    units: what a chunk has that is marked on its own, its steps or the whole.
    """

    gate: str
    run: Callable[..., None]
    inputs: tuple[AnyArray, ...]
    outputs: tuple[AnyArray, ...]
    illegal: tuple[Callable[[int], AnyArray], ...]
    is_mark: Callable[[AnyArray], BoolArray]
    units: int

    def arrays(self, batch: int) -> tuple[list[AnyArray], list[AnyArray]]:
        """Inputs and outputs of so many chunks."""
        inputs, outputs = ([np.repeat(part, batch, axis=0) for part in side] for side in (self.inputs, self.outputs))
        return inputs, outputs


def _calls(model: ModelEntry, backend: Backend) -> Iterator[_Call]:
    levels, units = model.vocabulary, model.chunk_length if model.token_grid else 1
    limit = np.float32(model.action_limit)
    beyond = np.nextafter(limit, np.float32(np.inf))
    wrong_actions = np.array([np.nan, -np.nan, np.inf, -np.inf, beyond, -beyond], np.float32)
    numbers = {levels, -1, 2**30, 2**31 - 1, -(2**31), 2**8 + 1, 2**16 + 1, -(2**16) + 1, levels + 1}
    wrong_tokens = np.array(sorted(number for number in numbers if not 0 <= number < levels), np.int32)
    wide = np.nextafter(np.float32(STATS_LIMIT), np.float32(np.inf))
    either = [np.nan, np.inf, -np.inf, wide, -wide]
    # Mean and sigma take turns in memory.
    wrong_stats = [np.array(either, np.float32), np.array([*either, 0.0, -0.0, -1e-45, -1.0], np.float32)]

    def codes(layers: int, token: int, stat: float) -> tuple[AnyArray, ...]:
        tokens = np.full(model.tokens_shape(1, layers), token, np.int32)
        stats = np.full(model.stats_shape(1, layers), stat, np.float32)
        return (tokens, stats) if model.has_stats else (tokens,)

    yield _Call(
        "encode",
        backend.encode_into if model.has_stats else lambda actions, tokens: backend.encode_into(actions, tokens, None),
        (np.zeros(model.actions_shape(1), np.float32),),
        codes(model.depth, _UNTOUCHED_TOKEN, -1.0),
        (lambda _place: wrong_actions,),
        lambda tokens: (tokens < 0) | (tokens >= levels),
        units,
    )
    # Where several prefixes are decoded by one decoder, one that is neither the shortest nor the longest.
    named: dict[str, list[int]] = {}
    for prefix in model.prefixes:
        named.setdefault(model.decoder_of(prefix), []).append(prefix)
    for name, prefixes in named.items():
        prefix = prefixes[len(prefixes) // 2]
        yield _Call(
            f"decode {name}",
            backend.decode_into if model.has_stats else lambda tokens, out: backend.decode_into(tokens, None, out),
            codes(prefix, 0, 1.0),
            (np.full(model.actions_shape(1), _UNTOUCHED_ACTION),),
            (lambda _place: wrong_tokens, lambda place: wrong_stats[place % 2]),
            np.isnan,
            units,
        )


def _check(call: _Call, gate: str, problems: Iterator[str]) -> Check:
    """problems: a line for each illegal value that passed for a legal one."""
    found = list(problems)
    return Check(f"{call.gate}: {gate}", len(found), GATES.illegal_values, found[0] if found else "")


def _accepted(call: _Call, batches: list[int], is_thorough: bool) -> Iterator[str]:
    """One illegal value in each call, which has to raise and to write nothing."""
    for batch in batches:
        inputs, outputs = call.arrays(batch)
        for array, values_at in zip(inputs, call.illegal, strict=False):
            flat, legal = array.reshape(-1), array.flat[0]
            for place, value in _trials(array, values_at, is_thorough):
                flat[place] = value
                try:
                    call.run(*inputs, *outputs)
                except IllegalValueError:
                    problem = ""
                except TokenizerError as error:
                    problem = f"raised {type(error).__name__}: {error}"
                else:
                    problem = f"was accepted and became {outputs[0].flat[place % outputs[0].size]}"
                flat[place] = legal
                if problem:
                    yield _described(value, array, place, problem)
                    outputs = call.arrays(batch)[1]
            if any((out != untouched).any() for out, untouched in zip(outputs, call.outputs, strict=True)):
                yield f"a refused call of {batch} chunks has written into its output"
                outputs = call.arrays(batch)[1]


def _trials(array: AnyArray, values_at: Callable[[int], AnyArray], is_thorough: bool) -> Iterator[tuple[int, Any]]:
    """Where, and what: all of the first and the last step, somewhere in every other, every value at both ends."""
    steps = array.shape[0] * array.shape[1]
    unit = array.size // steps
    if is_thorough:
        places = list(range(array.size))
    else:
        between = [step * unit + (step * 37 + unit // 2) % unit for step in range(1, steps - 1)]
        places = [*range(unit), *between, *range(max((steps - 1) * unit, unit), array.size)]
    for turn, place in enumerate(places):
        values = values_at(place)
        if place in (0, 1, array.size - 2, array.size - 1):
            yield from ((place, value) for value in values)
        else:
            # Out of step with the layers, so that each of them gets every value.
            yield place, values[(turn + turn // len(values)) % len(values)]


def _unmarked(call: _Call, token_type: np.dtype[Any]) -> Iterator[str]:
    """Illegal values in two of three units, which have to be marked while the third is not."""
    values = call.illegal[0](0)
    if call.gate.startswith("decode"):
        # -1 is the largest of unsigned tokens, and has to be no level there either.
        fits = (values <= np.iinfo(token_type).max) & (values >= min(np.iinfo(token_type).min, -1))
        values = values[fits]
    for batch in _MARKED_BATCHES:
        for turn in range(len(values)):
            inputs, outputs = call.arrays(batch)
            rows = inputs[0].reshape(batch * call.units, -1)
            units = np.arange(len(rows))
            # Another one after each round, or a row of five elements would have but one.
            places = (units * 5 + units // rows.shape[1] + turn) % rows.shape[1]
            is_legal = units % _LEGAL_EVERY == turn % _LEGAL_EVERY
            given = np.where(is_legal, rows[0, 0], values[(units + turn) % len(values)])
            rows[units, places] = given
            call.run(*inputs, *outputs)
            results = outputs[0].reshape(len(rows), -1)
            marks = call.is_mark(results)
            for unit in np.flatnonzero(np.where(is_legal, marks.any(-1), ~marks.all(-1))).tolist():
                problem = f"was {'marked' if is_legal[unit] else 'not marked'} and became {results[unit, 0]}"
                yield _described(given[unit], inputs[0], unit * rows.shape[1] + int(places[unit]), problem)


def _described(value: Any, array: AnyArray, place: int, problem: str) -> str:
    return f"{value} at {list(unravel(place, array.shape))} of {list(array.shape)} {problem}"
