"""The readout: a ridge regression that lowers the action error of calibrated tokens and costs nothing to run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfsq.calibration import readout as module
from rfsq.calibration.data import is_certain_gain
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.fitting import calibrate
from rfsq.calibration.readout import RIDGES, fit_readout, held_out_warning
from rfsq.calibration.settings import DEFAULT_READOUT, READOUT_OFF, CalibrationConfig, ReadoutChoice, ReadoutConfig
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint, checkpoint_of
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit, split_episodes
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.gates import GATES
from tests.calibration.small_fits import hardly_trained
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


def on(ridge: float | None = None) -> ReadoutConfig:
    return ReadoutConfig(ReadoutChoice.ON, ridge)


@pytest.mark.parametrize("ridge", [1e-6, 1e-4, 1.0])
def test_it_is_least_squares_shrunk_towards_what_the_trained_layer_gives(
    robust: Checkpoint, split: EpisodeSplit, ridge: float
) -> None:
    """Against the augmented problem [h; sqrt(N ridge / M) a; sqrt(N ridge 1e-3 |a|^2) I] dV = [e; 0; 0]."""
    actions = split.calibration.steps()
    features = hidden(robust, actions)
    model = robust.model(dtype=torch.float64)
    random = hidden(robust, module._random_actions(model, torch.from_numpy(actions).double()).numpy())
    trained = np.column_stack([robust.weights["decoder.2.weight"], robust.weights["decoder.2.bias"]]).astype(np.float64)
    penalty = np.vstack(
        [np.sqrt(len(actions) * ridge / len(random)) * random,
         np.sqrt(len(actions) * ridge * 1e-3 * np.square(random).mean()) * np.eye(features.shape[1])]
    )  # fmt: skip
    error = np.vstack([actions - features @ trained.T, np.zeros((len(penalty), actions.shape[1]))])
    change, *_ = np.linalg.lstsq(np.vstack([features, penalty]), error, rcond=None)

    found = fit_readout(robust, split.calibration, on(ridge)).readout

    assert found is not None
    expected = trained + change.T
    tolerance = 2.0**-14 * np.abs(change).max()
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
    # A layer alone leaves a thousand times what the refit gains: it stays as it was, to a hundredth.
    assert error(fitted, 1) < 1.01 * error(plain, 1)


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


@pytest.mark.slow
@given(st.integers(1, 40))
def test_the_more_ridge_the_nearer_to_the_trained_layer(exponent: int) -> None:
    """In what the layer gives for random actions, on latents of the smallest model there is."""
    checkpoint, episodes = _tiny(), _random_episodes(1)
    trained = checkpoint.model(dtype=torch.float64)
    actions = torch.from_numpy(episodes.steps()).double()
    random = module._random_actions(trained, actions)
    moved = []
    for ridge in (2.0**-exponent, 2.0 ** (1 - exponent)):
        readout = fit_readout(checkpoint, episodes, on(ridge)).readout
        assert readout is not None
        weights = {**checkpoint.weights, "decoder.2.weight": readout.weight, "decoder.2.bias": readout.bias}
        model = replace(checkpoint, weights=weights).model(dtype=torch.float64)
        with torch.no_grad():
            change = model.decoder(model.encode_latents(random)) - trained.decoder(trained.encode_latents(random))
            penalised = readout.weight - checkpoint.weights["decoder.2.weight"]
            bias = readout.bias - checkpoint.weights["decoder.2.bias"]
        size = float(np.square(hidden(checkpoint, random.numpy())).mean())
        moved.append(mean_square(change) * 2 + 1e-3 * size * float(penalised.square().sum() + bias.square().sum()))
    assert moved[1] <= moved[0] * (1 + 1e-3) + 1e-12


def test_a_decoder_that_is_right_stays() -> None:
    checkpoint = _tiny()
    model = checkpoint.model(dtype=torch.float64)
    # Actions that the trained decoder gives back exactly: zero weights, and its bias everywhere.
    fixed = np.zeros((5, 2), np.float32)
    still = replace(
        checkpoint,
        weights={**checkpoint.weights, "decoder.2.weight": torch.zeros_like(model.decoder[2].weight).float(),
                 "decoder.2.bias": torch.zeros(2)},
    )  # fmt: skip
    episodes = ActionDataset((fixed, fixed), ("", ""), ("", ""), "")
    readout = fit_readout(still, episodes, on()).readout
    assert readout is not None
    assert not readout.weight.any()
    assert not readout.bias.any()
    # Nothing is won, so nothing is changed.
    assert fit_readout(still, episodes).readout is None


# Where it is kept ----------------------------------------------------------------------------------------------------


def test_one_episode_has_no_other_to_validate_on_and_keeps_the_trained_layer(
    robust: Checkpoint, split: EpisodeSplit
) -> None:
    lone = split.calibration.select([0])
    fit = fit_readout(robust, lone)
    assert fit.readout is None
    assert "with one calibration episode no other can say whether" in fit.remark
    asked = fit_readout(robust, lone, on())
    assert asked.readout is not None
    assert torch.isfinite(asked.readout.weight).all()


def test_off_keeps_the_trained_layer_and_on_refits_what_auto_would_not(robust: Checkpoint, split: EpisodeSplit) -> None:
    assert fit_readout(robust, split.calibration, READOUT_OFF).readout is None
    # So large a penalty wins next to nothing.
    checkpoint, episodes, ridge = _tiny(), _random_episodes(4), 1e6
    refused = fit_readout(checkpoint, episodes, ReadoutConfig(ReadoutChoice.AUTO, ridge))
    assert refused.readout is None
    assert "stays as it was trained" in refused.remark
    assert fit_readout(checkpoint, episodes, on(ridge)).readout is not None


def test_it_is_kept_where_it_wins_and_says_by_how_much(robust: Checkpoint, split: EpisodeSplit) -> None:
    fit = fit_readout(robust, split.calibration, is_training_data=True)
    assert fit.readout is not None
    assert fit.cross_validated is not None
    assert fit.cross_validated < 0.5
    assert f"{fit.cross_validated:.3g} times the squared error" in fit.remark
    assert fit.facts(DEFAULT_READOUT)["ridge"] in RIDGES


def test_a_refusal_names_the_rule_and_its_figure(
    robust: Checkpoint, split: EpisodeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may win by far on episodes left out, and be refused all the same."""
    monkeypatch.setattr(module, "_RANDOM_GAIN", 0.99)
    fit = fit_readout(robust, split.calibration)
    assert fit.readout is None
    assert fit.cross_validated is not None
    assert fit.cross_validated < 0.5
    assert f"refitted it has {fit.cross_validated:.3g} times the squared error" in fit.remark
    assert "but random actions from the range that the model was trained for would have" in fit.remark
    assert "and 0.01 is the most that is allowed; --readout on refits it all the same" in fit.remark
    assert "as --readout on asks for" in fit_readout(robust, split.calibration, on()).remark


def test_a_refit_with_weights_that_float32_cannot_serve_is_left_out() -> None:
    """The gate of a build would rightly refuse the one that wins by most."""
    checkpoint, data = hardly_trained()
    steps = torch.from_numpy(data.steps()[:1000])

    def float32_error(fitted: Checkpoint) -> float:
        reference, model = (
            fitted.model(Conditioning.CALIBRATED, dtype=each) for each in (torch.float64, torch.float32)
        )
        shape = reference.encode(steps.double())[0].shape[1:]
        tokens = torch.randint(7, (50_000, *shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return float(((reference.decode(tokens) - model.decode(tokens).double()) / reference.units).abs().max())

    asked = calibrate(checkpoint, data, CalibrationConfig(), on(1e-5))
    assert float32_error(asked) > GATES.action_error
    assert "its weights are so large that float32 errs by" in asked.provenance["calibrated"]["remark"]
    kept = calibrate(checkpoint, data, CalibrationConfig())
    assert kept.readout is not None
    assert float32_error(kept) < GATES.action_error / 2
    none = calibrate(checkpoint, data, CalibrationConfig(), ReadoutConfig(ridge=1e-5))
    assert none.readout is None
    assert "stays as it was trained: refitted" in none.provenance["calibrated"]["remark"]
    assert "and 6.7e-06 is the most that is allowed: train the model longer" in none.provenance["calibrated"]["remark"]


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        ({"certainty": 0.5}, "the gain is 0.5 times its standard error, and more than 1.5 is asked for"),
        ({"lost": "in the robot's units it loses"}, "in the robot's units it loses"),
        ({"random_ratio": 1.25}, "random actions from the range that the model was trained for would have 1.25 times"),
        (
            {"float32_error": 2e-5},
            "so large that float32 errs by 2e-05 normalised units, and 6.7e-06 is the most",
        ),
    ],
)
def test_each_rule_refuses_in_words_of_its_own(found: dict[str, float | str], rule: str) -> None:
    passes = module._Candidate(
        0.1, 0.5, certainty=3.0, needed=1.5, lost="", random_ratio=0.9, most_random=1.0, float32_error=6e-6
    )
    assert passes.objection == ""
    assert "the gain is 3 times its standard error (1.5 is asked for)" in passes.remark(is_kept=True)
    refused = replace(passes, **found)
    assert rule in refused.objection
    assert rule in refused.remark(is_kept=False)


def test_what_is_lost_on_episodes_left_out_is_named_by_what_it_was_decoded_from() -> None:
    episodes = _random_episodes(4)
    problem = module._problem(calibrate(_tiny(), episodes, CalibrationConfig(), READOUT_OFF), episodes)
    views = (problem.exact, *problem.decoded)
    before = torch.ones(len(views), 2, 4)
    after = before.clone()
    assert module._lost(views, before, after) == ""
    after[1, 1] = 1.1
    assert module._lost(views, before, after).startswith(
        "in the robot's units, decoded from the tokens of the first layer of episodes left out, it has 1.1 times the "
        "squared error, and 1.01 is the most"
    )


def test_a_refit_that_lost_where_it_is_judged_is_told() -> None:
    assert held_out_warning(5.279e-2, 5.344e-2, "held-out episodes", "robot units²") == (
        "the refitted readout lost on held-out episodes: action MSE 5.344e-02 robot units², as trained 5.279e-02 "
        "(+1.2%); --readout off keeps the trained layer"
    )
    assert {held_out_warning(2.0, refitted, "held-out episodes", "robot units²") for refitted in (1.0, None)} == {""}


def test_gains_that_a_few_episodes_make_are_luck() -> None:
    before = torch.ones(6)
    assert is_certain_gain(before, before - 0.1 - 0.01 * torch.arange(6))
    lucky = before.clone()
    lucky[0] = 0
    assert not is_certain_gain(before, lucky)
    assert not is_certain_gain(before, before)
    # Two episodes must agree closely.
    assert not is_certain_gain(torch.ones(2), torch.tensor([0.9, 0.5]))
    assert is_certain_gain(torch.ones(2), torch.tensor([0.6, 0.5]))


@pytest.mark.slow
def test_the_choice_does_not_look_at_episodes_that_judge(robust: Checkpoint, demonstrations: ActionDataset) -> None:
    """Other test episodes, the same fit."""
    fitted = calibrate(robust, demonstrations, CalibrationConfig())
    judged = {*split_episodes(demonstrations).test.names}
    spoilt = tuple(
        np.flip(episode, 0).copy() if name in judged else episode
        for name, episode in zip(demonstrations.names, demonstrations.episodes, strict=True)
    )
    other = replace(demonstrations, episodes=spoilt)
    recorded = {**robust.provenance, "data": {**robust.provenance["data"], "sha256": other.sha256}}
    again = calibrate(replace(robust, provenance=recorded), other, CalibrationConfig())
    assert fitted.readout is not None
    assert again.readout is not None
    assert torch.equal(fitted.readout.weight, again.readout.weight)


@pytest.mark.parametrize("ridge", [0.0, -1e-4, float("nan"), float("inf")])
def test_a_ridge_that_is_no_penalty_is_refused(ridge: float) -> None:
    with pytest.raises(CalibrationError, match="expected a small positive number"):
        ReadoutConfig(ridge=ridge)


def test_another_robot_is_refused(robust: Checkpoint) -> None:
    with pytest.raises(DataError, match="2 action dimensions, the checkpoint 7"):
        fit_readout(robust, ActionDataset((np.zeros((9, 2), np.float32),), ("",), ("",), "other.npz"))


def _tiny() -> Checkpoint:
    return checkpoint_of(make_model(ModelConfig(2, 3, 4, 2, 5), Conditioning.DYNAMIC), {})


def _random_episodes(count: int) -> ActionDataset:
    generator = np.random.default_rng(0)
    episodes = tuple(generator.uniform(-1, 1, (50, 2)).astype(np.float32) for _ in range(count))
    return ActionDataset(episodes, ("",) * count, ("",) * count, "")
