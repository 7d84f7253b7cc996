"""The range of chunk tokens: that of all episodes and some more, or limits that a user gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.calibration.chunk_fitting import fit_chunk_tokens
from rfsq.calibration.chunk_normaliser import chunk_normaliser, far_episode_warning
from rfsq.calibration.settings import ChunkConfig, ChunkNormaliser
from rfsq.rfsq_ref.data import split_episodes
from rfsq.rfsq_ref.errors import DataError
from tests.calibration.test_chunk import smooth_episodes
from tests.calibration.test_chunk_fitting import SMALL, dataset_of, worst_error


@given(st.integers(0, 2**32))
def test_no_action_of_any_episode_lies_beyond_the_range(seed: int) -> None:
    generator = np.random.default_rng(seed)
    offset, unit = generator.normal(size=3) * 1000, 10.0 ** generator.uniform(-2, 3, 3)
    dataset = dataset_of([episode * unit + offset for episode in smooth_episodes(3, [20] * 5, seed)])
    found, _ = chunk_normaliser(dataset, ChunkNormaliser.MIN_MAX)
    assert found is not None
    assert (np.abs(dataset.steps().astype(np.float64) - found.offset) <= found.scale).all()


def test_the_range_reaches_a_tenth_farther_than_any_episode_whichever_part_it_is_in() -> None:
    episodes = [np.linspace(-1, 1, 20)[:, None] * [10.0, 50.0] for _ in range(10)]
    dataset = dataset_of(episodes)
    for part in vars(split_episodes(dataset)).values():
        farther = list(episodes)
        farther[int(part.names[0].removeprefix("demo_"))] = episodes[0] * [1.1, 1]
        found, why = chunk_normaliser(dataset_of(farther), ChunkNormaliser.AUTO)
        assert found is not None
        assert found.scale == pytest.approx((1.2 * 11, 1.2 * 50))
        assert why.endswith("; the range is 1.2 times that of all 10 episodes")


@pytest.mark.parametrize(("far", "headroom"), [(1, 1.2), (3, 1.5)])
def test_the_range_is_as_much_wider_as_more_than_one_in_ten_reached_beyond_the_others(
    far: int, headroom: float
) -> None:
    episodes = [np.linspace(-1, 1, 20)[:, None] * np.full(3, 10.0) for _ in range(11)]
    for index in range(far):
        # Each alone in a dimension.
        episodes[index] = episodes[index] * np.where(np.arange(3) == index, 1.5, 1)
    found, why = chunk_normaliser(dataset_of(episodes), ChunkNormaliser.AUTO)
    assert found is not None
    assert found.scale == pytest.approx([10 * headroom * (1.5 if index < far else 1) for index in range(3)])
    assert ("since one in ten reached so far beyond the others" in why) is (far > 1)


def test_few_episodes_that_differ_much_widen_it_no_more_than_escape_can_bear() -> None:
    episodes = [np.linspace(-1, 1, 20)[:, None] * [10.0 ** (index + 1), 1.0] for index in range(4)]
    found, _ = chunk_normaliser(dataset_of(episodes), ChunkNormaliser.AUTO)
    assert found is not None
    # A last dimension of unit size, a gripper, stays as it is.
    assert found.scale == pytest.approx((10**4 * 4, 1))


def test_episodes_that_reach_farther_than_any_seen_are_coded_too() -> None:
    generator = np.random.default_rng(0)
    episodes = [episode * generator.uniform(3, 12, size=2) for episode in smooth_episodes(2, [60] * 30, seed=0)]
    dataset = dataset_of(episodes[:20])
    checkpoint = fit_chunk_tokens(dataset, ChunkConfig(chunk_length=4, classes=8))
    farthest = np.abs(dataset.steps()).max(axis=0)
    beyond = [episode * 1.05 * farthest / np.abs(episode).max(axis=0) for episode in episodes[20:]]
    assert (worst_error(checkpoint, beyond) < 0.05 * farthest).all()


def test_a_gripper_of_unit_size_keeps_its_range() -> None:
    episodes = [episode * np.array([90.0, 90.0, 1.0]) for episode in smooth_episodes(3, [50] * 10, seed=0)]
    found, _ = chunk_normaliser(dataset_of(episodes), ChunkNormaliser.AUTO)
    assert found is not None
    assert (found.offset[2], found.scale[2]) == (0, 1)


def test_limits_of_a_robot_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({"kind": "min-max", "offset": [1, 2, 0], "scale": [3, 4, 1]}))
    found = fit_chunk_tokens(dataset_of(smooth_episodes(3, [50] * 10, seed=0)), replace(SMALL, normaliser=str(path)))
    assert found.normaliser is not None
    assert (found.normaliser.offset, found.normaliser.scale) == ((1, 2, 0), (3, 4, 1))
    assert found.provenance["config"]["normaliser"] == "limits.json"
    assert found.provenance["remarks"][0] == "normaliser: that of limits.json, as asked"


def test_limits_of_another_robot_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    dataset, path = dataset_of(smooth_episodes(3, [50] * 10, seed=0)), tmp_path / "limits.json"
    path.write_text(json.dumps({"kind": "min-max", "offset": [1, 2], "scale": [3, 4]}))
    with pytest.raises(DataError, match=r"limits.json is for 2 dimensions, a lab has 3; give the normaliser of this"):
        chunk_normaliser(dataset, str(path))
    with pytest.raises(DataError, match=r"expected one of auto, none, min-max, or a JSON file .* there is no such"):
        chunk_normaliser(dataset, str(tmp_path / "none.json"))


def test_the_warning_of_a_wild_episode_has_the_name_of_the_dimension() -> None:
    episodes = smooth_episodes(3, [50] * 5, seed=0)
    episodes[2][7, 1] = 1000
    dataset = replace(dataset_of(episodes), dimensions=("pan", "lift", "gripper"))
    assert far_episode_warning(dataset).startswith("WARNING: dimension 1 (lift) spans 1e+03 by episode 'demo_2'")
    assert far_episode_warning(dataset_of(smooth_episodes(3, [50] * 5, seed=0))) == ""
