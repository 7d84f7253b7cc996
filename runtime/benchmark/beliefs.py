"""Figures of what a policy believes: distributions decoded, with standard deviations and without."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..backends.beliefs import BeliefAnswer, BeliefQuestion, belief_backend, coarse_layers, decodes_beliefs
from ..bundle.arrays import Float32Array
from ..bundle.models import ModelEntry
from ..tokenizer import ActionTokenizer
from .timing import CallPath, Figure, operation_name, time_calls


def belief_figures(tokenizer: ActionTokenizer) -> Iterator[Figure]:
    """One chunk's distributions of all its tokens, checked and unchecked; none where the backend decodes no beliefs.

    With `std` in its name a figure writes the mode's probability as well.
    """
    model, backend = tokenizer.model, tokenizer.backend
    if not decodes_beliefs(backend):
        return
    given = {is_logits: random_distributions(model, is_logits=is_logits) for is_logits in (False, True)}
    actions, std = (np.empty(model.actions_shape(1), np.float32) for _ in range(2))
    outputs: tuple[tuple[Any, ...], ...] = ((actions, None, None), (actions, std, np.empty(1, np.float32)))
    paths: tuple[CallPath, ...] = ("host", "unchecked")
    for path, (is_logits, array), (out, *others) in itertools.product(paths, given.items(), outputs):
        if path == "host":
            decode = tokenizer.decode_logits_into if is_logits else tokenizer.decode_probabilities_into
            call = functools.partial(decode, array, out, *others)
        else:
            question = BeliefQuestion(
                (array,), np.ones(array.shape[-2], np.float32), is_logits, False, coarse_layers(model)
            )
            call = functools.partial(belief_backend(backend).decode_belief_into, question, BeliefAnswer(out, *others))
        name = f"{'logits' if is_logits else 'probabilities'}{', std' if others[0] is not None else ''}"
        written = sum(found.nbytes for found in (out, *others) if found is not None)
        yield Figure(
            backend.name, name, path, 1, functools.partial(time_calls, call), bytes_in=array.nbytes, bytes_out=written,
            compared=operation_name(model, model.depth),
        )  # fmt: skip


def random_distributions(model: ModelEntry, *, is_logits: bool) -> Float32Array:
    """Of every token of one chunk: [1, T, D, l, K] or [1, l, V]; always the same."""
    shape = (*model.tokens_shape(1), model.vocabulary)
    logits = np.random.default_rng(0).normal(scale=2, size=shape)
    found = logits if is_logits else np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return found.astype(np.float32)
