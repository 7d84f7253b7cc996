"""Checks of ONNX graphs before anything is compiled from them: form, shapes, and two runtimes that must agree.

Polygraphy drives ONNX Runtime and the reference evaluator of the onnx package, which share no code, and compares them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnx import InferShapes
from polygraphy.backend.onnx.util import get_input_metadata
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

# Before Polygraphy opens ONNX Runtime: switches its telemetry off.
import rfsq.runtime.backends.onnxruntime  # noqa: F401
from rfsq.runtime.bundle.comparison import action_errors, compare_tokens
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import GraphEntry, ModelEntry

_Arrays = Mapping[str, npt.NDArray[Any]]


class _EvaluatorRunner(BaseRunner):  # type: ignore[misc]  # polygraphy has no types
    """onnx's own evaluator, node by node in numpy."""

    def __init__(self, onnx_bytes: bytes) -> None:
        super().__init__(name="onnx reference evaluator", prefix="onnx-reference")
        self._model = onnx.load_model_from_string(onnx_bytes)

    def activate_impl(self) -> None:
        self._evaluator = onnx.reference.ReferenceEvaluator(self._model)

    def get_input_metadata_impl(self) -> Any:
        return get_input_metadata(self._model.graph)

    def infer_impl(self, feed_dict: _Arrays) -> Any:
        started = time.perf_counter()
        outputs = self._evaluator.run(None, dict(feed_dict))
        self.inference_time = time.perf_counter() - started
        return OrderedDict(zip(self._evaluator.output_names, outputs, strict=True))

    def deactivate_impl(self) -> None:
        del self._evaluator


def check_graph(entry: GraphEntry, onnx_bytes: bytes) -> list[str]:
    """Checker, strict shape inference, and the tensors that `entry` states; a line for everything that is wrong."""
    model = onnx.load_model_from_string(onnx_bytes)
    try:
        onnx.checker.check_model(model, full_check=True)
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            inferred = InferShapes(model, error_ok=False)()
        graph = onnx.shape_inference.infer_shapes(inferred, check_type=True, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, PolygraphyException) as error:
        return [f"{entry.file} is not a sound graph: {error}"]
    found = [_tensor(value) for value in (*graph.input, *graph.output)]
    expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in (*entry.inputs, *entry.outputs)]
    if found != expected or len(graph.input) != len(entry.inputs):
        return [f"{entry.file} has the tensors {found}; expected {expected}"]
    unknown = [node.name for node in graph.node if set(node.output) - {value.name for value in _typed(graph)}]
    return [f"{entry.file}: shapes of {unknown} could not be inferred"] if unknown else []


def cross_check(entry: GraphEntry, onnx_bytes: bytes, golden: Golden, model: ModelEntry) -> list[str]:
    """Run the graph on two independent runtimes; a line for everything in which either leaves the reference."""
    runners = [
        OnnxrtRunner(SessionFromOnnx(onnx_bytes, providers=["cpu"]), name="ONNX Runtime"),
        _EvaluatorRunner(onnx_bytes),
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[_feed(entry, golden)])
    problems = []
    for name, (outputs,) in results.items():
        wrong = _disagreement(entry, golden, model, outputs)
        if wrong:
            problems.append(f"{entry.file} on {name}: {wrong}")
    return problems


def _feed(entry: GraphEntry, golden: Golden) -> dict[str, npt.NDArray[Any]]:
    if entry.role == "encoder":
        return {"actions": golden.actions}
    feed: dict[str, npt.NDArray[Any]] = {"tokens": np.ascontiguousarray(golden.tokens[..., : entry.prefix])}
    if golden.stats is not None:
        feed["stats"] = np.ascontiguousarray(golden.stats[..., : entry.prefix, :])
    return feed


def _disagreement(entry: GraphEntry, golden: Golden, model: ModelEntry, outputs: _Arrays) -> str:
    if entry.role == "encoder":
        compared = compare_tokens(
            golden.tokens,
            outputs["tokens"],
            golden.margins,
            golden.bounds,
            num_levels=model.num_levels,
            is_step_coupled=model.is_step_coupled,
        )
        if compared.num_wrong:
            return f"{compared.num_wrong} wrong tokens, first {compared.first_wrong}"
        if golden.stats is None:
            return ""
        # Behind a flip the statistics are those of another residual.
        steady = ~compared.flipped
        stats_error = action_errors(golden.stats[steady], outputs["stats"][steady], 1.0).value
        if stats_error <= GATES.stats_error:
            return ""
        return f"stats error {stats_error:g}, expected at most {GATES.stats_error:g}"
    error = action_errors(golden.decoded[entry.prefix], outputs["actions"], model.action_units)
    if error.value <= GATES.action_error:
        return ""
    return f"action error {error.value:g}, expected at most {GATES.action_error:g}: {error}"


def _typed(graph: onnx.GraphProto) -> tuple[onnx.ValueInfoProto, ...]:
    return (*graph.value_info, *graph.output)


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape in the words of a TensorEntry."""
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape
