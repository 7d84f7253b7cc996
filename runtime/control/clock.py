"""Times and numbers that are safe to compute with, whatever a clock, a policy or a caller gives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from .errors import ClockFaultError, in_words, is_from_outside
from .result import NO_NUMBER, WRONG_NUMBER

_MOST = 2**62
#: Longer deadlines are cut to this one.
_LONGEST_US = 1e9


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
