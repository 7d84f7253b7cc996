"""Errors: each message says what was found, what was expected and what to do next."""


class RfsqError(Exception):
    """Base of everything that this project raises on purpose: each room has its own beneath it.

    >>> issubclass(InvalidInputError, RfsqError), issubclass(InvalidInputError, ValueError)
    (True, True)
    """

    #: What a command ends with that raises it: 2, bad input or a missing package; 1, a check failed.
    exit_status = 2


class TokenizerError(RfsqError):
    """Base of everything that the runtime raises on purpose."""


class InvalidInputError(TokenizerError, ValueError):
    """Actions, tokens or statistics with a wrong rank, shape, type or value."""


class OutputExistsError(TokenizerError):
    """Output that is there already and may not be replaced."""


class UnbuiltPrefixError(InvalidInputError):
    """Tokens with a number of layers for which the bundle has no decoder."""


class VocabularyError(TokenizerError, ValueError):
    """Settings of a vocabulary of ids that make no sense, such as a special id among those of the tokens."""


class MalformedIdsError(InvalidInputError):
    """Ids that are no sequence of tokens. row, position: where the first of them is, or would be, in [B, n].

    Both are None where the array as a whole is wrong.
    """

    # Two optional arguments, so that it can be pickled, as workers do to hand an error on.
    def __init__(self, message: str, row: int | None = None, position: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.position = position


class IdTypeError(MalformedIdsError):
    """Ids of another type or rank than int64 or int32 [B, n]."""


class SequenceTooShortError(MalformedIdsError):
    """A sequence that ends early; position: the first that is missing."""


class SequenceTooLongError(MalformedIdsError):
    """A sequence that goes on; position: the first that is too many."""


class ForeignIdError(MalformedIdsError):
    """An id that is neither a token's nor special."""


class SpecialIdError(MalformedIdsError):
    """A special id where a token's is expected."""


class WrongLayerError(MalformedIdsError):
    """An id of another layer than belongs at its position."""


class BundleError(TokenizerError):
    """A bundle that is missing, incomplete, altered or of another schema version."""


class FingerprintError(BundleError):
    """A bundle whose tokens mean something else than the caller expects."""


class IncompatibleTokensError(FingerprintError):
    """Two bundles whose tokens are not proven to mean the same."""


class BackendUnavailableError(TokenizerError):
    """A backend that is not installed, not built into the bundle, or does not work on this machine."""


class SelfTestError(TokenizerError):
    """A backend whose answers to the golden vectors are not those of the reference."""


class EngineRefusedError(BundleError):
    """A serialised engine that is altered or that its library does not accept; the message quotes the library."""


class CannotCopyError(TokenizerError, TypeError):
    """Something that belongs to one process: it can be neither copied nor pickled."""


class InferenceError(TokenizerError):
    """A backend that failed while it ran; the message quotes it. The output is not to be used."""


class IllegalValueError(InferenceError):
    """Values that a backend has refused, with nothing written."""


class OutOfGpuMemoryError(InferenceError):
    """A GPU without room for what a call needs."""
