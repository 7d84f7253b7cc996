"""What `rfsq_ref.quantizer` promises: the nearest level, ties downwards, and what tokens alone say."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfsq.rfsq_ref.errors import NotDecodableError
from rfsq.rfsq_ref.quantizer import (
    SIGMA_EPSILON,
    Conditioning,
    ConditioningConstants,
    ResidualQuantizer,
    published_dequantize,
)
from tests.rfsq_ref.models import CONDITIONINGS, shrinking_constants

DTYPES = [torch.float32, torch.float64]


def make_quantizer(
    conditioning: Conditioning, layers: int = 8, levels: int = 7, latent_dim: int = 16, seed: int = 0
) -> ResidualQuantizer:
    calibrated = conditioning is Conditioning.CALIBRATED
    constants = shrinking_constants(layers, latent_dim, levels, seed) if calibrated else None
    return ResidualQuantizer(layers, levels, latent_dim, conditioning, constants).double()


def latents_of(seed: int, latent_dim: int = 16, count: int = 40) -> Tensor:
    """float64 [count, D], as an encoder's tanh gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tanh(1.5 * torch.randn(count, latent_dim, generator=generator, dtype=torch.float64))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ResidualQuantizer, Tensor]:
    conditioning = draw(st.sampled_from(CONDITIONINGS))
    layers, levels, latent_dim = draw(st.integers(1, 9)), draw(st.integers(2, 12)), draw(st.integers(2, 20))
    seed = draw(st.integers(0, 1000))
    quantizer = make_quantizer(conditioning, layers, levels, latent_dim, seed)
    chunk_length = draw(st.integers(1, 9))
    return quantizer, latents_of(seed, latent_dim, 5 * chunk_length).unflatten(0, (5, chunk_length))


# The nearest level ---------------------------------------------------------------------------------------------------


@given(cases())
def test_tokens_are_the_nearest_levels_of_the_conditioned_residual(case: tuple[ResidualQuantizer, Tensor]) -> None:
    quantizer, latents = case
    grid = torch.linspace(-1, 1, quantizer.num_levels, dtype=torch.float64)
    residual = latents
    tokens = quantizer.quantize(latents).tokens
    for layer in range(quantizer.num_layers):
        if quantizer.conditioning is Conditioning.DYNAMIC:
            mean = residual.mean(-1, keepdim=True)
            variance = ((residual - mean) ** 2).sum(-1, keepdim=True) / (quantizer.latent_dim - 1)
            scale = variance.sqrt() + SIGMA_EPSILON
        else:
            mean, scale = quantizer.mean[layer], quantizer.scale[layer]
        conditioned = (residual - mean) / scale
        nearest = (conditioned[..., None] - grid).abs().argmin(-1)
        # Brute force and bucketize round differently; where float64 itself cannot tell, either is right.
        decided = quantizer.decision_margins(conditioned) > 1e-9
        assert torch.equal(tokens[..., layer][decided], nearest[decided])
        residual = residual - (grid[tokens[..., layer]] * scale + mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [2, 3, 5, 9, 17])
def test_ties_go_to_the_lower_level(levels: int, dtype: torch.dtype) -> None:
    # With K - 1 a power of two levels and edges are exact, so these are true ties.
    quantizer = ResidualQuantizer(1, levels, levels - 1, Conditioning.NONE).to(dtype)
    edges = (torch.arange(levels - 1, dtype=dtype) * 2 + 1) / (levels - 1) - 1
    assert torch.equal(quantizer.edges, edges)
    assert torch.equal((edges[:, None] - quantizer.grid).abs().argmin(-1), torch.arange(levels - 1))
    assert torch.equal(quantizer.quantize(edges).tokens[:, 0], torch.arange(levels - 1))
    above = torch.nextafter(edges, torch.ones_like(edges))
    assert torch.equal(quantizer.quantize(above).tokens[:, 0], torch.arange(1, levels))


@given(st.integers(2, 12), st.floats(-3, 3))
def test_the_ceil_formula_gives_the_same_level(levels: int, value: float) -> None:
    quantizer = ResidualQuantizer(1, levels, 1, Conditioning.NONE).double()
    conditioned = torch.tensor([value], dtype=torch.float64)
    formula = torch.ceil((conditioned + 1) * (levels - 1) / 2 - 0.5).clamp(0, levels - 1).long()
    if quantizer.decision_margins(conditioned) > 1e-12:
        assert torch.equal(quantizer.quantize(conditioned).tokens[:, 0], formula)


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_the_ceil_formula_sends_ties_to_the_same_level(levels: int) -> None:
    quantizer = ResidualQuantizer(1, levels, levels - 1, Conditioning.NONE).double()
    formula = torch.ceil((quantizer.edges + 1) * (levels - 1) / 2 - 0.5).long()
    assert torch.equal(quantizer.quantize(quantizer.edges).tokens[:, 0], formula)


@given(st.integers(2, 12), st.floats(-3, 3))
def test_margins_are_distances_to_the_nearest_edge_in_bins(levels: int, value: float) -> None:
    quantizer = ResidualQuantizer(1, levels, 1, Conditioning.NONE).double()
    conditioned = torch.tensor([value], dtype=torch.float64)
    expected = (conditioned[:, None] - quantizer.edges).abs().min() * (levels - 1) / 2
    torch.testing.assert_close(quantizer.decision_margins(conditioned)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", range(2, 13))
def test_the_grid_is_the_linspace_in_both_dtypes(levels: int) -> None:
    quantizer = ResidualQuantizer(1, levels, 1, Conditioning.NONE)
    for dtype in DTYPES:
        torch.testing.assert_close(quantizer.to(dtype).grid, torch.linspace(-1, 1, levels, dtype=dtype))
    # To the last bit in float64, not float32's rounding of it.
    assert (quantizer.grid * (levels - 1) - quantizer.half_steps).abs().max() < 1e-14


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_float32_and_float64_agree_where_the_decision_is_clear(conditioning: Conditioning) -> None:
    latents = latents_of(3, count=500).float()
    quantizer = make_quantizer(conditioning, layers=3)
    exact = quantizer.quantize(latents.double())
    margins = torch.stack([quantizer.decision_margins(step.conditioned) for step in quantizer.layers(latents.double())])
    found = quantizer.float().quantize(latents)
    assert found.latents.dtype is torch.float32
    clear = (margins > 1e-4).all(0).all(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(found.tokens[clear], exact.tokens[clear])


# Decoding ------------------------------------------------------------------------------------------------------------


@given(cases())
def test_decoding_all_layers_gives_what_quantising_gave(case: tuple[ResidualQuantizer, Tensor]) -> None:
    quantizer, latents = case
    quantized = quantizer.quantize(latents)
    torch.testing.assert_close(quantizer.dequantize(quantized.tokens, quantized.stats), quantized.latents)


@given(cases(), st.data())
def test_a_prefix_is_the_sum_of_its_layers_and_the_mean_of_the_missing(
    case: tuple[ResidualQuantizer, Tensor], data: st.DataObject
) -> None:
    quantizer, latents = case
    steps = list(quantizer.layers(latents))
    tokens, stats = quantizer.quantize(latents).tokens, quantizer.quantize(latents).stats
    prefix = data.draw(st.integers(1, quantizer.num_layers))
    expected = torch.stack([step.dequantised for step in steps[:prefix]]).sum(0)
    if quantizer.conditioning is Conditioning.CALIBRATED and prefix < quantizer.num_layers:
        expected = expected + quantizer.mean[prefix]
    found = quantizer.dequantize(tokens[..., :prefix], None if stats is None else stats[..., :prefix, :])
    torch.testing.assert_close(found, expected)


def test_the_mean_of_missing_layers_makes_a_calibrated_prefix_better() -> None:
    latents = latents_of(1, count=400)
    quantizer = make_quantizer(Conditioning.CALIBRATED)
    quantizer.mean[1] = (latents - next(iter(quantizer.layers(latents))).dequantised).mean(0)
    tokens = quantizer.quantize(latents).tokens[..., :1]
    with_mean = quantizer.dequantize(tokens)
    assert ((latents - with_mean) ** 2).mean() < ((latents - (with_mean - quantizer.mean[1])) ** 2).mean()


@given(cases(), st.data())
def test_decoding_is_affine_in_the_tokens(case: tuple[ResidualQuantizer, Tensor], data: st.DataObject) -> None:
    quantizer, latents = case
    prefix = data.draw(st.integers(1, quantizer.num_layers))
    tokens = quantizer.quantize(latents).tokens[..., :prefix]
    stats = quantizer.quantize(latents).stats
    if stats is None:
        mean, scale = quantizer.mean, quantizer.scale
        columns = [(mean[layer], scale[layer]) for layer in range(prefix)]
    else:
        columns = [(stats[..., layer, :1], stats[..., layer, 1:]) for layer in range(prefix)]
    expected = torch.zeros_like(latents)
    for layer, (mean, scale) in enumerate(columns):
        expected = expected + 2 * scale / (quantizer.num_levels - 1) * tokens[..., layer] + mean - scale
    if quantizer.conditioning is Conditioning.CALIBRATED and prefix < quantizer.num_layers:
        expected = expected + quantizer.mean[prefix]
    torch.testing.assert_close(quantizer.dequantize(tokens, stats), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("conditioning", [Conditioning.NONE, Conditioning.CALIBRATED])
def test_tokens_of_every_integer_type_decode(conditioning: Conditioning, dtype: torch.dtype) -> None:
    quantizer = make_quantizer(conditioning)
    tokens = quantizer.quantize(latents_of(0)).tokens
    assert torch.equal(quantizer.dequantize(tokens.to(dtype)), quantizer.dequantize(tokens))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_single_step_is_coded_as_in_a_batch(conditioning: Conditioning) -> None:
    quantizer, latents = make_quantizer(conditioning), latents_of(0, count=3)
    batch, single = quantizer.quantize(latents), quantizer.quantize(latents[1])
    assert torch.equal(single.tokens, batch.tokens[1])
    torch.testing.assert_close(quantizer.dequantize(single.tokens, single.stats), batch.latents[1])


def test_dynamic_stats_are_the_mean_and_sigma_of_every_layer() -> None:
    quantizer = make_quantizer(Conditioning.DYNAMIC)
    latents = latents_of(4)
    stats = quantizer.quantize(latents).stats
    assert stats is not None
    assert stats.shape == (40, 8, 2)
    torch.testing.assert_close(stats[:, 0, 0], latents.mean(-1))
    torch.testing.assert_close(stats[:, 0, 1], latents.std(-1) + 1e-5)
    torch.testing.assert_close(stats[:, 3, 0], list(quantizer.layers(latents))[3].residual.mean(-1))


@pytest.mark.parametrize("conditioning", [Conditioning.NONE, Conditioning.CALIBRATED])
def test_only_dynamic_has_stats(conditioning: Conditioning) -> None:
    assert make_quantizer(conditioning).quantize(latents_of(0)).stats is None


def test_dynamic_tokens_alone_are_not_decodable_and_the_message_names_the_command() -> None:
    quantizer = make_quantizer(Conditioning.DYNAMIC)
    with pytest.raises(NotDecodableError, match=r"python calibration/fit\.py --checkpoint"):
        quantizer.dequantize(quantizer.quantize(latents_of(0)).tokens)


@pytest.mark.parametrize("shape", [(16,), (3, 15, 8), (3, 16, 9), (3, 16, 0)])
@pytest.mark.parametrize("conditioning", [Conditioning.NONE, Conditioning.CALIBRATED])
def test_tokens_of_another_shape_are_refused(conditioning: Conditioning, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 16, l\]"):
        make_quantizer(conditioning).dequantize(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("level", [-1, 7])
def test_tokens_outside_the_grid_are_refused(level: int) -> None:
    tokens = torch.zeros(2, 16, 8, dtype=torch.int64)
    tokens[1, 2, 3] = level
    with pytest.raises(ValueError, match="expected 0 to 6"):
        make_quantizer(Conditioning.NONE).dequantize(tokens)


def test_the_published_decoding_drops_means_and_sigmas() -> None:
    quantizer = make_quantizer(Conditioning.DYNAMIC)
    tokens = quantizer.quantize(latents_of(0)).tokens
    expected = torch.linspace(-1, 1, 7, dtype=torch.float64)[tokens].sum(-1)
    torch.testing.assert_close(published_dequantize(quantizer, tokens), expected)


def test_what_travels_in_files_is_called_as_it_always_was() -> None:
    assert [conditioning.value for conditioning in Conditioning] == ["none", "dynamic", "calibrated"]
    # As in the published model.
    assert SIGMA_EPSILON == 1e-5
    # Constants travel beside the weights, under names of their own.
    assert not make_quantizer(Conditioning.CALIBRATED).state_dict()


# Conditionings -------------------------------------------------------------------------------------------------------


def mean_square_by_layer(quantizer: ResidualQuantizer, latents: Tensor) -> list[float]:
    return [float((step.residual - step.dequantised).square().mean()) for step in quantizer.layers(latents)]


def test_naive_layers_after_the_first_change_nothing() -> None:
    latents = latents_of(5).clamp(-1, 1)
    tokens = make_quantizer(Conditioning.NONE).quantize(latents).tokens
    # The residual is at most half a bin, so the middle level is the nearest ever after.
    assert (tokens[..., 1:] == 3).all()


@pytest.mark.parametrize("conditioning", [Conditioning.DYNAMIC, Conditioning.CALIBRATED])
def test_every_conditioned_layer_brings_the_latents_closer(conditioning: Conditioning) -> None:
    errors = mean_square_by_layer(make_quantizer(conditioning), latents_of(5))
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_straight_through_gradient_is_the_identity(conditioning: Conditioning) -> None:
    quantizer = make_quantizer(conditioning)
    latents = latents_of(6).requires_grad_()
    weights = torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    quantized = quantizer(latents)
    torch.autograd.backward((quantized * weights).sum())
    assert latents.grad is not None
    assert torch.equal(latents.grad, weights)
    torch.testing.assert_close(quantized.detach(), quantizer.quantize(latents.detach()).latents)


def with_one(value: float, numbers: Tensor) -> Tensor:
    numbers[3, 5] = value
    return numbers


@pytest.mark.parametrize(
    ("mean", "scale"),
    [
        (with_one(torch.nan, torch.zeros(8, 16)), torch.ones(8, 16)),
        (torch.zeros(8, 16), with_one(torch.inf, torch.ones(8, 16))),
        (torch.zeros(8, 16), with_one(0, torch.ones(8, 16))),
        (torch.zeros(8, 16), torch.zeros(8, 16)),
        (torch.zeros(8, 16), -torch.ones(8, 16)),
        (torch.full((8, 16), torch.nan), torch.ones(8, 16)),
        (torch.zeros(8, 16), torch.full((8, 16), torch.inf)),
        (torch.zeros(8, 16), torch.ones(8, 15)),
        (torch.zeros(16), torch.ones(16)),
    ],
    ids=[
        "one NaN", "one infinite", "one zero", "zero scale", "negative scale", "NaN", "infinite", "other shape",
        "one axis",
    ],
)  # fmt: skip
def test_constants_that_make_no_sense_are_refused(mean: Tensor, scale: Tensor) -> None:
    with pytest.raises(ValueError, match="conditioning constants"):
        ConditioningConstants(mean, scale)


def test_constants_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"this quantiser needs \[num_layers, latent_dim\] = \(8, 16\)"):
        ResidualQuantizer(8, 7, 16, Conditioning.CALIBRATED, shrinking_constants(7, 16, 7))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_constants_belong_to_calibrated_and_to_nothing_else(conditioning: Conditioning) -> None:
    constants = None if conditioning is Conditioning.CALIBRATED else shrinking_constants(8, 16, 7)
    with pytest.raises(ValueError, match=conditioning.value):
        ResidualQuantizer(8, 7, 16, conditioning, constants)
