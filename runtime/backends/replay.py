"""Golden vectors replayed through a backend: does it give the reference's answers?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..bundle.arrays import BoolArray, Float32Array, Float64Array, Int32Array
from ..bundle.comparison import action_errors
from ..bundle.errors import SelfTestError, TokenizerError
from ..bundle.gates import GATES, Check
from ..bundle.golden import Golden
from ..bundle.golden_beliefs import NUM_BELIEFS
from ..bundle.models import ModelEntry
from .belief_replay import judge_beliefs
from .beliefs import decodes_beliefs
from .contract import Backend, judged
from .refusal import judge_refusal

#: Chunks that are also run in batches of 1 and 2: what can go wrong there is the batch, not the numbers.
_SMALL_BATCH_CHUNKS = 64


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

    def require(self, backend: Backend, folder: object) -> None:
        """Raises SelfTestError where a check of this backend failed. folder: of the bundle."""
        if not self.passed:
            lines = "\n".join(f"  {check}" for check in self.failures)
            raise SelfTestError(
                f"{backend.name} ({backend.description}) does not give the reference's answers to the golden vectors "
                f"of {folder}; do not use it, build the bundle again:\n{lines}"
            )


def replay(golden: Golden, model: ModelEntry, backend: Backend, *, beliefs: bool = True) -> ReplayResult:
    """Encode and decode all golden vectors at once, some also one by one and in pairs; hold every answer to GATES.

    Every batch size is judged against the reference, not against another batch size: a library may choose another
    order of summation for another size. The backend's variants are held to the same, and illegal values are refused or
    marked where a backend promises that. Collects all failures; a backend that raises fails that check.

    beliefs: whether `replay_beliefs` is part of it, which takes as long again.
    """
    num_chunks = len(golden.actions)
    # Evenly spread over all of them, so that every kind of input is among them.
    sample = golden.every(-(-num_chunks // _SMALL_BATCH_CHUNKS))
    runs = {1: sample, min(2, len(sample.actions)): sample, num_chunks: golden}
    checks: list[Check] = []
    for name, variant in judged(backend).items():
        for batch_size, vectors in runs.items():
            label = f"batch {batch_size}, {name}" if name else f"batch {batch_size}"
            checks += _Run(vectors, model, variant, batch_size, label).checks()
    for name, variant in judged(backend).items():
        checks += _refusal_checks(model, variant, name)
    if beliefs:
        checks += replay_beliefs(golden, model, backend).checks
    return ReplayResult(tuple(checks))


def replay_beliefs(golden: Golden, model: ModelEntry, backend: Backend) -> ReplayResult:
    """Decode all golden beliefs, on a backend that decodes any; golden vectors that have none fail it."""
    return ReplayResult(tuple(_belief_checks(golden, model, backend)))


def _refusal_checks(model: ModelEntry, backend: Backend, variant: str) -> Iterator[Check]:
    try:
        for check in judge_refusal(model, backend):
            yield replace(check, gate=f"{variant}, {check.gate}") if variant else check
    except TokenizerError as error:
        yield Check("illegal values", np.inf, GATES.illegal_values, str(error))


def _belief_checks(golden: Golden, model: ModelEntry, backend: Backend) -> Iterator[Check]:
    if not decodes_beliefs(backend):
        return
    if golden.beliefs is None:
        yield Check("beliefs: action error", np.inf, GATES.action_error, "there are no golden vectors of beliefs")
        return
    for batch_size in (1, NUM_BELIEFS):
        for check in judge_beliefs(golden.beliefs, model, backend, batch_size):
            yield replace(check, gate=check.gate.replace("beliefs", f"beliefs, batch {batch_size}"))


class _Run:
    """Golden vectors, encoded and decoded by one backend in batches of one size."""

    def __init__(self, golden: Golden, model: ModelEntry, backend: Backend, batch_size: int, label: str) -> None:
        self._golden, self._model, self._backend, self._label = golden, model, backend, label
        self._batches = [slice(start, start + batch_size) for start in range(0, len(golden.actions), batch_size)]

    def checks(self) -> Iterator[Check]:
        golden, model, label = self._golden, self._model, self._label
        try:
            tokens, stats = self._encoded()
        except TokenizerError as error:
            yield Check(f"encode, {label}", np.inf, GATES.wrong_tokens, str(error))
            return
        compared = golden.compared(tokens, model)
        where = f"{compared.first_wrong}; per layer {compared.wrong.tolist()}"
        yield _located(f"encode, {label}: wrong tokens", compared.num_wrong, GATES.wrong_tokens, where)
        ties = compared.num_near_ties
        detail = f"per layer {compared.near_ties.tolist()}, {compared.behind.sum()} tokens behind them" if ties else ""
        yield Check(f"encode, {label}: near-tie flips", ties, golden.near_tie_cap, detail)
        if stats is not None and golden.stats is not None:
            # Behind a flip the statistics are those of another residual.
            kept = np.where(compared.flipped[..., None, None], golden.stats, stats)
            worst = action_errors(golden.stats, kept, 1.0)
            where = f"stats{list(worst.index)} is {worst.found:.9g}"
            yield _located(f"encode, {label}: max |stats error|", worst.value, GATES.stats_error, where)
        whole = golden.decoded[model.depth]
        worst_of: dict[str, Check] = {}
        for prefix, rows, expected in golden.decodings():
            part = None if golden.stats is None else golden.stats[rows, ..., :prefix, :]
            given, decoder = golden.tokens[rows, ..., :prefix], model.decoder_of(prefix)
            unflipped = np.zeros_like(compared.flipped[rows])
            for check in self._decoding_checks(f"decode {decoder}", given, part, expected, unflipped):
                named = replace(check, detail=f"{prefix} {model.depth_unit}: {check.detail}" if check.detail else "")
                worst_of[decoder] = max(worst_of.get(decoder, named), named, key=lambda each: each.value)
        yield from worst_of.values()
        if compared.num_wrong == 0:
            # Its own tokens, decoded: the only judge of what lies behind a near-tie flip.
            yield from self._decoding_checks("encode and decode", tokens, stats, whole, compared.flipped)

    def _decoding_checks(
        self, what: str, tokens: Int32Array, stats: Float32Array | None, expected: Float64Array, flipped: BoolArray
    ) -> Iterator[Check]:
        """flipped: the steps whose tokens have a near-tie flip."""
        units = self._model.action_units
        gate = f"{what}, {self._label}: max |action error|"
        try:
            decoded = self._decoded(tokens, stats)
        except TokenizerError as error:
            yield Check(gate, np.inf, GATES.action_error, str(error))
            return
        # A flipped step is judged by its own limit; the reference's value in its place adds no error to the first
        # check. In the type that a backend gives, by which it is judged.
        right, is_flipped = expected.astype(np.float32), flipped[..., None]
        worst = action_errors(expected, np.where(is_flipped, right, decoded), units)
        yield _located(gate, worst.value, GATES.action_error, str(worst))
        if flipped.any():
            gate = f"{gate} of {int(flipped.sum())} steps with a near-tie flip"
            worst = action_errors(expected, np.where(is_flipped, decoded, right), units)
            yield _located(gate, worst.value, self._golden.flip_tolerance, str(worst))

    def _encoded(self) -> tuple[Int32Array, Float32Array | None]:
        golden = self._golden
        tokens = np.full(golden.tokens.shape, -1, np.int32)
        stats = None if golden.stats is None else np.full_like(golden.stats, np.nan)
        # A backend gets what the tokenizer would give it, here and below: arrays of its own, writable and contiguous.
        actions = golden.actions.copy()
        for batch in self._batches:
            self._backend.encode_into(actions[batch], tokens[batch], None if stats is None else stats[batch])
        return tokens, stats

    def _decoded(self, tokens: Int32Array, stats: Float32Array | None) -> Float32Array:
        actions = np.full(self._model.actions_shape(len(tokens)), np.nan, np.float32)
        tokens, stats = np.array(tokens, order="C"), None if stats is None else np.array(stats, order="C")
        for batch in self._batches:
            if batch.start >= len(tokens):
                break
            self._backend.decode_into(tokens[batch], None if stats is None else stats[batch], actions[batch])
        return actions


def _located(gate: str, value: float, limit: float, where: str) -> Check:
    """A check that says where, if it fails."""
    check = Check(gate, value, limit, where)
    return replace(check, detail="") if check.passed else check
