"""Errors of demonstrations, of token datasets, and of the places where they are written."""

from ..bundle.errors import InvalidInputError, TokenizerError


def reason(error: Exception) -> str:
    """Why a parser refused something, in words for people: the names of Python's errors and types say nothing to them.

    >>> reason(KeyError("length"))
    "it lacks 'length'"
    """
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, TypeError | AttributeError | IndexError):
        return "it is built in another way"
    return (str(error).splitlines() or ["it cannot be parsed"])[0]


class DatasetError(TokenizerError):
    """Base of all errors of datasets."""


class SourceError(DatasetError):
    """Demonstrations that cannot be read without guessing."""


class IllegalActionError(SourceError, InvalidInputError):
    """An action that is not finite or beyond the bundle's limit; the message names file, episode and step."""


class TokenDatasetError(DatasetError):
    """A token dataset that is unfinished, truncated, altered or of another schema version."""


class VerificationError(DatasetError):
    """A file that does not hold what was written to it: none of the work can be trusted."""


class OutputError(DatasetError):
    """An output that exists, belongs to another job, or cannot be written."""
