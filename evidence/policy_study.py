#!/usr/bin/env python3
"""Train the same small policy on the tokens of several tokenizers, and judge the actions that it says: needs a GPU.

Every policy sees the same contexts, trains as long, and says the likeliest tokens. Policies are trained on the training
episodes and judged on the validation episodes. The result, docs/results/policies.json, is what the docs show.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.evidence.policy_study")

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.calibration.chunk_windows import windows
from rfsq.evidence.devices import all_devices, device_name
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.networks import NetworkRecipe
from rfsq.evidence.policies import PolicyConfig, policy_of, train_policy
from rfsq.evidence.policy_results import AUTOREGRESSIVE, POLICIES_JSON, PolicyReport, PolicyResults, PrefixReport, table
from rfsq.evidence.policy_tokens import PolicyTokens, all_tokens, contexts
from rfsq.evidence.results import Document, Spread
from rfsq.evidence.settings import SEEDS
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit, load_demonstrations, split_episodes
from rfsq.runtime.bundle.command import CommandParser, Outcome, positive, run
from rfsq.runtime.bundle.paths import refuse_existing

CHUNK_LENGTH = 8
OAT_RECIPE = NetworkRecipe(steps=5_000, learning_rate=1e-3)
_Job = TypeVar("_Job")
_Answers = TypeVar("_Answers")
_Results = TypeVar("_Results", bound=Document)
_JobOut = TypeVar("_JobOut", covariant=True)
_AnswersIn = TypeVar("_AnswersIn", contravariant=True)
_ResultsOut = TypeVar("_ResultsOut", bound=Document, covariant=True)
#: How many of the tokens said so far each kind of policy is shown.
POLICIES = {AUTOREGRESSIVE: None, "in two passes": 1}
#: Processes that share one GPU: a policy is too small to fill it.
_PER_GPU = 10
#: Contexts in one batch that is asked.
_ASKED = 1024
_JUDGED = "validation"


@dataclass(frozen=True, eq=False)
class PolicyJob:
    """One training. vocabulary: None where it says actions; seen [n, C] and targets: tokens int64 [n, L] or actions
    float32 [n, N]; asked [m, C]: contexts that it is judged on; place: which of all."""

    place: int
    seed: int
    config: PolicyConfig
    vocabulary: int | None
    seen: npt.NDArray[np.float32]
    targets: npt.NDArray[np.generic]
    asked: npt.NDArray[np.float32]
    device: str


@dataclass(frozen=True, eq=False)
class Entry:
    """One row of the study: what policies of one kind, one for each seed, say. tokens: None where they say actions."""

    tokens: PolicyTokens | None
    policy: str


def said(job: PolicyJob) -> tuple[int, int, npt.NDArray[np.generic]]:
    """Train, and ask: the place and the seed of the job, and what the policy says of each context asked."""
    if job.device != "cpu":
        # What is recorded goes to the current device.
        torch.cuda.set_device(job.device)
    torch.manual_seed(job.seed)
    seen, targets, asked = (torch.from_numpy(part).to(job.device) for part in (job.seen, job.targets, job.asked))
    policy = policy_of(seen.shape[1], job.vocabulary, targets.shape[1], job.config).to(job.device)
    train_policy(policy, seen, targets, job.seed)
    with torch.inference_mode():
        answers = torch.cat([policy.say(part) for part in torch.split(asked, _ASKED)])
    return job.place, job.seed, answers.cpu().numpy()


class Study:
    """The entries, the jobs that they need, and what becomes of their answers."""

    def __init__(self, dataset: ActionDataset, split: EpisodeSplit, tokens: Sequence[PolicyTokens]) -> None:
        self._dataset = dataset
        self.entries = [Entry(None, AUTOREGRESSIVE)]
        self.entries += [Entry(each, policy) for policy in POLICIES for each in tokens]
        tasks = sorted(set(dataset.tasks))
        self._seen, self._asked = (contexts(part, CHUNK_LENGTH, tasks) for part in (split.train, split.validation))
        self._train, self.judged = (
            windows(part.episodes, CHUNK_LENGTH).reshape(-1, CHUNK_LENGTH, dataset.action_dim)
            for part in (split.train, split.validation)
        )
        self._trained = {each: each.encode(self._train) for each in tokens}
        self._own = {each: self._own_prefixes(each) for each in tokens}
        self._errors: dict[int, dict[int, tuple[float, ...]]] = {}

    def _own_prefixes(self, tokens: PolicyTokens) -> list[PrefixReport]:
        """What the recorded actions' own tokens are worth, as if a policy said them."""
        own = tokens.encode(self.judged)
        found = []
        for count in tokens.prefixes:
            error = self._error(tokens.decode(own[:, :count]))
            found.append(PrefixReport(count, tokens.bits(own[:, :count]) / CHUNK_LENGTH, error, Spread.of([error])))
        return found

    def jobs(self, config: PolicyConfig, seeds: Sequence[int], devices: Sequence[str]) -> list[PolicyJob]:
        """Seed by seed, so that a study that was stopped has all rows; the longest first."""
        found = [self._job(place, seed, config) for seed in seeds for place in range(len(self.entries))]
        found.sort(key=lambda job: (seeds.index(job.seed), -job.targets.shape[1] * (job.vocabulary is not None)))
        return [replace(job, device=devices[index % len(devices)]) for index, job in enumerate(found)]

    def _job(self, place: int, seed: int, config: PolicyConfig) -> PolicyJob:
        entry = self.entries[place]
        targets = self._train.flatten(1).float() if entry.tokens is None else self._trained[entry.tokens]
        return PolicyJob(
            place=place,
            seed=seed,
            config=replace(config, shown=POLICIES[entry.policy]),
            vocabulary=None if entry.tokens is None else entry.tokens.vocabulary,
            seen=self._seen.numpy(),
            targets=targets.numpy(),
            asked=self._asked.numpy(),
            device="cpu",
        )

    def add(self, place: int, seed: int, answers: npt.NDArray[np.generic]) -> str:
        """Judge what one policy said; the line that a log shows."""
        entry, found = self.entries[place], torch.from_numpy(answers)
        if entry.tokens is None:
            errors: tuple[float, ...] = (self._error(found.reshape(self.judged.shape)),)
        else:
            tokens = entry.tokens
            errors = tuple(self._error(tokens.decode(found[:, :count].long())) for count in tokens.prefixes)
        self._errors.setdefault(place, {})[seed] = errors
        name = entry.tokens.name if entry.tokens else "actions"
        return f"{name}, {entry.policy}, seed {seed}: {', '.join(f'{error:.2e}' for error in errors)}"

    def _error(self, decoded: Tensor) -> float:
        return float((decoded.double() - self.judged).square().mean())

    def results(self, config: PolicyConfig, device: str) -> PolicyResults:
        """Of what was added so far."""
        reports = [self._report(place, found) for place, found in sorted(self._errors.items()) if place]
        regression = self._errors.get(0)
        settings = {name: value for name, value in asdict(config).items() if value is not None}
        return PolicyResults(
            source=self._dataset.source,
            sha256=self._dataset.sha256,
            judged=_JUDGED,
            device=device,
            versions={package: version(package) for package in ("torch", "numpy")},
            settings=settings,
            regression_mse=Spread.of([regression[seed][0] for seed in sorted(regression)]) if regression else None,
            reports=tuple(reports),
        )

    def _report(self, place: int, found: Mapping[int, tuple[float, ...]]) -> PolicyReport:
        tokens = self.entries[place].tokens
        assert tokens is not None
        over_seeds = zip(*(found[seed] for seed in sorted(found)), strict=True)
        prefixes = tuple(
            replace(own, policy_mse=Spread.of(errors))
            for own, errors in zip(self._own[tokens], over_seeds, strict=True)
        )
        return PolicyReport(tokens.name, self.entries[place].policy, tokens.vocabulary, prefixes)


class Studied(Protocol[_JobOut, _AnswersIn, _ResultsOut]):
    """What `run_study` runs: jobs, each with a place and a seed, and what becomes of their answers."""

    def jobs(self, config: PolicyConfig, seeds: Sequence[int], devices: Sequence[str]) -> Sequence[_JobOut]: ...

    def add(self, place: int, seed: int, answers: _AnswersIn) -> str: ...

    def results(self, config: PolicyConfig, device: str) -> _ResultsOut: ...


def run_study(
    study: Studied[_Job, _Answers, _Results],
    work: Callable[[_Job], tuple[int, int, _Answers]],
    options: argparse.Namespace,
) -> _Results:
    """All jobs, side by side; the file is written as each is done. options: of `add_study_options`, and the output.

    Raises EvidenceError.
    """
    config = PolicyConfig(options.width, options.depth, steps=options.steps, batch=options.batch)
    workers = options.workers or _PER_GPU * torch.cuda.device_count() or os.cpu_count() or 1
    results: _Results | None = None
    for place, seed, answers in in_processes(
        work, study.jobs(config, tuple(options.seeds), all_devices()), workers, prepare
    ):
        print(study.add(place, seed, answers), flush=True)
        results = study.results(config, device_name())
        results.write(options.output)
    if results is None:
        raise EvidenceError("no seed was given; expected at least one, like --seeds 0")
    return results


def add_study_options(parser: CommandParser) -> None:
    """Of every study that trains policies side by side."""
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S", help="default: 0 1 2")
    parser.add_argument("--workers", type=positive, metavar="N", help=f"processes; default: {_PER_GPU} for each GPU")
    parser.add_settings(
        PolicyConfig(),
        {"width": "of the policy", "depth": "layers", "steps": "of each training", "batch": "chunks in a step"},
    )


def prepare() -> None:
    """Other jobs have the other cores; on a GPU products are three times as fast so."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("evidence/policy_study.py", "train the same policy on several kinds of tokens, and judge it")
    parser.add_output("the result", Path("docs/results") / POLICIES_JSON)
    parser.add_argument(
        "--oat-steps",
        type=positive,
        default=OAT_RECIPE.steps,
        metavar="N",
        help="of OAT's training; default: %(default)s",
    )
    add_study_options(parser)
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    refuse_existing([options.output], overwrite=options.overwrite)
    dataset = load_demonstrations()
    split = split_episodes(dataset)
    study = Study(dataset, split, all_tokens(split, CHUNK_LENGTH, replace(OAT_RECIPE, steps=options.oat_steps)))
    results = run_study(study, said, options)
    print(table(results).text())
    return Outcome(f"✓ wrote {options.output}", {"reports": len(results.reports)})
