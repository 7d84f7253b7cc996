"""Beliefs decoded by graphs: numpy makes the probabilities that these take, and keeps to the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..bundle.arrays import AnyArray, BoolArray, Float32Array, Float64Array, Int32Array
from ..bundle.models import ChunkModel, ModelEntry
from ..bundle.probabilities import chunk_probabilities, distributions, num_tokens, one_hot, tokens_of
from .beliefs import BeliefAnswer, BeliefQuestion

#: So many numbers of the largest array of a graph are computed at once: some tens of megabytes in all.
_SLICE = 2**20


class RunsGraph(Protocol):
    """A graph with one or two inputs, and two outputs."""

    def run(self, source: AnyArray, second: AnyArray | None, target: AnyArray, other: AnyArray | None, /) -> None: ...


@dataclass(frozen=True, eq=False)
class GraphInputs:
    """arrays: the graph's inputs, float32; mode_probability: float64 [B], of the likeliest mode int32 [B] or
    [B, T, D, c]; certain: bool [B], whether one chunk of tokens is all that is possible; tokens: int32, of those."""

    arrays: tuple[Float32Array, ...]
    mode_probability: Float64Array
    mode: Int32Array
    tokens: Int32Array
    certain: BoolArray


class GraphBeliefs:
    """`DecodesBeliefs` on belief graphs, by the largest prefix that each takes.

    decode: the backend's own: chunks of which everything is certain give the very same.
    """

    def __init__(
        self,
        model: ModelEntry,
        graphs: Mapping[int, RunsGraph],
        decode: Callable[[Int32Array, None, Float32Array], None],
    ) -> None:
        self._model, self._graphs, self._decode = model, graphs, decode

    def decode_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        """See `DecodesBeliefs.decode_belief_into`."""
        batch, layers, actions = question.batch, num_tokens(question.given, self._model), answer.actions
        tokens, certain = np.zeros(self._model.tokens_shape(batch, layers), np.int32), np.empty(batch, np.bool_)
        # A graph has both outputs.
        std = np.empty_like(actions) if answer.std is None else answer.std
        graph, size = self._graphs[self._model.graph_of(layers)], slice_size(self._model, layers)
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            part = question._replace(given=tuple(array[rows] for array in question.given))
            made = graph_inputs(self._model, part)
            if not made.certain.all():
                second = made.arrays[1] if len(made.arrays) == 2 else None
                graph.run(made.arrays[0], second, actions[rows], std[rows])
            certain[rows] = made.certain
            tokens[rows][made.certain] = made.tokens
            for output, found in ((answer.mode_probability, made.mode_probability), (answer.mode, made.mode)):
                if output is not None:
                    output[rows] = found
        if certain.any():
            # All of them, since a library may sum in another order for another number of chunks.
            decoded = np.empty_like(actions)
            self._decode(tokens, None, decoded)
            actions[certain], std[certain] = decoded[certain], 0


def graph_inputs(model: ModelEntry, question: BeliefQuestion) -> GraphInputs:
    """What a belief graph takes of a question to a backend."""
    if isinstance(model, ChunkModel):
        return _of_chunks(model, question)
    # Levels first, [K, B, T, D, l]: rows of a few levels take numpy several times as long as long ones.
    levels = question.given[0].transpose(4, 0, 1, 2, 3)
    found = distributions(levels, question.sharpness, is_logits=question.is_logits, axis=0)
    largest = found.max(axis=0)
    mode, mode_probability = step_mode(question), largest[..., : question.coarse].min(axis=(1, 2, 3))
    if question.keeps_mode:
        found[..., : question.coarse] = one_hot(mode, model.vocabulary).transpose(4, 0, 1, 2, 3)
        largest = largest[..., question.coarse :]
    # Where the largest is 1, others may be small: they count before they are rounded to 0.
    certain = (largest == 1).all(axis=(1, 2, 3))
    if certain.any():
        certain[certain] = (np.count_nonzero(found[:, certain], axis=0) == 1).all(axis=(1, 2, 3))
    tokens = found[:, certain].argmax(axis=0).astype(np.int32)
    probabilities = found.transpose(1, 2, 3, 4, 0).astype(np.float32, order="C")
    return GraphInputs((probabilities,), mode_probability, mode, tokens, certain)


def step_mode(question: BeliefQuestion) -> Int32Array:
    """The likeliest coarse tokens [B, T, D, coarse]. Of what was given, for a softmax rounds near logits to a tie."""
    likeliest: Int32Array = question.given[0][..., : question.coarse, :].argmax(axis=-1).astype(np.int32)
    return likeliest


def _of_chunks(model: ChunkModel, question: BeliefQuestion) -> GraphInputs:
    """Columns of bits: of the first token given each class, of those behind, and what stays unknown (both sides 0)."""
    found = chunk_probabilities(question.given, question.sharpness, model, is_logits=question.is_logits)
    likeliest, mode_probability = found.classes.argmax(axis=1).astype(np.int32), found.classes.max(axis=1)
    classes = one_hot(likeliest, model.num_classes) if question.keeps_mode else found.classes
    batch, cut = len(classes), model.num_classes * found.first.shape[3]
    bits = np.zeros((batch, 2, model.belief_columns), np.float32)
    bits[:, :, :cut] = found.first.swapaxes(1, 2).reshape(batch, 2, cut)
    bits[:, :, cut : cut + found.rest.shape[2]] = found.rest
    certain: BoolArray = np.count_nonzero(classes, axis=1) == 1
    tokens = np.empty(model.tokens_shape(0, num_tokens(question.given, model)), np.int32)
    if certain.any():
        zeros, ones = found.of_class(likeliest).swapaxes(0, 1)
        # Before rounding, which takes a bit that is 1 for certain long before one that is 0.
        certain &= ((zeros == 0) | (ones == 0)).all(axis=1)
        tokens = tokens_of(likeliest[certain], (ones > zeros)[certain].astype(np.int32), model)
    return GraphInputs((classes.astype(np.float32), bits), mode_probability, likeliest, tokens, certain)


def slice_size(model: ModelEntry, layers: int) -> int:
    """How many chunks numpy computes at once."""
    if isinstance(model, ChunkModel):
        latents = model.num_classes * (model.chunk_length * model.action_dim + model.code_bits)
        numbers = max(latents, model.num_tokens * model.vocabulary)
    else:
        numbers = int(np.prod(model.tokens_shape(1, layers))) * model.vocabulary
    return max(_SLICE // numbers, 1)
