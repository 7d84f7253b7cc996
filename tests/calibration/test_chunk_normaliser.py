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
from rfsq.calibration.settings import ChunkNormaliser
from rfsq.rfsq_ref.data import split_episodes
from rfsq.rfsq_ref.errors import DataError
from tests.calibration.test_chunk import smooth_episodes
from tests.calibration.test_chunk_fitting import SMALL, dataset_of


@given(st.integers(0, 2**32))
def test_no_action_of_any_episode_lies_beyond_the_range(seed: int) -> None:
    generator = np.random.default_rng(seed)
    offset, unit = generator.normal(size=3) * 1000, 10.0 ** generator.uniform(-2, 3, 3)
    dataset = dataset_of([episode * unit + offset for episode in smooth_episodes(3, [20] * 5, seed)])
    found, _ = chunk_normaliser(dataset, ChunkNormaliser.MIN_MAX)
    assert found is not None
    assert (np.abs(dataset.steps().astype(np.float64) - found.offset) <= found.scale).all()


def test_the_range_reaches_a_tenth_farther_than_any_episode() -> None:
    episodes = [episode * np.array([90.0, 90.0, 1.0]) for episode in smooth_episodes(3, [50] * 10, seed=0)]
    dataset = dataset_of(episodes)
    for part in vars(split_episodes(dataset)).values():
        # Whichever part the farthest episode is in.
        farthest = [episode.copy() for episode in episodes]
        farthest[int(part.names[0].removeprefix("demo_"))][3, 0] = 200.0
        low = min(float(episode[:, 0].min()) for episode in farthest)
        found, line = chunk_normaliser(dataset_of(farthest), ChunkNormaliser.AUTO)
        assert found is not None
        low_end, high_end = found.offset[0] - found.scale[0], found.offset[0] + found.scale[0]
        assert (low_end, high_end) == pytest.approx((low - 0.1 * (200 - low), 200 + 0.1 * (200 - low)), rel=1e-6)
        assert "the range is that of all 10 episodes, and 10% of it more on either side" in line


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
