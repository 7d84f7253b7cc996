"""What `rfsq_ref.experts` promises without a simulator: sound geometry, bounded actions, an end to every episode."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.rfsq_ref.expert import (
    ACTION_DIM,
    POSITION_UNIT,
    ROTATION_UNIT,
    Expert,
    OrnsteinUhlenbeck,
    Style,
    about_z,
    gripper_position,
    limited,
    nearest_yaw,
    pointing_down,
    quaternion_matrix,
    rotation_of,
    rotation_vector,
    tilted,
    yaw_of,
)
from rfsq.rfsq_ref.experts import EXPERTS, HELD_OUT_EXPERTS, LiftExpert, NutAssemblySquareExpert

ANGLES = st.floats(-3.1, 3.1)
VECTORS = st.lists(st.floats(-1.7, 1.7), min_size=3, max_size=3).map(np.array)


def half_turn_about_x() -> list[float]:
    """Looking straight down, as x y z w."""
    return [1.0, 0.0, 0.0, 0.0]


ALL_EXPERTS = {**EXPERTS, **HELD_OUT_EXPERTS}


def still_observation() -> dict[str, Any]:
    """Of a scene with every object, in which nothing is reached and nothing moves."""
    objects = {}
    for name, place in (
        ("cube", [0.1, 0.0, 0.82]),
        ("cubeA", [0.1, 0.0, 0.82]),
        ("cubeB", [-0.1, 0.1, 0.82]),
        ("SquareNut", [0.1, 0.1, 0.83]),
        ("RoundNut", [0.1, -0.1, 0.83]),
        ("Can", [0.1, -0.2, 0.86]),
    ):
        objects |= {f"{name}_pos": np.array(place), f"{name}_quat": np.array([0.0, 0.0, 0.0, 1.0])}
    door = {
        "door_pos": np.array([-0.1, -0.35, 1.1]),
        "handle_pos": np.array([-0.2, -0.4, 1.08]),
        "handle_qpos": np.array([0.0]),
        "hinge_qpos": np.array([0.0]),
    }
    robot = {"robot0_eef_pos": np.array([0.0, 0.0, 1.0]), "robot0_eef_quat_site": np.array(half_turn_about_x())}
    return objects | door | robot


def act_until_done(expert: Expert, observation: dict[str, Any], seed: int = 0) -> np.ndarray:
    expert.reset(np.random.default_rng(seed))
    actions = []
    while not expert.done:
        actions.append(expert.act(observation))
        assert len(actions) <= 2000, "the expert never ends"
    return np.stack(actions)


# Experts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL_EXPERTS)
def test_actions_are_float32_in_the_unit_box_and_episodes_end(task: str) -> None:
    actions = act_until_done(ALL_EXPERTS[task](), still_observation())
    assert actions.dtype == np.float32
    assert actions.shape[1] == ACTION_DIM
    assert np.abs(actions).max() <= 1.0


@pytest.mark.parametrize("task", ALL_EXPERTS)
def test_the_same_seed_drives_the_same_way(task: str) -> None:
    first, again, other = (act_until_done(ALL_EXPERTS[task](), still_observation(), seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


@pytest.mark.parametrize("task", ALL_EXPERTS)
def test_the_gripper_opens_first_and_closes_later(task: str) -> None:
    gripper = act_until_done(ALL_EXPERTS[task](noise_scale=0.0), still_observation())[:, -1]
    assert gripper[0] < -0.5
    assert gripper.max() > 0.5


def test_the_expert_moves_towards_its_target() -> None:
    """A gripper that does exactly what it is told arrives, phase after phase."""
    expert = LiftExpert(noise_scale=0.0)
    expert.reset(np.random.default_rng(0))
    observation = still_observation()
    names = []
    while not expert.done and len(names) < expert.max_steps:
        names.append(expert.phase)
        action = expert.act(observation)
        position = gripper_position(observation) + POSITION_UNIT * action[:3]
        turn = rotation_of(ROTATION_UNIT * action[3:6].astype(np.float64))
        rotation = turn @ quaternion_matrix(observation["robot0_eef_quat_site"])
        observation = dict(observation, robot0_eef_pos=position, robot0_eef_quat_site=quaternion_of(rotation))
    assert expert.phase == "done"
    assert list(dict.fromkeys(names)) == ["approach", "align", "descend", "grasp", "lift", "carry", "hold"]
    # Faster than the time each phase may take at most.
    assert len(names) < 200


def quaternion_of(rotation: np.ndarray) -> np.ndarray:
    """x y z w, by the eigenvector that belongs to the largest eigenvalue of Bar-Itzhack's matrix."""
    m = rotation
    matrix = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], m[1, 0] + m[0, 1], m[2, 0] + m[0, 2], m[2, 1] - m[1, 2]],
            [m[1, 0] + m[0, 1], m[1, 1] - m[0, 0] - m[2, 2], m[2, 1] + m[1, 2], m[0, 2] - m[2, 0]],
            [m[2, 0] + m[0, 2], m[2, 1] + m[1, 2], m[2, 2] - m[0, 0] - m[1, 1], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], np.trace(m)],
        ]
    )
    return np.linalg.eigh(matrix)[1][:, -1]


def test_experts_of_unseen_tasks_are_not_among_those_of_the_demonstrations() -> None:
    """Their place among EXPERTS decides the seeds of the embedded demonstrations."""
    assert list(EXPERTS) == ["Lift", "Stack", "NutAssemblySquare", "PickPlaceCan", "Door"]
    assert set(HELD_OUT_EXPERTS) == {"NutAssemblyTight", "NutAssemblyRound"}


@pytest.mark.parametrize("task", HELD_OUT_EXPERTS)
def test_experts_of_unseen_nuts_plan_as_the_one_of_the_square_nut(task: str) -> None:
    known, unseen = NutAssemblySquareExpert(), HELD_OUT_EXPERTS[task]()
    for expert in (known, unseen):
        expert.reset(np.random.default_rng(2))
    assert known.style.position_gain == unseen.style.position_gain
    assert [phase.name for phase in known._phases] == [phase.name for phase in unseen._phases]
    tolerances = {phase.name: phase.position_tolerance for phase in unseen._phases}
    assert tolerances["align above"] == unseen.aligned[0] <= known.aligned[0]


def test_acting_before_a_reset_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"called before reset\(rng\)"):
        LiftExpert().act(still_observation())


def test_no_noise_leaves_the_style() -> None:
    quiet = Style.sample(np.random.default_rng(0), 0.0)
    loud = Style.sample(np.random.default_rng(0), 1.0)
    assert quiet.noise == 0.0
    assert 0.03 <= loud.noise <= 0.07
    assert (quiet.position_gain, quiet.gripper_level) == (loud.position_gain, loud.gripper_level)


def test_the_noise_has_unit_deviation_and_a_memory() -> None:
    noise = OrnsteinUhlenbeck(np.random.default_rng(0))
    samples = np.stack([noise.step() for _ in range(20_000)])
    assert samples.std() == pytest.approx(1.0, abs=0.03)
    correlation = (samples[1:] * samples[:-1]).mean() / samples.var()
    assert correlation == pytest.approx(0.85, abs=0.02)


# Geometry ------------------------------------------------------------------------------------------------------------


@given(VECTORS)
def test_rotation_vectors_come_back(vector: np.ndarray) -> None:
    np.testing.assert_allclose(rotation_vector(rotation_of(vector)), vector, atol=1e-7)


@given(VECTORS)
def test_rotations_are_rotations(vector: np.ndarray) -> None:
    rotation = rotation_of(vector)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(quaternion_matrix(quaternion_of(rotation)), rotation, atol=1e-9)


@given(ANGLES)
def test_yaws_come_back(angle: float) -> None:
    assert yaw_of(about_z(angle)) == pytest.approx(angle, abs=1e-9)
    assert yaw_of(pointing_down(angle)) == pytest.approx(angle, abs=1e-9)
    np.testing.assert_allclose(pointing_down(angle)[:, 2], [0, 0, -1])


@given(st.floats(-20, 20), st.floats(-20, 20), st.sampled_from([np.pi / 2, np.pi, 2 * np.pi]))
def test_the_nearest_yaw_is_an_equal_one_and_near(yaw: float, reference: float, symmetry: float) -> None:
    found = nearest_yaw(yaw, reference, symmetry)
    assert abs(found - reference) <= symmetry / 2 + 1e-9
    turns = (found - yaw) / symmetry
    assert turns == pytest.approx(round(turns), abs=1e-9)


@given(VECTORS, st.floats(0.01, 2))
def test_limited_vectors_keep_their_direction(vector: np.ndarray, limit: float) -> None:
    found = limited(vector, limit)
    length = np.linalg.norm(vector)
    assert np.linalg.norm(found) == pytest.approx(min(length, limit), abs=1e-12)
    np.testing.assert_allclose(found * length, vector * np.linalg.norm(found), atol=1e-9)


def test_a_tilt_is_a_turn_in_the_world() -> None:
    tilt = np.array([0.3, 0.0, 0.0])
    np.testing.assert_allclose(tilted(about_z(1.0), tilt), rotation_of(tilt) @ about_z(1.0))
    np.testing.assert_array_equal(tilted(about_z(1.0), None), about_z(1.0))
