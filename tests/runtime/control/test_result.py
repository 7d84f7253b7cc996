"""What a result says, of a tick that was whole and of one that was not; nothing is left to be guessed."""

import copy
import pickle
from typing import Any

import pytest

from rfsq.runtime import ControlDecoder, Status
from rfsq.runtime.control.result import ControlResult
from tests.bundles import Recipe
from tests.runtime.control.loops import PERIOD_NS, Clock, ScriptedLoop, config_of, loop, scripted

ADVICE = "it was raised from outside; send this action, or stop the robot"


def _said(result: ControlResult) -> dict[str, Any]:
    names = ("status", "is_held", "is_limited", "is_latched", "fell_back", "backend", "detail", "tick", "sequence")
    return {name: getattr(result, name) for name in names} | {
        "actions": result.actions.tolist(),
        "latency_ns": result.latency_ns,
    }


NOTHING_YET = {
    **{"status": Status.NOT_READY, "is_held": True, "is_limited": False, "is_latched": False, "fell_back": False},
    **{"backend": "", "detail": "", "tick": 0, "sequence": -1, "actions": [0.0] * 3, "latency_ns": 0},
}


def test_before_anything_has_happened_it_stands_still() -> None:
    with ScriptedLoop() as made:
        assert _said(made.decoder.result) == NOTHING_YET
    config = made.config
    assert _said(ControlDecoder(scripted(Recipe(chunk_length=4))[0], config).result) == NOTHING_YET


def _break_off(made: ScriptedLoop, error: BaseException) -> ControlResult:
    with pytest.raises(type(error)):
        made.tick(error)
    return made.decoder.result


@pytest.mark.parametrize("record_ticks", [0, 16])
def test_a_tick_that_was_broken_off_stands_still_and_is_the_next_one(record_ticks: int) -> None:
    with ScriptedLoop(record_ticks=record_ticks, max_relative_step=(0.25,) * 3) as made:
        made.tick(0.25, sequence=6)
        assert first_of_limited(made.tick(0.75, sequence=7)) == (pytest.approx(0.5), True)
        result = _break_off(made, KeyboardInterrupt("now"))
        expected = {
            **{"status": Status.BACKEND_FAULT, "is_held": True, "is_limited": False, "is_latched": False},
            **{"fell_back": False, "backend": "scripted", "tick": 3, "sequence": 7, "latency_ns": 0},
            "detail": f"the tick was broken off: KeyboardInterrupt: now; {ADVICE}",
        }
        said = _said(result)
        held = said.pop("actions")
        assert held == pytest.approx([0.25] * 3, abs=1e-6)
        assert said == expected
        # A copy is of this tick still when others have come.
        copies = [copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))]  # noqa: S301
        for _ in range(3):
            made.tick(0.1)
        for copied in copies:
            assert _said(copied) == {**expected, "actions": held}
        assert made.decoder.result.tick == 6


def first_of_limited(result: ControlResult) -> tuple[float, bool]:
    return float(result.actions[0]), result.is_limited


def test_a_latch_outlives_a_tick_that_was_broken_off() -> None:
    with ScriptedLoop(on_fault="stop") as made:
        assert made.wrong().is_latched
        made.clock.readings = [KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            made.tick()
        result = made.decoder.result
        assert (result.status, result.is_latched, result.tick) == (Status.BAD_TOKEN, True, 2)
        result = made.tick(0.5)
        assert (result.status, result.is_latched) == (Status.BAD_TOKEN, True)
        assert result.detail == "standing still after a fault; find the cause, then call reset()"
        first = result.tick
        assert [made.tick().tick for _ in range(3)] == [first + 1, first + 2, first + 3]


def test_a_held_action_is_not_a_limited_one() -> None:
    with ScriptedLoop(max_relative_step=(0.25,) * 3, deadline_us=1000.0) as made:
        result = made.tick(0.75)
        assert (result.is_held, result.is_limited) == (False, True)
        # Limited when it was chosen, and too late when it was there.
        begin = made.clock.now + PERIOD_NS
        made.clock.readings = [begin, begin + 10**6, begin + 10**6 + 1, begin + 10**6 + 2]
        result = made.tick(-0.75)
        assert (result.status, result.is_held, result.is_limited) == (Status.DEADLINE_MISS, True, False)
        assert made.clock.readings == []
        assert made.tick(0.0).is_limited is False


def test_how_long_it_took_is_in_nanoseconds_and_in_microseconds() -> None:
    with ScriptedLoop() as made:
        begin = made.clock.now + PERIOD_NS
        # When it begins, when the action is there, and at the end.
        made.clock.readings = [begin, begin + 1_000, begin + 2_500]
        result = made.tick(0.5)
        assert (result.latency_ns, result.latency_us) == (2_500, 2.5)
        assert _said(copy.copy(result)) == _said(result)
        assert repr(result) == "ControlResult(OK, [0.5, 0.5, 0.5], 2.5 us)"
        refused = repr(made.wrong())
        assert refused.startswith("ControlResult(BAD_TOKEN, held, [0.0, 0.0, 0.0], 0.0 us: tokens is a builtins.str; ")


def test_once_closed_a_motion_ends_within_the_slew_and_every_call_is_counted() -> None:
    made = ScriptedLoop(max_relative_step=(0.25,) * 3)
    for _ in range(3):
        made.tick(0.75)
    made.decoder.close()
    sent = [float(made.tick(0.75).actions[0]) for _ in range(4)]
    assert sent == pytest.approx([0.5, 0.25, 0.0, 0.0], abs=1e-5)
    result = made.decoder.result
    assert result.detail == "the decoder is not warm, or closed; call warmup() in the thread of the loop"
    assert made.decoder.snapshot().statuses["NOT_READY"] == made.decoder.snapshot().held == 4


def test_one_that_was_never_warm_may_be_closed_and_says_what_it_is(tokenizer: Any) -> None:
    decoder = loop(tokenizer, clock=Clock())
    assert decoder.flush()
    decoder.close()
    assert repr(decoder) == f"ControlDecoder(not warm, latest_only, {tokenizer!r})"
    assert decoder.config == config_of(tokenizer)


def test_who_looks_while_a_tick_is_under_way_sees_a_robot_that_stands_still() -> None:
    """As a thread may that has to stop the robot, or a third exception that leaves no room for anything to be done."""
    seen: list[dict[str, Any]] = []
    with ScriptedLoop(max_relative_step=(0.25,) * 3) as made:
        decode = made.backend.decode_into

        def look(*arguments: Any) -> None:
            seen.append(_said(made.decoder.result))
            decode(*arguments)

        made.backend.decode_into = look  # type: ignore[method-assign]
        for wanted in (0.25, 0.5, 0.75, 0.5):
            made.tick(wanted)
    assert [found["tick"] for found in seen] == [1, 2, 3, 4]
    assert [found["sequence"] for found in seen] == [-1, 0, 1, 2]
    assert {(found["status"], found["is_held"]) for found in seen} == {(Status.BACKEND_FAULT, True)}
    assert [found["actions"][0] for found in seen] == pytest.approx([0.0, 0.0, 0.25, 0.5], abs=1e-5)
