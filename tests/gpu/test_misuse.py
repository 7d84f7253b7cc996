"""What goes wrong on a GPU is told, in words that help, before anything wrong comes out."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.gpu.driver import DeviceMemory, free_memory
from rfsq.runtime.backends.registry import create_backend
from rfsq.runtime.backends.tensorrt import TrtBackend
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.errors import (
    BackendUnavailableError,
    EngineRefusedError,
    InferenceError,
    InvalidInputError,
    OutOfGpuMemoryError,
    UnbuiltPrefixError,
)
from rfsq.runtime.bundle.folder import Bundle
from tests.gpu.conftest import ENGINES, TENSORRT
from tests.gpu.test_arrays import cupy, random_actions

ROOT = Path(__file__).parents[2]


def gpu_tokens(tokenizer: ActionTokenizer, batch: int = 2) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode(random_actions(tokenizer, batch))).cuda()


WRONG: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "int64": (lambda tokens: tokens.long(), "int64; expected int32"),
    "float": (lambda tokens: tokens.float(), "float32; expected int32"),
    "transposed": (lambda tokens: tokens.transpose(1, 2).contiguous().transpose(1, 2), "not C-contiguous"),
    "every other chunk": (lambda tokens: tokens.repeat(2, 1, 1, 1)[::2], "not C-contiguous"),
    "misaligned": (
        lambda tokens: torch.cat((tokens.new_zeros(1), tokens.flatten()))[1:].view(tokens.shape),
        "multiple of 16",
    ),
    "one chunk": (lambda tokens: tokens[0], "shape"),
    "no prefix": (lambda tokens: tokens[..., :2].contiguous(), "--prefixes"),
    "on the host": (lambda tokens: tokens.cpu(), "numpy"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_array_that_cannot_be_used_as_it_lies_is_refused(tokenizer: ActionTokenizer, kind: str) -> None:
    spoil, words = WRONG[kind]
    with pytest.raises(InvalidInputError, match=words) as caught:
        tokenizer.decode(spoil(gpu_tokens(tokenizer)))
    assert isinstance(caught.value, UnbuiltPrefixError) == (kind == "no prefix")


def test_an_output_that_results_cannot_be_written_into_is_refused(tokenizer: ActionTokenizer) -> None:
    tokens = gpu_tokens(tokenizer)
    shape = (2, tokenizer.model.chunk_length, tokenizer.model.action_dim)
    for out, words in (
        (torch.empty(shape, dtype=torch.float64, device="cuda"), "float64"),
        (torch.empty((3, *shape[1:]), device="cuda"), "expected float32"),
        (np.empty(shape, np.float32), "does not lie on the GPU"),
        (tokens.view(torch.float32).flatten()[: np.prod(shape)].view(shape), "overlaps"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            tokenizer.decode_into(tokens, out)
    with pytest.raises(InvalidInputError, match=r"numpy\.ndarray"):
        tokenizer.decode_into(tokens.cpu().numpy(), torch.empty(shape, device="cuda"))
    with pytest.raises(InvalidInputError, match=r"require.* grad"):
        tokenizer.encode(torch.zeros(shape, device="cuda", requires_grad=True))


def test_an_array_that_belongs_to_another_stream_is_refused(tokenizer: ActionTokenizer) -> None:
    """CuPy says which stream its arrays belong to."""
    tokens = tokenizer.encode(random_actions(tokenizer, 1))
    own, other = cupy().cuda.Stream(non_blocking=True), cupy().cuda.Stream(non_blocking=True)
    with own:
        on_own = cupy().asarray(tokens)
        with pytest.raises(InvalidInputError, match="belongs to the stream"):
            tokenizer.decode(on_own, stream=other)
        decoded = cupy().asarray(tokenizer.decode(on_own))
        own.synchronize()
    assert np.array_equal(decoded.get(), tokenizer.decode(tokens))
    with pytest.raises(InvalidInputError, match="expected a stream"):
        tokenizer.decode(gpu_tokens(tokenizer), stream="default")


def test_a_backend_on_the_cpu_does_not_take_arrays_of_the_gpu(
    tokenizer: ActionTokenizer, cpu_tokenizer: ActionTokenizer
) -> None:
    with pytest.raises(InvalidInputError, match="takes numpy arrays alone"):
        cpu_tokenizer.decode(gpu_tokens(tokenizer))


def test_out_of_memory_is_told_and_passes(tokenizer: ActionTokenizer) -> None:
    tokens = gpu_tokens(tokenizer)
    expected = tokenizer.decode(tokens.cpu().numpy())
    torch.cuda.empty_cache()
    hoard = []
    for size in (2**30, 2**26, 2**22, 2**20):
        while free_memory() > 2 * size:
            try:
                hoard.append(DeviceMemory(size))
            except OutOfGpuMemoryError:
                break
    big = random_actions(tokenizer, 3000)

    def encode_ever_more() -> None:
        for batch in range(500, 3000, 500):
            tokenizer.encode(big[:batch])

    try:
        with pytest.raises(OutOfGpuMemoryError, match=r"are free|out of memory"):
            encode_ever_more()
    finally:
        for memory in hoard:
            memory.close()
    assert np.array_equal(tokenizer.decode(tokens.cpu().numpy()), expected)
    assert tokenizer.encode(big).shape[0] == 3000


@pytest.mark.parametrize("name", TENSORRT)
def test_an_engine_of_another_version_or_gpu_is_not_tried(bundle: Bundle, name: str) -> None:
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("9.9.9", {"version": "9.9.9"}),
        ("5.0", {"targets": ("5.0",)}),
    )
    for found, change in changes:
        engines = tuple(replace(entry, **change) for entry in bundle.manifest.engines)
        other = Bundle(bundle.folder, replace(bundle.manifest, engines=engines), bundle._contents)
        with pytest.raises(BackendUnavailableError, match="--from-bundle") as caught:
            TrtBackend(other, name)
        assert found in str(caught.value)


@pytest.mark.parametrize("name", TENSORRT)
def test_engines_and_kernels_that_tensorrt_does_not_accept_are_errors(bundle: Bundle, name: str) -> None:
    """Their hashes may be right: whoever built them may have been wrong."""
    entry = next(entry for entry in bundle.manifest.engines if entry.backend == name)
    content = bundle.content(entry.file)
    for spoiled in (content[: len(content) // 2], b"", b"not an engine"):
        other = Bundle(bundle.folder, bundle.manifest, {**bundle._contents, entry.file: spoiled})
        with pytest.raises(EngineRefusedError):
            TrtBackend(other, name)


def test_kernels_for_another_gpu_or_spoiled_ones_are_refused(bundle: Bundle) -> None:
    (entry,) = (entry for entry in bundle.manifest.engines if entry.backend == "cuda")
    moved = replace(bundle.manifest, engines=(replace(entry, targets=("5.0",)),))
    with pytest.raises(BackendUnavailableError, match=r"compute capability 9\.0, but engines for 5\.0;.*--from-bundle"):
        create_backend("cuda", Bundle(bundle.folder, moved, bundle._contents))
    content = bundle.content(entry.file)
    for spoiled in (content[: len(content) // 2], b"not an engine"):
        other = Bundle(bundle.folder, bundle.manifest, {**bundle._contents, entry.file: spoiled})
        with pytest.raises(BackendUnavailableError, match="--from-bundle"):
            create_backend("cuda", other)


VISIBLE = """
import sys
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import BackendUnavailableError
with ActionTokenizer.load(sys.argv[1]) as tokenizer:
    print(tokenizer.backend.name)
try:
    ActionTokenizer.load(sys.argv[1], backend=sys.argv[2])
except BackendUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ENGINES)
def test_without_the_gpu_auto_takes_the_processor_and_a_name_is_refused(bundle_path: Path, name: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", VISIBLE, str(bundle_path), name],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    chosen, refusal = done.stdout.split("\n", 1)
    assert chosen == "onnxruntime"
    assert "CUDA_VISIBLE_DEVICES is ''" in refusal


def test_a_child_of_fork_is_told_and_the_parent_goes_on(tokenizer: ActionTokenizer) -> None:
    assert not BACKENDS[tokenizer.backend.name].survives_fork
    actions = random_actions(tokenizer, 1)
    expected = tokenizer.encode(actions)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tokenizer.encode(actions)
        except InferenceError as error:
            status = 0 if "fork" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tokenizer.encode(actions) == expected).all()


FORK_THEN_LOAD = """
import os, sys
from rfsq.runtime import ActionTokenizer
with ActionTokenizer.load(sys.argv[1], backend=sys.argv[2]) as parent:
    child = os.fork()
    if child == 0:
        # CUDA is of no use here any more; a decoder still is.
        with ActionTokenizer.load(sys.argv[1]) as tokenizer:
            os._exit(0 if tokenizer.backend.name == "onnxruntime" else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("name", ENGINES)
def test_a_child_of_fork_can_still_load_a_backend_on_the_processor(bundle_path: Path, name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", FORK_THEN_LOAD, str(bundle_path), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_shared", [False, True])
def test_threads_get_right_answers_each_with_a_tokenizer_or_all_with_one(
    tokenizer: ActionTokenizer, bundle_path: Path, is_shared: bool
) -> None:
    rounds, errors = 200, []
    expected = {seed: tokenizer.encode(random_actions(tokenizer, 1 + seed, seed)) for seed in range(4)}
    decoded = {seed: tokenizer.decode(tokens) for seed, tokens in expected.items()}

    def work(seed: int) -> None:
        own = tokenizer if is_shared else ActionTokenizer.load(bundle_path, backend=tokenizer.backend.name)
        actions, stream = random_actions(own, 1 + seed, seed), torch.cuda.Stream()
        try:
            for _ in range(rounds):
                assert (own.encode(actions) == expected[seed]).all()
                assert np.array_equal(own.decode(expected[seed]), decoded[seed])
                with torch.cuda.stream(stream):
                    tokens = torch.from_numpy(expected[seed]).cuda()
                    out = torch.as_tensor(own.decode(tokens, stream=stream), device="cuda").cpu()
                assert np.array_equal(out.numpy(), decoded[seed])
        except BaseException as error:
            errors.append(error)
        finally:
            if not is_shared:
                own.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_closed_tokenizer_says_so(bundle_path: Path) -> None:
    tokenizer = ActionTokenizer.load(bundle_path, backend=TENSORRT[0])
    tokens = gpu_tokens(tokenizer)
    tokenizer.close()
    with pytest.raises(Exception, match="closed"):
        tokenizer.decode(tokens)
