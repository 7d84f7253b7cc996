"""Cold start and memory of a backend, in new processes: what a robot waits for before its first chunk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..bundle.errors import TokenizerError

_ROOT = Path(__file__).resolve().parents[len(__package__.split("."))]
_TIMEOUT_S = 120


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
