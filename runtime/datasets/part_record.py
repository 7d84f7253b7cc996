"""The record of a finished part, for the run that goes on: its files, what they were made from, and their steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.manifest import FileEntry
from ..bundle.reading import build
from .episodes import Run
from .errors import OutputError


@dataclass(frozen=True)
class PartRecord:
    """A finished part. digests: sha256 of every HASH_STEPS steps of the source; runs: in their order."""

    part: int
    files: dict[str, FileEntry]
    digests: tuple[str, ...]
    runs: tuple[Run, ...]

    def text(self, work: str) -> bytes:
        """The record as JSON with its own hash. work: the name of the job's folder, so that it fits no other."""
        # Not dataclasses.asdict of the whole, which copies every run and takes longer than all the rest.
        files = {name: dataclasses.asdict(entry) for name, entry in self.files.items()}
        content = {"part": self.part, "files": files, "digests": self.digests, "runs": self.runs}
        digest = hashlib.sha256(f"{work}\n{json.dumps(content)}".encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}).encode()

    @classmethod
    def parse(cls, text: bytes, work: str) -> PartRecord:
        """Raises OutputError for anything but what `text` gives."""
        try:
            content = json.loads(text)
            record = cls(
                build(int, content["part"], "part"),
                build(dict[str, FileEntry], content["files"], "files"),
                build(tuple[str, ...], content["digests"], "digests"),
                _runs(content["runs"]),
            )
            if any(len(bytes.fromhex(digest)) != hashlib.sha256().digest_size for digest in record.digests):
                raise ValueError("a digest is no sha256")
            is_spelled_so = record.text(work) == text
        # What any content of another shape can raise, deep nesting and non-ASCII text included.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise OutputError(
                f"a record of a finished part cannot be read ({type(error).__name__}: {error})"
            ) from error
        if not is_spelled_so:
            raise OutputError("a record of a finished part was altered after it was written: its hash is another")
        return record

    def check(self, part: int, files: set[str], steps: int, digests: int) -> None:
        """Raises OutputError unless it is about this part, its files, and so many steps and digests."""
        counted = sum(run[3] for run in self.runs)
        found = (self.part, set(self.files), counted, len(self.digests))
        if found != (part, files, steps, digests):
            raise OutputError(
                f"the record of part {part} is about part {self.part}, {len(self.files)} files, {counted} steps and "
                f"{len(self.digests)} digests; expected {len(files)} files, {steps} steps and {digests} digests"
            )


def _runs(values: Any) -> tuple[Run, ...]:
    """By numpy, for there may be one for every step. Raises ValueError."""
    runs = np.array(values)
    if runs.dtype != np.int64 or runs.shape[1:] != (4,):
        raise ValueError(f"runs are {runs.dtype} {list(runs.shape)}; expected int64 [n, 4]")
    _, first, last, count = runs.T
    if ((count < 1) | (last - first < count - 1)).any():
        raise ValueError("a run has no steps, or more than its frames")
    return tuple(map(tuple, runs.tolist()))
