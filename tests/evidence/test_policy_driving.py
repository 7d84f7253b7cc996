"""A policy drives many scenes at once: asked as often as it should be, about those alone that are not solved."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.evidence.policies import PolicyConfig, RegressionPolicy
from rfsq.evidence.policy_driving import MOST_STEPS, Cell, DrivingJob, drive, expert_steps, policy_steps
from rfsq.evidence.policy_recordings import DRIVEN_SEED
from rfsq.evidence.policy_sight import lessons
from rfsq.evidence.policy_training import ACTIONS, PolicyKind, SeeingPolicies, train_all, training_jobs, weights_file
from rfsq.rfsq_ref.generate_demonstrations import attempt_of
from tests.evidence.conftest import some_recordings

TASKS = ("Lift", "Stack")
CONTEXT = lessons(some_recordings(1), TASKS, 8)[0].shape[1]


class CountingWorld:
    """Solved after so many steps; keeps what it was sent."""

    task, seed = "Lift", 0

    def __init__(self, needed: int) -> None:
        self.needed, self.sent = needed, list[np.ndarray]()

    def reset(self) -> dict[str, Any]:
        self.sent.clear()
        return self._observe()

    def step(self, action: np.ndarray) -> dict[str, Any]:
        self.sent.append(action)
        return self._observe()

    def succeeded(self) -> bool:
        return len(self.sent) >= self.needed

    def _observe(self) -> dict[str, Any]:
        place, turn = np.full(3, len(self.sent)), np.array([0.0, 0.0, 0.0, 1.0])
        return {"robot0_eef_pos": place, "robot0_eef_quat_site": turn, "cube_pos": np.zeros(3), "cube_quat": turn}


class SayingPolicy:
    """Says for step j of the chunk 0.1 j more than it saw of the gripper; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def say(self, context: Tensor, count: int | None) -> Tensor:
        assert count is None
        self.asked.append(context)
        return (0.01 * context[:, :1, None] + 0.1 * torch.arange(8)[None, :, None]).expand(-1, -1, 7).flatten(1)


def driven(needed: list[int], executed: int) -> tuple[tuple[int | None, ...], list[CountingWorld], SayingPolicy]:
    worlds, policy = [CountingWorld(steps) for steps in needed], SayingPolicy()
    job = DrivingJob(Cell(ACTIONS, None, executed, 3), "Lift", tuple(range(len(needed))), (), TASKS, Path())
    policies = SimpleNamespace(mean=torch.zeros(CONTEXT), deviation=torch.ones(CONTEXT), by_seed={3: policy})
    return policy_steps(worlds, job, policies), worlds, policy  # type: ignore[arg-type]


def test_a_scene_counts_with_the_step_at_which_it_was_solved_first() -> None:
    steps, worlds, _ = driven([1, 8, 9, MOST_STEPS, MOST_STEPS + 1], 8)
    assert steps == (1, 8, 9, MOST_STEPS, None)
    assert [len(world.sent) for world in worlds] == [1, 8, 9, MOST_STEPS, MOST_STEPS]


@pytest.mark.parametrize("executed", [8, 3])
def test_the_policy_is_asked_again_after_so_many_steps_with_what_it_did_last(executed: int) -> None:
    _, worlds, policy = driven([20], executed)
    assert len(policy.asked) == -(-20 // executed)
    sent = np.stack(worlds[0].sent)
    np.testing.assert_allclose(sent[:executed, 0], 0.1 * np.arange(executed), atol=1e-6)
    np.testing.assert_allclose(sent[executed, 0], 0.01 * executed, atol=1e-6)
    past = policy.asked[1][0, -len(TASKS) - 56 : -len(TASKS)].reshape(8, 7)
    np.testing.assert_allclose(past[-executed:], sent[:executed], atol=1e-6)
    assert not past[: 8 - executed].any()


def test_solved_scenes_are_not_asked_about() -> None:
    _, _, policy = driven([30, 4, 12], 8)
    assert [len(context) for context in policy.asked] == [3, 2, 1, 1]
    assert policy.asked[2][0, 0] == 16


def test_the_expert_is_given_up_after_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    still = SimpleNamespace(reset=lambda _: None, act=lambda _: np.zeros(7, np.float32))
    monkeypatch.setattr("rfsq.evidence.policy_driving.EXPERTS", {"Lift": lambda: still})
    assert expert_steps(CountingWorld(5)) == 5  # type: ignore[arg-type]
    assert expert_steps(CountingWorld(MOST_STEPS + 1)) is None  # type: ignore[arg-type]


def test_in_the_simulator_the_expert_solves_what_an_untrained_policy_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("robosuite", reason="the simulator is not installed here: pip install '.[sim]'")
    monkeypatch.setattr("rfsq.evidence.policy_training.in_processes", lambda work, jobs, *_: map(work, jobs))
    config = PolicyConfig(width=8, depth=1, heads=2, steps=1, batch=4)
    seen, chunks = lessons(some_recordings(), TASKS, 8)
    targets: dict[str, tuple[int | None, Tensor]] = {ACTIONS: (None, chunks.flatten(1).float())}
    train_all(training_jobs(seen, targets, config, (0,)), (seen.mean(0), seen.std(0)), 1, tmp_path)
    seeds = (attempt_of(DRIVEN_SEED, "Lift", 0).seed,)
    found = [
        drive(DrivingJob(cell, "Lift", (0,), seeds, TASKS, weights_file(tmp_path, ACTIONS)))
        for cell in (None, Cell(ACTIONS, None, 8, 0))
    ]
    assert found[0].steps[0] is not None
    assert found[1].steps == (None,)


def test_policies_that_are_loaded_say_chunks() -> None:
    """What stands in for them above has the same calls."""
    policy = RegressionPolicy(CONTEXT, 56, PolicyConfig(width=8, depth=1, heads=2)).eval()
    kind = PolicyKind(ACTIONS, CONTEXT, None, 56, "CPU", {})
    policies = SeeingPolicies(kind, torch.zeros(CONTEXT), torch.ones(CONTEXT), {3: policy})
    job = DrivingJob(Cell(ACTIONS, None, 8, 3), "Lift", (0, 1), (), TASKS, Path())
    worlds: list[Any] = [CountingWorld(9), CountingWorld(10)]
    assert policy_steps(worlds, job, policies) == (9, 10)
