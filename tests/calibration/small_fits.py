"""Random small fits: a briefly trained autoencoder, few calibration episodes, and held-out episodes to judge on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rfsq.calibration.recovered import fit_recovered_details
from rfsq.calibration.settings import RecoveredConfig
from rfsq.rfsq_ref.autoencoder import RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.normaliser import suggested_normaliser
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.rfsq_ref.training import train

Array = npt.NDArray[np.float64]
_TRAINING_EPISODES, _HELD_OUT_EPISODES = 12, 12


@dataclass(frozen=True, eq=False)
class SmallFit:
    """kind: of the data; training: a split of these trains the checkpoint; held_out: nothing may be fitted to it."""

    kind: str
    chunk_length: int
    training: ActionDataset
    calibration: ActionDataset
    held_out: ActionDataset
    config: TrainConfig

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return train(self.training, self.config).checkpoint


@cache
def small_fit(seed: int) -> SmallFit:
    """4 to 26 dimensions, T 4 to 20, 2 to 20 calibration episodes; the kind of data takes turns with the seed."""
    generator = np.random.default_rng(seed)
    kind = list(_KINDS)[seed % len(_KINDS)]
    action_dim = int(generator.integers(4, 27))
    chunk_length = int(generator.integers(4, 21))
    calibration = int(generator.integers(2, 21))
    steps = chunk_length * int(generator.integers(2, 7))
    make, shifts = _KINDS[kind](generator, action_dim)

    def episodes(count: int, moved: float = 0.0) -> ActionDataset:
        found = tuple(make(generator, steps, moved).astype(np.float32) for _ in range(count))
        return ActionDataset(found, tuple(map(str, range(count))), ("",) * count, kind)

    training = episodes(_TRAINING_EPISODES + int(generator.integers(0, 40)))
    config = TrainConfig(
        epochs=int(generator.integers(2, 31)),
        seed=seed,
        latent_dim=int(generator.integers(4, 17)),
        hidden_width=int(generator.choice([16, 32, 64])),
        num_layers=int(generator.integers(2, 9)),
        num_levels=int(generator.choice([4, 5, 7, 9])),
        normaliser=suggested_normaliser(training),
    )
    of_calibration, of_held_out = shifts
    return SmallFit(
        kind,
        chunk_length,
        training,
        episodes(calibration, of_calibration),
        episodes(_HELD_OUT_EPISODES, of_held_out),
        config,
    )


@cache
def hardly_trained() -> tuple[Checkpoint, ActionDataset]:
    """A model after one epoch, and its data: a refit to these would need weights that float32 cannot serve."""
    generator = np.random.default_rng(1)
    make, _ = _walk(generator, 14)
    episodes = tuple(make(generator, 100, 0.0).astype(np.float32) for _ in range(40))
    data = ActionDataset(episodes, tuple(map(str, range(40))), ("",) * 40, "random walk")
    return train(data, TrainConfig(epochs=1, normaliser=suggested_normaliser(data))).checkpoint, data


#: How far the calibration and the held-out episodes are moved.
_ALIKE = (0.0, 0.0)
_Episode = Callable[[np.random.Generator, int, float], Array]
_Kind = Callable[[np.random.Generator, int], tuple[_Episode, tuple[float, float]]]


def _smooth(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """Joints that follow three slow waves each; every episode has its own."""
    centre, size = generator.normal(0, 1, action_dim), generator.uniform(0.1, 1.5, action_dim)

    def episode(generator: np.random.Generator, steps: int, moved: float) -> Array:
        time = np.linspace(0, 1, steps)[:, None]
        found = np.zeros((steps, action_dim))
        for _ in range(3):
            amplitude, phase = generator.normal(0, 0.5, action_dim), generator.uniform(0, 6.3, action_dim)
            found += amplitude * np.sin(generator.uniform(0.5, 6, action_dim) * time + phase)
        return centre + size * (found + moved)

    return episode, _ALIKE


def _walk(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """Random walks that stay within about one unit."""
    pace = generator.uniform(0.02, 0.2, action_dim)

    def episode(generator: np.random.Generator, steps: int, _moved: float) -> Array:
        start = generator.uniform(-0.5, 0.5, action_dim)
        found: Array = np.tanh(start + np.cumsum(generator.normal(0, pace, (steps, action_dim)), axis=0))
        return found

    return episode, _ALIKE


def _unlike_held_out(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """The held-out episodes move about another centre than those that train and calibrate."""
    smooth, _ = _smooth(generator, action_dim)
    return smooth, (0.0, float(generator.uniform(0.2, 0.8)))


def _unlike_calibration(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """The episodes that calibrate move about another centre than those that train and are held out."""
    smooth, _ = _smooth(generator, action_dim)
    return smooth, (float(generator.uniform(0.2, 0.8)), 0.0)


def _resting(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """Some joints never move, one of them far from zero."""
    smooth, _ = _smooth(generator, action_dim)
    rests = generator.permutation(action_dim)[: max(1, action_dim // 4)]
    places = generator.normal(0, 2, len(rests))

    def episode(generator: np.random.Generator, steps: int, moved: float) -> Array:
        found = smooth(generator, steps, moved)
        found[:, rests] = places
        return found

    return episode, _ALIKE


def _gripper(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """Deltas of an arm, and a gripper command that is -1 or 1."""
    size = generator.uniform(0.1, 0.6, action_dim)

    def episode(generator: np.random.Generator, steps: int, _moved: float) -> Array:
        shape = np.sin(np.pi * np.linspace(0, 1, steps))[:, None]
        found: Array = np.clip(size * generator.normal(0, 0.7, action_dim) * shape, -1, 1)
        found += generator.normal(0, 0.02, found.shape)
        found[:, -1] = np.where(np.arange(steps) < generator.integers(1, steps), -1.0, 1.0)
        return found

    return episode, _ALIKE


def _tasks(generator: np.random.Generator, action_dim: int) -> tuple[_Episode, tuple[float, float]]:
    """Several tasks, each a straight line of its own; few episodes do not show all of them."""
    ends = generator.uniform(-1, 1, (8, action_dim))

    def episode(generator: np.random.Generator, steps: int, _moved: float) -> Array:
        start, end = ends[generator.permutation(8)[:2]]
        share = np.linspace(0, 1, steps)[:, None]
        return start + (3 * share**2 - 2 * share**3) * (end - start) + generator.normal(0, 0.03, (steps, action_dim))

    return episode, _ALIKE


_KINDS: dict[str, _Kind] = {
    "smooth": _smooth,
    "random walk": _walk,
    "unlike held-out": _unlike_held_out,
    "unlike calibration": _unlike_calibration,
    "resting joints": _resting,
    "gripper": _gripper,
    "tasks": _tasks,
}


def fit_recovered(
    checkpoint: Checkpoint,
    episodes: ActionDataset,
    prefixes: Iterable[int],
    config: RecoveredConfig | None = None,
    *,
    weights: npt.ArrayLike | None = None,
) -> dict[int, RecoveredDecoder]:
    """One decoder per prefix, from the published tokens of these episodes; weights [N]: of the steps, in place of those
    of the config."""
    with pytest.MonkeyPatch.context() as patch:
        if weights is not None:
            shares = torch.from_numpy(np.asarray(weights) / np.sum(weights))
            patch.setattr("rfsq.calibration.recovered._step_shares", lambda *_: shares)
        fits = fit_recovered_details(checkpoint, episodes, prefixes, config or RecoveredConfig())
    return {prefix: fit.decoder for prefix, fit in fits.items()}
