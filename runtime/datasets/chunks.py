"""Chunks as rows: those of demonstrations, to be encoded, and those of tokens, to be decoded step by step.

What makes parts, files and hashes of a source then need not know that a chunk is more than a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..bundle.arrays import Float64Array, Int64Array
from ..bundle.fidelity import CHUNK_RANGE
from .episodes import WholePass, check_stated, farthest
from .format import DatasetInfo, Outlier
from .progress import Progress
from .rows import ChunkTokens
from .source_base import EpisodeTable, Source, StepReader, Steps
from .token_reader import TokenDataset


class _ChunkReader(StepReader):
    _source: ChunkSource

    def _open(self, index: int) -> StepReader:
        del index
        return self._source.steps.open(self._source.model.action_dim)

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        del piece
        source = self._source
        episode, place = source.chunks.places(start, stop)
        first = source.table.starts[episode] + place * source.model.stride
        last = source.table.starts[episode + 1] - 1
        length, begin = source.model.chunk_length, int(first[0])
        steps = self._at(0).read(begin, int(min(first[-1] + length - 1, last[-1])) + 1)
        within = np.minimum(first[:, None] + np.arange(length), last[:, None]) - begin
        values = steps.values[within].reshape(stop - start, -1)
        return Steps(values, steps.episode[first - begin], steps.frame[first - begin])


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkSource(Source):
    """A row for every `stride`-th step of each episode of `steps`: the T actions from there on, float32 [n, T * A].

    Beyond the end of an episode its last action is repeated. Gaps between frames are passed over. table: all episodes,
    in steps; chunks: the same in rows; farthest: the action farthest beyond the range of the tokens, if any is.
    """

    kind = "chunks of demonstrations"
    reader = _ChunkReader
    steps: Source
    table: EpisodeTable
    chunks: EpisodeTable
    model: ChunkTokens
    farthest: Outlier | None

    @classmethod
    def of(cls, steps: Source, model: ChunkTokens, limit: float, units: tuple[Float64Array, Float64Array]) -> Self:
        """Read all steps once, to find the episodes and to check every value.

        limit: of a legal action; units: those of the normaliser and its offsets, [A] each. Raises what WholePass does.
        """
        whole, progress, outliers = WholePass(steps, model.action_dim, limit), Progress(steps.num_steps), []
        for _, found in whole:
            outliers.append(farthest(found, *units, CHUNK_RANGE))
            progress.add(len(found))
            progress.show()
        progress.finish()
        table = whole.episodes
        chunks = EpisodeTable.of_lengths(model.rows_of(table.lengths, "tokens"), table.numbers)
        return cls(
            name=steps.name,
            root=steps.root,
            files=steps.files,
            first_rows=chunks.starts[[0, -1]],
            width=model.source_width("tokens"),
            steps=steps,
            table=table,
            chunks=chunks,
            model=model,
            farthest=max(filter(None, outliers), default=None),
        )

    def check_episodes(self, found: EpisodeTable) -> None:
        check_stated(self.name, self.chunks, found)

    def file_of(self, row: int) -> str:
        (episode,), (place,) = self.chunks.places(row, row + 1)
        return self.steps.file_of(int(self.table.starts[episode] + place * self.model.stride))

    def episode_names(self, episodes: Int64Array) -> list[str]:
        return self.steps.episode_names(episodes)


class _StepReader(StepReader):
    _source: ChunkSteps

    def _open(self, index: int) -> StepReader:
        del index
        return self._source.dataset.open(self._source.dataset.width)

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        del piece
        source, stride = self._source, self._source.model.stride
        episode, frame = source.table.places(start, stop)
        chunk, place = source.chunks.starts[episode] + frame // stride, frame % stride
        begin = int(chunk[0])
        found = self._at(0).read(begin, int(chunk[-1]) + 1)
        chunk -= begin
        values = np.column_stack((found.values[chunk], place.astype(found.values.dtype)))
        return Steps(values, found.episode[chunk], found.frame[chunk] + place)


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkSteps(Source):
    """A row for each step of a dataset of chunk tokens: the tokens of its chunk and its place there, uint16 [n, l + 1].

    Of each chunk its first `stride` steps, which are all steps once. table: all episodes, in steps; chunks: in chunks.
    """

    kind = "a converted dataset"
    reader = _StepReader
    dataset: TokenDataset
    table: EpisodeTable
    chunks: EpisodeTable
    model: ChunkTokens

    @classmethod
    def of(cls, dataset: TokenDataset, model: ChunkTokens) -> Self:
        chunks = dataset.episodes()
        table = EpisodeTable.of_lengths(dataset.episode_lengths(), chunks.numbers)
        return cls(
            name=dataset.name,
            root=dataset.root,
            files=dataset.files,
            first_rows=table.starts[[0, -1]],
            width=model.source_width("actions"),
            dataset=dataset,
            table=table,
            chunks=chunks,
            model=model,
        )

    @property
    def info(self) -> DatasetInfo:
        return self.dataset.info

    def episodes(self) -> EpisodeTable:
        return self.table

    def check_episodes(self, found: EpisodeTable) -> None:
        check_stated(self.name, self.table, found)

    def file_of(self, row: int) -> str:
        return f"{self.name}, step {row}"

    def episode_names(self, episodes: Int64Array) -> list[str]:
        return self.dataset.episode_names(episodes)
