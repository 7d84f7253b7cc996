"""What `evidence.simulation` promises: robosuite's own trajectories, faster, and a rewind that leaves no trace.

Needs the simulator; run with the environment that has `.[sim]`.
"""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="the simulator is not installed here: pip install '.[sim]'")

from rfsq.evidence.simulation import OBSERVED, Simulation, plan
from rfsq.rfsq_ref.expert import Expert
from rfsq.rfsq_ref.experts import TASKS, NutAssemblyTightExpert
from rfsq.rfsq_ref.generate_demonstrations import make_environment

SEED = 5
STEPS = 24


def expert_of(task: str) -> Expert:
    expert = TASKS[task]()
    expert.reset(np.random.default_rng(SEED))
    return expert


def seen_alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "NutAssemblyTight"])
def test_every_observation_and_joint_is_bit_for_bit_that_of_robosuite(task: str) -> None:
    simulation, environment, expert = Simulation(task, SEED), make_environment(task, SEED), expert_of(task)
    expected, found = environment.reset(), simulation.reset()
    assert set(found) == set(OBSERVED) & set(expected)
    for _ in range(STEPS):
        assert seen_alike(expected, found)
        action = expert.act(found)
        expected, found = environment.step(action)[0], simulation.step(action)
    np.testing.assert_array_equal(environment.sim.data.qpos, simulation._data.qpos)
    np.testing.assert_array_equal(environment.sim.data.qvel, simulation._data.qvel)
    assert simulation.succeeded() == bool(environment._check_success())
    simulation.close()
    environment.close()


@pytest.mark.parametrize("task", ["Stack", "NutAssemblyTight"])
def test_planning_ahead_leaves_no_trace_and_foresees_what_raw_actions_do(task: str) -> None:
    undisturbed, simulation = Simulation(task, SEED), Simulation(task, SEED)
    expert, planning = expert_of(task), expert_of(task)
    expected, found = undisturbed.reset(), simulation.reset()
    for _ in range(STEPS // 8):
        actions, foreseen = plan(simulation, planning, found, 8)
        for action, ahead in zip(actions, foreseen, strict=True):
            np.testing.assert_array_equal(action, expert.act(expected))
            np.testing.assert_array_equal(action, planning.act(found))
            expected, found = undisturbed.step(action), simulation.step(action)
            assert seen_alike(expected, found)
            assert seen_alike(expected, ahead)
    np.testing.assert_array_equal(undisturbed._data.qpos, simulation._data.qpos)


def test_an_episode_begins_again_as_it_began() -> None:
    simulation, rng = Simulation("NutAssemblyRound", SEED), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (10, 7)).astype(np.float32)
    runs = []
    for _ in range(2):
        runs.append([simulation.reset(), *(simulation.step(action) for action in actions)])
        simulation.step(-actions[0])
    assert all(seen_alike(first, second) for first, second in zip(*runs, strict=True))


def test_the_robot_clips_actions_itself_as_the_loop_does() -> None:
    wild, clipped = Simulation("Lift", SEED), Simulation("Lift", SEED)
    action = np.array([7.0, -3.0, 0.5, 4.0, -9.0, 0.1, 30.0], np.float32)
    for _ in range(3):
        assert seen_alike(wild.step(action), clipped.step(np.clip(action, -1.0, 1.0)))


def test_the_tight_peg_leaves_the_play_it_promises() -> None:
    """Read from the compiled model: the peg's half width, and where the nut's four walls begin."""
    model = Simulation("NutAssemblyTight", SEED)._model
    peg = model.body("peg1").id
    widths = [model.geom_size[geom][0] for geom in range(model.ngeom) if model.geom_bodyid[geom] == peg]
    nut = model.body("SquareNut_main").id
    walls = [
        np.abs(model.geom_pos[geom][:2]).max() - model.geom_size[geom][:2].min()
        for geom in range(model.ngeom)
        if model.geom_bodyid[geom] == nut and model.geom_contype[geom]
    ]
    assert widths
    assert set(np.round(widths, 9)) == {np.round(min(walls) - NutAssemblyTightExpert.play, 9)}
