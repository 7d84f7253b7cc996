"""What the calibration study fits and judges: a checkpoint with its episodes, and how its errors are measured."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from rfsq.calibration.constants import CalibrationConfig, fit_constants, worst_case_errors
from rfsq.calibration.data import (
    MINIMUM_EPISODES,
    Selection,
    calibration_episodes,
    judging_episodes,
    mean_square,
    reference_actions,
    reference_latents,
    selection_of,
)
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.readout import DEFAULT_READOUT, READOUT_OFF, ReadoutConfig, fit_readout
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, Readout
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants

_RANDOM_ACTIONS = 2000
#: Of the random actions, and of the choice of episodes.
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What `calibrate` can be told."""

    name: str = "default"
    config: CalibrationConfig = field(default_factory=CalibrationConfig)
    readout: ReadoutConfig = DEFAULT_READOUT


DEFAULT = Setting()
WITHOUT_READOUT = Setting("readout off", readout=READOUT_OFF)


@dataclass(frozen=True, eq=False)
class Bench:
    """One checkpoint, the episodes to fit to and to test on, and random actions, float64 [N, A].

    is_training_data: whether the episodes are a part of what the checkpoint was trained on.
    """

    checkpoint: Checkpoint
    calibration: ActionDataset
    test: ActionDataset
    random: Tensor
    is_training_data: bool
    _fits: dict[tuple[CalibrationConfig, ReadoutConfig, str], Checkpoint] = field(default_factory=dict)

    def fit(self, setting: Setting, episodes: ActionDataset | None = None) -> ActionAutoencoder:
        """The float64 model that `calibrate` would give, fitted to all calibration episodes or to these."""
        return calibrated(self.fitted(setting, episodes or self.calibration))

    def fitted(self, setting: Setting, episodes: ActionDataset) -> Checkpoint:
        """Without what was fitted to the checkpoint before. Made once for each setting and choice of episodes."""
        key = setting.config, setting.readout, episodes.sha256
        if key not in self._fits:
            constants = fit_constants(self.checkpoint, episodes, setting.config)
            fitted = replace(self.checkpoint, readout=None).with_fit(constants=constants)
            self._fits[key] = fitted.with_fit(readout=self.readout(fitted, episodes, setting.readout))
        return self._fits[key]

    def readout(self, fitted: Checkpoint, episodes: ActionDataset, config: ReadoutConfig) -> Readout | None:
        """For a checkpoint with constants."""
        return fit_readout(fitted, episodes, config, is_training_data=self.is_training_data).readout

    def test_actions(self, task: str | None = None) -> Tensor:
        """Float64 [N, A], of all test episodes or of one task."""
        return reference_actions(self.checkpoint, self.test if task is None else of_tasks(self.test, [task]))


def benches_of(checkpoints: Sequence[Checkpoint], dataset: ActionDataset) -> list[Bench]:
    if not checkpoints:
        raise CalibrationError("no checkpoint to study; expected at least one, or better three training seeds")
    sizes = {checkpoint.config for checkpoint in checkpoints}
    if len(sizes) > 1:
        raise CalibrationError(
            f"checkpoints of {len(sizes)} sizes ({', '.join(map(str, sizes))}); expected one size: study them apart"
        )
    if len(dataset.episodes) < MINIMUM_EPISODES:
        raise DataError(
            f"{dataset.source} has {len(dataset.episodes)} episodes; expected {MINIMUM_EPISODES} or more, because some "
            "must be held back for the test: give more episodes"
        )
    benches = [_bench(checkpoint, dataset) for checkpoint in checkpoints]
    if len({(bench.calibration.sha256, bench.test.sha256) for bench in benches}) > 1:
        raise CalibrationError(
            f"some of the checkpoints were trained on {dataset.source} and some were not, so that they cannot share "
            "their test episodes; study them apart"
        )
    return benches


def _bench(checkpoint: Checkpoint, dataset: ActionDataset) -> Bench:
    calibration, test = calibration_episodes(checkpoint, dataset), judging_episodes(checkpoint, dataset)
    # Refuses actions that the checkpoint cannot take; fitting does so for the calibration episodes.
    reference_latents(checkpoint.model(dtype=torch.float64), reference_actions(checkpoint, test))
    recorded = reference_actions(checkpoint, calibration)
    low, high = recorded.amin(dim=0), recorded.amax(dim=0)
    generator = torch.Generator().manual_seed(SEED)
    shares = torch.rand(_RANDOM_ACTIONS, len(low), generator=generator, dtype=torch.float64)
    is_training_data = selection_of(checkpoint, dataset) is Selection.TRAINING_SPLIT
    return Bench(checkpoint, calibration, test, low + shares * (high - low), is_training_data)


def calibrated(checkpoint: Checkpoint) -> ActionAutoencoder:
    return checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64)


def prefix_errors(model: ActionAutoencoder, actions: Tensor) -> list[Tensor]:
    """Action errors [N, A] of decoding the first 1 ... L layers."""
    tokens, _ = model.encode(actions)
    return [model.decode(tokens[..., :prefix]) - actions for prefix in range(1, model.config.num_layers + 1)]


def prefix_mse(model: ActionAutoencoder, actions: Tensor) -> list[float]:
    return [mean_square(error) for error in prefix_errors(model, actions)]


def excess_mse(model: ActionAutoencoder, actions: Tensor, floor: float) -> list[float]:
    return [value / floor for value in prefix_mse(model, actions)]


def unquantised_mse(model: ActionAutoencoder, actions: Tensor) -> float:
    """Action MSE without the quantiser; above 0, because ratios are taken of it."""
    error = model.decode_latents(model.encode_latents(actions)) - actions
    return max(mean_square(error), sys.float_info.min)


def added_mse(model: ActionAutoencoder, actions: Tensor) -> list[float]:
    """Mean squared action difference that quantising makes, per prefix."""
    unquantised = model.decode_latents(model.encode_latents(actions)) - actions
    return [mean_square(error - unquantised) for error in prefix_errors(model, actions)]


def latent_bounds(model: ActionAutoencoder) -> list[float]:
    constants = ConditioningConstants(model.quantizer.mean, model.quantizer.scale)
    bounds: list[float] = worst_case_errors(constants, model.config.num_levels).tolist()
    return bounds


def gain_factors(values: Sequence[float]) -> list[float]:
    """Factors by which each value is smaller than the one before."""
    return [before / max(after, sys.float_info.min) for before, after in pairwise(values)]


def level_shares(model: ActionAutoencoder, actions: Tensor) -> list[float]:
    tokens, _ = model.encode(actions)
    used = torch.stack([(tokens == level).any(dim=0) for level in range(model.config.num_levels)])
    shares: list[float] = used.double().mean(dim=(0, 1)).tolist()
    return shares


def of_tasks(episodes: ActionDataset, tasks: Collection[str]) -> ActionDataset:
    return episodes.select(index for index, task in enumerate(episodes.tasks) if task in tasks)
