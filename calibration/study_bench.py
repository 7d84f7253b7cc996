"""What the calibration study fits and judges: a checkpoint with its episodes, and how its errors are measured."""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from rfsq.calibration.constants import fit_constants, worst_case_errors
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
from rfsq.calibration.readout import fit_readout
from rfsq.calibration.report import levels_used
from rfsq.calibration.settings import DEFAULT_READOUT, READOUT_OFF, CalibrationConfig, ReadoutConfig
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
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
    _constants: dict[tuple[CalibrationConfig, str], ConditioningConstants] = field(default_factory=dict)
    _fits: dict[tuple[CalibrationConfig, str, ReadoutConfig], Checkpoint] = field(default_factory=dict)

    def fit(self, setting: Setting, episodes: ActionDataset | None = None) -> ActionAutoencoder:
        """The float64 model that `calibrate` would give, fitted to all calibration episodes or to these.

        Without what was fitted to the checkpoint before. Made once for each choice of settings and episodes.
        """
        episodes = episodes or self.calibration
        of_constants = setting.config, episodes.sha256
        if of_constants not in self._constants:
            self._constants[of_constants] = fit_constants(self.checkpoint, episodes, setting.config)
        key = *of_constants, setting.readout
        if key not in self._fits:
            fitted = replace(self.checkpoint, readout=None).with_fit(constants=self._constants[of_constants])
            fit = fit_readout(fitted, episodes, setting.readout, is_training_data=self.is_training_data)
            self._fits[key] = fitted.with_fit(readout=fit.readout)
        return self._fits[key].model(Conditioning.CALIBRATED, dtype=torch.float64)

    def fit_to_tasks(self, setting: Setting, tasks: Sequence[str]) -> Iterator[tuple[str, ActionAutoencoder, str]]:
        """Fits that leave out the task they are to be tested on: kind of fit, model, task.

        "unseen": fitted to all other tasks; "other": to one other task alone, for every pair of `tasks`.
        """
        for task in tasks:
            yield "unseen", self.fit(setting, of_tasks(self.calibration, {*self.calibration.tasks} - {task})), task
            alone = self.fit(setting, of_tasks(self.calibration, [task]))
            for other in tasks:
                if other != task:
                    yield "other", alone, other

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


def prefix_errors(model: ActionAutoencoder, actions: Tensor) -> list[Tensor]:
    """Action errors [N, A] of decoding the first 1 ... L layers."""
    tokens, _ = model.encode(actions)
    return [model.decode(tokens[..., :prefix]) - actions for prefix in range(1, model.config.num_layers + 1)]


def prefix_mse(model: ActionAutoencoder, actions: Tensor) -> list[float]:
    return [mean_square(error) for error in prefix_errors(model, actions)]


def unquantised_mse(model: ActionAutoencoder, actions: Tensor) -> float:
    """Action MSE without the quantiser, at least the smallest positive number: other errors are divided by it."""
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
    shares: list[float] = levels_used(tokens, model.config.num_levels).double().mean(dim=(0, 1)).tolist()
    return shares


def of_tasks(episodes: ActionDataset, tasks: Collection[str]) -> ActionDataset:
    return episodes.select(index for index, task in enumerate(episodes.tasks) if task in tasks)
