"""The command that measures how far two bundles agree, and says whether one can stand in for the other.

OLD is the bundle that the policy was trained with, NEW the one that would replace it; `agreement.py` does the work.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..bundle.advice import command, page
from ..bundle.command import DONE, WANTING, CommandParser, Outcome, run
from ..bundle.console import aligned, printable

if TYPE_CHECKING:
    from .agreement import BundleFacts, Comparison, Decoding


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("compat", wanting="the verdict is another than --accept takes")
    parser.add_bundle(
        "old",
        "bundle that the policy was trained with; a checkpoint becomes one by "
        f"{command('build', '--checkpoint F --conditioning MODE --output DIR')}",
    )
    parser.add_bundle("new", "bundle that would replace it")
    parser.add_data(required=True)
    parser.add_backend()
    parser.add_argument(
        "--accept",
        choices=("interchangeable", "decoder"),
        default="interchangeable",
        help="the verdict that is enough for status 0; decoder: it is also enough that NEW can replace the decoder of "
        "OLD while the policy stays; default: interchangeable",
    )
    parser.add_argument("--force", action="store_true", help="let the measurement decide what is not proven")
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    from ..datasets.sources import open_source
    from .agreement import compare

    source = open_source(options.data, options.key, options.filter_key)
    found = compare(options.old, options.new, source, backend=options.backend, force=options.force)
    print("\n".join(map(printable, overview(found, is_verbose=options.verbose))))
    is_enough = found.verdict.kind in ("interchangeable", options.accept)
    sign = "✗" if found.verdict.kind == "incompatible" else "✓"
    hint = ""
    if found.verdict.kind == "decoder" and not is_enough:
        hint = "\n  status 1, for the two are not interchangeable; --accept decoder makes it 0"
    return Outcome(
        f"{sign} {found.verdict.text}{hint}{_advice(found)}", dataclasses.asdict(found), DONE if is_enough else WANTING
    )


def overview(found: Comparison, *, is_verbose: bool) -> Iterator[str]:
    """Lines for people; is_verbose: what the tokens of each are worth by dimension, too."""
    for facts in (found.old, found.new):
        model = facts.model
        yield f"{facts.name}  {facts.folder}: {model.mode}, {model.sizes_text}, fingerprint {facts.fingerprint[:16]}"
    measured = found.measurement
    yield from (f"  – {line}" for line in measured.remarks)
    if measured.equal:
        yield f"equal tokens  {'  '.join(f'{place} {share:.3%}' for place, share in _equal(found))}"
        yield f"{measured.unit} with a token that differs  {measured.differing:,} of {measured.coded:,}"
    if measured.decodings:
        units = list(dict.fromkeys(facts.model.depth_unit for facts in (found.old, found.new)))
        has_units = any(map(_has_normaliser, (found.old, found.new)))
        yield from _table(measured.decodings, " or ".join(units), has_units=has_units)
    models = {facts.name: facts.model for facts in (found.old, found.new)}
    for entry in measured.whole():
        if is_verbose:
            yield from entry.fidelity.text(
                f"{entry.tokens}, its own tokens, {entry.layers} {models[entry.tokens].depth_unit}",
                models[entry.tokens].mode,
            ).splitlines()
        elif warning := entry.fidelity.warning_in(models[entry.tokens].mode):
            yield f"{entry.tokens}: {warning}"


def _advice(found: Comparison) -> str:
    if found.verdict.kind == "incompatible":
        return f"\n  {page('integration')} has the ways from here"
    if found.compatibility.is_same:
        return ""
    return f"\n  from now on: ActionTokenizer.load(..., expect_fingerprint={found.new.fingerprint[:16]!r})"


def _equal(found: Comparison) -> Iterator[tuple[str, float]]:
    """The share of equal tokens of each layer; of chunk tokens those of a few places, the last of what is decoded."""
    equal, model = found.measurement.equal, found.old.model
    if found.measurement.chunks is None:
        yield from ((f"L{layer}", share) for layer, share in enumerate(equal))
    else:
        places = sorted({*(prefix for prefix in model.key_prefixes if prefix <= len(equal)), len(equal)})
        yield from ((f"token {prefix - 1}", equal[prefix - 1]) for prefix in places)


def _table(decodings: Sequence[Decoding], unit: str, *, has_units: bool) -> Iterator[str]:
    """unit: what a prefix counts."""
    heads = ["tokens of", "decoder of", unit, "action MSE, normalised units²", "largest error, normalised"]
    heads += ["MSE, robot units²", "largest, robot units"] if has_units else []
    rows = [[*heads, "from own decoder"]]
    for entry in decodings:
        numbers = [entry.mse, entry.largest] + ([entry.mse_units, entry.largest_units] if has_units else [])
        apart = "–" if entry.tokens == entry.decoder else f"{entry.from_own:.3g}"
        rows.append([entry.tokens, entry.decoder, f"{entry.layers}", *(f"{value:.3g}" for value in numbers), apart])
    return aligned(rows, left=2)


def _has_normaliser(facts: BundleFacts) -> bool:
    return any(unit != 1 for unit in facts.model.action_units) or any(facts.model.action_offset)
