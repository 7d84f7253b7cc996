"""A policy sees bodies from its gripper, its own last chunk, and the task; recordings are seen as scenes are."""

from dataclasses import replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from rfsq.evidence.policy_recordings import NUM_POSES
from rfsq.evidence.policy_sight import lessons, sight, task_mark
from tests.evidence.conftest import some_recordings

TASKS = ("Lift", "Stack")
LENGTH = 8


def seen(cube_yaw: float, shift: float = 0.0) -> Tensor:
    """A gripper and one cube, turned about the vertical, both moved sideways."""
    poses = np.zeros((1, NUM_POSES, 7))
    poses[0, 0] = [shift, 0.0, 1.0, *Rotation.from_euler("x", np.pi).as_quat()]
    poses[0, 1] = [0.02 + shift, 0.0, 0.8, *Rotation.from_euler("z", cube_yaw).as_quat()]
    return sight(torch.from_numpy(poses), torch.zeros(1, LENGTH, 7), task_mark("Lift", TASKS))


def test_of_a_cube_that_is_turned_by_a_quarter_only_the_rotation_looks_other() -> None:
    differ = (seen(0.3) - seen(0.3 + np.pi / 2)).abs()[0] > 1e-5
    # The first two columns of one rotation.
    assert differ.sum() <= 6
    assert ((seen(0.3) - seen(0.3 + np.pi / 4)).abs()[0] > 1e-5).sum() > differ.sum()


def test_when_gripper_and_cube_move_together_only_the_gripper_s_place_changes() -> None:
    differ = (seen(0.3) - seen(0.3, shift=0.1)).abs()[0] > 1e-5
    assert differ.nonzero().flatten().tolist() == [0]


def test_of_a_body_that_is_not_there_nothing_is_seen() -> None:
    poses = torch.zeros(1, NUM_POSES, 7)
    poses[0, 0] = torch.tensor([5.0, 6.0, 7.0, 0.0, 0.0, 0.0, 1.0])
    found = sight(poses, torch.zeros(1, LENGTH, 7), task_mark("Stack", TASKS))
    # A place, a rotation and the task.
    assert (found != 0).sum() == 3 + 2 + 1


def test_there_is_one_context_for_each_chunk_that_was_meant() -> None:
    recordings = some_recordings(steps=20)
    contexts, chunks = lessons(recordings, TASKS, LENGTH)
    assert len(contexts) == len(chunks) == 6 * (20 - LENGTH + 1)
    np.testing.assert_array_equal(chunks[0], recordings[0].intended[:LENGTH])


def test_the_last_chunk_is_what_was_executed_before_and_nothing_at_first() -> None:
    recording = some_recordings(1)[0]
    contexts, _ = lessons([recording], TASKS, LENGTH)
    past = contexts[:, -len(TASKS) - LENGTH * 7 : -len(TASKS)].reshape(-1, LENGTH, 7)
    assert not past[0].any()
    np.testing.assert_array_equal(past[LENGTH], recording.executed[:LENGTH])
    np.testing.assert_array_equal(past[1, -1], recording.executed[0])
    assert not past[1, :-1].any()


def test_what_was_meant_at_the_end_is_not_seen_before() -> None:
    recording = some_recordings(1)[0]
    other = replace(recording, intended=-recording.intended, executed=recording.executed.copy())
    other.executed[-1] = 0.0
    assert torch.equal(lessons([recording], TASKS, LENGTH)[0], lessons([other], TASKS, LENGTH)[0])
