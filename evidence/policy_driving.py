"""Drive the simulator with trained policies: many scenes at once, for a policy is asked about all of them together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfsq.evidence.policy_lessons import CHUNK_LENGTH
from rfsq.evidence.policy_recordings import poses
from rfsq.evidence.policy_sight import sight, task_mark
from rfsq.evidence.policy_tokens import PolicyTokens
from rfsq.evidence.policy_training import SeeingPolicies, load_policies
from rfsq.evidence.simulation import Simulation
from rfsq.rfsq_ref.expert import ACTION_DIM
from rfsq.rfsq_ref.experts import EXPERTS

#: Steps after which a scene counts as not solved: 20 s.
MOST_STEPS = 400


@dataclass(frozen=True)
class Cell:
    """name: of the tokens; count: how many of the tokens it says, None for all or where it says actions; executed:
    steps of a chunk before it is asked again; seed: of the policy."""

    name: str
    count: int | None
    executed: int
    seed: int


@dataclass(frozen=True)
class DrivingJob:
    """cell: None for the expert; numbers, seeds: of the scenes; tasks: all that the policy knows; weights: a file."""

    cell: Cell | None
    task: str
    numbers: tuple[int, ...]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    weights: Path | None


@dataclass(frozen=True)
class Driven:
    """steps: after how many each scene was solved first, None where it never was."""

    job: DrivingJob
    steps: tuple[int | None, ...]


#: Of a worker process: what decodes, by name, and the scenes of the last task, which take long to make.
_decoders: dict[str, PolicyTokens] = {}
_worlds: dict[tuple[str, int], Simulation] = {}


def prepare(decoders: Sequence[PolicyTokens]) -> None:
    """At the beginning of a worker process."""
    torch.set_num_threads(1)
    _decoders.update({each.name: each for each in decoders})


def drive(job: DrivingJob) -> Driven:
    """All scenes of a job."""
    _make_room(job)
    worlds = [_world(job.task, seed) for seed in job.seeds]
    if job.cell is None:
        return Driven(job, tuple(map(expert_steps, worlds)))
    assert job.weights is not None
    return Driven(job, policy_steps(worlds, job, _policies(job.weights)))


def expert_steps(world: Simulation) -> int | None:
    """After how many steps the scripted expert, with its usual noise, has solved a scene first."""
    expert = EXPERTS[world.task]()
    expert.reset(np.random.default_rng(world.seed))
    observation = world.reset()
    for step in range(1, MOST_STEPS + 1):
        observation = world.step(expert.act(observation))
        if world.succeeded():
            return step
    return None


@torch.inference_mode()
def policy_steps(worlds: Sequence[Simulation], job: DrivingJob, policies: SeeingPolicies) -> tuple[int | None, ...]:
    """After how many steps the policy has solved each scene first."""
    assert job.cell is not None
    steps: list[int | None] = [None] * len(worlds)
    observations = [world.reset() for world in worlds]
    past = torch.zeros(len(worlds), CHUNK_LENGTH, ACTION_DIM)
    task, decoder = task_mark(job.task, job.tasks), _decoders.get(job.cell.name)
    running = list(range(len(worlds)))
    for begun in range(0, MOST_STEPS, job.cell.executed):
        seen = torch.from_numpy(np.stack([poses(job.task, observations[index]) for index in running]))
        context = (sight(seen, past[running], task.expand(len(running), -1)) - policies.mean) / policies.deviation
        said = policies.by_seed[job.cell.seed].say(context, job.cell.count)
        decoded = said if decoder is None else decoder.decode(said)
        chunks = decoded.reshape(len(running), CHUNK_LENGTH, ACTION_DIM)[:, : job.cell.executed].float().clamp(-1, 1)
        for index, chunk in zip(running, chunks, strict=True):
            steps[index] = _executed(worlds[index], observations[index], chunk, begun)
        past[running] = torch.cat((past[running], chunks), dim=1)[:, -CHUNK_LENGTH:]
        running = [index for index in running if steps[index] is None]
        if not running:
            break
    return tuple(steps)


def _executed(world: Simulation, observation: dict[str, object], chunk: Tensor, begun: int) -> int | None:
    """Execute a chunk [steps, A]; the step after which the scene was solved. observation: becomes the last one."""
    for step, action in enumerate(chunk.numpy(), begun + 1):
        observation.update(world.step(action))
        if world.succeeded():
            return step
    return None


@cache
def _policies(weights: Path) -> SeeingPolicies:
    return load_policies(weights)


def _world(task: str, seed: int) -> Simulation:
    if (task, seed) not in _worlds:
        _worlds[task, seed] = Simulation(task, seed)
    return _worlds[task, seed]


def _make_room(job: DrivingJob) -> None:
    """Close scenes that are not of this job."""
    for key in [key for key in _worlds if key not in {(job.task, seed) for seed in job.seeds}]:
        _worlds.pop(key).close()
