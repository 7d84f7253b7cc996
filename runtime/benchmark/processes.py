"""What is measured in processes of their own: cold starts, and peers that users would otherwise run.

A new process tells what a robot waits for before its first chunk, and what memory that takes. With the peers elsewhere,
this process stays free of torch. Their side is `evidence/bench_peers.py`. It says in one line of JSON what it can run,
and then answers each line `INDEX CALLS` with the microseconds of so many calls. So its figures are timed in turn with
ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..bundle.arrays import Float64Array
from ..bundle.errors import BackendUnavailableError, InferenceError, TokenizerError
from ..bundle.models import ModelEntry, step_model
from .timing import Figure, copies_name, operation_name

_ROOT = Path(__file__).resolve().parents[len(__package__.split("."))]
_TIMEOUT_S = 120
_SCRIPT = Path(__file__).resolve().parents[2] / "evidence" / "bench_peers.py"


@dataclass(frozen=True)
class Start:
    """Medians over new processes, in seconds and bytes.

    first_result: from starting the process to the first decoded chunk, the interpreter's own start included; load:
    every file hashed and the golden vectors replayed; load_hashed: hashed alone. host_memory: growth of the resident
    set from before numpy to after the first decoding; gpu_memory: beside that of CUDA's context, after every decoder
    and the encoder ran at batch 1; None where it could not be told.
    """

    backend: str
    processes: int
    first_result: float
    import_numpy: float
    import_runtime: float
    load: float
    load_hashed: float
    first_decode: float
    host_memory: int | None
    gpu_memory: int | None


class StartError(TokenizerError):
    """A process gave no result; the message quotes it."""


def measure_start(folder: Path, backend: str, processes: int) -> Start:
    """Start `processes` processes for each way to load. Raises StartError."""
    verified = [_run(folder, backend, "verify") for _ in range(processes)]
    hashed = [_run(folder, backend, "hash") for _ in range(processes)]
    counted = _run(folder, backend, "gpu-memory")
    resident = [result["host_memory"] for result in verified if result["host_memory"] is not None]
    times = ("first_result", "import_numpy", "import_runtime", "load", "first_decode")
    return Start(
        backend=backend,
        processes=processes,
        load_hashed=median(result["load"] for result in hashed),
        host_memory=int(median(resident)) if resident else None,
        gpu_memory=counted["gpu_memory"],
        **{name: median(result[name] for result in verified) for name in times},
    )


def _run(folder: Path, backend: str, way: str) -> dict[str, Any]:
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from {__package__}.first_result import main; main()"
    command = [sys.executable, "-c", code, str(folder.resolve()), backend, way]
    start = time.perf_counter()
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise StartError(f"{backend} gave no first result in {_TIMEOUT_S} s") from error
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        raise StartError(
            f"a new process with {backend} ended with status {result.returncode}: {result.stderr.strip()[-500:]}"
        )
    found: dict[str, Any] = json.loads(lines[-1])
    # Both processes read the machine's one monotonic clock.
    found["first_result"] = found.pop("decoded_at") - start
    return found


# --- peers ------------------------------------------------------------------------------------------------------------


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
    request = json.dumps({**dataclasses.asdict(step_model(model, "comparing with peers")), "batches": list(batches)})
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
