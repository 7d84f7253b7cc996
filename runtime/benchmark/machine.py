"""The machine that the figures come from: processor, GPU, libraries and load."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)


def machine_facts(gpu: Any, versions: Mapping[str, str]) -> dict[str, str]:
    """By name, for people. gpu: the module `gpu`, or None; versions: of other libraries."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores usable",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    if gpu is not None:
        device = gpu.open_device()
        facts["GPU"] = f"{device}, {device.memory / 1e9:.0f} GB"
        facts["driver"] = f"{_driver_version()}, CUDA {device.driver}"
    found = {"Python": platform.python_version(), **versions}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return {**facts, "system": platform.platform(), "versions": ", ".join(f"{n} {v}" for n, v in found.items())}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "version not told"
    return next((word for word in text.split() if word.count(".") >= 1 and word[0].isdigit()), "version not told")
