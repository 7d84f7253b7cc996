#!/usr/bin/env python3
"""A plain 500 Hz loop: tokens come from another process, through a pipe; `--fault` makes that process misbehave."""

import argparse
import logging
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from runtime import ActionTokenizer, ControlDecoder
from runtime.control_soak import chunks_of, config_for

PERIOD_S = 0.002
FAULTS = ("none", "bad", "late", "duplicate", "killed")


def produce(connection: Connection, bundle: Path, fault: str) -> None:
    """The policy: a chunk every four ticks; every 50th is faulty."""
    with ActionTokenizer.load(bundle) as tokenizer:
        tokens = chunks_of(tokenizer, 16)[0]
    number = 0
    while True:
        number += 1
        chunk, observed, sequence = tokens[number % 16].copy(), time.monotonic_ns(), number
        if number % 50 == 0:
            if fault == "killed":
                return
            if fault == "bad":
                chunk[0, 0, 0, 0] = -1
            observed -= 10**9 if fault == "late" else 0
            sequence -= 1 if fault == "duplicate" else 0
        try:
            connection.send((sequence, observed, chunk))
        except OSError:
            return
        time.sleep(4 * PERIOD_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    policy = context.Process(target=produce, args=(sender, options.bundle, options.fault), daemon=True)
    with ActionTokenizer.load(options.bundle) as tokenizer:
        config = config_for(tokenizer, chunks_of(tokenizer, 16)[2], stale_after_s=0.2)
        with ControlDecoder(tokenizer, config, position=(0.0,) * config.action_dim) as decoder:
            decoder.warmup()
            policy.start()
            sender.close()
            is_open, due = True, time.monotonic()
            for _ in range(round(options.seconds / PERIOD_S)):
                due += PERIOD_S
                time.sleep(max(0.0, due - time.monotonic()))
                message = None
                try:
                    while is_open and receiver.poll():
                        message = receiver.recv()
                except EOFError:
                    is_open = False
                if message is None:
                    decoder.step()
                else:
                    decoder.step(message[2], sequence=message[0], observed_ns=message[1])
            print(decoder.snapshot())
    policy.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
