"""Chunk tokenizers to export: of any sizes, and one that is fitted to demonstrations."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.calibration.chunk import ChunkFitConfig, fit_chunk_code, windows
from rfsq.export.chunk_plan import ChunkPlan, plan_chunk_code
from rfsq.rfsq_ref.chunk_code import ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.normaliser import Normaliser
from tests.once import once
from tests.rfsq_ref.test_chunk_code import random_constants

#: Of the demonstrations' chunks, with fewer classes, so that a fit takes seconds.
FITTED_SIZES = ChunkSizes(7, 8, num_classes=12)


def random_tokenizer(sizes: ChunkSizes, seed: int, normaliser: Normaliser | None = None) -> ChunkTokenizer:
    """In float64; with latents so small that classes hold what lies near their means."""
    constants = random_constants(sizes, seed)
    return ChunkTokenizer(sizes, replace(constants, scale=constants.scale * 0.1), normaliser).double()


def random_plan(sizes: ChunkSizes, seed: int) -> ChunkPlan:
    return plan_chunk_code(random_tokenizer(sizes, seed))


def fitted_tokenizer(factory: pytest.TempPathFactory, split: EpisodeSplit) -> ChunkTokenizer:
    """Of `FITTED_SIZES`, in float64."""

    def fit(path: Path) -> None:
        train, calibration = (
            [np.asarray(episode, np.float64) for episode in part.episodes] for part in (split.train, split.calibration)
        )
        config = ChunkFitConfig(most_windows=4000)
        torch.save(vars(fit_chunk_code(train, calibration, FITTED_SIZES, config)), path)

    constants = torch.load(once(factory, "chunk_constants.pt", fit), weights_only=True)
    return ChunkTokenizer(FITTED_SIZES, ChunkConstants(**constants)).double()


def held_out_actions(split: EpisodeSplit) -> np.ndarray:
    """Chunks of the validation episodes, float32 [B, 8, 7]."""
    episodes = [np.asarray(episode, np.float64) for episode in split.validation.episodes]
    return windows(episodes, FITTED_SIZES.chunk_length).reshape(-1, 8, 7).numpy().astype(np.float32)
