"""Peers, which users would otherwise run, timed in a process of their own: this one stays free of torch.

The other side is `evidence/bench_peers.py`. It says in one line of JSON what it can run, and then answers each line
`INDEX CALLS` with the microseconds of so many calls. So its figures are timed in turn with ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.arrays import Float64Array
from ..bundle.errors import BackendUnavailableError, InferenceError
from ..bundle.manifest import ModelEntry
from .timing import Figure, copies_name, operation_name

_SCRIPT = Path(__file__).resolve().parents[2] / "evidence" / "bench_peers.py"


@dataclass(frozen=True, eq=False)
class Peers:
    """versions: by name; unavailable: reasons by peer; remarks: for people."""

    versions: dict[str, str]
    figures: tuple[Figure, ...]
    unavailable: dict[str, str]
    remarks: tuple[str, ...]


@contextlib.contextmanager
def open_peers(model: ModelEntry, batches: Sequence[int], device_floor: str) -> Iterator[Peers]:
    """Start the peers with the bundle's sizes; their process ends with the context.

    device_floor: the floor of calls on the GPU, or nothing. Raises BackendUnavailableError where they do not start.
    """
    if not _SCRIPT.is_file():
        raise BackendUnavailableError(
            f"there is no {_SCRIPT}; the peers need the whole repository, not `runtime` alone"
        )
    request = json.dumps({**dataclasses.asdict(model), "batches": list(batches)})
    # Not a pipe: nobody would empty it while the peers work.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
        )
        assert process.stdin is not None
        try:
            remote = _Remote(process, log)
            try:
                offered = remote.read()
            except InferenceError as error:
                raise BackendUnavailableError(str(error)) from error
            yield Peers(
                versions=offered["versions"],
                figures=tuple(
                    _figure(index, entry, model, remote, device_floor) for index, entry in enumerate(offered["figures"])
                ),
                unavailable=offered["unavailable"],
                remarks=tuple(offered["remarks"]),
            )
        finally:
            # The end of its input is the end of its work.
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Remote:
    """The process of the peers; it answers each question with one line of JSON."""

    def __init__(self, process: subprocess.Popen[str], log: Any) -> None:
        self._process, self._log = process, log

    def take(self, index: int, calls: int) -> Float64Array:
        assert self._process.stdin is not None
        # Writing to a process that has ended would end this one too, where SIGPIPE has its default action.
        if self._process.poll() is None:
            self._process.stdin.write(f"{index} {calls}\n")
            self._process.stdin.flush()
        return np.array(self.read(), np.float64)

    def read(self) -> Any:
        """Raises InferenceError where the process has ended, or says that a call failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            lines = self._log.read().strip().splitlines()
            raise InferenceError(
                f"the peers' process ended with status {status}: {lines[-1] if lines else 'no message'}"
            )
        answer = json.loads(line)
        if isinstance(answer, str):
            raise InferenceError(answer)
        return answer


def _figure(index: int, entry: dict[str, Any], model: ModelEntry, remote: _Remote, device_floor: str) -> Figure:
    operation = operation_name(model, entry["prefix"])
    has_copies = entry["path"] == "host" and entry["on_gpu"]
    return Figure(
        backend=entry["peer"],
        operation=operation,
        path=entry["path"],
        batch=entry["batch"],
        take=functools.partial(remote.take, index),
        floor=copies_name(operation) if has_copies else device_floor if entry["path"] == "device" else "",
        bytes_in=entry["bytes_in"],
        bytes_out=entry["bytes_out"],
    )
