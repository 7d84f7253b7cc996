"""Tokens back to actions in one file, .npz or HDF5: written in slices, renamed when it is whole and verified."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ..bundle.writing import sync
from ..tokenizer import ActionTokenizer
from .coding import StepCoder
from .errors import OutputError
from .finish import verify_actions
from .format import SCHEMA_VERSION, Verification
from .job import partial_folder
from .partial import discard, locked, output_errors, work_folder
from .progress import Progress
from .reader import TokenDataset
from .sources import open_source
from .steps import AnyArray, Int64Array, optional

FileFormat = Literal["npz", "hdf5"]
#: Steps that are decoded before they are written.
_SLICE_STEPS = 65_536
#: The earliest time that a zip file can state: equal content, equal bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def write_file(
    dataset: TokenDataset,
    tokenizer: ActionTokenizer,
    output: Path,
    kind: FileFormat,
    progress: Progress,
    *,
    overwrite: bool,
    restart: bool,
) -> Verification:
    """Actions of all steps in physical units, with their episodes. A killed run is begun again from the start."""
    output = output.resolve()
    partial = partial_folder(output)
    write = _write_npz if kind == "npz" else _write_hdf5
    with output_errors(partial), locked(output):
        _refuse_existing(output, overwrite=overwrite)
        if restart:
            discard(partial)
        temporary = work_folder(partial, "decoded") / f"decoded.{kind}"
        write(dataset, tokenizer, temporary, progress)
        progress.finish()
        verification = _verify(dataset, tokenizer, temporary)
        sync(temporary)
        # Again: it takes a while, and another one may have come to be there.
        _refuse_existing(output, overwrite=overwrite)
        temporary.replace(output)
        sync(output.parent)
    return verification


def _refuse_existing(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give another name, or --overwrite to replace it once all is verified")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; give the name of a file")


def _verify(dataset: TokenDataset, tokenizer: ActionTokenizer, path: Path) -> Verification:
    written = open_source(path).open(tokenizer.model.action_dim)
    with closing(dataset.open(dataset.width)) as source, closing(written):
        return verify_actions(tokenizer, source, written, dataset.num_steps)


def _slices(dataset: TokenDataset, tokenizer: ActionTokenizer, progress: Progress) -> Iterator[tuple[int, AnyArray]]:
    coder = StepCoder(tokenizer)
    with closing(dataset.open(dataset.width)) as reader:
        for start, steps in reader.slices(0, dataset.num_steps, _SLICE_STEPS):
            yield start, coder.decode(steps.values)
            progress.add(len(steps))
            progress.show()


def _write_npz(dataset: TokenDataset, tokenizer: ActionTokenizer, path: Path, progress: Progress) -> None:
    table = dataset.episodes()
    shape = (dataset.num_steps, tokenizer.model.action_dim)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "actions", shape, "<f4") as member:
            for _, actions in _slices(dataset, tokenizer, progress):
                member.write(actions.astype("<f4", copy=False).tobytes())
        for name, values in (("episode_ends", table.starts[1:]), ("episode_numbers", table.numbers)):
            with _member(archive, name, values.shape, "<i8") as member:
                member.write(values.astype("<i8").tobytes())
        with _member(archive, "fingerprint", (), f"<U{len(tokenizer.fingerprint)}") as member:
            member.write(np.array(tokenizer.fingerprint).astype(f"<U{len(tokenizer.fingerprint)}").tobytes())


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> Iterator[IO[bytes]]:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME), "w", force_zip64=True) as member:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def _write_hdf5(dataset: TokenDataset, tokenizer: ActionTokenizer, path: Path, progress: Progress) -> None:
    """data/demo_N/actions, N being the episode's number."""
    table, h5py = dataset.episodes(), optional("h5py")
    with _hdf5_errors(), h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["total"] = dataset.num_steps
        group.attrs["rfsq.fingerprint"] = tokenizer.fingerprint
        group.attrs["rfsq.schema_version"] = SCHEMA_VERSION
        demonstrations = _Demonstrations(group.create_group, table.starts, table.numbers, tokenizer.model.action_dim)
        for start, actions in _slices(dataset, tokenizer, progress):
            demonstrations.write(start, actions)


@contextmanager
def _hdf5_errors() -> Iterator[None]:
    """What a full disk refuses when the file is closed, h5py raises as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


class _Demonstrations:
    """Actions in the order of the steps, cut into episodes; `create_group` is h5py's."""

    def __init__(self, create_group: Callable[[str], Any], starts: Int64Array, numbers: Int64Array, width: int) -> None:
        self._create, self._starts, self._numbers, self._width = create_group, starts, numbers, width
        self._episode = -1
        self._dataset: Any = None

    def write(self, start: int, actions: AnyArray) -> None:
        row, stop = start, start + len(actions)
        while row < stop:
            episode = int(np.searchsorted(self._starts, row, side="right")) - 1
            first, end = int(self._starts[episode]), int(self._starts[episode + 1])
            if episode != self._episode:
                group = self._create(f"demo_{self._numbers[episode]}")
                group.attrs["num_samples"] = end - first
                self._dataset = group.create_dataset("actions", (end - first, self._width), "<f4")
                self._episode = episode
            upto = min(stop, end)
            self._dataset[row - first : upto - first] = actions[row - start : upto - start]
            row = upto
