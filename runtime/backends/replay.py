"""Golden vectors replayed through a backend: does it give the reference's answers?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..bundle.arrays import Float32Array, Int32Array
from ..bundle.comparison import ActionError, TokenComparison, action_errors, compare_tokens
from ..bundle.errors import TokenizerError
from ..bundle.gates import GATES
from ..bundle.golden import Golden
from ..bundle.manifest import ModelEntry
from .contract import Backend, judged
from .refusal import judge_refusal

#: Chunks that are also run in batches of 1 and 2: what can go wrong there is the batch, not the numbers.
_SMALL_BATCH_CHUNKS = 64


@dataclass(frozen=True)
class Check:
    """One gate on one kind of answer: passes where value <= limit."""

    gate: str
    value: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        sign, relation = ("✓", "≤") if self.passed else ("✗", ">")
        detail = f" ({self.detail})" if self.detail else ""
        return f"{sign} {self.gate}: {self.value:.4g} {relation} {self.limit:.4g}{detail}"


@dataclass(frozen=True)
class ReplayResult:
    """All checks in the order they ran; none is skipped because another failed."""

    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        return not self.failures


def replay(golden: Golden, model: ModelEntry, backend: Backend) -> ReplayResult:
    """Encode and decode all golden vectors at once, some also one by one and in pairs; hold every answer to GATES.

    Every batch size is judged against the reference, not against another batch size: a library may choose another
    order of summation for another size. The backend's variants are held to the same, and illegal values are refused or
    marked where a backend promises that. Collects all failures; a backend
    that raises fails that check.
    """
    num_chunks = len(golden.actions)
    # Evenly spread over all of them, so that every kind of input is among them.
    sample = golden.every(-(-num_chunks // _SMALL_BATCH_CHUNKS))
    runs = {1: sample, min(2, len(sample.actions)): sample, num_chunks: golden}
    return ReplayResult(
        tuple(
            check
            for name, variant in judged(backend).items()
            for batch_size, vectors in runs.items()
            for check in _replay_batches(vectors, model, variant, batch_size, f", {name}" if name else "")
        )
        + tuple(check for name, variant in judged(backend).items() for check in _refusal_checks(model, variant, name))
    )


def _refusal_checks(model: ModelEntry, backend: Backend, variant: str) -> Iterator[Check]:
    try:
        for verdict in judge_refusal(model, backend):
            label = f"{variant}, {verdict.gate}" if variant else verdict.gate
            yield Check(label, verdict.accepted, GATES.illegal_values, verdict.first)
    except TokenizerError as error:
        yield Check("illegal values", np.inf, GATES.illegal_values, str(error))


def _replay_batches(
    golden: Golden, model: ModelEntry, backend: Backend, batch_size: int, variant: str
) -> Iterator[Check]:
    tokens = np.full(golden.tokens.shape, -1, np.int32)
    stats = None if golden.stats is None else np.full_like(golden.stats, np.nan)
    label = f"batch {batch_size}{variant}"
    batches = [slice(start, start + batch_size) for start in range(0, len(golden.actions), batch_size)]
    # A backend gets what the tokenizer would give it: arrays of its own, writable and contiguous.
    inputs = golden.actions.copy()
    try:
        for batch in batches:
            backend.encode_into(inputs[batch], tokens[batch], None if stats is None else stats[batch])
    except TokenizerError as error:
        yield Check(f"encode, {label}", np.inf, GATES.wrong_tokens, str(error))
        return
    comparison = compare_tokens(
        golden.tokens,
        tokens,
        golden.margins,
        golden.bounds,
        num_levels=model.num_levels,
        is_step_coupled=model.is_step_coupled,
    )
    yield from _token_checks(comparison, golden.near_tie_cap, label)
    if stats is not None and golden.stats is not None:
        yield _stats_check(golden.stats, stats, comparison.flipped, label)
    for prefix in model.prefixes:
        reference = golden.stats if golden.stats is None else golden.stats[..., :prefix, :]
        gate = f"decode {prefix} layers, {label}: max |action error|"
        decoded = _decode(golden.tokens[..., :prefix], reference, golden, backend, batches)
        if isinstance(decoded, TokenizerError):
            yield Check(gate, np.inf, GATES.action_error, str(decoded))
            continue
        worst = action_errors(golden.decoded[prefix], decoded, model.action_units)
        yield _action_check(gate, worst, GATES.action_error)
    if comparison.num_wrong == 0:
        yield from _round_trip_checks(golden, model, backend, batches, tokens, stats, comparison.flipped, label)


def _round_trip_checks(
    golden: Golden,
    model: ModelEntry,
    backend: Backend,
    batches: list[slice],
    tokens: Int32Array,
    stats: Float32Array | None,
    flipped: npt.NDArray[np.bool_],
    label: str,
) -> Iterator[Check]:
    """The backend's own tokens, decoded: the only judge of what lies behind a near-tie flip."""
    expected = golden.decoded[model.num_layers]
    decoded = _decode(tokens, stats, golden, backend, batches)
    gate = f"encode and decode, {label}: max |action error|"
    if isinstance(decoded, TokenizerError):
        yield Check(gate, np.inf, GATES.action_error, str(decoded))
        return
    # A flipped step is judged by its own limit; the reference's value in its place adds no error to the first check. In
    # the type that a backend gives, by which it is judged.
    right = expected.astype(np.float32)
    kept = np.where(flipped[..., None], right, decoded)
    yield _action_check(gate, action_errors(expected, kept, model.action_units), GATES.action_error)
    if flipped.any():
        swapped = np.where(flipped[..., None], decoded, right)
        yield _action_check(
            f"encode and decode, {label}: max |action error| of {int(flipped.sum())} steps with a near-tie flip",
            action_errors(expected, swapped, model.action_units),
            golden.flip_tolerance,
        )


def _decode(
    tokens: Int32Array, stats: Float32Array | None, golden: Golden, backend: Backend, batches: list[slice]
) -> Float32Array | TokenizerError:
    actions = np.full(golden.actions.shape, np.nan, np.float32)
    tokens = np.array(tokens, order="C")
    stats = None if stats is None else np.array(stats, order="C")
    try:
        for batch in batches:
            backend.decode_into(tokens[batch], None if stats is None else stats[batch], actions[batch])
    except TokenizerError as error:
        return error
    return actions


def _token_checks(comparison: TokenComparison, near_tie_cap: int, label: str) -> Iterator[Check]:
    where = f"{comparison.first_wrong}; per layer {comparison.wrong.tolist()}"
    yield _located(f"encode, {label}: wrong tokens", comparison.num_wrong, GATES.wrong_tokens, where)
    detail = ""
    if comparison.num_near_ties:
        detail = f"per layer {comparison.near_ties.tolist()}, {comparison.num_behind} tokens behind them"
    yield Check(f"encode, {label}: near-tie flips", comparison.num_near_ties, near_tie_cap, detail)


def _stats_check(expected: Float32Array, found: Float32Array, flipped: npt.NDArray[np.bool_], label: str) -> Check:
    # Behind a flip the statistics are those of another residual.
    kept = np.where(flipped[..., None, None], expected, found)
    errors = action_errors(expected, kept, 1.0)
    where = f"stats{list(errors.index)} is {errors.found:.9g}"
    return _located(f"encode, {label}: max |stats error|", errors.value, GATES.stats_error, where)


def _action_check(gate: str, error: ActionError, limit: float) -> Check:
    return _located(gate, error.value, limit, str(error))


def _located(gate: str, value: float, limit: float, where: str) -> Check:
    """Says where, if it fails."""
    check = Check(gate, value, limit, where)
    return replace(check, detail="") if check.passed else check
