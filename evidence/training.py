"""The checkpoints that are compared where none are given: embedded, kept from an earlier run, or trained now."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, SUFFIX, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.rfsq_ref.training import TrainingHistory, history_path, load_history, save_result, train

#: To be raised when the recipe in rfsq.rfsq_ref.training changes what comes out of it.
RECIPE = 1


def trained_checkpoint(dataset: ActionDataset, config: TrainConfig, cache: Path) -> tuple[Checkpoint, TrainingHistory]:
    """Trained by this recipe on this dataset's training episodes: embedded, kept from an earlier run, or trained now.

    Raises CheckpointError for a damaged file, DataError for too few episodes.
    """
    path = ROBUST_CHECKPOINT if config.use_layernorm else NAIVE_CHECKPOINT
    if not _trained_by(load_checkpoint(path), dataset, config):
        path = cached_path(dataset, config, cache)
        if not path.is_file():
            save_result(train(dataset, config), path)
    return load_checkpoint(path), load_history(history_path(path))


def cached_path(dataset: ActionDataset, config: TrainConfig, cache: Path) -> Path:
    """Where a checkpoint is kept; the name carries a hash of all that decides its weights."""
    identity = json.dumps([RECIPE, dataset.sha256, asdict(config)], sort_keys=True)
    kind = "robust" if config.use_layernorm else "naive"
    return cache / f"{kind}-seed{config.seed}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}{SUFFIX}"


def _trained_by(checkpoint: Checkpoint, dataset: ActionDataset, config: TrainConfig) -> bool:
    provenance = checkpoint.provenance
    # A setting that is younger than the checkpoint had its default.
    recorded = {**asdict(TrainConfig()), **provenance["training"]}
    return bool(provenance["data"]["sha256"] == dataset.sha256 and recorded == asdict(config))
