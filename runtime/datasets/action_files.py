"""Tokens back to actions in one file, .npz or HDF5: written in slices, renamed when it is whole and verified."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Literal

import numpy as np

from ..bundle.arrays import Float32Array
from ..bundle.writing import sync
from ..tokenizer import ActionTokenizer
from .coding import StepCoder
from .errors import OutputError
from .finish import verify_actions
from .format import SCHEMA_VERSION, Verification
from .job import partial_folder
from .job_folder import discard, locked, output_errors, work_folder
from .progress import Progress
from .sources import open_source
from .steps import optional
from .token_reader import TokenDataset

FileFormat = Literal["npz", "hdf5"]
#: Gives the actions of the steps start … stop - 1 in slices: the first row of each, and float32 [n, A].
_Decoded = Callable[[int, int], Iterator[tuple[int, Float32Array]]]
#: Steps that are decoded before they are written.
_SLICE_STEPS = 65_536
#: The earliest time that a zip file can state. With it, equal content gives equal bytes.
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
    """Write the actions of all steps in physical units, with their episodes. A killed run starts from the beginning."""
    output = output.resolve()
    partial = partial_folder(output)
    write = _write_npz if kind == "npz" else _write_hdf5
    with output_errors(partial), locked(output):
        _refuse_existing(output, overwrite=overwrite)
        if restart:
            discard(partial)
        temporary = work_folder(partial, "decoded") / f"decoded.{kind}"
        coder = StepCoder(tokenizer)
        with closing(dataset.open(dataset.width)) as reader:

            def decoded(start: int, stop: int) -> Iterator[tuple[int, Float32Array]]:
                for row, steps in reader.slices(start, stop, _SLICE_STEPS):
                    yield row, coder.decode(steps.values)
                    progress.add(len(steps))
                    progress.show()

            write(dataset, tokenizer, temporary, decoded)
            progress.finish()
            with closing(open_source(temporary).open(tokenizer.model.action_dim)) as written:
                verification = verify_actions(tokenizer, reader, written, dataset.num_steps)
        sync(temporary)
        # Again: decoding takes a while, and somebody may have written there meanwhile.
        _refuse_existing(output, overwrite=overwrite)
        temporary.replace(output)
        sync(output.parent)
    return verification


def _refuse_existing(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give another name, or --overwrite to replace it once all is verified")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; give the name of a file")


def _write_npz(dataset: TokenDataset, tokenizer: ActionTokenizer, path: Path, decoded: _Decoded) -> None:
    table = dataset.episodes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "actions") as member:
            shape = (dataset.num_steps, tokenizer.model.action_dim)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for _, actions in decoded(0, dataset.num_steps):
                member.write(actions.astype("<f4", copy=False).tobytes())
        for name, values in (
            ("episode_ends", table.starts[1:].astype("<i8")),
            ("episode_numbers", table.numbers.astype("<i8")),
            ("fingerprint", np.array(tokenizer.fingerprint).astype(f"<U{len(tokenizer.fingerprint)}")),
        ):
            with _member(archive, name) as member:
                np.lib.format.write_array(member, values)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME), "w", force_zip64=True)


def _write_hdf5(dataset: TokenDataset, tokenizer: ActionTokenizer, path: Path, decoded: _Decoded) -> None:
    """data/demo_N/actions, N being the episode's number."""
    table = dataset.episodes()
    with _hdf5_errors(), optional("h5py").File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["total"] = dataset.num_steps
        group.attrs["rfsq.fingerprint"] = tokenizer.fingerprint
        group.attrs["rfsq.schema_version"] = SCHEMA_VERSION
        for number, (start, stop) in zip(table.numbers.tolist(), pairwise(table.starts.tolist()), strict=True):
            demonstration = group.create_group(f"demo_{number}")
            demonstration.attrs["num_samples"] = stop - start
            array = demonstration.create_dataset("actions", (stop - start, tokenizer.model.action_dim), "<f4")
            for row, actions in decoded(start, stop):
                array[row - start : row - start + len(actions)] = actions


@contextmanager
def _hdf5_errors() -> Iterator[None]:
    """Raise as an OSError what h5py raises as a RuntimeError when it closes a file on a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
