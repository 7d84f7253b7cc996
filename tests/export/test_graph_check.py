"""Graphs are checked before anything is compiled from them; every problem names the file."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from rfsq.export import parity
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.chunk_tokens import ChunkTokens
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm
from rfsq.export.parity import check_graph, cross_check
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import GraphEntry, Manifest, TensorEntry
from tests.bundles import Deployed, Recipe, deploy, export_graphs, golden_vectors, graph_file, make_manifest
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint, deployed_chunk_tokens, random_chunks
from tests.export.plan_numpy import MODES


class Graphs:
    """All graphs of one small model, with what is to be known of them."""

    def __init__(self, mode: DeployMode) -> None:
        self.deployed: Deployed = deploy(Recipe(mode=mode, num_chunks=40))
        self.manifest: Manifest = make_manifest(self.deployed)
        self.contents = export_graphs(self.deployed)
        self.golden: Golden = golden_vectors(self.deployed)
        self.entries: dict[str, GraphEntry] = {entry.file: entry for entry in self.manifest.graphs}

    def cross_check(self, file: str, content: bytes) -> list[str]:
        return cross_check(self.entries[file], content, self.golden, self.manifest.model)


@pytest.fixture(scope="module", params=MODES)
def graphs(request: pytest.FixtureRequest) -> Graphs:
    return Graphs(request.param)


@pytest.fixture(scope="module")
def calibrated_graphs() -> Graphs:
    return Graphs(DeployMode.CALIBRATED)


FILES = [graph_file(name, form) for form in LinearForm for name in ("encoder.onnx", "decoder.onnx", "decoder_l2.onnx")]


def altered(content: bytes, change: Callable[[onnx.ModelProto], object]) -> bytes:
    model = onnx.load_model_from_string(content)
    change(model)
    return model.SerializeToString()


# --- sound graphs -----------------------------------------------------------------------------------------------------


def test_sound_graphs_pass_both_checks(graphs: Graphs) -> None:
    beliefs = {graph_file(name, form) for form in BELIEF_FORMS for name in ("belief.onnx", "belief_l2.onnx")}
    assert set(graphs.entries) == set(FILES) | (set() if graphs.manifest.model.has_stats else beliefs)
    for file, content in graphs.contents.items():
        assert check_graph(graphs.entries[file], content) == []
        assert graphs.cross_check(file, content) == []


@pytest.mark.parametrize(("form", "expected"), [(LinearForm.GEMM, [32, 8]), (LinearForm.REDUCE, [8] * 5)])
def test_a_graph_is_run_on_all_chunks_and_on_few_at_once(
    form: LinearForm, expected: list[int], calibrated_graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of products and sums holds far more of a chunk than it is large."""
    evaluator_of, sizes = parity.onnx_evaluator, list[int]()

    def counting(content: bytes) -> ReferenceEvaluator:
        evaluator = evaluator_of(content)
        run = evaluator.run
        monkeypatch.setattr(
            evaluator, "run", lambda names, feed: sizes.append(len(feed["actions"])) or run(names, feed)
        )
        return evaluator

    monkeypatch.setattr(parity, "onnx_evaluator", counting)
    file = graph_file("encoder.onnx", form)
    entry, content = calibrated_graphs.entries[file], calibrated_graphs.contents[file]
    golden, model = calibrated_graphs.golden, calibrated_graphs.manifest.model
    assert cross_check(entry, content, golden, model) == []
    assert sizes == expected
    tokens = golden.tokens.copy()
    tokens[-1, -1, -1, 0] ^= 1
    problems = cross_check(entry, content, replace(golden, tokens=tokens), model)
    assert ["wrong tokens, first token [39, " in problem for problem in problems] == [True, True]


# --- form -------------------------------------------------------------------------------------------------------------


def with_tensor(entry: GraphEntry, side: str, **changes: object) -> GraphEntry:
    first, *rest = getattr(entry, side)
    return replace(entry, **{side: (replace(first, **changes), *rest)})


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("changes", [{"name": "other"}, {"shape": (-1, 2, 99)}, {"shape": (1, 2, 3)}, {"dtype": None}])
@pytest.mark.parametrize("file", FILES)
def test_a_tensor_that_is_not_as_stated_is_named(graphs: Graphs, file: str, side: str, changes: dict) -> None:
    entry = graphs.entries[file]
    if changes == {"dtype": None}:
        changes = {"dtype": "int32" if getattr(entry, side)[0].dtype == "float32" else "float32"}
    (problem,) = check_graph(with_tensor(entry, side, **changes), graphs.contents[file])
    assert problem.startswith(f"{file} has the tensors ")
    assert "; expected " in problem


def test_a_missing_and_an_extra_tensor_are_noticed(graphs: Graphs) -> None:
    entry = graphs.entries["encoder.onnx"]
    for outputs in (entry.outputs[:-1], (*entry.outputs, TensorEntry("extra", "float32", (-1,)))):
        (problem,) = check_graph(replace(entry, outputs=outputs), graphs.contents["encoder.onnx"])
        assert problem.startswith("encoder.onnx has the tensors ")


def test_an_output_in_an_inputs_place_is_noticed(graphs: Graphs) -> None:
    entry = graphs.entries["decoder.onnx"]
    moved = replace(entry, inputs=(*entry.inputs, *entry.outputs), outputs=())
    (problem,) = check_graph(moved, graphs.contents["decoder.onnx"])
    assert problem.startswith("decoder.onnx has the tensors ")


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.UINT8])
@pytest.mark.parametrize("file", FILES)
def test_a_number_type_that_no_bundle_has_is_noticed(calibrated_graphs: Graphs, file: str, kind: int) -> None:
    """A graph that casts its output once more than it should is sound by itself."""

    def cast(model: onnx.ModelProto) -> None:
        output = model.graph.output[0]
        last = next(node for node in model.graph.node if output.name in node.output)
        last.output[0] = "before the cast"
        model.graph.node.append(onnx.helper.make_node("Cast", ["before the cast"], [output.name], to=kind))
        output.type.tensor_type.elem_type = kind

    content = altered(calibrated_graphs.contents[file], cast)
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    (problem,) = check_graph(calibrated_graphs.entries[file], content)
    assert problem.startswith(f"{file} has the tensors ")
    assert np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).name in problem


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("position", [0, 5, -2])
def test_a_missing_node_is_noticed(graphs: Graphs, file: str, position: int) -> None:
    content = altered(graphs.contents[file], lambda model: model.graph.node.pop(position))
    (problem,) = check_graph(graphs.entries[file], content)
    assert problem.startswith(f"{file} is not a sound graph: ")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_constant_is_noticed(graphs: Graphs, file: str) -> None:
    content = altered(graphs.contents[file], lambda model: model.graph.initializer.pop(0))
    (problem,) = check_graph(graphs.entries[file], content)
    assert problem.startswith(f"{file} is not a sound graph: ")


@pytest.mark.parametrize("file", FILES)
def test_shapes_that_do_not_fit_together_are_noticed(graphs: Graphs, file: str) -> None:
    def widen(model: onnx.ModelProto) -> None:
        weight = next(constant for constant in model.graph.initializer if constant.name == "outer.weight")
        wider = np.pad(numpy_helper.to_array(weight), ((0, 0), (0, 1)))
        weight.CopyFrom(numpy_helper.from_array(wider, weight.name))

    (problem,) = check_graph(graphs.entries[file], altered(graphs.contents[file], widen))
    assert problem.startswith(f"{file} is not a sound graph: ")


def test_an_operator_without_inference_is_noticed(graphs: Graphs) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Exp").op_type = "NoSuchOperator"

    (problem,) = check_graph(graphs.entries["encoder.onnx"], altered(graphs.contents["encoder.onnx"], rename))
    assert problem.startswith("encoder.onnx is not a sound graph: ")


# --- numbers ----------------------------------------------------------------------------------------------------------


def scale_weight(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def scale(model: onnx.ModelProto) -> None:
        weight = next(constant for constant in model.graph.initializer if constant.name == name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), name))

    return scale


@pytest.mark.parametrize("name", ["inner.weight", "outer.weight", "inner.bias", "outer.bias"])
@pytest.mark.parametrize("file", FILES)
def test_changed_weights_are_noticed_by_both_runtimes(graphs: Graphs, file: str, name: str) -> None:
    content = altered(graphs.contents[file], scale_weight(name, 1.05))
    assert check_graph(graphs.entries[file], content) == []
    problems = graphs.cross_check(file, content)
    assert [problem.split(":")[0] for problem in problems] == [
        f"{file} on ONNX Runtime",
        f"{file} on onnx reference evaluator",
    ]
    measured = "wrong tokens, first token [" if file.endswith("encoder.onnx") else "action error "
    assert all(measured in problem for problem in problems)


def test_weights_that_are_no_numbers_are_noticed(graphs: Graphs) -> None:
    for file in (file for file in FILES if not file.endswith("encoder.onnx")):
        problems = graphs.cross_check(file, altered(graphs.contents[file], scale_weight("outer.weight", np.nan)))
        assert len(problems) == 2
        assert all("action error inf, expected at most 1e-05" in problem for problem in problems)


def test_another_operator_of_the_same_shape_is_noticed(graphs: Graphs) -> None:
    def floor(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Ceil").op_type = "Floor"

    content = altered(graphs.contents["encoder.onnx"], floor)
    assert check_graph(graphs.entries["encoder.onnx"], content) == []
    assert len(graphs.cross_check("encoder.onnx", content)) == 2


def test_the_decoder_of_another_prefix_is_noticed(graphs: Graphs) -> None:
    entry = graphs.entries["decoder.onnx"]
    (problem,) = check_graph(entry, graphs.contents["decoder_l2.onnx"])
    assert problem.startswith("decoder.onnx has the tensors ")


def test_wrong_statistics_are_noticed() -> None:
    """`dynamic` decoding needs them as much as the tokens: they may be wrong while every token is right."""
    graphs = Graphs(DeployMode.DYNAMIC)

    def shift(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "stats" in node.output)
        node.input[0], before = "shifted", node.input[0]
        index = list(model.graph.node).index(node)
        constant = numpy_helper.from_array(np.float32(1e-3), "shift")
        model.graph.initializer.append(constant)
        model.graph.node.insert(index, onnx.helper.make_node("Add", [before, "shift"], ["shifted"], name="shifted"))

    content = altered(graphs.contents["encoder.onnx"], shift)
    assert check_graph(graphs.entries["encoder.onnx"], content) == []
    problems = graphs.cross_check("encoder.onnx", content)
    assert len(problems) == 2
    assert all("stats" in problem for problem in problems)


# --- chunk tokens ---------------------------------------------------------------------------------------------------


def test_what_overflows_before_it_is_clipped_is_no_warning() -> None:
    checkpoint = chunk_checkpoint(ChunkRecipe())
    # Units in which the largest action has no float32.
    narrow = replace(checkpoint, normaliser=Normaliser(NormaliserKind.MIN_MAX, (0.0,) * 3, (0.01,) * 3))
    tokens = ChunkTokens(
        narrow, ChunkReference(narrow.model(dtype=torch.float64)), deployed_chunk_tokens(ChunkRecipe()).data, "narrow"
    )
    actions = random_chunks(tokens.reference.model, 4)
    actions[0] = tokens.model.action_limit
    golden = tokens.reference.golden(tokens.reference.answer(actions).expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for entry, content in tokens.graphs():
            if entry.role == "encoder":
                assert cross_check(entry, content, golden, tokens.model) == []
