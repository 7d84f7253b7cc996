"""Runs `tokenize_dataset.py` again and again while the system refuses a call on its files; run with faulty_files.c.

Each run is a forked child, in which the n-th call fails, or all from the n-th on, with the errors taken in turns. It
must end with 0 or 2 and without a traceback; and the same command, undisturbed, must then give what it always gives.
"""

import ctypes
import gc
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py  # noqa: F401  # here, so that every child finds loaded what it needs
import numpy as np
import pyarrow.compute
import pyarrow.parquet
import pyarrow.types

from rfsq.runtime.datasets.tokenize import main
from tests.runtime.datasets.command import open_once

SHIM = ctypes.CDLL(None)
# With its first array pyarrow imports pandas, where there is one: three times as long as all else that a child does.
pyarrow.array(np.zeros(1))


def child(arguments: list[str], arm: Callable[[], None], log: Path) -> tuple[int, int]:
    """Exit status, and how many calls there were."""
    sys.stdout.flush()
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        arm()
        status = 1
        try:
            status = main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(send, str(SHIM.faulty_seen()).encode())
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as answer:
        seen = int(answer.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def files(folder: Path) -> dict[str, str]:
    found = sorted(path for path in (folder, *folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def run(
    arguments: list[str], output: Path, faulty: Path, before: Path, errors: list[int], every: int, goes_on: list[bool]
) -> int:
    log = output.parent.with_name("log")

    def arm(nth: int, error: int, goes_on: bool) -> Callable[[], None]:
        return lambda: SHIM.faulty_arm(os.fsencode(faulty), ctypes.c_long(nth), error, int(goes_on))

    def fresh() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        if before.exists():
            shutil.copytree(before, output)

    fresh()
    status, total = child(arguments, arm(0, 0, False), log)
    assert status == 0, log.read_text()
    expected, whole = files(output.parent), files(output)
    calls = range(1, total + 1, every)
    # Where all are tried, each goes on and does not; of a sample every other one goes on.
    chosen = itertools.product(calls, goes_on) if every == 1 else zip(calls, itertools.cycle(goes_on), strict=False)
    for index, (nth, goes) in enumerate(chosen):
        fresh()
        old = files(output)
        error = errors[index % len(errors)]
        status, _ = child(arguments, arm(nth, error, goes), log)
        told = f"call {nth} of {total}, {os.strerror(error)}, goes on: {goes}: status {status}\n{log.read_text()}"
        assert status in (0, 2), told
        assert "Traceback" not in told, told
        # Complete or not there; where something was to be replaced, it may be set aside till the next run.
        found = files(output)
        assert found in ({}, old, whole), told
        assert status == 2 or found == whole, told
        status, _ = child(arguments, lambda: None, log)
        # 2: all was done but for cleaning up, so that the output exists.
        assert status == 0 or (status == 2 and found == whole), f"{told}then {status}\n{log.read_text()}"
        assert files(output.parent) == expected, told
    return total


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    open_once(given["arguments"])
    # A child that collects would copy all that is here.
    gc.collect()
    gc.freeze()
    paths = [Path(given.pop(name)) for name in ("output", "faulty", "before")]
    print(run(given.pop("arguments"), *paths, **given))
