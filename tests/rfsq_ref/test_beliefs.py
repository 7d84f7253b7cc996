"""What probabilities of tokens decode to: exact where decoding is affine, right to the first order elsewhere."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig, RecoveredDecoder, linear_layers
from rfsq.rfsq_ref.beliefs import BitProbabilities, bits_of_tokens, chunk_belief, step_belief
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.errors import NotDecodableError
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.beliefs import BELIEF_MODES, Belief, BeliefMode
from tests.chunk_bundles import random_constants
from tests.rfsq_ref.models import configs, make_model, some_normaliser
from tests.rfsq_ref.test_chunk_code import any_sizes

DECODABLE = ("none", "calibrated", "recovered")
#: Few enough that all its tokens can be decoded one after the other.
TINY = ModelConfig(action_dim=3, latent_dim=2, hidden_width=5, num_layers=2, num_levels=3)
TINY_CHUNKS = ChunkSizes(action_dim=2, chunk_length=2, num_classes=3, token_bits=4, num_tokens=3)


def step_model(config: ModelConfig, kind: str, prefix: int, seed: int = 0) -> ActionAutoencoder:
    conditioning = Conditioning.DYNAMIC if kind == "recovered" else Conditioning(kind)
    normaliser = some_normaliser(config.action_dim, seed)
    model = make_model(config, conditioning, seed=seed, normaliser=normaliser, dtype=torch.float64)
    if kind == "recovered":
        shape = (config.latent_dim, config.latent_dim * prefix)
        model.recovered = {prefix: RecoveredDecoder(torch.randn(shape).double(), torch.randn(shape[0]).double())}
    return model


def chunk_model(sizes: ChunkSizes, seed: int = 0) -> ChunkTokenizer:
    normaliser = some_normaliser(sizes.action_dim, seed)
    return ChunkTokenizer(sizes, random_constants(sizes, seed), normaliser).double()


def random_probabilities(*shape: int, seed: int, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits_of(model: ChunkTokenizer, tokens: Tensor) -> BitProbabilities:
    """Tokens [B, l] that are certain."""
    return bits_of_tokens(functional.one_hot(tokens, 2**model.sizes.token_bits).double(), model.sizes)


def assert_is(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# What is certain ------------------------------------------------------------------------------------------------------


@given(configs(), st.sampled_from(DECODABLE), st.sampled_from(BELIEF_MODES), st.data())
def test_certain_steps_decode_as_their_tokens_do(
    config: ModelConfig, kind: str, mode: BeliefMode, data: st.DataObject
) -> None:
    prefix = data.draw(st.integers(1, config.num_layers))
    coarse = data.draw(st.integers(1, prefix))
    model = step_model(config, kind, prefix)
    tokens = torch.randint(config.num_levels, (2, 3, config.latent_dim, prefix), generator=seeded())
    belief = step_belief(model, functional.one_hot(tokens, config.num_levels).double(), mode, coarse, seeded())
    assert_is(belief.actions, model.decode(tokens))
    assert (belief.std == 0).all()
    assert (belief.mode_probability == 1).all()
    assert torch.equal(belief.mode, tokens[..., :coarse])


@given(any_sizes(), st.integers(0, 2**32), st.sampled_from(BELIEF_MODES), st.data())
def test_certain_chunks_decode_as_their_tokens_do_in_every_class(
    sizes: ChunkSizes, seed: int, mode: BeliefMode, data: st.DataObject
) -> None:
    model, length = chunk_model(sizes, seed), data.draw(st.integers(1, sizes.num_tokens))
    tokens = torch.randint(2**sizes.token_bits, (8, length), generator=seeded(seed))
    # Of all classes, and of numbers behind the last.
    tokens[:, 0] = torch.linspace(0, 2**sizes.token_bits - 1, 8).long()
    belief = chunk_belief(model, bits_of(model, tokens), mode, seeded())
    assert_is(belief.actions, model.decode(tokens))
    assert (belief.std == 0).all()
    assert (belief.mode_probability == 1).all()
    assert torch.equal(belief.mode, model.code.classes(model.code.bits(tokens)))


# Against all that is possible -----------------------------------------------------------------------------------------


def all_steps(model: ActionAutoencoder, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the actions [A] of one step, probabilities [D, l, K], over all its tokens."""
    layers, levels = probabilities.shape[1:]
    words = itertools.product(range(levels), repeat=probabilities.shape[0] * layers)
    tokens = torch.tensor(list(words)).reshape(-1, probabilities.shape[0], layers)
    weights = probabilities.expand(len(tokens), -1, -1, -1).gather(3, tokens.unsqueeze(3)).flatten(1).prod(1)
    return weighted(weights, model.decode(tokens))


def weighted(weights: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.tensordot(weights, actions, 1)
    return mean, torch.tensordot(weights, (actions - mean).square(), 1).sqrt()


@pytest.mark.parametrize("kind", DECODABLE)
def test_steps_are_exact_where_mish_is_straight(kind: str) -> None:
    model = step_model(TINY, kind, 2)
    # Mish is x to the last digit of a float64 from 40 on.
    linear_layers(model.decoder)[0].bias.add_(60)
    probabilities = random_probabilities(1, 1, 2, 2, 3, seed=1)
    belief = step_belief(model, probabilities, "expected", 1, None)
    mean, deviation = all_steps(model, probabilities[0, 0])
    assert_is(belief.actions[0, 0], mean)
    assert_is(belief.std[0, 0], deviation)


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.001])
def test_steps_are_right_to_the_first_order_where_mish_bends(scale: float) -> None:
    model = step_model(TINY, "calibrated", 2)
    model.quantizer.scale.mul_(scale)
    probabilities = random_probabilities(1, 1, 2, 2, 3, seed=2)
    belief = step_belief(model, probabilities, "expected", 1, None)
    mean, deviation = all_steps(model, probabilities[0, 0])
    assert ((belief.actions[0, 0] - mean).abs() < scale * deviation).all()
    assert ((belief.std[0, 0] / deviation - 1).abs() < scale).all()


def all_bits(model: ChunkTokenizer, index: int, ones: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the actions [T, A] of a class, over all its bits, whose probabilities [n] these are."""
    bits = torch.tensor(list(itertools.product((0, 1), repeat=len(ones))))
    weights = torch.where(bits.bool(), ones, 1 - ones).prod(1)
    number = torch.full((len(bits), 1), index) >> torch.arange(model.sizes.class_bits - 1, -1, -1) & 1
    chunks = model.code.decode_bits(torch.cat((number, bits), 1))
    return weighted(weights, chunks.reshape(-1, *TINY_CHUNKS_SHAPE) * model.units + model.offset)


TINY_CHUNKS_SHAPE = (TINY_CHUNKS.chunk_length, TINY_CHUNKS.action_dim)


def in_class(model: ChunkTokenizer, index: int, ones: Tensor) -> Belief[Tensor]:
    classes = functional.one_hot(torch.tensor([index]), model.sizes.num_classes).double()
    bits = ones.expand(1, model.sizes.num_classes, -1)
    return chunk_belief(model, BitProbabilities(classes, bits), "expected", None)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_escaped_chunks_are_exact(length: int) -> None:
    model = chunk_model(TINY_CHUNKS)
    ones = random_probabilities(length * 4 - 2, 2, seed=length)[:, 0]
    belief = in_class(model, TINY_CHUNKS.escape, ones)
    mean, deviation = all_bits(model, TINY_CHUNKS.escape, ones)
    assert_is(belief.actions[0], mean)
    assert_is(belief.std[0], deviation)


def one_latent(width: float) -> ChunkTokenizer:
    """One latent of a class has all the bits, so that its last ones move it little."""
    constants = random_constants(TINY_CHUNKS, 3)
    constants = replace(constants, order=torch.zeros_like(constants.order), scale=constants.scale * width)
    return ChunkTokenizer(TINY_CHUNKS, constants).double()


@pytest.mark.parametrize("place", range(10))
def test_of_one_bit_that_is_unsure_the_deviation_is_exact_wherever_it_moves_the_latent(place: int) -> None:
    # Near the end of its range a latent goes to the middle when its first bit is another; nothing is clipped.
    model, ones = one_latent(0.05), torch.ones(10, dtype=torch.float64)
    ones[place] = 0.99
    assert_is(in_class(model, 1, ones).std[0], all_bits(model, 1, ones)[1], 1e-9)


def test_no_deviation_is_wider_than_the_range() -> None:
    model, ones = one_latent(1e4), torch.full((10,), 0.5, dtype=torch.float64)
    std = in_class(model, 1, ones).std[0] / model.units
    assert std.max() == 1


def test_chunks_are_exact_before_the_compander_and_to_the_first_order_behind_it() -> None:
    # Nothing is clipped.
    model = one_latent(0.05)
    for known, tolerance in ((3, 0.1), (5, 0.03), (7, 0.01)):
        ones = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.float64)
        ones[known:] = random_probabilities(10 - known, 2, seed=known)[:, 0]
        belief = in_class(model, 1, ones)
        mean, deviation = all_bits(model, 1, ones)
        moves = deviation > 1e-9
        assert moves.any()
        assert ((belief.actions[0] - mean).abs() <= tolerance * deviation + 1e-12).all()
        assert ((belief.std[0] / deviation - 1).abs()[moves] < tolerance).all()


def test_classes_are_mixed_with_their_probabilities() -> None:
    model = chunk_model(TINY_CHUNKS, seed=2)
    tokens = torch.tensor([[index * 4 + 1, 9, 6] for index in range(3)])
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    # The bits are those of the tokens in each class, and certain.
    bits = bits_of(model, tokens).bits[torch.arange(3), torch.arange(3)].unsqueeze(0)
    belief = chunk_belief(model, BitProbabilities(weights.unsqueeze(0), bits), "expected", None)
    mean, deviation = weighted(weights, model.decode(tokens))
    assert_is(belief.actions[0], mean)
    assert_is(belief.std[0], deviation)
    alone = chunk_belief(model, BitProbabilities(weights.unsqueeze(0), bits), "likeliest mode", None)
    assert_is(alone.actions, model.decode(tokens[:1]))
    assert (alone.std == 0).all()
    assert alone.mode_probability.tolist() == belief.mode_probability.tolist() == [0.5]
    assert alone.mode.tolist() == belief.mode.tolist() == [0]


# Tokens of a vocabulary -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_tokens_of_independent_bits_are_these_bits(seed: int) -> None:
    sizes = TINY_CHUNKS
    classes = random_probabilities(2, 3, seed=seed)
    ones = random_probabilities(2, 10, 2, seed=seed + 1)[..., 0]
    digits = (torch.arange(16).unsqueeze(1) >> torch.arange(3, -1, -1) & 1).bool()

    def words(bits: Tensor, places: Tensor) -> Tensor:
        return torch.where(places, bits.unsqueeze(1), 1 - bits.unsqueeze(1)).prod(-1)

    numbers = functional.pad(classes, (0, 1))
    # The last class has two numbers: its own and the one behind.
    numbers[:, 2:] = numbers[:, 2:3] * torch.tensor([0.25, 0.75])
    first = (numbers.unsqueeze(2) * words(ones[:, :2], digits[:4, 2:]).unsqueeze(1)).flatten(1)
    tokens = torch.stack((first, words(ones[:, 2:6], digits), words(ones[:, 6:], digits)), 1)
    found = bits_of_tokens(tokens, sizes)
    assert_is(found.classes, classes)
    assert_is(found.bits, ones.unsqueeze(1).expand(-1, 3, -1))


def test_bits_of_the_first_token_follow_from_the_class() -> None:
    tokens = torch.zeros(1, 1, 16, dtype=torch.float64)
    # Class 0 with the bits 01, and class 1 with 10 or, three times as likely, 11.
    tokens[0, 0, [1, 6, 7]] = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    found = bits_of_tokens(tokens, TINY_CHUNKS)
    assert_is(found.classes, torch.tensor([[0.2, 0.8, 0]], dtype=torch.float64))
    # Of a class that cannot be nothing is known.
    assert_is(found.bits, torch.tensor([[[0, 1], [1, 0.75], [0.5, 0.5]]]).double())


# Modes ----------------------------------------------------------------------------------------------------------------


def test_the_likeliest_mode_of_steps_is_that_of_the_coarse_layers() -> None:
    model = step_model(TINY, "calibrated", 2)
    probabilities = random_probabilities(1, 1, 2, 2, 3, seed=4)
    belief = step_belief(model, probabilities, "likeliest mode", 1, None)
    known = probabilities.clone()
    known[..., 0, :] = functional.one_hot(probabilities[..., 0, :].argmax(-1), 3)
    expected = step_belief(model, known, "expected", 1, None)
    assert_is(belief.actions, expected.actions)
    assert_is(belief.std, expected.std)
    # Of the least certain of its tokens.
    assert belief.mode_probability.item() == probabilities[..., 0, :].amax(-1).min().item()
    assert torch.equal(belief.mode, probabilities[..., :1, :].argmax(-1))


def step_sample(seed: int) -> tuple[ActionAutoencoder, Tensor, Belief[Tensor]]:
    model = step_model(TINY, "calibrated", 2)
    probabilities = random_probabilities(1, 1, 2, 2, 3, seed=5).expand(4000, -1, -1, -1, -1)
    return model, probabilities, step_belief(model, probabilities, "sample", 1, seeded(seed))


def test_samples_of_steps_come_as_often_as_they_are_likely_and_as_the_seed_has_them() -> None:
    model, probabilities, belief = step_sample(1)
    mean, deviation = all_steps(model, probabilities[0, 0])
    assert ((belief.actions.mean(0)[0] - mean).abs() < 5 * deviation / 4000**0.5).all()
    assert torch.equal(step_sample(1)[2].actions, belief.actions)
    assert not torch.equal(step_sample(2)[2].actions, belief.actions)
    # How far it may be off is said of what the drawn mode leaves open.
    known = probabilities.clone()
    known[..., :1, :] = functional.one_hot(belief.mode, 3)
    assert_is(belief.std, step_belief(model, known, "expected", 1, None).std)


def test_samples_of_chunks_come_as_often_as_they_are_likely_and_as_the_seed_has_them() -> None:
    model = chunk_model(TINY_CHUNKS, seed=1)
    classes = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).expand(4000, -1)
    known = BitProbabilities(classes, random_probabilities(3, 10, 2, seed=6)[..., 0].expand(4000, -1, -1))
    belief = chunk_belief(model, known, "sample", seeded(1))
    assert ((belief.mode.bincount() / 4000 - classes[0]).abs() < 0.04).all()
    for index in range(3):
        mean, deviation = all_bits(model, index, known.bits[0, index])
        of_class = belief.actions[belief.mode == index]
        assert ((of_class.mean(0) - mean).abs() < 5 * deviation / len(of_class) ** 0.5).all()
        assert_is(belief.std[belief.mode == index][0], in_class(model, index, known.bits[0, index]).std[0])
    assert torch.equal(chunk_belief(model, known, "sample", seeded(1)).actions, belief.actions)
    assert not torch.equal(chunk_belief(model, known, "sample", seeded(2)).actions, belief.actions)


# Training through them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [1.0, 1000.0], ids=["uncertain", "certain"])
@pytest.mark.parametrize("mode", ["expected", "likeliest mode"])
def test_gradients_reach_the_logits_and_are_finite(mode: BeliefMode, sharpness: float) -> None:
    steps = (sharpness * torch.randn(2, 3, 2, 2, 3, generator=seeded())).double().requires_grad_()
    belief = step_belief(step_model(TINY, "calibrated", 2), steps.softmax(-1), mode, 1, None)
    words = (sharpness * torch.randn(2, 3, 16, generator=seeded())).double().requires_grad_()
    chunks = chunk_belief(chunk_model(TINY_CHUNKS), bits_of_tokens(words.softmax(-1), TINY_CHUNKS), mode, None)
    for logits, found in ((steps, belief), (words, chunks)):
        (found.actions.sum() + found.std.sum()).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert sharpness > 1 or (logits.grad != 0).any()


def test_gradients_of_actions_are_those_of_the_function() -> None:
    # Of chunks in the middle of the range, where nothing is clipped.
    constants = random_constants(TINY_CHUNKS, 0)
    constants = replace(constants, mean=constants.mean * 0.1, scale=constants.scale * 0.05)
    model, chunks = step_model(TINY, "calibrated", 2), ChunkTokenizer(TINY_CHUNKS, constants).double()
    steps = torch.randn(1, 1, 2, 2, 3, generator=seeded()).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: step_belief(model, x.softmax(-1), "expected", 1, None).actions, steps)
    words = torch.randn(1, 2, 16, generator=seeded()).double().requires_grad_()

    def decoded(logits: Tensor) -> Tensor:
        return chunk_belief(chunks, bits_of_tokens(logits.softmax(-1), TINY_CHUNKS), "expected", None).actions

    assert torch.autograd.gradcheck(decoded, words)


def test_tokens_that_need_the_encoder_s_statistics_are_refused() -> None:
    model = make_model(TINY, Conditioning.DYNAMIC, dtype=torch.float64)
    with pytest.raises(NotDecodableError, match="no policy predicts"):
        step_belief(model, random_probabilities(1, 1, 2, 2, 3, seed=0), "expected", 1, None)
