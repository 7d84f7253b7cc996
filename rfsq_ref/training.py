"""Trains a Robust RFSQ (or naive) action autoencoder by the published recipe.

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

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import checkpoint_of
from rfsq.rfsq_ref.data import ActionDataset, split_episodes
from rfsq.rfsq_ref.errors import DataError, SettingsError, TrainingError
from rfsq.rfsq_ref.normaliser import Normaliser, fit_normaliser
from rfsq.rfsq_ref.normaliser_choice import untouched
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.rfsq_ref.training_history import EpochRecord, TrainResult

#: In normalised units: float32 holds the sum of 2^28 squares of it.
_FARTHEST = 2.0**50


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
    for part in (episodes, split.validation):
        _refuse_overflow(part, normaliser)
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


def _refuse_overflow(part: ActionDataset, normaliser: Normaliser | None) -> None:
    """Raises DataError, before any work, for an action whose squared error float32 cannot add up."""
    offset, scale = (np.array(normaliser.offset), np.array(normaliser.scale)) if normaliser else (0.0, 1.0)
    for name, episode in zip(part.names, part.episodes, strict=True):
        far = np.argwhere(np.abs(episode.astype(np.float64) - offset) > _FARTHEST * scale)
        if far.size:
            step, dimension = map(int, far[0])
            raise DataError(
                f"{part.source}, episode {name!r}, step {step}, dimension {dimension}: {episode[step, dimension]}; "
                f"expected at most {_FARTHEST:.0e} in normalised units, or squared errors overflow float32: repair or "
                "drop this episode, or give another --normaliser"
            )


def _fit(
    model: ActionAutoencoder, steps: Tensor, validation: Tensor, config: TrainConfig, *, show_progress: bool
) -> tuple[EpochRecord, list[EpochRecord]]:
    """The epoch with the lowest validation error, whose weights the model then has, and all that ran.

    steps, validation: float32 [N, A]. Raises TrainingError where no epoch has an error below infinity.
    """
    generator = torch.Generator().manual_seed(config.seed)
    history: list[EpochRecord] = []
    chosen = EpochRecord(0, math.inf, math.inf)
    best = copy.deepcopy(model.state_dict())
    epochs = train_epochs(model, partial(_normalised_mse, model), steps, config, generator)
    # None: on a terminal alone.
    with tqdm(epochs, total=config.epochs, unit="epoch", disable=None if show_progress else True) as progress:
        for epoch, train_mse in enumerate(progress, start=1):
            record = EpochRecord(epoch, train_mse, _evaluate(model, validation))
            history.append(record)
            if record.validation_mse < chosen.validation_mse:
                chosen, best = record, copy.deepcopy(model.state_dict())
            elif config.patience and epoch - chosen.epoch >= config.patience:
                break
            progress.set_postfix(train=f"{record.train_mse:.2e}", validation=f"{record.validation_mse:.2e}")
    model.load_state_dict(best)
    if not math.isfinite(chosen.train_mse):
        last = history[-1]
        raise TrainingError(
            f"training diverged: train MSE {last.train_mse}, validation MSE {last.validation_mse} in epoch "
            f"{last.epoch}; lower the learning rate (--learning-rate, now {config.learning_rate})"
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


def train_epochs(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    steps: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
) -> Iterator[float]:
    """Train epoch by epoch: the mean loss of each, after which the model is in evaluation mode.

    loss_of: the loss of a batch of `steps` [N, A]; config: epochs, batch_size and learning_rate count.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=config.epochs)
    for _ in range(config.epochs):
        model.train()
        total = 0.0
        for batch in torch.split(torch.randperm(len(steps), generator=generator), config.batch_size):
            loss = loss_of(steps[batch.to(steps.device)])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            total += float(loss.detach()) * len(batch)
        schedule.step()
        model.eval()
        yield total / len(steps)


@torch.no_grad()
def _evaluate(model: ActionAutoencoder, steps: Tensor) -> float:
    return float(_normalised_mse(model, steps))


def _normalised_mse(model: ActionAutoencoder, actions: Tensor) -> Tensor:
    return mse_loss(model(actions) / model.units, actions / model.units)
