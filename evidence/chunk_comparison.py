"""Compare codecs of whole chunks at equal bits: chunk tokens, peers that are fitted here, and those of a GPU's results.

One job per seed of chunk tokens and per setting of a peer, spread over processes, each on one thread.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from rfsq.evidence.chunk_jobs import Judged, beast_job, bins_job, chunk_job, fast_job
from rfsq.evidence.chunk_results import ChunkComparison
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.fast import VOCABULARY
from rfsq.evidence.findings import best_within
from rfsq.evidence.gaussian import least_distortion, principal_variances
from rfsq.evidence.judging import Trial
from rfsq.evidence.peers import training_chunks
from rfsq.evidence.results import CodecReport, Spread, over_seeds
from rfsq.evidence.settings import SEEDS
from rfsq.evidence.train_peers import PEERS_JSON, PeerResults
from rfsq.evidence.workers import results_of
from rfsq.rfsq_ref.settings import check_positive
from rfsq.rfsq_ref.training import make_deterministic

#: Their versions may change the numbers.
_PACKAGES = ("torch", "numpy", "scipy", "tokenizers")
#: Of the tasks, each of which costs as much as all else.
_MOST_UNSEEN = 8


@dataclass(frozen=True)
class ChunkComparisonConfig:
    """seeds: of chunk tokens; chunk_length: of chunk tokens, and of all where a task is left out; multiples: of it,
    chunk lengths of FAST and BEAST; vocabularies: of FAST; unseen: leave each task out once, too; workers: processes.
    """

    seeds: tuple[int, ...] = SEEDS
    chunk_length: int = 8
    multiples: tuple[int, ...] = (1, 2, 4)
    vocabularies: tuple[int, ...] = (VOCABULARY, 2 * VOCABULARY)
    unseen: bool = True
    workers: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        check_positive(self, "chunk_length", "workers", error=EvidenceError)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise EvidenceError(f"seeds are {self.seeds}; expected different ones, like 0 1 2")
        if not self.multiples or min(self.multiples) < 1:
            raise EvidenceError(f"multiples are {self.multiples}; expected numbers from 1, like 1 2 4")


def compare_chunks(trial: Trial, config: ChunkComparisonConfig, trained: PeerResults | None = None) -> ChunkComparison:
    """trained: of `train_peers`, on the same episodes; others are left out, and a remark says so."""
    groups = _groups(trial, config)
    jobs = [(group.name, job) for group in groups for job in group.jobs]
    results = iter(results_of(jobs, config.workers, make_deterministic))
    shown, unseen = list[Judged](), dict[str, tuple[CodecReport, ...]]()
    for group in groups:
        judged: Judged = over_seeds([next(results) for _ in group.jobs])
        if group.task:
            unseen[group.task] = (*unseen.get(group.task, ()), *judged.reports)
        else:
            shown.append(judged)
    remarks: tuple[str, ...] = ()
    if trained is not None and (trained.sha256, trained.judged) == (trial.dataset.sha256, trial.judged):
        shown += _trained(trained)
    elif trained is not None:
        remarks = (f"no peers of {PEERS_JSON.name}: they were judged on {trained.judged} episodes of {trained.source}",)
    reports = tuple(report for judged in shown for report in judged.reports)
    wrong = {name: errors for judged in shown for name, errors in judged.wrong_tokens.items()}
    windows = training_chunks(trial.parts().fitted, config.chunk_length)
    variances = principal_variances(windows, trial.units)
    return ChunkComparison(
        source=trial.dataset.source,
        sha256=trial.dataset.sha256,
        judged=trial.judged,
        seeds=config.seeds,
        budgets=trial.budgets,
        versions={name: version(name) for name in _PACKAGES},
        gaussian=tuple(least_distortion(variances, bits * config.chunk_length) for bits in trial.budgets),
        reports=reports,
        unseen=unseen,
        wrong_tokens={name: errors for name, errors in wrong.items() if name not in _idle(reports, trial.budgets)},
        remarks=remarks,
    )


def _idle(reports: Sequence[CodecReport], budgets: Sequence[float]) -> set[str]:
    """The names of those that are not the best of their family within any budget."""
    chosen = {report.name for bits in budgets for report in best_within(reports, bits).values() if report}
    return {report.name for report in reports} - chosen


@dataclass(frozen=True)
class _Group:
    """Jobs that differ by the seed alone. name: of a log's lines; task: what all are fitted without."""

    name: str
    task: str
    jobs: Sequence[Callable[[], Judged]]


def _groups(trial: Trial, config: ChunkComparisonConfig) -> list[_Group]:
    """The longest first, so that no process waits for another at the end."""
    length = config.chunk_length
    lengths = sorted((length * multiple for multiple in config.multiples), reverse=True)
    groups = [
        _Group(f"FAST, {long} steps", "", [partial(fast_job, trial, long, vocabulary)])
        for long in lengths
        for vocabulary in config.vocabularies
    ]
    groups += [_Group(f"BEAST, {long} steps", "", [partial(beast_job, trial, long)]) for long in lengths]
    groups.append(_Group("bins", "", [partial(bins_job, trial)]))
    for task in ("", *_unseen(trial, config)):
        without = f" without {task}" if task else ""
        seeds = [partial(chunk_job, trial, length, seed, task) for seed in config.seeds]
        groups.append(_Group(f"chunk tokens{without}", task, seeds))
        if task:
            groups.append(_Group(f"FAST{without}", task, [partial(fast_job, trial, length, left_out=task)]))
            groups.append(_Group(f"BEAST{without}", task, [partial(beast_job, trial, length, left_out=task)]))
    return groups


def _unseen(trial: Trial, config: ChunkComparisonConfig) -> list[str]:
    """The tasks to be left out: the first ones by name. Where there is one alone, nothing would be left."""
    tasks = sorted(set(trial.dataset.tasks))
    return [task for task in tasks if task][:_MOST_UNSEEN] if config.unseen and len(tasks) > 1 else []


def _trained(trained: PeerResults) -> list[Judged]:
    """Of each series, over its seeds."""
    by_series: dict[str, list[Judged]] = {}
    for result in trained.results:
        if not result.job.left_out:
            wrong = {result.job.series: tuple(Spread.of([error]) for error in result.wrong_tokens)}
            by_series.setdefault(result.job.series, []).append(Judged(result.reports, wrong))
    return [over_seeds(same) for same in by_series.values()]
