"""Engines for this machine, added to a bundle that was built elsewhere: needs neither torch nor a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from rfsq.export.bundle_writer import StagedBundle, stage_bundle
from rfsq.export.engines import EngineSources, Profile, compilable, compile_engines, profile_of
from rfsq.export.errors import BuildInputError, EngineBuildError, ExportError, require_none
from rfsq.export.progress import phase
from rfsq.export.proving import failures, seal_proven
from rfsq.runtime.backends.contract import Backend, engines_of
from rfsq.runtime.backends.registry import create_backend, no_gpu_said_first, targets_here, without_gpu_as_one
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.backend_specs import BACKENDS, compiled_from
from rfsq.runtime.bundle.errors import BackendUnavailableError, EngineRefusedError, InferenceError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.golden import Golden, read_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME, EngineEntry, Manifest, ParityEntry

#: Backends whose engines are compiled from what a bundle holds.
_BUILT = compiled_from("c", "cuda", "graphs")


@dataclass(frozen=True)
class TargetConfig:
    """bundle: the folder to add to; profile: batch sizes B; has_details: whether every gate is printed.

    backends: all of them, or nothing is added; None for what can be proven here, of C, CUDA and every TensorRT that is
    installed.
    """

    bundle: Path
    backends: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=Profile)
    has_details: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.backends or ()) - set(_BUILT)
        if unknown:
            raise BuildInputError(f"backends {sorted(unknown)} have no engines to add; there are {', '.join(_BUILT)}")


class _CannotRunError(ExportError):
    """Some engines cannot be made or run here. reasons: why not, by backend."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def add_engines(config: TargetConfig) -> tuple[Manifest, tuple[str, ...]]:
    """Compile graphs and sources for this machine, replay the golden vectors on it, and replace the bundle as a whole.

    Engines that are there already, proven on this kind of machine, stay with their proof.

    Returns the manifest, and the backends with validated engines for this machine. The bundle is as it was unless every
    gate passed. Raises BundleError for no bundle, GateError, and ExportError where a backend that was asked for cannot
    be made or run here, or none can.
    """
    with phase("open bundle") as opening:
        bundle = open_bundle(config.bundle)
        golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
        opening.note(f"{bundle.folder}: {bundle.manifest.model.mode}, fingerprint {bundle.manifest.fingerprint[:16]}")
    present = _present(config, bundle, golden)
    complete = tuple(name for name in _BUILT if _is_complete(name, present))
    backends, left_out = compilable(to_run=True)
    chosen = tuple(name for name in config.backends or backends if name not in complete)
    left_out = {name: reason for name, reason in left_out.items() if name not in complete}
    manifest = bundle.manifest
    while chosen:
        try:
            manifest = _add_all(config, bundle, golden, chosen, present)
            break
        except _CannotRunError as error:
            if config.backends:
                others = [name for name in backends if name not in error.reasons]
                advice = f"\nadd what can be proven here with --backend {' '.join(others)}" if others else ""
                raise ExportError(
                    "no engine is added, for some cannot be made or run here:\n  " + _listed(error.reasons) + advice
                ) from error
            # Once more without it: nothing that was not proven stays, nor takes the place of what was there.
            left_out.update(error.reasons)
            chosen = tuple(name for name in chosen if name not in error.reasons)
    if not (chosen or complete):
        raise ExportError(
            "no engine can be added here: install gcc or clang for C, or TensorRT with "
            f"{BACKENDS['tensorrt-rtx'].install} on a machine with a GPU\n  {_listed(left_out)}"
        )
    told = left_out if config.has_details else without_gpu_as_one(left_out)
    for name, reason in told.items() if not config.backends else ():
        print(f"– {name} is left out: {reason}")
    return manifest, (*complete, *chosen)


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _present(config: TargetConfig, bundle: Bundle, golden: Golden) -> tuple[EngineEntry, ...]:
    """Engines for this machine that need no new one: proven on its kind, of these sources, and right here and now."""
    entries, parity = bundle.manifest.engines, bundle.manifest.parity
    wanted = {entry.backend for entry in entries if entry.status == "validated"} & {*(config.backends or _BUILT)}
    found: list[EngineEntry] = []
    with ExitStack() as stack:
        for name in sorted(wanted):
            for target in targets_here(name):
                try:
                    backend = create_backend(name, bundle, target)
                except (BackendUnavailableError, EngineRefusedError, InferenceError):
                    continue
                stack.callback(backend.close)
                used = [engine.entry for engine in engines_of(backend)]
                steps = [entry.steps for entry in parity if (entry.backend, entry.device) == (name, backend.device)]
                if (
                    steps
                    and all(_is_current(entry, backend, bundle, config.profile) for entry in used)
                    and replay(golden, bundle.manifest.model, backend).passed
                ):
                    print(f"– {name} for {backend.device}: already there, proven over {min(steps):,} steps")
                    found += used
    return tuple(found)


def _is_current(entry: EngineEntry, backend: Backend, bundle: Bundle, profile: Profile) -> bool:
    graphs = {graph.file: graph for graph in bundle.manifest.graphs}
    return (
        (entry.status, entry.device) == ("validated", backend.device)
        and entry.source_sha256 == bundle.manifest.files[entry.source].sha256
        and (entry.source not in graphs or entry.profile == astuple(profile_of(graphs[entry.source], profile)))
    )


def _is_complete(name: str, present: Sequence[EngineEntry]) -> bool:
    targets = {target for entry in present if entry.backend == name for target in ("", *entry.targets)}
    return targets.issuperset(targets_here(name))


def _add_all(
    config: TargetConfig,
    bundle: Bundle,
    golden: Golden,
    backends: tuple[str, ...],
    present: Sequence[EngineEntry],
) -> Manifest:
    """Raises _CannotRunError where not all of them can be made and run here."""
    with stage_bundle(config.bundle, overwrite=True) as staged:
        there = {(entry.backend, entry.device) for entry in present}
        sources = EngineSources(staged, bundle.content, bundle.manifest, config.profile, present=tuple(present))
        added: tuple[EngineEntry, ...] = ()
        for name in dict.fromkeys(backends):
            try:
                with no_gpu_said_first(name):
                    added += compile_engines(name, sources)
            except (BackendUnavailableError, EngineBuildError) as error:
                raise _CannotRunError({name: str(error)}) from error
        engines = _kept(bundle, added, staged) + added

        def judge(opened: Sequence[Backend], absent: Mapping[str, str]) -> tuple[ParityEntry, ...]:
            if absent:
                raise _CannotRunError(absent)
            new = [backend for backend in opened if (backend.name, backend.device) not in there]
            here = {(backend.name, backend.device) for backend in new}
            before = (entry for entry in bundle.manifest.parity if (entry.backend, entry.device) not in here)
            return (*before, *_proven(golden, bundle, new, has_details=config.has_details))

        return seal_proven(staged, replace(bundle.manifest, engines=engines), judge, backends)


def _kept(bundle: Bundle, added: Sequence[EngineEntry], staged: StagedBundle) -> tuple[EngineEntry, ...]:
    """The engines that stay beside the new ones; they and all other files are written as they are."""
    engines = bundle.manifest.engines
    replaced = [entry for entry in engines if any(_takes_the_place(new, entry) for new in added)]
    dropped = {file for entry in replaced for file in (entry.file, entry.kernel_cache)}
    for file in bundle.manifest.files.keys() - dropped:
        staged.write(file, bundle.content(file))
    return tuple(entry for entry in engines if entry not in replaced)


def _proven(golden: Golden, bundle: Bundle, opened: Sequence[Backend], *, has_details: bool) -> list[ParityEntry]:
    """What the golden vectors say of each backend. Raises GateError where a gate is red."""
    steps = golden.actions.shape[0] * golden.actions.shape[1]
    parity: list[ParityEntry] = []
    with phase("golden vectors") as current:
        for backend in opened:
            checks = replay(golden, bundle.manifest.model, backend).checks
            parity += [
                ParityEntry(
                    backend.name,
                    f"golden vectors, {check.gate}",
                    steps,
                    check.value,
                    check.limit,
                    check.detail or backend.description,
                    backend.device,
                )
                for check in checks
            ]
            where, red = f"{backend.name} for {backend.device}", sum(not check.passed for check in checks)
            outcome = f"{red} of {len(checks)} gates are red" if red else f"{len(checks)} gates hold"
            current.note(f"{where}: {outcome} over {steps:,} steps")
            if has_details:
                current.note(*(f"{where}, {check}" for check in checks))
        require_none(failures(parity))
    return parity


def _takes_the_place(new: EngineEntry, old: EngineEntry) -> bool:
    """Whether the old engine is of no use beside the new one: else it might be the one that is run and proven."""
    is_same_library = (new.backend, new.version, new.source) == (old.backend, old.version, old.source)
    return new.file == old.file or (BACKENDS[new.backend].engine_source == "graphs" and is_same_library)
