"""Scripted experts for simulated Panda tasks (robosuite), one class per task, all with the contract of `Expert`."""

from typing import ClassVar

import numpy as np

from rfsq.rfsq_ref.expert import (
    Array,
    Expert,
    Observation,
    Phase,
    Pose,
    Target,
    about_z,
    above,
    arc,
    facing_door,
    gripper_position,
    gripper_yaw,
    held_over,
    held_pose,
    nearest_yaw,
    pointing_down,
    quaternion_matrix,
    relative,
    scalar,
    tilted,
    yaw_of,
)


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
            Phase("approach", above("cubeA", hover, np.pi / 2, tilt, "cubeB"), closed=False, position_tolerance=0.02),
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
        return lambda now, _start: Pose(now["Can_pos"] + offset, tilted(pointing_down(yaw), tilt))

    def _place(self, goal: Array, yaw: float, tilt: Array | None = None) -> Target:
        return lambda now, _start: Pose(gripper_position(now) + goal - now["Can_pos"], tilted(pointing_down(yaw), tilt))


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
TASKS = EXPERTS | HELD_OUT_EXPERTS
"""Every task that can be rolled out, with the expert that solves it."""
