"""Whether a chunk may be used and for which ticks its actions are; if it may not, why, in words.

Times and numbers are made safe to compute with first, whatever a clock, a policy or a caller gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from ..bundle.models import ModelEntry
from ..bundle.validation import as_array_advice, kind_of, listed, token_types
from .beliefs import BeliefForms, GivenBelief
from .config import ControlConfig
from .errors import ClockFaultError, in_words, is_from_outside
from .result import NO_NUMBER, WRONG_NUMBER, InService

_Array = np.ndarray
_MOST = 2**62
#: Longer deadlines are cut to this one.
_LONGEST_US = 1e9


class ChunkOrder:
    """Places chunks on the line of ticks. Times are nanoseconds of the loop's clock; the loop counts the ticks."""

    def __init__(self, config: ControlConfig, model: ModelEntry) -> None:
        self.period_ns = round(config.period_s * 1e9)
        self._half_period_ns = self.period_ns // 2
        self.stale_ns = round(config.stale_after_s * 1e9)
        self._stale_s = config.stale_after_s
        self._length, self._types = model.chunk_length, token_types(model)
        #: Legal shapes of tokens, with the length of the last axis.
        self.layers_of = {model.tokens_shape(1, prefix): prefix for prefix in model.prefixes}
        self._forms = None if config.beliefs is None else BeliefForms(model, config.beliefs)
        lengths = f"one of the layers {list(model.prefixes)}" if model.token_grid else f"from 1 to {model.depth} tokens"
        self._expected = f"{[1, *model.token_grid]} and {lengths}"

    def layers_believed(self, given: object) -> int:
        """How many layers, or chunk tokens, a belief of one chunk has; 0 for one that is not taken by its form, and for
        all else."""
        return 0 if self._forms is None or type(given) is not GivenBelief else self._forms.accept(given)

    def next_tick(self, begin: int, line: tuple[int, int], service: InService | None) -> int:
        """The number of the tick that begins now. line: number and beginning of the last one.

        Ticks are counted, so that a jittery clock repeats no action and skips none. But after more than 1.5 periods
        whole ticks are missed, and no action of the chunk in `service` is served a whole period late.
        """
        tick, last = line
        period = self.period_ns
        # Time does not go back here; even if none has passed, this is the next tick.
        tick += (begin - last + self._half_period_ns - 1) // period or 1
        if service is None:
            return tick
        _, observed, _, start = service
        due = start + (begin - observed) // period
        return due if due > tick else tick

    def place(  # noqa: PLR0913  # numbers alone: it can be tried without a loop
        self,
        begin: int,
        tick: int,
        layers: int,
        service: InService,
        stamps: tuple[int, int],
        is_drained: bool,
    ) -> InService | str:
        """Date the chunk that arrives on this tick; or say why it is not to be used.

        A chunk with the number of the one in service, and more layers or tokens, takes its place. stamps: sequence and
        observed_ns of the chunk, NO_NUMBER for none. is_drained: nothing is left of the one in service.
        """
        number, observed = stamps
        last_number, last_observed, last_layers, last_start = service
        if number == NO_NUMBER:
            number = last_number + 1
        is_dated = observed != NO_NUMBER
        is_swap = number == last_number and layers > last_layers > 0 and (not is_dated or observed == last_observed)
        if is_swap:
            observed = last_observed
        elif not is_dated:
            observed = begin
        age = begin - observed
        if age > self.stale_ns:
            return self.too_old(age)
        if age < -self.period_ns:
            return (
                f"the chunk was observed {-age / 1e9:.3f} s from now; expected the past: use one clock in both "
                "processes"
            )
        if not is_swap and last_observed != NO_NUMBER:
            # A policy that was restarted counts from the beginning again, and has observed later than before.
            is_restart = is_dated and observed > last_observed and is_drained
            if number <= last_number and not is_restart:
                kind = "again" if number == last_number else "after a newer one"
                return f"chunk {number} comes {kind}; expected above {last_number}: look at the policy's order"
            if observed < last_observed:
                return (
                    f"chunk {number} was observed before chunk {last_number}, which came earlier; expected later: "
                    "look at the policy's order"
                )
        delay = (age + self._half_period_ns) // self.period_ns
        if delay >= self._length:
            return (
                f"the chunk comes {delay} ticks after its observation and has {self._length} actions; expected one "
                "whose time has not passed: look at the policy's latency"
            )
        start = last_start if is_swap else tick - delay if delay > 0 else tick
        return number, observed, layers, start

    def too_old(self, age_ns: int) -> str:
        return (
            f"the chunk was observed {age_ns / 1e9:.3f} s ago; expected at most {self._stale_s:g}: look at the policy, "
            "or raise stale_after_s"
        )

    def wrong_form(self, tokens: object, sequence: object, observed_ns: object) -> str:
        """Which of the arguments is wrong, and why; one of them is."""
        if type(tokens) is GivenBelief:
            if self._forms is None:
                return "logits or probabilities were given; expected tokens: set beliefs in the settings to take both"
            found = self._forms.wrong_form(tokens)
        else:
            found = self._wrong_tokens(tokens)
        if found:
            return found
        is_first = stamp(sequence) == WRONG_NUMBER
        name, value = ("sequence", sequence) if is_first else ("observed_ns", observed_ns)
        is_int = type(value) is int or isinstance(value, np.integer)
        found = "beyond it" if is_int else f"a {type(value).__qualname__}"
        return f"{name} is {found}; expected an int between -2**62 and 2**62: correct what the policy sends"

    def _wrong_tokens(self, tokens: object) -> str:
        """What is wrong with the form of tokens; empty for nothing."""
        if type(tokens) is not _Array:
            advice = as_array_advice("tokens", tokens, is_float=False)
            return f"tokens is a {kind_of(tokens)}; expected a numpy.ndarray{advice}"
        if tokens.shape not in self.layers_of:
            return (
                f"tokens have shape {list(tokens.shape)}; expected {self._expected}: send what the policy gives for "
                "one chunk"
            )
        if tokens.dtype not in self._types:
            return f"tokens have type {tokens.dtype}; expected {listed(self._types)}: send what encoding gives"
        return ""


def steady(clock: Callable[[], int]) -> Callable[[], int]:
    """`clock`, made to give an int between -2**62 and 2**62 or to raise: ClockFaultError, or what a handler raised."""
    if clock is time.monotonic_ns:
        return clock

    def read() -> int:
        try:
            now: object = clock()
        except BaseException as error:
            if isinstance(error, Exception) or is_from_outside(error):
                raise
            raise ClockFaultError(in_words(error)) from error
        if isinstance(now, float) and math.isfinite(now):
            now = int(now)
        number = as_number(now)
        if number == WRONG_NUMBER:
            found = repr(now) if isinstance(now, (int, float)) else f"a {type(now).__qualname__}"
            raise ClockFaultError(f"the clock gave {found}; expected nanoseconds between -2**62 and 2**62")
        return number

    return read


def as_number(value: object) -> int:
    """`value` where it is an int of Python or numpy between -2**62 and 2**62; WRONG_NUMBER for everything else."""
    if isinstance(value, np.integer):
        value = int(value)
    return value if type(value) is int and -_MOST < value < _MOST else WRONG_NUMBER


def stamp(value: object) -> int:
    """Like `as_number`, but NO_NUMBER for None."""
    return NO_NUMBER if value is None else as_number(value)


def nanoseconds(deadline_us: object) -> int:
    """A deadline in microseconds as nanoseconds; -1, which is over at once, for what is no number above 0."""
    if not isinstance(deadline_us, (int, float, np.integer)) or not 0 < deadline_us < math.inf:
        return -1
    return int(min(deadline_us, _LONGEST_US) * 1000)
