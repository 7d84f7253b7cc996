"""Work spread over processes."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from operator import call
from typing import TypeVar

from tqdm import tqdm

from rfsq.evidence.errors import EvidenceError
from rfsq.runtime.bundle.console import end_by_interrupts

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def in_processes(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], workers: int, start: Callable[[], object]
) -> Iterator[_Result]:
    """What `work` makes of each job, each as soon as it is done.

    start: called at the beginning of every process. A job that fails says so at once on standard error; jobs that run
    are waited for and given, no other begins, and then its error is raised: EvidenceError when a process dies.
    """
    # Spawned: a forked process would share torch's threads and the simulator's native state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), partial(_begin, start))
    failed: BaseException | None = None
    try:
        futures = [pool.submit(work, job) for job in jobs]
        # What a process finished before another died comes first.
        for future in as_completed(futures):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                yield future.result()
            elif failed is None:
                failed = error
                print(f"a job failed: {error!r}; those that run are waited for", file=sys.stderr, flush=True)
                for other in futures:
                    other.cancel()
        if failed is not None:
            raise failed
    except BrokenProcessPool as error:
        raise EvidenceError(
            "a worker process died, perhaps for want of memory. What is finished is kept: start again, and it goes on "
            "where it was; use fewer --workers if it happens again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def results_of(
    jobs: Sequence[tuple[str, Callable[[], _Result]]], workers: int, start: Callable[[], object]
) -> list[_Result]:
    """What the jobs, each with its name, give, in their order, and a line as each is done, which a log shows too."""
    placed = [partial(_placed, place, job) for place, (_, job) in enumerate(jobs)]
    if workers == 1:
        start()
        found: Iterator[tuple[int, _Result]] = map(call, placed)
    else:
        found = in_processes(call, placed, min(workers, len(jobs)), start)
    results: dict[int, _Result] = {}
    for place, result in tqdm(found, total=len(jobs), unit="job", disable=None):
        results[place] = result
        tqdm.write(f"{len(results)} of {len(jobs)} jobs are done: {jobs[place][0]}", file=sys.stderr)
    return [results[place] for place in range(len(jobs))]


def _placed(place: int, job: Callable[[], _Result]) -> tuple[int, _Result]:
    return place, job()


def _begin(start: Callable[[], object]) -> None:
    end_by_interrupts()
    start()
