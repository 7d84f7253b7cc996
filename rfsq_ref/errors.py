"""Errors of the reference: each message says what was found, what was expected and what to do next."""


class DataError(ValueError):
    """Action data that cannot be used as it is."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint this project can read, or whose contents do not fit together."""


class NotDecodableError(ValueError):
    """Tokens that cannot be turned into actions without something that is missing."""
