"""Beliefs through graphs on this GPU, of TensorRT and of ONNX Runtime: the definition's answers, in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rfsq.export.build_config import BuildConfig
from rfsq.export.chunk_tokens import load_chunk_tokens
from rfsq.export.on_target import TargetConfig, add_engines
from rfsq.export.pipeline import build
from rfsq.export.step_tokens import load_step_tokens
from rfsq.rfsq_ref.chunk_checkpoint import save_chunk_checkpoint
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.gates import BELIEF_GATES
from tests.bundles import Recipe, deploy, random_model, write_bundle
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens, write_chunk_bundle
from tests.gpu.conftest import TENSORRT
from tests.gpu.test_sizes import SIZES
from tests.runtime.test_beliefs import MODES, STEP_MODES, Case, one_hot, random_tokens, softmax

HAS_ORT_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
ORT_CUDA = pytest.param(
    "onnxruntime-cuda", marks=pytest.mark.skipif(not HAS_ORT_CUDA, reason="ONNX Runtime was built without CUDA")
)
#: One chunk, a few, and more than go through at once.
COUNTS = (1, 5, 300)


@pytest.fixture(scope="module")
def chunk_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model in float64 that is fitted to the embedded demonstrations, and a bundle of it."""
    folder = tmp_path_factory.mktemp("chunks")
    deployed = load_chunk_tokens(BuildConfig(kind=TokenKind.CHUNK))
    save_chunk_checkpoint(deployed.checkpoint, folder / "chunks.safetensors")
    output = folder / "bundle"
    backends = ("onnxruntime", *TENSORRT)
    build(BuildConfig(checkpoint=folder / "chunks.safetensors", output=output, backends=backends, parity_steps=10_000))
    return deployed.reference.model, output


@pytest.fixture(scope="module", params=[*TENSORRT, ORT_CUDA])
def steps(request: pytest.FixtureRequest, bundle_path: Path) -> Iterator[Case]:
    with ActionTokenizer.load(bundle_path, backend=request.param) as tokenizer:
        yield Case(tokenizer, load_step_tokens(BuildConfig()).reference.model.requires_grad_(False))


@pytest.fixture(scope="module", params=[*TENSORRT, ORT_CUDA])
def chunks(request: pytest.FixtureRequest, chunk_bundle: tuple[Any, Path]) -> Iterator[Case]:
    model, folder = chunk_bundle
    with ActionTokenizer.load(folder, backend=request.param) as tokenizer:
        yield Case(tokenizer, model)


@pytest.mark.parametrize("backend", TENSORRT)
def test_gates_of_beliefs_were_passed_on_this_gpu(
    backend: str, bundle_path: Path, chunk_bundle: tuple[Any, Path]
) -> None:
    for folder in (bundle_path, chunk_bundle[1]):
        manifest = open_bundle(folder).manifest
        gates = [entry.gate for entry in manifest.parity if entry.backend == backend and "beliefs" in entry.gate]
        assert gates == [f"beliefs: {gate}" for gate in BELIEF_GATES]
        sources = {entry.source for entry in manifest.engines if entry.backend == backend}
        assert sources == {graph.file for graph in manifest.every_graph_of("reduce")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", COUNTS)
def test_beliefs_of_steps_are_those_of_the_definition(steps: Case, mode: Any, count: int) -> None:
    for prefix in steps.tokenizer.prefixes:
        logits = steps.logits(prefix, count)
        expected = steps.expected(logits, mode)
        steps.assert_is(steps.tokenizer.decode_logits(logits, mode=mode), expected)
        steps.assert_is(steps.tokenizer.decode_probabilities(softmax(logits), mode=mode), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prefix", [1, 4, 8, 45])
def test_beliefs_of_chunks_are_those_of_the_definition(chunks: Case, mode: Any, count: int, prefix: int) -> None:
    words, pair = chunks.logits(prefix, min(count, 40)), chunks.pair(prefix, count)
    for logits in (words, pair):
        chunks.assert_is(chunks.tokenizer.decode_logits(logits, mode=mode), chunks.expected(logits, mode))


def test_steps_that_are_certain_decode_to_the_same_bits_as_alone(steps: Case) -> None:
    assert_certain(steps, steps.tokenizer.prefixes)


def test_chunks_that_are_certain_decode_to_the_same_bits_as_alone(chunks: Case) -> None:
    assert_certain(chunks, (1, 8))


def assert_certain(case: Case, prefixes: Sequence[int]) -> None:
    for prefix, count in itertools.product(prefixes, (1, 5, 150)):
        tokens = random_tokens(case, prefix, count)
        found = case.tokenizer.decode_probabilities(one_hot(tokens, case.tokenizer.model.vocabulary))
        np.testing.assert_array_equal(found.actions, case.tokenizer.decode(tokens))
        assert not found.std.any()


def test_what_nobody_wants_is_left_out(chunks: Case) -> None:
    pair, out = chunks.pair(8, 3), np.empty((3, 8, 7), np.float32)
    chunks.tokenizer.decode_logits_into(pair, out)
    np.testing.assert_array_equal(out, chunks.tokenizer.decode_logits(pair).actions)


def test_threads_share_a_tokenizer(steps: Case) -> None:
    given = [steps.logits(8, count, seed=count) for count in (1, 3, 200, 2)]
    alone = [steps.tokenizer.decode_logits(logits).actions for logits in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda logits: steps.tokenizer.decode_logits(logits).actions, given)
            assert all(np.array_equal(*pair) for pair in zip(found, alone, strict=True))


def on_this_gpu(folder: Path) -> Path:
    add_engines(TargetConfig(folder, TENSORRT))
    return folder


@pytest.mark.parametrize("mode", STEP_MODES)
@pytest.mark.parametrize("size", ["odd", "two arms", "128 levels", "least"])
def test_steps_of_other_sizes_and_modes(mode: Any, size: str, tmp_path: Path) -> None:
    config = SIZES[size]
    recipe = Recipe(mode=mode, config=config, prefixes=(max(1, config.num_layers - 1),), has_engine=False)
    folder = on_this_gpu(write_bundle(tmp_path / "bundle", deploy(recipe)))
    for backend in TENSORRT:
        with ActionTokenizer.load(folder, backend=backend) as tokenizer:
            assert_is_right(Case(tokenizer, random_model(recipe)), Case.logits)


def test_chunks_of_other_sizes(tmp_path: Path) -> None:
    recipe = ChunkRecipe()
    folder = on_this_gpu(write_chunk_bundle(tmp_path / "bundle", recipe))
    for backend in TENSORRT:
        with ActionTokenizer.load(folder, backend=backend) as tokenizer:
            case = Case(tokenizer, deployed_chunk_tokens(recipe).reference.model)
            assert_is_right(case, Case.logits)
            assert_is_right(case, Case.pair)


def assert_is_right(case: Case, draw: Callable[[Case, int], Any]) -> None:
    for prefix in case.tokenizer.prefixes:
        for mode in MODES:
            logits = draw(case, prefix)
            case.assert_is(case.tokenizer.decode_logits(logits, mode=mode), case.expected(logits, mode))
