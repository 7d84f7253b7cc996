"""Which backends there are, and how the best one that works here is chosen."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.advice import command, install
from ..bundle.backend_specs import BACKENDS, BackendSpec, compiled_from
from ..bundle.errors import BackendUnavailableError, EngineRefusedError, InferenceError, SelfTestError, TokenizerError
from ..bundle.folder import Bundle
from .contract import Backend

if TYPE_CHECKING:
    from ..bundle.golden import Golden

_LOG = logging.getLogger(__name__)

#: What keeps a backend from being used here, while another may be.
OBSTACLES = (BackendUnavailableError, SelfTestError, InferenceError, EngineRefusedError)
#: All names, in the order in which `auto` tries them.
PREFERENCE = tuple(BACKENDS)
#: Those that take arrays of the GPU where they lie.
GPU_BACKENDS = tuple(name for name, spec in BACKENDS.items() if spec.is_on_gpu)
#: What NVIDIA's driver shows on Linux, under WSL and on a Jetson.
_GPU_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")


def factory_of(spec: BackendSpec) -> Callable[..., Backend]:
    """What makes this backend for a bundle, and for a target where it has some.

    Only now is its module imported, and the library with it.

    Raises BackendUnavailableError where a package is missing or does not load.
    """
    if not spec.is_installed:
        raise BackendUnavailableError(f"{spec.name} is not installed; install it with: {spec.install}")
    module, name = spec.factory
    try:
        factory = getattr(importlib.import_module(f".{module}", __package__), name)
    except ImportError as error:
        again = spec.install.replace("install", "install --force-reinstall")
        raise BackendUnavailableError(
            f"what a backend on the GPU needs does not load: {error}; install cuda-python with: {install('gpu')}"
            if spec.is_on_gpu
            else f"{spec.name} is installed but does not load: {error}; install it again with: {again}"
        ) from error
    return lambda bundle, *target: factory(bundle, *spec.arguments, *target)


def targets_here(name: str) -> tuple[str, ...]:
    """The kinds of this backend's engines that this machine runs, the best first; "" alone where there are no kinds."""
    if not BACKENDS[name].has_targets:
        return ("",)
    # Here, since few ask.
    from .cpu_targets import host_targets

    return host_targets()


def create_backend(name: str, bundle: Bundle, target: str = "") -> Backend:
    """The backend `name` for a bundle, not yet tested: see `select_backend`.

    target: one of `targets_here`; empty for the best that the bundle has. Raises BackendUnavailableError where it is
    unknown, not installed or does not accept the bundle's graphs.
    """
    spec = BACKENDS.get(name)
    if spec is None:
        raise BackendUnavailableError(f"no backend {name!r}; there are {', '.join(('auto', *BACKENDS))}")
    return factory_of(spec)(bundle, *filter(None, [target]))


@contextlib.contextmanager
def no_gpu_said_first(name: str | None) -> Iterator[None]:
    """Where the backend `name` is unavailable for want of a GPU, say that: no package would help; None for none.

    Raises BackendUnavailableError, as what is done within does.
    """
    try:
        yield
    except BackendUnavailableError as error:
        if name not in GPU_BACKENDS or _has_gpu():
            raise
        reason = str(error).partition(";")[0]
        said = f"no NVIDIA GPU is here, and {name} needs one ({reason}); choose another backend, or another machine"
        raise BackendUnavailableError(said) from error


def _has_gpu() -> bool:
    return any(Path(trace).exists() for trace in _GPU_TRACES)


def without_gpu_as_one(reasons: Mapping[str, str]) -> dict[str, str]:
    """Why backends cannot be used, where no NVIDIA GPU is here in one entry for all that need one."""
    on_gpu = [name for name in reasons if BACKENDS[name].is_on_gpu]
    if len(on_gpu) < 2 or _has_gpu():
        return dict(reasons)
    others = {name: reason for name, reason in reasons.items() if name not in on_gpu}
    return {**others, ", ".join(on_gpu): "no NVIDIA GPU is here (-v shows each reason)"}


def select_backend(name: str, bundle: Bundle, golden: Golden | None) -> Backend:
    """The backend `name`, or for `auto` the best that works here, after it has replayed the golden vectors.

    golden: None skips the replay. Raises BackendUnavailableError where nothing can be opened, SelfTestError where what
    was opened gives wrong answers.
    """
    if name != "auto":
        with no_gpu_said_first(name):
            return _open_tested(name, bundle, golden)
    obstacles: dict[str, TokenizerError] = {}
    for candidate in BACKENDS:
        try:
            backend = _open_tested(candidate, bundle, golden)
        except OBSTACLES as error:
            obstacles[candidate] = error
            # A backend that is missing is expected; one that is there and fails is worth a warning.
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
    """Warn where this processor could run faster code. obstacle: why the C engine cannot be used."""
    best = targets_here("c")[0]
    if isinstance(obstacle, BackendUnavailableError):
        _LOG.warning("%s takes the place of the C engine, which is faster: %s", backend.name, obstacle)
    elif backend.name == "c" and backend.device != best:
        _LOG.warning(
            "the C engine is for %s, and this processor runs %s: compile one for it, on this machine: %s",
            *(backend.device, best, command("build", f"--from-bundle {bundle.folder}")),
        )


def _warn_of_idle_gpu(bundle: Bundle, backend: Backend, obstacles: Mapping[str, TokenizerError]) -> None:
    """Warn where a GPU is here and no engine for it can be used."""
    engines = compiled_from("cuda", "graphs")
    if not obstacles.keys() >= {*engines}:
        return
    try:
        # Here, because it needs cuda-python, which a machine without a GPU need not have.
        from .gpu.driver import open_device

        gpu = open_device()
    except (ImportError, BackendUnavailableError, InferenceError):
        return
    reasons = "; ".join(f"{name}: {str(obstacles[name]).splitlines()[0]}" for name in engines)
    _LOG.warning(
        "%s takes the place of an engine for %s, which is faster: build one for it, on this machine: %s (%s)",
        *(backend.name, gpu, command("build", f"--from-bundle {bundle.folder}"), reasons),
    )


def _open_tested(name: str, bundle: Bundle, golden: Golden | None) -> Backend:
    backend = create_backend(name, bundle)
    if golden is None:
        return backend
    # Here, so that a load without the replay does not import it.
    from .replay import replay

    try:
        # A tokenizer replays those of beliefs before it decodes any.
        replay(golden, bundle.manifest.model, backend, beliefs=False).require(backend, bundle.folder)
    except BaseException:
        backend.close()
        raise
    return backend
