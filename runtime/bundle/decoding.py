"""What a decoder is made of, for code that differentiates through it: arrays of a bundle, beside graphs and sources.

Formulas: docs/architecture.md for per-step tokens, docs/chunk_tokens.md for chunk tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .array_file import NOT_AS_WRITTEN, Form, arrays_of, read_members, write_arrays
from .arrays import AnyArray, Float32Array, Int32Array, IntegerArray
from .errors import BundleError
from .manifest import DECODING_NAME
from .models import ChunkModel, StepModel

#: No latent gets more bits: 2^-18 is what float32 resolves of a companded latent.
MOST_BITS = 18
#: A block of the escape code: so many values with three levels each, 243 of the 256 words of eight bits.
BLOCK_VALUES, BLOCK_BITS = 5, 8


@dataclass(frozen=True, eq=False)
class StepDecoding:
    """latents = matrices[l] @ tokens + offsets[l], float32 [D, D * l] and [D], for each prefix l; then first, Mish and
    second, float32 [H, D], [H], [A, H] and [A], give actions in physical units, less the normaliser's offset."""

    matrices: Mapping[int, Float32Array]
    offsets: Mapping[int, Float32Array]
    first_weight: Float32Array
    first_bias: Float32Array
    second_weight: Float32Array
    second_bias: Float32Array


@dataclass(frozen=True, eq=False)
class ChunkDecoding:
    """Of the C - 1 classes but escape; N = T * A values, M latents.

    mean: float32 [C - 1, N]; basis: float32 [C - 1, N, M]; width: float32 [C - 1, M, MOST_BITS + 1], what atanh of a
    level of so many bits is multiplied by; order: int32 [C - 1, code_bits], the latent that each bit refines.
    """

    mean: Float32Array
    basis: Float32Array
    width: Float32Array
    order: Int32Array


Decoding = StepDecoding | ChunkDecoding


def bit_places(order: IntegerArray, num_latents: int) -> Int32Array:
    """int32 [C - 1, M, R]: the code bits that refine each of M latents, the highest first, and code_bits where it has
    fewer than R, the most that one has. order: [C - 1, code_bits], the latent that each bit refines."""
    classes, length = order.shape
    counts = [np.bincount(row, minlength=num_latents).max(initial=0) for row in order]
    places = np.full((classes, num_latents, max(counts)), length, np.int32)
    for found, row in zip(places, order, strict=True):
        # Stable: the bits of a latent stay in their order.
        by_latent = row.argsort(kind="stable")
        refined = row[by_latent]
        found[refined, np.arange(length) - np.searchsorted(refined, refined)] = by_latent
    return places


def write_decoding(decoding: Decoding) -> bytes:
    """The bytes of the file."""
    return write_arrays(_arrays(decoding))


def read_decoding(content: bytes, model: ChunkModel | StepModel) -> Decoding:
    """Constants that fit `model`, as read-only arrays. Raises BundleError for all but what `write_decoding` writes."""
    try:
        arrays = arrays_of(read_members(content), _expected(model))
    except ValueError as error:
        raise _malformed(str(error)) from error
    problems = [*_problems(arrays, model)]
    if problems:
        raise _malformed(f"has {'; '.join(problems)}")
    if write_arrays(arrays) != content:
        raise _malformed(NOT_AS_WRITTEN)
    if isinstance(model, ChunkModel):
        return ChunkDecoding(**arrays)
    matrices, offsets = (
        {prefix: arrays.pop(f"{name}_{prefix}") for prefix in model.prefixes} for name in ("matrix", "offset")
    )
    return StepDecoding(matrices, offsets, **arrays)


def _arrays(decoding: Decoding) -> dict[str, AnyArray]:
    arrays = dict(vars(decoding))
    if isinstance(decoding, StepDecoding):
        for name, kept in (("matrix", arrays.pop("matrices")), ("offset", arrays.pop("offsets"))):
            arrays |= {f"{name}_{prefix}": array for prefix, array in kept.items()}
    return arrays


def _expected(model: ChunkModel | StepModel) -> dict[str, Form]:
    shapes: dict[str, tuple[int, ...]]
    if isinstance(model, ChunkModel):
        kept, values, latents = model.num_classes - 1, model.chunk_length * model.action_dim, model.num_latents
        shapes = {
            "mean": (kept, values),
            "basis": (kept, values, latents),
            "width": (kept, latents, MOST_BITS + 1),
            "order": (kept, model.code_bits),
        }
    else:
        latents, hidden, actions = model.latent_dim, model.hidden_width, model.action_dim
        shapes = {
            "first_weight": (hidden, latents),
            "first_bias": (hidden,),
            "second_weight": (actions, hidden),
            "second_bias": (actions,),
            **{f"matrix_{prefix}": (latents, latents * prefix) for prefix in model.prefixes},
            **{f"offset_{prefix}": (latents,) for prefix in model.prefixes},
        }
    return {name: (np.int32 if name == "order" else np.float32, shape) for name, shape in shapes.items()}


def _problems(arrays: Mapping[str, AnyArray], model: ChunkModel | StepModel) -> Iterator[str]:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            yield f"{name} that is not finite"
    if isinstance(model, ChunkModel):
        order, latents = arrays["order"], model.num_latents
        if not (arrays["width"][..., 1:] > 0).all():
            yield "a width that is not above 0"
        if not ((order >= 0) & (order < latents)).all():
            yield f"an order of latents outside 0 ... {latents - 1}"
        elif max(np.bincount(row).max(initial=0) for row in order) > MOST_BITS:
            yield f"an order that names a latent more than {MOST_BITS} times"


def _malformed(problem: str) -> BundleError:
    return BundleError(f"{DECODING_NAME} {problem}; copy the bundle again or build it again")
