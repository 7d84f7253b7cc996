"""Run the closed loop over every task, scene and cell in several processes, and go on where a run was stopped."""

import hashlib
import sys
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from rfsq.evidence.cells import codecs, fingerprint, select
from rfsq.evidence.closed_loop import run_episode
from rfsq.evidence.codecs import Codec
from rfsq.evidence.episodes import Episode, Identity, Job, open_episodes
from rfsq.evidence.settings import RolloutConfig
from rfsq.evidence.simulation import Simulation
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT
from rfsq.rfsq_ref.data import load_demonstrations
from rfsq.rfsq_ref.experts import TASKS
from rfsq.rfsq_ref.generate_demonstrations import check_simulator

#: To be raised when a change to the simulation, the loop or the experts changes what comes out of an episode.
LOOP_VERSION = 1


def seed_of(seed: int, task: str, index: int) -> int:
    """Seed of the scene and the expert: the same in every cell, and that of no demonstration."""
    return int(np.random.SeedSequence((seed, index, *task.encode())).generate_state(1, np.uint32)[0])


def jobs_of(config: RolloutConfig, fingerprints: Mapping[str, str], done: set[tuple[str, str, int]]) -> list[Job]:
    """The episodes that are missing, scene by scene, so that at any time all cells have about equally many.

    fingerprints: of the codec of each cell; done: tasks, cells and indices.
    """
    return [
        Job(task, cell, codec, index, seed_of(config.seed, task, index))
        for index in range(config.episodes)
        for task in config.tasks
        for cell, codec in fingerprints.items()
        if (task, cell, index) not in done
    ]


def identity_of(config: RolloutConfig) -> Identity:
    """Raises SimulatorError where the simulator is missing."""
    return Identity(
        loop_version=LOOP_VERSION,
        seed=config.seed,
        chunk=config.chunk,
        versions=check_simulator("torch", "numba", "scipy"),
        hashes={
            "demonstrations": load_demonstrations().sha256,
            "naive": hashlib.sha256(NAIVE_CHECKPOINT.read_bytes()).hexdigest(),
            "robust": hashlib.sha256(ROBUST_CHECKPOINT.read_bytes()).hexdigest(),
        },
    )


def run_rollouts(config: RolloutConfig) -> list[Episode]:
    """Run what is missing. Returns all episodes of the file, also those of cells that were not asked for.

    Raises SimulatorError without a simulator, EvidenceError where the file belongs to another run or a worker dies.
    """
    torch.set_num_threads(1)
    with open_episodes(config.file, identity_of(config)) as file:
        print("fitting the decoders", file=sys.stderr, flush=True)
        chosen = select(codecs(peers=config.peers), config.cells)
        fingerprints = {name: fingerprint(codec) for name, codec in chosen.items()}
        for name, found in fingerprints.items():
            file.check_codec(name, found, restart=config.restart_changed)
        jobs = jobs_of(config, fingerprints, {episode.key for episode in file.episodes})
        drive = partial(_run_job, chosen, config.chunk)
        driven = in_processes(drive, jobs, config.workers, partial(torch.set_num_threads, 1))
        shown = tqdm(driven, "closed loop", len(jobs), unit="episode", disable=None, mininterval=5.0, smoothing=0.1)
        for episode in shown:
            file.append(episode)
        return file.episodes


#: Of a worker process, from one job to the next: the scene of the last.
_simulation: Simulation | None = None


def _run_job(chosen: dict[str, Codec], chunk: int, job: Job) -> Episode:
    global _simulation
    if _simulation is None or (_simulation.task, _simulation.seed) != (job.task, job.seed):
        if _simulation is not None:
            _simulation.close()
        _simulation = Simulation(job.task, job.seed)
    expert, rng = TASKS[job.task](), np.random.default_rng(job.seed)
    return Episode(**vars(job), result=run_episode(_simulation, expert, chosen[job.cell], rng, chunk))
