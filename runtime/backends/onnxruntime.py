"""ONNX Runtime on the CPU, with inputs and outputs bound once per shape.

Importing this module switches ONNX Runtime's telemetry off, unless the process has imported onnxruntime before.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# From 1.32 on its import alone starts a thread that keeps a database in the home folder and reports to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from ..bundle.arrays import AnyArray, Float32Array, Int32Array
from ..bundle.errors import BackendUnavailableError, BundleError, InferenceError
from ..bundle.folder import Bundle
from ..bundle.manifest import GraphEntry, TensorEntry
from .beliefs import BeliefAnswer, BeliefQuestion
from .graph_beliefs import GraphBeliefs

_LOG = logging.getLogger(__name__)

#: Batch sizes that stay bound, each with every number of chunk tokens that came; a robot uses one or two.
_BOUND_BATCHES = 4
#: Binding arrays of the caller costs 35 us, copying through bound buffers 1 us per 10 KB: above this, bind.
_COPY_LIMIT_BYTES = 256 * 2**10
_ORT_TYPES = {"float32": "tensor(float)", "int32": "tensor(int32)"}
#: In every graph that keeps weights in another file, whichever kind of tensor it is: the key of the file's name.
_EXTERNAL_DATA = b"location"
_LEVELS = (logging.DEBUG, logging.DEBUG, logging.WARNING, logging.ERROR, logging.CRITICAL)

#: The address and shape of an array.
_Place = tuple[int, tuple[int, ...]]
#: The shape of the source, and whether its statistics are left out.
_Key = tuple[tuple[int, ...], bool]
#: Arrays of our own, the session, and its binding to their memory, which stays valid as long as they are kept.
_Buffers = tuple[tuple[Any, ...], Any, Any]
Providers = Sequence[tuple[str, dict[str, str]]]

_CPU_PROVIDERS: Providers = (("CPUExecutionProvider", {}),)


class OrtBackend:
    """Deterministic: one thread by default, so every sum is taken in one order.

    May be called from threads and signal handlers at once; a child of fork opens sessions of its own at its first call.

    num_threads: on two cores, two take a third off batches of thousands of chunks and add a third to a single one.
    Raises BackendUnavailableError where ONNX Runtime refuses a graph, BundleError where a graph is not what the
    manifest describes or keeps weights in another file.
    """

    name = "onnxruntime"
    checked_steps = 0

    def __init__(self, bundle: Bundle, *, num_threads: int = 1) -> None:
        self._open(bundle, "CPU", bundle.manifest.every_graph_of("gemm"), num_threads, _CPU_PROVIDERS)

    def _open(
        self, bundle: Bundle, device: str, graphs: Sequence[GraphEntry], num_threads: int, providers: Providers
    ) -> None:
        self.device, self.description = device, f"ONNX Runtime {ort.__version__}, {device}"
        _forward_messages()
        encoder, *others = graphs
        self._encoder = BoundGraph(bundle, encoder, num_threads, providers)
        opened = {(entry.role, entry.prefix): BoundGraph(bundle, entry, num_threads, providers) for entry in others}
        model = bundle.manifest.model
        self._decoders = {prefix: opened["decoder", model.graph_of(prefix)] for prefix in model.prefixes}
        self._belief_graphs = {prefix: graph for (role, prefix), graph in opened.items() if role == "belief"}
        self._beliefs = GraphBeliefs(model, self._belief_graphs, self.decode_into)

    def encode_into(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        self._encoder.run(actions, None, tokens, stats)

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        self._decoders[tokens.shape[-1]].run(tokens, stats, actions, None)

    @property
    def has_beliefs(self) -> bool:
        """Whether this bundle has graphs for them."""
        return bool(self._belief_graphs)

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        self._beliefs.decode_into(question, answer)

    def close(self) -> None:
        self._encoder.close()
        for decoder in (*self._decoders.values(), *self._belief_graphs.values()):
            decoder.close()


class BoundGraph:
    """One session, with one or two inputs and one or two outputs, the second of either called statistics here, as those
    of `dynamic` bundles are."""

    def __init__(self, bundle: Bundle, entry: GraphEntry, num_threads: int, providers: Providers) -> None:
        self._inputs, self._outputs, self._providers = entry.inputs, entry.outputs, providers
        # Input for another device is copied there when it is bound, not when the graph runs.
        self._can_keep_bindings = providers is _CPU_PROVIDERS
        self._content, self._num_threads = bundle.content(entry.file), num_threads
        if _EXTERNAL_DATA in self._content:
            raise BundleError(
                f"{entry.file} names another file to read weights from, which nobody has hashed; expected a graph "
                "that holds all its weights: build the bundle again"
            )
        try:
            self._session: Any = self._open_session()
        except BackendUnavailableError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} refuses {entry.file}: {error}; build the bundle again or install the "
                f"version it was built with ({bundle.manifest.tools.get('onnxruntime', 'not recorded')})"
            ) from error
        _check_tensors(entry.file, entry.inputs, self._session.get_inputs())
        _check_tensors(entry.file, entry.outputs, self._session.get_outputs())
        self._bound: dict[_Key, _Buffers] = {}
        # Held by the one caller that uses the buffers.
        self._lock = threading.Lock()
        _OPEN_GRAPHS.add(self)

    def run(
        self, source: AnyArray, source_stats: AnyArray | None, target: AnyArray, target_stats: AnyArray | None
    ) -> None:
        """target_stats may be left out where the graph gives them."""
        # Written out, because every call and every loop here costs as much as a node of the graph.
        lock = self._lock
        try:
            # Without waiting: the holder may be the very thread that a signal handler has interrupted.
            if lock.acquire(False):
                try:
                    key = (source.shape, target_stats is None)
                    buffers = self._bound.get(key)
                    if buffers is None:
                        buffers = self._make_buffers(key, source, source_stats, target, target_stats)
                    if buffers is not None:
                        (own_source, own_source_stats, own_target, own_target_stats), session, binding = buffers
                        own_source[...] = source
                        if source_stats is not None:
                            own_source_stats[...] = source_stats
                        session.run_with_iobinding(binding)
                        target[...] = own_target
                        if target_stats is not None:
                            target_stats[...] = own_target_stats
                        return
                finally:
                    lock.release()
            session = self._session_here()
            session.run_with_iobinding(self._bind_host(session, source, source_stats, target, target_stats))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InferenceError(f"ONNX Runtime {ort.__version__} failed: {error}") from error

    def _make_buffers(self, key: _Key, *arrays: AnyArray | None) -> _Buffers | None:
        """Buffers like `arrays`, kept in place of the oldest batch size; None where copying costs more than binding."""
        if not self._can_keep_bindings:
            return None
        if sum(array.nbytes for array in arrays if array is not None) > _COPY_LIMIT_BYTES:
            return None
        own = tuple(None if array is None else np.zeros_like(array) for array in arrays)
        session = self._session_here()
        buffers = own, session, self._bind_host(session, *own)
        self._bound[key] = buffers
        batches = list(dict.fromkeys(shape[0] for shape, _ in self._bound))
        if len(batches) > _BOUND_BATCHES:
            self._bound = {kept: found for kept, found in self._bound.items() if kept[0][0] != batches[0]}
        return buffers

    def _open_session(self) -> Any:
        options = _session_options(self._num_threads)
        wanted = self._providers[0][0]
        if wanted != "CPUExecutionProvider":
            # What ONNX Runtime cannot place on the GPU is an error, not a slow session.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = ort.InferenceSession(self._content, options, providers=list(self._providers))
        found = session.get_providers()[0]
        if found != wanted:
            # A GPU that is not there is a warning to ONNX Runtime.
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} runs on {found} instead of {wanted}: it finds no usable GPU or not "
                "the CUDA libraries that it needs; check nvidia-smi and its log"
            )
        return session

    def _session_here(self) -> Any:
        """This process's own, opened at its first use in a child of fork."""
        if self._session is None:
            self._session = self._open_session()
        return self._session

    def _bind_host(self, session: Any, *arrays: AnyArray | None) -> Any:
        """A binding to the memory of source, its stats, target and its stats, which has to outlive it."""
        return self._bind(session, "cpu", [(array.ctypes.data, array.shape) for array in arrays if array is not None])

    def _bind(self, session: Any, device: str, places: Sequence[_Place]) -> Any:
        """places: of the inputs, then of the outputs, of which the last may be left out."""
        binding = session.io_binding()
        binders = [binding.bind_input] * len(self._inputs) + [binding.bind_output] * len(self._outputs)
        entries = (*self._inputs, *self._outputs)
        for bind, entry, (address, shape) in zip(binders, entries, places, strict=False):
            bind(entry.name, device, 0, np.dtype(entry.dtype).type, shape, address)
        return binding

    def bind_device(self, places: Sequence[_Place]) -> Callable[[], None]:
        """A call on memory of CUDA's device 0, inputs first, for a session on it; it returns when the work is done."""
        session = self._session_here()
        binding = self._bind(session, "cuda", places)

        def run() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                raise InferenceError(f"ONNX Runtime {ort.__version__} failed: {error}") from error

        return run

    def start_anew(self) -> None:
        """With another lock, session and buffers; whoever holds the old ones goes on with them."""
        _ABANDONED.append((self._session, self._bound))
        self._lock = threading.Lock()
        self._session, self._bound = None, {}

    def close(self) -> None:
        _OPEN_GRAPHS.discard(self)
        self._session, self._bound, self._content = None, {}, b""


_OPEN_GRAPHS: weakref.WeakSet[BoundGraph] = weakref.WeakSet()
#: Kept from being freed, which might wait for a lock of theirs.
_ABANDONED: list[Any] = []


def _start_anew() -> None:
    """In a child of fork: locks, ONNX Runtime's own too, may have been held by threads that the child does not have."""
    for graph in list(_OPEN_GRAPHS):
        graph.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def _session_options(num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # A spinning thread takes a core from the controller between two chunks.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Only ONNX, only from the hashed bytes: never a format with rules of its own, never weights from a folder.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
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
