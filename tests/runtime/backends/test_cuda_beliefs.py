"""The whole way of beliefs to the generated CUDA and back, its kernels on the processor: no GPU is needed."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, InvalidInputError
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.manifest import CUDA_SOURCE
from tests.bundles import Recipe, write_bundle
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.export.cuda_on_cpu import CHUNK_INSTRUCTIONS, INSTRUCTIONS, Kernels, constant
from tests.runtime.backends.gpu.fake_gpu import FakeArray, FakeCuda, aligned

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")
pytest.importorskip("cuda.core", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends import cuda as cuda_backend
from rfsq.runtime.backends import cuda_beliefs
from rfsq.runtime.backends.gpu import arrays as gpu_arrays
from rfsq.runtime.backends.gpu import backend as gpu_backend
from rfsq.runtime.backends.gpu.driver import GpuDevice
from rfsq.runtime.backends.gpu.kernels import KernelArguments

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: apt-get install g++"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the threads of a block need ucontext, of glibc"),
]

CAPABILITY = "9.0"
RECIPES: dict[str, Recipe | ChunkRecipe] = {
    "steps": Recipe(has_engine=False, c_targets=(host_targets()[-1],), prefixes=(2,), compute_capability=CAPABILITY),
    "chunks": ChunkRecipe(c_targets=(host_targets()[-1],), compute_capability=CAPABILITY),
}
#: So many blocks run at once: fewer than those of some batches below, whose blocks take turns.
RESIDENT = 20
EVERY = pytest.mark.parametrize("form", ["steps", "words", "pair"])


class OnCpu:
    """Stands for `KernelLibrary`: the kernels of a source, run when somebody waits for the stream."""

    def __init__(self, cuda: FakeCuda, folder: Path, source: str) -> None:
        self._cuda, self._source, self.launches = cuda, source, list[tuple[str, int]]()
        for found, replacement in {**INSTRUCTIONS, **CHUNK_INSTRUCTIONS}.items():
            source = source.replace(found, replacement)
        self._kernels = Kernels(folder, source)

    def find(self, name: str) -> OneKernel | None:
        bound = re.search(rf"__launch_bounds__\((\w+)[^)]*\) {name}\(", self._source)
        if bound is None:
            return None
        threads = constant(self._source, bound[1]) if not bound[1].isdigit() else int(bound[1])
        return OneKernel(self, name, threads)

    def kernel(self, name: str) -> OneKernel:
        found = self.find(name)
        assert found is not None
        return found

    def run(self, name: str, grid: tuple[int, int], arguments: KernelArguments, stream: int) -> None:
        # A launch takes its arguments along.
        values = (ctypes.c_void_p * len(arguments._values))(*arguments._values)
        self.launches.append((name, grid[0]))
        self._cuda.put(stream, lambda: self._kernels.launch(name, grid, values))

    def close(self) -> None:
        pass


class OneKernel:
    def __init__(self, library: OnCpu, name: str, threads: int) -> None:
        self._library, self._name, self.threads, self.resident_blocks = library, name, threads, RESIDENT

    def launch(self, blocks: int, arguments: KernelArguments, stream: int) -> None:
        self._library.run(self._name, (blocks, self.threads), arguments, stream)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        name: (write_chunk_bundle if isinstance(recipe, ChunkRecipe) else write_bundle)(folder / name, recipe)  # type: ignore[operator]
        for name, recipe in RECIPES.items()
    }


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda().install(monkeypatch, gpu_backend)

    class Memory(gpu_backend.DeviceMemory):  # type: ignore[misc]
        def clear(self) -> None:
            fake.view(self.address, (self.num_bytes,), np.uint8).fill(0)

        def write(self, content: bytes) -> None:
            fake.view(self.address, (len(content),), np.uint8)[...] = np.frombuffer(content, np.uint8)

    for module in (cuda_backend, cuda_beliefs, gpu_arrays, gpu_backend):
        monkeypatch.setattr(module, "DeviceMemory", Memory)
    device = GpuDevice("a processor", CAPABILITY, 2**30, "13.0", multiprocessors=3)
    monkeypatch.setattr(gpu_arrays, "is_on_device", lambda address: address in fake.live)
    for other in (cuda_backend, cuda_beliefs):
        monkeypatch.setattr(other, "open_device", lambda: device)
    return fake


@pytest.fixture
def opened(
    cuda: FakeCuda, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ActionTokenizer]]:
    found = list[ActionTokenizer]()

    def load(form: str) -> ActionTokenizer:
        path = bundles["steps" if form == "steps" else "chunks"]
        source = open_bundle(path).content(CUDA_SOURCE).decode()
        monkeypatch.setattr(cuda_backend, "KernelLibrary", lambda _image: OnCpu(cuda, tmp_path, source))
        found.append(ActionTokenizer.load(path, backend="cuda", verify=False))
        return found[-1]

    yield load
    for tokenizer in found:
        tokenizer.close()
    # Sharpness, workspaces and buffers.
    assert not cuda.live
    assert not cuda.open_graphs


def logits_of(tokenizer: ActionTokenizer, form: str, batch: int, seed: int = 0) -> Any:
    model, random = tokenizer.model, np.random.default_rng(seed)
    if form != "pair":
        return random.standard_normal((*model.tokens_shape(batch), model.vocabulary)).astype(np.float32)
    classes, bits = model.num_classes, model.code_bits  # type: ignore[attr-defined]
    return tuple(random.standard_normal((batch, size)).astype(np.float32) for size in (classes, bits))


def on_gpu(given: Any) -> Any:
    """The same where a GPU would have it."""

    def copied(array: np.ndarray) -> FakeArray:
        memory = aligned(array.shape, array.dtype)
        memory[...] = array
        return FakeArray(memory)

    return tuple(map(copied, given)) if isinstance(given, tuple) else copied(given)


def outputs_of(tokenizer: ActionTokenizer, batch: int) -> list[FakeArray]:
    shape = tokenizer.model.actions_shape(batch)
    return [FakeArray(aligned(size, np.float32)) for size in (shape, shape, (batch,))]


@EVERY
def test_numpy_arrays_give_what_the_generated_c_gives(
    opened: Callable[[str], ActionTokenizer], bundles: dict[str, Path], form: str
) -> None:
    tokenizer = opened(form)
    with ActionTokenizer.load(bundles["steps" if form == "steps" else "chunks"], backend="c", verify=False) as c:
        for batch in (1, 5):
            logits = logits_of(tokenizer, form, batch, seed=batch)
            for terms in ({}, {"mode": "likeliest mode", "temperature": 0.5}):
                found, expected = (each.decode_logits(logits, **terms) for each in (tokenizer, c))
                np.testing.assert_allclose(found.actions, expected.actions, atol=2e-6)
                np.testing.assert_allclose(found.std, expected.std, rtol=1e-4, atol=1e-7)
                np.testing.assert_allclose(found.mode_probability, expected.mode_probability, rtol=1e-6)
                assert np.array_equal(found.mode, expected.mode)
                out = np.empty_like(found.actions)
                tokenizer.decode_logits_into(logits, out, **terms)
                assert np.array_equal(out, found.actions)


@EVERY
def test_arrays_of_the_gpu_are_decoded_where_they_lie_bound_or_not(
    opened: Callable[[str], ActionTokenizer], cuda: FakeCuda, form: str
) -> None:
    tokenizer = opened(form)
    logits = logits_of(tokenizer, form, 3)
    expected = tokenizer.decode_logits(logits, temperature=2.0)
    source, outputs = on_gpu(logits), outputs_of(tokenizer, 3)
    tokenizer.decode_logits_into(source, *outputs, temperature=2.0, stream=7)
    assert not outputs[0].array.any(), "not in the order of the stream"
    cuda.synchronize(7)
    wanted = expected.actions, expected.std, expected.mode_probability
    assert all(np.array_equal(output.array, part) for output, part in zip(outputs, wanted, strict=True))
    alone = outputs_of(tokenizer, 3)[0]
    bound = tokenizer.bind_decode_logits(source, alone, temperature=2.0, stream=7)
    alone.array.fill(0)
    bound()
    cuda.synchronize(7)
    assert np.array_equal(alone.array, expected.actions)
    bound.close()
    belief = tokenizer.decode_logits(source, temperature=2.0, stream=7)
    cuda.synchronize(7)
    where = belief.mode.__cuda_array_interface__
    mode = cuda.view(where["data"][0], where["shape"], np.int32)
    assert np.array_equal(mode, expected.mode)
    del belief, mode, where


@EVERY
def test_batches_beyond_the_slots_of_a_workspace_go_through_in_parts(
    opened: Callable[[str], ActionTokenizer], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    tokenizer = opened(form)
    logits = logits_of(tokenizer, form, 9)
    expected = tokenizer.decode_logits(logits)
    library = tokenizer.backend._library  # type: ignore[attr-defined]
    library.launches.clear()
    monkeypatch.setattr(cuda_beliefs, "_MOST_SLOT_BYTES", 4 * tokenizer.backend._belief_kernels.slot_bytes)  # type: ignore[attr-defined]
    rows = tuple(part[:8] for part in logits) if form == "pair" else logits[:8]
    found = tokenizer.decode_logits(rows)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert np.array_equal(one, other[:8])
    # Two parts, run once before they are captured.
    assert len({name for name, _ in library.launches}) == 1
    assert len(library.launches) == (2 if form == "steps" else 4)


@EVERY
def test_what_is_illegal_on_the_gpu_is_marked(
    opened: Callable[[str], ActionTokenizer], cuda: FakeCuda, form: str
) -> None:
    tokenizer = opened(form)
    source, outputs = on_gpu(logits_of(tokenizer, form, 3)), outputs_of(tokenizer, 3)
    (source[0] if form == "pair" else source).array[1].flat[0] = np.nan
    tokenizer.decode_logits_into(source, *outputs, stream=7)
    cuda.synchronize(7)
    for output in outputs:
        assert [bool(np.isnan(part).all()) for part in output.array] == [False, True, False]


@EVERY
def test_what_the_gpu_does_not_take_is_refused(opened: Callable[[str], ActionTokenizer], form: str) -> None:
    tokenizer = opened(form)
    logits = logits_of(tokenizer, form, 2)
    source, outputs = on_gpu(logits), outputs_of(tokenizer, 2)
    for call, message in (
        (lambda: tokenizer.decode_logits(source, mode="sample"), "samples are drawn of numpy arrays alone"),
        (lambda: tokenizer.decode_logits_into(source, *outputs, temperature=-1.0), "temperature is -1"),
        (lambda: tokenizer.decode_probabilities_into(source, *outputs, temperature=2.0), "logarithms to decode_logits"),
        (lambda: tokenizer.decode_logits_into(source, outputs[0], outputs[0]), "out overlaps the memory of std_out"),
        (lambda: tokenizer.decode_logits_into(source, outputs[2]), r"out is float32\[2\]; expected float32"),
        (lambda: tokenizer.decode_logits_into(source, np.empty(1, np.float32)), "beside arrays that do"),
        (
            lambda: tokenizer.bind_decode_logits(on_gpu(logits_of(tokenizer, form, 0)), *outputs_of(tokenizer, 0)),
            "empty",
        ),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()
