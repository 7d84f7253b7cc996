#!/usr/bin/env python3
"""A page that shows what each further token adds, on your own episodes. See `runtime/explain/command.py`."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import_module("runtime.bundle.start").run_script("runtime.explain.command")
