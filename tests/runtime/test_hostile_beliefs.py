"""What nobody should pass, and some will: an answer or a typed error, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, InvalidInputError
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.beliefs import SUM_TOLERANCE
from rfsq.runtime.bundle.models import ChunkModel
from tests.bundles import Recipe

LARGEST = np.finfo(np.float32).max


@pytest.fixture(scope="session", params=["c", "onnxruntime"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["steps", "chunks"])
def tokenizer(
    request: pytest.FixtureRequest, backend: str, bundle_of: Callable[[Recipe], Path], chunk_bundle: Path
) -> Iterator[ActionTokenizer]:
    is_chunk = request.param == "chunks"
    folder = chunk_bundle if is_chunk else bundle_of(Recipe(c_targets=host_targets()[:1]))
    with ActionTokenizer.load(folder, backend=backend) as opened:
        yield opened


def shape_of(tokenizer: ActionTokenizer, count: int) -> tuple[int, ...]:
    prefix = tokenizer.prefixes[-1]
    return (*tokenizer.model.tokens_shape(count, prefix), tokenizer.model.vocabulary)


def normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(tokenizer: ActionTokenizer, count: int) -> list[Any]:
    shape = tokenizer.model.actions_shape(count)
    return [np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(count, np.float32)]


def test_sums_at_the_very_limit_are_decoded_or_refused_as_input(tokenizer: ActionTokenizer) -> None:
    """The runtime and a backend sum in another order: what one takes, the other may not call a fault of its own."""
    random, shape, taken = np.random.default_rng(0), shape_of(tokenizer, 1), set()
    out = outputs(tokenizer, 1)
    for step in range(100):
        shares = random.random(shape) + 0.01
        wanted = 1 + (-1) ** step * SUM_TOLERANCE + random.integers(-4, 5, shape[:-1]) * 2.0**-24
        shares *= (wanted / shares.sum(-1))[..., None]
        for decode in (
            lambda given: tokenizer.decode_probabilities(given),
            lambda given: tokenizer.decode_probabilities_into(given, *out),
        ):
            try:
                decode(shares.astype(np.float32))
                refused = ""
            except InvalidInputError as error:
                refused = str(error)
            taken.add(refused.partition("; ")[2])
    said = (
        "expected a distribution, whose sum is 1 within 0.00390625: pass what softmax gave, or logits to decode_logits"
    )
    assert {said} <= taken <= {said, ""}


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("size", [LARGEST, 1e30, 1e-40])
def test_logits_of_any_size_decode_at_any_temperature(
    tokenizer: ActionTokenizer, temperature: float, size: float
) -> None:
    signs = np.sign(normal(shape_of(tokenizer, 2)))
    belief = tokenizer.decode_logits((signs * np.float32(size)).astype(np.float32), temperature=temperature)
    # What float64 makes of them.
    powers = signs * np.float64(np.float32(size)) / temperature
    powers = np.exp(np.maximum(powers - powers.max(-1, keepdims=True), -1e4))
    expected = tokenizer.decode_probabilities((powers / powers.sum(-1, keepdims=True)).astype(np.float32))
    np.testing.assert_allclose(belief.actions, expected.actions, atol=2e-5)
    np.testing.assert_allclose(belief.std, expected.std, rtol=1e-3, atol=1e-6)


def test_one_word_that_is_left_is_certain_however_unlikely(tokenizer: ActionTokenizer) -> None:
    shape = shape_of(tokenizer, 3)
    tokens = np.random.default_rng(0).integers(shape[-1], size=shape[:-1], dtype=np.int32)
    for logit in (-LARGEST, -1e-45, 0.0, LARGEST):
        logits = np.where(tokens[..., None] == np.arange(shape[-1]), np.float32(logit), np.float32(-np.inf))
        belief = tokenizer.decode_logits(logits.astype(np.float32))
        assert belief.actions.tobytes() == tokenizer.decode(tokens).tobytes()
        assert not belief.std.any()


def test_zeros_have_no_sign(tokenizer: ActionTokenizer) -> None:
    shape = shape_of(tokenizer, 2)
    shares = np.where(np.arange(shape[-1]) == 1, np.float32(1), np.float32(-0.0)) * np.ones(shape, np.float32)
    out = outputs(tokenizer, 2)
    tokenizer.decode_probabilities_into(shares, *out)
    np.testing.assert_array_equal(out[0], tokenizer.decode_probabilities(np.abs(shares)).actions)


def test_arrays_of_any_layout_give_the_same(tokenizer: ActionTokenizer) -> None:
    logits = normal(shape_of(tokenizer, 2))
    memory = np.ndarray(logits.shape, np.float32, buffer=bytearray(logits.nbytes + 1), offset=1)
    memory[...] = logits
    locked = logits.copy()
    locked.setflags(write=False)
    expected = tokenizer.decode_logits(logits)
    for given in (
        memory, locked, np.asfortranarray(logits), logits.astype(">f4"), np.repeat(logits, 2, -1)[..., ::2],
        logits[..., ::-1][..., ::-1],
    ):  # fmt: skip
        found = tokenizer.decode_logits(given)
        np.testing.assert_array_equal(found.actions, expected.actions)
        np.testing.assert_array_equal(found.std, expected.std)
        out = outputs(tokenizer, 2)
        for _ in range(3):
            tokenizer.decode_logits_into(given, *out)
            np.testing.assert_array_equal(out[0], expected.actions)
            out[0][...] = 0


OTHERS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda logits: logits.astype(np.float64),
    "float16": lambda logits: logits.astype(np.float16),
    "integers": lambda logits: logits.astype(np.int32),
    "truth values": lambda logits: logits > 0,
    "objects": lambda logits: logits.astype(object),
    "a list": lambda logits: logits.tolist(),
    "a masked array": lambda logits: np.ma.masked_array(logits, logits > 2),
    "a subclass": lambda logits: logits.view(np.recarray),
    "bytes": lambda logits: logits.tobytes(),
    "one number": lambda logits: logits.flat[0],
    "nothing": lambda _: None,
    "a tuple of one": lambda logits: (logits,),
    "a tuple of two": lambda logits: (logits, logits),
    "one axis more": lambda logits: logits[None],
    "one chunk": lambda logits: logits[0],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_array_of_float32_is_refused_and_nothing_is_written(tokenizer: ActionTokenizer, name: str) -> None:
    given, out = OTHERS[name](normal(shape_of(tokenizer, 2))), outputs(tokenizer, 2)
    with pytest.raises(InvalidInputError, match="expected"):
        tokenizer.decode_logits(given)
    with pytest.raises(InvalidInputError, match="expected"):
        tokenizer.decode_logits(given, mode="sample", seed=0)
    with pytest.raises(InvalidInputError, match="expected"):
        tokenizer.decode_logits_into(given, *out)
    assert not any(array.any() for array in out)


def test_what_changes_between_two_calls_is_seen(tokenizer: ActionTokenizer) -> None:
    logits, out = normal(shape_of(tokenizer, 1)), outputs(tokenizer, 1)
    for place in range(3):
        for _ in range(3):
            tokenizer.decode_logits_into(logits, *out)
        out[place].setflags(write=False)
        with pytest.raises(InvalidInputError, match="is not writable"):
            tokenizer.decode_logits_into(logits, *out)
        out[place].setflags(write=True)
    tokenizer.decode_logits_into(logits, *out)
    logits.flat[-1] = np.nan
    with pytest.raises(InvalidInputError, match="is nan"):
        tokenizer.decode_logits_into(logits, *out)
    logits.flat[-1] = 0
    shared = logits.reshape(-1)[: out[1].size].reshape(out[1].shape)
    with pytest.raises(InvalidInputError, match="std_out overlaps the memory of an input"):
        tokenizer.decode_logits_into(logits, out[0], shared, out[2])
    with pytest.raises(InvalidInputError, match=r"probabilities.* is -.*; expected a probability"):
        tokenizer.decode_probabilities_into(logits, *out)


@pytest.mark.parametrize("mode", ["expected", "likeliest mode", "sample"])
def test_no_chunks_are_no_beliefs_in_any_way(tokenizer: ActionTokenizer, mode: Any) -> None:
    given: list[Any] = [np.zeros(shape_of(tokenizer, 0), np.float32)]
    if isinstance(tokenizer.model, ChunkModel):
        given.append((np.zeros((0, 6), np.float32), np.zeros((0, 5), np.float32)))
    for part in given:
        for options in ({}, {"temperature": 2.0}):
            for decode in (tokenizer.decode_logits, tokenizer.decode_probabilities):
                assert decode(part, mode=mode, **options).actions.shape == tokenizer.model.actions_shape(0)
        if mode != "sample":
            tokenizer.decode_logits_into(part, *outputs(tokenizer, 0), mode=mode)


def test_threads_with_arrays_of_their_own_do_not_meet(tokenizer: ActionTokenizer) -> None:
    given = [normal(shape_of(tokenizer, 1), seed) for seed in range(8)]
    expected = [tokenizer.decode_logits(logits) for logits in given]

    def decode(place: int) -> bool:
        out = outputs(tokenizer, 1)
        for _ in range(50):
            tokenizer.decode_logits_into(given[place], *out)
            if not (out[0] == expected[place].actions).all() or not (out[1] == expected[place].std).all():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(decode, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_generated_c_decodes_in_a_child_as_in_its_parent(
    bundle_of: Callable[[Recipe], Path],
) -> None:
    with ActionTokenizer.load(bundle_of(Recipe(c_targets=host_targets()[:1])), backend="c") as tokenizer:
        logits, out = normal(shape_of(tokenizer, 1)), outputs(tokenizer, 1)
        tokenizer.decode_logits_into(logits, *out)
        child = os.fork()
        if not child:
            again = outputs(tokenizer, 1)
            tokenizer.decode_logits_into(logits, *again)
            os._exit(0 if (again[0] == out[0]).all() else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_tokenizer_that_decoded_beliefs_is_freed_at_once(bundle: Path) -> None:
    tokenizer = ActionTokenizer.load(bundle, backend="onnxruntime")
    tokenizer.decode_logits(normal(shape_of(tokenizer, 1)), mode="sample")
    # As in a control loop, which waits for no collector.
    gc.disable()
    try:
        seen = weakref.ref(tokenizer)
        del tokenizer
        assert seen() is None
    finally:
        gc.enable()
