"""Opens a bundle: every file is read once, hashed, and handed out as the very bytes that were hashed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from .advice import quoted
from .backend_specs import BACKENDS
from .contents import check_contents, copy_again
from .errors import BundleError
from .gates import highest_limit, missing_gates, promised_refusal
from .manifest import (
    GOLDEN_NAME,
    GRAPH_FORMS,
    MANIFEST_NAME,
    FileEntry,
    GraphForm,
    Manifest,
    graph_tensors,
    parse_manifest,
)
from .models import LARGEST_UNIT, LEAST_UNIT, ChunkModel, ModelEntry
from .paths import as_path
from .reading import OpenFolder, UnfitFileError

#: A build may replace the bundle while its files are read one by one. Then it is read again, this often at most.
_READS = 4
#: A manifest takes a few tens of KB; a larger file is something else and is not read: in memory it takes 25 times that.
MANIFEST_SIZE_LIMIT = 4 * 2**20
#: A bundle is held in memory. Engines that bring their library take some 100 MB, all others and golden vectors a few.
_FILE_SIZE_LIMIT, _TOTAL_SIZE_LIMIT, _MOST_FILES = 2**29, 2**30, 1000
#: What every build runs, and the device that it runs on.
GRAPHS_PROVEN_ON = ("onnxruntime", "CPU")
#: Float32 has 24 bits: farther from zero than so many units, two neighbours are a unit apart.
_MOST_OFFSET = 2.0**24
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle whose files have the sizes and hashes that its manifest states."""

    folder: Path
    manifest: Manifest
    _contents: Mapping[str, bytes] = field(repr=False)

    def content(self, file: str) -> bytes:
        """The bytes that were hashed; never read from disk again. Raises BundleError for a file not listed."""
        try:
            return self._contents[file]
        except KeyError:
            raise BundleError(f"{self.folder} lists no file {file!r}; {copy_again()}") from None

    def unlisted_files(self) -> tuple[str, ...]:
        """Files in the folder that the manifest does not name: nothing reads them."""
        return unlisted_files(self.folder, self._contents.keys())


def open_bundle(path: str | os.PathLike[str], *, is_proven: bool = True) -> Bundle:
    """Read a bundle into memory and check it against its manifest; nothing in it is deserialised before.

    is_proven: False for what a build opens to run its gates. Raises BundleError when it is missing, incomplete,
    altered, of another schema version, not a bundle, or when its manifest contradicts itself; InvalidInputError for a
    path that is none.
    """
    folder = as_path(path, "the bundle")
    for _ in range(_READS):
        with _open_folder(folder) as opened:
            text = _read_manifest(folder, opened)
            try:
                return _read_bundle(folder, opened, text, is_proven)
            except BundleError:
                # The folder may have been replaced meanwhile, or another bundle copied into it.
                if opened.is_still_there() and _read_manifest(folder, opened) == text:
                    raise
    raise BundleError(f"{folder} was replaced {_READS} times while it was read; load it when the builds have ended")


def _read_bundle(folder: Path, opened: OpenFolder, manifest_text: str, is_proven: bool) -> Bundle:
    manifest = parse_manifest(manifest_text)
    check_manifest(manifest, is_proven=is_proven)
    contents: dict[str, bytes] = {}
    kept: dict[str, bytes] = {}
    for name, entry in manifest.files.items():
        content = _read_checked(folder, opened, name, entry)
        # The same content under several names is kept once.
        contents[name] = kept.setdefault(entry.sha256, content)
    check_contents(manifest, contents)
    return Bundle(folder, manifest, MappingProxyType(contents))


def unlisted_files(folder: Path, listed: Collection[str]) -> tuple[str, ...]:
    """Files in `folder`, links included, that are neither the manifest nor listed in it: nothing reads them."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = {path.relative_to(folder).as_posix() for path in paths}
    return tuple(sorted(found.difference(listed, {MANIFEST_NAME})))


def check_manifest(manifest: Manifest, *, is_proven: bool) -> None:
    """Raises BundleError where the manifest contradicts itself: no build that passed its gates writes that.

    is_proven: False for the manifest of a build whose gates have still to run.
    """
    _check_files(manifest.files)
    # One after the other: each relies on those before.
    for finding, problems in (
        ("describes no possible model", _model_problems(manifest.model)),
        ("contradicts itself", _reference_problems(manifest)),
        ("states what no build that passed its gates writes", _statement_problems(manifest)),
        ("calls proven what is not", _parity_problems(manifest) if is_proven else iter(())),
    ):
        found = "; ".join(problems)
        if found:
            raise BundleError(f"{MANIFEST_NAME} {finding}: {found}; build the bundle again")


def _open_folder(folder: Path) -> OpenFolder:
    try:
        if folder.is_dir():
            return OpenFolder(folder)
        found = "a file, not a folder" if folder.exists() else "nothing"
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error}; check its permissions") from error
    # Not above: where all is well they would only take time to load.
    import glob
    import shlex

    # Where export/bundle_writer.py cannot exchange two folders, a build that is killed between two renames leaves this.
    aside = next(folder.absolute().parent.glob(f".{glob.escape(folder.name)}.staged-*/old"), None)
    advice = (
        "a build that was killed has set aside the one that was there: put it back with "
        + shlex.join(["mv", str(aside), str(folder)])
        if aside
        else f"give the folder that {quoted('build')} wrote"
    )
    raise BundleError(f"no bundle at {folder}: found {found}; {advice}")


def _read_manifest(folder: Path, opened: OpenFolder) -> str:
    without = f"{folder} is not a bundle: it has no file {MANIFEST_NAME}; give the folder that {quoted('build')} wrote"
    with _readable(MANIFEST_NAME, folder, without), opened.opened(MANIFEST_NAME) as (stream, size):
        if size > MANIFEST_SIZE_LIMIT:
            raise BundleError(f"{MANIFEST_NAME} in {folder} has {size} bytes, more than any manifest; {copy_again()}")
        # Decoded here: as text, line ends of other systems would become ours before the spelling is checked.
        return stream.read(size).decode("utf-8")


def _read_checked(folder: Path, opened: OpenFolder, name: str, entry: FileEntry) -> bytes:
    """The file's bytes, with the size and hash that the manifest states."""
    without = f"{name} is missing from {folder}; {copy_again()}"
    with _readable(name, folder, without), opened.opened(name) as (stream, size):
        if size != entry.size:
            raise BundleError(
                f"{name} in {folder} has {size} bytes, the manifest states {entry.size}: it is truncated or was "
                f"altered; {copy_again()}"
            )
        content = stream.read(size)
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise BundleError(
            f"{name} in {folder} has sha256 {found}, the manifest states {entry.sha256}: it was altered; {copy_again()}"
        )
    return content


@contextlib.contextmanager
def _readable(name: str, folder: Path, without: str) -> Iterator[None]:
    """Raises BundleError for what keeps the file from being read. without: what to say where it is missing."""
    try:
        yield
    except FileNotFoundError:
        raise BundleError(without) from None
    except UnicodeDecodeError as error:
        raise BundleError(f"{name} in {folder} is not UTF-8 text: {error}; {copy_again()}") from error
    except (OSError, ValueError) as error:
        # Beside the system's refusals: names that it cannot represent.
        next_step = copy_again() if isinstance(error, UnfitFileError) else "check its permissions"
        raise BundleError(f"{name} in {folder} cannot be read: {error}; {next_step}") from error


def check_file_name(name: str) -> None:
    """Raises BundleError unless `name` is a plain path inside the bundle, with forward slashes, on every system."""
    if any(part in ("", ".", "..") for part in name.split("/")) or any(sign in name for sign in "\\:\0"):
        raise BundleError(f"{name!r} may lie outside the bundle; expected a plain path in it with forward slashes")


def _check_files(files: Mapping[str, FileEntry]) -> None:
    """Names inside the bundle, and no more of them, nor larger ones, than a machine can hold in memory."""
    for name in files:
        check_file_name(name)
    sizes = [entry.size for entry in files.values()]
    is_each_possible = all(0 <= size <= _FILE_SIZE_LIMIT for size in sizes)
    if not is_each_possible or sum(sizes) > _TOTAL_SIZE_LIMIT or len(sizes) > _MOST_FILES:
        raise BundleError(
            f"{MANIFEST_NAME} lists {len(sizes)} files of {sum(sizes)} bytes, the largest of {max(sizes)}; expected at "
            f"most {_MOST_FILES}, {_TOTAL_SIZE_LIMIT} and {_FILE_SIZE_LIMIT}: build the bundle with fewer engines"
        )


def _model_problems(model: ModelEntry) -> Iterator[str]:
    """Sizes and units that no model can have: everything behind this relies on them."""
    for name, (least, most) in model.size_limits.items():
        if not least <= getattr(model, name) <= most:
            yield f"{name} is {getattr(model, name)}, not from {least} to {most}"
    ascending = tuple(sorted(set(model.prefixes)))
    if model.prefixes != ascending or not ascending or ascending[0] < 1 or ascending[-1] != model.depth:
        yield f"prefixes are {list(model.prefixes)} for {model.depth} {model.depth_unit}"
    if isinstance(model, ChunkModel):
        yield from _chunk_problems(model)
    for name in ("action_units", "action_offset"):
        values = getattr(model, name)
        if len(values) != model.action_dim:
            yield f"{name} are {list(values)} for {model.action_dim} dimensions"
    if not all(LEAST_UNIT <= unit <= LARGEST_UNIT for unit in model.action_units):
        yield f"action_units are {list(model.action_units)}, not all between {LEAST_UNIT:g} and {LARGEST_UNIT:g}"
    ranges = list(zip(model.action_offset, model.action_units, strict=False))
    if not all(abs(offset) <= _MOST_OFFSET * unit for offset, unit in ranges):
        yield f"action_offset are {list(model.action_offset)}, where float32 does not tell units apart"
    # The limit becomes a float32, against which float32 actions are held.
    if not all(abs(offset) + unit <= model.action_limit <= _FLOAT32_MAX for offset, unit in ranges):
        yield f"action_limit is {model.action_limit}, not beyond the range of the units and in float32"


def _chunk_problems(model: ChunkModel) -> Iterator[str]:
    num_values = model.chunk_length * model.action_dim
    if model.class_bits > model.token_bits:
        yield f"{model.num_classes} classes do not fit into a token of {model.token_bits} bits"
    if len(model.prefixes) != model.num_tokens:
        yield f"prefixes are {list(model.prefixes)}, and every number of tokens decodes"
    if not 1 <= model.num_latents <= num_values:
        yield f"num_latents is {model.num_latents}, not from 1 to {num_values}"
    if sorted({*model.budgets} & {*model.prefixes}) != list(model.budgets) or len(model.bounds) != len(model.budgets):
        yield f"budgets are {list(model.budgets)} and bounds {list(model.bounds)}"
    if not all(0 < bound <= 1 for bound in model.bounds):
        yield f"bounds are {list(model.bounds)}, not all above 0 and at most 1"


def _reference_problems(manifest: Manifest) -> Iterator[str]:
    """Whatever the manifest refers to is among its files, and engines were compiled from the graphs they name."""
    named = {GOLDEN_NAME, *(entry.file for entry in manifest.graphs), *(entry.file for entry in manifest.engines)}
    named |= {entry.kernel_cache for entry in manifest.engines if entry.kernel_cache}
    unlisted = sorted(named - manifest.files.keys())
    if unlisted:
        yield f"it refers to {', '.join(unlisted)} but lists no hash for them"
    model = manifest.model
    parts = [("encoder", model.depth), *(("decoder", prefix) for prefix in model.decoder_graphs)]
    wanted = [(*part, form) for part in parts for form in GRAPH_FORMS]
    if not model.has_stats:
        forms = (form for form in GRAPH_FORMS if manifest.belief_graphs_of(form))
        wanted += [("belief", prefix, form) for form in forms for prefix in model.decoder_graphs]
    wanted.sort()
    found = sorted((entry.role, entry.prefix, entry.form) for entry in manifest.graphs)
    if found != wanted:
        yield f"it lists the graphs {found}; the model needs {wanted}"
    for entry in manifest.graphs:
        inputs, outputs = graph_tensors(model, entry.role, entry.prefix)
        if (entry.inputs, entry.outputs) != (inputs, outputs):
            yield (
                f"it states the tensors {entry.inputs} and {entry.outputs} for {entry.file}; the model needs {inputs} "
                f"and {outputs}"
            )
    for engine in manifest.engines:
        if engine.source not in manifest.files or engine.source_sha256 != manifest.files[engine.source].sha256:
            yield (
                f"{engine.file} was compiled from {engine.source} with sha256 {engine.source_sha256}, which is not in "
                "this bundle: graph and engine do not belong together"
            )


def _statement_problems(manifest: Manifest) -> Iterator[str]:
    if not re.fullmatch("[0-9a-f]{64}", manifest.fingerprint):
        yield f"the fingerprint is {manifest.fingerprint!r}, not 64 lowercase hexadecimal digits"
    for engine in manifest.engines:
        least, optimum, most = engine.profile
        if not 1 <= least <= optimum <= most:
            yield f"{engine.file} is tuned for batches {list(engine.profile)}, not 1 or more and ascending"
        if engine.backend == "c" and len(engine.targets) != 1:
            yield f"{engine.file} is C for the targets {list(engine.targets)}, not for one"
        measured = (engine.precision == "fp32", engine.device != "")
        if measured != (engine.status == "validated",) * 2:
            yield f"{engine.file} is {engine.status!r} with precision {engine.precision!r} on the GPU {engine.device!r}"
        if engine.kernel_cache and not engine.device:
            yield f"{engine.file} has kernels in {engine.kernel_cache}, compiled for no GPU that is named"
    model, quality = manifest.model, manifest.quality
    if quality is not None and not quality.fidelity.is_possible(model.action_units, model.action_offset):
        yield "the quality is not that of this model's dimensions and units, or no errors can be so"


def _parity_problems(manifest: Manifest) -> Iterator[str]:
    """What the manifest calls proven has passed every gate, and none of them was wider than this project's."""
    model = manifest.model
    gates: dict[tuple[str, str], list[str]] = {}
    for entry in manifest.parity:
        highest = highest_limit(entry.gate, entry.steps, model.step_latents, model.depth)
        if highest is None or entry.steps < 1:
            yield f"{entry.gate!r} of {entry.backend}, over {entry.steps} steps, is no gate"
        elif not 0 <= entry.value <= entry.limit <= highest:
            yield (
                f"the gate {entry.gate!r} of {entry.backend} did not pass: {entry.value:g} of {entry.limit:g}, where "
                f"at most {highest:g} may be allowed"
            )
        gates.setdefault((entry.backend, entry.device), []).append(entry.gate)
    # The graphs are run as they are, whatever engines there are beside them.
    proven = {GRAPHS_PROVEN_ON, *((entry.backend, entry.device) for entry in manifest.engines if entry.device)}
    # No build leaves a C engine unproven, and it would run as it is on every processor of its kind.
    proven |= {(entry.backend, entry.targets[0]) for entry in manifest.engines if entry.backend == "c"}
    for backend, device in sorted(proven):
        refusal = promised_refusal(backend, model.chunk_length)
        found = gates.get((backend, device), ())
        spec = BACKENDS.get(backend)
        form: GraphForm = "reduce" if spec is not None and spec.is_on_gpu else "gemm"
        has_beliefs = spec is not None and spec.decodes_beliefs and bool(manifest.belief_graphs_of(form))
        missing = missing_gates(
            found, model.decoders, has_stats=model.has_stats, refusal=refusal, has_beliefs=has_beliefs
        )
        if missing:
            yield f"{backend} on {device} lacks the gates {', '.join(missing)}"
