"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write; it takes the file's place when all went well, and is gone when not.

    The folder is made if missing; until the end the old file stays whole. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    finally:
        # Where the folder itself is the trouble, looking for the file fails as well.
        with suppress(OSError):
            temporary.unlink()
