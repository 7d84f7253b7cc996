"""Tokens of one byte, through kernels of their own: the same levels, the same bits, and marks of their own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import InvalidInputError
from tests.gpu.conftest import TENSORRT
from tests.gpu.test_arrays import random_actions

#: Chunks of 8 steps. Up to 1,024 a block takes each step; beyond, warps take 32 each, the last of them 8, 16 or 24.
BATCHES = (1, 3, 1024, 1025, 1026, 1027, 5000)


@pytest.fixture(scope="module")
def cuda(bundle_path: Path) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(bundle_path, backend="cuda") as opened:
        yield opened


def encoded(tokenizer: ActionTokenizer, actions: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    model = tokenizer.model
    shape = (len(actions), model.chunk_length, model.latent_dim, model.num_layers)
    # Guarded, so that a kernel that writes beyond its tokens is seen.
    room = torch.full((2, *shape), 77, dtype=dtype, device="cuda")
    tokenizer.encode_into(torch.from_numpy(actions).cuda(), room[0])
    assert (room[1] == 77).all()
    return room[0].cpu().numpy()


def decoded(tokenizer: ActionTokenizer, tokens: np.ndarray) -> np.ndarray:
    model = tokenizer.model
    room = torch.full((2, len(tokens), model.chunk_length, model.action_dim), 77.0, device="cuda")
    tokenizer.decode_into(torch.from_numpy(np.ascontiguousarray(tokens)).cuda(), room[0])
    assert (room[1] == 77).all()
    return room[0].cpu().numpy()


def random_tokens(tokenizer: ActionTokenizer, batch: int, layers: int) -> np.ndarray:
    model = tokenizer.model
    shape = (batch, model.chunk_length, model.latent_dim, layers)
    return np.random.default_rng(batch).integers(model.num_levels, size=shape, dtype=np.int32)


@pytest.mark.parametrize("batch", BATCHES)
def test_bytes_are_the_tokens_that_numpy_arrays_get(cuda: ActionTokenizer, batch: int) -> None:
    actions = random_actions(cuda, batch, seed=batch)
    as_bytes = encoded(cuda, actions, torch.uint8)
    assert as_bytes.dtype == np.uint8
    assert (as_bytes == encoded(cuda, actions, torch.int32)).all()
    assert (as_bytes == cuda.encode(actions)).all()


@pytest.mark.parametrize("batch", BATCHES)
def test_bytes_decode_to_the_same_bits(cuda: ActionTokenizer, batch: int) -> None:
    for layers in cuda.prefixes:
        tokens = random_tokens(cuda, batch, layers)
        expected = decoded(cuda, tokens)
        assert np.isfinite(expected).all()
        assert np.array_equal(decoded(cuda, tokens.astype(np.uint8)), expected)
        assert np.array_equal(cuda.decode(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_chunk_has_the_same_bits_in_every_batch(cuda: ActionTokenizer, dtype: torch.dtype) -> None:
    """Both ways through the kernels: a step for a block, a step for a thread."""
    actions = random_actions(cuda, 3000)
    together = encoded(cuda, actions, dtype)
    apart = np.concatenate([encoded(cuda, actions[start : start + 500], dtype) for start in range(0, 3000, 500)])
    assert (together == apart).all()
    for layers in cuda.prefixes:
        tokens = random_tokens(cuda, 3000, layers).astype(together.dtype)
        parts = [decoded(cuda, tokens[start : start + 500]) for start in range(0, 3000, 500)]
        assert np.array_equal(decoded(cuda, tokens), np.concatenate(parts))


@pytest.mark.parametrize("batch", [4, 2001])
@pytest.mark.parametrize("level", [7, 8, 64, 127, 128, 200, 255])
def test_a_byte_that_is_no_level_makes_its_step_nan_and_no_other(cuda: ActionTokenizer, batch: int, level: int) -> None:
    for layers in cuda.prefixes:
        tokens = random_tokens(cuda, batch, layers).astype(np.uint8)
        expected = decoded(cuda, tokens)
        places = [(0, 0, 0, 0), (2, 5, 3, layers - 1), (batch - 1, 7, 15, layers - 1)]
        for place in places:
            tokens[place] = level
            expected[place[:2]] = np.nan
        assert np.array_equal(decoded(cuda, tokens), expected, equal_nan=True)


@pytest.mark.parametrize("batch", [4, 2001])
@pytest.mark.parametrize("level", [7, 128, 255, 256, 2**16, 2**31 - 1, -1, -256, -(2**31)])
def test_so_does_an_int_that_is_none_in_large_batches(cuda: ActionTokenizer, batch: int, level: int) -> None:
    """Tokens pass as bytes there too: what would look like a level once it is cut to a byte must not pass."""
    for layers in cuda.prefixes:
        tokens = random_tokens(cuda, batch, layers)
        expected = decoded(cuda, tokens)
        tokens[batch // 2, 3, 7, 1] = level
        expected[batch // 2, 3] = np.nan
        assert np.array_equal(decoded(cuda, tokens), expected, equal_nan=True)


@pytest.mark.parametrize("batch", [4, 2001])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_an_action_that_no_encoder_takes_becomes_255(cuda: ActionTokenizer, batch: int, value: float) -> None:
    actions = random_actions(cuda, batch)
    actions[batch // 2, 3, 6] = value
    for dtype, mark in ((torch.uint8, 255), (torch.int32, -1)):
        tokens = encoded(cuda, actions, dtype)
        is_marked = (tokens == mark).all((2, 3))
        assert is_marked[batch // 2, 3]
        assert is_marked.sum() == 1
        assert (tokens[~is_marked] < cuda.model.num_levels).all()
        # And what is marked decodes to no action.
        assert np.isnan(decoded(cuda, tokens)[batch // 2, 3]).all()


def test_a_bound_call_takes_bytes(cuda: ActionTokenizer) -> None:
    actions = random_actions(cuda, 2)
    tokens = torch.zeros(cuda.encode(actions).shape, dtype=torch.uint8, device="cuda")
    out = torch.empty(actions.shape, device="cuda")
    encode = cuda.bind_encode(torch.from_numpy(actions).cuda(), tokens)
    decode = cuda.bind_decode(tokens, out)
    encode()
    decode()
    torch.cuda.synchronize()
    assert (tokens.cpu().numpy() == cuda.encode(actions)).all()
    assert np.array_equal(out.cpu().numpy(), cuda.decode(cuda.encode(actions)))
    encode.close()
    decode.close()


def test_bytes_at_an_odd_address_are_refused(cuda: ActionTokenizer) -> None:
    tokens = torch.from_numpy(cuda.encode(random_actions(cuda, 1))).to(torch.uint8).cuda()
    shifted = torch.cat((tokens.new_zeros(1), tokens.flatten()))[1:].view(tokens.shape)
    with pytest.raises(InvalidInputError, match="multiple of 16"):
        cuda.decode(shifted)


def test_the_gates_judge_these_kernels_too(bundle_path: Path) -> None:
    from rfsq.runtime.bundle.folder import open_bundle

    proven = {entry.gate for entry in open_bundle(bundle_path).manifest.parity if entry.backend == "cuda"}
    assert proven >= {"encode: wrong tokens", "uint8 tokens, encode: wrong tokens"}
    assert {"decode 8 layers: action error", "uint8 tokens, decode 8 layers: action error"} <= proven
    # Gates judge no more steps at once than the kernels for few take.
    assert {"many steps, encode: wrong tokens", "uint8 tokens, many steps, decode 8 layers: action error"} <= proven


@pytest.mark.parametrize("backend", [*TENSORRT, "onnxruntime-cuda"])
def test_the_other_engines_say_that_they_take_none(bundle_path: Path, backend: str) -> None:
    with ActionTokenizer.load(bundle_path, backend=backend) as tokenizer:
        tokens = torch.from_numpy(tokenizer.encode(random_actions(tokenizer, 1))).to(torch.uint8).cuda()
        with pytest.raises(InvalidInputError, match="type uint8; expected int32"):
            tokenizer.decode(tokens)
