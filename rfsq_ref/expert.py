"""What all scripted experts have in common: poses of the gripper, phases, the style of an episode, and one contract.

An expert looks at one observation and answers one action of the OSC_POSE delta controller, 7 values in [-1, 1]:
dx dy dz (1 = 0.05 m), droll dpitch dyaw (world-frame rotation vector, 1 = 0.5 rad), gripper (negative opens,
positive closes). It works closed-loop: every target is computed from the current observation, so it also corrects
what a lossy tokenizer between it and the robot does to its actions. Only numpy is needed; the simulator is not.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

# Poses: lengths in m, angles in rad -----------------------------------------------------------------------------------

Array = NDArray[np.float64]
Observation = Mapping[str, Any]


@dataclass(frozen=True)
class Pose:
    """Gripper pose in the world frame: position [3] in m; rotation [3, 3], x closes the fingers, z points out."""

    position: Array
    rotation: Array


Target = Callable[[Observation, Observation], Pose]
"""(observation now, observation when the phase began) -> where the gripper should be."""


def above(name: str, offset: Array, symmetry: float, tilt: Array | None = None, obstacle: str = "") -> Target:
    """At the object plus `offset` [3], fingers along the face (every `symmetry` rad) nearest to the gripper's yaw.

    obstacle: another object; where it is close, the fingers open where it does not stand in their way.
    """

    def target(now: Observation, start: Observation) -> Pose:
        wanted = gripper_yaw(start)
        if obstacle:
            towards = start[f"{obstacle}_pos"] - start[f"{name}_pos"]
            if np.linalg.norm(towards[:2]) < 0.11:
                wanted = nearest_yaw(np.arctan2(towards[1], towards[0]) + np.pi / 2, wanted, np.pi)
        heading = nearest_yaw(yaw_of(quaternion_matrix(now[f"{name}_quat"])), wanted, symmetry)
        return Pose(now[f"{name}_pos"] + offset, tilted(pointing_down(heading), tilt))

    return target


def held_over(held: str, base: str, offset: Array, symmetry: float, tilt: Array | None = None) -> Target:
    """Brings the held object to the base's position plus `offset` [3] and to its yaw (modulo `symmetry`)."""
    return lambda now, _start: held_pose(
        now, held, now[f"{base}_pos"] + offset, yaw_of(quaternion_matrix(now[f"{base}_quat"])), symmetry, tilt
    )


def held_pose(
    now: Observation, held: str, goal: Array, goal_yaw: float, symmetry: float, tilt: Array | None = None
) -> Pose:
    """Gripper pose that puts the held object at `goal` [3], yaw `goal_yaw`: corrects how it really sits in the hand."""
    current = yaw_of(quaternion_matrix(now[f"{held}_quat"]))
    turn = nearest_yaw(goal_yaw, current, symmetry) - current
    position = gripper_position(now) + goal - now[f"{held}_pos"]
    return Pose(position, tilted(pointing_down(gripper_yaw(now) + turn), tilt))


def relative(shift: Array, turn: float = 0.0, tilt: Array | None = None) -> Target:
    """Where the gripper was when the phase began, plus `shift` [3] and a world rotation: yaw `turn`, then `tilt`."""
    return lambda _now, start: Pose(
        gripper_position(start) + shift, tilted(about_z(turn) @ gripper_rotation(start), tilt)
    )


def gripper_position(observation: Observation) -> Array:
    """Position [3] in m, between the finger pads."""
    return np.asarray(observation["robot0_eef_pos"], dtype=np.float64)


def gripper_rotation(observation: Observation) -> Array:
    """Rotation [3, 3] of the gripper's site, which the controller moves; its body is turned by 90 degrees."""
    return quaternion_matrix(observation["robot0_eef_quat_site"])


def gripper_yaw(observation: Observation) -> float:
    """Direction in which the fingers close, in rad."""
    return yaw_of(gripper_rotation(observation))


def quaternion_matrix(quaternion: Any) -> Array:
    """Rotation [3, 3] of a quaternion x y z w."""
    x, y, z, w = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(rotation: Array) -> Array:
    """Axis times angle [3] in rad of a rotation [3, 3]; well defined below half a turn."""
    axis = 0.5 * np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine = float(np.linalg.norm(axis))
    if sine < 1e-9:
        return np.zeros(3)
    angle = np.arctan2(sine, 0.5 * (np.trace(rotation) - 1.0))
    return np.asarray(axis * (angle / sine), dtype=np.float64)


def rotation_of(vector: Array) -> Array:
    """Rotation [3, 3] of axis times angle [3] in rad."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross, dtype=np.float64)


def about_z(angle: float) -> Array:
    """Rotation [3, 3] about the vertical."""
    return rotation_of(np.array([0.0, 0.0, angle]))


def pointing_down(yaw: float) -> Array:
    """Gripper rotation [3, 3] that looks straight down and closes its fingers along `yaw`."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]])


def facing_door(turn: float) -> Array:
    """Gripper rotation [3, 3] in the door's frame: looks along y, fingers above and below a handle turned by `turn`."""
    level = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])
    return np.asarray(rotation_of(np.array([0.0, turn, 0.0])) @ level, dtype=np.float64)


def arc(radius: float, turn: float) -> Array:
    """Offset [3] from the handle's axis, in the door's frame, of a point on a handle turned by `turn` rad."""
    return np.array([radius * np.cos(turn), 0.0, -radius * np.sin(turn)])


def tilted(rotation: Array, tilt: Array | None) -> Array:
    """`rotation` [3, 3] turned further by the world-frame rotation vector `tilt` [3]."""
    return rotation if tilt is None else rotation_of(tilt) @ rotation


def yaw_of(rotation: Array) -> float:
    """Direction of the x axis of a rotation [3, 3] seen from above, in rad."""
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def nearest_yaw(yaw: float, reference: float, symmetry: float) -> float:
    """The angle equal to `yaw` modulo `symmetry` that is nearest to `reference`, in rad."""
    return float(yaw + symmetry * np.round((reference - yaw) / symmetry))


def limited(vector: Array, limit: float) -> Array:
    """`vector` shortened to the length `limit`; its direction stays."""
    length = float(np.linalg.norm(vector))
    return vector if length <= limit else np.asarray(vector * (limit / length), dtype=np.float64)


def scalar(value: Any) -> float:
    """The one number in an observation entry of shape [] or [1]."""
    return float(np.asarray(value).reshape(-1)[0])


# The contract ---------------------------------------------------------------------------------------------------------

POSITION_UNIT = 0.05
"""Metres that one unit of dx, dy or dz asks for."""
ROTATION_UNIT = 0.5
"""Radians that one unit of droll, dpitch or dyaw asks for."""
ACTION_DIM = 7


@dataclass(frozen=True)
class Phase:
    """One part of a task: go towards `target` until it is reached or time is up.

    Tolerances are in m and rad, steps are control steps (20 per second), `speed` and `noise` scale the episode's
    own speed limit and noise level. `until` replaces the tolerances as the condition to go on.
    """

    name: str
    target: Target
    closed: bool
    position_tolerance: float = 0.01
    rotation_tolerance: float = 0.1
    min_steps: int = 1
    max_steps: int = 90
    speed: float = 1.0
    noise: float = 1.0
    until: Callable[[Observation], bool] | None = None


@dataclass(frozen=True)
class Style:
    """How one episode is driven; sampled per episode so that demonstrations differ as those of people do.

    Gains are the fraction of the remaining error asked for per step; limits and noise are in action units.
    """

    position_gain: float
    rotation_gain: float
    position_limit: float
    rotation_limit: float
    gripper_level: float
    noise: float
    tilt: Array = field(repr=False)

    @classmethod
    def sample(cls, rng: np.random.Generator, noise_scale: float) -> "Style":
        return cls(
            position_gain=rng.uniform(0.45, 0.75),
            rotation_gain=rng.uniform(0.45, 0.75),
            position_limit=rng.uniform(0.6, 1.0),
            rotation_limit=rng.uniform(0.35, 0.7),
            gripper_level=rng.uniform(0.75, 0.98),
            noise=noise_scale * rng.uniform(0.03, 0.07),
            tilt=np.append(rng.normal(0.0, 0.18, 2), 0.0),
        )


class OrnsteinUhlenbeck:
    """Correlated noise [7] with unit standard deviation and a memory of about six steps."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._state = rng.standard_normal(ACTION_DIM)

    def step(self) -> Array:
        keep = 0.85
        self._state = keep * self._state + np.sqrt(1.0 - keep**2) * self._rng.standard_normal(ACTION_DIM)
        return self._state


class Expert(ABC):
    """Contract: `reset(rng)` once per episode, then `act(observation)` until `done`."""

    task: ClassVar[str]
    max_steps: ClassVar[int] = 450

    def __init__(self, noise_scale: float = 1.0) -> None:
        """`noise_scale` 0 switches the action noise off; the per-episode style stays."""
        self._noise_scale = noise_scale
        self._phases: tuple[Phase, ...] = ()
        self._index = 0

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new episode; everything random about it comes from `rng`."""
        self.style = Style.sample(rng, self._noise_scale)
        self._phases = self.plan(rng)
        self._noise = OrnsteinUhlenbeck(rng)
        self._index = 0
        self._phase_steps = 0
        self._phase_start: Observation | None = None
        self._gripper = -self.style.gripper_level

    @abstractmethod
    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        """The phases of one episode, with its random waypoints."""

    @property
    def done(self) -> bool:
        """Whether the last phase has ended."""
        return self._index >= len(self._phases)

    @property
    def phase(self) -> str:
        """Name of the phase that is under way, "done" after the last one."""
        return "done" if self.done else self._phases[self._index].name

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Action float32 [7] in [-1, 1] for this observation; after the end it holds the last phase's target."""
        if not self._phases:
            raise RuntimeError(f"{type(self).__name__}.act was called before reset(rng)")
        if self._phase_start is None:
            self._phase_start = dict(observation)
        phase = self._phases[min(self._index, len(self._phases) - 1)]
        pose = phase.target(observation, self._phase_start)
        position_error = pose.position - gripper_position(observation)
        rotation_error = rotation_vector(pose.rotation @ gripper_rotation(observation).T)
        action = self._command(phase, position_error, rotation_error)
        self._advance(phase, observation, position_error, rotation_error)
        return action

    def _command(self, phase: Phase, position_error: Array, rotation_error: Array) -> NDArray[np.float32]:
        style = self.style
        move = limited(style.position_gain * position_error / POSITION_UNIT, style.position_limit * phase.speed)
        turn = limited(style.rotation_gain * rotation_error / ROTATION_UNIT, style.rotation_limit * phase.speed)
        goal = style.gripper_level if phase.closed else -style.gripper_level
        self._gripper += 0.6 * (goal - self._gripper)
        clean = np.concatenate([move, turn, [self._gripper]])
        self.intended = np.clip(clean, -1.0, 1.0).astype(np.float32)
        noisy = clean + phase.noise * style.noise * self._noise.step()
        return np.clip(noisy, -1.0, 1.0).astype(np.float32)

    def _advance(self, phase: Phase, observation: Observation, position_error: Array, rotation_error: Array) -> None:
        if self.done:
            return
        self._phase_steps += 1
        if phase.until is not None:
            reached = phase.until(observation)
        else:
            near = float(np.linalg.norm(position_error)) < phase.position_tolerance
            reached = near and float(np.linalg.norm(rotation_error)) < phase.rotation_tolerance
        if (reached and self._phase_steps >= phase.min_steps) or self._phase_steps >= phase.max_steps:
            self._index += 1
            self._phase_steps = 0
            self._phase_start = None
