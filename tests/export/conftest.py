"""For this room: the embedded robust checkpoint, calibrated once, and C for one target alone."""

import pytest

from rfsq.calibration.fitting import calibrate
from rfsq.calibration.settings import CalibrationConfig
from rfsq.export import c_builder, engines
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.runtime.backends.cpu_targets import host_targets


@pytest.fixture(scope="session")
def calibrated(robust: Checkpoint, demonstrations: ActionDataset) -> Checkpoint:
    return calibrate(robust, demonstrations, CalibrationConfig())


@pytest.fixture
def one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """C is compiled for the best target alone, and in a third of the time, where a test is not about targets."""
    best = host_targets()[:1]
    monkeypatch.setattr(engines, "host_targets", lambda: best)
    monkeypatch.setattr(c_builder, "C_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in c_builder.C_FLAGS))
