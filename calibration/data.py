"""Which actions a fit may see, and what it sees of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import SPLIT_SHARES, ActionDataset, load_actions, load_demonstrations, split_episodes
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime.bundle.fidelity import FAR
from rfsq.runtime.bundle.paths import counted

#: One for each part of a split.
MINIMUM_EPISODES = len(SPLIT_SHARES)
#: Of a latent's range known from N steps, one more step leaves it with probability 2 / (N + 1) where steps are
#: independent, and more often where they follow each other: 1 % at this number. On the embedded demonstrations the
#: error of L0-L2 by the default fit is 1.8 times that of all 3295 steps when fitted to 200 consecutive steps, 3.8 times
#: at 100 and 18 times at 30; with steps from all over, 1.03, 1.15 and 1.7 times (means of 8 choices for 3 seeds each).
FEW_STEPS = 200
#: Of what is fitted: far above what processors disagree on, and far below what a bin or a fit can tell.
ROUNDED_BITS = 16
#: As near to -1 or 1, a latent is that number in float32.
_SATURATED = 2.0**-25


def embedded_demonstrations(checkpoint: Checkpoint) -> ActionDataset | None:
    """The embedded demonstrations, where the checkpoint was trained on them."""
    dataset = load_demonstrations()
    return dataset if selection_of(checkpoint, dataset) is Selection.TRAINING_SPLIT else None


def calibration_dataset(
    checkpoint: Checkpoint, path: Path | None, *, key: str | None = None, filter_key: str | None = None
) -> ActionDataset:
    """Actions from a file, or the embedded demonstrations.

    These serve only checkpoints that were trained on them: what is fitted to another robot's actions would be wrong
    without anyone noticing. Raises DataError.
    """
    if path is not None:
        return load_actions(path, key=key, filter_key=filter_key)
    dataset = embedded_demonstrations(checkpoint)
    if dataset is None:
        recorded = checkpoint.provenance.get("data")
        trained_on = recorded.get("source", "of no name") if isinstance(recorded, dict) else recorded or "not recorded"
        raise DataError(
            f"the checkpoint was not trained on the embedded demonstrations (its data: {trained_on}), so they cannot "
            "calibrate it; give episodes of its own robot: --data FILE"
        )
    return dataset


def data_warnings(checkpoint: Checkpoint, dataset: ActionDataset) -> tuple[str, ...]:
    """Warnings about the data that a fit sees, and about those that judge it. Raises DataError."""
    fitted = calibration_episodes(checkpoint, dataset)
    found = [few_steps_warning(fitted), _outliers_warning(checkpoint, fitted)]
    if selection_of(checkpoint, dataset) is Selection.ALL:
        found.append(unsplit_warning(dataset))
    return tuple(filter(None, found))


def unsplit_warning(dataset: ActionDataset) -> str:
    """A warning about too few episodes to split."""
    return (
        f"WARNING: {counted(len(dataset.episodes), 'episode')} cannot be split, so the verdict is of the very data "
        "that are fitted to, and new ones may be worse: "
        + (dataset.missing_borders or f"give {MINIMUM_EPISODES} episodes or more")
    )


def _outliers_warning(checkpoint: Checkpoint, fitted: ActionDataset) -> str:
    """A warning about single steps far outside of the model's range, which the verdict may not see; else empty.

    Where half of the steps or more lie there, the units are wrong, and the verdict says so.
    """
    normaliser = checkpoint.normaliser
    offset, unit = (np.array(normaliser.offset), np.array(normaliser.scale)) if normaliser else (0.0, 1.0)
    reaches = [np.abs(episode.astype(np.float64) - offset) / unit for episode in fitted.episodes]
    count = sum(int((reach > FAR).any(axis=1).sum()) for reach in reaches)
    if not 0 < 2 * count < fitted.num_steps:
        return ""
    place = max(range(len(reaches)), key=lambda index: float(reaches[index].max()))
    step, dimension = map(int, np.unravel_index(reaches[place].argmax(), reaches[place].shape))
    return (
        f"WARNING: the fit saw {counted(count, 'step')} more than {FAR:g} times as far out as the model was trained "
        f"for, which tokens can hardly code; the farthest is {fitted.source}, episode {fitted.names[place]!r}, "
        f"step {step}, dimension {dimension}: {fitted.episodes[place][step, dimension]:g}. The verdict may be of other "
        "episodes alone: repair or drop that one"
    )


def few_steps_warning(episodes: ActionDataset) -> str:
    """A warning about a fit to these episodes; empty where there are enough steps."""
    if episodes.num_steps >= FEW_STEPS:
        return ""
    return (
        f"WARNING: only {episodes.num_steps} steps to calibrate on; expected {FEW_STEPS} or more, or new actions will "
        "often lie outside of what was seen: give more episodes"
    )


def episode_folds(total: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Indices of the episodes to fit to, and of those left out: every episode is left out once, in one of at most
    `most` folds. A single episode has no folds.

    >>> list(episode_folds(3, 2))
    [([1], [0, 2]), ([0, 2], [1])]
    """
    folds = min(most, total) if total > 1 else 0
    for fold in range(folds):
        kept, left_out = ([index for index in range(total) if (index % folds == fold) is out] for out in (False, True))
        yield kept, left_out


def is_certain_gain(before: Tensor, after: Tensor) -> bool:
    """Whether squared errors [episodes], of episodes left out of a fit, fall by more than the gain's standard error.

    Otherwise a few episodes could decide for all. The fewer there are, the larger the gain must be, as Student's
    quantiles are.
    """
    return gain_certainty(before, after) > needed_certainty(len(before))


def needed_certainty(episodes: int) -> float:
    """How many standard errors a gain on so many episodes must be, two or more."""
    # About the quantile of 90 %: 3 for two episodes, 1.5 for five, 1.1 for twenty.
    return 1 + 2 / (episodes - 1)


def gain_certainty(before: Tensor, after: Tensor) -> float:
    """How many standard errors the squared errors [episodes] fall by; infinite where all fall by the same."""
    gain = before - after
    total, noise = float(gain.sum()), float(gain.std()) * math.sqrt(len(gain))
    return total / noise if noise else math.copysign(math.inf, total) if total else 0.0


_UNRECORDED = "in numbers or episode borders it is not the recorded training data"


class Selection(StrEnum):
    """Which episodes of a dataset are taken, as provenance records it."""

    TRAINING_SPLIT = "part of the training data's split by episode"
    OTHER_SPLIT = f"part of a split by episode; {_UNRECORDED}"
    ALL = f"all of it, too few episodes to split; {_UNRECORDED}"


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
    return joined(split.train, split.validation, split.calibration), split.test


def joined(*parts: ActionDataset) -> ActionDataset:
    """The episodes of all parts of a dataset, one part after the other."""
    return replace(
        parts[0],
        episodes=tuple(episode for part in parts for episode in part.episodes),
        names=tuple(name for part in parts for name in part.names),
        tasks=tuple(task for part in parts for task in part.tasks),
    )


def reference_actions(checkpoint: Checkpoint, episodes: ActionDataset) -> Tensor:
    """All steps as the float64 reference takes them, float64 [N, A]. DataError for another action dimension."""
    _check_action_dim(checkpoint, episodes)
    return torch.from_numpy(episodes.steps()).double()


def reference_latents(model: ActionAutoencoder, actions: Tensor) -> Tensor:
    """Latents [N, D] of a float64 model, not quantised. DataError unless finite, and where most are saturated."""
    with torch.no_grad():
        latents = model.encode_latents(actions)
    if not torch.isfinite(latents).all():
        bad = int((~torch.isfinite(latents)).any(dim=-1).sum())
        raise DataError(
            f"{bad} of {len(latents)} steps have latents that are not finite; expected numbers in [-1, 1]: the actions "
            "are too large for this checkpoint, or it was trained in other units"
        )
    lost = int((1 - latents.abs() < _SATURATED).all(dim=-1).sum())
    if 2 * lost > len(latents):
        largest = float(((actions - model.offset) / model.units).abs().max())
        raise DataError(
            f"{lost} of {len(latents)} steps drive every latent to the end of its range, so nothing tells these "
            f"actions apart; the largest is {largest:.3g} in the checkpoint's units, expected about 1: give actions in "
            "the units it was trained on, or the normaliser it was trained behind (--normaliser FILE)"
        )
    return latents


def rounded(values: Tensor, span: Tensor) -> Tensor:
    """To multiples of a power of two about 2^-ROUNDED_BITS of the span.

    >>> rounded(torch.tensor([0.1, 0.5]).double(), torch.tensor(0.5)).tolist()
    [0.100006103515625, 0.5]
    """
    quantum = torch.exp2(torch.frexp(span).exponent.double() - ROUNDED_BITS)
    return torch.round(values / quantum) * quantum


def mean_square(error: Tensor) -> float:
    return float(error.square().mean())


def _check_action_dim(checkpoint: Checkpoint, dataset: ActionDataset) -> None:
    if dataset.action_dim != checkpoint.config.action_dim:
        raise DataError(
            f"{dataset.source} has {dataset.action_dim} action dimensions, the checkpoint "
            f"{checkpoint.config.action_dim}; calibrate with actions of the robot it was trained for"
        )
