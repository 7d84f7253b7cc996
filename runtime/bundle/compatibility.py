"""Whether tokens that were made for one bundle mean the same to another: decided from the two manifests alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .advice import command, page
from .checkpoint_layouts import recorded_hashes
from .errors import IncompatibleTokensError, InvalidInputError
from .manifest import GRAPH_FORMS, Manifest, ModelEntry

#: Who makes tokens that follow no constants of the bundle, but the step's own mean and deviation.
_PUBLISHED_MODES = ("dynamic", "recovered")
_KINDS = {
    "none": "naive tokens",
    "dynamic": "published robust tokens",
    "recovered": "published robust tokens",
    "calibrated": "calibrated tokens",
}


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


def compare_manifests(old: Manifest, new: Manifest) -> Compatibility:
    """Look for a proof; chunk length and built prefixes do not change what a token means."""
    is_same = old.fingerprint == new.fingerprint
    obstacles, differences = tuple(_obstacles(old.model, new.model)), tuple(_differences(old, new))
    proof = _proof(old, new)
    if is_same:
        proof, differences = f"the same fingerprint, {old.fingerprint[:16]}", ()
    common = tuple(sorted({*old.model.prefixes} & {*new.model.prefixes})) if _fits(old.model, new.model) else ()
    return Compatibility(is_same, proof, common, obstacles, () if proof else differences)


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


def _fits(old: ModelEntry, new: ModelEntry) -> bool:
    """Whether a prefix of the layers of `old` is an input of `new`, as far as shapes and levels go."""
    return (old.latent_dim, old.num_levels, old.action_dim) == (new.latent_dim, new.num_levels, new.action_dim)


def _obstacles(old: ModelEntry, new: ModelEntry) -> Iterator[str]:
    for name, what in (("action_dim", "A"), ("latent_dim", "D"), ("num_levels", "K")):
        if getattr(old, name) != getattr(new, name):
            yield f"{what} is {getattr(old, name)} in the old and {getattr(new, name)} in the new bundle"
    if not {*old.prefixes} & {*new.prefixes}:
        yield f"the old decodes {_listed(old.prefixes)} layers and the new {_listed(new.prefixes)}: none in common"
    if new.has_stats and not old.has_stats:
        yield "the new bundle needs mean and sigma of every layer beside the tokens, and the old has none"


def _differences(old: Manifest, new: Manifest) -> Iterator[str]:
    kinds = [_KINDS[manifest.model.mode] for manifest in (old, new)]
    if kinds[0] != kinds[1]:
        yield f"the old has {kinds[0]}, the new {kinds[1]}"
    if old.model.num_layers != new.model.num_layers:
        yield f"L is {old.model.num_layers} in the old and {new.model.num_layers} in the new bundle"
    if not _has_same_units(old.model, new.model):
        yield "their normalisers differ"
    hashes = [recorded_hashes(manifest) for manifest in (old, new)]
    if hashes[0] is not None and hashes[1] is not None:
        changed = sorted(
            name for name, value in hashes[0].items() if _is_encoder(name) and hashes[1].get(name) != value
        )
        if changed:
            yield f"their encoders have other weights ({', '.join(changed)})"
    elif kinds[0] == kinds[1] != _KINDS["calibrated"] and _checkpoint_sha256(old) != _checkpoint_sha256(new):
        yield (
            "they come from different checkpoint files, and a manifest lacks `provenance.checkpoint.tensors`, the "
            "hashes that could show their encoders to be the same: build that bundle again with this version"
        )
    if kinds[0] == kinds[1] == _KINDS["calibrated"]:
        yield "their encoders are not the same file, so the constants may differ"


def _proof(old: Manifest, new: Manifest) -> str:
    shared = sorted(set(_encoder_hashes(old)) & set(_encoder_hashes(new)))
    if shared:
        return f"the same encoder, to the last constant: sha256 {shared[0][:16]}"
    modes = {old.model.mode, new.model.mode}
    # Beside sizes and weights, nothing else goes into these tokens; calibrated ones follow constants that were fitted.
    has_no_constants = modes <= {*_PUBLISHED_MODES} or modes == {"none"}
    if not (has_no_constants and _fits(old.model, new.model) and _has_same_units(old.model, new.model)):
        return ""
    if old.model.num_layers != new.model.num_layers:
        return ""
    kind = _KINDS[old.model.mode]
    checkpoints = _checkpoint_sha256(old), _checkpoint_sha256(new)
    if checkpoints[0] and checkpoints[0] == checkpoints[1]:
        return f"both have {kind} of the same checkpoint: sha256 {checkpoints[0][:16]}"
    hashes = [recorded_hashes(manifest) for manifest in (old, new)]
    if hashes[0] is None or hashes[1] is None:
        return ""
    encoders = [{name: value for name, value in found.items() if _is_encoder(name)} for found in hashes if found]
    return f"both have {kind} of the same encoder weights" if encoders[0] and encoders[0] == encoders[1] else ""


def _encoder_hashes(manifest: Manifest) -> list[str]:
    """Of the encoder's graph in each of its forms."""
    depth = manifest.model.num_layers
    return [manifest.files[manifest.graph("encoder", depth, form).file].sha256 for form in GRAPH_FORMS]


def _checkpoint_sha256(manifest: Manifest) -> str:
    """Of the file that the bundle was built from, or empty."""
    checkpoint = manifest.provenance.get("checkpoint")
    found = checkpoint.get("checkpoint_sha256") if isinstance(checkpoint, dict) else None
    return found if isinstance(found, str) else ""


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.")


def _has_same_units(old: ModelEntry, new: ModelEntry) -> bool:
    return (old.action_units, old.action_offset) == (new.action_units, new.action_offset)


def _listed(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers))
