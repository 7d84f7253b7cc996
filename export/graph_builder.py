"""How graphs of ONNX are put together: nodes, constants, tensors; the same bytes from any folder and at any time.

Every graph exists in several forms (`LinearForm`), because none is right everywhere: TensorRT-RTX computes a matrix
product in TF32 even when told not to (docs/architecture.md), and a CPU computes anything else at half the speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from rfsq.runtime.bundle.arrays import Float32Array

#: Old enough for every TensorRT 10 and for ONNX Runtime since 1.14.
OPSET = 18
IR_VERSION = 8
#: The dynamic axis of every tensor.
BATCH = "batch"


class LinearForm(StrEnum):
    """How the linear layers are written down, and with it what the graph is for.

    gemm: matrix products, for ONNX Runtime on the CPU; gemm_marked: the same for the GPU, where TF32 is switched off;
    reduce: products and sums, which every TensorRT computes in float32. The forms for the GPU mark what no host has
    validated, since their inputs may never leave it: an illegal level makes all actions of its step NaN, an action that
    no host would let pass (not finite, or beyond the model's limit) makes all tokens of its step -1.
    """

    GEMM = "gemm"
    GEMM_MARKED = "gemm_marked"
    REDUCE = "reduce"

    @property
    def is_marked(self) -> bool:
        return self is not LinearForm.GEMM


#: The forms of graphs that decode probabilities. A host has validated these, so that no form marks what is illegal.
BELIEF_FORMS = (LinearForm.GEMM, LinearForm.REDUCE)


@dataclass
class GraphBuilder:
    """Collects nodes and constants; values are named after what they hold."""

    form: LinearForm
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        made = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if self.constants.setdefault(name, made) != made:
            raise ValueError(f"two constants have the name {name}; expected a name for each")
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def apply(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def is_within(self, distance: str, radius: float, output: str) -> str:
        """Whether |distance| <= radius, which no NaN is."""
        size = self.apply("Abs", [distance], f"{output}.distance")
        return self.apply("LessOrEqual", [size, self.scalar(f"{output}.radius", radius)], f"{output}.is_within")

    def where_within(self, distance: str, radius: float, value: str, other: float, output: str) -> str:
        """`value` where |distance| <= radius, and the number `other` elsewhere."""
        is_within = self.is_within(distance, radius, output)
        return self.apply("Where", [is_within, value, self.scalar(f"{output}.other", other)], output)

    def reshape(self, value: str, shape: Sequence[int], output: str) -> str:
        return self.apply("Reshape", [value, self.constant(f"{output}.shape", np.array(shape, np.int64))], output)

    def product(self, rows: str, name: str, matrix: Float32Array, output: str) -> str:
        """rows [..., r, n] times the constant `name` [..., n, m]: [..., r, m]."""
        if self.form is not LinearForm.REDUCE:
            return self.apply("MatMul", [rows, self.constant(name, matrix)], output)
        before_last, last = (self.constant(f"axis_{axis}", np.array([axis], np.int64)) for axis in (-2, -1))
        wide = self.apply("Unsqueeze", [rows, before_last], f"{output}.wide")
        weight = self.constant(name, matrix.swapaxes(-1, -2)[..., None, :, :])
        return self.apply(
            "ReduceSum", [self.apply("Mul", [wide, weight], f"{output}.products"), last], output, keepdims=0
        )

    def model(self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> bytes:
        graph = helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), initializer=list(self.constants.values())
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="rfsq-deploy"
        )
        return bytes(model.SerializeToString(deterministic=True))


def batched(name: str, element_type: int, *shape: int | str) -> onnx.ValueInfoProto:
    """An input or output [batch, *shape]; a word is a dynamic axis."""
    return helper.make_tensor_value_info(name, element_type, [BATCH, *shape])
