"""Measure how far tokens and decoded actions of two bundles agree, and say whether one can stand in for the other.

OLD is the bundle that the policy was trained with, NEW the one that would replace it. A checkpoint is made a bundle by
`python export/build_engine.py --checkpoint F --conditioning MODE --output DIR`, with `none` for a naive one and
`dynamic` for a robust one as published.

The exit status is 0 when they are interchangeable, 1 when NEW can replace the decoder of OLD, 2 when the policy has to
be trained again, or NEW to be built otherwise, and 3 when nothing could be compared. What the manifests do not prove
counts only with --force.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..backends.registry import PREFERENCE
from ..bundle.compatibility import Compatibility, compare_manifests
from ..bundle.console import printable
from ..bundle.errors import TokenizerError
from ..bundle.gates import GATES
from ..bundle.manifest import ModelEntry
from ..bundle.paths import as_path
from ..datasets.pieces import Source
from ..datasets.sources import open_source
from .agreement import BundleFacts, Decoding, Measurement, Side, listed, measure

INTERCHANGEABLE, DECODER_CAN_BE_REPLACED, NOT_COMPATIBLE, NOT_COMPARED = range(4)

#: Decoders that are the same may each be off by the gate.
SAME_ACTION = 2 * GATES.action_error


@dataclass(frozen=True)
class Verdict:
    """status: the exit status."""

    status: int
    text: str


@dataclass(frozen=True)
class Comparison:
    """All there is to say about two bundles."""

    old: BundleFacts
    new: BundleFacts
    compatibility: Compatibility
    measurement: Measurement
    verdict: Verdict


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return _main(arguments)
    except Exception:
        # Python's own status for it, 1, says here that the decoder can be replaced.
        traceback.print_exc()
        return NOT_COMPARED


def _main(arguments: Sequence[str] | None) -> int:
    options = _parse_arguments(arguments)
    try:
        source = open_source(options.data, options.key, options.filter_key)
        found = compare(options.old, options.new, source, backend=options.backend, force=options.force)
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return NOT_COMPARED
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False))
    else:
        print("\n".join(map(printable, overview(found))))
    return found.verdict.status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse's own status, 2, says here that the policy has to be trained again.
        self.print_usage(sys.stderr)
        self.exit(NOT_COMPARED, f"{self.prog}: error: {message}\n")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = _Parser(description=description, epilog=epilog)
    parser.add_argument("old", metavar="OLD", type=Path, help="bundle that the policy was trained with")
    parser.add_argument("new", metavar="NEW", type=Path, help="bundle that would replace it")
    parser.add_argument(
        "--data", type=Path, required=True, help="recorded actions in robot units: .npz, .npy, HDF5 or LeRobot"
    )
    parser.add_argument("--key", help="name of the action array or column in --data")
    parser.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")
    parser.add_argument("--backend", choices=("auto", *PREFERENCE), default="auto", help="default: auto")
    parser.add_argument("--force", action="store_true", help="let the measurement decide what is not proven")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    return parser.parse_args(arguments)


def compare(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    source: Source,
    *,
    backend: str = "auto",
    force: bool = False,
) -> Comparison:
    """Two bundles on recorded actions. force: let the measurement decide what the manifests do not prove.

    Raises what ActionTokenizer.load does, DatasetError for the data, InvalidInputError for actions that a bundle does
    not take.
    """
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(contextlib.closing(Side("OLD", as_path(old, "OLD"), backend)))
        after = stack.enter_context(contextlib.closing(Side("NEW", as_path(new, "NEW"), backend)))
        compatibility = compare_manifests(before.tokenizer.manifest, after.tokenizer.manifest)
        measurement = measure(before, after, source)
        verdict = _conclude(compatibility, measurement, before.model, after.model, force=force)
        return Comparison(before.facts, after.facts, compatibility, measurement, verdict)


# Concluding ----------------------------------------------------------------------------------------------------------


def _conclude(
    compatibility: Compatibility, measurement: Measurement, old: ModelEntry, new: ModelEntry, *, force: bool
) -> Verdict:
    """What is proven, if the measurement bears it out; with force what is measured."""
    on_data = f"on {measurement.steps:,} steps"
    has_same_depth = old.num_layers == new.num_layers
    is_same_measured = has_same_depth and measurement.has_same_tokens()
    if compatibility.proof:
        if not (has_same_depth and measurement.has_same_tokens(spare=1)):
            return Verdict(
                NOT_COMPATIBLE,
                f"contradiction: the manifests have {compatibility.proof}, but {measurement.differing:,} of "
                f"{measurement.steps:,} steps have other tokens; run runtime/selftest.py on both bundles",
            )
        ground = f"proven: {compatibility.proof}"
    elif force and is_same_measured:
        ground = f"not proven, the same {on_data}"
    else:
        reasons = "; ".join((*compatibility.obstacles, *compatibility.differences)) or "nothing proves them the same"
        hint = f". But all tokens agree {on_data}; --force takes that for enough" if is_same_measured else ""
        return Verdict(NOT_COMPATIBLE, f"not compatible, retrain the policy on tokens of NEW: {reasons}{hint}")
    if compatibility.obstacles:
        return Verdict(
            NOT_COMPATIBLE,
            f"NEW cannot decode for this policy: {'; '.join(compatibility.obstacles)}; its tokens are the same "
            f"({ground})",
        )
    rebuilt = tuple(_rebuilt(old, new))
    if rebuilt:
        return Verdict(
            NOT_COMPATIBLE,
            f"build NEW again before it stands in for OLD: {'; '.join(rebuilt)}. Its tokens are the same ({ground})",
        )
    crossed = measurement.crossed("OLD")
    if max(entry.from_own for entry in (*crossed, *measurement.crossed("NEW"))) <= SAME_ACTION:
        return Verdict(INTERCHANGEABLE, f"interchangeable ({ground})")
    return Verdict(
        DECODER_CAN_BE_REPLACED,
        f"the decoder can be replaced, the policy stays: the tokens are the same ({ground}), and NEW decodes them with "
        f"action MSE {crossed[-1].mse:.3g} (normalised units²)",
    )


def _rebuilt(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    """What a policy of `old` sends and `new` refuses, though it means the same: a line and an option for each."""
    if old.chunk_length != new.chunk_length:
        yield f"it takes chunks of {new.chunk_length} steps, not of {old.chunk_length} (--chunk-length)"
    missing = sorted({*old.prefixes} - {*new.prefixes})
    if missing:
        yield f"it does not decode {listed(missing)} layers (--prefixes)"


# Showing -------------------------------------------------------------------------------------------------------------


def overview(found: Comparison) -> Iterator[str]:
    """Lines for people."""
    for facts in (found.old, found.new):
        model = facts.model
        yield (
            f"{facts.name}  {facts.folder}: {model.mode}, T {model.chunk_length}, A {model.action_dim}, "
            f"D {model.latent_dim}, L {model.num_layers}, K {model.num_levels}, fingerprint {facts.fingerprint[:16]}"
        )
    measured = found.measurement
    yield from (f"  – {line}" for line in measured.remarks)
    if measured.equal:
        yield f"equal tokens  {'  '.join(f'L{layer} {share:.3%}' for layer, share in enumerate(measured.equal))}"
        yield f"steps with a token that differs  {measured.differing:,} of {measured.steps:,}"
    if measured.decodings:
        yield from _table(measured.decodings, has_units=any(map(_has_normaliser, (found.old, found.new))))
        for entry in measured.whole():
            yield from entry.fidelity.text(f"{entry.tokens}, its own tokens, {entry.layers} layers").splitlines()
    yield f"{'✗' if found.verdict.status == NOT_COMPATIBLE else '✓'} {found.verdict.text}"
    if found.verdict.status == NOT_COMPATIBLE:
        yield "  docs/integration.md has the ways from here"
    elif not found.compatibility.is_same:
        yield f"  from now on: ActionTokenizer.load(..., expect_fingerprint={found.new.fingerprint[:16]!r})"


def _table(decodings: Sequence[Decoding], *, has_units: bool) -> Iterator[str]:
    heads = ["tokens of", "decoder of", "layers", "action MSE, normalised units²", "largest error, normalised"]
    heads += ["MSE, robot units²", "largest, robot units"] if has_units else []
    rows = [[*heads, "from own decoder"]]
    for entry in decodings:
        numbers = [entry.mse, entry.largest] + ([entry.mse_units, entry.largest_units] if has_units else [])
        apart = "–" if entry.tokens == entry.decoder else f"{entry.from_own:.3g}"
        rows.append([entry.tokens, entry.decoder, f"{entry.layers}", *(f"{value:.3g}" for value in numbers), apart])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _has_normaliser(facts: BundleFacts) -> bool:
    return any(unit != 1 for unit in facts.model.action_units) or any(facts.model.action_offset)
