"""The command that encodes a dataset of demonstrations, or decodes one of tokens; `conversion.py` does the work."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..bundle.command import DATA_FORMATS, DONE, WANTING, CommandParser, Outcome, positive, run
from .rows import CHUNK_SIZES, STEP_SIZES

if TYPE_CHECKING:
    from ..bundle.fidelity import Fidelity
    from .format import Outlier

#: Formats by what is written.
ENCODED, DECODED = ("parquet", "zarr"), ("parquet", "npz", "hdf5")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser(), _work, arguments)


def parser() -> CommandParser:
    """All arguments of the command.

    >>> parser().parse_args(["build/bundle", "--data", "a.npz", "--output", "b.zarr"]).data.name
    'a.npz'
    """
    parser = CommandParser(
        "tokenize",
        wanting="--output is written, but its tokens are worthless",
        interrupted="run the same command again to go on",
    )
    parser.add_bundle()
    parser.add_data(required=True, text=f"{DATA_FORMATS}; with --decode, what this command wrote")
    parser.add_output(
        "folder, Parquet (NAME) or Zarr (NAME.zarr) by its name; with --decode Parquet, .npz or .hdf5",
        required=True,
    )
    parser.add_backend()
    parser.add_argument("--decode", action="store_true", help="tokens to actions")
    parser.add_argument("--format", choices=sorted({*ENCODED, *DECODED}), help="default: by the name of --output")
    parser.add_argument("--expect-fingerprint", metavar="F", help="refuse any other tokenizer")
    parser.add_argument("--compression", choices=("zstd", "none"), default="zstd", help="default: %(default)s")
    parser.add_argument(
        "--steps-per-file",
        type=positive,
        metavar="N",
        help=f"rows of a file; default: {STEP_SIZES.rows} steps, or {CHUNK_SIZES.rows} chunks",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="of chunk tokens: a chunk begins at every N-th step of an episode; default: 1, those a policy learns; T "
        "for each step once",
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of chunk tokens: the first N of each chunk alone; default: all"
    )
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="default: one for each core"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="a running cluster; default: one is started here")
    parser.add_argument("--restart", action="store_true", help="discard what an earlier run has left unfinished")
    return parser


def _about(far: Outlier, worth: Fidelity, *, is_chunk: bool) -> str:
    """The warning about an action that no token gives."""
    from ..bundle.fidelity import wider

    place = f"WARNING: episode {far.episode}, step {far.step}, dimension {far.dimension} is {far.value:g}, "
    if not is_chunk:
        return (
            f"{place}{far.reach:.3g} times as far from the middle as what the model was trained on: no token gives "
            "that; repair or drop this episode"
        )
    unit, offset = worth.unit[far.dimension], worth.offset[far.dimension]
    return (
        f"{place}beyond the range of the tokens, from {offset - unit:.4g} to {offset + unit:.4g}, and decodes as the "
        f"end of that. {wider()}"
    )


def _work(options: argparse.Namespace) -> Outcome:
    from ..bundle.fidelity import Grade
    from .conversion import convert

    found = convert(options)
    worth = found.verification.fidelity
    document = {
        "output": str(options.output),
        "grade": worth and worth.grade,
        "fingerprint": found.fingerprint,
        "mode": found.model.mode,
        "episodes": found.num_episodes,
        "steps": found.num_steps,
        **({} if found.num_chunks is None else {"chunks": found.num_chunks}),
        "verification": dataclasses.asdict(found.verification),
    }
    if worth is None:
        return Outcome(f"✓ {options.output}", document)
    lines = [f"what the tokens are worth: {worth.line}, on {found.verified} of the source"]
    lines += filter(None, [worth.warning_in(found.model.mode)])
    far = found.verification.farthest
    if far is not None and worth.grade is not Grade.WORTHLESS:
        lines.append(_about(far, worth, is_chunk=found.num_chunks is not None))
    is_worthless = worth.grade is Grade.WORTHLESS
    if is_worthless:
        lines.append(
            f"WARNING: {options.output} is there all the same, and the exit status is 1: do not train a policy on it"
        )
    return Outcome("\n".join(lines), document, WANTING if is_worthless else DONE)
