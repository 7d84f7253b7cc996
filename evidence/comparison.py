"""Compare on held-out episodes: train what is missing, fit, judge, and bring the seeds together.

One job per checkpoint and per seed of the peers, spread over processes. A job computes on one thread and depends on
nothing but its own arguments, so the number of processes changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from rfsq.calibration.data import judging_episodes
from rfsq.calibration.settings import DEFAULT_CALIBRATION
from rfsq.evidence.findings import REFITTED, find, improvement_over_naive, judge_peers
from rfsq.evidence.jobs import TRAJECTORY_STEPS, CheckpointResult, checkpoint_job, peers_job
from rfsq.evidence.metrics import Array, units_of
from rfsq.evidence.results import CodecReport, Comparison, DataFacts, SchemeReport, Trajectory, over_seeds
from rfsq.evidence.schemes import ERROR_EDGES
from rfsq.evidence.settings import ComparisonConfig
from rfsq.evidence.workers import results_of
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset, split_episodes
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.training import make_deterministic

#: Their versions may change the numbers.
_PACKAGES = ("torch", "numpy", "scipy", "tokenizers", "vector-quantize-pytorch")
_Job = Callable[[], object]


def compare(
    dataset: ActionDataset,
    config: ComparisonConfig,
    *,
    naive: Sequence[Checkpoint] = (),
    robust: Sequence[Checkpoint] = (),
) -> Comparison:
    """Train every kind of checkpoint that is not given, one per seed, and compare all of them on the test episodes.

    Checkpoints that are given may have been trained on other data; they are then calibrated on these. Raises
    DataError, CheckpointError or EvidenceError where something does not fit.
    """
    # Refused now, not after minutes of training.
    _check_given("naive", naive, Conditioning.NONE)
    _check_given("robust", robust, Conditioning.DYNAMIC)
    split_episodes(dataset)
    for checkpoint in (*naive, *robust):
        judging_episodes(checkpoint, dataset)
    if config.physical:
        config.physical.arms(dataset.episodes[0])
    # The longest first, so that no process waits for another at the end.
    jobs: list[tuple[str, _Job]] = []
    if config.peers:
        jobs += [("peers", partial(peers_job, dataset, config, seed)) for seed in config.seeds]
    for kind, given in (("robust", robust), ("naive", naive)):
        jobs += [(kind, partial(checkpoint_job, dataset, config, kind, source)) for source in given or config.seeds]
    results = results_of(jobs, config.workers, make_deterministic)
    found: dict[str, list[Any]] = {"naive": [], "robust": [], "peers": []}
    for (kind, _), result in zip(jobs, results, strict=True):
        found[kind].append(result)
    peers = found.pop("peers")
    seeds = config.seeds if config.peers or not (naive and robust) else ()
    return _together(dataset, config, seeds, found, peers)


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


def _together(
    dataset: ActionDataset,
    config: ComparisonConfig,
    seeds: tuple[int, ...],
    by_kind: dict[str, list[CheckpointResult]],
    peers: list[list[CodecReport]],
) -> Comparison:
    named = {f"{kind} {found.name}": found for kind, results in by_kind.items() for found in results}
    schemes = tuple(report for kind, found in by_kind.items() for report in _schemes(kind, found))
    reports = tuple(map(over_seeds, zip(*peers, strict=True)))
    unquantised = {
        name: over_seeds([found.unquantised[name] for found in results])
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
            "calibration": _settings(asdict(DEFAULT_CALIBRATION)),
            "readout": config.readout.choice.value,
            "recovered": _settings(asdict(config.recovered)),
        },
        versions={name: version(name) for name in _PACKAGES},
        checkpoints={name: found.sha256 for name, found in named.items()},
        curves={name: found.curve for name, found in named.items() if found.curve},
        unquantised=unquantised,
        schemes=schemes,
        peers=reports,
        error_edges=ERROR_EDGES,
        trajectory=_trajectory(dataset, by_kind["naive"][0].decoded | by_kind["robust"][0].decoded),
        improvement=improvement_over_naive(schemes),
        findings=find(schemes, unquantised, data),
        remarks=tuple(dict.fromkeys(remark for found in named.values() for remark in found.remarks)),
        peer_verdict=judge_peers(schemes, reports),
    )


def _settings(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _schemes(kind: str, found: Sequence[CheckpointResult]) -> list[SchemeReport]:
    """Those that every checkpoint has; a remark says why one is missing."""
    reports = []
    for name in found[0].schemes:
        same = [result.schemes[name] for result in found if name in result.schemes]
        if len(same) == len(found):
            checkpoints = tuple(f"{kind} {result.name}" for result in found)
            shares = np.mean([report.error_share for report in same], axis=0).tolist()
            reports.append(replace(over_seeds(same), checkpoints=checkpoints, error_share=tuple(shares)))
    return reports


def _data_facts(dataset: ActionDataset, config: ComparisonConfig) -> DataFacts:
    split = split_episodes(dataset)
    parts: dict[str, ActionDataset] = vars(split)
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
    recorded = judged.episodes[0][:TRAJECTORY_STEPS]
    return Trajectory(
        f"{judged.tasks[0]} {judged.names[0]}".strip(),
        _rounded(recorded),
        {name: _rounded(v) for name, v in decoded.items()},
    )


def _rounded(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(value), 5) for value in step) for step in values)
