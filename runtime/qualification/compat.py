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
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..backends.registry import PREFERENCE
from ..bundle.arrays import Float32Array, Float64Array, Int32Array
from ..bundle.compatibility import Compatibility, compare_manifests
from ..bundle.console import printable
from ..bundle.errors import InvalidInputError, TokenizerError
from ..bundle.fidelity import Fidelity, FidelitySums
from ..bundle.gates import GATES
from ..bundle.manifest import ModelEntry
from ..bundle.paths import as_path
from ..datasets.episodes import Run, extend_runs, join_runs
from ..datasets.pieces import Source
from ..datasets.sources import open_source
from ..tokenizer import ActionTokenizer

INTERCHANGEABLE, DECODER_CAN_BE_REPLACED, NOT_COMPATIBLE, NOT_COMPARED = range(4)

#: Share of steps that may have another token: float32 rounding carries a value across the edge between two bins, and
#: behind it others of the step with published tokens. Between two backends of one bundle it was 0.0006 at most.
FLIPPED_STEPS = 0.005
#: Decoders that are the same may each be off by the gate.
SAME_ACTION = 2 * GATES.action_error
#: Steps that go through encoders and decoders at a time.
_BATCH_STEPS = 2**16


@dataclass(frozen=True)
class BundleFacts:
    """What a comparison says about one of its bundles; name: OLD or NEW."""

    name: str
    folder: str
    fingerprint: str
    model: ModelEntry


@dataclass(frozen=True)
class Decoding:
    """What the decoder of one bundle makes of the first `layers` layers of the tokens of one.

    mse, largest: action error against the data in normalised units of OLD; the same in robot units with `_units`;
    fidelity: for each dimension.
    from_own: largest |difference|, normalised, to what the bundle that made the tokens decodes them to.
    """

    tokens: str
    decoder: str
    layers: int
    mse: float
    largest: float
    mse_units: float
    largest_units: float
    from_own: float
    fidelity: Fidelity


@dataclass(frozen=True)
class Measurement:
    """equal: share of equal tokens in each layer that both have, empty where no token of one corresponds to one of the
    other; differing: how many steps have a token that differs; remarks: a line for all that could not be compared."""

    steps: int
    equal: tuple[float, ...]
    differing: int
    decodings: tuple[Decoding, ...]
    remarks: tuple[str, ...]

    def has_same_tokens(self, *, spare: int = 0) -> bool:
        """As far as float32 rounding lets tokens be the same; spare: steps that may differ beside, of however few."""
        return bool(self.equal) and self.differing <= spare + FLIPPED_STEPS * self.steps

    def whole(self) -> list[Decoding]:
        """Each bundle's own tokens, as many layers as both decode."""
        own = {entry.tokens: entry for entry in self.decodings if entry.tokens == entry.decoder}
        return list(own.values())

    def crossed(self, tokens: str) -> list[Decoding]:
        """Tokens of one bundle, decoded by the other."""
        return [entry for entry in self.decodings if entry.tokens == tokens != entry.decoder]


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
        before = stack.enter_context(contextlib.closing(_Side("OLD", as_path(old, "OLD"), backend)))
        after = stack.enter_context(contextlib.closing(_Side("NEW", as_path(new, "NEW"), backend)))
        compatibility = compare_manifests(before.tokenizer.manifest, after.tokenizer.manifest)
        measurement = _measure(before, after, source)
        verdict = _conclude(compatibility, measurement, before.model, after.model, force=force)
        return Comparison(before.facts, after.facts, compatibility, measurement, verdict)


# Measuring -----------------------------------------------------------------------------------------------------------


class _Side:
    """One of the bundles, step by step: every step is coded on its own, so each cuts chunks as it needs them."""

    def __init__(self, name: str, path: Path, backend: str) -> None:
        if path.is_file():
            raise InvalidInputError(
                f"{name} is the file {path}; expected a bundle. Make one from a checkpoint: `python "
                f"export/build_engine.py --checkpoint {path} --conditioning MODE --output DIR`, with none for a naive "
                "one and dynamic for a robust one as published"
            )
        self.tokenizer = ActionTokenizer.load(path, backend=backend)
        self.model = self.tokenizer.model
        self.facts = BundleFacts(name, str(path), self.tokenizer.fingerprint, self.model)

    def close(self) -> None:
        self.tokenizer.close()

    def encode(self, actions: Float32Array) -> tuple[Int32Array, Float32Array | None]:
        """actions [N, A] -> tokens [N, D, L] and, of a `dynamic` bundle, stats [N, L, 2]."""
        chunks = self._chunks(actions)
        if not self.model.has_stats:
            return _steps(self.tokenizer.encode(chunks), len(actions)), None
        tokens, stats = self.tokenizer.encode_with_stats(chunks)
        return _steps(tokens, len(actions)), _steps(stats, len(actions))

    def decode(self, tokens: Int32Array, stats: Float32Array | None) -> Float32Array:
        """tokens [N, D, l] and, if there are any, stats [N, l, 2] -> actions [N, A]."""
        given = self._chunks(stats) if stats is not None and self.model.has_stats else None
        return _steps(self.tokenizer.decode(self._chunks(tokens), given), len(tokens))

    def _chunks(self, steps: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[N, ...] as [B, T, ...], the last chunk filled up with the last step."""
        length = self.model.chunk_length
        filling = np.repeat(steps[-1:], -len(steps) % length, axis=0)
        return np.concatenate((steps, filling)).reshape(-1, length, *steps.shape[1:])


def _steps(chunks: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    return chunks.reshape(-1, *chunks.shape[2:])[:count]


class _Sums:
    """The errors of one decoding, added up."""

    def __init__(self, units: Sequence[float], tokens: ModelEntry) -> None:
        """units: normalised units of all; tokens: the model that made the tokens."""
        self._units: Float64Array = np.array(units)
        # Normalised, and in robot units.
        self._squares, self._largest, self._count = np.zeros(2), np.zeros(2), 0
        self._from_own = 0.0
        self._fidelity = FidelitySums(tokens.action_units, tokens.action_offset)

    def add(self, actions: Float32Array, decoded: Float32Array, own: Float32Array) -> None:
        errors = np.abs(decoded.astype(np.float64) - actions)
        scaled = errors / self._units, errors
        self._squares += [np.square(each).sum() for each in scaled]
        self._largest = np.maximum(self._largest, [each.max() for each in scaled])
        self._count += errors.size
        self._fidelity.add(actions, decoded)
        apart = np.abs(decoded.astype(np.float64) - own) / self._units
        self._from_own = max(self._from_own, float(apart.max()))

    def decoding(self, tokens: str, decoder: str, layers: int) -> Decoding:
        mse, mse_units = map(float, self._squares / self._count)
        largest, largest_units = map(float, self._largest)
        return Decoding(
            tokens, decoder, layers, mse, largest, mse_units, largest_units, self._from_own, self._fidelity.result()
        )


def _measure(old: _Side, new: _Side, source: Source) -> Measurement:
    """Encode all steps with both, and decode all tokens with both wherever that can be done."""
    remarks = tuple(_remarks(old.model, new.model))
    if old.model.action_dim != new.model.action_dim:
        return Measurement(0, (), 0, (), remarks)
    corresponds = (old.model.latent_dim, old.model.num_levels) == (new.model.latent_dim, new.model.num_levels)
    depth = min(old.model.num_layers, new.model.num_layers) if corresponds else 0
    # A bundle's own decoder first: the other is held against it.
    pairs = [(old, old), (new, new), *(((old, new), (new, old)) if corresponds else ())]
    sums = {
        (tokens, decoder, layers): _Sums(old.model.action_units, tokens.model)
        for tokens, decoder in pairs
        if tokens.model.has_stats or not decoder.model.has_stats
        for layers in _common_prefixes(tokens.model, decoder.model)
    }
    equal, differing = np.zeros(depth, np.int64), 0
    for actions in _batches(source, old.model.action_dim):
        codes = {side: side.encode(actions) for side in (old, new)}
        if corresponds:
            is_equal = codes[old][0][..., :depth] == codes[new][0][..., :depth]
            equal += is_equal.sum(axis=(0, 1))
            differing += len(actions) - int(is_equal.all(axis=(1, 2)).sum())
        own: dict[tuple[_Side, int], Float32Array] = {}
        for (side, decoder, layers), total in sums.items():
            tokens, stats = codes[side]
            decoded = decoder.decode(tokens[..., :layers], None if stats is None else stats[:, :layers])
            total.add(actions, decoded, own.setdefault((side, layers), decoded))
    return Measurement(
        steps=source.num_steps,
        equal=tuple(map(float, equal / (source.num_steps * old.model.latent_dim))),
        differing=differing,
        decodings=tuple(
            total.decoding(side.facts.name, decoder.facts.name, layers)
            for (side, decoder, layers), total in sums.items()
        ),
        remarks=remarks,
    )


def _batches(source: Source, action_dim: int) -> Iterator[Float32Array]:
    if not source.num_steps:
        raise InvalidInputError(f"{source.name} has no steps; expected at least one")
    source.check()
    runs: list[Run] = []
    with contextlib.closing(source.open(action_dim)) as reader:
        for start, steps in reader.slices(0, source.num_steps, _BATCH_STEPS):
            extend_runs(runs, steps, source, start)
            yield steps.values
    join_runs(runs, source)


def _common_prefixes(one: ModelEntry, other: ModelEntry) -> tuple[int, ...]:
    return tuple(sorted({*one.prefixes} & {*other.prefixes}))


def _remarks(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    if old.action_dim != new.action_dim:
        yield f"A is {old.action_dim} in OLD, {new.action_dim} in NEW: actions of different robots, nothing is compared"
        return
    for name, what in (("latent_dim", "D"), ("num_levels", "K")):
        if getattr(old, name) != getattr(new, name):
            yield (
                f"{what} is {getattr(old, name)} in OLD, {getattr(new, name)} in NEW: no token of one corresponds to "
                "one of the other, so each decodes its own alone"
            )
    if old.num_layers != new.num_layers:
        yield f"L is {old.num_layers} in OLD, {new.num_layers} in NEW: tokens are compared as far as both have them"
    if old.prefixes != new.prefixes:
        yield f"OLD decodes {_listed(old.prefixes)} layers, NEW {_listed(new.prefixes)}: what both do is done crosswise"
    if old.chunk_length != new.chunk_length:
        yield f"T is {old.chunk_length} in OLD, {new.chunk_length} in NEW: compared step by step, as they are coded"
    if (old.action_units, old.action_offset) != (new.action_units, new.action_offset):
        yield "their normalisers differ: normalised units are those of OLD"
    names = [(name, model) for name, model in (("OLD", old), ("NEW", new)) if model.has_stats]
    for name, _ in names:
        yield f"{name} decodes with the stats of the encoder beside the tokens, which no policy emits"
    if len(names) == 1:
        other = "NEW" if names[0][0] == "OLD" else "OLD"
        yield f"the tokens of {other} have no such stats: {names[0][0]} does not decode them"


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
        yield f"it does not decode {_listed(missing)} layers (--prefixes)"


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


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
