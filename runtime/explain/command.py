"""The command that writes a page on which a person takes more or fewer tokens, and sees what they decode to.

The page is one file, which needs no network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.command import CommandParser, Outcome, natural, run
from ..bundle.console import printable
from ..bundle.errors import InvalidInputError
from ..bundle.paths import counted, refuse_existing, replacing

if TYPE_CHECKING:
    from ..bundle.fidelity import Grade
    from ..bundle.models import ModelEntry
    from .measure import Explanation

_OUTPUT = Path("build/explain.html")
#: Prefixes that the command itself shows at most; the page has all.
_MOST_LINES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("explain")
    parser.add_bundle()
    parser.add_data(required=True)
    parser.add_backend()
    parser.add_argument(
        "--episode", nargs="+", type=natural, metavar="N", help="which are shown; default: a few, spread over the data"
    )
    parser.add_argument(
        "--names",
        metavar="A,B,…",
        help="of all action dimensions, with commas between; default: those that the data name, or dim 0,dim 1,…",
    )
    parser.add_argument(
        "--position-unit",
        type=_length,
        metavar="M",
        help="metres that 1 is, in the first three dimensions, where these are x, y and z of a position or its change, "
        "and no angles; then errors are shown in millimetres too",
    )
    parser.add_output("the page", _OUTPUT)
    return parser


def _length(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; expected metres, such as 0.05")
    return value


def _work(options: argparse.Namespace) -> Outcome:
    refuse_existing([options.output], overwrite=options.overwrite)
    from ..bundle.fidelity import clipping
    from ..bundle.models import ChunkModel
    from ..datasets.sources import open_source
    from ..tokenizer import ActionTokenizer
    from .measure import explain
    from .page import page
    from .samples import choose_samples

    source = open_source(options.data, options.key, options.filter_key)
    with closing(ActionTokenizer.load(options.bundle, backend=options.backend)) as tokenizer:
        model = tokenizer.model
        names = _names(options.names, source.action_names, model.action_dim)
        if options.position_unit is not None and model.action_dim < 3:
            raise InvalidInputError(
                f"--position-unit is of the first three dimensions, and actions have {model.action_dim}; leave it out"
            )
        samples = choose_samples(source, model, options.episode)
        found = explain(tokenizer, samples, names, options.position_unit)
        facts = {
            "bundle": f"{options.bundle.resolve().name}, fingerprint {tokenizer.fingerprint[:16]}",
            "data": source.name,
            "decoded by": f"{tokenizer.backend.name}, {tokenizer.backend.description}",
        }
        text = page(found, tokenizer.manifest, facts)
    with replacing(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    lines = [
        f"{bits:6.4g} bits a step  {counted(prefix, model.depth_unit.removesuffix('s')):>10}  {grade:>9}  RMS error of "
        f"half of the chunks below {median:.3g}, of 99 % below {p99:.3g}"
        for prefix, bits, grade, median, p99 in _rows(found)
    ]
    lines += _meanings(model)
    if options.position_unit is not None:
        lines.append(
            f"millimetres: {', '.join(names[:3])} are taken as x, y and z, where 1 is {options.position_unit:g} m; of "
            "angles they say nothing"
        )
    print("\n".join(map(printable, lines)))
    if isinstance(model, ChunkModel):
        ends = samples.low.tolist(), samples.high.tolist()
        if warning := clipping(*ends, model.action_units, model.action_offset, names):
            print(printable(warning))
    verdict = f"✓ {options.output}: {counted(len(found.chunks), 'chunk')} shown, {found.counted:,} counted; "
    return Outcome(verdict + _judged(found, model.depth_unit), _document(options, found))


def _meanings(model: ModelEntry) -> Iterator[str]:
    """What the numbers and the grades of the lines are."""
    from ..bundle.fidelity import POOR_SHARE

    has_normaliser = any(unit != 1 for unit in model.action_units) or any(model.action_offset)
    yield (
        "errors are in normalised units: 1 is half of the range that the tokenizer was fitted for, in each dimension"
        + ("" if has_normaliser else "; here they are the robot's own")
    )
    yield (
        f"good: no dimension loses more than {POOR_SHARE:.0%} of its variance; poor: one does; worthless: there the "
        "mean alone would do about as well"
    )


def _judged(found: Explanation, unit: str) -> str:
    """From how many layers or tokens on they are worth it, on these data."""
    rows = reversed([*zip(found.prefixes, found.grades, strict=True)])
    good = [prefix for prefix, _ in takewhile(lambda row: row[1] == "good", rows)]
    if good:
        return f"good from {counted(good[-1], unit.removesuffix('s'))} on"
    return f"all {found.prefixes[-1]} {unit} are {found.grades[-1]} on these data"


def _names(given: str | None, stated: Sequence[str], count: int) -> list[str]:
    """stated: by the data, or empty. Raises InvalidInputError for another number of names than of dimensions, and for
    empty ones.
    """
    if given is None:
        return [*stated] or [f"dim {dimension}" for dimension in range(count)]
    names = [name.strip() for name in given.split(",")]
    if len(names) != count or not all(names):
        raise InvalidInputError(
            f"--names has {counted(len(names), 'name')}{'' if all(names) else ', empty ones among them'}, and actions "
            f"have {counted(count, 'dimension')}; expected a name for each, such as --names x,y,z"
        )
    return names


def _rows(found: Explanation) -> list[tuple[int, float, Grade, float, float]]:
    """Prefix, bits, grade and errors: of those that have a bound, or else of a few."""
    errors = found.median.tolist(), found.p99.tolist()
    rows = list(zip(found.prefixes, found.bits, found.grades, *errors, strict=True))
    bounded = [row for row in rows if row[0] in found.bounds]
    return bounded or rows[:: -(-len(rows) // _MOST_LINES)]


def _document(options: argparse.Namespace, found: Explanation) -> dict[str, Any]:
    return {
        "output": str(options.output),
        "chunks": found.num_chunks,
        "counted": found.counted,
        "shown": [{"episode": chunk.episode, "step": chunk.step} for chunk in found.chunks],
        "prefixes": [
            {"prefix": prefix, "bits_per_step": bits, "grade": grade, "median_rms": median, "p99_rms": p99}
            for prefix, bits, grade, median, p99 in zip(
                found.prefixes, found.bits, found.grades, found.median.tolist(), found.p99.tolist(), strict=True
            )
        ],
    }
