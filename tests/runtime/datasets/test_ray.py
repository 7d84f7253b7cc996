"""The same job on a local Ray: the same bytes, with a worker killed, and the same refusals."""

import dataclasses
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import BackendUnavailableError, SequenceTooShortError, TokenizerError
from rfsq.runtime.datasets.errors import IllegalActionError
from rfsq.runtime.datasets.job import plan, token_model
from rfsq.runtime.datasets.job_folder import begin, locked
from rfsq.runtime.datasets.ray import RayWorker, raise_refusal
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.datasets.tokenize import parser
from tests.bundles import Recipe, random_actions
from tests.runtime.datasets.command import LENGTHS, ROOT, arguments, files, run
from tests.runtime.datasets.samples import random_episodes, write_npz


def workers_at(partial: Path, driver: int) -> Iterator[int]:
    """Processes that are writing a part: their numbers are in the names of what they write."""
    for path in partial.glob("*/scratch/*"):
        number = int(path.name.split(".")[0])
        if number != driver:
            yield number


def kill_one(partial: Path, killed: list[int], is_over: threading.Event) -> None:
    while not killed and not is_over.wait(0.002):
        for worker in workers_at(partial, os.getpid()):
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)
            break


def check_tasks(ray: Any, tokenizer: ActionTokenizer) -> None:
    """Tokenizers and errors go to other processes and come back as they were."""
    chunks = random_actions(Recipe(), 6)
    handle = ray.put(tokenizer)
    encode = ray.remote(ActionTokenizer.encode)
    np.testing.assert_array_equal(ray.get(encode.remote(handle, chunks)), tokenizer.encode(chunks))
    with pytest.raises(TokenizerError, match=r"actions\[0, 0, 0\] is nan"):
        ray.get(encode.remote(handle, chunks * np.nan))

    @ray.remote
    def refuse() -> None:
        raise SequenceTooShortError("sequence 3 has 5 ids", 3, 5)

    with pytest.raises(SequenceTooShortError, match="sequence 3 has 5 ids") as caught:
        ray.get(refuse.remote())
    assert (caught.value.row, caught.value.position) == (3, 5)


def test_ray_gives_the_same_bytes_with_a_worker_killed_and_its_tasks_encode_and_refuse(
    c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one test, for Ray takes seconds to start and to end; the command starts it, and would end it.

    Of two workers one is killed: Ray takes seconds to put another in its place, and would do the same a second time.
    """
    ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    source = write_npz(tmp_path / "x.npz", [np.resize(random_episodes([10_000])[0], (120_000, 3))])
    run(source, tmp_path / "local.parquet", c_bundle)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    end, ends, killed, is_over = ray.shutdown, list[int](), list[int](), threading.Event()
    monkeypatch.setattr(ray, "shutdown", lambda: ends.append(1))
    killer = threading.Thread(target=kill_one, args=(tmp_path / "ray.parquet.partial", killed, is_over))
    killer.start()
    try:
        run(source, tmp_path / "ray.parquet", c_bundle, "--engine", "ray", "--workers", "2")
        assert len(killed) == 1
        assert sum(ends) == 1
        assert files(tmp_path / "ray.parquet") == files(tmp_path / "local.parquet")
        with ActionTokenizer.load(c_bundle) as tokenizer:
            check_tasks(ray, tokenizer)
    finally:
        is_over.set()
        killer.join()
        end()


def test_a_worker_of_ray_hands_its_refusal_on_to_the_command(c_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    episodes[3][5, 0] = np.nan
    path = write_npz(tmp_path / "x.npz", episodes)
    given, source = arguments(path, tmp_path / "out.parquet", c_bundle), open_source(path)
    with ActionTokenizer.load(c_bundle) as tokenizer:
        options = parser().parse_args(given)
        job = plan(source, tokenizer, token_model(tokenizer.model, options), options, "parquet")
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
