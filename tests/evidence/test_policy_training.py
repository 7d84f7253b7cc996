"""Policies of all kinds are trained alike, show how far they are, and are kept seed by seed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfsq.evidence import policy_training
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.networks import NetworkRecipe
from rfsq.evidence.policies import NOTHING, PolicyConfig
from rfsq.evidence.policy_lessons import Lessons, meant
from rfsq.evidence.policy_training import (
    ACTIONS,
    OAT,
    OAT_FILE,
    TrainingJob,
    load_oat,
    load_policies,
    normalisation,
    targets_of,
    train_all,
    train_job,
    training_jobs,
    weights_file,
)
from tests.evidence.conftest import some_recordings

SMALL = PolicyConfig(width=8, depth=1, heads=2, steps=3, batch=4)
KINDS = {"long": (9, 6), "short": (1025, 2), ACTIONS: (None, 56)}


def some_jobs(seeds: tuple[int, ...] = (0, 1), config: PolicyConfig = SMALL) -> list[TrainingJob]:
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    targets: dict[str, tuple[int | None, Tensor]] = {
        name: (words, torch.randn(20, size) if words is None else torch.full((20, size), words - 1))
        for name, (words, size) in KINDS.items()
    }
    targets["long"][1][:, -1] = NOTHING
    return training_jobs(rows, targets, config, seeds)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(work: Callable[[Any], Any], jobs: list[Any], *_: object) -> Iterator[Any]:
        yield from map(work, jobs)

    monkeypatch.setattr(policy_training, "in_processes", run)


def test_seeds_come_one_after_the_other_and_short_kinds_first() -> None:
    found = [(job.seed, job.kind.name) for job in some_jobs((3, 1))]
    assert found == [(seed, name) for seed in (3, 1) for name in (ACTIONS, "short", "long")]


def test_no_process_is_sent_more_than_it_needs() -> None:
    sizes = {job.kind.name: job.targets.nbytes for job in some_jobs((0,))}
    assert sizes == {ACTIONS: 20 * 56 * 4, "short": 20 * 2 * 2, "long": 20 * 6 * 2}


def test_a_training_says_when_it_begins_and_how_fast_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    config = PolicyConfig(**asdict(SMALL) | {"steps": 500})
    train_job(next(job for job in some_jobs((7,), config) if job.kind.name == "short"))
    begins, first, last = capsys.readouterr().out.splitlines()
    assert begins == "short, seed 7: begins"
    assert first.startswith("short, seed 7: 100 of 500 steps, ")
    assert " a second, loss " in first
    assert last.startswith("short, seed 7: 500 of 500 steps, ")


@pytest.mark.usefixtures("one_process")
def test_policies_are_the_same_from_a_file_up_to_its_rounding(tmp_path: Path) -> None:
    jobs, normalised = some_jobs(), (torch.zeros(5), torch.ones(5))
    train_all(jobs, normalised, 1, tmp_path)
    for name, (words, size) in KINDS.items():
        found = load_policies(weights_file(tmp_path, name))
        assert (found.kind.name, found.kind.vocabulary, found.kind.size) == (name, words, size)
        assert sorted(found.by_seed) == [0, 1]
        for job in (job for job in jobs if job.kind.name == name):
            _, _, _, weights = train_job(job)
            kept = found.by_seed[job.seed].state_dict()
            assert all(torch.equal(kept[key], torch.from_numpy(weights[key]).float()) for key in kept)


def test_what_was_trained_before_another_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(work: Callable[[Any], Any], jobs: list[Any], *_: object) -> Iterator[Any]:
        yield from map(work, jobs[:4])
        raise EvidenceError("a worker process died")

    monkeypatch.setattr(policy_training, "in_processes", run)
    with pytest.raises(EvidenceError, match="died"):
        train_all(some_jobs(), (torch.zeros(5), torch.ones(5)), 1, tmp_path)
    seeds = {name: sorted(load_policies(weights_file(tmp_path, name)).by_seed) for name in KINDS}
    assert seeds == {ACTIONS: [0, 1], "short": [0], "long": [0]}


def test_what_never_changes_is_divided_by_one() -> None:
    mean, deviation = normalisation(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2.0, 5.0]
    assert deviation.tolist() == pytest.approx([2**0.5, 1.0])


def test_oat_is_trained_once_and_decodes_as_it_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recordings, recipe = some_recordings(), NetworkRecipe(steps=1, batch_size=4, checks=1)
    vocabulary, first = targets_of(recordings, Lessons({}, {}), recipe, tmp_path)[OAT]
    monkeypatch.setattr(policy_training, "oat_tokens", None)
    again = targets_of(recordings, Lessons({}, {}), recipe, tmp_path)[OAT]
    kept = load_oat(tmp_path / OAT_FILE)
    assert vocabulary == again[0] == kept.vocabulary
    assert torch.equal(first, again[1])
    assert torch.equal(first, kept.encode(meant(recordings)))


@pytest.mark.parametrize(("load", "words"), [(load_policies, "no policies"), (load_oat, "no OAT, 8 registers")])
def test_a_file_of_something_else_is_refused(tmp_path: Path, load: Callable[[Path], object], words: str) -> None:
    (tmp_path / "weights").write_bytes(b"something else")
    with pytest.raises(EvidenceError, match=f"holds {words}"):
        load(tmp_path / "weights")
