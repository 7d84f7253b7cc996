"""The end of a job: episodes, a sample read back from the files and verified, `dataset.json`, the last rename."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import closing

import numpy as np

from ..bundle.arrays import AnyArray, Float32Array, in_chunks
from ..bundle.fidelity import FidelitySums
from ..bundle.manifest import FileEntry
from ..tokenizer import ActionTokenizer
from .episodes import join_runs
from .errors import VerificationError
from .format import (
    EPISODES_NAME,
    INFO_NAME,
    ORDERING,
    SCHEMA_VERSION,
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
    digests = b"".join(bytes.fromhex(digest) for record in records for digest in record.digests)
    source = SourceInfo(job.source.name, job.key, hashlib.sha256(digests).hexdigest(), job.filter_key or None)
    files = {name: entry for record in records for name, entry in record.files.items()}
    info = DatasetInfo(
        **job.facts(),
        schema_version=SCHEMA_VERSION,
        ordering=ORDERING,
        num_steps=job.source.num_steps,
        num_episodes=len(table.numbers),
        steps_per_block=job.block_steps,
        source=source,
        verification=Verification(0, 0.0, 0.0),
        files=files,
    )
    verified = _verify(job, tokenizer, TokenDataset.of(job.data, info))
    outlier = max(filter(None, (record.farthest for record in records)), default=None)
    info = dataclasses.replace(info, verification=dataclasses.replace(verified, farthest=outlier))
    write = _write_parquet_episodes if job.storage == "parquet" else _write_zarr_tables
    info = dataclasses.replace(info, files={**files, **write(job, info, table)})
    touched = job.source.touched_file()
    if touched is not None and parts_of_another_source(job, records):
        raise has_changed(touched)
    put(info_text(info).encode(), job.data, INFO_NAME, job.scratch)
    finish(job, overwrite=overwrite)
    return info


# Verification ---------------------------------------------------------------------------------------------------------


def sample_windows(num_steps: int) -> list[tuple[int, int]]:
    """First and last row of each slice of the sample: the beginning, the end and places between; all of a short one."""
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
        tokens = tokenizer.encode(in_chunks(given.values, model.chunk_length))
        _check_equal(tokens.reshape(-1, read.values.shape[1])[: stop - start], read.values, start)
        decoded = _decoded(tokenizer, read.values)
        total += float(np.abs(decoded.astype(np.float64) - given.values).sum())
        sums.add(given.values, decoded)
    found = sums.result()
    return Verification(found.steps, max(found.largest), total / (found.steps * model.action_dim), found)


def verify_actions(tokenizer: ActionTokenizer, source: StepReader, target: StepReader, num_steps: int) -> Verification:
    """source: of tokens; target: of the actions that were written for them, in which episodes may be numbered anew."""
    windows = sample_windows(num_steps)
    for start, stop in windows:
        decoded = _decoded(tokenizer, source.read(start, stop).values)
        _check_equal(decoded, target.read(start, stop).values, start)
    return Verification(sum(stop - start for start, stop in windows), 0.0, 0.0)


def _decoded(tokenizer: ActionTokenizer, tokens: AnyArray) -> Float32Array:
    """Tokens uint8 [n, D*L] to actions [n, A]. Not by StepCoder, whose work is verified here."""
    model = tokenizer.model
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


def _write_parquet_episodes(job: Job, info: DatasetInfo, table: EpisodeTable) -> dict[str, FileEntry]:
    arrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    columns = {
        "episode_index": arrow.array(table.numbers),
        "name": arrow.array(job.source.episode_names(table.numbers)),
        "first_row": arrow.array(table.starts[:-1]),
        "num_steps": arrow.array(np.diff(table.starts)),
    }
    metadata = job.metadata(0, info.source.sha256)
    temporary = scratch_file(job.scratch, EPISODES_NAME)
    parquet.write_table(arrow.table(columns).replace_schema_metadata(metadata), temporary)
    return put_file(temporary, job.data, EPISODES_NAME)


def _write_zarr_tables(job: Job, info: DatasetInfo, table: EpisodeTable) -> dict[str, FileEntry]:
    """Write the groups, the descriptions of arrays, and the arrays of meta/ in one chunk each."""
    model, steps, chunk = info.model, info.num_steps, info.steps_per_block
    names = np.array([name.encode() for name in job.source.episode_names(table.numbers)], np.bytes_)
    arrays: dict[str, AnyArray] = {
        "meta/episode_ends": table.starts[1:].astype("<i8"),
        "meta/episode_index": table.numbers.astype("<i8"),
        "meta/episode_name": names,
    }
    shape = (model.latent_dim, model.num_layers)
    metadata: dict[str, dict[str, object]] = {
        ".zgroup": {"zarr_format": 2},
        ".zattrs": {**job.metadata(0, info.source.sha256), "rfsq.model": dataclasses.asdict(info.model)},
        "data/.zgroup": {"zarr_format": 2},
        "meta/.zgroup": {"zarr_format": 2},
        "data/tokens/.zarray": zarr_array((steps, *shape), (chunk, *shape), "|u1", info.compression, "F"),
        "data/episode_index/.zarray": zarr_array((steps,), (chunk,), "<i8", info.compression),
        "data/frame_index/.zarray": zarr_array((steps,), (chunk,), "<i8", info.compression),
    }
    for name, values in arrays.items():
        metadata[f"{name}/.zarray"] = zarr_array(values.shape, values.shape, values.dtype.str, "none")
    contents = {name: spelled(content) for name, content in metadata.items()}
    contents[".zmetadata"] = spelled({"zarr_consolidated_format": 1, "metadata": metadata})
    contents |= {f"{name}/0": values.tobytes() for name, values in arrays.items()}
    return {name: put(content, job.data, name, job.scratch) for name, content in contents.items()}
