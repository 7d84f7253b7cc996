"""A tick that is broken off before any of its bytecodes, by one or two exceptions, leaves a robot that stands still."""

import contextlib
import dis
import gc
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, ControlDecoder, ControlFaultError, Status
from rfsq.runtime.qualification.soak import chunks_of
from tests.bundles import Recipe
from tests.runtime.control.loops import PERIOD_NS, Clock, SwitchedBackend, check_safe, fails, loop, switched
from tests.runtime.control.opcodes import Breaker, Survey, in_a_thread

#: In `step`, before which instructions a tick that is broken off is not held: those that look up what was shown last,
#: with the beginnings of both `try`, when nothing has begun; and the last one, when all is done. None of them calls
#: anything: but for RESUME, where the call begins, a signal's handler never runs there.
_BEFORE = ["RESUME", "LOAD_FAST", "LOAD_ATTR", "LOAD_ATTR", "STORE_FAST", "NOP", "NOP"]
_AFTER = ["RETURN_VALUE"]
#: The instructions of `step`, by their offset.
_STEP = {found.offset: found.opname for found in dis.get_instructions(ControlDecoder.step)}
_BEFORE_OFFSETS = list(_STEP)[: len(_BEFORE)]
#: Of a loop, as that over all signals which looks for their handlers, so many rounds are broken off.
_ROUNDS = 3


pytestmark = pytest.mark.own_trace


class Scene:
    """Ticks of one decoder, each checked in float64 against what was sent before it."""

    def __init__(
        self,
        decoder: ControlDecoder,
        clock: Clock,
        chunks: list[Any],
        graphs: list[Any],
        backends: list[SwitchedBackend],
    ) -> None:
        self.decoder, self.clock, self.chunks, self.graphs, self.backends = decoder, clock, chunks, graphs, backends
        model = decoder._tokenizers[0].model
        #: Of a chunk of which nothing is known.
        self.logits = np.zeros((*model.tokens_shape(1), model.vocabulary), np.float32)
        #: Of a chunk that gets one by its policy.
        self.sequence = 0
        self.sent, self.number = np.zeros(decoder.config.action_dim, np.float32), decoder.result.tick
        #: Before which offsets of `step` it was broken off and not held, when nothing had begun, or all was done.
        self.before: set[int] = set()
        self.after: set[int] = set()

    def tick(self, tokens: Any = None, after_ns: int = PERIOD_NS, sequence: int | None = None) -> Any:
        self.clock.now += after_ns
        # The safe action is in `result`.
        with contextlib.suppress(ControlFaultError):
            self.decoder.step(tokens, sequence=sequence)
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

    def mend(self) -> None:
        """All backends work, and nothing is latched."""
        chain: Any = self.decoder._chain
        for backend, warm in zip(self.backends, chain.warm, strict=True):
            backend.act, warm.is_healthy = None, True
        if self.decoder.result.is_latched:
            self.decoder.reset()
            # Ticks are counted anew.
            self.number = -1
            assert not self.see().is_latched

    def survey(self, case: "Case") -> Survey:
        """Of such a tick, whole."""
        case.prepare(self)
        self.clock.now += PERIOD_NS
        survey = Survey()
        error = survey.run(lambda: case.what(self))
        assert error is None or isinstance(error, ControlFaultError)
        self.see()
        self.mend()
        # What an exception leaves of an Event or a Condition hangs the next tick.
        assert not survey.has_threading
        return survey

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
        self.clock.now += PERIOD_NS
        breaker = Breaker(at)
        error = breaker.run(lambda: what(self))
        if not breaker.places:
            assert error is None or isinstance(error, ControlFaultError)
            return breaker
        result = self.see()
        assert result.is_latched or not before.is_latched, breaker.places
        if result.is_held:
            assert result.status is not Status.OK
        else:
            # It had not begun, and all is as it was; or it was whole. No second one was left to come.
            ((name, offset),) = breaker.places
            assert name == "step"
            if result.shown is before:
                self.before.add(offset)
            else:
                assert result.tick > before.tick
                self.after.add(offset)
        self._unlock()
        # There is one result for all ticks.
        was_held, was_latched = result.is_held, result.is_latched
        # Some loops go on at once, others with their next period.
        number, after_ns = self.number, PERIOD_NS // (1, 25)[sum(at) % 2]
        following = self.tick(after_ns=after_ns)
        assert following.is_held or not was_held, breaker.places
        assert following.is_latched or not was_latched, breaker.places
        assert self.number > number
        self.mend()
        assert self.tick(self.chunks[2]).status is Status.OK, breaker.places
        assert gc.isenabled()
        return breaker


def _check_beside(scene: Scene) -> None:
    """What is not held is as short as can be, and named."""
    assert [_STEP[offset] for offset in _BEFORE_OFFSETS] == _BEFORE
    assert scene.before <= set(_BEFORE_OFFSETS)
    assert {_STEP[offset] for offset in scene.after} <= set(_AFTER)
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
def scene_of(
    tokenizer: ActionTokenizer,
    bundle_of: Callable[[Recipe], Path],
    chunk_bundle: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., Scene]]:
    decoders: list[ControlDecoder] = []

    def make(
        *, has_spare: bool = False, chunk_length: int | None = None, has_chunk_tokens: bool = False, **changes: Any
    ) -> Scene:
        clock, used = Clock(), tokenizer
        if chunk_length is not None or has_chunk_tokens:
            folder = chunk_bundle if has_chunk_tokens else bundle_of(Recipe(chunk_length=chunk_length or 1))
            used = ActionTokenizer.load(folder, backend="onnxruntime")
            request.addfinalizer(used.close)
        (main, *spares), backends = zip(
            *(switched(used, name) for name in ("main", "spare")[: 1 + has_spare]), strict=True
        )
        decoder = loop(main, fallbacks=tuple(spares), clock=clock, retry_after_s=1e5, **changes)
        decoders.append(decoder)
        decoder.warmup()
        graphs: Any = used.backend
        return Scene(decoder, clock, chunks_of(used, 3)[0], list(graphs._decoders.values()), list(backends))

    yield make
    for decoder in decoders:
        decoder.close()


@dataclass(frozen=True)
class Case:
    """what: the tick that is broken off, `before` which another one has served. changes: of the settings.

    every: which of its bytecodes are taken, where they are too many.
    """

    what: Callable[[Scene], None]
    changes: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Scene], None] = lambda _: None
    every: int = 1

    def prepare(self, scene: Scene) -> None:
        scene.serve()
        self.before(scene)


def _fails(scene: Scene) -> None:
    scene.backends[0].act = fails


def _all_fail(scene: Scene) -> None:
    for backend in scene.backends:
        backend.act = fails


def _goes_outside(scene: Scene) -> None:
    scene.backends[0].act = lambda actions: actions.fill(1e3)


def _latches(scene: Scene) -> None:
    assert scene.tick(scene.chunks[1] - 100).is_latched


def _after_missed_ticks(scene: Scene) -> None:
    """Three periods after the last one; all but the first are in time for what is queued."""
    scene.clock.now += 2 * PERIOD_NS
    scene.decoder.step()


def _after_many_missed_ticks(scene: Scene) -> None:
    """Nothing is queued for it; a new chunk comes."""
    scene.clock.now += 7 * PERIOD_NS
    scene.decoder.step(scene.chunks[1])


def _draft_of(scene: Scene) -> Any:
    return np.ascontiguousarray(scene.chunks[1][..., :2])


def _asks_for_the_next_number(scene: Scene) -> None:
    scene.sequence = scene.decoder.result.sequence + 1


def _draft(scene: Scene) -> None:
    scene.decoder.step(_draft_of(scene), sequence=scene.sequence)


def _has_a_draft(scene: Scene) -> None:
    _asks_for_the_next_number(scene)
    assert scene.tick(_draft_of(scene), sequence=scene.sequence).status is Status.OK


def _full(scene: Scene) -> None:
    scene.decoder.step(scene.chunks[1], sequence=scene.sequence)


def _belief(scene: Scene) -> None:
    scene.decoder.step(logits=scene.logits)


_SPARE: dict[str, Any] = {"has_spare": True}
_WORKER: dict[str, Any] = {"use_worker": True, "deadline_us": 60e6}
CASES = {
    "latest_only": Case(_chunk),
    "weighted_average": Case(_chunk, {"strategy": "weighted_average"}),
    "temporal_ensemble": Case(_chunk, {"strategy": "temporal_ensemble"}),
    "no chunk": Case(_nothing),
    "bad tokens": Case(_bad),
    "bad tokens, raise": Case(_bad, {"on_fault": "raise"}),
    "bad tokens, stop": Case(_bad, {"on_fault": "stop"}),
    "latched": Case(_chunk, {"on_fault": "stop"}, _latches),
    "outside, limit": Case(_chunk, {"out_of_range": "limit"}, _goes_outside),
    "falls back": Case(_chunk, _SPARE, _fails),
    "falls back, worker": Case(_chunk, _SPARE | _WORKER, _fails, 3),
    "all backends fail": Case(_chunk, _SPARE, _all_fail, 5),
    "after missed ticks": Case(_after_missed_ticks, {"chunk_length": 4}),
    "after many missed ticks": Case(_after_many_missed_ticks),
    "draft": Case(_draft, {}, _asks_for_the_next_number),
    "full decode": Case(_full, {}, _has_a_draft),
    "full decode, temporal_ensemble": Case(_full, {"strategy": "temporal_ensemble"}, _has_a_draft),
    "full decode of chunk tokens": Case(_full, {"has_chunk_tokens": True}, _has_a_draft),
    "worker": Case(_chunk, _WORKER),
    "belief": Case(_belief, {"beliefs": {}}),
    "uncertain": Case(_belief, {"beliefs": {"least_mode_probability": 0.9, "when_uncertain": "slow"}}),
    "uncertain, held": Case(_belief, {"beliefs": {"std_limit": 1e-6}, "on_fault": "stop"} | _WORKER),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
@in_a_thread
def test_a_tick_that_is_broken_off_before_any_bytecode_stands_still(scene_of: Any, name: str) -> None:
    case = CASES[name]
    scene = scene_of(**case.changes)
    scene.serve()
    survey = scene.survey(case)
    numbers = survey.numbers(_ROUNDS)[:: case.every]
    assert numbers[-1] > 500
    # A tick may be a little longer than another one.
    for number in itertools.chain(numbers, itertools.count(len(survey.seen) + 1)):
        case.prepare(scene)
        places = scene.break_off(case.what, [number]).places
        if number > len(survey.seen) and not places:
            break
    _check_beside(scene)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
@in_a_thread
def test_a_tick_that_is_broken_off_twice_stands_still(scene_of: Any, name: str) -> None:
    """The second exception comes before any bytecode of what is done about the first."""
    case = CASES[name]
    scene, first, twice = scene_of(**case.changes), 1, 0
    is_over = False
    while not is_over:
        second = 1 + first % 13
        while True:
            case.prepare(scene)
            breaker = scene.break_off(case.what, [first, second])
            is_over = not breaker.places
            if len(breaker.places) < 2:
                break
            twice += 1
            second += 13
        first += 61 * case.every
    assert twice > 50
    _check_beside(scene)


@pytest.mark.slow
@in_a_thread
def test_a_tick_after_a_broken_one_that_is_broken_off_too_stands_still(scene_of: Any) -> None:
    scene, number = scene_of(), 0
    scene.serve()
    while True:
        number += 5
        scene.clock.now += PERIOD_NS
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
            scene.clock.now += PERIOD_NS
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


@pytest.mark.slow
@pytest.mark.parametrize("then", ["reset", "step"])
@in_a_thread
def test_a_reset_that_is_broken_off_and_what_comes_next_too_have_not_begun_or_stand_still(
    scene_of: Any, then: str
) -> None:
    scene, stride = scene_of(), 11 if then == "reset" else 61
    first = second = pairs = 1
    while True:
        scene.serve()
        before = scene.decoder.result.shown
        one, two = Breaker([first]), Breaker([second])
        one.run(lambda: scene.decoder.reset())
        # Where it has begun, ticks are counted anew.
        scene.number = -1
        scene.see()
        if not one.places:
            break
        if then == "reset":
            two.run(lambda: scene.decoder.reset())
            scene.number = -1
        else:
            scene.clock.now += PERIOD_NS
            two.run(lambda: scene.decoder.step(scene.chunks[1]))
        result = scene.see()
        if two.places:
            pairs += 1
            was_held, is_as_before = result.is_held, result.shown is before
            following = scene.tick(after_ns=PERIOD_NS // 25)
            if was_held:
                assert following.is_held, (one.places, two.places)
            elif is_as_before:
                assert following.status is Status.OK, (one.places, two.places)
            else:
                # The tick was whole.
                ((name, offset),) = two.places
                assert (name, _STEP[offset]) == ("step", *_AFTER)
        assert scene.tick(scene.chunks[2]).status is Status.OK, (one.places, two.places)
        first, second = (first, second + stride) if two.places else (first + 7, 1 + first % stride)
    assert pairs > 200


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture
def alarms() -> Iterator[None]:
    """Nothing is left of them."""
    numbers = signal.SIGALRM, signal.SIGTERM
    previous = [signal.getsignal(number) for number in numbers]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, previous, strict=True):
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("alarms")
def test_signals_that_come_while_others_are_handled_leave_a_result_that_is_held_or_whole(scene_of: Any) -> None:
    scene, random = scene_of(has_spare=True), np.random.default_rng(0)
    raised: list[str] = []
    has_begun = True

    def is_in_a_tick(frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not ControlDecoder.step.__code__:
            frame = frame.f_back
        return frame is not None

    def interrupt(_number: int, frame: FrameType | None) -> None:
        if frame is None or not is_in_a_tick(frame) or len(raised) == 2:
            return
        nonlocal has_begun
        if not raised:
            has_begun = frame.f_code is not ControlDecoder.step.__code__ or frame.f_lasti not in _BEFORE_OFFSETS
        raised.append("interrupt")
        # Another alarm, while this one is handled by who was broken off; or another signal, while it is handled here.
        if random.random() < 0.5:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-5))
            raise KeyboardInterrupt
        try:
            raise KeyboardInterrupt
        finally:
            signal.raise_signal(signal.SIGTERM)

    def terminate(_number: int, frame: FrameType | None) -> None:
        assert is_in_a_tick(frame)
        raised.append("terminate")
        sys.exit(15)

    signal.signal(signal.SIGALRM, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    broken, twice = 0, set[tuple[str, ...]]()
    for number in range(4000):
        if number % 8 == 0:
            scene.mend()
        scene.backends[0].act = fails if number % 8 == 5 else None
        before, is_broken = scene.decoder.result.shown, False
        scene.clock.now += PERIOD_NS
        raised.clear()
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-4))
            scene.decoder.step((None, scene.chunks[1] - 100, *scene.chunks)[number % 5])
        except (KeyboardInterrupt, SystemExit):
            is_broken = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        result = scene.see()
        if is_broken:
            broken += 1
            twice.add(tuple(raised))
            assert result.is_held if has_begun else result.shown is before
    assert broken > 100
    assert {("interrupt", "interrupt"), ("interrupt", "terminate")} <= twice
    scene.mend()
    scene.serve()
    assert gc.isenabled()
