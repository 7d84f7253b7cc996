"""Opens demonstrations of any format: LeRobot, robomimic and LIBERO, numpy."""

from __future__ import annotations

import os
from pathlib import Path

from ..bundle.paths import as_path, shortlist
from .errors import SourceError
from .hdf5 import HDF5_SUFFIXES, hdf5_files, open_hdf5
from .lerobot import open_parquet, parquet_files
from .npz import open_npz
from .source_base import Source
from .steps import is_hidden

_EXPECTED = (
    "expected .npz, .npy, .hdf5, .h5, .parquet, a folder of HDF5 files, or a LeRobot v2 or v3 folder "
    "(data/chunk-000/*.parquet and meta/)"
)


def open_source(path: str | os.PathLike[str], key: str | None = None, filter_key: str | None = None) -> Source:
    """Open a file or folder of demonstrations. Tables of contents are read, no actions.

    key: the action array or column, where its name is not the usual one; filter_key: of robomimic's HDF5 files, to take
    only the episodes that it lists. Raises SourceError.

    >>> import tempfile, numpy
    >>> path = Path(tempfile.mkdtemp()) / "demonstrations.npz"
    >>> numpy.savez(path, actions=numpy.zeros((50, 7)), episode_ends=[20, 50])
    >>> source = open_source(path)
    >>> source.num_steps, source.width
    (50, 7)
    >>> source.open(width=7).read(19, 22).episode.tolist()
    [0, 1, 1]
    """
    # Absolute, since workers with another working directory open it too.
    path = as_path(path, "the data", SourceError).absolute()
    try:
        return _open(path, key, filter_key)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}; check its permissions") from error


def _open(path: Path, key: str | None, filter_key: str | None) -> Source:
    if not path.exists():
        raise SourceError(f"{path} does not exist; {_EXPECTED}")
    suffix = path.suffix.lower()
    if filter_key and suffix not in HDF5_SUFFIXES and not path.is_dir():
        raise SourceError(f"{path.name} is no HDF5 file, and has no filter keys; leave --filter-key (filter_key=) out")
    if path.is_dir():
        if parquet_files(path) and not filter_key:
            return open_parquet(path, key)
        if hdf5_files(path):
            return open_hdf5(path, key, filter_key)
        if filter_key:
            raise SourceError(
                f"folder {path.name} holds no HDF5 files, and has no filter keys; leave --filter-key (filter_key=) out"
            )
        names = (file.name for file in path.iterdir())
        listed = shortlist(sorted(name for name in names if not is_hidden(name))) or "nothing"
        raise SourceError(f"folder {path} holds {listed}; {_EXPECTED}")
    if suffix == ".parquet":
        return open_parquet(path, key)
    if suffix in HDF5_SUFFIXES:
        return open_hdf5(path, key, filter_key)
    if suffix in (".npz", ".npy"):
        return open_npz(path, key)
    raise SourceError(f"{path.name} has the suffix {path.suffix!r}; {_EXPECTED}")
