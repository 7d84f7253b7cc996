#!/usr/bin/env python3
"""Decide every tick of a flight record again. See `runtime/qualification/replay_flight.py`."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import_module("runtime.bundle.start").run_script("runtime.qualification.replay_flight")
