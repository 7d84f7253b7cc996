"""Episodes of scripted experts with what the robot could see, for policies that are driven in the simulator.

The expert's noise is executed, and what it meant to do is kept beside it, so that a policy learns the way back (DART,
Laskey et al. 2017, arXiv 1703.09327).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.expert import Observation
from rfsq.rfsq_ref.experts import EXPERTS
from rfsq.rfsq_ref.generate_demonstrations import Attempt, attempt_of, check_simulator
from rfsq.runtime.bundle.paths import replacing

#: The bodies that a policy sees beside its gripper, by task.
BODIES: Mapping[str, tuple[str, ...]] = {"Lift": ("cube",), "Stack": ("cubeA", "cubeB"), "PickPlaceCan": ("Can",)}
#: Poses of one observation: of the gripper, and of as many bodies as any task has.
NUM_POSES = 1 + max(map(len, BODIES.values()))
#: Of scenes and experts: of no demonstration that is shipped, and others for driving than for recording.
RECORDED_SEED, DRIVEN_SEED = 1, 2
_WRITTEN_EVERY = 30


@dataclass(frozen=True, eq=False)
class Recording:
    """One solved episode. poses: float32 [steps, NUM_POSES, 7], see `poses`; executed, intended: actions float32
    [steps, 7] with the expert's noise and without."""

    task: str
    seed: int
    poses: FloatArray
    executed: FloatArray
    intended: FloatArray


def poses(task: str, observation: Observation) -> FloatArray:
    """float32 [NUM_POSES, 7]: position in m and quaternion x y z w of the gripper and the task's bodies, 0 where there
    is none."""
    names = [("robot0_eef_pos", "robot0_eef_quat_site"), *((f"{body}_pos", f"{body}_quat") for body in BODIES[task])]
    found = np.zeros((NUM_POSES, 7), np.float32)
    for pose, (position, quaternion) in zip(found, names, strict=False):
        pose[:3], pose[3:] = observation[position], observation[quaternion]
    return found


def record(noise: float, attempt: Attempt) -> Recording | None:
    """One episode, with so many times the expert's usual noise; None where it was not solved at the end."""
    from rfsq.evidence.simulation import Simulation

    world, expert = Simulation(attempt.task, attempt.seed), EXPERTS[attempt.task](noise)
    expert.reset(np.random.default_rng(attempt.seed))
    observation = world.reset()
    seen: list[FloatArray] = []
    executed, intended = [], []
    while not expert.done and len(seen) < expert.max_steps:
        seen.append(poses(attempt.task, observation))
        executed.append(expert.act(observation))
        intended.append(expert.intended)
        observation = world.step(executed[-1])
    is_solved = world.succeeded()
    world.close()
    if not is_solved:
        return None
    return Recording(attempt.task, attempt.seed, np.stack(seen), np.stack(executed), np.stack(intended))


def record_all(tasks: Sequence[str], episodes: int, noise: float, workers: int, path: Path) -> list[Recording]:
    """So many attempts of each task, scene by scene; the file is written again and again, so that a run that was
    stopped has left something. Raises SimulatorError, EvidenceError."""
    versions = check_simulator()
    attempts = [attempt_of(RECORDED_SEED, task, index) for index in range(episodes) for task in tasks]
    found: list[Recording] = []
    made = in_processes(partial(record, noise), attempts, workers, partial(torch.set_num_threads, 1))
    for count, recording in enumerate(made, 1):
        if recording is not None:
            found.append(recording)
        if count % _WRITTEN_EVERY == 0 or count == len(attempts):
            found.sort(key=lambda each: (tasks.index(each.task), each.seed))
            save_recordings(path, found, {"noise": noise, "attempts": count, "versions": versions})
            print(f"{count} of {len(attempts)} episodes, {len(found)} of them solved", flush=True)
    return found


def save_recordings(path: Path, recordings: Sequence[Recording], facts: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    names = sorted({recording.task for recording in recordings})
    arrays: dict[str, npt.NDArray[Any]] = {
        part: np.concatenate([getattr(recording, part) for recording in recordings])
        for part in ("poses", "executed", "intended")
    }
    arrays |= {
        "ends": np.cumsum([len(recording.poses) for recording in recordings]),
        "tasks": np.array([names.index(recording.task) for recording in recordings]),
        "seeds": np.array([recording.seed for recording in recordings]),
        "names": np.array(names),
        "facts": np.array(json.dumps(facts, sort_keys=True)),
    }
    with replacing(path, error=EvidenceError) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_recordings(path: Path) -> list[Recording]:
    """What `save_recordings` wrote. Raises EvidenceError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(_recordings(arrays))
    except (OSError, ValueError, KeyError) as error:
        raise EvidenceError(f"{path} holds no recordings: {error}; record them first") from error


def _recordings(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[Recording]:
    ends = arrays["ends"][:-1]
    parts = [np.split(arrays[part], ends) for part in ("poses", "executed", "intended")]
    names = [str(arrays["names"][index]) for index in arrays["tasks"]]
    for task, seed, *found in zip(names, arrays["seeds"].tolist(), *parts, strict=True):
        yield Recording(task, seed, *found)
