"""Beliefs on the C engine: which function is called, with which arrays, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.backends.beliefs import BeliefAnswer, BeliefQuestion, decodes_beliefs
from rfsq.runtime.backends.c import CBackend
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.arrays import AnyArray, Float32Array, Int32Array
from rfsq.runtime.bundle.errors import BackendUnavailableError, IllegalValueError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from tests.bundles import Recipe
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle

BEST = host_targets()[0]
RECIPE = Recipe(c_targets=(BEST,))
SIZES = ChunkSizes(3, 2, num_classes=5, token_bits=6, num_tokens=6)
#: Whether these are logits, whether the mode alone is decoded, and how many layers are it.
Call = tuple[bool, bool, int]
LOGITS, PROBABILITIES = (True, False, 2), (False, False, 2)

BundleOf = Callable[[Recipe], Path]


@pytest.fixture(scope="module")
def opened(bundle_of: BundleOf) -> Bundle:
    return open_bundle(bundle_of(RECIPE))


@pytest.fixture(scope="module")
def steps(opened: Bundle) -> CBackend:
    return CBackend(opened)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> CBackend:
    recipe = ChunkRecipe(SIZES, c_targets=(BEST,))
    return CBackend(open_bundle(write_chunk_bundle(tmp_path_factory.mktemp("chunk") / "bundle", recipe)))


def asked(
    backend: CBackend, given: tuple[Float32Array, ...], call: Call, action_dim: int = 3
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Actions, standard deviations and the mode's probability; every temperature is 1."""
    batch, size = len(given[0]), given[0].shape[-2] if len(given) == 1 else 1 + given[1].shape[1]
    actions = np.full((batch, 2, action_dim), 77, np.float32)
    std, mode_probability = actions.copy(), np.full(batch, 77, np.float32)
    question = BeliefQuestion(given, np.ones(size, np.float32), *call)
    backend.decode_belief_into(question, BeliefAnswer(actions, std, mode_probability))
    return actions, std, mode_probability


def certain(indices: AnyArray, size: int) -> Float32Array:
    return (indices[..., None] == np.arange(size)).astype(np.float32)


def decoded(backend: CBackend, tokens: Int32Array) -> Float32Array:
    actions = np.empty((len(tokens), 2, 3), np.float32)
    backend.decode_into(tokens, None, actions)
    return actions


def test_each_prefix_of_per_step_tokens_has_its_function(steps: CBackend) -> None:
    assert decodes_beliefs(steps)
    for prefix in (2, 3):
        tokens = np.random.default_rng(1).integers(5, size=(7, 2, 4, prefix), dtype=np.int32)
        actions, std, mode_probability = asked(steps, (certain(tokens, 5),), PROBABILITIES)
        np.testing.assert_array_equal(actions, decoded(steps, tokens))
        assert (std == 0).all()
        assert (mode_probability == 1).all()
        logits = np.log(certain(tokens, 5), where=certain(tokens, 5) > 0, out=np.full((*tokens.shape, 5), -np.inf))
        np.testing.assert_array_equal(asked(steps, (logits.astype(np.float32),), LOGITS)[0], actions)


def test_both_forms_of_chunk_tokens_have_theirs(chunks: CBackend) -> None:
    assert decodes_beliefs(chunks)
    for length in (1, 4, 6):
        tokens = np.random.default_rng(2).integers(64, size=(7, length), dtype=np.int32)
        bits = (tokens[..., None] >> np.arange(5, -1, -1) & 1).reshape(7, -1)[:, 3:].astype(np.float32)
        classes = certain(np.minimum(tokens[:, 0] >> 3, 4), 5)
        for given in ((certain(tokens, 64),), (classes, bits)):
            actions, std, mode_probability = asked(chunks, given, (False, False, 0))
            np.testing.assert_array_equal(actions, decoded(chunks, tokens))
            assert (std == 0).all()
            assert (mode_probability == 1).all()


def test_what_is_asked_for_arrives(steps: CBackend, chunks: CBackend) -> None:
    """Temperature, mode, and whether these are logits: each changes what comes out."""
    random = np.random.default_rng(3)
    logits = random.normal(size=(3, 2, 4, 3, 5)).astype(np.float32)
    pair = random.normal(size=(3, 5)).astype(np.float32), random.normal(size=(3, 15)).astype(np.float32)
    for backend, given, size in ((steps, (logits,), 3), (chunks, pair, 16)):
        found = []
        for call, sharpness in ((LOGITS, 1), (LOGITS, 2), ((True, True, 2), 1)):
            actions, std = np.empty((3, 2, 3), np.float32), np.empty((3, 2, 3), np.float32)
            question = BeliefQuestion(given, np.full(size, sharpness, np.float32), *call)
            backend.decode_belief_into(question, BeliefAnswer(actions, std))
            found.append(np.stack((actions, std)))
        for i in range(3):
            assert not np.allclose(found[i], found[i - 1])
        with pytest.raises(IllegalValueError):
            asked(backend, given, (False, False, 2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_illegal_values_are_refused_and_nothing_is_written(value: float, steps: CBackend, chunks: CBackend) -> None:
    grid = ((1, 2, 4, 3, 5),)
    pair = (1, 5), (1, 15)
    for backend, shapes, illegal in (
        (steps, grid, 0),
        (chunks, ((1, 5, 64),), 0),
        (chunks, pair, 0),
        (chunks, pair, 1),
    ):
        given = tuple(np.zeros(shape, np.float32) for shape in shapes)
        given[illegal].flat[-1] = value
        size = shapes[0][-2] if len(shapes) == 1 else 16
        outputs = tuple(np.full(shape, 77, np.float32) for shape in ((1, 2, 3), (1, 2, 3), (1,)))
        question = BeliefQuestion(given, np.ones(size, np.float32), *LOGITS)
        with pytest.raises(IllegalValueError):
            backend.decode_belief_into(question, BeliefAnswer(*outputs))
        assert all((output == 77).all() for output in outputs)


def test_an_engine_that_was_built_before_there_were_beliefs_decodes_tokens_alone(opened: Bundle) -> None:
    file = f"engines/c/{BEST}/librfsq_tokenizer.so"
    content = opened.content(file).replace(b"rfsq_decode_beliefs_l", b"rfsq_decode_unknown_l")
    older = CBackend(replace(opened, _contents=MappingProxyType({**opened._contents, file: content})))
    assert not decodes_beliefs(older)
    assert np.isfinite(decoded(older, np.zeros((1, 2, 4, 3), np.int32))).all()
    with pytest.raises(BackendUnavailableError, match="build the bundle again"):
        asked(older, (np.zeros((1, 2, 4, 3, 5), np.float32),), LOGITS)


def test_tokens_that_need_statistics_have_none(bundle_of: BundleOf) -> None:
    assert not decodes_beliefs(CBackend(open_bundle(bundle_of(replace(RECIPE, mode=DeployMode.DYNAMIC)))))
