"""Errors of the control loop. `ControlDecoder.step` raises none of them unless it was asked to."""

from __future__ import annotations

import functools
import signal
from types import CodeType

from ..bundle.errors import TokenizerError


class ControlConfigError(TokenizerError, ValueError):
    """The settings of a control loop make no sense; this is found before the robot moves."""


class ControlFaultError(TokenizerError):
    """A fault in a loop with `on_fault` = `raise`; the decoder's `result` holds the safe action of this tick."""


class ClockFaultError(TokenizerError):
    """A clock gives no time."""


class WrongThreadError(TokenizerError):
    """A decoder was called from another thread than the one that warmed it up."""


class RealtimeRefusedError(TokenizerError):
    """The system refuses a real-time setting that is required."""


class FlightRecordError(TokenizerError):
    """A flight record is missing, damaged, or of another model."""


def message_of(error: BaseException) -> str:
    """The message of `error`; empty where asking for it raises: a library's error may be broken itself."""
    try:
        return str(error)
    except BaseException as broken:
        if is_from_outside(broken):
            raise
        return ""


def in_words(error: BaseException) -> str:
    """The type of `error` and, if it has one, its message."""
    message = message_of(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_from_outside(error: BaseException) -> bool:
    """Whether a signal's handler raised `error`: KeyboardInterrupt, or what came through a handler in Python.

    Everything else, SystemExit too, was raised by the code that was called.
    """
    if isinstance(error, KeyboardInterrupt):
        return True
    codes = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: object) -> CodeType | None:
    """The code that runs when `handler` is called; None if it is not written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    # A function or method itself, or the `__call__` of any other object.
    for function in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None
