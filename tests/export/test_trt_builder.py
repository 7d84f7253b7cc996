"""What `export.engines` promises of TensorRT, shown with real TensorRT-RTX engines built on this machine's CPU."""

import importlib.util
import os
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rfsq.export.engines import (
    BuiltEngine,
    EngineBuildError,
    Profile,
    build_engine,
    differences,
    inspect_engine,
)
from rfsq.runtime.backends.tensorrt_api import EngineTensor, ProfileShapes, find_tensorrt
from rfsq.runtime.bundle.errors import BackendUnavailableError, EngineRefusedError
from rfsq.runtime.bundle.manifest import GraphEntry, TensorEntry

RTX_NAMES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
RTX = next((name for name in RTX_NAMES if importlib.util.find_spec(name)), None)

needs_rtx = pytest.mark.skipif(RTX is None, reason="TensorRT-RTX is not importable: pip install '.[tensorrt-rtx]'")

T, A, D, L, K, HIDDEN = 8, 7, 16, 8, 7, 64
PROFILE = Profile(1, 4, 64)


class Graph:
    """Collects nodes and constants; `step` returns the name of the node's output."""

    def __init__(self, seed: int = 0) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def constant(self, values: object, dtype: type = np.float32) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weights(self, *shape: int) -> str:
        return self.constant(0.1 * self._random.standard_normal(shape))

    def step(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"step_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def reshape(self, values: str, *shape: int, output: str = "") -> str:
        return self.step("Reshape", values, self.constant(shape, np.int64), output=output)

    def serialize(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> bytes:
        values = [
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in side.items()]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "graph", *values, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        return model.SerializeToString(deterministic=True)


def linear(graph: Graph, values: str, inputs: int, outputs: int, form: str) -> str:
    if form == "gemm":
        return graph.step("Gemm", values, graph.weights(inputs, outputs), graph.weights(outputs))
    if form == "matmul":
        return graph.step("Add", graph.step("MatMul", values, graph.weights(inputs, outputs)), graph.weights(outputs))
    expanded = graph.step("Unsqueeze", values, graph.constant([-2], np.int64))
    products = graph.step("Mul", expanded, graph.weights(outputs, inputs))
    sums = graph.step("ReduceSum", products, graph.constant([-1], np.int64), keepdims=0)
    return graph.step("Add", sums, graph.weights(outputs))


def mish(graph: Graph, values: str, form: str) -> str:
    if form == "mish":
        return graph.step("Mish", values)
    return graph.step("Mul", values, graph.step("Tanh", graph.step("Softplus", values)))


def decoder(
    layers: int = 3, *, form: str = "gemm", activation: str = "mish", kind: int = TensorProto.INT32, seed: int = 0
) -> bytes:
    """tokens `kind` [batch, T, D, layers] -> actions float32 [batch, T, A]"""
    graph = Graph(seed)
    flat = graph.reshape(graph.step("Cast", "tokens", to=TensorProto.FLOAT), -1, D * layers)
    hidden = mish(graph, linear(graph, flat, D * layers, HIDDEN, form), activation)
    graph.reshape(linear(graph, hidden, HIDDEN, A, form), -1, T, A, output="actions")
    return graph.serialize(
        {"tokens": (kind, ["batch", T, D, layers])}, {"actions": (TensorProto.FLOAT, ["batch", T, A])}
    )


def encoder(*, dynamic: bool = False, form: str = "gemm") -> bytes:
    """actions float32 [batch, T, A] -> tokens int32 [batch, T, D, L], and stats float32 [batch, T, L, 2] if dynamic"""
    graph = Graph()
    one, half, top = graph.constant(1.0), graph.constant(0.5), graph.constant(K - 1.0)
    low, middle, width = graph.constant(0.0), graph.constant((K - 1) / 2), graph.constant(2 / (K - 1))
    last = graph.constant([-1], np.int64)

    def spread(centred: str) -> str:
        squares = graph.step("ReduceSum", graph.step("Mul", centred, centred), last, keepdims=1)
        deviation = graph.step("Sqrt", graph.step("Div", squares, graph.constant(D - 1.0)))
        return graph.step("Add", deviation, graph.constant(1e-5))

    hidden = mish(graph, linear(graph, graph.reshape("actions", -1, A), A, HIDDEN, form), "mish")
    residual = graph.step("Tanh", linear(graph, hidden, HIDDEN, D, form))
    tokens, stats = [], []
    for layer in range(L):
        mean = graph.step("ReduceMean", residual, last, keepdims=1) if dynamic else graph.constant(np.zeros(D))
        centred = graph.step("Sub", residual, mean)
        scale = spread(centred) if dynamic else graph.constant(np.full(D, 0.25**layer))
        position = graph.step("Mul", graph.step("Add", graph.step("Div", centred, scale), one), middle)
        index = graph.step("Clip", graph.step("Ceil", graph.step("Sub", position, half)), low, top)
        level = graph.step("Sub", graph.step("Mul", index, width), one)
        residual = graph.step("Sub", residual, graph.step("Add", graph.step("Mul", level, scale), mean))
        tokens.append(graph.reshape(index, -1, T, D, 1))
        if dynamic:
            stats.append(graph.step("Concat", *(graph.reshape(v, -1, T, 1, 1) for v in (mean, scale)), axis=3))
    graph.step("Cast", graph.step("Concat", *tokens, axis=3), output="tokens", to=TensorProto.INT32)
    outputs = {"tokens": (TensorProto.INT32, ["batch", T, D, L])}
    if dynamic:
        graph.step("Concat", *stats, axis=2, output="stats")
        outputs["stats"] = (TensorProto.FLOAT, ["batch", T, L, 2])
    return graph.serialize({"actions": (TensorProto.FLOAT, ["batch", T, A])}, outputs)


def build(onnx_bytes: bytes, *compute_capabilities: str, backend: str = "tensorrt-rtx") -> BuiltEngine:
    return build_engine(backend, onnx_bytes, PROFILE, compute_capabilities)


@pytest.fixture(scope="module")
def built() -> BuiltEngine:
    """The engine of `decoder()`."""
    return build(decoder())


def problems_of(engine: BuiltEngine, onnx_bytes: bytes) -> list[str]:
    """What the check says, asked with the tensors that the graph itself declares."""
    graph = onnx.load_model_from_string(onnx_bytes).graph
    inputs, outputs = (
        tuple(
            TensorEntry(
                value.name,
                helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim),
            )
            for value in side
        )
        for side in (graph.input, graph.output)
    )
    entry = GraphEntry("x.onnx", "decoder", 1, "reduce", inputs, outputs)
    return list(differences(engine, entry, inspect_engine(engine)[1]))


GRAPHS = {
    "decoder": decoder(L),
    "coarse decoder": decoder(3),
    "decoder with MatMul and Add": decoder(form="matmul"),
    "decoder as multiply and reduce-sum": decoder(form="multiply-reduce"),
    "decoder with Mish in parts": decoder(activation="softplus-tanh-mul"),
    "decoder of uint8 tokens": decoder(kind=TensorProto.UINT8),
    "encoder": encoder(),
    "encoder as multiply and reduce-sum": encoder(form="multiply-reduce"),
    "dynamic encoder with statistics": encoder(dynamic=True),
}


@needs_rtx
class TestBuilding:
    @pytest.mark.parametrize("name", GRAPHS)
    def test_every_graph_that_is_deployed_builds_without_a_warning(self, name):
        engine = build(GRAPHS[name])

        assert engine.warnings == ()
        assert problems_of(engine, GRAPHS[name]) == []

    def test_an_engine_knows_how_it_was_made(self, built):
        assert built.backend == "tensorrt-rtx"
        assert built.version == find_tensorrt("tensorrt-rtx").version
        assert built.profile == PROFILE
        assert built.tensors == (
            EngineTensor(
                "tokens", "input", "int32", (-1, T, D, 3), ProfileShapes((1, T, D, 3), (4, T, D, 3), (64, T, D, 3))
            ),
            EngineTensor("actions", "output", "float32", (-1, T, A)),
        )

    def test_what_tensorrt_warns_about_is_kept(self):
        engine = build(decoder(kind=TensorProto.INT64))
        assert any("Int64" in warning for warning in engine.warnings)

    def test_targets_can_be_chosen(self):
        engine = build(decoder(), "8.9", "12.0")
        assert problems_of(engine, decoder()) == []

    def test_the_builder_is_told_strong_types_no_tf32_and_the_targets(self, monkeypatch):
        trt = find_tensorrt("tensorrt-rtx").module
        original, seen = trt.Builder.build_serialized_network, []

        def spy(self, network, config):
            seen.append(
                {
                    "typed": network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
                    "tf32": config.get_flag(trt.BuilderFlag.TF32),
                    "host code": config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE),
                    "profiles": config.num_optimization_profiles,
                    "target": config.get_compute_capability(0).name,
                }
            )
            return original(self, network, config)

        monkeypatch.setattr(trt.Builder, "build_serialized_network", spy)
        build(decoder(), "8.9")

        assert seen == [{"typed": True, "tf32": False, "host code": False, "profiles": 1, "target": "SM89"}]

    def test_the_callers_polygraphy_and_environment_are_as_before(self, monkeypatch):
        polygraphy = importlib.import_module("polygraphy.backend.trt")
        environment = dict(os.environ)
        monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)

        build(decoder())
        with pytest.raises(EngineBuildError):
            build(b"not an ONNX file")

        assert sys.modules["polygraphy.backend.trt"] is polygraphy
        assert "tensorrt_rtx" not in sys.modules
        assert dict(os.environ) == environment

    def test_one_process_builds_for_both_libraries(self, built, monkeypatch):
        # TensorRT-RTX under the other library's name and version: Polygraphy takes its full-TensorRT path.
        stand_in = ModuleType("tensorrt")
        vars(stand_in).update({**vars(importlib.import_module(RTX)), "__name__": "tensorrt", "__version__": "10.13.2"})
        monkeypatch.setitem(sys.modules, "tensorrt", stand_in)

        other = build(decoder(), backend="tensorrt")

        assert (built.backend, other.backend, other.version) == ("tensorrt-rtx", "tensorrt", "10.13.2")
        assert other.tensors == built.tensors


class TestRefusedRequests:
    @pytest.mark.parametrize("sizes", [(8, 4, 64), (1, 64, 8), (0, 1, 8), (16, 8, 8)])
    def test_a_profile_out_of_order_is_refused(self, sizes):
        with pytest.raises(ValueError, match="1 <= minimum <= optimum <= maximum"):
            Profile(*sizes)

    def test_an_unknown_backend_is_refused(self):
        with pytest.raises(BackendUnavailableError, match="'openvino'"):
            build(decoder(), backend="openvino")

    @needs_rtx
    @pytest.mark.parametrize("target", ["8.7", "9.0", "99", "SM89"])
    def test_an_unknown_compute_capability_is_refused_with_the_valid_ones(self, target):
        with pytest.raises(EngineBuildError, match=rf"'{target}'.*valid are .*8\.9.*12\.0"):
            build(decoder(), target)

    @needs_rtx
    @pytest.mark.parametrize("content", [b"not an ONNX file", decoder()[:100]])
    def test_invalid_onnx_is_refused_in_the_parsers_words(self, content):
        with pytest.raises(EngineBuildError, match="Failed to parse the ONNX model"):
            build(content)

    @needs_rtx
    def test_an_empty_file_is_refused_in_the_builders_words(self):
        with pytest.raises(EngineBuildError, match="Network must have at least one output"):
            build(b"")

    @needs_rtx
    def test_an_unsupported_operator_is_named(self):
        model = onnx.load_model_from_string(decoder())
        model.graph.node[-1].op_type = "NoSuchOperator"
        with pytest.raises(EngineBuildError, match="NoSuchOperator is not supported"):
            build(model.SerializeToString())

    @needs_rtx
    @pytest.mark.parametrize("shape", [[4, T, A], ["batch", "steps", A]])
    def test_only_the_batch_may_be_dynamic_and_it_must_be(self, shape):
        graph = Graph()
        graph.step("Ceil", "x", output="y")
        content = graph.serialize({"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)})
        with pytest.raises(EngineBuildError, match="expected a dynamic first dimension and no other"):
            build(content)


@needs_rtx
class TestChecking:
    def test_the_description_says_where_its_knowledge_comes_from(self, built):
        source, tensors = inspect_engine(built)
        # Bound to a name so that the runtime outlives the engine.
        runtime = find_tensorrt("tensorrt-rtx").create_runtime()
        is_read_here = runtime.deserialize_cuda_engine(built.serialized) is not None
        assert source == ("engine" if is_read_here else "network")
        assert set(tensors) == set(built.tensors)

    def test_a_truncated_engine_is_refused(self, built):
        half = built.serialized[: len(built.serialized) // 2]

        with pytest.raises(EngineRefusedError, match="refuses the engine"):
            inspect_engine(replace(built, serialized=half))

    def test_an_engine_of_another_shape_is_noticed(self, built):
        problems = problems_of(built, decoder(L))
        assert any("'tokens': shape is (-1, 8, 16, 3), the graph asks for (-1, 8, 16, 8)" in line for line in problems)

    def test_missing_and_unexpected_tensors_are_noticed(self, built):
        problems = problems_of(built, encoder(dynamic=True))
        assert any("output 'stats' of the graph is missing" in line for line in problems)
        assert any("'tokens': mode is input, the graph asks for output" in line for line in problems)

        renamed = replace(built, tensors=tuple(replace(tensor, name=f"{tensor.name}2") for tensor in built.tensors))
        if inspect_engine(built)[0] == "network":
            assert any("input 'tokens2' is not in the graph" in line for line in problems_of(renamed, decoder()))

    def test_another_profile_is_noticed(self, built):
        problems = problems_of(replace(built, profile=Profile(1, 4, 128)), decoder())
        assert len(problems) == 1
        assert "profile" in problems[0]

    def test_a_type_that_tensorrt_changed_silently_is_noticed(self):
        # TensorRT-RTX builds float64 as float32 without a word.
        graph = Graph()
        graph.step("Ceil", "x", output="y")
        kind = (TensorProto.DOUBLE, ["batch", T, A])
        content = graph.serialize({"x": kind}, {"y": kind})
        engine = build(content)

        assert engine.warnings == ()
        assert problems_of(engine, content) == [
            "input 'x': dtype is float32, the graph asks for float64",
            "output 'y': dtype is float32, the graph asks for float64",
        ]
