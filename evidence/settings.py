"""What can be chosen for comparisons and rollouts; neither torch nor the simulator is needed to choose."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rfsq.calibration.settings import DEFAULT_READOUT, DEFAULT_RECOVERED, ReadoutConfig, RecoveredConfig
from rfsq.evidence.errors import EvidenceError
from rfsq.rfsq_ref.settings import NormaliserKind, TrainConfig, check_positive, check_tasks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Of everything that a comparison trains, and where it keeps what it has trained.
SEEDS, CACHE = (0, 1, 2), Path("build/evidence/models")
#: dx dy dz, a rotation vector, a gripper command.
ARM_DIMENSIONS = 7
#: Every task that can be rolled out, as in `rfsq_ref.experts.TASKS`, which takes numpy to import.
TASK_NAMES = (
    "Lift",
    "Stack",
    "NutAssemblySquare",
    "PickPlaceCan",
    "Door",
    "NutAssemblyTight",
    "NutAssemblyRound",
)
#: Two that forgive centimetres, and two that punish millimetres.
DEFAULT_TASKS = ("Stack", "NutAssemblySquare", "NutAssemblyTight", "PickPlaceCan")


@dataclass(frozen=True)
class OscPose:
    """Units of the OSC_POSE delta controller, one arm or several of 7 dimensions each.

    position_m: metres that one action unit of dx, dy or dz asks for; rotation_rad: radians of the rotation vector;
    the gripper command's sign opens or closes.
    """

    position_m: float = 0.05
    rotation_rad: float = 0.5

    def __post_init__(self) -> None:
        for name, unit in (("position", self.position_m), ("rotation", self.rotation_rad)):
            if not 0 < unit < math.inf:
                raise EvidenceError(f"{name} unit is {unit}; expected a number above 0: correct --{name}-unit")

    def arms(self, actions: "npt.NDArray[np.floating]") -> "npt.NDArray[np.float64]":
        """[N, arms * 7] to [N, arms, 7]. Raises EvidenceError for another number of dimensions."""
        if actions.shape[-1] % ARM_DIMENSIONS:
            raise EvidenceError(
                f"{actions.shape[-1]} action dimensions are no OSC_POSE actions; expected 7 for each arm "
                "(dx dy dz droll dpitch dyaw gripper): leave --osc-pose out"
            )
        return actions.astype("float64").reshape(len(actions), -1, ARM_DIMENSIONS)


@dataclass(frozen=True)
class ComparisonConfig:
    """What to train and compare.

    seeds: of everything that is trained; physical: units of the actions, where they have any; workers: processes.
    """

    seeds: tuple[int, ...] = SEEDS
    epochs: int = 100
    normaliser: NormaliserKind | None = None
    chunk_length: int = 8
    physical: OscPose | None = None
    peers: bool = True
    recovered: RecoveredConfig = DEFAULT_RECOVERED
    readout: ReadoutConfig = DEFAULT_READOUT
    workers: int = os.cpu_count() or 1
    cache: Path = CACHE

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise EvidenceError(f"seeds are {self.seeds}; expected different ones, like 0 1 2")
        check_positive(self, "epochs", "chunk_length", "workers", error=EvidenceError)

    def training(self, *, use_layernorm: bool, seed: int) -> TrainConfig:
        """The published recipe."""
        return TrainConfig(use_layernorm=use_layernorm, epochs=self.epochs, seed=seed, normaliser=self.normaliser)


@dataclass(frozen=True)
class RolloutConfig:
    """What to run. cells: all of them if none are named; episodes: per task and cell; chunk: actions executed between
    two plans; peers: run the methods of others too; restart_changed: drive cells whose codec has changed anew; folder:
    of the episodes."""

    tasks: tuple[str, ...] = DEFAULT_TASKS
    cells: tuple[str, ...] = ()
    episodes: int = 50
    seed: int = 0
    chunk: int = 8
    workers: int = 2
    peers: bool = False
    restart_changed: bool = False
    folder: Path = Path("build/evidence/rollout")

    def __post_init__(self) -> None:
        check_positive(self, "episodes", "chunk", "workers", error=EvidenceError)
        if self.seed < 0:
            raise EvidenceError(f"seed is {self.seed}; expected 0 or more")
        check_tasks(self.tasks, TASK_NAMES, EvidenceError)
        if self.peers and self.chunk != 8:
            raise EvidenceError(
                f"chunk is {self.chunk}; the peers are trained for chunks of 8 steps: leave --peers out"
            )

    @property
    def file(self) -> Path:
        return self.folder / "episodes.jsonl"
