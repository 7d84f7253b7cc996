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
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint, checkpoint_of, save_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, split_episodes
from rfsq.rfsq_ref.errors import CheckpointError, DataError, SettingsError, TrainingError
from rfsq.rfsq_ref.normaliser import Normaliser, fit_normaliser, untouched
from rfsq.rfsq_ref.own_format import check_output
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.runtime.bundle.paths import as_path, replacing
from rfsq.runtime.bundle.reading import build, read_file

#: In normalised units: float32 holds the sum of 2^28 squares of it.
_FARTHEST = 2.0**50


@dataclass(frozen=True)
class EpochRecord:
    """Mean squared errors in normalised action units."""

    epoch: int
    train_mse: float
    validation_mse: float


@dataclass(frozen=True)
class TrainResult:
    """A trained checkpoint and its learning curve.

    history: one record per epoch that ran, fewer than asked for when training stopped early."""

    checkpoint: Checkpoint
    history: tuple[EpochRecord, ...]


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


# What is written: a checkpoint, its learning curve as JSON, and with matplotlib a drawing of it -----------------------

HISTORY_FORMAT = "rfsq-training-history"
HISTORY_VERSION = 1
#: In bytes: six times what 100,000 epochs take.
_HISTORY_SIZE_LIMIT = 2**26


@dataclass(frozen=True)
class TrainingHistory:
    """A learning curve, as it lies beside its checkpoint.

    training: the TrainConfig, the seed among it; data: source, sha256 and training_steps; versions: of python, numpy
    and torch; kept_epoch: whose weights the checkpoint has, counted from 1; epochs: all that ran.
    """

    training: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    kept_epoch: int
    epochs: tuple[EpochRecord, ...]


def history_of(result: TrainResult) -> TrainingHistory:
    facts = result.checkpoint.provenance
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": facts["torch"]}
    return TrainingHistory(facts["training"], facts["data"], versions, facts["epoch"], result.history)


def history_path(checkpoint: Path) -> Path:
    """NAME.history.json beside NAME.safetensors; the drawing is NAME.history.png."""
    return checkpoint.with_suffix(".history.json")


def load_history(path: str | os.PathLike[str]) -> TrainingHistory:
    """Read a NAME.history.json. Raises CheckpointError for anything else."""
    path = as_path(path, "the learning curve", CheckpointError)
    try:
        # Not strictly: the curve of a training that diverged later on has NaN in it.
        content = json.loads(read_file(path, _HISTORY_SIZE_LIMIT))
        found = (content.pop("format", None), content.pop("version", None)) if isinstance(content, dict) else None
        if found != (HISTORY_FORMAT, HISTORY_VERSION):
            raise ValueError(f"expected format {HISTORY_FORMAT!r}, version {HISTORY_VERSION}")
        history = build(TrainingHistory, content, "the curve")
        if history.kept_epoch not in {record.epoch for record in history.epochs}:
            raise ValueError(f"kept_epoch {history.kept_epoch!r} is none of the {len(history.epochs)} epochs")
    except (OSError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise CheckpointError(
            f"{path} is no learning curve of this project: {reason}; give the NAME.history.json that training wrote "
            "beside its checkpoint"
        ) from error
    return history


def result_files(output: Path) -> tuple[Path, ...]:
    """What save_result may write."""
    return output, history_path(output), history_path(output).with_suffix(".png")


def save_result(result: TrainResult, output: Path) -> Path | None:
    """Write the checkpoint, NAME.history.json and, where matplotlib is installed, NAME.history.png, the drawing given.

    Each goes to a temporary sibling, and all are renamed at the end: a failure leaves none of them. Raises
    CheckpointError.
    """
    output = check_output(output)
    history = history_of(result)
    content = {"format": HISTORY_FORMAT, "version": HISTORY_VERSION, **asdict(history)}
    text = json.dumps(content, indent=1) + "\n"
    path = history_path(output)
    drawing = path.with_suffix(".png") if find_spec("matplotlib") else None
    with ExitStack() as stack:
        stack.enter_context(replacing(path, error=CheckpointError)).write_text(text, encoding="utf-8")
        if drawing:
            _draw(history, output.stem, stack.enter_context(replacing(drawing, error=CheckpointError)))
        save_checkpoint(result.checkpoint, output)
    return drawing


def _draw(history: TrainingHistory, name: str, path: Path) -> None:
    # Training needs no matplotlib, and the simulator's environment has none.
    from rfsq.rfsq_ref.drawing import BLUE, GREY, ORANGE, finish, new_chart, save_png

    figure, axes = new_chart(4.4)
    epochs, train_mse, validation_mse = zip(*(vars(record).values() for record in history.epochs), strict=True)
    axes.plot(epochs, train_mse, color=GREY, label="training episodes")
    axes.plot(epochs, validation_mse, color=BLUE, linewidth=2, label="validation episodes")
    kept = next(record for record in history.epochs if record.epoch == history.kept_epoch)
    label = f"kept: epoch {kept.epoch}, {kept.validation_mse:.2e}"
    axes.plot(kept.epoch, kept.validation_mse, "o", color=ORANGE, markersize=8, label=label)
    axes.set_ylabel("MSE, normalised units²")
    finish(axes, f"{name}, seed {history.training['seed']}, {history.data['source']}", x="epoch", grid="y")
    save_png(figure, path, CheckpointError)
