"""Holds a bundle in the making against the gates, opened as the robot would open it, and seals what has passed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from rfsq.export.bundle_writer import StagedBundle
from rfsq.runtime.backends.contract import Backend, engines_of
from rfsq.runtime.backends.registry import create_backend, targets_here
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.manifest import EngineEntry, Manifest, ParityEntry

#: Takes the backends that run here, and why the others do not. Returns everything that the manifest is to call proven;
#: raises GateError where a gate is red.
Judge = Callable[[Sequence[Backend], Mapping[str, str]], tuple[ParityEntry, ...]]


def seal_proven(
    staged: StagedBundle,
    manifest: Manifest,
    judge: Judge,
    wanted: Sequence[str] | None,
    *,
    required: Sequence[str] = (),
) -> Manifest:
    """Open the bundle before it is proven, let `judge` look at its backends, and seal it with what was found.

    wanted, required: see `opened_backends`.
    """
    staged.seal(manifest, is_proven=False)
    bundle = open_bundle(staged.folder, is_proven=False)
    with opened_backends(bundle, wanted, required=required) as (backends, absent):
        parity = judge(backends, absent)
        engines = _with_measurements(manifest.engines, backends, staged)
    return staged.seal(replace(manifest, parity=parity, engines=engines))


@contextlib.contextmanager
def opened_backends(
    bundle: Bundle, wanted: Sequence[str] | None, *, required: Sequence[str] = ()
) -> Iterator[tuple[list[Backend], dict[str, str]]]:
    """Every backend that runs here, and why every other one does not; closed when the block ends.

    wanted: None for all. Engines that are asked for may be for another machine. Raises BackendUnavailableError where
    one that is required does not run.
    """
    engines = {(entry.backend, target) for entry in bundle.manifest.engines for target in ("", *entry.targets)}
    with contextlib.ExitStack() as stack:
        backends: list[Backend] = []
        absent: dict[str, str] = {}
        # What runs graphs as they are comes first.
        for spec in sorted(BACKENDS.values(), key=lambda spec: spec.engine_source is not None):
            if wanted is not None and spec.name not in (*wanted, *required):
                continue
            # Of this machine's own kinds all run, the lesser ones too.
            for target in targets_here(spec.name):
                if spec.engine_source is not None and (spec.name, target) not in engines:
                    continue
                try:
                    backend = create_backend(spec.name, bundle, target)
                except BackendUnavailableError as error:
                    if spec.name in required or target:
                        raise
                    absent[spec.name] = str(error)
                else:
                    backends.append(stack.enter_context(contextlib.closing(backend)))
        yield backends, absent


def failures(entries: Sequence[ParityEntry]) -> list[str]:
    """A line for every gate that is red; NaN is red."""
    return [
        f"{entry.backend}, {entry.gate}: {entry.value:g} over {entry.steps} steps; expected at most {entry.limit:g}"
        + (f" ({entry.detail})" if entry.detail else "")
        for entry in entries
        if not entry.value <= entry.limit
    ]


def _with_measurements(
    engines: Sequence[EngineEntry], backends: Sequence[Backend], staged: StagedBundle
) -> tuple[EngineEntry, ...]:
    """The entries of engines that have just passed the gates, as validated on what they ran on; the others as they are.

    Kernels that were compiled on the way are written beside their engine.
    """
    measured = {}
    for backend in backends:
        for engine in engines_of(backend):
            entry = engine.entry
            kernel_cache = f"{entry.file}.kernels" if engine.kernel_cache else ""
            if kernel_cache:
                staged.write(kernel_cache, engine.kernel_cache)
            measured[entry.file] = replace(
                entry,
                status="validated",
                precision="fp32",
                device=backend.device,
                kernel_cache=kernel_cache,
                detail=f"passed the gates through {backend.description}",
            )
    return tuple(measured.get(entry.file, entry) for entry in engines)
