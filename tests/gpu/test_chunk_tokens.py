"""Chunk tokens on this GPU: every engine is the reference, for any number and type of tokens and size of batch."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.export.build_config import BuildConfig
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.chunk_tokens import ChunkTokens, load_chunk_tokens
from rfsq.export.on_target import TargetConfig, add_engines
from rfsq.export.pipeline import build
from rfsq.rfsq_ref.chunk_checkpoint import save_chunk_checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.contract import judged
from rfsq.runtime.backends.cuda import FEW_CHUNKS
from rfsq.runtime.backends.gpu.driver import open_device, synchronize_device
from rfsq.runtime.backends.registry import create_backend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.comparison import action_errors
from rfsq.runtime.bundle.errors import InvalidInputError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.golden import read_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint, write_chunk_bundle
from tests.gpu.conftest import ENGINES, TENSORRT
from tests.gpu.test_arrays import cupy, to_host

#: Of tokens that an encoder gives, in normalised units.
ENCODED_ERROR = 1e-6
#: Chunks whose tokens are judged.
MILLION = int(os.environ.get("RFSQ_PARITY_CHUNKS", "1000000"))
#: A block for each, a last one that is not full, and kernels for many chunks of either way.
BATCHES = (1, 2, 7, 300, 520, FEW_CHUNKS["decoder"], FEW_CHUNKS["decoder"] + 1, 33_000)


@pytest.fixture(scope="module")
def deployed() -> ChunkTokens:
    return load_chunk_tokens(BuildConfig(kind=TokenKind.CHUNK))


@pytest.fixture(scope="module")
def reference(deployed: ChunkTokens) -> ChunkReference:
    return deployed.reference


@pytest.fixture(scope="module")
def chunk_bundle(deployed: ChunkTokens, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What is fitted to the embedded demonstrations, with engines of every kind, all validated on this GPU."""
    folder = tmp_path_factory.mktemp("chunks")
    save_chunk_checkpoint(deployed.checkpoint, folder / "chunks.safetensors")
    output = folder / "bundle"
    build(
        BuildConfig(
            checkpoint=folder / "chunks.safetensors",
            output=output,
            backends=("onnxruntime", "c", *ENGINES),
            parity_steps=10_000,
        )
    )
    return open_bundle(output)


@pytest.fixture(scope="module", params=[*ENGINES, "onnxruntime-cuda"])
def tokenizer(request: pytest.FixtureRequest, chunk_bundle: Bundle) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(chunk_bundle.folder, backend=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def cuda(chunk_bundle: Bundle) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(chunk_bundle.folder, backend="cuda") as opened:
        yield opened


@pytest.fixture(scope="module")
def c_tokenizer(chunk_bundle: Bundle) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(chunk_bundle.folder, backend="c") as opened:
        yield opened


def random_tokens(tokenizer: ActionTokenizer, batch: int, length: int) -> np.ndarray:
    """Of every class, escape among them."""
    random = np.random.default_rng(batch + length)
    return random.integers(tokenizer.model.vocabulary, size=(batch, length), dtype=np.int32)


def some_chunks(tokenizer: ActionTokenizer, batch: int) -> np.ndarray:
    """That classes hold, and some of escape."""
    return tokenizer.decode(random_tokens(tokenizer, batch, tokenizer.model.depth))


def guarded(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """An array of CuPy, and what stands behind it and must not change."""
    room = cupy().full((2, *shape), 77, dtype=dtype)
    return room[0], room[1]


def decoded_on_gpu(tokenizer: ActionTokenizer, tokens: np.ndarray) -> np.ndarray:
    out, behind = guarded(tokenizer.model.actions_shape(len(tokens)), np.float32)
    tokenizer.decode_into(cupy().asarray(np.ascontiguousarray(tokens)), out)
    assert (to_host(behind) == 77).all()
    return to_host(out)


def encoded_on_gpu(tokenizer: ActionTokenizer, actions: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
    out, behind = guarded(tokenizer.model.tokens_shape(len(actions)), dtype)
    tokenizer.encode_into(cupy().asarray(actions), out)
    assert (to_host(behind) == 77).all()
    return to_host(out)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_every_gate_has_been_run_for_every_engine_and_every_kernel(chunk_bundle: Bundle) -> None:
    proven = {(entry.backend, entry.gate) for entry in chunk_bundle.manifest.parity}
    gates = ("encode: wrong tokens", "decode 45 tokens: action error", "decode fewer tokens: action error")
    gates = (*gates, "encode: illegal values not marked", "decode fewer tokens: illegal values not marked")
    assert proven >= {(name, gate) for name in ENGINES for gate in gates}
    variants = ("many steps", "uint16 tokens", "uint16 tokens, many steps")
    assert proven >= {("cuda", f"{variant}, {gate}") for variant in variants for gate in gates[:3]}


def test_engines_are_added_to_a_bundle_from_elsewhere_and_proven(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "chunk.safetensors", tmp_path / "bundle"
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), checkpoint)
    build(BuildConfig(checkpoint=checkpoint, output=output, backends=("onnxruntime",), parity_steps=200))
    _, backends = add_engines(TargetConfig(output))
    assert {"cuda", *ENGINES} <= set(backends)
    for name in backends:
        ActionTokenizer.load(output, backend=name).close()


@pytest.mark.parametrize("length", [1, 2, 8, 23, 44, 45])
def test_any_number_of_tokens_decodes_from_numpy_and_where_it_lies(
    tokenizer: ActionTokenizer, reference: ChunkReference, length: int
) -> None:
    for batch in (1, 300):
        tokens = random_tokens(tokenizer, batch, length)
        found = tokenizer.decode(tokens)
        worst = action_errors(reference.decode(tokens), found, reference.model.units.numpy())
        assert worst.value <= GATES.action_error, worst
        assert np.array_equal(decoded_on_gpu(tokenizer, tokens), found)


def test_every_prefix_of_what_was_encoded_decodes_within_a_millionth(
    cuda: ActionTokenizer, reference: ChunkReference, deployed: ChunkTokens
) -> None:
    tokens = cuda.encode(deployed.data.held_out)
    for length in cuda.prefixes:
        part = np.ascontiguousarray(tokens[:, :length])
        worst = action_errors(reference.decode(part), cuda.decode(part), reference.model.units.numpy())
        assert worst.value <= ENCODED_ERROR, (length, worst)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_gives_what_numpy_arrays_give(tokenizer: ActionTokenizer, batch: int) -> None:
    actions = some_chunks(tokenizer, batch)
    tokens = tokenizer.encode(actions)
    found, decoded = encoded_on_gpu(tokenizer, actions), decoded_on_gpu(tokenizer, tokens)
    if tokenizer.backend.name == "cuda" or batch <= 300:
        assert np.array_equal(found, tokens)
        assert np.array_equal(decoded, tokenizer.decode(tokens))
    else:
        # Numpy arrays and others are cut at other places, and a library may take other kernels for other sizes.
        assert (found == tokens).mean() > 0.999
        assert np.abs(decoded - tokenizer.decode(tokens)).max() < GATES.action_error


def test_a_chunk_has_the_same_bits_in_every_batch_and_type(cuda: ActionTokenizer) -> None:
    """Through all kernels: a block for a chunk, and chunks that share one."""
    actions = some_chunks(cuda, 40_000)
    tokens = encoded_on_gpu(cuda, actions)
    assert np.array_equal(encoded_on_gpu(cuda, actions, np.uint16), tokens)
    apart = np.concatenate([encoded_on_gpu(cuda, part) for part in np.array_split(actions, 100)])
    assert np.array_equal(apart, tokens)
    for length in (3, 45):
        part = np.ascontiguousarray(tokens[:, :length])
        decoded = decoded_on_gpu(cuda, part)
        assert np.array_equal(decoded_on_gpu(cuda, part.astype(np.uint16)), decoded)
        in_parts = [decoded_on_gpu(cuda, piece) for piece in np.array_split(part, 100)]
        assert np.array_equal(np.concatenate(in_parts), decoded)


def test_no_token_of_a_million_chunks_is_wrong(
    chunk_bundle: Bundle, c_tokenizer: ActionTokenizer, reference: ChunkReference, deployed: ChunkTokens
) -> None:
    """The reference is asked where an engine and the generated C differ: in float64 it would take an hour for all."""
    found = dict.fromkeys(ENGINES, 0)
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        tokenizers = {name: ActionTokenizer.load(chunk_bundle.folder, backend=name) for name in ENGINES}
        for section in deployed.sections(MILLION * reference.model.sizes.chunk_length):
            parts = np.array_split(section.actions, max(len(section.actions) // 256, 1))
            expected = np.concatenate(list(pool.map(c_tokenizer.encode, parts)))
            tokens = {name: opened.encode(section.actions) for name, opened in tokenizers.items()}
            differ = np.flatnonzero(np.any([(own != expected).any(-1) for own in tokens.values()], axis=0))
            print(f"  {section.name}: {len(expected)} chunks, {len(differ)} of them differ from those of C")
            for rows in np.array_split(differ, max(len(differ) // 1024, 1)):
                actions = section.actions[rows]
                own = reference.model.encode(torch.from_numpy(actions).double()).numpy()
                for name, of_engine in tokens.items():
                    found[name] += reference.judge(actions, own, of_engine[rows]).num_wrong
        for opened in tokenizers.values():
            opened.close()
    assert found == dict.fromkeys(ENGINES, 0)


# --- marks, arrays and bound calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [5, 40_000])
@pytest.mark.parametrize("token", [-1, 1024, 2**16, 2**31 - 1])
def test_a_token_outside_the_vocabulary_makes_its_chunk_nan_and_no_other(
    tokenizer: ActionTokenizer, token: int, batch: int
) -> None:
    for length in (1, 45):
        tokens = random_tokens(tokenizer, batch, length)
        expected = decoded_on_gpu(tokenizer, tokens)
        tokens[batch // 2, length - 1] = token
        expected[batch // 2] = np.nan
        assert np.array_equal(decoded_on_gpu(tokenizer, tokens), expected, equal_nan=True)


@pytest.mark.parametrize("batch", [5, 600])
@pytest.mark.parametrize("value", [np.nan, np.inf, -3e38])
def test_an_action_that_no_encoder_takes_makes_the_tokens_of_its_chunk_minus_one(
    tokenizer: ActionTokenizer, value: float, batch: int
) -> None:
    actions = some_chunks(tokenizer, batch)
    expected = encoded_on_gpu(tokenizer, actions)
    actions[batch // 2, 3, 6] = value
    expected[batch // 2] = -1
    assert np.array_equal(encoded_on_gpu(tokenizer, actions), expected)


def test_words_of_16_bits_are_taken_and_marked_with_65535(cuda: ActionTokenizer) -> None:
    for batch in (3, 600):
        actions = some_chunks(cuda, batch)
        actions[1, 0, 0] = np.nan
        tokens = encoded_on_gpu(cuda, actions, np.uint16)
        assert (tokens == 2**16 - 1).all(axis=1).tolist() == [chunk == 1 for chunk in range(batch)]
        # And what is marked decodes to no action.
        decoded = decoded_on_gpu(cuda, tokens)
        assert np.isnan(decoded).all(axis=(1, 2)).tolist() == np.isnan(decoded).any(axis=(1, 2)).tolist()
        assert np.isnan(decoded[1]).all()


@pytest.mark.parametrize("backend", [*TENSORRT, "onnxruntime-cuda"])
def test_the_other_engines_say_that_they_take_no_words(chunk_bundle: Bundle, backend: str) -> None:
    with ActionTokenizer.load(chunk_bundle.folder, backend=backend) as opened:
        tokens = cupy().zeros((1, 45), np.uint16)
        with pytest.raises(InvalidInputError, match="type uint16; expected int32"):
            opened.decode(tokens)


def test_bound_calls_follow_their_arrays_for_any_number_of_tokens(tokenizer: ActionTokenizer) -> None:
    actions = torch.from_numpy(some_chunks(tokenizer, 2)).cuda()
    tokens = torch.zeros((2, 45), dtype=torch.int32, device="cuda")
    encode = tokenizer.bind_encode(actions, tokens)
    parts = {length: torch.zeros((2, length), dtype=torch.int32, device="cuda") for length in (1, 8, 45)}
    outs = {length: torch.empty_like(actions) for length in parts}
    calls = {length: tokenizer.bind_decode(part, outs[length]) for length, part in parts.items()}
    for seed in range(3):
        other = some_chunks(tokenizer, 2 + seed)[:2]
        actions.copy_(torch.from_numpy(other))
        torch.cuda.synchronize()
        encode()
        synchronize_device()
        assert np.array_equal(tokens.cpu().numpy(), tokenizer.encode(other))
        for length, call in calls.items():
            parts[length].copy_(tokens[:, :length])
            torch.cuda.synchronize()
            call()
            synchronize_device()
            expected = tokenizer.decode(np.ascontiguousarray(tokens.cpu().numpy()[:, :length]))
            assert np.array_equal(outs[length].cpu().numpy(), expected)
    for bound in (encode, *calls.values()):
        bound.close()


WRONG: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "int64": (lambda tokens: tokens.long(), "int64; expected int32"),
    "one chunk": (lambda tokens: tokens[0], "shape"),
    "per step": (lambda tokens: tokens.view(1, 2, 45), "shape"),
    "none": (lambda tokens: tokens[:, :0], "from 1 to 45"),
    "too many": (lambda tokens: torch.cat((tokens, tokens), 1), "from 1 to 45"),
    "not contiguous": (lambda tokens: tokens[:, :8], "not C-contiguous"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_array_that_is_none_of_chunk_tokens_is_refused(tokenizer: ActionTokenizer, kind: str) -> None:
    spoil, words = WRONG[kind]
    tokens = torch.zeros((2, 45), dtype=torch.int32, device="cuda")
    with pytest.raises(InvalidInputError, match=words):
        tokenizer.decode(spoil(tokens))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        ChunkSizes(1, 1, num_classes=2, token_bits=4, num_tokens=1),
        ChunkSizes(2, 5, num_classes=3, token_bits=16, num_tokens=4),
        ChunkSizes(3, 1, num_classes=256, token_bits=9, num_tokens=4),
        ChunkSizes(26, 16, num_classes=9, token_bits=12, num_tokens=60),
        ChunkSizes(7, 32, num_classes=12, token_bits=10, num_tokens=90),
    ],
    ids=str,
)
def test_other_sizes_pass_their_golden_vectors(sizes: ChunkSizes, tmp_path: Path) -> None:
    recipe = ChunkRecipe(sizes=sizes, num_chunks=40, compute_capability=open_device().compute_capability)
    bundle = open_bundle(write_chunk_bundle(tmp_path / "bundle", recipe))
    golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
    backend = create_backend("cuda", bundle)
    try:
        result = replay(golden, bundle.manifest.model, backend)
        assert [str(check) for check in result.failures] == []
        together = np.empty_like(golden.actions)
        backend.decode_into(golden.tokens, None, together)
        for variant in judged(backend).values():
            apart = np.empty_like(together)
            variant.decode_into(golden.tokens, None, apart)
            assert np.array_equal(apart, together)
    finally:
        backend.close()
