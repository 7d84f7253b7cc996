"""Which compiled C engines this processor can run: architecture and the vector instructions that it has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

#: Flags of /proc/cpuinfo that the x86-64 levels of the System V ABI ask for, beyond the baseline; the best level first.
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_X86_LEVELS = {
    "x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": _V3,
    "x86-64": set[str](),
}
#: What platform.machine() says, and what we call it.
_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


@cache
def host_targets() -> tuple[str, ...]:
    """Targets that run here, such as `x86-64-v3`, best first; the last runs on every machine of this architecture."""
    architecture = _ARCHITECTURES.get(platform.machine().lower(), platform.machine().lower())
    if architecture != "x86-64":
        return (architecture,)
    # Where there is no Linux, only the baseline is certain.
    flags = set(cpu_info("flags").split())
    return tuple(level for level, needed in _X86_LEVELS.items() if needed <= flags)


def cpu_info(*names: str) -> str:
    """What Linux says of the first processor under the first of these names that comes; empty where it says nothing."""
    lines = (line for line in system_text("/proc/cpuinfo").splitlines() if line.startswith(names))
    return next(lines, "").partition(":")[2].strip()


def system_text(path: str) -> str:
    """What the system tells in a file of its own; empty where it has none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
