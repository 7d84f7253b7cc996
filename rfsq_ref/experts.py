"""Scripted experts for five simulated Panda tasks (robosuite), one class per task, all with the same contract.

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

Array = NDArray[np.float64]
Observation = Mapping[str, Any]

POSITION_UNIT = 0.05
"""Metres that one unit of dx, dy or dz asks for."""
ROTATION_UNIT = 0.5
"""Radians that one unit of droll, dpitch or dyaw asks for."""
ACTION_DIM = 7


@dataclass(frozen=True)
class Pose:
    """Gripper pose in the world frame: position [3] in m; rotation [3, 3], x closes the fingers, z points out."""

    position: Array
    rotation: Array


Target = Callable[[Observation, Observation], Pose]
"""(observation now, observation when the phase began) -> where the gripper should be."""


@dataclass(frozen=True)
class Phase:
    """One step of a task: go towards `target` until it is reached or time is up.

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
        """True once the last phase has ended."""
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


class LiftExpert(Expert):
    """Grasp the cube along its faces, lift it and carry it, turned, to a random place in the air."""

    task = "Lift"

    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        hover = np.append(rng.uniform(-0.02, 0.02, 2), rng.uniform(0.06, 0.14))
        grasp = np.array([0.0, 0.0, rng.uniform(-0.004, 0.006)])
        rise = np.array([0.0, 0.0, rng.uniform(0.08, 0.16)])
        carry = np.append(rng.uniform(-0.12, 0.12, 2), rng.uniform(-0.03, 0.06))
        turn = rng.uniform(-0.7, 0.7)
        tilt = self.style.tilt
        return (
            Phase("approach", above("cube", hover, np.pi / 2, tilt), closed=False, position_tolerance=0.02),
            Phase("align", above("cube", np.append(0.3 * hover[:2], 0.05), np.pi / 2), closed=False),
            Phase("descend", above("cube", grasp, np.pi / 2), False, 0.005, 0.06, speed=0.6, noise=0.6),
            Phase("grasp", above("cube", grasp, np.pi / 2), True, min_steps=10, max_steps=14, noise=0.4),
            Phase("lift", relative(rise), True, 0.02, 0.3, speed=0.8),
            Phase("carry", relative(carry, turn, 2.0 * tilt), True, 0.015, 0.08),
            Phase("hold", relative(np.zeros(3)), True, min_steps=8, max_steps=14),
        )


class StackExpert(Expert):
    """Put the small cube on the large one, faces aligned."""

    task = "Stack"
    resting_height: ClassVar[float] = 0.045

    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        hover = np.append(rng.uniform(-0.015, 0.015, 2), rng.uniform(0.07, 0.14))
        grasp = np.array([0.0, 0.0, rng.uniform(0.0, 0.008)])
        rise = np.array([0.0, 0.0, rng.uniform(0.09, 0.15)])
        over = np.append(rng.uniform(-0.015, 0.015, 2), rng.uniform(0.09, 0.13))
        back = np.append(rng.uniform(-0.05, 0.05, 2), rng.uniform(0.08, 0.14))
        tilt = self.style.tilt
        close_above = np.array([0.0, 0.0, self.resting_height + 0.025])
        resting = np.array([0.0, 0.0, self.resting_height + rng.uniform(0.0, 0.002)])
        return (
            Phase("approach", beside("cubeA", "cubeB", hover, tilt), closed=False, position_tolerance=0.02),
            Phase("align", above("cubeA", np.append(0.3 * hover[:2], 0.06), np.pi / 2), closed=False),
            Phase("descend", above("cubeA", grasp, np.pi / 2), False, 0.005, 0.06, speed=0.6, noise=0.6),
            Phase("grasp", above("cubeA", grasp, np.pi / 2), True, min_steps=10, max_steps=14, noise=0.4),
            Phase("lift", relative(rise), True, 0.02, 0.3, speed=0.8),
            Phase("transport", held_over("cubeA", "cubeB", over, np.pi / 2, tilt), True, 0.02, 0.2),
            Phase("align above", held_over("cubeA", "cubeB", close_above, np.pi / 2), True, 0.004, 0.06, noise=0.5),
            Phase("lower", held_over("cubeA", "cubeB", resting, np.pi / 2), True, 0.0025, 0.06, 4, 50, 0.4, 0.3),
            Phase("release", relative(np.zeros(3)), False, min_steps=9, max_steps=12, noise=0.2),
            Phase("rise", relative(np.array([0.0, 0.0, 0.05])), False, 0.015, 0.3, speed=0.6, noise=0.4),
            Phase("retreat", relative(back, 0.0, 2.0 * tilt), closed=False, position_tolerance=0.03, max_steps=40),
        )


class NutAssemblySquareExpert(Expert):
    """Thread the square nut over the square peg: 6.75 mm of play on each side."""

    task = "NutAssemblySquare"
    nut: ClassVar[str] = "SquareNut"
    # The arena fixes the peg and does not observe it.
    peg: ClassVar[Array] = np.array([0.23, 0.10, 0.0])
    peg_top: ClassVar[float] = 0.95
    handle: ClassVar[Array] = np.array([0.054, 0.0, 0.0])
    # The peg is square, but with the handle pointing away from the robot the arm is stretched to its limit.
    handle_yaws: ClassVar[tuple[float, ...]] = (0.5 * np.pi, np.pi, 1.5 * np.pi)
    # How well the nut is aligned above the peg before it is lowered, in m and rad.
    aligned: ClassVar[tuple[float, float]] = (0.004, 0.06)

    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        along = np.array([rng.uniform(-0.004, 0.008), 0.0, 0.0]) + self.handle
        hover = np.append(rng.uniform(-0.02, 0.02, 2), rng.uniform(0.07, 0.14))
        grasp = np.array([0.0, 0.0, rng.uniform(0.002, 0.006)])
        rise = np.array([0.0, 0.0, rng.uniform(0.15, 0.19)])
        far = np.append(rng.uniform(-0.02, 0.02, 2), self.peg_top + rng.uniform(0.045, 0.075))
        near = np.array([0.0, 0.0, self.peg_top + rng.uniform(0.02, 0.03)])
        low = np.array([0.0, 0.0, self.peg_top - rng.uniform(0.025, 0.04)])
        tilt = self.style.tilt
        return (
            Phase("approach", self._handle(along, hover, tilt), closed=False, position_tolerance=0.02),
            Phase("align", self._handle(along, np.append(0.2 * hover[:2], 0.05)), closed=False),
            Phase("descend", self._handle(along, grasp), False, 0.005, 0.06, speed=0.6, noise=0.4),
            Phase("grasp", self._handle(along, grasp), True, min_steps=10, max_steps=14, noise=0.4),
            Phase("lift", relative(rise), True, 0.02, 0.3, speed=0.8),
            Phase("transport", self._over_peg(far, tilt), True, 0.025, 0.2),
            Phase("align above", self._over_peg(near), True, *self.aligned, min_steps=4, noise=0.25),
            Phase(
                "insert",
                self._over_peg(low),
                True,
                max_steps=60,
                speed=0.5,
                noise=0.4,
                until=lambda now: bool(now[f"{self.nut}_pos"][2] < low[2] + 0.003),
            ),
            Phase("release", relative(np.zeros(3)), False, min_steps=12, max_steps=14, noise=0.3),
            Phase("retreat", relative(np.array([0.0, 0.0, 0.1])), False, 0.03, 0.3, max_steps=40, speed=0.8),
        )

    def _handle(self, along: Array, offset: Array, tilt: Array | None = None) -> Target:
        def target(now: Observation, start: Observation) -> Pose:
            rotation = quaternion_matrix(now[f"{self.nut}_quat"])
            heading = nearest_yaw(yaw_of(rotation) + np.pi / 2, gripper_yaw(start), np.pi)
            return Pose(now[f"{self.nut}_pos"] + rotation @ along + offset, tilted(pointing_down(heading), tilt))

        return target

    def _over_peg(self, offset: Array, tilt: Array | None = None) -> Target:
        def target(now: Observation, start: Observation) -> Pose:
            begun = yaw_of(quaternion_matrix(start[f"{self.nut}_quat"]))
            goal = min(
                (nearest_yaw(yaw, begun, 2 * np.pi) for yaw in self.handle_yaws), key=lambda yaw: abs(yaw - begun)
            )
            return held_pose(now, self.nut, self.peg + offset, goal, 2 * np.pi, tilt)

        return target


class NutAssemblyTightExpert(NutAssemblySquareExpert):
    """The square nut over a thicker square peg, 2 mm of play on each side: aligned more finely before it is lowered."""

    task = "NutAssemblyTight"
    play: ClassVar[float] = 0.002
    aligned = (0.0015, 0.02)


class NutAssemblyRoundExpert(NutAssemblySquareExpert):
    """Thread the round nut over the round peg: 11.2 mm of play on each side."""

    task = "NutAssemblyRound"
    nut = "RoundNut"
    peg: ClassVar[Array] = np.array([0.23, -0.10, 0.0])
    handle: ClassVar[Array] = np.array([0.06, 0.0, 0.0])


class PickPlaceCanExpert(Expert):
    """Carry the can over the walls into its compartment of the second bin and set it down, turned at random."""

    task = "PickPlaceCan"
    # The arena fixes the compartment and does not observe it; its far half is out of the arm's reach.
    corner: ClassVar[Array] = np.array([0.10, 0.28, 0.0])

    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        grip_yaw = np.pi / 2 + rng.uniform(-0.8, 0.8)
        hover = np.append(rng.uniform(-0.02, 0.02, 2), rng.uniform(0.09, 0.15))
        grasp = np.array([0.0, 0.0, rng.uniform(0.016, 0.024)])
        rise = np.array([0.0, 0.0, rng.uniform(0.17, 0.23)])
        spot = self.corner + np.append(rng.uniform(0.045, 0.08, 2), 0.0)
        self.spot = spot
        over = np.array([0.0, 0.0, rng.uniform(0.97, 1.01)])
        down = np.array([0.0, 0.0, rng.uniform(0.868, 0.876)])
        place_yaw = np.pi / 2 + rng.uniform(-0.8, 0.8)
        tilt = self.style.tilt
        return (
            Phase("approach", self._can(grip_yaw, hover, tilt), closed=False, position_tolerance=0.02),
            Phase("align", self._can(grip_yaw, np.append(0.2 * hover[:2], 0.08)), closed=False),
            Phase("descend", self._can(grip_yaw, grasp), False, 0.006, 0.08, speed=0.6, noise=0.6),
            Phase("grasp", self._can(grip_yaw, grasp), True, min_steps=10, max_steps=14, noise=0.4),
            Phase("lift", relative(rise), True, 0.03, 0.3, speed=0.9),
            Phase("transport", self._place(spot + over, place_yaw, tilt), True, 0.025, 0.2, max_steps=130),
            Phase("lower", self._place(spot + down, place_yaw), True, 0.012, 0.15, max_steps=50, speed=0.6, noise=0.6),
            Phase("release", relative(np.zeros(3)), False, min_steps=9, max_steps=12, noise=0.3),
            Phase("retreat", relative(np.array([0.0, 0.0, 0.14])), False, 0.04, 0.3, max_steps=40),
        )

    def _can(self, yaw: float, offset: Array, tilt: Array | None = None) -> Target:
        def target(now: Observation, start: Observation) -> Pose:
            del start
            return Pose(now["Can_pos"] + offset, tilted(pointing_down(yaw), tilt))

        return target

    def _place(self, goal: Array, yaw: float, tilt: Array | None = None) -> Target:
        def target(now: Observation, start: Observation) -> Pose:
            del start
            return Pose(gripper_position(now) + goal - now["Can_pos"], tilted(pointing_down(yaw), tilt))

        return target


class DoorExpert(Expert):
    """Grip the horizontal handle from the front, turn it down on its arc, pull the door open, hold it."""

    task = "Door"
    # Lengths of the door model in the door's own frame (x towards the hinge, y into the door), in m.
    latch: ClassVar[Array] = np.array([-0.175, -0.10, -0.025])
    site_radius: ClassVar[float] = 0.125
    hinge: ClassVar[Array] = np.array([0.255, 0.0, 0.0])

    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        radius = rng.uniform(0.095, 0.12)
        away = rng.uniform(0.07, 0.11)
        turned = rng.uniform(1.28, 1.38)
        opened = rng.uniform(0.365, 0.385)
        lower = rng.uniform(1.45, 1.5)
        pull = rng.uniform(0.12, 0.2)
        side = np.append(rng.uniform(-0.03, 0.03, 1), [0.0, rng.uniform(-0.02, 0.03)])
        return (
            Phase("approach", self._grip(radius, away, side=side), False, 0.03, 0.15, max_steps=140),
            Phase("align", self._grip(radius, 0.06), False, 0.012, 0.08, noise=0.7),
            Phase("reach", self._grip(radius), False, 0.008, 0.08, speed=0.6, noise=0.6),
            Phase("grasp", self._grip(radius), True, min_steps=10, max_steps=14, noise=0.4),
            Phase(
                "turn handle",
                self._grip(radius, handle_goal=lower),
                True,
                max_steps=120,
                until=lambda now: scalar(now["handle_qpos"]) > turned,
            ),
            Phase(
                "pull",
                self._grip(radius, handle_goal=lower, swing=pull),
                True,
                max_steps=120,
                until=lambda now: scalar(now["hinge_qpos"]) > opened,
            ),
            Phase(
                "hold open",
                self._grip(radius, handle_goal=lower, swing=0.08),
                True,
                min_steps=10,
                max_steps=16,
                noise=0.5,
            ),
        )

    def _grip(
        self,
        radius: float,
        away: float = 0.0,
        handle_goal: float | None = None,
        swing: float = 0.0,
        side: Array | None = None,
    ) -> Target:
        """On the handle bar, `radius` m from its axis and `away` m in front; up to 0.4 rad ahead of the handle on the
        way to `handle_goal`, `swing` rad ahead of the door."""

        def target(now: Observation, start: Observation) -> Pose:
            del start
            handle = scalar(now["handle_qpos"])
            turn = handle if handle_goal is None else handle + float(np.clip(handle_goal - handle, -0.4, 0.4))
            shift = np.zeros(3) if side is None else side
            seen = self.latch + arc(self.site_radius, handle)
            offset = now["handle_pos"] - now["door_pos"]
            yaw = np.arctan2(offset[1], offset[0]) - np.arctan2(seen[1], seen[0])
            pivot = now["door_pos"] + about_z(yaw) @ self.hinge
            frame = about_z(yaw + swing)
            local = self.latch + arc(radius, turn) - np.array([0.0, away, 0.0]) + shift - self.hinge
            return Pose(pivot + frame @ local, frame @ facing_door(turn))

        return target


EXPERTS: dict[str, type[Expert]] = {
    expert.task: expert for expert in (LiftExpert, StackExpert, NutAssemblySquareExpert, PickPlaceCanExpert, DoorExpert)
}
"""Experts of the demonstrations. Their order decides the seeds: a new one goes to the end."""
HELD_OUT_EXPERTS: dict[str, type[Expert]] = {
    expert.task: expert for expert in (NutAssemblyTightExpert, NutAssemblyRoundExpert)
}
"""Experts of tasks that the demonstrations do not hold, so that no tokenizer has seen them."""


def above(name: str, offset: Array, symmetry: float, tilt: Array | None = None) -> Target:
    """At the object plus `offset` [3], fingers along the face (every `symmetry` rad) nearest to the gripper's yaw."""

    def target(now: Observation, start: Observation) -> Pose:
        heading = nearest_yaw(yaw_of(quaternion_matrix(now[f"{name}_quat"])), gripper_yaw(start), symmetry)
        return Pose(now[f"{name}_pos"] + offset, tilted(pointing_down(heading), tilt))

    return target


def beside(name: str, obstacle: str, offset: Array, tilt: Array) -> Target:
    """Like `above` for a cube, but opening the fingers where a close obstacle does not stand in their way."""

    def target(now: Observation, start: Observation) -> Pose:
        towards = start[f"{obstacle}_pos"] - start[f"{name}_pos"]
        wanted = gripper_yaw(start)
        if np.linalg.norm(towards[:2]) < 0.11:
            wanted = nearest_yaw(np.arctan2(towards[1], towards[0]) + np.pi / 2, wanted, np.pi)
        heading = nearest_yaw(yaw_of(quaternion_matrix(now[f"{name}_quat"])), wanted, np.pi / 2)
        return Pose(now[f"{name}_pos"] + offset, tilted(pointing_down(heading), tilt))

    return target


def held_over(held: str, base: str, offset: Array, symmetry: float, tilt: Array | None = None) -> Target:
    """Brings the held object to the base's position plus `offset` [3] and to its yaw (modulo `symmetry`)."""

    def target(now: Observation, start: Observation) -> Pose:
        del start
        goal_yaw = yaw_of(quaternion_matrix(now[f"{base}_quat"]))
        return held_pose(now, held, now[f"{base}_pos"] + offset, goal_yaw, symmetry, tilt)

    return target


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

    def target(now: Observation, start: Observation) -> Pose:
        del now
        return Pose(gripper_position(start) + shift, tilted(about_z(turn) @ gripper_rotation(start), tilt))

    return target


def gripper_position(observation: Observation) -> Array:
    """[3] in m, between the finger pads."""
    return np.asarray(observation["robot0_eef_pos"], dtype=np.float64)


def gripper_rotation(observation: Observation) -> Array:
    """[3, 3]; the site's quaternion, because the body's is turned by 90 degrees against what the controller moves."""
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
