"""Demonstrations of the usual formats, opened by what they are: LeRobot, robomimic and LIBERO, numpy."""

from __future__ import annotations

from pathlib import Path

from runtime.dataset_errors import SourceError
from runtime.dataset_hdf5 import HDF5_SUFFIXES, hdf5_files, open_hdf5
from runtime.dataset_lerobot import open_parquet, parquet_files
from runtime.dataset_npz import open_npz
from runtime.dataset_steps import Source, is_hidden

_EXPECTED = (
    "expected .npz, .npy, .hdf5, .h5, .parquet, a folder of HDF5 files, or a LeRobot v2 or v3 folder "
    "(data/chunk-000/*.parquet and meta/)"
)


def open_source(path: str | Path, key: str | None = None) -> Source:
    """Read tables of contents, no actions. key: the action array or column, where its name is not the usual one.

    Raises SourceError.
    """
    # Absolute, since workers elsewhere open it too.
    path = Path(path).absolute()
    try:
        return _open(path, key)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}; check its permissions") from error


def _open(path: Path, key: str | None) -> Source:
    if not path.exists():
        raise SourceError(f"{path} does not exist; {_EXPECTED}")
    suffix = path.suffix.lower()
    if path.is_dir():
        if parquet_files(path):
            return open_parquet(path, key)
        if hdf5_files(path):
            return open_hdf5(path, key)
        names = (file.name for file in path.iterdir())
        listed = ", ".join(sorted(name for name in names if not is_hidden(name))[:10]) or "nothing"
        raise SourceError(f"folder {path} holds {listed}; {_EXPECTED}")
    if suffix == ".parquet":
        return open_parquet(path, key)
    if suffix in HDF5_SUFFIXES:
        return open_hdf5(path, key)
    if suffix in (".npz", ".npy"):
        return open_npz(path, key)
    raise SourceError(f"{path.name} has the suffix {path.suffix!r}; {_EXPECTED}")
