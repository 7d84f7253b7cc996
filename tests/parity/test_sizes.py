"""Models of other sizes hold on the generated C and ONNX Runtime: some of the table of `tests.parity.sizes`, unfitted.

The whole table, through all gates of a build: `python -m tests.parity.sizes`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.export.chunk_reference import ChunkReference
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.cpu_targets import host_targets
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint, write_chunk_bundle
from tests.parity.sizes import TABLE, judge_bundle
from tests.parity.steps import BACKENDS, DECODE_ERROR, judge_steps, judged


@pytest.mark.parametrize(
    "sizes",
    [
        ChunkSizes(2, 1, num_classes=256, token_bits=12, num_tokens=3),
        ChunkSizes(26, 1, num_classes=2, token_bits=8, num_tokens=30),
        ChunkSizes(7, 8, num_classes=64, token_bits=10, num_tokens=6),
        ChunkSizes(14, 16, num_classes=15, token_bits=12, num_tokens=4),
        ChunkSizes(2, 32, num_classes=15, token_bits=8, num_tokens=16),
    ],
    ids=str,
)
def test_every_number_of_tokens_and_a_loop_hold(sizes: ChunkSizes, tmp_path: Path) -> None:
    recipe = ChunkRecipe(sizes, c_targets=host_targets()[:1])
    bundle = write_chunk_bundle(tmp_path / "bundle", recipe)
    error, *_ = judge_bundle(chunk_checkpoint(recipe), bundle)
    assert error <= DECODE_ERROR


def test_the_table_has_every_pair_of_sizes() -> None:
    rows = [
        (case.sizes.action_dim, case.sizes.chunk_length, case.sizes.token_bits, case.sizes.num_classes)
        for case in TABLE
    ]
    for first in range(4):
        for second in range(first):
            seen = {(row[first], row[second]) for row in rows}
            missing = {(a[first], b[second]) for a in rows for b in rows} - seen
            assert not missing, (first, second, missing)


def test_steps_are_judged_and_a_wrong_constant_is_found(tmp_path: Path) -> None:
    recipe = ChunkRecipe(c_targets=host_targets()[:1])
    bundle, checkpoint = write_chunk_bundle(tmp_path / "bundle", recipe), chunk_checkpoint(recipe)
    verdicts = judge_steps(checkpoint, bundle, 400)
    assert [verdict.backend for verdict in verdicts] == list(BACKENDS)
    assert all(verdict.is_right and verdict.num_steps >= 400 for verdict in verdicts)
    reference = ChunkReference(checkpoint.model(dtype=torch.float64))
    reference.model.offset += 1e-3
    tokens = np.random.default_rng(0).integers(256, size=(200, 9))
    actions = reference.decode(tokens).astype(np.float32)
    expected = reference.model.encode(torch.from_numpy(actions).double()).numpy().astype(np.int32)
    with ActionTokenizer.load(bundle, backend="c") as tokenizer:
        verdict = judged(reference, tokenizer, actions, expected, 5)
    assert verdict.wrong > 0
    assert not verdict.is_right
    assert "expected" in verdict.first_wrong
