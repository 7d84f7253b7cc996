"""Parts of a dataset on disk: Parquet files, or chunks of Zarr arrays. Equal steps give equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..bundle.manifest import FileEntry
from ..bundle.reading import regular_file
from .errors import OutputError
from .format import Compression, Content, Storage, part_name
from .steps import AnyArray, Int64Array, Steps, optional

_ZSTD_LEVEL = 1
#: So many steps of tokens are turned at once: they stay in the processor's first cache.
_TURNED_STEPS = 256
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Where and how: scratch lies beside the data, on the same file system.

    shape: of one step's values: (D, L) for tokens, (A,) for actions.
    """

    data: Path
    scratch: Path
    content: Content
    storage: Storage
    compression: Compression
    shape: tuple[int, ...]
    block_steps: int

    @property
    def width(self) -> int:
        return int(np.prod(self.shape))


class PartWriter(Protocol):
    """Nothing of a part bears its final name before it is whole."""

    def write(self, block: Steps) -> None:
        """The next block: `block_steps` steps, fewer in the last one."""

    def close(self, metadata: Mapping[str, str]) -> dict[str, FileEntry]:
        """Put the part in place; its files, by their paths in the dataset."""

    def abandon(self) -> None:
        """Leave nothing behind."""


def part_writer(layout: Layout, index: int, first_row: int) -> PartWriter:
    return ParquetPart(layout, index) if layout.storage == "parquet" else ZarrPart(layout, first_row)


def part_files(layout: Layout, index: int, rows: tuple[int, int]) -> set[str]:
    """The names of a part's files; rows: its first, and the one after its last."""
    if layout.storage == "parquet":
        return {part_name(index)}
    chunks = range(rows[0] // layout.block_steps, -(-rows[1] // layout.block_steps))
    return {name for chunk in chunks for name in _chunk_names(layout, chunk)}


def put(content: bytes, folder: Path, name: str, scratch: Path) -> FileEntry:
    """Write a file whole or not at all. Raises OSError, FileNotFoundError where `folder` is gone."""
    temporary = scratch_file(scratch, Path(name).name)
    temporary.write_bytes(content)
    move(temporary, folder, name)
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def move(temporary: Path, folder: Path, name: str) -> None:
    """To `name` in `folder`, which is not made: a worker that outlives its job must not lay its folder out again."""
    target = folder / name
    for parent in reversed(Path(name).parents[:-1]):
        (folder / parent).mkdir(exist_ok=True)
    temporary.replace(target)


def scratch_file(scratch: Path, name: str) -> Path:
    """A name that no other process or thread uses; the process is in it for whoever looks on."""
    return scratch / f"{os.getpid()}.{os.urandom(8).hex()}.{name}"


def hash_file(path: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with regular_file(path) as (file, _):
        while content := file.read(_HASHED_BYTES):
            digest.update(content)
            size += len(content)
    return FileEntry(digest.hexdigest(), size)


# Parquet --------------------------------------------------------------------------------------------------------------


class ParquetPart:
    """Columns episode_index, frame_index and tokens (bytes, D*L of them) or action (float32, A of them)."""

    def __init__(self, layout: Layout, index: int) -> None:
        self._layout, self._name = layout, part_name(index)
        self._arrow = optional("pyarrow")
        parquet = optional("pyarrow.parquet")
        arrow = self._arrow
        # Lists of bytes would take five times as long to write as bytes of fixed length, which hold the same.
        kind = arrow.binary(layout.width) if layout.content == "tokens" else arrow.list_(arrow.float32(), layout.width)
        column = "tokens" if layout.content == "tokens" else "action"
        fields = [("episode_index", arrow.int64()), ("frame_index", arrow.int64()), (column, kind)]
        self._schema = arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in fields])
        values = column if layout.content == "tokens" else f"{column}.list.element"
        is_compressed = layout.compression == "zstd"
        # Byte d*L + l of all steps side by side compresses better and four times as fast.
        encoding = {values: "BYTE_STREAM_SPLIT" if is_compressed else "PLAIN"}
        self._temporary = scratch_file(layout.scratch, Path(self._name).name)
        self._writer = parquet.ParquetWriter(
            self._temporary,
            self._schema,
            compression=layout.compression,
            compression_level=_ZSTD_LEVEL if is_compressed else None,
            use_dictionary=False,
            write_statistics=["episode_index", "frame_index"],
            column_encoding={**encoding, **dict.fromkeys(("episode_index", "frame_index"), "DELTA_BINARY_PACKED")},
            store_schema=True,
        )

    def write(self, block: Steps) -> None:
        arrow = self._arrow
        values = np.ascontiguousarray(block.values)
        kind = self._schema.field(2).type
        if self._layout.content == "tokens":
            column = arrow.FixedSizeBinaryArray.from_buffers(kind, len(block), [None, arrow.py_buffer(values)])
        else:
            column = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), type=kind)
        columns = [arrow.array(block.episode), arrow.array(block.frame), column]
        self._writer.write_table(arrow.Table.from_arrays(columns, schema=self._schema), row_group_size=len(block))

    def close(self, metadata: Mapping[str, str]) -> dict[str, FileEntry]:
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        entry = hash_file(self._temporary)
        move(self._temporary, self._layout.data, self._name)
        return {self._name: entry}

    def abandon(self) -> None:
        # A full disk refuses the footer as it refused the rest.
        with suppress(OSError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


# Zarr, version 2 of its format: every library reads it ----------------------------------------------------------------


class ZarrPart:
    """Chunks of the arrays data/tokens, data/episode_index and data/frame_index."""

    def __init__(self, layout: Layout, first_row: int) -> None:
        self._layout = layout
        self._chunk = first_row // layout.block_steps
        self._files: dict[str, FileEntry] = {}

    def write(self, block: Steps) -> None:
        steps = self._layout.block_steps
        contents = (
            turned(block.values, self._layout.shape, steps),
            padded(block.episode, steps),
            padded(block.frame, steps),
        )
        for name, content in zip(_chunk_names(self._layout, self._chunk), contents, strict=True):
            packed = pack(content, self._layout.compression)
            self._files[name] = put(packed, self._layout.data, name, self._layout.scratch)
        self._chunk += 1

    def close(self, metadata: Mapping[str, str]) -> dict[str, FileEntry]:
        del metadata  # Zarr has one place for all of it: the attributes of the group.
        return self._files

    def abandon(self) -> None:
        """Whole chunks may stay: they will be written again, the same."""


def _chunk_names(layout: Layout, chunk: int) -> tuple[str, str, str]:
    """Of tokens, episodes and frames."""
    return (
        f"data/tokens/{chunk}" + ".0" * len(layout.shape),
        f"data/episode_index/{chunk}",
        f"data/frame_index/{chunk}",
    )


def turned(values: AnyArray, shape: tuple[int, ...], steps: int) -> AnyArray:
    """[n, D*L] as [L, D, steps], which is [steps, D, L] in order F: each token's steps side by side; zeros beyond n."""
    result = np.zeros((*reversed(shape), steps), values.dtype)
    for start in range(0, len(values), _TURNED_STEPS):
        part = values[start : start + _TURNED_STEPS].reshape(-1, *shape)
        result[..., start : start + len(part)] = part.T
    return result


def padded(values: Int64Array, steps: int) -> Int64Array:
    result = np.zeros(steps, "<i8")
    result[: len(values)] = values
    return result


def pack(content: AnyArray, compression: Compression) -> bytes:
    if compression == "none":
        return content.tobytes()
    packed: bytes = optional("pyarrow").Codec("zstd", _ZSTD_LEVEL).compress(content, asbytes=True)
    return packed


def unpack(content: bytes, size: int, compression: Compression) -> bytes:
    """Raises OutputError where it does not give so many bytes."""
    if compression == "zstd":
        content = optional("pyarrow").Codec("zstd").decompress(content, size, asbytes=True)
    if len(content) != size:
        raise OutputError(f"a chunk has {len(content)} bytes; expected {size}")
    return content


def zarr_array(
    shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, compression: Compression, order: str = "C"
) -> dict[str, Any]:
    """The content of `.zarray`."""
    compressor = {"id": "zstd", "level": _ZSTD_LEVEL} if compression == "zstd" else None
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": dtype,
        "compressor": compressor,
        "fill_value": 0,
        "order": order,
        "filters": None,
    }


def spelled(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"
