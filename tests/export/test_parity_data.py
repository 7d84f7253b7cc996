"""What engines are judged on holds the hard cases, not only many."""

from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.export.golden_inputs import Span
from rfsq.export.plan import DeployMode
from rfsq.export.reference import (
    EDGES,
    Section,
    edge_steps,
    near_tie_steps,
    neighbours_at_rounding_distance,
    parity_sections,
)
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.rounding import token_error_bounds
from tests.bundles import Recipe, random_model
from tests.export.plan_numpy import MODES

LIMIT = 1e20
SIZES = ModelConfig(action_dim=3, latent_dim=6, hidden_width=16, num_layers=4, num_levels=5)


def model_of(mode: DeployMode = DeployMode.CALIBRATED, *, action_dim: int = 3, **options: bool) -> ActionAutoencoder:
    sizes = ModelConfig(action_dim, SIZES.latent_dim, SIZES.hidden_width, SIZES.num_layers, SIZES.num_levels)
    return random_model(Recipe(mode=mode, config=sizes, **options))


def episodes_of(model: ActionAutoencoder, count: int) -> np.ndarray:
    units, offset = model.units.numpy(), model.offset.numpy()
    normalised = np.random.default_rng(5).uniform(-1, 1, (count, len(units)))
    return (normalised * units + offset).astype(np.float32)


def edges(model: ActionAutoencoder, *, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return edge_steps(model, Span(low, high, LIMIT), np.random.default_rng(0))


# --- sections ---------------------------------------------------------------------------------------------------------


@given(
    num_steps=st.integers(1, 3000),
    num_episode_steps=st.integers(0, 2000),
    chunk_length=st.integers(1, 60),
    action_dim=st.integers(1, 10),
)
def test_sections_hold_at_least_as_many_steps_as_asked_for(
    num_steps: int, num_episode_steps: int, chunk_length: int, action_dim: int
) -> None:
    model = model_of(action_dim=action_dim)
    episodes = episodes_of(model, num_episode_steps)
    # The edges come on top. To search for them takes long, and has nothing to do with how many others there are.
    some = np.ones((7, action_dim), np.float32)
    with (
        mock.patch("rfsq.export.reference.edge_steps", return_value=some),
        mock.patch("rfsq.export.reference.sensitive_steps", return_value=some),
    ):
        sections = parity_sections(model, episodes, chunk_length=chunk_length, limit=LIMIT, num_steps=num_steps)
    assert sum(section.num_steps for section in sections if section.name != EDGES) >= num_steps
    check_form(sections, chunk_length, action_dim)


def check_form(sections: Sequence[Section], chunk_length: int, action_dim: int) -> None:
    for section in sections:
        assert section.actions.dtype == np.float32
        assert section.actions.flags.c_contiguous
        assert section.actions.shape[1:] == (chunk_length, action_dim)
        assert section.num_steps == section.actions.shape[0] * chunk_length
        assert (np.abs(section.actions) <= np.float32(LIMIT)).all()


@pytest.mark.parametrize(("chunk_length", "action_dim"), [(1, 10), (60, 1), (7, 3)])
def test_edges_have_the_form_of_all_other_sections(chunk_length: int, action_dim: int) -> None:
    model = model_of(action_dim=action_dim)
    sections = parity_sections(model, episodes_of(model, 9), chunk_length=chunk_length, limit=LIMIT, num_steps=5)
    assert [section.num_steps > 500 for section in sections if section.name == EDGES] == [True]
    check_form(sections, chunk_length, action_dim)


def test_held_out_episodes_are_all_there_and_others_lie_around_them() -> None:
    model = model_of()
    # In a corner of the range, so that `around` differs from `uniform`.
    episodes = episodes_of(model, 1000) * np.float32(0.1) + np.float32(0.3)
    held_out, around, uniform, _ = parity_sections(model, episodes, chunk_length=8, limit=LIMIT, num_steps=9000)

    np.testing.assert_array_equal(held_out.actions.reshape(-1, 3)[:1000], episodes)
    assert around.num_steps == uniform.num_steps == 4000
    units = model.units.numpy()
    centre = episodes.mean(0)
    near, far = (np.abs((part.actions - centre) / units).mean() for part in (around, uniform))
    assert near < far / 2
    assert not (set(map(bytes, around.actions.reshape(-1, 3))) & set(map(bytes, episodes)))


def test_random_actions_span_the_normalised_range_and_all_that_the_episodes_hold() -> None:
    model = model_of()
    low, high = (model.offset.numpy() + sign * model.units.numpy() for sign in (-1, 1))
    episodes = episodes_of(model, 50)
    episodes[7, 0] = high[0] + 5
    episodes[8, 1] = low[1] - 5
    uniform = parity_sections(model, episodes, chunk_length=8, limit=LIMIT, num_steps=5000)[2].actions.reshape(-1, 3)

    np.testing.assert_allclose(uniform.min(0), (low[0], low[1] - 5, low[2]), atol=0.05)
    np.testing.assert_allclose(uniform.max(0), (high[0] + 5, *high[1:]), atol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_without_episodes_random_actions_take_their_place(mode: DeployMode) -> None:
    none = np.empty((0, 3), np.float32)
    sections = {
        section.name: section
        for section in parity_sections(model_of(mode), none, chunk_length=8, limit=LIMIT, num_steps=500)
    }
    assert sections["episodes"].num_steps == sections["around them"].num_steps == 0
    assert sections["uniform random"].num_steps >= 500
    assert sections[EDGES].num_steps > 500


def test_the_same_seed_gives_the_same_steps_and_another_gives_others() -> None:
    model = model_of()
    first, again, other = (
        parity_sections(model, episodes_of(model, 99), chunk_length=8, limit=LIMIT, num_steps=999, seed=seed)
        for seed in (0, 0, 1)
    )
    for index, section in enumerate(first):
        np.testing.assert_array_equal(section.actions, again[index].actions)
    assert not np.array_equal(first[2].actions, other[2].actions)


# --- edges ------------------------------------------------------------------------------------------------------------


def contains(steps: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether all of the wanted steps are there, bit by bit (0.0 is not -0.0)."""
    present = set(map(bytes, steps.view(np.uint32)))
    return set(map(bytes, np.ascontiguousarray(wanted, np.float32).view(np.uint32))) <= present


def test_edges_hold_both_zeros_and_every_corner() -> None:
    model = model_of(has_normaliser=False)
    low, high = np.array([-2.0, -1.0, -4.0]), np.array([2.0, 1.0, 8.0])
    steps = edges(model, low=low, high=high)
    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T

    assert contains(steps, np.zeros((1, 3)))
    assert contains(steps, -np.zeros((1, 3)))
    assert contains(steps, corners)
    assert contains(steps, np.where(corners > 0, high, low))


def test_a_space_with_too_many_corners_is_sampled() -> None:
    model = model_of(action_dim=12, has_normaliser=False)
    steps = edges(model, low=-np.ones(12), high=np.ones(12))
    corners = {bytes(step) for step in steps if (np.abs(step) == 1).all()}
    assert len(corners) > 200
    assert np.isfinite(steps).all()


def test_edges_hold_subnormal_and_huge_values_up_to_the_limit() -> None:
    model = model_of(has_normaliser=False)
    steps = edges(model, low=-np.ones(3), high=np.ones(3))
    sizes = np.abs(steps)
    subnormal = (sizes > 0) & (sizes < np.finfo(np.float32).tiny)

    assert subnormal.all(-1).any()
    assert (sizes == np.finfo(np.float32).smallest_subnormal).all(-1).any()
    assert (sizes == np.finfo(np.float32).tiny).all(-1).any()
    for size in (1e3, 1e6, 1e12, LIMIT):
        assert (sizes == np.float32(size)).all(-1).any()
    assert sizes.max() == np.float32(LIMIT)
    # One dimension at the limit, the others at rest: with either sign.
    for lone in (*np.eye(3) * np.float32(LIMIT), *-np.eye(3) * np.float32(LIMIT)):
        assert (steps == lone).all(-1).any()


@pytest.mark.parametrize("mode", MODES)
def test_near_tie_steps_lie_on_edges_of_every_layer(mode: DeployMode) -> None:
    model = model_of(mode)
    low, high = (model.offset.numpy() + sign * model.units.numpy() for sign in (-1, 1))
    steps = near_tie_steps(model, Span(low, high, LIMIT), np.random.default_rng(0))
    uniform = np.random.default_rng(1).uniform(low, high, steps.shape).astype(np.float32)

    def margins(actions: np.ndarray) -> np.ndarray:
        """Of each step and layer the smallest over its latents, [N, L]."""
        latents = model.encode_latents(torch.from_numpy(actions).double())
        layers = [model.quantizer.decision_margins(step.conditioned) for step in model.quantizer.layers(latents)]
        return torch.stack(layers, -1).amin(-2).numpy()

    near, random = margins(steps), margins(uniform)
    assert len(steps) >= 500
    # Every pair ends as neighbours in float32: some layer's margin is what float32 can tell of an action at best.
    assert np.median(near.min(-1)) < np.median(random.min(-1)) / 1e3
    hit = near < 1e-3 * np.median(random, axis=0)
    assert (hit.sum(0) >= 20).all(), hit.sum(0)
    assert np.isfinite(steps).all()


def share_across_an_edge(model: ActionAutoencoder) -> float:
    """How many of the pairs that bisection ends with have different tokens; all of them are neighbours."""
    low, high = (model.offset.numpy() + sign * model.units.numpy() for sign in (-1, 1))
    first, second = np.split(near_tie_steps(model, Span(low, high, LIMIT), np.random.default_rng(0)), 2)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6 * float(model.units.max()))
    of_first, of_second = (model.encode(torch.from_numpy(part).double())[0] for part in (first, second))
    return float((of_first != of_second).flatten(1).any(1).float().mean())


@pytest.mark.parametrize("mode", MODES)
def test_near_tie_steps_come_in_pairs_from_both_sides_of_an_edge(mode: DeployMode) -> None:
    # Latents of a model that was never trained hardly spread: some pairs have the same tokens from the start.
    assert share_across_an_edge(model_of(mode)) > 0.5


def test_near_tie_steps_of_the_embedded_model_all_come_in_such_pairs(calibrated: Checkpoint) -> None:
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)
    assert share_across_an_edge(model) > 0.99


@pytest.mark.parametrize("ratio", [0.0, 20.0, 1000.0])
@pytest.mark.parametrize("mode", [DeployMode.NONE, DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def test_some_steps_lie_as_far_from_an_edge_as_float32_rounds_however_far_joints_rest_from_zero(
    mode: DeployMode, ratio: float, calibrated: Checkpoint, naive: Checkpoint
) -> None:
    checkpoint = naive if mode is DeployMode.NONE else calibrated
    model = checkpoint.model(mode.conditioning, dtype=torch.float64).requires_grad_(False)
    model.units.copy_(torch.linspace(0.3, 2.0, 7))
    model.offset.copy_((model.units * ratio).float())
    low, high = (model.offset.numpy() + sign * model.units.numpy() for sign in (-1, 1))
    random = np.random.default_rng(0)
    pairs = near_tie_steps(model, Span(low, high, LIMIT), random)[::2]
    steps = neighbours_at_rounding_distance(model, pairs, random)

    assert steps.dtype == np.float32
    assert (np.abs(steps - pairs) <= 4 * np.spacing(np.abs(pairs))).all()
    _, margins, bounds = token_error_bounds(model, torch.from_numpy(steps).double())
    shares = (margins / bounds).flatten(1).amin(1)
    # Near enough to flip, and enough of them that their number is not one of chance; not on the edge itself, where any
    # implementation flips half of them, a bad one no more than a good one.
    assert (shares < 1 / 8).double().mean() > 0.6
    assert 1 / 200 < shares.median() < 1 / 16
