#!/usr/bin/env python3
"""A control loop from end to end: a policy in another process, ControlDecoder, a robot, and a fault on demand.

    python examples/control_loop.py build/bundle                               500 Hz, no simulator
    python examples/control_loop.py build/bundle --robosuite --fault killed    a Panda arm at 20 Hz; needs .[sim]

policy_process.py is the policy, plain_robot.py and panda.py are the robots, loop_report.py tells how it went. The exit
status is 0 when every verdict is a ✓, 1 when not, 2 when nothing could be run.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from examples.missing_packages import explain_missing_packages

    explain_missing_packages()

import argparse
import logging
import os
import time
from contextlib import ExitStack
from typing import Any

from examples.fault_switch import FAULTS, FaultSwitch
from examples.loop_report import Witness, report
from examples.plain_robot import PlainRobot, SwingPolicy
from examples.policy_process import policy_process, wait_until_ready
from rfsq.runtime import ActionTokenizer, ControlDecoder, RealtimeConfig, RfsqError, TokenizerError, apply_realtime
from rfsq.runtime.bundle.console import escape_what_cannot_be_shown
from rfsq.runtime.qualification.injection import faulty


def main() -> int:
    # Not prepare_console: with it, writing to a policy that is gone would end the loop by SIGPIPE.
    escape_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--robosuite", action="store_true", help="drive a simulated Panda arm")
    parser.add_argument("--task", default="Lift", help="of the arm")
    parser.add_argument("--seed", type=int, default=0, help="of the task")
    parser.add_argument("--seconds", type=float, help="default: 5; with --robosuite 10")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--realtime", action="store_true", help="ask the system for everything it can do")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        return 0 if run(options) else 1
    except RfsqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(options: argparse.Namespace) -> bool:
    with ExitStack() as stack:
        tokenizer = stack.enter_context(ActionTokenizer.load(options.bundle))
        spares = [stack.enter_context(ActionTokenizer.load(options.bundle, backend="onnxruntime"))]
        backend = None
        if options.fault in ("backend", "nan"):
            tokenizer, backend = faulty(tokenizer)
        if options.fault == "nan":
            spares = []

        policy: Any = SwingPolicy(tokenizer.model.action_units, tokenizer.model.action_offset)
        if options.robosuite:
            from examples.panda import ExpertPolicy, Panda

            policy = ExpertPolicy(options.task, options.seed)
        # Before anything real-time: the policy must not inherit the loop's priority and core.
        process, connection = stack.enter_context(policy_process(options.bundle, policy))
        robot: Any = Panda(options.task, options.seed) if options.robosuite else PlainRobot(tokenizer.model)
        seconds = robot.seconds if options.seconds is None else options.seconds
        if not seconds >= robot.fault_at_s + 1:
            raise TokenizerError(f"--seconds is {seconds:g}; expected {robot.fault_at_s + 1:g} at least, for the fault")
        link = wait_until_ready(process, connection)
        decoder = stack.enter_context(
            ControlDecoder(tokenizer, robot.config, fallbacks=spares, position=robot.position)
        )
        decoder.warmup()
        if options.realtime:
            cpus = (max(os.sched_getaffinity(0)),)
            print(*apply_realtime(RealtimeConfig(True, fifo_priority=50, cpus=cpus, freeze_gc=True)), sep="\n")

        # The loop. It takes one message per tick, or none, and never waits for one.
        period_s, witness = robot.config.period_s, Witness(robot.config, robot.position)
        switch = FaultSwitch(options.fault, robot.fault_at_s, period_s)
        due = time.monotonic()
        for tick in range(round(seconds / period_s)):
            fault = switch.begin(tick, process, backend)
            chunk = link.receive()
            is_asked = link.ask(robot.observe, fault)
            if chunk is None:
                result = decoder.step()
            else:
                result = decoder.step(
                    chunk.tokens, stats=chunk.stats, sequence=chunk.sequence, observed_ns=chunk.observed_ns
                )
            witness.see(result)
            robot.act(result.actions)

            switch.injected += is_asked and fault != ""
            due += period_s
            late_s = time.monotonic() - due
            if late_s > 0:  # the ticks after it do not hurry
                due += late_s
                witness.overruns += 1
            else:
                time.sleep(-late_s)
        decoder.flush()
        return report(witness, decoder, robot, switch)


if __name__ == "__main__":
    sys.exit(main())
