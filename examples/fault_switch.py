"""`--fault`: what goes wrong on purpose, for how long, and which status answers it."""

from multiprocessing.process import BaseProcess

from rfsq.runtime import Status
from rfsq.runtime.qualification.injection import Fault, FaultyBackend

FAULT_S = 0.25
FAULTS = {
    "none": ("nothing", Status.OK),
    "bad": ("a token that does not exist, in each chunk", Status.BAD_TOKEN),
    "late": ("each chunk comes when its time has passed", Status.STALE),
    "duplicate": ("each chunk comes twice", Status.STALE),
    "reordered": ("of two chunks the newer comes first", Status.STALE),
    "killed": ("SIGKILL to the policy", Status.STALE),
    "hang": ("the policy sleeps for a second", Status.STALE),
    "backend": ("the backend raises, and there is a spare one", Status.OK),
    "nan": ("the backend makes NaN, and there is no spare one", Status.NONFINITE),
}
_OF_BACKEND = {"backend": Fault.RAISES, "nan": Fault.NAN}


class FaultSwitch:
    """On for FAULT_S. The policy is killed, the backend broken from here; the other faults travel with the question."""

    def __init__(self, fault: str, start_s: float, period_s: float) -> None:
        self.fault, self.first = fault, round(start_s / period_s)
        self._end = self.first + round(FAULT_S / period_s)
        self.start_s, self.injected = start_s, 0

    def begin(self, tick: int, process: BaseProcess, backend: FaultyBackend | None) -> str:
        """What the policy is told to do wrong on this tick."""
        is_on = self.first <= tick < self._end
        if backend is not None:
            backend.fault = _OF_BACKEND[self.fault] if is_on else Fault.NONE
        elif self.fault == "killed" and tick == self.first:
            process.kill()
            self.injected += 1
        elif is_on and self.fault != "none":
            return self.fault
        return ""
