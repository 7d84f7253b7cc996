"""Run the closed loop over every task, scene and cell in several processes, and go on where a run was stopped.

A cell is a codec that the loop compares, and one cell of the report's table.
"""

import hashlib
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rfsq.calibration.fitting import calibrate, recover
from rfsq.calibration.recovered import default_prefixes
from rfsq.calibration.settings import CalibrationConfig, RecoveredConfig
from rfsq.calibration.tables import prefix_name
from rfsq.evidence.episodes import Episode, Identity, Job, open_episodes
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.schemes import BinRange, Codec, RawCodec, RfsqCodec
from rfsq.evidence.settings import CACHE, RolloutConfig
from rfsq.evidence.simulation import Simulation, run_episode
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, chunk, load_demonstrations, split_episodes
from rfsq.rfsq_ref.experts import TASKS
from rfsq.rfsq_ref.generate_demonstrations import check_simulator
from rfsq.rfsq_ref.quantizer import Conditioning

RAW = "raw"
#: How many layers of the calibrated tokens are decoded, beside all of them.
CALIBRATED_PREFIXES = (1, 2, 3, 5)
#: Peers are taken at the setting nearest to this many layers of ours, the coarse tokens.
LIKE_BITS_LAYERS = 3
#: Bins as OpenVLA has them: a cell of its own, whatever its bits.
OPENVLA_BINS = f"256 bins, {BinRange.QUANTILE.value}"
#: Families whose prefixes are settings of the method, as ours are; FAST's first tokens are only a part of a chunk's.
PREFIX_FAMILIES = ("ResidualFSQ", "ResidualVQ")
#: Bits within this share of each other count as equally near.
_SAME_BITS = 0.05
_FINGERPRINT_CHUNKS = 64
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


# The cells ------------------------------------------------------------------------------------------------------------


def codecs(*, peers: bool = False, cache: Path = CACHE) -> dict[str, Codec]:
    """Cell names and their codecs, from the embedded checkpoints and demonstrations; float32 models.

    peers: also the methods of others, trained where `cache` does not hold them, for chunks of 8 steps. Fitting the
    recovered decoder takes tens of seconds. Raises CheckpointError or DataError for damaged files.
    """
    dataset = load_demonstrations()
    robust = load_checkpoint(ROBUST_CHECKPOINT)
    found = rfsq_cells(load_checkpoint(NAIVE_CHECKPOINT), robust, dataset)
    if peers:
        from rfsq.evidence.peers import peer_codecs

        # Chosen by what is not reported: the test episodes are.
        chunks = chunk(split_episodes(dataset).validation.steps(), 8)
        like = found[_calibrated(LIKE_BITS_LAYERS, robust)].bits_per_step(chunks)
        found |= choose_peers(peer_codecs(dataset, 8, seed=0, cache=cache), chunks, like)
    return found


def rfsq_cells(naive: Checkpoint, robust: Checkpoint, dataset: ActionDataset) -> dict[str, Codec]:
    """Raw actions, and every way of decoding tokens alone: naive, published, recovered, calibrated by layers."""
    layers = robust.config.num_layers
    calibrated = calibrate(robust, dataset, CalibrationConfig()).model(Conditioning.CALIBRATED)
    recovered = recover(robust, dataset, default_prefixes(layers), RecoveredConfig()).model()
    published = robust.model()
    found: list[Codec] = [
        RawCodec(RAW),
        RfsqCodec("naive", naive.model(), naive.config.num_layers),
        RfsqCodec("published decoder", published, layers, published=True),
        RfsqCodec("recovered decoder", recovered, layers),
    ]
    for prefix in [*(prefix for prefix in CALIBRATED_PREFIXES if prefix < layers), layers]:
        found.append(RfsqCodec(_calibrated(prefix, robust), calibrated, prefix))
    return {codec.name: codec for codec in found}


def _calibrated(prefix: int, robust: Checkpoint) -> str:
    """The cell of the first `prefix` layers."""
    return f"calibrated, {prefix_name(prefix, robust.config.num_layers)}"


def choose_peers(peers: list[Codec], chunks: FloatArray, like_bits: float) -> dict[str, Codec]:
    """Of every family the codec at about `like_bits` bits per step, and OpenVLA's bins.

    chunks: float32 [B, T, A] of the validation episodes. Of those of a family whose bits are within 5 % of the bits of
    the nearest, the one with the lowest mean square error on `chunks` is taken. Prefixes compete where they are a
    setting of the method (PREFIX_FAMILIES), other partial codecs do not.
    """
    families: dict[str, list[tuple[float, Codec]]] = {}
    chosen: dict[str, Codec] = {}
    for peer in peers:
        if not peer.partial or peer.family in PREFIX_FAMILIES:
            families.setdefault(peer.family, []).append((peer.bits_per_step(chunks), peer))
        if peer.name == OPENVLA_BINS:
            chosen[peer.name] = peer
    for settings in families.values():
        nearest, _ = min(settings, key=lambda setting: abs(setting[0] - like_bits))
        alike = [peer for bits, peer in settings if abs(bits - nearest) <= _SAME_BITS * nearest]
        best = min(alike, key=lambda peer: float(np.mean((peer.reconstruct(chunks) - chunks) ** 2)))
        chosen[best.name] = best
    return chosen


def fingerprint(codec: Codec) -> str:
    """Hash of the first chunks of the demonstrations as the codec decodes them, to tell one codec from another.

    It is of bytes, so it also differs between processors that round differently, as trajectories do.
    """
    chunks = chunk(load_demonstrations().steps(), 8)[:_FINGERPRINT_CHUNKS]
    return hashlib.sha256(codec.reconstruct(chunks).tobytes()).hexdigest()[:16]


def select(found: Mapping[str, Codec], names: tuple[str, ...]) -> dict[str, Codec]:
    """The cells of these names, all cells where no name is given. Raises EvidenceError for a name that is no cell."""
    unknown = [name for name in names if name not in found]
    if unknown:
        raise EvidenceError(f"no cells named {unknown}; expected some of {list(found)}")
    return {name: found[name] for name in names or found}
