"""Arrays that lie on the GPU already, and the calls of an `ActionTokenizer` on them.

They are those of torch, CuPy, JAX and whatever else speaks their two common protocols: `__cuda_array_interface__`
(version 3) and DLPack say where an array lies; nothing is copied, and no value is read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ...bundle.errors import InvalidInputError
from ...bundle.models import ModelEntry
from ...bundle.validation import (
    check_prefix,
    check_shape,
    check_whether_stats,
    is_gpu_array,
    kind_of,
    token_letters,
    type_advice,
)
from ..contract import BoundCall, MarksIllegalValues
from .driver import DEVICE, DeviceMemory, is_on_device

_DType = np.dtype[Any]
FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
#: cudaStreamLegacy: the stream that torch and CuPy work on unless they are told otherwise.
DEFAULT_STREAM = 1
#: cudaStreamPerThread.
_PER_THREAD_STREAM = 2
#: What the widest load of a kernel needs.
_ALIGNMENT = 16
_OUTPUTS = {"out", "stats_out", "std_out", "mode_probability_out", "mode_out"}


@dataclass(frozen=True, slots=True)
class GpuArray:
    """A C-contiguous array on CUDA's device 0. `owner` keeps its memory; `stream` is the one it says it belongs to."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_writable: bool
    stream: int | None
    owner: object

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def overlaps(self, other: GpuArray) -> bool:
        return self.address < other.address + other.num_bytes and other.address < self.address + self.num_bytes


class GpuResult:
    """An array of ours on the GPU, for `torch.as_tensor`, `cupy.asarray` and the like, which do not copy it.

    Its values are there once the stream of the call has come so far; `stream` is told to whoever takes the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, stream: GpuStream) -> None:
        self.shape, self.dtype, self.stream = shape, np.dtype(dtype), stream
        self._memory = DeviceMemory(math.prod(shape) * self.dtype.itemsize)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._memory.address, False),
            "strides": None,
            "stream": self.stream.handle,
        }

    def __del__(self) -> None:
        # cudaFree waits until nothing uses the memory any more.
        memory = getattr(self, "_memory", None)
        if memory is not None:
            memory.close()


def gpu_array(name: str, value: object) -> GpuArray:
    """Where `value` lies. Raises InvalidInputError unless it is C-contiguous, aligned and on CUDA's device 0."""
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
        array = _from_dlpack(value) if interface is None else _from_interface(name, interface, value)
    except InvalidInputError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, BufferError) as error:
        raise InvalidInputError(f"{name} cannot be read on the GPU: {error}") from error
    if array.num_bytes:
        where = getattr(value, "__dlpack_device__", None)
        _check_memory(name, array, is_on_device(array.address) if where is None else int(where()[1]) == DEVICE)
    return array


@dataclass(frozen=True, slots=True)
class GpuStream:
    """A cudaStream_t, and the object that it belongs to, which must not go before it."""

    handle: int
    owner: object


def stream_of(stream: object, arrays: dict[str, GpuArray]) -> GpuStream:
    """The stream to work on: the caller's, else the one the arrays name, else the current one of their library.

    stream: None, a cudaStream_t as a number, or a stream of torch, CuPy or cuda.core. Raises InvalidInputError where
    an array names another stream: what is computed on that one might not be there yet.
    """
    if isinstance(stream, GpuStream):
        return stream
    named = {name: array.stream for name, array in arrays.items() if array.stream is not None}
    if stream is None:
        stream = next(iter(named.values()), None) or _current_stream(arrays)
    handle = _stream_handle(stream)
    if handle == _PER_THREAD_STREAM:
        raise InvalidInputError(
            "the stream is CUDA's per-thread default stream, which is another one in every thread; pass a stream of "
            "your own"
        )
    for name, other in named.items():
        if other != handle:
            raise InvalidInputError(
                f"{name} belongs to the stream {other:#x}, this call works on {handle:#x}: what is written on one may "
                "not be there on the other yet; make the array's stream the current one, or wait for it and pass "
                "the array from there"
            )
    return GpuStream(handle, stream)


def _current_stream(arrays: dict[str, GpuArray]) -> object:
    """torch's tensors name no stream: what is theirs is the one that is current in torch."""
    torch = sys.modules.get("torch")
    if torch is not None and any(type(array.owner).__module__.startswith("torch") for array in arrays.values()):
        return torch.cuda.current_stream(DEVICE)
    return DEFAULT_STREAM


def _stream_handle(stream: object) -> int:
    for handle in (stream, getattr(stream, "cuda_stream", None), getattr(stream, "ptr", None)):
        if isinstance(handle, int):
            return handle or DEFAULT_STREAM
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        # A method by the protocol, a property in its first version.
        _, handle = protocol() if callable(protocol) else protocol
        return int(handle) or DEFAULT_STREAM
    raise InvalidInputError(
        f"stream is a {type(stream).__qualname__}; expected a stream of torch, CuPy or cuda.core, or its handle as int"
    )


def _from_interface(name: str, interface: dict[str, Any], owner: object) -> GpuArray:
    if interface.get("mask") is not None:
        raise InvalidInputError(f"{name} has a mask; expected a plain array")
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    address, is_read_only = interface["data"]
    stream = interface.get("stream")
    _check_strides(name, interface.get("strides"), shape, dtype.itemsize)
    return GpuArray(int(address or 0), shape, dtype, not is_read_only, None if stream is None else int(stream), owner)


def _from_dlpack(value: object) -> GpuArray:
    # Here, because torch, CuPy and JAX all have the other protocol.
    from cuda.core.utils import StridedMemoryView

    # -1: no stream waits for another; `stream_of` decides about streams.
    view = StridedMemoryView.from_dlpack(value, stream_ptr=-1)
    dtype, shape = np.dtype(view.dtype), tuple(view.shape)
    strides = None if view.strides is None else tuple(step * dtype.itemsize for step in view.strides)
    _check_strides("array", strides, shape, dtype.itemsize)
    # The view holds the array, and the array's memory as long.
    return GpuArray(int(view.ptr), shape, dtype, not view.readonly, None, view)


def _check_strides(name: str, strides: tuple[int, ...] | None, shape: tuple[int, ...], itemsize: int) -> None:
    if strides is None or 0 in shape:
        return
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        # Where there is one entry only, nobody takes the step to the next.
        if size != 1 and stride != expected:
            raise InvalidInputError(
                f"{name} is not C-contiguous: shape {list(shape)}, strides {list(strides)} bytes; pass a contiguous "
                "copy, `.contiguous()` in torch"
            )
        expected *= size


def _check_memory(name: str, array: GpuArray, is_on_device: bool) -> None:
    if array.address % _ALIGNMENT:
        raise InvalidInputError(
            f"{name} begins at the address {array.address:#x}, which is no multiple of {_ALIGNMENT}; pass an array "
            "that begins where its memory begins, a `.clone()` of the slice in torch"
        )
    if not is_on_device:
        raise InvalidInputError(
            f"{name} does not lie in the memory of CUDA's device 0, on which this tokenizer works; move it there, or "
            "choose the GPU with CUDA_VISIBLE_DEVICES"
        )


# Calls, checked like those on numpy arrays, but for the values --------------------------------------------------------

#: The arrays in the engine's order, and the stream to work on.
_Call = tuple[list[GpuArray], GpuStream]


@runtime_checkable
class TakesGpuArrays(MarksIllegalValues, Protocol):
    """What a backend on the GPU has beside the contract of all backends; arrays in the order of its graphs."""

    def encode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def decode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def bind_encode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...

    def bind_decode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...


class GpuCalls:
    """Encodes and decodes where the arrays lie, on the caller's stream."""

    def __init__(self, model: ModelEntry, backend: TakesGpuArrays) -> None:
        self._model, self._backend = model, backend

    def encode(self, actions: object, stream: object) -> tuple[GpuResult, ...]:
        """actions float32 [B, T, A] -> tokens int32 [B, T, D, L] and, in `dynamic` bundles, stats [B, T, L, 2]."""
        source = self._actions(actions)
        own, batch = stream_of(stream, {"actions": source}), source.shape[0]
        tokens = GpuResult(self._model.tokens_shape(batch), _INT32, own)
        stats = GpuResult(self._model.stats_shape(batch), FLOAT32, own) if self._model.has_stats else None
        self.encode_into(source, tokens, stats, own)
        return (tokens,) if stats is None else (tokens, stats)

    def encode_into(self, actions: object, out: object, stats_out: object | None, stream: object) -> None:
        """Into arrays of the GPU."""
        arrays, handle = self._encoding(actions, out, stats_out, stream)
        if arrays[0].shape[0]:
            self._backend.encode_on_gpu(arrays, handle)

    def bind_encode(self, actions: object, out: object, stats_out: object | None, stream: object) -> BoundCall:
        """`encode_into`, captured."""
        return self._backend.bind_encode(*bindable(self._encoding(actions, out, stats_out, stream)))

    def decode(self, tokens: object, stats: object | None, stream: object) -> GpuResult:
        """tokens int32 [B, T, D, l] -> actions float32 [B, T, A]."""
        source = self._tokens(tokens)
        own = stream_of(stream, {"tokens": source})
        actions = GpuResult(self._model.actions_shape(source.shape[0]), FLOAT32, own)
        self.decode_into(source, actions, stats, own)
        return actions

    def decode_into(self, tokens: object, out: object, stats: object | None, stream: object) -> None:
        """Into an array of the GPU."""
        arrays, handle = self._decoding(tokens, out, stats, stream)
        if arrays[0].shape[0]:
            self._backend.decode_on_gpu(arrays, handle)

    def bind_decode(self, tokens: object, out: object, stats: object | None, stream: object) -> BoundCall:
        """`decode_into`, captured."""
        return self._backend.bind_decode(*bindable(self._decoding(tokens, out, stats, stream)))

    def _encoding(self, actions: object, out: object, stats_out: object | None, stream: object) -> _Call:
        source = self._actions(actions)
        batch = source.shape[0]
        named = {"actions": source}
        named["out"] = gpu_output("out", out, self._backend.token_types, self._model.tokens_shape(batch))
        if self._model.has_stats:
            shape = self._model.stats_shape(batch)
            if stats_out is None:
                raise InvalidInputError(
                    "stats_out is missing: the engine of a `dynamic` bundle always gives statistics; pass a float32 "
                    f"array {list(shape)} on the GPU for them"
                )
            named["stats_out"] = gpu_output("stats_out", stats_out, (FLOAT32,), shape)
        return checked(named, stream)

    def _decoding(self, tokens: object, out: object, stats: object | None, stream: object) -> _Call:
        source = self._tokens(tokens)
        batch, layers = source.shape[0], source.shape[-1]
        named = {"tokens": source}
        check_whether_stats(stats, self._model)
        if stats is not None:
            named["stats"] = gpu_input("stats", stats, (FLOAT32,))
            shape = self._model.stats_shape(batch, layers)
            if named["stats"].shape != shape:
                raise InvalidInputError(f"stats has shape {list(named['stats'].shape)}; expected {list(shape)}")
        named["out"] = gpu_output("out", out, (FLOAT32,), self._model.actions_shape(batch))
        return checked(named, stream)

    def _actions(self, value: object) -> GpuArray:
        array = gpu_input("actions", value, (FLOAT32,))
        check_shape("actions", array.shape, "B, T, A", (self._model.chunk_length, self._model.action_dim))
        return array

    def _tokens(self, value: object) -> GpuArray:
        array = gpu_input("tokens", value, self._backend.token_types)
        check_shape("tokens", array.shape, token_letters(self._model), self._model.token_grid)
        check_prefix(array.shape, self._model)
        return array


def _read(name: str, value: object) -> GpuArray:
    if isinstance(value, GpuArray):
        return value
    if not is_gpu_array(value):
        raise InvalidInputError(
            f"{name} is a {kind_of(value)} that does not lie on the GPU, beside arrays that do; pass all of them from "
            "the GPU, or all of them as numpy.ndarray"
        )
    return gpu_array(name, value)


def gpu_input(name: str, value: object, accepted: Sequence[_DType]) -> GpuArray:
    """accepted: its types, the one to advise first."""
    array = _read(name, value)
    if array.dtype not in accepted:
        wanted = accepted[0]
        advice = type_advice(array.dtype, wanted, f".to(torch.{wanted}) or .astype(cupy.{wanted})")
        raise InvalidInputError(
            f"{name} have type {array.dtype}; expected {wanted}: nothing is converted on the GPU unasked, {advice}"
        )
    return array


def gpu_output(name: str, value: object, accepted: Sequence[_DType], shape: tuple[int, ...]) -> GpuArray:
    """accepted: its types, the one to advise first."""
    array = _read(name, value)
    if array.dtype not in accepted or array.shape != shape:
        expected = array.dtype if array.dtype in accepted else accepted[0]
        raise InvalidInputError(
            f"{name} is {array.dtype}{list(array.shape)}; expected {expected}{list(shape)} to write the results into"
        )
    if not array.is_writable:
        raise InvalidInputError(f"{name} is read-only; expected an array that results can be written into")
    return array


def checked(named: dict[str, GpuArray], stream: object) -> _Call:
    """named: in the engine's order."""
    for output in (name for name in named if name in _OUTPUTS):
        for other in named:
            if other != output and named[output].overlaps(named[other]):
                raise InvalidInputError(f"{output} overlaps the memory of {other}; give it memory of its own")
    return list(named.values()), stream_of(stream, named)


def bindable(call: _Call) -> _Call:
    if not call[0][0].shape[0]:
        raise InvalidInputError("an empty batch cannot be bound; expected at least one chunk")
    return call
