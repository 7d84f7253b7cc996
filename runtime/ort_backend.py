"""ONNX Runtime on the CPU, with inputs and outputs bound once per batch size."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime.bundle import Bundle
from runtime.errors import BackendUnavailableError, BundleError, InferenceError
from runtime.golden import Float32Array, Int32Array
from runtime.manifest import GraphEntry, TensorEntry

_LOG = logging.getLogger(__name__)

#: Batch sizes that stay bound; a robot uses one or two.
_BOUND_BATCHES = 4
#: Binding arrays of the caller costs 35 us, copying through bound buffers 1 us per 10 KB: above this, bind.
_COPY_LIMIT_BYTES = 256 * 2**10
_ORT_TYPES = {"float32": "tensor(float)", "int32": "tensor(int32)"}
_LEVELS = (logging.DEBUG, logging.DEBUG, logging.WARNING, logging.ERROR, logging.CRITICAL)

_Array = npt.NDArray[Any]


class OrtBackend:
    """Deterministic: one thread by default, so every sum is taken in one order.

    num_threads: more help batches of hundreds of chunks and slow down a single one. Raises BackendUnavailableError
    where ONNX Runtime refuses a graph, BundleError where a graph is not what the manifest describes.
    """

    def __init__(self, bundle: Bundle, *, num_threads: int = 1) -> None:
        _forward_messages()
        model = bundle.manifest.model
        self._encoder = _BoundGraph(bundle, bundle.manifest.graph("encoder", model.num_layers), num_threads)
        self._decoders = {
            prefix: _BoundGraph(bundle, bundle.manifest.graph("decoder", prefix), num_threads)
            for prefix in model.prefixes
        }

    @property
    def name(self) -> str:
        return "onnxruntime"

    @property
    def description(self) -> str:
        return f"ONNX Runtime {ort.__version__}, CPU"

    def encode_into(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        if stats is None:
            self._encoder.run((actions,), (tokens,))
        else:
            self._encoder.run((actions,), (tokens, stats))

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        decoder = self._decoders[tokens.shape[-1]]
        decoder.run((tokens,) if stats is None else (tokens, stats), (actions,))

    def close(self) -> None:
        self._encoder.close()
        for decoder in self._decoders.values():
            decoder.close()


class _BoundGraph:
    """One session. Arrays come in the order of the graph's inputs and outputs; trailing outputs may be left out."""

    def __init__(self, bundle: Bundle, entry: GraphEntry, num_threads: int) -> None:
        self._inputs, self._outputs = entry.inputs, entry.outputs
        try:
            self._session: Any = ort.InferenceSession(
                bundle.content(entry.file), _session_options(num_threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} refuses {entry.file}: {error}; build the bundle again or install the "
                f"version it was built with ({bundle.manifest.tools.get('onnxruntime', 'not recorded')})"
            ) from error
        _check_tensors(entry.file, entry.inputs, self._session.get_inputs())
        _check_tensors(entry.file, entry.outputs, self._session.get_outputs())
        self._bound: OrderedDict[tuple[tuple[int, ...], int], _Buffers] = OrderedDict()
        # Buffers are shared by all callers.
        self._lock = threading.Lock()

    def run(self, inputs: tuple[_Array, ...], outputs: tuple[_Array, ...]) -> None:
        try:
            with self._lock:
                buffers = self._find_buffers(inputs, outputs)
                if buffers is not None:
                    for buffer, array in zip(buffers.inputs, inputs, strict=True):
                        buffer[...] = array
                    self._session.run_with_iobinding(buffers.binding)
                    for array, buffer in zip(outputs, buffers.outputs, strict=True):
                        array[...] = buffer
                    return
            self._session.run_with_iobinding(self._bind(inputs, outputs))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InferenceError(f"ONNX Runtime {ort.__version__} failed: {error}") from error

    def _find_buffers(self, inputs: tuple[_Array, ...], outputs: tuple[_Array, ...]) -> _Buffers | None:
        """Bound buffers for these shapes, made where there are none yet; None where copying would cost too much."""
        key = (inputs[0].shape, len(outputs))
        buffers = self._bound.get(key)
        if buffers is not None:
            self._bound.move_to_end(key)
            return buffers
        if sum(array.nbytes for array in (*inputs, *outputs)) > _COPY_LIMIT_BYTES:
            return None
        buffers = self._bound[key] = self._make_buffers(inputs, outputs)
        if len(self._bound) > _BOUND_BATCHES:
            self._bound.popitem(last=False)
        return buffers

    def _make_buffers(self, inputs: Sequence[_Array], outputs: Sequence[_Array]) -> _Buffers:
        own_inputs = tuple(np.zeros(array.shape, array.dtype) for array in inputs)
        own_outputs = tuple(np.empty(array.shape, array.dtype) for array in outputs)
        return _Buffers(own_inputs, own_outputs, self._bind(own_inputs, own_outputs))

    def _bind(self, inputs: Sequence[_Array], outputs: Sequence[_Array]) -> Any:
        """A binding to the arrays' memory, which has to outlive it."""
        binding = self._session.io_binding()
        for entry, array in zip(self._inputs, inputs, strict=True):
            binding.bind_input(entry.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for entry, array in zip(self._outputs, outputs, strict=False):
            binding.bind_output(entry.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def close(self) -> None:
        with self._lock:
            self._bound.clear()
            self._session = None


class _Buffers:
    """Arrays of our own and the binding to their memory, which stays valid as long as they are kept."""

    __slots__ = ("binding", "inputs", "outputs")

    def __init__(self, inputs: tuple[_Array, ...], outputs: tuple[_Array, ...], binding: Any) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.binding = binding


def _session_options(num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # A spinning thread takes a core from the controller between two chunks.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _check_tensors(file: str, expected: Sequence[TensorEntry], found: Sequence[Any]) -> None:
    stated = [(entry.name, _ORT_TYPES[entry.dtype], list(entry.shape)) for entry in expected]
    # A dynamic dimension is a name or None to ONNX Runtime.
    actual = [(node.name, node.type, [size if isinstance(size, int) else -1 for size in node.shape]) for node in found]
    if stated != actual:
        raise BundleError(f"{file} has the tensors {actual}; the manifest states {stated}; build the bundle again")


def _forward_messages() -> None:
    """ONNX Runtime's messages go to logging instead of stderr, where this version can do so; else only its errors."""
    set_callback = getattr(ort, "set_default_logger_callback", None)
    if set_callback is not None:
        set_callback(_log_message)
    else:
        ort.set_default_logger_severity(3)


def _log_message(severity: int, _category: str, _logger_id: str, location: str, message: str) -> None:
    _LOG.log(_LEVELS[min(int(severity), len(_LEVELS) - 1)], "ONNX Runtime: %s (%s)", message, location)
