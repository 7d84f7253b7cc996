#!/usr/bin/env python3
"""What is in a bundle, and what was proven when it was built? See `runtime/qualification/inspection.py`."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import_module("runtime.bundle.start").run_script("runtime.qualification.inspection")
