#!/usr/bin/env python3
"""Build a validated bundle from a trained checkpoint: calibrate, export, compile, prove, then write it all at once.

Without arguments the embedded robust checkpoint is built into build/bundle. The exit status is 0 for a bundle that
passed every gate, 1 when a gate or a check failed, 2 for input that cannot be used; only 0 leaves a bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import importlib.metadata
import platform
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

import torch
from tqdm import tqdm

from export.bundle_writer import StagedBundle, stage_bundle
from export.errors import ExportError, GateError, require_none
from export.fingerprint import fingerprint
from export.graph_check import check_graph, cross_check
from export.graphs import decoder_graph, encoder_graph
from export.parity import Judge, batches, failures, golden_vectors
from export.parity_data import Section, parity_sections
from export.plan import DeployMode, action_limit, choose_prefixes, plan_decoder, plan_encoder
from export.progress import StepList, table
from export.reference import Reference
from export.sources import choose_mode, fit_for, load_build_data, needs_fit, open_checkpoint
from export.trt_builder import EngineBuildError, EngineRequest, Profile, build_engine, check_engine, inspect_engine
from rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint
from rfsq_ref.quantizer import Conditioning
from runtime.backends import create_backend
from runtime.bundle import open_bundle
from runtime.console import escape_what_cannot_be_shown
from runtime.errors import TokenizerError
from runtime.golden import Golden, ReplayResult, replay
from runtime.manifest import SCHEMA_VERSION, EngineEntry, GraphEntry, Manifest, ModelEntry, ParityEntry, graph_tensors
from runtime.trt_api import TENSORRT_BACKENDS, available_tensorrt

#: Packages whose version can change what is built.
_TOOLS = ("numpy", "torch", "onnx", "onnxruntime", "polygraphy")
_ALWAYS = "onnxruntime"
#: Far beyond any policy's chunks; the golden vectors of longer ones would take a robot seconds to load.
_LONGEST_CHUNK = 1024
#: A person, the system, a closed terminal, a reader that has left.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
#: What a person gave or the machine lacks, each with a message that says so. ValueError is the base of the errors of
#: checkpoints, data and calibration.
_UNUSABLE = (EngineBuildError, ExportError, TokenizerError, ValueError)


@dataclass(frozen=True)
class BuildConfig:
    """What to build.

    prefixes: None for 3 where the model has as many layers, and L; backends: None for ONNX Runtime and every TensorRT
    that is installed; conditioning: None for `calibrated` with a robust checkpoint and `none` with a naive one;
    use_layernorm: for files that do not say it.
    """

    checkpoint: Path = ROBUST_CHECKPOINT
    output: Path = Path("build/bundle")
    overwrite: bool = False
    conditioning: DeployMode | None = None
    use_layernorm: bool | None = None
    normaliser: Path | None = None
    calibration_data: Path | None = None
    key: str | None = None
    prefixes: tuple[int, ...] | None = None
    chunk_length: int = 8
    backends: tuple[str, ...] | None = None
    compute_capabilities: tuple[str, ...] = ()
    profile: Profile = field(default_factory=lambda: Profile(1, 1, 4096))
    parity_steps: int = 120_000

    def __post_init__(self) -> None:
        for name in ("chunk_length", "parity_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.chunk_length > _LONGEST_CHUNK:
            raise ValueError(f"chunk_length is {self.chunk_length}; expected at most {_LONGEST_CHUNK} steps")
        wrong = [name for name in self.compute_capabilities if not re.fullmatch(r"\d+\.\d", name)]
        if wrong:
            raise ValueError(f"compute capabilities {wrong} are none; expected numbers such as 8.9")
        if self.compute_capabilities and self.backends is not None and not set(self.backends) & set(TENSORRT_BACKENDS):
            raise ValueError(
                f"compute capabilities {list(self.compute_capabilities)} are for {' and '.join(TENSORRT_BACKENDS)}, "
                f"and only {', '.join(self.backends)} is asked for; leave one of the two flags out"
            )
        unknown = set(self.backends or ()) - {_ALWAYS, *TENSORRT_BACKENDS}
        if unknown:
            known = ", ".join((_ALWAYS, *TENSORRT_BACKENDS))
            raise ValueError(f"backends {sorted(unknown)} are not known; there are {known}")


@dataclass(frozen=True)
class BuildResult:
    """quality: action MSE in normalised units on the data judged on, by what was decoded; empty without data."""

    output: Path
    manifest: Manifest
    quality: Mapping[str, float]


def build(config: BuildConfig) -> BuildResult:
    """Build, prove and write a bundle; prints a line per step.

    Raises CheckpointError, DataError, ValueError, ExportError or TokenizerError for what cannot be built, GateError
    for what was built and is not right. The output is complete afterwards, or as it was before.
    """
    steps = StepList()
    with stage_bundle(config.output, overwrite=config.overwrite) as staged:
        with steps.step("load checkpoint") as step:
            checkpoint = open_checkpoint(
                config.checkpoint, use_layernorm=config.use_layernorm, normaliser_file=config.normaliser
            )
            mode = choose_mode(checkpoint, config.conditioning)
            prefixes = choose_prefixes(config.prefixes, checkpoint.config.num_layers)
            step.note(f"{config.checkpoint.name}: {_describe(checkpoint)}; deployed as {mode.value!r}")
            for remark in checkpoint.remarks:
                step.note(remark)
        is_fit_needed = needs_fit(checkpoint, mode, prefixes)
        with steps.step("load action data") as step:
            data = load_build_data(checkpoint, config.calibration_data, key=config.key, is_needed=is_fit_needed)
            for line in data.description.splitlines():
                step.note(line)
        with steps.step("calibrate") as step:
            if is_fit_needed and data.dataset is not None:
                checkpoint = fit_for(checkpoint, mode, prefixes, data.dataset)
                facts = checkpoint.provenance[mode.value]
                step.note(f"{mode.value!r}, fitted on {facts['data']['steps']} steps")
                for line in facts.get("remark", "").splitlines():
                    step.note(line)
            else:
                step.skip("nothing to fit")
        reference = Reference(checkpoint, mode, prefixes)
        with steps.step("export ONNX") as step:
            graphs, model_entry = write_graphs(config, checkpoint, reference, staged)
            step.note(", ".join(f"{entry.file} {len(content) / 1000:.0f} kB" for entry, content in graphs))
        sections = parity_sections(
            reference.model,
            data.held_out,
            chunk_length=config.chunk_length,
            limit=model_entry.action_limit,
            num_steps=config.parity_steps,
        )
        with steps.step("write golden vectors") as step:
            golden = golden_vectors(reference, sections)
            staged.write_golden(golden)
            step.note(f"{golden.actions.shape[0]} chunks of {config.chunk_length} steps")
        with steps.step("cross-check graphs") as step:
            for entry, content in graphs:
                require_none(cross_check(entry, content, golden, model_entry))
            step.note("ONNX Runtime and the onnx reference evaluator agree with PyTorch (through Polygraphy)")
        quality = reference.action_mse(data.held_out)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint(checkpoint, mode),
            model=model_entry,
            graphs=tuple(entry for entry, _ in graphs),
            engines=build_engines(config, graphs, staged, steps),
            parity=(),
            tools=_tool_versions(),
            provenance={
                "checkpoint": {**checkpoint.provenance, "file": config.checkpoint.name},
                "data": data.description,
                "action_mse": quality,
            },
            files={},
        )
        staged.seal(manifest)
        with steps.step("parity gates") as step:
            parity, replayed = prove(staged, golden, reference, sections)
            problems = [*failures(parity), *(f"golden vectors: {check}" for check in replayed.failures)]
            conclusion = f"{_ALWAYS}: {parity[0].steps} steps against PyTorch float64"
            if problems:
                step.fail(f"{conclusion}: {len(problems)} gates are red")
            else:
                step.note(conclusion)
        print(_closing_tables(parity, quality, data.judged_on))
        require_none(problems)
        manifest = staged.seal(replace(manifest, parity=parity))
    print(f"\n✓ {config.output} is built and validated, fingerprint {manifest.fingerprint[:16]}")
    return BuildResult(config.output, manifest, quality)


def write_graphs(
    config: BuildConfig, checkpoint: Checkpoint, reference: Reference, staged: StagedBundle
) -> tuple[list[tuple[GraphEntry, bytes]], ModelEntry]:
    """Encoder and one decoder per prefix, checked and written; with what the runtime has to know of the model."""
    model, mode, sizes = reference.model, reference.mode, checkpoint.config
    plan = plan_encoder(model, mode, config.chunk_length)
    contents: list[tuple[str, Literal["encoder", "decoder"], int, bytes]] = [
        ("encoder.onnx", "encoder", sizes.num_layers, encoder_graph(plan))
    ]
    for prefix in reference.prefixes:
        name = "decoder.onnx" if prefix == sizes.num_layers else f"decoder_l{prefix}.onnx"
        decoder = plan_decoder(model, mode, config.chunk_length, prefix)
        contents.append((name, "decoder", prefix, decoder_graph(decoder)))
    entry = ModelEntry(
        mode=mode.value,
        chunk_length=config.chunk_length,
        action_dim=sizes.action_dim,
        latent_dim=sizes.latent_dim,
        hidden_width=sizes.hidden_width,
        num_layers=sizes.num_layers,
        num_levels=sizes.num_levels,
        prefixes=reference.prefixes,
        action_limit=action_limit(plan),
        action_units=tuple(map(float, model.units)),
        action_offset=tuple(map(float, model.offset)),
    )
    graphs = []
    for name, role, prefix, content in contents:
        graph = GraphEntry(name, role, prefix, *graph_tensors(entry, role, prefix))
        require_none(check_graph(graph, content))
        graphs.append((graph, content))
        staged.write(name, content)
    return graphs, entry


def build_engines(
    config: BuildConfig, graphs: Sequence[tuple[GraphEntry, bytes]], staged: StagedBundle, steps: StepList
) -> tuple[EngineEntry, ...]:
    """Compile every graph for every TensorRT asked for; by default for every one installed.

    What cannot be run on this machine is inspected and recorded as built, never as validated.
    """
    wanted = config.backends if config.backends is not None else available_tensorrt()
    engines = []
    for backend in (name for name in TENSORRT_BACKENDS if name in wanted):
        with steps.step(f"compile {backend}") as step:
            for entry, content in tqdm(graphs, desc=f"  {backend}", unit="engine", leave=False, disable=None):
                request = EngineRequest(backend, content, config.profile, config.compute_capabilities)
                built = build_engine(request)
                require_none(f"{backend}, {entry.file}: {problem}" for problem in check_engine(built, content))
                description = inspect_engine(built)
                target = "-".join(f"sm{name.replace('.', '')}" for name in built.compute_capabilities) or "default"
                stem = entry.file.removesuffix(".onnx")
                file = f"engines/{backend}-{built.version}-{target}/{stem}-{built.onnx_sha256[:12]}.engine"
                staged.write(file, built.serialized)
                reason = description.obstacle or "this runtime has no backend that runs it yet"
                engines.append(
                    EngineEntry(
                        backend=backend,
                        version=built.version,
                        compute_capabilities=built.compute_capabilities,
                        graph=entry.file,
                        onnx_sha256=built.onnx_sha256,
                        file=file,
                        profile=(config.profile.minimum, config.profile.optimum, config.profile.maximum),
                        status="built",
                        detail=f"inspected ({description.source}) but not run: {reason}",
                    )
                )
                step.note(f"{file.rpartition('/')[2]} {len(built.serialized) / 1e6:.1f} MB")
            step.note(f"built for {backend} {built.version}, target {target}; NOT run on this machine: {reason}")
    return tuple(engines)


def prove(
    staged: StagedBundle, golden: Golden, reference: Reference, sections: Sequence[Section]
) -> tuple[tuple[ParityEntry, ...], ReplayResult]:
    """Run every backend that can run here through all gates, on the staged bundle as the robot would open it."""
    bundle = open_bundle(staged.folder)
    with contextlib.closing(create_backend(_ALWAYS, bundle)) as backend:
        judge = Judge(backend, reference, bundle.manifest.model)
        total = sum(section.num_steps for section in sections)
        with tqdm(total=total, desc="  parity", unit="step", unit_scale=True, leave=False, disable=None) as progress:
            for answers in batches(reference, sections):
                judge.judge(answers)
                progress.update(answers.float32.num_steps)
        return judge.entries(), replay(golden, bundle.manifest.model, backend)


def _describe(checkpoint: Checkpoint) -> str:
    sizes = checkpoint.config
    kind = "robust" if checkpoint.trained_with is Conditioning.DYNAMIC else "naive"
    return (
        f"{kind}, A {sizes.action_dim}, D {sizes.latent_dim}, L {sizes.num_layers}, K {sizes.num_levels}, "
        f"hidden {sizes.hidden_width}"
    )


def _tool_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _TOOLS}}


def _closing_tables(parity: Sequence[ParityEntry], quality: Mapping[str, float], judged_on: str) -> str:
    gates = [
        (
            f"{'✓' if entry.value <= entry.limit else '✗'} {entry.backend}, {entry.gate}",
            f"{entry.value:.4g}",
            f"{entry.limit:.4g}",
            f"{entry.steps}",
        )
        for entry in parity
    ]
    parts = [table(("gate", "measured", "limit", "steps"), gates)]
    parts += [f"{entry.gate}: {entry.detail}" for entry in parity if entry.detail]
    if quality:
        rows = [(name, f"{value:.3e}") for name, value in quality.items()]
        parts.append(table((f"{judged_on}, decoded from", "action MSE"), rows))
    return "\n" + "\n\n".join(parts)


def parse_arguments(arguments: Sequence[str] | None = None) -> BuildConfig:
    """Exits with status 2 and a message for arguments that make no sense."""
    defaults = BuildConfig()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=defaults.checkpoint, help="default: the embedded robust one")
    parser.add_argument(
        "--use-layernorm",
        action=argparse.BooleanOptionalAction,
        help="how a checkpoint was trained that does not say it: with normalised residuals, or not",
    )
    parser.add_argument("--normaliser", type=Path, help="JSON with kind, offset and scale, folded into the engines")
    parser.add_argument("--calibration-data", type=Path, help="episodes of the checkpoint's robot")
    parser.add_argument("--key", help="name of the action array or column in --calibration-data")
    parser.add_argument("--output", type=Path, default=defaults.output, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    parser.add_argument(
        "--conditioning", type=DeployMode, choices=list(DeployMode), help="default: calibrated if robust"
    )
    parser.add_argument("--prefixes", type=int, nargs="+", help="default: 3; the full depth is always built")
    parser.add_argument("--chunk-length", type=int, default=defaults.chunk_length, help="T, default: %(default)s")
    parser.add_argument(
        "--backends", nargs="+", help=f"{_ALWAYS} is always built; of {', '.join(TENSORRT_BACKENDS)} what is installed"
    )
    parser.add_argument(
        "--compute-capabilities", nargs="+", default=[], help="such as 8.6 8.9; default: the library's portable target"
    )
    parser.add_argument(
        "--profile", type=int, nargs=3, default=[1, 1, 4096], metavar=("MIN", "OPT", "MAX"), help="batch sizes B"
    )
    parser.add_argument("--parity-steps", type=int, default=defaults.parity_steps, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        return BuildConfig(
            **{
                **vars(options),
                "prefixes": None if options.prefixes is None else tuple(options.prefixes),
                "backends": tuple(options.backends) if options.backends else None,
                "compute_capabilities": tuple(options.compute_capabilities),
                "profile": Profile(*options.profile),
            }
        )
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_arguments(arguments)
    # For matrices this small more threads are slower.
    torch.set_num_threads(1)
    escape_what_cannot_be_shown()
    with _clean_ends():
        try:
            build(config)
        except GateError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except (*_UNUSABLE, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


@contextlib.contextmanager
def _clean_ends() -> Iterator[None]:
    """A build that is told to end, by a person or by the system, cleans up after itself as one that fails does."""

    def end(number: int, _frame: object) -> NoReturn:
        if number != signal.SIGPIPE:
            print(f"ended by {signal.Signals(number).name}", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        # Python hands signals to the main thread alone: whoever calls from another decides what they do.
        yield
        return
    # What nohup or a shell has told the process to ignore stays ignored; SIGPIPE is ignored by Python itself.
    taken = [n for n in _ENDING if n == signal.SIGPIPE or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
