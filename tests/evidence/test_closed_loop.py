"""What `evidence.simulation` promises, on a robot that does exactly what it is told."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from rfsq.evidence.schemes import RawCodec
from rfsq.evidence.simulation import EpisodeResult, Spread, plan, precision, run_episode
from rfsq.rfsq_ref.expert import POSITION_UNIT, ROTATION_UNIT
from rfsq.rfsq_ref.experts import (
    HELD_OUT_EXPERTS,
    LiftExpert,
    NutAssemblyRoundExpert,
    NutAssemblySquareExpert,
    PickPlaceCanExpert,
    StackExpert,
)
from tests.rfsq_ref.test_experts import still_observation


class ObedientWorld:
    """A gripper among things that never move; keeps every action it ever got, planned ones too."""

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []
        self.restored = 0
        self.reset()

    def reset(self) -> dict[str, Any]:
        self._position, self._rotation = np.array([0.0, 0.0, 1.0]), Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
        return self._observe()

    def step(self, action: np.ndarray) -> dict[str, Any]:
        self.sent.append(action)
        bounded = np.clip(action.astype(np.float64), -1, 1)
        self._position = self._position + POSITION_UNIT * bounded[:3]
        self._rotation = Rotation.from_rotvec(ROTATION_UNIT * bounded[3:6]) * self._rotation
        return self._observe()

    def save(self) -> Any:
        return self._position, self._rotation

    def restore(self, snapshot: Any) -> None:
        self._position, self._rotation = snapshot
        self.restored += 1

    def succeeded(self) -> bool:
        return bool(self._position[2] > 0.95)

    def _observe(self) -> dict[str, Any]:
        return still_observation() | {
            "robot0_eef_pos": self._position,
            "robot0_eef_quat_site": self._rotation.as_quat(),
        }


@dataclass(frozen=True)
class Shift:
    """Adds a constant to one dimension of every action."""

    dimension: int
    by: float
    name: str = "shift"

    def reconstruct(self, chunks: np.ndarray) -> np.ndarray:
        assert chunks.dtype == np.float32
        assert chunks.ndim == 3
        moved = chunks.copy()
        moved[..., self.dimension] += np.float32(self.by)
        return moved

    def bits_per_step(self, chunks: np.ndarray) -> float:
        del chunks
        return 0.0


def drive(codec: Any, chunk: int = 8, seed: int = 0) -> tuple[EpisodeResult, list[np.ndarray]]:
    world = ObedientWorld()
    result = run_episode(world, LiftExpert(), codec, np.random.default_rng(seed), chunk)
    return result, world.sent


def executed(sent: list[np.ndarray], chunk: int) -> np.ndarray:
    """Without what was only planned: every chunk is planned, then executed; the last one may end early."""
    found = []
    while sent:
        found += sent[chunk : 2 * chunk]
        sent = sent[2 * chunk :]
    return np.stack(found)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_with_raw_actions_the_loop_is_plain_control_step_by_step(chunk: int) -> None:
    world, expert = ObedientWorld(), LiftExpert()
    expert.reset(np.random.default_rng(0))
    observation, expected = world.reset(), []
    while not expert.done:
        expected.append(expert.act(observation))
        observation = world.step(expected[-1])
    result, sent = drive(RawCodec(), chunk)
    np.testing.assert_array_equal(executed(sent, chunk), np.stack(expected))
    assert result.steps == len(expected)
    assert result.tracking_mm == Spread(0.0, 0.0, 0.0)
    assert result.tracking_deg.max == pytest.approx(0.0, abs=1e-9)


def test_planning_changes_neither_world_nor_expert() -> None:
    world, expert = ObedientWorld(), LiftExpert()
    expert.reset(np.random.default_rng(3))
    observation = world.reset()
    first, foreseen = plan(world, expert, observation, 8)
    again, _ = plan(world, expert, observation, 8)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (8, 7)
    assert first.dtype == np.float32
    assert len(foreseen) == 8
    np.testing.assert_array_equal(world.save()[0], observation["robot0_eef_pos"])


def test_tracking_is_the_way_from_where_the_raw_chunk_would_have_led() -> None:
    """0.02 units of z add up to 1 mm a step, from 1 to 8 mm over a chunk, and are looked at again after it."""
    result, _ = drive(Shift(2, 0.02))
    assert result.tracking_mm.max == pytest.approx(8.0, abs=1e-3)
    full_chunks = np.arange(1, 9)
    assert result.tracking_mm.mean == pytest.approx(full_chunks.mean(), rel=0.05)
    turned, _ = drive(Shift(5, 0.02))
    assert turned.tracking_deg.max == pytest.approx(8 * np.degrees(0.02 * ROTATION_UNIT), rel=1e-3)
    assert turned.tracking_mm.max == pytest.approx(0.0, abs=1e-9)


def test_the_policy_looks_again_after_every_chunk_so_that_errors_do_not_add_up() -> None:
    """2.5 mm a step in x: 20 mm after 8 steps, and never more, however long the episode."""
    long, _ = drive(Shift(0, 0.05))
    assert long.steps > 50
    assert long.tracking_mm.max == pytest.approx(20.0, abs=1e-3)
    short, _ = drive(Shift(0, 0.05), chunk=1)
    assert short.tracking_mm.max == pytest.approx(2.5, abs=1e-3)


def test_decoded_actions_are_clipped_before_they_are_sent() -> None:
    _, sent = drive(Shift(0, 40.0))
    actions = executed(sent, 8)
    assert np.abs(actions).max() <= 1.0
    np.testing.assert_array_equal(actions[:, 0], 1.0)


def test_noise_is_the_same_for_every_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the expert that stays: it steps its noise once per executed step, whatever the codec does."""
    heard: list[list[np.ndarray]] = []

    class Listening(LiftExpert):
        def _command(self, *arguments: Any) -> Any:
            action = super()._command(*arguments)
            if self is self.original:
                heard[-1].append(self._noise._state)
            return action

    for codec in (RawCodec(), Shift(0, 0.3)):
        expert = Listening()
        monkeypatch.setattr(Listening, "original", expert, raising=False)
        heard.append([])
        run_episode(ObedientWorld(), expert, codec, np.random.default_rng(1), 8)
    common = min(map(len, heard))
    assert common > 30
    np.testing.assert_array_equal(heard[0][:common], heard[1][:common])


def test_an_episode_that_never_ends_is_ended() -> None:
    class Endless(LiftExpert):
        max_steps = 21

    world = ObedientWorld()
    assert run_episode(world, Endless(), Shift(2, 2.0), np.random.default_rng(0), 8).steps == 21


def test_success_is_judged_at_the_end_and_reaching_it_at_any_time() -> None:
    result, _ = drive(RawCodec())
    # The gripper begins high enough, goes down to the cube and comes up again, but not as high.
    assert result.reached
    assert not result.success


# Precision -----------------------------------------------------------------------------------------------------------


def test_stacked_cubes_are_judged_by_their_last_horizontal_offset() -> None:
    beginning = {"cubeA_pos": np.zeros(3), "cubeB_pos": np.ones(3)}
    end = {"cubeA_pos": np.array([0.003, 0.0, 0.9]), "cubeB_pos": np.array([0.0, 0.004, 0.8])}
    assert precision(StackExpert(), [beginning, end], ["", ""]) == pytest.approx(5.0)


@pytest.mark.parametrize("expert", [NutAssemblySquareExpert(), *(kind() for kind in HELD_OUT_EXPERTS.values())])
def test_a_nut_is_judged_when_it_passes_the_top_of_its_peg(expert: NutAssemblySquareExpert) -> None:
    def nut(offset: float, height: float) -> dict[str, Any]:
        return {f"{expert.nut}_pos": np.array([expert.peg[0] + offset, expert.peg[1], height])}

    way = [nut(0.3, 0.83), nut(0.02, 0.99), nut(0.004, 0.961), nut(0.003, 0.959), nut(0.001, 0.94)]
    phases = ["approach", "transport", "insert", "insert", "insert"]
    assert precision(expert, way, phases) == pytest.approx(3.0)
    assert precision(expert, way[:3], phases[:3]) is None


def test_a_can_is_judged_by_where_the_expert_meant_it() -> None:
    expert = PickPlaceCanExpert()
    expert.reset(np.random.default_rng(0))
    end = {"Can_pos": np.array([expert.spot[0] + 0.006, expert.spot[1] - 0.008, 0.86])}
    assert precision(expert, [end], ["done"]) == pytest.approx(10.0)


def test_other_tasks_have_no_measure_of_precision() -> None:
    assert precision(LiftExpert(), [{}], ["done"]) is None


def test_the_round_nut_is_brought_to_the_other_peg() -> None:
    assert NutAssemblyRoundExpert.peg[1] == -NutAssemblySquareExpert.peg[1]
    assert NutAssemblyRoundExpert.nut == "RoundNut"
