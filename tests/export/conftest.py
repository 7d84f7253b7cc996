"""The embedded robust checkpoint, calibrated once for all tests of this room."""

import pytest

from calibration.constants import CalibrationConfig
from calibration.fit import calibrate
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.data import ActionDataset


@pytest.fixture(scope="session")
def calibrated(robust: Checkpoint, demonstrations: ActionDataset) -> Checkpoint:
    return calibrate(robust, demonstrations, CalibrationConfig())
