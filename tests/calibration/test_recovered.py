"""What `calibration.recovered` promises: published tokens decode without their side information."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.calibration.affine_maps import Features, Regression, _mish_slope
from rfsq.calibration.affine_maps import regress as regressions
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.recovered import default_prefixes, fit_recovered_details
from rfsq.calibration.settings import RecoveredConfig, Target, Weighting
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint, checkpoint_of
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import Conditioning, published_dequantize
from tests.calibration.small_fits import fit_recovered

NUM_LEVELS = 7
#: Given, so that the fit is that of the formulas; what cross-validation makes of it is tested with small fits.
RIDGE = 1e-6
FIXED = RecoveredConfig(RIDGE)
seeds = st.integers(0, 2**32 - 1)


def regress(
    tokens: Tensor, latents: Tensor, worth: Tensor, num_levels: int, *, shares: Tensor | None = None, ridge: float = 0.0
) -> Regression:
    """With steps of equal weight by default, and one ridge."""
    if shares is None:
        shares = torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64)
    return regressions(Features.of(tokens, worth, num_levels, shares), latents, (ridge,))[0]


def mean_square(error: Tensor) -> float:
    return float(error.square().mean())


# The embedded robust checkpoint, held-out episodes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(recovered: Checkpoint) -> ActionAutoencoder:
    return recovered.model(dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def published(model: ActionAutoencoder, test_actions: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and the side information that does not travel with them."""
    tokens, stats = model.encode(test_actions)
    assert stats is not None
    return tokens, stats


@pytest.mark.slow
def test_published_tokens_decode_within_ten_times_the_error_of_everything_else(
    model: ActionAutoencoder, published: tuple[Tensor, Tensor], test_actions: Tensor
) -> None:
    tokens, stats = published
    with_side_information = mean_square(model.decode(tokens, stats) - test_actions)
    unquantised = mean_square(model.decode_latents(model.encode_latents(test_actions)) - test_actions)
    assert mean_square(model.decode(tokens) - test_actions) <= 10 * (with_side_information + unquantised)


@pytest.mark.slow
def test_published_tokens_decode_ten_thousand_times_better_than_as_published(
    model: ActionAutoencoder, published: tuple[Tensor, Tensor], test_actions: Tensor
) -> None:
    tokens, _ = published
    as_published = mean_square(model.decode_latents(published_dequantize(model.quantizer, tokens)) - test_actions)
    assert mean_square(model.decode(tokens) - test_actions) <= as_published / 10_000


@pytest.mark.slow
def test_coarse_tokens_decode_better_than_with_their_side_information(
    model: ActionAutoencoder, published: tuple[Tensor, Tensor], test_actions: Tensor
) -> None:
    tokens, stats = published
    with_side_information = mean_square(model.decode(tokens[..., :3], stats[..., :3, :]) - test_actions)
    assert mean_square(model.decode(tokens[..., :3]) - test_actions) < with_side_information / 2


@pytest.mark.slow
def test_unseen_kinds_of_actions_decode_better_than_by_regression_alone(
    recovered: Checkpoint, model: ActionAutoencoder, split: EpisodeSplit
) -> None:
    actions = torch.rand(2000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    tokens = model.encode(actions)[0][..., :3]
    alone = fit_recovered(recovered, split.calibration, [3], RecoveredConfig(RIDGE, refine_steps=0))[3]
    regressed = mean_square(model.decode_latents(alone.latents(tokens)) - actions)
    assert mean_square(model.decode(tokens) - actions) < regressed


def test_the_larger_the_ridge_the_nearer_to_mean_side_information(robust: Checkpoint, split: EpisodeSplit) -> None:
    def apart(ridge: float) -> float:
        fit = fit_recovered(robust, split.calibration, [2], RecoveredConfig(ridge, refine_steps=0))[2]
        return float((fit.matrix - mean_map.matrix).norm())

    lone = split.calibration.select([0])
    # One episode of all: nothing to validate a map on.
    joined = replace(lone, episodes=(split.calibration.steps(),))
    mean_map = fit_recovered(robust, joined, [2])[2]
    near, far = apart(1e6), apart(1e-2)
    assert near < 1e-3 * far


# The regression, against what numpy finds ----------------------------------------------------------------------------


def some_tokens(seed: int, steps: int, latent_dim: int, prefix: int) -> Tensor:
    return torch.randint(
        0, NUM_LEVELS, (steps, latent_dim, prefix), generator=torch.Generator().manual_seed(seed % 2**31)
    )


@given(seeds, st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_an_affine_map_is_found_exactly(seed: int, latent_dim: int, prefix: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = some_tokens(seed, 200, latent_dim, prefix)
    matrix = torch.from_numpy(generator.normal(size=(latent_dim, latent_dim * prefix)))
    offset = torch.from_numpy(generator.normal(size=latent_dim))
    latents = tokens.flatten(-2).double() @ matrix.T + offset
    worth = torch.from_numpy(generator.uniform(0.01, 1, prefix))
    found = regress(tokens, latents, worth, NUM_LEVELS)
    torch.testing.assert_close(found.decoder.matrix, matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.decoder.offset, offset, rtol=0, atol=1e-9)
    assert found.rank == latent_dim * prefix


def test_weighted_ridge_regression_agrees_with_numpy() -> None:
    generator = np.random.default_rng(0)
    tokens, latents = some_tokens(0, 60, 2, 3), torch.from_numpy(generator.normal(size=(60, 2)))
    shares = generator.uniform(0, 1, 60)
    shares /= shares.sum()
    worth, ridge = np.array([1.0, 0.3, 0.1]), 1e-3
    found = regress(
        tokens, latents, torch.from_numpy(worth), NUM_LEVELS, shares=torch.from_numpy(shares), ridge=ridge
    )  # fmt: skip

    # Least squares with the penalty as extra rows, and the unpenalised mean as a column.
    features = ((2 * tokens.numpy() / (NUM_LEVELS - 1) - 1) * worth).reshape(60, -1)
    root = np.sqrt(shares)[:, None]
    rows = np.concatenate([root * np.hstack([features, np.ones((60, 1))]), np.sqrt(ridge) * np.eye(6, 7)])
    values = np.concatenate([root * latents.numpy(), np.zeros((6, 2))])
    expected = np.hstack([features, np.ones((60, 1))]) @ np.linalg.lstsq(rows, values, rcond=None)[0]
    np.testing.assert_allclose(found.decoder.latents(tokens).numpy(), expected, atol=1e-11)
    singular = np.linalg.svd(root * (features - shares @ features), compute_uv=False)
    assert found.condition == pytest.approx(singular[0] / singular[-1])


def test_constant_and_repeated_tokens_lower_the_rank_and_nothing_else() -> None:
    tokens = some_tokens(0, 100, 3, 2)
    tokens[:, 0, 0] = 4
    tokens[:, 2] = tokens[:, 1]
    matrix = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    latents = tokens.flatten(-2).double() @ matrix.T
    found = regress(tokens, latents, torch.ones(2, dtype=torch.float64), NUM_LEVELS)
    assert found.rank == 3
    assert found.condition < 10
    assert (found.decoder.matrix[:, 0] == 0).all()
    torch.testing.assert_close(found.decoder.latents(tokens), latents, rtol=0, atol=1e-10)
    # Two equal columns share what there is to say.
    torch.testing.assert_close(found.decoder.matrix[:, 2:4], found.decoder.matrix[:, 4:6])


def test_tokens_that_never_change_decode_to_the_mean() -> None:
    latents = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
    tokens = torch.full((3, 1, 2), 5)
    found = regress(tokens, latents, torch.ones(2, dtype=torch.float64), NUM_LEVELS, ridge=1e-6)
    assert (found.rank, found.condition) == (0, 1.0)
    assert found.decoder.latents(tokens).flatten().tolist() == pytest.approx([4.0, 4.0, 4.0])


def test_ridge_shrinks_the_map() -> None:
    tokens = some_tokens(0, 50, 2, 2)
    latents = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    worth = torch.ones(2, dtype=torch.float64)
    sizes = [
        float(regress(tokens, latents, worth, NUM_LEVELS, ridge=ridge).decoder.matrix.norm()) for ridge in (0, 0.1, 10)
    ]
    assert sizes[0] > sizes[1] > 2 * sizes[2]


# Small checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    torch.manual_seed(0)
    sizes = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=3, num_levels=5)
    return checkpoint_of(ActionAutoencoder(sizes, Conditioning.DYNAMIC), {})


def actions_of(steps: int, episodes: int = 1, action_dim: int = 3) -> ActionDataset:
    generator = np.random.default_rng(0)
    parts = [generator.uniform(-1, 1, (steps, action_dim)).astype(np.float32) for _ in range(episodes)]
    names = tuple(f"episode_{index}" for index in range(episodes))
    return ActionDataset(tuple(parts), names, ("",) * episodes, "made up")


def action_mse(checkpoint: Checkpoint, episodes: ActionDataset, prefix: int, config: RecoveredConfig) -> float:
    fitted = checkpoint.with_fit(recovered=fit_recovered(checkpoint, episodes, [prefix], config))
    model = fitted.model(dtype=torch.float64).requires_grad_(False)
    actions = torch.from_numpy(episodes.steps()).double()
    return mean_square(model.decode(model.encode(actions)[0][..., :prefix]) - actions)


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_every_prefix_gets_a_decoder(small: Checkpoint, prefix: int) -> None:
    episodes = actions_of(200)
    decoder = fit_recovered(small, episodes, range(1, 4))[prefix]
    assert decoder.matrix.shape == (4, 4 * prefix)
    assert decoder.matrix.dtype is decoder.offset.dtype is torch.float64


def test_more_layers_fit_better(small: Checkpoint) -> None:
    errors = [
        action_mse(small, actions_of(200), prefix, RecoveredConfig(RIDGE, refine_steps=20)) for prefix in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_refining_lowers_the_action_error_and_zero_steps_leave_the_regression(small: Checkpoint) -> None:
    episodes = actions_of(200)
    refined = fit_recovered_details(small, episodes, [2], FIXED)[2]
    plain = fit_recovered_details(small, episodes, [2], RecoveredConfig(RIDGE, refine_steps=0))[2]
    assert refined.refinements >= 1
    assert plain.refinements == 0
    # Rounded to 2^-16 of the largest entry.
    largest = float(plain.decoder.matrix.abs().max())
    torch.testing.assert_close(plain.decoder.matrix, plain.regression.decoder.matrix, rtol=0, atol=largest * 2.0**-16)
    assert torch.equal(refined.regression.decoder.matrix, plain.regression.decoder.matrix)
    assert action_mse(small, episodes, 2, FIXED) < 0.9 * action_mse(
        small, episodes, 2, RecoveredConfig(RIDGE, refine_steps=0)
    )


def test_refining_ends_where_the_action_error_has_no_slope(small: Checkpoint) -> None:
    episodes = actions_of(200)
    ridge = 1e-2
    fit = fit_recovered_details(small, episodes, [1], RecoveredConfig(ridge=ridge, refine_steps=50))[1]
    model = small.model(dtype=torch.float64).requires_grad_(False)
    actions = torch.from_numpy(episodes.steps()).double()
    tokens = model.encode(actions)[0][..., :1]

    def slope(decoder_matrix: Tensor) -> Tensor:
        """Of the penalised error, by automatic differentiation; one layer's worth is 1, its step 2 / (K - 1)."""
        matrix = decoder_matrix.clone().requires_grad_(True)
        centred = tokens.flatten(-2).double()
        mean = centred.mean(dim=0)
        middle = fit.decoder.offset + fit.decoder.matrix @ mean
        error = model.decode_latents((centred - mean) @ matrix.T + middle) - actions
        moved = (matrix - fit.regression.decoder.matrix) * (5 - 1) / 2
        (error.square().mean() + ridge * moved.square().sum()).backward()
        assert matrix.grad is not None
        return matrix.grad

    assert slope(fit.decoder.matrix).norm() < 0.05 * slope(fit.regression.decoder.matrix).norm()


def test_slope_of_mish_is_that_of_automatic_differentiation() -> None:
    value = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.mish(value).sum(), value)
    torch.testing.assert_close(_mish_slope(value.detach()), slope)


def test_targets_differ_in_what_the_first_step_regresses_on(small: Checkpoint) -> None:
    episodes = actions_of(200)
    model = small.model(dtype=torch.float64).requires_grad_(False)
    latents = model.encode_latents(torch.from_numpy(episodes.steps()).double())
    quantized = model.quantizer.quantize(latents)
    for target, wanted in ((Target.DEQUANTISED, quantized.latents), (Target.UNQUANTISED, latents)):
        config = RecoveredConfig(ridge=0, refine_steps=0, target=target)
        decoded = fit_recovered(small, episodes, [3], config)[3].latents(quantized.tokens)
        # Least squares with an offset meets the mean of its target, but for the rounding of the map.
        torch.testing.assert_close(decoded.mean(dim=0), wanted.mean(dim=0), rtol=0, atol=1e-4)
    assert (latents - quantized.latents).mean(dim=0).abs().max() > 1e-3


def test_a_weight_counts_like_repeated_steps(small: Checkpoint) -> None:
    episodes = actions_of(40)
    twice = ActionDataset((np.concatenate([episodes.steps(), episodes.steps()[:10]]),), ("a",), ("",), "made up")
    weights = np.ones(40)
    weights[:10] = 2
    weighted = fit_recovered(small, episodes, [2], FIXED, weights=weights)[2]
    repeated = fit_recovered(small, twice, [2], FIXED)[2]
    # The worth of a layer is a mean over steps without weights, which the ridge sees.
    torch.testing.assert_close(weighted.matrix, repeated.matrix, rtol=0, atol=1e-2)
    unweighted = fit_recovered(small, episodes, [2], FIXED)[2]
    assert (unweighted.matrix - repeated.matrix).norm() > 3 * (weighted.matrix - repeated.matrix).norm()


def test_steps_of_weight_zero_do_not_count(small: Checkpoint) -> None:
    episodes = actions_of(80)
    config = RecoveredConfig(ridge=0, refine_steps=0)
    weights = np.repeat([1.0, 0.0], 40)
    first_half = ActionDataset((episodes.steps()[:40],), ("a",), ("",), "made up")
    weighted = fit_recovered(small, episodes, [2], config, weights=weights)[2]
    torch.testing.assert_close(
        weighted.matrix, fit_recovered(small, first_half, [2], config)[2].matrix, rtol=0, atol=1e-9
    )


def test_inverse_magnitude_favours_slow_steps(small: Checkpoint) -> None:
    generator = np.random.default_rng(0)
    fast = generator.uniform(-1, 1, (150, 3)).astype(np.float32)
    episodes = ActionDataset((fast, (fast[:50] * 0.1)), ("fast", "slow"), ("", ""), "made up")
    slow = torch.from_numpy(episodes.episodes[1].copy()).double()
    model = small.model(dtype=torch.float64).requires_grad_(False)
    tokens = model.encode(slow)[0][..., :1]
    errors = {
        weighting: mean_square(
            model.decode_latents(
                fit_recovered(small, episodes, [1], RecoveredConfig(RIDGE, weighting=weighting))[1].latents(tokens)
            )
            - slow
        )
        for weighting in Weighting
    }
    assert errors[Weighting.INVERSE_MAGNITUDE] < errors[Weighting.UNIFORM]


def test_actions_that_never_change_are_refused(small: Checkpoint) -> None:
    still = ActionDataset((np.zeros((60, 3), np.float32),), ("a",), ("",), "made up")
    with pytest.raises(CalibrationError, match=r"all 60 steps .* same tokens in the first 3 layers.*robot moves"):
        fit_recovered(small, still, [3])


def test_a_map_that_the_data_determine_only_in_part_says_so(small: Checkpoint) -> None:
    along_a_line = np.linspace(-1, 1, 60, dtype=np.float32)[:, None] * np.array([1, 0, 0], np.float32)
    two_poses = np.repeat(along_a_line[[0, -1]], 30, axis=0)
    fit = fit_recovered_details(small, ActionDataset((two_poses,), ("a",), ("",), "made up"), [3], FIXED)[3]
    assert fit.regression.rank == 1
    assert fit.remark.startswith(
        "WARNING: the tokens of the calibration data determine 1 of 12 columns of the map from 3"
    )
    assert fit_recovered_details(small, actions_of(200), [3], FIXED)[3].remark == ""


def test_latents_that_never_change_are_fitted_around(small: Checkpoint) -> None:
    weights = {name: tensor.clone() for name, tensor in small.weights.items()}
    weights["encoder.2.weight"][0] = 0
    weights["encoder.2.bias"][0] = 4
    saturated = replace(small, weights=weights)
    episodes = actions_of(200)
    fit = fit_recovered_details(saturated, episodes, [1], FIXED)[1]
    assert 0 < fit.regression.rank < 4
    assert torch.isfinite(fit.decoder.matrix).all()
    assert "3 of 4 columns" in fit.remark
    assert action_mse(saturated, episodes, 1, FIXED) < float(np.square(episodes.steps()).mean())


def test_last_bits_of_the_fit_leave_the_map_as_it_is(robust: Checkpoint, split: EpisodeSplit) -> None:
    """Another order of the steps, as another processor, changes every sum in its last bits."""
    config = RecoveredConfig(RIDGE, refine_steps=1)
    backwards = split.calibration.select(reversed(range(len(split.calibration.episodes))))
    first, second = (fit_recovered(robust, episodes, [3], config)[3] for episodes in (split.calibration, backwards))
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(first.offset, second.offset)
    assert len(torch.unique(first.matrix)) < first.matrix.numel()


@pytest.mark.parametrize(("num_layers", "expected"), [(1, (1,)), (2, (2,)), (3, (3,)), (8, (3, 8))])
def test_default_prefixes_are_coarse_and_all(num_layers: int, expected: tuple[int, ...]) -> None:
    assert default_prefixes(num_layers) == expected


# What cannot be fitted -----------------------------------------------------------------------------------------------


def test_naive_checkpoint_is_refused(naive: Checkpoint, split: EpisodeSplit) -> None:
    with pytest.raises(CalibrationError, match=r"trained with conditioning 'none'.*--method calibrated"):
        fit_recovered(naive, split.calibration, [3])


@pytest.mark.parametrize("prefixes", [[], [0], [4], [1, 9]])
def test_prefixes_outside_the_layers_are_refused(small: Checkpoint, prefixes: list[int]) -> None:
    with pytest.raises(CalibrationError, match="expected at least one, each of 1 to 3 layers"):
        fit_recovered(small, actions_of(60), prefixes)


def test_too_few_steps_are_refused(small: Checkpoint) -> None:
    with pytest.raises(DataError, match=r"13 steps to fit 13 unknowns.*shorter --prefixes"):
        fit_recovered(small, actions_of(13), [3])
    assert fit_recovered(small, actions_of(14), [3])[3].matrix.isfinite().all()


def test_another_action_dimension_is_refused(small: Checkpoint) -> None:
    with pytest.raises(DataError, match="7 action dimensions, the checkpoint 3"):
        fit_recovered(small, actions_of(60, action_dim=7), [1])


def test_settings_without_sense_are_refused() -> None:
    for changes in ({"ridge": -1.0}, {"ridge": float("nan")}, {"refine_steps": -1}):
        with pytest.raises(CalibrationError, match="expected 0"):
            replace(RecoveredConfig(), **changes)  # type: ignore[arg-type]


def test_one_episode_validates_no_map_so_the_mean_side_information_decodes(small: Checkpoint) -> None:
    fit = fit_recovered_details(small, actions_of(200), [2])[2]
    assert fit.ridge is None
    assert fit.refinements == 0
    assert "mean side information alone" in fit.remark
    # A latent depends on its own tokens alone, and all latents alike.
    columns = fit.decoder.matrix.reshape(4, 4, 2)
    assert torch.equal(columns, torch.einsum("de,l->del", torch.eye(4).double(), columns[0, 0]))
