"""Ten million control steps, in one call and streamed in batches: right, and without using memory up."""

import gc

import numpy as np
import torch

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.gpu.driver import free_memory, synchronize_device
from tests.gpu.test_arrays import random_actions

STEPS = 10_000_000


def test_ten_million_steps_go_through_in_one_call(tokenizer: ActionTokenizer) -> None:
    chunk_length = tokenizer.model.chunk_length
    part = random_actions(tokenizer, 1000)
    actions = np.tile(part, (STEPS // chunk_length // len(part), 1, 1))
    assert actions.shape[0] * chunk_length == STEPS
    tokenizer.encode(actions[:4000])
    before = free_memory()
    tokens = tokenizer.encode(actions)
    # Every thousand chunks are the same ones, so they have the same tokens, wherever a slice begins.
    repeated = tokens.reshape(-1, len(part), *tokens.shape[1:])
    assert (repeated == repeated[0]).all()
    assert (repeated[0] == tokenizer.encode(part)).all()
    decoded = tokenizer.decode(tokens).reshape(-1, *part.shape)
    assert np.isfinite(decoded).all()
    assert (decoded == decoded[0]).all()
    assert before - free_memory() < 2**26


def test_ten_million_steps_streamed_on_the_gpu_leave_its_memory_as_it_was(tokenizer: ActionTokenizer) -> None:
    batch = 4096
    actions = torch.from_numpy(random_actions(tokenizer, batch)).cuda()
    tokens = torch.empty((batch, *tokenizer.encode(random_actions(tokenizer, 1)).shape[1:]), dtype=torch.int32).cuda()
    decoded = torch.empty_like(actions)
    tokenizer.encode_into(actions, tokens)
    tokenizer.decode_into(tokens, decoded)
    synchronize_device()
    first = decoded.clone()
    gc.collect()
    before = free_memory()
    for _ in range(-(-STEPS // (batch * tokenizer.model.chunk_length))):
        tokenizer.encode_into(actions, tokens)
        tokenizer.decode_into(tokens, decoded)
    synchronize_device()
    assert free_memory() == before
    assert torch.equal(decoded, first)


def test_the_same_input_gives_the_same_bits_at_every_call(tokenizer: ActionTokenizer) -> None:
    """A library that changed kernels in the middle of a run would change the last bits of an action."""
    tokens = tokenizer.encode(random_actions(tokenizer, 1))
    first = tokenizer.decode(tokens)
    for _ in range(2000):
        assert np.array_equal(tokenizer.decode(tokens), first)
