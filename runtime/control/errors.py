"""Errors of the control loop. None of them leaves `ControlDecoder.step` in the loop, unless it was asked for."""

from __future__ import annotations

import functools
import signal
from types import CodeType

from ..bundle.errors import TokenizerError


class ControlConfigError(TokenizerError, ValueError):
    """Settings of the control loop that make no sense; found before the robot moves."""


class ControlFaultError(TokenizerError):
    """A fault in the loop where `on_fault` is `raise`; the decoder's `result` holds the safe action of this tick."""


class ClockFaultError(TokenizerError):
    """A clock that gives no time."""


class WrongThreadError(TokenizerError):
    """A decoder called from another thread than the one that has warmed it up."""


class RealtimeRefusedError(TokenizerError):
    """A real-time setting that is required, and that the system refuses."""


class FlightRecordError(TokenizerError):
    """A flight record that is missing, damaged, or of another model."""


def message_of(error: BaseException) -> str:
    """Nothing where asking for it raises: an error made by a library may be broken itself."""
    try:
        return str(error)
    except BaseException as broken:
        if is_from_outside(broken):
            raise
        return ""


def in_words(error: BaseException) -> str:
    """Type and message."""
    message = message_of(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_from_outside(error: BaseException) -> bool:
    """Whether a signal's handler has raised `error`: KeyboardInterrupt, or what has come through a handler in Python.

    Everything else is of whoever was called, SystemExit too.
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
    """What runs where `handler` is called; None for what is not of Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    # Of an object that can be called, the method that is.
    for function in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None
