"""Chunk tokens in the robot's units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.errors import SettingsError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from tests.chunk_bundles import random_constants

SIZES = ChunkSizes(action_dim=3, chunk_length=4, num_classes=5, num_tokens=12)


@given(st.integers(0, 2**32))
def test_units_and_offsets_of_any_robot_change_no_token_and_scale_the_bound(seed: int) -> None:
    constants = random_constants(SIZES, seed)
    # Powers of two, so that no rounding is new.
    normaliser = Normaliser(NormaliserKind.MIN_MAX, (64.0, 0.0, -8.0), (0.25, 1.0, 1024.0))
    plain, scaled = ChunkTokenizer(SIZES, constants).double(), ChunkTokenizer(SIZES, constants, normaliser).double()
    generator = torch.Generator().manual_seed(seed)
    actions = torch.rand(2, 3, 4, 3, generator=generator, dtype=torch.float32).double() * 2 - 1
    tokens = plain.encode(actions)
    assert tokens.shape == (2, 3, 12)
    robot = actions * scaled.units + scaled.offset
    assert torch.equal(scaled.encode(robot), tokens)
    assert scaled.decode(tokens[..., :5]).shape == (2, 3, 4, 3)
    for budget in scaled.code.budgets:
        error = (scaled.decode(tokens[..., :budget]) - robot).abs().amax(dim=(0, 1, 2))
        assert (error <= scaled.bound(budget) * (1 + 1e-9)).all()


def test_no_chunks_are_no_tokens() -> None:
    tokenizer = ChunkTokenizer(SIZES, random_constants(SIZES, 0))
    assert tokenizer.encode(torch.zeros(0, 4, 3)).shape == (0, 12)
    assert tokenizer.decode(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 4, 3)


def test_a_normaliser_of_another_robot_is_refused() -> None:
    with pytest.raises(SettingsError, match="normaliser for 1 dimensions, code for 3"):
        ChunkTokenizer(SIZES, random_constants(SIZES, 0), Normaliser(NormaliserKind.MIN_MAX, (0.0,), (1.0,)))
