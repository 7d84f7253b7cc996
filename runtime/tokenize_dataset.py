#!/usr/bin/env python3
"""Encode a dataset of demonstrations with a bundle, or decode one. See `runtime/datasets/tokenize.py`."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import_module("runtime.bundle.start").run_script("runtime.datasets.tokenize")
