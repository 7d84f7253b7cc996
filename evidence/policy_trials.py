"""Which policies drive which scenes, and what becomes of their drives."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from rfsq.evidence.belief_tokens import Believer, OnePass, TwoPasses
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.policy_driving import Cell, Driven, DrivingJob, drive, prepare
from rfsq.evidence.policy_lessons import AT_ONCE, IN_TWO_PASSES, Lessons, encoded
from rfsq.evidence.policy_loop_results import EXPERT, LoopReport, LoopRun
from rfsq.evidence.policy_recordings import DRIVEN_SEED, Recording
from rfsq.evidence.policy_tokens import ChunkTokens, PolicyTokens
from rfsq.evidence.policy_training import OAT_FILE, SeeingPolicies, load_oat, weights_file
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.generate_demonstrations import attempt_of

#: Scenes that one job drives at once: each needs some tens of megabytes.
_AT_ONCE = 10


def decoders_of(
    fitted: Sequence[PolicyTokens], recordings: Sequence[Recording], learnt: Lessons, weights: Path
) -> list[PolicyTokens]:
    """What decodes the tokens of the policies in this folder: `fitted`, and OAT where it was trained. Raises
    EvidenceError where it is not what they learnt."""
    found, now = list(fitted), encoded(fitted, recordings)
    for name, tokens in learnt.tokens.items():
        if name not in now.tokens or not torch.equal(now.tokens[name], tokens):
            raise EvidenceError(f"{name} encodes otherwise here than what the policies learnt: encode and train anew")
    if (weights / OAT_FILE).exists():
        found.append(load_oat(weights / OAT_FILE))
    return found


@dataclass(frozen=True)
class Trial:
    """One row of the table. weights: of the policies, None for the expert; count, executed, way: as a Cell has them."""

    name: str
    weights: Path | None
    seeds: tuple[int, ...]
    count: int | None
    executed: int | None
    way: str | None = None


def trials_of(
    policies: Mapping[Path, SeeingPolicies],
    prefixes: Mapping[str, Sequence[int]],
    ways: Mapping[str, Sequence[str]],
    executed: Sequence[int],
) -> list[Trial]:
    """prefixes: numbers of tokens that are said, by name, where it is not all alone; ways: of decoding, by name, where
    probabilities are decoded."""
    found = [Trial(EXPERT, None, (), None, None)]
    for steps in executed:
        for path, each in policies.items():
            kind = each.kind
            counts = [None] if kind.vocabulary is None else prefixes.get(kind.name, [kind.size])
            found += [
                Trial(kind.name, path, tuple(each.by_seed), count, steps, way)
                for count in counts
                for way in ways.get(kind.name, [None])
            ]
    return found


def jobs_of(trials: Sequence[Trial], tasks: Sequence[str], scenes: int) -> list[DrivingJob]:
    """Some scenes of all trials before others, so that a run that was stopped can compare them."""
    found = []
    for begun in range(0, scenes, _AT_ONCE):
        for task in tasks:
            numbers = tuple(range(begun, min(begun + _AT_ONCE, scenes)))
            seeds = tuple(attempt_of(DRIVEN_SEED, task, number).seed for number in numbers)
            for trial in trials:
                found += [DrivingJob(cell, task, numbers, seeds, tuple(tasks), trial.weights) for cell in _cells(trial)]
    return found


def _cells(trial: Trial) -> list[Cell | None]:
    if trial.executed is None:
        return [None]
    return [Cell(trial.name, trial.count, trial.executed, seed, trial.way) for seed in trial.seeds]


@dataclass
class Tally:
    """What was driven so far: scenes, after how many steps they were solved, and errors, by task, trial and seed."""

    found: dict[tuple[str, Cell | None], tuple[list[int], dict[int, int], list[float]]] = field(default_factory=dict)

    def add(self, driven: Driven) -> None:
        scenes, solved, errors = self.found.setdefault((driven.job.task, driven.job.cell), ([], {}, []))
        errors += driven.errors
        scenes += driven.job.numbers
        solved |= {
            number: steps for number, steps in zip(driven.job.numbers, driven.steps, strict=True) if steps is not None
        }

    def reports(self, trials: Sequence[Trial], tasks: Sequence[str]) -> Iterator[LoopReport]:
        """Of what has been driven."""
        for task in tasks:
            for trial in trials:
                runs = []
                for cell in _cells(trial):
                    if (task, cell) in self.found:
                        scenes, solved, errors = self.found[task, cell]
                        seed = None if cell is None else cell.seed
                        runs.append(
                            LoopRun(seed, len(scenes), tuple(sorted(solved.items())), fmean(errors) if errors else None)
                        )
                if runs:
                    yield LoopReport(task, trial.name, trial.count, trial.executed, trial.way, tuple(runs))


def believers_of(decoders: Sequence[PolicyTokens]) -> dict[str, Believer]:
    """Of the policies that do not say their tokens one after the other, by their name."""
    by_name = {each.name: each for each in decoders}
    found: dict[str, Believer] = {AT_ONCE: OnePass(by_name[AT_ONCE])} if AT_ONCE in by_name else {}
    if isinstance(chunk := by_name.get(IN_TWO_PASSES), ChunkTokens):
        found[IN_TWO_PASSES] = TwoPasses(chunk)
    return found


def drive_all(jobs: Sequence[DrivingJob], decoders: Sequence[PolicyTokens], workers: int) -> Iterator[Driven]:
    """Each as soon as it is done. Raises EvidenceError."""
    return in_processes(drive, jobs, workers, partial(prepare, decoders, believers_of(decoders)))


def weights_in(folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of these names that are there."""
    return [path for path in (weights_file(folder, name) for name in names) if path.exists()]
