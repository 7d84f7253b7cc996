"""Arrays that lie on the GPU are used where they lie, in the order of the caller's stream, and nothing is copied."""

import gc
import importlib
import tracemalloc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.gpu.driver import free_memory, synchronize_device

BATCHES = (1, 2, 7, 300)


def cupy() -> ModuleType:
    """Only where there is a GPU is it installed."""
    return importlib.import_module("cupy")


def random_actions(tokenizer: ActionTokenizer, batch: int, seed: int = 0) -> np.ndarray:
    model = tokenizer.model
    shape = (batch, model.chunk_length, model.action_dim)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


class OnlyDlpack:
    """An array of a library that speaks DLPack alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


TO_GPU: dict[str, Callable[[np.ndarray], Any]] = {
    "torch": lambda array: torch.from_numpy(array).cuda(),
    "cupy": lambda array: cupy().asarray(array),
    "dlpack": lambda array: OnlyDlpack(torch.from_numpy(array).cuda()),
}


def to_host(array: Any) -> np.ndarray:
    synchronize_device()
    if isinstance(array, OnlyDlpack):
        return array.tensor.cpu().numpy()
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else cupy().asnumpy(array)


@pytest.mark.parametrize("library", TO_GPU)
@pytest.mark.parametrize("batch", BATCHES)
def test_arrays_of_every_library_give_what_numpy_arrays_give(
    tokenizer: ActionTokenizer, library: str, batch: int
) -> None:
    to_gpu = TO_GPU[library]
    actions = random_actions(tokenizer, batch)
    expected = tokenizer.encode(actions)
    tokens = to_gpu(np.full_like(expected, -7))
    torch.cuda.synchronize()
    tokenizer.encode_into(to_gpu(actions), tokens)
    assert (to_host(tokens) == expected).all()
    for prefix in tokenizer.prefixes:
        part = np.ascontiguousarray(expected[..., :prefix])
        decoded = to_gpu(np.full_like(actions, np.nan))
        tokenizer.decode_into(to_gpu(part), decoded)
        assert np.array_equal(to_host(decoded), tokenizer.decode(part))


def test_results_are_taken_without_a_copy_by_torch_and_cupy(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(tokenizer, 3)
    tokens = tokenizer.encode(torch.from_numpy(actions).cuda())
    as_torch = torch.as_tensor(tokens, device="cuda")
    assert as_torch.data_ptr() == tokens.__cuda_array_interface__["data"][0]
    assert (as_torch.cpu().numpy() == tokenizer.encode(actions)).all()
    decoded = cupy().asarray(tokenizer.decode(as_torch))
    assert np.array_equal(cupy().asnumpy(decoded), tokenizer.decode(tokenizer.encode(actions)))
    # The memory lives as long as whoever took it.
    del tokens, decoded
    gc.collect()
    assert (as_torch.cpu().numpy() == tokenizer.encode(actions)).all()


def test_a_batch_beyond_the_engine_goes_through_in_parts(
    tokenizer: ActionTokenizer, cpu_tokenizer: ActionTokenizer
) -> None:
    actions = random_actions(tokenizer, 4096 * 2 + 3)
    expected = tokenizer.encode(actions)
    on_gpu = torch.as_tensor(tokenizer.encode(torch.from_numpy(actions).cuda()), device="cuda")
    assert (on_gpu.cpu().numpy() == expected).all()
    decoded = tokenizer.decode(expected)
    assert np.abs(decoded - cpu_tokenizer.decode(expected)).max() < 1e-5
    assert np.array_equal(torch.as_tensor(tokenizer.decode(on_gpu), device="cuda").cpu().numpy(), decoded)


def test_work_is_done_in_the_order_of_the_callers_stream(tokenizer: ActionTokenizer) -> None:
    """The tokens are still being made when the call comes; on any other stream it would read what was there before."""
    actions = random_actions(tokenizer, 64)
    expected_tokens, stream = tokenizer.encode(actions), torch.cuda.Stream()
    ready = torch.from_numpy(expected_tokens).cuda()
    tokens, decoded = torch.zeros_like(ready), torch.empty(actions.shape, device="cuda")
    bound = tokenizer.bind_decode(tokens, decoded, stream=stream)
    expected = tokenizer.decode(expected_tokens)
    busy = torch.randn(4096, 4096, device="cuda")
    for call in (lambda: tokenizer.decode_into(tokens, decoded, stream=stream), bound):
        tokens.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):
                torch.matmul(busy, busy)
            tokens.copy_(ready)
            call()
            taken = decoded.clone()
        stream.synchronize()
        assert np.array_equal(taken.cpu().numpy(), expected)


def test_a_bound_call_follows_its_arrays_and_keeps_them_alive(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(tokenizer, 1)
    tokens = torch.zeros(tokenizer.encode(actions).shape, dtype=torch.int32, device="cuda")
    decoded = torch.empty(actions.shape, device="cuda")
    encode = tokenizer.bind_encode(torch.from_numpy(actions).cuda(), tokens)
    decode = tokenizer.bind_decode(tokens, decoded)
    for seed in range(3):
        other = random_actions(tokenizer, 1, seed)
        tokens.copy_(torch.from_numpy(tokenizer.encode(other)))
        decode()
        torch.cuda.synchronize()
        assert np.array_equal(decoded.cpu().numpy(), tokenizer.decode(tokenizer.encode(other)))
    # Nobody but the call knows the actions' memory any more.
    gc.collect()
    torch.cuda.empty_cache()
    filler = [torch.full((1, 8, 7), 9.0, device="cuda") for _ in range(100)]
    encode()
    torch.cuda.synchronize()
    assert (tokens.cpu().numpy() == tokenizer.encode(actions)).all()
    del filler
    encode.close()
    decode.close()
    encode.close()


def test_after_warmup_a_call_allocates_nothing(tokenizer: ActionTokenizer) -> None:
    tokenizer.warmup()
    actions = random_actions(tokenizer, 1)
    tokens, decoded = tokenizer.encode(actions), np.empty_like(actions)
    gpu_tokens, gpu_decoded = torch.from_numpy(tokens).cuda(), torch.empty(actions.shape, device="cuda")
    bound = tokenizer.bind_decode(gpu_tokens, gpu_decoded)

    def calls(count: int) -> None:
        for _ in range(count):
            tokenizer.encode_into(actions, tokens)
            tokenizer.decode_into(tokens, decoded)
            bound()
        synchronize_device()

    calls(10)
    tracemalloc.start()
    calls(10)
    gc.collect()
    host, gpu = tracemalloc.get_traced_memory()[0], free_memory()
    calls(1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - host
    tracemalloc.stop()
    assert grown < 2048
    assert free_memory() == gpu


@pytest.mark.parametrize("level", [-1, 7, 2**31 - 1, -(2**31)])
def test_a_token_that_is_no_level_makes_its_step_nan_and_no_other(tokenizer: ActionTokenizer, level: int) -> None:
    """The host does not read tokens on the GPU; what is illegal must not move a robot all the same."""
    tokens = tokenizer.encode(random_actions(tokenizer, 4))
    expected = tokenizer.decode(tokens)
    for prefix in tokenizer.prefixes:
        spoiled = np.ascontiguousarray(tokens[..., :prefix])
        spoiled[2, 5, 3, prefix - 1] = level
        decoded = torch.as_tensor(tokenizer.decode(torch.from_numpy(spoiled).cuda()), device="cuda").cpu().numpy()
        is_nan = np.isnan(decoded)
        assert is_nan[2, 5].all()
        assert is_nan.sum() == tokenizer.model.action_dim
        if prefix == tokenizer.prefixes[-1]:
            assert np.array_equal(decoded[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_not_finite_makes_the_tokens_of_its_step_minus_one(
    tokenizer: ActionTokenizer, value: float
) -> None:
    actions = random_actions(tokenizer, 4)
    expected = tokenizer.encode(actions)
    actions[1, 6, 2] = value
    tokens = torch.as_tensor(tokenizer.encode(torch.from_numpy(actions).cuda()), device="cuda").cpu().numpy()
    assert (tokens[1, 6] == -1).all()
    others = np.ones(tokens.shape[:2], bool)
    others[1, 6] = False
    assert (tokens[others] == expected[others]).all()
