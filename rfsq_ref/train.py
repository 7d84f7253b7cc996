#!/usr/bin/env python3
"""Train a Robust RFSQ (or naive) action autoencoder by the published recipe.

AdamW at 1e-3 with a cosine schedule, batches of 64 steps, mean squared error through the straight-through
quantiser. The weights with the lowest validation error are kept. On the CPU the same seed, data and torch
version give the same weights.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq_ref.checkpoints import Checkpoint, check_output, checkpoint_of, save_checkpoint
from rfsq_ref.data import ActionDataset, load_actions, load_demonstrations, split_episodes
from rfsq_ref.errors import CheckpointError, DataError
from rfsq_ref.normaliser import NormaliserKind, fit_normaliser
from rfsq_ref.quantizer import Conditioning


@dataclass(frozen=True)
class TrainConfig:
    """use_layernorm: `dynamic` conditioning (Robust RFSQ) or `none` (naive); num_episodes: 0 = all for training."""

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

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.num_episodes < 0:
            raise ValueError(f"num_episodes is {self.num_episodes}; expected 0 (all) or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected more than 0")


@dataclass(frozen=True)
class EpochRecord:
    """Mean squared errors in normalised action units."""

    epoch: int
    train_mse: float
    validation_mse: float


@dataclass(frozen=True)
class TrainResult:
    checkpoint: Checkpoint
    history: tuple[EpochRecord, ...]


def train(dataset: ActionDataset, config: TrainConfig, *, show_progress: bool = False) -> TrainResult:
    """Train on the training episodes of `split_episodes(dataset)`, choose the epoch by its validation episodes.

    Deterministic for a given seed. Raises DataError when there are too few episodes, ValueError when it diverges.
    """
    split = split_episodes(dataset)
    episodes = split.train
    if config.num_episodes:
        if config.num_episodes > len(episodes.episodes):
            raise DataError(
                f"{config.num_episodes} training episodes asked for, {len(episodes.episodes)} are there; "
                "lower --num-episodes"
            )
        episodes = episodes.select(range(config.num_episodes))
    normaliser = fit_normaliser(episodes.steps(), config.normaliser) if config.normaliser else None
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    sizes = ModelConfig(
        episodes.action_dim, config.latent_dim, config.hidden_width, config.num_layers, config.num_levels
    )
    conditioning = Conditioning.DYNAMIC if config.use_layernorm else Conditioning.NONE
    model = ActionAutoencoder(sizes, conditioning, normaliser=normaliser)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=config.epochs)
    steps, validation = torch.from_numpy(episodes.steps().copy()), torch.from_numpy(split.validation.steps().copy())

    history: list[EpochRecord] = []
    best = copy.deepcopy(model.state_dict())
    with tqdm(range(1, config.epochs + 1), unit="epoch", disable=not show_progress) as progress:
        for epoch in progress:
            train_mse = _train_epoch(model, optimiser, steps, config.batch_size, generator)
            schedule.step()
            record = EpochRecord(epoch, train_mse, _evaluate(model, validation))
            if not history or record.validation_mse < min(past.validation_mse for past in history):
                best = copy.deepcopy(model.state_dict())
            history.append(record)
            progress.set_postfix(train=f"{record.train_mse:.2e}", validation=f"{record.validation_mse:.2e}")
    model.load_state_dict(best)
    chosen = min(history, key=lambda record: record.validation_mse)
    if not math.isfinite(chosen.validation_mse):
        raise ValueError(
            f"training diverged: validation MSE {chosen.validation_mse} in epoch {chosen.epoch}; lower the learning "
            f"rate (--learning-rate, now {config.learning_rate})"
        )
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
        actions = steps[batch]
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
    return mse_loss(model(actions).actions / model.units, actions / model.units)


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
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--hidden-width", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-levels", type=int, default=7)
    parser.add_argument("--data", type=Path, help="action data; the embedded demonstrations by default")
    parser.add_argument("--key", help="name of the action array or column in --data, when it is not the usual one")
    parser.add_argument(
        "--normaliser", type=NormaliserKind, choices=list(NormaliserKind),
        help="train on normalised actions (all dimensions but the last, the gripper)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="default: build/checkpoints/robust.safetensors or naive.safetensors"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # One thread: sums come out in one order, and for matrices this small more threads are slower.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    output = (
        options.output or Path("build/checkpoints") / f"{'robust' if options.use_layernorm else 'naive'}.safetensors"
    )
    try:
        # Not after an hour of training.
        check_output(output)
        dataset = load_actions(options.data, key=options.key) if options.data else load_demonstrations()
        config = TrainConfig(**{name: getattr(options, name) for name in TrainConfig.__dataclass_fields__})
        print(
            f"training on {dataset.source}: {len(dataset.episodes)} episodes, {dataset.num_steps} steps, "
            "split by episode"
        )
        result = train(dataset, config, show_progress=True)
        save_checkpoint(result.checkpoint, output)
    except (DataError, CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = result.checkpoint.provenance
    print(
        f"kept epoch {chosen['epoch']}: train MSE {chosen['train_mse']:.3e}, "
        f"validation MSE {chosen['validation_mse']:.3e}"
    )
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
