#!/usr/bin/env python3
"""How fast and how steady are a bundle's backends on this machine? See `runtime/benchmark/command.py`."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import_module("runtime.bundle.start").run_script("runtime.benchmark.command")
