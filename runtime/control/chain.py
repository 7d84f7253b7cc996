"""The backends of one loop: the first that works decodes; if it fails, the next one tries within the same deadline.

`worker.py` has the threads beside the loop.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..bundle.arrays import AnyArray, Float32Array
from ..bundle.errors import InferenceError, InvalidInputError
from ..bundle.validation import check_whether_stats
from ..tokenizer import ActionTokenizer
from .beliefs import BeliefSlots, GivenBelief
from .config import ControlConfig, OutOfRange, Status
from .errors import in_words, is_from_outside, message_of
from .guard import ActionGuard
from .health import Health
from .worker import DecodeWorker, Retrier, WarmTokenizer

_OK, _DEADLINE_MISS, _BAD_TOKEN, _NONFINITE = Status.OK, Status.DEADLINE_MISS, Status.BAD_TOKEN, Status.NONFINITE
_OUT_OF_RANGE, _BACKEND_FAULT = Status.OUT_OF_RANGE, Status.BACKEND_FAULT
#: Faults of a backend, not of what it was given.
FAILURES = frozenset((_BACKEND_FAULT, _NONFINITE, _DEADLINE_MISS))


class BackendChain:
    """What a loop asks for actions, and nobody else.

    `decode` leaves `chunk` float32 [T, A], `used`, `fell_back` and `detail` behind; of a belief more, in `decoded`. A
    backend that has failed is tried again in another thread, and used again once `WarmTokenizer.works` says that it
    answers rightly. Making a chain runs every backend once, and raises what a broken one raises.
    """

    def __init__(
        self,
        tokenizers: Sequence[ActionTokenizer],
        config: ControlConfig,
        guard: ActionGuard,
        clock: Callable[[], int],
        health: Health,
    ) -> None:
        self._model = model = tokenizers[0].model
        self.warm = [WarmTokenizer(tokenizer, index, config.beliefs) for index, tokenizer in enumerate(tokenizers)]
        self._workers = [DecodeWorker(found) for found in self.warm] if config.use_worker else []
        self._retriers: list[Retrier] = []
        self._config, self._guard, self._clock = config, guard, clock
        self._highest = model.vocabulary - 1
        self._is_limiting = config.out_of_range is OutOfRange.LIMIT
        self._health = health
        self.chunk: Float32Array = self.warm[0].chunk
        self.used = self.warm[0]
        self.fell_back, self.detail = False, ""
        self.decoded: BeliefSlots | None = None

    def start(self) -> None:
        """Retry what fails, from now on: the rehearsal is over."""
        self._health.backend = self.warm[0].name
        if len(self.warm) > 1 or self._workers:
            self._retriers = [
                Retrier(found, worker, self._config, self._health)
                for found, worker in itertools.zip_longest(self.warm, self._workers)
            ]

    def close(self) -> None:
        for retrier in self._retriers:
            retrier.close()
        for worker in self._workers:
            worker.close()

    def decode(self, tokens: AnyArray | GivenBelief, stats: object, deadline_ns: int | None) -> Status:
        """Decode tokens, or a belief, of a legal shape and type; values may still be illegal."""
        self.fell_back, self.decoded, active = False, None, self.warm[0]
        if not active.is_healthy:
            # Once more: the tick that found the failure may have been broken off before it asked for a retry.
            if self._retriers:
                self._retriers[active.index].start()
            # If none is healthy, the first one is as good as any.
            active = self._beside(active) or active
        health = self._health
        if health.backend is not active.name:
            health.backend = active.name
        other = self._beside(active) if self._workers else None
        status = self._decode_on(active, tokens, stats, deadline_ns, has_other=other is not None)
        if status in FAILURES:
            return self._fall_back(active, status, tokens, stats, deadline_ns)
        return status

    def _fall_back(
        self,
        failed: WarmTokenizer,
        status: Status,
        tokens: AnyArray | GivenBelief,
        stats: object,
        deadline_ns: int | None,
    ) -> Status:
        self._retry(failed)
        other, reason = self._beside(failed), self.detail
        # If no time is left, the other one decodes from the next chunk on.
        if other is None or (deadline_ns is not None and self._clock() >= deadline_ns):
            return status
        self._health.fallbacks += 1
        self._health.backend = other.name
        status = self._decode_on(other, tokens, stats, deadline_ns, has_other=False)
        if status in FAILURES:
            self._retry(other)
            self.detail = f"{reason}; {other.name} instead: {self.detail}"
        elif status is _OK or (status is _OUT_OF_RANGE and self._is_limiting):
            self.fell_back, self.detail = True, f"{reason}; decoded on {other.name} instead"
        return status

    def _retry(self, warm: WarmTokenizer) -> None:
        if self._retriers:
            warm.is_healthy = False
            self._retriers[warm.index].start()

    def _beside(self, warm: WarmTokenizer) -> WarmTokenizer | None:
        return next((found for found in self.warm if found.is_healthy and found is not warm), None)

    def _decode_on(
        self, warm: WarmTokenizer, tokens: Any, stats: Any, deadline_ns: int | None, *, has_other: bool
    ) -> Status:
        self.used = warm
        left_s = 0.0 if deadline_ns is None else (deadline_ns - self._clock()) / 1e9
        try:
            if self._workers:
                # Half of the time, where another backend can use the rest.
                if not self._decode_in_worker(
                    self._workers[warm.index], tokens, stats, left_s / 2 if has_other else left_s
                ):
                    self.detail = (
                        f"backend {warm.name} has not answered in time, and may hang; expected within deadline_us: it "
                        "is left behind until it answers"
                    )
                    return _DEADLINE_MISS
            else:
                warm.spoil()
                warm.decode(tokens, stats)
        except InvalidInputError as error:
            self.detail = message_of(error)
            return _BAD_TOKEN
        except BaseException as error:  # whatever a library raises, the robot must not
            if is_from_outside(error):
                raise
            self.detail = f"{warm.name}: {in_words(error)}"
            return _BACKEND_FAULT
        self.chunk = warm.chunk
        status = self._guard.check_chunk(warm.chunk)
        if type(tokens) is GivenBelief:
            self.decoded = tokens.decoded = warm.beliefs
            if self.decoded is not None and not self.decoded.is_finite:
                status = _NONFINITE
        if status is not _OK:
            broken = f"backend {warm.name} gave values that are not finite; expected numbers: run selftest"
            self.detail = broken if status is _NONFINITE else self._guard.outside
        return status

    def _decode_in_worker(self, worker: DecodeWorker, tokens: Any, stats: Any, left_s: float) -> bool:
        """False if it has not answered in time."""
        if type(tokens) is not GivenBelief:
            # The values of a belief are looked at where it is decoded.
            self._check_codes(tokens, stats)
        if left_s <= 0:
            # Whether it could still answer would be chance.
            return False
        end = time.monotonic() + left_s
        if worker.is_pending:
            # It was left behind and may answer meanwhile, or a tick was broken off before it woke the worker.
            worker.wake()
            if not worker.wait_until(end):
                return False
        worker.warm.spoil()
        worker.ask(tokens, stats)
        if not worker.wait_until(end):
            return False
        if worker.error is not None:
            # SystemExit and the like would end the worker's thread, and must not end the loop.
            raise worker.error if isinstance(worker.error, Exception) else InferenceError(in_words(worker.error))
        return True

    def _check_codes(self, tokens: AnyArray, stats: Any) -> None:
        """Raises InvalidInputError for what could not be copied unchanged into arrays of a worker."""
        if tokens.dtype != np.int32 and not ((tokens >= 0) & (tokens <= self._highest)).all():
            raise InvalidInputError(
                f"not all tokens are 0 ... {self._highest}; expected these alone: look at the policy"
            )
        if stats is not None:
            check_whether_stats(stats, self._model)
            shape = self._model.stats_shape(1, tokens.shape[-1])
            if type(stats) is not np.ndarray or stats.dtype != np.float32 or stats.shape != shape:
                raise InvalidInputError("stats have a wrong form; expected float32 [1, T, l, 2] as encoding gave them")
