"""What belief graphs are given: probabilities that numpy has made, and which chunks of tokens are certain."""

from __future__ import annotations

import numpy as np
import pytest

from rfsq.runtime.backends.belief_replay import plain_question
from rfsq.runtime.backends.graph_beliefs import GraphInputs, graph_inputs
from rfsq.runtime.bundle.arrays import Float32Array
from rfsq.runtime.bundle.models import ModelEntry
from rfsq.runtime.bundle.probabilities import softmax
from tests.bundles import Recipe, deploy, make_manifest
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

STEPS: ModelEntry = make_manifest(deploy(Recipe())).model
CHUNKS: ModelEntry = deployed_chunk_tokens(ChunkRecipe()).model
MODELS = pytest.mark.parametrize("model", [STEPS, CHUNKS], ids=["steps", "chunks"])
KEEPS_MODE = pytest.mark.parametrize("keeps_mode", [False, True], ids=["expected", "likeliest mode"])


def drawn_logits(model: ModelEntry, count: int) -> Float32Array:
    shape = (*model.tokens_shape(count, model.depth), model.vocabulary)
    return np.random.default_rng(0).normal(scale=2, size=shape).astype(np.float32)


def inputs_of(model: ModelEntry, logits: Float32Array, *, keeps_mode: bool = False) -> GraphInputs:
    return graph_inputs(model, plain_question((logits,), model, is_logits=True, keeps_mode=keeps_mode))


def test_steps_come_as_distributions_whose_coarse_layers_may_be_the_mode() -> None:
    logits = drawn_logits(STEPS, 3)
    shares, coarse = softmax(logits, 1.0), STEPS.prefixes[0]
    expected, kept = (inputs_of(STEPS, logits, keeps_mode=keeps_mode) for keeps_mode in (False, True))
    np.testing.assert_allclose(expected.arrays[0], shares, rtol=1e-6)
    np.testing.assert_array_equal(kept.arrays[0][..., coarse:, :], expected.arrays[0][..., coarse:, :])
    np.testing.assert_array_equal(kept.arrays[0][..., :coarse, :].argmax(-1), logits[..., :coarse, :].argmax(-1))
    assert set(np.unique(kept.arrays[0][..., :coarse, :])) == {0, 1}
    for made in (expected, kept):
        assert made.arrays[0].flags.c_contiguous
        np.testing.assert_array_equal(made.mode, logits[..., :coarse, :].argmax(-1))
        np.testing.assert_allclose(made.mode_probability, shares[..., :coarse, :].max(-1).min((1, 2, 3)), rtol=1e-12)


@MODELS
@KEEPS_MODE
def test_chunks_are_certain_where_nothing_else_is_possible(model: ModelEntry, keeps_mode: bool) -> None:
    """However little: what is likely to e^-100 is so too, and a float64 knows no sum that it would change."""
    logits = drawn_logits(model, 4)
    # Of the words that mean the last class one alone is what tokens are made of: let it be another class.
    logits.reshape(4, -1, model.vocabulary)[:, 0, 1] = 20
    likeliest = logits.argmax(-1)
    others = np.arange(model.vocabulary) != likeliest[..., None]
    logits[1][others[1]] = -np.inf
    logits[2][others[2]] = -100
    logits[2][~others[2]] = 0
    logits[3][others[3]] = -np.inf
    made = inputs_of(model, logits, keeps_mode=keeps_mode)
    assert made.certain.tolist() == [False, True, False, True]
    assert made.tokens.dtype == np.int32
    np.testing.assert_array_equal(made.tokens, likeliest[[1, 3]])


@MODELS
def test_where_nothing_is_certain_there_are_no_tokens(model: ModelEntry) -> None:
    made = inputs_of(model, drawn_logits(model, 2))
    assert not made.certain.any()
    assert made.tokens.shape == model.tokens_shape(0, model.depth)
