#!/usr/bin/env python3
"""Speculative decoding of action tokens: a small draft says the coarse layers, a main model accepts and completes them.

    python examples/speculative_decoding.py build/bundle            trains both in about two minutes on one core
    python examples/speculative_decoding.py build/bundle --quick    in seconds, and worse

This shows the interface. Both models are toys, trained on 75 simulated episodes, without images: no claim about a large
one. speculative_data.py is what they see, speculative_models.py what they are, speculative_acceptance.py the rule,
speculative_arrivals.py what reaches the control loop and when, speculative_loop.py the loop. -v prints every table. The
exit status is 0 when every verdict is a ✓, 1 when not, 2 when nothing could be run.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from examples.missing_packages import explain_missing_packages

    explain_missing_packages()

import argparse
import logging
import time
from dataclasses import replace

import numpy as np
import torch

from examples.speculative_acceptance import Speculation
from examples.speculative_data import Eyes, cut_windows
from examples.speculative_latency import latency_table
from examples.speculative_loop import CONFIG, drive
from examples.speculative_models import Size, TokenModel, train
from examples.speculative_report import acceptance_table, error_table, loop_table, verdicts
from rfsq.rfsq_ref.data import load_demonstrations, split_episodes
from rfsq.runtime import TokenizerError
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.console import aligned, escape_what_cannot_be_shown
from rfsq.runtime.torch_adapter import ActionRFSQAE

COARSE = 3
DRAFT, MAIN = Size(width=128, depth=2, epochs=60), Size(width=512, depth=2, epochs=60)
#: With `--quick` both have half the width, too.
QUICK_EPOCHS, QUICK_BATCH = 8, 64


def main() -> int:
    escape_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--epochs", type=int, help=f"of both models; default: {MAIN.epochs}")
    parser.add_argument(
        "--quick", action="store_true", help="smaller models, every fourth window, few epochs, few episodes in the loop"
    )
    parser.add_argument("--tolerance", type=float, default=0.2, help="of a step, in action units; default: 0.2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-v", "--verbose", action="store_true", help="errors, latency and the loop as tables, too")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    try:
        return 0 if run(options) else 1
    except TokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(options: argparse.Namespace) -> bool:
    if (options.epochs is not None and options.epochs < 1) or not 0 < options.tolerance < float("inf"):
        raise TokenizerError(
            f"--epochs is {options.epochs} and --tolerance {options.tolerance:g}; expected at least 1 epoch and "
            "a finite tolerance above 0: correct them"
        )
    # One thread: the same numbers whatever the number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = open_adapter(options.bundle)
    model = tokenizer.tokenizer.model
    split = split_episodes(load_demonstrations())
    units, offset = (np.array(values, np.float32) for values in (model.action_units, model.action_offset))
    eyes = Eyes(model.chunk_length, units, offset, tuple(sorted(set(split.train.tasks))))
    trained = cut_windows(split.train, eyes, tokenizer, every=4 if options.quick else 1)
    held_out = cut_windows(split.test, eyes, tokenizer, every=model.chunk_length // 2)
    print(f"tokens    {model.mode}, fingerprint {tokenizer.fingerprint[:16]}")
    print(f"learnt    {len(split.train.episodes)} episodes, {len(trained)} windows, {len(eyes.tasks)} tasks")
    print(f"held out  {len(split.test.episodes)} episodes, {len(held_out)} windows")

    generator = torch.Generator().manual_seed(options.seed)
    models = []
    for name, size, layers in (("draft", DRAFT, COARSE), ("main", MAIN, model.num_layers)):
        if options.quick:
            size = replace(size, width=size.width // 2, epochs=QUICK_EPOCHS, batch=QUICK_BATCH)
        size = replace(size, epochs=options.epochs or size.epochs)
        made, begin = TokenModel(eyes.size, model, layers, size), time.monotonic()
        bits = train(made, trained, size, generator)
        weights = sum(part.numel() for part in made.parameters())
        print(
            f"{name:10}{weights / 1e6:.1f} million weights, {layers} layers, {size.epochs} epochs in "
            f"{time.monotonic() - begin:.0f} s, {bits:.2f} bits a token"
        )
        models.append(made)
    speculation = Speculation(tokenizer, models[0], models[1], torch.from_numpy(units), options.tolerance)

    verdict = speculation.verify(held_out.context, speculation.propose(held_out.context))
    error_rows, errors = error_table(speculation, trained, held_out, verdict)
    rate_rows, rates = acceptance_table(speculation, trained, held_out, generator)
    episodes = split.test.select(range(5)) if options.quick else split.test
    runs = [drive(speculation, eyes, episodes, tokenizer.tokenizer, with_draft=value) for value in (False, True)]
    tables = [rate_rows]
    if options.verbose:
        timed = latency_table(speculation, held_out, count=50 if options.quick else 400)
        tables = [error_rows, rate_rows, timed, loop_table(*runs)]
    for rows in tables:
        print("", *aligned(rows), sep="\n")
    print()
    found = verdicts(errors, rates, *runs)
    for is_right, text in found:
        print(f"{'✓' if is_right else '✗'} {text}")
    print("This shows the interface, with toys for models; it is no claim about a large one.")
    return all(is_right for is_right, _ in found)


def open_adapter(bundle: Path) -> ActionRFSQAE:
    """Raises TokenizerError for a bundle that cannot speak of the demonstrations coarsely, by tokens alone."""
    tokenizer = ActionRFSQAE.from_bundle(bundle)
    model = tokenizer.tokenizer.model
    needs = {
        f"{CONFIG.action_dim} action dimensions": model.action_dim == CONFIG.action_dim,
        "tokens that decode alone (--conditioning calibrated or recovered)": not model.has_stats,
        f"the prefix {COARSE} of more layers (--prefixes {COARSE})": COARSE in model.prefixes
        and model.num_layers > COARSE,
        "chunks of 4 steps or more (--chunk-length 8)": model.chunk_length >= 4,
    }
    if missing := [name for name, is_met in needs.items() if not is_met]:
        raise TokenizerError(
            f"{bundle} lacks {'; '.join(missing)}; the example speaks of the embedded demonstrations: give the bundle "
            f"of a model that was trained on them, as {command('build')} makes it"
        )
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
