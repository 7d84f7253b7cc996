#!/usr/bin/env python3
"""Train small policies on several kinds of tokens, and decode their probabilities in several ways: needs a GPU.

Every policy sees the same contexts and trains as long. They are trained on the training episodes and judged on the
validation episodes. The result, docs/results/beliefs.json, is what docs/beliefs.md shows.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.evidence.belief_study")

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.calibration.chunk import ChunkFitConfig, fit_chunk_code
from rfsq.calibration.chunk_windows import windows
from rfsq.calibration.fitting import calibrate
from rfsq.calibration.settings import CalibrationConfig
from rfsq.evidence.belief_results import BELIEFS_JSON, BeliefReport, BeliefResults, table
from rfsq.evidence.belief_tokens import Believer, LeastSquares, OneByOne, OnePass, StepTokens, TwoPasses
from rfsq.evidence.faster import FasterConfig, FasterNetwork
from rfsq.evidence.networks import NetworkRecipe, train_network
from rfsq.evidence.policies import PolicyConfig, policy_of, train_policy
from rfsq.evidence.policy_study import CHUNK_LENGTH, OAT_RECIPE, add_study_options, run_study
from rfsq.evidence.policy_tokens import (
    BinTokens,
    ChunkTokens,
    NetworkTokens,
    PolicyTokens,
    chunk_tokens,
    contexts,
    fit_fast_tokens,
    oat_tokens,
)
from rfsq.evidence.results import Spread
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, load_checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit, load_demonstrations, split_episodes
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.command import CommandParser, Outcome, positive, run
from rfsq.runtime.bundle.paths import refuse_existing

_JUDGED = "validation"
_BINS, _FAST_SCALE, _STEP_LAYERS = 6, 20.0, 3
#: Of the residual codebooks: four layers of 1,024 entries for each of three patches.
_CODEBOOKS = FasterConfig(layers=4, codebook_size=1024)


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the study. tokens: None where the policy says actions; how: a few words for the table."""

    name: str
    how: str
    tokens: PolicyTokens | None
    believer: Believer


@dataclass(frozen=True, eq=False)
class BeliefJob:
    """One training. seen [n, C] and targets: tokens int64 [n, L] or values float32 [n, N]; asked [m, C]: contexts that
    it is judged on, true: the tokens of their chunks; place: which of all rows."""

    place: int
    seed: int
    config: PolicyConfig
    vocabulary: int | None
    believer: Believer
    seen: npt.NDArray[np.float32]
    targets: npt.NDArray[np.generic]
    asked: npt.NDArray[np.float32]
    true: npt.NDArray[np.generic]
    device: str


def believed(job: BeliefJob) -> tuple[int, int, dict[str, npt.NDArray[np.float64]]]:
    """Train, and ask: the place and the seed of the job, and actions [m, T, A] by the way of decoding."""
    if job.device != "cpu":
        # What is recorded goes to the current device.
        torch.cuda.set_device(job.device)
    torch.manual_seed(job.seed)
    seen, targets, asked = (torch.from_numpy(part).to(job.device) for part in (job.seen, job.targets, job.asked))
    policy = policy_of(seen.shape[1], job.vocabulary, targets.shape[1], job.config).to(job.device)
    train_policy(policy, seen, targets, job.seed)
    with torch.inference_mode():
        found = job.believer.decoded(policy, asked, torch.from_numpy(job.true))
    return job.place, job.seed, {way: actions.double().numpy() for way, actions in found.items()}


class BeliefStudy:
    """The rows, the jobs that they need, and what becomes of their answers."""

    def __init__(self, dataset: ActionDataset, split: EpisodeSplit, entries: Sequence[Entry]) -> None:
        self._dataset, self._entries = dataset, entries
        tasks = sorted(set(dataset.tasks))
        self._seen, self._asked = (contexts(part, CHUNK_LENGTH, tasks) for part in (split.train, split.validation))
        self._train, self._judged = (
            windows(part.episodes, CHUNK_LENGTH).reshape(-1, CHUNK_LENGTH, dataset.action_dim)
            for part in (split.train, split.validation)
        )
        self._errors: dict[int, dict[int, dict[str, float]]] = {}

    def jobs(self, config: PolicyConfig, seeds: Sequence[int], devices: Sequence[str]) -> list[BeliefJob]:
        """Seed by seed, so that a study that was stopped has all rows; the longest first."""
        one = [self._job(place, config) for place in range(len(self._entries))]
        one.sort(key=lambda job: -job.targets.shape[1] * (job.vocabulary is not None))
        found = [replace(job, seed=seed) for seed in seeds for job in one]
        return [replace(job, device=devices[index % len(devices)]) for index, job in enumerate(found)]

    def _job(self, place: int, config: PolicyConfig) -> BeliefJob:
        entry, chunks = self._entries[place], (self._train, self._judged)
        encode = (lambda part: part.flatten(1).float()) if entry.tokens is None else entry.tokens.encode
        targets, true = (encode(part).numpy() for part in chunks)
        return BeliefJob(
            place=place,
            seed=0,
            config=replace(config, shown=entry.believer.shown),
            vocabulary=None if entry.tokens is None else entry.tokens.vocabulary,
            believer=entry.believer,
            seen=self._seen.numpy(),
            targets=targets,
            asked=self._asked.numpy(),
            true=true,
            device="cpu",
        )

    def add(self, place: int, seed: int, answers: Mapping[str, npt.NDArray[np.float64]]) -> str:
        """Judge what one policy believes; the line that a log shows."""
        errors = {way: self._error(torch.from_numpy(actions)) for way, actions in answers.items()}
        self._errors.setdefault(place, {})[seed] = errors
        entry, told = self._entries[place], ", ".join(f"{way} {error:.2e}" for way, error in errors.items())
        return f"{entry.name}, {entry.how}, seed {seed}: {told}"

    def _error(self, decoded: Tensor) -> float:
        return float((decoded - self._judged.double()).square().mean())

    def results(self, config: PolicyConfig, device: str) -> BeliefResults:
        """Of what was added so far."""
        return BeliefResults(
            source=self._dataset.source,
            sha256=self._dataset.sha256,
            judged=_JUDGED,
            device=device,
            versions={package: version(package) for package in ("torch", "numpy")},
            settings={name: value for name, value in asdict(config).items() if value is not None},
            reports=tuple(self._report(place, found) for place, found in sorted(self._errors.items())),
        )

    def _report(self, place: int, found: Mapping[int, Mapping[str, float]]) -> BeliefReport:
        entry, seeds = self._entries[place], sorted(found)
        mse = {way: Spread.of([found[seed][way] for seed in seeds]) for way in found[seeds[0]]}
        return BeliefReport(entry.name, entry.how, entry.tokens.prefixes[-1] if entry.tokens else 0, mse)


def entries_of(split: EpisodeSplit, recipe: NetworkRecipe) -> list[Entry]:
    """All rows, their tokenizers fitted to the training and calibration episodes. recipe: of what is trained.

    Raises DataError, CalibrationError or EvidenceError.
    """
    shape = (CHUNK_LENGTH, split.train.action_dim)
    chunks, held_out = (
        windows(part.episodes, CHUNK_LENGTH).reshape(-1, *shape) for part in (split.train, split.calibration)
    )
    bins = BinTokens(f"{1 << _BINS} bins", 1 << _BINS, fit_bins(split.train.steps(), BinRange.FULL, _BINS), shape)
    fast = fit_fast_tokens(chunks, _FAST_SCALE)
    steps = _step_tokens()
    vectors = _vector_tokens(chunks.float(), held_out.float(), recipe)
    oat = oat_tokens(chunks.float(), held_out.float(), 8, recipe)
    found = [
        Entry("the actions themselves", "by least squares", None, LeastSquares(shape)),
        Entry(bins.name, "one by one", bins, OneByOne(bins, shape)),
        Entry(bins.name, "at once", bins, OnePass(bins)),
        Entry(fast.name, "one by one", fast, OneByOne(fast, shape)),
        Entry(vectors.name, "at once", vectors, OnePass(vectors)),
        Entry(oat.name, "one by one", oat, OneByOne(oat, shape)),
        Entry(oat.name, "at once", oat, OnePass(oat)),
        Entry(steps.name, "at once", steps, OnePass(steps)),
    ]
    for is_shared, order in ((False, "own order"), (True, "shared order")):
        sizes = ChunkSizes(split.train.action_dim, CHUNK_LENGTH)
        config = ChunkFitConfig(has_shared_order=is_shared)
        constants = fit_chunk_code(split.train.episodes, split.calibration.episodes, sizes, config)
        code = ChunkCode(sizes, constants).double()
        cuts: dict[int, ChunkTokens] = {tokens.cut[0]: tokens for tokens in chunk_tokens(code, order)}
        by_class, small = cuts[sizes.class_bits], cuts[4]
        found += [
            Entry(by_class.name, "in two passes", by_class, TwoPasses(by_class)),
            Entry(small.name, "one by one", small, OneByOne(small, shape)),
        ]
    return found


def _step_tokens() -> StepTokens:
    checkpoint = calibrate(load_checkpoint(ROBUST_CHECKPOINT), load_demonstrations(), CalibrationConfig())
    model = checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64)
    name = f"calibrated per-step tokens, {_STEP_LAYERS} layers"
    return StepTokens(name, checkpoint.config.num_levels, model, CHUNK_LENGTH, _STEP_LAYERS)


def _vector_tokens(chunks: Tensor, held_out: Tensor, recipe: NetworkRecipe) -> NetworkTokens:
    torch.manual_seed(recipe.seed)
    network = FasterNetwork(_CODEBOOKS, chunks.shape[2]).to("cuda" if torch.cuda.is_available() else "cpu")
    train_network(network, chunks, held_out, recipe)
    return NetworkTokens("residual VQ (FASTer)", network.vocabulary, network.cpu())


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("evidence/belief_study.py", "decode the probabilities of policies in several ways")
    parser.add_output("the result", Path("docs/results") / BELIEFS_JSON)
    parser.add_argument(
        "--network-steps",
        type=positive,
        default=OAT_RECIPE.steps,
        metavar="N",
        help="of the training of OAT and residual VQ; default: %(default)s",
    )
    add_study_options(parser)
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    refuse_existing([options.output], overwrite=options.overwrite)
    dataset = load_demonstrations()
    split = split_episodes(dataset)
    study = BeliefStudy(dataset, split, entries_of(split, replace(OAT_RECIPE, steps=options.network_steps)))
    results = run_study(study, believed, options)
    print(table(results).text())
    return Outcome(f"✓ wrote {options.output}", {"reports": len(results.reports)})
