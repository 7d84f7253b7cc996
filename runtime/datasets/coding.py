"""Codes rows of a dataset, for one thread: steps by themselves, or chunks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ..bundle.arrays import AnyArray, Float32Array, in_chunks
from ..tokenizer import ActionTokenizer
from .rows import ChunkTokens, TokenModel

#: Steps that are coded at once: their int32 tokens fit into the processor's second-level cache.
_CODED_STEPS = 4096


class Coder(ABC):
    """It keeps the memory for one call. Rows are what `rows.py` says."""

    def __init__(self, tokenizer: ActionTokenizer) -> None:
        self._tokenizer, self._model = tokenizer, tokenizer.model
        batch = max(1, _CODED_STEPS // self._model.chunk_length)
        self._tokens = np.empty(self._model.tokens_shape(batch), np.int32)

    @abstractmethod
    def encode(self, rows: Float32Array) -> AnyArray:
        """Actions, a row each, to tokens. Raises InvalidInputError for illegal actions."""

    @abstractmethod
    def decode(self, rows: AnyArray) -> Float32Array:
        """Tokens, a row each, to actions float32 [n, A]. Raises InvalidInputError for illegal tokens."""


class StepCoder(Coder):
    """Every step is coded on its own, so that chunks may begin anywhere."""

    def encode(self, rows: Float32Array) -> AnyArray:
        """Actions float32 [n, A] to tokens uint8 [n, D*L]."""
        width = math.prod(self._tokens.shape[2:])
        result = np.empty((len(rows), width), np.uint8)
        for place, chunks in self._chunks(rows):
            tokens = self._tokens[: len(chunks)]
            self._tokenizer.encode_into(chunks, tokens)
            # The levels were checked to fit into a byte.
            np.copyto(result[place], tokens.reshape(-1, width)[: place.stop - place.start], casting="unsafe")
        return result

    def decode(self, rows: AnyArray) -> Float32Array:
        """Tokens uint8 [n, D*L] to actions."""
        model = self._model
        result = np.empty((len(rows), model.action_dim), np.float32)
        for place, chunks in self._chunks(rows):
            actions = self._tokenizer.decode(chunks.reshape(model.tokens_shape(len(chunks))))
            result[place] = actions.reshape(-1, model.action_dim)[: place.stop - place.start]
        return result

    def _chunks(self, values: AnyArray) -> Iterator[tuple[slice, AnyArray]]:
        """[n, W] as [B, T, W] for the tokenizer; nobody reads the results of what fills up the last chunk."""
        batch, length = self._tokens.shape[:2]
        for start in range(0, len(values), batch * length):
            part = values[start : start + batch * length]
            yield slice(start, start + len(part)), in_chunks(part, length)


class ChunkCoder(Coder):
    """Every chunk is a row, or the tokens of every step's chunk are."""

    def __init__(self, tokenizer: ActionTokenizer, width: int) -> None:
        """width: how many tokens of each chunk are kept."""
        super().__init__(tokenizer)
        self._width = width

    def encode(self, rows: Float32Array) -> AnyArray:
        """Actions float32 [n, T * A] to the first tokens, uint16 [n, l]."""
        result = np.empty((len(rows), self._width), np.uint16)
        for start in range(0, len(rows), len(self._tokens)):
            part = rows[start : start + len(self._tokens)]
            tokens = self._tokens[: len(part)]
            self._tokenizer.encode_into(part.reshape(self._model.actions_shape(len(part))), tokens)
            # No vocabulary is larger than these types hold.
            np.copyto(result[start : start + len(part)], tokens[:, : self._width], casting="unsafe")
        return result

    def decode(self, rows: AnyArray) -> Float32Array:
        """Tokens of a step's chunk, and its place there, uint16 [n, l + 1], to actions."""
        tokens, place = rows[:, :-1], rows[:, -1]
        is_first = place == 0
        # The first chunk may have begun before these rows.
        is_first[:1] = True
        actions = self._tokenizer.decode(tokens[is_first])
        result: Float32Array = actions[np.cumsum(is_first) - 1, place]
        return result


def coder_of(tokenizer: ActionTokenizer, model: TokenModel) -> Coder:
    return ChunkCoder(tokenizer, model.num_tokens) if isinstance(model, ChunkTokens) else StepCoder(tokenizer)
