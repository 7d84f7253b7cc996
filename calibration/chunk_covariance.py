"""Covariances of chunks that few windows determine: those of steps times those of dimensions."""

import torch
from torch import Tensor

#: Of the variance of a normalised action, what no latent falls below: rounding of float32 recordings.
LEAST_VARIANCE = 1e-10
#: Rounds of the fit, which changes little after the first few.
_ROUNDS = 6
#: Of the mean variance, what is added to each, so that dimensions that never move have an inverse.
_FLOOR = 1e-6


def separable(covariance: Tensor, chunk_length: int) -> Tensor:
    """The likeliest covariance [N, N] that is a product of one over steps [T, T] and one over dimensions [A, A].

    Its T² + A² numbers in place of N² are found from few windows. Maximum likelihood of the matrix normal distribution
    (Dutilleul 1999): each factor in turn, given the other.
    """
    steps, dims = chunk_length, len(covariance) // chunk_length
    blocks = covariance.reshape(steps, dims, steps, dims)
    time = torch.eye(steps, dtype=covariance.dtype)
    for _ in range(_ROUNDS):
        across = _with_inverse(torch.einsum("tasb,ts->ab", blocks, torch.linalg.inv(time)) / steps)
        time = _with_inverse(torch.einsum("tasb,ab->ts", blocks, torch.linalg.inv(across)) / dims)
    return torch.kron(time, across)


def _with_inverse(matrix: Tensor) -> Tensor:
    return matrix + _FLOOR * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def mixed(covariance: Tensor, chunk_length: int, share: float) -> Tensor:
    """With this share of the separable covariance, scaled to the same mean variance."""
    if not share:
        return covariance
    product = separable(covariance, chunk_length)
    scale = covariance.diagonal().sum() / product.diagonal().sum()
    return (1 - share) * covariance + share * scale * product


def eigen(covariance: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most so many variances [K], the largest first and none too small, and their basis [N, K]."""
    variances, basis = torch.linalg.eigh(covariance)
    return variances.flip(-1)[:most].clamp(min=LEAST_VARIANCE), basis.flip(-1)[:, :most]
