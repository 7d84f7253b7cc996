"""Small, real bundles for tests: a random model of any size and mode, its graphs, and golden vectors from it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from rfsq.export.belief_graphs import belief_graph
from rfsq.export.belief_vectors import belief_vectors
from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.c_builder import compile_c
from rfsq.export.c_source import CTokenizer, c_tokenizer
from rfsq.export.cuda_source import cuda_tokenizer
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm
from rfsq.export.graphs import decoder_graph, encoder_graph
from rfsq.export.plan import (
    DecoderPlan,
    DeployMode,
    EncoderPlan,
    action_limit,
    choose_prefixes,
    plan_decoder,
    plan_encoder,
    step_decoding,
)
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig, RecoveredDecoder
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.decoding import StepDecoding, write_decoding
from rfsq.runtime.bundle.fidelity import fidelity
from rfsq.runtime.bundle.gates import highest_limit, missing_gates, promised_refusal
from rfsq.runtime.bundle.golden import Golden, write_golden
from rfsq.runtime.bundle.manifest import (
    C_HEADER,
    C_SOURCE,
    CUDA_SOURCE,
    DECODING_NAME,
    GOLDEN_NAME,
    SCHEMA_VERSION,
    EngineEntry,
    GraphEntry,
    GraphRole,
    Manifest,
    ParityEntry,
    QualityEntry,
    graph_tensors,
)
from rfsq.runtime.bundle.models import ModelEntry, StepModel

SMALL = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=3, num_levels=5)
ENGINE = b"not an engine, but bytes to be hashed"


@dataclass(frozen=True)
class Recipe:
    """What to build; equal recipes give equal bundles.

    pool: how many times more steps are drawn than become golden vectors; those closest to an edge of L0 are kept.
    knows_actions: whether the decoder's last layer is fitted, so that decoded actions resemble those that were encoded:
    what a model with random weights alone gives is worthless.
    error: what the manifest says of every action, in units of the normaliser; None where it says nothing.
    has_beliefs: False for a bundle as it was built before beliefs were decoded.
    c_targets: what the generated C is compiled for; empty for the source alone, None for no C at all.
    compute_capability: of the GPU that the generated CUDA is compiled for; None for no CUDA at all.
    """

    mode: DeployMode = DeployMode.CALIBRATED
    config: ModelConfig = SMALL
    chunk_length: int = 2
    prefixes: tuple[int, ...] = (2,)
    num_chunks: int = 6
    pool: int = 1
    has_normaliser: bool = True
    has_engine: bool = True
    knows_actions: bool = False
    error: float | None = None
    has_beliefs: bool = True
    c_targets: tuple[str, ...] | None = None
    compute_capability: str | None = None
    seed: int = 0


@dataclass
class Deployed:
    """What goes into a bundle, open to be changed before it is written: graphs from one model, golden from another.

    alter_c: what becomes of the generated C source before it is compiled.
    """

    recipe: Recipe
    reference: ActionAutoencoder
    exported: ActionAutoencoder
    graphs: dict[str, bytes] = field(default_factory=dict)
    alter_c: Callable[[str], str] = str

    @property
    def prefixes(self) -> tuple[int, ...]:
        return choose_prefixes(self.recipe.prefixes, self.recipe.config.num_layers)


def deploy(recipe: Recipe) -> Deployed:
    model = random_model(recipe)
    return Deployed(recipe, model, copy.deepcopy(model))


def write_bundle(output: Path, deployed: Deployed | Recipe, *, overwrite: bool = False) -> Path:
    """A complete bundle at `output`, which is also returned."""
    if isinstance(deployed, Recipe):
        deployed = deploy(deployed)
    graphs = {**export_graphs(deployed), **deployed.graphs}
    with stage_bundle(output, overwrite=overwrite) as staged:
        for file, content in graphs.items():
            staged.write(file, content)
        if _has_beliefs(deployed.recipe):
            staged.write(DECODING_NAME, write_decoding(decoding_of(deployed)))
        staged.write(GOLDEN_NAME, write_golden(golden_vectors(deployed)))
        manifest = make_manifest(deployed)
        if deployed.recipe.has_engine:
            engine = engine_entry(graphs["reduce/decoder.onnx"])
            staged.write(engine.file, ENGINE)
            manifest = replace(manifest, engines=(engine,))
        if deployed.recipe.c_targets is not None:
            generated = generate_c(deployed)
            staged.write(C_HEADER, generated.header.encode())
            staged.write(C_SOURCE, generated.source.encode())
            for target in deployed.recipe.c_targets:
                entry = c_entry(generated, target)
                staged.write(entry.file, compile_c(generated.header, generated.source, target).content)
                manifest = replace(manifest, engines=(*manifest.engines, entry))
        if deployed.recipe.compute_capability is not None:
            source = generate_cuda(deployed)
            staged.write(CUDA_SOURCE, source.encode())
            entry = cuda_entry(source, deployed.recipe.compute_capability)
            staged.write(entry.file, compile_cuda(source, deployed.recipe.compute_capability))
            manifest = replace(manifest, engines=(*manifest.engines, entry))
        if deployed.recipe.error is not None:
            manifest = replace(manifest, quality=quality_of(manifest, deployed.recipe.error))
        for entry in manifest.engines:
            if entry.device:
                proofs = proven(entry.backend, entry.device, manifest.model)
                manifest = replace(manifest, parity=(*manifest.parity, *proofs))
        staged.seal(manifest)
    return output


def random_model(recipe: Recipe) -> ActionAutoencoder:
    """In float64, with weights that float32 holds exactly."""
    torch.manual_seed(recipe.seed)
    config, conditioning = recipe.config, recipe.mode.conditioning
    constants = None
    if conditioning is Conditioning.CALIBRATED:
        shape = (config.num_layers, config.latent_dim)
        shrink = max(config.num_levels - 1, 2.0) ** -torch.arange(config.num_layers, dtype=torch.float32)[:, None]
        constants = ConditioningConstants(0.1 * shrink * torch.randn(shape), shrink * (0.8 + 0.4 * torch.rand(shape)))
    normaliser = None
    if recipe.has_normaliser:
        offset, scale = 0.2 * torch.randn(config.action_dim), 0.5 + torch.rand(config.action_dim)
        normaliser = Normaliser(NormaliserKind.MIN_MAX, tuple(offset.tolist()), tuple(scale.tolist()))
    model = ActionAutoencoder(config, conditioning, constants=constants, normaliser=normaliser).double().eval()
    model.requires_grad_(False)
    if recipe.knows_actions:
        _teach(model, recipe)
    if recipe.mode is DeployMode.RECOVERED:
        model.recovered = _recover(model, choose_prefixes(recipe.prefixes, config.num_layers))
    return model


def _teach(model: ActionAutoencoder, recipe: Recipe) -> None:
    """Fit the last layer to actions of the whole range, decoded from all layers."""
    actions = torch.from_numpy(random_actions(recipe, 500, seed=2)).double().flatten(0, 1)
    hidden = model.decoder[:2](model.dequantize(model.encode(actions)[0]))
    features = torch.cat((hidden, torch.ones(len(hidden), 1)), dim=1)
    solved = torch.linalg.lstsq(features, (actions - model.offset) / model.units).solution.float().double()
    model.decoder[2].weight.copy_(solved[:-1].T)
    model.decoder[2].bias.copy_(solved[-1])


def export_graphs(deployed: Deployed) -> dict[str, bytes]:
    """File name to ONNX bytes."""
    recipe, model = deployed.recipe, deployed.exported
    encoder = plan_encoder(model, recipe.mode, recipe.chunk_length)
    graphs = {}
    for form in LinearForm:
        graphs[graph_file("encoder.onnx", form)] = encoder_graph(encoder, form)
        for prefix in deployed.prefixes:
            decoder = plan_decoder(model, recipe.mode, recipe.chunk_length, prefix)
            graphs[graph_file(_decoder_file(deployed, prefix), form)] = decoder_graph(decoder, form)
            if _has_beliefs(recipe) and form in BELIEF_FORMS:
                graphs[graph_file(_belief_file(deployed, prefix), form)] = belief_graph(decoder, form)
    return graphs


def graph_file(name: str, form: LinearForm) -> str:
    """Where a bundle keeps the graph."""
    return name if form is LinearForm.GEMM else f"{form.value}/{name}"


def random_actions(recipe: Recipe, num_chunks: int, *, seed: int = 1) -> np.ndarray:
    """float32 [N, T, A] over the range the model was made for and somewhat beyond."""
    shape = (num_chunks, recipe.chunk_length, recipe.config.action_dim)
    return np.random.default_rng(seed).uniform(-1.5, 1.5, shape).astype(np.float32)


def golden_vectors(deployed: Deployed) -> Golden:
    """The reference's answers; as many near-tie flips are allowed as there are near-ties."""
    recipe, model = deployed.recipe, deployed.reference
    actions = random_actions(recipe, recipe.num_chunks * recipe.pool)
    if recipe.pool > 1:
        actions = closest_to_edges(model, actions, len(actions) // recipe.pool)
    if len(actions) < 10:
        # So few may all lie in the middle of the range, where no unit can be judged.
        actions[0] = (model.offset + 1.4 * model.units).numpy()
    inputs = torch.from_numpy(actions).double()
    tokens, margins, bounds = token_error_bounds(model, inputs)
    stats = model.encode(inputs)[1] if recipe.mode.has_stats else None
    rounded = None if stats is None else stats.float()
    decoded = {prefix: reference_decode(model, tokens[..., :prefix], rounded) for prefix in deployed.prefixes}
    unquantised = model.decode_latents(model.encode_latents(inputs)).numpy()
    coding_error = np.abs(decoded[recipe.config.num_layers] - unquantised) / model.units.numpy()
    steps = actions[..., 0].size
    most_flips = int(
        highest_limit("encode: near-tie flips", steps, recipe.config.latent_dim, recipe.config.num_layers) or 0
    )
    golden = Golden(
        actions=actions,
        tokens=tokens.numpy().astype(np.int32),
        margins=margins.numpy().astype(np.float32),
        bounds=bounds.numpy().astype(np.float32),
        stats=None if rounded is None else rounded.numpy(),
        decoded=decoded,
        near_tie_cap=min(int((margins <= bounds).sum()), most_flips),
        flip_tolerance=float(2 * coding_error.max() + 1e-5),
    )
    if not _has_beliefs(recipe):
        return golden
    return replace(golden, beliefs=belief_vectors(model, model_entry(deployed), golden.tokens))


def closest_to_edges(model: ActionAutoencoder, actions: np.ndarray, num_chunks: int) -> np.ndarray:
    """As many chunks, made of those steps whose latents lie closest to an edge between two bins of L0."""
    steps = actions.reshape(-1, actions.shape[-1])
    first_layer = next(model.quantizer.layers(model.encode_latents(torch.from_numpy(steps).double())))
    margins = model.quantizer.decision_margins(first_layer.conditioned).amin(-1)
    return steps[margins.argsort()[: num_chunks * actions.shape[1]].numpy()].reshape(num_chunks, *actions.shape[1:])


def reference_decode(model: ActionAutoencoder, tokens: torch.Tensor, stats: torch.Tensor | None = None) -> np.ndarray:
    """tokens [..., D, l] and all layers' stats [..., L, 2] to float64 actions [..., A]."""
    part = None if stats is None else stats[..., : tokens.shape[-1], :].double()
    return model.decode(tokens, part).numpy()


def quality_of(manifest: Manifest, error: float = 0.01) -> QualityEntry:
    """As if every action were decoded with this error, in units of the normaliser."""
    unit, offset = (np.array(column) for column in (manifest.model.action_units, manifest.model.action_offset))
    actions = offset + unit * np.linspace(-1, 1, 50)[:, None]
    found = fidelity(actions, actions + error * unit, manifest.model.action_units, manifest.model.action_offset)
    return QualityEntry("held-out episodes", "own.npz", "0" * 64, found)


def model_entry(deployed: Deployed) -> StepModel:
    """What the manifest says of the model."""
    recipe, model = deployed.recipe, deployed.reference
    return StepModel(
        mode=recipe.mode.value,
        chunk_length=recipe.chunk_length,
        action_dim=recipe.config.action_dim,
        latent_dim=recipe.config.latent_dim,
        hidden_width=recipe.config.hidden_width,
        num_layers=recipe.config.num_layers,
        num_levels=recipe.config.num_levels,
        prefixes=deployed.prefixes,
        action_limit=action_limit(plan_encoder(model, recipe.mode, recipe.chunk_length)),
        action_units=tuple(model.units.tolist()),
        action_offset=tuple(model.offset.tolist()),
    )


def make_manifest(deployed: Deployed) -> Manifest:
    recipe, entry = deployed.recipe, model_entry(deployed)
    named: list[tuple[str, GraphRole, int]] = [("encoder.onnx", "encoder", entry.num_layers)]
    named += [(_decoder_file(deployed, prefix), "decoder", prefix) for prefix in entry.prefixes]
    graphs = [
        GraphEntry(graph_file(file, form), role, prefix, form.value, *graph_tensors(entry, role, prefix))
        for form in LinearForm
        for file, role, prefix in named
    ]
    if _has_beliefs(recipe):
        graphs += [
            GraphEntry(
                graph_file(_belief_file(deployed, prefix), form),
                "belief",
                prefix,
                form.value,
                *graph_tensors(entry, "belief", prefix),
            )
            for form in BELIEF_FORMS
            for prefix in entry.prefixes
        ]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint_of(recipe),
        model=entry,
        graphs=tuple(graphs),
        engines=(),
        parity=proven("onnxruntime", "CPU", entry),
        tools={"numpy": np.__version__},
        provenance={"checkpoint": {"file": "random"}},
        files={},
    )


def proven(backend: str, device: str, model: ModelEntry) -> tuple[ParityEntry, ...]:
    """What a build records that has run all gates."""
    refusal = promised_refusal(backend, model.chunk_length)
    has_beliefs = BACKENDS[backend].decodes_beliefs and not model.has_stats
    gates = missing_gates((), model.decoders, has_stats=model.has_stats, refusal=refusal, has_beliefs=has_beliefs)
    return tuple(ParityEntry(backend, gate, 120_000, 0, 0, "", device) for gate in gates)


def engine_entry(onnx_bytes: bytes) -> EngineEntry:
    """An engine that no machine runs, as a build without a GPU records it."""
    return EngineEntry(
        backend="tensorrt-rtx",
        version="1.6.1.120",
        targets=("8.9",),
        source="reduce/decoder.onnx",
        source_sha256=hashlib.sha256(onnx_bytes).hexdigest(),
        file="engines/tensorrt-rtx-1.6.1.120-sm89/decoder.engine",
        profile=(1, 1, 64),
        status="built",
        precision="not measured",
        device="",
        kernel_cache="",
        detail="inspected (network) but not run: no GPU",
    )


def _plans(deployed: Deployed) -> tuple[EncoderPlan, list[DecoderPlan]]:
    recipe, model = deployed.recipe, deployed.exported
    decoders = [plan_decoder(model, recipe.mode, recipe.chunk_length, prefix) for prefix in deployed.prefixes]
    return plan_encoder(model, recipe.mode, recipe.chunk_length), decoders


def decoding_of(deployed: Deployed) -> StepDecoding:
    """The constants of its decoders, whose tokens decode alone."""
    found = step_decoding(_plans(deployed)[1])
    assert found is not None
    return found


def generate_c(deployed: Deployed) -> CTokenizer:
    """Source of encoder and decoders."""
    generated = c_tokenizer(*_plans(deployed), fingerprint_of(deployed.recipe), deployed.recipe.mode)
    return replace(generated, source=deployed.alter_c(generated.source))


def c_entry(generated: CTokenizer, target: str) -> EngineEntry:
    """As a build records it that has compiled the source and run it."""
    return EngineEntry(
        backend="c",
        version="a compiler",
        targets=(target,),
        source=C_SOURCE,
        source_sha256=hashlib.sha256(generated.source.encode()).hexdigest(),
        file=f"engines/c/{target}/librfsq_tokenizer.so",
        profile=(1, 1, 2**31 - 1),
        status="validated",
        precision="fp32",
        device=target,
        kernel_cache="",
        detail="passed the gates",
    )


def generate_cuda(deployed: Deployed) -> str:
    """Source of encoder and decoders."""
    return cuda_tokenizer(*_plans(deployed), fingerprint_of(deployed.recipe))


def compile_cuda(source: str, compute_capability: str) -> bytes:
    """Needs NVRTC, but no GPU."""
    from rfsq.runtime.backends.gpu.kernels import compile_kernels

    return compile_kernels(source, "rfsq_tokenizer.cu", compute_capability, may_fuse=False)


def cuda_entry(source: str, compute_capability: str) -> EngineEntry:
    """As a build records it that has compiled the source and run it."""
    return EngineEntry(
        backend="cuda",
        version="NVRTC",
        targets=(compute_capability,),
        source=CUDA_SOURCE,
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        file=f"engines/cuda/sm{compute_capability.replace('.', '')}/rfsq_tokenizer.cubin",
        profile=(1, 1, 2**31 - 1),
        status="validated",
        precision="fp32",
        device="a GPU",
        kernel_cache="",
        detail="passed the gates",
    )


def fingerprint_of(recipe: Recipe) -> str:
    """Of 64 digits, as a real one."""
    return hashlib.sha256(repr(recipe).encode()).hexdigest()


def bundle_files(folder: Path) -> list[str]:
    """Every file, by its path inside the bundle."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _decoder_file(deployed: Deployed, prefix: int) -> str:
    return "decoder.onnx" if prefix == deployed.recipe.config.num_layers else f"decoder_l{prefix}.onnx"


def without_beliefs(manifest: Manifest) -> Manifest:
    """As it would be without graphs that decode them."""
    return replace(manifest, graphs=tuple(entry for entry in manifest.graphs if entry.role != "belief"))


def _has_beliefs(recipe: Recipe) -> bool:
    return recipe.has_beliefs and not recipe.mode.has_stats


def _belief_file(deployed: Deployed, prefix: int) -> str:
    return _decoder_file(deployed, prefix).replace("decoder", "belief")


def _recover(model: ActionAutoencoder, prefixes: Sequence[int]) -> dict[int, RecoveredDecoder]:
    """Least squares from tokens to latents, the matrices exact in float32."""
    actions = torch.empty(2000, model.config.action_dim).uniform_(-1.5, 1.5).double()
    latents, tokens = model.encode_latents(actions), model.encode(actions)[0]
    fitted = {}
    for prefix in prefixes:
        flat = tokens[..., :prefix].flatten(1).double()
        design = torch.cat((flat, torch.ones(len(flat), 1)), dim=1)
        solution = torch.linalg.lstsq(design, latents, driver="gelsd").solution.float().double()
        fitted[prefix] = RecoveredDecoder(solution[:-1].T.contiguous(), solution[-1])
    return fitted
