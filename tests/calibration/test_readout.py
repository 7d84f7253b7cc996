"""The readout: a ridge regression that lowers the action error of calibrated tokens and costs nothing to run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.constants import CalibrationConfig
from calibration.errors import CalibrationError
from calibration.fit import calibrate
from calibration.readout import ReadoutConfig, fit_readout
from rfsq_ref.autoencoder import ModelConfig
from rfsq_ref.checkpoints import Checkpoint, checkpoint_of
from rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq_ref.errors import DataError
from rfsq_ref.quantizer import Conditioning
from tests.rfsq_ref.models import make_model


def mean_square(value: Tensor) -> float:
    return float(value.square().mean())


def hidden(checkpoint: Checkpoint, actions: np.ndarray) -> np.ndarray:
    """Activations in front of the last layer, and a column of ones, by NumPy alone."""
    weights = {name: tensor.double().numpy() for name, tensor in checkpoint.weights.items()}

    def layer(name: str, values: np.ndarray) -> np.ndarray:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def mish(values: np.ndarray) -> np.ndarray:
        return values * np.tanh(np.logaddexp(0.0, values))

    latents = np.tanh(layer("encoder.2", mish(layer("encoder.0", actions.astype(np.float64)))))
    return np.column_stack([mish(layer("decoder.0", latents)), np.ones(len(actions))])


@pytest.mark.parametrize("ridge", [1e-6, 1e-4, 1.0])
def test_it_is_the_ridge_regression_towards_the_trained_layer(
    robust: Checkpoint, split: EpisodeSplit, ridge: float
) -> None:
    """Against the augmented least squares problem [h; sqrt(N ridge) I] dV = [e; 0], by another solver."""
    actions = split.calibration.steps()
    features = hidden(robust, actions)
    trained = np.column_stack([robust.weights["decoder.2.weight"], robust.weights["decoder.2.bias"]]).astype(np.float64)
    penalty = np.sqrt(len(actions) * ridge) * np.eye(features.shape[1])
    error = np.vstack([actions - features @ trained.T, np.zeros((len(penalty), actions.shape[1]))])
    change, *_ = np.linalg.lstsq(np.vstack([features, penalty]), error, rcond=None)

    found = fit_readout(robust, split.calibration, ReadoutConfig(ridge))

    expected = trained + change.T
    tolerance = 2.0**-15 * np.abs(change).max()
    assert np.abs(found.weight.numpy() - expected[:, :-1]).max() < tolerance
    assert np.abs(found.bias.numpy() - expected[:, -1]).max() < tolerance


def test_it_makes_the_error_several_times_smaller_on_episodes_it_has_not_seen(
    robust: Checkpoint, demonstrations: ActionDataset, split: EpisodeSplit
) -> None:
    fitted = calibrate(robust, demonstrations, CalibrationConfig())
    actions = torch.from_numpy(split.test.steps()).double()

    def error(checkpoint: Checkpoint, layers: int) -> float:
        model = checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64)
        with torch.no_grad():
            return mean_square(model.decode(model.encode(actions)[0][..., :layers]) - actions)

    plain = replace(fitted, readout=None)
    assert error(fitted, 8) < error(plain, 8) / 4
    assert error(fitted, 3) < error(plain, 3) / 3
    assert error(fitted, 1) < error(plain, 1)


def test_tokens_stay_the_same(robust: Checkpoint, demonstrations: ActionDataset, split: EpisodeSplit) -> None:
    fitted = calibrate(robust, demonstrations, CalibrationConfig())
    actions = torch.from_numpy(split.test.steps())
    with_readout, without = (
        checkpoint.model(Conditioning.CALIBRATED) for checkpoint in (fitted, replace(fitted, readout=None))
    )

    assert torch.equal(with_readout.encode(actions)[0], without.encode(actions)[0])


def test_actions_unlike_the_calibration_data_hardly_lose(robust: Checkpoint, demonstrations: ActionDataset) -> None:
    fitted = calibrate(robust, demonstrations, CalibrationConfig())
    actions = torch.empty(4000, 7, dtype=torch.float64).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    errors = []
    for checkpoint in (fitted, replace(fitted, readout=None)):
        model = checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64)
        with torch.no_grad():
            errors.append(mean_square(model.decode_latents(model.encode_latents(actions)) - actions))

    assert errors[0] < 1.05 * errors[1]


@given(st.integers(1, 40))
def test_the_more_ridge_the_nearer_to_the_trained_layer(exponent: int) -> None:
    """A property of ridge regression, on latents of the smallest model there is."""
    checkpoint = _tiny()
    episodes = ActionDataset((np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32),), ("",), ("",), "")
    ridges = (2.0**-exponent, 2.0 ** (1 - exponent))
    moved = [
        float(
            (
                fit_readout(checkpoint, episodes, ReadoutConfig(ridge)).weight - checkpoint.weights["decoder.2.weight"]
            ).norm()
        )
        for ridge in ridges
    ]
    assert moved[1] <= moved[0] * (1 + 1e-3)


def test_one_step_is_enough_and_a_decoder_that_is_right_stays(robust: Checkpoint, split: EpisodeSplit) -> None:
    single = ActionDataset((split.calibration.episodes[0][:1],), ("one",), ("",), "one.npz")
    assert torch.isfinite(fit_readout(robust, single).weight).all()

    checkpoint = _tiny()
    model = checkpoint.model(dtype=torch.float64)
    with torch.no_grad():
        # Actions that the trained decoder gives back exactly: zero weights, and its bias everywhere.
        fixed = torch.zeros(5, 2, dtype=torch.float64)
    still = replace(
        checkpoint,
        weights={**checkpoint.weights, "decoder.2.weight": torch.zeros_like(model.decoder[2].weight).float(),
                 "decoder.2.bias": torch.zeros(2)},
    )  # fmt: skip
    readout = fit_readout(still, ActionDataset((fixed.float().numpy(),), ("",), ("",), ""))
    assert not readout.weight.any()
    assert not readout.bias.any()


@pytest.mark.parametrize("ridge", [0.0, -1e-4, float("nan"), float("inf")])
def test_a_ridge_that_is_no_penalty_is_refused(ridge: float) -> None:
    with pytest.raises(CalibrationError, match="expected a small positive number"):
        ReadoutConfig(ridge)


def test_another_robot_is_refused(robust: Checkpoint) -> None:
    with pytest.raises(DataError, match="2 action dimensions, the checkpoint 7"):
        fit_readout(robust, ActionDataset((np.zeros((9, 2), np.float32),), ("",), ("",), "other.npz"))


def _tiny() -> Checkpoint:
    return checkpoint_of(make_model(ModelConfig(2, 3, 4, 2, 5), Conditioning.DYNAMIC), {})
