"""What only a GPU has: calls on arrays that lie there, the floor under every call, and copy bandwidth.

Needs cuda-python; importing this module without it raises ImportError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver, nvrtc
from cuda.bindings import runtime as cudart

from runtime import cuda_api
from runtime.bench_calls import Batch, copies_name, decode_name
from runtime.bench_timing import BANDWIDTH, Figure, time_calls
from runtime.errors import InferenceError
from runtime.gpu_arrays import GpuArray
from runtime.manifest import ModelEntry
from runtime.tokenizer import ActionTokenizer

TRIVIAL_KERNEL = "trivial kernel"
#: The copies of which bandwidth is measured, and how often each byte passes the memory.
_PASSES = {"device to device": 2, "host to device": 1, "device to host": 1}
#: Larger than every cache.
_COPY_BYTES = 256 * 2**20

_SOURCE = b'extern "C" __global__ void trivial(float* x) { x[threadIdx.x] += 1.0f; }'
_THREADS = 32

_Array = npt.NDArray[Any]


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closable)


def open_device() -> cuda_api.GpuDevice:
    """Raises BackendUnavailableError where there is no GPU."""
    return cuda_api.open_device()


def floor_figures(scope: contextlib.ExitStack, model: ModelEntry, batch: Batch) -> Iterator[Figure]:
    """Captured graphs of the copies alone, through pinned memory, one for each operation."""
    tokens, stats = batch.tokens, batch.stats
    operations: list[tuple[str, list[_Array | None], list[_Array | None]]] = [
        ("encode", [batch.actions], [tokens, stats])
    ]
    for prefix in reversed(model.prefixes):
        sources = [batch.tokens_of(prefix), batch.stats_of(prefix)]
        operations.append((decode_name(model, prefix), sources, [batch.actions]))
    for operation, sources, results in operations:
        bytes_in, bytes_out = ([array.nbytes for array in side if array is not None] for side in (sources, results))
        call = _copies(scope, bytes_in, bytes_out)
        yield Figure(
            backend="floor",
            operation=copies_name(operation),
            path="floor",
            batch=batch.size,
            take=functools.partial(time_calls, call),
            bytes_in=sum(bytes_in),
            bytes_out=sum(bytes_out),
        )


def _copies(scope: contextlib.ExitStack, bytes_in: Sequence[int], bytes_out: Sequence[int]) -> Callable[[], None]:
    stream = _own(scope, cuda_api.Stream())
    incoming = [(_own(scope, cuda_api.PinnedArray((size,), np.uint8)), _memory(scope, size)) for size in bytes_in]
    outgoing = [(_own(scope, cuda_api.PinnedArray((size,), np.uint8)), _memory(scope, size)) for size in bytes_out]

    def work() -> None:
        for host, gpu in incoming:
            cuda_api.copy_to_device(gpu.address, host.address, host.num_bytes, stream.handle)
        for host, gpu in outgoing:
            cuda_api.copy_to_host(host.address, gpu.address, host.num_bytes, stream.handle)

    return _launch_and_wait(_own(scope, cuda_api.capture(stream, work)), stream)


def trivial_kernel(scope: contextlib.ExitStack) -> Callable[[], None]:
    """A captured graph of one kernel that does next to nothing. Raises InferenceError where it cannot be made."""
    stream, memory = _own(scope, cuda_api.Stream()), _memory(scope, _THREADS * 4)
    image = np.frombuffer(_compile(cuda_api.open_device().compute_capability), np.uint8)
    # The context of the runtime's API is current since memory was allocated.
    module = _driver(driver.cuModuleLoadData, image.ctypes.data)
    scope.callback(driver.cuModuleUnload, module)
    kernel = _driver(driver.cuModuleGetFunction, module, b"trivial")
    arguments = ((memory.address,), (ctypes.c_void_p,))

    def work() -> None:
        _driver(driver.cuLaunchKernel, kernel, 1, 1, 1, _THREADS, 1, 1, 0, stream.handle, arguments, 0)

    # The first launch may load code, which no capture allows.
    work()
    stream.synchronize()
    return _launch_and_wait(_own(scope, cuda_api.capture(stream, work)), stream)


def _compile(compute_capability: str) -> bytes:
    architecture = f"sm_{compute_capability.replace('.', '')}"
    try:
        program = _nvrtc(nvrtc.nvrtcCreateProgram, _SOURCE, b"trivial.cu", 0, [], [])
        _nvrtc(nvrtc.nvrtcCompileProgram, program, 1, [f"--gpu-architecture={architecture}".encode()])
        image = b" " * int(_nvrtc(nvrtc.nvrtcGetCUBINSize, program))
        # Fills the bytes that it is given.
        _nvrtc(nvrtc.nvrtcGetCUBIN, program, image)
    except RuntimeError as error:  # What cuda-python raises where it does not find the library
        raise InferenceError(
            f"NVRTC cannot be used: {error}; install it with: pip install nvidia-cuda-nvrtc"
        ) from error
    return image


def _nvrtc(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    error, *values = function(*arguments)
    if error:
        raise InferenceError(f"NVRTC failed to compile the trivial kernel: {error!r}")
    return values[0] if values else None


def _driver(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    error, *values = function(*arguments)
    if error:
        raise InferenceError(f"CUDA failed to run the trivial kernel: {error!r}")
    return values[0] if values else None


def device_figures(scope: contextlib.ExitStack, tokenizer: ActionTokenizer, batch: Batch) -> Iterator[Figure]:
    """Encoding and every decoder bound to arrays of the GPU. Raises InferenceError for a batch too large to bind."""
    model, stream = tokenizer.model, _own(scope, cuda_api.Stream())
    actions = _upload(scope, batch.actions, stream)
    encoded, decoded = _upload(scope, batch.tokens, stream), _upload(scope, batch.actions, stream)
    encoded_stats = None if batch.stats is None else _upload(scope, batch.stats, stream)
    bound = _own(scope, tokenizer.bind_encode(actions, encoded, encoded_stats, stream=stream.handle))
    yield _device_figure(tokenizer, "encode", batch, bound, stream, [actions], [encoded, encoded_stats])
    for prefix in reversed(model.prefixes):
        tokens, part = _upload(scope, batch.tokens_of(prefix), stream), batch.stats_of(prefix)
        stats = None if part is None else _upload(scope, part, stream)
        bound = _own(scope, tokenizer.bind_decode(tokens, decoded, stats, stream=stream.handle))
        yield _device_figure(tokenizer, decode_name(model, prefix), batch, bound, stream, [tokens, stats], [decoded])


def _device_figure(
    tokenizer: ActionTokenizer,
    operation: str,
    batch: Batch,
    bound: Callable[[], None],
    stream: cuda_api.Stream,
    inputs: Sequence[GpuArray | None],
    outputs: Sequence[GpuArray | None],
) -> Figure:
    def call() -> None:
        bound()
        stream.synchronize()

    bytes_in, bytes_out = (sum(array.num_bytes for array in side if array is not None) for side in (inputs, outputs))
    return Figure(
        backend=tokenizer.backend.name,
        operation=operation,
        path="device",
        batch=batch.size,
        take=functools.partial(time_calls, call),
        floor=TRIVIAL_KERNEL,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
    )


def copy_figures(scope: contextlib.ExitStack, batch: int) -> Iterator[Figure]:
    """Copies of one large array, whose time gives the bandwidth, to be timed in turn with the calls at `batch`."""
    stream = _own(scope, cuda_api.Stream())
    first, second = _memory(scope, _COPY_BYTES), _memory(scope, _COPY_BYTES)
    host = _own(scope, cuda_api.PinnedArray((_COPY_BYTES,), np.uint8))
    ways = {
        "device to device": (second.address, first.address, cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice),
        "host to device": (first.address, host.address, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice),
        "device to host": (host.address, second.address, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost),
    }
    for name, (target, source, kind) in ways.items():
        call = functools.partial(_copy_and_wait, stream, target, source, kind)
        take = functools.partial(time_calls, call)
        yield Figure(BANDWIDTH, name, "floor", batch, take, bytes_in=_COPY_BYTES * _PASSES[name])


def _copy_and_wait(stream: cuda_api.Stream, target: int, source: int, kind: Any) -> None:
    cuda_api.call(cudart.cudaMemcpyAsync, target, source, _COPY_BYTES, kind, stream.handle)
    stream.synchronize()


def trivial_figure(call: Callable[[], None], batch: int) -> Figure:
    """The floor of `device` calls, timed in turn with those at `batch`; the kernel itself has no batch."""
    return Figure("floor", TRIVIAL_KERNEL, "floor", batch, functools.partial(time_calls, call))


def _launch_and_wait(graph: cuda_api.CapturedGraph, stream: cuda_api.Stream) -> Callable[[], None]:
    def call() -> None:
        graph.launch(stream.handle)
        stream.synchronize()

    return call


def _upload(scope: contextlib.ExitStack, array: _Array, stream: cuda_api.Stream) -> GpuArray:
    memory = _memory(scope, array.nbytes)
    pinned = cuda_api.PinnedArray(array.shape, array.dtype)
    try:
        pinned.array[...] = array
        cuda_api.copy_to_device(memory.address, pinned.address, pinned.num_bytes, stream.handle)
        stream.synchronize()
    finally:
        pinned.close()
    return GpuArray(memory.address, array.shape, array.dtype, True, None, memory)


def _memory(scope: contextlib.ExitStack, num_bytes: int) -> cuda_api.DeviceMemory:
    return _own(scope, cuda_api.DeviceMemory(num_bytes))


def _own(scope: contextlib.ExitStack, resource: _T) -> _T:
    """Closed with everything else, the last first."""
    scope.callback(resource.close)
    return resource
