"""The command `rfsq`: what the scripts of the rooms do, under one name."""

from __future__ import annotations

import sys

from . import __version__
from .runtime.bundle.console import prepare_console, run_command

#: Name to its module, and what it does.
COMMANDS = {
    "build": ("export.build_engine", "build a validated bundle from a checkpoint, or add engines for this machine"),
    "selftest": ("runtime.qualification.selftest", "does a bundle give the reference's answers on this machine?"),
    "inspect": ("runtime.qualification.inspect", "what is in a bundle, and what was proven"),
    "bench": ("runtime.benchmark.command", "how fast and how steady the backends are on this machine"),
    "compat": ("runtime.qualification.compat", "can one bundle stand in for another?"),
    "tokenize": ("runtime.datasets.tokenize", "encode a dataset of demonstrations, or decode one of tokens"),
    "replay": ("runtime.qualification.replay", "decide every tick of a flight record again"),
    "calibrate": ("calibration.fit", "fit a checkpoint to demonstrations"),
    "train": ("rfsq_ref.train", "train a tokenizer on demonstrations"),
    "compare": ("evidence.report", "compare tokens with their peers at equal bits"),
    "rollout": ("rfsq_ref.rollout", "drive simulated robots through tokens"),
}


def main() -> None:
    """Ends with the status of the command, or with 2 where there is none of that name."""
    prepare_console()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        print(f"rfsq {__version__}")
    elif name in COMMANDS:
        # As argparse names a command in its help.
        sys.argv[:2] = [f"rfsq {name}"]
        run_command(f"{__package__}.{COMMANDS[name][0]}")
    else:
        print(f"error: {name!r} is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rfsq COMMAND …",
            "",
            "Robust RFSQ action tokens on robots.",
            "",
            *lines,
            "",
            "rfsq COMMAND --help tells more.",
        ]
    )


if __name__ == "__main__":
    main()
