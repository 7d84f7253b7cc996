"""Checks of ONNX graphs before anything is compiled from them: form, shapes, and two runtimes that must agree.

The two are ONNX Runtime, through Polygraphy, and the reference evaluator of the onnx package: they share no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.logger import G_LOGGER

# Before Polygraphy opens ONNX Runtime: switches its telemetry off.
import rfsq.runtime.backends.onnxruntime  # noqa: F401
from rfsq.runtime.bundle.comparison import action_errors
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import GraphEntry, ModelEntry

_Arrays = Mapping[str, npt.NDArray[Any]]


def check_graph(entry: GraphEntry, onnx_bytes: bytes) -> list[str]:
    """Checker, strict shape inference, and the tensors that `entry` states; a line for everything that is wrong."""
    model = onnx.load_model_from_string(onnx_bytes)
    try:
        onnx.checker.check_model(model, full_check=True)
        graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [f"{entry.file} is not a sound graph: {error}"]
    found = [_tensor(value) for value in (*graph.input, *graph.output)]
    expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in (*entry.inputs, *entry.outputs)]
    if found != expected or len(graph.input) != len(entry.inputs):
        return [f"{entry.file} has the tensors {found}; expected {expected}"]
    inferred = {value.name for value in (*graph.value_info, *graph.output)}
    unknown = [node.name for node in graph.node if set(node.output) - inferred]
    return [f"{entry.file}: shapes of {unknown} could not be inferred"] if unknown else []


def cross_check(entry: GraphEntry, onnx_bytes: bytes, golden: Golden, model: ModelEntry) -> list[str]:
    """Run the graph on two independent runtimes; a line for everything in which either leaves the reference."""
    feed = _feed(entry, golden)
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(onnx_bytes))
    session = SessionFromOnnx(onnx_bytes, providers=["cpu"])
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), OnnxrtRunner(session) as runtime:
        answers = {
            "ONNX Runtime": runtime.infer(feed),
            "onnx reference evaluator": dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True)),
        }
    judged = ((name, _disagreement(entry, golden, model, outputs)) for name, outputs in answers.items())
    return [f"{entry.file} on {name}: {wrong}" for name, wrong in judged if wrong]


def _feed(entry: GraphEntry, golden: Golden) -> dict[str, npt.NDArray[Any]]:
    if entry.role == "encoder":
        return {"actions": golden.actions}
    feed: dict[str, npt.NDArray[Any]] = {"tokens": np.ascontiguousarray(golden.tokens[..., : entry.prefix])}
    if golden.stats is not None:
        feed["stats"] = np.ascontiguousarray(golden.stats[..., : entry.prefix, :])
    return feed


def _disagreement(entry: GraphEntry, golden: Golden, model: ModelEntry, outputs: _Arrays) -> str:
    if entry.role == "encoder":
        compared = golden.compared(outputs["tokens"], model)
        if compared.num_wrong:
            return f"{compared.num_wrong} wrong tokens, first {compared.first_wrong}"
        if golden.stats is not None:
            # Behind a flip the statistics are those of another residual.
            steady = ~compared.flipped
            stats_error = action_errors(golden.stats[steady], outputs["stats"][steady], 1.0).value
            if not stats_error <= GATES.stats_error:
                return f"stats error {stats_error:g}, expected at most {GATES.stats_error:g}"
        return ""
    error = action_errors(golden.decoded[entry.prefix], outputs["actions"], model.action_units)
    if error.value <= GATES.action_error:
        return ""
    return f"action error {error.value:g}, expected at most {GATES.action_error:g}: {error}"


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape in the words of a TensorEntry."""
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape
