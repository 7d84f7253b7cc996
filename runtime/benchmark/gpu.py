"""Figures that need a GPU: calls on arrays that lie there, the floor under every call, and copy bandwidth.

Needs cuda-python; importing this module without it raises ImportError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import numpy as np
from cuda.bindings import runtime as cudart

from ..backends.beliefs import decodes_beliefs
from ..backends.gpu import driver as cuda_api
from ..backends.gpu.arrays import GpuArray, TakesGpuArrays
from ..backends.gpu.kernels import KernelArguments, KernelLibrary, compile_kernels
from ..bundle.arrays import AnyArray
from ..bundle.beliefs import BeliefMode
from ..bundle.models import ModelEntry
from ..tokenizer import ActionTokenizer
from .beliefs import random_distributions
from .timing import (
    ARITHMETIC,
    BANDWIDTH,
    Batch,
    Figure,
    copies_name,
    operation_name,
    operations_of,
    time_calls,
)

TRIVIAL_KERNEL = "trivial kernel"
#: The copies whose bandwidth is measured, and how often each byte passes through memory.
_PASSES = {"device to device": 2, "host to device": 1, "device to host": 1}
#: Larger than every cache.
_COPY_BYTES = 256 * 2**20

_THREADS = 32
#: Enough independent sums in enough threads that a multiprocessor never waits for a result.
_ADDING_THREADS, _CHAINS, _BLOCKS_EACH = 256, 8, 8
_ROUNDS = 32 * 1024
_SOURCE = f"""
extern "C" __global__ void __launch_bounds__({_THREADS}) trivial(float *x) {{ x[threadIdx.x] += 1.0f; }}

extern "C" __global__ void __launch_bounds__({_ADDING_THREADS}) multiply_add(float *x)
{{
    float sums[{_CHAINS}], total = 0;
    for (int i = 0; i < {_CHAINS}; ++i)
        sums[i] = x[i] + threadIdx.x;
    const float factor = x[0], term = x[1];
#pragma unroll 16
    for (int round = 0; round < {_ROUNDS}; ++round)
#pragma unroll
        for (int i = 0; i < {_CHAINS}; ++i)
            sums[i] = fmaf(sums[i], factor, term);
    for (int i = 0; i < {_CHAINS}; ++i)
        total += sums[i];
    /* Never true, but the compiler does not know. */
    if (total == 1.25f)
        x[0] = total;
}}
"""

_GpuArrays = Sequence[GpuArray | None]


def open_device() -> cuda_api.GpuDevice:
    """Raises BackendUnavailableError where there is no GPU."""
    return cuda_api.open_device()


def floor_figures(scope: ExitStack, model: ModelEntry, batch: Batch) -> Iterator[Figure]:
    """For each operation a captured graph that only copies its arrays, through pinned memory."""
    for prefix in (None, *reversed(model.key_prefixes)):
        codes = [array.nbytes for array in batch.codes.prefix(prefix or model.depth) if array is not None]
        actions = [batch.actions.nbytes]
        bytes_in, bytes_out = (actions, codes) if prefix is None else (codes, actions)
        take = functools.partial(time_calls, _copies(scope, bytes_in, bytes_out))
        name = copies_name(operation_name(model, prefix))
        yield Figure("floor", name, "floor", batch.size, take, bytes_in=sum(bytes_in), bytes_out=sum(bytes_out))


def _copies(scope: ExitStack, bytes_in: Sequence[int], bytes_out: Sequence[int]) -> Callable[[], None]:
    stream = scope.enter_context(closing(cuda_api.Stream()))
    incoming = [(_pinned(scope, size), _memory(scope, size)) for size in bytes_in]
    outgoing = [(_pinned(scope, size), _memory(scope, size)) for size in bytes_out]

    def work() -> None:
        for host, gpu in incoming:
            cuda_api.copy_to_device(gpu.address, host.address, host.num_bytes, stream.handle)
        for host, gpu in outgoing:
            cuda_api.copy_to_host(host.address, gpu.address, host.num_bytes, stream.handle)

    return _waiting(stream, _captured(scope, stream, work))


def trivial_kernel(scope: ExitStack) -> Callable[[], None]:
    """A call of a captured graph with one kernel that does next to nothing. Raises KernelError, InferenceError."""
    stream, memory = scope.enter_context(closing(cuda_api.Stream())), _memory(scope, _THREADS * 4)
    work = _launch(scope, "trivial", 1, memory, stream)
    # The first launch may load code, which no capture allows.
    work()
    stream.synchronize()
    return _waiting(stream, _captured(scope, stream, work))


def trivial_figure(scope: ExitStack, batch: int) -> Figure:
    """The floor of `device` calls, timed in turn with those at `batch`; the kernel itself has no batch."""
    return Figure("floor", TRIVIAL_KERNEL, "floor", batch, functools.partial(time_calls, trivial_kernel(scope)))


def arithmetic_figure(scope: ExitStack, batch: int) -> Figure:
    """Nothing but fused multiply-adds, whose time gives their rate; timed in turn with the calls at `batch`.

    Raises KernelError, InferenceError.
    """
    stream, memory = scope.enter_context(closing(cuda_api.Stream())), _memory(scope, _CHAINS * 4)
    blocks = cuda_api.open_device().multiprocessors * _BLOCKS_EACH
    launch = _launch(scope, "multiply_add", blocks, memory, stream)
    operations = blocks * _ADDING_THREADS * _CHAINS * _ROUNDS * 2
    take = functools.partial(time_calls, _waiting(stream, launch))
    return Figure(ARITHMETIC, "multiply and add", "floor", batch, take, operations=operations)


def _launch(
    scope: ExitStack, name: str, blocks: int, memory: cuda_api.DeviceMemory, stream: cuda_api.Stream
) -> Callable[[], None]:
    image = compile_kernels(_SOURCE, "floor.cu", cuda_api.open_device().compute_capability)
    kernel, arguments = scope.enter_context(closing(KernelLibrary(image))).kernel(name), KernelArguments(1)
    arguments.set((memory.address,))
    return functools.partial(kernel.launch, blocks, arguments, stream.handle)


def device_figures(scope: ExitStack, tokenizer: ActionTokenizer, batch: Batch) -> Iterator[Figure]:
    """Encoding and `key_prefixes` bound to arrays of the GPU.

    Raises InferenceError for a batch too large to bind.
    """
    model, stream = tokenizer.model, scope.enter_context(closing(cuda_api.Stream()))
    actions, decoded = (_upload(scope, batch.actions, stream) for _ in range(2))
    encoded_stats = None if batch.codes.stats is None else _upload(scope, batch.codes.stats, stream)
    backend = tokenizer.backend

    def figure(
        prefix: int | None, suffix: str, bound: Callable[[], None], inputs: _GpuArrays, outputs: _GpuArrays
    ) -> Figure:
        """prefix: None for encoding."""
        bytes_in, bytes_out = (
            sum(array.num_bytes for array in side if array is not None) for side in (inputs, outputs)
        )
        return Figure(
            backend=backend.name,
            operation=operation_name(model, prefix) + suffix,
            path="device",
            batch=batch.size,
            take=functools.partial(time_calls, _waiting(stream, bound)),
            floor=TRIVIAL_KERNEL,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            operations=operations_of(model, prefix) * batch.size * model.chunk_length,
        )

    for kind in backend.token_types if isinstance(backend, TakesGpuArrays) else (np.dtype(np.int32),):
        suffix = "" if kind == np.int32 else f", {kind} tokens"
        encoded = _upload(scope, batch.codes.tokens.astype(kind), stream)
        bound = scope.enter_context(
            closing(tokenizer.bind_encode(actions, encoded, encoded_stats, stream=stream.handle))
        )
        yield figure(None, suffix, bound, [actions], [encoded, encoded_stats])
        for prefix in reversed(model.key_prefixes):
            part = batch.codes.prefix(prefix)
            tokens = _upload(scope, part.tokens.astype(kind), stream)
            stats = None if part.stats is None else _upload(scope, part.stats, stream)
            bound = scope.enter_context(closing(tokenizer.bind_decode(tokens, decoded, stats, stream=stream.handle)))
            yield figure(prefix, suffix, bound, [tokens, stats], [decoded])


def device_belief_figures(scope: ExitStack, tokenizer: ActionTokenizer) -> Iterator[Figure]:
    """Logits of one chunk that lie on the GPU, bound, of all its tokens; none where the backend takes none there.

    With `std` in its name a figure writes the mode's probability as well.
    """
    model, backend = tokenizer.model, tokenizer.backend
    if not decodes_beliefs(backend) or not hasattr(type(backend), "bind_decode_belief"):
        return
    stream = scope.enter_context(closing(cuda_api.Stream()))
    logits = _upload(scope, random_distributions(model, is_logits=True), stream)
    shapes = (model.actions_shape(1), model.actions_shape(1), (1,))
    out, *others = (_upload(scope, np.zeros(shape, np.float32), stream) for shape in shapes)
    calls: tuple[tuple[str, list[GpuArray], BeliefMode], ...] = (
        ("logits", [], "expected"),
        ("logits, std", others, "expected"),
        ("logits, std, likeliest mode", others, "likeliest mode"),
    )
    for name, wanted, mode in calls:
        bound = tokenizer.bind_decode_logits(logits, out, *wanted, mode=mode, stream=stream.handle)
        take = functools.partial(time_calls, _waiting(stream, scope.enter_context(closing(bound))))
        written = sum(array.num_bytes for array in (out, *wanted))
        yield Figure(
            backend.name, name, "device", 1, take, floor=TRIVIAL_KERNEL, bytes_in=logits.num_bytes, bytes_out=written,
            compared=operation_name(model, model.depth),
        )  # fmt: skip


def copy_figures(scope: ExitStack, batch: int) -> Iterator[Figure]:
    """Copies of one large array, whose time gives the bandwidth; timed in turn with the calls at `batch`."""
    stream = scope.enter_context(closing(cuda_api.Stream()))
    first, second = _memory(scope, _COPY_BYTES), _memory(scope, _COPY_BYTES)
    host = _pinned(scope, _COPY_BYTES)
    ways = {
        "device to device": (second.address, first.address, cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice),
        "host to device": (first.address, host.address, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice),
        "device to host": (host.address, second.address, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost),
    }
    for name, (target, source, kind) in ways.items():
        copy = functools.partial(
            cuda_api.call, cudart.cudaMemcpyAsync, target, source, _COPY_BYTES, kind, stream.handle
        )
        take = functools.partial(time_calls, _waiting(stream, copy))
        yield Figure(BANDWIDTH, name, "floor", batch, take, bytes_in=_COPY_BYTES * _PASSES[name])


def _captured(scope: ExitStack, stream: cuda_api.Stream, work: Callable[[], None]) -> Callable[[], None]:
    return functools.partial(scope.enter_context(closing(cuda_api.capture(stream, work))).launch, stream.handle)


def _waiting(stream: cuda_api.Stream, work: Callable[[], object]) -> Callable[[], None]:
    """A call that does `work` and waits until the stream is done."""

    def call() -> None:
        work()
        stream.synchronize()

    return call


def _upload(scope: ExitStack, array: AnyArray, stream: cuda_api.Stream) -> GpuArray:
    memory = _memory(scope, array.nbytes)
    with closing(cuda_api.PinnedArray(array.shape, array.dtype)) as pinned:
        pinned.array[...] = array
        cuda_api.copy_to_device(memory.address, pinned.address, pinned.num_bytes, stream.handle)
        stream.synchronize()
    return GpuArray(memory.address, array.shape, array.dtype, True, None, memory)


def _memory(scope: ExitStack, num_bytes: int) -> cuda_api.DeviceMemory:
    return scope.enter_context(closing(cuda_api.DeviceMemory(num_bytes)))


def _pinned(scope: ExitStack, num_bytes: int) -> cuda_api.PinnedArray:
    return scope.enter_context(closing(cuda_api.PinnedArray((num_bytes,), np.uint8)))
