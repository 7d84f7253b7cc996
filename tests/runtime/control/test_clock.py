"""What a clock may give, and what becomes of the rest."""

import time
from typing import Any

import numpy as np
import pytest

from rfsq.runtime.control.errors import ClockFaultError
from rfsq.runtime.control.order import steady


def test_the_clock_of_the_system_is_read_as_it_is() -> None:
    assert steady(time.monotonic_ns) is time.monotonic_ns


@pytest.mark.parametrize("value", [5, -5, 5.0, 5.9, np.int32(5), np.float64(5.5), 2**62 - 1])
def test_numbers_of_any_type_are_whole_nanoseconds(value: Any) -> None:
    found = steady(lambda: value)()
    assert (found, type(found)) == (int(value), int)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "nan"),
        (-float("inf"), "-inf"),
        (1e300, str(int(1e300))),
        (2**62, "4611686018427387904"),
        (True, "True"),
        ("noon", "a str"),
        (None, "a NoneType"),
        (np.uint64(2**63), "a uint64"),
        (np.zeros(2), "a ndarray"),
    ],
)
def test_what_is_no_time_is_named(value: Any, found: str) -> None:
    with pytest.raises(ClockFaultError) as caught:
        steady(lambda: value)()
    assert str(caught.value) == f"the clock gave {found}; expected nanoseconds between -2**62 and 2**62"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (OSError("no clock"), OSError, "no clock"),
        (SystemExit(3), ClockFaultError, "SystemExit: 3"),
    ],
)
def test_a_signal_goes_through_a_clock_and_what_would_end_the_process_does_not(
    error: BaseException, kind: type[BaseException], message: str
) -> None:
    def clock() -> int:
        raise error

    with pytest.raises(kind) as caught:
        steady(clock)()
    assert (type(caught.value), str(caught.value)) == (kind, message)
