"""Makes the parts of a job, block by block: reads, codes and writes it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from queue import Empty, SimpleQueue

import numpy as np

from ..tokenizer import ActionTokenizer
from .coding import StepCoder
from .episodes import Run, check_values, extend_runs
from .format import HASH_STEPS
from .job import Job
from .job_folder import output_errors, save_record
from .part_record import PartRecord
from .progress import Progress
from .steps import AnyArray, Steps
from .writers import part_writer

_WAIT_SECONDS = 0.1


class Stopped(Exception):  # noqa: N818  # no error: another worker has one
    """Raised in a worker to end a part that will not be used, since another worker has failed."""


class PartMaker:
    """Makes parts in one thread, with a reader of its own. Parts in ascending order are read fastest."""

    def __init__(self, job: Job, tokenizer: ActionTokenizer) -> None:
        self._job, self._limit = job, float(np.float32(tokenizer.model.action_limit))
        self._coder = StepCoder(tokenizer)
        self._reader = job.source.open(job.source_width)

    def make(self, part: int, on_steps: Callable[[int], None], is_stopped: Callable[[], bool]) -> PartRecord:
        """Write the part and its record. on_steps: is told the number of steps after every block."""
        job = self._job
        start, stop = job.rows(part)
        digests: list[str] = []
        runs: list[Run] = []
        writer = part_writer(job, part)
        try:
            for row, steps in self._reader.slices(start, stop, job.block_steps):
                if is_stopped():
                    raise Stopped
                digests += _digests(steps)
                extend_runs(runs, steps, job.source, row)
                writer.write(Steps(self._code(steps, row), steps.episode, steps.frame))
                on_steps(len(steps))
            digest = hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
            files = writer.close(job.metadata(start, digest))
        except BaseException:
            writer.abandon()
            raise
        record = PartRecord(part, files, tuple(digests), tuple(runs))
        save_record(job, record)
        return record

    def close(self) -> None:
        self._reader.close()

    def _code(self, steps: Steps, first_row: int) -> AnyArray:
        if self._job.content == "actions":
            return self._coder.decode(steps.values)
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

    def work() -> None:
        with closing(PartMaker(job, tokenizer)) as maker, output_errors(job.partial), suppress(Empty, Stopped):
            while not stopping.is_set():
                maker.make(waiting.get_nowait(), progress.add, stopping.is_set)

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
