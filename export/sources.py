"""What a build starts from: the checkpoint, its mode, data of its robot, and what has to be fitted first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibration.constants import CalibrationConfig
from calibration.data import Selection, judging_episodes, selection_of
from calibration.fit import calibrate, recover
from calibration.recovered import RecoveredConfig
from export.plan import DeployMode
from rfsq_ref.checkpoints import Checkpoint, load_checkpoint
from rfsq_ref.data import ActionDataset, load_actions, load_demonstrations
from rfsq_ref.errors import CheckpointError, DataError
from rfsq_ref.normaliser import read_normaliser
from rfsq_ref.quantizer import Conditioning
from runtime.golden import Float32Array

#: Held-out steps that the gates look at; more are drawn around them and at random.
_MOST_HELD_OUT = 20_000


def open_checkpoint(
    path: Path, *, use_layernorm: bool | None = None, normaliser_file: Path | None = None
) -> Checkpoint:
    """A checkpoint of any layout, with the normaliser it was trained behind where it does not bring one.

    Raises CheckpointError or DataError.
    """
    checkpoint = load_checkpoint(path, use_layernorm=use_layernorm)
    if normaliser_file is None:
        return checkpoint
    normaliser = read_normaliser(normaliser_file)
    if checkpoint.normaliser not in (None, normaliser):
        raise CheckpointError(
            f"{path} brings a normaliser of its own that differs from {normaliser_file}; leave --normaliser out"
        )
    if len(normaliser.scale) != checkpoint.config.action_dim:
        raise CheckpointError(
            f"{normaliser_file} is for {len(normaliser.scale)} dimensions, {path} has {checkpoint.config.action_dim}; "
            "give the normaliser it was trained with"
        )
    return replace(checkpoint, normaliser=normaliser)


def choose_mode(checkpoint: Checkpoint, requested: DeployMode | None) -> DeployMode:
    """`calibrated` for a robust checkpoint and `none` for a naive one, unless requested otherwise.

    Raises CheckpointError for a mode whose tokens this checkpoint cannot give.
    """
    if requested is None:
        return DeployMode.CALIBRATED if checkpoint.trained_with is Conditioning.DYNAMIC else DeployMode.NONE
    possible = [
        mode for mode in DeployMode if mode is DeployMode.CALIBRATED or mode.conditioning is checkpoint.trained_with
    ]
    if requested not in possible:
        raise CheckpointError(
            f"the checkpoint was trained with conditioning {checkpoint.trained_with.value!r} and cannot be deployed as "
            f"{requested.value!r}; choose {' or '.join(mode.value for mode in possible)}"
        )
    return requested


@dataclass(frozen=True)
class BuildData:
    """dataset: None without data; held_out: steps float32 [N, A] to judge on, none without data."""

    dataset: ActionDataset | None
    held_out: Float32Array
    description: str


def load_build_data(checkpoint: Checkpoint, path: Path | None, *, key: str | None = None, is_needed: bool) -> BuildData:
    """Episodes for calibration and for the gates.

    The embedded demonstrations serve only checkpoints that were trained on them: constants fitted to another robot's
    actions would be wrong without anyone noticing. Raises DataError.
    """
    if path is not None:
        dataset = load_actions(path, key=key)
    else:
        dataset = load_demonstrations()
        if selection_of(checkpoint, dataset) is not Selection.TRAINING_SPLIT:
            if is_needed:
                trained_on = checkpoint.provenance.get("data", "not recorded")
                raise DataError(
                    f"the checkpoint was not trained on the embedded demonstrations (its data: {trained_on}), so they "
                    "cannot calibrate it; give episodes of its own robot: --calibration-data FILE"
                )
            none = np.empty((0, checkpoint.config.action_dim), np.float32)
            return BuildData(None, none, "none given: gates run on random actions alone")
    held_out = judging_episodes(checkpoint, dataset).steps()[:_MOST_HELD_OUT]
    selection = selection_of(checkpoint, dataset).value
    return BuildData(dataset, held_out, f"{dataset.source}: {len(dataset.episodes)} episodes; {selection}")


def needs_fit(checkpoint: Checkpoint, mode: DeployMode, prefixes: Sequence[int]) -> bool:
    """Whether the checkpoint lacks constants or decoders that the mode needs."""
    if mode is DeployMode.CALIBRATED:
        return checkpoint.constants is None
    return mode is DeployMode.RECOVERED and not set(prefixes) <= checkpoint.recovered.keys()


def fit_for(checkpoint: Checkpoint, mode: DeployMode, prefixes: tuple[int, ...], dataset: ActionDataset) -> Checkpoint:
    """The checkpoint with what its mode needs, by the default settings; `calibration/fit.py` has them all as flags.

    Raises DataError or CalibrationError.
    """
    if mode is DeployMode.CALIBRATED:
        return calibrate(checkpoint, dataset, CalibrationConfig())
    return recover(checkpoint, dataset, prefixes, RecoveredConfig())
