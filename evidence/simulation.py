"""A simulated Panda arm (robosuite) that can be rewound, and that runs faster than robosuite with the same result.

robosuite spends half of its time outside the physics: on observations that nobody reads, on rewards, on looking up the
same names and matrices several times. Here the first of the 25 physics steps of a control step is robosuite's own,
which sets the controller's goal; the other 24 compute the same torques with the same functions and nothing else.
tests/evidence/test_simulation.py compares the two bit for bit.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from rfsq.evidence.schemes import Codec
from rfsq.rfsq_ref.expert import Expert, Observation, gripper_position, gripper_rotation, rotation_vector
from rfsq.rfsq_ref.experts import NutAssemblySquareExpert, NutAssemblyTightExpert, PickPlaceCanExpert, StackExpert
from rfsq.rfsq_ref.generate_demonstrations import SimulatorError, check_simulator, make_environment
from rfsq.runtime.bundle.advice import install

Array = NDArray[np.float64]

#: What experts and measures read; everything else that robosuite observes is switched off.
OBSERVED = (
    "robot0_eef_pos",
    "robot0_eef_quat_site",
    *(
        f"{body}_{part}"
        for body in ("cube", "cubeA", "cubeB", "SquareNut", "RoundNut", "Can")
        for part in ("pos", "quat")
    ),
    "door_pos",
    "handle_pos",
    "handle_qpos",
    "hinge_qpos",
)
#: Tasks that `precision` measures: their success can be judged again at any tolerance.
PRECISION_TASKS = ("Stack", "NutAssemblySquare", "NutAssemblyTight", "NutAssemblyRound", "PickPlaceCan")
#: Half the height of both nuts of robosuite, in m.
NUT_HALF_HEIGHT = 0.01
#: Half the width of the square hole in robosuite's square nut, in m.
_HALF_HOLE = 0.02275


@dataclass(frozen=True)
class Snapshot:
    """All that decides what happens next: MuJoCo's integration state, and what robosuite's objects remember.

    step, time: of the episode, time in s; objects: attributes of the controllers and the observables, in this order.
    """

    physics: Array
    step: int
    time: float
    gripper: Array
    objects: tuple[dict[str, Any], ...]


class Simulation:
    """One episode of one task, that can be driven again and again from its beginning, or from any saved state.

    Results are the same on the same kind of processor; another one rounds differently.
    """

    def __init__(self, task: str, seed: int) -> None:
        """Raises SimulatorError where the simulator is missing, or its controller is not the one known here."""
        check_simulator()
        import mujoco

        if task == NutAssemblyTightExpert.task:
            _register_tight_task()
        self.task, self.seed = task, seed
        self._mujoco = mujoco
        self._parts = mujoco.mjtState.mjSTATE_INTEGRATION
        self._environment = environment = make_environment(task, seed)
        environment.reset()
        robot = environment.robots[0]
        self._model, self._data = environment.sim.model._model, environment.sim.data._data
        self._arm = robot.composite_controller.part_controllers["right"]
        self._gripper = robot.gripper["right"]
        _check_controller(self._arm)
        self._site = self._model.site(self._arm.ref_name).id
        self._joints: Any = self._arm.qvel_index
        self._actuators = np.asarray(robot._ref_actuators_indexes_dict["right"])
        self._limits = environment.sim.model.actuator_ctrlrange[self._actuators].T
        for name, observable in environment._observables.items():
            if name not in OBSERVED and observable.is_enabled():
                observable.set_enabled(False)
        self._seen = [seen for seen in environment._observables.values() if seen.is_enabled()]
        self._remembering = (self._arm, robot.composite_controller.part_controllers["right_gripper"], *self._seen)
        self._beginning = self.save()

    def reset(self) -> dict[str, Any]:
        """Back to the beginning of the episode; the first observation."""
        self.restore(self._beginning)
        return self._observe()

    def step(self, action: NDArray[np.float32]) -> dict[str, Any]:
        """Execute one action float32 [7], clipped to [-1, 1] by the controller, for 50 ms; the observation after it."""
        environment = self._environment
        environment.timestep += 1
        self._mujoco.mj_step1(self._model, self._data)
        environment._pre_action(action, True)
        self._mujoco.mj_step2(self._model, self._data)
        environment._update_observables()
        self._hold_goal(int(environment.control_timestep / environment.model_timestep) - 1)
        environment.cur_time += environment.control_timestep
        return self._observe()

    def succeeded(self) -> bool:
        """Whether the task is solved now, by robosuite's own check."""
        return bool(self._environment._check_success())

    def save(self) -> Snapshot:
        """A copy of the present state."""
        physics = np.empty(self._mujoco.mj_stateSize(self._model, self._parts))
        self._mujoco.mj_getState(self._model, self._data, physics, self._parts)
        environment = self._environment
        return Snapshot(
            physics,
            environment.timestep,
            environment.cur_time,
            np.array(self._gripper.current_action),
            tuple(_copies(vars(remembering)) for remembering in self._remembering),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Rewind to the state in which `snapshot` was taken; go on with `step`.

        What MuJoCo derives from its state (body positions, contacts) is computed anew by the next step.
        """
        self._mujoco.mj_setState(self._model, self._data, snapshot.physics, self._parts)
        environment = self._environment
        environment.timestep, environment.cur_time = snapshot.step, snapshot.time
        self._gripper.current_action = np.copy(snapshot.gripper)
        for remembering, attributes in zip(self._remembering, snapshot.objects, strict=True):
            vars(remembering).update(_copies(attributes))

    def close(self) -> None:
        self._environment.close()

    def _observe(self) -> dict[str, Any]:
        return {seen.name: seen.obs for seen in self._seen}

    def _hold_goal(self, steps: int) -> None:
        """Drive `steps` physics steps towards the goal that is set.

        The torques are those of robosuite's OperationalSpaceController.run_controller, operation by operation. The
        gripper's command stays as the first physics step set it, and the base of the arm does not move.
        """
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        mujoco, model, data, arm = self._mujoco, self._model, self._data, self._arm
        joints, lower, upper = self._joints, self._limits[0], self._limits[1]
        goal_position = arm.origin_pos + np.dot(arm.origin_ori, arm.goal_pos)
        goal_rotation = np.dot(arm.origin_ori, arm.goal_ori)
        stiffness, damping = arm.kp, arm.kd
        jacobian_position, jacobian_rotation = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        full_mass = np.zeros((model.nv, model.nv))
        site_position, site_rotation = data.site_xpos[self._site], data.site_xmat[self._site].reshape(3, 3)
        cache = self._environment._obs_cache
        timestep = self._environment.model_timestep
        for _ in range(steps):
            mujoco.mj_step1(model, data)
            mujoco.mj_jacSite(model, data, jacobian_position, jacobian_rotation, self._site)
            mujoco.mj_fullM(model, full_mass, data.qM)
            velocity = data.qvel
            # Indexed one after the other as robosuite does it: the memory order that results decides the rounding.
            mass = full_mass[joints, :][:, joints]
            j_position, j_rotation = arm.J_pos, arm.J_ori
            j_position[:, :] = jacobian_position[:, joints]
            j_rotation[:, :] = jacobian_rotation[:, joints]
            arm.J_full[:3], arm.J_full[3:] = j_position, j_rotation
            rotation = np.array(site_rotation)
            force = (goal_position - site_position) * stiffness[0:3]
            force += -np.dot(jacobian_position, velocity) * damping[0:3]
            torque = orientation_error(goal_rotation, rotation) * stiffness[3:6]
            torque += -np.dot(jacobian_rotation, velocity) * damping[3:6]
            _, lambda_position, lambda_rotation, nullspace = opspace_matrices(mass, arm.J_full, j_position, j_rotation)
            wrench = np.concatenate([np.dot(lambda_position, force), np.dot(lambda_rotation, torque)])
            torques = np.dot(arm.J_full.T, wrench) + data.qfrc_bias[joints]
            torques += nullspace_torques(
                mass, nullspace, arm.initial_joint, data.qpos[arm.qpos_index], velocity[joints]
            )
            data.ctrl[self._actuators] = np.minimum(np.maximum(torques, lower), upper)
            mujoco.mj_step2(model, data)
            for seen in self._seen:
                seen.update(timestep=timestep, obs_cache=cache)


def _copies(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an object that change from step to step: arrays, numbers, flags, and those not set yet."""
    return {
        name: np.copy(value) if isinstance(value, np.ndarray) else value
        for name, value in attributes.items()
        if isinstance(value, np.ndarray | np.generic | float | bool | None)
    }


def _check_controller(arm: Any) -> None:
    expected = {
        "impedance_mode": "fixed",
        "input_type": "delta",
        "input_ref_frame": "base",
        "uncoupling": True,
        "use_ori": True,
        "interpolator_pos": None,
        "interpolator_ori": None,
        "lite_physics": True,
    }
    found = {name: getattr(arm, name, "missing") for name in expected}
    if found != expected:
        raise SimulatorError(
            f"the arm's controller is {found}; expected {expected}; install the versions of {install('sim')}"
        )


def _register_tight_task() -> None:
    """Make robosuite know NutAssemblyTight: NutAssemblySquare with a thicker peg."""
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.environments.manipulation.nut_assembly import NutAssemblySquare

    if NutAssemblyTightExpert.task in REGISTERED_ENVS:
        return

    # robosuite registers every class that is derived from one of its environments, by its name.
    class NutAssemblyTight(NutAssemblySquare):  # type: ignore[misc]
        def edit_model_xml(self, xml: str) -> str:
            tree = ElementTree.fromstring(super().edit_model_xml(xml))
            geoms = tree.findall(".//body[@name='peg1']/geom")
            if not geoms:
                raise SimulatorError(f"the arena has no peg named peg1; install the versions of {install('sim')}")
            half_width = _HALF_HOLE - NutAssemblyTightExpert.play
            for geom in geoms:
                height = geom.attrib["size"].split()[2]
                geom.set("size", f"{half_width} {half_width} {height}")
            return ElementTree.tostring(tree, encoding="unicode")


# The control loop of a vision-language-action policy ------------------------------------------------------------------
#
# It observes, plans a chunk of actions, executes it and observes again. The policy is a scripted expert, which plans by
# driving the simulation ahead in closed loop. Then the simulation is rewound and executes the planned actions as the
# codec decodes them. So every codec stands between the same policy and the same robot, and with raw actions the robot
# does exactly what was planned.


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
