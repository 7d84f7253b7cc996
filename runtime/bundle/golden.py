"""Golden vectors: inputs, and what the reference in float64 made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .array_file import NOT_AS_WRITTEN, Form, arrays_of, header, read_members, write_arrays
from .arrays import AnyArray, Float32Array, Float64Array, Int32Array, Int64Array, IntegerArray
from .comparison import TokenComparison, compare_chunk_tokens, compare_tokens
from .errors import BundleError
from .gates import GATES, highest_bounds, highest_limit, near_tie_cap
from .golden_beliefs import PREFIX as BELIEFS
from .golden_beliefs import GoldenBeliefs, belief_arrays, belief_problems, beliefs_of, expected_belief_arrays
from .manifest import GOLDEN_NAME
from .models import ModelEntry, StepModel

#: How far inputs reach from the middle at least, in units: they are drawn from a range of about two units.
_SPANNED_UNITS = 0.1
#: What arrays of decoded actions are called, before their number of layers; and what others are called.
_DECODED = "decoded_"

_ALWAYS_THERE = ("actions", "tokens", "margins", "bounds")
_OPTIONAL = ("stats", "lengths", "partial")


@dataclass(frozen=True, eq=False)
class Expected:
    """N chunks through the reference in float64.

    actions: float32 [N, T, A] in physical units, the encoder's inputs; tokens: int32 [N, T, D, L] or [N, L]; stats:
    float32 [N, T, L, 2], `dynamic` only; decoded: for every prefix l that has a decoder of its own, the reference's
    decoding of tokens[..., :l] (and stats[..., :l, :]) in physical units, float64 [N, T, A]. near_tie_cap: how many
    near-tie flips are allowed; flip_tolerance: how far, in normalised units, the full-depth decoding of a step, or
    chunk, with such a flip may lie from decoded[L].
    Of chunk tokens, whose every prefix decodes: lengths int32 [N], 1 ... L, and partial float64 [N, T, A], what chunk
    n decodes to from its first lengths[n] tokens.
    """

    actions: Float32Array
    tokens: Int32Array
    stats: Float32Array | None
    decoded: Mapping[int, Float64Array]
    near_tie_cap: int
    flip_tolerance: float
    lengths: Int32Array | None = None
    partial: Float64Array | None = None

    def decodings(self) -> Iterator[tuple[int, slice | Int64Array, Float64Array]]:
        """Prefix l, which chunks [n], and what these decode to from it, float64 [n, T, A]."""
        for prefix, decoded in self.decoded.items():
            yield prefix, slice(None), decoded
        if self.lengths is not None and self.partial is not None:
            for prefix in np.unique(self.lengths).tolist():
                rows = np.flatnonzero(self.lengths == prefix)
                yield prefix, rows, self.partial[rows]


@dataclass(frozen=True, eq=False, kw_only=True)
class Golden(Expected):
    """What tokens are judged by where there is no reference, too.

    margins, bounds: float32, of the shape of the tokens: the decision margins and how far float32 can move them, in bin
    widths or another unit of both. beliefs: None in bundles that decode none, or were built before there were any.
    """

    margins: Float32Array
    bounds: Float32Array
    beliefs: GoldenBeliefs | None = None

    def compared(self, tokens: IntegerArray, model: ModelEntry) -> TokenComparison:
        """How the tokens that an implementation gives for `actions` differ."""
        expected = self.tokens, tokens, self.margins, self.bounds
        if not model.token_grid:
            return compare_chunk_tokens(*expected, vocabulary=model.vocabulary)
        return compare_tokens(*expected, num_levels=model.vocabulary, is_step_coupled=model.is_step_coupled)

    def every(self, stride: int) -> Golden:
        """Every stride-th chunk, and all beliefs.

        Of torch's flips it has a share; the scatter of a count so small stays.
        """
        float32_flips = max(self.near_tie_cap - GATES.near_tie_scatter, 0) / GATES.near_tie_ratio
        share = len(self.actions[::stride]) / len(self.actions)
        cap = min(self.near_tie_cap, near_tie_cap(float32_flips * share))
        without = _arrays_of(replace(self, beliefs=None))
        chosen = {name: array[::stride] if array.ndim else array for name, array in without.items()}
        return replace(_golden_of(chosen), near_tie_cap=cap, beliefs=self.beliefs)


def write_golden(golden: Golden) -> bytes:
    """The bytes of an .npz: the same for the same content, at any time."""
    return write_arrays(_arrays_of(golden))


def _arrays_of(golden: Golden) -> dict[str, AnyArray]:
    arrays: dict[str, AnyArray] = {
        **{name: getattr(golden, name) for name in _ALWAYS_THERE},
        "near_tie_cap": np.array(golden.near_tie_cap, np.int64),
        "flip_tolerance": np.array(golden.flip_tolerance, np.float64),
        **{f"{_DECODED}{prefix}": actions for prefix, actions in golden.decoded.items()},
    }
    if golden.beliefs is not None:
        arrays |= belief_arrays(golden.beliefs)
    optional = {name: getattr(golden, name) for name in _OPTIONAL}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def _golden_of(arrays: Mapping[str, AnyArray]) -> Golden:
    """The inverse of `_arrays_of`."""
    actions, tokens, margins, bounds = (arrays[name] for name in _ALWAYS_THERE)
    decoded = {int(name.removeprefix(_DECODED)): array for name, array in arrays.items() if name.startswith(_DECODED)}
    cap, tolerance = int(arrays["near_tie_cap"]), float(arrays["flip_tolerance"])
    stats, *chunk = (arrays.get(name) for name in _OPTIONAL)
    edges = {"margins": margins, "bounds": bounds}
    return Golden(actions, tokens, stats, decoded, cap, tolerance, *chunk, **edges, beliefs=beliefs_of(arrays))


def read_golden(content: bytes, model: ModelEntry) -> Golden:
    """Golden vectors that fit `model`, as read-only arrays.

    Raises BundleError for anything but the very bytes that `write_golden` writes, and for values that make no sense.
    """
    try:
        members = read_members(content)
        expected = _expected_arrays(model, _num_chunks(members, model))
        if not model.has_stats and any(name.startswith(BELIEFS) for name in members):
            expected |= expected_belief_arrays(model)
        golden = _golden_of(arrays_of(members, expected))
    except ValueError as error:
        raise _malformed(str(error)) from error
    _check_values(golden, model)
    if write_golden(golden) != content:
        raise _malformed(NOT_AS_WRITTEN)
    return golden


def _expected_arrays(model: ModelEntry, num_chunks: int) -> dict[str, Form]:
    """By name."""
    actions, per_token = model.actions_shape(num_chunks), model.tokens_shape(num_chunks)
    arrays: dict[str, Form] = {
        "actions": (np.float32, actions),
        "tokens": (np.int32, per_token),
        "margins": (np.float32, per_token),
        "bounds": (np.float32, per_token),
        "near_tie_cap": (np.int64, ()),
        "flip_tolerance": (np.float64, ()),
        **{f"{_DECODED}{prefix}": (np.float64, actions) for prefix in model.decoder_graphs},
    }
    if model.has_stats:
        arrays["stats"] = (np.float32, model.stats_shape(num_chunks))
    if not model.token_grid:
        arrays |= {"lengths": (np.int32, (num_chunks,)), "partial": (np.float64, actions)}
    return arrays


def _num_chunks(members: Mapping[str, bytes], model: ModelEntry) -> int:
    if "actions.npy" not in members:
        raise ValueError("lacks actions.npy")
    chunk = (model.chunk_length, model.action_dim)
    # A header is as long for any number of chunks.
    size = len(members["actions.npy"]) - len(header(np.float32, (1, *chunk)))
    num_chunks, rest = divmod(size, np.dtype(np.float32).itemsize * math.prod(chunk))
    if num_chunks < 1 or rest:
        raise ValueError(f"has {size} bytes of actions; expected one or more whole chunks of float32{list(chunk)}")
    return num_chunks


def _check_values(golden: Golden, model: ModelEntry) -> None:
    """Every number must be one that the reference can give: golden vectors that cannot fail test nothing."""
    excused = int((golden.margins <= golden.bounds).sum())
    most_flips = _most_flips(golden, model, excused)
    rules: dict[str, bool | np.bool_] = {
        "actions that do not span the model's action_units": _spans_units(golden, model),
        "actions beyond the model's action_limit": (np.abs(golden.actions) <= model.action_limit).all(),
        f"tokens outside 0 ... {model.vocabulary - 1}": (
            (golden.tokens >= 0) & (golden.tokens < model.vocabulary)
        ).all(),
        "margins that are negative or not finite": ((golden.margins >= 0) & np.isfinite(golden.margins)).all(),
        "bounds that are negative or not a number": (golden.bounds >= 0).all(),
        "stats that are not finite": golden.stats is None or np.isfinite(golden.stats).all(),
        "decoded actions that are not finite": all(np.isfinite(part).all() for _, _, part in golden.decodings()),
        f"lengths that are not all from 1 to {model.depth}": golden.lengths is None
        or np.isin(golden.lengths, model.prefixes).all(),
        "bounds that float32's rounding does not explain": _are_of_rounding(golden, model),
        f"bounds that excuse {excused} of {golden.tokens.size} tokens": (
            excused <= GATES.excused_share * golden.tokens.size
        ),
        f"a near_tie_cap of {golden.near_tie_cap}, not from 0 to {most_flips}": 0 <= golden.near_tie_cap <= most_flips,
        f"a flip_tolerance of {golden.flip_tolerance:g}, not from 0 to {GATES.flip_error:g}": (
            0 <= golden.flip_tolerance <= GATES.flip_error
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    broken += belief_problems(golden.beliefs) if golden.beliefs is not None else ()
    if broken:
        raise _malformed(f"has {'; '.join(broken)}")


def _are_of_rounding(golden: Golden, model: ModelEntry) -> bool:
    if not isinstance(model, StepModel):
        # Margins and bounds have a unit that only their ratio knows; `excused_share` judges it.
        return True
    beyond = golden.bounds > np.array(highest_bounds(model.num_levels, model.num_layers))
    num_tokens = golden.tokens[..., 0].size
    # One token of a few vectors is already a large share, or one step where the latents of a step share a deviation.
    fewest = model.latent_dim if model.has_stats else 1
    return bool((beyond.sum(axis=(0, 1, 2)) <= max(GATES.unlikely_bounds * num_tokens, fewest)).all())


def _most_flips(golden: Golden, model: ModelEntry, excused: int) -> int:
    """No flip is without a near-tie, but those of later layers may follow it. Torch's, and what that allows."""
    steps = golden.actions[..., 0].size
    highest = highest_limit("encode: near-tie flips", steps, model.step_latents, model.depth)
    assert highest is not None  # the name is a gate's
    return int(min(highest, near_tie_cap(min(model.depth * excused, golden.tokens.size))))


def _spans_units(golden: Golden, model: ModelEntry) -> bool:
    """Whether one in ten inputs, in every dimension, is some part of a unit away from the middle of the range.

    Builds cover the range. With units far too large no error, in units, would be one.
    """
    distance = np.abs(golden.actions - np.array(model.action_offset))
    return bool((np.quantile(distance, 0.9, axis=(0, 1)) >= _SPANNED_UNITS * np.array(model.action_units)).all())


def _malformed(problem: str) -> BundleError:
    return BundleError(f"{GOLDEN_NAME} {problem}; copy the bundle again or build it again")
