#!/usr/bin/env python3
"""Compare naive and robust tokens, and peers at equal bits, on held-out episodes: table, JSON and one HTML page.

Exit status: 0 when calibrated robust tokens have more than 30 % less action error than naive ones, 1 when they have
not, 2 when the input cannot be used. This is a command: the comparison itself is the room `evidence/`, and nothing in
`rfsq_ref` imports it.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.console import explain_missing_packages

    explain_missing_packages()

from rfsq.evidence.report import main

if __name__ == "__main__":
    sys.exit(main())
