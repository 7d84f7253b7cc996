"""Opens demonstrations of any format: LeRobot, robomimic and LIBERO, numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from ..bundle.paths import as_path, shortlist
from .errors import SourceError
from .hdf5 import HDF5_SUFFIXES, hdf5_files, open_hdf5
from .lerobot import open_parquet, parquet_files
from .npz import open_npz
from .source_base import Source, is_hidden, unreadable

_EXPECTED = (
    "expected .npz, .npy, .hdf5, .h5, .parquet, a folder of HDF5 files, or a LeRobot v2 or v3 folder "
    "(data/chunk-000/*.parquet and meta/)"
)
#: Of .csv and all else that is not read: which columns are actions, and where episodes end, only its owner knows.
_CONVERTED = (
    "of anything else make a .npz with an array [steps, A] for each episode, of a .csv with one line of names by "
    "np.savez('episodes.npz', demo_0=np.loadtxt('FILE.csv', delimiter=',', skiprows=1))"
)

#: Opens a file by its path and the name of its action array.
Opener = Callable[[Path, str | None], Source]
_OPENERS: dict[str, Opener] = {
    ".parquet": open_parquet,
    ".npz": open_npz,
    ".npy": open_npz,
    **dict.fromkeys(HDF5_SUFFIXES, open_hdf5),
}


def open_source(
    path: str | os.PathLike[str],
    key: str | None = None,
    filter_key: str | None = None,
    more: Mapping[str, Opener] = MappingProxyType({}),
) -> Source:
    """Open a file or folder of demonstrations. Tables of contents are read, no actions.

    key: the action array or column, where its name is not the usual one; filter_key: of robomimic's HDF5 files, to take
    only the episodes that it lists; more: openers of other files, by their suffixes. Raises SourceError.

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
    for option, given in (("--key (key=)", key), ("--filter-key (filter_key=)", filter_key)):
        if given == "":
            raise SourceError(f"{option} is empty; expected a name: give one, or leave it out")
    try:
        opener = _opener(path, {**_OPENERS, **more}, filter_key)
        return opener(path, key) if filter_key is None else open_hdf5(path, key, filter_key)
    except OSError as error:
        raise unreadable(str(path), error) from error


def _opener(path: Path, openers: Mapping[str, Opener], filter_key: str | None) -> Opener:
    if not path.exists():
        raise SourceError(f"{path} does not exist; {_EXPECTED}")
    if path.is_dir():
        names = (file.name for file in path.iterdir())
        found = f"folder {path} holds {shortlist(sorted(name for name in names if not is_hidden(name))) or 'nothing'}"
        holds: list[Opener] = [open_parquet] * bool(parquet_files(path)) + [open_hdf5] * bool(hdf5_files(path))
        if len(holds) > 1:
            raise SourceError(f"{found}, both LeRobot's data and HDF5 files; expected one of them: put them apart")
        opener, hint = next(iter(holds), None), f"folder {path.name} holds no HDF5 files"
    else:
        found = f"{path.name} has the suffix {path.suffix!r}"
        opener, hint = openers.get(path.suffix.lower()), f"{path.name} is no HDF5 file"
    if filter_key is not None and opener is not open_hdf5:
        raise SourceError(f"{hint}, and has no filter keys; leave --filter-key (filter_key=) out")
    if opener is None:
        raise SourceError(f"{found}; {_EXPECTED}; {_CONVERTED}")
    return opener
