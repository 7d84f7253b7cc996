"""The command `rfsq`: what the scripts of the rooms do, under one name."""

from __future__ import annotations

import sys

from .runtime.bundle.start import end_interrupted, run_script


def main() -> None:
    """Ends with the status of the command, or with 2 where there is none of that name."""
    try:
        _main()
    except KeyboardInterrupt:
        end_interrupted()


def _main() -> None:
    # Here, as in `run_script`: importing takes most of the time in which nothing happens yet.
    from . import __version__
    from .runtime.bundle.advice import COMMANDS
    from .runtime.bundle.command import UNUSABLE, end_with
    from .runtime.bundle.console import prepare_console

    prepare_console()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        end_with(lambda: print(_usage()))
    elif name == "--version":
        end_with(lambda: print(f"rfsq {__version__}"))
    elif name in COMMANDS:
        # As argparse names a command in its help.
        sys.argv[:2] = [f"rfsq {name}"]
        run_script(f"{__package__}.{COMMANDS[name].module}")
    else:
        print(f"error: {name!r} is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(UNUSABLE)


def _usage() -> str:
    from .runtime.bundle.advice import COMMANDS

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
