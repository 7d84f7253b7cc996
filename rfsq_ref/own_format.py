"""Files of models in our own format: safetensors with a JSON header, and a SHA-256 of both in it.

A format for each kind of tokens. `checkpoints.py` and `chunk_checkpoint.py` say what is in them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.rfsq_ref.tensor_files import hash_tensors, load_safetensors, other_format
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.paths import as_path, replacing, shown
from rfsq.runtime.bundle.reading import UnfitFileError, parse_json, read_file

#: How to come by a checkpoint.
TRAIN = f"train one with {quoted('train')}"
#: What the metadata call the header.
FORMATS = {TokenKind.STEP: "rfsq-checkpoint", TokenKind.CHUNK: "rfsq-chunk-checkpoint"}
FORMAT_VERSION = 1
#: Of our own format and of bare state dicts; any other is taken for a torch file.
SUFFIX = ".safetensors"

#: In the header: the SHA-256 of all else in the file, for safetensors have no checksums.
_HASH_KEY = "sha256"
#: In bytes. A policy of 7 billion numbers with the tokenizer inside takes 28 GB.
_SIZE_LIMIT = 2**35


def token_kind(path: str | os.PathLike[str]) -> TokenKind:
    """What tokens a checkpoint is of; those of others are of per-step tokens. Raises CheckpointError for no checkpoint.

    >>> from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT
    >>> token_kind(ROBUST_CHECKPOINT).value
    'step'
    """
    path, content = read_content(path, TRAIN)
    metadata = read_safetensors(content, path)[1] if path.suffix == SUFFIX else {}
    return TokenKind.CHUNK if FORMATS[TokenKind.CHUNK] in metadata else TokenKind.STEP


def read_content(path: str | os.PathLike[str], advice: str) -> tuple[Path, bytes]:
    """The path, and the whole file, read once: what is hashed is what is parsed, even where it is replaced meanwhile.

    advice: how to come by such a file. Raises CheckpointError.
    """
    path = as_path(path, "the checkpoint", CheckpointError)
    try:
        content = read_file(path, _SIZE_LIMIT)
    except (FileNotFoundError, NotADirectoryError, UnfitFileError) as error:
        reason = f": {error}" if isinstance(error, UnfitFileError) else ""
        raise CheckpointError(f"no checkpoint at {path}{reason}; {advice or 'give another file'}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if other := other_format(content):
        raise CheckpointError(f"{path} is no checkpoint but {other}")
    return path, content


def read_safetensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata, as they stand in the file. Raises CheckpointError."""
    try:
        return load_safetensors(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; copy or write it again") from error
    except KeyError as error:
        raise CheckpointError(f"{path} has tensors of type {error}, which torch lacks; expected float32") from error


@contextmanager
def reading_header(path: Path) -> Iterator[None]:
    """What is wrong with a header is a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a broken header: {shown(error)}; save the checkpoint again") from error


def parse_header(written: str, path: Path) -> dict[str, Any]:
    """A header of the version that this code reads. Raises CheckpointError, and what `reading_header` makes one of."""
    header: dict[str, Any] = parse_json(written)
    version = header["version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {shown(version)}; this code reads {FORMAT_VERSION}")
    # A bundle's manifest will hold it, which has neither infinite numbers nor halves of surrogate pairs.
    json.dumps(dict(header["provenance"]), ensure_ascii=False, allow_nan=False).encode()
    return header


def check_hash(header: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Take the hash out of the header. Raises CheckpointError where header and tensors have another."""
    # Older files have none.
    stated = header.pop(_HASH_KEY, None)
    if stated is not None and stated != _hash(header, tensors):
        raise CheckpointError(
            f"{path} is damaged: its numbers have another SHA-256 than it states itself; copy it again"
        )


def check_output(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path. Raises CheckpointError for a name that would be taken for another layout when it is read."""
    output = as_path(path, "the output", CheckpointError)
    if output.suffix != SUFFIX:
        raise CheckpointError(
            f"{output} does not end with {SUFFIX!r}, and would not be read again as what it is; expected a name like "
            f"{output.stem}{SUFFIX}"
        )
    return output


def write_own(
    kind: TokenKind, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Write our own format, through a temporary sibling that is renamed: the old file stays whole until then.

    fields: of the header, beside format and version. Raises CheckpointError when the name does not end with SUFFIX or
    the file cannot be written; nothing is left behind.
    """
    path = check_output(path)
    try:
        # As it will be read: JSON turns every key into text.
        header = parse_json(json.dumps({"format": FORMATS[kind], "version": FORMAT_VERSION, **fields}))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be written: in its provenance, {error}; leave that out") from error
    header[_HASH_KEY] = _hash(header, tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path, error=CheckpointError) as temporary:
        # Not save_file: it makes a private file (0600), whatever the umask.
        temporary.write_bytes(safetensors.torch.save(contiguous, {FORMATS[kind]: json.dumps(header, sort_keys=True)}))


def _hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and the tensors. header: without the hash."""
    return hashlib.sha256((json.dumps(header, sort_keys=True) + hash_tensors(tensors)).encode()).hexdigest()
