"""A policy drives many scenes at once: asked as often as it should be, about those alone that are not solved."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.evidence.policies import PolicyConfig, RegressionPolicy
from rfsq.evidence.policy_driving import MOST_STEPS, Cell, Driven, DrivingJob, drive, expert_steps, policy_drive
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


class StillExpert:
    """Means to stand still, whatever it sees."""

    intended = np.zeros(7, np.float32)

    def reset(self, rng: np.random.Generator) -> None:
        """Nothing is random."""

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        assert "robot0_eef_pos" in observation
        return self.intended


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "simulator" not in request.node.name:
        monkeypatch.setattr("rfsq.evidence.policy_driving.EXPERTS", {"Lift": StillExpert})


def driven(needed: list[int], executed: int) -> tuple[Driven, list[CountingWorld], SayingPolicy]:
    worlds, policy = [CountingWorld(steps) for steps in needed], SayingPolicy()
    job = DrivingJob(Cell(ACTIONS, None, executed, 3), "Lift", tuple(range(len(needed))), (), TASKS, Path())
    policies = SimpleNamespace(mean=torch.zeros(CONTEXT), deviation=torch.ones(CONTEXT), by_seed={3: policy})
    return policy_drive(worlds, job, policies), worlds, policy  # type: ignore[arg-type]


def test_a_scene_counts_with_the_step_at_which_it_was_solved_first() -> None:
    found, worlds, _ = driven([1, 8, 9, MOST_STEPS, MOST_STEPS + 1], 8)
    assert found.steps == (1, 8, 9, MOST_STEPS, None)
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


def test_errors_are_of_every_step_that_was_executed_and_of_what_the_expert_meant_there() -> None:
    found, worlds, _ = driven([2, 13], 8)
    for error, world in zip(found.errors, worlds, strict=True):
        np.testing.assert_allclose(error, np.square(world.sent).mean(), rtol=1e-6)


def test_probabilities_are_decoded_as_the_cell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Believer:
        def ask(self, _: object, contexts: Tensor) -> tuple[Tensor, ...]:
            return (contexts,)

        def decode(self, answers: tuple[Tensor, ...], way: str, _: torch.Generator) -> Tensor:
            assert way == "expected"
            return torch.full((len(answers[0]), 8, 7), 0.25)

    monkeypatch.setattr("rfsq.evidence.policy_driving._believers", {"some": Believer()})
    job = DrivingJob(Cell("some", 3, 8, 3, "expected"), "Lift", (0,), (), TASKS, Path())
    policies = SimpleNamespace(mean=torch.zeros(CONTEXT), deviation=torch.ones(CONTEXT), by_seed={3: None})
    world = CountingWorld(5)
    assert policy_drive([world], job, policies).steps == (5,)  # type: ignore[arg-type, list-item]
    assert (np.stack(world.sent) == 0.25).all()


def test_solved_scenes_are_not_asked_about() -> None:
    _, _, policy = driven([30, 4, 12], 8)
    assert [len(context) for context in policy.asked] == [3, 2, 1, 1]
    assert policy.asked[2][0, 0] == 16


def test_the_expert_is_given_up_after_as_many_steps() -> None:
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
    assert policy_drive(worlds, job, policies).steps == (9, 10)
