"""What an HDF5 file holds itself: its library also opens other files, and gives zeros for missing data."""

from __future__ import annotations

import math
from typing import Any

from .errors import SourceError
from .source_base import optional

_MOST_LINKS = 15
_ONE_FILE = (
    "expected all in this file, since it alone is checked and recorded: where nothing is missing, copy all into a new "
    "one with h5py (new[PLACE] = old[PLACE][()])"
)


def follow(group: Any, path: str, name: str, most: int = _MOST_LINKS) -> Any:
    """The object at this path from a group, None where there is none; nothing outside of the file is opened.

    name: of the file, for messages; most: how many links may be followed. Raises SourceError for a link to another
    file, and for one that leads nowhere.
    """
    h5py = optional("h5py")
    found = group
    for place in filter(lambda part: part not in ("", "."), path.split("/")):
        if not isinstance(found, h5py.Group):
            return None
        # The same as `get(place, getlink=True)`, but faster.
        links, encoded = found.id.links, place.encode("utf-8", "surrogateescape")
        if not links.exists(encoded):
            return None
        if links.get_info(encoded).type == h5py.h5l.TYPE_HARD:
            found = found[place]
            continue
        target = found.get(place, getlink=True)
        link = f"{name}, {found.name.rstrip('/')}/{place} is a link to {target.path!r}".replace(", /", ", ")
        if isinstance(target, h5py.ExternalLink):
            raise SourceError(f"{link} in another file, {target.filename!r}; {_ONE_FILE}")
        if not most:
            raise SourceError(f"{link}, and so on without an end; expected an array or a group: write the file anew")
        found = follow(found.file["/"] if target.path.startswith("/") else found, target.path, name, most - 1)
        if found is None:
            raise SourceError(f"{link}, which is not in the file; expected what it leads to: write the file anew")
    return found


def require_stored(array: Any, where: str) -> None:
    """Raises SourceError for an array whose numbers are not all in this file: HDF5 would give zeros for them."""
    if array.shape is None:
        raise SourceError(f"{where} is empty and has no shape; expected an array: remove it, or write the file anew")
    settings = array.id.get_create_plist()
    if settings.get_external_count() or array.is_virtual:
        sources = array.virtual_sources() if array.is_virtual else array.external
        names = sorted({source.file_name if array.is_virtual else str(source[0]) for source in sources})
        raise SourceError(f"{where} has its numbers elsewhere, in {', '.join(names)}; {_ONE_FILE}")
    if not array.size:
        return
    if array.chunks is None:
        missing = not array.id.get_storage_size()
    else:
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
        missing = array.id.get_num_chunks() < chunks
    if missing:
        raise SourceError(
            f"{where} has room for {list(array.shape)}, but not all was written; expected every step: the recording "
            "was not finished, remove this episode or record it again"
        )
