"""Tokens back to actions in one file, .npz or HDF5: written in slices, renamed when it is whole and verified."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from ..bundle.arrays import Float32Array
from ..bundle.paths import sync
from ..tokenizer import ActionTokenizer
from .chunks import ChunkSteps
from .coding import coder_of
from .errors import OutputError
from .finish import verify_actions
from .format import Verification
from .job import partial_folder
from .job_folder import discard, locked, output_errors, work_folder
from .progress import Progress
from .source_base import optional
from .sources import open_source
from .token_reader import TokenDataset

#: The actions of all steps in slices: the first row of each, and float32 [n, A].
_Decoded = Iterable[tuple[int, Float32Array]]
#: Steps that are decoded before they are written.
_SLICE_STEPS = 65_536
#: The earliest time that a zip file can state. With it, equal content gives equal bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def write_file(
    dataset: TokenDataset | ChunkSteps,
    tokenizer: ActionTokenizer,
    kind: str,
    options: argparse.Namespace,
    progress: Progress,
) -> Verification:
    """Write the actions of all steps in physical units, with their episodes. A killed run starts from the beginning.

    kind: npz or hdf5; options: of the command `tokenize`.
    """
    output = options.output.resolve()
    partial = partial_folder(output)
    write = _write_npz if kind == "npz" else _write_hdf5
    with output_errors(partial), locked(output):
        _refuse_existing(output, kind, overwrite=options.overwrite)
        if options.restart:
            discard(partial)
        temporary = work_folder(partial, "decoded") / f"decoded.{kind}"
        coder = coder_of(tokenizer, dataset.info.model)
        with closing(dataset.open(dataset.width)) as reader:

            def decoded() -> Iterator[tuple[int, Float32Array]]:
                for row, steps in reader.slices(0, dataset.num_steps, _SLICE_STEPS):
                    yield row, coder.decode(steps.values)
                    progress.add(len(steps))
                    progress.show()

            write(dataset, tokenizer, temporary, decoded())
            progress.finish()
            with closing(open_source(temporary).open(tokenizer.model.action_dim)) as written:
                verification = verify_actions(tokenizer, reader, written, dataset.num_steps)
        sync(temporary)
        # Again: decoding takes a while, and somebody may have written there meanwhile.
        _refuse_existing(output, kind, overwrite=options.overwrite)
        temporary.replace(output)
        sync(output.parent)
    return verification


def _refuse_existing(output: Path, kind: str, *, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give another name, or --overwrite to replace it once all is verified")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; give the name of a file")
    if output.exists() and not (output.is_file() and _was_written_here(output, kind)):
        raise OutputError(f"{output} was not written here; give another name, or remove it yourself")


def _was_written_here(path: Path, kind: str) -> bool:
    """Whether the file bears the fingerprint of a tokenizer."""
    with suppress(OSError, KeyError, zipfile.BadZipFile):
        if kind == "npz":
            with zipfile.ZipFile(path) as archive:
                return bool(archive.getinfo("fingerprint.npy"))
        with optional("h5py").File(path, "r") as file:
            return "rfsq.fingerprint" in file["data"].attrs
    return False


def _write_npz(dataset: TokenDataset | ChunkSteps, tokenizer: ActionTokenizer, path: Path, decoded: _Decoded) -> None:
    table = dataset.episodes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "actions") as member:
            shape = (dataset.num_steps, tokenizer.model.action_dim)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for _, actions in decoded:
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


def _write_hdf5(dataset: TokenDataset | ChunkSteps, tokenizer: ActionTokenizer, path: Path, decoded: _Decoded) -> None:
    """data/demo_N/actions, N being the episode's number."""
    table = dataset.episodes()
    starts, numbers = table.starts.tolist(), table.numbers.tolist()
    # Through Python, since HDF5 itself ends the process where it cannot write; with the usual buffer this is slower.
    with _hdf5_errors(), path.open("w+b", 1 << 20) as raw, optional("h5py").File(raw, "w") as file:
        group = file.create_group("data")
        group.attrs["total"] = dataset.num_steps
        group.attrs["rfsq.fingerprint"] = tokenizer.fingerprint
        group.attrs["rfsq.schema_version"] = dataset.info.schema_version
        place = 0
        # A slice holds many episodes: a call of the decoder for each would take longer than the decoding.
        for row, actions in decoded:
            while starts[place] < row + len(actions):
                begin, end = starts[place : place + 2]
                part = actions[max(begin - row, 0) : end - row]
                # HDF5 is fastest where an array comes with its numbers; of one that ends later some are missing yet.
                whole = part if len(part) == end - begin else None
                if begin >= row:
                    demonstration = group.create_group(f"demo_{numbers[place]}")
                    demonstration.attrs["num_samples"] = end - begin
                    array = demonstration.create_dataset("actions", (end - begin, part.shape[1]), "<f4", data=whole)
                if whole is None:
                    first = max(row - begin, 0)
                    array[first : first + len(part)] = part
                if end > row + len(actions):
                    break
                place += 1


@contextmanager
def _hdf5_errors() -> Iterator[None]:
    """Raise as an OSError what h5py raises as a RuntimeError when it closes a file on a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
