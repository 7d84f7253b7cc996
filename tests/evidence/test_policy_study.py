"""A study trains every policy alike, judges what it says, and is whole at any time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.calibration.tables import Table
from rfsq.evidence.policies import PolicyConfig
from rfsq.evidence.policy_results import PolicyResults, findings, parts, table
from rfsq.evidence.policy_study import CHUNK_LENGTH, Study, said
from rfsq.evidence.policy_tokens import BinTokens
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit

SMALL = PolicyConfig(width=8, depth=1, heads=2, steps=2, batch=4)


@pytest.fixture
def study(demonstrations: ActionDataset, split: EpisodeSplit) -> Study:
    small = EpisodeSplit(*(part.select(range(2)) for part in vars(split).values()))
    steps, shape = small.train.steps(), (CHUNK_LENGTH, 7)
    codecs = {bits: fit_bins(steps, BinRange.FULL, bits) for bits in (2, 6)}
    names = {2: "chunk tokens", 6: "64 bins"}
    return Study(demonstrations, small, [BinTokens(names[bits], 1 << bits, codecs[bits], shape) for bits in codecs])


def own(study: Study, place: int) -> np.ndarray:
    """The tokens of what was recorded, or itself."""
    tokens = study.entries[place].tokens
    return (study.judged.flatten(1) if tokens is None else tokens.encode(study.judged)).numpy()


def test_seeds_come_one_after_the_other_and_devices_take_turns(study: Study) -> None:
    jobs = study.jobs(SMALL, (3, 1), ["one", "other"])
    assert [job.seed for job in jobs] == [3] * 5 + [1] * 5
    assert {job.place for job in jobs[:5]} == set(range(5))
    assert [job.device for job in jobs[:4]] == ["one", "other", "one", "other"]
    assert {(job.place, job.config.shown) for job in jobs} == {(0, None), (1, None), (2, None), (3, 1), (4, 1)}


def test_a_policy_says_a_chunk_for_each_context(study: Study) -> None:
    jobs = {job.place: job for job in study.jobs(SMALL, (0,), ["cpu"])}
    for place in (0, 1, 3):
        found, seed, answers = said(jobs[place])
        assert (found, seed) == (place, 0)
        assert answers.shape == own(study, place).shape
        assert study.add(place, seed, answers)


def test_a_policy_that_says_the_right_tokens_errs_as_these_do(study: Study) -> None:
    for place in range(5):
        study.add(place, 0, own(study, place))
    results = study.results(SMALL, "CPU")
    assert results.regression_mse is not None
    assert results.regression_mse.mean < 1e-12
    assert [(report.name, report.policy) for report in results.reports] == [
        (name, policy) for policy in ("autoregressive", "in two passes") for name in ("chunk tokens", "64 bins")
    ]
    for report in results.reports:
        assert report.whole.policy_mse.values == (report.whole.token_mse,)
    assert results.reports[0].whole.bits_per_step == 14


def test_results_are_there_before_all_is_done_and_stay_as_they_are_in_a_file(study: Study, tmp_path: Path) -> None:
    for seed in (0, 1):
        study.add(1, seed, own(study, 1))
    study.add(4, 0, own(study, 4))
    results = study.results(SMALL, "CPU")
    assert [len(report.whole.policy_mse.values) for report in results.reports] == [2, 1]
    assert "with 1 to 2 seeds each" in str(parts(results)["policies judged"])
    results.write(tmp_path / "policies.json")
    assert PolicyResults.read(tmp_path / "policies.json") == results


def test_a_table_has_a_row_for_all_tokens_and_a_column_for_each_kind_of_policy(study: Study) -> None:
    for place in (0, 1, 2, 4):
        study.add(place, 0, own(study, place))
    found = table(study.results(SMALL, "CPU"))
    assert [row[0] for row in found.rows] == ["chunk tokens", "64 bins", "the actions themselves, by least squares"]
    assert found.header[-2:] == ("MSE of the policy, autoregressive", "MSE of the policy, in two passes")
    assert found.rows[0][-1] == "–" != found.rows[1][-1]


def test_a_claim_that_does_not_hold_is_said_to_fail(study: Study) -> None:
    for place in (1, 2):
        study.add(place, 0, own(study, place))
    (found,) = findings(study.results(SMALL, "CPU"))
    assert not found.holds
    study.add(2, 0, torch.zeros(own(study, 2).shape).numpy())
    (found,) = findings(study.results(SMALL, "CPU"))
    assert found.holds
    assert isinstance(parts(study.results(SMALL, "CPU"))["policies"], Table)
