"""Opens a converted dataset and verifies it, for decoding and for training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.advice import page
from ..bundle.arrays import Int64Array
from ..bundle.compatibility import matches_fingerprint
from ..bundle.errors import FingerprintError
from ..bundle.paths import as_path
from ..bundle.reading import read_file
from .episodes import check_stated
from .errors import TokenDatasetError
from .format import EPISODE_STEPS, EPISODES_NAME, DatasetInfo, part_name, read_info
from .source_base import EpisodeTable, Source, StepReader, Steps, optional
from .writers import chunk_names, hash_file, unpack

_AGAIN = "copy the dataset again, or tokenise the source again"


def open_token_dataset(path: str | os.PathLike[str], *, expect_fingerprint: str | None = None) -> TokenDataset:
    """Open a folder that `tokenize_dataset.py` wrote: the sizes of all files are checked, their hashes when read.

    expect_fingerprint: of the tokenizer that the tokens are for, in full or its first digits (8 at least). Raises
    TokenDatasetError for what is unfinished, truncated, altered or of another schema version, FingerprintError for
    tokens of another tokenizer.
    """
    folder = as_path(path, "the dataset").absolute()
    try:
        return _open(folder, expect_fingerprint)
    except OSError as error:
        raise TokenDatasetError(f"{folder} cannot be read: {error}; check its permissions, or {_AGAIN}") from error


def _open(folder: Path, expect_fingerprint: str | None) -> TokenDataset:
    info = read_info(folder)
    if expect_fingerprint is not None and not matches_fingerprint(info.fingerprint, expect_fingerprint):
        raise FingerprintError(
            f"the tokens in {folder} have the fingerprint {info.fingerprint!r}, expected {expect_fingerprint!r}: they "
            "mean something else to that tokenizer, and would become other actions; use the bundle that made them, or "
            f"one of the ways in {page('integration')}"
        )
    for name, entry in info.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes, it was written with {entry.size}"
            raise TokenDatasetError(f"{name} in {folder} {found}: the dataset is truncated or was altered; {_AGAIN}")
    return TokenDataset.of(folder, info)


class _DatasetReader(StepReader):
    """Keeps the last block, so that slices in ascending order read each block once."""

    _source: TokenDataset
    _block: tuple[int, Steps] | None = None

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        source = self._source
        first, end = source.first_rows[piece : piece + 2].tolist()
        if self._block is None or self._block[0] != piece:
            read = self._read_parquet if source.info.storage == "parquet" else self._read_zarr
            self._block = piece, read(piece)
        block, rows = self._block[1], slice(start - first, stop - first)
        if len(block) != end - first:
            raise TokenDatasetError(
                f"block {piece} of {source.root} has {len(block)} steps, expected {end - first}; {_AGAIN}"
            )
        return Steps(block.values[rows], block.episode[rows], block.frame[rows])

    def _open(self, index: int) -> Any:
        self._source.verify(part_name(index))
        return optional("pyarrow.parquet").ParquetFile(self._source.root / part_name(index))

    def _read_parquet(self, index: int) -> Steps:
        info = self._source.info
        part, group = divmod(index, info.steps_per_file // info.steps_per_block)
        table = self._at(part).read_row_group(group, use_threads=False)
        episode, frame, column = (table.column(place).combine_chunks() for place in range(3))
        if info.content == "actions":
            values = np.asarray(column.flatten().to_numpy())
        else:
            dtype = np.dtype(info.model.dtype)
            begin = column.offset * info.width * dtype.itemsize
            values = np.frombuffer(column.buffers()[1], dtype, len(column) * info.width, begin)
        return Steps(values.reshape(-1, info.width), episode.to_numpy(), frame.to_numpy())

    def _read_zarr(self, index: int) -> Steps:
        info, steps = self._source.info, self._source.info.steps_per_block
        rows, model = min(steps, info.num_rows - index * steps), info.model
        columns = ((model.dtype, info.width), ("<i8", 1), ("<i8", 1))
        tokens, episode, frame = (
            np.frombuffer(
                unpack(self._source.content(name), steps * width * np.dtype(dtype).itemsize, info.compression), dtype
            )
            for name, (dtype, width) in zip(chunk_names(index, model), columns, strict=True)
        )
        # In order F, as `turned` of writers.py lays them out.
        tokens = tokens.reshape(*reversed(model.shape), steps)[..., :rows].T
        return Steps(np.ascontiguousarray(tokens).reshape(rows, info.width), episode[:rows], frame[:rows])


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenDataset(Source):
    """Rows of a converted dataset, in slices. It is a source like any other: it can be decoded as a whole."""

    kind = "a converted dataset"
    reader = _DatasetReader
    info: DatasetInfo
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, folder: Path, info: DatasetInfo) -> TokenDataset:
        starts = range(0, info.num_rows, info.steps_per_block)
        blocks = [(min(info.steps_per_block, info.num_rows - start), info.width, folder.name) for start in starts]
        return cls.from_pieces(folder, [folder / name for name in info.files], blocks, info=info)

    def open(self, width: int) -> StepReader:
        if width != self.width:
            raise TokenDatasetError(f"{self.name} has {self.width} values for a step, expected {width}; {_AGAIN}")
        return self.reader(self)

    def check_episodes(self, found: EpisodeTable) -> None:
        check_stated(self.name, self.episodes(), found)

    def file_of(self, row: int) -> str:
        return f"{self.name}, row {row}"

    def episodes(self) -> EpisodeTable:
        """All episodes, by the table that was written with the rows."""
        if self.info.storage == "zarr":
            ends, numbers = (
                np.frombuffer(self.content(f"meta/{name}/0"), "<i8") for name in ("episode_ends", "episode_index")
            )
            return EpisodeTable(np.concatenate([np.zeros(1, np.int64), ends]), numbers)
        numbers = self._episodes_column("episode_index").to_numpy()
        return EpisodeTable.of_lengths(self.info.model.rows_of(self.episode_lengths(), self.info.content), numbers)

    def episode_lengths(self) -> Int64Array:
        """How many steps each episode has, [E]."""
        if self.info.storage == "parquet":
            return self._episodes_column("num_steps").to_numpy()  # type: ignore[no-any-return]
        if self.info.num_chunks is None:
            return self.episodes().lengths
        return np.frombuffer(self.content(f"{EPISODE_STEPS}/0"), "<i8")

    def episode_names(self, episodes: Int64Array) -> list[str]:
        if self.info.storage == "zarr":
            names = self.content("meta/episode_name/0")
            size = len(names) // self.info.num_episodes
            found = [name.decode() for name in np.frombuffer(names, f"S{size}").tolist()]
        else:
            found = self._episodes_column("name").to_pylist()
        numbers = self.episodes().numbers
        return [found[place] for place in np.searchsorted(numbers, episodes).tolist()]

    def content(self, name: str) -> bytes:
        """The bytes of a file, verified."""
        self.verify(name)
        return read_file(self.root / name, self.info.files[name].size)

    def verify(self, name: str) -> None:
        """Hash a file, once. Raises TokenDatasetError where `dataset.json` states another hash."""
        expected = self.info.files.get(name)
        if expected is None:
            raise TokenDatasetError(f"{self.root} lists no file {name!r}; {_AGAIN}")
        if name in self._verified:
            return
        try:
            found = hash_file(self.root / name)
        except OSError as error:
            raise TokenDatasetError(f"{name} in {self.root} cannot be read: {error}; {_AGAIN}") from error
        if found != expected:
            raise TokenDatasetError(
                f"{name} in {self.root} has {found.size} bytes and sha256 {found.sha256}, it was written with "
                f"{expected.size} and {expected.sha256}: it is truncated or was altered; {_AGAIN}"
            )
        self._verified.add(name)

    def _episodes_column(self, name: str) -> Any:
        self.verify(EPISODES_NAME)
        return optional("pyarrow.parquet").ParquetFile(self.root / EPISODES_NAME).read([name]).column(0)
