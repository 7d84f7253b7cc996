#!/usr/bin/env python3
"""Training on action error through the tokenizer: a small policy whose loss is what its beliefs decode to.

    python examples/belief_training.py build/chunk       chunk tokens: some minutes on one core
    python examples/belief_training.py build/bundle      per-step tokens
    python examples/belief_training.py build/chunk --quick      in seconds, and worse

The same policy is trained on the cross-entropy of the recorded tokens, on that and the error of the actions that its
beliefs decode to, by two weights, and, as a yardstick, to say the actions themselves. All are judged on episodes that
none has seen. belief_policies.py has the policies, speculative_data.py what they see. The exit status is 0 where a run
ends, 2 when nothing could be run.
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
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.belief_policies import BelievingPolicy, ChunkPolicy, StepPolicy, layers
from examples.speculative_data import Eyes, Windows, cut_windows
from rfsq.rfsq_ref.data import load_demonstrations, split_episodes
from rfsq.runtime import ActionTokenizer, TokenizerError
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.console import aligned, escape_what_cannot_be_shown
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer

Adapter = ActionRFSQAE | ChunkTokenizer
TOKENS, ACTIONS = "tokens alone", "the actions themselves"
#: Of the embedded demonstrations.
ACTION_DIM = 7
STEPS, QUICK_STEPS, BATCH, RATE = 600, 30, 256, 1e-3


@dataclass(frozen=True)
class Judged:
    """On held-out windows: mean squared error, in normalised units, of what is believed and of the likeliest tokens;
    within: the share of actions within one standard deviation of what is believed. NaN where there is none."""

    believed: float
    likeliest: float
    within: float


def main() -> int:
    escape_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=8, metavar="L", help="chunk tokens said; default: %(default)s")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[100, 1000], metavar="W", help="of the error; default: 100 1000"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="default: 0")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, and every eighth window")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    try:
        run(options)
    except TokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    # One thread: the same numbers whatever the number of cores.
    torch.set_num_threads(1)
    tokenizer = open_adapter(options.bundle)
    model = tokenizer.tokenizer.model
    units, offset = (np.array(values, np.float32) for values in (model.action_units, model.action_offset))
    split = split_episodes(load_demonstrations())
    eyes = Eyes(model.chunk_length, units, offset, tuple(sorted(set(split.train.tasks))))
    learnt = cut_windows(split.train, eyes, tokenizer, every=8 if options.quick else 1)
    held_out = cut_windows(split.validation, eyes, tokenizer, every=8 if options.quick else 1)
    print(f"tokens    {model.mode}, fingerprint {tokenizer.fingerprint[:16]}")
    print(f"learnt    {len(split.train.episodes)} episodes, {len(learnt)} windows")
    print(f"held out  {len(split.validation.episodes)} episodes, {len(held_out)} windows")
    steps, scale = QUICK_STEPS if options.quick else options.steps, torch.from_numpy(units)
    weights = {TOKENS: 0.0, **{f"tokens, and {weight:g} x action error": weight for weight in options.weights}}
    found: dict[str, list[Judged]] = {kind: [] for kind in (*weights, ACTIONS)}
    for seed in options.seeds:
        for kind, weight in weights.items():
            begin = time.monotonic()
            torch.manual_seed(seed)
            policy = policy_for(tokenizer, eyes.size, options.tokens)
            train(
                policy,
                lambda rows, policy=policy, weight=weight: loss(policy, learnt, rows, weight, scale),
                learnt,
                steps,
            )
            found[kind].append(judge(policy, held_out, scale))
            print(f"seed {seed}, {kind}: {time.monotonic() - begin:.0f} s")
        torch.manual_seed(seed)
        found[ACTIONS].append(least_squares(learnt, held_out, steps, scale))
    print("", *aligned(table(found)), sep="\n")
    print("\nThis shows the interface, with a toy for a policy; it is no claim about a large one.")


def open_adapter(bundle: Path) -> Adapter:
    """Raises TokenizerError for a bundle that does not speak of the demonstrations, by tokens alone."""
    with ActionTokenizer.load(bundle) as tokenizer:
        model, is_chunk = tokenizer.model, not tokenizer.model.token_grid
    if model.has_stats or model.action_dim != ACTION_DIM:
        raise TokenizerError(
            f"{bundle} has {model.action_dim} action dimensions and {model.mode} tokens; expected {ACTION_DIM}, and "
            f"tokens that decode alone: {command('build')} makes such a bundle from the embedded demonstrations"
        )
    return (ChunkTokenizer if is_chunk else ActionRFSQAE).from_bundle(bundle)


def policy_for(tokenizer: Adapter, context_size: int, num_tokens: int) -> BelievingPolicy:
    if isinstance(tokenizer, ChunkTokenizer):
        return ChunkPolicy(context_size, tokenizer, num_tokens)
    return StepPolicy(context_size, tokenizer)


def loss(policy: BelievingPolicy, windows: Windows, rows: Tensor, weight: float, units: Tensor) -> Tensor:
    """What this is all about: the error of the actions is a loss as any other."""
    entropy, belief = policy.losses(windows.context[rows], windows.codes[rows])
    return entropy + weight * functional.mse_loss(belief.actions / units, windows.actions[rows] / units)


def train(network: nn.Module, loss_of: Callable[[Tensor], Tensor], windows: Windows, steps: int) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    network.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(torch.randint(len(windows), (BATCH,))).backward()
        optimiser.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def judge(policy: BelievingPolicy, windows: Windows, units: Tensor) -> Judged:
    belief = policy.believe(windows.context)
    errors = (belief.actions - windows.actions).abs()
    likeliest = policy.likeliest(windows.context) - windows.actions
    return Judged(
        float((errors / units).square().mean()),
        float((likeliest / units).square().mean()),
        float((errors <= belief.std).float().mean()),
    )


def least_squares(learnt: Windows, held_out: Windows, steps: int, units: Tensor) -> Judged:
    """A network as large, which says the actions."""
    network = layers(learnt.context.shape[1], learnt.actions[0].numel())

    def error(windows: Windows, rows: Tensor) -> Tensor:
        said = network(windows.context[rows]).reshape(windows.actions[rows].shape)
        return functional.mse_loss(said, windows.actions[rows] / units)

    train(network, lambda rows: error(learnt, rows), learnt, steps)
    with torch.no_grad():
        return Judged(float(error(held_out, torch.arange(len(held_out)))), math.nan, math.nan)


def table(found: Mapping[str, Sequence[Judged]]) -> list[list[str]]:
    rows = [["trained on", "action MSE, believed", "of the likeliest tokens", "within one std"]]
    for kind, judged in found.items():
        columns = zip(*((one.believed, one.likeliest, 100 * one.within) for one in judged), strict=True)
        rows.append([kind, *map(spread, columns, (4, 4, 1))])
    return rows


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and half of the range where there are several; empty for NaN."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
