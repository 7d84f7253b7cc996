"""ONNX Runtime on an NVIDIA GPU: in float32 and not in TF32, on the GPU and never silently on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle.errors import BackendUnavailableError, InferenceError
from ..bundle.folder import Bundle
from .gpu.arrays import GpuArray, GpuStream
from .gpu.driver import open_device, synchronize_stream
from .onnxruntime import BoundGraph, OrtBackend, Providers

_PROVIDER = "CUDAExecutionProvider"
# TF32 is on unless it is switched off.
_PROVIDERS: Providers = ((_PROVIDER, {"use_tf32": "0"}),)


class OrtCudaBackend(OrtBackend):
    """Runs on CUDA's device 0. ONNX Runtime copies numpy arrays, and uses arrays of the GPU where they lie.

    It works on a stream of its own, so a call waits for the caller's stream first, and returns when all is done.
    Raises BackendUnavailableError where this ONNX Runtime has no CUDA or finds no GPU.
    """

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle) -> None:
        if _PROVIDER not in ort.get_available_providers():
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} was built without CUDA; install onnxruntime-gpu in its place"
            )
        gpu = open_device()
        # Finds CUDA's and cuDNN's libraries where pip has put them.
        preload = getattr(ort, "preload_dlls", None)
        if preload is not None:
            preload()
        # Those of beliefs in the other form: in double, the one for the processor takes some GPUs 64 times as long.
        graphs = (*bundle.manifest.graphs_of("gemm_marked"), *bundle.manifest.belief_graphs_of("reduce"))
        self._open(bundle, str(gpu), graphs, 1, _PROVIDERS)

    @property
    def token_types(self) -> tuple[np.dtype[Any], ...]:
        return (np.dtype(np.int32),)

    def encode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        self.bind_encode(arrays, stream)()

    def decode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        self.bind_decode(arrays, stream)()

    def bind_encode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> OrtBoundCall:
        return OrtBoundCall(self._encoder, arrays, stream)

    def bind_decode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> OrtBoundCall:
        return OrtBoundCall(self._decoders[arrays[0].shape[-1]], arrays, stream)


class OrtBoundCall:
    """A call on fixed arrays of the GPU, which it keeps alive until it is closed."""

    def __init__(self, graph: BoundGraph, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        self._run = graph.bind_device([(array.address, array.shape) for array in arrays])
        self._arrays, self._stream = tuple(arrays), stream

    def __call__(self) -> None:
        if not self._arrays:
            raise InferenceError("this bound call was closed; bind the arrays again")
        synchronize_stream(self._stream.handle)
        self._run()

    def close(self) -> None:
        self._arrays = ()
