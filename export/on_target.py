"""Engines for this machine, added to a bundle that was built elsewhere: needs neither torch nor a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rfsq.export.batches import Profile
from rfsq.export.bundle_writer import StagedBundle, stage_bundle
from rfsq.export.engines import EngineSources, compilable, compile_engines
from rfsq.export.errors import BuildInputError, EngineBuildError, ExportError, require_none
from rfsq.export.progress import phase
from rfsq.export.proving import failures, seal_proven
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.backend_specs import BACKENDS, compiled_from
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.golden import Golden, read_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME, EngineEntry, Manifest, ParityEntry


@dataclass(frozen=True)
class TargetConfig:
    """bundle: the folder to add to; profile: batch sizes B.

    backends: all of them, or nothing is added; None for what can be proven here, of C, CUDA and every TensorRT that is
    installed.
    """

    bundle: Path
    backends: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=Profile)

    def __post_init__(self) -> None:
        known = compiled_from("c", "cuda", "graphs")
        unknown = set(self.backends or ()) - set(known)
        if unknown:
            raise BuildInputError(f"backends {sorted(unknown)} have no engines to add; there are {', '.join(known)}")


class _CannotRunError(ExportError):
    """Some engines cannot be made or run here. reasons: why not, by backend."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def add_engines(config: TargetConfig) -> tuple[Manifest, tuple[str, ...]]:
    """Compile graphs and sources for this machine, replay the golden vectors on it, and replace the bundle as a whole.

    Returns the new manifest, and the backends that were added. The bundle is as it was unless every gate passed. Raises
    BundleError for no bundle, GateError, and ExportError where a backend that was asked for cannot be made or run here,
    or none can.
    """
    backends, left_out = compilable(to_run=True)
    chosen = config.backends or backends
    while chosen:
        try:
            manifest = _add_all(config, chosen)
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
        else:
            for name, reason in left_out.items() if not config.backends else ():
                print(f"– {name} is left out: {reason}")
            return manifest, chosen
    raise ExportError(
        "no engine can be added here: install gcc or clang for C, or TensorRT with "
        f"{BACKENDS['tensorrt-rtx'].install} on a machine with a GPU\n  {_listed(left_out)}"
    )


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _add_all(config: TargetConfig, backends: tuple[str, ...]) -> Manifest:
    """Raises _CannotRunError where not all of them can be made and run here."""
    with phase("open bundle") as opening:
        bundle = open_bundle(config.bundle)
        golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
        opening.note(f"{bundle.folder}: {bundle.manifest.model.mode}, fingerprint {bundle.manifest.fingerprint[:16]}")
    with stage_bundle(config.bundle, overwrite=True) as staged:
        sources = EngineSources(staged, bundle.content, bundle.manifest.graphs_of("reduce"), config.profile)
        added: tuple[EngineEntry, ...] = ()
        for name in dict.fromkeys(backends):
            try:
                added += compile_engines(name, sources)
            except (BackendUnavailableError, EngineBuildError) as error:
                raise _CannotRunError({name: str(error)}) from error
        engines = _kept(bundle, added, staged) + added

        def judge(opened: Sequence[Backend], absent: Mapping[str, str]) -> tuple[ParityEntry, ...]:
            if absent:
                raise _CannotRunError(absent)
            here = {(backend.name, backend.device) for backend in opened}
            before = (entry for entry in bundle.manifest.parity if (entry.backend, entry.device) not in here)
            return (*before, *_proven(golden, bundle, opened))

        return seal_proven(staged, replace(bundle.manifest, engines=engines), judge, backends)


def _kept(bundle: Bundle, added: Sequence[EngineEntry], staged: StagedBundle) -> tuple[EngineEntry, ...]:
    """The engines that stay beside the new ones; they and all other files are written as they are."""
    engines = bundle.manifest.engines
    replaced = [entry for entry in engines if any(_takes_the_place(new, entry) for new in added)]
    dropped = {file for entry in replaced for file in (entry.file, entry.kernel_cache)}
    for file in bundle.manifest.files.keys() - dropped:
        staged.write(file, bundle.content(file))
    return tuple(entry for entry in engines if entry not in replaced)


def _proven(golden: Golden, bundle: Bundle, opened: Sequence[Backend]) -> list[ParityEntry]:
    """What the golden vectors say of each backend. Raises GateError where a gate is red."""
    with phase("golden vectors") as current:
        parity = [
            ParityEntry(
                backend.name,
                f"golden vectors, {check.gate}",
                golden.actions.shape[0] * golden.actions.shape[1],
                check.value,
                check.limit,
                check.detail or backend.description,
                backend.device,
            )
            for backend in opened
            for check in replay(golden, bundle.manifest.model, backend).checks
        ]
        current.note(
            *(f"{entry.backend}, {entry.gate}: {entry.value:.4g}, limit {entry.limit:.4g}" for entry in parity)
        )
        require_none(failures(parity))
    return parity


def _takes_the_place(new: EngineEntry, old: EngineEntry) -> bool:
    """Whether the old engine is of no use beside the new one: else it might be the one that is run and proven."""
    is_same_library = (new.backend, new.version, new.source) == (old.backend, old.version, old.source)
    return new.file == old.file or (BACKENDS[new.backend].engine_source == "graphs" and is_same_library)
