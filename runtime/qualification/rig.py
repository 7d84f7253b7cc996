"""A decoder on a clock of its own, with a source of good chunks and a check that trusts nothing of the decoder."""

from __future__ import annotations

import functools
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..backends.beliefs import decodes_beliefs
from ..bundle.arrays import Codes, Float32Array, Float64Array, Int32Array
from ..bundle.probabilities import one_hot
from ..bundle.validation import token_types
from ..control.belief_config import BeliefConfig, WhenUncertain
from ..control.config import ActionKind, ControlConfig, OnFault, OutOfRange, Status, Strategy
from ..control.decoder import ControlDecoder
from ..control.errors import ControlFaultError
from ..control.result import ControlResult
from ..tokenizer import ActionTokenizer
from .injection import Fault, faulty
from .trial_inputs import chunks_of, config_for

_Found = TypeVar("_Found")
#: On the rig's own clock; but a worker is waited for in real time, and even the busiest machine answers within them.
PERIOD_S, DEADLINE_S = 100.0, 80.0
#: Real seconds after which something hangs.
PATIENCE_S = 60.0
PERIOD_NS = round(PERIOD_S * 1e9)
#: Faults in a row until the decoder latches.
MOST_FAULTS = 6
_CHUNKS = 16
#: Of a mode, and what is left of a motion that is not so sure.
LEAST_PROBABILITY, SLOW_FACTOR = 0.6, 0.25
#: By which share of the limit two backends, or two roundings, may differ.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Setup:
    """How a decoder of a campaign is set up. action_kind: None for delta and absolute in turn."""

    strategy: Strategy = Strategy.LATEST_ONLY
    use_worker: bool = False
    has_fallback: bool = False
    action_kind: ActionKind | None = ActionKind.DELTA
    on_fault: OnFault = OnFault.HOLD_LAST
    out_of_range: OutOfRange = OutOfRange.REJECT
    record_folder: str | None = None
    when_uncertain: WhenUncertain = WhenUncertain.HOLD

    def __str__(self) -> str:
        parts = [self.strategy, self.action_kind or "mixed", self.on_fault, self.out_of_range, self.when_uncertain]
        parts += ["worker"] * self.use_worker + ["fallback"] * self.has_fallback
        return ", ".join(str(part) for part in parts)

    def config(self, tokenizer: ActionTokenizer, limit: float, *, takes_beliefs: bool = False) -> ControlConfig:
        size = tokenizer.model.action_dim
        mixed = [ActionKind.DELTA, ActionKind.ABSOLUTE] * size
        return config_for(
            tokenizer,
            limit,
            period_s=PERIOD_S,
            deadline_us=DEADLINE_S * 1e6,
            # Longer than a chunk, to tell one that is too old from one that has run out.
            stale_after_s=2 * tokenizer.model.chunk_length * PERIOD_S,
            strategy=self.strategy,
            use_worker=self.use_worker,
            action_kind=tuple(mixed[:size] if self.action_kind is None else [self.action_kind] * size),
            on_fault=self.on_fault,
            out_of_range=self.out_of_range,
            max_consecutive_faults=MOST_FAULTS,
            retry_after_s=0.001,
            record_interval_s=1e-3,
            record_folder=self.record_folder,
            beliefs=BeliefConfig(
                least_mode_probability=LEAST_PROBABILITY,
                when_uncertain=self.when_uncertain,
                slow_factor=SLOW_FACTOR,
            )
            if takes_beliefs
            else None,
        )


@dataclass(frozen=True)
class Answer:
    """The answer of a tick; a copy, since the decoder has one result for all ticks. seconds: how long it took."""

    status: Status
    is_held: bool
    fell_back: bool
    is_latched: bool
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        flags = [name for name in ("is_held", "fell_back", "is_latched") if getattr(self, name)]
        return " ".join((self.status.name, *flags))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens and stats of a chunk, and the actions [T, A] that they decode to while nothing is broken."""

    tokens: Int32Array
    stats: Float32Array | None
    rows: Float64Array


class SafetyCheck:
    """Checks limits, slew and standing still by the settings alone, in float64; `problems` says what was wrong."""

    def __init__(self, config: ControlConfig, position: tuple[float, ...]) -> None:
        self.low, self.high = np.array(config.action_low), np.array(config.action_high)
        self.step = np.array(config.max_relative_step)
        self._keeps = np.array(
            [kind is ActionKind.ABSOLUTE or index in config.gripper for index, kind in enumerate(config.action_kind)]
        )
        self._grippers = list(config.gripper)
        self._slows = config.beliefs is not None and config.beliefs.when_uncertain is WhenUncertain.SLOW
        self._tolerance = _TOLERANCE * np.maximum(np.abs(self.low), np.abs(self.high))
        self.last = np.array(position, np.float64)
        self.problems: list[str] = []

    def __call__(self, result: ControlResult, wanted: tuple[Float64Array, Float64Array] | None) -> None:
        """Check the action of a tick. wanted: its bounds [A] each before limits and slew; None if they are unknown."""
        sent, last = result.actions.astype(np.float64), self.last
        near = np.clip(np.zeros_like(last), last - self.step, last + self.step)
        still = np.where(self._keeps, last, near)
        tests = {
            "not finite": np.isfinite(sent),
            "outside the limits": (sent >= self.low) & (sent <= self.high),
            "further than the slew limit": np.abs(sent - last) <= self.step,
        }
        if result.is_held:
            tests["not standing still"] = np.abs(sent - still) <= self._tolerance
        elif wanted is not None:
            if self._slows and result.status is Status.UNCERTAIN:
                wanted = self._slowed(wanted[0]), self._slowed(wanted[1])
            lowest, highest = np.maximum(self.low, last - self.step), np.minimum(self.high, last + self.step)
            is_low_enough = sent <= np.clip(wanted[1], lowest, highest) + self._tolerance
            is_high_enough = sent >= np.clip(wanted[0], lowest, highest) - self._tolerance
            tests["not the action of this tick"] = is_low_enough & is_high_enough
        for what, is_right in tests.items():
            if not is_right.all():
                self.problems.append(f"{what}: {sent.tolist()} after {last.tolist()} ({result})")
        self.last = sent

    def _slowed(self, wanted: Float64Array) -> Float64Array:
        still = np.where(self._keeps, self.last, 0.0)
        slowed = still + SLOW_FACTOR * (wanted - still)
        slowed[self._grippers] = self.last[self._grippers]
        return slowed


class Rig:
    """Serves good chunks to one decoder, one tick after another, and checks every action that leaves."""

    def __init__(
        self,
        tokenizer: ActionTokenizer,
        setup: Setup,
        rng: random.Random,
        *,
        fallback: ActionTokenizer | None = None,
    ) -> None:
        self.setup, self.rng = setup, rng
        self.model = tokenizer.model
        self.length = self.model.chunk_length
        self._due = self.now = 10**15
        self.is_clock_broken = False
        tokens, stats, limit = chunks_of(tokenizer, _CHUNKS)
        self._whole, self._tokenizer = list(map(Codes, tokens, stats)), tokenizer
        #: Whether every backend decodes beliefs.
        self.takes_beliefs = all(decodes_beliefs(found.backend) for found in (tokenizer, fallback or tokenizer))
        self.config = setup.config(tokenizer, limit, takes_beliefs=self.takes_beliefs)
        main, self.backend = faulty(tokenizer, pause=self.jump, delay_s=PERIOD_S)
        spare, self.spare = faulty(fallback or tokenizer, pause=self.jump, delay_s=PERIOD_S)
        position = (0.0,) * self.config.action_dim
        self.decoder = ControlDecoder(
            main,
            self.config,
            fallbacks=(spare,) if setup.has_fallback else (),
            position=position,
            clock=self._clock,
        )
        self.decoder.warmup()
        self.check = SafetyCheck(self.config, position)
        self.sequence = 0
        self._observed = 0
        #: The chunk in service and when it was observed; None if there is none, or it is not known.
        self._serving: tuple[Chunk, int] | None = None
        #: The last chunks that were accepted, of which averages are made.
        self._accepted: deque[tuple[Chunk, int]] = deque(maxlen=2 * self.config.ensemble_chunks)

    def close(self) -> None:
        self.clear()
        self.decoder.close()

    def clear(self) -> None:
        """End every fault."""
        self.is_clock_broken = False
        for backend in (self.backend, self.spare):
            backend.fault, backend.delay_s = Fault.NONE, PERIOD_S
            backend.release()

    def jump(self, seconds: float) -> None:
        """Set the clock forward, or back."""
        self.now += round(seconds * 1e9)
        self._due += round(seconds * 1e9)

    @property
    def next_ns(self) -> int:
        """When the next tick begins."""
        return self._due + PERIOD_NS

    @functools.cached_property
    def chunks(self) -> list[Chunk]:
        """Good ones, whole."""
        return [self.decoded(codes) for codes in self._whole]

    def decoded(self, codes: Codes) -> Chunk:
        """What legal codes of one chunk mean, by a tokenizer that nothing is wrong with."""
        return Chunk(*codes, self._tokenizer.decode(*codes)[0].astype(np.float64))

    def believed(self, probabilities: Float32Array) -> Chunk:
        """What probabilities of the tokens of one chunk mean, likewise."""
        actions = np.empty(self.model.actions_shape(1), np.float32)
        self._tokenizer.decode_probabilities_into(probabilities, actions)
        return Chunk(probabilities.argmax(axis=-1).astype(np.int32), None, actions[0].astype(np.float64))

    def certain(self, chunk: Chunk) -> Float32Array:
        """Probabilities of 0 and 1 that its tokens have."""
        return one_hot(chunk.tokens, self.model.vocabulary)

    def pick(self) -> Chunk:
        return self.rng.choice(self.chunks)

    def draft(self, chunk: Chunk) -> Chunk:
        """The beginning of a chunk, of any length that can be decoded but the whole, unless there is no other."""
        prefix = self.rng.choice(self.model.prefixes[:-1] or self.model.prefixes)
        return self.decoded(Codes(chunk.tokens, chunk.stats).prefix(prefix))

    def tick(self, tokens: object = None, *, serves: tuple[Chunk, int] | None = None, **options: Any) -> Answer:
        """Take one step. serves: the chunk that is in service from now on, if this tick accepts it."""
        self._due += PERIOD_NS
        self.now = begun = self._due
        begin, is_raised = time.monotonic(), False
        try:
            result = self.decoder.step(tokens, **options)
        except ControlFaultError:
            result, is_raised = self.decoder.result, True
        seconds = time.monotonic() - begin
        if is_raised != (result.is_held and self.config.on_fault is OnFault.RAISE and result.status != 6):
            self.check.problems.append(f"{result} was {'' if is_raised else 'not '}raised")
        is_uncertain = result.status is Status.UNCERTAIN
        if serves is not None and (is_uncertain or (not result.is_held and result.status is not Status.STALE)):
            self._serve(serves)
        elif result.is_held and not is_uncertain:
            self._serving = None
        self.check(result, self._wanted(begun))
        return Answer(result.status, result.is_held, result.fell_back, result.is_latched, result.detail, seconds)

    def send(self, chunk: Chunk, *, sequence: int | None = None, age: int = 0, **options: Any) -> Answer:
        """Send a chunk that was observed `age` periods before this tick; accepted unless something is broken."""
        number = self.sequence + 1 if sequence is None else sequence
        observed = self.next_ns - age * PERIOD_NS
        options = {"stats": chunk.stats, "sequence": number, "observed_ns": observed, **options}
        answer = self.tick(options.pop("tokens", chunk.tokens), serves=(chunk, observed), **options)
        is_uncertain = answer.status is Status.UNCERTAIN
        if is_uncertain or (not answer.is_held and answer.status is not Status.STALE):
            self.sequence, self._observed = number, observed
        return answer

    def believe(self, probabilities: Float32Array, **options: Any) -> Answer:
        """Send a belief of one chunk: probabilities, or the logarithms of them."""
        if self.rng.randrange(2):
            given: dict[str, Any] = {"probabilities": probabilities}
        else:
            with np.errstate(divide="ignore"):
                given = {"logits": np.log(probabilities)}
        return self.send(self.believed(probabilities), tokens=None, **given, **options)

    def good(self) -> Answer:
        """Send as policies do: at once, after a delay, as numbers of another type, as beliefs that are certain, or a
        draft and then the whole."""
        way, age, chunk = self.rng.randrange(6), self.rng.randint(1, 2), self.pick()
        if way == 0 and age < self.length and self._observed < self.next_ns - age * PERIOD_NS:
            return self.send(chunk, age=age)
        if way == 1 and len(self.model.prefixes) > 1 and self.length > 1:
            draft = self.send(self.draft(chunk))
            if draft.status is not Status.OK:
                return draft
            return self.send(chunk, sequence=self.sequence, age=1)
        if way == 2:
            legal = [kind for kind in token_types(self.model) if self.model.vocabulary <= np.iinfo(kind).max]
            return self.send(chunk, tokens=chunk.tokens.astype(self.rng.choice(legal)))
        if way == 3 and self.takes_beliefs:
            return self.believe(self.certain(chunk))
        return self.send(chunk)

    def idle(self, most: int) -> None:
        """Take up to so many steps without a chunk, but not to the end of the chunk in service."""
        if self._serving is not None:
            most = min(most, self.length - 1 - round((self._due - self._serving[1]) / PERIOD_NS))
        for _ in range(self.rng.randint(0, max(most, 0))):
            self.tick()

    def expect_service(self, chunk: Chunk, age_ticks: int) -> None:
        """Expect `chunk` to be served from now on: a held tick has accepted it, `age_ticks` before the next one."""
        self.sequence += 1
        self._serve((chunk, self.next_ns - age_ticks * PERIOD_NS))

    def reset(self) -> None:
        self.decoder.reset()
        self._serving, self._observed = None, 0
        self._accepted.clear()

    def wait_for(self, look: Callable[[], _Found], timeout_s: float = PATIENCE_S) -> _Found:
        """Wait in real time until `look` finds something beside the loop; returns what it found last."""
        end = time.monotonic() + timeout_s
        while not (found := look()) and time.monotonic() <= end:
            time.sleep(2e-4)
        return found

    def _clock(self) -> int:
        """The rig's clock; a little time passes between two looks at it."""
        if self.is_clock_broken:
            raise OSError("injected: the clock cannot be read")
        self.now += 1000
        return self.now

    def _serve(self, serves: tuple[Chunk, int]) -> None:
        self._serving = serves
        self._accepted.append(serves)

    def _wanted(self, now: int) -> tuple[Float64Array, Float64Array] | None:
        """Bounds of the action that is due, [A] each: an average lies between the actions that it is made of."""
        if self._serving is None:
            return None
        newest = self._row(*self._serving, now)
        if newest is None:
            # Nothing is due any more, and no action is right.
            nothing = np.full(self.model.action_dim, np.nan)
            return nothing, nothing
        if self.setup.strategy is Strategy.LATEST_ONLY:
            return newest, newest
        rows = [row for accepted in self._accepted if (row := self._row(*accepted, now)) is not None]
        low, high = np.min(rows, axis=0), np.max(rows, axis=0)
        grippers = list(self.config.gripper)
        low[grippers] = high[grippers] = newest[grippers]
        return low, high

    def _row(self, chunk: Chunk, observed: int, now: int) -> Float64Array | None:
        index = round((now - observed) / PERIOD_NS)
        return chunk.rows[index] if 0 <= index < self.length else None
