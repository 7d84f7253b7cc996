"""The one place that talks to CUDA: device, streams, memory, graphs, through NVIDIA's cuda-python.

Addresses and handles are plain integers. Nothing here chooses a GPU: it is CUDA's device 0, which
`CUDA_VISIBLE_DEVICES` decides.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver
from cuda.bindings import runtime as cudart

from ...bundle.arrays import AnyArray
from ...bundle.errors import BackendUnavailableError, InferenceError, OutOfGpuMemoryError

#: The GPU that everything here is about.
DEVICE = 0
_DEFAULT_STREAM = 0
_HOST_TO_DEVICE = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
_DEVICE_TO_HOST = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
#: Nobody else knows a stream that is captured, so nothing else has to hold still: no thread, no signal handler, and not
#: the garbage collector, which may free memory at any moment.
_CAPTURE_MODE = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
_NOT_CAPTURING = cudart.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
_OUT_OF_MEMORY = cudart.cudaError_t.cudaErrorMemoryAllocation
#: What cudaPointerGetAttributes calls memory that kernels can read at the speed of the GPU.
_DEVICE_MEMORY = cudart.cudaMemoryType.cudaMemoryTypeDevice


@dataclass(frozen=True)
class GpuDevice:
    """compute_capability: such as `9.0`; memory in bytes; driver: the CUDA version that it supports, such as `13.0`."""

    name: str
    compute_capability: str
    memory: int
    driver: str
    multiprocessors: int = 1

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.compute_capability}"


class _Process:
    """CUDA does not survive a fork: the child has the parent's handles and none of its threads."""

    is_started = False
    is_forked = False


def _after_fork() -> None:
    _Process.is_forked = _Process.is_started


os.register_at_fork(after_in_child=_after_fork)


def is_usable() -> bool:
    """False in a child of fork whose parent had started CUDA: nothing of it may be called there, not even to free."""
    return not _Process.is_forked


def require_same_process() -> None:
    """Raises InferenceError in a child of fork whose parent had started CUDA."""
    if _Process.is_forked:
        raise InferenceError(
            "this process was forked after CUDA had started, and CUDA does not work in such a child; start processes "
            "with multiprocessing's 'spawn', or fork before the bundle is loaded"
        )


def require_device() -> None:
    """Raises InferenceError in such a child, and in a thread whose current device is not device 0."""
    require_same_process()
    status, current = cudart.cudaGetDevice()
    if status:
        fail(status)
    if current != DEVICE:
        raise InferenceError(
            f"this thread's current CUDA device is {current}, and the tokenizer works on device {DEVICE}; make it the "
            "current one around the call, with torch.cuda.device, or choose the GPU with CUDA_VISIBLE_DEVICES"
        )


def require_not_capturing(stream: int) -> None:
    """Raises InferenceError where someone is capturing the stream: what a call uses would not outlive their graph."""
    if call(cudart.cudaStreamIsCapturing, stream) != _NOT_CAPTURING:
        raise InferenceError(
            "the stream is being captured into a graph, which this call cannot be part of; bind the arrays with "
            "bind_encode or bind_decode before, and launch the bound call beside the graph"
        )


def open_device() -> GpuDevice:
    """CUDA's device 0. Raises BackendUnavailableError where there is none, or in a child of fork."""
    try:
        require_same_process()
    except InferenceError as error:
        raise BackendUnavailableError(str(error)) from error
    return _device()


@cache
def _device() -> GpuDevice:
    status, count = cudart.cudaGetDeviceCount()
    if status or not count:
        reason = _describe(status) if status else "no device"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise BackendUnavailableError(
            f"CUDA finds no usable GPU here: {reason}{hint}; check the driver with nvidia-smi"
        )
    _Process.is_started = True
    properties = call(cudart.cudaGetDeviceProperties, DEVICE)
    version = call(cudart.cudaDriverGetVersion)
    return GpuDevice(
        name=properties.name.decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory=int(properties.totalGlobalMem),
        driver=f"{version // 1000}.{version % 1000 // 10}",
        multiprocessors=int(properties.multiProcessorCount),
    )


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call into CUDA, its runtime or its driver; returns what comes beside the status: nothing, a value or a tuple.

    Raises OutOfGpuMemoryError or InferenceError with CUDA's own words.
    """
    error, *values = function(*arguments)
    if error:
        fail(error)
    return values[0] if len(values) == 1 else (tuple(values) or None)


def fail(error: Any) -> None:
    """Raises what `call` raises for a status that is not success."""
    # Clears the error: the next call that only asks for one would report it again.
    cudart.cudaGetLastError()
    if error == _OUT_OF_MEMORY:
        status, free, total = cudart.cudaMemGetInfo()
        have = "" if status else f": {free / 1e6:.0f} MB of {total / 1e6:.0f} MB are free"
        raise OutOfGpuMemoryError(f"the GPU is out of memory{have}; free some, or use smaller batches")
    raise InferenceError(f"CUDA failed: {_describe(error)}; if this comes again, start the process anew")


def _describe(error: Any) -> str:
    if isinstance(error, cudart.cudaError_t):
        name, text = cudart.cudaGetErrorName(error)[1], cudart.cudaGetErrorString(error)[1]
    else:
        name, text = driver.cuGetErrorName(error)[1], driver.cuGetErrorString(error)[1]
    return f"{text.decode()} ({name.decode()})"


def synchronize_stream(stream: int) -> None:
    """Wait for everything that was put on a stream, of ours or not."""
    call(cudart.cudaStreamSynchronize, stream)


def synchronize_device() -> None:
    """Wait for everything that was put on any stream. Other threads may be capturing theirs."""
    # cudaDeviceSynchronize would make their captures fail. To free memory waits as long, and leaves them alone.
    DeviceMemory(1).close()


def free_memory() -> int:
    """Bytes of the GPU's memory that nobody uses."""
    return int(call(cudart.cudaMemGetInfo)[0])


class Stream:
    """A stream of our own that waits for no other. `handle` is its cudaStream_t."""

    def __init__(self) -> None:
        self._stream = call(cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        error = cudart.cudaStreamSynchronize(self._stream)[0]
        if error:
            fail(error)

    def close(self) -> None:
        if is_usable():
            cudart.cudaStreamDestroy(self._stream)


class DeviceMemory:
    """Memory of the GPU, freed by `close`; `address` is a multiple of 256."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.address = int(call(cudart.cudaMalloc, max(num_bytes, 1)))

    def clear(self) -> None:
        """Fill it with zeros, and wait until they are there for every stream."""
        call(cudart.cudaMemset, self.address, 0, self.num_bytes)
        synchronize_stream(_DEFAULT_STREAM)

    def write(self, content: bytes) -> None:
        """Fill its beginning, and wait until that is there for every stream."""
        source = np.frombuffer(content, np.uint8)
        call(cudart.cudaMemcpy, self.address, source.ctypes.data, len(content), _HOST_TO_DEVICE)
        # Of memory that is not pinned, the copy itself may still be under way.
        synchronize_stream(_DEFAULT_STREAM)

    def close(self) -> None:
        if self.address and is_usable():
            cudart.cudaFree(self.address)
        self.address = 0


class PinnedArray:
    """A numpy array in memory that the GPU copies from and to without the processor."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        count = int(np.prod(shape))
        self.num_bytes = count * np.dtype(dtype).itemsize
        self.address = int(call(cudart.cudaHostAlloc, max(self.num_bytes, 1), cudart.cudaHostAllocDefault))
        memory = (ctypes.c_byte * max(self.num_bytes, 1)).from_address(self.address)
        self.array: AnyArray = np.frombuffer(memoryview(memory), dtype, count).reshape(shape)

    def close(self) -> None:
        if self.address and is_usable():
            cudart.cudaFreeHost(self.address)
        self.address = 0
        del self.array


def copy_to_device(target: int, source: int, num_bytes: int, stream: int) -> None:
    """In the order of `stream`; `source` is pinned."""
    call(cudart.cudaMemcpyAsync, target, source, num_bytes, _HOST_TO_DEVICE, stream)


def copy_to_host(target: int, source: int, num_bytes: int, stream: int) -> None:
    """In the order of `stream`; `target` is pinned."""
    call(cudart.cudaMemcpyAsync, target, source, num_bytes, _DEVICE_TO_HOST, stream)


class CapturedGraph:
    """What `capture` recorded, launched as one."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: int) -> None:
        error = cudart.cudaGraphLaunch(self._executable, stream)[0]
        if error:
            fail(error)

    def close(self) -> None:
        if is_usable():
            cudart.cudaGraphExecDestroy(self._executable)


def capture(stream: Stream, work: Callable[[], None]) -> CapturedGraph:
    """Record what `work` puts on `stream`, without running it. Whatever it uses has to outlive the graph."""
    call(cudart.cudaStreamBeginCapture, stream.handle, _CAPTURE_MODE)
    try:
        work()
    except BaseException:
        # The capture has to end, whatever became of it.
        cudart.cudaStreamEndCapture(stream.handle)
        cudart.cudaGetLastError()
        raise
    graph = call(cudart.cudaStreamEndCapture, stream.handle)
    try:
        return CapturedGraph(call(cudart.cudaGraphInstantiate, graph, 0))
    finally:
        cudart.cudaGraphDestroy(graph)


def is_on_device(address: int) -> bool:
    """Whether `address` is memory of device 0, as cudaMalloc gives it: not of the host, not of another GPU."""
    error, attributes = cudart.cudaPointerGetAttributes(address)
    if error:
        cudart.cudaGetLastError()
        return False
    return bool(attributes.type == _DEVICE_MEMORY and attributes.device == DEVICE)
