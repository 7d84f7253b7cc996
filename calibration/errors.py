"""Errors of calibration: each message says what was found, what was expected and what to do next."""

from rfsq.rfsq_ref.errors import UnusableError


class CalibrationError(UnusableError):
    """A fit that does not suit the checkpoint, or settings that make no sense."""
