"""Buffers, slices and captured graphs around an engine, on a CUDA in numpy's memory: no GPU is needed."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime.backends.contract import judged
from rfsq.runtime.bundle.errors import InferenceError
from rfsq.runtime.bundle.manifest import GraphEntry
from tests.bundles import Recipe, deploy, make_manifest
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens
from tests.runtime.backends.gpu.fake_gpu import FakeCuda, FakeFunction, aligned, answer

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends.gpu import backend as gpu_backend
from rfsq.runtime.backends.gpu import kept as kept_module
from rfsq.runtime.backends.gpu.arrays import GpuArray, GpuStream
from rfsq.runtime.backends.gpu.backend import GpuBackend
from rfsq.runtime.backends.gpu.kept import Kept

#: Small enough that batches of a few chunks need slices: of 5 chunks for the encoder, of 8 for the decoder of 2 layers.
SLICE_BYTES = 600
CALLERS_STREAM = GpuStream(7, object())


class Bench:
    """A backend of fake functions for a small model."""

    def __init__(self, cuda: FakeCuda, mode: DeployMode = DeployMode.CALIBRATED, max_batch: int = 64) -> None:
        self.cuda, self.manifest = cuda, make_manifest(deploy(Recipe(mode=mode)))
        self.entries = self.manifest.graphs_of("reduce")
        self.functions = [FakeFunction(cuda, entry, max_batch) for entry in self.entries]
        self.backend = GpuBackend("fake", "a fake", "a GPU", self.functions)

    def inputs(self, entry: GraphEntry, batch: int, seed: int = 0) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        return [random.integers(100, size=(batch, *tensor.shape[1:])).astype(tensor.dtype) for tensor in entry.inputs]

    def encode(self, batch: int, seed: int = 0) -> None:
        entry = self.entries[0]
        (actions,) = self.inputs(entry, batch, seed)
        outputs = [np.empty((batch, *tensor.shape[1:]), tensor.dtype) for tensor in entry.outputs]
        self.backend.encode_into(actions, outputs[0], outputs[1] if len(outputs) > 1 else None)
        for output, tensor in zip(outputs, entry.outputs, strict=True):
            np.testing.assert_array_equal(output, answer([actions], tensor))

    def decode(self, entry: GraphEntry, batch: int, seed: int = 0) -> None:
        inputs = self.inputs(entry, batch, seed)
        actions = np.empty((batch, *entry.outputs[0].shape[1:]), np.float32)
        self.backend.decode_into(inputs[0], inputs[1] if len(inputs) > 1 else None, actions)
        np.testing.assert_array_equal(actions, answer(inputs, entry.outputs[0]))

    @property
    def num_programs(self) -> int:
        return sum(not program.is_closed for function in self.functions for program in function.programs)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(gpu_backend, "_SLICE_BYTES", SLICE_BYTES)
    return FakeCuda().install(monkeypatch, gpu_backend)


@pytest.fixture
def bench(cuda: FakeCuda) -> Bench:
    return Bench(cuda)


# --- arrays of the host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct_bytes", [0, 64, 2**16], ids=["copied", "some copied", "written directly"])
@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def test_every_batch_comes_out_chunk_by_chunk_however_it_is_sliced(
    mode: DeployMode, direct_bytes: int, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_backend, "_DIRECT_BYTES", direct_bytes)
    bench = Bench(cuda, mode)
    for batch in (*range(1, 24), 61):
        bench.encode(batch, seed=batch)
        for entry in bench.entries[1:]:
            bench.decode(entry, batch, seed=batch)


@pytest.mark.parametrize(("direct_bytes", "num_allocations"), [(0, 4), (95, 4), (96, 3)])
def test_small_results_are_written_straight_to_the_host(
    direct_bytes: int, num_allocations: int, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of a chunk take 96 bytes. Inputs always have a copy on the GPU, where kernels read them often."""
    monkeypatch.setattr(gpu_backend, "_DIRECT_BYTES", direct_bytes)
    Bench(cuda).encode(1)
    assert len(cuda.live) == num_allocations


def test_slices_are_all_of_one_size_and_the_last_one_overlaps(bench: Bench) -> None:
    """Or every batch size would keep a graph of its own for what is left."""
    for batch in (11, 12, 13, 14, 61):
        bench.encode(batch)
    assert {tuple(program.batches) for program in bench.functions[0].programs} == {(5,)}
    # Two slices are under way at a time.
    assert len(bench.functions[0].programs) == 2


def test_no_slice_is_larger_than_what_the_engine_takes(cuda: FakeCuda) -> None:
    bench = Bench(cuda, max_batch=3)
    for batch in (3, 4, 7):
        bench.encode(batch)
        bench.decode(bench.entries[1], batch)
    assert max(size for function in bench.functions for program in function.programs for size in program.batches) == 3


def test_statistics_that_nobody_wants_are_left_out(cuda: FakeCuda) -> None:
    bench = Bench(cuda, DeployMode.DYNAMIC)
    entry = bench.entries[0]
    for batch in (2, 13):
        (actions,) = bench.inputs(entry, batch)
        tokens = np.empty((batch, *entry.outputs[0].shape[1:]), np.int32)
        bench.backend.encode_into(actions, tokens, None)
        np.testing.assert_array_equal(tokens, answer([actions], entry.outputs[0]))


def test_a_call_that_was_made_before_makes_nothing_new(bench: Bench) -> None:
    for batch in (1, 4, 12):
        bench.encode(batch)
    programs, memory = bench.num_programs, set(bench.cuda.live)
    for seed, batch in itertools.product(range(3), (1, 4, 12)):
        bench.encode(batch, seed)
    assert (bench.num_programs, set(bench.cuda.live)) == (programs, memory)


def test_only_a_few_batch_sizes_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "_SLICE_BYTES", 2**20)
    bench = Bench(bench.cuda)
    for batch in range(1, 20):
        bench.encode(batch)
    kept = [program.batches for program in bench.functions[0].programs if not program.is_closed]
    assert kept == [[16], [17], [18], [19]]
    assert bench.cuda.open_graphs == 4


def test_close_frees_everything(cuda: FakeCuda) -> None:
    bench = Bench(cuda, DeployMode.DYNAMIC)
    for batch in (1, 2, 13):
        bench.encode(batch)
        bench.decode(bench.entries[1], batch)
    assert cuda.live
    bench.backend.close()
    assert (cuda.live, cuda.streams, cuda.open_graphs, bench.num_programs) == ({}, {}, 0, 0)
    assert all(function.is_closed for function in bench.functions)


def test_tokens_of_another_type_go_through_functions_of_their_own(cuda: FakeCuda) -> None:
    """Arrays of the host through those of the first type, whatever it is; on the GPU they are taken as they are."""
    bench = Bench(cuda)
    as_bytes = [
        replace(
            entry,
            inputs=tuple(replace(t, dtype="uint8") if t.name == "tokens" else t for t in entry.inputs),
            outputs=tuple(replace(t, dtype="uint8") if t.name == "tokens" else t for t in entry.outputs),
        )
        for entry in bench.entries
    ]
    functions = [FakeFunction(cuda, entry) for entry in (*bench.entries, *as_bytes)]
    backend = GpuBackend("fake", "a fake", "a GPU", functions)
    assert backend.token_types == (np.dtype(np.int32), np.dtype(np.uint8))
    assert judged(backend) == {"": backend}
    for entry, function in zip((bench.entries[0], as_bytes[0]), (functions[0], functions[3]), strict=True):
        inputs, output = arrays_of(bench, entry, 3)
        inputs[0] %= 2
        backend.encode_on_gpu([on_gpu(array) for array in (*inputs, output)], CALLERS_STREAM)
        cuda.synchronize(CALLERS_STREAM.handle)
        np.testing.assert_array_equal(output, answer(inputs, entry.outputs[0]))
        # Its own function, and no other, was used.
        assert [used for used in functions if used.programs][-1] is function
    functions += [FakeFunction(cuda, entry) for entry in as_bytes]
    alone = GpuBackend("fake", "a fake", "a GPU", functions[6:])
    (actions,) = bench.inputs(as_bytes[0], 3)
    actions = actions % 2
    tokens = np.empty((3, *as_bytes[0].outputs[0].shape[1:]), np.int32)
    alone.encode_into(actions, tokens, None)
    np.testing.assert_array_equal(tokens, answer([actions], as_bytes[0].outputs[0]))
    assert [bool(function.programs) for function in functions] == [True, False, False] * 3
    alone.close()
    backend.close()
    cuda.streams.pop(CALLERS_STREAM.handle)
    assert (cuda.live, cuda.streams, cuda.open_graphs) == ({}, {}, 0)
    assert all(function.is_closed for function in functions)


def chunk_entries() -> list[GraphEntry]:
    """Encoder and decoder of chunk tokens: 9 of them for 4 steps of 3 dimensions."""
    graphs = (graph for graph, _ in deployed_chunk_tokens(ChunkRecipe()).graphs() if graph.form == "reduce")
    return [graph for graph in graphs if graph.role != "belief"]


@pytest.mark.parametrize("batch", [1, 4, 13])
def test_any_number_of_chunk_tokens_goes_through_one_decoder(batch: int, cuda: FakeCuda) -> None:
    encoder, decoder = chunk_entries()
    function = FakeFunction(cuda, decoder)
    backend = GpuBackend("fake", "a fake", "a GPU", [FakeFunction(cuda, encoder), function])
    for length in (9, 1, 4, 9):
        tokens = aligned((batch, length), np.int32)
        tokens[...] = np.random.default_rng(length).integers(100, size=tokens.shape)
        on_host, decoded, again = (aligned((batch, 4, 3), np.float32) for _ in range(3))
        backend.decode_into(tokens, None, on_host)
        backend.decode_on_gpu([on_gpu(tokens), on_gpu(decoded)], CALLERS_STREAM)
        cuda.synchronize(CALLERS_STREAM.handle)
        bound = backend.bind_decode([on_gpu(tokens), on_gpu(again)], CALLERS_STREAM)
        tokens += 1
        bound()
        cuda.synchronize(CALLERS_STREAM.handle)
        bound.close()
        np.testing.assert_array_equal(again, answer([tokens], decoder.outputs[0]))
        for found in (on_host, decoded):
            np.testing.assert_array_equal(found, answer([tokens - 1], decoder.outputs[0]))
    backend.close()
    cuda.streams.pop(CALLERS_STREAM.handle)
    assert (cuda.live, cuda.streams, cuda.open_graphs) == ({}, {}, 0)
    assert function.is_closed


def test_only_a_few_numbers_of_chunk_tokens_are_kept_ready(cuda: FakeCuda) -> None:
    encoder, decoder = chunk_entries()
    function = FakeFunction(cuda, decoder)
    backend = GpuBackend("fake", "a fake", "a GPU", [FakeFunction(cuda, encoder), function])
    for length in (*range(1, 10), *range(1, 10)):
        backend.decode_into(np.zeros((1, length), np.int32), None, np.empty((1, 4, 3), np.float32))
    assert sum(not program.is_closed for program in function.programs) == kept_module._KEPT


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [3, 13])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_failure_is_told_and_what_it_left_is_never_used_again(bench: Bench, batch: int, good: int) -> None:
    """At the first run, in the middle of the slices, or at the end: the next call is right, and nothing is leaked."""
    bench.encode(batch)
    before, programs = len(bench.cuda.live), list(bench.functions[0].programs)
    bench.cuda.fail_after = good
    try:
        bench.encode(batch, seed=1)
    except InferenceError as error:
        assert "on purpose" in str(error)  # noqa: PT017
        assert all(program.is_closed for program in programs)
    else:
        assert batch == 3, "a batch of several slices waits three times"
        assert good > 0
    bench.cuda.fail_after = None
    bench.encode(batch, seed=2)
    assert len(bench.cuda.live) == before
    bench.backend.close()
    assert (bench.cuda.live, bench.cuda.open_graphs, bench.num_programs) == ({}, 0, 0)


def test_a_first_run_that_fails_leaves_nothing(bench: Bench) -> None:
    bench.cuda.fail_after = 0
    with pytest.raises(InferenceError, match="on purpose"):
        bench.encode(2)
    assert (bench.cuda.live, bench.cuda.streams, bench.cuda.open_graphs, bench.num_programs) == ({}, {}, 0, 0)


def test_a_wrong_array_spoils_no_later_call(bench: Bench) -> None:
    bench.encode(2)
    with pytest.raises(ValueError, match="broadcast"):
        bench.backend.encode_into(np.zeros((2, 9, 9), np.float32), np.empty((2, 2, 4, 3), np.int32), None)
    bench.encode(2, seed=1)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 13])
def test_threads_never_see_each_others_numbers(bench: Bench, batch: int) -> None:
    barrier = threading.Barrier(4)

    def work(thread: int) -> None:
        barrier.wait()
        for turn in range(50):
            bench.encode(batch, seed=1000 * thread + turn)
            bench.decode(bench.entries[1 + thread % 2], batch, seed=1000 * thread + turn)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    bench.backend.close()
    assert (bench.cuda.live, bench.cuda.open_graphs, bench.num_programs) == ({}, 0, 0)


class Interrupted(OrderedDict[int, list[object]]):
    """Whatever looks something up is interrupted by another call before it can use what it found."""

    interruption: Callable[[], None] | None = None

    def get(self, key: int, default: object = None) -> object:
        found = super().get(key, default)
        interruption, self.interruption = self.interruption, None
        if interruption is not None:
            interruption()
        return found


@pytest.fixture
def closed() -> list[object]:
    return []


@pytest.fixture
def kept(closed: list[object]) -> Kept:
    kept = Kept(lambda key: [key], closed.append)
    kept._idle = Interrupted()
    return kept


def use_others(kept: Kept) -> None:
    """So many that all keys from before are dropped."""
    for key in range(100, 101 + kept_module._KEPT):
        kept.give_back(key, kept.take(key))


def test_what_another_call_drops_is_not_taken(kept: Kept, closed: list[object]) -> None:
    kept.give_back(1, kept.take(1))
    kept._idle.interruption = lambda: use_others(kept)
    item = kept.take(1)
    assert not any(item is gone for gone in closed)


def test_what_is_given_back_as_its_key_is_dropped_is_closed(kept: Kept, closed: list[object]) -> None:
    item = kept.take(1)
    kept._idle.interruption = lambda: use_others(kept)
    kept.give_back(1, item)
    assert [gone for gone in closed if gone is item] == [item]


# --- arrays of the GPU ------------------------------------------------------------------------------------------------


def on_gpu(array: np.ndarray) -> GpuArray:
    return GpuArray(array.ctypes.data, array.shape, array.dtype, True, None, array)


def arrays_of(bench: Bench, entry: GraphEntry, batch: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    inputs = []
    for array in bench.inputs(entry, batch, seed):
        inputs.append(aligned(array.shape, array.dtype))
        inputs[-1][...] = array
    return inputs, aligned((batch, *entry.outputs[0].shape[1:]), entry.outputs[0].dtype)


@pytest.mark.parametrize("batch", [1, 4, 5, 13])
def test_arrays_of_the_gpu_are_used_where_they_lie_and_on_the_callers_stream(cuda: FakeCuda, batch: int) -> None:
    bench = Bench(cuda, max_batch=4)
    for entry, call in zip(bench.entries[:2], (bench.backend.encode_on_gpu, bench.backend.decode_on_gpu), strict=True):
        inputs, output = arrays_of(bench, entry, batch)
        call([on_gpu(array) for array in (*inputs, output)], CALLERS_STREAM)
        assert (output == 0).all(), "done before the caller's stream has come so far"
        cuda.synchronize(CALLERS_STREAM.handle)
        np.testing.assert_array_equal(output, answer(inputs, entry.outputs[0]))
    assert cuda.live == {}


def test_a_bound_call_is_captured_once_and_reads_its_arrays_anew(bench: Bench) -> None:
    entry = bench.entries[0]
    inputs, output = arrays_of(bench, entry, 3)
    call = bench.backend.bind_encode([on_gpu(array) for array in (*inputs, output)], CALLERS_STREAM)
    np.testing.assert_array_equal(output, answer(inputs, entry.outputs[0]))
    for number in range(3):
        inputs[0].fill(number)
        output.fill(-9)
        call()
        assert (output == -9).all()
        bench.cuda.synchronize(CALLERS_STREAM.handle)
        np.testing.assert_array_equal(output, answer(inputs, entry.outputs[0]))
    assert (bench.cuda.open_graphs, bench.num_programs) == (1, 1)
    call.close()
    call.close()
    assert (bench.cuda.open_graphs, bench.num_programs) == (0, 0)
    with pytest.raises(InferenceError, match="this bound call was closed"):
        call()


def test_a_bound_call_waits_for_what_the_caller_has_put_on_the_stream(bench: Bench) -> None:
    inputs, output = arrays_of(bench, bench.entries[0], 2)
    bench.cuda.put(CALLERS_STREAM.handle, lambda: inputs[0].fill(5))
    bench.backend.bind_encode([on_gpu(array) for array in (*inputs, output)], CALLERS_STREAM)
    np.testing.assert_array_equal(output, answer([np.full_like(inputs[0], 5)], bench.entries[0].outputs[0]))


def test_more_chunks_than_the_engine_takes_cannot_be_bound(cuda: FakeCuda) -> None:
    bench = Bench(cuda, max_batch=4)
    inputs, output = arrays_of(bench, bench.entries[0], 5)
    with pytest.raises(InferenceError, match="5 chunks cannot be bound at once, 4 can; call without binding"):
        bench.backend.bind_encode([on_gpu(array) for array in (*inputs, output)], CALLERS_STREAM)
    assert bench.num_programs == 0


def test_a_binding_that_fails_leaves_nothing(bench: Bench) -> None:
    inputs, output = arrays_of(bench, bench.entries[0], 2)
    bench.cuda.fail_after = 1
    with pytest.raises(InferenceError, match="on purpose"):
        bench.backend.bind_encode([on_gpu(array) for array in (*inputs, output)], CALLERS_STREAM)
    assert (bench.cuda.open_graphs, bench.num_programs) == (0, 0)
