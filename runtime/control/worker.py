"""What runs a backend of a loop: a warm tokenizer, a thread that can be left behind, and one that tries again."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np

from ..backends.replay import replay
from ..bundle.arrays import AnyArray, Codes, Float32Array, Float64Array
from ..bundle.comparison import action_errors
from ..bundle.gates import GATES
from ..bundle.validation import check_whether_stats
from ..tokenizer import ActionTokenizer, codes_of
from .belief_config import BeliefConfig
from .beliefs import BeliefSlots, BeliefTrial, GivenBelief
from .config import ControlConfig
from .errors import in_words
from .health import Health

_LOG = logging.getLogger(__name__)
_INT32 = np.dtype(np.int32)
_LONGEST_RETRY_S = 60.0
#: A retry takes as long as a decode, unless it hangs.
_CLOSE_S = 1.0
#: How many chunks a failed backend has to decode rightly before it is used again.
_PROBES = 16


class WarmTokenizer:
    """A tokenizer that has decoded already. `is_healthy` is cleared by the loop alone."""

    def __init__(self, tokenizer: ActionTokenizer, index: int, beliefs: BeliefConfig | None = None) -> None:
        model = tokenizer.model
        self.tokenizer, self.index, self.name = tokenizer, index, tokenizer.backend.name
        self.is_healthy = True
        self.out = np.zeros((1, model.chunk_length, model.action_dim), np.float32)
        self.chunk: Float32Array = self.out[0]
        # numpy's own `fill` takes more than twice as long.
        self._bytes, self._spoilt = self.out.data.cast("B"), np.full_like(self.out, np.nan).tobytes()
        # A policy sends another array each time. Where the backend looks at the values itself, to copy them into an
        # array that comes again takes less than to check one that was never seen.
        is_known_again = model.chunk_length <= tokenizer.backend.checked_steps and not model.has_stats
        #: Arrays for tokens int32, by the length of the last axis.
        self._slots = {
            prefix: np.zeros(model.tokens_shape(1, prefix), np.int32) for prefix in model.prefixes if is_known_again
        }
        tokenizer.warmup(beliefs=beliefs is not None)
        self.probe = codes_of(tokenizer, np.zeros_like(self.out))
        #: Where the loop takes beliefs.
        self.beliefs = None if beliefs is None else BeliefSlots(tokenizer, beliefs, self.out)
        golden = tokenizer.golden
        # Not all of them: other threads may have to wait for Python's lock meanwhile.
        self._golden = None if golden is None else golden.every(-(-len(golden.actions) // _PROBES))
        self._answers = [] if golden is not None else self._answer_probes()
        # Arrays of their own, for the loop may decode meanwhile.
        self._trial = None if beliefs is None else BeliefTrial(tokenizer, beliefs)

    def spoil(self) -> None:
        """Fill `out` with NaN: a backend that leaves a part unwritten must not pass off the last chunk as this one."""
        self._bytes[:] = self._spoilt

    def slots_for(self, given: GivenBelief, stats: object) -> BeliefSlots:
        """What a belief of a legal form was copied into, to be decoded. Raises InvalidInputError for stats."""
        assert self.beliefs is not None  # the loop takes no beliefs elsewhere
        check_whether_stats(stats, self.tokenizer.model)
        self.beliefs.take(given)
        return self.beliefs

    def decode(self, tokens: AnyArray | GivenBelief, stats: Float32Array | None) -> None:
        """Decode tokens, or a belief, of a legal shape and type into `out`. Raises whatever the tokenizer raises."""
        if isinstance(tokens, GivenBelief):
            self.slots_for(tokens, stats).decode()
            return
        own = self._slots.get(tokens.shape[-1])
        if own is not None and tokens.dtype == _INT32:
            own[...] = tokens
            tokens = own
        self.tokenizer.decode_into(tokens, self.out, stats)

    def works(self) -> bool:
        """Whether it answers as the reference does; without golden vectors, and where it gets beliefs, as it did at the
        start.

        Raises whatever it raises.
        """
        model = self.tokenizer.model
        if self._trial is not None and not self._trial.repeats():
            return False
        if self._golden is not None:
            return replay(self._golden, model, self.tokenizer.backend).passed
        return all(
            action_errors(expected, self.tokenizer.decode(*codes), model.action_units).value <= GATES.action_error
            for codes, expected in self._answers
        )

    def _answer_probes(self) -> list[tuple[Codes, Float64Array]]:
        """Codes from all over the range for every graph, and cut as short as they may be, and what they decode to."""
        model = self.tokenizer.model
        shape = (_PROBES, model.chunk_length, model.action_dim)
        chunks = np.random.default_rng(0).uniform(-1, 1, shape) * model.action_units + model.action_offset
        whole = codes_of(self.tokenizer, chunks.astype(np.float32))
        parts = [whole.prefix(prefix) for prefix in sorted({model.prefixes[0], *model.decoder_graphs})]
        return [(codes, self.tokenizer.decode(*codes).astype(np.float64)) for codes in parts]


class _Bell:
    """Wakes one thread. May be rung from any thread, again and again, also where a signal's handler may raise.

    A threading.Event stays locked for ever where such a handler comes within `set`: the next tick would hang in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        # One call that is all or nothing.
        try:
            self._lock.release()
        except RuntimeError:
            """It rings already."""

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait until it is rung, or return at once if it was since the last time; False after `timeout_s`."""
        return self._lock.acquire(True, timeout_s)


class DecodeWorker:
    """Decodes in a thread of its own, so that the loop can stop waiting. Called by the loop alone.

    Tokens are copied in: a worker that is left behind reads its own copy, and writes where nobody else looks.
    """

    def __init__(self, warm: WarmTokenizer) -> None:
        model = warm.tokenizer.model
        self.warm = warm
        # Counters, not the state of a lock: a signal's handler may raise between any two instructions.
        self._asked = self._answered = 0
        self.error: BaseException | None = None
        self._slots = {
            prefix: (
                np.zeros(model.tokens_shape(1, prefix), np.int32),
                np.zeros(model.stats_shape(1, prefix), np.float32) if model.has_stats else None,
            )
            for prefix in model.prefixes
        }
        #: Tokens and stats of its own, or a belief that was copied into the slots.
        self._given: Codes | BeliefSlots = warm.probe
        self._go, self._done = _Bell(), _Bell()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"control decode {warm.name}", daemon=True)
        self._thread.start()

    @property
    def is_pending(self) -> bool:
        """Whether it has not answered yet; may be asked from any thread."""
        return self._asked != self._answered

    def wait_until(self, end_s: float) -> bool:
        """Whether it has answered by `end_s` on `time.monotonic()`; the answer is `error` or `warm.out`."""
        while self.is_pending:
            if not self._done.wait(max(end_s - time.monotonic(), 0.0)):
                return not self.is_pending
        return True

    def ask(self, tokens: AnyArray | GivenBelief, stats: Float32Array | None) -> None:
        """Start decoding tokens of a legal shape, and stats where the bundle has any, or a belief; only while nothing
        is pending."""
        self._given = (
            self.warm.slots_for(tokens, stats) if isinstance(tokens, GivenBelief) else self._copied(tokens, stats)
        )
        self.error = None
        self._asked += 1
        self.wake()

    def _copied(self, tokens: AnyArray, stats: Float32Array | None) -> Codes:
        own_tokens, own_stats = self._slots[tokens.shape[-1]]
        np.copyto(own_tokens, tokens, casting="unsafe")
        if stats is not None and own_stats is not None:
            np.copyto(own_stats, stats)
        return Codes(own_tokens, None if stats is None else own_stats)

    def wake(self) -> None:
        """Wake the thread if something is pending; harmless if it is awake."""
        self._go.ring()

    def close(self) -> None:
        """End the thread. One that hangs is left behind, and ends when its backend answers, or with the process."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.is_pending:
            self.wake()
            self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            self._go.wait()
            if self._is_closed:
                return
            if not self.is_pending:
                continue
            try:
                if isinstance(given := self._given, BeliefSlots):
                    given.decode()
                else:
                    self.warm.tokenizer.decode_into(given.tokens, self.warm.out, given.stats)
            except BaseException as error:  # handed to the loop, which says what it was
                self.error = error
            self._answered = self._asked
            self._done.ring()


class Retrier:
    """Tries a failed tokenizer again in a thread of its own, less and less often, until it answers rightly."""

    def __init__(self, warm: WarmTokenizer, worker: DecodeWorker | None, config: ControlConfig, health: Health) -> None:
        self._warm, self._worker, self._first_s, self._health = warm, worker, config.retry_after_s, health
        self._failed, self._end, self._is_closed = _Bell(), _Bell(), False
        self._thread = threading.Thread(target=self._run, name=f"control retry {warm.name}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        self._failed.ring()

    def close(self) -> None:
        """End the thread; one that hangs in its backend is left behind."""
        self._is_closed = True
        self._end.ring()
        self._failed.ring()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            self._failed.wait()
            pause = self._first_s
            while not self._warm.is_healthy and not self._end.wait(pause):
                pause = min(2 * pause, _LONGEST_RETRY_S)
                is_free = self._worker is None or not self._worker.is_pending
                if is_free and self._succeeds():
                    self._health.recoveries += 1
                    self._warm.is_healthy = True
                    _LOG.warning("backend %s answers rightly again, and is used again", self._warm.name)
            if self._is_closed:
                return

    def _succeeds(self) -> bool:
        try:
            return self._warm.works()
        except BaseException as error:  # whatever it is, the backend does not work yet
            _LOG.info("backend %s still fails: %s", self._warm.name, in_words(error))
            return False
