"""The layout of a converted dataset on disk, and `dataset.json`, which is read strictly and written in one spelling."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..bundle.advice import quoted
from ..bundle.fidelity import Fidelity
from ..bundle.manifest import FileEntry
from ..bundle.paths import counted
from ..bundle.reading import build, parse_json, read_file
from .errors import TokenDatasetError
from .rows import ChunkTokens, Content, StepTokens

#: Another one with every change of meaning or layout; all that are not listed here are refused.
SCHEMA_VERSIONS = (StepTokens.schema_version, ChunkTokens.schema_version)
INFO_NAME = "dataset.json"
EPISODES_NAME = "episodes.parquet"
#: In Zarr: the array with the number of steps of each episode, where a row is a chunk.
EPISODE_STEPS = "meta/episode_steps"

Storage = Literal["parquet", "zarr"]
Compression = Literal["zstd", "none"]

#: Rows that are hashed together; every file but the last holds a multiple of them.
HASH_STEPS = 8192

_INFO_SIZE_LIMIT = 64 * 2**20
_FILES_PER_FOLDER = 1000


@dataclass(frozen=True)
class SourceInfo:
    """sha256: over the sha256 of every HASH_STEPS rows, which are steps, or the actions of a chunk: their values, then
    episodes, then frames, little-endian.

    filter_key: of a robomimic file, where not all of its episodes were taken.
    """

    name: str
    key: str
    sha256: str
    filter_key: str | None = None


@dataclass(frozen=True)
class MadeWith:
    """The tools of a job: others may give other bytes, and another backend other tokens at near-ties."""

    backend: str
    device: str
    pyarrow: str


@dataclass(frozen=True, order=True)
class Outlier:
    """An action far outside of what the model knows. reach: in units of its normaliser, from the middle."""

    reach: float
    value: float
    episode: int
    step: int
    dimension: int


@dataclass(frozen=True)
class Verification:
    """A sample read back from the files: tokens decoded and held against the actions they came from, in their units.

    For decoded actions: against what the tokenizer gives for the tokens again, where both errors must be 0.
    fidelity: of tokens, what they are worth, by dimension; None in what was made before it was recorded.
    farthest: of all steps, None where none is far outside.
    """

    steps: int
    max_error: float
    mean_error: float
    fidelity: Fidelity | None = None
    farthest: Outlier | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is written, how, and by which tokenizer and tools: the same for a job and for the dataset that it makes."""

    content: Content
    storage: Storage
    compression: Compression
    steps_per_file: int
    fingerprint: str
    model: ChunkTokens | StepTokens
    made_with: MadeWith

    @property
    def width(self) -> int:
        """Values of one row, as they are written."""
        return self.model.width(self.content)

    def facts(self) -> dict[str, Any]:
        """The fields of a Conversion, of whatever extends it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Conversion)}


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(Conversion):
    """num_chunks: the rows of a dataset of chunk tokens; all others have a row for each step. steps_per_file,
    steps_per_block: in rows. files: every file but `dataset.json`, by its path inside the dataset, with forward
    slashes."""

    schema_version: int
    ordering: str
    num_steps: int
    num_episodes: int
    steps_per_block: int
    source: SourceInfo
    verification: Verification
    files: dict[str, FileEntry]
    num_chunks: int | None = None

    @property
    def num_rows(self) -> int:
        return self.num_steps if self.num_chunks is None else self.num_chunks

    @property
    def verified(self) -> str:
        """How much of what was encoded the verification has read back, for people; its `steps` count a step once for
        each place in a chunk that it fills."""
        steps, length = self.verification.steps, self.model.chunk_length
        if self.num_chunks is None:
            return counted(steps, "step")
        return f"{counted(steps // length, 'chunk')} of {counted(length, 'step')}"


def part_name(index: int) -> str:
    """The Parquet file of a part, named as LeRobot v3 names its files.

    >>> part_name(1234)
    'data/chunk-001/file-234.parquet'
    """
    return f"data/chunk-{index // _FILES_PER_FOLDER:03d}/file-{index % _FILES_PER_FOLDER:03d}.parquet"


def info_text(info: DatasetInfo) -> str:
    """The one spelling of `dataset.json`, its own hash included."""
    content = dataclasses.asdict(info)
    if info.verification.fidelity is None:
        # As it was spelled before it was recorded.
        del content["verification"]["fidelity"]
    if info.verification.farthest is None:
        del content["verification"]["farthest"]
    if info.source.filter_key is None:
        del content["source"]["filter_key"]
    if info.num_chunks is None:
        del content["num_chunks"]
    digest = hashlib.sha256(_spelled(content).encode()).hexdigest()
    return _spelled({**content, "dataset_sha256": digest}) + "\n"


def read_info(folder: Path) -> DatasetInfo:
    """Raises TokenDatasetError unless `folder` holds a finished dataset of this schema version."""
    path = folder / INFO_NAME
    if not path.is_file():
        unfinished = folder.with_name(folder.name + ".partial")
        if unfinished.is_dir():
            raise TokenDatasetError(f"{folder} is not finished: run the command that was making it again, to go on")
        found = "a file" if folder.is_file() else "a folder without it" if folder.is_dir() else "nothing"
        raise TokenDatasetError(
            f"{folder} is no token dataset: expected a folder with {INFO_NAME}, found {found}; give the whole folder "
            f"that {quoted('tokenize')} wrote"
        )
    try:
        return parse_info(read_file(path, _INFO_SIZE_LIMIT).decode("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise TokenDatasetError(f"{path} cannot be read: {error}; copy the dataset again") from error


def parse_info(text: str, path: Path) -> DatasetInfo:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise TokenDatasetError(f"{path} is not JSON: {error}; copy the dataset again") from error
    found = content.get("schema_version") if isinstance(content, dict) else type(content).__name__
    if found not in SCHEMA_VERSIONS or isinstance(found, bool):
        raise TokenDatasetError(
            f"{path} has schema version {found!r}; this runtime reads {' and '.join(map(str, SCHEMA_VERSIONS))}: "
            "tokenise the source again, or use the version that wrote it"
        )
    stated = content.pop("dataset_sha256", None)
    try:
        info = build(DatasetInfo, content, path.name, is_exact=True)
    except ValueError as error:
        raise TokenDatasetError(f"{error}: copy the dataset again") from error
    if info_text(info) != text:
        raise TokenDatasetError(
            f"{path} was altered after it was written: its dataset_sha256 is {stated}, or its spelling is not the one "
            "written here; copy the dataset again"
        )
    for name in info.files:
        if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise TokenDatasetError(f"{path} lists {name!r}, which lies outside the dataset; copy the dataset again")
    least = min(info.num_steps, info.num_rows, info.num_episodes)
    if not 0 < info.steps_per_block <= info.steps_per_file or least < 1:
        raise TokenDatasetError(f"{path} states a dataset without steps, episodes or blocks; copy the dataset again")
    if (info.schema_version, info.ordering) != (info.model.schema_version, info.model.ordering):
        raise TokenDatasetError(
            f"{path} orders tokens as {info.ordering!r}; this runtime reads {info.model.ordering!r} there"
        )
    return info


def spelled(content: dict[str, Any]) -> bytes:
    """The one spelling of descriptions beside `dataset.json`: of Zarr's arrays, and of jobs."""
    return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"


def _spelled(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False)
