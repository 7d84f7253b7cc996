"""What every engine on an NVIDIA GPU has in common: buffers, streams and captured graphs around it.

An engine brings `GpuFunction`s; this module gives them the contract of a backend. Numpy arrays travel through pinned
memory, and copy, engine and copy back are one captured graph. Arrays of the GPU are used where they lie.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...bundle.arrays import AnyArray, Float32Array, Int32Array
from ...bundle.errors import InferenceError
from ...bundle.manifest import GraphEntry, TensorEntry
from .arrays import GpuArray, GpuStream
from .driver import (
    CapturedGraph,
    DeviceMemory,
    PinnedArray,
    Stream,
    capture,
    copy_to_device,
    copy_to_host,
    is_usable,
    require_device,
    require_not_capturing,
    require_same_process,
    synchronize_device,
    synchronize_stream,
)
from .kept import Kept

#: What a kernel may write straight into the memory of the host, or read there: a copy of its own takes microseconds,
#: whatever its size.
_DIRECT_BYTES = 64 * 2**10
#: So many chunks take a multiple of 16 bytes, whatever their size: what the widest load of a kernel needs.
_ALIGNED_CHUNKS = 16
#: Larger batches of numpy arrays go through in slices, of which two are under way at a time.
_SLICE_BYTES = 4 * 2**20

_Shape = tuple[int, ...]


class Program(Protocol):
    """One use of a function: everything that running it on given addresses needs, scratch memory included."""

    def bind(self, shape: _Shape, addresses: Sequence[int]) -> None:
        """Take the addresses of all inputs, then all outputs. shape: of the first input, from which the others
        follow."""

    def enqueue(self, stream: int) -> None:
        """Put the work on a stream. Raises InferenceError."""

    def close(self) -> None:
        """Free what it holds."""


class GpuFunction(Protocol):
    """An encoder or a decoder on the GPU."""

    @property
    def graph(self) -> GraphEntry:
        """Which one it is, with the types and shapes of its inputs and outputs."""

    @property
    def max_batch(self) -> int:
        """The most chunks that one program takes."""

    @property
    def reads_once(self) -> bool:
        """Whether it reads each byte of its inputs once: then it may read them where the host has them."""

    def new_program(self) -> Program:
        """Independent of every other program. Raises InferenceError, OutOfGpuMemoryError where there is no room."""

    def close(self) -> None:
        """Free what all programs share; they are closed before."""


class GpuBackend:
    """A backend made of GPU functions. May be called from any thread, and from a signal handler.

    functions: of the encoder and every decoder, once for each type of tokens. Arrays of the host go through those of
    the first type: what is legal has the same value in all.
    """

    checked_steps = 0

    def __init__(self, name: str, description: str, device: str, functions: Sequence[GpuFunction]) -> None:
        self.name, self.description, self.device = name, description, device
        # By the type of tokens; then by the prefix, None for the encoder.
        self._runners: dict[np.dtype[Any], dict[int | None, Runner]] = {}
        self._all = [Runner(function) for function in functions]
        for function, runner in zip(functions, self._all, strict=True):
            graph = function.graph
            of_type = self._runners.setdefault(np.dtype(graph.tokens.dtype), {})
            of_type |= dict.fromkeys((None,) if graph.role == "encoder" else graph.decodes, runner)
        self._on_host = next(iter(self._runners.values()))

    @property
    def token_types(self) -> tuple[np.dtype[Any], ...]:
        return tuple(self._runners)

    def encode_into(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        self._on_host[None].run_on_host((actions,), (tokens, stats))

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        self._on_host[tokens.shape[-1]].run_on_host((tokens,) if stats is None else (tokens, stats), (actions,))

    def encode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        """arrays: actions, tokens and, in `dynamic` bundles, stats. Returns before the work is done."""
        self._runners[arrays[1].dtype][None].run_on_gpu(arrays, stream)

    def decode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        """arrays: tokens, in `dynamic` bundles stats, and actions. Returns before the work is done."""
        self._runners[arrays[0].dtype][arrays[0].shape[-1]].run_on_gpu(arrays, stream)

    def bind_encode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> CapturedCall:
        """`encode_on_gpu` on these arrays, captured."""
        return self._runners[arrays[1].dtype][None].bind(arrays, stream)

    def bind_decode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> CapturedCall:
        """`decode_on_gpu` on these arrays, captured."""
        return self._runners[arrays[0].dtype][arrays[0].shape[-1]].bind(arrays, stream)

    def close(self) -> None:
        for runner in self._all:
            runner.close()


class CapturedCall:
    """A call on fixed arrays of the GPU, captured as a graph: calling it launches the graph and allocates nothing.

    It keeps the arrays, the stream and the engine alive until it is closed. The arrays may be written between calls, in
    the order of the stream that it was bound to.
    """

    def __init__(self, program: Program, graph: CapturedGraph, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        self._program, self._graph, self._arrays, self._stream = program, graph, tuple(arrays), stream

    def __call__(self) -> None:
        """Launch on the bound stream; returns before the work is done. Raises InferenceError."""
        if not self._arrays:
            raise InferenceError("this bound call was closed; bind the arrays again")
        require_device()
        self._graph.launch(self._stream.handle)

    def close(self) -> None:
        """Wait for the stream, then free the graph. It cannot be called afterwards."""
        # In a child of fork nothing of CUDA may be called, not even to free.
        if self._arrays and is_usable():
            synchronize_stream(self._stream.handle)
            self._graph.close()
            self._program.close()
            self._arrays = ()

    def __del__(self) -> None:
        # Its memory must not go while the graph is under way.
        with contextlib.suppress(InferenceError):
            self.close()


class Runner:
    """One function with everything that is kept ready for it."""

    def __init__(self, function: GpuFunction) -> None:
        self._function = function
        graph = function.graph
        per_chunk = sum(
            math.prod(tensor.shape_of(1, graph.prefix)) * np.dtype(tensor.dtype).itemsize
            for tensor in (*graph.inputs, *graph.outputs)
        )
        self._slice = max(1, min(function.max_batch, _SLICE_BYTES // per_chunk))
        self._host_calls: Kept[_HostCall] = Kept(self._new_host_call, _HostCall.close)
        self._programs: Kept[Program] = Kept(lambda _stream: function.new_program(), _close_idle_program)

    def run_on_host(self, inputs: Sequence[AnyArray], outputs: Sequence[AnyArray | None]) -> None:
        shape = inputs[0].shape
        batch = shape[0]
        if batch <= self._slice:
            # Written out: this is the call of the control loop, and a context manager takes a microsecond.
            require_same_process()
            host_call = self._host_calls.take(shape)
            try:
                host_call.start(inputs)
                host_call.finish(outputs)
            except BaseException:
                host_call.close()
                raise
            self._host_calls.give_back(shape, host_call)
            return
        require_device()
        # The last slice repeats chunks of the one before it, so that all are of one size.
        starts = [*range(0, batch - self._slice, self._slice), batch - self._slice]
        parts = [slice(start, start + self._slice) for start in starts]
        key = (self._slice, *shape[1:])
        with self._host_calls.borrowed(key) as first, self._host_calls.borrowed(key) as second:
            # While one slice is on the GPU, the processor fills or empties the pinned memory of the other.
            following, under_way = first, second
            for number, part in enumerate(parts):
                following.start([array[part] for array in inputs])
                if number:
                    under_way.finish([None if array is None else array[parts[number - 1]] for array in outputs])
                following, under_way = under_way, following
            under_way.finish([None if array is None else array[parts[-1]] for array in outputs])

    def run_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        require_device()
        require_not_capturing(stream.handle)
        with self._programs.borrowed(stream.handle) as program:
            whole, most = arrays[0].shape[0], self._function.max_batch
            # Every part begins aligned, as the first does.
            most = most // _ALIGNED_CHUNKS * _ALIGNED_CHUNKS or most
            for start in range(0, whole, most):
                addresses = [array.address + start * (array.num_bytes // whole) for array in arrays]
                program.bind((min(most, whole - start), *arrays[0].shape[1:]), addresses)
                program.enqueue(stream.handle)

    def bind(self, arrays: Sequence[GpuArray], stream: GpuStream) -> CapturedCall:
        require_device()
        require_not_capturing(stream.handle)
        batch = arrays[0].shape[0]
        if batch > self._function.max_batch:
            raise InferenceError(
                f"{batch} chunks cannot be bound at once, {self._function.max_batch} can; call without binding"
            )
        program, own_stream = self._function.new_program(), Stream()
        try:
            program.bind(arrays[0].shape, [array.address for array in arrays])
            # The first run compiles kernels, which no capture allows; nothing else may use the arrays meanwhile.
            synchronize_stream(stream.handle)
            program.enqueue(own_stream.handle)
            own_stream.synchronize()
            return CapturedCall(
                program, capture(own_stream, lambda: program.enqueue(own_stream.handle)), arrays, stream
            )
        except BaseException:
            program.close()
            raise
        finally:
            own_stream.close()

    def close(self) -> None:
        self._host_calls.close()
        self._programs.close()
        if is_usable():
            self._function.close()
        else:
            _ABANDONED.append(self._function)

    def _new_host_call(self, shape: _Shape) -> _HostCall:
        # Once is enough: its stream, memory and graph are this device's, whichever is current when they are used.
        require_device()
        return _HostCall(self._function, shape)


class _HostCall:
    """One function from numpy arrays to numpy arrays: pinned memory, device memory, one graph.

    shape: of the first input.
    """

    def __init__(self, function: GpuFunction, shape: _Shape) -> None:
        with contextlib.ExitStack() as undo:
            program = function.new_program()
            undo.callback(program.close)
            self._stream = Stream()
            undo.callback(self._stream.close)

            def allocate(tensor: TensorEntry, *, may_be_direct: bool) -> tuple[PinnedArray, DeviceMemory | None]:
                host = PinnedArray(tensor.shape_of(shape[0], shape[-1]), tensor.dtype)
                undo.callback(host.close)
                if may_be_direct and host.num_bytes <= _DIRECT_BYTES:
                    return host, None
                gpu = DeviceMemory(host.num_bytes)
                undo.callback(gpu.close)
                return host, gpu

            inputs = [allocate(tensor, may_be_direct=function.reads_once) for tensor in function.graph.inputs]
            outputs = [allocate(tensor, may_be_direct=True) for tensor in function.graph.outputs]
            for host, _ in inputs:
                # Legal input, whatever the memory held.
                host.array.fill(0)
            program.bind(shape, [(host if gpu is None else gpu).address for host, gpu in (*inputs, *outputs)])
            self._inputs, self._outputs = ([host.array for host, _ in side] for side in (inputs, outputs))
            self._handle = handle = self._stream.handle

            def work() -> None:
                for host, gpu in inputs:
                    if gpu is not None:
                        copy_to_device(gpu.address, host.address, host.num_bytes, handle)
                program.enqueue(handle)
                for host, gpu in outputs:
                    if gpu is not None:
                        copy_to_host(host.address, gpu.address, host.num_bytes, handle)

            # The first run compiles kernels, which no capture allows.
            work()
            self._stream.synchronize()
            self._graph = capture(self._stream, work)
            undo.callback(self._graph.close)
            self._undo = undo.pop_all()

    def start(self, inputs: Sequence[AnyArray]) -> None:
        for buffer, array in zip(self._inputs, inputs, strict=False):
            buffer[...] = array
        self._graph.launch(self._handle)

    def finish(self, outputs: Sequence[AnyArray | None]) -> None:
        """Wait, and copy into the arrays; None, or none at all, for an output that nobody wants."""
        self._stream.synchronize()
        for array, buffer in zip(outputs, self._outputs, strict=False):
            if array is not None:
                array[...] = buffer

    def close(self) -> None:
        if not is_usable():
            _ABANDONED.append(self)
            return
        # What failed may still be under way in memory that is about to be freed.
        with contextlib.suppress(InferenceError):
            self._stream.synchronize()
        del self._inputs, self._outputs
        self._undo.close()


def _close_idle_program(program: Program) -> None:
    if not is_usable():
        _ABANDONED.append(program)
        return
    # The caller's stream may still be working with it.
    with contextlib.suppress(InferenceError):
        synchronize_device()
    program.close()


#: Kept from being freed in a child of fork, where nothing of CUDA may be called.
_ABANDONED: list[object] = []
