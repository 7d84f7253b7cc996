"""A robot without a simulator at 500 Hz: it takes what it gets; the policy swings every dimension."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rfsq.runtime import ControlConfig
from rfsq.runtime.bundle.manifest import ModelEntry

PERIOD_S = 0.002


class PlainRobot:
    """Motions, and a gripper in the last dimension. Its limits are twice the range that the bundle was trained for."""

    name = "no simulator, at 500 Hz"
    seconds, fault_at_s = 5.0, 0.5

    def __init__(self, model: ModelEntry) -> None:
        units = np.asarray(model.action_units)
        limits, size = 2 * units + np.abs(model.action_offset), model.action_dim
        self.config = ControlConfig.from_values(
            {
                "period_s": PERIOD_S,
                "action_low": (-limits).tolist(),
                "action_high": limits.tolist(),
                "max_relative_step": [*(0.05 * units[:-1]).tolist(), float("inf")],
                "action_kind": ["delta"] * size,
                "gripper": [size - 1],
                "stale_after_s": 0.1,
                "max_consecutive_faults": 1000,
                "deadline_us": 1000,
            }
        )
        self.position = (0.0,) * size
        self._ticks = 0

    def observe(self) -> float:
        return self._ticks * PERIOD_S

    def act(self, actions: npt.NDArray[np.float32]) -> None:
        del actions
        self._ticks += 1

    def verdicts(self, fault: str) -> list[tuple[bool, str]]:
        """It has no task."""
        del fault
        return []


@dataclass(frozen=True)
class SwingPolicy:
    """Made in the policy's process."""

    units: tuple[float, ...]
    offset: tuple[float, ...]
    period_s: float = PERIOD_S

    def __call__(self, chunk_length: int) -> Any:
        ahead = self.period_s * np.arange(chunk_length)[:, np.newaxis]
        phases = np.arange(len(self.units))

        def planner(time_s: float) -> npt.NDArray[np.float32]:
            swing = 0.5 * np.sin(2 * np.pi * 0.5 * (time_s + ahead) + phases)
            actions: npt.NDArray[np.float64] = np.asarray(self.offset) + np.asarray(self.units) * swing
            return actions.astype(np.float32)

        return planner
