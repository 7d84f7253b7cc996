#!/usr/bin/env python3
"""Train a Robust RFSQ (or naive) action autoencoder by the published recipe.

AdamW at 1e-3 with a cosine schedule, batches of 64 steps, mean squared error through the straight-through
quantiser. The weights with the lowest validation error are kept, and training stops early when that error has not
improved for `patience` epochs. On the CPU the same seed, data and torch version give the same weights; on a GPU the
same GPU model and CUDA version must be added, and the weights differ from the CPU's.

Patience and the cosine schedule work against each other: most of the gain comes at the end, when the learning rate is
small, and a run that stops early never gets there. On the embedded demonstrations (100 epochs, 3 seeds of either kind)
the error paused for 16 epochs at most before it fell again, so that the default of 25 leaves these runs as they
are; a patience of 5 costs robust training a factor of 4 to 11, one of 10 a factor of 1.9 to 5. It is for runs that
overfit or stall; where time is short, lower `epochs` instead: the schedule follows.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.console import explain_missing_packages

    explain_missing_packages()

import argparse
import copy
import math
import os
import statistics
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import SUFFIX, check_output, checkpoint_of
from rfsq.rfsq_ref.data import ActionDataset, load_actions, load_demonstrations, split_episodes
from rfsq.rfsq_ref.errors import DataError, OutputError, SettingsError, TrainingError, UnusableError
from rfsq.rfsq_ref.normaliser import NormaliserKind, fit_normaliser
from rfsq.rfsq_ref.normaliser_choice import chosen_normaliser, describe, untouched
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.training_history import EpochRecord, TrainResult, history_path, result_files, save_result
from rfsq.runtime.bundle.console import path_argument
from rfsq.runtime.bundle.paths import refuse_existing


@dataclass(frozen=True)
class TrainConfig:
    """use_layernorm: `dynamic` conditioning (Robust RFSQ) or `none` (naive); num_episodes: 0 = all for training.

    patience: stop after so many epochs without a lower validation error, 0 = never; it belongs to a long run: with
    the cosine schedule the last epochs gain most. device: as torch names it, "cpu" or "cuda".
    """

    use_layernorm: bool = True
    epochs: int = 100
    num_episodes: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    latent_dim: int = 16
    hidden_width: int = 64
    num_layers: int = 8
    num_levels: int = 7
    normaliser: NormaliserKind | None = None
    patience: int = 25
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name, nothing in (("num_episodes", "all"), ("patience", "never stop early")):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected 0 ({nothing}) or more")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate}; expected more than 0")
        if not -(2**63) <= self.seed < 2**64:
            raise SettingsError(f"seed is {self.seed}; expected one of 64 bits")


def train(dataset: ActionDataset, config: TrainConfig, *, show_progress: bool = False) -> TrainResult:
    """Train on the training episodes of `split_episodes(dataset)`, choose the epoch by its validation episodes.

    A normaliser leaves the last dimension as it is where that is a gripper command of unit size. Deterministic for a
    given seed; on a GPU after `make_deterministic`. Raises DataError when there are too few episodes, SettingsError
    when the device is not there, TrainingError when training diverges.
    """
    device = _device(config.device)
    split = split_episodes(dataset)
    episodes = split.train
    if config.num_episodes:
        if config.num_episodes > len(episodes.episodes):
            raise DataError(
                f"{config.num_episodes} training episodes asked for, {len(episodes.episodes)} are there; "
                "lower --num-episodes"
            )
        episodes = episodes.select(range(config.num_episodes))
    actions = episodes.steps()
    normaliser = fit_normaliser(actions, config.normaliser, untouched(actions)) if config.normaliser else None
    torch.manual_seed(config.seed)
    sizes = ModelConfig(
        episodes.action_dim, config.latent_dim, config.hidden_width, config.num_layers, config.num_levels
    )
    conditioning = Conditioning.DYNAMIC if config.use_layernorm else Conditioning.NONE
    model = ActionAutoencoder(sizes, conditioning, normaliser=normaliser).to(device)
    steps, validation = torch.from_numpy(actions).to(device), torch.from_numpy(split.validation.steps()).to(device)
    chosen, history = _fit(model, steps, validation, config, show_progress=show_progress)
    provenance = {
        "training": {**asdict(config), "normaliser": config.normaliser.value if config.normaliser else None},
        # The whole file's hash, so that calibration recognises it and keeps away from the training episodes.
        "data": {"source": dataset.source, "sha256": dataset.sha256, "training_steps": episodes.num_steps},
        "epoch": chosen.epoch,
        "train_mse": chosen.train_mse,
        "validation_mse": chosen.validation_mse,
        "torch": str(torch.__version__),
    }
    return TrainResult(checkpoint_of(model, provenance), tuple(history))


def _fit(
    model: ActionAutoencoder, steps: Tensor, validation: Tensor, config: TrainConfig, *, show_progress: bool
) -> tuple[EpochRecord, list[EpochRecord]]:
    """The epoch with the lowest validation error, whose weights the model then has, and all that ran.

    steps, validation: float32 [N, A]. Raises TrainingError where no epoch has an error below infinity.
    """
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=config.epochs)
    history: list[EpochRecord] = []
    chosen = EpochRecord(0, math.inf, math.inf)
    best = copy.deepcopy(model.state_dict())
    # None: on a terminal alone.
    with tqdm(range(1, config.epochs + 1), unit="epoch", disable=None if show_progress else True) as progress:
        for epoch in progress:
            train_mse = _train_epoch(model, optimiser, steps, config.batch_size, generator)
            schedule.step()
            record = EpochRecord(epoch, train_mse, _evaluate(model, validation))
            history.append(record)
            if record.validation_mse < chosen.validation_mse:
                chosen, best = record, copy.deepcopy(model.state_dict())
            elif config.patience and epoch - chosen.epoch >= config.patience:
                break
            progress.set_postfix(train=f"{record.train_mse:.2e}", validation=f"{record.validation_mse:.2e}")
    model.load_state_dict(best)
    if not chosen.epoch:
        raise TrainingError(
            f"training diverged: validation MSE {history[-1].validation_mse} in epoch {history[-1].epoch}; lower the "
            f"learning rate (--learning-rate, now {config.learning_rate})"
        )
    return chosen, history


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device is {name!r}, which torch does not know; expected cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device is {name!r}; expected cpu or cuda, the ones this training was tried on")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device is {name!r}, but torch {torch.__version__} finds {torch.cuda.device_count()} CUDA GPUs here; "
            "use cpu, or one that is there"
        )
    return device


def make_deterministic() -> None:
    """Set torch up, for this whole process, so that one seed gives one result; call it before any work on a GPU."""
    # One thread: sums come out in one order, and for matrices this small more threads are slower.
    torch.set_num_threads(1)
    # Without it cuBLAS has no deterministic results, and torch refuses to use it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _train_epoch(
    model: ActionAutoencoder,
    optimiser: torch.optim.Optimizer,
    steps: Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    model.train()
    total = 0.0
    for batch in torch.split(torch.randperm(len(steps), generator=generator), batch_size):
        actions = steps[batch.to(steps.device)]
        loss = _normalised_mse(model, actions)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        total += float(loss.detach()) * len(actions)
    return total / len(steps)


def _evaluate(model: ActionAutoencoder, steps: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(_normalised_mse(model, steps))


def _normalised_mse(model: ActionAutoencoder, actions: Tensor) -> Tensor:
    return mse_loss(model(actions) / model.units, actions / model.units)


# Command line --------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--use-layernorm", action=argparse.BooleanOptionalAction, default=True,
        help="normalise every layer's residual (Robust RFSQ), or not (naive RFSQ)",
    )  # fmt: skip
    parser.add_argument("--num-episodes", type=int, default=0, help="training episodes to use, 0 = all (default)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--patience", type=int, default=TrainConfig.patience,
        help="epochs without a lower validation error before training stops, 0 = never "
        f"(default {TrainConfig.patience})",
    )  # fmt: skip
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    seeds.add_argument("--seeds", type=int, nargs="+", help="train once for each, into NAME-seedS.safetensors")
    parser.add_argument("--device", default=TrainConfig.device, help="cpu (default; as fast for this model) or cuda")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--hidden-width", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-levels", type=int, default=7)
    parser.add_argument("--data", type=path_argument, help="action data; the embedded demonstrations by default")
    parser.add_argument("--key", help="name of the action array or column in --data, when it is not the usual one")
    parser.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")
    parser.add_argument(
        "--normaliser", choices=["auto", "none", *(kind.value for kind in NormaliserKind)], default="auto",
        help="train on normalised actions; a gripper of unit size (last dimension) stays as it is. auto (default): "
        "min-max where the actions are not of about unit size, else none",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=path_argument, help="default: build/checkpoints/robust.safetensors or naive.safetensors"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there, and its curve")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    make_deterministic()
    name = f"{'robust' if options.use_layernorm else 'naive'}{SUFFIX}"
    output: Path = options.output or Path("build/checkpoints") / name
    seeds: list[int] = options.seeds or [options.seed]
    outputs = [output.with_stem(f"{output.stem}-seed{seed}") if options.seeds else output for seed in seeds]
    errors = []
    try:
        # Not after an hour of training.
        check_output(output)
        written = [file for path in outputs for file in result_files(path)]
        refuse_existing(written, overwrite=options.overwrite, error=OutputError)
        if len(set(seeds)) < len(seeds):
            raise SettingsError(
                f"--seeds {' '.join(map(str, seeds))} has one twice; equal runs would pass for a spread"
            )
        dataset = (
            load_actions(options.data, key=options.key, filter_key=options.filter_key)
            if options.data
            else load_demonstrations()
        )
        given = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
        config = TrainConfig(**{**given, "normaliser": chosen_normaliser(options.normaliser, dataset)})
        print(describe(dataset, options.normaliser))
        for seed, path in zip(seeds, outputs, strict=True):
            result = train(dataset, replace(config, seed=seed), show_progress=True)
            drawing = save_result(result, path)
            kept = result.checkpoint.provenance
            errors.append(float(kept["validation_mse"]))
            print(
                f"seed {seed}: kept epoch {kept['epoch']} of {len(result.history)}, train MSE {kept['train_mse']:.3e}, "
                f"validation MSE {kept['validation_mse']:.3e} (normalised units²)"
            )
            print(f"wrote {path} and {history_path(path).name}")
            if drawing is None:
                print("no drawing of the curve: matplotlib is not installed; pip install '.[evidence]'")
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(errors) > 1:
        mean, deviation = statistics.mean(errors), statistics.stdev(errors)
        print(f"{len(errors)} seeds: validation MSE {mean:.3e}, standard deviation {deviation:.1e} (normalised units²)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
