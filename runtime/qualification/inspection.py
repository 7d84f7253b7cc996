"""Show what is in a bundle: a summary, or with -v model, graphs, engines, what was proven, and every file.

Sizes and hashes are checked on the way; nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..bundle.command import CommandParser, Outcome, run
from ..bundle.console import printable
from ..bundle.modes import MEANING
from ..bundle.paths import shortlist

if TYPE_CHECKING:
    from ..bundle.folder import Bundle
    from ..bundle.manifest import EngineEntry, GraphEntry, TensorEntry
    from ..bundle.models import ModelEntry


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("inspect")
    parser.add_bundle()
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    from ..bundle.folder import open_bundle

    bundle = open_bundle(options.bundle)
    # Line by line: a name with a line end in it must not look like two lines of ours.
    print("\n".join(printable(line.replace("\n", "\\n")) for line in overview(bundle, is_verbose=options.verbose)))
    files = bundle.manifest.files
    size, quality = sum(entry.size for entry in files.values()), bundle.manifest.quality
    # For -q too, which shows nothing else.
    grade = "" if quality is None or quality.fidelity.grade == "good" else f"; the tokens are {quality.fidelity.grade}"
    return Outcome(
        f"✓ {bundle.folder}: {len(files)} files, {size / 1e6:.1f} MB, sizes and sha256 as in the manifest{grade}",
        describe(bundle),
    )


def describe(bundle: Bundle) -> dict[str, Any]:
    """The manifest's content and `unlisted_files`, fit for JSON."""
    return {**dataclasses.asdict(bundle.manifest), "unlisted_files": list(bundle.unlisted_files())}


def overview(bundle: Bundle, *, is_verbose: bool = True) -> Iterator[str]:
    """Lines for people: what it is and what it is worth, and then a summary of the rest or every detail."""
    manifest, model = bundle.manifest, bundle.manifest.model
    yield f"{bundle.folder} (schema version {manifest.schema_version})"
    yield f"  fingerprint  {manifest.fingerprint}"
    yield f"  mode         {model.mode}: {MEANING[model.mode]}"
    yield f"  sizes        {model.sizes_text}; decodes {model.prefixes_text}"
    worth = "not recorded; build it with action data to know" if manifest.quality is None else manifest.quality.line
    yield from _details(bundle, worth) if is_verbose else _summary(bundle, worth)


def _summary(bundle: Bundle, worth: str) -> Iterator[str]:
    manifest = bundle.manifest
    yield f"  worth        {worth}"
    for backend in dict.fromkeys(engine.backend for engine in manifest.engines):
        found = Counter(engine.status for engine in manifest.engines if engine.backend == backend)
        yield f"  engines      {backend}: {', '.join(f'{count} {status}' for status, count in found.items())}"
    for backend in dict.fromkeys(entry.backend for entry in manifest.parity):
        steps = {entry.steps for entry in manifest.parity if entry.backend == backend}
        yield f"  parity       {backend}: ✓ every gate, over {max(steps):,} steps"
    if unlisted := tuple(bundle.unlisted_files()):
        yield f"  unlisted     {shortlist(unlisted)}: never read"
    yield "  -v shows graphs, engines, gates, files and provenance"


def _details(bundle: Bundle, worth: str) -> Iterator[str]:
    manifest, model = bundle.manifest, bundle.manifest.model
    yield f"  actions      physical = normalised * units + offset; float32 overflows beyond {model.action_limit:.3g}"
    yield f"    units      {_numbers(model.action_units)}"
    yield f"    offset     {_numbers(model.action_offset)}"
    yield f"what the tokens are worth: {worth}"
    if quality := manifest.quality:
        yield f"  judged by {quality.source}, sha256 {quality.sha256}"
        text = quality.fidelity.text(f"{quality.judged_on}, all {model.depth_unit}", model.mode)
        yield from (f"  {line}" for line in text.splitlines())
    yield "graphs"
    for graph in manifest.graphs:
        yield f"  {_graph(graph, model)}"
    yield "engines" if manifest.engines else "engines: none, the graphs are run as they are"
    for engine in manifest.engines:
        yield from (f"  {line}" for line in _engine(engine))
    yield "parity with PyTorch float64"
    for entry in manifest.parity:
        detail = f" ({entry.detail})" if entry.detail else ""
        measured = f"{entry.value:.4g} ≤ {entry.limit:.4g} over {entry.steps} steps"
        yield f"  ✓ {entry.backend}, {entry.gate}: {measured}{detail}"
    yield "files, sizes and sha256 as in the manifest"
    for file, listed in sorted(manifest.files.items()):
        yield f"  {listed.size:>12,} bytes  {listed.sha256[:16]}…  {file}"
    for file in bundle.unlisted_files():
        yield f"  not listed in the manifest, never read: {file}"
    yield f"built with {', '.join(f'{name} {version}' for name, version in sorted(manifest.tools.items()))}"
    yield "provenance"
    yield from (
        f"  {line}" for line in json.dumps(manifest.provenance, indent=1, ensure_ascii=False).splitlines()[1:-1]
    )


def _graph(graph: GraphEntry, model: ModelEntry) -> str:
    what: str = graph.role
    if graph.role == "decoder":
        most = "" if model.graph_of(model.prefixes[0]) == model.prefixes[0] else "at most "
        what = f"decoder of {most}{graph.prefix} {model.depth_unit}"
    elif graph.role == "belief":
        what = f"decoder of probabilities of {'' if model.token_grid else 'at most '}{graph.prefix} {model.depth_unit}"
    return f"{graph.file}: {what}, {_tensors(graph.inputs)} -> {_tensors(graph.outputs)}"


def _tensors(tensors: Sequence[TensorEntry]) -> str:
    return ", ".join(f"{tensor.name} {tensor.dtype}[{', '.join(_axes(tensor.shape))}]" for tensor in tensors)


def _axes(shape: Sequence[int]) -> Iterator[str]:
    """Sizes, and letters for those that are free: B of the first axis, l of the last one of tokens."""
    for axis, size in enumerate(shape):
        yield str(size) if size != -1 else "l" if axis else "B"


def _engine(engine: EngineEntry) -> Iterator[str]:
    target = f"for {', '.join(engine.targets)}" if engine.targets else "for the library's default GPUs"
    least, optimum, most = engine.profile
    yield f"{engine.file}"
    batch = f"B {least} ... {most}, tuned for {optimum}"
    yield f"  {engine.backend} {engine.version}, {target}, from {engine.source}, {batch}"
    if engine.status == "validated":
        yield f"  ✓ validated: it passed the parity gates ({engine.detail})"
    else:
        yield f"  – built, NOT validated: it was never run ({engine.detail})"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
