"""Whether tokens that were made for one bundle mean the same to another: decided from the two manifests alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .advice import command, page
from .checkpoint_layouts import recorded_checkpoint, recorded_hashes
from .errors import FingerprintError, IncompatibleTokensError, InvalidInputError
from .manifest import GRAPH_FORMS, Manifest
from .models import ChunkModel, ModelEntry, StepModel

#: `dynamic` and `recovered` tokens follow no constants of the bundle, but the step's own mean and deviation.
_KINDS = {
    "none": "naive tokens",
    "dynamic": "published robust tokens",
    "recovered": "published robust tokens",
    "calibrated": "calibrated tokens",
    "chunk": "chunk tokens",
}
#: What the tokens of a kind have to share; chunk tokens code all their steps together.
_STEP_SIZES = {"action_dim": "A", "latent_dim": "D", "num_levels": "K"}
_CHUNK_SIZES = {"action_dim": "A", "chunk_length": "T", "vocabulary": "the vocabulary"}


def integration_paths() -> str:
    """What to do where policy and bundle do not belong together; for messages."""
    built = command("build", "--checkpoint ITS_CHECKPOINT --conditioning recovered --data F --output NEW")
    return f"""\
(A) retrain the policy on the tokens of the new bundle; encode its demonstrations anew:
    {command("tokenize", "NEW --data DEMONSTRATIONS --output OUT")}
(B) keep the policy and replace the decoder alone, where it was trained on published robust tokens (those of a naive
    policy mean something else: refused unless the constants prove equal):
    {built}
(C) evaluate first, then decide:
    {command("compat", "OLD NEW --data F")}
{page("integration")} has the details"""


@dataclass(frozen=True)
class Compatibility:
    """What two manifests say about the tokens of `old` in front of the decoders of `new`.

    is_same: the fingerprints are equal. proof: why a token means the same in both, empty where nothing proves it.
    common_prefixes: the layers l that both decode, of tokens that fit both; obstacles: why `new` cannot take these
    tokens, whatever they mean; differences: what sets the tokens apart. A line each.
    """

    is_same: bool
    proof: str
    common_prefixes: tuple[int, ...]
    obstacles: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def is_proven(self) -> bool:
        """Whether `new` may decode the tokens of `old`."""
        return bool(self.proof) and not self.obstacles


def matches_fingerprint(found: str, expected: object) -> bool:
    """Whether `expected` is the fingerprint `found` or its first digits. InvalidInputError for what can be neither."""
    if not isinstance(expected, str):
        raise InvalidInputError(
            f"expect_fingerprint is a {type(expected).__qualname__}; expected a str of 8 to 64 hexadecimal digits, as "
            "`tokenizer.fingerprint` gives it"
        )
    if not re.fullmatch("[0-9a-f]{8,64}", expected):
        raise InvalidInputError(
            f"expect_fingerprint is {expected!r:.70}, of {len(expected)} characters; expected a str of 8 to 64 "
            "hexadecimal digits in lower case, as `tokenizer.fingerprint` gives it: fewer fit too many tokenizers"
        )
    return found.startswith(expected)


def check_fingerprint(found: str, expected: str) -> None:
    """Raises FingerprintError for another tokenizer, InvalidInputError for what is no fingerprint."""
    if not matches_fingerprint(found, expected):
        raise FingerprintError(
            f"the bundle's fingerprint is {found!r}, expected {expected!r}: its tokens mean something else than those "
            "the policy was trained on, or become other actions; load the bundle that belongs to the policy. Or:\n"
            f"{integration_paths()}"
        )


def compare_manifests(old: Manifest, new: Manifest) -> Compatibility:
    """Look for a proof; chunk length and built prefixes do not change what a token means."""
    proof = _proof(old, new)
    common = {*old.model.prefixes} & {*new.model.prefixes} if fits(old.model, new.model) else ()
    return Compatibility(
        is_same=old.fingerprint == new.fingerprint,
        proof=proof,
        common_prefixes=tuple(sorted(common)),
        obstacles=tuple(_obstacles(old.model, new.model)),
        differences=() if proof else tuple(_differences(old, new)),
    )


def require_compatible(old: Manifest, new: Manifest, *, force: bool = False) -> Compatibility:
    """To be called before tokens that were made for `old` are decoded by `new`.

    IncompatibleTokensError unless the manifests prove that tokens mean the same in both and `new` can decode them.
    force: go on without a proof, where `new` can take such tokens at all; then measure what comes of it.
    """
    found = compare_manifests(old, new)
    if found.is_proven or (force and not found.obstacles):
        return found
    reasons = "; ".join(found.obstacles or found.differences)
    way_out = "" if found.obstacles else " To measure it all the same, pass force=True."
    raise IncompatibleTokensError(
        f"tokens of the bundle {old.fingerprint[:16]} ({old.model.mode}) are not to be decoded by "
        f"{new.fingerprint[:16]} ({new.model.mode}): {reasons}.{way_out} Or:\n{integration_paths()}"
    )


def fits(old: ModelEntry, new: ModelEntry) -> bool:
    """Whether a prefix of the tokens of `old` is an input of `new`, as far as shapes and levels go."""
    return not any(_size_obstacles(old, new))


def _obstacles(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    yield from _size_obstacles(old, new)
    if type(old) is not type(new):
        return
    if not {*old.prefixes} & {*new.prefixes}:
        decoded = [" and ".join(map(str, model.prefixes)) for model in (old, new)]
        yield f"the old decodes {decoded[0]} layers and the new {decoded[1]}: none in common"
    if new.has_stats and not old.has_stats:
        yield "the new bundle needs mean and sigma of every layer beside the tokens, and the old has none"


def token_sizes(model: ModelEntry) -> dict[str, str]:
    """What tokens have to share to be each other's: attributes of the model, and what they are called."""
    return _STEP_SIZES if isinstance(model, StepModel) else _CHUNK_SIZES


def kind_of_tokens(model: ModelEntry) -> str:
    """For people; tokens of two kinds have nothing in common."""
    return _KINDS[model.mode]


def _size_obstacles(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    if type(old) is not type(new):
        yield f"the old has {_KINDS[old.mode]}, the new {_KINDS[new.mode]}: other numbers of other things"
        return
    for name, letter in token_sizes(old).items():
        if getattr(old, name) != getattr(new, name):
            yield f"{letter} is {getattr(old, name)} in the old and {getattr(new, name)} in the new bundle"


def _differences(old: Manifest, new: Manifest) -> Iterator[str]:
    kinds = [_KINDS[manifest.model.mode] for manifest in (old, new)]
    if kinds[0] != kinds[1]:
        yield f"the old has {kinds[0]}, the new {kinds[1]}"
    if old.model.depth != new.model.depth:
        yield f"L is {old.model.depth} in the old and {new.model.depth} in the new bundle"
    if not _has_same_units(old.model, new.model):
        yield "their normalisers differ"
    if isinstance(old.model, ChunkModel) and isinstance(new.model, ChunkModel):
        yield from _fit_differences(old, new)
        return
    old_weights, new_weights = _encoder_weights(old), _encoder_weights(new)
    if old_weights and new_weights:
        changed = sorted(name for name, value in old_weights.items() if new_weights.get(name) != value)
        if changed:
            yield f"their encoders have other weights ({', '.join(changed)})"
    elif kinds[0] == kinds[1] != _KINDS["calibrated"] and _checkpoint_sha256(old) != _checkpoint_sha256(new):
        yield (
            "they come from different checkpoint files, and a manifest lacks `provenance.checkpoint.tensors`, the "
            "hashes that could show their encoders to be the same: build that bundle again with this version"
        )
    if kinds[0] == kinds[1] == _KINDS["calibrated"]:
        yield "their encoders are not the same file, so the constants may differ"


def _fit_differences(old: Manifest, new: Manifest) -> Iterator[str]:
    """Of chunk tokens, whose constants all come from a fit; what was fitted to is free-form, and may be missing."""
    records = [recorded_checkpoint(manifest) for manifest in (old, new)]
    data, settings = ([_record(found, name) for found in records] for name in ("data", "config"))
    sources = [found.get("source", "unknown demonstrations") for found in data]
    is_same_data = "sha256" in data[0] and data[0]["sha256"] == data[1].get("sha256")
    told = f"to the same demonstrations ({sources[0]})" if is_same_data else f"to {sources[0]} and to {sources[1]}"
    # Where one is unknown, nothing can be said of the other.
    names = sorted(settings[0].keys() | settings[1].keys()) if all(settings) else []
    pairs = [(name, settings[0].get(name), settings[1].get(name)) for name in names]
    changed = [f"{name} {_said(one)} and {_said(other)}" for name, one, other in pairs if one != other]
    if changed:
        told += f", with other settings: {', '.join(changed)}"
    elif is_same_data:
        told += " with the same settings, by other versions of the fit or on other machines"
    yield f"each has the constants of its own fit, {told}"


def _said(setting: object) -> str:
    return "default" if setting is None else str(setting)


def _record(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _proof(old: Manifest, new: Manifest) -> str:
    """Why the tokens mean the same; empty where nothing shows it."""
    if old.fingerprint == new.fingerprint:
        return f"the same fingerprint, {old.fingerprint[:16]}"
    shared = sorted(_encoder_hashes(old) & _encoder_hashes(new))
    if shared:
        return f"the same encoder, to the last constant: sha256 {shared[0][:16]}"
    kind = _KINDS[old.model.mode]
    # Beside sizes and weights, nothing else goes into these tokens; calibrated ones follow constants that were fitted.
    is_of_weights_alone = (
        kind == _KINDS[new.model.mode] != _KINDS["calibrated"]
        and old.model.depth == new.model.depth
        and fits(old.model, new.model)
        and _has_same_units(old.model, new.model)
    )
    if not is_of_weights_alone:
        return ""
    checkpoint, weights = _checkpoint_sha256(old), _encoder_weights(old)
    if checkpoint and checkpoint == _checkpoint_sha256(new):
        return f"both have {kind} of the same checkpoint: sha256 {checkpoint[:16]}"
    return f"both have {kind} of the same encoder weights" if weights and weights == _encoder_weights(new) else ""


def _encoder_hashes(manifest: Manifest) -> set[str]:
    """Of the encoder's graph in each of its forms."""
    depth = manifest.model.depth
    return {manifest.files[manifest.graph("encoder", depth, form).file].sha256 for form in GRAPH_FORMS}


def _encoder_weights(manifest: Manifest) -> dict[str, str]:
    """The hash of each of the encoder's tensors; empty where the build did not write them down."""
    hashes = recorded_hashes(manifest) or {}
    return {name: value for name, value in hashes.items() if name.startswith("encoder.")}


def _checkpoint_sha256(manifest: Manifest) -> str:
    """Of the file that the bundle was built from, or empty."""
    found = recorded_checkpoint(manifest).get("checkpoint_sha256")
    return found if isinstance(found, str) else ""


def _has_same_units(old: ModelEntry, new: ModelEntry) -> bool:
    return (old.action_units, old.action_offset) == (new.action_units, new.action_offset)
