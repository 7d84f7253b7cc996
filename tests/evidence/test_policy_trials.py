"""All policies drive the same scenes, and what they solved is told of at any time."""

from pathlib import Path

import pytest
import torch

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.policies import PolicyConfig, policy_of
from rfsq.evidence.policy_driving import Cell, Driven
from rfsq.evidence.policy_lessons import Lessons, encoded
from rfsq.evidence.policy_loop_results import EXPERT, LoopRun
from rfsq.evidence.policy_tokens import BinTokens
from rfsq.evidence.policy_training import ACTIONS, PolicyKind, SeeingPolicies
from rfsq.evidence.policy_trials import Tally, Trial, decoders_of, jobs_of, trials_of, weights_in
from rfsq.evidence.schemes import BinRange, fit_bins
from tests.evidence.conftest import some_recordings

CONFIG = PolicyConfig(width=8, depth=1, heads=2)
TRIALS = [Trial(EXPERT, None, (), None, None), Trial("some", Path("some"), (0, 4), 4, 8)]


def trained(name: str, vocabulary: int | None, size: int) -> SeeingPolicies:
    kind = PolicyKind(name, 5, vocabulary, size, "CPU", {})
    by_seed = {seed: policy_of(5, vocabulary, size, CONFIG) for seed in (0, 4)}
    return SeeingPolicies(kind, torch.zeros(5), torch.ones(5), by_seed)


def test_there_is_a_row_for_the_expert_and_each_number_of_tokens_and_steps() -> None:
    policies = {
        Path("a"): trained("some", 7, 16),
        Path("b"): trained("other", 7, 3),
        Path("c"): trained(ACTIONS, None, 56),
    }
    found = [(trial.name, trial.count, trial.executed) for trial in trials_of(policies, {"some": (4, 16)}, {}, (8, 4))]
    rows = [("some", 4), ("some", 16), ("other", 3), (ACTIONS, None)]
    assert found == [(EXPERT, None, None), *((*row, executed) for executed in (8, 4) for row in rows)]


def test_each_way_of_decoding_probabilities_has_a_row() -> None:
    policies = {Path("a"): trained("some", 7, 16), Path("b"): trained("other", 7, 3)}
    found = [(trial.name, trial.way) for trial in trials_of(policies, {}, {"some": ("likeliest", "expected")}, (8,))]
    assert found == [(EXPERT, None), ("some", "likeliest"), ("some", "expected"), ("other", None)]
    (cell,) = {job.cell for job in jobs_of([Trial("some", Path("some"), (0,), 4, 8, "expected")], ("Lift",), 1)}
    assert cell == Cell("some", 4, 8, 0, "expected")


def test_all_drive_the_same_scenes_some_of_all_before_others() -> None:
    jobs = jobs_of(TRIALS, ("Lift", "Stack"), 14)
    assert [(job.task, job.numbers[0], len(job.numbers)) for job in jobs[::3]] == [
        ("Lift", 0, 10), ("Stack", 0, 10), ("Lift", 10, 4), ("Stack", 10, 4)
    ]  # fmt: skip
    assert [job.cell for job in jobs[:3]] == [None, Cell("some", 4, 8, 0), Cell("some", 4, 8, 4)]
    scenes = {cell: [(job.task, job.seeds) for job in jobs if job.cell == cell] for cell in {job.cell for job in jobs}}
    assert all(found == scenes[None] for found in scenes.values())
    assert len({seed for job in jobs for seed in job.seeds}) == 28


def test_a_tally_has_all_that_was_driven_and_nothing_else() -> None:
    jobs, tally = jobs_of(TRIALS, ("Lift",), 14), Tally()
    expert, first, second = jobs[:3]
    tally.add(Driven(first, (None, 50, *[None] * 8), (0.5,) * 10))
    tally.add(Driven(jobs[4], (None, None, 80, None), (1.2,) * 4))
    (report,) = tally.reports(TRIALS, ("Lift", "Stack"))
    assert (report.task, report.name, report.tokens, report.executed) == ("Lift", "some", 4, 8)
    assert report.runs == (LoopRun(0, 14, ((1, 50), (12, 80)), pytest.approx(0.7)),)
    tally.add(Driven(second, (7,) * 10))
    tally.add(Driven(expert, (9,) * 10))
    found = list(tally.reports(TRIALS, ("Lift",)))
    assert [report.name for report in found] == [EXPERT, "some"]
    assert (found[1].rate.successes, found[1].rate.n, found[1].steps) == (12, 24, 7)
    assert (found[0].runs[0].seed, found[0].error) == (None, None)


def test_what_decodes_must_encode_what_was_learnt(tmp_path: Path) -> None:
    recordings = some_recordings()
    bins = BinTokens("64 bins", 64, fit_bins(recordings[0].intended, BinRange.FULL, 6), (8, 7))
    learnt = encoded([bins], recordings)
    assert decoders_of([bins], recordings, learnt, tmp_path) == [bins]
    for other in (
        Lessons({"64 bins": (learnt.tokens["64 bins"] + 1) % 64}, learnt.vocabularies),
        Lessons({"32 bins": learnt.tokens["64 bins"]}, {"32 bins": 32}),
    ):
        with pytest.raises(EvidenceError, match="bins encodes otherwise here than what the policies learnt"):
            decoders_of([bins], recordings, other, tmp_path)


def test_only_policies_that_were_trained_are_driven(tmp_path: Path) -> None:
    (tmp_path / "64-bins.safetensors").touch()
    (tmp_path / "oat.safetensors").touch()
    assert weights_in(tmp_path, ["64 bins", "FAST, scale 20"]) == [tmp_path / "64-bins.safetensors"]
