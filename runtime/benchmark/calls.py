"""The calls of a tokenizer that the benchmark times from numpy to numpy, and their data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.arrays import Codes, Float32Array
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


def operation_name(model: ModelEntry, prefix: int | None) -> str:
    """`encode` for None, `decode` for all layers, `decode l3` for the first three."""
    if prefix is None:
        return "encode"
    return "decode" if prefix == model.num_layers else f"decode l{prefix}"


def host_figures(tokenizer: ActionTokenizer, batch: Batch, *, has_copies: bool) -> Iterator[Figure]:
    """Encoding and every decoder, checked and unchecked. has_copies: whether the arrays travel to a GPU and back."""
    model, backend = tokenizer.model, tokenizer.backend
    encoded: list[Any] = [None if array is None else np.empty_like(array) for array in batch.codes]
    decoded = np.empty_like(batch.actions)
    paths: tuple[CallPath, ...] = ("host", "unchecked")
    for path, prefix in itertools.product(paths, (None, *reversed(model.prefixes))):
        codes = batch.codes.prefix(prefix or model.num_layers)
        sizes = [batch.actions.nbytes, sum(array.nbytes for array in codes if array is not None)]
        if prefix is None:
            encode = tokenizer.encode_into if path == "host" else backend.encode_into
            call = functools.partial(encode, batch.actions, *encoded)
        else:
            sizes.reverse()
            call = (
                functools.partial(tokenizer.decode_into, codes.tokens, decoded, codes.stats)
                if path == "host"
                else functools.partial(backend.decode_into, *codes, decoded)
            )
        operation = operation_name(model, prefix)
        floor = copies_name(operation) if has_copies else ""
        yield Figure(backend.name, operation, path, batch.size, functools.partial(time_calls, call), floor, *sizes)


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
