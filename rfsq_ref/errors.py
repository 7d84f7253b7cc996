"""Errors of the reference: each message says what was found, what was expected and what to do next."""

from rfsq.runtime.bundle.errors import RfsqError


class UnusableError(RfsqError, ValueError):
    """Base of what `rfsq_ref`, `calibration` and `evidence` raise on purpose; a command ends with status 2 for it."""


class DataError(UnusableError):
    """Action data that cannot be used as it is."""


class CheckpointError(UnusableError):
    """A file that is not a checkpoint this project can read, or whose contents do not fit together."""


class NotDecodableError(UnusableError):
    """Tokens that cannot be turned into actions without something that is missing."""


class SettingsError(UnusableError):
    """Settings that make no sense: sizes of a model, of a training, of a generation of data."""


class TrainingError(UnusableError):
    """A training that came to nothing."""
