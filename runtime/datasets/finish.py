"""The end of a job: episodes, a sample read back from the files and verified, `dataset.json`, the last rename."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import closing

import numpy as np

from ..bundle.arrays import AnyArray, Float32Array, Int64Array, in_chunks
from ..bundle.fidelity import FidelitySums
from ..bundle.manifest import FileEntry
from ..bundle.models import StepModel
from ..tokenizer import ActionTokenizer
from .chunks import ChunkSource
from .episodes import join_runs
from .errors import VerificationError
from .format import (
    EPISODE_STEPS,
    EPISODES_NAME,
    INFO_NAME,
    DatasetInfo,
    SourceInfo,
    Verification,
    info_text,
    spelled,
)
from .job import Job
from .job_folder import finish
from .parts import load_records, parts_of_another_source
from .source_base import EpisodeTable, StepReader, has_changed, optional
from .token_reader import TokenDataset
from .writers import put, put_file, scratch_file, zarr_array

_WINDOWS, _WINDOW_STEPS = 8, 512


def complete(job: Job, tokenizer: ActionTokenizer, *, overwrite: bool) -> DatasetInfo:
    """Join all parts, verify a sample of them, and put the dataset in its place.

    Raises SourceError where the source changed or states other episodes, VerificationError where the sample is not what
    the tokenizer gives.
    """
    records = load_records(job)
    table = join_runs([run for record in records for run in record.runs], job.source)
    lengths = job.source.table.lengths if isinstance(job.source, ChunkSource) else table.lengths
    digests = b"".join(bytes.fromhex(digest) for record in records for digest in record.digests)
    source = SourceInfo(job.source.name, job.key, hashlib.sha256(digests).hexdigest(), job.filter_key or None)
    files = {name: entry for record in records for name, entry in record.files.items()}
    info = DatasetInfo(
        **job.facts(),
        schema_version=job.model.schema_version,
        ordering=job.model.ordering,
        num_steps=int(lengths.sum()),
        num_episodes=len(table.numbers),
        steps_per_block=job.block_steps,
        source=source,
        verification=Verification(0, 0.0, 0.0),
        files=files,
        num_chunks=job.source.num_steps if isinstance(job.source, ChunkSource) else None,
    )
    verified = _verify(job, tokenizer, TokenDataset.of(job.data, info))
    outliers = [record.farthest for record in records]
    outliers += [job.source.farthest] if isinstance(job.source, ChunkSource) else []
    outlier = max(filter(None, outliers), default=None)
    info = dataclasses.replace(info, verification=dataclasses.replace(verified, farthest=outlier))
    write = _write_parquet_episodes if job.storage == "parquet" else _write_zarr_tables
    info = dataclasses.replace(info, files={**files, **write(job, info, table, lengths)})
    touched = job.source.touched_file()
    if touched is not None and parts_of_another_source(job, records):
        raise has_changed(touched)
    put(info_text(info).encode(), job.data, INFO_NAME, job.scratch)
    finish(job, overwrite=overwrite)
    return info


# Verification ---------------------------------------------------------------------------------------------------------


def sample_windows(num_steps: int) -> list[tuple[int, int]]:
    """First and last row of each slice of the sample: the beginning, the end and places between; all of a short one.

    num_steps: all rows.
    """
    if num_steps <= _WINDOWS * _WINDOW_STEPS:
        return [(start, min(start + _WINDOW_STEPS, num_steps)) for start in range(0, num_steps, _WINDOW_STEPS)]
    starts = np.linspace(0, num_steps - _WINDOW_STEPS, _WINDOWS).astype(int).tolist()
    return [(start, start + _WINDOW_STEPS) for start in starts]


def _verify(job: Job, tokenizer: ActionTokenizer, written: TokenDataset) -> Verification:
    verify = _verify_tokens if job.content == "tokens" else verify_actions
    with closing(job.source.open(job.source_width)) as source, closing(written.open(written.width)) as target:
        return verify(tokenizer, source, target, job.source.num_steps)


def _verify_tokens(tokenizer: ActionTokenizer, source: StepReader, target: StepReader, num_steps: int) -> Verification:
    model = tokenizer.model
    total, sums = 0.0, FidelitySums(model.action_units, model.action_offset)
    for start, stop in sample_windows(num_steps):
        given, read = source.read(start, stop), target.read(start, stop)
        if not (np.array_equal(given.episode, read.episode) and np.array_equal(given.frame, read.frame)):
            raise VerificationError(
                f"episodes and steps read back from row {start} on are not those of the source; {_AGAIN}"
            )
        _check_equal(_encoded(tokenizer, given.values, read.values.shape[1]), read.values, start)
        # Of a chunk every step, also where the next chunk begins before its end.
        actions = given.values.reshape(-1, model.action_dim)
        decoded = _decoded(tokenizer, read.values)
        total += float(np.abs(decoded.astype(np.float64) - actions).sum())
        sums.add(actions, decoded)
    found = sums.result()
    return Verification(found.steps, max(found.largest), total / (found.steps * model.action_dim), found)


def verify_actions(tokenizer: ActionTokenizer, source: StepReader, target: StepReader, num_steps: int) -> Verification:
    """source: of tokens; target: of the actions that were written for them, in which episodes may be numbered anew."""
    windows = sample_windows(num_steps)
    for start, stop in windows:
        given = source.read(start, stop).values
        if isinstance(tokenizer.model, StepModel):
            decoded = _decoded(tokenizer, given)
        else:
            decoded = tokenizer.decode(given[:, :-1])[np.arange(len(given)), given[:, -1]]
        _check_equal(decoded, target.read(start, stop).values, start)
    return Verification(sum(stop - start for start, stop in windows), 0.0, 0.0)


# Not by the coders, whose work is verified here.


def _encoded(tokenizer: ActionTokenizer, actions: AnyArray, width: int) -> AnyArray:
    """Rows of actions to rows of tokens [n, width]."""
    model = tokenizer.model
    if not isinstance(model, StepModel):
        return tokenizer.encode(actions.reshape(model.actions_shape(len(actions))))[:, :width]
    return tokenizer.encode(in_chunks(actions, model.chunk_length)).reshape(-1, width)[: len(actions)]


def _decoded(tokenizer: ActionTokenizer, tokens: AnyArray) -> Float32Array:
    """Rows of tokens to the actions of all their steps [n, A]."""
    model = tokenizer.model
    if not isinstance(model, StepModel):
        return tokenizer.decode(tokens).reshape(-1, model.action_dim)
    chunks = in_chunks(tokens, model.chunk_length)
    actions = tokenizer.decode(chunks.reshape(model.tokens_shape(len(chunks))))
    return actions.reshape(-1, model.action_dim)[: len(tokens)]


def _check_equal(expected: AnyArray, found: AnyArray, row: int) -> None:
    wrong = np.flatnonzero((expected != found).any(axis=1))
    if wrong.size:
        raise VerificationError(
            f"what was read back at row {row + wrong[0]} is not what the tokenizer gives for it; {_AGAIN}"
        )


_AGAIN = (
    "the source changed while it was read, or memory or disk cannot be trusted: run the command again, it begins anew"
)


# Tables ---------------------------------------------------------------------------------------------------------------


def _write_parquet_episodes(
    job: Job, info: DatasetInfo, table: EpisodeTable, lengths: Int64Array
) -> dict[str, FileEntry]:
    """table: of all episodes, in rows; lengths: in steps."""
    arrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    columns = {
        "episode_index": arrow.array(table.numbers),
        "name": arrow.array(job.source.episode_names(table.numbers)),
        "first_row": arrow.array(table.starts[:-1]),
        "num_steps": arrow.array(lengths),
    }
    metadata = job.metadata(0, info.source.sha256)
    temporary = scratch_file(job.scratch, EPISODES_NAME)
    parquet.write_table(arrow.table(columns).replace_schema_metadata(metadata), temporary)
    return put_file(temporary, job.data, EPISODES_NAME)


def _write_zarr_tables(job: Job, info: DatasetInfo, table: EpisodeTable, lengths: Int64Array) -> dict[str, FileEntry]:
    """Write the groups, the descriptions of arrays, and the arrays of meta/ in one chunk each."""
    model, rows, chunk = info.model, info.num_rows, info.steps_per_block
    names = np.array([name.encode() for name in job.source.episode_names(table.numbers)], np.bytes_)
    arrays: dict[str, AnyArray] = {
        "meta/episode_ends": table.starts[1:].astype("<i8"),
        "meta/episode_index": table.numbers.astype("<i8"),
        "meta/episode_name": names,
        **({} if info.num_chunks is None else {EPISODE_STEPS: lengths.astype("<i8")}),
    }
    metadata: dict[str, dict[str, object]] = {
        ".zgroup": {"zarr_format": 2},
        ".zattrs": {**job.metadata(0, info.source.sha256), "rfsq.model": dataclasses.asdict(info.model)},
        "data/.zgroup": {"zarr_format": 2},
        "meta/.zgroup": {"zarr_format": 2},
        "data/tokens/.zarray": zarr_array(
            (rows, *model.shape), (chunk, *model.shape), model.dtype, info.compression, "F"
        ),
        "data/episode_index/.zarray": zarr_array((rows,), (chunk,), "<i8", info.compression),
        "data/frame_index/.zarray": zarr_array((rows,), (chunk,), "<i8", info.compression),
    }
    for name, values in arrays.items():
        metadata[f"{name}/.zarray"] = zarr_array(values.shape, values.shape, values.dtype.str, "none")
    contents = {name: spelled(content) for name, content in metadata.items()}
    contents[".zmetadata"] = spelled({"zarr_consolidated_format": 1, "metadata": metadata})
    contents |= {f"{name}/0": values.tobytes() for name, values in arrays.items()}
    return {name: put(content, job.data, name, job.scratch) for name, content in contents.items()}
