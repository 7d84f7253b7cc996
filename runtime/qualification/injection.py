"""Backends that fail on purpose, to see what a loop makes of it before a robot does.

tokenizer, backend = faulty(ActionTokenizer.load("build/bundle"))
decoder = ControlDecoder(tokenizer, config, position=position)
decoder.warmup()
backend.fault = Fault.NAN
assert decoder.step(tokens).status is Status.NONFINITE
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np

from ..backends.beliefs import BeliefAnswer, BeliefQuestion, decodes_beliefs
from ..backends.contract import Backend
from ..backends.registry import create_backend
from ..bundle.arrays import Float32Array, Int32Array
from ..bundle.errors import BackendUnavailableError, InferenceError
from ..bundle.folder import Bundle
from ..tokenizer import ActionTokenizer

_NAN = struct.pack("<f", float("nan"))
#: Smaller tables are no weights: a graph has one number for each bit of a token, and makes indices with them.
_MOST_BITS = 16
#: Two float32 as one number, which no code happens to look like.
_PAIR = np.dtype(np.uint64)
#: What stands before the numbers of a table in a graph: the type FLOAT, a name, and how many bytes follow. Fields are
#: written in the order of their numbers.
_FLOAT_TABLE = re.compile(rb"\x10\x01B[\x00-\x7f][ -~]+J([\x80-\xff]*[\x00-\x7f])")


class Fault(StrEnum):
    """What a decoder call does in place of its work, or after it; NONE for nothing."""

    NONE = ""
    RAISES = "raises"
    RAISES_UNKNOWN = "raises what nobody knows"
    OUT_OF_MEMORY = "runs out of memory"
    WRONG_SHAPE = "gives another shape"
    HANGS = "hangs"
    SLOW = "is slow"
    NAN = "gives one NaN"
    INF = "gives infinity"
    HUGE = "gives a huge value"
    WRITES_NOTHING = "writes nothing"


_RAISED: dict[Fault, tuple[type[Exception], str]] = {
    Fault.RAISES: (InferenceError, "injected: the library failed"),
    Fault.RAISES_UNKNOWN: (RuntimeError, "injected: an exception that no contract knows"),
    Fault.OUT_OF_MEMORY: (MemoryError, "injected"),
}
#: Where what is written into the actions.
_WRITTEN: dict[Fault, tuple[Any, float]] = {
    Fault.NAN: ((0, -1, 0), np.nan),
    Fault.INF: (..., np.inf),
    Fault.HUGE: ((0, 0, 0), 1e30),
}


class FaultyBackend:
    """Decodes as `backend` does until `fault` is set, from any thread; hands everything else through.

    delay_s: how long SLOW takes. pause: how SLOW waits; pass what sets a clock of your own forward. A call that HANGS
    lets other threads run, as ctypes and ONNX Runtime do, until `release()` or `close()`, and then decodes.
    """

    def __init__(self, backend: Backend, *, pause: Callable[[float], None] = time.sleep, delay_s: float = 0.05) -> None:
        self._backend, self._pause = backend, pause
        self.fault, self.delay_s = Fault.NONE, delay_s
        self.hanging = 0
        self._counting, self._released = threading.Lock(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def replace(self, backend: Backend) -> Backend:
        """Decode on `backend` from now on; returns the one before, which stays open."""
        before, self._backend = self._backend, backend
        return before

    def release(self) -> None:
        """Let the calls that hang go on; the next one hangs again."""
        released, self._released = self._released, threading.Event()
        released.set()

    def close(self) -> None:
        self.release()
        self._backend.close()

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        self._decode(actions, lambda: self._backend.decode_into(tokens, stats, actions))

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        backend: Any = self._backend
        self._decode(answer.actions, lambda: backend.decode_belief_into(question, answer))

    @property
    def has_beliefs(self) -> bool:
        return decodes_beliefs(self._backend)

    def _decode(self, actions: Float32Array, decode: Callable[[], None]) -> None:
        fault = self.fault
        if fault in _RAISED:
            kind, message = _RAISED[fault]
            raise kind(message)
        if fault == Fault.WRONG_SHAPE:
            actions[...] = np.zeros((actions.shape[0], actions.shape[1] + 1, actions.shape[2]), np.float32)
        if fault == Fault.WRITES_NOTHING:
            return
        if fault == Fault.HANGS:
            self._hang()
        elif fault == Fault.SLOW:
            self._pause(self.delay_s)
        decode()
        if fault in _WRITTEN:
            place, value = _WRITTEN[fault]
            actions[place] = value

    def _hang(self) -> None:
        released = self._released
        with self._counting:
            self.hanging += 1
        try:
            released.wait()
        finally:
            with self._counting:
                self.hanging -= 1


def faulty(tokenizer: ActionTokenizer, **options: Any) -> tuple[ActionTokenizer, FaultyBackend]:
    """`tokenizer` on its own backend in a FaultyBackend, made with `options`, and that. Close only one of the two."""
    backend: Any = FaultyBackend(tokenizer.backend, **options)
    return ActionTokenizer(tokenizer.manifest, backend, tokenizer.golden), backend


def with_nan_weights(bundle: Bundle, name: str) -> Backend:
    """The real backend `name`, `onnxruntime` or `c`, with NaN for the decoders' weights.

    Nothing on disk is changed. Raises BackendUnavailableError if the backend is not there, or is another one, or has so
    few weights that they cannot be found.
    """
    graphs = [entry.file for entry in bundle.manifest.graphs_of("gemm") if entry.role == "decoder"]
    contents = {file: bundle.content(file) for file in bundle.manifest.files}
    if name == "onnxruntime":
        contents |= {graph: _nan_graph(contents[graph]) for graph in graphs}
    elif name == "c":
        weights = [table for graph in graphs for table in weight_tables(contents[graph])]
        libraries = [entry.file for entry in bundle.manifest.engines if entry.backend == "c"]
        altered = {library: _nan_library(contents[library], weights) for library in libraries}
        if any(contents[library] == content for library, content in altered.items()):
            raise BackendUnavailableError("no weights of the C engine can be altered: this model has hardly any")
        contents |= altered
    else:
        raise BackendUnavailableError(f"no weights of {name!r} can be altered here; expected onnxruntime or c")
    return create_backend(name, replace(bundle, _contents=MappingProxyType(contents)))


def weight_tables(graph: bytes) -> list[Float32Array]:
    """The float32 tables in an ONNX file, flat; read without onnx, which a robot lacks."""
    return [np.frombuffer(graph[place], np.float32) for place in _places(graph)]


def _places(graph: bytes) -> list[slice]:
    found = [slice(table.end(), table.end() + _varint(table[1])) for table in _FLOAT_TABLE.finditer(graph)]
    return [place for place in found if place.stop - place.start > _MOST_BITS * len(_NAN)]


def _nan_graph(graph: bytes) -> bytes:
    altered = bytearray(graph)
    for place in _places(graph):
        altered[place] = _NAN * ((place.stop - place.start) // len(_NAN))
    return bytes(altered)


def _nan_library(library: bytes, weights: Sequence[Float32Array]) -> bytes:
    """With NaN wherever two numbers stand that are neighbours in a table: tables are laid out anew there, in parts."""
    if not weights:
        return library
    pairs = np.concatenate([np.lib.stride_tricks.sliding_window_view(table, 2) for table in weights])
    # Two zeros are everywhere.
    wanted = np.ascontiguousarray(pairs[pairs.all(axis=1)]).view(_PAIR)
    altered = bytearray(library)
    for first in (0, _PAIR.itemsize // 2):
        words = np.frombuffer(altered, _PAIR, (len(altered) - first) // _PAIR.itemsize, first)
        words[np.isin(words, wanted)] = np.frombuffer(2 * _NAN, _PAIR)[0]
    return bytes(altered)


def _varint(data: bytes) -> int:
    """A number as protobuf writes it, 7 bits in each byte, the lowest first."""
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(data))
