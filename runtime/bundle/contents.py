"""What the files of a bundle say of themselves, held against its manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .advice import quoted
from .errors import BundleError
from .manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, Manifest, kernel_name, token_types
from .models import ChunkModel, StepModel

#: What stands in graphs, and in generated sources, of a quantiser with constant bins and of no other; and of one that
#: takes the statistics of every step.
_CONSTANTS = (b"L0.ratio", b"#define HAS_CONSTANT_BINS 1\n")
_STATISTICS = (b"L0.sigma", b"#define HAS_CONSTANT_BINS 0\n")
#: Sources state the fingerprint in their first line.
_HEAD = 400


def copy_again() -> str:
    return f"copy the bundle again or build it again with {quoted('build')}"


def check_contents(manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Hold what the files say of themselves against the manifest: hashes do not show that they belong together.

    Nothing is parsed or compiled: only what the generators write is looked for. That the numbers are right is for the
    golden vectors. contents: every file by its path inside the bundle. Raises BundleError.
    """
    problems = [*_of_header(manifest, contents), *_of_sources(manifest, contents), *_of_quantiser(manifest, contents)]
    if problems:
        raise BundleError(
            f"the manifest and the files beside it are not of one bundle: {'; '.join(problems)}; {copy_again()}"
        )


def _of_header(manifest: Manifest, contents: Mapping[str, bytes]) -> Iterator[str]:
    if C_HEADER not in contents:
        return
    model = manifest.model
    sizes = {"CHUNK_LENGTH": model.chunk_length, "ACTION_DIM": model.action_dim}
    if isinstance(model, StepModel):
        sizes |= {"LATENT_DIM": model.latent_dim, "NUM_LAYERS": model.num_layers, "NUM_LEVELS": model.num_levels}
    else:
        sizes |= {"NUM_TOKENS": model.depth, "VOCABULARY": model.vocabulary}
    expected = {"FINGERPRINT": f'"{manifest.fingerprint}"'} | {name: str(size) for name, size in sizes.items()}
    text = contents[C_HEADER].decode("utf-8", "replace")
    found = dict(re.findall(r"^#define RFSQ_(\w+) (\S+)$", text, re.MULTILINE))
    # Headers of older builds do not name the mode.
    if "MODE" in found:
        expected["MODE"] = f'"{model.mode}"'
    for name, value in expected.items():
        if found.get(name) != value:
            yield f"{C_HEADER} has RFSQ_{name} {found.get(name, 'nowhere')}, the manifest {value}"


def _needed_parts(model: ChunkModel | StepModel) -> dict[str, list[str]]:
    """What the generators write into each source, and into none of another model."""
    if not isinstance(model, StepModel):
        return {
            C_SOURCE: ["int rfsq_encode(", "int rfsq_decode("],
            CUDA_SOURCE: [
                f"T = {model.chunk_length}, A = {model.action_dim}, L = {model.depth};",
                f"CLASSES = {model.num_classes - 1}, M = {model.num_latents}, BUDGETS = {len(model.budgets)};",
                f"TOKEN_BITS = {model.token_bits}, ",
                *(
                    f"{kernel_name(prefix, token, 'few')}("
                    for prefix in (None, model.depth)
                    for token in token_types(model.vocabulary, "uint16")
                ),
            ],
        }
    return {
        C_SOURCE: ["int rfsq_encode(", *(f"int rfsq_decode_l{prefix}(" for prefix in model.prefixes)],
        CUDA_SOURCE: [
            f"A = {model.action_dim}, D = {model.latent_dim}, L = {model.num_layers}, K = {model.num_levels}, "
            f"H = {model.hidden_width};",
            *(
                f"{kernel_name(prefix, token, 'few')}("
                for prefix in (None, *model.prefixes)
                for token in token_types(model.num_levels)
            ),
        ],
    }


def _of_sources(manifest: Manifest, contents: Mapping[str, bytes]) -> Iterator[str]:
    needed = _needed_parts(manifest.model)
    for file in needed.keys() & contents.keys():
        content = contents[file]
        missing = [part for part in needed[file] if part.encode() not in content]
        if missing:
            yield f"{file} has no `{'`, no `'.join(missing)}`"
        stated = re.search(rb"fingerprint ([0-9a-f]{64})", content[:_HEAD])
        if stated and stated[1].decode() != manifest.fingerprint:
            yield f"{file} has the fingerprint {stated[1].decode()}, the manifest {manifest.fingerprint}"


def _of_quantiser(manifest: Manifest, contents: Mapping[str, bytes]) -> Iterator[str]:
    model = manifest.model
    if not isinstance(model, StepModel):
        return
    foreign, kind = (
        (_CONSTANTS, "constants") if model.is_step_coupled else (_STATISTICS, "the statistics of every step")
    )
    encoders = [entry.file for entry in manifest.graphs if entry.role == "encoder"]
    for file in (*encoders, *(source for source in (C_SOURCE, CUDA_SOURCE) if source in contents)):
        if any(mark in contents[file] for mark in foreign):
            yield f"{file} normalises by {kind}, which no {model.mode!r} encoder does"
