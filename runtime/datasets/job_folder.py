"""The folder of a job in progress: who works there, what is done, and how it becomes the output.

Everything lies in `OUT.partial`: `lock`, which also marks the folder as ours, `job.json` (what the job is), and in a
folder of the job's own `scratch/` (files being written), `done/` (one record for each finished part) and `data/`, which
becomes OUT by a rename when all of it is verified and on the disk. So a worker that outlives its killed job spoils no
other: it writes into the folder of its own job, and nothing but the bytes that belong there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..bundle.errors import TokenizerError
from ..bundle.ownership import Ownership
from ..bundle.paths import sync
from .errors import OutputError, VerificationError
from .format import INFO_NAME, DatasetInfo, read_info, spelled
from .job import LOCK_NAME, Job, ownership_of, partial_folder
from .source_base import is_hidden
from .writers import put

_IDENTITY_NAME = "job.json"
#: A job that ends removes the folder, maybe while this one locks it. More often than this, the place is at fault.
_LOCK_ATTEMPTS = 20
#: What file managers and network file systems leave beside the files of a dataset.
_WORTHLESS = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")


# The lock -------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Let no other process work at this output. The lock ends with the process, however it ends.

    Raises OutputError where the folder holds what was not written here. The folder is removed at the end where nothing
    was begun in it.
    """
    partial = partial_folder(output)
    descriptor = _lock(partial)
    try:
        _claim(partial)
        _put_back(output, partial)
        try:
            yield
        finally:
            # A folder that cannot be removed must not hide why the work ended.
            with suppress(OSError):
                if not (partial / _IDENTITY_NAME).exists():
                    _take_away(partial)
    finally:
        os.close(descriptor)


def _lock(partial: Path) -> int:
    """The descriptor of the lock. Raises OutputError, OSError."""
    if partial.is_symlink():
        raise OutputError(f"{partial} is a link; remove it, since the work must be done on the file system of --output")
    failure: OSError | None = None
    for _ in range(_LOCK_ATTEMPTS):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if LOCK_NAME not in (entries := _entries(partial)):
                _refuse_foreign(partial, entries)
            descriptor = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            with ExitStack() as stack:
                stack.callback(os.close, descriptor)
                if _hold(descriptor, partial):
                    stack.pop_all()
                    return descriptor
        except (FileNotFoundError, FileExistsError) as error:
            # The job that held the lock may just have ended and removed the folder.
            failure = error
    raise failure or FileNotFoundError(f"{partial} is taken away again and again")


def _hold(descriptor: int, partial: Path) -> bool:
    """Lock it; whether it is still the file that lies there.

    Raises OutputError where another process holds it, FileNotFoundError where none lies there.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{partial} is in use: another process is making the same output; wait for it") from None
    except OSError as error:
        raise OutputError(
            f"{partial} cannot be locked: {error}; its file system must offer locks (flock): give an --output elsewhere"
        ) from error
    return os.path.samestat((partial / LOCK_NAME).stat(), os.fstat(descriptor))


def _claim(partial: Path) -> None:
    """Mark an empty folder as ours. Raises OutputError where it holds anything that its marker does not name."""
    lock, entries = partial / LOCK_NAME, _entries(partial)
    ownership = Ownership.read(lock)
    if ownership is not None:
        known = (LOCK_NAME, _IDENTITY_NAME)
        _refuse_foreign(partial, [name for name in entries if name not in known and not ownership.owns(name)])
    elif entries == [LOCK_NAME] and Ownership.is_unfinished(lock):
        Ownership.begin(lock)
    else:
        _refuse_foreign(partial, entries)


def _refuse_foreign(partial: Path, foreign: list[str]) -> None:
    if foreign:
        raise OutputError(
            f"{partial} is where the work is done, but it holds {', '.join(foreign[:5])}, which was not written here; "
            "move it elsewhere, or give another --output"
        )


def _entries(partial: Path) -> list[str]:
    return sorted(path.name for path in partial.iterdir() if not is_hidden(path.name))


def _own_folders(partial: Path) -> list[Path]:
    ownership = ownership_of(partial)
    return [path for path in partial.iterdir() if ownership.owns(path.name)]


def _put_back(output: Path, partial: Path) -> None:
    """Restore the output that a run had set aside when it was killed between the two renames of finish()."""
    for folder in _own_folders(partial):
        if (folder / "replaced").exists() and not os.path.lexists(output):
            (folder / "replaced").rename(output)


# Beginning ------------------------------------------------------------------------------------------------------------


def begin(job: Job, *, overwrite: bool, restart: bool) -> tuple[bool, str]:
    """Lay the folder out, or find what an earlier run of the same job has finished.

    Returns whether the source may have changed since that run, and why its work was discarded, "" where it was not.
    Raises OutputError where the output exists, or another job was begun in its place.
    """
    if job.output.exists():
        _refuse_existing(job, overwrite=overwrite)
    earlier, replaced = None, ""
    if not restart and (job.partial / _IDENTITY_NAME).is_file():
        earlier = _read_identity(job.partial)
        different = _differences(job, earlier)
        why = f"was refused ({earlier['refused']})" if earlier["refused"] else "had finished no part"
        if different and not earlier["refused"] and any(job.partial.glob("*/done/*.json")):
            raise OutputError(
                f"{job.partial} holds the beginning of another job, which differs in {different}; go on with what it "
                "was begun with, or discard it with --restart"
            )
        if different:
            replaced, earlier = f"an earlier run {why}", None
    if earlier is None:
        discard(job.partial)
    # A worker of an earlier run that still writes does no harm: the folder of its files is gone.
    _remove(job.scratch)
    for folder in (job.data, job.scratch, job.work / "done"):
        folder.mkdir(parents=True, exist_ok=True)
    stamps = job.stamps if earlier is None else earlier["stamps"]
    if earlier is None or earlier["refused"]:
        _write_identity(job, stamps, "")
    return stamps != job.stamps, replaced


def discard(partial: Path) -> None:
    """Remove the work. `job.json` goes first: after a kill in between, nothing of the rest is used. Raises OSError."""
    (partial / _IDENTITY_NAME).unlink(missing_ok=True)
    for folder in _own_folders(partial):
        _remove(folder)


def work_folder(partial: Path, what: str) -> Path:
    """A folder for work that is no job of parts. Raises OutputError where a job was begun here."""
    if (partial / _IDENTITY_NAME).exists():
        raise OutputError(
            f"{partial} holds the beginning of another job; go on with that, or discard it with --restart"
        )
    folder = partial / ownership_of(partial).name(what)
    folder.mkdir(exist_ok=True)
    return folder


def give_up(job: Job, error: TokenizerError) -> None:
    """After a refusal, leave nothing that would stand in the way of the corrected command.

    Finished parts stay, since the same command may use them (a file server was away for a moment). The job is marked as
    refused, so that another job may replace it without --restart.
    """
    # The refusal must be seen. Where this fails, the next run says what to do.
    with suppress(OSError, OutputError):
        if isinstance(error, VerificationError) or not any((job.work / "done").iterdir()):
            discard(job.partial)
        elif not isinstance(error, OutputError):
            _write_identity(job, _read_identity(job.partial)["stamps"], str(error))


def _write_identity(job: Job, stamps: list[list[int]], refused: str) -> None:
    content = {"identity": job.identity(), "stamps": stamps, "refused": refused}
    put(spelled(content), job.partial, _IDENTITY_NAME, job.scratch)


def _read_identity(partial: Path) -> dict[str, Any]:
    path = partial / _IDENTITY_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        if {name: type(value) for name, value in found.items()} != {"identity": dict, "stamps": list, "refused": str}:
            raise ValueError(f"it holds {', '.join(found) or 'nothing'}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise OutputError(f"{path} is damaged: {error}; discard what was begun with --restart") from error
    return found


def _differences(job: Job, earlier: dict[str, Any]) -> str:
    expected, found = json.loads(spelled(job.identity())), earlier["identity"]
    different = [name for name, value in expected.items() if found.get(name) != value]
    details = "; ".join(f"{name}: {_short(found.get(name))}, now {_short(expected[name])}" for name in different)
    return f"{', '.join(different)} ({details})" if different else ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:120]}… (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


# The end --------------------------------------------------------------------------------------------------------------


def finish(job: Job, *, overwrite: bool) -> None:
    """Put the data in place. A job that is killed between any two of these lines ends the same when it is run again."""
    # The output is complete or not there, even after a power cut. Parts are not synced one by one, which would be slow:
    # their hashes show whether they are whole.
    for path in (*job.data.rglob("*"), job.data):
        sync(path)
    if job.output.exists():
        _refuse_existing(job, overwrite=overwrite)
        _remove(job.work / "replaced")
        job.output.rename(job.work / "replaced")
    job.data.rename(job.output)
    sync(job.output.parent)
    _clean_up(job.partial)


def was_finished(job: Job) -> DatasetInfo | None:
    """What an earlier run of this job made that was killed when only cleaning up was left; that is done here."""
    identity = job.partial / _IDENTITY_NAME
    if not (job.output.is_dir() and identity.is_file()):
        return None
    if any((folder / "data").exists() for folder in _own_folders(job.partial)):
        return None
    is_same, begun = not _differences(job, _read_identity(job.partial)), identity.stat().st_mtime_ns
    _clean_up(job.partial)
    if not is_same:
        return None
    info, is_newer = read_info(job.output), (job.output / INFO_NAME).stat().st_mtime_ns >= begun
    # What was begun may have been cleared away by hand: then an older dataset lies there, or another one.
    found, made = (info.facts(), info.num_rows, info.source.name), (job.facts(), job.source.num_steps, job.source.name)
    return info if is_newer and found == made else None


def _clean_up(partial: Path) -> None:
    """Remove the work. `job.json` goes last: after a kill in between, the next run knows that the job was finished."""
    # The output is in its place. What cannot be removed is no failure; the next run tries again.
    with suppress(OSError):
        for folder in _own_folders(partial):
            _remove(folder)
        (partial / _IDENTITY_NAME).unlink()


def _take_away(partial: Path) -> None:
    """Remove the folder, but nothing that was not written here. The lock goes last: it tells whose the rest is."""
    for folder in _own_folders(partial):
        _remove(folder)
    (partial / LOCK_NAME).unlink()
    partial.rmdir()


def _remove(folder: Path) -> None:
    """Remove a folder with all it holds. Raises OSError where something is left."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        # Somebody wrote into it meanwhile. If not, this raises the reason.
        shutil.rmtree(folder)


def _refuse_existing(job: Job, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{job.output} exists; give another name, or --overwrite to replace it once all is verified")
    written = _written_files(job.output)
    if not written:
        raise OutputError(
            f"{job.output} is not a dataset that was written here: it has no {INFO_NAME} that lists its files; give "
            "another name, or remove it yourself"
        )
    found = (path for path in job.output.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(job.output).as_posix() for path in found if not _WORTHLESS.fullmatch(path.name)}
    if foreign := sorted(names - written):
        raise OutputError(
            f"{job.output} also holds {', '.join(foreign[:5])}, which {INFO_NAME} does not list and which would be "
            "lost; move it elsewhere, or give another name"
        )


def _written_files(folder: Path) -> set[str]:
    """The files that `dataset.json` lists, itself included, of any schema version; none where it is not one of ours."""
    try:
        content = json.loads((folder / INFO_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return set()
    is_ours = isinstance(content, dict) and "dataset_sha256" in content and isinstance(content.get("files"), dict)
    return {INFO_NAME, *content["files"]} if is_ours else set()


@contextmanager
def output_errors(partial: Path) -> Iterator[None]:
    """Raise as an OutputError what the file system refuses."""
    try:
        yield
    except TokenizerError:
        raise
    except OSError as error:
        raise OutputError(
            f"{partial} cannot be written: {error}; make room or choose another place, and run the command again "
            "to go on"
        ) from error
