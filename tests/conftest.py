"""For all rooms: how tests run, and the embedded checkpoints and demonstrations, read once."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import settings

from rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq_ref.data import ActionDataset, EpisodeSplit, load_demonstrations, split_episodes

# Small matrices: more threads only wait for each other, and for whatever else runs. In processes that tests start, too.
torch.set_num_threads(1)
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
# No test judges time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def demonstrations() -> ActionDataset:
    return load_demonstrations()


@pytest.fixture(scope="session")
def split(demonstrations: ActionDataset) -> EpisodeSplit:
    return split_episodes(demonstrations)


@pytest.fixture(scope="session")
def robust() -> Checkpoint:
    """As embedded: without constants, whether or not the file should ever bring some."""
    return replace(load_checkpoint(ROBUST_CHECKPOINT), constants=None, recovered={})


@pytest.fixture(scope="session")
def naive() -> Checkpoint:
    return load_checkpoint(NAIVE_CHECKPOINT)
