"""A part of a job: made block by block, recorded when it is whole, and found again by the run that goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from ..bundle.arrays import AnyArray
from ..bundle.manifest import FileEntry
from ..bundle.reading import build
from ..tokenizer import ActionTokenizer
from .chunks import ChunkSource
from .coding import coder_of
from .episodes import Run, check_values, extend_runs, farthest
from .errors import OutputError, reason
from .format import HASH_STEPS, Outlier
from .job import Job
from .job_folder import output_errors
from .progress import Progress
from .source_base import Steps
from .writers import hash_file, part_files, put, write_part

_WAIT_SECONDS = 0.1


@dataclass(frozen=True)
class PartRecord:
    """A finished part. digests: sha256 of every HASH_STEPS steps of the source; runs: in their order."""

    part: int
    files: dict[str, FileEntry]
    digests: tuple[str, ...]
    runs: tuple[Run, ...]
    farthest: Outlier | None = None

    def text(self, work: str) -> bytes:
        """The record as JSON with its own hash. work: the name of the job's folder, so that it fits no other."""
        # Not dataclasses.asdict of the whole, which copies every run and takes longer than all the rest.
        files = {name: dataclasses.asdict(entry) for name, entry in self.files.items()}
        content = {"part": self.part, "files": files, "digests": self.digests, "runs": self.runs}
        if self.farthest is not None:
            content["farthest"] = dataclasses.asdict(self.farthest)
        digest = hashlib.sha256(f"{work}\n{json.dumps(content)}".encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}).encode()

    @classmethod
    def parse(cls, text: bytes, work: str) -> PartRecord:
        """Raises OutputError for anything but what `text` gives."""
        try:
            content = json.loads(text)
            runs = _runs(content.pop("runs"))
            del content["sha256"]
            record = dataclasses.replace(build(cls, {**content, "runs": []}, "the record"), runs=runs)
            if any(len(bytes.fromhex(digest)) != hashlib.sha256().digest_size for digest in record.digests):
                raise ValueError("a digest is no sha256")
            is_spelled_so = record.text(work) == text
        # What any content of another shape can raise, deep nesting and non-ASCII text included.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise OutputError(f"a record of a finished part cannot be read ({reason(error)})") from error
        if not is_spelled_so:
            raise OutputError("a record of a finished part was altered after it was written: its hash is another")
        return record

    def check(self, part: int, files: set[str], steps: int, digests: int) -> None:
        """Raises OutputError unless it is about this part, its files, and so many steps and digests."""
        counted = sum(run[3] for run in self.runs)
        found = (self.part, set(self.files), counted, len(self.digests))
        if found != (part, files, steps, digests):
            raise OutputError(
                f"the record of part {part} is about part {self.part}, {len(self.files)} files, {counted} steps and "
                f"{len(self.digests)} digests; expected {len(files)} files, {steps} steps and {digests} digests"
            )


def _runs(values: Any) -> tuple[Run, ...]:
    """By numpy, for there may be one for every step. Raises ValueError."""
    runs = np.array(values)
    if runs.dtype != np.int64 or runs.shape[1:] != (4,):
        raise ValueError(f"runs are {runs.dtype} {list(runs.shape)}; expected int64 [n, 4]")
    _, first, last, count = runs.T
    if ((count < 1) | (last - first < count - 1)).any():
        raise ValueError("a run has no steps, or more than its frames")
    return tuple(map(tuple, runs.tolist()))


def load_records(job: Job) -> list[PartRecord]:
    """The records of all parts, in order. Raises OutputError where one is missing or was altered."""
    try:
        return [_record(job, part) for part in range(job.num_parts)]
    except FileNotFoundError as error:
        raise OutputError(f"{error.filename} is missing: it was removed while the job ran; run it again") from error


def finished_parts(job: Job) -> dict[int, PartRecord]:
    """The parts that an earlier run has finished, read again and hashed, by their numbers."""
    found = {}
    for part in range(job.num_parts):
        try:
            record = _record(job, part)
        except FileNotFoundError:
            continue
        except OutputError:
            # A power cut leaves such files, and so does an edit by hand. The part is made again.
            _record_path(job, part).unlink()
            continue
        paths = {job.data / name: entry for name, entry in record.files.items()}
        if all(path.is_file() and hash_file(path) == entry for path, entry in paths.items()):
            found[part] = record
    return found


def _record(job: Job, part: int) -> PartRecord:
    path = _record_path(job, part)
    start, stop = job.rows(part)
    try:
        record = PartRecord.parse(path.read_bytes(), job.work.name)
        record.check(part, part_files(job, part), stop - start, -(-(stop - start) // HASH_STEPS))
    except OutputError as error:
        raise OutputError(f"{path}: {error}; run the command again, and the part is made anew") from error
    return record


def _record_path(job: Job, part: int) -> Path:
    return job.work / "done" / f"{part:09d}.json"


# Making ---------------------------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818  # no error: another worker has one
    """Raised in a worker to end a part that will not be used, since another worker has failed."""


class PartMaker:
    """Makes parts in one thread, with a reader of its own. Parts in ascending order are read fastest."""

    def __init__(self, job: Job, tokenizer: ActionTokenizer) -> None:
        self._job, self._limit = job, float(np.float32(tokenizer.model.action_limit))
        self._coder = coder_of(tokenizer, job.model)
        # All values of chunks were looked at when the episodes were found.
        self._is_checking = job.content == "tokens" and not isinstance(job.source, ChunkSource)
        self._reader = job.source.open(job.source_width)
        self._normaliser = np.array([tokenizer.model.action_units, tokenizer.model.action_offset], np.float64)

    def make(self, part: int, on_steps: Callable[[int], None]) -> None:
        """Write the part and its record. on_steps: is told the number of steps after every block; what it raises ends
        the part, and leaves nothing of it."""
        job = self._job
        start, stop = job.rows(part)
        digests: list[str] = []
        runs: list[Run] = []
        outliers: list[Outlier | None] = []

        def blocks() -> Iterator[Steps]:
            for row, steps in self._reader.slices(start, stop, job.block_steps):
                digests.extend(_digests(steps))
                extend_runs(runs, steps, job.source, row)
                outliers.append(farthest(steps, *self._normaliser) if self._is_checking else None)
                yield Steps(self._code(steps, row), steps.episode, steps.frame)
                on_steps(len(steps))

        def metadata() -> dict[str, str]:
            return job.metadata(start, hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest())

        files = write_part(job, part, blocks(), metadata)
        outlier = max(filter(None, outliers), default=None)
        record, path = PartRecord(part, files, tuple(digests), tuple(runs), outlier), _record_path(job, part)
        put(record.text(job.work.name), path.parent, path.name, job.scratch)

    def close(self) -> None:
        self._reader.close()

    def _code(self, steps: Steps, first_row: int) -> AnyArray:
        if self._job.content == "actions":
            return self._coder.decode(steps.values)
        if self._is_checking:
            check_values(steps, self._job.source, first_row, self._limit)
        return self._coder.encode(steps.values)


def _digests(steps: Steps) -> list[str]:
    found = []
    for start in range(0, len(steps), HASH_STEPS):
        rows = slice(start, start + HASH_STEPS)
        digest = hashlib.sha256()
        for column in (steps.values, steps.episode, steps.frame):
            digest.update(np.ascontiguousarray(column[rows]).data.cast("B"))
        found.append(digest.hexdigest())
    return found


def parts_of_another_source(job: Job, records: Iterable[PartRecord]) -> set[int]:
    """The parts whose steps in the source have changed since they were made. Raises SourceError."""
    found = set()
    with closing(job.source.open(job.source_width)) as reader:
        for record in records:
            blocks = reader.slices(*job.rows(record.part), job.block_steps)
            if tuple(digest for _, steps in blocks for digest in _digests(steps)) != record.digests:
                found.add(record.part)
    return found


def run_local(job: Job, tokenizer: ActionTokenizer, parts: Sequence[int], workers: int, progress: Progress) -> None:
    """Make these parts in threads, which run side by side: what takes time in them releases the interpreter."""
    waiting, stopping = SimpleQueue[int](), threading.Event()
    for part in parts:
        waiting.put(part)

    def on_steps(steps: int) -> None:
        progress.add(steps)
        if stopping.is_set():
            raise Stopped

    def work() -> None:
        with closing(PartMaker(job, tokenizer)) as maker, output_errors(job.partial), suppress(Empty, Stopped):
            while not stopping.is_set():
                maker.make(waiting.get_nowait(), on_steps)

    with ThreadPoolExecutor(workers, "part-maker") as pool:
        working = {pool.submit(work) for _ in range(workers)}
        try:
            while working:
                ended, working = wait(working, _WAIT_SECONDS, FIRST_COMPLETED)
                for worker in ended:
                    worker.result()
                progress.show()
        finally:
            stopping.set()
