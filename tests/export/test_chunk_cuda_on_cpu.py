"""What the generated CUDA of chunk tokens computes, on the processor: both kinds of kernels and of tokens, every number
of tokens, wrong values, tails."""

import functools
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rfsq.export import chunk_cuda_source
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.chunk_tokens import ChunkTokens
from rfsq.export.sources import BuildData
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.chunk_code import ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.runtime.bundle.comparison import action_errors
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.manifest import CHUNKS_OF_BLOCK, CHUNKS_OF_WINDOW, KernelKind, token_types
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens
from tests.export.chunk_c_library import random_actions, random_tokens
from tests.export.chunk_models import fitted_tokenizer, held_out_actions
from tests.export.cuda_on_cpu import ChunkCudaOnCpu

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: apt-get install g++"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the threads of a block need ucontext, of glibc"),
]

KINDS: tuple[KernelKind, ...] = ("few", "many")
TILE, WINDOW = CHUNKS_OF_BLOCK["decoder"], CHUNKS_OF_WINDOW
WINDOW_ENDS = (WINDOW - 1, WINDOW, WINDOW + 1)
#: One of everything, sizes that no group divides, a first token that is the class alone, more values than a block has
#: threads, tokens that no word of 16 bits holds beside the mark, chunks that have no room beside others, and latents
#: that hold less than all.
RECIPES = {
    "small": ChunkRecipe(),
    "least": ChunkRecipe(sizes=ChunkSizes(1, 1, num_classes=2, token_bits=4, num_tokens=1), has_normaliser=False),
    "whole words": ChunkRecipe(sizes=ChunkSizes(2, 5, num_classes=3, token_bits=16, num_tokens=4), seed=2),
    "most classes": ChunkRecipe(sizes=ChunkSizes(6, 1, num_classes=256, token_bits=9, num_tokens=4), seed=3),
    "many values": ChunkRecipe(sizes=ChunkSizes(40, 8, num_classes=9, token_bits=12, num_tokens=20), seed=4),
    "class alone": ChunkRecipe(sizes=ChunkSizes(3, 4, num_classes=16, token_bits=4, num_tokens=12), seed=6),
    "most tokens": ChunkRecipe(sizes=ChunkSizes(3, 5, num_classes=4, token_bits=8, num_tokens=33), seed=5),
}
#: Fewer where the reference takes long.
COUNTS = {name: 12 if name in ("many values", "most classes") else 43 for name in RECIPES}
#: In normalised units: of tokens that an encoder gives, and of any.
ENCODED_ERROR, ANY_ERROR = 1e-6, GATES.action_error / 4


@dataclass(frozen=True)
class Case:
    deployed: ChunkTokens
    kernels: ChunkCudaOnCpu
    actions: np.ndarray

    @property
    def types(self) -> tuple[str, ...]:
        return token_types(self.deployed.model.vocabulary, "uint16")

    def kinds(self, role: str) -> list[tuple[KernelKind, str]]:
        return [(kind, token) for kind in KINDS for token in self.types if self.kernels.has(role, token, kind)]

    def tokens(self, length: int, seed: int = 0) -> np.ndarray:
        """Of every class, and of numbers behind it."""
        return random_tokens(self.deployed.checkpoint.sizes, len(self.actions), length, seed)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def compiled(name: str) -> Case:
        deployed = deployed_chunk_tokens(RECIPES[name])
        actions = random_actions(deployed.reference.model, COUNTS[name], 0.05, seed=1)
        return Case(deployed, ChunkCudaOnCpu(tmp_path_factory.mktemp("cuda"), deployed), actions)

    return compiled


def assert_encodes(reference: ChunkReference, actions: np.ndarray, found: np.ndarray) -> None:
    expected = reference.model.encode(torch.from_numpy(actions).double()).numpy().astype(np.int32)
    compared = reference.judge(actions, expected, found)
    assert compared.num_wrong == 0, compared.first_wrong


def assert_decodes(reference: ChunkReference, tokens: np.ndarray, found: np.ndarray, limit: float) -> None:
    worst = action_errors(reference.decode(tokens), found, reference.model.units.numpy())
    assert worst.value <= limit, worst


@pytest.mark.parametrize("name", RECIPES)
def test_every_kernel_encodes_as_the_reference_and_all_alike(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    expected = here.kernels.encode(here.actions, "int32", "few")
    assert_encodes(here.deployed.reference, here.actions, expected)
    for kind, token_type in here.kinds("encoder"):
        for is_backwards in (False, True):
            found = here.kernels.encode(here.actions, token_type, kind, is_backwards=is_backwards)
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_every_kernel_decodes_every_number_of_tokens_as_the_reference_and_to_the_same_bits(
    case: Callable[[str], Case], name: str
) -> None:
    here = case(name)
    depth = here.deployed.model.depth
    for length in sorted({1, 2, depth // 2, depth - 1, depth} - {0}) if depth > 12 else range(1, depth + 1):
        tokens = here.tokens(length, seed=length)
        expected = here.kernels.decode(tokens, "few")
        assert_decodes(here.deployed.reference, tokens, expected, ANY_ERROR)
        for kind, token_type in here.kinds("decoder"):
            for is_backwards in (False, True):
                found = here.kernels.decode(tokens.astype(token_type), kind, is_backwards=is_backwards)
                assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_a_token_outside_the_vocabulary_makes_its_chunk_nan_and_no_other(
    case: Callable[[str], Case], name: str
) -> None:
    here = case(name)
    vocabulary = here.deployed.model.vocabulary
    for length in {1, here.deployed.model.depth}:
        for kind, token_type in here.kinds("decoder"):
            tokens = here.tokens(length).astype(token_type)
            expected = here.kernels.decode(tokens, kind)
            # What looks like a token once it is cut to 16 bits is none either.
            values = [vocabulary, vocabulary + 1, 2**16 - 1, 2**16, 2**16 + 1, 2**31 - 1, -1, -(2**16), -(2**31)]
            limits = np.iinfo(token_type)
            illegal = [value for value in values if not 0 <= value < vocabulary and limits.min <= value <= limits.max]
            for chunk, value in enumerate(illegal[: len(tokens)]):
                tokens[chunk, chunk * 7 % length] = value
                expected[chunk] = np.nan
            assert np.isnan(expected).any()
            assert np.array_equal(here.kernels.decode(tokens, kind), expected, equal_nan=True)


@pytest.mark.parametrize("name", RECIPES)
def test_an_action_that_no_encoder_takes_makes_its_chunk_the_mark_and_no_other(
    case: Callable[[str], Case], name: str
) -> None:
    here = case(name)
    limit = np.float32(here.deployed.model.action_limit)
    for kind, token_type in here.kinds("encoder"):
        actions = here.actions.copy()
        tokens = here.kernels.encode(actions, token_type, kind)
        assert (tokens < here.deployed.model.vocabulary).all()
        illegal = (np.nan, np.inf, -np.inf, np.nextafter(limit, np.float32(np.inf)), -3.4e38)
        for turn, value in enumerate(illegal[: len(actions)]):
            chunk = turn * 5 % len(actions)
            actions[chunk].flat[turn * 3 % actions[0].size] = value
            tokens[chunk] = -1 if token_type == "int32" else 2**16 - 1
        assert np.array_equal(here.kernels.encode(actions, token_type, kind), tokens)


@pytest.mark.parametrize("count", [1, 7, 8, 9, TILE - 1, TILE, TILE + 1, 1500, *WINDOW_ENDS])
def test_batches_of_every_size_end_where_they_end(case: Callable[[str], Case], count: int) -> None:
    here = case("small")
    tokens = random_tokens(here.deployed.checkpoint.sizes, count, 9, seed=count)
    decoded = here.kernels.decode(tokens, "many")
    assert np.array_equal(decoded, here.kernels.decode(tokens, "few"))
    few = here.kernels.encode(decoded[:20], "int32", "few")
    assert np.array_equal(here.kernels.encode(decoded[:20], "int32", "many"), few)


@pytest.mark.parametrize("token_type", ["int32", "uint16"])
def test_chunks_are_marked_on_both_sides_of_the_end_of_a_window_and_no_other(
    case: Callable[[str], Case], token_type: str
) -> None:
    here = case("small")
    tokens = random_tokens(here.deployed.checkpoint.sizes, WINDOW + 2, 2, seed=0).astype(token_type)
    expected = here.kernels.decode(tokens, "many")
    illegal = [0, WINDOW - 1, WINDOW, WINDOW + 1]
    tokens[illegal, [0, 1, 0, 1]] = here.deployed.model.vocabulary
    expected[illegal] = np.nan
    assert np.array_equal(here.kernels.decode(tokens, "many"), expected, equal_nan=True)


def test_chunks_of_one_class_and_of_all_are_sorted_alike(case: Callable[[str], Case]) -> None:
    here = case("most classes")
    count, escape = 1024, 511
    tokens = random_tokens(here.deployed.checkpoint.sizes, count, 4, seed=0)
    for first in (tokens[:, 0], np.full(count, tokens[1, 0]), np.arange(count) % 512, np.full(count, escape)):
        tokens[:, 0] = first
        expected = here.kernels.decode(tokens, "few")
        for blocks in (1, 7, 300):
            assert np.array_equal(here.kernels.decode(tokens, "many", blocks=blocks), expected)


def test_tokens_that_change_after_they_were_sorted_change_their_own_chunks_alone(case: Callable[[str], Case]) -> None:
    here = case("small")
    before = random_tokens(here.deployed.checkpoint.sizes, 500, 9, seed=1)
    tokens = before.copy()
    changed = np.arange(0, 500, 3)
    tokens[changed] = np.random.default_rng(2).integers(-(2**31), 2**31, (len(changed), 9))
    found = here.kernels.decode(tokens, "many", sorted_by=before)
    kept = np.setdiff1d(np.arange(500), changed)
    assert np.array_equal(found[kept], here.kernels.decode(before, "few")[kept])
    # These are no tokens any more.
    assert np.isnan(found[changed]).all()


def test_threads_that_read_different_classes_go_the_same_way(
    case: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = case("small")
    read = "class_of((uint16)own[0])"
    racing = ChunkCudaOnCpu(
        tmp_path_factory.mktemp("cuda"), here.deployed, {read: f"({read} + threadIdx.x) % (ESCAPE + 1)"}
    )
    tokens = here.tokens(9)
    found = racing.decode(tokens, "few")
    assert np.isfinite(found).all()
    # Escape does not look at what was loaded of a class.
    expected = here.kernels.decode(tokens, "few")
    code = here.deployed.reference.model.code
    escaped = (code.classes(code.bits(torch.from_numpy(tokens))) == code.sizes.escape).numpy()
    assert 0 < escaped.sum() < len(tokens)
    assert np.array_equal(found[escaped], expected[escaped])


def test_large_tables_are_strings_of_the_same_numbers(
    case: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = case("small")
    monkeypatch.setattr(chunk_cuda_source, "MOST_SPELLED", 64)
    packed = ChunkCudaOnCpu(tmp_path_factory.mktemp("cuda"), here.deployed)
    assert "DECODER_BASIS_BYTES" in packed.source
    assert "DECODER_BASIS_BYTES" not in here.kernels.source
    tokens = packed.encode(here.actions, "int32", "many")
    assert np.array_equal(tokens, here.kernels.encode(here.actions, "int32", "many"))
    for kind in KINDS:
        assert np.array_equal(packed.decode(tokens, kind), here.kernels.decode(tokens, kind))


def test_what_is_far_from_every_class_is_escaped_within_its_bound(case: Callable[[str], Case]) -> None:
    for name in ("small", "most tokens"):
        here = case(name)
        reference = here.deployed.reference
        actions = random_actions(reference.model, 40, 3.0, seed=9)
        tokens = here.kernels.encode(actions, "int32", "few")
        assert_encodes(reference, actions, tokens)
        code = reference.model.code
        classes = code.classes(code.bits(torch.from_numpy(tokens)))
        assert (classes == code.sizes.escape).float().mean() > 0.5


def test_kernels_that_share_a_block_and_those_that_cannot_are_among_these(case: Callable[[str], Case]) -> None:
    assert all(case("small").kernels.has(role, "uint16", "many") for role in ("encoder", "decoder"))
    assert not case("whole words").kernels.has("encoder", "uint16", "few")
    assert not case("many values").kernels.has("encoder", "int32", "many")
    assert not case("many values").kernels.has("decoder", "int32", "many")
    assert {"#define HAS_REST 0", "#define HAS_REST 1"} == {
        line
        for name in RECIPES
        for line in case(name).kernels.source.splitlines()
        if line.startswith("#define HAS_REST")
    }


# --- what was fitted --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, split: EpisodeSplit) -> Case:
    tokenizer = fitted_tokenizer(tmp_path_factory, split)
    names = ("mean", "basis", "scale", "gain", "order", "weights")
    constants = ChunkConstants(
        **{name: getattr(tokenizer.code, name) for name in names}, budgets=tokenizer.code.budgets
    )
    none = np.empty((0, 8, 7), np.float32)
    checkpoint = ChunkCheckpoint(tokenizer.sizes, constants, None)
    deployed = ChunkTokens(checkpoint, ChunkReference(tokenizer), BuildData(None, none, "none", ""), "demonstrations")
    return Case(
        deployed, ChunkCudaOnCpu(tmp_path_factory.mktemp("cuda"), deployed), held_out_actions(split)[:96].copy()
    )


def test_what_was_fitted_is_encoded_as_by_the_reference_and_decoded_within_a_millionth(fitted: Case) -> None:
    for kind in KINDS:
        tokens = fitted.kernels.encode(fitted.actions, "int32", kind)
        assert_encodes(fitted.deployed.reference, fitted.actions, tokens)
        for length in (1, 4, 16, 30, 45):
            part = np.ascontiguousarray(tokens[:, :length])
            assert_decodes(fitted.deployed.reference, part, fitted.kernels.decode(part, kind), ENCODED_ERROR)
