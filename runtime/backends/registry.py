"""Which backends there are, and how the best one that works here is chosen."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping

from ..bundle.errors import BackendUnavailableError, InferenceError, SelfTestError, TokenizerError
from ..bundle.folder import Bundle
from ..bundle.golden import Golden
from .contract import Backend
from .cpu_targets import host_targets
from .replay import replay
from .tensorrt_api import TENSORRT_BACKENDS, EngineRefusedError, available_tensorrt

_LOG = logging.getLogger(__name__)


BackendFactory = Callable[[Bundle], Backend]

#: `auto` takes the first of these that works: the fastest decoder of one chunk of numpy arrays first (docs/gpu.md).
#: ONNX Runtime on the GPU comes last: a single chunk takes it longer than on the processor.
PREFERENCE = ("c", "cuda", "tensorrt-rtx", "tensorrt", "onnxruntime", "onnxruntime-cuda")
#: Those that a bundle has engines for, each for its kind of GPU.
GPU_ENGINES = ("cuda", *TENSORRT_BACKENDS)
#: Those that take arrays of the GPU where they lie.
GPU_BACKENDS = (*GPU_ENGINES, "onnxruntime-cuda")


def _open_onnxruntime(bundle: Bundle) -> Backend:
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailableError("onnxruntime is not installed; install it with: pip install onnxruntime")
    # Here, so that nobody who uses another backend pays for the import.
    try:
        from .onnxruntime import OrtBackend
    except ImportError as error:
        raise BackendUnavailableError(
            f"onnxruntime is installed but does not load: {error}; install it again with: "
            "pip install --force-reinstall onnxruntime"
        ) from error
    return OrtBackend(bundle)


def _open_onnxruntime_cuda(bundle: Bundle) -> Backend:
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailableError("onnxruntime is not installed; install it with: pip install onnxruntime-gpu")
    try:
        from .onnxruntime_cuda import OrtCudaBackend
    except ImportError as error:
        raise _cuda_python_missing(error) from error
    return OrtCudaBackend(bundle)


def _open_c(bundle: Bundle) -> Backend:
    from .c import CBackend

    return CBackend(bundle)


def _open_cuda(bundle: Bundle) -> Backend:
    try:
        from .cuda import CudaBackend
    except ImportError as error:
        raise _cuda_python_missing(error) from error
    return CudaBackend(bundle)


def _open_tensorrt(name: str, bundle: Bundle) -> Backend:
    if name not in available_tensorrt():
        raise BackendUnavailableError(f"{name} is not installed; install it with: pip install '.[{name},gpu]'")
    try:
        from .tensorrt import TrtBackend
    except ImportError as error:
        raise _cuda_python_missing(error) from error
    return TrtBackend(bundle, name)


def _cuda_python_missing(error: ImportError) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"what a backend on the GPU needs does not load: {error}; install cuda-python with: pip install '.[gpu]'"
    )


#: Every backend that this runtime can run.
FACTORIES: dict[str, BackendFactory] = {
    "c": _open_c,
    "cuda": _open_cuda,
    "onnxruntime": _open_onnxruntime,
    "onnxruntime-cuda": _open_onnxruntime_cuda,
    **{name: functools.partial(_open_tensorrt, name) for name in TENSORRT_BACKENDS},
}


def create_backend(name: str, bundle: Bundle) -> Backend:
    """The backend `name` for a bundle, not yet tested: see `select_backend`.

    Raises BackendUnavailableError where it is unknown, not installed or does not accept the bundle's graphs.
    """
    factory = FACTORIES.get(name)
    if factory is not None:
        return factory(bundle)
    raise BackendUnavailableError(f"no backend {name!r}; there are {', '.join(('auto', *PREFERENCE))}")


def select_backend(name: str, bundle: Bundle, golden: Golden | None) -> Backend:
    """The backend `name`, or for `auto` the best that works here, after it has replayed the golden vectors.

    golden: None skips the replay. Raises BackendUnavailableError where nothing can be opened, SelfTestError where what
    was opened gives wrong answers.
    """
    if name != "auto":
        return _open_tested(name, bundle, golden)
    obstacles: dict[str, TokenizerError] = {}
    for candidate in PREFERENCE:
        try:
            backend = _open_tested(candidate, bundle, golden)
        except (BackendUnavailableError, SelfTestError, InferenceError, EngineRefusedError) as error:
            obstacles[candidate] = error
            # What is not there is no news; what is there and does not work is.
            level = logging.DEBUG if isinstance(error, BackendUnavailableError) else logging.WARNING
            _LOG.log(level, "not %s: %s", candidate, error)
            continue
        passed = "not self-tested" if golden is None else "passed its self-test"
        skipped = f"; not {', '.join(obstacles)}" if obstacles else ""
        _LOG.info("backend %s (%s): %s, best of what works here%s", candidate, backend.description, passed, skipped)
        _warn_of_less(bundle, backend, obstacles.get("c"))
        _warn_of_idle_gpu(bundle, backend, obstacles)
        return backend
    reasons = "\n".join(f"  {candidate}: {error}" for candidate, error in obstacles.items())
    wrong = any(isinstance(error, SelfTestError) for error in obstacles.values())
    kind = SelfTestError if wrong else BackendUnavailableError
    raise kind(f"no backend works for {bundle.folder} on this machine:\n{reasons}")


def _warn_of_less(bundle: Bundle, backend: Backend, obstacle: TokenizerError | None) -> None:
    """Where this processor could run better code than it does. obstacle: what kept the C engine from being used."""
    best = host_targets()[0]
    if isinstance(obstacle, BackendUnavailableError):
        _LOG.warning("%s takes the place of the C engine, which is faster: %s", backend.name, obstacle)
    elif backend.name == "c" and backend.device != best:
        _LOG.warning(
            "the C engine is for %s, and this processor runs %s: compile one for it, on this machine: "
            "python export/build_engine.py --from-bundle %s",
            *(backend.device, best, bundle.folder),
        )


def _warn_of_idle_gpu(bundle: Bundle, backend: Backend, obstacles: Mapping[str, TokenizerError]) -> None:
    """Where there is a GPU, and what is taken is less than any engine for it would be."""
    if not obstacles.keys() >= {*GPU_ENGINES}:
        return
    try:
        # Here, because it needs cuda-python, which a machine without a GPU need not have.
        from .gpu.driver import open_device

        gpu = open_device()
    except (ImportError, BackendUnavailableError, InferenceError):
        return
    reasons = "; ".join(f"{name}: {str(obstacles[name]).splitlines()[0]}" for name in GPU_ENGINES)
    _LOG.warning(
        "%s takes the place of an engine for %s, which is faster: build one for it, on this machine: "
        "python export/build_engine.py --from-bundle %s (%s)",
        *(backend.name, gpu, bundle.folder, reasons),
    )


def _open_tested(name: str, bundle: Bundle, golden: Golden | None) -> Backend:
    backend = create_backend(name, bundle)
    if golden is None:
        return backend
    try:
        result = replay(golden, bundle.manifest.model, backend)
        if not result.passed:
            lines = "\n".join(f"  {check}" for check in result.failures)
            raise SelfTestError(
                f"{name} ({backend.description}) does not give the reference's answers to the golden vectors of "
                f"{bundle.folder}; do not use it, build the bundle again:\n{lines}"
            )
    except BaseException:
        backend.close()
        raise
    return backend
