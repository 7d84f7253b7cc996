"""A study of beliefs trains every policy alike, judges every way of decoding, and is whole at any time."""

from pathlib import Path

import numpy as np
import pytest

from rfsq.evidence.belief_results import BeliefResults, parts, table
from rfsq.evidence.belief_study import BeliefStudy, Entry, believed
from rfsq.evidence.belief_tokens import EXPECTED, LIKELIEST, LeastSquares, OneByOne, OnePass
from rfsq.evidence.policies import PolicyConfig
from rfsq.evidence.policy_study import CHUNK_LENGTH
from rfsq.evidence.policy_tokens import BinTokens
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit

SMALL = PolicyConfig(width=8, depth=1, heads=2, steps=2, batch=4)
SHAPE = (CHUNK_LENGTH, 7)


@pytest.fixture
def study(demonstrations: ActionDataset, split: EpisodeSplit) -> BeliefStudy:
    small = EpisodeSplit(*(part.select(range(2)) for part in vars(split).values()))
    tokens = BinTokens("8 bins", 8, fit_bins(small.train.steps(), BinRange.FULL, 3), SHAPE)
    entries = [
        Entry("actions", "by least squares", None, LeastSquares(SHAPE)),
        Entry("8 bins", "at once", tokens, OnePass(tokens)),
        Entry("8 bins", "one by one", tokens, OneByOne(tokens, SHAPE, draws=2)),
    ]
    return BeliefStudy(demonstrations, small, entries)


def test_every_policy_is_shown_what_its_way_of_asking_needs(study: BeliefStudy) -> None:
    jobs = study.jobs(SMALL, (3, 1), ["one", "other"])
    assert [job.seed for job in jobs] == [3] * 3 + [1] * 3
    assert [job.device for job in jobs[:3]] == ["one", "other", "one"]
    assert {(job.place, job.config.shown) for job in jobs} == {(0, None), (1, 0), (2, None)}


def test_all_are_trained_and_judged_in_every_way_and_stay_as_they_are_in_a_file(
    study: BeliefStudy, tmp_path: Path
) -> None:
    for job in study.jobs(SMALL, (0, 1), ["cpu"]):
        place, seed, answers = believed(job)
        assert all(actions.shape == (len(job.asked), *SHAPE) for actions in answers.values())
        assert f"seed {seed}: " in study.add(place, seed, answers)
    results = study.results(SMALL, "CPU")
    assert [set(report.mse) for report in results.reports] == [
        {EXPECTED},
        {LIKELIEST, EXPECTED},
        {LIKELIEST, "mean of drawn chunks"},
    ]
    assert all(len(spread.values) == 2 for report in results.reports for spread in report.mse.values())
    results.write(tmp_path / "beliefs.json")
    assert BeliefResults.read(tmp_path / "beliefs.json") == results
    assert "with 2 seeds each" in str(parts(results)["beliefs judged"])
    rows = table(results).rows
    assert [row[:3] for row in rows] == [
        ("actions", "by least squares", "–"),
        ("8 bins", "at once", "56"),
        ("8 bins", "one by one", "56"),
    ]


def test_the_actions_themselves_have_no_error(study: BeliefStudy) -> None:
    judged = study.jobs(SMALL, (0,), ["cpu"])[-1].true
    study.add(0, 0, {EXPECTED: np.asarray(judged, np.float64).reshape(-1, *SHAPE)})
    assert study.results(SMALL, "CPU").reports[0].mse[EXPECTED].mean < 1e-12
