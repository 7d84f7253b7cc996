"""What can be chosen for comparisons and rollouts; neither torch nor the simulator is needed to choose."""

from dataclasses import dataclass
from pathlib import Path

from rfsq.evidence.errors import EvidenceError
from rfsq.rfsq_ref.settings import check_positive, check_tasks

#: Of everything that a comparison trains, and where it keeps what it has trained.
SEEDS, CACHE = (0, 1, 2), Path("build/evidence/models")
#: Units of robosuite's OSC_POSE delta controller: m and rad that an action of 1 asks for.
OSC_POSITION_M, OSC_ROTATION_RAD = 0.05, 0.5
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
