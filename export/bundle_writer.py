"""Writes a bundle all at once: into a temporary sibling that takes the output's name only when everything is right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from export.errors import ExportError
from runtime.bundle import check_file_name
from runtime.errors import BundleError
from runtime.golden import Golden, read_golden, write_golden
from runtime.manifest import GOLDEN_NAME, MANIFEST_NAME, FileEntry, Manifest, manifest_text, parse_manifest

# Hidden, beside the output, named after the process: a later build can tell what a dead one left behind.
_STAGED, _REPLACED = "staged", "replaced"


class StagedBundle:
    """A bundle in the making. `folder` can be opened like any bundle once it is sealed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, FileEntry] = {}
        self._golden: bytes | None = None
        self._is_sealed = False

    @property
    def is_sealed(self) -> bool:
        """Whether a manifest describes everything that was written."""
        return self._is_sealed

    def write(self, file: str, content: bytes) -> None:
        """Write `file`, a relative path with forward slashes, once. Raises ExportError where that fails."""
        if file in self._files or file == MANIFEST_NAME:
            raise ExportError(f"{file} was already written to this bundle, or is the manifest; choose another name")
        try:
            check_file_name(file)
        except BundleError as error:
            raise ExportError(str(error)) from error
        self._is_sealed = False
        _write_synced(self.folder / file, content)
        self._files[file] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))

    def write_golden(self, golden: Golden) -> None:
        """Write the golden vectors under the name that the runtime reads."""
        content = write_golden(golden)
        self.write(GOLDEN_NAME, content)
        self._golden = content

    def seal(self, manifest: Manifest) -> Manifest:
        """Write the manifest, its `files` filled in from what was written; again, to replace it.

        Returns the manifest as written. Raises ExportError where the runtime would not read it, or not the golden
        vectors with it.
        """
        sealed = replace(manifest, files=dict(self._files))
        try:
            text = manifest_text(sealed)
            parse_manifest(text)
            if self._golden is not None:
                read_golden(self._golden, sealed.model)
        except (ValueError, TypeError, BundleError) as error:
            raise ExportError(f"the bundle cannot be read back: {error}") from error
        _write_synced(self.folder / MANIFEST_NAME, text.encode())
        self._is_sealed = True
        return sealed


@contextlib.contextmanager
def stage_bundle(output: str | Path, *, overwrite: bool = False) -> Iterator[StagedBundle]:
    """A bundle that appears at `output` when the block ends, sealed and without an exception; else nothing does.

    overwrite: whether a bundle that is there is replaced; never anything but a bundle or an empty folder.
    Raises ExportError where `output` is taken or cannot be written, and where the block ends unsealed.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - keeps a link a link; only `..` is taken out
    staged_folder = _sibling(output, _STAGED)
    try:
        _check_output(output, overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(output)
        staged_folder.mkdir()
    except OSError as error:
        raise ExportError(f"{output.parent} cannot be written: {error.strerror}; choose another --output") from error
    try:
        staged = StagedBundle(staged_folder)
        yield staged
        if not staged.is_sealed:
            raise ExportError(f"the bundle for {output} was not sealed, so it was not written")
        # Checked again: a build takes a while, and another one may have finished first.
        _check_output(output, overwrite)
        _publish(staged_folder, output)
    finally:
        # After publishing there is nothing at this name; before, the bundle is not to be seen by anyone.
        shutil.rmtree(staged_folder, ignore_errors=True)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ExportError(f"{output} is not a folder; choose another --output, or remove it")
    if not output.exists():
        return
    if not os.access(output, os.R_OK | os.X_OK):
        raise ExportError(f"{output} cannot be read; choose another --output, or change its permissions")
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise ExportError(f"{output} is not empty and no bundle (it has no {MANIFEST_NAME}); choose another --output")
    if not overwrite:
        raise ExportError(f"{output} already holds a bundle; choose another --output, or replace it with --overwrite")


def _publish(staged: Path, output: Path) -> None:
    """Rename onto `output`. A bundle that was there is set aside first, and put back where the rename fails."""
    for folder, _, _ in os.walk(staged):
        _sync_folder(Path(folder))
    replaced = _sibling(output, _REPLACED)
    try:
        if output.exists() and any(output.iterdir()):
            output.rename(replaced)
        try:
            # Onto nothing or an empty folder, which rename replaces.
            staged.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    _sync_folder(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_stale(output: Path) -> None:
    """Clear up after builds of the same output whose process is gone.

    A bundle that such a build had set aside, without putting the new one in place, is put back.
    """
    pattern = re.compile(rf"\.{re.escape(output.name)}\.({_STAGED}|{_REPLACED})-(\d+)")
    for path in output.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or _is_alive(int(match[2])):
            continue
        if match[1] == _REPLACED and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sibling(output: Path, purpose: str) -> Path:
    return output.with_name(f".{output.name}.{purpose}-{os.getpid()}")


def _is_alive(pid: int) -> bool:
    # Left behind under our own number: by the same process in an earlier life of its container.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        # Not permitted to signal it: it exists and is someone else's.
        return error.errno == errno.EPERM
    return True


def _write_synced(path: Path, content: bytes) -> None:
    """Write and flush to the disk, through a temporary name: a reader sees the whole file or none."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror}; make room or choose another --output"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
