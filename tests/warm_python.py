"""Scripts of commands, each in a process of its own that need not import torch: it is a fork of one that has.

Importing torch, and the compiler that its optimisers import, takes two to four seconds of every command. What a command
imports itself, and when, `tests/test_commands.py` looks at in new processes.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_CURRENT_TEST = "PYTEST_CURRENT_TEST"


def run_warm(words: Sequence[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` gives in a folder. There is one process for each environment."""
    # Another one for each test.
    server = _server(tuple(sorted((name, value) for name, value in environment.items() if name != _CURRENT_TEST)))
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as printed:
        paths = [Path(printed) / name for name in ("stdout", "stderr")]
        print(json.dumps([*words]), folder, *paths, sep="\0", file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["python", *words], status, *(path.read_text("utf-8") for path in paths))


@functools.cache
def _server(environment: tuple[tuple[str, str], ...]) -> "subprocess.Popen[str]":
    """It ends with this process, which closes its standard input."""
    return subprocess.Popen(
        [sys.executable, __file__], env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    for name in ("torch._dynamo", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    gc.freeze()

    for line in sys.stdin:
        words, folder, *printed = line.rstrip("\n").split("\0")
        if not os.fork():
            start(json.loads(words), folder, printed)
            break
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)


def start(words: list[str], folder: str, printed: list[str]) -> None:
    """As Python starts a script."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
