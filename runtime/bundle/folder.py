"""Opens a bundle: every file is read once, hashed, and handed out as the very bytes that were hashed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import numpy as np

from .advice import command
from .contradictions import check_contents
from .errors import BundleError
from .gates import highest_limit, missing_gates, promised_refusal
from .manifest import (
    GOLDEN_NAME,
    GRAPH_FORMS,
    MANIFEST_NAME,
    SIZE_LIMITS,
    FileEntry,
    Manifest,
    ModelEntry,
    graph_tensors,
    parse_manifest,
)
from .paths import as_path
from .reading import OpenFolder, UnfitFileError

#: A build may put a new bundle in place while its files are read one by one: how many times it is read at most.
_READS = 4
#: A manifest takes a few tens of KB; a larger file is something else and is not read: in memory it takes 25 times that.
MANIFEST_SIZE_LIMIT = 4 * 2**20
#: A bundle is held in memory. Engines that bring their library take some 100 MB, all others and golden vectors a few.
_FILE_SIZE_LIMIT, _TOTAL_SIZE_LIMIT, _MOST_FILES = 2**29, 2**30, 1000
#: What every build runs, and the device that it runs on.
GRAPHS_PROVEN_ON = ("onnxruntime", "CPU")
#: Physical units per normalised one, from picometres in metres to encoders of many turns. Errors are judged in
#: normalised units: with units too large, no error would be one.
_LEAST_UNIT, _LARGEST_UNIT = 1e-12, 1e12
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
            raise BundleError(f"{self.folder} lists no file {file!r}; {_copy_again()}") from None

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
                # Another folder may stand there now, or another bundle may have been copied into this one.
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
        # The same content under many names takes its room once.
        contents[name] = kept.setdefault(entry.sha256, content)
    check_contents(manifest, contents)
    return Bundle(folder, manifest, MappingProxyType(contents))


def unlisted_files(folder: Path, listed: Collection[str]) -> tuple[str, ...]:
    """Files in `folder`, links included, that are neither the manifest nor listed in it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = {path.relative_to(folder).as_posix() for path in paths}
    return tuple(sorted(found.difference(listed, {MANIFEST_NAME})))


def check_manifest(manifest: Manifest, *, is_proven: bool) -> None:
    """Raises BundleError where the manifest contradicts itself: no build that passed its gates writes that.

    is_proven: False for the manifest of a build whose gates have still to run.
    """
    _check_files(manifest.files)
    _check_model(manifest.model)
    _check_references(manifest)
    _check_statements(manifest)
    if is_proven:
        _check_parity(manifest)


def _copy_again() -> str:
    return f"copy the bundle again or build it again with `{command('build')}`"


def _open_folder(folder: Path) -> OpenFolder:
    try:
        if folder.is_dir():
            return OpenFolder(folder)
        found = "a file, not a folder" if folder.exists() else "nothing"
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error}; check its permissions") from error
    raise BundleError(f"no bundle at {folder}: found {found}; give the folder that `{command('build')}` wrote")


def _read_manifest(folder: Path, opened: OpenFolder) -> str:
    try:
        with opened.opened(MANIFEST_NAME) as (stream, size):
            if size > MANIFEST_SIZE_LIMIT:
                raise BundleError(
                    f"{MANIFEST_NAME} in {folder} has {size} bytes, more than any manifest; {_copy_again()}"
                )
            # Decoded here: as text, line ends of other systems would become ours before the spelling is checked.
            return stream.read(size).decode("utf-8")
    except FileNotFoundError:
        raise BundleError(
            f"{folder} is not a bundle: it has no file {MANIFEST_NAME}; give the folder that `{command('build')}` wrote"
        ) from None
    except UnicodeDecodeError as error:
        raise BundleError(f"{MANIFEST_NAME} in {folder} is not UTF-8 text: {error}; {_copy_again()}") from error
    except OSError as error:
        raise _unreadable(MANIFEST_NAME, folder, error) from error


def _read_checked(folder: Path, opened: OpenFolder, name: str, entry: FileEntry) -> bytes:
    """The file's bytes, with the size and hash that the manifest states."""
    try:
        with opened.opened(name) as (stream, size):
            if size != entry.size:
                raise BundleError(
                    f"{name} in {folder} has {size} bytes, the manifest states {entry.size}: it is truncated or was "
                    f"altered; {_copy_again()}"
                )
            content = stream.read(size)
    except FileNotFoundError:
        raise BundleError(f"{name} is missing from {folder}; {_copy_again()}") from None
    except (OSError, ValueError) as error:
        # Beside the system's refusals: names that it cannot represent.
        raise _unreadable(name, folder, error) from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise BundleError(
            f"{name} in {folder} has sha256 {found}, the manifest states {entry.sha256}: it was altered; "
            f"{_copy_again()}"
        )
    return content


def _unreadable(name: str, folder: Path, error: Exception) -> BundleError:
    next_step = _copy_again() if isinstance(error, UnfitFileError) else "check its permissions"
    return BundleError(f"{name} in {folder} cannot be read: {error}; {next_step}")


def check_file_name(name: str) -> None:
    """Raises BundleError unless `name` is a plain path inside the bundle, with forward slashes, on every system."""
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or any(character in name for character in "\\:\0")
        or PurePosixPath(name).is_absolute()
    ):
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


def _check_model(model: ModelEntry) -> None:
    """Sizes and units that a model can have: everything behind this relies on them."""
    problems = [
        f"{name} is {getattr(model, name)}, not from {least} to {most}"
        for name, (least, most) in SIZE_LIMITS.items()
        if not least <= getattr(model, name) <= most
    ]
    ascending = tuple(sorted(set(model.prefixes)))
    if model.prefixes != ascending or not ascending or ascending[0] < 1 or ascending[-1] != model.num_layers:
        problems.append(f"prefixes are {list(model.prefixes)} for {model.num_layers} layers")
    for name in ("action_units", "action_offset"):
        values = getattr(model, name)
        if len(values) != model.action_dim:
            problems.append(f"{name} are {list(values)} for {model.action_dim} dimensions")
    if not all(_LEAST_UNIT <= unit <= _LARGEST_UNIT for unit in model.action_units):
        problems.append(
            f"action_units are {list(model.action_units)}, not all between {_LEAST_UNIT:g} and {_LARGEST_UNIT:g}"
        )
    ranges = list(zip(model.action_offset, model.action_units, strict=False))
    if not all(abs(offset) <= _MOST_OFFSET * unit for offset, unit in ranges):
        problems.append(f"action_offset are {list(model.action_offset)}, where float32 does not tell units apart")
    # The limit becomes a float32, against which float32 actions are held.
    if not all(abs(offset) + unit <= model.action_limit <= _FLOAT32_MAX for offset, unit in ranges):
        problems.append(f"action_limit is {model.action_limit}, not beyond the range of the units and in float32")
    if problems:
        raise BundleError(f"{MANIFEST_NAME} describes no possible model: {'; '.join(problems)}; build the bundle again")


def _check_references(manifest: Manifest) -> None:
    """Whatever the manifest refers to is among its files, and engines were compiled from the graphs they name."""
    named = [GOLDEN_NAME, *(entry.file for entry in manifest.graphs), *(entry.file for entry in manifest.engines)]
    named += [entry.kernel_cache for entry in manifest.engines if entry.kernel_cache]
    unlisted = sorted(set(named) - manifest.files.keys())
    if unlisted:
        raise BundleError(f"{MANIFEST_NAME} refers to {', '.join(unlisted)} but lists no hash for them; build it again")
    model = manifest.model
    parts = [("encoder", model.num_layers), *(("decoder", prefix) for prefix in model.prefixes)]
    wanted = [(*part, form) for part in parts for form in GRAPH_FORMS]
    found = [(entry.role, entry.prefix, entry.form) for entry in manifest.graphs]
    if sorted(found) != sorted(wanted):
        raise BundleError(f"{MANIFEST_NAME} lists the graphs {sorted(found)}; the model needs {sorted(wanted)}")
    for entry in manifest.graphs:
        tensors = graph_tensors(model, entry.role, entry.prefix)
        if (entry.inputs, entry.outputs) != tensors:
            raise BundleError(
                f"{MANIFEST_NAME} states the tensors {entry.inputs} and {entry.outputs} for {entry.file}; the model "
                f"needs {tensors[0]} and {tensors[1]}; build the bundle again"
            )
    for engine in manifest.engines:
        if engine.source not in manifest.files or engine.source_sha256 != manifest.files[engine.source].sha256:
            raise BundleError(
                f"{engine.file} was compiled from {engine.source} with sha256 {engine.source_sha256}, which is not in "
                "this bundle: graph and engine do not belong together; build the bundle again"
            )


def _check_statements(manifest: Manifest) -> None:
    problems = []
    if not re.fullmatch("[0-9a-f]{64}", manifest.fingerprint):
        problems.append(f"the fingerprint is {manifest.fingerprint!r}, not 64 lowercase hexadecimal digits")
    for engine in manifest.engines:
        least, optimum, most = engine.profile
        if not 1 <= least <= optimum <= most:
            problems.append(f"{engine.file} is tuned for batches {list(engine.profile)}, not 1 or more and ascending")
        if engine.backend == "c" and len(engine.targets) != 1:
            problems.append(f"{engine.file} is C for the targets {list(engine.targets)}, not for one")
        measured = (engine.precision == "fp32", engine.device != "")
        if measured != (engine.status == "validated",) * 2:
            problems.append(
                f"{engine.file} is {engine.status!r} with precision {engine.precision!r} on the GPU {engine.device!r}"
            )
        if engine.kernel_cache and not engine.device:
            problems.append(f"{engine.file} has kernels in {engine.kernel_cache}, compiled for no GPU that is named")
    if manifest.quality is not None and not manifest.quality.fidelity.is_possible(
        manifest.model.action_units, manifest.model.action_offset
    ):
        problems.append("the quality is not that of this model's dimensions and units, or no errors can be so")
    if problems:
        raise BundleError(
            f"{MANIFEST_NAME} states what no build that passed its gates writes: {'; '.join(problems)}; build the "
            "bundle again"
        )


def _check_parity(manifest: Manifest) -> None:
    """What the manifest calls proven has passed every gate, and none of them was wider than this project's."""
    model = manifest.model
    problems = []
    gates: dict[tuple[str, str], list[str]] = {}
    for entry in manifest.parity:
        highest = highest_limit(entry.gate, entry.steps, model.latent_dim, model.num_layers)
        if highest is None or entry.steps < 1:
            problems.append(f"{entry.gate!r} of {entry.backend}, over {entry.steps} steps, is no gate")
        elif not 0 <= entry.value <= entry.limit <= highest:
            problems.append(
                f"the gate {entry.gate!r} of {entry.backend} did not pass: {entry.value:g} of {entry.limit:g}, where "
                f"at most {highest:g} may be allowed"
            )
        gates.setdefault((entry.backend, entry.device), []).append(entry.gate)
    # The graphs are run as they are, whatever engines there are beside them.
    proven = {GRAPHS_PROVEN_ON, *((entry.backend, entry.device) for entry in manifest.engines if entry.device)}
    # No build leaves a C engine unproven, and it would run as it is on every processor of its kind.
    proven |= {(entry.backend, entry.targets[0]) for entry in manifest.engines if entry.backend == "c"}
    for backend, device in sorted(proven):
        missing = missing_gates(
            gates.get((backend, device), ()),
            model.prefixes,
            has_stats=model.has_stats,
            refusal=promised_refusal(backend, model.chunk_length),
        )
        if missing:
            problems.append(f"{backend} on {device} lacks the gates {', '.join(missing)}")
    if problems:
        raise BundleError(f"{MANIFEST_NAME} calls proven what is not: {'; '.join(problems)}; build the bundle again")
