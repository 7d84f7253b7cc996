"""Which episodes a fit may see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rfsq.calibration.data import (
    FEW_STEPS,
    Selection,
    calibration_dataset,
    calibration_episodes,
    data_warnings,
    embedded_demonstrations,
    few_steps_warning,
    judging_episodes,
    selection_of,
)
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.errors import DataError


def episode_hashes(dataset: ActionDataset) -> set[bytes]:
    return {episode.tobytes() for episode in dataset.episodes}


def test_of_the_training_data_only_the_calibration_part_is_used(
    robust: Checkpoint, demonstrations: ActionDataset, split: EpisodeSplit
) -> None:
    chosen = calibration_episodes(robust, demonstrations)
    assert selection_of(robust, demonstrations) is Selection.TRAINING_SPLIT
    assert episode_hashes(chosen) == episode_hashes(split.calibration)
    for part in (split.train, split.validation, split.test, judging_episodes(robust, demonstrations)):
        assert episode_hashes(chosen).isdisjoint(episode_hashes(part))


def test_of_other_data_all_is_used_but_the_test_part(
    robust: Checkpoint, demonstrations: ActionDataset, split: EpisodeSplit
) -> None:
    for provenance in ({}, {"data": "a file from somewhere"}):
        silent = replace(robust, provenance=provenance)
        assert selection_of(silent, demonstrations) is Selection.OTHER_SPLIT
        fitted, judged = calibration_episodes(silent, demonstrations), judging_episodes(silent, demonstrations)
        assert episode_hashes(judged) == episode_hashes(split.test)
        assert episode_hashes(fitted) == episode_hashes(demonstrations) - episode_hashes(judged)
        assert fitted.num_steps + judged.num_steps == demonstrations.num_steps


def test_data_of_too_few_episodes_are_used_whole(robust: Checkpoint, demonstrations: ActionDataset) -> None:
    other = demonstrations.select(range(3))
    assert selection_of(robust, other) is Selection.ALL
    assert calibration_episodes(robust, other) is judging_episodes(robust, other) is other
    assert selection_of(robust, demonstrations.select(range(4))) is Selection.OTHER_SPLIT


def test_the_embedded_demonstrations_serve_only_their_own_checkpoints(
    robust: Checkpoint, naive: Checkpoint, demonstrations: ActionDataset, tmp_path: Path
) -> None:
    for own in (robust, naive):
        assert calibration_dataset(own, None).sha256 == demonstrations.sha256
        assert embedded_demonstrations(own) is not None
    foreign = replace(robust, provenance={})
    assert embedded_demonstrations(foreign) is None
    with pytest.raises(DataError, match=r"not trained on the embedded .*not recorded.*--data FILE"):
        calibration_dataset(foreign, None)
    np.savez(tmp_path / "own.npz", moves=np.zeros((4, 9, 7)), rest=np.zeros(3))
    assert calibration_dataset(foreign, tmp_path / "own.npz", key="moves").num_steps == 36


def test_a_step_far_outside_is_warned_of_by_place_even_where_the_verdict_does_not_see_it(robust: Checkpoint) -> None:
    generator = np.random.default_rng(0)
    episodes = [generator.uniform(-1, 1, (60, 7)).astype(np.float32) for _ in range(8)]
    names = tuple(f"demo_{place}" for place in range(8))
    assert data_warnings(robust, ActionDataset(tuple(episodes), names, ("",) * 8, "x.npz")) == ()
    judged = judging_episodes(robust, ActionDataset(tuple(episodes), names, ("",) * 8, "x.npz")).names
    place = next(place for place, name in enumerate(names) if name not in judged)
    episodes[place][5, 3] = 1e15
    (warning,) = data_warnings(robust, ActionDataset(tuple(episodes), names, ("",) * 8, "x.npz"))
    assert warning.startswith("WARNING: the fit saw 1 step more than 5 times as far out as the model was trained for")
    assert f"the farthest is x.npz, episode '{names[place]}', step 5, dimension 3: 1e+15" in warning


def test_few_steps_are_warned_of() -> None:
    def steps(number: int) -> ActionDataset:
        return ActionDataset((np.zeros((number, 7), np.float32),), ("a",), ("",), "made up")

    assert few_steps_warning(steps(FEW_STEPS)) == ""
    assert few_steps_warning(steps(FEW_STEPS - 1)).startswith("WARNING: only 199 steps to calibrate on; expected 200")


@pytest.mark.parametrize("choose", [calibration_episodes, judging_episodes])
def test_another_action_dimension_is_refused(robust: Checkpoint, choose: object) -> None:
    other = ActionDataset((np.zeros((5, 6), np.float32),), ("a",), ("",), "gripper_free.npz")
    assert callable(choose)
    with pytest.raises(DataError, match=r"gripper_free.npz has 6 action dimensions, the checkpoint 7; calibrate with"):
        choose(robust, other)
