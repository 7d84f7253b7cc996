"""The steps of a build: calibrate, export, compile, prove, then write the bundle all at once."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rfsq.calibration.settings import ReadoutChoice, ReadoutConfig
from rfsq.export.batches import Profile
from rfsq.export.bundle_writer import StagedBundle, stage_bundle
from rfsq.export.c_source import c_tokenizer
from rfsq.export.cuda_source import cuda_tokenizer
from rfsq.export.engines import EngineSources, compilable, compile_engines
from rfsq.export.errors import BuildInputError, require_none
from rfsq.export.fingerprint import fingerprint
from rfsq.export.graph_check import check_graph, cross_check
from rfsq.export.graphs import LinearForm, decoder_graph, encoder_graph
from rfsq.export.judging import closing_tables, note_gates, prove
from rfsq.export.parity import golden_vectors
from rfsq.export.parity_data import Section, parity_sections
from rfsq.export.plan import (
    DecoderPlan,
    DeployMode,
    EncoderPlan,
    action_limit,
    choose_prefixes,
    plan_decoder,
    plan_encoder,
)
from rfsq.export.progress import StepList
from rfsq.export.proving import seal_proven
from rfsq.export.reference import Reference
from rfsq.export.sources import BuildData, choose_mode, fit_for, load_build_data, needs_fit, open_checkpoint
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.backend_specs import BACKENDS, compiled_from
from rfsq.runtime.bundle.checkpoint_layouts import HASHES_KEY, weight_hashes
from rfsq.runtime.bundle.fidelity import Fidelity
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import (
    C_HEADER,
    C_SOURCE,
    CUDA_SOURCE,
    SCHEMA_VERSION,
    EngineEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    ParityEntry,
    graph_tensors,
)

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
    profile: Profile = field(default_factory=lambda: Profile(1, 1, 4096))
    parity_steps: int = 120_000

    def __post_init__(self) -> None:
        for name in ("chunk_length", "parity_steps"):
            if getattr(self, name) < 1:
                raise BuildInputError(f"{name} is {getattr(self, name)}; expected at least 1")
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


@dataclass(frozen=True)
class BuildResult:
    """quality: action MSE in normalised units on the data judged on, by what was decoded; empty without data.

    fidelity: of all layers, for each dimension in the robot's units; None without data.
    """

    output: Path
    manifest: Manifest
    quality: Mapping[str, float]
    fidelity: Fidelity | None

    @property
    def verdict(self) -> str:
        """That it is right, and what its tokens are worth."""
        lines = [f"✓ {self.output} is built and validated, fingerprint {self.manifest.fingerprint[:16]}"]
        if self.manifest.quality is not None:
            lines.append(f"what the tokens are worth: {self.manifest.quality.line}")
            lines += filter(None, [self.manifest.quality.fidelity.warning])
        return "\n".join(lines)


def build(config: BuildConfig, *, has_tables: bool = True) -> BuildResult:
    """Build, prove and write a bundle; prints a line per step. has_tables: also of what went well.

    Raises UnusableError, ExportError or TokenizerError for what cannot be built, GateError
    for what was built and is not right. The output is complete afterwards, or as it was before.
    """
    steps = StepList()
    with stage_bundle(config.output, overwrite=config.overwrite) as staged:
        source = _load(config, steps)
        exported = _export(config, source, staged, steps)
        exam = _examine(config, source, exported, staged, steps)
        engines = _compile(config, exported, staged, steps)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            fingerprint=exported.fingerprint,
            model=exported.model,
            graphs=exported.graphs,
            engines=engines,
            parity=(),
            tools=_tool_versions(),
            provenance=_provenance(config, source, exam),
            files={},
            quality=source.data.quality(exam.fidelity),
        )

        def judge(backends: Sequence[Backend], absent: Mapping[str, str]) -> tuple[ParityEntry, ...]:
            with steps.step("parity gates") as step:
                parity, problems = prove(exported.model, exam.golden, source.reference, exam.sections, backends)
                note_gates(step, parity, problems, backends, absent)
            if has_tables or problems or (exam.fidelity is not None and exam.fidelity.warning):
                print(closing_tables(parity, exam.quality, exam.fidelity, source.data.judged_on))
            require_none(problems)
            return parity

        manifest = seal_proven(staged, manifest, judge, config.backends, required=_required(config))
    return BuildResult(config.output, manifest, exam.quality, exam.fidelity)


@dataclass(frozen=True)
class _Source:
    """What a build starts from: checkpoint, calibrated where its mode needs that, the reference, data to judge on."""

    checkpoint: Checkpoint
    reference: Reference
    data: BuildData


@dataclass(frozen=True)
class _Exported:
    """What is generated from the reference. contents: graphs and sources, by their file in the bundle."""

    model: ModelEntry
    fingerprint: str
    graphs: tuple[GraphEntry, ...]
    contents: Mapping[str, bytes]


@dataclass(frozen=True)
class _Exam:
    """What everything is held against. quality, fidelity: of the reference, see `BuildResult`."""

    sections: Sequence[Section]
    golden: Golden
    quality: Mapping[str, float]
    fidelity: Fidelity | None


def _load(config: BuildConfig, steps: StepList) -> _Source:
    with steps.step("load checkpoint") as step:
        checkpoint = open_checkpoint(
            config.checkpoint,
            use_layernorm=config.use_layernorm,
            weights=config.weights,
            normaliser_file=config.normaliser,
        )
        mode = choose_mode(checkpoint, config.conditioning)
        prefixes = choose_prefixes(config.prefixes, checkpoint.config.num_layers)
        step.note(f"{config.checkpoint.name}: {_describe(checkpoint)}; deployed as {mode.value!r}")
        for remark in checkpoint.remarks:
            step.note(remark)
    is_fit_needed = needs_fit(checkpoint, mode, prefixes)
    if config.readout is not ReadoutChoice.AUTO and not (is_fit_needed and mode is DeployMode.CALIBRATED):
        raise BuildInputError(
            f"readout {config.readout.value!r} is asked for, but nothing is calibrated here: the mode is "
            f"{mode.value!r}" + ("" if is_fit_needed else " and the checkpoint has what it needs") + "; leave "
            f"--readout out, or calibrate anew with `{command('calibrate', '--readout')}`"
        )
    with steps.step("load action data") as step:
        data = load_build_data(
            checkpoint,
            config.data,
            key=config.key,
            filter_key=config.filter_key,
            is_needed=is_fit_needed,
        )
        for line in data.description.splitlines():
            step.note(line)
    with steps.step("calibrate") as step:
        if is_fit_needed and data.dataset is not None:
            checkpoint = fit_for(checkpoint, mode, prefixes, data.dataset, ReadoutConfig(config.readout))
            facts = checkpoint.provenance[mode.value]
            step.note(f"{mode.value!r}, fitted on {facts['data']['steps']} steps")
            for line in facts.get("remark", "").splitlines():
                step.note(line)
        else:
            step.skip("nothing to fit")
    return _Source(checkpoint, Reference(checkpoint, mode, prefixes), data)


def _export(config: BuildConfig, source: _Source, staged: StagedBundle, steps: StepList) -> _Exported:
    """Graphs, C and CUDA from one plan, written as they are."""
    reference = source.reference
    model, mode = reference.model, reference.mode
    contents: dict[str, bytes] = {}

    def add(file: str, content: bytes) -> None:
        contents[file] = content
        staged.write(file, content)

    with steps.step("export ONNX") as step:
        encoder = plan_encoder(model, mode, config.chunk_length)
        decoders = [plan_decoder(model, mode, config.chunk_length, prefix) for prefix in reference.prefixes]
        graphs, model_entry = make_graphs(source.checkpoint, reference, encoder, decoders)
        for entry, content in graphs:
            add(entry.file, content)
        step.note(", ".join(f"{entry.file} {len(content) / 1000:.0f} kB" for entry, content in graphs))
    identity = fingerprint(source.checkpoint, mode)
    with steps.step("generate C") as step:
        generated = c_tokenizer(encoder, decoders, identity, mode)
        add(C_HEADER, generated.header.encode())
        add(C_SOURCE, generated.source.encode())
        step.note(f"{C_SOURCE} {len(contents[C_SOURCE]) / 1000:.0f} kB")
    with steps.step("generate CUDA") as step:
        add(CUDA_SOURCE, cuda_tokenizer(encoder, decoders, identity).encode())
        step.note(f"{CUDA_SOURCE} {len(contents[CUDA_SOURCE]) / 1000:.0f} kB")
    return _Exported(model_entry, identity, tuple(entry for entry, _ in graphs), contents)


def _examine(config: BuildConfig, source: _Source, exported: _Exported, staged: StagedBundle, steps: StepList) -> _Exam:
    """Draw what everything is judged on, write the golden vectors, and hold the graphs against them."""
    reference, held_out = source.reference, source.data.held_out
    sections = parity_sections(
        reference.model,
        held_out,
        chunk_length=config.chunk_length,
        limit=exported.model.action_limit,
        num_steps=config.parity_steps,
        prefixes=reference.prefixes,
    )
    with steps.step("write golden vectors") as step:
        golden = golden_vectors(reference, sections)
        staged.write_golden(golden)
        step.note(f"{golden.actions.shape[0]} chunks of {config.chunk_length} steps")
    with steps.step("cross-check graphs") as step:
        for entry in exported.graphs:
            require_none(cross_check(entry, exported.contents[entry.file], golden, exported.model))
        step.note("ONNX Runtime and the onnx reference evaluator agree with PyTorch (through Polygraphy)")
    return _Exam(sections, golden, reference.action_mse(held_out), reference.fidelity(held_out))


def _compile(
    config: BuildConfig, exported: _Exported, staged: StagedBundle, steps: StepList
) -> tuple[EngineEntry, ...]:
    graphs = tuple(entry for entry in exported.graphs if entry.form == LinearForm.REDUCE.value)
    sources = EngineSources(exported.contents.__getitem__, graphs, config.profile, config.compute_capabilities)
    chosen = config.backends
    if chosen is None:
        chosen, reasons = compilable(to_run=False)
        for name, reason in reasons.items():
            advice = "no C compiler is here: compile the generated C on the robot, with --from-bundle"
            print(f"  {advice if name == 'c' else reason}")
    return tuple(engine for name in dict.fromkeys(chosen) for engine in compile_engines(name, sources, staged, steps))


def _provenance(config: BuildConfig, source: _Source, exam: _Exam) -> dict[str, Any]:
    weights = {name: part.numpy() for name, part in source.checkpoint.tensors().items()}
    return {
        "checkpoint": {
            **source.checkpoint.provenance,
            "file": config.checkpoint.name,
            HASHES_KEY: weight_hashes(weights),
        },
        "data": source.data.description,
        "action_mse": exam.quality,
    }


def make_graphs(
    checkpoint: Checkpoint, reference: Reference, encoder: EncoderPlan, decoders: Sequence[DecoderPlan]
) -> tuple[list[tuple[GraphEntry, bytes]], ModelEntry]:
    """Encoder and one decoder per prefix in every form, checked; with what the runtime has to know."""
    model, sizes = reference.model, checkpoint.config
    contents: list[tuple[str, Literal["encoder", "decoder"], int, LinearForm, bytes]] = []
    for form in LinearForm:
        folder = "" if form is LinearForm.GEMM else f"{form.value}/"
        contents.append((f"{folder}encoder.onnx", "encoder", sizes.num_layers, form, encoder_graph(encoder, form)))
        for decoder in decoders:
            name = "decoder.onnx" if decoder.prefix == sizes.num_layers else f"decoder_l{decoder.prefix}.onnx"
            contents.append((folder + name, "decoder", decoder.prefix, form, decoder_graph(decoder, form)))
    entry = ModelEntry(
        mode=reference.mode.value,
        chunk_length=encoder.chunk_length,
        action_dim=sizes.action_dim,
        latent_dim=sizes.latent_dim,
        hidden_width=sizes.hidden_width,
        num_layers=sizes.num_layers,
        num_levels=sizes.num_levels,
        prefixes=tuple(decoder.prefix for decoder in decoders),
        action_limit=action_limit(encoder),
        action_units=tuple(map(float, model.units)),
        action_offset=tuple(map(float, model.offset)),
    )
    graphs = []
    for name, role, prefix, form, content in contents:
        graph = GraphEntry(name, role, prefix, form.value, *graph_tensors(entry, role, prefix))
        require_none(check_graph(graph, content))
        graphs.append((graph, content))
    return graphs, entry


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
