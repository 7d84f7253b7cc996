"""Which of a bundle's engines this library and this GPU can run: decided by the manifest alone, without either."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rfsq.runtime import BackendUnavailableError, BundleError
from rfsq.runtime.bundle.folder import Bundle
from rfsq.runtime.bundle.manifest import EngineEntry, GraphEntry, Manifest, TensorEntry
from tests.bundles import Recipe, deploy, make_manifest, without_beliefs
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends.gpu.driver import GpuDevice
from rfsq.runtime.backends.tensorrt import _check_tensors, choose_engines
from rfsq.runtime.backends.tensorrt_api import EngineTensor, ProfileShapes

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
