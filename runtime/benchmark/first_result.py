"""The shortest program of a robot: import, load, decode one chunk. Prints the times as one line of JSON.

The benchmark runs it in new processes. It imports nothing that the runtime does not need itself.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    folder, backend, way = sys.argv[1:]
    resident_before = resident_bytes()
    free_before = _free_gpu_memory() if way == "gpu-memory" else None
    start = time.perf_counter()
    import numpy as np

    imported_numpy = time.perf_counter()
    from .. import ActionTokenizer

    imported_runtime = time.perf_counter()
    tokenizer = ActionTokenizer.load(folder, backend=backend, verify=way == "verify")
    loaded = time.perf_counter()
    model = tokenizer.model
    tokens = np.zeros(model.tokens_shape(1), np.int32)
    stats = np.ones(model.stats_shape(1), np.float32) if model.has_stats else None
    tokenizer.decode(tokens, stats)
    decoded = time.perf_counter()
    resident_after = resident_bytes()
    gpu_memory = None
    if free_before is not None:
        tokenizer.warmup()
        free_after = _free_gpu_memory()
        gpu_memory = None if free_after is None else free_before - free_after
    found = {
        "import_numpy": imported_numpy - start,
        "import_runtime": imported_runtime - imported_numpy,
        "load": loaded - imported_runtime,
        "first_decode": decoded - loaded,
        "decoded_at": decoded,
        "host_memory": None if resident_before is None or resident_after is None else resident_after - resident_before,
        "gpu_memory": gpu_memory,
    }
    tokenizer.close()
    print(json.dumps(found), flush=True)


def resident_bytes() -> int | None:
    """The resident memory of this process in bytes; None where the system does not tell (no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _free_gpu_memory() -> int | None:
    """In bytes; None without a GPU or without cuda-python."""
    try:
        from ..backends.gpu import driver as cuda_api
    except ImportError:
        return None
    from ..bundle.errors import TokenizerError

    try:
        cuda_api.open_device()
        return cuda_api.free_memory()
    except TokenizerError:
        return None


if __name__ == "__main__":
    main()
