"""Drive the simulator with trained policies: many scenes at once, for a policy is asked about all of them together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from rfsq.evidence.belief_tokens import Believer
from rfsq.evidence.policies import TokenPolicy
from rfsq.evidence.policy_lessons import CHUNK_LENGTH
from rfsq.evidence.policy_recordings import poses
from rfsq.evidence.policy_sight import sight, task_mark
from rfsq.evidence.policy_tokens import PolicyTokens
from rfsq.evidence.policy_training import SeeingPolicies, load_policies
from rfsq.evidence.simulation import Simulation
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.expert import ACTION_DIM, Observation
from rfsq.rfsq_ref.experts import EXPERTS

#: Steps after which a scene counts as not solved: 20 s.
MOST_STEPS = 400


@dataclass(frozen=True)
class Cell:
    """name: of the tokens; count: how many of the tokens it says, None for all or where it says actions; executed:
    steps of a chunk before it is asked again; seed: of the policy; way: how its probabilities are decoded, None for the
    tokens that it says."""

    name: str
    count: int | None
    executed: int
    seed: int
    way: str | None = None


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
    """steps: after how many each scene was solved first, None where it never was; errors: mean squares of each scene's
    actions less those that the expert meant there, none of the expert itself."""

    job: DrivingJob
    steps: tuple[int | None, ...]
    errors: tuple[float, ...] = ()


#: Of a worker process: what decodes tokens and probabilities, by name, and the scenes of the last task, which take long
#: to make.
_decoders: dict[str, PolicyTokens] = {}
_believers: dict[str, Believer] = {}
_worlds: dict[tuple[str, int], Simulation] = {}


def prepare(decoders: Sequence[PolicyTokens], believers: Mapping[str, Believer]) -> None:
    """At the beginning of a worker process. believers: of policies that do not say tokens one after the other."""
    torch.set_num_threads(1)
    _decoders.update({each.name: each for each in decoders})
    _believers.update(believers)


def drive(job: DrivingJob) -> Driven:
    """All scenes of a job."""
    _make_room(job)
    worlds = [_world(job.task, seed) for seed in job.seeds]
    if job.cell is None:
        return Driven(job, tuple(map(expert_steps, worlds)))
    assert job.weights is not None
    return policy_drive(worlds, job, _policies(job.weights))


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
def policy_drive(worlds: Sequence[Simulation], job: DrivingJob, policies: SeeingPolicies) -> Driven:
    """All scenes until the policy has solved them."""
    assert job.cell is not None
    steps: list[int | None] = [None] * len(worlds)
    observations, watchers = [world.reset() for world in worlds], [Watcher(world) for world in worlds]
    past = torch.zeros(len(worlds), CHUNK_LENGTH, ACTION_DIM)
    task, generator = task_mark(job.task, job.tasks), torch.Generator().manual_seed(job.cell.seed)
    running = list(range(len(worlds)))
    for begun in range(0, MOST_STEPS, job.cell.executed):
        seen = torch.from_numpy(np.stack([poses(job.task, observations[index]) for index in running]))
        context = (sight(seen, past[running], task.expand(len(running), -1)) - policies.mean) / policies.deviation
        chunks = (
            _decoded(policies.by_seed[job.cell.seed], context, job.cell, generator)
            .reshape(len(running), CHUNK_LENGTH, ACTION_DIM)[:, : job.cell.executed]
            .float()
            .clamp(-1, 1)
        )
        for index, chunk in zip(running, chunks, strict=True):
            steps[index] = _executed(worlds[index], observations[index], watchers[index], chunk, begun)
        past[running] = torch.cat((past[running], chunks), dim=1)[:, -CHUNK_LENGTH:]
        running = [index for index in running if steps[index] is None]
        if not running:
            break
    return Driven(job, tuple(steps), tuple(watcher.error for watcher in watchers))


def _decoded(policy: TokenPolicy, contexts: Tensor, cell: Cell, generator: torch.Generator) -> Tensor:
    """The chunks that a policy means."""
    if cell.way is not None:
        believer = _believers[cell.name]
        return believer.decode(believer.ask(policy, contexts), cell.way, generator)
    said, decoder = policy.say(contexts, cell.count), _decoders.get(cell.name)
    return said if decoder is None else decoder.decode(said)


class Watcher:
    """An expert that watches another drive, and says at each step what it would do."""

    def __init__(self, world: Simulation) -> None:
        self._expert, self._squares = EXPERTS[world.task](), list[float]()
        self._expert.reset(np.random.default_rng(world.seed))

    def watch(self, observation: Observation, action: FloatArray) -> None:
        self._expert.act(observation)
        self._squares.append(float(np.square(action - self._expert.intended).mean()))

    @property
    def error(self) -> float:
        """Mean square of all actions so far, less what the expert meant."""
        return fmean(self._squares)


def _executed(
    world: Simulation, observation: dict[str, object], watcher: Watcher, chunk: Tensor, begun: int
) -> int | None:
    """Execute a chunk [steps, A]; the step after which the scene was solved. observation: becomes the last one."""
    for step, action in enumerate(chunk.numpy(), begun + 1):
        watcher.watch(observation, action)
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
