"""Affine maps from tokens to latents: ridge regression of latents, and Gauss-Newton steps on the error of actions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mish, softplus

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, RecoveredDecoder

#: Relative decrease of the objective at which refining stops.
_CONVERGED = 1e-4
#: Damping relative to the mean diagonal of the normal matrix: where it starts, where a step is given up.
_DAMPING_START, _DAMPING_MOST = 1e-4, 1e4


@dataclass(frozen=True)
class Regression:
    """A fitted affine map, and how well the tokens determine it.

    decoder: the map; rank: of the centred features, at most D * l; condition: largest over smallest non-zero
    singular value of these features, 1 where there is none."""

    decoder: RecoveredDecoder
    rank: int
    condition: float


@dataclass(frozen=True, eq=False)
class Features:
    """What maps are fitted to: values [N, D * l], the tokens times `scale` less `shift`, which makes their mean 0.

    scale, shift: [D * l]; shares: [N], weights of the steps, which add up to 1.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor
    shares: Tensor

    @classmethod
    def of(cls, tokens: Tensor, worth: Tensor, num_levels: int, shares: Tensor) -> "Features":
        """Features of tokens [N, D, l] with `num_levels` levels. worth [l]: size of a level of each layer, positive."""
        scale = (worth * 2 / (num_levels - 1)).expand(tokens.shape[-2:]).flatten()
        scaled = tokens.flatten(-2).double() * scale
        constant = (scaled == scaled[0]).all(dim=0)
        # Exactly, so that rounding lends a constant token no direction.
        shift = torch.where(constant, scaled[0], shares @ scaled)
        return cls(scaled - shift, scale, shift, shares)

    def decoder(self, coefficients: Tensor, mean: Tensor) -> RecoveredDecoder:
        """From the map of the features, coefficients [D * l, D], to that of the tokens."""
        return RecoveredDecoder((coefficients.T * self.scale).contiguous(), mean - coefficients.T @ self.shift)

    def coefficients(self, decoder: RecoveredDecoder) -> Tensor:
        """The inverse of `decoder`, [D * l + 1, D], the mean last."""
        coefficients = (decoder.matrix / self.scale).T
        return torch.cat((coefficients, (decoder.offset + coefficients.T @ self.shift).unsqueeze(0)))


def regress(features: Features, latents: Tensor, ridges: Sequence[float]) -> list[Regression]:
    """Ridge regressions of latents [N, D], one for each ridge, a penalty on the map of the features.

    A token that never changes gets the coefficient 0; directions the tokens do not span, too.
    """
    mean = features.shares @ latents
    root = features.shares.sqrt().unsqueeze(-1)
    left, singular, right = torch.linalg.svd(root * features.values, full_matrices=False)
    # numpy's rule for the rank of a matrix.
    tolerance = float(singular.max()) * max(features.values.shape) * torch.finfo(torch.float64).eps
    kept = singular > max(tolerance, torch.finfo(torch.float64).tiny)
    rank = int(kept.sum())
    condition = float(singular[0] / singular[rank - 1]) if rank else 1.0
    projected = left.T @ (root * (latents - mean))
    found = []
    for ridge in ridges:
        filtered = torch.where(kept, singular / (singular.square() + ridge).where(kept, torch.ones(())), 0.0)
        coefficients = right.T @ (filtered.unsqueeze(-1) * projected)
        found.append(Regression(features.decoder(coefficients, mean), rank, condition))
    return found


def refinements(
    model: ActionAutoencoder, features: Features, wanted: Tensor, start: RecoveredDecoder, ridge: float
) -> Iterator[RecoveredDecoder]:
    """The map after each Gauss-Newton step towards `wanted` actions [N, A], in normalised units; ends where none helps.

    ridge: penalty on leaving `start`.
    """
    shares, values = features.shares, torch.cat((features.values, torch.ones_like(features.values[:, :1])), dim=1)
    begin = coefficients = features.coefficients(start)
    penalty = torch.full_like(begin, ridge)
    penalty[-1] = 0

    def objective(coefficients: Tensor) -> float:
        error = model.decoder(values @ coefficients) - wanted
        return float(shares @ error.square().mean(dim=-1) + (penalty * (coefficients - begin).square()).sum())

    value, damping, gained = objective(begin), _DAMPING_START, math.inf
    while gained >= _CONVERGED * value:
        normal, gradient = _normal_equations(model, values, wanted, shares, coefficients)
        # Flattened as [D, P], the order of the normal matrix.
        gradient = (gradient - penalty * (coefficients - begin)).T.flatten()
        normal.diagonal().add_(penalty.T.flatten())
        typical = float(normal.diagonal().mean())
        candidate, next_value = coefficients, math.inf
        while not next_value < value and damping <= _DAMPING_MOST:
            damped = normal.clone()
            damped.diagonal().add_(damping * typical)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                change = torch.cholesky_solve(gradient.unsqueeze(-1), factor)
                candidate = coefficients + change.reshape(begin.T.shape).T
                next_value = objective(candidate)
            damping *= 10
        if not next_value < value:
            return
        gained = value - next_value
        coefficients, value, damping = candidate, next_value, damping / 100
        yield features.decoder(coefficients[:-1], coefficients[-1])


def _normal_equations(
    model: ActionAutoencoder, features: Tensor, wanted: Tensor, shares: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix [D * P, D * P] and descent direction [P, D] of the weighted mean squared action error."""
    first, second = model.decoder[0], model.decoder[2]
    inner = first(features @ coefficients)
    error = wanted - second(mish(inner))
    jacobian = torch.einsum("ah,nh,hd->nad", second.weight, _mish_slope(inner), first.weight)
    shares = (shares / wanted.shape[1]).unsqueeze(-1)
    descent = features.T @ (torch.einsum("nad,na->nd", jacobian, error) * shares)
    metric = torch.einsum("nad,nae->nde", jacobian, jacobian) * shares.unsqueeze(-1)
    width, latent_dim = coefficients.shape
    normal = torch.empty(latent_dim, width, latent_dim, width, dtype=features.dtype)
    for row in range(latent_dim):
        for column in range(row + 1):
            block = features.T @ (features * metric[:, row, column].unsqueeze(-1))
            normal[row, :, column] = normal[column, :, row] = block
    return normal.reshape(latent_dim * width, latent_dim * width), descent


def _mish_slope(value: Tensor) -> Tensor:
    """Derivative of x tanh(softplus(x)): tanh(s) + x sigmoid(x) (1 - tanh(s)^2) with s = softplus(x)."""
    gate = torch.tanh(softplus(value))
    return gate + value * torch.sigmoid(value) * (1 - gate.square())
