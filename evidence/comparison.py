"""Compare on held-out episodes: train what is missing, fit, judge, and bring the seeds together.

One job per checkpoint and per seed of the peers, spread over processes. A job computes on one thread and depends on
nothing but its own arguments, so the number of processes changes nothing.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rfsq.calibration.constants import CalibrationConfig
from rfsq.calibration.data import calibration_episodes, judging_episodes
from rfsq.calibration.fit import Method, calibrate, recover
from rfsq.calibration.readout import DEFAULT_READOUT, ReadoutChoice, ReadoutConfig
from rfsq.calibration.recovered import RecoveredConfig
from rfsq.evidence.codecs import Codec
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.findings import REFITTED, find, improvement_over_naive, judge_peers
from rfsq.evidence.metrics import ActionErrors, Array, OscPose, action_errors, units_of
from rfsq.evidence.peers import peer_codecs
from rfsq.evidence.results import (
    CodecReport,
    Comparison,
    Curve,
    DataFacts,
    Metrics,
    ReportRow,
    SchemeReport,
    Spread,
    Trajectory,
)
from rfsq.evidence.schemes import Calibrated, Dynamic, Judge, Naive, Published, Recovered, Row, Scheme, SchemeResult
from rfsq.evidence.training import CACHE, SEEDS, trained_checkpoint
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, chunk, split_episodes
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from rfsq.rfsq_ref.normaliser import NormaliserKind
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.train import TrainConfig, make_deterministic
from rfsq.rfsq_ref.training_history import TrainingHistory
from rfsq.runtime.bundle.fidelity import fidelity

#: Bins of |error|, in normalised units: a fifth of a decade wide.
ERROR_EDGES = tuple(10.0 ** (exponent / 5) for exponent in range(-40, 11))
_TRAJECTORY_STEPS = 240
#: Their versions may change the numbers.
_PACKAGES = ("torch", "numpy", "scipy", "tokenizers", "vector-quantize-pytorch")


@dataclass(frozen=True)
class ComparisonConfig:
    """seeds: of everything that is trained; physical: units of the actions, where they have any; workers: processes."""

    seeds: tuple[int, ...] = SEEDS
    epochs: int = 100
    normaliser: NormaliserKind | None = None
    chunk_length: int = 8
    physical: OscPose | None = None
    with_peers: bool = True
    calibrated: CalibrationConfig = field(default_factory=CalibrationConfig)
    recovered: RecoveredConfig = field(default_factory=RecoveredConfig)
    readout: ReadoutConfig = DEFAULT_READOUT
    workers: int = max(1, os.cpu_count() or 1)
    cache: Path = CACHE

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise EvidenceError(f"seeds are {self.seeds}; expected different ones, like 0 1 2")
        for name in ("epochs", "chunk_length", "workers"):
            if getattr(self, name) < 1:
                raise EvidenceError(f"{name} is {getattr(self, name)}; expected at least 1")

    def training(self, *, use_layernorm: bool, seed: int) -> TrainConfig:
        """The published recipe."""
        return TrainConfig(use_layernorm=use_layernorm, epochs=self.epochs, seed=seed, normaliser=self.normaliser)


@dataclass(frozen=True)
class _CheckpointResult:
    """What one checkpoint gives; decoded: by label, the trajectory's steps [n, A]; remarks: what is missing
    and why, and how good the tokens are; is_refitted: whether calibration kept a readout."""

    name: str
    sha256: str
    curve: Curve | None
    unquantised: dict[str, ActionErrors]
    schemes: tuple[SchemeResult, ...]
    decoded: dict[str, Array]
    remarks: tuple[str, ...]
    is_refitted: bool

    def scheme(self, name: str) -> SchemeResult:
        """Raises StopIteration for a scheme it does not have."""
        return next(result for result in self.schemes if result.scheme == name)


@dataclass(frozen=True)
class _CodecResult:
    family: str
    series: str
    name: str
    partial: bool
    bits_per_step: float
    errors: ActionErrors


def compare(
    dataset: ActionDataset,
    config: ComparisonConfig,
    *,
    naive: Sequence[Checkpoint] = (),
    robust: Sequence[Checkpoint] = (),
    show_progress: bool = False,
) -> Comparison:
    """Train every kind of checkpoint that is not given, one per seed, and compare all of them on the test episodes.

    Checkpoints that are given may have been trained on other data; they are then calibrated on these. Raises
    DataError, CheckpointError or EvidenceError where something does not fit.
    """
    # Not after minutes of training.
    _check_given("naive", naive, Conditioning.NONE)
    _check_given("robust", robust, Conditioning.DYNAMIC)
    split_episodes(dataset)
    for checkpoint in (*naive, *robust):
        judging_episodes(checkpoint, dataset)
    if config.physical:
        config.physical.arms(dataset.episodes[0])
    jobs: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {}
    # The longest first, so that no process waits for another at the end.
    if config.with_peers:
        jobs |= {f"peers, seed {seed}": (_peers_job, (dataset, config, seed)) for seed in config.seeds}
    for kind, given in (("robust", robust), ("naive", naive)):
        sources: Sequence[Checkpoint | int] = given or config.seeds
        jobs |= {
            f"{kind} {number if given else f'seed {number}'}": (_checkpoint_job, (dataset, config, kind, source))
            for number, source in zip(range(len(given)) if given else config.seeds, sources, strict=True)
        }
    results = _run(jobs, config.workers, show_progress)
    by_kind = {
        kind: [
            found for name, found in results.items() if isinstance(found, _CheckpointResult) and name.startswith(kind)
        ]
        for kind in ("naive", "robust")
    }
    peers = [found for found in results.values() if isinstance(found, list)]
    seeds = config.seeds if config.with_peers or not (naive and robust) else ()
    return _together(dataset, config, seeds, by_kind, peers)


def _check_given(kind: str, given: Sequence[Checkpoint], expected: Conditioning) -> None:
    """Raises CheckpointError for checkpoints that cannot stand in one row."""
    for checkpoint in given:
        if checkpoint.trained_with is not expected:
            raise CheckpointError(
                f"a checkpoint given as {kind} was trained with {checkpoint.trained_with.value!r}; expected "
                f"{expected.value!r}: swap --naive and --robust"
            )
        if checkpoint.config != given[0].config:
            raise CheckpointError(
                f"{kind} checkpoints have the sizes {given[0].config} and {checkpoint.config}; expected the same, as "
                "their errors are averaged: compare them one by one"
            )
    hashes = [checkpoint.provenance["checkpoint_sha256"] for checkpoint in given]
    if len(set(hashes)) < len(hashes):
        raise CheckpointError(f"one {kind} checkpoint is given twice; expected different ones, as they give the spread")


def _run(
    jobs: dict[str, tuple[Callable[..., object], tuple[object, ...]]], workers: int, show_progress: bool
) -> dict[str, object]:
    """Results in the order of the jobs."""
    if workers == 1:
        make_deterministic()
        return {
            name: work(*arguments)
            for name, (work, arguments) in tqdm(jobs.items(), disable=None if show_progress else True)
        }
    results: dict[str, object] = {}
    # Spawned: a forked process would share torch's threads.
    with (
        ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), make_deterministic) as pool,
        tqdm(total=len(jobs), unit="job", disable=None if show_progress else True) as progress,
    ):
        futures = {pool.submit(work, *arguments): name for name, (work, arguments) in jobs.items()}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                progress.set_postfix_str(futures[future])
                progress.update()
        except BrokenProcessPool as error:
            raise EvidenceError(
                "a worker process was killed, perhaps for want of memory; start again (what is trained is kept), with "
                "fewer --workers if it happens again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: results[name] for name in jobs}


# One checkpoint ------------------------------------------------------------------------------------------------------


def _checkpoint_job(
    dataset: ActionDataset, config: ComparisonConfig, kind: str, source: Checkpoint | int
) -> _CheckpointResult:
    curve = None
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        training = config.training(use_layernorm=kind == "robust", seed=source)
        checkpoint, history = trained_checkpoint(dataset, training, config.cache)
        curve = _curve(history)
    sha256 = str(checkpoint.provenance["checkpoint_sha256"])
    name = f"seed {source}" if isinstance(source, int) else sha256[:12]
    remarks, is_refitted = [], False
    if kind == "naive":
        schemes: list[Scheme] = [Naive(checkpoint)]
    else:
        checkpoint = calibrate(checkpoint, dataset, config.calibrated, config.readout)
        is_refitted = checkpoint.readout is not None
        if not is_refitted and config.readout.choice is ReadoutChoice.AUTO:
            remarks.append(f"robust {name}: {checkpoint.provenance[Method.CALIBRATED.value]['remark']}")
        schemes = [Dynamic(checkpoint), Published(checkpoint), Calibrated(checkpoint)]
        try:
            prefixes = range(1, checkpoint.config.num_layers + 1)
            schemes.insert(2, Recovered(recover(checkpoint, dataset, tuple(prefixes), config.recovered)))
        except DataError as error:
            # Few data calibrate, but do not determine a dense map: everything else can still be compared.
            remarks.append(f"no recovered decoder, so no such row: {error}")
    judged = judging_episodes(checkpoint, dataset)
    judge = Judge(
        judged.steps(), calibration_episodes(checkpoint, dataset).steps(), units_of(dataset.steps()), config.physical
    )
    unquantised = {f"{kind} autoencoder": judge.unquantised(checkpoint.model(dtype=torch.float64))}
    if kind == "robust":
        # Where no refit was kept, that of the autoencoder as trained: seeds that have one share a row with it.
        unquantised[REFITTED] = judge.unquantised(checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64))
        remarks += _verdict(schemes[-1], judged.steps(), name)
    example = judged.episodes[0][:_TRAJECTORY_STEPS]
    return _CheckpointResult(
        name=name,
        sha256=sha256,
        curve=curve,
        unquantised=unquantised,
        schemes=tuple(judge.result(scheme) for scheme in schemes),
        decoded={name: values for scheme in schemes for name, values in _decoded(scheme, example).items()},
        remarks=tuple(remarks),
        is_refitted=is_refitted,
    )


def _verdict(scheme: Scheme, actions: FloatArray, name: str) -> list[str]:
    """How well all layers decode each dimension, in the robot's units, and a warning where that is poor."""
    encoded = scheme.encode(actions)
    with torch.no_grad():
        decoded = scheme.model.decode_latents(scheme.prefix(encoded, len(encoded.steps))).numpy()
    found = fidelity(actions, decoded, scheme.model.units.tolist(), scheme.model.offset.tolist())
    label = f"{scheme.name} tokens of {name}, all layers"
    return [f"{label}, {found.line}", *([f"{label}: {found.warning}"] if found.warning else [])]


def _curve(history: TrainingHistory) -> Curve:
    return Curve(
        tuple(record.train_mse for record in history.epochs),
        tuple(record.validation_mse for record in history.epochs),
        history.kept_epoch,
    )


def _decoded(scheme: Scheme, actions: FloatArray) -> dict[str, Array]:
    encoded = scheme.encode(actions)
    count = len(encoded.steps)
    with torch.no_grad():
        return {
            f"{scheme.name}, {what}": scheme.model.decode_latents(scheme.prefix(encoded, layers)).numpy()
            for what, layers in (("L0", 1), ("all layers", count))
        }


# Peers ---------------------------------------------------------------------------------------------------------------


def _peers_job(dataset: ActionDataset, config: ComparisonConfig, seed: int) -> list[_CodecResult]:
    judged = split_episodes(dataset).test
    units = units_of(dataset.steps())
    codecs = peer_codecs(dataset, config.chunk_length, seed=seed, cache=config.cache)
    return [judge_codec(codec, judged, config.chunk_length, units, config.physical) for codec in codecs]


def judge_codec(
    codec: Codec, judged: ActionDataset, chunk_length: int, units: Array, physical: OscPose | None
) -> _CodecResult:
    """Every step of these episodes, the last chunk of each filled up with its last action; filling is not judged."""
    filled = [padded_chunks(episode, chunk_length) for episode in judged.episodes]
    chunks = np.concatenate(filled)
    # Filling is cheap to code, so that only whole chunks tell what a step takes.
    whole = np.concatenate([chunk(episode, chunk_length) for episode in judged.episodes])
    decoded = codec.reconstruct(chunks)
    found: list[FloatArray] = []
    for episode, part in zip(
        judged.episodes, np.split(decoded, np.cumsum([len(part) for part in filled])[:-1]), strict=True
    ):
        found.append(part.reshape(-1, part.shape[-1])[: len(episode)])
    return _CodecResult(
        family=str(getattr(codec, "family", codec.name)),
        series=str(getattr(codec, "series", codec.name)),
        name=codec.name,
        partial=bool(getattr(codec, "partial", False)),
        bits_per_step=codec.bits_per_step(whole if len(whole) else chunks),
        errors=action_errors(judged.steps(), np.concatenate(found), units, physical),
    )


def padded_chunks(episode: FloatArray, length: int) -> FloatArray:
    """[n, A] to [ceil(n / length), length, A], the last action repeated."""
    missing = -len(episode) % length
    return np.concatenate([episode, np.repeat(episode[-1:], missing, axis=0)]).reshape(-1, length, episode.shape[1])


# Together ------------------------------------------------------------------------------------------------------------


def _together(
    dataset: ActionDataset,
    config: ComparisonConfig,
    seeds: tuple[int, ...],
    by_kind: dict[str, list[_CheckpointResult]],
    peers: list[list[_CodecResult]],
) -> Comparison:
    first = {kind: found[0] for kind, found in by_kind.items()}
    schemes = tuple(
        _scheme_report(kind, [checkpoint.scheme(name) for checkpoint in found], found)
        for kind, found in by_kind.items()
        for name in _common_schemes(found)
    )
    reports = tuple(
        CodecReport(
            same[0].family,
            same[0].series,
            same[0].name,
            same[0].partial,
            {"bits_per_step": Spread.of([found.bits_per_step for found in same])}
            | _metrics([found.errors for found in same]),
        )
        for same in zip(*peers, strict=True)
    )
    unquantised = {
        name: _metrics([found.unquantised[name] for found in results])
        for results in by_kind.values()
        for name in results[0].unquantised
        if name != REFITTED or any(found.is_refitted for found in results)
    }
    data = _data_facts(dataset, config)
    return Comparison(
        data=data,
        seeds=seeds,
        settings={
            "epochs": str(config.epochs),
            "chunk_length": str(config.chunk_length),
            "normaliser": config.normaliser.value if config.normaliser else "none",
            "calibration": _settings(asdict(config.calibrated)),
            "readout": config.readout.choice.value,
            "recovered": _settings(asdict(config.recovered)),
        },
        versions={name: version(name) for name in _PACKAGES},
        checkpoints={f"{kind} {found.name}": found.sha256 for kind, results in by_kind.items() for found in results},
        curves={
            f"{kind} {found.name}": found.curve
            for kind, results in by_kind.items()
            for found in results
            if found.curve is not None
        },
        unquantised=unquantised,
        schemes=schemes,
        peers=reports,
        error_edges=ERROR_EDGES,
        trajectory=_trajectory(dataset, {**first["naive"].decoded, **first["robust"].decoded}),
        improvement=improvement_over_naive(schemes),
        findings=find(schemes, unquantised, data),
        remarks=tuple(dict.fromkeys(remark for found in by_kind["robust"] for remark in found.remarks)),
        peer_verdict=judge_peers(schemes, reports),
    )


def _settings(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _common_schemes(checkpoints: Sequence[_CheckpointResult]) -> list[str]:
    """Those that every checkpoint has; a remark says why one is missing."""
    names = [{result.scheme for result in checkpoint.schemes} for checkpoint in checkpoints]
    return [result.scheme for result in checkpoints[0].schemes if result.scheme in set.intersection(*names)]


def _scheme_report(
    kind: str, results: Sequence[SchemeResult], checkpoints: Sequence[_CheckpointResult]
) -> SchemeReport:
    model = results[0]
    return SchemeReport(
        scheme=model.scheme,
        checkpoints=tuple(f"{kind} {found.name}" for found in checkpoints),
        bits_per_layer=model.bits_per_layer,
        prefixes=tuple(_report_row(rows) for rows in zip(*(found.prefixes for found in results), strict=True)),
        groups=tuple(_report_row(rows) for rows in zip(*(found.groups for found in results), strict=True)),
        error_share=tuple(np.mean([_error_share(found.absolute_errors) for found in results], axis=0).tolist()),
    )


def _error_share(errors: Array) -> Array:
    """Share of |error| in each bin; what lies beyond the outermost edges counts to the outermost bins."""
    counts, _ = np.histogram(np.clip(errors, ERROR_EDGES[0], ERROR_EDGES[-1]), ERROR_EDGES)
    return counts / errors.size


def _report_row(rows: Sequence[Row]) -> ReportRow:
    metrics = {
        "residual_std": Spread.of([row.use.residual_std for row in rows]),
        "entropy_bits": Spread.of([row.use.entropy_bits for row in rows]),
        "latent_mse": Spread.of([row.latent_mse for row in rows]),
    }
    shares = tuple(Spread.of(same) for same in zip(*(row.use.level_share for row in rows), strict=True))
    return ReportRow(rows[0].label, metrics | _metrics([row.errors for row in rows]), shares)


def _metrics(errors: Sequence[ActionErrors]) -> Metrics:
    """Spread of every number that applies."""
    columns = {name: [asdict(found)[name] for found in errors] for name in asdict(errors[0])}
    return {name: Spread.of(values) for name, values in columns.items() if None not in values}


def _data_facts(dataset: ActionDataset, config: ComparisonConfig) -> DataFacts:
    split = split_episodes(dataset)
    parts = {
        "train": split.train, "validation": split.validation, "calibration": split.calibration, "test": split.test
    }  # fmt: skip
    mean = split.train.steps().astype(np.float64).mean(axis=0)
    from_mean = (split.test.steps().astype(np.float64) - mean) / units_of(dataset.steps())
    return DataFacts(
        source=dataset.source,
        sha256=dataset.sha256,
        action_dim=dataset.action_dim,
        episodes={name: len(part.episodes) for name, part in parts.items()},
        steps={name: part.num_steps for name, part in parts.items()},
        mean_action_mse=float(np.mean(from_mean**2)),
        physical=asdict(config.physical) if config.physical else None,
    )


def _trajectory(dataset: ActionDataset, decoded: dict[str, Array]) -> Trajectory:
    judged = split_episodes(dataset).test
    recorded = judged.episodes[0][:_TRAJECTORY_STEPS]
    return Trajectory(
        f"{judged.tasks[0]} {judged.names[0]}".strip(),
        _rounded(recorded),
        {name: _rounded(v) for name, v in decoded.items()},
    )


def _rounded(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(value), 5) for value in step) for step in values)
