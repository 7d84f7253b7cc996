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
from collections.abc import Callable, Sequence

import torch

from rfsq.evidence.networks import NetworkRecipe
from rfsq.evidence.policies import PolicyConfig
from rfsq.evidence.policy_lessons import CHUNK_LENGTH, encoded, fitted_tokens, load_lessons, save_lessons
from rfsq.evidence.policy_recordings import BODIES, load_recordings, record_all
from rfsq.evidence.policy_sight import lessons
from rfsq.evidence.policy_training import targets_of, train_all
from rfsq.evidence.settings import SEEDS
from rfsq.runtime.bundle.command import CommandParser, Outcome, natural, path_argument, positive, run
from rfsq.runtime.bundle.paths import refuse_existing

#: Smaller than in the study, so that a processor can drive with it.
POLICY = PolicyConfig(width=160, depth=4, steps=4000)
OAT_RECIPE = NetworkRecipe(steps=5_000, learning_rate=1e-3)
_TASKS = ("Lift", "Stack")


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
    parser.add_argument("--oat-steps", type=natural, default=OAT_RECIPE.steps, metavar="N", help="0 leaves OAT out")
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
    path = options.folder / "lessons.npz"
    refuse_existing([path], overwrite=options.overwrite)
    recordings = load_recordings(_recordings(options))
    found = encoded(fitted_tokens(recordings), recordings)
    save_lessons(path, found)
    return Outcome(f"✓ wrote {path}", {"tokens": list(found.tokens)})


def _train(options: argparse.Namespace) -> Outcome:
    torch.set_float32_matmul_precision("high")
    recordings, tokens = load_recordings(_recordings(options)), load_lessons(options.folder / "lessons.npz")
    recipe = NetworkRecipe(options.oat_steps, learning_rate=OAT_RECIPE.learning_rate) if options.oat_steps else None
    weights = options.folder / "weights"
    targets = targets_of(recordings, tokens, recipe, weights)
    seen, _ = lessons(recordings, options.tasks, CHUNK_LENGTH)
    config = PolicyConfig(options.width, options.depth, steps=options.steps, batch=options.batch)
    train_all(seen, targets, config, options.seeds, options.workers, weights)
    return Outcome(f"✓ wrote {weights}", {"policies": list(targets)})


def _recordings(options: argparse.Namespace) -> Path:
    path: Path = options.folder / "recordings.npz"
    return path


_STEPS: dict[str, Callable[[argparse.Namespace], Outcome]] = {"record": _record, "encode": _encode, "train": _train}
