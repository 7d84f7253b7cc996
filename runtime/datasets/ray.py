"""A job on a Ray Data cluster. Each part is a row for the next free worker, and is made again where a worker dies."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Sequence
from typing import Any

from ..bundle.advice import install
from ..bundle.errors import TokenizerError
from .errors import DatasetError
from .job import Job, open_tokenizer
from .job_folder import output_errors
from .parts import PartMaker
from .progress import Progress

#: The least that Ray accepts; a row is a few numbers.
_OBJECT_STORE_BYTES = 80 * 2**20
#: Up to so many parts, each is a task of its own; of more, a task makes several.
_MOST_BLOCKS = 4096


def run_ray(job: Job, parts: Sequence[int], workers: int, address: str | None, progress: Progress) -> None:
    """Make these parts on the cluster at `address`, or on one started here with so many workers.

    Source, bundle and output must lie where every machine sees them by the same paths. A part is written whole or not
    at all, so that it does not matter when one is made twice.
    """
    # Otherwise Ray reports its use to its maker. This must be set before it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DatasetError(f"--engine ray needs Ray, which cannot be imported ({error}); {install('ray')}") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    is_ours = not ray.is_initialized()
    if is_ours:
        own = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
        except (OSError, RuntimeError, ValueError) as error:
            raise DatasetError(f"no Ray at {address or 'this machine'}: {error}; check --ray-address") from error
    progress.begin()
    try:
        _run(ray, job, parts, workers, progress)
    finally:
        if is_ours:
            ray.shutdown()


def _run(ray: Any, job: Job, parts: Sequence[int], workers: int, progress: Progress) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    made = ray.data.from_items(
        [{"part": part} for part in parts], override_num_blocks=min(len(parts), _MOST_BLOCKS)
    ).map(
        RayWorker,
        fn_constructor_args=(pickle.dumps(job),),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
        num_cpus=1,
    )
    for row in made.iter_rows():
        raise_refusal(row)
        progress.add(row["steps"])
        progress.show()


class RayWorker:
    """One process of the cluster. It opens the tokenizer for its first part, so that a refusal comes back in a row."""

    def __init__(self, job: bytes) -> None:
        self._job: Job = pickle.loads(job)  # noqa: S301  # the driver's own bytes, through Ray, which pickles everything
        self._maker: PartMaker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = int(row["part"])
        start, stop = self._job.rows(part)
        found = {"part": part, "steps": stop - start, "error": b""}
        try:
            with output_errors(self._job.partial):
                if self._maker is None:
                    self._maker = PartMaker(self._job, open_tokenizer(self._job))
                self._maker.make(part, lambda _: None)
        except TokenizerError as error:
            return {**found, "error": pickle.dumps(error)}
        return found


def raise_refusal(row: dict[str, Any]) -> None:
    """Raise the worker's error, where the row has one."""
    if row["error"]:
        raise pickle.loads(row["error"])  # noqa: S301  # our own worker's bytes, through Ray, which pickles everything
