"""Graphs say nothing but the model: the same bytes anywhere, and the reference's answers on two runtimes."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import google.protobuf.descriptor
import google.protobuf.message
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.export.graph_builder import BATCH, BELIEF_FORMS, IR_VERSION, OPSET, LinearForm
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime.bundle.comparison import action_errors
from tests.bundles import (
    Deployed,
    Recipe,
    deploy,
    export_graphs,
    graph_file,
    make_manifest,
    random_actions,
    reference_decode,
)
from tests.export.plan_numpy import MODES, check_tokens, recipes
from tests.export.runtimes import EVERYWHERE, MARKED, PRODUCTS, RUNTIMES, OnnxRuntime

ROOT = Path(__file__).parents[2]

# --- bytes ------------------------------------------------------------------------------------------------------------


def test_other_weights_give_other_bytes() -> None:
    first, second = (export_graphs(deploy(Recipe(seed=seed))) for seed in (0, 1))
    assert all(first[file] != second[file] for file in first)


def fields(message: google.protobuf.message.Message) -> Iterator[tuple[str, object]]:
    """Every field that is set, at any depth, by its name."""
    for descriptor, value in message.ListFields():
        values = value if isinstance(value, list) or hasattr(value, "add") or hasattr(value, "append") else [value]
        for entry in values:
            yield descriptor.name, entry
            if isinstance(entry, google.protobuf.message.Message):
                yield from fields(entry)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_holds_nothing_that_is_not_the_model(mode: DeployMode) -> None:
    for file, content in export_graphs(deploy(Recipe(mode=mode))).items():
        model = onnx.load_model_from_string(content)
        found = list(fields(model))
        names = {name for name, _ in found}
        assert {"node", "initializer", "op_type"} <= names
        assert not names & {"doc_string", "metadata_props", "external_data", "data_location", "functions"}
        texts = [value for _, value in found if isinstance(value, str)]
        assert ("Gemm" in texts) == (not file.startswith("reduce/"))
        assert not [text for text in texts if "/" in text or "\\" in text or ".py" in text]
        assert (model.producer_name, model.producer_version, model.model_version) == ("rfsq-deploy", "", 0)
        assert str(ROOT).encode() not in content


@given(recipes())
@settings(max_examples=30)
def test_every_constant_and_every_node_is_used(recipe: Recipe) -> None:
    """A runtime that finds one it can drop says so, on the robot, at every start."""
    for content in export_graphs(deploy(recipe)).values():
        graph = onnx.load_model_from_string(content).graph
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        made = {constant.name for constant in graph.initializer} | {name for node in graph.node for name in node.output}
        assert made | {value.name for value in graph.input} == used


@pytest.mark.parametrize("mode", MODES)
def test_opset_and_ir_are_those_that_every_supported_runtime_reads(mode: DeployMode) -> None:
    for content in export_graphs(deploy(Recipe(mode=mode))).values():
        model = onnx.load_model_from_string(content)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)] == [("", 18)]
        assert model.ir_version == IR_VERSION == 8
        assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("mode", MODES)
def test_only_the_batch_is_dynamic_and_it_is_named(mode: DeployMode) -> None:
    config = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=5, num_levels=5)
    graphs = export_graphs(deploy(Recipe(mode=mode, config=config, chunk_length=6, prefixes=(2,))))
    shapes = {
        file: {
            value.name: (value.type.tensor_type.elem_type, [dim.dim_param or dim.dim_value for dim in dims(value)])
            for value in (*graph.input, *graph.output)
        }
        for file, graph in ((file, onnx.load_model_from_string(content).graph) for file, content in graphs.items())
    }
    number, integer = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    expected: dict[str, object] = {
        file: {"actions": (number, [BATCH, 6, 3]), "tokens": (integer, [BATCH, 6, 4, prefix])}
        | ({"stats": (number, [BATCH, 6, prefix, 2])} if mode is DeployMode.DYNAMIC else {})
        for file, prefix in (("encoder.onnx", 5), ("decoder_l2.onnx", 2), ("decoder.onnx", 5))
    }
    beliefs: dict[str, object] = {
        file: {
            "probabilities": (number, [BATCH, 6, 4, prefix, 5]),
            "actions": (number, [BATCH, 6, 3]),
            "std": (number, [BATCH, 6, 3]),
        }
        for file, prefix in (("belief_l2.onnx", 2), ("belief.onnx", 5))
        if mode is not DeployMode.DYNAMIC
    }
    in_forms = {graph_file(file, form): tensors for form in LinearForm for file, tensors in expected.items()}
    in_forms |= {graph_file(file, form): tensors for form in BELIEF_FORMS for file, tensors in beliefs.items()}
    assert shapes == in_forms


def dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


# --- answers ----------------------------------------------------------------------------------------------------------


@functools.cache
def exported(recipe: Recipe) -> tuple[Deployed, dict[str, bytes]]:
    """The model of a recipe, which nobody changes, and its graphs."""
    deployed = deploy(recipe)
    return deployed, export_graphs(deployed)


def check_encoder(deployed: Deployed, runtime: type, content: bytes, actions: np.ndarray) -> None:
    recipe, inputs = deployed.recipe, torch.from_numpy(actions).double()
    found, *stats = runtime(content).run({"actions": actions})

    assert found.dtype == np.int32
    compared = check_tokens(deployed, actions, found)
    assert len(stats) == (recipe.mode is DeployMode.DYNAMIC)
    if stats:
        expected = deployed.reference.encode(inputs)[1].numpy()
        np.testing.assert_allclose(stats[0][~compared.flipped], expected[~compared.flipped], rtol=0, atol=1e-5)


def check_decoder(deployed: Deployed, runtime: type, content: bytes, prefix: int, batch: int) -> None:
    recipe, random = deployed.recipe, np.random.default_rng(1)
    steps = (batch, recipe.chunk_length)
    tokens = random.integers(recipe.config.num_levels, size=(*steps, recipe.config.latent_dim, prefix), dtype=np.int32)
    feed, stats = {"tokens": tokens}, None
    if recipe.mode is DeployMode.DYNAMIC:
        feed["stats"] = random.uniform((-0.5, 1e-5), (0.5, 0.5), (*steps, prefix, 2)).astype(np.float32)
        stats = torch.from_numpy(feed["stats"])
    (found,) = runtime(content).run(feed)

    assert found.dtype == np.float32
    expected = reference_decode(deployed.reference, torch.from_numpy(tokens), stats)
    worst = action_errors(expected, found, deployed.reference.units.numpy())
    assert worst.value <= 1e-5, worst


@given(recipe=recipes())
@settings(max_examples=25)
def test_both_runtimes_give_the_references_answers(recipe: Recipe) -> None:
    deployed = deploy(recipe)
    graphs = export_graphs(deployed)
    for runtime, form in EVERYWHERE:
        check_encoder(deployed, runtime, graphs[graph_file("encoder.onnx", form)], random_actions(recipe, 40))
        for prefix in deployed.prefixes:
            file = "decoder.onnx" if prefix == recipe.config.num_layers else f"decoder_l{prefix}.onnx"
            check_decoder(deployed, runtime, graphs[graph_file(file, form)], prefix, 40)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gain", [1.0, 10.0, 40.0, 100.0, 1e4, 1e18])
def test_no_sum_is_too_large_for_mish(mode: DeployMode, gain: float) -> None:
    """exp of a hidden unit overflows float32 from 88 on, its square from 44: no token and no action may do that."""
    recipe = Recipe(mode=mode)
    deployed = deploy(recipe)
    # Upwards: Mish of a large negative number is zero and can do no harm.
    for layer in (deployed.reference.encoder[0], deployed.reference.decoder[0]):
        layer.weight.abs_().mul_(gain)
    for layer in (deployed.reference.encoder[2], deployed.reference.decoder[2]):
        layer.weight.div_(gain)
    deployed.exported = deployed.reference
    graphs = export_graphs(deployed)
    for runtime, form in EVERYWHERE:
        for prefix, file in ((2, "decoder_l2.onnx"), (3, "decoder.onnx")):
            check_decoder(deployed, runtime, graphs[graph_file(file, form)], prefix, 50)
        check_encoder(deployed, runtime, graphs[graph_file("encoder.onnx", form)], random_actions(recipe, 50))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 2, 257])
def test_any_batch_is_taken(mode: DeployMode, batch: int) -> None:
    recipe = Recipe(mode=mode)
    deployed, graphs = exported(recipe)
    for runtime, form in EVERYWHERE:
        check_encoder(deployed, runtime, graphs[graph_file("encoder.onnx", form)], random_actions(recipe, batch))
        check_decoder(deployed, runtime, graphs[graph_file("decoder.onnx", form)], 3, batch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_levels", [2, 4, 5, 6, 8])
def test_a_latent_on_an_edge_goes_to_the_lower_level(mode: DeployMode, num_levels: int) -> None:
    """Zero weights make every latent exactly zero, which is an edge where K is even; sigma is zero in `dynamic`."""
    recipe = Recipe(mode=mode, config=ModelConfig(3, 4, 8, 3, num_levels))
    deployed = deploy(recipe)
    for parameter in deployed.exported.encoder.parameters():
        parameter.zero_()
    deployed.exported.quantizer.mean.zero_()
    actions = random_actions(recipe, 3)
    expected = deployed.exported.encode(torch.from_numpy(actions).double())[0].numpy()
    graphs = export_graphs(deployed)
    for runtime, form in EVERYWHERE:
        found = runtime(graphs[graph_file("encoder.onnx", form)]).run({"actions": actions})[0]
        assert (found[..., 0] == (num_levels - 1) // 2).all()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", LinearForm)
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("mode", MODES)
def test_steps_of_a_chunk_do_not_touch_each_other(mode: DeployMode, runtime: type, form: LinearForm) -> None:
    """A token that changes in one step changes that step's action alone."""
    _, graphs = exported(Recipe(mode=mode, chunk_length=5))
    session = runtime(graphs[graph_file("decoder.onnx", form)])
    feed = {"tokens": np.full((2, 5, 4, 3), 2, np.int32)}
    if mode is DeployMode.DYNAMIC:
        feed["stats"] = np.full((2, 5, 3, 2), 0.25, np.float32)
    (before,) = session.run(feed)
    feed["tokens"] = feed["tokens"].copy()
    feed["tokens"][1, 3, 0, 0] = 4
    (after,) = session.run(feed)
    assert np.argwhere((before != after).any(-1)).tolist() == [[1, 3]]


@pytest.mark.parametrize("latents", ["all zero", "all alike", "one apart"])
@pytest.mark.parametrize("mode", list(DeployMode))
def test_latents_that_never_change_are_coded_alike(mode: DeployMode, latents: str) -> None:
    """sigma = 0 for `dynamic`: only its epsilon is left to divide by."""
    deployed = deploy(Recipe(mode=mode))
    output = deployed.exported.encoder[2]
    output.weight.zero_()
    output.bias.fill_(0.0 if latents == "all zero" else 0.25)
    if latents == "one apart":
        output.bias[0] = 0.75
    deployed.reference.load_state_dict(deployed.exported.state_dict())
    graphs, actions = export_graphs(deployed), random_actions(deployed.recipe, 16)
    for runtime, form in EVERYWHERE:
        check_encoder(deployed, runtime, graphs[graph_file("encoder.onnx", form)], actions)


# --- the forms for GPUs -----------------------------------------------------------------------------------------------

MARKED_EVERYWHERE = list(itertools.product(RUNTIMES, MARKED))


@given(recipes())
@settings(max_examples=30)
def test_the_form_for_tensorrt_has_no_matrix_product(recipe: Recipe) -> None:
    operators = {
        file: {node.op_type for node in onnx.load_model_from_string(content).graph.node}
        for file, content in export_graphs(deploy(recipe)).items()
    }
    assert not [file for file, found in operators.items() if file.startswith("reduce/") and found & PRODUCTS]
    assert all(found & PRODUCTS for file, found in operators.items() if not file.startswith("reduce/"))


def wrong_numbers(highest: int) -> list[int]:
    return [-1, highest + 1, 255, -(2**31), 2**31 - 1]


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_an_illegal_token_marks_its_step_and_no_other(
    mode: DeployMode, layers: int, runtime: type, form: LinearForm
) -> None:
    """All actions of the step are NaN, which no controller takes for a motion; every other action is as it was."""
    config = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=layers, num_levels=5)
    recipe = Recipe(mode=mode, config=config, chunk_length=3, prefixes=())
    session = runtime(exported(recipe)[1][graph_file("decoder.onnx", form)])
    random = np.random.default_rng(3)
    tokens = random.integers(5, size=(4, 3, 4, layers), dtype=np.int32)
    feed = {"tokens": tokens}
    if mode is DeployMode.DYNAMIC:
        feed["stats"] = random.uniform(0.1, 0.5, (4, 3, layers, 2)).astype(np.float32)
    (before,) = session.run(feed)
    assert np.isfinite(before).all()
    for place in np.ndindex(4, layers):
        for number in wrong_numbers(4):
            step = (int(random.integers(4)), int(random.integers(3)))
            wrong = tokens.copy()
            wrong[(*step, *place)] = number
            (found,) = session.run({**feed, "tokens": wrong})
            is_marked = np.isnan(found)
            assert is_marked[step].all(), (number, place)
            assert np.argwhere(is_marked.any(-1)).tolist() == [list(step)]
            is_marked[step] = True
            np.testing.assert_array_equal(found[~is_marked], before[~is_marked])


@given(recipe=recipes())
@settings(max_examples=15)
def test_the_lowest_and_the_highest_level_are_legal(recipe: Recipe) -> None:
    config, graphs = recipe.config, export_graphs(deploy(recipe))
    sessions = [runtime(graphs[graph_file("decoder.onnx", form)]) for runtime, form in MARKED_EVERYWHERE]
    shape = (1, recipe.chunk_length, config.latent_dim, config.num_layers)
    levels = ((-1, False), (0, True), (config.num_levels - 1, True), (config.num_levels, False))
    for session, (level, is_legal) in itertools.product(sessions, levels):
        feed = {"tokens": np.full(shape, level, np.int32)}
        if recipe.mode is DeployMode.DYNAMIC:
            feed["stats"] = np.full((*shape[:2], config.num_layers, 2), 0.25, np.float32)
        (found,) = session.run(feed)
        assert np.isnan(found).all() == (not is_legal)
        assert np.isfinite(found).all() == is_legal


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_an_action_that_is_no_number_marks_its_step_and_no_other(
    mode: DeployMode, layers: int, runtime: type, form: LinearForm
) -> None:
    """All tokens of the step are -1, which no decoder takes for a level; every other token is as it was."""
    config = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=layers, num_levels=5)
    recipe = Recipe(mode=mode, config=config, chunk_length=3, prefixes=())
    session = runtime(exported(recipe)[1][graph_file("encoder.onnx", form)])
    random = np.random.default_rng(4)
    actions = random_actions(recipe, 4)
    before, *stats_before = session.run({"actions": actions})
    assert ((before >= 0) & (before <= 4)).all()
    for dimension in range(3):
        for value in (np.nan, np.inf, -np.inf):
            step = (int(random.integers(4)), int(random.integers(3)))
            wrong = actions.copy()
            wrong[(*step, dimension)] = value
            found, *stats = session.run({"actions": wrong})
            check_marked(found, before, step)
            for one, other in zip(stats, stats_before, strict=True):
                np.testing.assert_array_equal(
                    np.delete(one.reshape(12, -1), step[0] * 3 + step[1], 0),
                    np.delete(other.reshape(12, -1), step[0] * 3 + step[1], 0),
                )


@given(recipe=recipes(), place=st.integers(0, 99), sign=st.sampled_from([-1, 1]))
@settings(max_examples=15)
def test_tokens_are_marked_beyond_the_limit_that_hosts_hold_actions_against(
    recipe: Recipe, place: int, sign: int
) -> None:
    """Whatever the sizes: with a single hidden unit even an infinite action has a latent like any other."""
    deployed = deploy(recipe)
    limit = np.float32(make_manifest(deployed).model.action_limit)
    graphs = export_graphs(deployed)
    sessions = [runtime(graphs[graph_file("encoder.onnx", form)]) for runtime, form in MARKED_EVERYWHERE]
    actions = random_actions(recipe, 2)
    shape = (recipe.chunk_length, recipe.config.action_dim)
    step, dimension = np.unravel_index(place % (shape[0] * shape[1]), shape)
    beyond = (np.nextafter(limit, np.float32(np.inf)), 3 * limit, np.finfo(np.float32).max, np.float32(np.inf))
    for session, value in itertools.product(sessions, (limit, *beyond)):
        before = session.run({"actions": actions})[0]
        wrong = actions.copy()
        wrong[1, step, dimension] = sign * value
        with np.errstate(all="ignore"):
            found = session.run({"actions": wrong})[0]
        if value > limit:
            check_marked(found, before, (1, int(step)))
        else:
            assert ((found >= 0) & (found < recipe.config.num_levels)).all()


def check_marked(found: np.ndarray, before: np.ndarray, step: tuple[int, int]) -> None:
    assert found.dtype == np.int32
    assert (found[step] == -1).all(), found[step]
    others = np.ones(found.shape[:2], bool)
    others[step] = False
    np.testing.assert_array_equal(found[others], before[others])


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("mode", [DeployMode.NONE, DeployMode.CALIBRATED, DeployMode.RECOVERED])
def test_what_the_encoder_marks_the_decoder_marks(mode: DeployMode, form: LinearForm) -> None:
    """On its way through tokens, a step that is not a number stays one."""
    recipe = Recipe(mode=mode)
    _, graphs = exported(recipe)
    actions = random_actions(recipe, 3)
    actions[1, 0, 2] = np.nan
    (tokens,) = OnnxRuntime(graphs[graph_file("encoder.onnx", form)]).run({"actions": actions})
    (decoded,) = OnnxRuntime(graphs[graph_file("decoder.onnx", form)]).run({"tokens": tokens})
    assert (
        np.argwhere(np.isnan(decoded).all(-1)).tolist() == np.argwhere(np.isnan(decoded).any(-1)).tolist() == [[1, 0]]
    )


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_statistics_that_are_no_numbers_do_not_become_a_motion(runtime: type, form: LinearForm) -> None:
    recipe = Recipe(mode=DeployMode.DYNAMIC)
    session = runtime(exported(recipe)[1][graph_file("decoder.onnx", form)])
    feed = {"tokens": np.ones((2, 2, 4, 3), np.int32), "stats": np.full((2, 2, 3, 2), 0.25, np.float32)}
    for part, value in ((0, np.nan), (1, np.nan), (0, np.inf), (1, np.inf)):
        stats = feed["stats"].copy()
        stats[1, 0, 2, part] = value
        with np.errstate(all="ignore"):
            (found,) = session.run({**feed, "stats": stats})
        assert not np.isfinite(found[1, 0]).all()
        assert np.isfinite(np.delete(found.reshape(4, 3), 2, 0)).all()
