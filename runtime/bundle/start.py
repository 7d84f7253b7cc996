"""How a script starts: it imports nothing but this first, so that Ctrl-C during the imports is no traceback."""

import sys
from importlib import import_module
from typing import NoReturn


def run_script(module: str) -> NoReturn:
    """End with the status of the `main` of `module`, or with 130 where Ctrl-C comes first."""
    try:
        import_module(".command", __package__).run_command(module)
    except KeyboardInterrupt:
        end_interrupted()
    raise AssertionError("a command ends by itself")


def end_interrupted() -> NoReturn:
    """For whoever was interrupted before there was a parser that knows more."""
    print("interrupted", file=sys.stderr)
    sys.exit(130)
