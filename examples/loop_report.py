"""What a run of the loop has shown: every tick is kept, every action checked once more, and then a verdict."""

from typing import Any

import numpy as np
import numpy.typing as npt

from examples.fault_switch import FAULTS, FaultSwitch
from rfsq.runtime import ControlConfig, ControlDecoder, ControlResult, Status

#: Of the end of a run, in which it must go on or stand still.
END_S = 0.25


class Witness:
    """Knows limits and slew from the settings and nothing else; sees every action on its way to the robot."""

    def __init__(self, config: ControlConfig, start: tuple[float, ...]) -> None:
        self.config, self._last = config, np.array(start)
        self._low, self._high = np.array(config.action_low), np.array(config.action_high)
        self._step = np.array(config.max_relative_step)
        self.unsafe = self.overruns = 0
        self.sent: list[npt.NDArray[np.float64]] = []
        self.ticks: list[tuple[Status, bool, bool]] = []

    def see(self, result: ControlResult) -> None:
        now = result.actions.astype(np.float64)
        is_safe = (now >= self._low) & (now <= self._high) & (np.abs(now - self._last) <= self._step)
        self.unsafe += not is_safe.all()  # NaN compares false
        self._last = now
        self.sent.append(now)
        self.ticks.append((result.status, result.is_held, result.fell_back))

    def stands_still(self) -> bool:
        """At the end: no motion, and the gripper's last command before the policy fell silent."""
        served = [index for index, (_, is_held, _) in enumerate(self.ticks) if not is_held]
        gripper = list(self.config.gripper)
        motions = [index for index in range(len(self._last)) if index not in gripper]
        end = np.stack(self.sent[-round(END_S / self.config.period_s) :])
        is_kept = bool(served) and (end[:, gripper] == self.sent[served[-1]][gripper]).all()
        return bool((end[:, motions] == 0).all() and is_kept)


def report(witness: Witness, decoder: ControlDecoder, robot: Any, switch: FaultSwitch) -> bool:
    """Prints what was injected, how it was answered, and whether all is well."""
    health, fault, config = decoder.snapshot(), switch.fault, witness.config
    what, answer = FAULTS[fault]
    count = f" x{switch.injected}" * (switch.injected > 0)
    begin = f", from {switch.start_s:g} s on" * (fault != "none")
    statuses = ", ".join(f"{name} {count}" for name, count in health.statuses.items() if count)
    print(f"robot     {robot.name}")
    print(f"injected  {fault}{count}: {what}{begin}")
    print(f"statuses  {statuses}; held on {health.held} of {health.ticks} ticks{', latched' * health.is_latched}")
    print(f"backend   {health.backend}; {health.fallbacks} fallbacks, {health.recoveries} recoveries")
    print(f"step      p50 {health.p50_us:.0f}  p99 {health.p99_us:.0f}  max {health.max_us:.0f} us")
    print(f"loop      {witness.overruns} ticks ended after their period")

    after = witness.ticks[switch.first :]
    verdicts = [(not witness.unsafe, f"{witness.unsafe} of {health.ticks} actions outside limits or slew")]
    if fault == "backend":
        is_at_once = any(fell_back for _, _, fell_back in after)
        when = "on the same tick" if is_at_once else "from the next chunk on, for the deadline had passed"
        verdicts.append((is_at_once or health.recoveries > 0, f"answered by the spare backend {when}"))
    elif fault != "none":
        answered = sum(status is answer for status, _, _ in after)
        verdicts.append((answered > 0, f"answered by {answer.name} on {answered} ticks"))
    if fault == "killed":
        verdicts.append((witness.stands_still(), "at the end it stands still, with the gripper's last command"))
    else:
        end = witness.ticks[-round(END_S / config.period_s) :]
        verdicts.append((any(status is Status.OK for status, _, _ in end), "at the end it is served"))
    verdicts += robot.verdicts(fault)
    for is_right, text in verdicts:
        print(f"{'✓' if is_right else '✗'} {text}")
    return all(is_right for is_right, _ in verdicts)
