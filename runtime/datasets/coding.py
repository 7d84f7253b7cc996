"""Steps to tokens and back. Every step is coded on its own, so that chunks may begin anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..bundle.arrays import AnyArray, Float32Array, in_chunks
from ..tokenizer import ActionTokenizer

#: Steps that are coded at once: their int32 tokens fit into the processor's second-level cache.
_CODED_STEPS = 4096


class StepCoder:
    """Codes steps for one thread; it keeps the memory for one call."""

    def __init__(self, tokenizer: ActionTokenizer) -> None:
        self._tokenizer, self._model = tokenizer, tokenizer.model
        model = self._model
        batch = max(1, _CODED_STEPS // model.chunk_length)
        self._tokens = np.empty(model.tokens_shape(batch), np.int32)

    def encode(self, actions: Float32Array) -> npt.NDArray[np.uint8]:
        """Actions float32 [n, A] to tokens uint8 [n, D*L]. Raises InvalidInputError for illegal actions."""
        result = np.empty((len(actions), self._model.latent_dim * self._model.num_layers), np.uint8)
        for rows, chunks in self._chunks(actions):
            tokens = self._tokens[: len(chunks)]
            self._tokenizer.encode_into(chunks, tokens)
            # The levels were checked to fit into a byte.
            np.copyto(result[rows], tokens.reshape(-1, result.shape[1])[: rows.stop - rows.start], casting="unsafe")
        return result

    def decode(self, tokens: AnyArray) -> Float32Array:
        """Tokens uint8 [n, D*L] to actions float32 [n, A]. Raises InvalidInputError for illegal tokens."""
        model = self._model
        result = np.empty((len(tokens), model.action_dim), np.float32)
        for rows, chunks in self._chunks(tokens):
            actions = self._tokenizer.decode(chunks.reshape(*chunks.shape[:2], model.latent_dim, model.num_layers))
            result[rows] = actions.reshape(-1, model.action_dim)[: rows.stop - rows.start]
        return result

    def _chunks(self, values: AnyArray) -> Iterator[tuple[slice, AnyArray]]:
        """[n, W] as [B, T, W] for the tokenizer; nobody reads the results of what fills up the last chunk."""
        batch, length = self._tokens.shape[:2]
        for start in range(0, len(values), batch * length):
            part = values[start : start + batch * length]
            yield slice(start, start + len(part)), in_chunks(part, length)
