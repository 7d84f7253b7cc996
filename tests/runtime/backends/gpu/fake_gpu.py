"""Arrays that say they lie on a GPU, and a CUDA in numpy's memory that is as lazy as the real one."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rfsq.runtime.bundle.errors import InferenceError
from rfsq.runtime.bundle.manifest import GraphEntry, TensorEntry

_ALIGNED = 256


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that begin where GPU memory would."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


class FakeArray:
    """What `__cuda_array_interface__` and DLPack tell of an array."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        device: int | None = 0,
        stream: int | None = None,
        is_read_only: bool = False,
        **changes: Any,
    ) -> None:
        self.array = array
        self._changes = {"stream": stream, **changes}
        self._is_read_only = is_read_only
        if device is not None:
            self.__dlpack_device__ = lambda: (2, device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        array = self.array
        return {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data if array.size else None, self._is_read_only),
            "strides": None if array.flags.c_contiguous else array.strides,
            **self._changes,
        }


def gpu(shape: tuple[int, ...], dtype: Any = np.float32, **options: Any) -> FakeArray:
    return FakeArray(aligned(shape, dtype), **options)


class FakeCuda:
    """Stands in for `runtime.backends.gpu.driver`: work on a stream is done when somebody waits for it, not before.

    So memory that is changed or freed too early gives wrong answers here too. `fail_after`: how many more
    synchronisations go well; None for all.
    """

    def __init__(self) -> None:
        self.live: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.fail_after: int | None = None
        self.open_graphs = 0
        self._captured: dict[int, list[Callable[[], None]]] = {}
        self._lock = threading.RLock()
        self._next_stream = 100

    def install(self, monkeypatch: Any, module: Any) -> FakeCuda:
        cuda = self

        class DeviceMemory:
            def __init__(self, num_bytes: int) -> None:
                self.num_bytes, self.address = num_bytes, cuda.allocate(num_bytes)

            def close(self) -> None:
                cuda.free(self.address)

        class PinnedArray:
            def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
                self.num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
                self.address = cuda.allocate(self.num_bytes)
                self.array = cuda.view(self.address, shape, dtype)

            def close(self) -> None:
                del self.array
                cuda.free(self.address)

        class Stream:
            def __init__(self) -> None:
                with cuda._lock:
                    cuda._next_stream += 1
                    self.handle = cuda._next_stream
                    cuda.streams[self.handle] = []

            def synchronize(self) -> None:
                cuda.synchronize(self.handle)

            def close(self) -> None:
                del cuda.streams[self.handle]

        class Graph:
            def __init__(self, work: list[Callable[[], None]]) -> None:
                self._work: list[Callable[[], None]] | None = work
                cuda.open_graphs += 1

            def launch(self, stream: int) -> None:
                assert self._work is not None, "launched after it was closed"
                for work in self._work:
                    cuda.put(stream, work)

            def close(self) -> None:
                assert self._work is not None, "closed twice"
                self._work = None
                cuda.open_graphs -= 1

        def capture(stream: Stream, work: Callable[[], None]) -> Graph:
            assert not cuda.streams[stream.handle], "a capture does not wait for what is under way"
            cuda._captured[stream.handle] = []
            try:
                work()
            finally:
                recorded = cuda._captured.pop(stream.handle)
            return Graph(recorded)

        def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
            cuda.put(stream, lambda: cuda.copy(target, source, num_bytes))

        for name, value in {
            "DeviceMemory": DeviceMemory,
            "PinnedArray": PinnedArray,
            "Stream": Stream,
            "capture": capture,
            "copy_to_device": copy,
            "copy_to_host": copy,
            "require_device": lambda: None,
            "require_not_capturing": lambda _stream: None,
            "is_usable": lambda: True,
            "synchronize_device": lambda: [cuda.synchronize(handle) for handle in list(cuda.streams)],
            "synchronize_stream": self.synchronize,
        }.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
        return self

    def allocate(self, num_bytes: int) -> int:
        memory = aligned((max(num_bytes, 1),), np.uint8)
        # Nobody may rely on zeros.
        memory.fill(0x7F)
        self.live[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        self.live.pop(address).fill(0x7F)

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        count = int(np.prod(shape))
        memory = (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address)
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        assert target in self.live, "copied to memory that was freed"
        assert source in self.live, "copied from memory that was freed"
        ctypes.memmove(target, source, num_bytes)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        queue = self._captured.get(stream)
        if queue is None:
            queue = self.streams.setdefault(stream, [])
        queue.append(work)

    def synchronize(self, stream: int) -> None:
        if self.fail_after is not None:
            if not self.fail_after:
                raise InferenceError("CUDA failed: on purpose")
            self.fail_after -= 1
        queue = self.streams.get(stream, [])
        while queue:
            queue.pop(0)()


class FakeFunction:
    """Computes something that tells every chunk, step and number from every other."""

    def __init__(self, cuda: FakeCuda, entry: GraphEntry, max_batch: int = 64) -> None:
        self.max_batch, self._cuda, self.graph = max_batch, cuda, entry
        self.programs: list[FakeProgram] = []
        self.is_closed = False
        self.reads_once = False

    def new_program(self) -> FakeProgram:
        self.programs.append(FakeProgram(self._cuda, self.graph, self.max_batch))
        return self.programs[-1]

    def close(self) -> None:
        assert all(program.is_closed for program in self.programs), "closed before its programs"
        self.is_closed = True


class FakeProgram:
    def __init__(self, cuda: FakeCuda, entry: GraphEntry, max_batch: int) -> None:
        self._cuda, self._entry, self._max_batch = cuda, entry, max_batch
        self.is_closed = False
        self.batches: list[int] = []

    def bind(self, shape: tuple[int, ...], addresses: Sequence[int]) -> None:
        batch = shape[0]
        assert 1 <= batch <= self._max_batch
        assert len(addresses) == len(self._entry.inputs) + len(self._entry.outputs)
        self._shape, self._addresses = shape, list(addresses)
        self.batches.append(batch)

    def enqueue(self, stream: int) -> None:
        assert not self.is_closed
        shape, addresses = self._shape, self._addresses

        def work() -> None:
            assert not self.is_closed, "closed before its work was done"
            views = [
                self._cuda.view(address, tensor.shape_of(shape[0], shape[-1]), tensor.dtype)
                for address, tensor in zip(addresses, (*self._entry.inputs, *self._entry.outputs), strict=True)
            ]
            inputs, outputs = views[: len(self._entry.inputs)], views[len(self._entry.inputs) :]
            for output, tensor in zip(outputs, self._entry.outputs, strict=True):
                output[...] = answer(inputs, tensor)

        self._cuda.put(stream, work)

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


def answer(inputs: Sequence[np.ndarray], tensor: TensorEntry) -> np.ndarray:
    """What a fake function gives for `tensor`: each chunk's own sum, and another number at every place."""
    total = sum(array.reshape(len(array), -1).astype(np.float64).sum(1) for array in inputs)
    places = np.arange(int(np.prod(tensor.shape[1:]))).reshape(tensor.shape[1:])
    return (np.asarray(total).reshape(-1, *[1] * places.ndim) + places).astype(tensor.dtype)
