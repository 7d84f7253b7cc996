"""A conversion as a job of parts: each is made whole or not at all, so that a killed job goes on where it was.

While it runs everything lies in `OUT.partial`: `job.json` (what the job is), `lock`, and in a folder named after the
job `scratch/` (files being written), `done/` (one record for each finished part) and `data/`, which becomes OUT by a
rename when all of it is verified and on the disk. So a worker that outlives its killed job spoils no other: it writes
into the folder of its own job, and nothing but the bytes that belong there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.dataset_errors import OutputError
from runtime.dataset_format import (
    BLOCK_STEPS,
    HASH_STEPS,
    INFO_NAME,
    Compression,
    Content,
    MadeWith,
    Storage,
    TokenModel,
    block_steps,
)
from runtime.dataset_steps import Source, optional
from runtime.dataset_writers import Layout, hash_file, put, spelled, sync
from runtime.errors import BackendUnavailableError, InvalidInputError, TokenizerError
from runtime.manifest import FileEntry
from runtime.tokenizer import ActionTokenizer

_IDENTITY_NAME = "job.json"
#: What lies in a folder of an unfinished job; network file systems keep an open file that was removed under `.nfs…`.
_OWN_NAMES = re.compile(r"lock|job\.json|[0-9a-f]{16}|decoded\.(npz|hdf5)|\.nfs.*")


@dataclass(frozen=True, eq=False)
class Job:
    """What to make of which source; can be pickled, so that workers elsewhere do the same job."""

    source: Source
    key: str
    bundle: Path
    fingerprint: str
    model: TokenModel
    made_with: MadeWith
    content: Content
    storage: Storage
    compression: Compression
    steps_per_file: int
    output: Path

    @property
    def partial(self) -> Path:
        return partial_folder(self.output)

    @cached_property
    def work(self) -> Path:
        """The folder in `partial` that no other job uses."""
        return self.partial / hashlib.sha256(spelled(self.identity())).hexdigest()[:16]

    @property
    def num_parts(self) -> int:
        return -(-self.source.num_steps // self.steps_per_file)

    @property
    def source_width(self) -> int:
        """Values of a step in the source."""
        model = self.model
        return model.action_dim if self.content == "tokens" else model.latent_dim * model.num_layers

    @property
    def layout(self) -> Layout:
        model = self.model
        shape = (model.latent_dim, model.num_layers) if self.content == "tokens" else (model.action_dim,)
        return Layout(
            data=self.work / "data",
            scratch=self.work / "scratch",
            content=self.content,
            storage=self.storage,
            compression=self.compression,
            shape=shape,
            block_steps=block_steps(self.steps_per_file),
        )

    def rows(self, part: int) -> tuple[int, int]:
        start = part * self.steps_per_file
        return start, min(start + self.steps_per_file, self.source.num_steps)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a job to go on; the output's place is not part of it."""
        return {
            "source": {
                "name": self.source.name,
                "key": self.key,
                "num_steps": self.source.num_steps,
                "files": [dataclasses.asdict(file) for file in self.source.files],
            },
            "fingerprint": self.fingerprint,
            "model": dataclasses.asdict(self.model),
            "made_with": dataclasses.asdict(self.made_with),
            "content": self.content,
            "storage": self.storage,
            "compression": self.compression,
            "steps_per_file": self.steps_per_file,
        }


#: What a part has of one episode: its number, the first and the last frame, and the number of steps.
Run = tuple[int, int, int, int]


@dataclass(frozen=True)
class PartRecord:
    """A finished part. digests: sha256 of every HASH_STEPS steps of the source; runs: in their order."""

    part: int
    files: dict[str, FileEntry]
    digests: tuple[str, ...]
    runs: tuple[Run, ...]

    def text(self) -> bytes:
        # Not dataclasses.asdict of the whole: it copies every run by itself, which takes longer than all else here.
        files = {name: dataclasses.asdict(entry) for name, entry in self.files.items()}
        return json.dumps({"part": self.part, "files": files, "digests": self.digests, "runs": self.runs}).encode()

    @classmethod
    def parse(cls, text: bytes) -> PartRecord:
        content = json.loads(text)
        return cls(
            content["part"],
            {name: FileEntry(**entry) for name, entry in content["files"].items()},
            tuple(content["digests"]),
            tuple((run[0], run[1], run[2], run[3]) for run in content["runs"]),
        )


def plan(
    source: Source,
    tokenizer: ActionTokenizer,
    bundle: Path,
    output: Path,
    *,
    key: str = "",
    content: Content = "tokens",
    storage: Storage = "parquet",
    compression: Compression = "zstd",
    steps_per_file: int,
) -> Job:
    """Raises InvalidInputError for what this bundle, or no job, can do; SourceError where the first step is unfit."""
    model = tokenizer.model
    _check_model(tokenizer)
    if (
        steps_per_file < 1
        or steps_per_file % HASH_STEPS
        or (steps_per_file > BLOCK_STEPS and steps_per_file % BLOCK_STEPS)
    ):
        raise InvalidInputError(
            f"--steps-per-file is {steps_per_file}; expected a multiple of {BLOCK_STEPS}, or of {HASH_STEPS} where it "
            "is smaller than that"
        )
    made_with = MadeWith(tokenizer.backend.name, tokenizer.backend.description, optional("pyarrow").__version__)
    job = Job(
        source=source,
        key=key,
        bundle=bundle.absolute(),
        fingerprint=tokenizer.fingerprint,
        model=TokenModel.of(model),
        made_with=made_with,
        content=content,
        storage=storage,
        compression=compression,
        steps_per_file=steps_per_file,
        output=output.resolve(),
    )
    reader = source.open(job.source_width)
    try:
        reader.read(0, 1)
    finally:
        reader.close()
    return job


def _check_model(tokenizer: ActionTokenizer) -> None:
    """Raises InvalidInputError for a bundle whose tokens no dataset can hold alone."""
    model = tokenizer.model
    if model.has_stats:
        raise InvalidInputError(
            "tokens of a `dynamic` bundle mean nothing without the statistics of their own step, which no dataset of "
            "tokens holds: build a bundle with `--conditioning recovered` (the same tokens, decoded on their own) or "
            "`--conditioning calibrated`"
        )
    if model.num_levels > 256:
        raise InvalidInputError(f"the bundle has {model.num_levels} levels; tokens of one byte hold at most 256")


def open_tokenizer(job: Job) -> ActionTokenizer:
    """For a worker of its own: exactly the tokenizer of the job. Raises BackendUnavailableError for a like one."""
    made_with = job.made_with
    tokenizer = ActionTokenizer.load(job.bundle, backend=made_with.backend, expect_fingerprint=job.fingerprint)
    if tokenizer.backend.description != made_with.device:
        found = tokenizer.backend.description
        tokenizer.close()
        raise BackendUnavailableError(
            f"this machine would use {found}, the job began with {made_with.device}: tokens may differ at near-ties; "
            "use machines of one kind, or `--backend onnxruntime` for all"
        )
    return tokenizer


# The folder of a job in progress --------------------------------------------------------------------------------------


def partial_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """The one process that works at this output; the lock ends with the process, however that ends.

    Raises OutputError where the folder holds what was not written here: it is emptied, and taken away at the end.
    """
    path = partial / "lock"
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(partial)
            file = path.open("ab")
        except FileNotFoundError:
            continue  # The job that held it has just ended and taken the folder away.
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{partial} is in use: another process is making the same output; wait for it"
                ) from None
            try:
                is_current = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                continue
            if is_current:
                try:
                    yield
                finally:
                    # Refused before anything was begun: leave nothing behind.
                    if partial.exists() and not (partial / _IDENTITY_NAME).exists():
                        shutil.rmtree(partial, ignore_errors=True)
                return


def _refuse_foreign(partial: Path) -> None:
    foreign = sorted(path.name for path in partial.iterdir() if not _OWN_NAMES.fullmatch(path.name))
    if foreign:
        raise OutputError(
            f"{partial} is where the work is done, but it holds {', '.join(foreign[:5])}, which was not written here; "
            "move it elsewhere, or give another OUT"
        )


def begin(job: Job, *, overwrite: bool, restart: bool) -> set[int]:
    """Lay the folder out, or find what an earlier run of the same job has finished, read again and hashed.

    Raises OutputError where the output exists, or another job was begun in its place.
    """
    # A run that was killed between the two renames of finish().
    for replaced in job.partial.glob("*/replaced"):
        if not job.output.exists():
            replaced.rename(job.output)
    if job.output.exists():
        _refuse_existing(job, overwrite=overwrite)
    layout, identity = job.layout, job.partial / _IDENTITY_NAME
    if restart:
        discard(job.partial)
    if identity.is_file():
        _check_same(job, _read_identity(identity))
    else:
        # Nothing was begun yet: job.json is written before any part.
        discard(job.partial)
    # What another process may still be writing can no longer come between: its files have lost their folder.
    shutil.rmtree(layout.scratch, ignore_errors=True)
    for folder in (layout.data, layout.scratch, job.work / "done"):
        folder.mkdir(parents=True, exist_ok=True)
    if not identity.is_file():
        put(spelled(job.identity()), identity, layout.scratch)
    done = set()
    for path in sorted((job.work / "done").iterdir()):
        try:
            record = PartRecord.parse(path.read_bytes())
        except (ValueError, LookupError, TypeError):
            # A power cut leaves such files: the part is made anew.
            path.unlink()
            continue
        if _is_whole(job, record):
            done.add(record.part)
    return done


def load_records(job: Job) -> list[PartRecord]:
    """Of all parts, in their order, once all are finished."""
    return [PartRecord.parse(path.read_bytes()) for path in sorted((job.work / "done").iterdir())]


def discard(partial: Path) -> None:
    """Empty the folder; what it was goes first, so that nothing of it is used after a kill."""
    (partial / _IDENTITY_NAME).unlink(missing_ok=True)
    _clear(partial, keep=("lock",))


def _clear(partial: Path, keep: Collection[str]) -> None:
    for path in partial.iterdir():
        if path.name in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def refuse_begun(partial: Path) -> None:
    """Raises OutputError where a job is to go on here."""
    if (partial / _IDENTITY_NAME).exists():
        raise OutputError(
            f"{partial} holds the beginning of another job; go on with that, or discard it with --restart"
        )


def finish(job: Job, *, overwrite: bool) -> None:
    """Put the data in place; killed between any two of these lines, the job ends the same when it is run again."""
    # After a power cut, too, OUT is complete or not there. Parts need no more than their hashes until then, and waiting
    # for the disk at each would make the whole as slow as whatever else is written to it.
    for path in (*job.layout.data.rglob("*"), job.layout.data):
        sync(path)
    if job.output.exists():
        _refuse_existing(job, overwrite=overwrite)
        replaced = job.work / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        job.output.rename(replaced)
    job.layout.data.rename(job.output)
    sync(job.output.parent)
    _clean_up(job.partial)


def was_finished(job: Job) -> bool:
    """Whether an earlier run of this job was killed when all but cleaning up was done, which is made up for here."""
    identity = job.partial / _IDENTITY_NAME
    if not (job.output.is_dir() and identity.is_file()) or any(job.partial.glob("*/data")):
        return False
    is_same = bool(_read_identity(identity) == json.loads(spelled(job.identity())))
    _clean_up(job.partial)
    return is_same


def _clean_up(partial: Path) -> None:
    """Take the folder away; what it was goes last, so that a run after a kill knows that the job was finished."""
    _clear(partial, keep=("lock", _IDENTITY_NAME))
    (partial / _IDENTITY_NAME).unlink()
    # What a worker that outlived its job may still write here is of no use to anyone.
    shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(job: Job, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{job.output} exists; give another name, or --overwrite to replace it once all is verified")
    written = _written_files(job.output)
    if not written:
        raise OutputError(
            f"{job.output} is not a dataset that was written here: it has no {INFO_NAME} that lists its files; give "
            "another name, or remove it yourself"
        )
    found = (path for path in job.output.rglob("*") if path.is_symlink() or not path.is_dir())
    foreign = sorted({path.relative_to(job.output).as_posix() for path in found} - written)
    if foreign:
        raise OutputError(
            f"{job.output} also holds {', '.join(foreign[:5])}, which {INFO_NAME} does not list and which would be "
            "lost; move it elsewhere, or give another name"
        )


def _written_files(folder: Path) -> set[str]:
    """What `dataset.json` lists, itself included, whatever its schema version; nothing where it is not one of ours."""
    try:
        content = json.loads((folder / INFO_NAME).read_bytes())
    except (OSError, ValueError):
        return set()
    is_ours = isinstance(content, dict) and "dataset_sha256" in content and isinstance(content.get("files"), dict)
    return {INFO_NAME, *content["files"]} if is_ours else set()


def save_record(job: Job, record: PartRecord) -> None:
    put(record.text(), job.work / "done" / f"{record.part:09d}.json", job.layout.scratch)


def _is_whole(job: Job, record: PartRecord) -> bool:
    for name, entry in record.files.items():
        path = job.layout.data / name
        if not path.is_file() or hash_file(path) != entry:
            return False
    return True


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise OutputError(f"{path} is damaged: {error}; discard what was begun with --restart") from error
    return found


def _check_same(job: Job, found: dict[str, Any]) -> None:
    expected = json.loads(spelled(job.identity()))
    different = [name for name, value in expected.items() if found.get(name) != value]
    if different:
        details = "; ".join(f"{name}: {_short(found.get(name))}, now {_short(expected[name])}" for name in different)
        raise OutputError(
            f"{job.partial} holds the beginning of another job, which differs in {', '.join(different)} ({details}); "
            "go on with what it was begun with, or discard it with --restart"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:120]}… (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


@contextmanager
def output_errors(partial: Path) -> Iterator[None]:
    """What the file system refuses, as an OutputError."""
    try:
        yield
    except TokenizerError:
        raise
    except OSError as error:
        raise OutputError(
            f"{partial} cannot be written: {error}; make room or choose another place, and run the command again "
            "to go on"
        ) from error
