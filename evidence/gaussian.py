"""What no code of Gaussian chunks can do better than: reverse water-filling of their covariance.

Cover and Thomas, Elements of Information Theory, theorem 10.3.3. Chunks of demonstrations are no Gaussian ones: a code
that knows more of them than their covariance can do better.
"""

import numpy as np

from rfsq.evidence.metrics import Array
from rfsq.rfsq_ref.data import FloatArray

_ROUNDS = 200


def principal_variances(chunks: FloatArray, units: Array) -> Array:
    """[T * A] of chunks [B, T, A] in units [A]: the eigenvalues of their covariance."""
    values = (chunks.astype(np.float64) / units).reshape(len(chunks), -1)
    found: Array = np.linalg.eigvalsh(np.atleast_2d(np.cov(values, rowvar=False, bias=True))).astype(np.float64)
    return found


def least_distortion(variances: Array, bits: float) -> float:
    """The least mean squared error of independent Gaussian values of these variances [N], in so many bits together.

    >>> least_distortion(np.array([1.0, 1.0]), 2.0)
    0.25
    """
    variances = np.maximum(variances, 0.0)
    low, high = 0.0, float(variances.max())
    # The water level: what lies below it is not coded at all.
    for _ in range(_ROUNDS):
        level = (low + high) / 2
        coded = variances[variances > level]
        needed = float(np.log2(coded / level).sum() / 2) if level else np.inf
        low, high = (level, high) if needed > bits else (low, level)
    return float(np.minimum(variances, high).mean())
