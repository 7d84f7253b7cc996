"""A conversion as a job of parts. A part is made whole or not at all, so that a killed job can go on."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..bundle.errors import BackendUnavailableError, InvalidInputError
from ..bundle.models import ChunkModel, ModelEntry, StepModel
from ..bundle.ownership import Ownership
from ..tokenizer import ActionTokenizer
from .errors import OutputError
from .format import HASH_STEPS, Conversion, MadeWith, Storage, spelled
from .rows import ChunkTokens, Content, StepTokens
from .source_base import Source, optional

#: The file in the folder of a job that its process locks; it also marks the folder as ours.
LOCK_NAME = "lock"


@dataclass(frozen=True, eq=False, kw_only=True)
class Job(Conversion):
    """What to make of which source. It can be pickled, so that workers elsewhere do the same job."""

    source: Source
    key: str
    filter_key: str
    bundle: Path
    output: Path

    @property
    def partial(self) -> Path:
        return partial_folder(self.output)

    @cached_property
    def work(self) -> Path:
        """The folder in `partial` that no other job uses. Ask for it while `partial` is locked."""
        digest = hashlib.sha256(spelled(self.identity())).hexdigest()[:16]
        return self.partial / ownership_of(self.partial).name(digest)

    @property
    def num_parts(self) -> int:
        return -(-self.source.num_steps // self.steps_per_file)

    @property
    def source_width(self) -> int:
        """Values of a row in the source."""
        return self.model.source_width(self.content)

    @property
    def data(self) -> Path:
        """What becomes the output."""
        return self.work / "data"

    @property
    def scratch(self) -> Path:
        """Where files are written, on the file system of `data`."""
        return self.work / "scratch"

    @property
    def block_steps(self) -> int:
        return min(self.model.sizes(self.content).block, self.steps_per_file)

    @property
    def stamps(self) -> list[list[int]]:
        """The stamps of all files, as JSON gives them back; they may change though the steps stay the same."""
        return [list(file.stamp) for file in self.source.files]

    def rows(self, part: int) -> tuple[int, int]:
        start = part * self.steps_per_file
        return start, min(start + self.steps_per_file, self.source.num_steps)

    def metadata(self, first_row: int, source_sha256: str) -> dict[str, str]:
        """The metadata of every Parquet file, by which a file that was taken out of its folder is still known."""
        return {
            "rfsq.schema_version": str(self.model.schema_version),
            "rfsq.content": self.content,
            "rfsq.fingerprint": self.fingerprint,
            "rfsq.model": json.dumps(dataclasses.asdict(self.model), sort_keys=True),
            "rfsq.ordering": self.model.ordering,
            "rfsq.first_row": str(first_row),
            "rfsq.source_sha256": source_sha256,
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same for a job to go on. The place of the output may differ."""
        return {
            "source": {
                "name": self.source.name,
                "key": self.key,
                # Left out, so that jobs go on that were begun before there were filter keys.
                **({"filter_key": self.filter_key} if self.filter_key else {}),
                "num_steps": self.source.num_steps,
                "files": [
                    {"name": file.name, "size": file.size, "mtime_ns": file.mtime_ns} for file in self.source.files
                ],
            },
            **dataclasses.asdict(Conversion(**self.facts())),
        }


def partial_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def ownership_of(partial: Path) -> Ownership:
    """The key in the folder's marker. Raises OutputError where it has none of ours."""
    found = Ownership.read(partial / LOCK_NAME)
    if found is None:
        raise OutputError(f"{partial} is no folder of a job: its {LOCK_NAME} is missing or was altered")
    return found


def plan(
    source: Source,
    tokenizer: ActionTokenizer,
    model: ChunkTokens | StepTokens,
    options: argparse.Namespace,
    storage: Storage,
) -> Job:
    """The job, checked. options: of the command `tokenize`.

    Raises InvalidInputError for settings that do not fit, SourceError for an unfit first step.
    """
    content: Content = "actions" if options.decode else "tokens"
    rows, block = options.steps_per_file or model.sizes(content).rows, model.sizes(content).block
    if rows % HASH_STEPS or (rows > block and rows % block):
        smaller = f", or a smaller multiple of {HASH_STEPS}" if block > HASH_STEPS else ""
        raise InvalidInputError(f"--steps-per-file is {rows}; expected a multiple of {block}{smaller}")
    job = Job(
        source=source,
        key=options.key or "",
        # Both spellings choose the same episodes.
        filter_key=(options.filter_key or "").removeprefix("mask/"),
        bundle=options.bundle.absolute(),
        fingerprint=tokenizer.fingerprint,
        model=model,
        made_with=MadeWith(tokenizer.backend.name, tokenizer.backend.description, optional("pyarrow").__version__),
        content=content,
        storage=storage,
        compression=options.compression,
        steps_per_file=rows,
        output=options.output.resolve(),
    )
    with closing(source.open(job.source_width)) as reader:
        reader.read(0, 1)
    return job


def token_model(model: ModelEntry, options: argparse.Namespace) -> ChunkTokens | StepTokens:
    """What rows of tokens of this bundle hold. options: of the command `tokenize`.

    Raises InvalidInputError for a bundle whose tokens a dataset cannot hold, and options that are not for it.
    """
    if isinstance(model, ChunkModel):
        return _chunk_tokens(model, options)
    assert isinstance(model, StepModel)  # there are no others
    given = [name for name in ("--stride", "--tokens") if getattr(options, name[2:]) is not None]
    if given:
        raise InvalidInputError(
            f"{' and '.join(given)} is for chunk tokens, and this bundle has {model.mode} tokens, a row for each step "
            "with all layers; leave it out"
        )
    if model.has_stats:
        raise InvalidInputError(
            "tokens of a `dynamic` bundle mean nothing without the statistics of their own step, which no dataset of "
            "tokens holds: build a bundle with `--conditioning recovered` (the same tokens, decoded on their own) or "
            "`--conditioning calibrated`"
        )
    if model.vocabulary > 256:
        raise InvalidInputError(f"the bundle has {model.vocabulary} levels; tokens of one byte hold at most 256")
    names = (field.name for field in dataclasses.fields(StepTokens))
    return StepTokens(**{name: getattr(model, name) for name in names})


def _chunk_tokens(model: ChunkModel, options: argparse.Namespace) -> ChunkTokens:
    chosen = {"--stride": (options.stride or 1, model.chunk_length), "--tokens": (options.tokens, model.num_tokens)}
    for name, (value, most) in chosen.items():
        if value is not None and value > most:
            raise InvalidInputError(f"{name} is {value}; expected 1 ... {most}, as this bundle has it")
    return ChunkTokens(
        mode=model.mode,
        chunk_length=model.chunk_length,
        action_dim=model.action_dim,
        num_tokens=options.tokens or model.num_tokens,
        vocabulary=model.vocabulary,
        stride=options.stride or 1,
    )


def open_tokenizer(job: Job) -> ActionTokenizer:
    """The tokenizer of a job, for another process. Raises BackendUnavailableError for another device."""
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
