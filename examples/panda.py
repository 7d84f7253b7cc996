"""A Panda arm in robosuite at 20 Hz, and the policy that drives it: a scripted expert which looks a chunk ahead."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rfsq.evidence.simulation import Simulation, plan
from rfsq.rfsq_ref.expert import gripper_position
from rfsq.rfsq_ref.experts import TASKS
from rfsq.rfsq_ref.generate_demonstrations import check_simulator
from rfsq.runtime import ControlConfig, TokenizerError

check_simulator()

PERIOD_S = 0.05
#: In a second, told to stand still: this controller aims from where the arm is, and so sinks under what it carries.
SINKS_MM = 2.0
#: dx dy dz droll dpitch dyaw are motions per tick; the gripper is a command that stays.
CONFIG = ControlConfig.from_values(
    {
        "period_s": PERIOD_S,
        "action_low": [-1.0] * 7,
        "action_high": [1.0] * 7,
        "max_relative_step": [0.4] * 6 + [float("inf")],
        "action_kind": ["delta"] * 6 + ["absolute"],
        "gripper": [6],
        "stale_after_s": 0.5,
        "max_consecutive_faults": 40,
        "deadline_us": 10_000,
    }
)


class Panda:
    """The robot: what the loop sees of it and does to it."""

    config, position = CONFIG, (0.0,) * 7
    seconds, fault_at_s = 10.0, 5.5

    def __init__(self, task: str, seed: int) -> None:
        if task not in TASKS:
            raise TokenizerError(f"--task is {task}; expected one of {', '.join(TASKS)}: correct the spelling")
        self.name, self._task = f"a Panda arm in robosuite, {task}, at 20 Hz", task
        self._path: list[npt.NDArray[np.float64]] = []
        self._simulation = Simulation(task, seed)
        self._simulation.reset()
        self._simulation.step(np.zeros(7, np.float32))  # compiled here, not in the loop
        self._seen = self._simulation.reset()

    def observe(self) -> Any:
        """The policy is told everything; a real one would get images and joint angles."""
        return self._simulation.save(), self._seen

    def act(self, actions: npt.NDArray[np.float32]) -> None:
        self._seen = self._simulation.step(actions)
        self._path.append(gripper_position(self._seen))

    def verdicts(self, fault: str) -> list[tuple[bool, str]]:
        """robosuite's own word on the task; without a policy it is enough that the arm does not drift."""
        last = self._path[-round(1 / PERIOD_S) :]
        drift_mm = 1e3 * max(float(np.linalg.norm(place - last[-1])) for place in last)
        result = f"{self._task}: {'' if self._simulation.succeeded() else 'not '}solved at the end"
        if fault == "killed":
            return [(drift_mm < SINKS_MM, f"the gripper moved by {drift_mm:.2f} mm in the last second; {result}")]
        return [(self._simulation.succeeded(), result)]


@dataclass(frozen=True)
class ExpertPolicy:
    """Made in the policy's process: the expert acts in a simulation of its own, wound to what the robot has seen."""

    task: str
    seed: int
    period_s: float = PERIOD_S

    def __call__(self, chunk_length: int) -> Any:
        world, expert = Simulation(self.task, self.seed), TASKS[self.task]()
        expert.reset(np.random.default_rng(self.seed))
        plan(world, expert, world.reset(), chunk_length)

        def planner(observation: Any) -> npt.NDArray[np.float32]:
            snapshot, seen = observation
            world.restore(snapshot)
            actions, _ = plan(world, expert, seen, chunk_length)
            expert.act(seen)  # of which its phase alone is wanted
            return actions

        return planner
