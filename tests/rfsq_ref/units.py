"""Between robot units and normalised ones, in float64: the definition that models and engines are held against."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rfsq.rfsq_ref.normaliser import Normaliser


def normalise(normaliser: Normaliser, actions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Physical [..., A] to normalised [..., A]."""
    return (np.asarray(actions, np.float64) - np.array(normaliser.offset)) / np.array(normaliser.scale)


def restore(normaliser: Normaliser, actions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Normalised [..., A] to physical [..., A]."""
    return np.asarray(actions, np.float64) * np.array(normaliser.scale) + np.array(normaliser.offset)
