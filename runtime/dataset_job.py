"""A conversion as a job of parts: each is made whole or not at all, so that a killed job goes on where it was.

While it runs everything lies in `OUT.partial`: `job.json` (what the job is), `lock`, and in a folder named after the
job `scratch/` (files being written), `done/` (one record for each finished part) and `data/`, which becomes OUT by a
rename when all of it is verified. So a worker that outlives its killed job spoils no other: it writes into the folder
of its own job, and nothing but the bytes that belong there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
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
from runtime.dataset_writers import Layout, hash_file, put, spelled
from runtime.errors import BackendUnavailableError, InvalidInputError, TokenizerError
from runtime.manifest import FileEntry
from runtime.tokenizer import ActionTokenizer


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
        return self.output.with_name(self.output.name + ".partial")

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
        return json.dumps(dataclasses.asdict(self)).encode()

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
        output=output.absolute(),
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


@contextmanager
def locked(job: Job) -> Iterator[None]:
    """The one process that works at this output; the lock ends with the process, however that ends."""
    path = job.partial / "lock"
    while True:
        try:
            job.partial.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except FileNotFoundError:
            continue  # The job that held it has just ended and taken the folder away.
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{job.partial} is in use: another process is making {job.output}; wait for it"
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
                    if job.partial.exists() and not (job.partial / "job.json").exists():
                        shutil.rmtree(job.partial, ignore_errors=True)
                return


def begin(job: Job, *, overwrite: bool, restart: bool) -> set[int]:
    """Lay the folder out, or find what an earlier run of the same job has finished, read again and hashed.

    Raises OutputError where the output exists, or another job was begun in its place.
    """
    if job.output.exists():
        _refuse_existing(job, overwrite=overwrite)
    layout, identity = job.layout, job.partial / "job.json"
    if restart:
        _discard(job.partial)
    if identity.is_file():
        _check_same(job, _read_identity(identity))
    else:
        # Nothing was begun yet: job.json is written before any part.
        _discard(job.partial)
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


def _discard(partial: Path) -> None:
    """Empty the folder; what it was goes first, so that nothing of it is used after a kill."""
    (partial / "job.json").unlink(missing_ok=True)
    _clear(partial, keep=("lock",))


def _clear(partial: Path, keep: Collection[str]) -> None:
    for path in partial.iterdir():
        if path.name in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def finish(job: Job, *, overwrite: bool) -> None:
    """Put the data in place; killed between any two of these lines, the job ends the same when it is run again."""
    if job.output.exists():
        _refuse_existing(job, overwrite=overwrite)
        replaced = job.work / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        job.output.rename(replaced)
    job.layout.data.rename(job.output)
    _clean_up(job.partial)


def was_finished(job: Job) -> bool:
    """Whether an earlier run of this job was killed when all but cleaning up was done, which is made up for here."""
    identity = job.partial / "job.json"
    if not (job.output.is_dir() and identity.is_file()) or any(job.partial.glob("*/data")):
        return False
    is_same = bool(_read_identity(identity) == json.loads(spelled(job.identity())))
    _clean_up(job.partial)
    return is_same


def _clean_up(partial: Path) -> None:
    """Take the folder away; what it was goes last, so that a run after a kill knows that the job was finished."""
    _clear(partial, keep=("lock", "job.json"))
    (partial / "job.json").unlink()
    # What a worker that outlived its job may still write here is of no use to anyone.
    shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(job: Job, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{job.output} exists; give another name, or --overwrite to replace it once all is verified")
    if not (job.output / INFO_NAME).is_file():
        raise OutputError(
            f"{job.output} is not a dataset that was written here: it has no {INFO_NAME}; give another name, or remove "
            "it yourself"
        )


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
def output_errors(job: Job) -> Iterator[None]:
    """What the file system refuses, as an OutputError."""
    try:
        yield
    except TokenizerError:
        raise
    except OSError as error:
        raise OutputError(
            f"{job.partial} cannot be written: {error}; make room or choose another place, and run the command again "
            "to go on"
        ) from error
