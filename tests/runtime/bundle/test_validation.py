"""Wrong arrays are refused by name and place before anything is written; odd but right ones work."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rfsq.rfsq_ref.quantizer import Conditioning, ResidualQuantizer
from rfsq.runtime import ActionTokenizer, InvalidInputError, UnbuiltPrefixError
from rfsq.runtime.bundle.validation import InputValidator, is_gpu_array, real_numbers
from tests.bundles import Recipe, random_actions
from tests.runtime.backends.gpu.fake_gpu import gpu

# The small bundle: A 3, D 4, L 3, K 5, T 2, prefixes 2 and 3.
ACTIONS = random_actions(Recipe(), 5)
TOKENS = np.random.default_rng(0).integers(0, 5, (5, 2, 4, 3), dtype=np.int32)
STATS = np.random.default_rng(0).random((5, 2, 3, 2), dtype=np.float32)


def changed(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (ACTIONS[0], r"actions have shape \[2, 3\]; expected \[B, T, A\] = \[B, 2, 3\]; for a single chunk pass"),
        (ACTIONS[..., None], r"actions have shape \[5, 2, 3, 1\]; expected \[B, T, A\] = \[B, 2, 3\]$"),
        (ACTIONS[None], r"actions have shape \[1, 5, 2, 3\]; expected"),
        (ACTIONS[:, :1], r"shape \[5, 1, 3\]; expected \[B, T, A\] = \[B, 2, 3\]"),
        (ACTIONS[..., :2], r"shape \[5, 2, 2\]; expected"),
        (np.float32(1), r"actions is a numpy.float32; expected a numpy.ndarray"),
        (
            ACTIONS.tolist(),
            r"actions is a builtins.list; expected a numpy.ndarray: pass np.asarray\(actions, np.float32\)",
        ),
        (None, "actions is a builtins.NoneType; expected a numpy.ndarray$"),
        (np.ma.masked_array(ACTIONS), "MaskedArray; expected a numpy.ndarray: what its mask hides is no value"),
        (ACTIONS.astype(np.float64), r"type float64; expected float32: convert with actions.astype\(np.float32\)"),
        (ACTIONS.astype(np.float16), "type float16; expected float32"),
        (ACTIONS.astype(int), "type int64; expected float32"),
        (ACTIONS.astype(object), "type object; expected float32"),
        (changed(ACTIONS, (3, 1, 2), np.nan), r"actions\[3, 1, 2\] is nan; expected finite numbers of at most"),
        (changed(ACTIONS, (0, 0, 1), np.inf), r"actions\[0, 0, 1\] is inf"),
        (changed(ACTIONS, (4, 1, 0), -np.inf), r"actions\[4, 1, 0\] is -inf"),
        (changed(ACTIONS, (2, 0, 0), -3e38), r"actions\[2, 0, 0\] is -3.*e\+38; expected .* overflows"),
    ],
)
def test_wrong_actions(actions: Any, message: str, tokenizer: ActionTokenizer) -> None:
    out = np.full((5, 2, 4, 3), 9, np.int32)
    with pytest.raises(InvalidInputError, match=message):
        tokenizer.encode(actions)
    with pytest.raises(InvalidInputError, match=message):
        tokenizer.encode_into(actions, out)
    assert (out == 9).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            TOKENS[0],
            r"tokens have shape \[2, 4, 3\]; expected \[B, T, D, l\] = \[B, 2, 4, l\]; for a single chunk pass",
        ),
        (TOKENS[None], r"shape \[1, 5, 2, 4, 3\]; expected"),
        (TOKENS[:, :1], r"shape \[5, 1, 4, 3\]; expected"),
        (TOKENS[..., None], r"shape \[5, 2, 4, 3, 1\]; expected"),
        (TOKENS[..., 0], r"shape \[5, 2, 4\]; expected"),
        (TOKENS[:, :, :3], r"shape \[5, 2, 3, 3\]; expected"),
        (
            TOKENS.astype(np.float32),
            "type float32; expected int32, int64 or uint8: a fraction is lost in conversion",
        ),
        (
            TOKENS.astype(bool),
            "type bool; expected int32, int64 or uint8: these are no plain numbers; make them anew as np.int32",
        ),
        (TOKENS.astype(np.int16), "type int16; expected int32"),
        (TOKENS.astype(np.uint64), "type uint64; expected int32"),
        (TOKENS.tolist(), "tokens is a builtins.list"),
        (changed(TOKENS, (3, 1, 2, 0), -1), r"tokens\[3, 1, 2, 0\] is -1; expected 0 \.\.\. 4, the 5 levels"),
        (changed(TOKENS, (0, 0, 0, 2), 5), r"tokens\[0, 0, 0, 2\] is 5; expected 0 \.\.\. 4"),
        (changed(TOKENS.astype(np.int64), (1, 0, 0, 0), 2**40), rf"tokens\[1, 0, 0, 0\] is {2**40}"),
        (changed(TOKENS.astype(np.int64), (1, 0, 0, 0), -(2**63)), rf"tokens\[1, 0, 0, 0\] is -{2**63}"),
        (changed(TOKENS.astype(np.uint8), (4, 1, 3, 1), 255), r"tokens\[4, 1, 3, 1\] is 255"),
    ],
)
def test_wrong_tokens(tokens: Any, message: str, tokenizer: ActionTokenizer) -> None:
    out = np.full((5, 2, 3), 9, np.float32)
    with pytest.raises(InvalidInputError, match=message):
        tokenizer.decode(tokens)
    with pytest.raises(InvalidInputError, match=message):
        tokenizer.decode_into(tokens, out)
    assert (out == 9).all()


class Exporting:
    """An array of another library that numpy understands."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return self.array.astype(dtype or self.array.dtype)


def advice(call: Callable[[Any], object], given: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        call(given)
    found = re.search(r": (?:pass|convert with) (.*)$", str(caught.value))
    return found[1] if found else ""


@pytest.mark.parametrize("name", ["actions", "tokens"])
@pytest.mark.parametrize(
    "make",
    [
        lambda array: array.tolist(),
        lambda array: tuple(array.tolist()),
        Exporting,
        lambda array: array.view(type("Subclass", (np.ndarray,), {})),
        torch.from_numpy,
        lambda array: torch.from_numpy(array).to(torch.bfloat16 if array.dtype == np.float32 else torch.int64),
        lambda array: torch.nn.Parameter(torch.from_numpy(array), requires_grad=array.dtype == np.float32),
        lambda array: array.astype(np.float64 if array.dtype == np.float32 else np.int16),
        lambda array: array.astype(np.float16 if array.dtype == np.float32 else np.uint64),
    ],
)
def test_what_a_message_advises_works(make: Callable[[np.ndarray], Any], name: str, tokenizer: ActionTokenizer) -> None:
    call, array = (tokenizer.encode, ACTIONS) if name == "actions" else (tokenizer.decode, TOKENS)
    given = make(array)
    repaired = eval(advice(call, given), {"np": np, name: given})  # noqa: S307  # a message of ours
    assert repaired.shape == array.shape
    np.testing.assert_allclose(repaired, array, rtol=0.01, atol=0.01)
    call(repaired)


@pytest.mark.parametrize(
    "make",
    [
        np.ma.masked_array,
        lambda array: array.astype(object),
        lambda array: array.astype(str),
        lambda array: array.astype(np.complex64),
        lambda array: array > 0,
        lambda _: None,
        lambda _: "tokens",
        lambda _: {},
    ],
)
@pytest.mark.parametrize("name", ["actions", "tokens"])
def test_no_conversion_is_advised_where_it_would_hide_what_is_wrong(
    make: Callable[[np.ndarray], Any], name: str, tokenizer: ActionTokenizer
) -> None:
    call, array = (tokenizer.encode, ACTIONS) if name == "actions" else (tokenizer.decode, TOKENS)
    assert advice(call, make(array)) == ""


def test_fractions_are_not_advised_to_become_tokens(tokenizer: ActionTokenizer) -> None:
    assert advice(tokenizer.decode, TOKENS + 0.5) == ""
    assert advice(tokenizer.decode, (TOKENS + 0.5).tolist()) == "np.asarray(tokens)"


@pytest.mark.parametrize(
    ("prefixes", "layers", "advice"),
    [
        ((2, 3), 1, "2 or 3: build the bundle with `--prefixes 1`"),
        ((1, 3), 2, "1 or 3: slice tokens[..., :l] to one of them, or build the bundle with `--prefixes 2`"),
        ((3,), 2, "3: build the bundle with `--prefixes 2`"),
    ],
)
def test_slicing_is_advised_where_there_is_enough_to_slice(
    prefixes: tuple[int, ...], layers: int, advice: str, tokenizer: ActionTokenizer
) -> None:
    validator = InputValidator(replace(tokenizer.model, prefixes=prefixes))
    with pytest.raises(UnbuiltPrefixError, match=f"this bundle decodes {re.escape(advice)}$"):
        validator.tokens(np.zeros((1, 2, 4, layers), np.int32))


def test_a_single_chunk_is_guessed_only_from_its_shape(tokenizer: ActionTokenizer) -> None:
    for call, chunk, other in (
        (tokenizer.encode, ACTIONS[0], ACTIONS[:, 0]),
        (tokenizer.decode, TOKENS[0], TOKENS[:, 0]),
    ):
        for array, is_guessed in ((chunk, True), (other, False)):
            with pytest.raises(InvalidInputError) as caught:
                call(array)
            assert ("for a single chunk pass" in str(caught.value)) == is_guessed


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_prefixes_that_were_not_built_are_refused_naming_those_that_were(
    layers: int, tokenizer: ActionTokenizer
) -> None:
    # What the model does not have cannot be built.
    cure = "build the bundle with `--prefixes 1`" if layers == 1 else "pass the first so many of the model's 3 layers"
    with pytest.raises(
        UnbuiltPrefixError, match=rf"tokens have {layers} layers .* this bundle decodes 2 or 3: .*{cure}"
    ):
        tokenizer.decode(np.zeros((1, 2, 4, layers), np.int32))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((5, 2, 4), np.float32), r"out is float32\[5, 2, 4\]; expected .*float32\[5, 2, 3\]: .*np.empty"),
        (np.empty((4, 2, 3), np.float32), r"out is float32\[4, 2, 3\]; expected .*float32\[5, 2, 3\]"),
        (np.empty((5, 2, 3)), r"out is float64\[5, 2, 3\]; expected .*float32"),
        (np.empty((5, 2, 3), ">f4"), r"out is >f4\[5, 2, 3\]; expected .*float32"),
        (np.empty((5, 2, 3), np.float32, order="F"), "out is not C-contiguous"),
        (np.empty((5, 2, 6), np.float32)[..., ::2], "out is not C-contiguous"),
        (np.frombuffer(bytes(121), np.uint8)[1:].view(np.float32).reshape(5, 2, 3), "out is not writable"),
        (np.zeros(121, np.uint8)[1:].view(np.float32).reshape(5, 2, 3), "out is not C-contiguous and aligned"),
        ([0.0], r"out is a builtins.list; .*: allocate it with np.empty\(\[5, 2, 3\], np.float32\)"),
    ],
)
def test_wrong_outputs(out: Any, message: str, tokenizer: ActionTokenizer) -> None:
    before = np.array(out).tobytes()
    with pytest.raises(InvalidInputError, match=message):
        tokenizer.decode_into(TOKENS, out)
    assert np.array(out).tobytes() == before


def test_outputs_that_overlap_inputs_are_refused(
    tokenizer: ActionTokenizer, dynamic_tokenizer: ActionTokenizer
) -> None:
    memory = np.zeros(1000, np.int32)
    tokens, out = memory[:120].reshape(5, 2, 4, 3), memory[100:130].view(np.float32).reshape(5, 2, 3)
    with pytest.raises(InvalidInputError, match="out overlaps the memory"):
        tokenizer.decode_into(tokens, out)
    actions = memory[:30].view(np.float32).reshape(5, 2, 3)
    with pytest.raises(InvalidInputError, match="out overlaps the memory"):
        tokenizer.encode_into(actions, tokens)
    stats = memory[110:170].view(np.float32).reshape(5, 2, 3, 2)
    with pytest.raises(InvalidInputError, match="stats_out overlaps the memory of an input or of another output"):
        dynamic_tokenizer.encode_into(ACTIONS, tokens, stats)
    stats[...] = 1
    with pytest.raises(InvalidInputError, match="out overlaps the memory"):
        dynamic_tokenizer.decode_into(TOKENS, stats.reshape(-1)[:30].reshape(5, 2, 3), stats)


# --- stats ------------------------------------------------------------------------------------------------------------


def test_dynamic_tokens_alone_are_refused_naming_what_to_do(dynamic_tokenizer: ActionTokenizer) -> None:
    out = np.full((5, 2, 3), 9, np.float32)
    for call in (dynamic_tokenizer.decode, lambda tokens: dynamic_tokenizer.decode_into(tokens, out)):
        with pytest.raises(InvalidInputError) as caught:
            call(TOKENS)
        assert "encode_with_stats" in str(caught.value)
        assert "python export/build_engine.py --conditioning calibrated" in str(caught.value)
        assert "--conditioning recovered" in str(caught.value)
    assert (out == 9).all()


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (STATS[:4], r"stats have shape \[4, 2, 3, 2\]; expected \[B, T, l, 2\] = \[5, 2, 3, 2\]"),
        (STATS[..., :2, :], r"stats have shape \[5, 2, 2, 2\]; expected .*slice tokens"),
        (STATS.astype(np.float64), "stats have type float64; expected float32"),
        (STATS.tolist(), "stats is a builtins.list"),
        (changed(STATS, (2, 1, 0, 1), np.nan), r"stats\[2, 1, 0, 1\] is nan; expected a sigma above 0 and at most 4"),
        (
            gpu(STATS.shape),
            r"FakeArray; expected a numpy.ndarray: copy it from the GPU, stats.get\(\) where it is CuPy",
        ),
        (changed(STATS, (0, 0, 2, 0), np.inf), r"stats\[0, 0, 2, 0\] is inf; expected a mean of at most ±4"),
        (changed(STATS, (4, 1, 1, 0), -4.5), r"stats\[4, 1, 1, 0\] is -4\.5; expected a mean"),
        (changed(STATS, (4, 1, 1, 1), 3e38), r"stats\[4, 1, 1, 1\] is 3.*e\+38; expected a sigma"),
        (changed(STATS, (0, 1, 1, 1), 0), r"stats\[0, 1, 1, 1\] is 0\.0; expected a sigma above 0"),
        (changed(STATS, (0, 1, 1, 1), -0.5), r"stats\[0, 1, 1, 1\] is -0\.5; expected a sigma above 0"),
    ],
)
def test_wrong_stats(stats: Any, message: str, dynamic_tokenizer: ActionTokenizer) -> None:
    with pytest.raises(InvalidInputError, match=message):
        dynamic_tokenizer.decode(TOKENS, stats)


@given(
    latents=hnp.arrays(
        np.float64, st.tuples(st.just(50), st.integers(2, 20)), elements=st.sampled_from([-1.0, -0.999, 0.0, 0.5, 1.0])
    ),
    num_levels=st.integers(2, 9),
)
def test_no_latents_give_stats_near_the_limit(latents: np.ndarray, num_levels: int) -> None:
    """The argument beside the limit, on the corners of tanh's range."""
    quantizer = ResidualQuantizer(8, num_levels, latents.shape[1], Conditioning.DYNAMIC).double()
    for layer in quantizer.layers(torch.from_numpy(latents)):
        assert layer.stats is not None
        mean, sigma = layer.stats.unbind(-1)
        assert mean.abs().max() <= 2
        assert sigma.min() > 0
        assert sigma.max() <= np.sqrt(2) + 2e-5


def test_stats_are_refused_where_tokens_decode_on_their_own(tokenizer: ActionTokenizer) -> None:
    with pytest.raises(InvalidInputError, match="stats were given, but tokens of a 'calibrated' bundle"):
        tokenizer.decode(TOKENS, STATS)
    with pytest.raises(InvalidInputError, match="a 'calibrated' bundle has no stats"):
        tokenizer.encode_with_stats(ACTIONS)
    with pytest.raises(InvalidInputError, match="a 'calibrated' bundle has no stats"):
        tokenizer.encode_into(ACTIONS, np.empty_like(TOKENS), np.empty_like(STATS))


@pytest.mark.parametrize("extreme", [(-4, 4), (4, np.nextafter(np.float32(0), np.float32(1)))])
def test_stats_up_to_the_limits_are_decoded(extreme: tuple[float, float], dynamic_tokenizer: ActionTokenizer) -> None:
    stats = np.broadcast_to(np.float32(extreme), STATS.shape)
    assert dynamic_tokenizer.decode(TOKENS, stats).shape == ACTIONS.shape


# --- on the CPU or on a GPU -------------------------------------------------------------------------------------------


def raising() -> tuple[int, int]:
    raise BufferError("it lies nowhere")


@pytest.mark.parametrize(
    ("value", "is_gpu"),
    [
        (gpu((1,)), True),
        (gpu((1,), device=3), True),
        (gpu((1,), device=None), True),
        (SimpleNamespace(__dlpack_device__=lambda: (2, 0)), True),
        (SimpleNamespace(__dlpack_device__=lambda: (1, 0)), False),
        (SimpleNamespace(__dlpack_device__=raising), False),
        (np.zeros(1), False),
        ([1.0], False),
        (None, False),
    ],
)
def test_whether_something_lies_on_a_gpu_is_what_it_says(value: object, is_gpu: bool) -> None:
    assert is_gpu_array(value) is is_gpu


# --- accepted ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Fortran": np.asfortranarray,
    "every second": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "backwards": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    "other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "unaligned": lambda array: (
        np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    ),
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_works(layout: str, tokenizer: ActionTokenizer, dynamic_tokenizer: ActionTokenizer) -> None:
    arrange = LAYOUTS[layout]
    plain = (lambda array: np.repeat(array[:1], len(array), axis=0)) if layout == "broadcast" else np.array
    np.testing.assert_array_equal(tokenizer.encode(arrange(ACTIONS)), tokenizer.encode(plain(ACTIONS)))
    for dtype in (np.int32, np.int64, np.uint8):
        np.testing.assert_array_equal(
            tokenizer.decode(arrange(TOKENS.astype(dtype))), tokenizer.decode(plain(TOKENS)), err_msg=str(dtype)
        )
    np.testing.assert_array_equal(
        dynamic_tokenizer.decode(arrange(TOKENS), arrange(STATS)), dynamic_tokenizer.decode(plain(TOKENS), plain(STATS))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backend_gets_contiguous_aligned_arrays_of_native_order(layout: str, tokenizer: ActionTokenizer) -> None:
    validator, arrange = InputValidator(tokenizer.model), LAYOUTS[layout]
    found = [validator.actions(arrange(ACTIONS))]
    found += [validator.tokens(arrange(TOKENS.astype(dtype))) for dtype in (np.int32, np.int64, np.uint8)]
    for array in found:
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.dtype in (np.dtype(np.float32), np.dtype(np.int32))
        assert array.dtype.isnative


def test_what_is_right_already_is_not_copied(dynamic_tokenizer: ActionTokenizer) -> None:
    validator = InputValidator(dynamic_tokenizer.model)
    assert validator.actions(ACTIONS) is ACTIONS
    assert validator.tokens(TOKENS) is TOKENS
    assert validator.stats(STATS, TOKENS) is STATS


def test_every_chunk_is_checked_unless_the_backend_does(tokenizer: ActionTokenizer) -> None:
    validator = InputValidator(tokenizer.model)
    with pytest.raises(InvalidInputError, match="is nan"):
        validator.actions(np.full((1, 2, 3), np.nan, np.float32))
    with pytest.raises(InvalidInputError, match="is 5"):
        validator.tokens(np.full((1, 2, 4, 3), 5, np.int32))


@pytest.mark.parametrize("batch", [4, 5, 6])
def test_values_are_left_to_the_backend_up_to_the_chunks_that_it_checks(batch: int, tokenizer: ActionTokenizer) -> None:
    validator = InputValidator(tokenizer.model)
    actions = np.full((batch, 2, 3), np.nan, np.float32)
    tokens = np.full((batch, 2, 4, 3), 5, np.int32)
    calls = [lambda: validator.actions(actions, unchecked=5), lambda: validator.tokens(tokens, unchecked=5)]
    for call in calls:
        with pytest.raises(InvalidInputError) if batch > 5 else contextlib.nullcontext():
            call()
    # Of other types the backend never sees them.
    for dtype in (np.int64, np.uint8):
        with pytest.raises(InvalidInputError, match="is 5; expected 0"):
            validator.tokens(tokens.astype(dtype), unchecked=5)


def test_an_output_is_apart_from_an_input_only_where_their_memory_is(tokenizer: ActionTokenizer) -> None:
    validator = InputValidator(tokenizer.model)
    owner = np.zeros((5, 2, 3), np.float32)
    shared = {"the very same": (owner, owner), "a view of it": (owner[:], owner), "seen by it": (owner, owner[:])}
    for out, source in shared.values():
        with pytest.raises(InvalidInputError, match="out overlaps the memory"):
            validator.output("out", out, np.float32, (5, 2, 3), source)
    for out, source in ((owner, ACTIONS.copy()), (owner[:], ACTIONS[:]), (owner, ACTIONS[:])):
        assert validator.output("out", out, np.float32, (5, 2, 3), source) is out


def test_inputs_are_never_changed(tokenizer: ActionTokenizer) -> None:
    actions, tokens = ACTIONS.copy(), TOKENS.copy()
    tokenizer.encode(actions)
    tokenizer.decode(tokens)
    np.testing.assert_array_equal(actions, ACTIONS)
    np.testing.assert_array_equal(tokens, TOKENS)


def test_actions_up_to_the_limit_are_encoded(tokenizer: ActionTokenizer) -> None:
    limit = np.float32(tokenizer.model.action_limit)
    for sign in (-1, 1):
        at_limit = np.full((1, 2, 3), sign * limit, np.float32)
        tokens = tokenizer.encode(at_limit)
        assert ((tokens >= 0) & (tokens < 5)).all()
        with pytest.raises(InvalidInputError, match=r"actions\[0, 1, 2\] is .*; expected finite numbers of at most"):
            tokenizer.encode(changed(at_limit, (0, 1, 2), sign * np.nextafter(limit, np.float32(np.inf))))


ANY_DTYPE = st.sampled_from([np.int8, np.int32, np.int64, np.uint8, np.uint32, np.float32, np.float64, np.bool_, ">i4"])


@given(hnp.arrays(ANY_DTYPE, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)))
def test_whatever_is_passed_it_decodes_or_is_refused(tokenizer: ActionTokenizer, array: np.ndarray) -> None:
    try:
        actions = tokenizer.decode(array)
    except InvalidInputError:
        return
    assert array.shape[1:3] == (2, 4)
    assert array.shape[3] in tokenizer.prefixes
    assert array.dtype.kind in "iu"
    assert array.min(initial=0) >= 0
    assert array.max(initial=0) < 5
    assert np.isfinite(actions).all()


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.just(2), st.just(3)), elements=st.floats(width=32)))
def test_whatever_the_numbers_actions_encode_or_are_refused(tokenizer: ActionTokenizer, actions: np.ndarray) -> None:
    legal = bool((np.abs(actions) <= tokenizer.model.action_limit).all())
    try:
        tokens = tokenizer.encode(actions)
    except InvalidInputError:
        assert not legal
    else:
        assert legal
        assert tokens.shape == (len(actions), 2, 4, 3)
        assert ((tokens >= 0) & (tokens < 5)).all()


# --- numbers that are no arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        2, 2.0, np.float16(2), np.int64(2), np.array(2.0), [1, 2.0], (1, 2.0), range(1, 3), np.array([1, 2], np.uint8),
        torch.tensor([1.0, 2.0]), [np.float32(1), np.array(2.0)], [[1, 2], [3, 4]], [],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_numbers_are_taken_in_every_form(value: Any) -> None:
    found = real_numbers("it", value, "numbers")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, np.asarray(value))


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (True, " of type bool"),
        ([True, 2.0], " of type bool"),
        ([2.0, np.True_], " of type bool"),
        ((1.0, np.array(False)), " of type bool"),
        (np.array([True, False]), " of type bool"),
        (torch.tensor([True]), " of type bool"),
        ("2", " of type <U1"),
        (["2", 1.0], " of type <U"),
        (1j, " of type complex128"),
        (None, " of type object"),
        ({"a": 1.0}, " of type object"),
        ({1.0}, " of type object"),
        (iter([1.0]), " of type object"),
        (10**400, " of type object"),
        (np.ma.masked_array([1.0], [1]), " of type float64"),
        ([[1.0], [1.0, 2.0]], ""),
        (torch.nn.Parameter(torch.ones(3)), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_are_no_numbers_is_refused_by_its_type(value: Any, read: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^it is a [\w.]+{re.escape(read)}.*; expected numbers$"):
        real_numbers("it", value, "numbers")


def test_what_a_signal_s_handler_raises_is_no_fault_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class AlarmError(Exception):
        """Of a handler."""

    def raise_alarm(*_: object) -> None:
        raise AlarmError

    for name in ("array", "asarray"):
        monkeypatch.setattr(np, name, raise_alarm)
    for value in (1.0, [1.0, 2.0], (1.0,)):
        with pytest.raises(AlarmError):
            real_numbers("it", value, "numbers")
