"""Judging codecs of chunks: who sees which episodes, what actions are changed to, and what one wrong token costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.judging import Trial, all_chunks, errors_unlike, unlike, whole_chunks, wrong_token_errors
from rfsq.evidence.schemes import BinRange, RawCodec, fit_bins
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from tests.evidence.conftest import robot_dataset


@pytest.fixture(scope="module")
def tasks() -> ActionDataset:
    """Three tasks, ten episodes each."""
    data = robot_dataset(episodes=30)
    return ActionDataset(data.episodes, data.names, ("lift", "door", "stack") * 10, data.source)


def _names(part: ActionDataset) -> set[str]:
    return set(part.names)


@pytest.mark.parametrize("judged", ["validation", "test"])
def test_nothing_is_fitted_to_what_is_judged(tasks: ActionDataset, judged: str) -> None:
    parts = Trial(tasks, judged).parts()

    assert _names(parts.judged) == _names(getattr(split_episodes(tasks), judged))
    assert _names(parts.fitted) == _names(parts.train) | _names(parts.calibration)
    assert not _names(parts.fitted) & _names(parts.judged)


def test_validation_trials_never_see_the_test(tasks: ActionDataset) -> None:
    test = _names(split_episodes(tasks).test)
    for left_out in ("", "door"):
        parts = Trial(tasks).parts(left_out)
        for part in (parts.train, parts.calibration, parts.validation, parts.judged):
            assert not _names(part) & test


@pytest.mark.parametrize("judged", ["validation", "test"])
def test_a_task_that_is_left_out_is_judged_and_nothing_else(tasks: ActionDataset, judged: str) -> None:
    parts = Trial(tasks, judged).parts("door")

    assert set(parts.judged.tasks) == {"door"}
    for part in (parts.train, parts.calibration, parts.validation):
        assert set(part.tasks) == {"lift", "stack"}
    # Of the test those of the test alone; before, all that are not of the test.
    expected = {"test": 1, "validation": 9}[judged]
    assert len(parts.judged.names) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"judged": "train"}, "expected one of validation, test"), ({"budgets": (20.0, 10.0)}, "expected rising")],
)
def test_other_trials_are_refused(tasks: ActionDataset, settings: dict[str, object], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        Trial(tasks, **settings)  # type: ignore[arg-type]


def test_an_unknown_task_is_refused(tasks: ActionDataset) -> None:
    with pytest.raises(EvidenceError, match="no episode is of the task 'wipe'; expected one of door, lift, stack"):
        Trial(tasks).parts("wipe")


def test_chunks_are_filled_up_or_whole() -> None:
    data = ActionDataset((np.arange(5, dtype=np.float32)[:, None],), ("a",), ("",), "test")

    assert all_chunks(data, 2).ravel().tolist() == [0, 1, 2, 3, 4, 4]
    assert whole_chunks(data, 2).ravel().tolist() == [0, 1, 2, 3]


def test_changed_actions_stay_in_the_range_of_the_demonstrations() -> None:
    chunks = np.random.default_rng(0).uniform(-0.8, 0.6, (500, 4, 2)).astype(np.float32)
    chunks[..., 1] = 0.25
    found = unlike(chunks, np.ones(2))

    for values in (found["perturbed"], found["random"]):
        assert values.min() >= chunks.min()
        assert values.max() <= chunks.max()
        assert (values[..., 1] == 0.25).all()
    np.testing.assert_allclose((found["perturbed"] - chunks)[..., 0].std(), 0.05, rtol=0.1)
    np.testing.assert_array_equal(found["scaled"], chunks / 2)
    # Random steps have nothing to do with one another.
    assert abs(np.corrcoef(found["random"][:, 0, 0], found["random"][:, 1, 0])[0, 1]) < 0.1


def test_no_tokens_at_all_cost_no_error_and_many_bits() -> None:
    found = errors_unlike(RawCodec(), np.ones((2, 3, 4), np.float32), np.ones(4))

    assert {name for name in found if name.endswith("_mse")} == {"perturbed_mse", "scaled_mse", "random_mse"}
    assert all(value == 0 for name, value in found.items() if not name.endswith("_bits"))
    assert found["random_bits"] == 128


def test_errors_unlike_are_in_units() -> None:
    chunks = np.random.default_rng(0).uniform(-10, 10, (200, 4, 1)).astype(np.float32)
    codec = fit_bins(chunks.reshape(-1, 1), BinRange.FULL, 4)

    found = errors_unlike(codec, chunks, np.array([10.0]))

    assert found["random_max"] <= 1 / 16 + 1e-6
    assert found["random_mse"] == pytest.approx((2 / 16) ** 2 / 12, rel=0.2)


@dataclass(frozen=True)
class _Digits:
    """Four digits of a number in [0, 1): a chunk of one step. Short rows have fewer."""

    vocabulary: int = 10
    is_short: bool = False

    def tokens(self, chunks: FloatArray) -> list[list[int]]:
        rows = [[int(digit) for digit in f"{value:.4f}"[2:]] for value in chunks.ravel()]
        return [row[: 2 if self.is_short and index % 2 else 4] for index, row in enumerate(rows)]

    def decode(self, tokens: Sequence[Sequence[int]], length: int) -> FloatArray:
        values = [sum(digit / 10 ** (place + 1) for place, digit in enumerate(row)) for row in tokens]
        found: npt.NDArray[np.float32] = np.array(values, np.float32).reshape(-1, length, 1)
        return found


def test_a_wrong_token_costs_what_it_says() -> None:
    chunks = np.round(np.random.default_rng(0).uniform(0, 0.9999, (300, 1, 1)), 4).astype(np.float32)

    errors = wrong_token_errors(_Digits(), chunks, np.ones(1))

    # The mean square of the difference of two digits that are not the same: 2 (100 - 1) / 12 / 0.9 = 330 / 18.
    expected = [(330 / 18) * 0.01 ** (place + 1) for place in range(4)]
    np.testing.assert_allclose(errors, expected, rtol=0.2)


def test_rows_of_unequal_length_count_where_they_have_a_token() -> None:
    chunks = np.round(np.random.default_rng(0).uniform(0, 0.9999, (300, 1, 1)), 4).astype(np.float32)

    errors = wrong_token_errors(_Digits(is_short=True), chunks, np.ones(1))

    assert len(errors) == 4
    assert errors == tuple(sorted(errors, reverse=True))
