#!/usr/bin/env python3
"""Train the neural peers of chunk tokens, OAT and FASTerVQ, and judge them: best on a GPU, minutes there.

All jobs run side by side, one process each. The result, docs/results/peers.json, is what `compare.py` shows of them.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.evidence.train_peers")

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from operator import call

import torch

from rfsq.calibration.chunk_windows import windows
from rfsq.evidence.devices import all_devices, device_name
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.faster import FasterConfig, FasterNetwork
from rfsq.evidence.judging import PARTS, Trial, all_chunks, wrong_token_errors
from rfsq.evidence.networks import ChunkNetwork, NetworkRecipe, Trained, network_codecs, train_network
from rfsq.evidence.oat import OatConfig, OatNetwork
from rfsq.evidence.results import CodecReport, Document
from rfsq.evidence.settings import SEEDS, OscPose
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.data import DEMONSTRATIONS, ActionDataset, load_actions
from rfsq.rfsq_ref.normaliser import fit_normaliser, suggested_normaliser
from rfsq.runtime.bundle.command import CommandParser, Outcome, path_argument, run
from rfsq.runtime.bundle.paths import refuse_existing
from rfsq.runtime.bundle.reading import build, parse_json

PEERS_JSON = Path("docs/results/peers.json")


@dataclass(frozen=True)
class PeerJob:
    """One training. series: the name of its setting; left_out: the task that it does not see, and is judged on."""

    series: str
    network: OatConfig | FasterConfig
    recipe: NetworkRecipe = field(default_factory=NetworkRecipe)
    left_out: str = ""


@dataclass(frozen=True)
class PeerResult:
    """reports: of every prefix; wrong_tokens: see `wrong_token_errors`, of all tokens, by place."""

    job: PeerJob
    training: Trained
    reports: tuple[CodecReport, ...]
    wrong_tokens: tuple[float, ...]


@dataclass(frozen=True)
class PeerResults(Document):
    """judged: the part of the episodes that errors are of; device: what trained."""

    format, version, again = "rfsq-neural-peers", 1, ("evidence/train_peers.py",)

    source: str
    sha256: str
    judged: str
    device: str
    versions: dict[str, str]
    results: tuple[PeerResult, ...]


def default_jobs(seeds: Iterable[int] = SEEDS) -> tuple[PeerJob, ...]:
    """Settings chosen on the validation episodes; those of one setting behind one another, so that several devices
    have alike much to do."""
    settings: dict[str, tuple[OatConfig | FasterConfig, NetworkRecipe]] = {
        "OAT, 45 registers": (
            OatConfig(prefixes=(1, 2, 4, 8, 16, 30, 36, 45), dropout=0.0),
            NetworkRecipe(learning_rate=1e-3),
        ),
        "OAT, 16 registers": (
            OatConfig(prefixes=(1, 2, 4, 8, 16), dropout=0.0),
            NetworkRecipe(learning_rate=1e-3),
        ),
        "FASTerVQ": (FasterConfig(), NetworkRecipe()),
    }
    return tuple(
        PeerJob(series, network, replace(recipe, seed=seed))
        for series, (network, recipe) in settings.items()
        for seed in seeds
    )


def train_peer(job: PeerJob, trial: Trial, device: str) -> PeerResult:
    """Train and judge one. Raises DataError or EvidenceError."""
    if device != "cpu":
        torch.cuda.set_device(device)
    split = trial.parts(job.left_out)
    length = job.network.chunk_length
    network = make_network(job, trial.dataset, split.fitted).to(device)
    # Three times as fast there; judging is in float32.
    torch.backends.cuda.matmul.allow_tf32 = True
    trained = train_network(network, _windows(split.fitted, length), _windows(split.validation, length), job.recipe)
    torch.backends.cuda.matmul.allow_tf32 = False
    codecs = network_codecs(network, "OAT" if isinstance(network, OatNetwork) else "FASTerVQ", job.series)
    reports = tuple(trial.report(codec, split.judged, length) for codec in codecs)
    wrong = wrong_token_errors(codecs[-1], all_chunks(split.judged, length), trial.units)
    return PeerResult(job, trained, reports, wrong)


def make_network(job: PeerJob, dataset: ActionDataset, fitted: ActionDataset) -> ChunkNetwork:
    """Untrained, and the same for the same seed."""
    torch.manual_seed(job.recipe.seed)
    kind = suggested_normaliser(dataset)
    normaliser = fit_normaliser(fitted.steps(), kind, untouched=()) if kind else None
    if isinstance(job.network, OatConfig):
        return OatNetwork(job.network, dataset.action_dim, normaliser)
    return FasterNetwork(job.network, dataset.action_dim, normaliser)


def _windows(part: ActionDataset, length: int) -> torch.Tensor:
    return windows(part.episodes, length).float().reshape(-1, length, part.action_dim)


def train_peers(jobs: Sequence[PeerJob], trial: Trial, devices: Sequence[str], output: Path) -> PeerResults:
    """All jobs side by side, over the devices in turn; the file is written as each is done."""
    placed = [
        partial(_placed, place, partial(train_peer, job, trial, devices[place % len(devices)]))
        for place, job in enumerate(jobs)
    ]
    found: dict[int, PeerResult] = {}
    for place, result in in_processes(call, placed, len(jobs), _one_thread):
        found[place] = result
        results = PeerResults(
            source=trial.dataset.source,
            sha256=trial.dataset.sha256,
            judged=trial.judged,
            device=device_name() if devices != ["cpu"] else "CPU",
            versions={package: version(package) for package in ("torch", "numpy")},
            results=tuple(found[index] for index in sorted(found)),
        )
        results.write(output)
        print(line_of(result), flush=True)
    return results


def _placed(place: int, work: Callable[[], PeerResult]) -> tuple[int, PeerResult]:
    return place, work()


def _one_thread() -> None:
    """Other jobs have the other cores."""
    torch.set_num_threads(1)


def line_of(result: PeerResult) -> str:
    """What a log shows of a job that is done: bits of a step and error of each prefix."""
    curve = ", ".join(f"{report.bits:.1f}: {report.mse:.2e}" for report in result.reports)
    unseen = f", without {result.job.left_out}" if result.job.left_out else ""
    training = f"{result.training.steps} steps, {result.training.seconds:.0f} s, kept {result.training.kept_step}"
    return f"{result.job.series}, seed {result.job.recipe.seed}{unseen} ({training}): {curve}"


def read_jobs(path: Path) -> tuple[PeerJob, ...]:
    """Jobs from a JSON list of what PeerJob has. Raises EvidenceError."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return build(tuple[PeerJob, ...], content, "the jobs")
    except (OSError, ValueError) as error:
        raise EvidenceError(f"cannot read jobs from {path}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("evidence/train_peers.py", "train the neural peers of chunk tokens, and judge them")
    parser.add_data()
    parser.add_output("the result", PEERS_JSON)
    parser.add_argument(
        "--jobs", type=path_argument, metavar="F", help="JSON list of trainings; default: three seeds of each peer"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S", help="default: 0 1 2")
    parser.add_argument("--steps", type=int, metavar="N", help="of every training, instead of its own")
    parser.add_argument("--seconds", type=float, metavar="X", help="an end of every training before its steps are done")
    parser.add_argument(
        "--judged", choices=PARTS, default=PARTS[0],
        help="episodes of the verdict; the test once all settings are chosen; default: validation",
    )  # fmt: skip
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    refuse_existing([options.output], overwrite=options.overwrite)
    dataset = load_actions(options.data or DEMONSTRATIONS, key=options.key, filter_key=options.filter_key)
    jobs = read_jobs(options.jobs) if options.jobs else default_jobs(options.seeds)
    changes = {name: value for name in ("steps", "seconds") if (value := getattr(options, name)) is not None}
    jobs = tuple(replace(job, recipe=replace(job.recipe, **changes)) for job in jobs)
    trial = Trial(dataset, options.judged, OscPose() if options.data is None else None)
    results = train_peers(jobs, trial, all_devices(), options.output)
    return Outcome(f"✓ wrote {options.output}", {"results": len(results.results)})
