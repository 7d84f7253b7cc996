"""Which of a bundle's engines this library and this GPU can run: decided by the manifest alone, without either. Then
what is done around engines, which fakes take the place of."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import BackendUnavailableError, BundleError
from rfsq.runtime.backends.belief_replay import plain_question
from rfsq.runtime.backends.beliefs import BeliefAnswer, decodes_beliefs
from rfsq.runtime.backends.graph_beliefs import graph_inputs
from rfsq.runtime.bundle.folder import Bundle
from rfsq.runtime.bundle.manifest import EngineEntry, GraphEntry, Manifest, TensorEntry
from rfsq.runtime.bundle.probabilities import one_hot
from tests.bundles import Recipe, deploy, make_manifest, without_beliefs
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends import tensorrt
from rfsq.runtime.backends.gpu import backend as gpu_backend
from rfsq.runtime.backends.gpu.driver import GpuDevice
from rfsq.runtime.backends.tensorrt import TrtBackend, TrtProgram, _check_tensors, choose_engines
from rfsq.runtime.backends.tensorrt_api import EngineTensor, ProfileShapes
from tests.runtime.backends.gpu.fake_gpu import FakeCuda, FakeFunction, answer

MANIFEST = make_manifest(deploy(Recipe()))
GRAPHS = MANIFEST.every_graph_of("reduce")
H100 = GpuDevice("NVIDIA H100", "9.0", 80 * 10**9, "13.0")
API = SimpleNamespace(backend="tensorrt-rtx", version="1.6.1.120", tag="tensorrt-rtx-1.6.1.120")


def engine(graph: GraphEntry, **changes: object) -> EngineEntry:
    entry = EngineEntry(
        backend="tensorrt-rtx",
        version="1.6.1.120",
        targets=(),
        source=graph.file,
        source_sha256="0" * 64,
        file=f"engines/{graph.file}.engine",
        profile=(1, 1, 64),
        status="built",
        precision="not measured",
        device="",
        kernel_cache="",
        detail="",
    )
    return replace(entry, **changes)


def engines(**changes: object) -> list[EngineEntry]:
    """One for every graph."""
    return [engine(graph, **changes) for graph in GRAPHS]


def choose(entries: list[EngineEntry], device: GpuDevice = H100, manifest: Manifest = MANIFEST) -> list[EngineEntry]:
    bundle = Bundle(Path("some/bundle"), replace(manifest, engines=tuple(entries)), {})
    return choose_engines(bundle, API, device)  # type: ignore[arg-type]


def refusal(entries: list[EngineEntry], device: GpuDevice = H100) -> str:
    with pytest.raises(BackendUnavailableError) as caught:
        choose(entries, device)
    message = str(caught.value)
    # Whatever is missing, the cure is the same.
    assert message.endswith(
        "build engines for this machine, on it: python export/build_engine.py --from-bundle some/bundle"
    )
    return message


@pytest.mark.parametrize("targets", [(), ("9.0",), ("8.9", "9.0")])
def test_engines_for_this_gpu_come_in_the_order_of_the_graphs(targets: tuple[str, ...]) -> None:
    entries = engines(targets=targets)
    assert choose(entries) == choose(entries[::-1]) == entries


def test_without_engines_the_way_to_some_is_shown() -> None:
    message = refusal([])
    assert "some/bundle has no engine of tensorrt-rtx-1.6.1.120 from reduce/encoder.onnx" in message
    assert "for NVIDIA H100, compute capability 9.0; " in message


def test_engines_of_another_version_are_named() -> None:
    assert ", but tensorrt-rtx 1.5.0.114 for any GPU of the library; " in refusal(engines(version="1.5.0.114"))


def test_engines_of_another_library_are_named() -> None:
    entries = engines(backend="tensorrt", targets=("9.0",))
    assert ", but tensorrt 1.6.1.120 for 9.0; " in refusal(entries)


def test_engines_for_other_gpus_are_named() -> None:
    entries = [*engines(targets=("8.6", "8.9")), *engines(targets=("12.0",), version="1.5.0")]
    assert ", but tensorrt-rtx 1.6.1.120 for 8.6, 8.9; tensorrt-rtx 1.5.0 for 12.0; " in refusal(entries)
    assert choose(entries, replace(H100, compute_capability="8.9")) == entries[: len(GRAPHS)]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: str(graph.file))
def test_one_graph_without_an_engine_is_one_too_many(graph: GraphEntry) -> None:
    others = [entry for entry in engines() if entry.source != graph.file]
    assert f"from {graph.file} for NVIDIA H100" in refusal(others)


def test_bundles_that_were_built_before_there_were_beliefs_need_no_engines_for_them() -> None:
    older = without_beliefs(MANIFEST)
    entries = [engine(graph) for graph in older.graphs_of("reduce")]
    assert choose(entries, manifest=older) == entries


def test_engines_of_graphs_in_another_form_do_not_count() -> None:
    entries = [engine(graph) for graph in (*MANIFEST.graphs_of("gemm"), *MANIFEST.graphs_of("gemm_marked"))]
    assert "compute capability 9.0; build" in refusal(entries)


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_that_fit_the_one_validated_on_this_gpu_is_taken(order: int) -> None:
    built = engines(targets=("9.0",))
    elsewhere = engines(status="validated", precision="fp32", device="NVIDIA H200, compute capability 9.0")
    here = engines(status="validated", precision="fp32", device=str(H100))
    assert choose([*built, *elsewhere, *here][::order]) == here


def test_of_several_that_fit_one_validated_on_another_gpu_will_do() -> None:
    elsewhere = engines(status="validated", precision="fp32", device="NVIDIA H200, compute capability 9.0")
    assert choose(elsewhere) == elsewhere


# --- engines that are not what the manifest says ----------------------------------------------------------------------


CHUNK_GRAPHS = [graph for graph, _ in deployed_chunk_tokens(ChunkRecipe()).graphs() if graph.form == "reduce"]


def tensors_of(graph: GraphEntry, lengths: tuple[int, int, int]) -> list[EngineTensor]:
    """As an engine tells them that was built for 1, 2 and 64 chunks, of so many tokens where that is dynamic."""

    def profile(tensor: TensorEntry) -> ProfileShapes:
        return ProfileShapes(*map(tensor.shape_of, (1, 2, 64), lengths))

    inputs = [EngineTensor(part.name, "input", part.dtype, part.shape, profile(part)) for part in graph.inputs]
    return [*inputs, *(EngineTensor(part.name, "output", part.dtype, part.shape) for part in graph.outputs)]


@pytest.mark.parametrize(
    "graph", [*GRAPHS, *CHUNK_GRAPHS], ids=lambda graph: f"{graph.role} of {graph.inputs[0].shape}"
)
def test_an_engine_has_the_tensors_of_its_graph_and_the_profile_that_is_stated(graph: GraphEntry) -> None:
    entry = engine(graph, profile=(1, 2, 64))
    # A decoder of chunk tokens takes any number of them, and is tuned for all.
    tensors = tensors_of(graph, (1, graph.prefix, graph.prefix))
    _check_tensors(entry, graph, tensors)
    wrong = [engine(graph, profile=(1, 1, 64)), engine(graph, profile=(1, 2, 65))]
    for other in wrong:
        with pytest.raises(BundleError, match=r"has the tensors .* build the engines again"):
            _check_tensors(other, graph, tensors)
    with pytest.raises(BundleError, match="has the tensors"):
        _check_tensors(entry, graph, [replace(part, dtype="int64") for part in tensors])


@pytest.mark.parametrize("lengths", [(1, 9, 8), (2, 9, 9), (1, 1, 9), (9, 9, 9)])
def test_an_engine_for_fewer_numbers_of_chunk_tokens_is_refused(lengths: tuple[int, int, int]) -> None:
    graph = CHUNK_GRAPHS[1]
    with pytest.raises(BundleError, match="build the engines again"):
        _check_tensors(engine(graph, profile=(1, 2, 64)), graph, tensors_of(graph, lengths))


# --- memory -----------------------------------------------------------------------------------------------------------


class FakeContext:
    """Takes every shape and address, and tells what memory it was given."""

    def __init__(self) -> None:
        self.memory, self.batch = (0, 0), 0

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        return True

    def set_tensor_address(self, _name: str, _address: int) -> bool:
        return True

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        self.memory = address, num_bytes


def test_a_program_has_memory_for_the_largest_batch_it_was_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda().install(monkeypatch, gpu_backend)
    monkeypatch.setattr(tensorrt, "DeviceMemory", gpu_backend.DeviceMemory)
    api = SimpleNamespace(
        collect_messages=lambda: contextlib.nullcontext([]), memory_size=lambda context: 1000 * context.batch
    )
    context, encoder = FakeContext(), GRAPHS[0]
    program = TrtProgram(api, context, encoder)  # type: ignore[arg-type]
    for batch, expected in ((2, 2000), (5, 5000), (1, 5000)):
        program.bind(encoder.inputs[0].shape_of(batch, 1), range(len((*encoder.inputs, *encoder.outputs))))
        address, num_bytes = context.memory
        assert num_bytes == expected
        assert list(cuda.live) == [address]
    program.close()
    assert not cuda.live


def test_a_program_whose_context_needs_no_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tensorrt, "DeviceMemory")
    api = SimpleNamespace(collect_messages=lambda: contextlib.nullcontext([]), memory_size=lambda _context: 0)
    context, encoder = FakeContext(), GRAPHS[0]
    program = TrtProgram(api, context, encoder)  # type: ignore[arg-type]
    program.bind(encoder.inputs[0].shape_of(2, 1), range(len((*encoder.inputs, *encoder.outputs))))
    program.close()
    assert context.memory == (0, 0)


# --- beliefs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeFunction]:
    """Of a TensorRT whose engines are fakes, by the file of their graph, as they are made."""
    cuda, made = FakeCuda().install(monkeypatch, gpu_backend), dict[str, FakeFunction]()

    def function(_api: object, _runtime: object, _bundle: Bundle, graph: GraphEntry, entry: EngineEntry) -> Any:
        made[graph.file] = FakeFunction(cuda, graph, entry.profile[2])
        return made[graph.file]

    api = SimpleNamespace(**vars(API), create_runtime=lambda: None)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda _backend: api)
    monkeypatch.setattr(tensorrt, "open_device", lambda: H100)
    monkeypatch.setattr(tensorrt, "TrtFunction", function)
    return made


def opened(manifest: Manifest = MANIFEST) -> TrtBackend:
    entries = tuple(engine(graph, profile=(1, 1, 4)) for graph in manifest.every_graph_of("reduce"))
    return TrtBackend(Bundle(Path("some/bundle"), replace(manifest, engines=entries), {}), "tensorrt-rtx")


@pytest.mark.parametrize("count", [1, 4, 11])
def test_beliefs_go_through_their_own_engine_in_parts(functions: dict[str, FakeFunction], count: int) -> None:
    backend, model, prefix = opened(), MANIFEST.model, MANIFEST.model.depth
    logits = np.random.default_rng(0).normal(size=(*model.tokens_shape(count, prefix), model.vocabulary))
    question = plain_question((logits.astype(np.float32),), model, is_logits=True, keeps_mode=False)
    actions, std = (np.empty(model.actions_shape(count), np.float32) for _ in range(2))
    probability = np.empty(count, np.float32)
    backend.decode_belief_into(question, BeliefAnswer(actions, std, probability))
    (graph,) = (found for found in GRAPHS if found.role == "belief" and found.prefix == prefix)
    inputs = graph_inputs(model, question)
    for found, tensor in zip((actions, std), graph.outputs, strict=True):
        np.testing.assert_allclose(found, answer(inputs.arrays, tensor), rtol=1e-6)
    np.testing.assert_allclose(probability, inputs.mode_probability, rtol=1e-6)
    # No other was made ready: a robot that decodes tokens alone pays for no beliefs.
    assert {file for file, made in functions.items() if made.programs} == {graph.file}
    assert {batch for program in functions[graph.file].programs for batch in program.batches} == {min(count, 4)}
    backend.close()
    assert all(made.is_closed for made in functions.values())


@pytest.mark.usefixtures("functions")
def test_beliefs_that_are_certain_go_through_the_decoder() -> None:
    backend, model, prefix = opened(), MANIFEST.model, MANIFEST.model.depth
    tokens = np.random.default_rng(0).integers(model.vocabulary, size=model.tokens_shape(3, prefix), dtype=np.int32)
    actions, std, decoded = (np.full(model.actions_shape(3), np.nan, np.float32) for _ in range(3))
    question = plain_question((one_hot(tokens, model.vocabulary),), model, is_logits=False, keeps_mode=False)
    backend.decode_belief_into(question, BeliefAnswer(actions, std))
    backend.decode_into(tokens, None, decoded)
    np.testing.assert_array_equal(actions, decoded)
    assert not std.any()
    backend.close()


@pytest.mark.usefixtures("functions")
def test_a_bundle_without_beliefs_decodes_none() -> None:
    with contextlib.closing(opened()) as backend:
        assert decodes_beliefs(backend)
    with contextlib.closing(opened(without_beliefs(MANIFEST))) as backend:
        assert not decodes_beliefs(backend)
