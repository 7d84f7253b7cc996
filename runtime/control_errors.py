"""Errors of the control loop. None of them leaves `ControlDecoder.step` in the loop, unless it was asked for."""

from runtime.errors import TokenizerError


class ControlConfigError(TokenizerError, ValueError):
    """Settings of the control loop that make no sense; found before the robot moves."""


class ControlFaultError(TokenizerError):
    """A fault in the loop where `on_fault` is `raise`; the decoder's `result` holds the safe action of this tick."""


class WrongThreadError(TokenizerError):
    """A decoder called from another thread than the one that has warmed it up."""


class RealtimeRefusedError(TokenizerError):
    """A real-time setting that is required, and that the system refuses."""


class FlightRecordError(TokenizerError):
    """A flight record that is missing, damaged, or of another model."""


def in_words(error: BaseException) -> str:
    """Type and message; the type alone where asking for the message raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # an error made by a library may be broken itself
        return type(error).__name__
