"""The command `rfsq`: what the scripts of the rooms do, under one name."""

from __future__ import annotations

import sys

from . import __version__
from .runtime.bundle.advice import COMMANDS
from .runtime.bundle.command import UNUSABLE, end_with, run_command
from .runtime.bundle.console import prepare_console


def main() -> None:
    """Ends with the status of the command, or with 2 where there is none of that name."""
    prepare_console()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        end_with(lambda: print(_usage()))
    elif name == "--version":
        end_with(lambda: print(f"rfsq {__version__}"))
    elif name in COMMANDS:
        # As argparse names a command in its help.
        sys.argv[:2] = [f"rfsq {name}"]
        run_command(f"{__package__}.{COMMANDS[name].module}")
    else:
        print(f"error: {name!r} is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(UNUSABLE)


def _usage() -> str:
    lines = [f"  {name:10} {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rfsq COMMAND …",
            "",
            "Robust RFSQ action tokens on robots.",
            "",
            *lines,
            "",
            "rfsq COMMAND --help tells more.",
            "",
            "exit status: 0 done; 1 a check failed; 2 bad input or a missing package, as the message says; 130 interrupted",
        ]
    )


if __name__ == "__main__":
    main()
