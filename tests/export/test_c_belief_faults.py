"""Faults in the generated C of beliefs, one at a time: what holds the source to the definition finds each of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rfsq.rfsq_ref.chunk_code import ChunkSizes
from tests.bundles import Recipe, deploy
from tests.export import test_c_beliefs as steps
from tests.export import test_chunk_c_beliefs as chunks
from tests.export.c_library import Library
from tests.export.chunk_c_library import Library as ChunkLibrary
from tests.export.chunk_c_library import random_tokenizer
from tests.export.test_c_source import with_value

SIZES = ChunkSizes(3, 2, num_classes=3, token_bits=5, num_tokens=6)

#: What stands in the source, and what a fault makes of it.
STEP_FAULTS = [
    ("means_above[k] = means_above[k + 1] + above[k];", "means_above[k] = means_above[k + 1] + above[k + 1];"),
    ("below += p[k + 1];", "below += p[k];"),
    ("below * (means_above[k] + means_above[k + 1])", "below * (2 * means_above[k])"),
    ("variance * (inverse * inverse)", "variance * inverse"),
    ("inverse = 1 / sum,", "inverse = sum / sum,"),
    ("(logits[k] - largest) * sharpness", "logits[k] * sharpness"),
    ("0x1.715476p+0f, 0, 0x1.fffffep+127f", "0x1.72p+0f, 0, 0x1.fffffep+127f"),
    ("lowest = bits_of(-127);", "lowest = bits_of(-9);"),
    ("return y <= 0 ? power : y;", "return power;"),
    ("SMALLER(smallest_of(p), SMALLER(above, below))", "SMALLER(above, below)"),
    ("SMALLER(smallest_of(p), SMALLER(above, below))", "SMALLER(smallest_of(p), above)"),
    ("SMALLER(smallest_of(p), SMALLER(above, below))", "SMALLER(smallest_of(p), below)"),
    ("illegal |= latents[i] != latents[i];", "illegal |= 0;"),
    ("likeliest[i] + (means[i] - means[i])", "likeliest[i]"),
    ("for (int k = K - 1; k >= 0; --k)\n        level = ", "for (int k = 0; k < K; ++k)\n        level = "),
    ("variances[i] *= is_fine[i];", "variances[i] *= 1;"),
    ("belief.is_fine[layer] = layer >= coarse;", "belief.is_fine[layer] = layer > coarse;"),
    ("slopes[i] = f + values[i]", "slopes[i] = f - values[i]"),
    ("slope[i] *= slope[i] * spread[i];", "slope[i] *= spread[i];"),
]  # fmt: skip
CHUNK_FAULTS = [
    ("upper[j] = (float)(above * (all - below));", "upper[j] = (float)(above * (all - above));"),
    ("above = p + (1 - ones[j]) * step", "above = p + step"),
    ("below = p - ones[j] * step", "below = p"),
    ("shares[latent] /= 2;", "shares[latent] /= 1;"),
    ("(float)(ones[j] * (1 - ones[j]))", "(float)ones[j]"),
    ("spread[m] *= of->width[m] * of->width[m];", "spread[m] *= of->width[m];"),
    ("(is_squared ? basis * basis : basis)", "(is_squared ? basis : basis)"),
    ("variances[n] = variances[n] < 1 ? variances[n] : 1;", ";"),
    ("cells[latent] = 2 * of.cells[latent] + ones[j];", "cells[latent] = 2 * of.cells[latent] + (ones[j] > 0.5);"),
    ("class == likeliest || !(share > 0)", "class == likeliest || !(share > 0.1)"),
    ("belief->weights[class] > belief->weights[likeliest] ?", "belief->weights[class] >= belief->weights[likeliest] ?"),
    ("if (one != 0 && one != 1)", "if (0)"),
    ("spread[i] -= cells[i] * cells[i];", ";"),
]  # fmt: skip


def fault(before: str, after: str) -> Callable[[str], str]:
    def alter(source: str) -> str:
        assert source.count(before) == 1, f"in the source {before!r} is not there once: name a fault of what is there"
        return source.replace(before, after)

    return alter


def check_steps(library: Library) -> None:
    for spread in (0.5, 20):
        steps.check_all(library, 9, spread)
    steps.check_certain(library, 9)
    tied = np.full((1, 2, 4, 2, 5), 0.2, np.float32)
    _, actions, _, _ = library.believe(tied, is_logits=False, keeps_mode=True, coarse=2)
    np.testing.assert_array_equal(actions, library.decode(np.zeros((1, 2, 4, 2), np.int32))[1])
    for value in (np.nan, 0.21, 0.19):
        steps.check_refused(library, with_value(tied, 7, value), is_logits=False)
    steps.check_refused(library, with_value(with_value(tied, 7, -0.1), 8, 0.5), is_logits=False)
    for value in (np.nan, -np.nan):
        steps.check_refused(library, with_value(tied, 7, value), is_logits=True)


def check_chunks(library: ChunkLibrary) -> None:
    for length in (1, 3, 6):
        for spread in (0.5, 20):
            chunks.check_all(library, 9, length, spread)
        chunks.check_certain(library, 9, length)
    chunks.check_ties(library)


@pytest.mark.parametrize(("before", "after"), STEP_FAULTS)
def test_a_fault_in_what_decodes_per_step_tokens_is_found(before: str, after: str, tmp_path: Path) -> None:
    library = Library(tmp_path, replace(deploy(Recipe()), alter_c=fault(before, after)), flags=steps.QUICK)
    with pytest.raises(AssertionError):
        check_steps(library)


@pytest.mark.parametrize(("before", "after"), CHUNK_FAULTS)
def test_a_fault_in_what_decodes_chunk_tokens_is_found(before: str, after: str, tmp_path: Path) -> None:
    library = ChunkLibrary(tmp_path, random_tokenizer(SIZES, seed=1), alter=fault(before, after))
    with pytest.raises(AssertionError):
        check_chunks(library)


def test_without_a_fault_nothing_is_found(tmp_path: Path) -> None:
    check_steps(Library(tmp_path / "steps", deploy(Recipe()), flags=steps.QUICK))
    check_chunks(ChunkLibrary(tmp_path / "chunks", random_tokenizer(SIZES, seed=1)))
