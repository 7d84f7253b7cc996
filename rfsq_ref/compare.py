#!/usr/bin/env python3
"""Compare naive and robust tokens, and peers at equal bits, on held-out episodes. See `evidence/compare_command.py`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from rfsq.runtime.bundle.start import run_script

    run_script("rfsq.evidence.compare_command")
