"""What a build starts from: the checkpoint, its mode, data of its robot, and what has to be fitted first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rfsq.calibration.data import (
    Selection,
    calibration_dataset,
    data_warnings,
    embedded_demonstrations,
    judging_episodes,
    reference_actions,
    reference_latents,
    selection_of,
)
from rfsq.calibration.fitting import calibrate, recover
from rfsq.calibration.settings import DEFAULT_READOUT, CalibrationConfig, ReadoutConfig, RecoveredConfig
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.checkpoints import Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.normaliser import read_normaliser
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.arrays import Float32Array
from rfsq.runtime.bundle.fidelity import Fidelity
from rfsq.runtime.bundle.manifest import QualityEntry
from rfsq.runtime.bundle.paths import counted

#: Held-out steps that the gates look at; more are drawn around them and at random.
MOST_HELD_OUT = 20_000


def open_checkpoint(
    path: Path, *, use_layernorm: bool | None = None, weights: str | None = None, normaliser_file: Path | None = None
) -> Checkpoint:
    """A checkpoint of any layout, with the normaliser it was trained behind where it does not bring one.

    Raises CheckpointError or DataError.
    """
    checkpoint = load_checkpoint(path, use_layernorm=use_layernorm, weights=weights)
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
    """dataset: None without data; held_out: steps float32 [N, A], or chunks [N, T, A], to judge on, none without data;
    description: what a person should know about the data, a line or more; judged_on: what held_out is, empty without
    data."""

    dataset: ActionDataset | None
    held_out: Float32Array
    description: str
    judged_on: str

    def quality(self, found: Fidelity | None) -> QualityEntry | None:
        """For the manifest; found: on held_out."""
        if found is None or self.dataset is None:
            return None
        return QualityEntry(self.judged_on, self.dataset.source, self.dataset.sha256, found)


def load_build_data(
    checkpoint: Checkpoint,
    path: Path | None,
    *,
    key: str | None = None,
    filter_key: str | None = None,
    is_needed: bool,
) -> BuildData:
    """Episodes for calibration and for the gates; without a path the embedded ones, for their own checkpoints only.

    is_needed: whether something will be fitted to them. Raises DataError, also for actions far outside the model.
    """
    if path is None and not is_needed:
        dataset = embedded_demonstrations(checkpoint)
    else:
        dataset = calibration_dataset(checkpoint, path, key=key, filter_key=filter_key)
    if dataset is None:
        none = np.empty((0, checkpoint.config.action_dim), np.float32)
        return BuildData(None, none, "none given: gates run on random actions alone", "")
    judging = judging_episodes(checkpoint, dataset)
    # Of what a model cannot tell apart, float32 gives any tokens: gates would turn red, and say nothing of the data.
    reference_latents(checkpoint.model(dtype=torch.float64), reference_actions(checkpoint, judging))
    held_out = judging.steps()[:MOST_HELD_OUT]
    selection = selection_of(checkpoint, dataset)
    judged_on = "held-out episodes"
    if selection is Selection.ALL:
        # What an earlier fit saw of them is not known.
        judged_on = f"{'the calibration data themselves' if is_needed else 'all episodes given'}, too few to split"
    lines = [f"{dataset.source}: {counted(len(dataset.episodes), 'episode')}; {selection.value}"]
    if not is_needed:
        lines.append("nothing is fitted to them: what the mode needs is already in the checkpoint, the data only judge")
    else:
        lines += filter(None, data_warnings(checkpoint, dataset))
    return BuildData(dataset, held_out, "\n".join(lines), judged_on)


def needs_fit(checkpoint: Checkpoint, mode: DeployMode, prefixes: Sequence[int]) -> bool:
    """Whether the checkpoint lacks constants or decoders that the mode needs."""
    if mode is DeployMode.CALIBRATED:
        return checkpoint.constants is None
    return mode is DeployMode.RECOVERED and not set(prefixes) <= checkpoint.recovered.keys()


def fit_for(
    checkpoint: Checkpoint,
    mode: DeployMode,
    prefixes: tuple[int, ...],
    dataset: ActionDataset,
    readout: ReadoutConfig = DEFAULT_READOUT,
) -> Checkpoint:
    """The checkpoint with what its mode needs, by the default settings; `calibration/fit.py` has them all as flags.

    Raises DataError or CalibrationError.
    """
    if mode is DeployMode.CALIBRATED:
        return calibrate(checkpoint, dataset, CalibrationConfig(), readout)
    return recover(checkpoint, dataset, prefixes, RecoveredConfig())
