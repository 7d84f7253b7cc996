"""Errors of the runtime: each message says what was found, what was expected and what to do next."""


class TokenizerError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidInputError(TokenizerError, ValueError):
    """Actions, tokens or statistics with a wrong rank, shape, type or value."""


class UnbuiltPrefixError(InvalidInputError):
    """Tokens with a number of layers for which the bundle has no decoder."""


class BundleError(TokenizerError):
    """A bundle that is missing, incomplete, altered or of another schema version."""


class FingerprintError(BundleError):
    """A bundle whose tokens mean something else than the caller expects."""


class BackendUnavailableError(TokenizerError):
    """A backend that is not installed, not built into the bundle, or does not work on this machine."""


class SelfTestError(TokenizerError):
    """A backend whose answers to the golden vectors are not those of the reference."""


class InferenceError(TokenizerError):
    """A backend that failed while it ran; the message quotes it. The output is not to be used."""


class IllegalValueError(InferenceError):
    """Values that a backend has refused, with nothing written."""


class OutOfGpuMemoryError(InferenceError):
    """A GPU without room for what a call needs."""
