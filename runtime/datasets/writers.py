"""Parts of a dataset on disk: Parquet files, or chunks of Zarr arrays. Equal steps give equal bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.arrays import AnyArray
from ..bundle.manifest import FileEntry
from ..bundle.reading import regular_file
from .errors import OutputError
from .format import Compression, part_name
from .rows import TokenModel
from .source_base import Steps, optional

if TYPE_CHECKING:
    # Readers of datasets load this module too, and need no tokenizer.
    from .job import Job

_ZSTD_LEVEL = 1
#: Steps that are turned at once: their tokens fit into the processor's first-level cache.
_TURNED_STEPS = 256


def write_part(
    job: Job, part: int, blocks: Iterable[Steps], metadata: Callable[[], Mapping[str, str]]
) -> dict[str, FileEntry]:
    """Write one part; its files, by their paths in the dataset. A file has its final name only once it is whole.

    blocks: of `block_steps` steps each, fewer in the last one; metadata: of a Parquet file, asked for after the last.
    """
    return _write_parquet(job, part, blocks, metadata) if job.storage == "parquet" else _write_zarr(job, part, blocks)


def part_files(job: Job, part: int) -> set[str]:
    """The names of a part's files."""
    if job.storage == "parquet":
        return {part_name(part)}
    start, stop = job.rows(part)
    chunks = range(start // job.block_steps, -(-stop // job.block_steps))
    return {name for chunk in chunks for name in chunk_names(chunk, job.model)}


def put(content: bytes, folder: Path, name: str, scratch: Path) -> FileEntry:
    """Write a file whole or not at all. Raises OSError, FileNotFoundError where `folder` is gone."""
    temporary = scratch_file(scratch, Path(name).name)
    temporary.write_bytes(content)
    move(temporary, folder, name)
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def put_file(temporary: Path, folder: Path, name: str) -> dict[str, FileEntry]:
    """Put a file that was written in its place; the file by its path in the dataset."""
    entry = hash_file(temporary)
    move(temporary, folder, name)
    return {name: entry}


def move(temporary: Path, folder: Path, name: str) -> None:
    """Rename to `name` in `folder`, which must exist: a worker that outlives its job must not create it again."""
    target = folder / name
    for parent in reversed(Path(name).parents[:-1]):
        (folder / parent).mkdir(exist_ok=True)
    temporary.replace(target)


def scratch_file(scratch: Path, name: str) -> Path:
    """A name that no other process or thread uses. It begins with the number of the process."""
    return scratch / f"{os.getpid()}.{os.urandom(8).hex()}.{name}"


def hash_file(path: Path) -> FileEntry:
    with regular_file(path) as (file, _):
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # a BinaryIO without readinto, to mypy
        return FileEntry(digest.hexdigest(), file.tell())


# Parquet --------------------------------------------------------------------------------------------------------------


def _write_parquet(
    job: Job, part: int, blocks: Iterable[Steps], metadata: Callable[[], Mapping[str, str]]
) -> dict[str, FileEntry]:
    """Columns episode_index, frame_index and tokens (the bytes of a row's) or action (float32, A of them)."""
    arrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    width, is_tokens, is_compressed = job.width, job.content == "tokens", job.compression == "zstd"
    # Bytes of fixed length are written five times as fast as lists of bytes, and hold the same.
    num_bytes = width * np.dtype(job.model.dtype).itemsize
    kind = arrow.binary(num_bytes) if is_tokens else arrow.list_(arrow.float32(), width)
    column = "tokens" if is_tokens else "action"
    fields = [("episode_index", arrow.int64()), ("frame_index", arrow.int64()), (column, kind)]
    schema = arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in fields])
    # With the same byte of all rows side by side, tokens compress better and four times as fast.
    encoding = {
        column if is_tokens else f"{column}.list.element": "BYTE_STREAM_SPLIT" if is_compressed else "PLAIN",
        **dict.fromkeys(("episode_index", "frame_index"), "DELTA_BINARY_PACKED"),
    }

    def table_of(block: Steps) -> Any:
        values = np.ascontiguousarray(block.values, job.model.dtype if is_tokens else None)
        if is_tokens:
            coded = arrow.FixedSizeBinaryArray.from_buffers(kind, len(block), [None, arrow.py_buffer(values)])
        else:
            coded = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), type=kind)
        return arrow.Table.from_arrays([arrow.array(block.episode), arrow.array(block.frame), coded], schema=schema)

    temporary = scratch_file(job.scratch, Path(part_name(part)).name)
    try:
        with parquet.ParquetWriter(
            temporary,
            schema,
            compression=job.compression,
            compression_level=_ZSTD_LEVEL if is_compressed else None,
            use_dictionary=False,
            write_statistics=["episode_index", "frame_index"],
            column_encoding=encoding,
            store_schema=True,
        ) as writer:
            for block in blocks:
                writer.write_table(table_of(block), row_group_size=len(block))
                # The next one takes its memory.
                del block
            writer.add_key_value_metadata(metadata())
        return put_file(temporary, job.data, part_name(part))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# Zarr, version 2 of its format: every library reads it ----------------------------------------------------------------


def _write_zarr(job: Job, part: int, blocks: Iterable[Steps]) -> dict[str, FileEntry]:
    """Chunks of the arrays data/tokens, data/episode_index and data/frame_index.

    What an end on the way leaves is whole, and the same when it is written again.
    """
    files: dict[str, FileEntry] = {}
    model, steps = job.model, job.block_steps
    for chunk, block in enumerate(blocks, job.rows(part)[0] // steps):
        numbers = (np.pad(column, (0, steps - len(block))).astype("<i8") for column in (block.episode, block.frame))
        contents = (turned(block.values.astype(model.dtype, copy=False), model.shape, steps), *numbers)
        for name, content in zip(chunk_names(chunk, model), contents, strict=True):
            files[name] = put(pack(content, job.compression), job.data, name, job.scratch)
        # The next one takes their memory.
        del block, contents, content
    return files


def chunk_names(chunk: int, model: TokenModel) -> tuple[str, str, str]:
    """The names of a chunk of tokens, of episodes and of frames."""
    return f"data/tokens/{chunk}{'.0' * len(model.shape)}", f"data/episode_index/{chunk}", f"data/frame_index/{chunk}"


def turned(values: AnyArray, shape: tuple[int, ...], steps: int) -> AnyArray:
    """[n, D*L] as [L, D, steps], which is [steps, D, L] in order F: each token's steps side by side; zeros beyond n.

    shape: of the tokens of a row, (D, L) or (l,).
    """
    result = np.zeros((*reversed(shape), steps), values.dtype)
    for start in range(0, len(values), _TURNED_STEPS):
        part = values[start : start + _TURNED_STEPS].reshape(-1, *shape)
        result[..., start : start + len(part)] = part.T
    return result


def pack(content: AnyArray, compression: Compression) -> bytes:
    if compression == "none":
        return content.tobytes()
    packed: bytes = optional("pyarrow").Codec("zstd", _ZSTD_LEVEL).compress(content, asbytes=True)
    return packed


def unpack(content: bytes, size: int, compression: Compression) -> bytes:
    """The bytes of a chunk. Raises OutputError where they are not `size`."""
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
        "fill_value": None if "S" in dtype else 0,
        "order": order,
        "filters": None,
    }
