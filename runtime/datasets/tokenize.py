"""Turn a dataset of demonstrations into tokens, or tokens back into actions; go on where a killed run was.

IN: LeRobot v2 or v3, robomimic or LIBERO HDF5, .npz; or, with --decode, what this script wrote. OUT: a folder, Parquet
or Zarr by its name; with --decode Parquet, .npz or .hdf5. The exit status is 0, 1 where OUT was written but its tokens
are worthless, 2 where input or output cannot be used, 130 when interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ..bundle.console import duration, printable
from ..bundle.errors import InvalidInputError, TokenizerError
from ..bundle.fidelity import Grade
from ..bundle.paths import counted
from ..tokenizer import ActionTokenizer
from .errors import OutputError, TokenDatasetError
from .files import FileFormat, write_file
from .finish import complete
from .format import PART_STEPS, Compression, DatasetInfo, Storage, Verification, read_info
from .job import Job, partial_folder, plan
from .partial import Begun, begin, give_up, load_records, locked, output_errors, was_finished
from .parts import parts_of_another_source, run_local
from .pieces import Source
from .progress import Progress
from .reader import check_fingerprint, open_token_dataset
from .sources import open_source

_FORMATS = {".parquet": "parquet", ".zarr": "zarr", ".npz": "npz", ".hdf5": "hdf5", ".h5": "hdf5"}
_ENCODED, _DECODED = ("parquet", "zarr"), ("parquet", "npz", "hdf5")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        verification = convert(options)
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 1 if _grade(verification) is Grade.WORTHLESS else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", type=_path, metavar="IN", help="demonstrations; with --decode, a dataset of tokens")
    parser.add_argument("output", type=_path, metavar="OUT", help="what to write: NAME.parquet, NAME.zarr, …")
    parser.add_argument("--bundle", type=_path, required=True, help="folder written by `python export/build_engine.py`")
    parser.add_argument("--decode", action="store_true", help="tokens to actions")
    parser.add_argument("--format", choices=sorted({*_ENCODED, *_DECODED}), help="default: by the name of OUT")
    parser.add_argument("--key", help="action array or column (default: actions, action)")
    parser.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")
    parser.add_argument("--expect-fingerprint", metavar="F", help="refuse any other tokenizer")
    parser.add_argument("--backend", default="auto", help="default: the best that works here")
    parser.add_argument("--compression", choices=("zstd", "none"), default="zstd")
    parser.add_argument("--steps-per-file", type=int, default=PART_STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, metavar="N", help="default: %(default)s")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="a running cluster (default: one is started here)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new one is verified")
    parser.add_argument("--restart", action="store_true", help="discard what an earlier run has left unfinished")
    return parser


def _path(text: str) -> Path:
    # The shell leaves the tilde of `--bundle=~/bundle` to us.
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def convert(options: argparse.Namespace) -> Verification:
    """Raises TokenizerError, before anything is written where that can be known."""
    kind = _format(options)
    try:
        given, made = options.input.resolve(), options.output.resolve()
        str(made).encode()
    # A circle of links is a RuntimeError until Python 3.12; Parquet's library takes no other names than UTF-8.
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise OutputError(f"IN or OUT is no path to work with: {error}; give another one") from error
    if options.decode and options.filter_key is not None:
        raise InvalidInputError(
            "--filter-key chooses episodes of demonstrations, and --decode takes every token of IN; leave it out"
        )
    inside = {given, *given.parents}
    if given in made.parents or made in inside or partial_folder(made) in inside:
        raise OutputError(f"OUT, {options.output}, is IN or lies in it, or IN in it; give a place of its own")
    with ActionTokenizer.load(
        options.bundle, backend=options.backend, expect_fingerprint=options.expect_fingerprint
    ) as tokenizer:
        source: Source
        if options.decode:
            dataset = open_token_dataset(options.input)
            check_fingerprint(dataset.root, dataset.info, tokenizer.fingerprint)
            if dataset.info.content != "tokens":
                raise TokenDatasetError(f"{options.input} holds {dataset.info.content}; expected tokens to decode")
            if kind in ("npz", "hdf5"):
                _say(f"{options.input}: {counted(dataset.num_steps, 'step')}; {tokenizer.backend.description}")
                progress = Progress(dataset.num_steps)
                verification = write_file(
                    dataset,
                    tokenizer,
                    options.output,
                    cast(FileFormat, kind),
                    progress,
                    overwrite=options.overwrite,
                    restart=options.restart,
                )
                _report_decoded(options.output, progress, verification)
                return verification
            source = dataset
        else:
            source = open_source(options.input, options.key, options.filter_key)
        job = plan(
            source,
            tokenizer,
            options.bundle,
            options.output,
            key=options.key or "",
            filter_key=options.filter_key or "",
            content="actions" if options.decode else "tokens",
            storage=cast(Storage, kind),
            compression=cast(Compression, options.compression),
            steps_per_file=options.steps_per_file,
        )
        with output_errors(job.partial), locked(job.output):
            verification = _run(job, tokenizer, options)
    _report_worth(verification, job.output)
    return verification


def _format(options: argparse.Namespace) -> str:
    kind = options.format or _FORMATS.get(options.output.suffix.lower())
    allowed = _DECODED if options.decode else _ENCODED
    if kind not in allowed:
        found = f"the format {kind!r}" if kind else f"{options.output.name}, whose name tells no format"
        raise OutputError(
            f"OUT is {found}; {'actions' if options.decode else 'tokens'} are written as {', '.join(allowed)}: name "
            "OUT so, or give --format"
        )
    return str(kind)


def _run(job: Job, tokenizer: ActionTokenizer, options: argparse.Namespace) -> Verification:
    if was_finished(job):
        _say(f"✓ {job.output} was finished by an earlier run")
        return read_info(job.output).verification
    begun = begin(job, overwrite=options.overwrite, restart=options.restart)
    if begun.replaced:
        _say(f"{begun.replaced}; what it is to be made of has changed since: beginning anew")
    try:
        with output_errors(job.partial):
            return _make(job, tokenizer, options, begun)
    except TokenizerError as error:
        give_up(job, error)
        raise


def _make(job: Job, tokenizer: ActionTokenizer, options: argparse.Namespace, begun: Begun) -> Verification:
    job.source.check()
    done = begun.done
    if done and begun.is_touched:
        _say("the source may have changed meanwhile: comparing its steps with those of the finished parts")
        done -= parts_of_another_source(job, load_records(job, done))
    missing = [part for part in range(job.num_parts) if part not in done]
    steps_done = sum(stop - start for start, stop in map(job.rows, done))
    size = f"{counted(job.source.num_steps, 'step')} in {counted(job.num_parts, 'part')}"
    _say(f"{options.input}: {size}; {tokenizer.backend.description}")
    if done:
        _say(f"going on: {counted(len(done), 'part')}, {counted(steps_done, 'step')}, finished by an earlier run")
    progress = Progress(job.source.num_steps, steps_done)
    if missing and options.engine == "ray":
        from .ray import run_ray

        run_ray(job, missing, options.workers, options.ray_address, progress)
    elif missing:
        run_local(job, tokenizer, missing, min(options.workers, len(missing)), progress)
    progress.finish()
    info = complete(job, tokenizer, load_records(job, range(job.num_parts)), overwrite=options.overwrite)
    if options.decode:
        _report_decoded(job.output, progress, info.verification)
    else:
        _report_encoded(job, info, progress)
    return info.verification


def _report_encoded(job: Job, info: DatasetInfo, progress: Progress) -> None:
    size = sum(entry.size for entry in info.files.values())
    _say(f"✓ {_speed(progress)}")
    _say(f"✓ verified: {info.verification.steps:,} steps read back equal what the tokenizer gives")
    steps, episodes = counted(info.num_steps, "step"), counted(info.num_episodes, "episode")
    _say(
        f"✓ {job.output}: {steps} of {episodes}, {size / info.num_steps:.1f} bytes a step, fingerprint "
        f"{info.fingerprint[:16]}, source {info.source.sha256[:16]}"
    )


def _report_worth(verification: Verification, output: Path) -> None:
    """Of tokens: the grade in a line; where they are not good each dimension, and last what to do."""
    found = verification.fidelity
    if found is None:
        return
    if found.grade is not Grade.GOOD:
        _say(found.table(f"{found.steps:,} steps of the source"))
    _say(f"what the tokens are worth: {found.line}, on {found.steps:,} steps of the source")
    if found.warning:
        _say(found.warning)
    if found.grade is Grade.WORTHLESS:
        _say(f"WARNING: {output} is there all the same, and the exit status is 1: do not train a policy on it")


def _grade(verification: Verification) -> Grade:
    return Grade.GOOD if verification.fidelity is None else verification.fidelity.grade


def _report_decoded(output: Path, progress: Progress, verification: Verification) -> None:
    _say(f"✓ {_speed(progress)}")
    _say(f"✓ verified: {verification.steps:,} steps read back equal what the tokenizer gives")
    _say(f"✓ {output}")


def _say(text: str) -> None:
    print(printable(text))


def _speed(progress: Progress) -> str:
    speed = f", {progress.speed}" if progress.speed else ""
    return f"{counted(progress.steps, 'step')} in {duration(progress.seconds)}{speed}"
