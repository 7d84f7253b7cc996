"""Datasets for workers of a DataLoader: a spawned one imports this module, and none of the tests'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.arrays import Float32Array, Int32Array


@dataclass
class Tokens(Dataset[Int32Array]):
    """The tokens of actions [N, T, A], encoded where they are asked for."""

    tokenizer: ActionTokenizer
    actions: Float32Array

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, index: int) -> Int32Array:
        return self.tokenizer.encode(self.actions[index : index + 1])[0]


@dataclass
class Refusals(Dataset[Int32Array]):
    """An error for every item."""

    error: Exception

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Int32Array:
        raise self.error


def stacked(batch: list[Int32Array]) -> Int32Array:
    return np.stack(batch)
