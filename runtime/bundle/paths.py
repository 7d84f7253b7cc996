"""Paths as people give them, the one rule for files that are there already, and the one way to write whole files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InvalidInputError, OutputExistsError

#: What is wrong with a path that the system refuses with ELOOP; `resolve` says it in words of its own, or not at all.
LINKS_IN_A_CIRCLE = "its symbolic links lead in a circle; put in their place what they should lead to"
#: What a file system answers that keeps no names to be forced to the disk, as some on networks do.
_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
#: What `refuse_existing` found free. A file that has appeared there since is another process's, and is not replaced.
_FOUND_FREE: set[Path] = set()


def as_path(path: str | os.PathLike[str], name: str = "path", error: type[Exception] = InvalidInputError) -> Path:
    """`path` with `~` expanded; name: what the caller calls it.

    Raises `error` for anything but text or a path-like object of text, for text that is no path, and for links that
    lead in a circle.
    """
    given = path.__fspath__() if isinstance(path, os.PathLike) else path
    if not isinstance(given, str):
        advice = ": decode it with os.fsdecode" if isinstance(given, bytes) else ""
        raise error(f"{name} is {given!r:.60} ({type(given).__qualname__}); expected a str or a pathlib.Path{advice}")
    if not given or "\0" in given:
        raise error(f"{name} is {given!r:.60}; expected the name of a file or folder, such as 'build/bundle'")
    try:
        os.fsencode(given)
        found = Path(given).expanduser()
        found.stat()
    except UnicodeEncodeError:
        raise error(f"{name} is {given!r:.60}; it has characters that no file name can have here") from None
    except RuntimeError:
        raise error(f"{name} is {given!r:.60}; no such user's home is known here: write the path in full") from None
    except OSError as refusal:
        if refusal.errno == errno.ELOOP:
            raise error(f"{name} is {given!r:.60}; {LINKS_IN_A_CIRCLE}") from None
    return found


def refuse_existing(files: Iterable[Path], *, overwrite: bool, folders: Iterable[Path] = ()) -> None:
    """The rule of every command that writes: what is there stays, unless `--overwrite` is given.

    Called before the work begins, with every file and folder that it will write; makes nothing. `replacing` looks
    again when the work is done, since two commands may have been started with one name. Raises OutputExistsError where
    one is there, and InvalidInputError where one could not be written.
    """
    files, folders = list(files), list(folders)
    for path in files:
        if path.is_dir():
            raise InvalidInputError(f"{path} is a folder, and a file is to be written there; give another name")
    for path in (*files, *folders):
        _refuse_unwritable(path)
    # A link that leads nowhere would be replaced as well.
    found = [] if overwrite else [str(path) for path in (*files, *folders) if os.path.lexists(path)]
    if found:
        verb, them = ("exists", "it") if len(found) == 1 else ("exist", "them")
        raise OutputExistsError(f"{shortlist(found)} {verb}; give another name, or --overwrite to replace {them}")
    free = {path.absolute() for path in files}
    _FOUND_FREE.update(free) if not overwrite else _FOUND_FREE.difference_update(free)


def _refuse_unwritable(path: Path) -> None:
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidInputError(
            f"cannot write {path}: {existing} is no writable folder; choose a writable folder for it"
        )


@contextmanager
def replacing(path: Path, *, is_synced: bool = False, error: type[Exception] | None = None) -> Iterator[Path]:
    """A temporary sibling to write; it takes the file's place when all went well, and is gone when not.

    The folder is made if missing, and goes again with a file that failed; until the end the old file stays whole.
    is_synced: the content is on the disk before it takes the name. Raises `error`, with what to do, where the file
    cannot be written, OSError where it is None; OutputExistsError where `refuse_existing` had found nothing there, and
    now there is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "new" / "numbers.txt"
    ...     with replacing(path) as temporary:
    ...         _ = temporary.write_text("1 2 3")
    ...     path.read_text()
    '1 2 3'
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if is_synced:
            sync(temporary)
        _publish(temporary, path)
        made = []
    except OSError as refusal:
        if error is None:
            raise
        raise error(
            f"cannot write {path}: {refusal.strerror or refusal}; choose a writable folder, or make room"
        ) from refusal
    finally:
        # Where the folder itself is the trouble, looking for the file fails as well.
        with suppress(OSError):
            temporary.unlink()
        with suppress(OSError):
            # Up to the first that somebody has written into.
            for folder in made:
                folder.rmdir()


def _publish(temporary: Path, path: Path) -> None:
    """Raises OutputExistsError, OSError."""
    if path.absolute() not in _FOUND_FREE:
        temporary.replace(path)
        return
    try:
        # Unlike a rename, it replaces nothing.
        path.hardlink_to(temporary)
    except OSError as refusal:
        # Where the file system has no links, there is a moment between looking and renaming.
        if isinstance(refusal, FileExistsError) or os.path.lexists(path):
            raise OutputExistsError(
                f"{path} was written by another process meanwhile, and is kept; what was made here is not: give "
                "another name, or --overwrite to replace it"
            ) from None
        temporary.replace(path)
    _FOUND_FREE.discard(path.absolute())


def sync(path: Path) -> None:
    """Force a file's content, or a folder's names, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Such as `1 episode` and `22,016 steps`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def shortlist(names: Iterable[object], most: int = 6) -> str:
    """The first few names, and how many more there are: a refusal must stay readable."""
    listed = [str(name) for name in names]
    more = len(listed) - most
    # Naming one more takes no more room than counting it.
    return ", ".join(listed) if more <= 1 else f"{', '.join(listed[:most])} and {more} more"


def shown(value: object, most: int = 200) -> str:
    """A value of a file as it stands in a message: of a long one the beginning."""
    try:
        text = repr(value)
    except ValueError:
        # Python spells no integer of more than 4,300 digits.
        return f"a value of type {type(value).__name__} with thousands of digits"
    return text if len(text) <= most else f"{text[:most]}…"
