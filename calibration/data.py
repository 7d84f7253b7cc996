"""Which actions a fit may see, and what it sees of them."""

from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum

import torch
from torch import Tensor

from rfsq_ref.autoencoder import ActionAutoencoder
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.data import ActionDataset, SplitFractions, split_episodes
from rfsq_ref.errors import DataError

#: One for each part of a split.
MINIMUM_EPISODES = len(fields(SplitFractions))


class Selection(StrEnum):
    """Which episodes of a dataset are taken, as provenance records it."""

    TRAINING_SPLIT = "part of the training data's split by episode"
    OTHER_SPLIT = "part of a split by episode; the dataset is not the recorded training data"
    ALL = "all episodes, too few to split; the dataset is not the recorded training data"


def selection_of(checkpoint: Checkpoint, dataset: ActionDataset) -> Selection:
    """TRAINING_SPLIT when the dataset is the very one the checkpoint was trained on, by its recorded hash."""
    recorded = checkpoint.provenance.get("data")
    if isinstance(recorded, Mapping) and recorded.get("sha256") == dataset.sha256:
        return Selection.TRAINING_SPLIT
    return Selection.OTHER_SPLIT if len(dataset.episodes) >= MINIMUM_EPISODES else Selection.ALL


def calibration_episodes(checkpoint: Checkpoint, dataset: ActionDataset) -> ActionDataset:
    """Episodes to fit on, disjoint from those the checkpoint was trained, validated and is judged on.

    The `calibration` part of the training data's split; of other data all but the `test` part, or the whole where
    there are too few episodes. DataError for another action dimension than the checkpoint's.
    """
    return _parts(checkpoint, dataset)[0]


def judging_episodes(checkpoint: Checkpoint, dataset: ActionDataset) -> ActionDataset:
    """Episodes to report on: the `test` part of the split, or the whole where there are too few episodes.

    Raises as `calibration_episodes`.
    """
    return _parts(checkpoint, dataset)[1]


def _parts(checkpoint: Checkpoint, dataset: ActionDataset) -> tuple[ActionDataset, ActionDataset]:
    _check_action_dim(checkpoint, dataset)
    selection = selection_of(checkpoint, dataset)
    if selection is Selection.ALL:
        return dataset, dataset
    split = split_episodes(dataset)
    if selection is Selection.TRAINING_SPLIT:
        return split.calibration, split.test
    # Nothing was trained on these episodes, so only those that judge are kept apart.
    return _joined(split.train, split.validation, split.calibration), split.test


def _joined(*parts: ActionDataset) -> ActionDataset:
    return ActionDataset(
        tuple(episode for part in parts for episode in part.episodes),
        tuple(name for part in parts for name in part.names),
        tuple(task for part in parts for task in part.tasks),
        parts[0].source,
    )


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
