"""What a page shows is what the tokenizer decodes, and its errors are of that."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.models import ChunkModel
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.explain.classes import class_mean, classes_of, in_words
from rfsq.runtime.explain.measure import Explanation, explain
from rfsq.runtime.explain.samples import Samples, choose_samples
from rfsq.runtime.tokenizer import codes_of
from tests.bundles import Recipe, write_bundle
from tests.chunk_bundles import SMALL, ChunkRecipe, chunk_checkpoint

NAMES = ("x", "y", "z")


def explained(tokenizer: ActionTokenizer, data: Path, unit: float | None = None) -> tuple[Samples, Explanation]:
    samples = choose_samples(open_source(data), tokenizer.model)
    return samples, explain(tokenizer, samples, NAMES, unit)


def check_decodings(tokenizer: ActionTokenizer, samples: Samples, found: Explanation) -> None:
    units = np.array(tokenizer.model.action_units)
    codes = codes_of(tokenizer, samples.actions)
    for index, prefix in enumerate(tokenizer.prefixes):
        part = codes.prefix(prefix)
        decoded = tokenizer.decode(part.tokens, part.stats).astype(np.float64)
        errors = (decoded - samples.actions) / units
        rms = np.sqrt((errors**2).mean(axis=(1, 2)))
        assert found.median[index] == pytest.approx(np.quantile(rms, 0.5))
        assert found.p99[index] == pytest.approx(np.quantile(rms, 0.99))
        for chunk, place in zip(found.chunks, samples.shown, strict=True):
            np.testing.assert_array_equal(chunk.decoded[index], decoded[place])
            assert chunk.rms[index] == pytest.approx(rms[place])
            assert chunk.largest[index] == pytest.approx(np.abs(errors[place]).max())


def test_chunk_tokens_are_decoded_from_every_number_of_them(chunk_tokenizer: ActionTokenizer, data: Path) -> None:
    samples, found = explained(chunk_tokenizer, data)
    model = chunk_tokenizer.model
    assert isinstance(model, ChunkModel)
    check_decodings(chunk_tokenizer, samples, found)
    assert found.prefixes == tuple(range(1, 10))
    # Eight bits a token, four steps a chunk.
    assert found.bits == tuple(2.0 * prefix for prefix in found.prefixes)
    # And what float32 rounds by.
    assert found.bounds == pytest.approx(dict(zip(model.budgets, model.bounds, strict=True)), abs=1e-7)
    assert all(found.bounds[budget] > bound for budget, bound in zip(model.budgets, model.bounds, strict=True))
    tokens = chunk_tokenizer.encode(samples.actions)
    assert [chunk.tokens for chunk in found.chunks] == [tuple(tokens[place].tolist()) for place in samples.shown]


@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def test_layers_of_per_step_tokens_are_decoded_where_the_bundle_can(
    mode: DeployMode, data: Path, tmp_path: Path
) -> None:
    tokenizer = ActionTokenizer.load(write_bundle(tmp_path / "bundle", Recipe(mode=mode)))
    samples, found = explained(tokenizer, data)
    check_decodings(tokenizer, samples, found)
    assert found.prefixes == (2, 3)
    # Four latents of five levels, whatever the chunk.
    assert found.bits == pytest.approx([prefix * 4 * np.log2(5) for prefix in (2, 3)])
    assert (found.bounds, found.classes) == ({}, {})
    assert {(chunk.class_number, chunk.tokens) for chunk in found.chunks} == {(None, ())}


def test_a_distance_is_in_millimetres_where_the_unit_is_known(chunk_tokenizer: ActionTokenizer, data: Path) -> None:
    _, found = explained(chunk_tokenizer, data, 0.05)
    for chunk in found.chunks:
        distances = np.linalg.norm((chunk.decoded - chunk.actions)[..., :3], axis=-1)
        np.testing.assert_allclose(chunk.position_mm, 50 * distances.mean(axis=1))
    assert {chunk.position_mm for chunk in explained(chunk_tokenizer, data)[1].chunks} == {None}


# Classes -------------------------------------------------------------------------------------------------------------


def test_the_first_bits_name_the_class_and_numbers_behind_the_last_mean_it(chunk_tokenizer: ActionTokenizer) -> None:
    model = chunk_tokenizer.model
    assert isinstance(model, ChunkModel)
    # Six classes: three bits of eight.
    tokens = np.array([[0], [31], [32], [5 * 32], [255]], np.int32)
    assert classes_of(model, tokens).tolist() == [0, 0, 1, 5, 5]


@pytest.mark.parametrize("sizes", [SMALL, ChunkSizes(3, 4, num_classes=16, token_bits=4, num_tokens=18)])
def test_over_all_its_words_a_class_decodes_to_its_mean(sizes: ChunkSizes, chunk_tokenizer: ActionTokenizer) -> None:
    """Also where the class is all of the first token."""
    checkpoint = chunk_checkpoint(ChunkRecipe(sizes))
    constants = checkpoint.constants
    # Small enough that nothing is clipped.
    within = replace(constants, mean=constants.mean.clamp(-0.5, 0.5), scale=constants.scale * 0.01)
    reference = replace(checkpoint, constants=within).model()
    assert isinstance(chunk_tokenizer.model, ChunkModel)
    model = replace(chunk_tokenizer.model, num_classes=sizes.num_classes, token_bits=sizes.token_bits)
    for number in range(model.num_classes - 1):
        found = class_mean(lambda words: reference.decode(torch.from_numpy(words)).numpy(), model, number)
        normalised = reference.normalised(torch.from_numpy(found))
        np.testing.assert_allclose(normalised, within.mean[number], atol=1e-6)


def test_shares_are_those_of_all_counted_chunks_and_escape_has_no_mean(
    chunk_tokenizer: ActionTokenizer, data: Path
) -> None:
    samples, found = explained(chunk_tokenizer, data)
    model = chunk_tokenizer.model
    assert isinstance(model, ChunkModel)
    numbers = classes_of(model, chunk_tokenizer.encode(samples.actions))
    assert found.classes.keys() == {*numbers[samples.shown].tolist()}
    for number, shown in found.classes.items():
        assert shown.share == (numbers == number).mean()
        assert (shown.mean is None) == (number == model.num_classes - 1) == (shown.words.startswith("no class"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0.0, 0.0, 0.05]] * 2, "all near 0"),
        ([[0.2, -0.5, 0.9]] * 2, "z strongly positive; y negative; x slightly positive"),
        ([[0.0, 0.0, -1.5]] * 2, "z negative; all else near 0"),
        ([[0.0, -0.4, 0.0], [0.0, 0.6, 0.0]], "y turns from negative to positive; all else near 0"),
        ([[0.3, 0.0, 0.0], [-0.3, 0.0, 0.0]], "x turns from positive to negative; all else near 0"),
    ],
)
def test_a_mean_is_said_in_words(rows: list[list[float]], said: str) -> None:
    largest = np.array([1, 1, 3 if "z negative" in said else 1], np.float32)
    assert in_words(np.array(rows), largest, NAMES) == said


def test_of_many_dimensions_the_first_four_are_named() -> None:
    names = tuple(f"dim {dimension}" for dimension in range(6))
    said = in_words(np.linspace(0.4, 0.9, 6)[None], np.ones(6, np.float32), names)
    assert said == "dim 5 strongly positive; dim 4 strongly positive; dim 3 strongly positive; dim 2 positive; 2 more"


def test_a_dimension_that_never_moves_is_near_zero() -> None:
    assert in_words(np.zeros((2, 3)), np.zeros(3, np.float32), NAMES) == "all near 0"
