"""What training writes: a checkpoint, its learning curve as JSON, and with matplotlib a drawing of it."""

import json
import os
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rfsq.rfsq_ref.checkpoints import Checkpoint, check_output, save_checkpoint
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.runtime.bundle.paths import as_path
from rfsq.runtime.bundle.reading import build, read_file
from rfsq.runtime.bundle.writing import replacing

HISTORY_FORMAT = "rfsq-training-history"
HISTORY_VERSION = 1
#: In bytes: six times what 100,000 epochs take.
_HISTORY_SIZE_LIMIT = 2**26


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
