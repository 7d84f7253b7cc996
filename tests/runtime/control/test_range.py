"""What is decoded beside the limits: brought to them where reconstruction can be the reason, refused beyond that."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime import ControlConfig, ControlDecoder, Status
from rfsq.runtime.control.config import Strategy
from rfsq.runtime.control.guard import ActionGuard
from tests.bundles import Recipe
from tests.runtime.control.loops import PERIOD_NS, Clock, check_safe, scripted

T = 4
#: A motion, a place, a gripper of 0 to 100 whose limits are physical ones.
VALUES: dict[str, Any] = {
    "period_s": PERIOD_NS / 1e9,
    "action_low": (-1.0, -2.0, 0.0),
    "action_high": (1.0, 2.0, 100.0),
    "max_relative_step": (0.5, 0.5, float("inf")),
    "action_kind": ("delta", "absolute", "absolute"),
    "gripper": (2,),
    "stale_after_s": 10.0,
}
START = (0.0, 0.0, 100.0)
TOKENIZER, BACKEND = scripted(Recipe(chunk_length=T))
TOKENS = np.zeros((1, T, 4, 3), np.int32)
STRATEGIES = pytest.mark.parametrize("strategy", list(Strategy))
#: Far and wide, and often near to a limit.
PLACE = st.floats(-3, 3, width=32) | st.floats(0.875, 1.25, width=32) | st.floats(-1.25, -0.875, width=32)


class Loop:
    def __init__(self, position: tuple[float, ...] = START, **changes: Any) -> None:
        self.clock = Clock()
        self.config = ControlConfig(**{**VALUES, **changes})
        BACKEND.rows = np.tile(np.array(position), (T, 1))
        self.decoder = ControlDecoder(TOKENIZER, self.config, position=position, clock=self.clock)
        self.decoder.warmup()

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        self.decoder.close()

    def tick(self, rows: Any = None) -> Any:
        self.clock.now += PERIOD_NS
        if rows is not None:
            BACKEND.rows = np.broadcast_to(np.array(rows, np.float64), (T, 3))
        return self.decoder.step(None if rows is None else TOKENS)


@given(
    chunks=st.lists(
        st.lists(st.tuples(PLACE, PLACE, PLACE), min_size=T, max_size=T) | st.none(), min_size=1, max_size=8
    ),
    tolerance=st.sampled_from([0.0, 0.05, 0.5, 1.0, (0.0, 0.1, 1.0)]),
    out_of_range=st.sampled_from(["reject", "limit"]),
    strategy=st.sampled_from(list(Strategy)),
    locked=st.none() | st.sampled_from([0.7, -1.3, 0.0]),
)
def test_nothing_outside_limits_or_slew_is_ever_sent(
    chunks: list[Any], tolerance: Any, out_of_range: str, strategy: Strategy, locked: float | None
) -> None:
    changes: dict[str, Any] = {"range_tolerance": tolerance, "out_of_range": out_of_range, "strategy": strategy}
    position = START
    if locked is not None:
        changes |= {"action_low": (-1.0, locked, 0.0), "action_high": (1.0, locked, 100.0)}
        position = (0.0, locked, 100.0)
    with Loop(position, **changes) as loop:
        low, high = np.array(loop.config.action_low), np.array(loop.config.action_high)
        width = np.array(loop.config.tolerances)
        before = np.array(position, np.float32)
        for chunk in chunks:
            rows = None if chunk is None else np.array(chunk) * (1, 2, 100)
            result = loop.tick(rows)
            check_safe(result, before, loop.config)
            before = result.actions
            if rows is None:
                continue
            decoded = rows.astype(np.float32).astype(np.float64)
            is_near = ((decoded >= low - width) & (decoded <= high + width)) | (low == high)
            # One that lies on the border itself is decided by the rounding of the border.
            if (np.abs(np.maximum(low - decoded, decoded - high) - width) > 1e-4).all():
                assert result.status is (Status.OK if is_near.all() else Status.OUT_OF_RANGE), result
                assert result.is_held is (not is_near.all() and out_of_range == "reject")


@STRATEGIES
def test_a_gripper_decoded_beside_its_physical_limit_is_sent_at_it(strategy: Strategy) -> None:
    """As it is with good demonstrations: a gripper that is open is at its limit, and tokens are not exact."""
    with Loop(strategy=strategy) as loop:
        for beside, limit in ((100.8, 100.0), (-0.8, 0.0)):
            for _ in range(3):
                result = loop.tick((0.0, 0.0, beside))
                assert (result.status, result.is_held, result.is_limited) == (Status.OK, False, True)
                assert result.detail == ""
                assert result.actions[2] == limit
        result = loop.tick((0.0, 0.0, 50.0))
        assert (result.status, result.is_limited, result.actions[2]) == (Status.OK, False, 50.0)
        assert loop.decoder.snapshot().refused_chunks == 0


def test_each_tick_says_whether_its_own_action_was_brought_to_a_limit() -> None:
    with Loop() as loop:
        rows = np.zeros((T, 3))
        rows[2, 2] = 101.0
        found = [loop.tick(rows).is_limited, *(loop.tick().is_limited for _ in range(T - 1))]
        assert found == [False, False, True, False]


def test_beyond_the_tolerance_a_chunk_is_refused_and_the_message_says_what_can_be_done() -> None:
    with Loop(range_tolerance=(0.05, 0.05, 0.01)) as loop:
        result = loop.tick((0.0, 0.0, 101.5))
        assert (result.status, result.is_held, result.actions[2]) == (Status.OUT_OF_RANGE, True, 100.0)
        assert result.detail == (
            "actions[0, 2] is 101.5; expected 0.0 to 100.0, or up to 1 outside (range_tolerance): look at the policy, "
            "at action_low and action_high, or raise range_tolerance"
        )


def test_without_a_tolerance_the_limit_itself_is_the_last_value() -> None:
    above = float(np.nextafter(np.float32(100.0), np.float32(np.inf)))
    for value, status in ((100.0, Status.OK), (above, Status.OUT_OF_RANGE)):
        with Loop(range_tolerance=0) as loop:
            assert loop.tick((0.0, 0.0, value)).status is status


@STRATEGIES
@pytest.mark.parametrize("place", [0.7, -1.3, 0.0])
def test_a_locked_joint_is_held_and_says_nothing(strategy: Strategy, place: float) -> None:
    """Whatever is decoded for it: it cannot move, and so is no reason to stop the others."""
    limits = {"action_low": (-1.0, place, 0.0), "action_high": (1.0, place, 100.0)}
    with Loop((0.0, place, 100.0), **limits, strategy=strategy, max_relative_step=(0.5, 0.0, 100.0)) as loop:
        for decoded in (place + 0.026, place, place - 40.0, 3e38):
            result = loop.tick((0.25, decoded, 50.0))
            assert (result.status, result.is_limited) == (Status.OK, False), decoded
            np.testing.assert_array_equal(result.actions, np.array([0.25, place, 50.0], np.float32))
        assert loop.tick((0.25, np.nan, 50.0)).status is Status.NONFINITE
        assert loop.tick((0.25, np.inf, 50.0)).status is Status.NONFINITE
        assert loop.decoder.result.actions[1] == np.float32(place)


def test_the_result_shows_what_it_says() -> None:
    with Loop() as loop:
        assert "]" in repr(loop.tick((0.0, 0.0, 50.0)))
        assert repr(loop.decoder.result).endswith(" us)")
        held = loop.tick((0.0, 0.0, 500.0))
        assert repr(held).endswith(f" us: {held.detail})")
        assert "actions[0, 2] is 500.0; expected 0.0 to 100.0" in repr(held)


def test_the_guard_alone_leaves_what_is_near_to_each_tick() -> None:
    guard = ActionGuard(ControlConfig(**VALUES), T, START)
    chunk = np.tile(np.array([0.0, 0.0, 104.0], np.float32), (T, 1))
    assert guard.check_chunk(chunk) is Status.OK
    assert (chunk[:, 2] == 104.0).all()
    assert guard.limit(chunk[0])
    assert guard.values == [0.0, 0.0, 100.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_tolerance_ends_at_the_last_float32_that_is_within_it(sign: int) -> None:
    limits = np.random.default_rng(0).uniform(0.5, 50.0, 50)
    for limit in limits:
        bounds = sorted((0.0, sign * float(limit)))
        changes = {"action_low": (-1.0, -1.0, bounds[0]), "action_high": (1.0, 1.0, bounds[1])}
        config = ControlConfig(**{**VALUES, **changes, "range_tolerance": 0.05})
        last = np.float32(sign * 1.05 * limit)
        # The nearest one may lie beyond.
        if abs(float(last)) > config.tolerances[2] + float(limit):
            last = np.nextafter(last, np.float32(0))
        for value, status in ((last, Status.OK), (np.nextafter(last, np.float32(sign * np.inf)), Status.OUT_OF_RANGE)):
            chunk = np.zeros((T, 3), np.float32)
            chunk[:, 2] = value
            assert ActionGuard(config, T, (0.0, 0.0, 0.0)).check_chunk(chunk) is status
