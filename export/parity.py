"""The parity gates: a backend, run through the very code that runs on the robot, against the float64 reference."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rfsq.export.parity_data import EDGES, Section
from rfsq.export.reference import Answers, Reference
from rfsq.runtime.backends.contract import Backend, judged
from rfsq.runtime.backends.refusal import judge_refusal
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array, Int32Array
from rfsq.runtime.bundle.comparison import TokenComparison, action_errors
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import ModelEntry, ParityEntry

#: Control steps judged at once: large enough to be fast, small enough that float64 margins stay in a few hundred MB.
_BATCH_STEPS = 8192
#: Control steps of each section that travel with the bundle as golden vectors; the edges travel whole.
_GOLDEN_STEPS = 192


def batches(reference: Reference, sections: Sequence[Section]) -> Iterator[Answers]:
    """The reference's answers to every section, a few thousand steps at a time."""
    for section in sections:
        chunks = max(_BATCH_STEPS // section.actions.shape[1], 1)
        for start in range(0, len(section.actions), chunks):
            yield reference.answer(section.actions[start : start + chunks])


def golden_vectors(reference: Reference, sections: Sequence[Section]) -> Golden:
    """What the robot replays: the first chunks of every section and all of the edges.

    But for chunks whose statistics float32 cannot give, in a `dynamic` model.
    """
    chunks = max(_GOLDEN_STEPS // sections[0].actions.shape[1], 1)
    parts = [section.actions if section.name == EDGES else section.actions[:chunks] for section in sections]
    answers = reference.answer(np.concatenate(parts))
    if answers.golden.stats is None:
        return answers.golden
    kept = answers.has_float32_stats.all(-1)
    return answers.golden if kept.all() else reference.answer(answers.golden.actions[kept]).golden


@dataclass
class Judge:
    """Collects what one backend, or a variant of it, gets wrong, batch by batch."""

    backend: Backend
    reference: Reference
    model: ModelEntry
    variant: str
    seed: int
    found: list[TokenComparison] = field(default_factory=list)
    float32: list[TokenComparison] = field(default_factory=list)
    near_tie_cap: int = 0
    decode_errors: dict[int, float] = field(default_factory=dict)
    stats_error: float = 0.0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def judge(self, answers: Answers) -> None:
        """Run the backend on one batch and keep the worst of every gate."""
        golden = answers.golden
        tokens = np.empty_like(golden.tokens)
        stats = None if golden.stats is None else np.empty_like(golden.stats)
        self.backend.encode_into(golden.actions, tokens, stats)
        self.found.append(self.reference.judge(golden.actions, golden.tokens, tokens))
        self.float32.append(answers.float32)
        self.near_tie_cap += golden.near_tie_cap
        if stats is not None and golden.stats is not None:
            # Behind a flip the statistics are those of another residual.
            steady = ~(golden.tokens != tokens).any(axis=(-2, -1)) & answers.has_float32_stats
            self.stats_error = max(self.stats_error, action_errors(golden.stats[steady], stats[steady], 1.0).value)
        for prefix, expected in golden.decoded.items():
            part = None if golden.stats is None else np.ascontiguousarray(golden.stats[..., :prefix, :])
            self._judge_decoding(np.ascontiguousarray(golden.tokens[..., :prefix]), part, expected)
            # A policy may send tokens that no encoder gives.
            any_tokens = self._random.integers(self.model.num_levels, size=tokens.shape, dtype=np.int32)
            any_tokens = np.ascontiguousarray(any_tokens[..., :prefix])
            self._judge_decoding(any_tokens, part, self.reference.decode(any_tokens, part))

    def _judge_decoding(self, tokens: Int32Array, stats: Float32Array | None, expected: Float64Array) -> None:
        prefix = tokens.shape[-1]
        found = np.empty(expected.shape, np.float32)
        self.backend.decode_into(tokens, stats, found)
        worst = action_errors(expected, found, self.model.action_units).value
        self.decode_errors[prefix] = max(self.decode_errors.get(prefix, 0.0), worst)

    def entries(self) -> tuple[ParityEntry, ...]:
        """One per gate; `value` above `limit` is a failure."""
        found, float32 = (functools.reduce(operator.add, parts) for parts in (self.found, self.float32))
        variant = f"{self.variant}, " if self.variant else ""

        def entry(gate: str, value: float, limit: float, detail: str = "") -> ParityEntry:
            return ParityEntry(
                self.backend.name, variant + gate, found.num_steps, value, limit, detail, self.backend.device
            )

        near_ties = f"L0 to L{self.model.num_layers - 1}: {_counts(found)}; torch float32: {_counts(float32)}"
        return (
            entry("encode: wrong tokens", found.num_wrong, GATES.wrong_tokens, str(found.first_wrong or "")),
            entry("encode: near-tie flips", found.num_near_ties, self.near_tie_cap, near_ties),
            *([entry("encode: stats error", self.stats_error, GATES.stats_error)] if self.model.has_stats else []),
            *(
                entry(f"decode {layers} layers: action error", error, GATES.action_error)
                for layers, error in sorted(self.decode_errors.items())
            ),
            *(
                entry(check.gate, check.value, check.limit, check.detail)
                for check in judge_refusal(self.model, self.backend, is_thorough=True)
            ),
        )


def judges_of(backends: Sequence[Backend], reference: Reference, model: ModelEntry, *, seed: int = 0) -> list[Judge]:
    """One for every backend and each of its variants."""
    return [
        Judge(judged_backend, reference, model, variant, seed)
        for backend in backends
        for variant, judged_backend in judged(backend).items()
    ]


def _counts(comparison: TokenComparison) -> str:
    return " ".join(map(str, comparison.near_ties.tolist()))
