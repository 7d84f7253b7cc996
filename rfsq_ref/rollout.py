#!/usr/bin/env python3
"""Drive simulated robots through tokens of every codec. See `evidence/rollout_command.py`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from rfsq.runtime.bundle.start import run_script

    run_script("rfsq.evidence.rollout_command")
