"""The same job on a local Ray: the same bytes, with workers killed, and the same refusals."""

import dataclasses
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import ActionTokenizer
from runtime.dataset_errors import IllegalActionError
from runtime.dataset_job import plan
from runtime.dataset_partial import begin, locked
from runtime.dataset_ray import RayWorker, raise_refusal
from runtime.dataset_sources import open_source
from runtime.errors import BackendUnavailableError, TokenizerError
from tests.runtime.dataset_command import LENGTHS, PART, arguments, files, run, start
from tests.runtime.dataset_samples import (
    random_episodes,
    write_npz,
)


def workers_at(partial: Path, driver: int) -> Iterator[int]:
    """Processes that are writing a part: their numbers are in the names of what they write."""
    for path in partial.glob("*/scratch/*"):
        number = int(path.name.split(".")[0])
        if number != driver:
            yield number


def test_ray_gives_the_same_bytes_with_workers_killed(c_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    source = write_npz(tmp_path / "x.npz", [np.resize(random_episodes([10_000])[0], (800_000, 3))])
    run(source, tmp_path / "local.parquet", c_bundle)
    output = tmp_path / "ray.parquet"
    process = start(*arguments(source, output, c_bundle, "--engine", "ray", "--workers", "2"))
    killed: set[int] = set()
    while process.poll() is None and len(killed) < 2:
        for worker in set(workers_at(tmp_path / "ray.parquet.partial", process.pid)) - killed:
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
            break
        time.sleep(0.002)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert len(killed) == 2
    assert files(output) == files(tmp_path / "local.parquet")


def test_a_worker_of_ray_hands_its_refusal_on_to_the_command(c_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    episodes[3][5, 0] = np.nan
    source = open_source(write_npz(tmp_path / "x.npz", episodes))
    with ActionTokenizer.load(c_bundle) as tokenizer:
        job = plan(source, tokenizer, c_bundle, tmp_path / "out.parquet", steps_per_file=PART)
    with locked(job.output):
        begin(job, overwrite=False, restart=False)
        worker = RayWorker(pickle.dumps(job))
        raise_refusal(worker({"part": 0}))
        with pytest.raises(IllegalActionError, match=r"^x.npz, episode 3, step 5, dimension 0: nan; expected"):
            raise_refusal(worker({"part": 1}))
        # A machine on which the bundle is another, or has no engine of the job's kind.
        other = RayWorker(pickle.dumps(dataclasses.replace(job, bundle=bundle)))
        with pytest.raises(TokenizerError):
            raise_refusal(other({"part": 0}))
        unlike = dataclasses.replace(job.made_with, device="generated C for another processor")
        unlike_worker = RayWorker(pickle.dumps(dataclasses.replace(job, made_with=unlike)))
        with pytest.raises(BackendUnavailableError, match="the job began with generated C for another processor"):
            raise_refusal(unlike_worker({"part": 0}))
