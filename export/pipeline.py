"""The phases of a build: calibrate, export, compile, prove, then write the bundle all at once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rfsq.export.belief_vectors import belief_vectors
from rfsq.export.build_config import BuildConfig
from rfsq.export.bundle_writer import StagedBundle, stage_bundle
from rfsq.export.chunk_tokens import load_chunk_tokens
from rfsq.export.deployable import Deployable
from rfsq.export.engines import EngineSources, compilable, compile_engines, require_means
from rfsq.export.errors import GateError, SourceTooLargeError, require_none
from rfsq.export.parity import closing_tables, cross_check, golden_vectors, prove
from rfsq.export.progress import Phase, phase
from rfsq.export.proving import seal_proven
from rfsq.export.reference import Section
from rfsq.export.step_tokens import load_step_tokens
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.registry import no_gpu_said_first, without_gpu_as_one
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.decoding import write_decoding
from rfsq.runtime.bundle.fidelity import Fidelity, Grade
from rfsq.runtime.bundle.golden import Golden, write_golden
from rfsq.runtime.bundle.manifest import (
    C_HEADER,
    C_SOURCE,
    CUDA_SOURCE,
    DECODING_NAME,
    GOLDEN_NAME,
    SCHEMA_VERSION,
    EngineEntry,
    Manifest,
    ParityEntry,
)
from rfsq.runtime.bundle.modes import Mode
from rfsq.runtime.policy.tensor_beliefs import problems_of

#: What backends are compiled from, beside graphs, where the tables of a model fit into it.
_SOURCES = {"c": C_SOURCE, "cuda": CUDA_SOURCE}
#: Packages whose version can change what is built.
_TOOLS = ("numpy", "torch", "onnx", "onnxruntime", "polygraphy")


def build(config: BuildConfig, *, has_tables: bool = True) -> Manifest:
    """Build, prove and write a bundle; prints a line for each phase. has_tables: also the tables, as a red gate does.

    Returns its manifest: what every gate measured is in `parity`, and in `quality` and `provenance["action_mse"]` what
    the tokens are worth.

    Raises UnusableError, ExportError or TokenizerError for what cannot be built, GateError for what was built and is
    not right. The output is complete afterwards, or as it was before.
    """
    for name in config.backends or ():
        with no_gpu_said_first(name):
            require_means(BACKENDS[name], to_run=False)
    kind = config.token_kind
    with stage_bundle(config.folder, overwrite=config.overwrite) as staged:
        tokens: Deployable = load_chunk_tokens(config) if kind is TokenKind.CHUNK else load_step_tokens(config)
        try:
            return _build(config, tokens, staged, has_tables=has_tables)
        except BaseException:
            tokens.keep_fit(config.folder)
            raise


def _build(config: BuildConfig, tokens: Deployable, staged: StagedBundle, *, has_tables: bool) -> Manifest:
    draft = _export(config, tokens, staged)
    reference, held_out = tokens.reference, tokens.data.held_out
    action_mse, fidelity = reference.action_mse(held_out), reference.fidelity(held_out)
    with _worth_first(fidelity, draft.model.mode):
        sections, golden = _examine(config, tokens, draft, staged)
    draft = replace(
        draft,
        engines=_compile(config, draft, staged),
        provenance={**tokens.provenance, "data": tokens.data.description, "action_mse": action_mse},
        quality=tokens.data.quality(fidelity),
    )

    def judge(backends: Sequence[Backend], absent: Mapping[str, str]) -> tuple[ParityEntry, ...]:
        with phase("parity gates") as current:
            parity, problems = prove(draft.model, golden, reference, sections, backends)
            current.note(*(f"{backend.name}: {backend.description}" for backend in backends))
            told = absent if has_tables else without_gpu_as_one(absent)
            current.note(*(f"NOT run: {name}: {reason}" for name, reason in told.items()))
            outcome = f"{parity[0].steps} steps against PyTorch float64"
            if problems:
                current.fail(f"{outcome}: {len(problems)} gates are red")
            else:
                current.note(outcome)
        if has_tables or problems:
            print(closing_tables(parity, action_mse, fidelity, tokens.data.judged_on))
        require_none(problems)
        return parity

    with _worth_first(fidelity, draft.model.mode):
        return seal_proven(staged, draft, judge, config.backends, required=_required(config))


@contextlib.contextmanager
def _worth_first(fidelity: Fidelity | None, mode: Mode) -> Iterator[None]:
    """Where a gate is red on tokens that are worthless, say that first: wrong units fail gates of rounding, too."""
    try:
        yield
    except GateError as error:
        if fidelity is None or fidelity.grade is not Grade.WORTHLESS:
            raise
        raise GateError(f"{fidelity.warning_in(mode)}\n{error}") from error


def _export(config: BuildConfig, tokens: Deployable, staged: StagedBundle) -> Manifest:
    """Write graphs, C and CUDA. Returns the manifest as far as it is known by then."""
    identity = tokens.fingerprint
    with phase("export ONNX") as current:
        graphs = tokens.graphs()
        for graph, content in graphs:
            staged.write(graph.file, content)
        current.note(", ".join(f"{graph.file} {len(content) / 1000:.0f} kB" for graph, content in graphs))
        if (decoding := tokens.decoding()) is not None:
            staged.write(DECODING_NAME, write_decoding(decoding))
    with phase("generate C") as current, _unless_too_large(config, "c", current):
        generated = tokens.c_source()
        staged.write(C_HEADER, generated.header.encode())
        staged.write(C_SOURCE, generated.source.encode())
        current.note(f"{C_SOURCE} {len(generated.source) / 1000:.0f} kB")
    with phase("generate CUDA") as current, _unless_too_large(config, "cuda", current):
        cuda = tokens.cuda_source()
        staged.write(CUDA_SOURCE, cuda.encode())
        current.note(f"{CUDA_SOURCE} {len(cuda) / 1000:.0f} kB")
    entries = tuple(graph for graph, _ in graphs)
    return Manifest(SCHEMA_VERSION, identity, tokens.model, entries, (), (), _tool_versions(), {}, {})


@contextlib.contextmanager
def _unless_too_large(config: BuildConfig, backend: str, current: Phase) -> Iterator[None]:
    """Without this source the bundle still has the engines that have room for its tables, unless it is asked for."""
    try:
        yield
    except SourceTooLargeError as error:
        if backend in (config.backends or ()):
            raise
        current.skip(f"left out: {error}")


def _examine(
    config: BuildConfig, tokens: Deployable, draft: Manifest, staged: StagedBundle
) -> tuple[tuple[Section, ...], Golden]:
    """Draw what everything is judged on, write the golden vectors, and hold the graphs against them."""
    model, sections = draft.model, tokens.sections(config.parity_steps)
    with phase("write golden vectors") as current:
        golden = golden_vectors(tokens.reference, sections)
        golden = replace(golden, beliefs=belief_vectors(tokens.reference.model, model, golden.tokens))
        staged.write(GOLDEN_NAME, write_golden(golden))
        current.note(f"{golden.actions.shape[0]} chunks of {model.chunk_length} steps")
    with phase("cross-check graphs") as current:
        for entry in draft.graphs:
            require_none(cross_check(entry, staged.content(entry.file), golden, model))
        current.note("ONNX Runtime (through Polygraphy) and the onnx reference evaluator agree with PyTorch")
        decoding = tokens.decoding()
        if decoding is not None and golden.beliefs is not None:
            require_none(problems_of(decoding, golden.beliefs, model))
    return sections, golden


def _compile(config: BuildConfig, draft: Manifest, staged: StagedBundle) -> tuple[EngineEntry, ...]:
    sources = EngineSources(staged, staged.content, draft, config.profile, config.compute_capabilities)
    chosen = config.backends
    if chosen is None:
        chosen, reasons = compilable(to_run=False)
        for name, reason in reasons.items():
            advice = "no C compiler is here: compile the generated C on the robot, with --from-bundle"
            print(f"  {advice if name == 'c' else reason}")
        chosen = tuple(name for name in chosen if (staged.folder / _SOURCES.get(name, "")).exists())
    return tuple(engine for name in dict.fromkeys(chosen) for engine in compile_engines(name, sources))


def _required(config: BuildConfig) -> tuple[str, ...]:
    """What has to run on the machine that builds: engines may be for another, graphs are run as they are."""
    runs_graphs = (name for name in config.backends or () if BACKENDS[name].engine_source is None)
    return ("onnxruntime", *(name for name in runs_graphs if name != "onnxruntime"))


def _tool_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _TOOLS}}
