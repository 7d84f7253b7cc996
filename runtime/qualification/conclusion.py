"""Concludes from manifests and from a measurement whether one bundle can stand in for another."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..bundle.advice import command
from ..bundle.compatibility import Compatibility, compare_manifests
from ..bundle.gates import GATES
from ..bundle.manifest import ModelEntry
from ..bundle.paths import as_path
from ..datasets.source_base import Source
from .agreement import BundleFacts, Measurement, Side, listed, measure

#: Decoders that are the same may each be off by the gate.
SAME_ACTION = 2 * GATES.action_error


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
    has_same_depth = old.num_layers == new.num_layers
    is_same_measured = has_same_depth and measurement.has_same_tokens()
    if compatibility.proof:
        if not (has_same_depth and measurement.has_same_tokens(spare=1)):
            return Verdict(
                Kind.INCOMPATIBLE,
                f"contradiction: the manifests have {compatibility.proof}, but {measurement.differing:,} of "
                f"{measurement.steps:,} steps have other tokens; run {command('selftest')} on both bundles",
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
