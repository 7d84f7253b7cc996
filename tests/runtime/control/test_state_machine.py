"""`ControlDecoder`, its guard and its queue against a specification: whatever comes, in whatever order."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from rfsq.runtime import ActionTokenizer, BeliefConfig, ControlConfig, ControlDecoder
from rfsq.runtime.control.belief_config import WhenUncertain
from tests.bundles import Recipe
from tests.chunk_bundles import SMALL, ChunkRecipe
from tests.runtime.control.loops import Clock, ScriptedBackend, scripted
from tests.runtime.control.specification import Belief, Chunk, Row, Rules, Specification

#: A tokenizer, and the backend that does as it is told.
Tokens = tuple[ActionTokenizer, ScriptedBackend]
T, DRAFT, FULL = 4, 2, 3
PERIOD = 10_000_000
VALUES: dict[str, Any] = {
    "period_s": PERIOD / 1e9,
    "action_low": (-1.0, -2.0, 0.0),
    "action_high": (1.0, 2.0, 0.125),
    "action_kind": ("delta", "absolute", "delta"),
    "gripper": (2,),
    "stale_after_s": 7.5 * PERIOD / 1e9,
    "ensemble_chunks": 3,
    "ensemble_decay": 0.5,
    "range_tolerance": 0.0625,
    "record_ticks": 4,
    "log_interval_s": 1e6,
}
TOLERANCE = VALUES["range_tolerance"]
START = [0.0, 1.0, 0.125]
STEPS: Tokens = scripted(Recipe(chunk_length=T))
CHUNKS: Tokens = scripted(ChunkRecipe(replace(SMALL, num_tokens=FULL)))


def some_rows(seed: int) -> list[Row]:
    """Inside the limits, often at them; one number for twelve is drawn several times as fast."""
    random = np.random.default_rng(seed)
    rows = random.uniform((-1, -2, 0), (1, 2, 0.125), (T, 3)).astype(np.float32)
    ends = np.array([[-1, -2, 0], [1, 2, 0.125], [0, 0, 0]], np.float32)
    places = random.integers(0, 6, (T, 3))
    rows = np.where(places < 3, ends[places % 3, [0, 1, 2]], rows)
    rows[:, 2] = random.choice([0.0, 0.125], T)
    return [[float(value) for value in row] for row in rows]


ROW = st.tuples(st.floats(-1, 1, width=32), st.floats(-2, 2, width=32), st.sampled_from([0.0, 0.125])).map(list)
ROWS = st.integers(0, 2**32 - 1).map(some_rows)
#: Of a tick, in periods: on time, trembling, or with whole ticks missed.
PASSED = st.sampled_from([1.0, 1.0, 1.0, 0.8, 1.2, 1.4, 2.0, 3.1])
#: At the limits and beside them, 0.5 to become uncertain and 0.25, or 0.75 of the mode, to end it; None for tokens.
BELIEF = st.none() | st.builds(
    lambda std, step, place, beside, probability: Belief(
        [[beside if (row, index) == (step, place) else std for index in range(3)] for row in range(T)], probability
    ),
    st.sampled_from([0.0, 0.0, 0.25]),
    st.integers(0, T - 1),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.25, 0.375, 0.5, 0.625]),
    st.sampled_from([1.0, 1.0, 0.75, 0.625, 0.5, 0.375]),
)
DELAY = st.sampled_from([0.0, 0.0, 0.4, 0.6, 1.0, 1.7, 2.0, 3.0])


class LoopMachine(RuleBasedStateMachine):
    """Every tick is compared: status, whether it is held, whether it is latched, and what is sent."""

    tokens: Tokens = STEPS
    decoder: ControlDecoder

    @initialize(
        strategy=st.sampled_from(["latest_only", "weighted_average", "temporal_ensemble"]),
        on_fault=st.sampled_from(["hold_last", "hold_last", "stop"]),
        out_of_range=st.sampled_from(["reject", "limit"]),
        most=st.sampled_from([0, 3]),
        # Where every action is limited, nothing else can be seen.
        steps=st.sampled_from([(0.25, 0.5, float("inf")), (3.0, 5.0, float("inf"))]),
        when_uncertain=st.sampled_from(["hold", "slow", "ask"]),
        leave_ticks=st.sampled_from([1, 3]),
    )
    def begin(  # settings, given by name
        self,
        strategy: str,
        on_fault: str,
        out_of_range: str,
        most: int,
        steps: tuple[float, ...],
        when_uncertain: WhenUncertain,
        leave_ticks: int,
    ) -> None:
        changes = {"strategy": strategy, "on_fault": on_fault, "out_of_range": out_of_range, "max_relative_step": steps}
        beliefs = BeliefConfig(
            std_limit=(0.5, 0.5, 0.5),
            least_mode_probability=0.5,
            when_uncertain=when_uncertain,
            slow_factor=0.25,
            leave_factor=0.5,
            leave_ticks=leave_ticks,
        )
        config = ControlConfig(**VALUES, **changes, max_consecutive_faults=most, beliefs=beliefs)  # type: ignore[arg-type]
        self.clock = Clock()
        self.tokenizer, self.backend = self.tokens
        self.backend.rows = np.zeros((T, 3))
        self.decoder = ControlDecoder(self.tokenizer, config, position=START, clock=self.clock)
        self.decoder.warmup()
        keeps = (False, True, True)
        limits = zip(config.action_low, config.action_high, config.max_relative_step, keeps, strict=True)
        rules = Rules(
            dimensions=tuple(limits),
            grippers=(2,),
            length=T,
            period=PERIOD,
            stale=round(7.5 * PERIOD),
            strategy=strategy,
            new_weight=config.new_weight,
            decay=config.ensemble_decay,
            ensemble=3,
            stops=on_fault == "stop",
            brings_inside=out_of_range == "limit",
            tolerance=TOLERANCE,
            most_faults=most,
            std_limit=(0.5, 0.5, 0.5),
            least_probability=0.5,
            leave_factor=0.5,
            leave_ticks=leave_ticks,
            when_uncertain=when_uncertain,
            slow_factor=0.25,
        )
        self.specified = Specification(rules, START)
        self.number = 0
        self.draft: Chunk | None = None

    def teardown(self) -> None:
        if hasattr(self, "decoder"):
            self.decoder.close()

    def _tick(self, passed: float, chunk: Chunk | None = None, tokens: Any = None) -> None:
        self.clock.now += round(passed * PERIOD)
        arguments: dict[str, Any] = {}
        if chunk is not None:
            self.backend.rows = RuntimeError("injected") if chunk.rows is None else np.array(chunk.rows)
            arguments = {"tokens": self._zeros(chunk.layers) if tokens is None else tokens}
            if chunk.belief is not None:
                self.backend.std, self.backend.mode_probability = chunk.belief.std, chunk.belief.probability
                arguments = {"logits": self._logits(chunk.layers) if tokens is None else tokens}
            arguments.update(sequence=chunk.number, observed_ns=chunk.observed)
        result = self.decoder.step(**arguments)
        status, is_held = self.specified.step(self.clock.now, chunk)
        is_latched = self.specified.latched is not None
        assert (result.status.name, result.is_held, result.is_latched) == (status, is_held, is_latched), result.detail
        np.testing.assert_allclose(result.actions, self.specified.sent, atol=1e-4, rtol=0, err_msg=result.detail)

    def _zeros(self, layers: int) -> Any:
        return np.zeros(self.tokenizer.model.tokens_shape(1, layers), np.int32)

    def _logits(self, layers: int) -> Any:
        return np.zeros((*self.tokenizer.model.tokens_shape(1, layers), self.tokenizer.model.vocabulary), np.float32)

    def _observed(self, passed: float, delay: float) -> int:
        """As many periods before the coming tick."""
        return self.clock.now + round((passed - delay) * PERIOD)

    @rule(passed=PASSED)
    def nothing_comes(self, passed: float) -> None:
        self._tick(passed)

    @rule(
        passed=PASSED,
        rows=ROWS,
        delay=DELAY,
        layers=st.sampled_from([DRAFT, FULL]),
        skipped=st.integers(1, 2),
        belief=BELIEF,
    )
    def a_chunk_comes(  # what is drawn, given by name
        self, passed: float, rows: list[Row], delay: float, layers: int, skipped: int, belief: Belief | None = None
    ) -> None:
        self.number += skipped
        chunk = Chunk(rows, layers, self.number, self._observed(passed, delay), belief=belief)
        self.draft = chunk if layers == DRAFT else None
        self._tick(passed, chunk)

    @rule(passed=PASSED, rows=ROWS)
    def a_chunk_without_number_and_date_comes(self, passed: float, rows: list[Row]) -> None:
        self.draft = None
        self._tick(passed, Chunk(rows, FULL))
        newest = self.specified.newest
        self.number = self.number if newest is None else newest.number

    @precondition(lambda self: self.draft is not None)
    @rule(passed=PASSED, rows=ROWS, is_dated=st.booleans(), belief=BELIEF)
    def the_full_decode_of_a_draft_comes(
        self, passed: float, rows: list[Row], is_dated: bool, belief: Belief | None = None
    ) -> None:
        assert self.draft is not None
        observed = self.draft.observed if is_dated else None
        self._tick(passed, Chunk(rows, FULL, self.draft.number, observed, belief=belief))

    @rule(rows=ROWS, beliefs=st.lists(BELIEF, min_size=2, max_size=6), between=st.integers(0, 1))
    def a_policy_is_more_and_less_sure(self, rows: list[Row], beliefs: list[Belief | None], between: int) -> None:
        """A chunk on each tick, or on every other one."""
        for belief in beliefs:
            self.a_chunk_comes(1.0, rows, 0.0, FULL, 1, belief)
            for _ in range(between):
                self._tick(1.0)

    @rule(rows=ROWS, full=ROWS, delay=DELAY, between=st.integers(0, 1), after=st.integers(0, 2))
    def a_draft_and_its_full_decode_come(
        self, rows: list[Row], full: list[Row], delay: float, between: int, after: int
    ) -> None:
        self.a_chunk_comes(1.0, rows, delay, DRAFT, 1)
        for _ in range(between):
            self._tick(1.0)
        self.the_full_decode_of_a_draft_comes(1.0, full, True)
        for _ in range(after):
            self._tick(1.0)

    @rule(passed=PASSED, rows=ROWS, behind=st.integers(0, 3), delay=DELAY, layers=st.sampled_from([DRAFT, FULL]))
    def an_old_number_comes(self, passed: float, rows: list[Row], behind: int, delay: float, layers: int) -> None:
        self._tick(passed, Chunk(rows, layers, self.number - behind, self._observed(passed, delay)))

    @rule(passed=PASSED, rows=ROWS, delay=st.sampled_from([-3.0, -0.9, 3.4, 3.6, 4.0, 7.6, 20.0]))
    def a_chunk_from_another_time_comes(self, passed: float, rows: list[Row], delay: float) -> None:
        self.number += 1
        self._tick(passed, Chunk(rows, FULL, self.number, self._observed(passed, delay)))

    @rule(
        passed=PASSED,
        rows=ROWS,
        step=st.integers(0, T - 1),
        place=st.integers(0, 2),
        share=st.sampled_from([9.0, 1.01, 0.99, 0.1]),
        is_above=st.booleans(),
    )
    def a_chunk_outside_the_limits_comes(
        self, passed: float, rows: list[Row], step: int, place: int, share: float, is_above: bool
    ) -> None:
        """By so many times the tolerance."""
        low, high = VALUES["action_low"][place], VALUES["action_high"][place]
        beyond = share * TOLERANCE * (high - low)
        rows[step][place] = float(np.float32(high + beyond if is_above else low - beyond))
        self.number += 1
        self._tick(passed, Chunk(rows, FULL, self.number, self._observed(passed, 0.0)))

    @rule(
        passed=PASSED,
        rows=ROWS,
        step=st.integers(0, T - 1),
        place=st.integers(0, 2),
        value=st.sampled_from([1.0, -1.0]),
    )
    def what_is_not_finite_comes(self, passed: float, rows: list[Row], step: int, place: int, value: float) -> None:
        rows[step][place] = float("nan") if place == 1 else value * float("inf")
        self.number += 1
        self._tick(passed, Chunk(rows, FULL, self.number, self._observed(passed, 0.0)))

    @rule(passed=PASSED, belief=BELIEF)
    def the_backend_raises(self, passed: float, belief: Belief | None) -> None:
        self.number += 1
        self._tick(passed, Chunk(None, FULL, self.number, self._observed(passed, 0.0), belief=belief))

    @rule(passed=PASSED, value=st.sampled_from([-1, 0, 2**30]), behind=st.integers(0, 1))
    def an_illegal_token_comes(self, passed: float, value: int, behind: int) -> None:
        """-1, the first above the vocabulary, or a far larger one."""
        tokens = self._zeros(FULL)
        tokens.flat[-1] = value if value < 0 else self.tokenizer.model.vocabulary + value
        self.number += 1 - behind
        chunk = Chunk(None, FULL, self.number, self._observed(passed, 0.0), is_legal=False)
        self._tick(passed, chunk, tokens)

    @rule(passed=PASSED, value=st.sampled_from([float("nan"), float("inf")]), behind=st.integers(0, 1))
    def a_belief_that_is_none_comes(self, passed: float, value: float, behind: int) -> None:
        logits = self._logits(FULL)
        logits.flat[-1] = value
        self.number += 1 - behind
        observed, belief = self._observed(passed, 0.0), Belief([[0.0] * 3] * T, 1.0)
        self._tick(passed, Chunk(None, FULL, self.number, observed, is_legal=False, belief=belief), logits)

    @rule(passed=PASSED, way=st.integers(0, 2))
    def what_is_no_belief_comes(self, passed: float, way: int) -> None:
        logits = self._logits(FULL)
        belief = Belief([[0.0] * 3] * T, 1.0)
        given = (logits[0], logits.astype(np.float64), "logits")[way]
        self._tick(passed, Chunk(None, 0, self.number, is_legal=False, belief=belief), given)

    @rule(passed=PASSED, way=st.integers(0, 3))
    def what_is_no_chunk_comes(self, passed: float, way: int) -> None:
        whole = self._zeros(FULL)
        tokens = (whole[0], whole.astype(np.float32), [0], "tokens")[way]
        self._tick(passed, Chunk(None, 0, self.number, is_legal=False), tokens)

    @rule()
    def the_policy_stops(self) -> None:
        self._tick(9.0)

    @rule()
    def the_clock_goes_back(self) -> None:
        self.draft = None
        self._tick(-5.0)

    @rule(position=st.none() | ROW)
    def a_person_resets(self, position: Row | None) -> None:
        self.decoder.reset(position)
        self.specified.reset(position)
        self.draft, self.number = None, 0


class ChunkLoopMachine(LoopMachine):
    tokens = CHUNKS


LoopMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
ChunkLoopMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestLoop = LoopMachine.TestCase
TestLoopOfChunkTokens = ChunkLoopMachine.TestCase
