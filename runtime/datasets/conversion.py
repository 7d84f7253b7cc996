"""Turns a dataset of demonstrations into tokens, or tokens back into actions; goes on where a killed run was."""

import argparse
import dataclasses
from pathlib import Path
from typing import cast

import numpy as np

from ..bundle.console import duration, printable
from ..bundle.errors import InvalidInputError, TokenizerError
from ..bundle.fidelity import Grade
from ..bundle.paths import counted
from ..tokenizer import ActionTokenizer
from .action_files import write_file
from .chunks import ChunkSource, ChunkSteps
from .errors import OutputError, TokenDatasetError
from .finish import complete
from .format import INFO_NAME, DatasetInfo, Storage, read_info
from .job import Job, partial_folder, plan, token_model
from .job_folder import begin, give_up, locked, output_errors, was_finished
from .parts import finished_parts, parts_of_another_source, run_local
from .progress import Progress
from .rows import ChunkTokens, StepTokens
from .source_base import Source
from .sources import open_source
from .token_reader import TokenDataset, open_token_dataset
from .tokenize import DECODED, ENCODED

_FORMATS = {"": "parquet", ".parquet": "parquet", ".zarr": "zarr", ".npz": "npz", ".hdf5": "hdf5", ".h5": "hdf5"}


def _holds_tokens(folder: Path) -> bool:
    try:
        return (folder / INFO_NAME).is_file() and read_info(folder).content == "tokens"
    except OSError:
        # Such as a name that is too long: what opens it as demonstrations says so.
        return False


def convert(options: argparse.Namespace) -> DatasetInfo:
    """What was written, all of it, beside what `verification` says of a sample; of a file, with the tokens' own facts.

    options: of the command `tokenize`. Raises TokenizerError, before anything is written where that can be known.
    """
    if not options.decode and _holds_tokens(options.data):
        raise InvalidInputError(f"{options.data} holds tokens; turn them into actions with --decode")
    kind = _format(options)
    _check_places(options)
    if options.decode and options.filter_key is not None:
        raise InvalidInputError(
            "--filter-key chooses episodes of demonstrations, and --decode takes every token of --data; leave it out"
        )
    if options.decode and (options.stride or options.tokens):
        raise InvalidInputError(
            "--stride and --tokens choose what is written of chunks, and --decode takes every token of --data, and the "
            "first steps of each chunk up to the next; leave them out"
        )
    if options.ray_address is not None and options.engine != "ray":
        raise InvalidInputError("--ray-address is for --engine ray alone; give --engine ray too, or leave it out")
    with ActionTokenizer.load(
        options.bundle, backend=options.backend, expect_fingerprint=options.expect_fingerprint
    ) as tokenizer:
        model = token_model(tokenizer.model, options)
        source = _open_tokens(options, tokenizer) if options.decode else open_actions(options, tokenizer, model)
        if isinstance(source, TokenDataset | ChunkSteps):
            model = source.info.model
            if kind in ("npz", "hdf5"):
                return _write_file(source, tokenizer, kind, options)
        job = plan(source, tokenizer, model, options, cast(Storage, kind))
        with output_errors(job.partial), locked(job.output):
            info = _run(job, tokenizer, options)
    worth = info.verification.fidelity
    if worth is not None and worth.grade is not Grade.GOOD:
        _say(worth.table(f"{info.verified} of the source"))
    return info


def _check_places(options: argparse.Namespace) -> None:
    try:
        given, made = options.data.resolve(), options.output.resolve()
        str(made).encode()
    # A circle of links is a RuntimeError until Python 3.12; Parquet's library takes no other names than UTF-8.
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise OutputError(f"--data or --output is no path to work with: {error}; give another one") from error
    inside = {given, *given.parents}
    if given in made.parents or made in inside or partial_folder(made) in inside:
        raise OutputError(
            f"--output {options.output} is --data or lies in it, or --data in it; give a place of its own"
        )


def open_actions(options: argparse.Namespace, tokenizer: ActionTokenizer, model: ChunkTokens | StepTokens) -> Source:
    """Demonstrations as rows that this tokenizer encodes. Raises what opening and reading them does."""
    source = open_source(options.data, options.key, options.filter_key)
    if isinstance(model, StepTokens):
        return source
    found = tokenizer.model
    units = (np.array(found.action_units), np.array(found.action_offset))
    return ChunkSource.of(source, model, float(np.float32(found.action_limit)), units)


def _open_tokens(options: argparse.Namespace, tokenizer: ActionTokenizer) -> TokenDataset | ChunkSteps:
    dataset = open_token_dataset(options.data, expect_fingerprint=tokenizer.fingerprint)
    if dataset.info.content != "tokens":
        raise TokenDatasetError(f"{options.data} holds {dataset.info.content}; expected tokens to decode")
    model = dataset.info.model
    return dataset if isinstance(model, StepTokens) else ChunkSteps.of(dataset, model)


def _write_file(
    dataset: TokenDataset | ChunkSteps, tokenizer: ActionTokenizer, kind: str, options: argparse.Namespace
) -> DatasetInfo:
    _say(f"{options.data}: {counted(dataset.num_steps, 'step')}; {_described(tokenizer)}")
    progress = Progress(dataset.num_steps)
    verification = write_file(dataset, tokenizer, kind, options, progress)
    _report_verified(progress, counted(verification.steps, "step"))
    return dataclasses.replace(dataset.info, verification=verification)


def _described(tokenizer: ActionTokenizer) -> str:
    return f"{tokenizer.backend.name}, {tokenizer.backend.description}"


def _format(options: argparse.Namespace) -> str:
    kind = options.format or _FORMATS.get(options.output.suffix.lower())
    allowed = DECODED if options.decode else ENCODED
    if kind not in allowed:
        found = f"the format {kind!r}" if kind else f"{options.output.name}, whose name tells no format"
        raise OutputError(
            f"--output is {found}; {'actions' if options.decode else 'tokens'} are written as {', '.join(allowed)}: "
            "name it so, or give --format"
        )
    return str(kind)


def _run(job: Job, tokenizer: ActionTokenizer, options: argparse.Namespace) -> DatasetInfo:
    if (finished := was_finished(job)) is not None:
        _say(f"✓ {options.output} was finished by an earlier run")
        return finished
    is_touched, replaced = begin(job, overwrite=options.overwrite, restart=options.restart)
    if replaced:
        _say(f"{replaced}; what it is to be made of has changed since: beginning anew")
    try:
        with output_errors(job.partial):
            return _make(job, tokenizer, options, is_touched=is_touched)
    except TokenizerError as error:
        give_up(job, error)
        raise


def _make(job: Job, tokenizer: ActionTokenizer, options: argparse.Namespace, *, is_touched: bool) -> DatasetInfo:
    job.source.check()
    done = finished_parts(job)
    if done and is_touched:
        _say("the source may have changed meanwhile: comparing its steps with those of the finished parts")
        done = {part: done[part] for part in done.keys() - parts_of_another_source(job, done.values())}
    missing = [part for part in range(job.num_parts) if part not in done]
    rows_done = sum(stop - start for start, stop in map(job.rows, done))
    unit = job.model.unit if job.content == "tokens" else "step"
    size = f"{counted(job.source.num_steps, unit)} in {counted(job.num_parts, 'part')}"
    _say(f"{options.data}: {size}; {_described(tokenizer)}")
    if done:
        _say(f"going on: {counted(len(done), 'part')}, {counted(rows_done, unit)}, finished by an earlier run")
    progress = Progress(job.source.num_steps, rows_done, unit=unit)
    if missing and options.engine == "ray":
        from .ray import run_ray

        run_ray(job, missing, options.workers, options.ray_address, progress)
    elif missing:
        run_local(job, tokenizer, missing, min(options.workers, len(missing)), progress)
    progress.finish()
    info = complete(job, tokenizer, overwrite=options.overwrite)
    _report_verified(progress, info.verified)
    if not options.decode:
        total = sum(entry.size for entry in info.files.values())
        steps, episodes = counted(info.num_steps, "step"), counted(info.num_episodes, "episode")
        _say(
            f"✓ {options.output}: {steps} of {episodes}, {total / info.num_steps:.1f} bytes a step, fingerprint "
            f"{info.fingerprint[:16]}, source {info.source.sha256[:16]}"
        )
        if info.storage == "parquet":
            _say(f"pandas and pyarrow read {options.output / 'data'}")
    return info


def _report_verified(progress: Progress, verified: str) -> None:
    speed = f", {progress.speed}" if progress.speed else ""
    _say(f"✓ {counted(progress.steps, progress.unit)} in {duration(progress.seconds)}{speed}")
    _say(f"✓ verified: {verified} read back equal what the tokenizer gives")


def _say(text: str) -> None:
    print(printable(text))
