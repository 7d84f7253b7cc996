"""What can be wrong with demonstrations, token datasets and where they are to be written."""

from ..bundle.errors import InvalidInputError, TokenizerError


class DatasetError(TokenizerError):
    """Base of what the conversion of datasets raises on purpose, beside the errors of the tokenizer itself."""


class SourceError(DatasetError):
    """Demonstrations that cannot be read, or not without guessing."""


class IllegalActionError(SourceError, InvalidInputError):
    """An action that is not finite or beyond the bundle's limit; the message names file, episode and step."""


class TokenDatasetError(DatasetError):
    """A token dataset that is unfinished, truncated, altered or of another schema version."""


class VerificationError(DatasetError):
    """What was read back is not what was to be written: none of the work can be trusted."""


class OutputError(DatasetError):
    """An output that exists, belongs to another job, or cannot be written."""
