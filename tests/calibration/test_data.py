"""Which episodes a fit may see."""

from dataclasses import replace

import numpy as np
import pytest

from calibration.data import Selection, calibration_episodes, judging_episodes, selection_of
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq_ref.errors import DataError


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


@pytest.mark.parametrize("choose", [calibration_episodes, judging_episodes])
def test_another_action_dimension_is_refused(robust: Checkpoint, choose: object) -> None:
    other = ActionDataset((np.zeros((5, 6), np.float32),), ("a",), ("",), "gripper_free.npz")
    assert callable(choose)
    with pytest.raises(DataError, match=r"gripper_free.npz has 6 action dimensions, the checkpoint 7; calibrate with"):
        choose(robust, other)
