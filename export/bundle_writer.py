"""Writes a bundle all at once: into a temporary sibling that takes the output's name only when everything is right."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from rfsq.export.errors import ExportError
from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.folder import MANIFEST_SIZE_LIMIT, check_file_name, check_manifest, unlisted_files
from rfsq.runtime.bundle.golden import read_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME, MANIFEST_NAME, FileEntry, Manifest, manifest_text, parse_manifest
from rfsq.runtime.bundle.ownership import Ownership
from rfsq.runtime.bundle.paths import as_path, replacing, sync
from rfsq.runtime.bundle.reading import read_json

# A build works in a hidden folder beside the output, whose lock it holds: a later build can tell what a dead one left.
_STAGED = "staged"
# In there: what tells that it is a build's, the bundle in the making, and the one that it replaces, set aside.
_MARKER, _NEW, _OLD = "owner", "new", "old"
# Linux's own numbers: paths as they are, and both names trade places.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class StagedBundle:
    """A bundle in the making. `folder` can be opened like any bundle once it is sealed.

    is_sealed: whether a manifest describes everything that was written, and that it is proven.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_sealed = False
        self._files: dict[str, FileEntry] = {}

    def content(self, file: str) -> bytes:
        """What was written as `file`."""
        return (self.folder / file).read_bytes()

    def write(self, file: str, content: bytes) -> None:
        """Write `file`, a relative path with forward slashes, once. Raises ExportError where that fails."""
        if file in self._files or file == MANIFEST_NAME:
            raise ExportError(f"{file} was already written to this bundle, or is the manifest; choose another name")
        try:
            check_file_name(file)
        except BundleError as error:
            raise ExportError(str(error)) from error
        self.is_sealed = False
        self._put(file, content)
        self._files[file] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))

    def seal(self, manifest: Manifest, *, is_proven: bool = True) -> Manifest:
        """Write the manifest, its `files` filled in from what was written; again, to replace it.

        is_proven: False before the gates have run; then it opens for them alone, and is not sealed. Returns the
        manifest as written. Raises ExportError where the runtime would refuse it, or the golden vectors with it.
        """
        sealed = replace(manifest, files=dict(self._files))
        try:
            text = manifest_text(sealed)
            check_manifest(parse_manifest(text), is_proven=is_proven)
            if GOLDEN_NAME in self._files:
                read_golden(self.content(GOLDEN_NAME), sealed.model)
        except (ValueError, TypeError, RecursionError, BundleError) as error:
            raise ExportError(f"the bundle cannot be read back: {error}") from error
        self._put(MANIFEST_NAME, text.encode())
        self.is_sealed = is_proven
        return sealed

    def _put(self, file: str, content: bytes) -> None:
        with replacing(self.folder / file, is_synced=True, error=ExportError) as temporary:
            temporary.write_bytes(content)


@contextlib.contextmanager
def stage_bundle(output: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[StagedBundle]:
    """A bundle that appears at `output` when the block ends, sealed and without an exception; else nothing does.

    overwrite: whether a bundle that is there is replaced; never anything but a bundle or an empty folder, and no bundle
    with files that its manifest does not list. Raises ExportError where `output` is taken or cannot be written, and
    where the block ends unsealed.
    """
    output = Path(os.path.abspath(as_path(output, "the output", ExportError)))  # noqa: PTH100 - keeps a link a link; only `..` is taken out
    if not output.name:
        raise ExportError(f"{output} is no place for a bundle; choose a folder in it as --output")
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with _locked(output.parent):
                # First, because it may put back the bundle that is to be checked.
                _remove_stale(output)
                _check_output(output, overwrite)
                workshop = Path(tempfile.mkdtemp(prefix=f".{output.name}.{_STAGED}-", dir=output.parent))
                stack.enter_context(_locked(workshop))
                stack.callback(_clear_up, workshop, output)
                Ownership.begin(workshop / _MARKER)
            # A folder of its own, with the usual permissions: those of a temporary folder are for its owner alone.
            (workshop / _NEW).mkdir()
        except OSError as error:
            raise ExportError(
                f"{output.parent} cannot be written: {error.strerror}; choose another --output"
            ) from error
        staged = StagedBundle(workshop / _NEW)
        yield staged
        if not staged.is_sealed:
            raise ExportError(f"the bundle for {output} was not sealed, so it was not written")
        try:
            with _locked(output.parent):
                # Checked again: a build takes a while, and another one may have finished first.
                _check_output(output, overwrite)
                _publish(workshop, output)
        except OSError as error:
            raise ExportError(f"{output} cannot be written: {error.strerror}; choose another --output") from error


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_symlink():
        raise ExportError(f"{output} is a link; give the folder that it leads to as --output, or remove the link")
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output} is not a folder; choose another --output, or remove it")
    if not os.access(output, os.R_OK | os.X_OK):
        raise ExportError(f"{output} cannot be read; choose another --output, or change its permissions")
    if not any(output.iterdir()):
        return
    listed = _files_of_bundle(output)
    if listed is None:
        raise ExportError(
            f"{output} is not empty and no bundle (it has no {MANIFEST_NAME} of one); choose another --output"
        )
    if not overwrite:
        raise ExportError(f"{output} already holds a bundle; choose another --output, or replace it with --overwrite")
    unlisted = unlisted_files(output, listed)
    if unlisted:
        raise ExportError(
            f"{output} holds files that its {MANIFEST_NAME} does not list: {', '.join(unlisted)}; move them elsewhere, "
            "or choose another --output"
        )


def _files_of_bundle(folder: Path) -> Collection[str] | None:
    """What the manifest lists, of any schema version and however damaged the rest; None where it is not one of ours."""
    try:
        content = read_json(folder / MANIFEST_NAME, MANIFEST_SIZE_LIMIT)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not {"schema_version", "manifest_sha256"} <= content.keys():
        return None
    files = content.get("files")
    return files.keys() if isinstance(files, dict) else ()


def _publish(workshop: Path, output: Path) -> None:
    """Put the new bundle at `output`, and what was there where `_clear_up` finds it."""
    new, old = workshop / _NEW, workshop / _OLD
    for folder, _, _ in os.walk(new):
        sync(Path(folder))
    if not (output.exists() and any(output.iterdir())):
        # Onto nothing or an empty folder, which rename replaces.
        new.rename(output)
    elif not _exchange(new, output):
        output.rename(old)
        new.rename(output)
    sync(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders, where system and file system can: then there is no moment without a bundle."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return renameat2 is not None and renameat2(*names, _RENAME_EXCHANGE) == 0


def _remove_stale(output: Path) -> None:
    """Clear up after builds of the same output that were killed: their marker tells, a name alone does not."""
    # mkdtemp adds eight characters.
    pattern = re.compile(rf"\.{re.escape(output.name)}\.{_STAGED}-[a-z0-9_]{{8}}")
    for path in output.parent.iterdir():
        if not pattern.fullmatch(path.name) or not _is_stale(path):
            continue
        if Ownership.read(path / _MARKER) is not None:
            _clear_up(path, output)
        else:
            # Killed before it had its marker, it is empty; what is not stays.
            with contextlib.suppress(OSError):
                path.rmdir()


def _clear_up(workshop: Path, output: Path) -> None:
    """Remove a build's folder, once a bundle that was set aside without a new one in its place is back there.

    Raises ExportError where it cannot be put back; then it stays where it is.
    """
    old = workshop / _OLD
    try:
        if old.is_dir() and not output.exists():
            old.rename(output)
    except OSError as error:
        raise ExportError(
            f"the bundle that was at {output} is now at {old} and cannot be put back: {error.strerror}; move it there"
        ) from error
    shutil.rmtree(workshop, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the folder's lock and hold it. The system frees it with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system without locks grants it to all, and nothing there is ever taken for stale.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_stale(folder: Path) -> bool:
    """Whether nobody holds its lock: unlike a process number, it means the same in every container."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
