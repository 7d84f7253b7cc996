"""Recordings stay as they are in a file, and hold what the expert saw, did and meant."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.evidence import policy_recordings
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.policy_recordings import (
    RECORDED_SEED,
    Recording,
    load_recordings,
    poses,
    record,
    record_all,
    save_recordings,
)
from rfsq.rfsq_ref.generate_demonstrations import Attempt, attempt_of
from tests.evidence.conftest import some_recordings


def alike(first: Recording, second: Recording) -> bool:
    return all(np.array_equal(value, vars(second)[name]) for name, value in vars(first).items())


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    recordings = [*some_recordings(3), *some_recordings(2, steps=12)]
    save_recordings(tmp_path / "found.npz", recordings, {"noise": 1.5})
    assert all(map(alike, recordings, load_recordings(tmp_path / "found.npz")))


@pytest.mark.parametrize("content", [None, b"nothing"])
def test_what_holds_no_recordings_says_to_record_them(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "found.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvidenceError, match=r"holds no recordings: .*; record them first"):
        load_recordings(path)


def test_poses_are_of_the_gripper_first_and_of_nothing_where_a_task_has_fewer_bodies() -> None:
    names = {"robot0_eef": "quat_site", "cube": "quat"}
    observation: dict[str, Any] = {f"{name}_pos": np.full(3, index) for index, name in enumerate(names, 1)}
    observation |= {f"{name}_{quat}": np.full(4, index) for index, (name, quat) in enumerate(names.items(), 1)}
    np.testing.assert_array_equal(poses("Lift", observation), [[1] * 7, [2] * 7, [0] * 7])


def test_what_was_not_solved_is_left_out_and_the_rest_is_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dict(zip(("Lift", "Stack"), some_recordings(2), strict=True))

    def run(work: Callable[[Attempt], object], attempts: list[Attempt], *_: object) -> Iterator[Recording | None]:
        del work
        for attempt in reversed(attempts):
            failed = attempt.seed == attempts[0].seed
            recording = made[attempt.task]
            parts = (recording.poses, recording.executed, recording.intended)
            yield None if failed else Recording(attempt.task, attempt.seed, *parts)

    monkeypatch.setattr(policy_recordings, "in_processes", run)
    monkeypatch.setattr(policy_recordings, "check_simulator", dict)
    found = record_all(("Lift", "Stack"), 3, 1.5, 1, tmp_path / "found.npz")
    assert [each.task for each in found] == ["Lift"] * 2 + ["Stack"] * 3
    assert all(map(alike, found, load_recordings(tmp_path / "found.npz")))


def test_in_the_simulator_the_noise_is_executed_and_is_not_what_was_meant() -> None:
    pytest.importorskip("robosuite", reason="the simulator is not installed here: pip install '.[sim]'")
    found = record(1.5, attempt_of(RECORDED_SEED, "Lift", 0))
    assert found is not None
    assert found.poses.shape == (len(found.executed), 3, 7)
    assert found.executed.shape == found.intended.shape
    difference = np.abs(found.executed - found.intended)
    assert 1e-3 < difference.mean() < 0.2
    assert np.abs(found.intended).max() <= 1.0
