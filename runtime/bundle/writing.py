"""The one way to write files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: What a file system answers that keeps no names to be forced to the disk, as some on networks do.
_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def replacing(path: Path, *, is_synced: bool = False, error: type[Exception] | None = None) -> Iterator[Path]:
    """A temporary sibling to write; it takes the file's place when all went well, and is gone when not.

    The folder is made if missing; until the end the old file stays whole. is_synced: the content is on the disk before
    it takes the name. Raises `error`, with what to do, where the file cannot be written; OSError where it is None.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "new" / "numbers.txt"
    ...     with replacing(path) as temporary:
    ...         _ = temporary.write_text("1 2 3")
    ...     path.read_text()
    '1 2 3'
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if is_synced:
            sync(temporary)
        temporary.replace(path)
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
