"""The calls of a tokenizer that the benchmark times from numpy to numpy, and their data."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..bundle.arrays import Codes, Float32Array, Int32Array
from ..bundle.manifest import ModelEntry
from ..tokenizer import ActionTokenizer, codes_of
from .timing import CallPath, Figure, time_calls


@dataclass(frozen=True, eq=False)
class Batch:
    """B random chunks within the model's range, float32 [B, T, A], and what they are encoded to."""

    actions: Float32Array
    codes: Codes

    @property
    def size(self) -> int:
        return len(self.actions)


def random_batch(tokenizer: ActionTokenizer, size: int) -> Batch:
    """A batch of B = size chunks: always the same actions, and the tokens that the backend makes of them."""
    model = tokenizer.model
    normalised = np.random.default_rng(0).uniform(-1, 1, model.actions_shape(size))
    actions = (normalised * model.action_units + model.action_offset).astype(np.float32)
    return Batch(actions, codes_of(tokenizer, actions))


def decode_name(model: ModelEntry, prefix: int) -> str:
    """`decode` for all layers, `decode l3` for the first three."""
    return "decode" if prefix == model.num_layers else f"decode l{prefix}"


def host_figures(tokenizer: ActionTokenizer, batch: Batch, *, has_copies: bool) -> Iterator[Figure]:
    """Encoding and every decoder, checked and unchecked. has_copies: whether the arrays travel to a GPU and back."""
    model, backend = tokenizer.model, tokenizer.backend
    encoded = np.empty_like(batch.codes.tokens)
    encoded_stats = None if batch.codes.stats is None else np.empty_like(batch.codes.stats)
    decoded = np.empty_like(batch.actions)

    def figure(operation: str, path: CallPath, call: functools.partial[None], bytes_in: int, bytes_out: int) -> Figure:
        floor = copies_name(operation) if has_copies else ""
        take = functools.partial(time_calls, call)
        return Figure(backend.name, operation, path, batch.size, take, floor, bytes_in, bytes_out)

    ways: tuple[tuple[CallPath, ActionTokenizer | None], ...] = (("host", tokenizer), ("unchecked", None))
    for path, checked in ways:
        call = functools.partial((checked or backend).encode_into, batch.actions, encoded, encoded_stats)
        yield figure("encode", path, call, batch.actions.nbytes, _bytes(encoded, encoded_stats))
        for prefix in reversed(model.prefixes):
            tokens, stats = batch.codes.prefix(prefix)
            if checked is None:
                call = functools.partial(backend.decode_into, tokens, stats, decoded)
            else:
                call = functools.partial(checked.decode_into, tokens, decoded, stats)
            yield figure(decode_name(model, prefix), path, call, _bytes(tokens, stats), decoded.nbytes)


def operations_of(model: ModelEntry, prefix: int | None) -> int:
    """Operations in float32 for one step, a fused multiply-add being two; prefix: None for encoding.

    Counted as generated code does them: 8 for Mish, 20 for tanh, 5 for each token that is encoded.
    """
    action_dim, latent_dim, width = model.action_dim, model.latent_dim, model.hidden_width
    layers = 2 * width * (action_dim + latent_dim) + 8 * width
    if prefix is None:
        return layers + 20 * latent_dim + 5 * latent_dim * model.num_layers
    tokens = 2 * latent_dim * prefix
    # A recovered decoder has a weight of every token for every latent.
    return layers + tokens * (latent_dim if model.mode == "recovered" else 1)


def copies_name(operation: str) -> str:
    """The floor of a call that brings arrays to the GPU and back."""
    return f"copies of {operation}"


def _bytes(*arrays: Float32Array | Int32Array | None) -> int:
    return sum(array.nbytes for array in arrays if array is not None)
