"""What `rfsq_ref.autoencoder` promises: physical units in and out, and the right decoder for every kind of token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig, RecoveredDecoder
from rfsq.rfsq_ref.errors import NotDecodableError
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.rfsq_ref.models import CONDITIONINGS, configs, make_model, random_actions, some_normaliser
from tests.rfsq_ref.units import restore

SMALL = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=3, num_levels=5)


def recovered_for(prefix: int, seed: int = 0) -> RecoveredDecoder:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(4, 4 * prefix, generator=generator, dtype=torch.float64)
    return RecoveredDecoder(matrix, torch.randn(4, generator=generator, dtype=torch.float64))


@settings(max_examples=40)
@given(configs(), st.sampled_from(CONDITIONINGS), st.integers(1, 9), st.booleans())
def test_shapes_hold_for_every_size(
    config: ModelConfig, conditioning: Conditioning, chunk_length: int, normalised: bool
) -> None:
    normaliser = some_normaliser(config.action_dim) if normalised else None
    model = make_model(config, conditioning, normaliser=normaliser)
    actions = random_actions(3 * chunk_length, config.action_dim).unflatten(0, (3, chunk_length))
    tokens, stats = model.encode(actions)
    assert tokens.shape == (3, chunk_length, config.latent_dim, config.num_layers)
    assert tokens.dtype is torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < config.num_levels
    if conditioning is Conditioning.DYNAMIC:
        assert stats is not None
        assert stats.shape == (3, chunk_length, config.num_layers, 2)
    else:
        assert stats is None
    assert model.decode(tokens, stats).shape == actions.shape


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_decoding_the_tokens_gives_the_forward_pass(conditioning: Conditioning) -> None:
    model = make_model(conditioning=conditioning, dtype=torch.float64)
    actions = random_actions(50).double()
    torch.testing.assert_close(model.decode(*model.encode(actions)), model(actions))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_step_of_a_chunk_is_coded_on_its_own(conditioning: Conditioning) -> None:
    model = make_model(conditioning=conditioning, dtype=torch.float64)
    chunks = random_actions(24).double().unflatten(0, (3, 8))
    alone = torch.stack([model.encode(step[None])[0][0] for step in chunks.flatten(0, 1)])
    assert torch.equal(model.encode(chunks)[0].flatten(0, 1), alone)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_normaliser_is_part_of_the_model(conditioning: Conditioning) -> None:
    normaliser = some_normaliser(7)
    plain = make_model(conditioning=conditioning, dtype=torch.float64)
    model = make_model(conditioning=conditioning, normaliser=normaliser, dtype=torch.float64)
    normalised = random_actions(40).double()
    physical = torch.from_numpy(restore(normaliser, normalised.numpy()))
    torch.testing.assert_close(model.encode_latents(physical), plain.encode_latents(normalised))
    latents = plain.encode_latents(normalised)
    expected = torch.from_numpy(restore(normaliser, plain.decode_latents(latents).numpy()))
    torch.testing.assert_close(model.decode_latents(latents), expected)


def test_a_normaliser_for_another_action_space_is_refused() -> None:
    with pytest.raises(ValueError, match="normaliser for 6 dimensions, model for 7"):
        ActionAutoencoder(ModelConfig(), Conditioning.NONE, normaliser=some_normaliser(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prefix", [1, 3])
def test_dynamic_tokens_alone_are_decoded_by_the_recovered_decoder(prefix: int, dtype: torch.dtype) -> None:
    decoder = recovered_for(prefix)
    model = make_model(SMALL, Conditioning.DYNAMIC, dtype=dtype)
    model.recovered = {1: recovered_for(1), 3: recovered_for(3)}
    tokens = model.encode(random_actions(20, 3).to(dtype))[0][..., :prefix]
    flat = tokens.reshape(20, 4 * prefix).double()
    latents = flat @ decoder.matrix.T + decoder.offset
    torch.testing.assert_close(model.dequantize(tokens), latents.to(dtype))
    torch.testing.assert_close(model.decode(tokens), model.decode_latents(latents.to(dtype)))


def test_stats_come_before_the_recovered_decoder() -> None:
    model = make_model(SMALL, Conditioning.DYNAMIC, dtype=torch.float64)
    actions = random_actions(20, 3).double()
    tokens, stats = model.encode(actions)
    expected = model.decode(tokens, stats)
    model.recovered = {3: recovered_for(3)}
    assert torch.equal(model.decode(tokens, stats), expected)
    assert not torch.allclose(model.decode(tokens), expected)


def test_a_prefix_without_a_recovered_decoder_is_refused_and_the_message_names_the_command() -> None:
    model = make_model(SMALL, Conditioning.DYNAMIC)
    model.recovered = {1: recovered_for(1), 3: recovered_for(3)}
    tokens = model.encode(random_actions(5, 3))[0]
    with pytest.raises(
        NotDecodableError, match=r"fitted prefixes: \[1, 3\].*calibration/fit.py --method recovered --prefixes 2"
    ):
        model.decode(tokens[..., :2])


def test_a_dynamic_model_without_stats_or_recovered_decoder_is_not_decodable() -> None:
    model = make_model(SMALL, Conditioning.DYNAMIC)
    with pytest.raises(NotDecodableError, match=r"python calibration/fit\.py --checkpoint"):
        model.decode(model.encode(random_actions(5, 3))[0])


@pytest.mark.parametrize("conditioning", [Conditioning.NONE, Conditioning.CALIBRATED])
def test_other_models_decode_every_prefix_without_help(conditioning: Conditioning) -> None:
    model = make_model(SMALL, conditioning)
    tokens = model.encode(random_actions(5, 3))[0]
    for prefix in (1, 2, 3):
        expected = model.decode_latents(model.quantizer.dequantize(tokens[..., :prefix]))
        assert torch.equal(model.decode(tokens[..., :prefix]), expected)


def test_one_latent_has_no_deviation() -> None:
    with pytest.raises(ValueError, match="latent_dim >= 2"):
        ActionAutoencoder(ModelConfig(latent_dim=1), Conditioning.DYNAMIC)


@pytest.mark.parametrize("name", ["action_dim", "latent_dim", "hidden_width", "num_layers", "num_levels"])
@pytest.mark.parametrize(
    "size",
    [0, 3.0, "3", True, 2**24 + 1, 10**9, 10**5000],
    ids=["zero", "float", "text", "bool", "large", "larger", "huge"],
)
def test_sizes_that_make_no_sense_are_refused(name: str, size: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; expected an integer"):
        ModelConfig(**{name: size})  # type: ignore[arg-type]
