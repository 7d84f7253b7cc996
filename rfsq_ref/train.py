#!/usr/bin/env python3
"""The command that trains a tokenizer on demonstrations; `training.py` has the recipe, and what patience costs."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    run_script("rfsq.rfsq_ref.train")

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rfsq.rfsq_ref.errors import SettingsError
from rfsq.rfsq_ref.settings import NORMALISER_CHOICES, TrainConfig
from rfsq.runtime.bundle.advice import install_package
from rfsq.runtime.bundle.command import CommandParser, Outcome, refuse_idle_choices, run
from rfsq.runtime.bundle.paths import refuse_existing

if TYPE_CHECKING:
    from rfsq.rfsq_ref.data import ActionDataset


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("train")
    parser.add_data()
    parser.add_output("model; default: build/checkpoints/robust.safetensors or naive.safetensors")
    parser.add_argument(
        "--use-layernorm", action=argparse.BooleanOptionalAction, default=True,
        help="normalise every layer's residual (Robust RFSQ), or not (naive RFSQ)",
    )  # fmt: skip
    parser.add_argument(
        "--normaliser", choices=NORMALISER_CHOICES, default="auto",
        help="train on normalised actions; a gripper of unit size (last dimension) stays as it is. auto (default): "
        "min-max where the actions are not of about unit size, else none",
    )  # fmt: skip
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=TrainConfig.seed, help="of the weights and the batches")
    seeds.add_argument("--seeds", type=int, nargs="+", help="train once for each, into NAME-seedS.safetensors")
    parser.add_settings(
        TrainConfig,
        {
            "num_episodes": "training episodes to use, 0 = all",
            "epochs": "most passes over the training episodes",
            "patience": "epochs without a lower validation error before training stops, 0 = never",
            "batch_size": "steps in a batch",
            "learning_rate": "of the first epoch; it falls by a cosine",
            "device": "cpu, as fast for this model, or cuda",
            "latent_dim": "D, tokens of a layer",
            "hidden_width": "of encoder and decoder",
            "num_layers": "L, layers of the quantiser",
            "num_levels": "K, levels of a code",
        },
    )
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    refuse_idle_choices(options)
    from rfsq.rfsq_ref.data import DEMONSTRATIONS, load_actions
    from rfsq.rfsq_ref.normaliser import chosen_normaliser, describe
    from rfsq.rfsq_ref.own_format import check_output
    from rfsq.rfsq_ref.training import make_deterministic, result_files

    output: Path = options.output or Path(
        f"build/checkpoints/{'robust' if options.use_layernorm else 'naive'}.safetensors"
    )
    seeds: list[int] = options.seeds or [options.seed]
    outputs = [output.with_stem(f"{output.stem}-seed{seed}") if options.seeds else output for seed in seeds]
    # Refused now, not after an hour of training.
    check_output(output)
    refuse_existing((file for path in outputs for file in result_files(path)), overwrite=options.overwrite)
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds {' '.join(map(str, seeds))} has one twice; equal runs would pass for a spread")
    dataset = load_actions(options.data or DEMONSTRATIONS, key=options.key, filter_key=options.filter_key)
    make_deterministic()
    given = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
    config = TrainConfig(**{**given, "normaliser": chosen_normaliser(options.normaliser, dataset)})
    print(describe(dataset, options.normaliser))
    trained = [_train(dataset, replace(config, seed=seed), path) for seed, path in zip(seeds, outputs, strict=True)]
    errors = [float(facts["validation_mse"]) for facts in trained]
    verdict = f"✓ wrote {', '.join(map(str, outputs))}: validation MSE {statistics.mean(errors):.3e}"
    if len(errors) > 1:
        verdict += f", standard deviation {statistics.stdev(errors):.1e} of {len(errors)} seeds"
    return Outcome(f"{verdict} (normalised units²)", {"data": dataset.source, "models": trained})


def _train(dataset: "ActionDataset", config: TrainConfig, path: Path) -> dict[str, Any]:
    """What is to be said of one model, after lines have said it."""
    from rfsq.rfsq_ref.training import save_result, train

    result = train(dataset, config, show_progress=True)
    drawing = save_result(result, path)
    kept = result.checkpoint.provenance
    print(
        f"seed {config.seed}: kept epoch {kept['epoch']} of {len(result.history)}, train MSE {kept['train_mse']:.3e}, "
        f"validation MSE {kept['validation_mse']:.3e} (normalised units²)"
    )
    if drawing is None:
        print(f"no drawing of the curve: matplotlib is not installed; {install_package('matplotlib')}")
    facts = {name: kept[name] for name in ("epoch", "train_mse", "validation_mse")}
    return {"output": str(path), "seed": config.seed, "epochs": len(result.history), **facts}
