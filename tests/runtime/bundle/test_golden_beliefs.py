"""Golden vectors of beliefs: written as they are read, and refused where no definition can have given them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from rfsq.export.belief_vectors import belief_vectors
from rfsq.export.plan import DeployMode
from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.golden import Golden, read_golden, write_golden
from rfsq.runtime.bundle.golden_beliefs import NUM_BELIEFS, GoldenBeliefs, belief_arrays, expected_belief_arrays
from rfsq.runtime.bundle.models import ModelEntry
from tests.bundles import Recipe, deploy, golden_vectors, model_entry
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens, random_chunks

KINDS = pytest.mark.parametrize("kind", ["steps", "chunk"])


@cache
def case(kind: str) -> tuple[Golden, ModelEntry]:
    if kind == "steps":
        deployed = deploy(Recipe())
        return golden_vectors(deployed), model_entry(deployed)
    tokens = deployed_chunk_tokens(ChunkRecipe())
    golden = tokens.reference.golden(tokens.reference.answer(random_chunks(tokens.reference.model, 12)).expected)
    return replace(golden, beliefs=belief_vectors(tokens.reference.model, tokens.model, golden.tokens)), tokens.model


def beliefs_of(golden: Golden) -> GoldenBeliefs:
    assert golden.beliefs is not None
    return golden.beliefs


@KINDS
def test_they_are_read_as_they_were_written(kind: str) -> None:
    golden, model = case(kind)
    found = belief_arrays(beliefs_of(read_golden(write_golden(golden), model)))
    for name, array in belief_arrays(beliefs_of(golden)).items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert (array.dtype, array.shape) == expected_belief_arrays(model)[name]


@KINDS
def test_bundles_without_them_are_read_too(kind: str) -> None:
    golden, model = case(kind)
    assert read_golden(write_golden(replace(golden, beliefs=None)), model).beliefs is None


@KINDS
def test_each_prefix_is_asked_for_all_that_is_possible_and_for_the_likeliest_mode(kind: str) -> None:
    golden, model = case(kind)
    cases = list(beliefs_of(golden).cases(model))
    assert [(each.prefix, each.keeps_mode) for each in cases] == [
        (prefix, keeps_mode) for prefix in model.key_prefixes for keeps_mode in (False, True)
    ]
    for each in cases:
        assert each.actions.shape == each.std.shape == model.actions_shape(NUM_BELIEFS)
        assert all(part.flags.c_contiguous for part in each.given)
    # The last chunk is certain, and decodes to what tokens do.
    assert all(not each.std[-1].any() for each in cases)
    assert beliefs_of(golden).mode_probability[-1] == 1


@KINDS
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("given", np.nan, "logits of beliefs that are no numbers"),
        ("given", np.inf, "logits of beliefs that are no numbers, or infinite"),
        ("actions", np.nan, "actions of beliefs that are not finite"),
        ("std", -1e-9, "deviations of beliefs that are negative"),
        ("std", np.inf, "deviations of beliefs that are negative, not finite"),
        ("mode_probability", 0, "probabilities of modes that are not above 0"),
        ("mode_probability", 1.0000001, "probabilities of modes that are not above 0 and at most 1"),
    ],
)
def test_values_that_no_definition_gives_are_refused(kind: str, name: str, value: float, message: str) -> None:
    golden, model = case(kind)
    beliefs = beliefs_of(golden)
    changed: Any = beliefs.given[-1] if name == "given" else getattr(beliefs, name)
    changed = changed.copy()
    changed.flat[changed.size // 3] = value
    altered = replace(beliefs, **{name: (*beliefs.given[:-1], changed) if name == "given" else changed})
    with pytest.raises(BundleError, match=message):
        read_golden(write_golden(replace(golden, beliefs=altered)), model)


@KINDS
def test_vectors_that_cannot_fail_are_refused(kind: str) -> None:
    golden, model = case(kind)
    beliefs = beliefs_of(golden)
    spread = beliefs.std.copy()
    spread[0, 0] = 0
    with pytest.raises(BundleError, match="or all 0"):
        read_golden(write_golden(replace(golden, beliefs=replace(beliefs, std=spread))), model)


def test_those_of_another_shape_or_of_tokens_that_do_not_decode_alone_are_refused() -> None:
    golden, model = case("steps")
    beliefs = beliefs_of(golden)
    fewer = replace(beliefs, mode_probability=beliefs.mode_probability[1:])
    with pytest.raises(BundleError, match=r"belief_mode_probability.npy .*; the manifest's model needs float64\[8\]"):
        read_golden(write_golden(replace(golden, beliefs=fewer)), model)
    dynamic = deploy(Recipe(mode=DeployMode.DYNAMIC))
    assert golden_vectors(dynamic).beliefs is None
    with pytest.raises(BundleError, match="has the unknown members"):
        read_golden(write_golden(replace(golden_vectors(dynamic), beliefs=beliefs)), model_entry(dynamic))
