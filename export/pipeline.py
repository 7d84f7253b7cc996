"""The phases of a build: calibrate, export, compile, prove, then write the bundle all at once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rfsq.calibration.settings import ReadoutChoice, ReadoutConfig
from rfsq.export.bundle_writer import StagedBundle, stage_bundle
from rfsq.export.c_source import c_tokenizer
from rfsq.export.cuda_source import cuda_tokenizer
from rfsq.export.engines import EngineSources, Profile, compilable, compile_engines, require_means
from rfsq.export.errors import BuildInputError, GateError, require_none
from rfsq.export.fingerprint import fingerprint
from rfsq.export.graph_builder import LinearForm
from rfsq.export.graphs import decoder_graph, encoder_graph
from rfsq.export.parity import check_graph, closing_tables, cross_check, golden_vectors, prove
from rfsq.export.plan import (
    DecoderPlan,
    DeployMode,
    EncoderPlan,
    action_limit,
    choose_prefixes,
    plan_decoder,
    plan_encoder,
)
from rfsq.export.progress import phase
from rfsq.export.proving import seal_proven
from rfsq.export.reference import Reference, Section, parity_sections
from rfsq.export.sources import BuildData, choose_mode, fit_for, load_build_data, needs_fit, open_checkpoint
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.settings import check_positive
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.registry import no_gpu_said_first, without_gpu_as_one
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.backend_specs import BACKENDS, compiled_from
from rfsq.runtime.bundle.checkpoint_layouts import HASHES_KEY, weight_hashes
from rfsq.runtime.bundle.fidelity import Fidelity, Grade
from rfsq.runtime.bundle.golden import Golden, write_golden
from rfsq.runtime.bundle.manifest import (
    C_HEADER,
    C_SOURCE,
    CUDA_SOURCE,
    GOLDEN_NAME,
    SCHEMA_VERSION,
    EngineEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    ParityEntry,
    graph_tensors,
)
from rfsq.runtime.bundle.modes import Mode

#: Packages whose version can change what is built.
_TOOLS = ("numpy", "torch", "onnx", "onnxruntime", "polygraphy")
#: Far beyond any policy's chunks; the golden vectors of longer ones would take a robot seconds to load.
_LONGEST_CHUNK = 1024
#: Hours of work on any machine, and a number that arrays are counted in.
_MOST_PARITY_STEPS = 10**9


@dataclass(frozen=True)
class BuildConfig:
    """What to build.

    prefixes: None for 3 where the model has as many layers, and L; backends: None for ONNX Runtime, on the GPU too
    where it can, every TensorRT that is installed, and C where there is a compiler; conditioning: None for
    `calibrated` with a robust checkpoint and `none` with a naive one; use_layernorm: for files that do not say it;
    weights: the model in a checkpoint that holds several.
    """

    checkpoint: Path = ROBUST_CHECKPOINT
    output: Path = Path("build/bundle")
    overwrite: bool = False
    conditioning: DeployMode | None = None
    use_layernorm: bool | None = None
    weights: str | None = None
    normaliser: Path | None = None
    data: Path | None = None
    key: str | None = None
    filter_key: str | None = None
    readout: ReadoutChoice = ReadoutChoice.AUTO
    prefixes: tuple[int, ...] | None = None
    chunk_length: int = 8
    backends: tuple[str, ...] | None = None
    compute_capabilities: tuple[str, ...] = ()
    profile: Profile = field(default_factory=Profile)
    parity_steps: int = 120_000

    def __post_init__(self) -> None:
        check_positive(self, "chunk_length", "parity_steps", error=BuildInputError)
        if self.chunk_length > _LONGEST_CHUNK:
            raise BuildInputError(f"chunk_length is {self.chunk_length}; expected at most {_LONGEST_CHUNK} steps")
        if self.parity_steps > _MOST_PARITY_STEPS:
            raise BuildInputError(f"parity_steps is {self.parity_steps}; expected at most {_MOST_PARITY_STEPS}")
        wrong = [name for name in self.compute_capabilities if not re.fullmatch(r"\d+\.\d", name)]
        if wrong:
            raise BuildInputError(f"compute capabilities {wrong} are none; expected numbers such as 8.9")
        tuned = compiled_from("graphs")
        if self.compute_capabilities and self.backends is not None and not set(self.backends) & set(tuned):
            raise BuildInputError(
                f"compute capabilities {list(self.compute_capabilities)} are for {' and '.join(tuned)}, "
                f"and only {', '.join(self.backends)} is asked for; leave one of the two flags out"
            )
        unknown = set(self.backends or ()) - BACKENDS.keys()
        if unknown:
            raise BuildInputError(f"backends {sorted(unknown)} are not known; there are {', '.join(BACKENDS)}")


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
    with stage_bundle(config.output, overwrite=config.overwrite) as staged:
        source = _load(config)
        draft = _export(config, source, staged)
        reference, held_out = source.reference, source.data.held_out
        action_mse, fidelity = reference.action_mse(held_out), reference.fidelity(held_out)
        with _worth_first(fidelity, draft.model.mode):
            sections, golden = _examine(config, source, draft, staged)
        draft = replace(
            draft,
            engines=_compile(config, draft, staged),
            provenance=_provenance(config, source, action_mse),
            quality=source.data.quality(fidelity),
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
                print(closing_tables(parity, action_mse, fidelity, source.data.judged_on))
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


@dataclass(frozen=True)
class _Source:
    """What a build starts from: checkpoint, calibrated where its mode needs that, the reference, data to judge on."""

    checkpoint: Checkpoint
    reference: Reference
    data: BuildData


def _load(config: BuildConfig) -> _Source:
    with phase("load checkpoint") as current:
        checkpoint = open_checkpoint(
            config.checkpoint,
            use_layernorm=config.use_layernorm,
            weights=config.weights,
            normaliser_file=config.normaliser,
        )
        mode = choose_mode(checkpoint, config.conditioning)
        prefixes = choose_prefixes(config.prefixes, checkpoint.config.num_layers)
        current.note(f"{config.checkpoint.name}: {_describe(checkpoint)}; deployed as {mode.value!r}")
        current.note(*checkpoint.remarks)
    is_fit_needed = needs_fit(checkpoint, mode, prefixes)
    if config.readout is not ReadoutChoice.AUTO and not (is_fit_needed and mode is DeployMode.CALIBRATED):
        raise BuildInputError(
            f"readout {config.readout.value!r} is asked for, but nothing is calibrated here: the mode is "
            f"{mode.value!r}" + ("" if is_fit_needed else " and the checkpoint has what it needs") + "; leave "
            f"--readout out, or calibrate anew with {quoted('calibrate', '--readout')}"
        )
    with phase("load action data") as current:
        data = load_build_data(
            checkpoint,
            config.data,
            key=config.key,
            filter_key=config.filter_key,
            is_needed=is_fit_needed,
        )
        current.note(*data.description.splitlines())
    with phase("calibrate") as current:
        if is_fit_needed and data.dataset is not None:
            checkpoint = fit_for(checkpoint, mode, prefixes, data.dataset, ReadoutConfig(config.readout))
            facts = checkpoint.provenance[mode.value]
            current.note(f"{mode.value!r}, fitted on {facts['data']['steps']} steps")
            current.note(*facts.get("remark", "").splitlines())
        else:
            current.skip("nothing to fit")
    return _Source(checkpoint, Reference(checkpoint, mode, prefixes), data)


def _export(config: BuildConfig, source: _Source, staged: StagedBundle) -> Manifest:
    """Write graphs, C and CUDA, all from one plan. Returns the manifest as far as it is known by then."""
    reference = source.reference
    model, mode = reference.model, reference.mode
    with phase("export ONNX") as current:
        encoder = plan_encoder(model, mode, config.chunk_length)
        decoders = [plan_decoder(model, mode, config.chunk_length, prefix) for prefix in reference.prefixes]
        entry = _model_entry(source, encoder)
        graphs = make_graphs(entry, encoder, decoders)
        for graph, content in graphs:
            staged.write(graph.file, content)
        current.note(", ".join(f"{graph.file} {len(content) / 1000:.0f} kB" for graph, content in graphs))
    identity = fingerprint(source.checkpoint, mode)
    with phase("generate C") as current:
        generated = c_tokenizer(encoder, decoders, identity, mode)
        staged.write(C_HEADER, generated.header.encode())
        staged.write(C_SOURCE, generated.source.encode())
        current.note(f"{C_SOURCE} {len(generated.source) / 1000:.0f} kB")
    with phase("generate CUDA") as current:
        cuda = cuda_tokenizer(encoder, decoders, identity)
        staged.write(CUDA_SOURCE, cuda.encode())
        current.note(f"{CUDA_SOURCE} {len(cuda) / 1000:.0f} kB")
    entries = tuple(graph for graph, _ in graphs)
    return Manifest(SCHEMA_VERSION, identity, entry, entries, (), (), _tool_versions(), {}, {})


def _examine(
    config: BuildConfig, source: _Source, draft: Manifest, staged: StagedBundle
) -> tuple[tuple[Section, ...], Golden]:
    """Draw what everything is judged on, write the golden vectors, and hold the graphs against them."""
    model = draft.model
    sections = parity_sections(
        source.reference.model,
        source.data.held_out,
        chunk_length=model.chunk_length,
        limit=model.action_limit,
        num_steps=config.parity_steps,
        prefixes=model.prefixes,
    )
    with phase("write golden vectors") as current:
        golden = golden_vectors(source.reference, sections)
        staged.write(GOLDEN_NAME, write_golden(golden))
        current.note(f"{golden.actions.shape[0]} chunks of {model.chunk_length} steps")
    with phase("cross-check graphs") as current:
        for entry in draft.graphs:
            require_none(cross_check(entry, staged.content(entry.file), golden, model))
        current.note("ONNX Runtime (through Polygraphy) and the onnx reference evaluator agree with PyTorch")
    return sections, golden


def _compile(config: BuildConfig, draft: Manifest, staged: StagedBundle) -> tuple[EngineEntry, ...]:
    sources = EngineSources(
        staged, staged.content, draft.graphs_of(LinearForm.REDUCE.value), config.profile, config.compute_capabilities
    )
    chosen = config.backends
    if chosen is None:
        chosen, reasons = compilable(to_run=False)
        for name, reason in reasons.items():
            advice = "no C compiler is here: compile the generated C on the robot, with --from-bundle"
            print(f"  {advice if name == 'c' else reason}")
    return tuple(engine for name in dict.fromkeys(chosen) for engine in compile_engines(name, sources))


def _provenance(config: BuildConfig, source: _Source, action_mse: Mapping[str, float]) -> dict[str, Any]:
    weights = {name: part.numpy() for name, part in source.checkpoint.tensors().items()}
    return {
        "checkpoint": {
            **source.checkpoint.provenance,
            "file": config.checkpoint.name,
            HASHES_KEY: weight_hashes(weights),
        },
        "data": source.data.description,
        "action_mse": action_mse,
    }


def _model_entry(source: _Source, encoder: EncoderPlan) -> ModelEntry:
    """What the runtime has to know of the model."""
    reference = source.reference
    return ModelEntry(
        mode=reference.mode.value,
        chunk_length=encoder.chunk_length,
        **asdict(source.checkpoint.config),
        prefixes=reference.prefixes,
        action_limit=action_limit(encoder),
        action_units=tuple(map(float, reference.model.units)),
        action_offset=tuple(map(float, reference.model.offset)),
    )


def make_graphs(
    model: ModelEntry, encoder: EncoderPlan, decoders: Sequence[DecoderPlan]
) -> list[tuple[GraphEntry, bytes]]:
    """Encoder and one decoder per prefix in every form, checked. Raises GateError where one is not sound."""
    graphs: list[tuple[GraphEntry, bytes]] = []

    def add(file: str, role: Literal["encoder", "decoder"], prefix: int, form: LinearForm, content: bytes) -> None:
        path = file if form is LinearForm.GEMM else f"{form.value}/{file}"
        graph = GraphEntry(path, role, prefix, form.value, *graph_tensors(model, role, prefix))
        require_none(check_graph(graph, content))
        graphs.append((graph, content))

    for form in LinearForm:
        add("encoder.onnx", "encoder", model.num_layers, form, encoder_graph(encoder, form))
        for decoder in decoders:
            file = "decoder.onnx" if decoder.prefix == model.num_layers else f"decoder_l{decoder.prefix}.onnx"
            add(file, "decoder", decoder.prefix, form, decoder_graph(decoder, form))
    return graphs


def _required(config: BuildConfig) -> tuple[str, ...]:
    """What has to run on the machine that builds: engines may be for another, graphs are run as they are."""
    runs_graphs = (name for name in config.backends or () if BACKENDS[name].engine_source is None)
    return ("onnxruntime", *(name for name in runs_graphs if name != "onnxruntime"))


def _describe(checkpoint: Checkpoint) -> str:
    sizes = checkpoint.config
    kind = "robust" if checkpoint.trained_with is Conditioning.DYNAMIC else "naive"
    return (
        f"{kind}, A {sizes.action_dim}, D {sizes.latent_dim}, L {sizes.num_layers}, K {sizes.num_levels}, "
        f"hidden {sizes.hidden_width}"
    )


def _tool_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _TOOLS}}
