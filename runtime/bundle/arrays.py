"""The arrays that everything here exchanges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]


class Codes(NamedTuple):
    """Tokens int32 [..., D, l], and float32 [..., l, 2], the stats beside them, where the bundle has any."""

    tokens: Int32Array
    stats: Float32Array | None

    def prefix(self, layers: int) -> Codes:
        """The first layers, C-contiguous."""
        stats = None if self.stats is None else np.ascontiguousarray(self.stats[..., :layers, :])
        return Codes(np.ascontiguousarray(self.tokens[..., :layers]), stats)
