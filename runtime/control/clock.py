"""What time it is, in numbers that can be reckoned with, whatever a clock, a policy or a caller gives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from .errors import ClockFaultError, in_words, is_from_outside
from .state import NO_NUMBER, WRONG_NUMBER

_MOST = 2**62
#: Nobody waits longer for an action.
_LONGEST_US = 1e9


def steady(clock: Callable[[], int]) -> Callable[[], int]:
    """`clock`, that gives an int of less than 2**62 or raises: ClockFaultError, or what a signal's handler raised."""
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
    """An int of Python or numpy of less than 2**62; WRONG_NUMBER for everything else."""
    if isinstance(value, np.integer):
        value = int(value)
    return value if type(value) is int and -_MOST < value < _MOST else WRONG_NUMBER


def stamp(value: object) -> int:
    """The same for what may be left out: NO_NUMBER for None."""
    return NO_NUMBER if value is None else as_number(value)


def nanoseconds(deadline_us: object) -> int:
    """What is no number above 0 is over at once: the loop asked for something, and nobody knows what."""
    if not isinstance(deadline_us, (int, float, np.integer)) or not 0 < deadline_us < math.inf:
        return -1
    return int(min(deadline_us, _LONGEST_US) * 1000)
