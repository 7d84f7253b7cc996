"""`ActionTokenizer` gives the reference's answers for any sizes and mode, whoever calls it and how often."""

import logging
import re
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime import (
    ActionTokenizer,
    BundleError,
    FingerprintError,
    InvalidInputError,
    SelfTestError,
    TokenizerError,
)
from rfsq.runtime.bundle.comparison import action_errors, compare_tokens
from rfsq.runtime.bundle.folder import check_manifest, open_bundle
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.models import ModelEntry
from tests.bundles import (
    Recipe,
    deploy,
    quality_of,
    random_actions,
    reference_decode,
    write_bundle,
)
from tests.strategies import recipes


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes())
def test_any_model_is_loaded_and_agrees_with_the_reference(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    deployed = deploy(recipe)
    model, depth = deployed.reference, recipe.config.num_layers
    actions = random_actions(recipe, 7, seed=2)
    inputs = torch.from_numpy(actions).double()
    expected, margins, bounds = (part.numpy() for part in token_error_bounds(model, inputs))
    with ActionTokenizer.load(write_bundle(tmp_path_factory.mktemp("any") / "bundle", deployed)) as tokenizer:
        assert tokenizer.prefixes == deployed.prefixes
        tokens = tokenizer.encode(actions)
        assert tokens.dtype == np.int32
        assert tokens.shape == (7, recipe.chunk_length, recipe.config.latent_dim, depth)
        compared = compare_tokens(
            expected,
            tokens,
            margins,
            bounds,
            num_levels=tokenizer.model.num_levels,
            is_step_coupled=tokenizer.model.is_step_coupled,
        )
        assert compared.num_wrong == 0, compared.first_wrong
        stats = None
        if recipe.mode.has_stats:
            again, stats = tokenizer.encode_with_stats(actions)
            np.testing.assert_array_equal(again, tokens)
        for prefix in tokenizer.prefixes:
            part = None if stats is None else stats[..., :prefix, :]
            decoded = tokenizer.decode(tokens[..., :prefix], part)
            reference = reference_decode(
                model, torch.from_numpy(tokens[..., :prefix]), None if stats is None else torch.from_numpy(stats)
            )
            assert decoded.dtype == np.float32
            assert action_errors(reference, decoded, model.units.numpy()).value <= GATES.action_error


@pytest.mark.parametrize("mode", list(DeployMode))
def test_each_mode_round_trips(mode: DeployMode, bundle_of: Callable[[Recipe], Path]) -> None:
    """More layers, less error; but for the naive quantiser, whose later layers add nothing."""
    recipe = Recipe(mode=mode)
    model = deploy(recipe).reference
    actions = random_actions(recipe, 50)
    unquantised = model.decode_latents(model.encode_latents(torch.from_numpy(actions).double())).numpy()
    with ActionTokenizer.load(bundle_of(recipe)) as tokenizer:
        if mode.has_stats:
            tokens, stats = tokenizer.encode_with_stats(actions)
            decoded = [tokenizer.decode(tokens[..., :depth], stats[..., :depth, :]) for depth in (2, 3)]
        else:
            tokens = tokenizer.encode(actions)
            decoded = [tokenizer.decode(tokens[..., :depth]) for depth in (2, 3)]
    coarse, fine = (np.mean((found - unquantised) ** 2) for found in decoded)
    if mode is DeployMode.NONE:
        assert fine == pytest.approx(coarse, rel=1e-5)
    else:
        assert fine < coarse


def test_facts_about_the_model(tokenizer: ActionTokenizer) -> None:
    assert isinstance(tokenizer.model, ModelEntry)
    assert (tokenizer.model.mode, tokenizer.model.chunk_length, tokenizer.prefixes) == ("calibrated", 2, (2, 3))
    assert len(tokenizer.fingerprint) == 64
    assert tokenizer.backend.name == "onnxruntime"
    assert "ONNX Runtime" in tokenizer.backend.description


# --- batches ----------------------------------------------------------------------------------------------------------


def test_an_empty_batch_gives_an_empty_batch(tokenizer: ActionTokenizer, dynamic_tokenizer: ActionTokenizer) -> None:
    tokens = tokenizer.encode(np.empty((0, 2, 3), np.float32))
    assert (tokens.dtype, tokens.shape) == (np.int32, (0, 2, 4, 3))
    actions = tokenizer.decode(tokens[..., :2])
    assert (actions.dtype, actions.shape) == (np.float32, (0, 2, 3))
    tokens, stats = dynamic_tokenizer.encode_with_stats(actions)
    assert (stats.dtype, stats.shape) == (np.float32, (0, 2, 3, 2))
    assert dynamic_tokenizer.decode(tokens, stats).shape == (0, 2, 3)


@pytest.mark.parametrize("batch", [1, 2, 3, 50, 2000])
def test_any_batch_size_gives_the_same_answers(batch: int, tokenizer: ActionTokenizer) -> None:
    """2000 chunks are beyond what is copied through the bound buffers."""
    actions = random_actions(Recipe(), 2000)
    tokens = np.concatenate([tokenizer.encode(part) for part in np.array_split(actions, 2000 // batch)])
    np.testing.assert_array_equal(tokens, tokenizer.encode(actions))
    decoded = np.concatenate([tokenizer.decode(part) for part in np.array_split(tokens, 2000 // batch)])
    np.testing.assert_allclose(decoded, tokenizer.decode(tokens), rtol=0, atol=1e-6)


def test_results_of_earlier_calls_stay_as_they_were(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), 2)
    first = tokenizer.encode(actions[:1])
    kept = first.copy()
    second = tokenizer.encode(actions[1:])
    assert (second != first).any()
    np.testing.assert_array_equal(first, kept)
    decoded = tokenizer.decode(first)
    kept_actions = decoded.copy()
    tokenizer.decode(second)
    np.testing.assert_array_equal(decoded, kept_actions)


def test_answers_are_deterministic(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), 300)
    tokens = tokenizer.encode(actions)
    for _ in range(5):
        np.testing.assert_array_equal(tokenizer.encode(actions), tokens)


def test_threads_do_not_mix_up_their_answers(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), 8)
    expected = [tokenizer.encode(actions[index : index + 1]) for index in range(8)]

    def repeat(index: int) -> bool:
        return all(
            (tokenizer.encode(actions[index : index + 1]) == expected[index]).all()
            and (tokenizer.decode(expected[index]) == decoded[index]).all()
            for _ in range(200)
        )

    decoded = [tokenizer.decode(tokens) for tokens in expected]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, range(8)))


# --- into arrays of the caller ----------------------------------------------------------------------------------------


def test_into_writes_what_the_others_return(tokenizer: ActionTokenizer, dynamic_tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), 5)
    tokens, decoded, stats = (
        np.empty((5, 2, 4, 3), np.int32),
        np.empty((5, 2, 3), np.float32),
        np.empty((5, 2, 3, 2), np.float32),
    )
    tokenizer.encode_into(actions, tokens)
    np.testing.assert_array_equal(tokens, tokenizer.encode(actions))
    for prefix in (2, 3):
        tokenizer.decode_into(tokens[..., :prefix], decoded)
        np.testing.assert_array_equal(decoded, tokenizer.decode(tokens[..., :prefix]))
    dynamic_tokenizer.encode_into(actions, tokens, stats)
    for found, expected in zip((tokens, stats), dynamic_tokenizer.encode_with_stats(actions), strict=True):
        np.testing.assert_array_equal(found, expected)
    dynamic_tokenizer.decode_into(tokens, decoded, stats)
    np.testing.assert_array_equal(decoded, dynamic_tokenizer.decode(tokens, stats))
    dynamic_tokenizer.encode_into(actions, tokens)
    np.testing.assert_array_equal(tokens, dynamic_tokenizer.encode(actions))


#: Chunks of `Recipe` for which buffers are kept yet: so large that one array is more than all else that Python does.
LARGEST_COPIED = 2000


def peak_bytes(call: Callable[[], object]) -> int:
    """Above what was allocated before, over a few calls."""
    call()
    tracemalloc.start()
    try:
        for _ in range(5):
            call()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(20):
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_into_allocates_no_arrays_after_the_first_call(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), LARGEST_COPIED)
    tokens, decoded = tokenizer.encode(actions), np.empty_like(actions)
    smallest = actions.nbytes
    assert peak_bytes(lambda: tokenizer.decode_into(tokens, decoded)) < smallest / 4
    assert peak_bytes(lambda: tokenizer.encode_into(actions, tokens)) < smallest / 4
    # The measure itself: returning a new array is seen.
    assert peak_bytes(lambda: tokenizer.decode(tokens)) >= smallest


def test_a_warm_tokenizer_makes_no_new_buffers(bundle: Path) -> None:
    with ActionTokenizer.load(bundle, verify=False) as fresh:
        fresh.warmup(LARGEST_COPIED)
        tokens = np.zeros((LARGEST_COPIED, 2, 4, 3), np.int32)
        decoded = np.empty((LARGEST_COPIED, 2, 3), np.float32)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            fresh.decode_into(tokens, decoded)
            assert tracemalloc.get_traced_memory()[1] - before < decoded.nbytes / 2
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("mode", list(DeployMode))
def test_warmup_works_in_every_mode(mode: DeployMode, bundle_of: Callable[[Recipe], Path]) -> None:
    with ActionTokenizer.load(bundle_of(Recipe(mode=mode))) as tokenizer:
        tokenizer.warmup()
        tokenizer.warmup(3)
        with pytest.raises(InvalidInputError, match="batch is 0; expected an int from 1"):
            tokenizer.warmup(0)


# --- identity, verification, end of life ------------------------------------------------------------------------------


def test_the_expected_fingerprint_may_be_given_in_full_or_by_its_first_digits(bundle: Path) -> None:
    with ActionTokenizer.load(bundle) as tokenizer:
        fingerprint = tokenizer.fingerprint
    for expected in (fingerprint, fingerprint[:8]):
        ActionTokenizer.load(bundle, expect_fingerprint=expected).close()


@pytest.mark.parametrize("expected", ["0" * 64, "0" * 8])
def test_another_fingerprint_is_refused(expected: str, bundle: Path) -> None:
    with pytest.raises(
        FingerprintError, match=r"the bundle's fingerprint is .*load the bundle that belongs to the policy"
    ):
        ActionTokenizer.load(bundle, expect_fingerprint=expected)


def test_the_refusal_names_the_three_ways_with_their_commands(bundle: Path) -> None:
    with pytest.raises(FingerprintError) as caught:
        ActionTokenizer.load(bundle, expect_fingerprint="0" * 64)
    text = str(caught.value)
    for way, command in (
        ("(A) retrain the policy", "python runtime/tokenize_dataset.py "),
        ("(B) keep the policy and replace the decoder alone", "python export/build_engine.py --checkpoint "),
        ("(C) evaluate first", "python runtime/compat.py OLD NEW --data F"),
    ):
        assert text.index(way) < text.index(command)
    for script in re.findall(r"python (\S+\.py)", text):
        assert (Path(__file__).parents[2] / script).is_file(), script
    assert max(map(len, text.splitlines()[1:])) <= 120


@pytest.mark.parametrize("expected", [12345678, b"0" * 64, ["0" * 64]])
def test_a_fingerprint_that_is_no_text_is_refused(expected: Any, bundle: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"expect_fingerprint is a {type(expected).__name__}; expected a str"):
        ActionTokenizer.load(bundle, expect_fingerprint=expected)


def test_first_digits_that_are_too_few_are_refused_even_if_right(bundle: Path) -> None:
    with ActionTokenizer.load(bundle) as tokenizer:
        fingerprint = tokenizer.fingerprint
    with pytest.raises(InvalidInputError, match="of 7 characters; expected a str of 8 to 64 hexadecimal digits"):
        ActionTokenizer.load(bundle, expect_fingerprint=fingerprint[:7])


def test_a_bundle_of_worthless_tokens_is_loaded_with_a_warning(
    bundle_of: Callable[[Recipe], Path], caplog: pytest.LogCaptureFixture
) -> None:
    for error, is_warned in ((0.01, False), (0.1, False), (2.0, True)):
        caplog.clear()
        with ActionTokenizer.load(bundle_of(Recipe(error=error))):
            messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        found = [line for line in messages if "the tokens are" in line]
        assert len(found) == is_warned
        assert all("on held-out episodes of own.npz: the tokens are worthless" in line for line in found)


def test_what_the_tokens_are_worth_is_refused_where_it_is_that_of_another_model(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    quality = quality_of(manifest)
    check_manifest(replace(manifest, quality=quality), is_proven=False)
    for wrong in ({"unit": (1.0, 1.0, 1.0)}, {"rmse": (0.1,)}, {"steps": 0}):
        other = replace(quality, fidelity=replace(quality.fidelity, **wrong))
        with pytest.raises(BundleError, match="the quality is not that of this model"):
            check_manifest(replace(manifest, quality=other), is_proven=False)


def test_without_verification_wrong_answers_go_unnoticed(tmp_path: Path) -> None:
    deployed = deploy(Recipe(seed=0))
    deployed.exported = deploy(Recipe(seed=1)).reference
    folder = write_bundle(tmp_path / "bundle", deployed)
    with pytest.raises(SelfTestError):
        ActionTokenizer.load(folder)
    ActionTokenizer.load(folder, verify=False).close()


def test_a_closed_tokenizer_says_so(bundle: Path) -> None:
    tokenizer = ActionTokenizer.load(bundle)
    tokenizer.close()
    tokenizer.close()
    with pytest.raises(TokenizerError, match="was closed"):
        tokenizer.encode(random_actions(Recipe(), 1))
    with pytest.raises(TokenizerError, match="was closed"):
        tokenizer.decode(np.zeros((1, 2, 4, 3), np.int32))


@pytest.mark.parametrize("backend", ["c", "onnxruntime"])
def test_arrays_that_come_again_are_checked_for_what_was_changed_in_place(
    backend: str, bundle_of: Callable[[Recipe], Path]
) -> None:
    with ActionTokenizer.load(bundle_of(Recipe(c_targets=("x86-64",))), backend=backend) as tokenizer:
        actions = random_actions(Recipe(), 2)
        tokens, out = tokenizer.encode(actions), np.empty_like(actions)
        encoded = np.empty_like(tokens)
        for _ in range(3):
            tokenizer.decode_into(tokens, out)
            tokenizer.encode_into(actions, encoded)
        expected = tokenizer.decode(tokens)
        tokens[1, 0, 0, 0] = tokenizer.model.vocabulary
        with pytest.raises(InvalidInputError, match=r"tokens\[1, 0, 0, 0\] is"):
            tokenizer.decode_into(tokens, out)
        np.testing.assert_array_equal(out, expected)
        actions[0, 0, 0] = np.nan
        with pytest.raises(InvalidInputError, match=r"actions\[0, 0, 0\] is nan"):
            tokenizer.encode_into(actions, encoded)
        tokens[1, 0, 0, 0] = 0
        out.flags.writeable = False
        with pytest.raises(InvalidInputError, match="not writable"):
            tokenizer.decode_into(tokens, out)
        out.flags.writeable = True
        out.dtype = np.int32
        with pytest.raises(InvalidInputError, match="out is int32"):
            tokenizer.decode_into(tokens, out)
        out.dtype = np.float32
        tokens.shape = (1, 2 * tokens.shape[1], *tokens.shape[2:])
        with pytest.raises(InvalidInputError, match="tokens have shape"):
            tokenizer.decode_into(tokens, out)
        tokens.shape = encoded.shape
        tokenizer.decode_into(tokens, out)
    with pytest.raises(TokenizerError, match="closed"):
        tokenizer.decode_into(tokens, out)
