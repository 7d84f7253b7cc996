"""What the files of a bundle say of themselves, held against its manifest.

Hashes show that files are the ones that were listed, not that they belong together. Nothing is parsed or compiled here:
only what the generators write is looked for. That the numbers are right is for the golden vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from .advice import command
from .errors import BundleError
from .kernel_names import kernel_name, token_types
from .manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, Manifest

#: How graphs call what one kind of quantiser has and the other has not.
_GRAPH_CONSTANTS, _GRAPH_STATISTICS = b"L0.ratio", b"L0.sigma"
#: The same in generated sources.
_SOURCE_CONSTANTS, _SOURCE_STATISTICS = b"#define HAS_CONSTANT_BINS 1\n", b"#define HAS_CONSTANT_BINS 0\n"
#: Sources state the fingerprint in their first line.
_HEAD = 400


def check_contents(manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """contents: every file by its path inside the bundle. Raises BundleError where one contradicts the manifest."""
    problems = [*_of_header(manifest, contents), *_of_sources(manifest, contents), *_of_graphs(manifest, contents)]
    if problems:
        raise BundleError(
            f"the manifest and the files beside it are not of one bundle: {'; '.join(problems)}; copy the bundle again "
            f"or build it again with `{command('build')}`"
        )


def _of_header(manifest: Manifest, contents: Mapping[str, bytes]) -> Iterator[str]:
    if C_HEADER not in contents:
        return
    model = manifest.model
    expected = {
        "FINGERPRINT": f'"{manifest.fingerprint}"',
        "CHUNK_LENGTH": str(model.chunk_length),
        "ACTION_DIM": str(model.action_dim),
        "LATENT_DIM": str(model.latent_dim),
        "NUM_LAYERS": str(model.num_layers),
        "NUM_LEVELS": str(model.num_levels),
    }
    text = contents[C_HEADER].decode("utf-8", "replace")
    found = dict(re.findall(r"^#define RFSQ_(\w+) (\S+)$", text, re.MULTILINE))
    # Headers that were generated before they named the mode are as good.
    if "MODE" in found:
        expected["MODE"] = f'"{model.mode}"'
    for name, value in expected.items():
        if found.get(name) != value:
            yield f"{C_HEADER} has RFSQ_{name} {found.get(name, 'nowhere')}, the manifest {value}"


def _of_sources(manifest: Manifest, contents: Mapping[str, bytes]) -> Iterator[str]:
    model = manifest.model
    sizes = (model.action_dim, model.latent_dim, model.num_layers, model.num_levels, model.hidden_width)
    needed = {
        C_SOURCE: ["int rfsq_encode(", *(f"int rfsq_decode_l{prefix}(" for prefix in model.prefixes)],
        CUDA_SOURCE: [
            "A = {}, D = {}, L = {}, K = {}, H = {};".format(*sizes),
            *(
                f"{kernel_name(prefix, token, 'few')}("
                for prefix in (None, *model.prefixes)
                for token in token_types(model.num_levels)
            ),
        ],
    }
    for file in needed.keys() & contents.keys():
        content = contents[file]
        missing = [part for part in needed[file] if part.encode() not in content]
        if missing:
            yield f"{file} has no `{'`, no `'.join(missing)}`"
        stated = re.search(rb"fingerprint ([0-9a-f]{64})", content[:_HEAD])
        if stated and stated[1].decode() != manifest.fingerprint:
            yield f"{file} has the fingerprint {stated[1].decode()}, the manifest {manifest.fingerprint}"
        yield from _of_quantiser(file, content, manifest, (_SOURCE_CONSTANTS, _SOURCE_STATISTICS))


def _of_graphs(manifest: Manifest, contents: Mapping[str, bytes]) -> Iterator[str]:
    for entry in manifest.graphs:
        if entry.role == "encoder":
            marks = (_GRAPH_CONSTANTS, _GRAPH_STATISTICS)
            yield from _of_quantiser(entry.file, contents[entry.file], manifest, marks)


def _of_quantiser(file: str, content: bytes, manifest: Manifest, marks: Sequence[bytes]) -> Iterator[str]:
    """marks: of a quantiser with constant bins, and of one that takes the statistics of every step."""
    if marks[not manifest.model.is_step_coupled] in content:
        kind = "constants" if manifest.model.is_step_coupled else "the statistics of every step"
        yield f"{file} normalises by {kind}, which no {manifest.model.mode!r} encoder does"
