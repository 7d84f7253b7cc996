"""A small robot that is nothing like the embedded one, and a comparison on it, made once; recordings that are seen."""

from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from rfsq.calibration.settings import RecoveredConfig
from rfsq.evidence.comparison import compare
from rfsq.evidence.policy_recordings import BODIES, NUM_POSES, Recording
from rfsq.evidence.results import Comparison
from rfsq.evidence.settings import ComparisonConfig
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.settings import NormaliserKind
from tests.once import once


def robot_dataset(action_dim: int = 4, episodes: int = 32, seed: int = 0) -> ActionDataset:
    """Smooth motions in odd units: metres, radians, a 0 … 255 count, and a last dimension that never moves."""
    rng = np.random.default_rng(seed)
    scale = np.resize([0.05, 3.0, 255.0], action_dim)
    found = []
    for index in range(episodes):
        # The first episode is shorter than a chunk.
        steps = 5 if index == 0 else int(rng.integers(30, 60))
        phase, speed = rng.uniform(0, 6, action_dim), rng.uniform(0.05, 0.2, action_dim)
        actions = scale * np.sin(phase + speed * np.arange(steps)[:, None]) + 0.01 * scale * rng.normal(
            size=(steps, action_dim)
        )
        actions[:, -1] = 0.5
        found.append(actions.astype(np.float32))
    names = tuple(f"episode {index}" for index in range(episodes))
    return ActionDataset(tuple(found), names, ("",) * episodes, "robot.npz")


def write_npz(path: Path, dataset: ActionDataset) -> None:
    ends = np.cumsum([len(episode) for episode in dataset.episodes])
    np.savez(path, actions=dataset.steps(), episode_ends=ends)


def some_recordings(count: int = 6, steps: int = 30, seed: int = 0) -> list[Recording]:
    """Recorded episodes of Lift and Stack in turn, of random smooth motions."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        task = ("Lift", "Stack")[index % 2]
        meant = np.sin(rng.uniform(0, 6, 7) + rng.uniform(0.05, 0.2, 7) * np.arange(steps)[:, None])
        executed = np.clip(meant + 0.1 * rng.normal(size=meant.shape), -1, 1)
        poses = rng.normal(size=(steps, NUM_POSES, 7))
        poses[:, 1 + len(BODIES[task]) :] = 0.0
        found.append(Recording(task, index, *(part.astype(np.float32) for part in (poses, executed, meant))))
    return found


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """For torch has one thread here, and importing it anew takes longest.

    That new processes do it too, the script shows in test_report.
    """
    patch.setattr("rfsq.evidence.workers.get_context", lambda _: get_context("fork"))


@pytest.fixture(scope="session")
def robot() -> ActionDataset:
    return robot_dataset()


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> ComparisonConfig:
    # Of all workers: what one has trained, the others find.
    cache = once(tmp_path_factory, "models", Path.mkdir)
    # Trained well: a readout repairs no model that was hardly trained, where float32 could not serve it.
    return ComparisonConfig(
        seeds=(0, 1), epochs=250, normaliser=NormaliserKind.MIN_MAX, peers=False, workers=1,
        recovered=RecoveredConfig(refine_steps=0), cache=cache,
    )  # fmt: skip


@pytest.fixture(scope="session")
def quick_config(small_config: ComparisonConfig) -> ComparisonConfig:
    """For what holds of models that are hardly trained, too."""
    return replace(small_config, epochs=4)


@pytest.fixture(scope="session")
def comparison(
    robot: ActionDataset, small_config: ComparisonConfig, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    return Comparison.read(
        once(tmp_path_factory, "comparison.json", lambda path: compare(robot, small_config).write(path))
    )
