"""Which actions a fit may see, and what it sees of them."""

from collections.abc import Mapping
from enum import StrEnum

import torch
from torch import Tensor

from rfsq_ref.autoencoder import ActionAutoencoder
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.data import ActionDataset, split_episodes
from rfsq_ref.errors import DataError


class Selection(StrEnum):
    """Which episodes of a dataset are taken, as provenance records it."""

    SPLIT = "part of the training data's split by episode"
    ALL = "all episodes; the dataset is not the recorded training data"


def selection_of(checkpoint: Checkpoint, dataset: ActionDataset) -> Selection:
    """SPLIT when the dataset is the very one the checkpoint was trained on, by its recorded hash."""
    recorded = checkpoint.provenance.get("data")
    is_training_data = isinstance(recorded, Mapping) and recorded.get("sha256") == dataset.sha256
    return Selection.SPLIT if is_training_data else Selection.ALL


def calibration_episodes(checkpoint: Checkpoint, dataset: ActionDataset) -> ActionDataset:
    """Episodes to fit on, disjoint from those the checkpoint was trained, validated and is tested on.

    The `calibration` part of the training data's split, or the whole of any other dataset. DataError for another
    action dimension than the checkpoint's, or too few episodes to split.
    """
    _check_action_dim(checkpoint, dataset)
    if selection_of(checkpoint, dataset) is Selection.SPLIT:
        return split_episodes(dataset).calibration
    return dataset


def judging_episodes(checkpoint: Checkpoint, dataset: ActionDataset) -> ActionDataset:
    """Episodes to report on: the `test` part of the training data's split, or the whole of any other dataset.

    Raises as `calibration_episodes`. For other data the report judges what was fitted on the same episodes.
    """
    _check_action_dim(checkpoint, dataset)
    if selection_of(checkpoint, dataset) is Selection.SPLIT:
        return split_episodes(dataset).test
    return dataset


def reference_actions(checkpoint: Checkpoint, episodes: ActionDataset) -> Tensor:
    """All steps as the float64 reference takes them, float64 [N, A]. DataError for another action dimension."""
    _check_action_dim(checkpoint, episodes)
    return torch.from_numpy(episodes.steps()).double()


def reference_latents(model: ActionAutoencoder, actions: Tensor) -> Tensor:
    """Latents [N, D] of a float64 model, not quantised. DataError unless finite."""
    with torch.no_grad():
        latents = model.encode_latents(actions)
    if not torch.isfinite(latents).all():
        bad = int((~torch.isfinite(latents)).any(dim=-1).sum())
        raise DataError(
            f"{bad} of {len(latents)} steps have latents that are not finite; expected numbers in [-1, 1]: the actions "
            "are too large for this checkpoint, or it was trained in other units"
        )
    return latents


def _check_action_dim(checkpoint: Checkpoint, dataset: ActionDataset) -> None:
    if dataset.action_dim != checkpoint.config.action_dim:
        raise DataError(
            f"{dataset.source} has {dataset.action_dim} action dimensions, the checkpoint "
            f"{checkpoint.config.action_dim}; calibrate with actions of the robot it was trained for"
        )
