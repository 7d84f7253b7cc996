"""Code written for the published model runs on the adapter as it stands, and gets the reference's answers."""

from __future__ import annotations

import ast
import copy
import io
import logging
import math
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812  the name everybody uses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime import ActionTokenizer, BundleError, FingerprintError, InvalidInputError, UnbuiltPrefixError
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.checkpoint_layouts import HASHES_KEY, weight_hashes
from rfsq.runtime.bundle.comparison import action_errors, compare_tokens
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.policy import adapter_calls as calls_module
from rfsq.runtime.policy.adapter import ActionRFSQAE
from rfsq.runtime.policy.adapter_calls import FINGERPRINT_KEY, narrowed
from tests.bundles import Deployed, Recipe, deploy, random_actions, reference_decode, write_bundle
from tests.rfsq_ref.published_model import ActionRFSQAE as PublishedActionRFSQAE
from tests.rfsq_ref.published_model import layouts
from tests.runtime.policy.published import act, act_through_rfsq, train_policy
from tests.strategies import recipes

ROOT = Path(__file__).parents[3]
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
#: Without a normaliser, as published checkpoints are.
PUBLISHED = Recipe(has_normaliser=False)
DECODABLE = (DeployMode.NONE, DeployMode.CALIBRATED, DeployMode.RECOVERED)


# --- the two tokenizers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The same weights twice: as the published module, and as a bundle behind the adapter."""

    deployed: Deployed
    path: Path
    published: PublishedActionRFSQAE
    adapter: ActionRFSQAE


def published_twin(deployed: Deployed) -> PublishedActionRFSQAE:
    """The published module with the weights of the reference."""
    config = deployed.recipe.config
    model = PublishedActionRFSQAE(
        config.action_dim,
        config.latent_dim,
        config.num_layers,
        config.num_levels,
        use_layernorm=deployed.recipe.mode is not DeployMode.NONE,
        width=config.hidden_width,
    )
    for name, size in model.config.items():
        setattr(model, name, size)
    weights = {name: tensor.float() for name, tensor in deployed.reference.state_dict().items()}
    model.load_state_dict(weights | model.rfsq.state_dict(prefix="rfsq."))
    return model.eval()


def with_hashes(source: Path, output: Path, tensors: dict[str, Tensor], **facts: str) -> Path:
    """The bundle at `source`, saying which tensors it was built from."""
    bundle = open_bundle(source)
    hashes = weight_hashes({name: tensor.float().numpy() for name, tensor in tensors.items()})
    with stage_bundle(output) as staged:
        for file in bundle.manifest.files:
            staged.write(file, bundle.content(file))
        checkpoint = {"file": "policy.pt", HASHES_KEY: hashes, **facts}
        staged.seal(replace(bundle.manifest, provenance={"checkpoint": checkpoint}))
    return output


@pytest.fixture(scope="session")
def pair_of(bundle_of: Callable[[Recipe], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Pair]:
    made: dict[Recipe, Pair] = {}

    def get(recipe: Recipe) -> Pair:
        if recipe not in made:
            deployed = deploy(recipe)
            output = tmp_path_factory.mktemp("adapter") / "bundle"
            path = with_hashes(bundle_of(recipe), output, deployed.reference.state_dict())
            made[recipe] = Pair(deployed, path, published_twin(deployed), ActionRFSQAE.from_bundle(path))
        return made[recipe]

    return get


@pytest.fixture(scope="session", params=list(DeployMode))
def pair(request: pytest.FixtureRequest, pair_of: Callable[[Recipe], Pair]) -> Pair:
    """Of every mode."""
    return pair_of(replace(PUBLISHED, mode=request.param))


@pytest.fixture(scope="session", params=DECODABLE)
def decodable(request: pytest.FixtureRequest, pair_of: Callable[[Recipe], Pair]) -> Pair:
    """Of every mode whose tokens decode alone."""
    return pair_of(replace(PUBLISHED, mode=request.param))


@pytest.fixture(scope="session")
def calibrated(pair_of: Callable[[Recipe], Pair]) -> Pair:
    return pair_of(PUBLISHED)


@pytest.fixture(scope="session")
def dynamic(pair_of: Callable[[Recipe], Pair]) -> Pair:
    return pair_of(replace(PUBLISHED, mode=DeployMode.DYNAMIC))


def chunks_of(recipe: Recipe, batch: int = 6, *, seed: int = 5) -> Tensor:
    return torch.from_numpy(random_actions(recipe, batch, seed=seed))


# --- published code runs unchanged ------------------------------------------------------------------------------------


def observations_of(chunks: Tensor) -> Tensor:
    """Something that a policy can learn them from."""
    return chunks.flatten(1)


def test_training_drafting_and_acting_run_on_either(decodable: Pair) -> None:
    chunks = chunks_of(decodable.deployed.recipe, 8)
    observations = observations_of(chunks)
    for model in (decodable.published, decodable.adapter):
        main, draft, losses = train_policy(model, observations, chunks)
        assert losses[-1] < losses[0]
        assert draft(observations).shape[-2:] == (3, model.num_levels)
        for how in (act, act_through_rfsq):
            actions = how(model, main, observations[:1])
            assert (actions.dtype, actions.shape) == (torch.float32, chunks[:1].shape)


@pytest.mark.parametrize("mode", [DeployMode.NONE, DeployMode.DYNAMIC, DeployMode.RECOVERED])
def test_a_policy_trained_on_the_published_tokens_is_the_same_policy(
    mode: DeployMode, pair_of: Callable[[Recipe], Pair]
) -> None:
    """Same labels, same seed: the same losses to the last bit, and the same predictions."""
    pair = pair_of(replace(PUBLISHED, mode=mode))
    chunks = chunks_of(pair.deployed.recipe, 8)
    observations = observations_of(chunks)
    theirs, _, their_losses = train_policy(pair.published, observations, chunks)
    ours, _, our_losses = train_policy(pair.adapter, observations, chunks)
    assert our_losses == their_losses
    assert torch.equal(theirs(observations).argmax(-1), ours(observations).argmax(-1))


def test_a_policy_that_learnt_its_labels_acts_as_the_tokens_do(decodable: Pair) -> None:
    chunks = chunks_of(decodable.deployed.recipe, 2)
    observations = observations_of(chunks)
    main, _, _ = train_policy(decodable.adapter, observations, chunks, steps=300)
    recon, codes = decodable.adapter(chunks)
    assert torch.equal(main(observations).argmax(-1), codes)
    assert torch.equal(act(decodable.adapter, main, observations), recon)
    assert torch.equal(act_through_rfsq(decodable.adapter, main, observations), recon)


def test_where_the_published_decoding_is_right_ours_is_the_same(pair_of: Callable[[Recipe], Pair]) -> None:
    """That of the naive model."""
    pair = pair_of(replace(PUBLISHED, mode=DeployMode.NONE))
    codes = torch.randint(0, 5, (50, 2, 4, 3), generator=torch.Generator().manual_seed(0))
    expected = pair.published.decode_from_indices(codes)
    torch.testing.assert_close(pair.adapter.decode_from_indices(codes), expected, rtol=0, atol=GATES.action_error)


# --- forward, encode and decode equal the reference -------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes(), batch=st.integers(0, 4), steps=st.integers(0, 20), integer=st.sampled_from(INTEGERS))
def test_any_model_at_any_length_gives_the_references_answers(
    recipe: Recipe, batch: int, steps: int, integer: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    deployed = deploy(recipe)
    reference, config = deployed.reference, recipe.config
    adapter = ActionRFSQAE.from_bundle(write_bundle(tmp_path_factory.mktemp("any") / "bundle", deployed))
    x = torch.from_numpy(random_actions(replace(recipe, chunk_length=steps), batch))
    recon, codes = adapter(x)
    assert (recon.dtype, recon.shape) == (torch.float32, x.shape)
    assert (codes.dtype, codes.shape) == (torch.int64, (batch, steps, config.latent_dim, config.num_layers))
    assert torch.equal(adapter.encode(x), codes)
    if not x.numel():
        return
    expected, margins, bounds = (part.numpy() for part in token_error_bounds(reference, x.double()))
    compared = compare_tokens(
        expected,
        codes.numpy(),
        margins,
        bounds,
        num_levels=config.num_levels,
        is_step_coupled=recipe.mode.conditioning.value == "dynamic",
    )
    assert compared.num_wrong == GATES.wrong_tokens, compared.first_wrong
    stats = reference.encode(x.double())[1] if recipe.mode.has_stats else None
    units = reference.units.numpy()
    steady = ~compared.flipped
    error = action_errors(reference_decode(reference, codes, stats)[steady], recon.numpy()[steady], units)
    assert error.value <= GATES.action_error
    if not recipe.mode.has_stats:
        assert torch.equal(adapter.decode_from_indices(codes.to(integer)), recon)
        for prefix in deployed.prefixes:
            decoded = adapter.decode_from_indices(codes[..., :prefix]).numpy()
            error = action_errors(reference_decode(reference, codes[..., :prefix]), decoded, units)
            assert error.value <= GATES.action_error


def test_forward_of_a_dynamic_bundle_is_forward_of_the_published_model(dynamic: Pair) -> None:
    """Its means and deviations stay inside."""
    x = chunks_of(dynamic.deployed.recipe, 200)
    with torch.no_grad():
        recon, codes = dynamic.published(x)
    ours, our_codes = dynamic.adapter(x)
    same = (codes == our_codes).flatten(2).all(-1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(ours[same], recon[same], rtol=0, atol=GATES.action_error)


def test_decoding_the_codes_gives_forwards_reconstruction_bit_for_bit(decodable: Pair) -> None:
    for steps in (2, 1, 7):
        x = chunks_of(replace(decodable.deployed.recipe, chunk_length=steps), 300)
        recon, codes = decodable.adapter(x)
        assert torch.equal(decodable.adapter.decode_from_indices(codes), recon)


def test_the_published_decoding_is_wrong_by_orders_of_magnitude_and_the_recovered_one_is_not(
    pair_of: Callable[[Recipe], Pair],
) -> None:
    """Of the very same tokens."""
    recipe = replace(PUBLISHED, mode=DeployMode.RECOVERED, config=ModelConfig(3, 8, 16, 4, 7), prefixes=(3,))
    pair = pair_of(recipe)
    x = chunks_of(recipe, 300)
    with torch.no_grad():
        recon, codes = pair.published(x)
    ours, theirs = (F.mse_loss(m.decode_from_indices(codes), recon).item() for m in (pair.adapter, pair.published))
    assert ours < theirs / 20


def test_tokens_of_a_dynamic_bundle_are_refused_and_never_decoded_wrongly(dynamic: Pair) -> None:
    codes = dynamic.adapter.encode(chunks_of(dynamic.deployed.recipe))
    for decode in (dynamic.adapter.decode_from_indices, dynamic.adapter.rfsq.decode_from_indices):
        for part in (codes, codes[..., :2]):
            with pytest.raises(InvalidInputError, match=r"--conditioning recovered.*--conditioning calibrated"):
                decode(part)


# --- coarse prefixes --------------------------------------------------------------------------------------------------


def test_a_slice_of_the_codes_decodes_as_the_coarse_prefix(decodable: Pair) -> None:
    x = chunks_of(decodable.deployed.recipe)
    codes = decodable.adapter.encode(x)
    coarse = codes[:, :, :, :2]
    assert not coarse.is_contiguous()
    with ActionTokenizer.load(decodable.path) as tokenizer:
        expected = tokenizer.decode(np.ascontiguousarray(coarse.numpy()))
    assert np.array_equal(decodable.adapter.decode_from_indices(coarse).numpy(), expected)
    assert torch.equal(decodable.adapter.decode_from_indices(coarse.contiguous()), torch.from_numpy(expected))
    assert torch.equal(
        decodable.adapter.decoder(decodable.adapter.rfsq.decode_from_indices(coarse)), torch.from_numpy(expected)
    )


def test_a_prefix_that_was_not_built_is_refused_by_name(calibrated: Pair) -> None:
    codes = calibrated.adapter.encode(chunks_of(PUBLISHED))
    with pytest.raises(UnbuiltPrefixError, match="this bundle decodes 2 or 3"):
        calibrated.adapter.decode_from_indices(codes[..., :1])


# --- shapes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(leading=st.lists(st.integers(0, 5), max_size=4), seed=st.integers(0, 9))
def test_leading_axes_may_be_any_as_in_the_published_model(leading: list[int], seed: int, calibrated: Pair) -> None:
    """A step is coded on its own: wherever it stands, it has the same tokens."""
    adapter, num_steps = calibrated.adapter, math.prod(leading)
    steps = chunks_of(PUBLISHED, 400, seed=seed).flatten(0, 1)[:num_steps]
    flat = adapter.encode(steps)
    x = steps.reshape(*leading, 3)
    with torch.no_grad():
        theirs = calibrated.published.encode(x)
    recon, codes = adapter(x)
    assert codes.shape == theirs.shape
    assert torch.equal(codes, flat.reshape(codes.shape))
    assert recon.shape == x.shape
    assert torch.equal(adapter.decode_from_indices(codes), recon)


def test_tensors_may_lie_as_policy_code_leaves_them(decodable: Pair) -> None:
    """One action held for a chunk, by `expand`; logits of layer heads, [B, L, T * D, K], permuted to codes."""
    held = chunks_of(decodable.deployed.recipe)[:1, :1].expand(4, 2, 3)
    assert 0 in held.stride()
    recon, codes = decodable.adapter(held)
    assert torch.equal(codes, decodable.adapter.encode(held.contiguous()))
    by_layer = codes.flatten(1, 2).permute(0, 2, 1).contiguous()
    permuted = F.one_hot(by_layer).argmax(-1).permute(0, 2, 1).view(4, 2, 4, 3)
    assert not permuted.is_contiguous()
    assert torch.equal(decodable.adapter.decode_from_indices(permuted), recon)


def test_what_fills_the_last_chunk_up_is_never_seen(calibrated: Pair) -> None:
    x = chunks_of(replace(PUBLISHED, chunk_length=7), 3)
    recon, codes = calibrated.adapter(x)
    one_by_one = torch.stack([calibrated.adapter.encode(x[:, step : step + 1])[:, 0] for step in range(7)], dim=1)
    assert torch.equal(codes, one_by_one)
    assert recon.is_contiguous()
    assert codes.is_contiguous()


@pytest.mark.parametrize("shape", [(5, 2, 4), (0, 2, 4), (4,), ()])
def test_another_number_of_dimensions_is_refused(shape: tuple[int, ...], calibrated: Pair) -> None:
    with pytest.raises(InvalidInputError, match=r"expected actions \[B, T, 3\]"):
        calibrated.adapter(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(5, 2, 3, 3), (3,), ()])
def test_codes_of_another_model_are_refused(shape: tuple[int, ...], calibrated: Pair) -> None:
    with pytest.raises(InvalidInputError, match=r"expected codes \[B, T, 4, l\]"):
        calibrated.adapter.decode_from_indices(torch.zeros(shape, dtype=torch.int64))


# --- types and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integer", INTEGERS)
def test_indices_may_be_of_any_integer_type(integer: torch.dtype, calibrated: Pair) -> None:
    for steps in (2, 5):
        recon, codes = calibrated.adapter(chunks_of(replace(PUBLISHED, chunk_length=steps)))
        assert torch.equal(calibrated.adapter.decode_from_indices(codes.to(integer)), recon)


@pytest.mark.parametrize("wrong", [torch.float32, torch.float64, torch.bool, torch.bfloat16, torch.complex64])
def test_indices_that_are_no_integers_are_refused(wrong: torch.dtype, calibrated: Pair) -> None:
    with pytest.raises(InvalidInputError, match=f"indices have type {wrong}; expected integers.*argmax"):
        calibrated.adapter.decode_from_indices(torch.zeros((1, 2, 4, 3), dtype=wrong))


@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("steps", [2, 5])
def test_an_illegal_level_is_an_error_that_names_its_place(steps: int, integer: torch.dtype, calibrated: Pair) -> None:
    limits = torch.iinfo(integer)
    for level in {5, limits.min, limits.max} - {0}:
        codes = torch.zeros((3, steps, 4, 3), dtype=torch.int64)
        if integer is torch.uint64:
            codes = torch.from_numpy(codes.numpy().astype(np.uint64))
        codes = codes.to(integer)
        codes.numpy()[2, 1, 3, 0] = level
        with pytest.raises(InvalidInputError, match=r"tokens\[2, 1, 3, 0\] is .*expected 0 \.\.\. 4"):
            calibrated.adapter.decode_from_indices(codes)


@settings(max_examples=200)
@given(level=st.integers(-(2**63), 2**63 - 1), num_levels=st.integers(2, 255))
def test_narrowing_for_the_gpu_makes_no_level_of_what_is_none(level: int, num_levels: int) -> None:
    (found,) = narrowed(torch.tensor([level]), num_levels).tolist()
    assert found == level if 0 <= level < num_levels else not 0 <= found < num_levels


@pytest.mark.parametrize("integer", INTEGERS)
def test_narrowing_keeps_every_type_honest(integer: torch.dtype) -> None:
    limits = torch.iinfo(integer)
    values = torch.from_numpy(np.array([0, 4, 5, limits.min, limits.max], str(integer).removeprefix("torch.")))
    found = narrowed(values, 5)
    assert found.dtype is torch.int32
    for value, narrow in zip(values.numpy().tolist(), found.tolist(), strict=True):
        assert narrow == value if 0 <= value < 5 else not 0 <= narrow < 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize(
    ("shape", "index", "named"),
    [((3, 2, 3), (2, 1, 0), "2, 1, 0"), ((3, 5, 3), (2, 4, 1), "2, 4, 1"), ((5, 3), (3, 2), "3, 2"),
     ((2, 2, 5, 3), (1, 0, 4, 1), "1, 0, 4, 1")],
)  # fmt: skip
def test_an_action_that_is_no_number_is_an_error_that_names_its_place(
    shape: tuple[int, ...], index: tuple[int, ...], named: str, value: float, calibrated: Pair
) -> None:
    x = torch.zeros(shape)
    x[index] = value
    for call in (calibrated.adapter, calibrated.adapter.encode):
        with pytest.raises(InvalidInputError, match=rf"actions\[{named}\] is"):
            call(x)


@pytest.mark.parametrize("wrong", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_actions_of_another_type_are_refused_as_the_published_model_does(wrong: torch.dtype, calibrated: Pair) -> None:
    x = torch.zeros((1, 2, 3), dtype=wrong)
    with pytest.raises(RuntimeError):
        calibrated.published(x)
    for call in (calibrated.adapter, calibrated.adapter.encode):
        with pytest.raises(InvalidInputError, match=f"x has type {wrong}; expected torch.float32.*x.float()"):
            call(x)


def test_autocast_changes_nothing(calibrated: Pair) -> None:
    x = chunks_of(PUBLISHED)
    expected = calibrated.adapter(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrated.adapter(x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((1, 2, 3), np.float32), "runtime.ActionTokenizer"),
        (torch.zeros((1, 2, 3)).to_sparse(), "torch.sparse_coo"),
        (torch.zeros((1, 2, 3), device="meta"), "on the meta device"),
        ([[[0.0]]], "builtins.list"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(wrong: Any, words: str, calibrated: Pair) -> None:
    for call in (calibrated.adapter, calibrated.adapter.encode, calibrated.adapter.decode_from_indices):
        with pytest.raises(InvalidInputError, match=words):
            call(wrong)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_results_carry_no_graph(decodable: Pair) -> None:
    x = chunks_of(decodable.deployed.recipe)
    recon, codes = decodable.adapter(x)
    assert not recon.requires_grad
    assert not codes.requires_grad
    assert not decodable.adapter.decode_from_indices(codes).requires_grad


def test_encode_takes_actions_that_require_a_gradient_as_labels_have_none(calibrated: Pair) -> None:
    x = chunks_of(PUBLISHED)
    assert torch.equal(calibrated.adapter.encode(x.clone().requires_grad_()), calibrated.adapter.encode(x))


def test_forward_refuses_a_gradient_that_it_would_lose(calibrated: Pair) -> None:
    x = chunks_of(PUBLISHED)
    expected = calibrated.adapter(x)
    with pytest.raises(InvalidInputError, match=r"x requires a gradient.*x\.detach\(\).*torch\.no_grad\(\)"):
        calibrated.adapter(x.clone().requires_grad_())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert all(map(torch.equal, calibrated.adapter(x.clone().requires_grad_()), expected))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_tensors_of_the_cpu_go_to_the_tokenizer_as_they_lie(calibrated: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Spy(ActionTokenizer):
        def encode_into(self, actions: Any, *arguments: Any, **options: Any) -> None:
            taken.append(actions.ctypes.data)
            super().encode_into(actions, *arguments, **options)

        def decode_into(self, tokens: Any, *arguments: Any, **options: Any) -> None:
            taken.append(tokens.ctypes.data)
            super().decode_into(tokens, *arguments, **options)

    monkeypatch.setattr(calls_module, "ActionTokenizer", Spy)
    adapter = ActionRFSQAE.from_bundle(calibrated.path)
    x = chunks_of(PUBLISHED)
    codes = adapter.encode(x)
    narrow, coarse = codes.int(), codes[..., :2]
    for tokens in (codes, narrow, coarse):
        adapter.decode_from_indices(tokens)
    # A batch in other lengths too, where they fill whole chunks.
    regrouped = x.reshape(3, 4, 3)
    adapter.encode(regrouped)
    assert taken == [tensor.data_ptr() for tensor in (x, codes, narrow, coarse, regrouped)]


def test_inputs_stay_as_they_were_and_results_are_ones_own(calibrated: Pair) -> None:
    x = chunks_of(PUBLISHED)
    kept = x.clone()
    recon, codes = calibrated.adapter(x)
    first = recon.clone(), codes.clone()
    calibrated.adapter(x.flip(0))
    assert torch.equal(x, kept)
    assert all(map(torch.equal, (recon, codes), first))
    recon.zero_()
    codes.fill_(-1)
    assert all(map(torch.equal, calibrated.adapter(x), first))


# --- a frozen module --------------------------------------------------------------------------------------------------


def test_the_attributes_are_the_published_ones(pair: Pair) -> None:
    names = ("action_dim", "hidden_dim", "num_layers", "num_levels", "use_layernorm")
    assert [getattr(pair.adapter, name) for name in names] == [getattr(pair.published, name) for name in names]
    assert pair.adapter.latent_dim == pair.adapter.hidden_dim
    with ActionTokenizer.load(pair.path) as tokenizer:
        assert pair.adapter.fingerprint == tokenizer.fingerprint


def test_it_is_a_torch_module_with_nothing_to_learn(calibrated: Pair) -> None:
    adapter = ActionRFSQAE.from_bundle(calibrated.path)
    assert isinstance(adapter, nn.Module)
    assert not adapter.training
    assert adapter.train() is adapter
    assert adapter.eval() is adapter
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 0
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    assert adapter.requires_grad_(False) is adapter
    with pytest.raises(InvalidInputError, match=r"cannot be trained.*build_engine\.py --checkpoint FILE"):
        adapter.requires_grad_()
    for changed in (adapter.half(), adapter.double(), adapter.bfloat16(), adapter.to("cpu"), adapter.cpu()):
        assert changed is adapter
        first = next(adapter.parameters())
        assert (first.device.type, first.dtype) == ("cpu", torch.float32)
    assert torch.equal(adapter.encode(chunks_of(PUBLISHED)), calibrated.adapter.encode(chunks_of(PUBLISHED)))
    assert adapter.fingerprint[:8] in repr(adapter)


def test_a_policy_around_it_trains_whatever_is_done_to_all_its_parameters(calibrated: Pair) -> None:
    policy = nn.ModuleDict({"tokenizer": ActionRFSQAE.from_bundle(calibrated.path), "head": nn.Linear(6, 24 * 5)})
    policy.requires_grad_(True)
    x = chunks_of(PUBLISHED)
    labels = policy["tokenizer"].encode(x)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(policy["head"](x.flatten(1)).reshape(-1, 5), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    averaged = torch.optim.swa_utils.AveragedModel(policy)
    averaged.update_parameters(policy)
    assert torch.equal(averaged.module["tokenizer"].encode(x), labels)


def test_copies_share_the_engines_and_what_is_pickled_opens_the_same_bundle(
    calibrated: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = chunks_of(PUBLISHED)
    copied = copy.deepcopy(calibrated.adapter)
    assert copied.tokenizer is calibrated.adapter.tokenizer
    path = with_hashes(calibrated.path, tmp_path / "bundle", calibrated.deployed.reference.state_dict())
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(ActionRFSQAE.from_bundle("bundle"))
    monkeypatch.chdir("/")
    for other in (copied, pickle.loads(content)):  # noqa: S301  written right here
        assert torch.equal(other.encode(x), calibrated.adapter.encode(x))
    write_bundle(path, deploy(replace(PUBLISHED, seed=1)), overwrite=True)
    with pytest.raises(FingerprintError):
        pickle.loads(content)  # noqa: S301  written right here


def decode_steps_in_a_row(model: Any, indices: Tensor) -> Tensor:
    """What the published decode_from_indices does, as code does that has it copied."""
    z_flat = model.rfsq.decode_from_indices(indices).view(-1, model.hidden_dim)
    return model.decoder(z_flat).view(*indices.shape[:2], -1)


def test_latents_may_be_put_in_a_row_step_by_step(decodable: Pair) -> None:
    codes = decodable.adapter.encode(chunks_of(decodable.deployed.recipe))
    for indices in (codes, codes[..., :2]):
        expected = decodable.adapter.decode_from_indices(indices)
        assert torch.equal(decode_steps_in_a_row(decodable.adapter, indices), expected)
    assert decode_steps_in_a_row(decodable.published, codes).shape == (6, 2, 3)
    latents = decodable.adapter.rfsq.decode_from_indices(codes)
    assert torch.equal(
        decodable.adapter.decoder(latents.reshape(6, 2, 4)), decodable.adapter.decode_from_indices(codes)
    )
    with pytest.raises(InvalidInputError, match="expected codes"):
        decodable.adapter.decoder(latents.view(-1, 8))


def test_latents_of_codes_are_for_the_decoder_and_no_numbers(calibrated: Pair) -> None:
    recon, codes = calibrated.adapter(chunks_of(PUBLISHED))
    latents = calibrated.adapter.rfsq.decode_from_indices(codes)
    assert (latents.shape, latents.device.type) == ((6, 2, 4), "cpu")
    assert torch.equal(calibrated.adapter.decoder(latents.to("cpu")), recon)
    with pytest.raises(AttributeError, match="no numbers"):
        latents.mean()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        torch.sum(latents)  # type: ignore[call-overload]
    with pytest.raises(InvalidInputError, match=r"rfsq\.decode_from_indices"):
        calibrated.adapter.decoder(torch.zeros(6, 2, 4))  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_may_be_called_from_compiled_code(calibrated: Pair) -> None:
    from torch._dynamo.testing import CompileCounter

    x = chunks_of(PUBLISHED)
    # Of the two, the compiler sees the product alone: a backend is no part of a graph.
    seen = CompileCounter()
    compiled = torch.compile(lambda actions: calibrated.adapter(actions)[0] * 2, backend=seen)
    assert torch.equal(compiled(x), calibrated.adapter(x)[0] * 2)
    assert (seen.frame_count, seen.op_count) == (1, 1)


def test_a_trace_would_record_one_answer_for_all_and_is_refused(calibrated: Pair) -> None:
    x = chunks_of(PUBLISHED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for traced in (calibrated.adapter, nn.Sequential(calibrated.adapter)):
            with pytest.raises(InvalidInputError, match="x is being traced"):
                torch.jit.trace(traced, x)
            with pytest.raises(InvalidInputError, match="x is being traced"):
                torch.onnx.export(traced, (x,), io.BytesIO(), dynamo=False)
    calibrated.adapter(x)


def make_fx(function: Callable[[Tensor], Tensor], **settings: Any) -> Callable[[Tensor], Any]:
    from torch.fx.experimental import proxy_tensor

    return proxy_tensor.make_fx(function, **settings)


def with_stand_ins(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(value: Tensor) -> Tensor:
        with FakeTensorMode() as mode:
            return function(mode.from_tensor(value))

    return run


def exported(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    class Called(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return function(value)

    return lambda value: torch.export.export(Called(), (value,), strict=False)


TRANSFORMS: dict[str, tuple[Callable[[Any], Callable[[Tensor], Any]], str]] = {
    "functionalize": (torch.func.functionalize, r"inside torch\.func \(Functionalize\)"),
    "vmap": (torch.vmap, r"inside torch\.func \(Vmap\)"),
    "grad": (torch.func.grad, r"inside torch\.func \(Grad\)"),
    "jacfwd": (torch.func.jacfwd, r"inside torch\.func \(Vmap, Jvp\)"),
    "make_fx": (make_fx, "being traced"),
    "make_fx before dispatch": (lambda function: make_fx(function, pre_dispatch=True), "being traced"),
    "make_fx with stand-ins": (lambda function: make_fx(function, tracing_mode="fake"), "being traced"),
    "export": (exported, "being traced"),
    "stand-ins": (with_stand_ins, "being traced"),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("is_given", [True, False], ids=["given", "from outside"])
@pytest.mark.parametrize("call", ["encode", "decode_from_indices"])
def test_transforms_are_refused_by_name_wherever_the_tensors_come_from(
    call: str, is_given: bool, transform: str, calibrated: Pair
) -> None:
    """What a backend writes into memory, they do not see: codes would be whatever lay there before."""
    x = chunks_of(PUBLISHED)
    inner = x if call == "encode" else calibrated.adapter.encode(x)
    transformed, message = TRANSFORMS[transform]

    def called(outer: Tensor) -> Tensor:
        return (outer.sum() + getattr(calibrated.adapter, call)(outer if is_given else inner)).sum()

    # Gradients are of floats; what is made of other tensors has a float beside them.
    outer = x if not is_given or call == "encode" or transform in ("grad", "jacfwd") else inner
    with pytest.raises(InvalidInputError, match=f"(x|indices) is {message}"):
        transformed(called)(outer)


def test_modes_that_look_on_change_nothing(calibrated: Pair) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = chunks_of(PUBLISHED)
    codes = calibrated.adapter.encode(x)
    with FlopCounterMode(display=False):
        assert torch.equal(calibrated.adapter.encode(x), codes)


@pytest.mark.parametrize(
    ("make", "sign"),
    [
        (lambda x: torch._neg_view(x), -1),
        (lambda x: torch.complex(x, x).conj().imag, -1),
        (lambda x: torch.complex(x, x).conj().real, 1),
        (lambda x: torch.complex(x, x).imag, 1),
    ],
    ids=["a negative view", "imaginary parts of a conjugate", "real parts of a conjugate", "imaginary parts"],
)
def test_views_that_change_the_sign_are_taken_as_what_they_are(
    make: Callable[[Tensor], Tensor], sign: int, calibrated: Pair
) -> None:
    x = chunks_of(PUBLISHED)
    codes = calibrated.adapter.encode(sign * x)
    assert torch.equal(calibrated.adapter.encode(make(x)), codes)
    decoded = calibrated.adapter.decode_from_indices(codes)
    assert torch.equal(calibrated.adapter.decode_from_indices(torch._neg_view(-codes)), decoded)


def freed(x: Tensor) -> Tensor:
    copy = x.clone()
    copy.untyped_storage().resize_(0)
    return copy


def left_by_vmap(x: Tensor) -> Tensor:
    left: list[Tensor] = []
    torch.vmap(lambda part: left.append(part) or part)(x)  # type: ignore[func-returns-value]
    return left[0]


def masked(x: Tensor) -> Tensor:
    return torch.masked.masked_tensor(x, x > 0)  # type: ignore[no-any-return]


def nested(x: Tensor, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nested, "nested"),
        (lambda x: nested(x, torch.jagged), "NestedTensor, which has no memory"),
        (lambda x: x.to_sparse(), r"torch\.sparse_coo"),
        (lambda x: x.to_mkldnn(), r"torch\._mkldnn"),
        (lambda x: x.to("meta"), "on the meta device"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"),
        (masked, "MaskedTensor, which has no memory"),
        (lambda x: torch._efficientzerotensor(tuple(x.shape)), "without memory"),
        (freed, "without memory"),
        (left_by_vmap, "without memory"),
    ],
)
def test_tensors_whose_memory_is_not_their_numbers_are_refused_by_name(
    make: Callable[[Tensor], Tensor], message: str, calibrated: Pair
) -> None:
    tensor = make(chunks_of(PUBLISHED))
    with pytest.raises(InvalidInputError, match=f"x is .*{message}"):
        calibrated.adapter.encode(tensor)


# --- state dicts ------------------------------------------------------------------------------------------------------


def saved(content: Any) -> Any:
    """Through a file and back, as training code reads it."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WRAPPED = ("compiled", "lightning", "average")


def layout(name: str, model: PublishedActionRFSQAE) -> Any:
    state = model.state_dict()
    return {
        **layouts(model),
        "unused layer norms": state | {f"rfsq.layers.{layer}.layernorm.weight": torch.ones(1) for layer in range(3)},
        "our own": {name: tensor for name, tensor in state.items() if not name.startswith("rfsq.")},
        "compiled": {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        "lightning": {"state_dict": {f"model.module.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        "average": {"model": state, "ema": {name: tensor + 1 for name, tensor in state.items()}},
    }[name]


@pytest.mark.parametrize(
    "name", ["trained", "model key", "both keys", "state dict", "unused layer norms", "our own", *WRAPPED]
)
def test_the_checkpoint_that_the_bundle_was_built_from_is_accepted(name: str, pair: Pair) -> None:
    result = pair.adapter.load_state_dict(saved(layout(name, pair.published)))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_a_bundle_of_the_average_accepts_the_average_in_the_file(calibrated: Pair, tmp_path: Path) -> None:
    content = saved({"model": layout("average", calibrated.published)["ema"], "ema": calibrated.published.state_dict()})
    weights = calibrated.deployed.reference.state_dict()
    adapter = ActionRFSQAE.from_bundle(with_hashes(calibrated.path, tmp_path / "b", weights, weights="ema"))
    assert adapter.load_state_dict(content).missing_keys == []
    with pytest.raises(FingerprintError, match="has other numbers"):
        calibrated.adapter.load_state_dict(content)


@pytest.mark.parametrize("tensor", ["encoder.0.weight", "encoder.2.bias", "decoder.0.weight", "decoder.2.weight"])
@pytest.mark.parametrize("name", ["trained", "model key", "both keys", "state dict"])
def test_another_checkpoint_is_refused_and_told_apart(name: str, tensor: str, pair: Pair) -> None:
    """One number off by its last bit."""
    state = pair.published.state_dict()
    first = state[tensor].flatten()[0]
    content = saved(layout(name, pair.published))
    for inner in (content, *(value for value in content.values() if isinstance(value, dict))):
        if tensor in inner:
            inner[tensor].view(-1)[0] = torch.nextafter(first, first + 1)
    for strict in (True, False):
        with pytest.raises(FingerprintError) as caught:
            pair.adapter.load_state_dict(content, strict=strict)
        message = str(caught.value)
        assert f"{tensor} has other numbers" in message
        assert message.count("has other numbers") == (2 if name == "both keys" else 1)
        assert "python export/build_engine.py --checkpoint FILE --conditioning" in message


def test_all_that_differs_is_told_at_once(calibrated: Pair) -> None:
    state = calibrated.published.state_dict()
    del state["encoder.0.bias"]
    state["encoder.0.weight"] = state["encoder.0.weight"].T
    state["rfsq.layers.1.boundaries"] = state["rfsq.layers.1.boundaries"] * 2
    state["rfsq.layers.3.boundaries"] = state["rfsq.layers.0.boundaries"]
    state["head.weight"] = torch.zeros(1)
    config = calibrated.published.config | {"num_levels": 9}
    with pytest.raises(FingerprintError) as caught:
        calibrated.adapter.load_state_dict({"model": state, "config": config})
    for line in (
        "its config says num_levels = 9, the bundle (calibrated) has 5",
        "encoder.0.weight has shape [3, 8], the bundle's model [8, 3]",
        "rfsq.layers.1.boundaries is not linspace(-1, 1, 5)",
        "it has 4 quantiser layers, the bundle's model 3",
        "it lacks encoder.0.bias",
        "it has the unknown tensors head.weight, rfsq.layers.3.boundaries",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (10**5000, "a value of type int with thousands of digits"),
        (torch.tensor([3, 4]), "tensor([3, 4])"),
        (np.array([3, 4]), "array([3, 4])"),
        ("x" * 10_000, f"'{'x' * 199}…"),
    ],
    ids=["huge", "tensor", "array", "text"],
)
def test_a_config_of_anything_is_compared(value: object, shown: str, calibrated: Pair) -> None:
    content = {"model": calibrated.published.state_dict(), "config": {"action_dim": value}}
    with pytest.raises(FingerprintError, match=re.escape(f"its config says action_dim = {shown}, the bundle (calib")):
        calibrated.adapter.load_state_dict(content)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["float4", "nested"],
)
def test_tensors_that_torch_does_not_compute_with_are_refused(tensor: torch.Tensor, calibrated: Pair) -> None:
    state = calibrated.published.state_dict() | {"encoder.0.bias": tensor}
    with pytest.raises(FingerprintError, match="it is no state dict of plain tensors"):
        calibrated.adapter.load_state_dict(state)


def test_a_second_spelling_of_the_weights_is_not_passed_over(calibrated: Pair) -> None:
    state = calibrated.published.state_dict()
    other = {name: tensor * 2 for name, tensor in state.items() if not name.startswith("rfsq.")}
    with pytest.raises(FingerprintError, match=r"it has the unknown tensors decoder\.0\.bias \(a second one\), dec"):
        calibrated.adapter.load_state_dict({f"module.{name}": tensor for name, tensor in state.items()} | other)
    doubled = {f"module.{name}": tensor * 2 for name, tensor in state.items()}
    with pytest.raises(FingerprintError, match=r"encoder\.0\.weight has other numbers"):
        calibrated.adapter.load_state_dict(doubled | {name: state[name] for name in other})


def test_a_config_of_the_other_kind_of_tokens_is_refused(pair_of: Callable[[Recipe], Pair]) -> None:
    pair = pair_of(replace(PUBLISHED, mode=DeployMode.NONE))
    content = layout("trained", pair.published)
    content["config"] = content["config"] | {"use_layernorm": True}
    with pytest.raises(FingerprintError, match=r"use_layernorm = True, the bundle \(none\) has False"):
        pair.adapter.load_state_dict(content)


def test_names_that_are_missing_or_unknown_pass_where_the_caller_is_not_strict(calibrated: Pair) -> None:
    state = calibrated.published.state_dict() | {"head.weight": torch.zeros(1)}
    del state["decoder.2.bias"]
    result = calibrated.adapter.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["decoder.2.bias"], ["head.weight"])


def test_that_calibrated_tokens_are_others_is_said_when_the_published_checkpoint_is_loaded(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.adapter.load_state_dict(pair.published.state_dict())
    is_calibrated = pair.deployed.recipe.mode is DeployMode.CALIBRATED
    assert ("a policy has to be trained on them" in caplog.text) == is_calibrated
    caplog.clear()
    pair.adapter.load_state_dict(pair.adapter.state_dict())
    assert caplog.text == ""


def test_one_coarse_tensor_does_not_excuse_another_grid(calibrated: Pair) -> None:
    state = calibrated.published.state_dict()
    state["rfsq.layers.0.boundaries"] = state["rfsq.layers.0.boundaries"] + 1e-3
    state["rfsq.layers.0.layernorm.weight"] = torch.ones(1).bfloat16()
    with pytest.raises(FingerprintError, match=r"rfsq\.layers\.0\.boundaries is not linspace"):
        calibrated.adapter.load_state_dict(state)


def test_a_checkpoint_in_half_precision_is_the_one_of_a_bundle_built_from_it(calibrated: Pair, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in calibrated.published.state_dict().items()}
    weights = {name: tensor for name, tensor in half.items() if not name.startswith("rfsq.")}
    adapter = ActionRFSQAE.from_bundle(with_hashes(calibrated.path, tmp_path / "bundle", weights))
    adapter.load_state_dict(half)
    with pytest.raises(FingerprintError):
        adapter.load_state_dict(calibrated.published.state_dict())


def test_what_calibration_fitted_is_compared_where_a_checkpoint_brings_it(calibrated: Pair, tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in calibrated.deployed.reference.state_dict().items()}
    fitted = {**weights, "calibrated.mean": torch.zeros(3, 4), "calibrated.scale": torch.ones(3, 4)}
    adapter = ActionRFSQAE.from_bundle(with_hashes(calibrated.path, tmp_path / "bundle", fitted))
    adapter.load_state_dict(fitted)
    adapter.load_state_dict(weights)
    with pytest.raises(FingerprintError, match=r"calibrated\.scale has other numbers"):
        adapter.load_state_dict({**fitted, "calibrated.scale": torch.full((3, 4), 2.0)})
    with pytest.raises(FingerprintError, match=r"unknown tensors calibrated\.mean, calibrated\.scale"):
        calibrated.adapter.load_state_dict(fitted)


def test_a_bundle_that_does_not_say_what_it_was_built_from_accepts_nothing(
    bundle_of: Callable[[Recipe], Path], calibrated: Pair
) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_of(PUBLISHED))
    with pytest.raises(FingerprintError, match="does not say which tensors it was built from"):
        adapter.load_state_dict(calibrated.published.state_dict())


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"encoder.0.weight": 3, "decoder": None}, FingerprintError, "decoder, encoder.0.weight are none"),
        ({}, FingerprintError, "it lacks decoder.0.bias"),
        ({"model": {}}, FingerprintError, "it lacks decoder.0.bias"),
        ([], InvalidInputError, "state_dict is a list"),
        ({1: torch.zeros(1)}, FingerprintError, "plain tensors: 1 are none"),
        ({"a": torch.zeros(1, device="meta"), "b": torch.zeros(1).to_sparse()}, FingerprintError, "a, b are none"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, error: type[Exception], words: str, calibrated: Pair) -> None:
    with pytest.raises(error, match=words):
        calibrated.adapter.load_state_dict(content)


def test_its_own_state_is_the_fingerprint(calibrated: Pair, pair_of: Callable[[Recipe], Pair]) -> None:
    state = saved(calibrated.adapter.state_dict())
    assert list(state) == [FINGERPRINT_KEY]
    assert bytes(map(int, state[FINGERPRINT_KEY])).hex() == calibrated.adapter.fingerprint
    for content in (state, {"model": state, "epoch": 3}, {FINGERPRINT_KEY: state[FINGERPRINT_KEY].half()}):
        calibrated.adapter.load_state_dict(content)
    beside = state | {"encoder.0.weight": torch.zeros(1)}
    with pytest.raises(FingerprintError, match=r"unknown tensors encoder\.0\.weight"):
        calibrated.adapter.load_state_dict(beside)
    assert calibrated.adapter.load_state_dict(beside, strict=False).unexpected_keys == ["encoder.0.weight"]
    other = pair_of(replace(PUBLISHED, mode=DeployMode.NONE)).adapter
    with pytest.raises(FingerprintError, match=f"it was saved with the tokenizer {calibrated.adapter.fingerprint}"):
        other.load_state_dict(state)


def test_a_policys_checkpoint_says_which_tokenizer_it_belongs_to(
    calibrated: Pair, pair_of: Callable[[Recipe], Pair]
) -> None:
    def policy(pair: Pair) -> nn.ModuleDict:
        return nn.ModuleDict({"tokenizer": pair.adapter, "head": nn.Linear(2, 2)})

    other = pair_of(replace(PUBLISHED, mode=DeployMode.NONE))
    state = saved(policy(calibrated).state_dict())
    policy(calibrated).load_state_dict(state)
    with pytest.raises(RuntimeError, match="it was saved with the tokenizer"):
        policy(other).load_state_dict(state)
    # One that was saved with the published model inside.
    before = nn.ModuleDict({"tokenizer": calibrated.published, "head": nn.Linear(2, 2)}).state_dict()
    same_tokens = pair_of(replace(PUBLISHED, mode=DeployMode.RECOVERED))
    policy(same_tokens).load_state_dict(
        {**before, **same_tokens.published.state_dict(prefix="tokenizer.")}  # type: ignore[no-untyped-call]
    )
    with pytest.raises(RuntimeError, match=r"calibrated tokens, which .* mean something else.*`recovered`"):
        policy(calibrated).load_state_dict(before)
    head = {name: tensor for name, tensor in before.items() if not name.startswith("tokenizer.")}
    policy(calibrated).load_state_dict(head, strict=False)
    strange = pair_of(replace(PUBLISHED, seed=3))
    with pytest.raises(RuntimeError, match=r"encoder\.0\.weight has other numbers"):
        policy(strange).load_state_dict(before)
    # One without a tokenizer.
    with pytest.raises(RuntimeError, match=f"Missing key.*tokenizer.{FINGERPRINT_KEY}"):
        policy(calibrated).load_state_dict({"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})


# --- opening ----------------------------------------------------------------------------------------------------------


def test_another_fingerprint_than_the_policys_is_refused(calibrated: Pair) -> None:
    fingerprint = calibrated.adapter.fingerprint
    assert ActionRFSQAE.from_bundle(calibrated.path, expect_fingerprint=fingerprint).fingerprint == fingerprint
    with pytest.raises(FingerprintError):
        ActionRFSQAE.from_bundle(calibrated.path, expect_fingerprint="0" * 64)


def test_the_published_models_arguments_are_answered_with_what_to_call() -> None:
    make: Any = ActionRFSQAE
    for call in (
        lambda: make(action_dim=7, hidden_dim=16, num_layers=8, num_levels=7, use_layernorm=True),
        lambda: make(7, 16, 8, 7),
        make,
    ):
        with pytest.raises(InvalidInputError, match=r"ActionRFSQAE\.from_bundle\(PATH\).*build_engine\.py"):
            call()


def test_the_first_parameter_is_float32_whatever_torchs_default_is(calibrated: Pair) -> None:
    """As transformers sets it while a policy is loaded."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        adapter = ActionRFSQAE.from_bundle(calibrated.path)
        found = adapter(chunks_of(PUBLISHED))
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(adapter.parameters()).dtype is torch.float32
    assert all(map(torch.equal, found, calibrated.adapter(chunks_of(PUBLISHED))))


def test_what_is_no_bundle_and_no_backend_is_refused(calibrated: Pair, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        ActionRFSQAE.from_bundle(tmp_path)
    with pytest.raises(BackendUnavailableError):
        ActionRFSQAE.from_bundle(calibrated.path, backend="abacus")


@pytest.mark.slow
def test_the_c_engine_gives_the_same_answers(bundle_of: Callable[[Recipe], Path], calibrated: Pair) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_of(replace(PUBLISHED, c_targets=host_targets()[:1])), backend="c")
    for steps in (2, 1, 9):
        x = chunks_of(replace(PUBLISHED, chunk_length=steps), 50)
        recon, codes = adapter(x)
        assert torch.equal(codes, calibrated.adapter.encode(x))
        assert torch.equal(adapter.decode_from_indices(codes), recon)
        torch.testing.assert_close(recon, calibrated.adapter(x)[0], rtol=0, atol=GATES.action_error)


GPU = torch.device("cuda", 0)


def test_auto_opens_a_backend_that_takes_tensors_of_the_gpu_once_they_come(
    calibrated: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, Any]] = []

    class Loader:
        @staticmethod
        def load(path: Path, *, backend: str, expect_fingerprint: str | None) -> ActionTokenizer:
            opened.append((backend, expect_fingerprint))
            if backend == "cuda":
                raise BackendUnavailableError("no kernels for this GPU")
            return ActionTokenizer.load(path, backend="onnxruntime", expect_fingerprint=expect_fingerprint)

    monkeypatch.setattr(calls_module, "ActionTokenizer", Loader)
    engines = ActionRFSQAE.from_bundle(calibrated.path)._engines
    assert [name for name, _ in opened] == ["auto"]
    first, second = (engines.tokenizer_for(GPU) for _ in range(2))
    assert first == second
    assert first[0] is not engines.on_host
    assert first[1]
    assert opened[1:] == [(name, calibrated.adapter.fingerprint) for name in ("cuda", "tensorrt-rtx")]
    assert engines.tokenizer_for(torch.device("cpu")) == (engines.on_host, True)


@pytest.mark.parametrize(("backend", "words"), [("auto", "cuda: "), ("onnxruntime", "was asked for")])
def test_where_no_backend_takes_tensors_of_the_gpu_they_are_copied_and_that_is_said_once(
    backend: str, words: str, calibrated: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle has no kernels, or the caller named a backend on the CPU."""
    engines = ActionRFSQAE.from_bundle(calibrated.path, backend=backend)._engines
    monkeypatch.setattr(calls_module, "GPU_BACKENDS", ("cuda",))
    with caplog.at_level(logging.WARNING, "rfsq.runtime.policy.adapter_calls"):
        for _ in range(2):
            assert engines.tokenizer_for(GPU) == (engines.on_host, False)
    (record,) = [record for record in caplog.records if record.name == "rfsq.runtime.policy.adapter_calls"]
    assert "copied to the CPU and back" in record.getMessage()
    assert words in record.getMessage()


def test_a_backend_on_the_gpu_serves_the_first_gpu_in_place_and_others_by_copies(
    calibrated: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that is on the GPU by name alone."""
    engines = ActionRFSQAE.from_bundle(calibrated.path, backend="onnxruntime")._engines
    monkeypatch.setattr(calls_module, "GPU_BACKENDS", ("onnxruntime",))
    assert engines.tokenizer_for(GPU) == (engines.on_host, True)
    for other in (torch.device("cuda", 1), torch.device("mps", 0)):
        assert engines.tokenizer_for(other) == (engines.on_host, False)


# --- torch stays optional ---------------------------------------------------------------------------------------------


def test_the_parts_of_the_adapter_alone_import_torch_and_nothing_here_imports_the_adapter() -> None:
    importers: dict[str, set[str]] = {"torch": set(), "policy.adapter": set()}
    for file in (ROOT / "runtime").glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for importer in importers:
                if any(f"{name}.".startswith(f"{importer}.") for name in names):
                    importers[importer].add(file.name)
    adapter = {"adapter.py", "adapter_calls.py", "chunk_adapter.py", "module.py", "tensors.py"}
    adapter |= {"belief_tensors.py", "chunk_beliefs.py", "step_beliefs.py", "tensor_beliefs.py"}
    assert importers == {"torch": adapter, "policy.adapter": {"torch_adapter.py"}}


def test_importing_runtime_does_not_import_torch_and_the_adapter_says_what_is_missing() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import rfsq.runtime, rfsq.runtime.bundle.checkpoint_layouts\n"
        "try:\n"
        "    import rfsq.runtime.policy.adapter\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout


def test_no_call_warns(calibrated: Pair) -> None:
    """torch warns of read-only memory, for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recon, codes = calibrated.adapter(chunks_of(PUBLISHED))
        calibrated.adapter.decode_from_indices(codes)
        calibrated.adapter.load_state_dict(calibrated.adapter.state_dict())
        assert recon.shape == (6, 2, 3)
