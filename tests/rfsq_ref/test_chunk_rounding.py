"""What `rfsq_ref.chunk_rounding` promises: float32 stays inside the bounds, faults do not, and bounds are narrow."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.calibration.chunk import fit_chunk_code
from rfsq.calibration.chunk_windows import windows
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.chunk_judging import chunk_token_bounds, judge_chunk_tokens
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.chunk_rounding import Chunks, choice, cost_interval, keep_excess, latents_of, normalised_chunks
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.comparison import TokenComparison, compare_chunk_tokens
from tests.calibration.test_chunk import smooth_episodes
from tests.rfsq_ref.test_chunk_code import any_sizes, random_constants

SIZES = ChunkSizes(action_dim=3, chunk_length=4, num_classes=6, token_bits=8, num_tokens=16)
#: Of the bits of token 0 the first three name a class, of six.
CLASS_SHIFT = SIZES.token_bits - SIZES.class_bits
NORMALISER = Normaliser(NormaliserKind.MIN_MAX, (100.0, 0.0, -3.0), (0.3, 1.0, 50.0))


def tokenizers(
    sizes: ChunkSizes, constants: ChunkConstants, normaliser: Normaliser | None = None
) -> tuple[ChunkTokenizer, ChunkTokenizer]:
    """In float64 and in float32."""
    return ChunkTokenizer(sizes, constants, normaliser).double(), ChunkTokenizer(sizes, constants, normaliser)


def some_chunks(model: ChunkTokenizer, count: int, seed: int) -> Tensor:
    """float32 actions [3 count, T, A]: random, close to the means of classes, and what random tokens decode to."""
    sizes, generator = model.sizes, torch.Generator().manual_seed(seed)
    shape = (count, sizes.chunk_length, sizes.action_dim)
    uniform = torch.rand(shape, generator=generator) * 2.4 - 1.2
    means = model.code.mean[torch.randint(0, sizes.escape, (count,), generator=generator)].reshape(shape)
    near = means + 0.05 * torch.randn(shape, generator=generator)
    tokens = torch.randint(0, 2**sizes.token_bits, (count, sizes.num_tokens), generator=generator)
    return torch.cat((torch.cat((uniform, near)) * model.units + model.offset, model.decode(tokens))).float()


def judged(reference: ChunkTokenizer, actions: Tensor, found: Tensor) -> TokenComparison:
    exact = actions.double()
    return judge_chunk_tokens(reference, exact, reference.encode(exact).numpy(), found.numpy())


@cache
def fitted() -> ChunkConstants:
    """Of a robot whose motions are smooth: a code that uses all its classes."""
    training, calibration = smooth_episodes(3, [60] * 12, seed=13), smooth_episodes(3, [60] * 4, seed=2)
    return fit_chunk_code(training, calibration, SIZES)


@cache
def a_code() -> tuple[ChunkTokenizer, ChunkTokenizer, Tensor, Tensor]:
    """One code in float64 and float32, actions, and the reference's tokens of them."""
    reference, model = tokenizers(SIZES, fitted(), NORMALISER)
    held_out = windows(smooth_episodes(3, [60] * 20, seed=3), SIZES.chunk_length).reshape(-1, 4, 3)
    actions = (held_out * reference.units + reference.offset).float()
    return reference, model, actions, reference.encode(actions.double())


# Float32 stays inside -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(any_sizes(), st.integers(0, 2**32), st.booleans())
def test_no_token_of_float32_is_wrong_for_any_sizes_constants_and_units(
    sizes: ChunkSizes, seed: int, normalised: bool
) -> None:
    generator = np.random.default_rng(seed)
    offset, units = generator.normal(size=sizes.action_dim) * 30, 10 ** generator.uniform(-2, 2, sizes.action_dim)
    normaliser = Normaliser(
        NormaliserKind.MIN_MAX, tuple(map(float, np.float32(offset))), tuple(map(float, np.float32(units)))
    )
    reference, model = tokenizers(sizes, random_constants(sizes, seed), normaliser if normalised else None)
    actions = some_chunks(model, 60, seed)
    found = model.encode(actions)
    assert judged(reference, actions, found).num_wrong == 0
    # Nor where only margins and bounds are known.
    tokens, margins, bounds = (part.numpy() for part in chunk_token_bounds(reference, actions.double()))
    vocabulary = 2**sizes.token_bits
    assert compare_chunk_tokens(tokens, found.numpy(), margins, bounds, vocabulary=vocabulary).num_wrong == 0


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-20, 1.0, 1e6, 1e30, 2.0**126])
def test_no_token_of_float32_is_wrong_for_actions_of_any_size(size: float) -> None:
    reference, model = tokenizers(SIZES, random_constants(SIZES, 5))
    signs = torch.randint(-1, 2, (200, 4, 3), generator=torch.Generator().manual_seed(0)).float()
    actions = signs * size
    assert judged(reference, actions, model.encode(actions)).num_wrong == 0


def in_another_order(code: ChunkCode, chunks: Tensor, index: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """Latents float32 [n, M] and cost [n] of a class, term after term: the longest chains of roundings there are."""
    latents = torch.zeros(len(chunks), code.scale.shape[1])
    for value in order.tolist():
        latents = latents + (chunks[:, value] - code.mean[index, value])[:, None] * code.basis[index, value]
    cost = torch.zeros(len(chunks))
    for weight, count in zip(code.weights, code.counts[:, index], strict=True):
        digits = ((code.compand(latents, index) + 1) * 2 ** (MOST_BITS - 1)).floor().clamp(0, 2**MOST_BITS - 1).long()
        level = (2 * (digits >> (MOST_BITS - count)) + 1) / torch.exp2(count.float()) - 1
        errors = latents - code.latents(level, count.expand_as(digits), index)
        for latent in range(latents.shape[1]):
            cost = cost + weight * errors[:, latent] ** 2
    return latents, cost


def test_latents_and_costs_stay_inside_for_any_order_of_the_sums() -> None:
    reference, model, actions, _ = a_code()
    chunks = normalised_chunks(reference, actions.double())
    values = model.normalised(actions).clamp(-1, 1)
    # All latents, so that none is left out of the cost.
    generator = torch.Generator().manual_seed(0)
    full = torch.linalg.qr(torch.randn(5, 12, 12, generator=generator)).Q
    for seed in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        for index in range(SIZES.escape):
            exact = latents_of(reference.code, chunks, index)
            z, _ = in_another_order(model.code, values, index, order)
            assert ((z.double() - exact.z).abs() <= exact.error).all()
            y = model.code.compand(z, index).double()
            assert ((y - exact.y).abs() <= exact.slack).all()
    constants = replace(
        fitted(),
        basis=full,
        scale=torch.rand(5, 12, generator=generator) + 0.05,
        gain=torch.ones(5, 12, MOST_BITS + 1),
    )
    whole, whole32 = tokenizers(SIZES, constants, NORMALISER)
    for index in range(SIZES.escape):
        interval = cost_interval(whole.code, latents_of(whole.code, chunks, index), index)
        _, cost = in_another_order(whole32.code, values, index, torch.arange(12).flip(0))
        assert ((interval.low <= cost) & (cost <= interval.high)).all()
        torch.testing.assert_close(interval.cost, whole.code.costs(chunks.values)[:, index])


def test_the_reference_itself_lies_in_its_intervals() -> None:
    reference, _, actions, tokens = a_code()
    chunks = normalised_chunks(reference, actions.double())
    costs, classes = reference.code.costs(chunks.values), tokens[:, 0] >> CLASS_SHIFT
    found = choice(reference.code, chunks)
    torch.testing.assert_close(found.cost, costs)
    assert ((found.low <= costs) & (costs <= found.high)).all()
    for index in range(SIZES.escape):
        excess, bound = keep_excess(reference.code, chunks, latents_of(reference.code, chunks, index), index)
        keeps = reference.code.keeps_bound(chunks.values, index)
        assert torch.equal(excess <= 0, keeps)
        assert (bound > 0).all()
    acceptable = found.acceptable()
    assert acceptable.gather(1, classes[:, None]).all()
    # And hardly any other.
    assert acceptable.double().sum(dim=1).mean() < 1.01


# Faults do not --------------------------------------------------------------------------------------------------------


def scaled(name: str, by: float) -> Callable[[ChunkConstants], ChunkConstants]:
    return lambda constants: replace(constants, **{name: getattr(constants, name) * by})


def truncated(name: str) -> Callable[[ChunkConstants], ChunkConstants]:
    """As TF32 does: 10 bits of fraction are left of 23."""
    return lambda constants: replace(constants, **{name: tf32(getattr(constants, name))})


def tf32(values: Tensor) -> Tensor:
    return torch.from_numpy((values.numpy().view(np.int32) & ~0x1FFF).view(np.float32))


def swapped(constants: ChunkConstants) -> ChunkConstants:
    order = constants.order.clone()
    other = int((order[0] != order[0, 0]).nonzero()[0])
    order[0, [0, other]] = order[0, [other, 0]]
    return replace(constants, order=order)


def with_other_weights(constants: ChunkConstants) -> ChunkConstants:
    weights = constants.weights * 1e-3
    weights[0] = constants.weights[0]
    return replace(constants, weights=weights)


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(scaled(name, 1 + 1e-4), id=f"{name} off by 1e-4") for name in ("mean", "basis", "scale")),
        *(pytest.param(truncated(name), id=f"{name} in TF32") for name in ("mean", "basis")),
        # What cells and budgets are worth shows in the choice of a class alone.
        pytest.param(scaled("gain", 1 + 1e-2), id="gain off by 1e-2"),
        pytest.param(with_other_weights, id="other weights"),
        pytest.param(swapped, id="two bits swapped"),
    ],
)
def test_tokens_of_other_constants_are_wrong(fault: Callable[[ChunkConstants], ChunkConstants]) -> None:
    reference, _, actions, _ = a_code()
    faulty = ChunkTokenizer(SIZES, fault(fitted()), NORMALISER)
    assert judged(reference, actions, faulty.encode(actions)).num_wrong > 0


def test_tokens_of_actions_in_tf32_are_wrong() -> None:
    reference, model, actions, _ = a_code()
    assert judged(reference, actions, model.encode(tf32(actions))).num_wrong > 0


def test_a_bit_of_a_cell_that_a_latent_is_not_in_is_wrong_where_it_stands() -> None:
    reference, _, actions, tokens = a_code()
    _, margins, bounds = chunk_token_bounds(reference, actions[:20].double())
    for row in range(20):
        bits = reference.code.bits(tokens[row : row + 1])
        place = SIZES.class_bits + 13 * row % SIZES.code_bits
        bits[0, place] ^= 1
        position = place // SIZES.token_bits
        comparison = judged(reference, actions[row : row + 1], reference.code.tokens(bits))
        if margins[row, position] > bounds[row, position]:
            assert np.flatnonzero(comparison.wrong).tolist() == [position]
            assert comparison.first_wrong is not None
            assert comparison.first_wrong.index == (0, position)
            assert comparison.first_wrong.margin > comparison.first_wrong.bound


def test_what_no_encoder_sends_is_wrong() -> None:
    reference, _, actions, tokens = a_code()
    cases = {
        "no token": (0, 2**SIZES.token_bits),
        "no token, negative": (7, -1),
        "a class behind the last": (0, (SIZES.num_classes << CLASS_SHIFT) + 1),
    }
    for name, (position, value) in cases.items():
        found = tokens[:1].clone()
        found[0, position] = value
        assert judged(reference, actions[:1], found).wrong[position] == 1, name


def test_a_word_of_escape_behind_the_last_and_bits_that_mean_nothing_are_wrong() -> None:
    sizes = ChunkSizes(action_dim=1, chunk_length=2, num_classes=2, token_bits=9, num_tokens=4)
    constants = random_constants(sizes, 0)
    reference, _ = tokenizers(sizes, constants)
    # The last word, 242, for values at the upper end, where no class is: 243 decodes the same.
    actions = torch.ones(1, 2, 1)
    found = reference.code.encode_in(torch.ones(1, 2, dtype=torch.float64), torch.tensor([sizes.escape]))
    assert int(found[0, 0]) >> 8 == sizes.escape
    word = int(found[0, 0]) & 255
    assert word == 2 * 81 + 2 * 27
    assert torch.equal(reference.decode(found), reference.decode(found))
    exact = actions.double()
    assert judge_chunk_tokens(reference, exact, found.numpy(), found.numpy()).num_wrong == 0
    other = found.clone()
    other[0, 0] += 243 - word
    assert judge_chunk_tokens(reference, exact, found.numpy(), other.numpy()).wrong[0] == 1


def test_another_class_is_wrong_and_what_follows_is_judged_along_it() -> None:
    reference, _, actions, tokens = a_code()
    chunks = reference.normalised(actions.double()).clamp(-1, 1)
    classes = tokens[:, 0] >> CLASS_SHIFT
    other = (classes + 1) % SIZES.num_classes
    found = reference.code.encode_in(chunks, other)
    acceptable = choice(reference.code, normalised_chunks(reference, actions.double())).acceptable()
    wrong = ~acceptable.gather(1, other[:, None])[:, 0]
    comparison = judged(reference, actions, found)
    assert comparison.wrong.tolist() == [int(wrong.sum()), *[0] * (SIZES.num_tokens - 1)]
    assert comparison.near_ties[0] == int((~wrong).sum())
    assert comparison.flipped.shape == (len(actions), 1)


# They are narrow ------------------------------------------------------------------------------------------------------


def test_few_tokens_are_excused_and_the_first_are_excused_least() -> None:
    reference, _, actions, _ = a_code()
    _, margins, bounds = chunk_token_bounds(reference, actions.double())
    excused = (margins <= bounds).double().mean(dim=0)
    # Measured: 0.1 %. Latents of up to 18 bits are refined here, down to where float32 rounds.
    assert excused.mean() < 0.1
    assert excused[1] < 1e-2


def test_the_bound_of_latents_is_within_a_small_factor_of_what_happens() -> None:
    reference, model, actions, _ = a_code()
    chunks = normalised_chunks(reference, actions.double())
    for index in range(SIZES.escape):
        exact = latents_of(reference.code, chunks, index)
        values = model.normalised(actions).clamp(-1, 1)
        z = (values - model.code.mean[index]) @ model.code.basis[index]
        y = model.code.compand(z, index).double()
        assert 0.03 < ((z.double() - exact.z).abs() / exact.error).max() < 1
        assert 0.03 < (((y + 1).float().double() - exact.y - 1).abs() / exact.slack).max() < 1


def test_only_float64_is_judged_and_shapes_have_to_fit() -> None:
    reference, model, actions, tokens = a_code()
    with pytest.raises(ValueError, match="float64"):
        chunk_token_bounds(model, actions.double())
    with pytest.raises(ValueError, match="float64"):
        chunk_token_bounds(reference, actions)
    with pytest.raises(ValueError, match="shapes"):
        judge_chunk_tokens(reference, actions.double(), tokens.numpy(), tokens[:, :5].numpy())


def test_values_beyond_the_ends_have_no_error_and_those_at_rest_hardly_any() -> None:
    reference, _, _, _ = a_code()
    actions = torch.tensor([2.0, 0.0, -1.0, 0.5]).double().expand(3, 4).T.reshape(1, 4, 3)
    chunks = normalised_chunks(reference, actions * reference.units + reference.offset)
    assert isinstance(chunks, Chunks)
    assert (chunks.variance[0, :3] == 0).all()
    assert (chunks.variance[0, 3:6] < 1e-20).all()
    assert (chunks.slack > 0).all()
