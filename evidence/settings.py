"""What can be chosen for comparisons and rollouts; neither torch nor the simulator is needed to choose."""

from dataclasses import dataclass
from pathlib import Path

from rfsq.evidence.errors import EvidenceError

#: Of everything that a comparison trains, and where it keeps what it has trained.
SEEDS, CACHE = (0, 1, 2), Path("build/evidence/models")
#: Units of robosuite's OSC_POSE delta controller: m and rad that an action of 1 asks for.
OSC_POSITION_M, OSC_ROTATION_RAD = 0.05, 0.5
#: Every task that can be rolled out, as in `evidence.simulation.TASKS`.
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
        for name in ("episodes", "chunk", "workers"):
            if getattr(self, name) < 1:
                raise EvidenceError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.seed < 0:
            raise EvidenceError(f"seed is {self.seed}; expected 0 or more")
        unknown = [task for task in self.tasks if task not in TASK_NAMES]
        if unknown or not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise EvidenceError(f"tasks are {list(self.tasks)}; expected different ones of {list(TASK_NAMES)}")
        if self.peers and self.chunk != 8:
            raise EvidenceError(
                f"chunk is {self.chunk}; the peers are trained for chunks of 8 steps: leave --peers out"
            )

    @property
    def file(self) -> Path:
        return self.folder / "episodes.jsonl"
