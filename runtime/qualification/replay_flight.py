"""The command that replays a flight record on a bundle; `flights.py` does the work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..bundle.advice import command
from ..bundle.command import DONE, WANTING, CommandParser, Outcome, path_argument, run
from ..bundle.console import printable
from ..bundle.errors import FingerprintError, InvalidInputError

#: Lines of differences that fit a screen.
_SHOWN = 16


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("replay", wanting="a tick differs")
    parser.add_bundle()
    parser.add_argument(
        "record", metavar="RECORD", type=path_argument, help="flight record that a ControlDecoder wrote"
    )
    parser.add_backend()
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    from ..control.recorder import read_record
    from ..tokenizer import ActionTokenizer
    from .flights import replay_flight

    if options.record.is_dir() and options.bundle.is_file():
        raise InvalidInputError(
            f"{options.record} is a folder; give the bundle first: {command('replay', 'BUNDLE RECORD')}"
        )
    record = read_record(options.record)
    with ActionTokenizer.load(options.bundle, backend=options.backend) as tokenizer:
        if tokenizer.fingerprint != record.meta["fingerprint"]:
            raise FingerprintError(
                f"{options.bundle} has another fingerprint than {options.record}; give the bundle that flew"
            )
        compared, differences = replay_flight(record, tokenizer)
        name = tokenizer.backend.name
    shown = differences if options.verbose else differences[:_SHOWN]
    print("".join(f"{printable(line)}\n" for line in shown), end="")
    if len(shown) < len(differences):
        print(f"… and {len(differences) - len(shown)} more; -v shows them all")
    sign, status = ("✗", WANTING) if differences else ("✓", DONE)
    return Outcome(
        f"{sign} {name}: {compared} of {len(record)} rows compared, {len(differences)} differ "
        "(the others are starts, or only say what was before)",
        {"backend": name, "rows": len(record), "compared": compared, "differences": differences},
        status,
    )
