"""Files of tensors, torch's and safetensors: no code in them is run, and what contradicts its checksum is refused."""

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from rfsq.runtime.bundle.errors import RfsqError
from rfsq.runtime.bundle.reading import parse_json

_ARCHIVE = b"PK\x03\x04"
#: What files begin with that people have beside a checkpoint, and what these are.
_OTHERS = {
    rb"PK\x03\x04.{26}[^\0]{1,200}\.npy(?!/)": "an .npz file of numpy arrays; recorded actions go to --data",
    rb"\x93NUMPY": "an .npy file, a numpy array; recorded actions go to --data",
    rb"\x89HDF\r\n": "an HDF5 file; recorded actions go to --data",
    rb"\x08[\1-\x20][\x12\x3a][^\0]": "an ONNX graph; give the checkpoint that it was exported from",
}


class DamagedFileError(RfsqError, ValueError):
    """A file whose content is not what its own checksums say."""


def other_format(content: bytes) -> str:
    """What this file is that holds no checkpoint, and what to do; empty where nothing is recognised."""
    return next((kind for start, kind in _OTHERS.items() if re.match(start, content, re.DOTALL)), "")


def load_torch(stream: BinaryIO) -> Any:
    """What torch.save wrote, on the CPU, if it is made of plain things.

    Raises DamagedFileError; pickle.UnpicklingError for objects that only running code could rebuild; on damaged bytes
    also whatever the parsers raise.
    """
    stream.seek(0)
    # The format before torch 1.6 is no archive and has no checksums.
    if stream.read(len(_ARCHIVE)) == _ARCHIVE:
        _check_archive(stream)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)


def load_safetensors(content: bytes) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata. The format has no checksums: see `hash_tensors`.

    Raises safetensors.SafetensorError, KeyError for a type that torch lacks.
    """
    tensors = safetensors.torch.load(content)
    # Only safe_open, which takes a path, gives the metadata; the layout is fixed: its length, then the JSON header.
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers, to be kept in the metadata of safetensors."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)};".encode())
        # As bytes: numpy has no bfloat16.
        sha256.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def _check_archive(stream: BinaryIO) -> None:
    """torch itself checks no checksum, and unpacks compressed records, however large they become."""
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        unpacked, size = sum(record.file_size for record in records), stream.seek(0, os.SEEK_END)
        if unpacked > size:
            raise DamagedFileError(
                f"its records unpack to {unpacked} bytes, more than the {size} of the file; torch.save compresses none"
            )
        # All are 0 where torch was told to compute none.
        damaged = archive.testzip() if any(record.CRC for record in records) else None
    if damaged is not None:
        raise DamagedFileError(f"the checksum of {damaged!r} in it is wrong")
