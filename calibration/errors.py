"""Errors of calibration: each message says what was found, what was expected and what to do next."""


class CalibrationError(ValueError):
    """A fit that does not suit the checkpoint, or settings that make no sense."""
