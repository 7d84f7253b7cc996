"""The embedded robust checkpoint, fitted once for all tests of this room."""

import pytest
import torch

from rfsq.calibration.constants import fit_constants
from rfsq.calibration.data import reference_actions
from rfsq.calibration.settings import RecoveredConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import EpisodeSplit
from tests.calibration.small_fits import fit_recovered


@pytest.fixture(scope="session")
def calibrated(robust: Checkpoint, split: EpisodeSplit) -> Checkpoint:
    return robust.with_fit(constants=fit_constants(robust, split.calibration))


@pytest.fixture(scope="session")
def recovered(robust: Checkpoint, split: EpisodeSplit) -> Checkpoint:
    return robust.with_fit(recovered=fit_recovered(robust, split.calibration, [3, 8], RecoveredConfig(1e-6)))


@pytest.fixture(scope="session")
def test_actions(robust: Checkpoint, split: EpisodeSplit) -> torch.Tensor:
    """Held-out steps, float64 [N, A]."""
    return reference_actions(robust, split.test)
