"""The control loop of a vision-language-action policy: observe, plan a chunk of actions, execute it, observe again.

The policy is a scripted expert. It plans by driving the simulation ahead in closed loop. Then the simulation is rewound
and executes the planned actions as the codec decodes them. So every codec stands between the same policy and the same
robot, and with raw actions the robot does exactly what was planned.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfsq.evidence.codecs import Codec
from rfsq.evidence.simulation import Simulation
from rfsq.rfsq_ref.expert import Expert, Observation, gripper_position, gripper_rotation, rotation_vector
from rfsq.rfsq_ref.experts import NutAssemblySquareExpert, PickPlaceCanExpert, StackExpert

#: Half the height of both nuts of robosuite, in m.
NUT_HALF_HEIGHT = 0.01
#: Tasks that `precision` measures: their success can be judged again at any tolerance.
PRECISION_TASKS = ("Stack", "NutAssemblySquare", "NutAssemblyTight", "NutAssemblyRound", "PickPlaceCan")


@dataclass(frozen=True)
class Spread:
    """One error over the steps of an episode: mean, 95th percentile, largest."""

    mean: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(float(np.mean(values)), float(np.percentile(values, 95)), float(np.max(values)))


@dataclass(frozen=True)
class EpisodeResult:
    """The outcome of one episode.

    success: robosuite's check at the end; reached: whether it held after any step. tracking_mm, tracking_deg: after
    every step, from where the gripper is to where the raw actions of the same chunk would have put it.
    precision_mm: see `precision`; None where the episode never came to the point at which it is measured.
    """

    success: bool
    reached: bool
    steps: int
    tracking_mm: Spread
    tracking_deg: Spread
    precision_mm: float | None


def run_episode(world: Simulation, expert: Expert, codec: Codec, rng: np.random.Generator, chunk: int) -> EpisodeResult:
    """Drive `world` from its beginning until the expert is done, planning anew after every `chunk` actions.

    The expert sees every real observation, one per step, so that its phases follow what has happened and not what was
    planned. Its noise is a sequence of its own, so that step n has the same noise with every codec. Decoded actions
    are clipped to [-1, 1], as the controller clips them.
    """
    expert.reset(rng)
    observation = world.reset()
    observations, phases = [observation], [expert.phase]
    millimetres: list[float] = []
    degrees: list[float] = []
    reached = False
    while not expert.done and len(millimetres) < expert.max_steps:
        planned, foreseen = plan(world, expert, observation, chunk)
        decoded = codec.reconstruct(planned[np.newaxis])[0]
        for action, expected in zip(np.clip(decoded, -1.0, 1.0), foreseen, strict=True):
            # Not for its action, but for what it remembers: its phase, its gripper, its noise.
            expert.act(observation)
            observation = world.step(action)
            observations.append(observation)
            phases.append(expert.phase)
            millimetres.append(1e3 * float(np.linalg.norm(gripper_position(observation) - gripper_position(expected))))
            turn = rotation_vector(gripper_rotation(observation) @ gripper_rotation(expected).T)
            degrees.append(float(np.degrees(np.linalg.norm(turn))))
            reached = reached or world.succeeded()
            if expert.done or len(millimetres) >= expert.max_steps:
                break
    return EpisodeResult(
        success=world.succeeded(),
        reached=reached,
        steps=len(millimetres),
        tracking_mm=Spread.of(millimetres),
        tracking_deg=Spread.of(degrees),
        precision_mm=precision(expert, observations, phases),
    )


def plan(
    world: Simulation, expert: Expert, observation: Observation, chunk: int
) -> tuple[NDArray[np.float32], list[Observation]]:
    """The actions float32 [chunk, 7] that the expert would take from here, and what it would see after each.

    Neither the world nor the expert is changed.
    """
    snapshot = world.save()
    planner = copy.deepcopy(expert)
    actions: list[NDArray[np.float32]] = []
    foreseen: list[Observation] = []
    for _ in range(chunk):
        actions.append(planner.act(observation))
        observation = world.step(actions[-1])
        foreseen.append(observation)
    world.restore(snapshot)
    return np.stack(actions), foreseen


def precision(expert: Expert, observations: Sequence[Observation], phases: list[str]) -> float | None:
    """How far from its goal the task ended, in mm; None for a task without such a measure, or a goal never reached.

    Stack: horizontal distance of the cubes' centres at the end. Nuts: horizontal distance from the nut to the axis of
    its peg when the nut, being lowered, first passes the top of the peg with its bottom. Can: horizontal distance at
    the end from where the expert meant to put it. `phases[n]`: the expert's phase when it had given action n - 1.
    """
    end = observations[-1]
    if isinstance(expert, StackExpert):
        return _horizontal_mm(end["cubeA_pos"], end["cubeB_pos"])
    if isinstance(expert, PickPlaceCanExpert):
        return _horizontal_mm(end["Can_pos"], expert.spot)
    if isinstance(expert, NutAssemblySquareExpert):
        for observation, phase in zip(observations, phases, strict=True):
            nut = observation[f"{expert.nut}_pos"]
            if phase == "insert" and nut[2] - NUT_HALF_HEIGHT <= expert.peg_top:
                return _horizontal_mm(nut, expert.peg)
    return None


def _horizontal_mm(first: Any, second: Any) -> float:
    return 1e3 * float(np.linalg.norm(np.asarray(first)[:2] - np.asarray(second)[:2]))
