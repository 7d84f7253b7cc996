"""Bundles of chunk tokens for tests of all rooms: of any sizes, with random constants, in a second or two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rfsq.export.belief_vectors import belief_vectors
from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.c_builder import compile_c
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.chunk_tokens import ChunkTokens
from rfsq.export.sources import BuildData
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.chunk_code import ChunkConstants, ChunkSizes, gain_range
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.decoding import write_decoding
from rfsq.runtime.bundle.golden import write_golden
from rfsq.runtime.bundle.manifest import (
    C_HEADER,
    C_SOURCE,
    CUDA_SOURCE,
    DECODING_NAME,
    GOLDEN_NAME,
    SCHEMA_VERSION,
    Manifest,
)
from tests.bundles import c_entry, compile_cuda, cuda_entry, proven

SMALL = ChunkSizes(action_dim=3, chunk_length=4, num_classes=6, token_bits=8, num_tokens=9)


@dataclass(frozen=True)
class ChunkRecipe:
    """What to build; equal recipes give equal bundles.

    c_targets: what the generated C is compiled for; None for no C at all; compute_capability: of the GPU that the
    generated CUDA is compiled for; None for no CUDA at all.
    """

    sizes: ChunkSizes = SMALL
    has_normaliser: bool = True
    num_chunks: int = 12
    c_targets: tuple[str, ...] | None = None
    compute_capability: str | None = None
    seed: int = 0


def random_constants(sizes: ChunkSizes, seed: int) -> ChunkConstants:
    """Those of any code of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    classes, values = sizes.num_classes - 1, sizes.num_values
    latents = int(torch.randint(-(-sizes.code_bits // MOST_BITS), values + 1, (), generator=generator))
    bases = torch.linalg.qr(torch.randn(classes, values, values, generator=generator, dtype=torch.float64)).Q
    # Each latent as often as it may be named, in any order.
    order = [
        torch.randperm(latents * MOST_BITS, generator=generator)[: sizes.code_bits] % latents for _ in range(classes)
    ]
    gain = torch.ones(classes, latents, MOST_BITS + 1)
    for bits in range(1, MOST_BITS + 1):
        low, high = gain_range(bits)
        gain[..., bits] = low + (high - low) * torch.rand(classes, latents, generator=generator)
    budgets = tuple(sorted({1, (sizes.num_tokens + 1) // 2, sizes.num_tokens}))
    return ChunkConstants(
        mean=torch.randn(classes, values, generator=generator) * 0.3,
        basis=bases[..., :latents].float(),
        scale=torch.rand(classes, latents, generator=generator) + 0.01,
        gain=gain,
        order=torch.stack(order),
        budgets=budgets,
        weights=torch.rand(len(budgets), generator=generator) + 0.1,
    )


def chunk_checkpoint(recipe: ChunkRecipe) -> ChunkCheckpoint:
    """A file's content, with random constants."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    normaliser = None
    if recipe.has_normaliser:
        offset = 0.2 * torch.randn(recipe.sizes.action_dim, generator=generator)
        units = 0.5 + torch.rand(recipe.sizes.action_dim, generator=generator)
        normaliser = Normaliser(NormaliserKind.MIN_MAX, tuple(offset.tolist()), tuple(units.tolist()))
    return ChunkCheckpoint(recipe.sizes, random_constants(recipe.sizes, recipe.seed), normaliser)


def deployed_chunk_tokens(recipe: ChunkRecipe) -> ChunkTokens:
    """As a build deploys them, without data."""
    checkpoint = chunk_checkpoint(recipe)
    none = np.empty((0, recipe.sizes.chunk_length, recipe.sizes.action_dim), np.float32)
    reference = ChunkReference(checkpoint.model(dtype=torch.float64))
    return ChunkTokens(checkpoint, reference, BuildData(None, none, "none", ""), "random")


def random_chunks(model: ChunkTokenizer, count: int, *, seed: int = 1) -> np.ndarray:
    """float32 [count, T, A]: smooth ones over the range, and some beyond it."""
    random, sizes = np.random.default_rng(seed), model.sizes
    shape = (count, sizes.chunk_length, sizes.action_dim)
    walks = random.uniform(-1, 1, (count, 1, sizes.action_dim)) + 0.1 * random.standard_normal(shape).cumsum(axis=1)
    return (walks * model.units.numpy() + model.offset.numpy()).astype(np.float32)


def write_chunk_bundle(output: Path, recipe: ChunkRecipe, *, overwrite: bool = False) -> Path:
    """A complete bundle at `output`, which is also returned."""
    tokens = deployed_chunk_tokens(recipe)
    with stage_bundle(output, overwrite=overwrite) as staged:
        graphs = tokens.graphs()
        for graph, content in graphs:
            staged.write(graph.file, content)
        answers = tokens.reference.answer(random_chunks(tokens.reference.model, recipe.num_chunks))
        golden = tokens.reference.golden(answers.expected)
        golden = replace(golden, beliefs=belief_vectors(tokens.reference.model, tokens.model, golden.tokens))
        staged.write(DECODING_NAME, write_decoding(tokens.decoding()))
        staged.write(GOLDEN_NAME, write_golden(golden))
        entries = tuple(graph for graph, _ in graphs)
        model, tools, provenance = tokens.model, {"numpy": np.__version__}, {"checkpoint": {"file": "random"}}
        parity = proven("onnxruntime", "CPU", model)
        manifest = Manifest(SCHEMA_VERSION, tokens.fingerprint, model, entries, (), parity, tools, provenance, {})
        if recipe.c_targets is not None:
            generated = tokens.c_source()
            staged.write(C_HEADER, generated.header.encode())
            staged.write(C_SOURCE, generated.source.encode())
            for target in recipe.c_targets:
                entry = c_entry(generated, target)
                staged.write(entry.file, compile_c(generated.header, generated.source, target).content)
                manifest = replace(manifest, engines=(*manifest.engines, entry))
        if recipe.compute_capability is not None:
            source = tokens.cuda_source()
            staged.write(CUDA_SOURCE, source.encode())
            entry = cuda_entry(source, recipe.compute_capability)
            staged.write(entry.file, compile_cuda(source, recipe.compute_capability))
            manifest = replace(manifest, engines=(*manifest.engines, entry))
        proofs = [gate for entry in manifest.engines for gate in proven(entry.backend, entry.device, model)]
        staged.seal(replace(manifest, parity=(*manifest.parity, *proofs)))
    return output
