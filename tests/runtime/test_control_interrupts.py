"""A tick that is broken off before any of its bytecodes, by one or two exceptions, leaves a robot that stands still."""

import contextlib
import dis
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import ActionTokenizer, ControlDecoder, ControlFaultError, Status
from runtime.control_soak import chunks_of
from tests.runtime.control_loops import PERIOD_NS, Clock, check_safe, loop, switched
from tests.runtime.opcodes import Breaker, in_a_thread

#: In `step`, before which instructions a tick that is broken off is not held: those that look up what was shown last,
#: with the beginnings of both `try`, when nothing has begun; and the last one, when all is done. None of them calls
#: anything: but for RESUME, where the call begins, a signal's handler never runs there.
_BEFORE = ["RESUME", "LOAD_FAST", "LOAD_ATTR", "LOAD_ATTR", "STORE_FAST", "NOP", "NOP"]
_AFTER = ["RETURN_VALUE"]


pytestmark = pytest.mark.own_trace


class Scene:
    """Ticks of one decoder, each checked in float64 against what was sent before it."""

    def __init__(self, decoder: ControlDecoder, clock: Clock, chunks: list[Any], graphs: list[Any]) -> None:
        self.decoder, self._clock, self.chunks, self.graphs = decoder, clock, chunks, graphs
        self.sent, self.number = np.zeros(decoder.config.action_dim, np.float32), decoder.result.tick
        #: Before which offsets of `step` it was broken off and not held, when nothing had begun, or all was done.
        self.before: set[int] = set()
        self.after: set[int] = set()

    def tick(self, tokens: Any = None, after_ns: int = PERIOD_NS) -> Any:
        self._clock.now += after_ns
        # The safe action is in `result`.
        with contextlib.suppress(ControlFaultError):
            self.decoder.step(tokens)
        return self.see()

    def see(self) -> Any:
        """What `result` says is what is sent, unless a tick of this number was sent already."""
        result = self.decoder.result
        if result.tick == self.number:
            np.testing.assert_array_equal(result.actions, self.sent)
            return result
        assert result.tick > self.number
        check_safe(result, self.sent, self.decoder.config)
        self.sent, self.number = result.actions.copy(), result.tick
        return result

    def serve(self) -> None:
        assert self.tick(self.chunks[0]).status is Status.OK

    def _unlock(self) -> None:
        """ONNX Runtime's backend serves on when it was broken off with its lock taken, but another way, and slowly.

        The next tick that is broken off is to go the usual way again.
        """
        for graph in self.graphs:
            if graph._lock.locked():
                graph._lock.release()

    def break_off(self, what: Callable[["Scene"], object], at: list[int]) -> Breaker:
        """One tick, broken off; then the next ones go on."""
        before = self.decoder.result.shown
        self._clock.now += PERIOD_NS
        breaker = Breaker(at)
        error = breaker.run(lambda: what(self))
        if not breaker.places:
            assert error is None or isinstance(error, ControlFaultError)
            return breaker
        result = self.see()
        if result.is_held:
            assert result.status is not Status.OK
        else:
            # It had not begun, and all is as it was; or it was whole. No second one was left to come.
            ((name, offset),) = breaker.places
            assert name == "step"
            if result.shown is before:
                self.before.add(offset)
            else:
                assert result.tick == before.tick + 1
                self.after.add(offset)
        self._unlock()
        # Some loops go on at once, others with their next period.
        number, after_ns = self.number, PERIOD_NS // (1, 25)[sum(at) % 2]
        assert self.tick(after_ns=after_ns).is_held or not result.is_held, breaker.places
        assert self.number > number
        assert self.tick(self.chunks[2]).status is Status.OK, breaker.places
        assert gc.isenabled()
        return breaker


def _check_beside(scene: Scene) -> None:
    """What is not held is as short as can be, and named."""
    names = {found.offset: found.opname for found in dis.get_instructions(ControlDecoder.step)}
    first = list(names)[: len(_BEFORE)]
    assert [names[offset] for offset in first] == _BEFORE
    assert scene.before <= set(first)
    assert {names[offset] for offset in scene.after} <= set(_AFTER)
    assert len(scene.after) <= 1


def _chunk(scene: Scene) -> None:
    scene.decoder.step(scene.chunks[1])


def _nothing(scene: Scene) -> None:
    scene.decoder.step()


def _bad(scene: Scene) -> None:
    scene.decoder.step(scene.chunks[1] - 100)


def _broken_before(scene: Scene) -> None:
    """The tick after one that was broken off."""
    scene.decoder.step(scene.chunks[1])


@pytest.fixture
def tokenizer(bundle: Path) -> Iterator[ActionTokenizer]:
    """Of one test alone: what is broken off in it is left in no state for others."""
    with ActionTokenizer.load(bundle) as loaded:
        yield loaded


@pytest.fixture
def scene_of(tokenizer: ActionTokenizer) -> Iterator[Callable[..., Scene]]:
    decoders: list[ControlDecoder] = []

    def make(*, has_spare: bool = False, **changes: Any) -> Scene:
        clock = Clock()
        main, backend = switched(tokenizer, "main")
        spares = (switched(tokenizer, "spare")[0],) if has_spare else ()
        decoder = loop(main, fallbacks=spares, clock=clock, retry_after_s=1e5, **changes)
        decoders.append(decoder)
        decoder.warmup()
        graphs: Any = tokenizer.backend
        scene = Scene(decoder, clock, chunks_of(tokenizer, 3)[0], list(graphs._decoders.values()))
        scene.backend = backend  # type: ignore[attr-defined]
        return scene

    yield make
    for decoder in decoders:
        decoder.close()


SCENES: dict[str, tuple[Callable[[Scene], None], dict[str, Any]]] = {
    "latest_only": (_chunk, {}),
    "weighted_average": (_chunk, {"strategy": "weighted_average"}),
    "temporal_ensemble": (_chunk, {"strategy": "temporal_ensemble"}),
    "no chunk": (_nothing, {}),
    "bad tokens": (_bad, {}),
    "bad tokens, raise": (_bad, {"on_fault": "raise"}),
    "worker": (_chunk, {"use_worker": True, "deadline_us": 60e6}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCENES))
@in_a_thread
def test_a_tick_that_is_broken_off_before_any_bytecode_stands_still(scene_of: Any, name: str) -> None:
    what, changes = SCENES[name]
    scene, number = scene_of(**changes), 0
    while True:
        number += 1
        scene.serve()
        if not scene.break_off(what, [number]).places:
            break
    assert number > 500
    _check_beside(scene)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCENES))
@in_a_thread
def test_a_tick_that_is_broken_off_twice_stands_still(scene_of: Any, name: str) -> None:
    """The second exception comes before any bytecode of what is done about the first."""
    what, changes = SCENES[name]
    scene, first, twice = scene_of(**changes), 1, 0
    is_over = False
    while not is_over:
        second = 1 + first % 13
        while True:
            scene.serve()
            breaker = scene.break_off(what, [first, second])
            is_over = not breaker.places
            if len(breaker.places) < 2:
                break
            twice += 1
            second += 13
        first += 61
    assert twice > 50
    _check_beside(scene)


@pytest.mark.slow
@in_a_thread
def test_a_tick_after_a_broken_one_that_is_broken_off_too_stands_still(scene_of: Any) -> None:
    scene, number = scene_of(), 0
    scene.serve()
    while True:
        number += 5
        scene._clock.now += PERIOD_NS
        assert Breaker([200]).run(lambda: scene.decoder.step(scene.chunks[1])) is not None
        assert scene.see().is_held
        if not scene.break_off(_broken_before, [number]).places:
            break
    _check_beside(scene)


@pytest.mark.parametrize("after", ["service", "a broken tick"])
@in_a_thread
def test_a_reset_that_is_broken_off_before_any_bytecode_has_not_begun_or_stands_still(
    scene_of: Any, after: str
) -> None:
    scene, number, begun = scene_of(), 0, 0
    while True:
        number += 1
        scene.serve()
        if after == "a broken tick":
            scene._clock.now += PERIOD_NS
            assert Breaker([200]).run(lambda: scene.decoder.step(scene.chunks[1])) is not None
            assert scene.see().is_held
        before = scene.decoder.result.shown
        breaker = Breaker([number])
        breaker.run(lambda: scene.decoder.reset())
        # Where it has begun, ticks are counted anew.
        scene.number = -1
        result = scene.see()
        if not breaker.places:
            break
        begun += result.shown is not before
        if result.shown is before and not result.is_held:
            # All is as it was.
            assert scene.tick().status is Status.OK, breaker.places
        else:
            assert result.is_held, breaker.places
            assert scene.tick().is_held, breaker.places
            assert scene.tick().is_held, breaker.places
        assert scene.tick(scene.chunks[2]).status is Status.OK, breaker.places
    assert (result.status, result.tick) == (Status.NOT_READY, 0)
    assert number > 100
    assert begun > (50 if after == "service" else 0)
