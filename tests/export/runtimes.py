"""Two runtimes of graphs that share no code."""

import itertools

import numpy as np
import onnxruntime

from rfsq.export.graph_builder import LinearForm
from rfsq.export.onnx_evaluator import onnx_evaluator


class OnnxRuntime:
    def __init__(self, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, feed)


class ReferenceEvaluator:
    def __init__(self, content: bytes) -> None:
        self._evaluator = onnx_evaluator(content)

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._evaluator.run(None, feed)


RUNTIMES = [OnnxRuntime, ReferenceEvaluator]
EVERYWHERE = list(itertools.product(RUNTIMES, LinearForm))
#: The forms for GPUs, whose inputs may never have been in the hands of a host.
MARKED = [form for form in LinearForm if form.is_marked]
#: What GPU libraries run in TF32 unless they are told otherwise, and TensorRT-RTX whatever it is told.
PRODUCTS = {"Gemm", "MatMul", "Einsum", "Conv", "MatMulInteger", "QLinearMatMul"}
