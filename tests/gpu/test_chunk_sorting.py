"""Chunks that CUDA sorts by class before it decodes them have the bits that each has alone, on this GPU.

What the engines answer is judged in `test_chunk_tokens.py`; here kernels are held to each other, with models of random
numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.cuda import FEW_CHUNKS
from rfsq.runtime.backends.gpu.driver import open_device
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.manifest import CHUNKS_OF_BLOCK, CHUNKS_OF_WINDOW, CUDA_SOURCE, sorter_name
from rfsq.runtime.bundle.models import ChunkModel
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.gpu.test_chunk_tokens import decoded_on_gpu, random_tokens

#: Much like the default; values that are no whole groups of four, with most classes; and a basis that no block holds.
RECIPES = {
    "usual": ChunkRecipe(sizes=ChunkSizes(7, 8, num_classes=64, token_bits=10, num_tokens=36), seed=26),
    "odd": ChunkRecipe(sizes=ChunkSizes(5, 3, num_classes=256, token_bits=9, num_tokens=12), seed=10),
    "wide": ChunkRecipe(sizes=ChunkSizes(14, 8, num_classes=9, token_bits=12, num_tokens=50), seed=11),
}
#: So many chunks a decoder takes one by one; of more, so many are sorted together, and these share a block.
FEW, WINDOW, TILE = FEW_CHUNKS["decoder"], CHUNKS_OF_WINDOW, CHUNKS_OF_BLOCK["decoder"]
#: Windows that are full, nearly full and nearly empty, and tiles of each of these.
MANY = (FEW + 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + TILE, 3 * WINDOW + TILE - 1, 100_003)


@pytest.fixture(scope="module", params=RECIPES)
def cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActionTokenizer]:
    recipe = replace(RECIPES[request.param], compute_capability=open_device().compute_capability)
    folder = write_chunk_bundle(tmp_path_factory.mktemp("sorted") / "bundle", recipe)
    with ActionTokenizer.load(folder, backend="cuda") as opened:
        source = open_bundle(folder).content(CUDA_SOURCE).decode()
        assert f" {sorter_name(opened.model.depth, 'uint16')}(" in source, "these sizes are not sorted"
        yield opened


def one_by_one(tokenizer: ActionTokenizer, tokens: np.ndarray) -> np.ndarray:
    """Decoded in batches so small that each chunk has a block of its own."""
    return np.concatenate([decoded_on_gpu(tokenizer, part) for part in np.array_split(tokens, len(tokens) // FEW + 1)])


def of_classes(tokenizer: ActionTokenizer, classes: np.ndarray) -> np.ndarray:
    """Random tokens of these; the last class means escape."""
    model = tokenizer.model
    assert isinstance(model, ChunkModel)
    tokens = random_tokens(tokenizer, len(classes), model.depth)
    room = model.vocabulary >> (model.num_classes - 1).bit_length()
    tokens[:, 0] = classes * room + tokens[:, 0] % room
    return tokens


@pytest.mark.parametrize("batch", [FEW, *MANY])
def test_chunks_that_are_sorted_have_the_bits_that_each_has_alone(cuda: ActionTokenizer, batch: int) -> None:
    for length in (1, 9, cuda.model.depth):
        tokens = random_tokens(cuda, batch, length)
        expected = one_by_one(cuda, tokens)
        assert np.array_equal(decoded_on_gpu(cuda, tokens), expected)
        assert np.array_equal(decoded_on_gpu(cuda, tokens.astype(np.uint16)), expected)


CLASSES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "the first": lambda chunks, _: 0 * chunks,
    "one": lambda chunks, escape: 0 * chunks + escape // 2,
    "escape": lambda chunks, escape: 0 * chunks + escape,
    "another for every chunk": lambda chunks, escape: chunks % (escape + 1),
    "one of another class": lambda chunks, escape: np.where(chunks == WINDOW - 1, 5, escape - 1),
    "a tile and one of each": lambda chunks, escape: chunks // (TILE + 1) % (escape + 1),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_chunks_of_any_classes_have_the_bits_that_each_has_alone(cuda: ActionTokenizer, kind: str) -> None:
    assert isinstance(cuda.model, ChunkModel)
    classes = CLASSES[kind](np.arange(2 * WINDOW + 1), cuda.model.num_classes - 1)
    tokens = of_classes(cuda, classes)
    assert np.array_equal(decoded_on_gpu(cuda, tokens), one_by_one(cuda, tokens))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_chunks_are_marked_on_both_sides_of_the_end_of_a_window_and_no_other(cuda: ActionTokenizer, dtype: Any) -> None:
    tokens = random_tokens(cuda, 2 * WINDOW + 1, cuda.model.depth).astype(dtype)
    expected = decoded_on_gpu(cuda, tokens)
    illegal = [0, WINDOW - 1, WINDOW, 2 * WINDOW - 1, 2 * WINDOW]
    tokens[illegal, [0, -1, 0, 1, -1]] = cuda.model.vocabulary
    expected[illegal] = np.nan
    assert np.array_equal(decoded_on_gpu(cuda, tokens), expected, equal_nan=True)


def test_batches_that_grow_and_shrink_are_sorted_in_memory_that_suffices(cuda: ActionTokenizer) -> None:
    for batch in (FEW + 1, 100_000, 20_000, 300_000, 5, FEW + 1):
        tokens = random_tokens(cuda, batch, cuda.model.depth)
        assert np.array_equal(decoded_on_gpu(cuda, tokens), one_by_one(cuda, tokens))


def test_bound_calls_that_sort_do_so_in_memory_of_their_own(cuda: ActionTokenizer) -> None:
    """Under way at the same time, again and again, on other tokens each time."""
    batch = 2 * WINDOW + 100
    given = [
        [random_tokens(cuda, batch + seed, cuda.model.depth)[:batch] for seed in (turn, turn + 3)] for turn in range(3)
    ]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    tokens = [torch.zeros((batch, cuda.model.depth), dtype=torch.int32, device="cuda") for _ in streams]
    outs = [torch.empty(cuda.model.actions_shape(batch), device="cuda") for _ in streams]
    torch.cuda.synchronize()
    calls = [cuda.bind_decode(own, out, stream=stream) for own, out, stream in zip(tokens, outs, streams, strict=True)]
    for turn in given:
        for own, source in zip(tokens, turn, strict=True):
            own.copy_(torch.from_numpy(source))
        torch.cuda.synchronize()
        for _ in range(20):
            for call in calls:
                call()
        torch.cuda.synchronize()
        for out, source in zip(outs, turn, strict=True):
            assert np.array_equal(out.cpu().numpy(), one_by_one(cuda, source))
    for call in calls:
        call.close()


def test_tokens_that_change_while_they_are_decoded_harm_no_other_chunk(cuda: ActionTokenizer) -> None:
    """Whatever is read, no kernel hangs or reads beyond a table."""
    batch, changing = 4 * WINDOW, slice(0, 2 * WINDOW)
    tokens = torch.from_numpy(random_tokens(cuda, batch, cuda.model.depth)).cuda()
    kept = one_by_one(cuda, tokens[2 * WINDOW :].cpu().numpy())
    few, out = tokens[:1000].clone(), torch.empty(cuda.model.actions_shape(batch), device="cuda")
    torch.cuda.synchronize()
    decoding, writing = torch.cuda.Stream(), torch.cuda.Stream()
    calls = [
        cuda.bind_decode(tokens, out, stream=decoding),
        cuda.bind_decode(few, torch.empty(cuda.model.actions_shape(1000), device="cuda"), stream=decoding),
    ]
    for _ in range(50):
        with torch.cuda.stream(writing):
            for target in (tokens[changing], few):
                target.random_(-(2**31), 2**31 - 1)
        for call in calls:
            call()
    torch.cuda.synchronize()
    assert np.array_equal(out[2 * WINDOW :].cpu().numpy(), kept)
    for call in calls:
        call.close()
