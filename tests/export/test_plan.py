"""A plan is the reference, folded: evaluated by its own docstring it gives the reference's tokens and actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.export.plan import DeployMode, EncoderPlan, action_limit, choose_prefixes, plan_decoder, plan_encoder
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.errors import NotDecodableError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.comparison import action_errors
from tests.bundles import Deployed, Recipe, deploy, random_actions
from tests.export.plan_numpy import MODES, check_tokens, decode, encode, recipes

FLOAT32 = np.finfo(np.float32)


def encoder_plan(deployed: Deployed) -> EncoderPlan:
    return plan_encoder(deployed.reference, deployed.recipe.mode, deployed.recipe.chunk_length)


# --- the same function ------------------------------------------------------------------------------------------------


@given(recipes())
@settings(max_examples=60)
def test_encoding_gives_the_references_tokens(recipe: Recipe) -> None:
    deployed = deploy(recipe)
    actions = random_actions(recipe, 100)
    found, stats = encode(encoder_plan(deployed), actions)

    compared = check_tokens(deployed, actions, found)
    assert (stats is not None) == (recipe.mode is DeployMode.DYNAMIC)
    if stats is not None:
        expected = deployed.reference.encode(torch.from_numpy(actions).double())[1].numpy()
        np.testing.assert_allclose(stats[~compared.flipped], expected[~compared.flipped], rtol=0, atol=2e-6)


@given(recipes(), st.data())
@settings(max_examples=60)
def test_decoding_gives_the_references_actions_for_any_tokens_and_prefix(recipe: Recipe, data: st.DataObject) -> None:
    deployed = deploy(recipe)
    model = deployed.reference
    prefix = data.draw(st.sampled_from(deployed.prefixes))
    random = np.random.default_rng(0)
    tokens = random.integers(recipe.config.num_levels, size=(200, recipe.config.latent_dim, prefix))
    stats = None
    if recipe.mode is DeployMode.DYNAMIC:
        stats = random.uniform((-0.5, 1e-5), (0.5, 0.5), (200, prefix, 2))

    plan = plan_decoder(model, recipe.mode, recipe.chunk_length, prefix)
    found = decode(plan, tokens, stats)
    expected = model.decode(torch.from_numpy(tokens), None if stats is None else torch.from_numpy(stats)).numpy()
    worst = action_errors(expected, found, model.units.numpy())
    assert worst.value <= 1e-5, worst


@given(recipes([DeployMode.CALIBRATED]), st.data())
@settings(max_examples=30)
def test_a_calibrated_prefix_adds_the_mean_of_the_first_missing_layer(recipe: Recipe, data: st.DataObject) -> None:
    model = deploy(recipe).reference
    sizes = recipe.config
    prefix = data.draw(st.integers(1, sizes.num_layers))
    tokens = np.random.default_rng(0).integers(sizes.num_levels, size=(50, sizes.latent_dim, prefix))
    mean, scale = model.quantizer.mean.numpy(), model.quantizer.scale.numpy()
    # z[d] = sum over l of (2 s / (K - 1)) i + (m - s).
    latents = (tokens * (2 * scale[:prefix] / (sizes.num_levels - 1)).T + (mean - scale)[:prefix].T).sum(-1)
    if prefix < sizes.num_layers:
        latents += mean[prefix]

    found = decode(plan_decoder(model, recipe.mode, 1, prefix), tokens, None)
    expected = model.decode_latents(torch.from_numpy(latents)).numpy()
    assert action_errors(expected, found, model.units.numpy()).value <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_all_constants_are_float32_and_contiguous(mode: DeployMode) -> None:
    deployed = deploy(Recipe(mode=mode))
    encoder = encoder_plan(deployed)
    decoder = plan_decoder(deployed.reference, mode, 2, 2)
    arrays = [
        *(array for layer in (encoder.first, encoder.second, decoder.first, decoder.second)
          for array in (layer.weight, layer.bias)),
        *(getattr(encoder.quantizer, name) for name in ("ratio", "shift") if hasattr(encoder.quantizer, name)),
    ]  # fmt: skip
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)


# --- the normaliser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_units_are_folded_into_the_first_and_the_last_layer_alone_and_the_offset_into_none(mode: DeployMode) -> None:
    plain = deploy(Recipe(mode=mode, has_normaliser=False)).reference
    normaliser = Normaliser(NormaliserKind.MEAN_STD, (3.0, -0.5, 0.0), (0.25, 40.0, 1.0))
    physical = ActionAutoencoder(
        plain.config,
        plain.conditioning,
        constants=ConditioningConstants(plain.quantizer.mean.float(), plain.quantizer.scale.float())
        if plain.conditioning is Conditioning.CALIBRATED
        else None,
        recovered=plain.recovered,
        normaliser=normaliser,
    ).double()
    physical.load_state_dict(plain.state_dict())
    bare, folded = plan_encoder(plain, mode, 2), plan_encoder(physical, mode, 2)
    offset, scale = np.array(normaliser.offset), np.array(normaliser.scale)

    weight = plain.encoder[0].weight.detach().numpy()
    np.testing.assert_array_equal(folded.first.weight, (weight / scale).astype(np.float32))
    np.testing.assert_array_equal(folded.first.bias, bare.first.bias)
    np.testing.assert_array_equal(folded.second.weight, bare.second.weight)
    assert not bare.offset.any()

    bare_decoder, folded_decoder = (plan_decoder(model, mode, 2, 3) for model in (plain, physical))
    last = plain.decoder[2]
    np.testing.assert_array_equal(folded_decoder.first.weight, bare_decoder.first.weight)
    np.testing.assert_array_equal(
        folded_decoder.second.weight, (last.weight.detach().numpy() * scale[:, None]).astype(np.float32)
    )
    np.testing.assert_array_equal(folded_decoder.second.bias, (last.bias.detach().numpy() * scale).astype(np.float32))
    for plan in (folded, folded_decoder):
        assert plan.offset.dtype == np.float32
        np.testing.assert_array_equal(plan.offset, offset)


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 4, 6, 8])
@pytest.mark.parametrize("mode", MODES)
def test_a_latent_on_an_edge_goes_to_the_lower_level(mode: DeployMode, num_levels: int) -> None:
    """With an even number of levels zero is an edge; zero weights make every latent exactly zero."""
    config = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=3, num_levels=num_levels)
    model = deploy(Recipe(mode=mode, config=config)).reference
    for parameter in model.encoder.parameters():
        parameter.zero_()
    model.quantizer.mean.zero_()
    model.quantizer.scale.copy_(torch.tensor([[1.0], [0.25], [1.0]], dtype=torch.float64).expand(3, 4))
    if mode is DeployMode.NONE:
        model.quantizer.scale.fill_(1)
    tokens, _ = encode(plan_encoder(model, mode, 1), np.ones((1, 1, 3)))

    assert (tokens[..., 0] == num_levels // 2 - 1).all()
    np.testing.assert_array_equal(tokens, model.encode(torch.ones(1, 1, 3, dtype=torch.float64))[0].numpy())


# --- the largest action -----------------------------------------------------------------------------------------------


def worst_actions(plan: EncoderPlan, size: float) -> np.ndarray:
    """Every sign pattern up to A = 8, which covers the one that each hidden unit likes least."""
    action_dim = plan.first.weight.shape[1]
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * action_dim)).reshape(action_dim, -1).T
    return (signs * size).astype(np.float32)


@given(recipes(), st.integers(-3, 12), st.integers(-3, 12), st.sampled_from([0.0, 1.0, 1e3, 1e30, 1e37]))
@settings(max_examples=60)
def test_no_action_at_the_limit_overflows_float32(recipe: Recipe, first: int, second: int, rest: float) -> None:
    model = deploy(recipe).reference
    model.offset.copy_((rest * model.offset.sign()).float())
    # Weights of any size, not only those of a freshly made model.
    model.encoder[0].weight.mul_(2.0**first)
    model.encoder[2].weight.mul_(2.0**second)
    plan = plan_encoder(model, recipe.mode, 1)
    try:
        limit = action_limit(plan)
    except ValueError:
        assert rest >= 1e30
        return

    actions = worst_actions(plan, limit)
    with np.errstate(over="raise", invalid="raise"):
        tokens, stats = encode(plan, actions, dtype=np.float32)
        actions = actions - plan.offset
        inner = actions[:, None] * plan.first.weight
        # In the worst order: all positive terms before all negative ones.
        assert np.isfinite(np.where(inner > 0, inner, 0).sum(-1) + np.abs(plan.first.bias)).all()
        # Mish neither grows a number nor gives one below -0.31.
        hidden = np.abs(actions @ plan.first.weight.T + plan.first.bias)
        outer = np.maximum(hidden, np.float32(0.31))[:, None] * np.abs(plan.second.weight)
        assert np.isfinite(outer.sum(-1) + np.abs(plan.second.bias)).all()
    assert tokens.min() >= 0
    assert tokens.max() < recipe.config.num_levels
    assert stats is None or np.isfinite(stats).all()


@given(recipes(), st.integers(-3, 12), st.integers(-3, 12))
@settings(max_examples=60)
def test_the_limit_is_within_a_power_of_ten_of_what_is_safe(recipe: Recipe, first: int, second: int) -> None:
    model = deploy(recipe).reference
    model.encoder[0].weight.mul_(2.0**first)
    model.encoder[2].weight.mul_(2.0**second)
    plan = plan_encoder(model, recipe.mode, 1)
    limit = action_limit(plan)

    reach = np.abs(plan.first.weight.astype(np.float64)).sum(1) * limit * 10
    sums = np.concatenate((reach, np.abs(plan.second.weight.astype(np.float64)) @ reach))
    assert limit == 1e38 or sums.max() > FLOAT32.max / 4
    assert limit >= 1e25


@pytest.mark.parametrize("layer", [0, 2])
def test_biases_that_leave_no_room_for_any_action_are_refused(layer: int) -> None:
    model = deploy(Recipe()).reference
    model.encoder[layer].bias.fill_(3e38)
    with pytest.raises(ValueError, match=r"biases overflow float32 whatever the action: sums reach \d\S*e\+38"):
        action_limit(plan_encoder(model, DeployMode.CALIBRATED, 2))


def test_numbers_that_are_too_large_for_float32_once_folded_are_refused() -> None:
    model, expected = deploy(Recipe(has_normaliser=False)).reference, "once the normaliser is folded in, too large for"
    model.units.fill_(1e-40)
    with pytest.raises(ValueError, match=expected):
        plan_encoder(model, DeployMode.CALIBRATED, 2)
    plan_decoder(model, DeployMode.CALIBRATED, 2, 2)
    model.units.fill_(1e40)
    with pytest.raises(ValueError, match=expected):
        plan_decoder(model, DeployMode.CALIBRATED, 2, 2)


def test_the_embedded_models_limit_is_far_beyond_any_robot(calibrated) -> None:
    plan = plan_encoder(calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64), DeployMode.CALIBRATED, 8)
    assert 1e30 <= action_limit(plan) <= 1e38


# --- prefixes and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "num_layers", "chosen"),
    [
        (None, 8, (3, 8)),
        (None, 3, (3,)),
        (None, 2, (2,)),
        (None, 1, (1,)),
        ((), 8, (8,)),
        ((5, 3, 5), 8, (3, 5, 8)),
        ((8,), 8, (8,)),
        ((1, 2, 3), 3, (1, 2, 3)),
    ],
)
def test_prefixes_are_sorted_and_end_with_the_full_depth(requested, num_layers, chosen) -> None:
    assert choose_prefixes(requested, num_layers) == chosen


@pytest.mark.parametrize("wrong", [0, -1, 9])
def test_a_prefix_that_the_model_does_not_have_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"prefixes \[{wrong}\] are not between 1 and the model's 8 layers"):
        choose_prefixes((3, wrong), 8)


@pytest.mark.parametrize("mode", MODES)
def test_a_float32_model_is_refused(mode: DeployMode) -> None:
    model = deploy(Recipe(mode=mode)).reference.float()
    with pytest.raises(ValueError, match=r"float64 reference; got torch\.float32"):
        plan_encoder(model, mode, 2)
    with pytest.raises(ValueError, match=r"float64 reference; got torch\.float32"):
        plan_decoder(model, mode, 2, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", MODES)
def test_a_mode_of_another_conditioning_is_refused(mode: DeployMode, wrong: DeployMode) -> None:
    model = deploy(Recipe(mode=mode)).reference
    if mode.conditioning is wrong.conditioning:
        plan_encoder(model, wrong, 2)
        return
    expected = f"mode '{wrong.value}' needs conditioning .* the model has '{mode.conditioning.value}'"
    with pytest.raises(ValueError, match=expected):
        plan_encoder(model, wrong, 2)
    with pytest.raises(ValueError, match=expected):
        plan_decoder(model, wrong, 2, 2)


def test_recovered_needs_a_decoder_for_the_prefix() -> None:
    model = deploy(replace(Recipe(mode=DeployMode.RECOVERED), prefixes=(2,))).reference
    with pytest.raises(NotDecodableError, match="no recovered decoder for a prefix of 1 layers"):
        plan_decoder(model, DeployMode.RECOVERED, 2, 1)
