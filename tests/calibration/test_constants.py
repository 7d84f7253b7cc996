"""What `calibration.constants` promises: accurate on the data, bounded everywhere, above the noise."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.calibration.constants import (
    NOISE_FACTOR,
    _round_up,
    constants_of_latents,
    fit_constants,
    float32_noise,
    worst_case_errors,
    worst_case_residuals,
)
from rfsq.calibration.data import reference_actions, reference_latents
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.settings import CalibrationConfig, Granularity, Objective
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint, checkpoint_of
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants, ResidualQuantizer

Float64 = npt.NDArray[np.float64]
#: A worst case at which the fit follows the data and nothing else.
DATA_ALONE = 1.0


def mean_square(error: Tensor) -> float:
    return float(error.square().mean())


def brute_force_layers(
    latents: Float64, constants: ConditioningConstants, num_levels: int
) -> list[tuple[Float64, Float64]]:
    """Conditioned values and the residual left by every layer, [N, D] each: the definition, argmin over all levels."""
    grid = np.linspace(-1, 1, num_levels)
    residual = latents
    layers = []
    for mean, scale in zip(constants.mean.double().numpy(), constants.scale.double().numpy(), strict=True):
        conditioned = (residual - mean) / scale
        nearest = np.abs(conditioned[..., None] - grid).argmin(axis=-1)
        residual = residual - (grid[nearest] * scale + mean)
        layers.append((conditioned, residual))
    return layers


@pytest.fixture(scope="module")
def model(calibrated: Checkpoint) -> ActionAutoencoder:
    return calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def bound(calibrated: Checkpoint) -> Tensor:
    assert calibrated.constants is not None
    return worst_case_errors(calibrated.constants, calibrated.config.num_levels)


# The embedded robust checkpoint, held-out episodes -------------------------------------------------------------------


def test_tokens_alone_are_as_good_as_no_quantiser(model: ActionAutoencoder, test_actions: Tensor) -> None:
    tokens, stats = model.encode(test_actions)
    unquantised = mean_square(model.decode_latents(model.encode_latents(test_actions)) - test_actions)
    assert stats is None
    assert mean_square(model.decode(tokens) - test_actions) < 1.05 * unquantised


def test_coarse_tokens_are_far_better_than_the_trained_ones_with_their_side_information(
    model: ActionAutoencoder, robust: Checkpoint, test_actions: Tensor
) -> None:
    trained = robust.model(dtype=torch.float64).requires_grad_(False)
    published, stats = trained.encode(test_actions)
    assert stats is not None
    with_side_information = mean_square(trained.decode(published[..., :3], stats[..., :3, :]) - test_actions)
    tokens, _ = model.encode(test_actions)
    assert mean_square(model.decode(tokens[..., :3]) - test_actions) < with_side_information / 40


@pytest.mark.slow
def test_no_latent_in_the_tanh_range_is_off_by_more_than_the_bound(calibrated: Checkpoint, bound: Tensor) -> None:
    assert calibrated.constants is not None
    sizes = calibrated.config
    dense = np.linspace(-1, 1, 50_001)
    latents = np.repeat(dense[:, None], sizes.latent_dim, axis=1)
    error = np.abs(brute_force_layers(latents, calibrated.constants, sizes.num_levels)[-1][1]).max()
    assert error <= bound[-1] < 5e-4
    # Not only safe but exact: some latent comes close to it.
    assert error > 0.99 * bound[-1]


@pytest.mark.slow
def test_actions_unlike_any_demonstration_keep_their_latents(model: ActionAutoencoder, bound: Tensor) -> None:
    actions = torch.rand(20_000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    latents = model.encode_latents(actions)
    tokens, _ = model.encode(actions)
    for prefix in range(1, model.config.num_layers + 1):
        assert (model.dequantize(tokens[..., :prefix]) - latents).abs().max() <= bound[prefix - 1]


def test_few_tokens_hang_on_float32_rounding(
    calibrated: Checkpoint, model: ActionAutoencoder, test_actions: Tensor
) -> None:
    tokens, _ = model.encode(test_actions)
    float32_tokens, _ = calibrated.model(Conditioning.CALIBRATED).encode(test_actions.float())
    flipped = (tokens != float32_tokens).double().mean(dim=(0, 1))
    assert flipped.max() < 2e-4


def test_naive_checkpoint(naive: Checkpoint, split: EpisodeSplit, test_actions: Tensor) -> None:
    fitted = naive.with_fit(constants=fit_constants(naive, split.calibration))
    model = fitted.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)
    assert fitted.constants is not None
    tokens, _ = model.encode(test_actions)
    unquantised = mean_square(model.decode_latents(model.encode_latents(test_actions)) - test_actions)
    assert mean_square(model.decode(tokens) - test_actions) < 1.05 * unquantised
    assert worst_case_errors(fitted.constants, 7)[-1] < 5e-4


def test_fit_is_deterministic(calibrated: Checkpoint, robust: Checkpoint, split: EpisodeSplit) -> None:
    assert calibrated.constants is not None
    again = fit_constants(robust, split.calibration)
    assert torch.equal(again.mean, calibrated.constants.mean)
    assert torch.equal(again.scale, calibrated.constants.scale)


@pytest.mark.slow
@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("name", ["robust", "naive"])
def test_last_bits_of_the_latents_leave_the_constants_as_they_are(
    name: str, objective: Objective, request: pytest.FixtureRequest, split: EpisodeSplit
) -> None:
    """Processors differ in these bits; the constants are part of the tokenizer's fingerprint."""
    checkpoint: Checkpoint = request.getfixturevalue(name)
    actions = reference_actions(checkpoint, split.calibration)
    latents = reference_latents(checkpoint.model(dtype=torch.float64), actions)
    config = CalibrationConfig(objective=objective)
    expected = constants_of_latents(latents, 8, 7, config)
    generator = torch.Generator().manual_seed(0)
    for ulps in (1, 4, 16):
        bits = torch.randint(-ulps, ulps + 1, latents.shape, generator=generator).double()
        changed = latents * (1 + bits * torch.finfo(torch.float64).eps)
        assert not torch.equal(changed, latents)
        found = constants_of_latents(changed, 8, 7, config)
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found.scale, expected.scale)


def test_a_mean_that_is_mere_rounding_is_zero(calibrated: Checkpoint) -> None:
    assert calibrated.constants is not None
    mean, scale = calibrated.constants.mean.abs(), calibrated.constants.scale
    assert (mean[0] > 0).any()
    assert ((mean == 0) | (mean > scale * 2.0**-18)).all()


@given(st.floats(1e-12, 4), st.integers(-4, 4))
def test_scales_are_rounded_up_to_16_bits_whatever_their_last_bits(scale: float, ulps: int) -> None:
    exact = torch.tensor([scale], dtype=torch.float64)
    rounded = _round_up(exact)
    assert exact < rounded <= exact * (1 + 2.0**-15 + 2.0**-20)
    assert (torch.frexp(rounded).mantissa * 2.0**16) % 1 == 0
    # Such a number, divided and multiplied again, as scales of one layer are from those of another.
    eps = torch.finfo(torch.float64).eps
    assert torch.equal(_round_up(rounded * (1 + ulps * eps)), _round_up(rounded))


# Any sizes, any latents ----------------------------------------------------------------------------------------------

sizes = st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 5]), st.sampled_from([2, 3, 5, 7, 16]))
seeds = st.integers(0, 2**32 - 1)


def some_latents(seed: int, latent_dim: int) -> Tensor:
    """Anything a tanh may give: wide, narrow, off centre, constant, or with outliers; few steps or many."""
    generator = np.random.default_rng(seed)
    steps = int(generator.choice([2, 3, 10, 300]))
    width = generator.choice([0.0, 1e-6, 0.05, 0.5], latent_dim)
    centre = generator.uniform(-0.9, 0.9, latent_dim)
    latents = centre + width * generator.standard_t(2, (steps, latent_dim))
    return torch.from_numpy(latents.clip(-1, 1))


def some_config(seed: int, **changes: object) -> CalibrationConfig:
    generator = np.random.default_rng(seed)
    config = CalibrationConfig(
        objective=list(Objective)[generator.integers(2)],
        coverage=float(generator.choice([1.0, 0.99, 0.8])),
        granularity=list(Granularity)[generator.integers(2)],
        headroom=float(generator.choice([0.0, 0.25])),
        worst_case=float(generator.choice([2.5e-4, 1e-2, DATA_ALONE])),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@given(sizes, seeds)
@settings(deadline=None, max_examples=80)
def test_constants_are_usable_for_any_size_and_any_latents(size: tuple[int, int, int], seed: int) -> None:
    num_layers, latent_dim, num_levels = size
    noise = 1e-6
    constants = constants_of_latents(
        some_latents(seed, latent_dim), num_layers, num_levels, some_config(seed), noise=noise
    )
    assert constants.mean.shape == constants.scale.shape == (num_layers, latent_dim)
    assert constants.mean.dtype is constants.scale.dtype is torch.float32
    assert torch.isfinite(constants.mean).all()
    assert torch.isfinite(constants.scale).all()
    assert (2 * constants.scale.double() / (num_levels - 1)).min() >= NOISE_FACTOR * noise * (1 - 1e-12)


@given(sizes, seeds)
@settings(deadline=None, max_examples=80)
def test_worst_case_bounds_every_latent_after_every_layer(size: tuple[int, int, int], seed: int) -> None:
    num_layers, latent_dim, num_levels = size
    generator = np.random.default_rng(seed)
    # Constants nobody would fit are bounded as well.
    constants = ConditioningConstants(
        torch.from_numpy(generator.normal(0, 0.3, (num_layers, latent_dim))).float(),
        torch.from_numpy(generator.choice([1e-4, 0.1, 0.5, 2.0], (num_layers, latent_dim))).float(),
    )
    latents = np.concatenate(
        [np.full((1, latent_dim), -1.0), generator.uniform(-1, 1, (500, latent_dim)), np.ones((1, latent_dim))]
    )
    bounds = worst_case_residuals(constants, num_levels).numpy()
    for (_, residual), bound in zip(brute_force_layers(latents, constants, num_levels), bounds, strict=True):
        assert (residual >= bound[:, 0]).all()
        assert (residual <= bound[:, 1]).all()


@given(sizes, seeds)
@settings(deadline=None, max_examples=40)
def test_worst_case_errors_bound_the_decoding_of_every_prefix(size: tuple[int, int, int], seed: int) -> None:
    num_layers, latent_dim, num_levels = size
    generator = np.random.default_rng(seed)
    constants = ConditioningConstants(
        torch.from_numpy(generator.normal(0, 0.3, (num_layers, latent_dim))).float(),
        torch.from_numpy(generator.uniform(0.01, 0.9, (num_layers, latent_dim))).float(),
    )
    quantizer = ResidualQuantizer(num_layers, num_levels, latent_dim, Conditioning.CALIBRATED, constants).double()
    latents = torch.linspace(-1, 1, 2001, dtype=torch.float64).unsqueeze(-1).expand(-1, latent_dim)
    tokens = quantizer.quantize(latents).tokens
    for prefix, bound in enumerate(worst_case_errors(constants, num_levels).tolist(), start=1):
        error = float((quantizer.dequantize(tokens[..., :prefix]) - latents).abs().max())
        assert error <= bound
        # Attained but for the spacing of the latents where the first layer decides; never far too wide.
        assert prefix > 1 or error >= bound - 2e-3


@pytest.mark.parametrize("num_levels", [3, 4, 7, 16])
def test_no_layer_spoils_what_the_layers_before_it_reached(num_levels: int) -> None:
    generator = np.random.default_rng(0)
    latents = torch.from_numpy(0.1 + generator.uniform(-0.01, 0.01, (400, 3)))
    constants = constants_of_latents(latents, 8, num_levels)
    quantizer = ResidualQuantizer(8, num_levels, 3, Conditioning.CALIBRATED, constants).double()
    tokens = quantizer.quantize(latents).tokens
    errors = [mean_square(quantizer.dequantize(tokens[..., :prefix]) - latents) for prefix in range(1, 9)]
    for before, after in pairwise(errors):
        assert after <= max(1.1 * before, 1e-11)


@given(sizes, seeds)
@settings(deadline=None, max_examples=80)
def test_worst_case_aim_is_reached_where_there_are_enough_levels(size: tuple[int, int, int], seed: int) -> None:
    num_layers, latent_dim, num_levels = size
    config = some_config(seed, worst_case=1e-2)
    constants = constants_of_latents(some_latents(seed, latent_dim), num_layers, num_levels, config)
    best_possible = float(num_levels) ** -num_layers
    # Every layer's scale is rounded up, by little more than 2^-15 at most.
    rounded_up = (1 + 2.0**-14) ** num_layers
    assert worst_case_errors(constants, num_levels)[-1] <= max(config.worst_case, best_possible) * rounded_up


@given(sizes, seeds)
@settings(deadline=None, max_examples=80)
def test_range_clips_no_more_of_the_data_than_coverage_allows(size: tuple[int, int, int], seed: int) -> None:
    num_layers, latent_dim, num_levels = size
    latents = some_latents(seed, latent_dim)
    config = some_config(seed, objective=Objective.RANGE)
    constants = constants_of_latents(latents, num_layers, num_levels, config)
    last_edge = num_levels / (num_levels - 1)
    for conditioned, _ in brute_force_layers(latents.numpy(), constants, num_levels):
        # Float64 rounds the quotient.
        clipped = np.abs(conditioned) > last_edge * (1 + 1e-9)
        share = clipped.mean() if config.granularity is Granularity.LAYER else clipped.mean(axis=0).max()
        assert share <= 1 - config.coverage + 1e-12


@given(seeds, st.sampled_from([2, 3, 5, 7, 16]))
@settings(deadline=None, max_examples=40)
def test_mse_has_no_larger_squared_error_than_range(seed: int, num_levels: int) -> None:
    latents = some_latents(seed, 3)
    errors = []
    for objective in (Objective.MSE, Objective.RANGE):
        config = CalibrationConfig(
            objective=objective, granularity=Granularity.LATENT, headroom=0, worst_case=DATA_ALONE
        )
        constants = constants_of_latents(latents, 1, num_levels, config)
        errors.append((brute_force_layers(latents.numpy(), constants, num_levels)[0][1] ** 2).mean(axis=0))
    # The floor under the scale, 1e-6, is all that mse may lose.
    assert (errors[0] <= errors[1] + 1e-11).all()


def test_mse_finds_the_levels_that_data_sit_on() -> None:
    levels = torch.tensor([-0.5, -0.2, 0.1], dtype=torch.float64)
    latents = torch.cat([levels, levels + 1e-4, levels - 1e-4]).unsqueeze(-1)
    config = CalibrationConfig(objective=Objective.MSE, worst_case=DATA_ALONE)
    constants = constants_of_latents(latents, 1, 3, config)
    assert constants.mean.item() == pytest.approx(-0.2, abs=1e-5)
    assert constants.scale.item() == pytest.approx(0.3, abs=1e-5)


def test_granularity_layer_shares_constants_between_latents() -> None:
    latents = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).double() * torch.tensor(
        [0.1, 0.2, 0.4, 0.8]
    )
    shared, apart = (
        constants_of_latents(latents, 3, 7, CalibrationConfig(granularity=granularity, worst_case=DATA_ALONE))
        for granularity in (Granularity.LAYER, Granularity.LATENT)
    )
    assert (shared.scale == shared.scale[:, :1]).all()
    assert (apart.scale[0].diff() > 0).all()


def test_headroom_widens_the_first_layer_but_not_beyond_the_tanh_range() -> None:
    latents = torch.linspace(-0.4, 0.4, 100, dtype=torch.float64).unsqueeze(-1)
    reaches = {}
    for headroom in (0.0, 0.25, 10.0):
        config = CalibrationConfig(headroom=headroom, worst_case=DATA_ALONE)
        reaches[headroom] = constants_of_latents(latents, 2, 7, config).scale[0].item() * 7 / 6
    assert reaches == pytest.approx({0.0: 0.4, 0.25: 0.5, 10.0: 1.0}, abs=4e-5)


def test_catch_up_layers_leave_the_data_alone(calibrated: Checkpoint, split: EpisodeSplit) -> None:
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)
    tokens, _ = model.encode(reference_actions(calibrated, split.calibration))
    silent = (tokens == 3).double().mean(dim=(0, 1))
    assert silent[4:].min() > 0.999
    assert silent[:4].max() < 0.5


# What cannot be fitted -----------------------------------------------------------------------------------------------


def dataset_of(*episodes: npt.NDArray[np.float32]) -> ActionDataset:
    names = tuple(f"episode_{index}" for index in range(len(episodes)))
    return ActionDataset(tuple(episodes), names, ("",) * len(episodes), "made up")


def test_one_step_is_too_few(robust: Checkpoint) -> None:
    with pytest.raises(DataError, match=r"at least 2 steps: give more"):
        fit_constants(robust, dataset_of(np.zeros((1, 7), np.float32)))


def test_two_steps_are_enough(robust: Checkpoint) -> None:
    constants = fit_constants(robust, dataset_of(np.zeros((2, 7), np.float32)))
    assert worst_case_errors(constants, 7)[-1] < 5e-4


def test_another_action_dimension_is_refused(robust: Checkpoint) -> None:
    with pytest.raises(DataError, match="6 action dimensions, the checkpoint 7"):
        fit_constants(robust, dataset_of(np.zeros((9, 6), np.float32)))


def test_actions_that_overflow_float32_are_refused(robust: Checkpoint) -> None:
    actions = np.full((9, 7), 3e38, np.float32)
    with pytest.raises(DataError, match="float32 may overflow"):
        float32_noise(robust.model(dtype=torch.float64), torch.from_numpy(actions).double())
    with pytest.raises(DataError, match="9 of 9 steps drive every latent to the end of its range"):
        fit_constants(robust, dataset_of(np.full((9, 7), 1e19, np.float32)))


def test_latents_that_are_not_finite_are_refused() -> None:
    checkpoint = checkpoint_of(ActionAutoencoder(ModelConfig(), Conditioning.NONE), {})
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    weights["encoder.2.bias"][0] = torch.nan
    with pytest.raises(DataError, match="9 of 9 steps have latents that are not finite"):
        fit_constants(replace(checkpoint, weights=weights), dataset_of(np.zeros((9, 7), np.float32)))


def test_noise_is_never_below_one_rounding() -> None:
    model = ActionAutoencoder(ModelConfig(), Conditioning.NONE).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    assert float32_noise(model, torch.zeros(3, 7, dtype=torch.float64)) == 2.0**-24


@pytest.mark.parametrize(
    ("field", "value"),
    [("coverage", 0.0), ("coverage", 1.01), ("coverage", float("nan")), ("worst_case", 0.0),
     ("worst_case", float("inf")), ("headroom", -0.1), ("headroom", float("nan"))],
)  # fmt: skip
def test_settings_without_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(CalibrationError, match=f"{field} is .*; expected"):
        CalibrationConfig(**{field: value})  # type: ignore[arg-type]
