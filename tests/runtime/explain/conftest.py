"""A bundle of chunk tokens, and episodes of its actions."""

from pathlib import Path

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer
from tests.chunk_bundles import SMALL, ChunkRecipe, write_chunk_bundle
from tests.once import once
from tests.runtime.datasets.samples import write_npz

#: Of T = 4: 3, 0, 5 and 1 chunks.
LENGTHS = (14, 3, 21, 4)


@pytest.fixture(scope="session")
def chunk_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return once(tmp_path_factory, "bundle explained", lambda path: write_chunk_bundle(path, ChunkRecipe()))


@pytest.fixture
def chunk_tokenizer(chunk_bundle: Path) -> ActionTokenizer:
    return ActionTokenizer.load(chunk_bundle)


@pytest.fixture
def episodes() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [
        np.clip(0.1 * random.standard_normal((length, SMALL.action_dim)).cumsum(axis=0), -0.9, 0.9).astype(np.float32)
        for length in LENGTHS
    ]


@pytest.fixture
def data(episodes: list[np.ndarray], tmp_path: Path) -> Path:
    return write_npz(tmp_path / "data.npz", episodes)
