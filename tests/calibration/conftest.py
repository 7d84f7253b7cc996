"""The embedded checkpoints and demonstrations, fitted once for all tests of this room."""

import pytest
import torch

from calibration.constants import fit_constants
from calibration.data import reference_actions
from calibration.recovered import fit_recovered
from rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq_ref.data import ActionDataset, EpisodeSplit, load_demonstrations, split_episodes


@pytest.fixture(scope="session")
def demonstrations() -> ActionDataset:
    return load_demonstrations()


@pytest.fixture(scope="session")
def split(demonstrations: ActionDataset) -> EpisodeSplit:
    return split_episodes(demonstrations)


@pytest.fixture(scope="session")
def robust() -> Checkpoint:
    return load_checkpoint(ROBUST_CHECKPOINT)


@pytest.fixture(scope="session")
def naive() -> Checkpoint:
    return load_checkpoint(NAIVE_CHECKPOINT)


@pytest.fixture(scope="session")
def calibrated(robust: Checkpoint, split: EpisodeSplit) -> Checkpoint:
    return robust.with_fit(constants=fit_constants(robust, split.calibration))


@pytest.fixture(scope="session")
def recovered(robust: Checkpoint, split: EpisodeSplit) -> Checkpoint:
    threads = torch.get_num_threads()
    # The matrices are small: more threads than free cores wait for each other most of the time.
    torch.set_num_threads(1)
    fits = fit_recovered(robust, split.calibration, [3, 8])
    torch.set_num_threads(threads)
    return robust.with_fit(recovered=fits)


@pytest.fixture(scope="session")
def test_actions(robust: Checkpoint, split: EpisodeSplit) -> torch.Tensor:
    """Held-out steps, float64 [N, A]."""
    return reference_actions(robust, split.test)
