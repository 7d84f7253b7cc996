"""The file in which a closed-loop run keeps its finished episodes, so that it can go on after a kill.

The first JSON line says what the results depend on; each line after it is an episode, in the order in which they ended.
A line is on the disk before the next episode counts. A last line that was cut off is ignored. A line with the name of a
dropped cell removes the episodes of that cell that stand before it.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.simulation import EpisodeResult
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.reading import build, parse_json

FORMAT = "rfsq-rollout"
_DROPPED = "dropped"


@dataclass(frozen=True)
class Identity:
    """What all episodes of a file depend on; results of another identity are not mixed with them.

    loop_version: of the code that decides results, raised by hand when it changes; versions: of packages; hashes: of
    the data and checkpoints; chunk: actions executed between two plans.
    """

    loop_version: int
    seed: int
    chunk: int
    versions: Mapping[str, str]
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """One episode to run. index: counts the episodes of its task, the same scene in every cell; codec: fingerprint of
    the cell's codec; seed: of scene and expert."""

    task: str
    cell: str
    codec: str
    index: int
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.cell, self.index


@dataclass(frozen=True)
class Episode(Job):
    """One finished episode."""

    result: EpisodeResult


class EpisodeFile:
    """Open for appending; made by `open_episodes`."""

    def __init__(self, file: BinaryIO, path: Path, episodes: list[Episode]) -> None:
        self._file, self.path, self.episodes = file, path, episodes

    def append(self, episode: Episode) -> None:
        """On the disk when this returns."""
        _write(self._file, asdict(episode))
        self.episodes.append(episode)

    def check_codec(self, cell: str, codec: str, *, restart: bool = False) -> None:
        """Raises EvidenceError where the cell's episodes are of another codec; with `restart`, drops them instead."""
        for episode in self.episodes:
            if episode.cell == cell and episode.codec != codec:
                if restart:
                    _write(self._file, {_DROPPED: cell})
                    self.episodes = _without(self.episodes, cell)
                    return
                raise EvidenceError(
                    f"{self.path} holds episodes of {cell!r} with codec {episode.codec}, now it is {codec}: "
                    "its checkpoint, its fit or this processor is another one; --restart-changed drives such cells "
                    "anew and keeps the others"
                )


@contextmanager
def open_episodes(path: Path, identity: Identity) -> Iterator[EpisodeFile]:
    """The file with the episodes it already holds, for this process alone.

    Raises EvidenceError where another run has it open, where it is damaged before its last line, or where it was made
    under another identity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EvidenceError(f"another run is writing {path}; wait for it, or choose another --output") from error
        file.seek(0)
        content = file.read()
        # A kill may have cut off the last line; what follows the last line feed never counted.
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            file.truncate(len(whole))
        if whole:
            found, episodes = _parse(whole, path)
            _check_identity(found, identity, path)
        else:
            episodes = []
            _write(file, {"format": FORMAT, **asdict(identity)})
        yield EpisodeFile(file, path, episodes)


def read_episodes(path: Path) -> tuple[Identity, list[Episode]]:
    """The file as it stands, also while a run appends to it. Raises EvidenceError for a missing or damaged one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvidenceError(f"cannot read {path}: {error.strerror}; run {quoted('rollout')} first") from error
    return _parse(content[: content.rfind(b"\n") + 1], path)


def _write(file: BinaryIO, content: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    file.write(json.dumps(content, allow_nan=False, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _parse(content: bytes, path: Path) -> tuple[Identity, list[Episode]]:
    lines = content.splitlines()
    number = 0
    try:
        header = parse_json(lines[0])
        if header.pop("format") != FORMAT:
            raise ValueError("the first line names another format")
        identity = build(Identity, header, "it")
        episodes: list[Episode] = []
        for number, line in enumerate(lines[1:], start=1):  # noqa: B007
            content_of_line = parse_json(line)
            if _DROPPED in content_of_line:
                episodes = _without(episodes, content_of_line[_DROPPED])
            else:
                episodes.append(build(Episode, content_of_line, "it"))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EvidenceError(
            f"{path} is damaged at line {number + 1} ({error}); expected lines as {FORMAT} writes them: move it away"
        ) from error
    return identity, episodes


def _without(episodes: list[Episode], cell: str) -> list[Episode]:
    return [episode for episode in episodes if episode.cell != cell]


def _check_identity(found: Identity, expected: Identity, path: Path) -> None:
    before, now = asdict(found), asdict(expected)
    different = [name for name in now if before[name] != now[name]]
    if different:
        made, running = (", ".join(f"{name} {found[name]}" for name in different) for found in (before, now))
        raise EvidenceError(
            f"{path} was made with {made}; this run has {running}: the two cannot be mixed; move the file away to "
            "start anew, or choose another --output"
        )
