"""What tests ask of processes that they start."""

from __future__ import annotations

import os
import signal
import time

#: Seconds until a process is taken to hang: far longer than it needs on the busiest machine.
PATIENCE = 600


def ends_well(process: int) -> bool:
    """Whether the child of fork ended by itself, with status 0; one that hangs is killed."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False
