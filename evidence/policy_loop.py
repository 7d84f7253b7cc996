#!/usr/bin/env python3
"""Drive the simulator with the same small policy on the tokens of several tokenizers.

Four steps, each from the files of the one before: `record` episodes of scripted experts (needs the simulator), `encode`
their chunks, `train` the policies (needs a GPU, or hours), `drive` scenes that nobody has seen (needs the simulator).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.evidence.policy_loop")

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from rfsq.evidence.policies import PolicyConfig
from rfsq.evidence.policy_lessons import (
    CHUNK_LENGTH,
    CHUNK_TOKENS,
    encoded,
    fit_chunk_tokens,
    fitted_tokens,
    load_lessons,
    save_lessons,
)
from rfsq.evidence.policy_loop_results import POLICY_LOOP_JSON, PolicyLoopResults, table
from rfsq.evidence.policy_recordings import BODIES, load_recordings, record_all
from rfsq.evidence.policy_sight import lessons
from rfsq.evidence.policy_study import OAT_RECIPE
from rfsq.evidence.policy_training import (
    ACTIONS,
    OAT,
    load_policies,
    normalisation,
    targets_of,
    train_all,
    training_jobs,
    weights_file,
)
from rfsq.evidence.settings import SEEDS
from rfsq.rfsq_ref.chunk_checkpoint import load_chunk_checkpoint, save_chunk_checkpoint
from rfsq.rfsq_ref.generate_demonstrations import check_simulator
from rfsq.runtime.bundle.command import CommandParser, Outcome, natural, path_argument, positive, run
from rfsq.runtime.bundle.paths import refuse_existing

#: Smaller than in the study, so that a processor can drive with it.
POLICY = PolicyConfig(width=160, depth=4, steps=2000)
_TASKS = ("Lift", "Stack")
_CHUNK_FILE = "chunk.safetensors"
#: Numbers of tokens that are said, where it is not all of them alone: the first four were the best in the study.
_PREFIXES = {CHUNK_TOKENS: (4, 16)}


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("evidence/policy_loop.py", "drive the simulator with policies on several kinds of tokens")
    parser.add_argument("step", choices=tuple(_STEPS), metavar="STEP", help=f"of {', '.join(_STEPS)}, in this order")
    parser.add_argument("--folder", type=path_argument, default=Path("build/loop"), metavar="DIR", help="of all files")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--tasks", nargs="+", choices=tuple(BODIES), default=list(_TASKS), metavar="TASK")
    parser.add_argument("--episodes", type=positive, default=124, metavar="N", help="recorded of each task")
    parser.add_argument("--noise", type=float, default=1.5, metavar="X", help="of recordings, over the expert's usual")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S", help="default: 0 1 2")
    parser.add_argument(
        "--oat-steps", type=natural, default=OAT_RECIPE.steps, metavar="N", help="of OAT's own; 0: no OAT"
    )
    parser.add_argument("--scenes", type=positive, default=50, metavar="N", help="driven of each task")
    parser.add_argument(
        "--executed", type=positive, nargs="+", default=[CHUNK_LENGTH], metavar="N",
        help=f"steps of a chunk before the policy is asked again, {CHUNK_LENGTH} at most; default: {CHUNK_LENGTH}",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=path_argument, default=Path("docs/results") / POLICY_LOOP_JSON, metavar="PATH",
        help="of the last step; default: %(default)s",
    )  # fmt: skip
    parser.add_settings(
        POLICY, {"width": "of a policy", "depth": "layers", "steps": "of each training", "batch": "chunks in a step"}
    )
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    return _STEPS[options.step](options)


def _record(options: argparse.Namespace) -> Outcome:
    path = _recordings(options)
    refuse_existing([path], overwrite=options.overwrite)
    found = record_all(options.tasks, options.episodes, options.noise, options.workers, path)
    return Outcome(f"✓ wrote {path}", {"recordings": len(found)})


def _encode(options: argparse.Namespace) -> Outcome:
    path, chunk = options.folder / "lessons.npz", options.folder / _CHUNK_FILE
    refuse_existing([path, chunk], overwrite=options.overwrite)
    recordings = load_recordings(_recordings(options))
    save_chunk_checkpoint(fit_chunk_tokens(recordings), chunk)
    found = encoded(fitted_tokens(recordings, load_chunk_checkpoint(chunk)), recordings)
    save_lessons(path, found)
    return Outcome(f"✓ wrote {path}", {"tokens": list(found.tokens)})


def _train(options: argparse.Namespace) -> Outcome:
    torch.set_float32_matmul_precision("high")
    recordings, tokens = load_recordings(_recordings(options)), load_lessons(options.folder / "lessons.npz")
    recipe = replace(OAT_RECIPE, steps=options.oat_steps) if options.oat_steps else None
    weights = options.folder / "weights"
    files = [weights_file(weights, name) for name in (*tokens.tokens, OAT, ACTIONS)]
    refuse_existing(files, overwrite=options.overwrite)
    targets = targets_of(recordings, tokens, recipe, weights)
    seen, _ = lessons(recordings, options.tasks, CHUNK_LENGTH)
    config = PolicyConfig(options.width, options.depth, steps=options.steps, batch=options.batch)
    mean, deviation = normalisation(seen)
    jobs = training_jobs((seen - mean) / deviation, targets, config, options.seeds)
    train_all(jobs, (mean, deviation), options.workers, weights)
    return Outcome(f"✓ wrote {weights}", {"policies": list(targets)})


def _drive(options: argparse.Namespace) -> Outcome:
    # It needs the simulator.
    from rfsq.evidence.policy_driving import MOST_STEPS
    from rfsq.evidence.policy_trials import Tally, believers_of, decoders_of, drive_all, jobs_of, trials_of, weights_in

    refuse_existing([options.output], overwrite=options.overwrite)
    versions = check_simulator("torch")
    recordings, learnt = load_recordings(_recordings(options)), load_lessons(options.folder / "lessons.npz")
    weights = options.folder / "weights"
    tokens = fitted_tokens(recordings, load_chunk_checkpoint(options.folder / _CHUNK_FILE))
    decoders = decoders_of(tokens, recordings, learnt, weights)
    policies = {path: load_policies(path) for path in weights_in(weights, [*learnt.tokens, OAT, ACTIONS])}
    ways = {name: believer.ways for name, believer in believers_of(decoders).items()}
    trials = trials_of(policies, _PREFIXES, ways, options.executed)
    jobs, tally = jobs_of(trials, options.tasks, options.scenes), Tally()
    counts = Counter(recording.task for recording in recordings)
    kind = next(iter(policies.values())).kind
    for driven in tqdm(drive_all(jobs, decoders, options.workers), "closed loop", len(jobs), unit="job", disable=None):
        tally.add(driven)
        results = PolicyLoopResults(
            recorded={task: counts[task] for task in options.tasks},
            noise=options.noise,
            most_steps=MOST_STEPS,
            device=kind.device,
            versions=versions,
            settings={name: value for name, value in kind.config.items() if value is not None},
            reports=tuple(tally.reports(trials, options.tasks)),
        )
        results.write(options.output)
    print(table(results).text())
    return Outcome(f"✓ wrote {options.output}", {"reports": len(results.reports)})


def _recordings(options: argparse.Namespace) -> Path:
    path: Path = options.folder / "recordings.npz"
    return path


_STEPS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "record": _record,
    "encode": _encode,
    "train": _train,
    "drive": _drive,
}
