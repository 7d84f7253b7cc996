"""Graphs that decode probabilities give the definition's answers for any sizes, and gates see each of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from rfsq.export.belief_graphs import belief_graph
from rfsq.export.belief_vectors import belief_vectors
from rfsq.export.chunk_builder import ChunkBuilder
from rfsq.export.deployable import checked_graph
from rfsq.export.engines import Profile, build_engine, differences, profile_of
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm, batched
from rfsq.export.graphs import decoder_graph, encoder_graph
from rfsq.export.parity import cross_check
from rfsq.export.plan import plan_decoder, plan_encoder
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.backends.belief_replay import judge_beliefs
from rfsq.runtime.backends.beliefs import BeliefAnswer, BeliefQuestion
from rfsq.runtime.backends.onnxruntime import OrtBackend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.folder import Bundle
from rfsq.runtime.bundle.gates import BELIEF_GATES
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.golden_beliefs import GoldenBeliefs
from rfsq.runtime.bundle.manifest import SCHEMA_VERSION, GraphEntry, GraphRole, Manifest, graph_tensors
from rfsq.runtime.bundle.models import ChunkModel, ModelEntry, StepModel
from tests.bundles import Deployed, Recipe, deploy, golden_vectors, graph_file, model_entry
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens, random_chunks
from tests.export.test_trt_builder import needs_rtx
from tests.rfsq_ref.test_chunk_code import any_sizes
from tests.strategies import recipes

#: Names of constants that do not decide within float32: where exp is capped. And those of the logarithm of what is
#: little more than 1, as for the last bits of a latent, which has a test of its own.
INDIFFERENT = {
    *("mish.cap", "slope.cap"),
    *("apart.small", "apart.sum.summand", "apart.cube.factor", "apart.terms.summand"),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A model's graphs, those of beliefs of any form, as ONNX Runtime takes them; and what they are judged by."""

    model: StepModel | ChunkModel
    graphs: dict[GraphEntry, bytes]
    golden: Golden

    @property
    def beliefs(self) -> GoldenBeliefs:
        assert self.golden.beliefs is not None
        return self.golden.beliefs

    def belief_graphs(self) -> Iterator[tuple[GraphEntry, bytes]]:
        return ((entry, content) for entry, content in self.graphs.items() if entry.role == "belief")

    def backend(self, changed: dict[GraphEntry, bytes] | None = None) -> OrtBackend:
        """The robot's own, with some of its graphs changed."""
        graphs = self.graphs | (changed or {})
        manifest = Manifest(SCHEMA_VERSION, "0" * 64, self.model, tuple(graphs), (), (), {}, {}, {})
        return OrtBackend(Bundle(Path("in memory"), manifest, {entry.file: graphs[entry] for entry in graphs}))

    def red(self, backend: OrtBackend) -> set[str]:
        """The gates of beliefs that are red."""
        checks = judge_beliefs(self.beliefs, self.model, backend, 8)
        assert [check.gate for check in checks] == [f"beliefs: {gate}" for gate in BELIEF_GATES]
        return {check.gate.removeprefix("beliefs: ") for check in checks if not check.passed}


def step_case(deployed: Deployed, form: LinearForm = LinearForm.GEMM) -> Case:
    model, exported, mode = model_entry(deployed), deployed.exported, deployed.recipe.mode
    encoder = encoder_graph(plan_encoder(exported, mode, model.chunk_length))
    graphs = {entry_of(model, "encoder", model.depth): encoder}
    for prefix in model.prefixes:
        plan = plan_decoder(exported, mode, model.chunk_length, prefix)
        graphs[entry_of(model, "decoder", prefix)] = decoder_graph(plan)
        graphs[entry_of(model, "belief", prefix)] = belief_graph(plan, form)
    return Case(model, graphs, golden_vectors(deployed))


def entry_of(model: ModelEntry, role: GraphRole, prefix: int) -> GraphEntry:
    return GraphEntry(f"{role}_{prefix}.onnx", role, prefix, "gemm", *graph_tensors(model, role, prefix))


def chunk_case(sizes: ChunkSizes, seed: int = 0, form: LinearForm = LinearForm.GEMM) -> Case:
    tokens = deployed_chunk_tokens(ChunkRecipe(sizes=sizes, seed=seed))
    reference = tokens.reference
    answers = reference.answer(random_chunks(reference.model, 12))
    golden = reference.golden(answers.expected)
    beliefs = belief_vectors(reference.model, tokens.model, golden.tokens)
    graphs = {
        entry_of(tokens.model, entry.role, entry.prefix): content
        for entry, content in tokens.graphs()
        if entry.form == (form.value if entry.role == "belief" else "gemm")
    }
    return Case(tokens.model, graphs, replace(golden, beliefs=beliefs))


@cache
def case_of(kind: str, form: LinearForm = LinearForm.GEMM) -> Case:
    if kind == "chunk":
        return chunk_case(ChunkSizes(3, 4, num_classes=6, token_bits=8, num_tokens=9), form=form)
    return step_case(deploy(Recipe()), form)


KINDS = pytest.mark.parametrize("kind", ["steps", "chunk"])
FORMS = pytest.mark.parametrize("form", BELIEF_FORMS)


# Right ----------------------------------------------------------------------------------------------------------------


@FORMS
@settings(max_examples=8)
@given(recipes())
def test_steps_of_any_sizes_pass_the_gates(form: LinearForm, recipe: Recipe) -> None:
    assume(not recipe.mode.has_stats)
    case = step_case(deploy(recipe), form)
    assert not case.red(case.backend())


@FORMS
@settings(max_examples=5)
@given(any_sizes(), st.integers(0, 1000))
def test_chunks_of_any_sizes_pass_the_gates(form: LinearForm, sizes: ChunkSizes, seed: int) -> None:
    case = chunk_case(sizes, seed, form)
    assert not case.red(case.backend())


@KINDS
@FORMS
def test_graphs_are_sound_and_right_on_two_runtimes(kind: str, form: LinearForm) -> None:
    case = case_of(kind, form)
    for entry, content in case.belief_graphs():
        checked, _ = checked_graph(case.model, "belief", entry.prefix, form, content)
        assert (checked.inputs, checked.outputs) == (entry.inputs, entry.outputs)
        name = "belief.onnx" if entry.prefix == case.model.depth else f"belief_l{entry.prefix}.onnx"
        assert checked.file == graph_file(name, form)
        assert not cross_check(entry, content, case.golden, case.model)


@KINDS
def test_for_tensorrt_all_is_in_float32_and_no_matrix_product(kind: str) -> None:
    """Which it would compute in TF32, as it computes a double in float32 without a word."""
    for _, content in case_of(kind, LinearForm.REDUCE).belief_graphs():
        graph = onnx.load_model_from_string(content).graph
        assert {node.op_type for node in graph.node} & {"MatMul", "Gemm", "Conv", "Einsum"} == set()
        assert TensorProto.DOUBLE not in {constant.data_type for constant in graph.initializer}
        casts = {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
        assert TensorProto.DOUBLE not in casts


@needs_rtx
@KINDS
def test_tensorrt_compiles_an_engine_of_a_few_chunks_to_many(kind: str) -> None:
    for entry, content in case_of(kind, LinearForm.REDUCE).belief_graphs():
        profile = profile_of(entry, Profile(1, 4, 4096))
        built = build_engine("tensorrt-rtx", content, profile, (), entry.prefix)
        assert (profile.minimum, profile.maximum) == (1, 32)
        assert built.warnings == ()
        assert not list(differences(built, entry, built.tensors))


def test_the_logarithm_of_what_is_little_more_than_1_is_right_to_float32s_last_digits() -> None:
    build = ChunkBuilder(LinearForm.REDUCE)
    build.log_of_one_more("value", "log")
    content = build.model("log", *([batched(name, TensorProto.FLOAT)] for name in ("value", "log")))
    values = np.geomspace(1e-9, 1e6, 10_000).astype(np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"value": values})
    np.testing.assert_allclose(found, np.log1p(values.astype(np.float64)), rtol=3e-6)


# Wrong ----------------------------------------------------------------------------------------------------------------


def altered(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The graph with each of its real numbers a thousandth larger, 0 and infinity apart: name and graph."""
    model = onnx.load_model_from_string(content)
    for place, constant in enumerate(model.graph.initializer):
        values = numpy_helper.to_array(constant)
        if values.dtype.kind != "f" or not values.any() or constant.name in INDIFFERENT:
            continue
        changed = onnx.ModelProto.FromString(content)
        changed.graph.initializer[place].CopyFrom(
            numpy_helper.from_array(values * values.dtype.type(1.003), constant.name)
        )
        yield constant.name, changed.SerializeToString()


@KINDS
@FORMS
def test_every_number_of_a_graph_turns_a_gate_red(kind: str, form: LinearForm) -> None:
    case, count = case_of(kind, form), 0
    for entry, content in case.belief_graphs():
        for name, graph in altered(content):
            assert case.red(case.backend({entry: graph})), f"{name} of {entry.file} is not judged"
            count += 1
    assert count > 10
    # And so does the last of them in the check before anything is compiled.
    problems = cross_check(entry, graph, case.golden, case.model)
    assert len(problems) > 1
    assert all("expected at most" in problem for problem in problems)


@KINDS
def test_places_of_bits_that_are_swapped_turn_gates_red(kind: str) -> None:
    if kind == "steps":
        # Two layers of a token's levels.
        case = case_of(kind)
        entry, content = list(case.belief_graphs())[-1]
        model = onnx.load_model_from_string(content)
        for constant in model.graph.initializer:
            if constant.name == "levels":
                constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant)[[1, 0, 2, 3, 4]], "levels"))
        assert case.red(case.backend({entry: model.SerializeToString()})) == {"action error", "std error"}
        return
    case = case_of(kind)
    ((entry, content),) = case.belief_graphs()
    for name in ("layers.places", "words.places", "finer.places"):
        model = onnx.load_model_from_string(content)
        (constant,) = (found for found in model.graph.initializer if found.name == name)
        places = numpy_helper.to_array(constant)
        constant.CopyFrom(numpy_helper.from_array(places.reshape(-1)[::-1].reshape(places.shape).copy(), name))
        assert case.red(case.backend({entry: model.SerializeToString()})) >= {"action error"}, name


def test_a_decoder_of_another_model_differs_where_all_is_certain() -> None:
    case, other = case_of("steps"), step_case(deploy(Recipe(seed=1)))
    mixed = {entry: other.graphs[entry] for entry in case.graphs if entry.role == "belief"}
    assert case.red(case.backend(mixed)) == {"action error", "std error"}

    class Rounding(OrtBackend):
        """Rounds what is certain another way than `decode_into`."""

        def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
            super().decode_belief_into(question, answer)
            answer.actions[...] = np.nextafter(answer.actions, np.float32(2))

    backend = case.backend()
    backend.__class__ = Rounding
    assert case.red(backend) == {"certain ones that differ"}


# In the replay --------------------------------------------------------------------------------------------------------


@KINDS
def test_the_replay_judges_beliefs_one_by_one_and_all_at_once(kind: str) -> None:
    case = case_of(kind)
    found = replay(case.golden, case.model, case.backend())
    names = [check.gate for check in found.checks if check.gate.startswith("beliefs")]
    assert names == [f"beliefs, batch {size}: {gate}" for size in (1, 8) for gate in BELIEF_GATES]
    assert found.passed


def test_golden_vectors_without_beliefs_fail_a_backend_that_decodes_them() -> None:
    case = case_of("steps")
    (failed,) = replay(replace(case.golden, beliefs=None), case.model, case.backend()).failures
    assert failed.detail == "there are no golden vectors of beliefs"


def test_a_backend_that_fails_fails_every_gate() -> None:
    case = case_of("steps")
    backend = case.backend()
    backend.close()
    backend._belief_graphs.clear()
    assert case.red(backend) == set(BELIEF_GATES)
