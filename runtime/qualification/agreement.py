"""How far tokens and decoded actions of two bundles agree on recorded actions, step by step.

The manifests and this measurement together say whether one bundle can stand in for the other.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from ..bundle.advice import command, quoted
from ..bundle.arrays import AnyArray, Codes, Float32Array, Float64Array, Int64Array, in_chunks
from ..bundle.compatibility import Compatibility, compare_manifests, fits, kind_of_tokens, token_sizes
from ..bundle.errors import InvalidInputError
from ..bundle.fidelity import Fidelity, FidelitySums
from ..bundle.gates import GATES
from ..bundle.models import ModelEntry, StepModel
from ..bundle.paths import as_path
from ..datasets.episodes import WholePass
from ..datasets.source_base import Source, Steps
from ..tokenizer import ActionTokenizer, codes_of

#: Share of steps that may have another token: float32 rounding carries a value across the edge between two bins, and
#: behind it others of the step with published tokens. Between two backends of one bundle it was 0.0006 at most.
FLIPPED_STEPS = 0.005
#: The same of chunks, whose tokens hang on more numbers: between C and ONNX Runtime it was 0.001.
FLIPPED_CHUNKS = 0.01
#: Decoders that are the same may each be off by the gate.
SAME_ACTION = 2 * GATES.action_error


@dataclass(frozen=True)
class BundleFacts:
    """What a comparison says about one of its bundles; name: OLD or NEW."""

    name: str
    folder: str
    fingerprint: str
    model: ModelEntry


@dataclass(frozen=True)
class Decoding:
    """What the decoder of one bundle makes of the first `layers` layers, or chunk tokens, of the tokens of one.

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
    """equal: share of equal tokens in each layer, or at each place of chunk tokens, that both have, empty where no
    token of one corresponds to one of the other; differing: how many steps have a token that differs, or of chunk
    tokens how many of `chunks`; remarks: a line for all that could not be compared."""

    steps: int
    equal: tuple[float, ...]
    differing: int
    decodings: tuple[Decoding, ...]
    remarks: tuple[str, ...]
    chunks: int | None = None

    @property
    def coded(self) -> int:
        """How many were coded, each by itself, of what `unit` says."""
        return self.steps if self.chunks is None else self.chunks

    @property
    def unit(self) -> str:
        return "steps" if self.chunks is None else "chunks"

    def has_same_tokens(self, *, spare: int = 0) -> bool:
        """As far as float32 rounding lets tokens be the same; spare: how many may differ beside, of however few."""
        most = FLIPPED_STEPS if self.chunks is None else FLIPPED_CHUNKS
        return bool(self.equal) and self.differing <= spare + most * self.coded

    def whole(self) -> list[Decoding]:
        """Each bundle's own tokens, as many layers as both decode."""
        own = {entry.tokens: entry for entry in self.decodings if entry.tokens == entry.decoder}
        return list(own.values())

    def crossed(self, tokens: str) -> list[Decoding]:
        """Tokens of one bundle, decoded by the other."""
        return [entry for entry in self.decodings if entry.tokens == tokens != entry.decoder]


class Side:
    """One of the bundles. It codes steps as its tokens want it, and gives actions for each step."""

    def __init__(self, name: str, path: Path, backend: str) -> None:
        if path.is_file():
            raise InvalidInputError(
                f"{name} is the file {path}; expected a bundle. Make one from a checkpoint: "
                f"{quoted('build', f'--checkpoint {path} --conditioning MODE --output DIR')}, with none for a naive "
                "one and dynamic for a robust one as published"
            )
        self.tokenizer = ActionTokenizer.load(path, backend=backend)
        self.model = self.tokenizer.model
        self.facts = BundleFacts(name, str(path), self.tokenizer.fingerprint, self.model)

    def close(self) -> None:
        self.tokenizer.close()

    def encode(self, steps: Steps) -> Codes:
        """actions [N, A] -> tokens [N, D, L] and, of a `dynamic` bundle, stats [N, L, 2]; or chunk tokens [n, L]."""
        actions = steps.values
        if not isinstance(self.model, StepModel):
            return Codes(self.tokenizer.encode(actions[_Cut(steps, self.model.chunk_length).steps]), None)
        # Every step is coded on its own, so that chunks may begin anywhere.
        tokens, stats = codes_of(self.tokenizer, in_chunks(actions, self.model.chunk_length))
        return Codes(_steps(tokens, len(actions)), None if stats is None else _steps(stats, len(actions)))

    def decode(self, codes: Codes, steps: Steps) -> Float32Array:
        """Some of what `encode` gives for these steps -> actions [N, A]."""
        length, (tokens, stats) = self.model.chunk_length, codes
        if not isinstance(self.model, StepModel):
            cut = _Cut(steps, length)
            decoded: Float32Array = self.tokenizer.decode(tokens)[cut.chunk, cut.place]
            return decoded
        given = in_chunks(stats, length) if stats is not None and self.model.has_stats else None
        return _steps(self.tokenizer.decode(in_chunks(tokens, length), given), len(tokens))


class _Cut:
    """Steps cut into chunks that begin where episodes do; the last chunk of each is filled up with its last step.

    steps: int64 [n, T], of each chunk; chunk, place: int64 [N], of each step.
    """

    def __init__(self, given: Steps, length: int) -> None:
        starts = np.flatnonzero(np.diff(given.episode, prepend=given.episode[0] - 1))
        run = np.searchsorted(starts, np.arange(len(given)), side="right") - 1
        last = np.append(starts[1:], len(given))[run] - 1
        self.place: Int64Array = (np.arange(len(given)) - starts[run]) % length
        first = np.flatnonzero(self.place == 0)
        self.chunk: Int64Array = np.cumsum(self.place == 0) - 1
        self.steps: Int64Array = np.minimum(first[:, None] + np.arange(length), last[first, None])


def _steps(chunks: AnyArray, count: int) -> AnyArray:
    return chunks.reshape(-1, *chunks.shape[2:])[:count]


class _Pair:
    """What `decoder` makes of so many layers of the tokens of another side, or of its own: the errors, added up."""

    def __init__(self, tokens: Side, decoder: Side, layers: int, units: Sequence[float]) -> None:
        """units: normalised units of all."""
        self.tokens, self.decoder, self.layers = tokens, decoder, layers
        self._units: Float64Array = np.array(units)
        self._from_own = 0.0
        self._fidelity = FidelitySums(tokens.model.action_units, tokens.model.action_offset)

    def add(self, actions: Float32Array, decoded: Float32Array, own: Float32Array) -> None:
        self._fidelity.add(actions, decoded)
        apart = np.abs(decoded.astype(np.float64) - own) / self._units
        self._from_own = max(self._from_own, float(apart.max()))

    def decoding(self) -> Decoding:
        found = self._fidelity.result()
        # Normalised, and in robot units.
        (mse, largest), (mse_units, largest_units) = (
            (float(np.square(found.rmse / units).mean()), float((found.largest / units).max()))
            for units in (self._units, np.ones_like(self._units))
        )
        names = self.tokens.facts.name, self.decoder.facts.name
        return Decoding(*names, self.layers, mse, largest, mse_units, largest_units, self._from_own, found)


def measure(old: Side, new: Side, source: Source) -> Measurement:
    """Encode all steps with both, and decode all tokens with both wherever that can be done."""
    remarks = tuple(_remarks(old.model, new.model))
    if old.model.action_dim != new.model.action_dim:
        return Measurement(0, (), 0, (), remarks)
    corresponds = fits(old.model, new.model)
    depth = min(old.model.depth, new.model.depth) if corresponds else 0
    # A bundle's own decoder first: the other is held against it.
    pairs = [(old, old), (new, new), *(((old, new), (new, old)) if corresponds else ())]
    found = [
        _Pair(tokens, decoder, layers, old.model.action_units)
        for tokens, decoder in pairs
        if tokens.model.has_stats or not decoder.model.has_stats
        for layers in _prefixes(tokens.model, decoder.model)
    ]
    if not source.num_steps:
        raise InvalidInputError(f"{source.name} has no steps; expected at least one")
    equal, tokens_each, differing, coded = np.zeros(depth, np.int64), 0, 0, 0
    limit = float(np.float32(min(old.model.action_limit, new.model.action_limit)))
    for _, steps in WholePass(source, old.model.action_dim, limit):
        codes = {side: side.encode(steps) for side in (old, new)}
        if corresponds:
            is_equal = codes[old].tokens[..., :depth] == codes[new].tokens[..., :depth]
            equal += is_equal.reshape(-1, depth).sum(axis=0)
            tokens_each += is_equal.size // depth
            differing += int((~is_equal.reshape(len(is_equal), -1).all(axis=1)).sum())
            coded += len(is_equal)
        own: dict[tuple[Side, int], Float32Array] = {}
        for pair in found:
            decoded = pair.decoder.decode(codes[pair.tokens].prefix(pair.layers), steps)
            pair.add(steps.values, decoded, own.setdefault((pair.tokens, pair.layers), decoded))
    return Measurement(
        steps=source.num_steps,
        equal=tuple(map(float, equal / max(tokens_each, 1))),
        differing=differing,
        decodings=tuple(pair.decoding() for pair in found),
        remarks=remarks,
        chunks=coded if corresponds and not isinstance(old.model, StepModel) else None,
    )


def _prefixes(tokens: ModelEntry, decoder: ModelEntry) -> list[int]:
    """How much of these tokens is decoded, ascending: of chunk tokens a few."""
    common = {*tokens.prefixes} & {*decoder.prefixes}
    if isinstance(tokens, StepModel):
        return sorted(common)
    return sorted(common & {*tokens.key_prefixes, max(common)})


def _remarks(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    if old.action_dim != new.action_dim:
        yield f"A is {old.action_dim} in OLD, {new.action_dim} in NEW: actions of different robots, nothing is compared"
        return
    if type(old) is not type(new):
        yield (
            f"OLD has {kind_of_tokens(old)}, NEW {kind_of_tokens(new)}: other numbers of other things, so each decodes "
            "its own alone"
        )
        return
    for name, what in token_sizes(old).items():
        if name != "action_dim" and getattr(old, name) != getattr(new, name):
            yield (
                f"{what} is {getattr(old, name)} in OLD, {getattr(new, name)} in NEW: no token of one corresponds to "
                "one of the other, so each decodes its own alone"
            )
    if old.depth != new.depth:
        yield f"L is {old.depth} in OLD, {new.depth} in NEW: tokens are compared as far as both have them"
    if (old.action_units, old.action_offset) != (new.action_units, new.action_offset):
        yield "their normalisers differ: normalised units are those of OLD"
    if isinstance(old, StepModel):
        yield from _step_remarks(old, new)


def _step_remarks(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    """Of two with per-step tokens."""
    if old.prefixes != new.prefixes:
        yield f"OLD decodes {listed(old.prefixes)} layers, NEW {listed(new.prefixes)}: what both do is done crosswise"
    if old.chunk_length != new.chunk_length:
        yield f"T is {old.chunk_length} in OLD, {new.chunk_length} in NEW: compared step by step, as they are coded"
    names = [(name, model) for name, model in (("OLD", old), ("NEW", new)) if model.has_stats]
    for name, _ in names:
        yield f"{name} decodes with the stats of the encoder beside the tokens, which no policy emits"
    if len(names) == 1:
        other = "NEW" if names[0][0] == "OLD" else "OLD"
        yield f"the tokens of {other} have no such stats: {names[0][0]} does not decode them"


# --- the conclusion ---------------------------------------------------------------------------------------------------


class Kind(StrEnum):
    """What NEW can be for a policy of OLD: the same, another decoder of the same tokens, or nothing as it is."""

    INTERCHANGEABLE = "interchangeable"
    DECODER = "decoder"
    INCOMPATIBLE = "incompatible"


@dataclass(frozen=True)
class Verdict:
    """What was concluded, and why."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Comparison:
    """All there is to say about two bundles."""

    old: BundleFacts
    new: BundleFacts
    compatibility: Compatibility
    measurement: Measurement
    verdict: Verdict


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


def _conclude(
    compatibility: Compatibility, measurement: Measurement, old: ModelEntry, new: ModelEntry, *, force: bool
) -> Verdict:
    """What is proven, if the measurement bears it out; with force what is measured."""
    on_data = f"on {measurement.steps:,} steps"
    has_same_depth = old.depth == new.depth
    is_same_measured = has_same_depth and measurement.has_same_tokens()
    if compatibility.proof:
        if not (has_same_depth and measurement.has_same_tokens(spare=1)):
            return Verdict(
                Kind.INCOMPATIBLE,
                f"contradiction: the manifests have {compatibility.proof}, but {measurement.differing:,} of "
                f"{measurement.coded:,} {measurement.unit} have other tokens; run {command('selftest')} on both "
                "bundles",
            )
        ground = f"proven: {compatibility.proof}"
    elif force and is_same_measured:
        ground = f"not proven, the same {on_data}"
    else:
        reasons = "; ".join((*compatibility.obstacles, *compatibility.differences)) or "nothing proves them the same"
        hint = f". But all tokens agree {on_data}; --force takes that for enough" if is_same_measured else ""
        return Verdict(Kind.INCOMPATIBLE, f"not compatible, retrain the policy on tokens of NEW: {reasons}{hint}")
    if compatibility.obstacles:
        return Verdict(
            Kind.INCOMPATIBLE,
            f"NEW cannot decode for this policy: {'; '.join(compatibility.obstacles)}; its tokens are the same "
            f"({ground})",
        )
    rebuilt = tuple(_rebuilt(old, new))
    if rebuilt:
        return Verdict(
            Kind.INCOMPATIBLE,
            f"build NEW again before it stands in for OLD: {'; '.join(rebuilt)}. Its tokens are the same ({ground})",
        )
    crossed = measurement.crossed("OLD")
    if max(entry.from_own for entry in (*crossed, *measurement.crossed("NEW"))) <= SAME_ACTION:
        return Verdict(Kind.INTERCHANGEABLE, f"interchangeable ({ground})")
    return Verdict(
        Kind.DECODER,
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


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
