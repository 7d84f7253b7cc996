"""How far float32 arithmetic can move a quantiser's decision: a forward error bound, computed per token.

Used to tell a near-tie, which every correct float32 implementation may decide either way, from a wrong token.
The bound holds for any order of summation and for the folded deployment graph. It follows the standard model
fl(a op b) = (a op b)(1 + e), |e| <= u, and gamma_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., sections 2.2 and 3.1), carried to first order through every layer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rfsq_ref.autoencoder import ActionAutoencoder
from rfsq_ref.quantizer import Conditioning, LayerStep, ResidualQuantizer

#: Unit roundoff of float32.
UNIT = 2.0**-24
#: Elementary functions (exp, log, tanh) of common libraries are good to 2 units in the last place, that is 4 u.
FUNCTION = 4 * UNIT
#: Largest slope of Mish, reached near x = 1.19 (computed from its derivative).
MISH_SLOPE = 1.0885


def gamma(terms: int) -> float:
    """Relative error bound of a sum of products with `terms` roundings on each path."""
    return terms * UNIT / (1 - terms * UNIT)


def latent_error_bound(model: ActionAutoencoder, actions: Tensor) -> tuple[Tensor, Tensor]:
    """float64 latents [..., D] of a float64 model and the bound on their float32 error, same shape."""
    first, second = model.encoder[0], model.encoder[2]
    # As deployed: the normaliser folded into the first layer, its weights rounded once more.
    weight = first.weight / model.units
    bias = first.bias - weight @ model.offset
    inner = actions @ weight.T + bias
    inner_error = gamma(model.config.action_dim + 3) * (actions.abs() @ weight.abs().T + bias.abs())
    hidden = model.encoder[1](inner)
    # x tanh(log(1 + exp x)): exp, add, log give at most 5 u + FUNCTION * softplus; tanh damps what is large
    # (sech^2(s) s < 0.45) and adds its own; the product rounds once. The form without log and tanh that the
    # deployment graph uses stays below the same bound.
    mish_error = inner.abs() * (5 * UNIT + 1.45 * FUNCTION) + UNIT * hidden.abs()
    hidden_error = MISH_SLOPE * inner_error + mish_error
    outer = hidden @ second.weight.T + second.bias
    outer_error = (
        gamma(model.config.hidden_width + 2) * (hidden.abs() @ second.weight.abs().T + second.bias.abs())
        + hidden_error @ second.weight.abs().T
    )
    latents = torch.tanh(outer)
    # The slope of tanh over the whole interval of error, not only at its centre.
    slope = (1 - latents**2 + 2 * outer_error).clamp(max=1)
    return latents, slope * outer_error + FUNCTION * latents.abs()


def token_error_bounds(model: ActionAutoencoder, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reference tokens, decision margins and float32 error bounds, each [..., D, L], for actions [..., A].

    model and actions are float64. Margins and bounds are in bin widths of their layer: a float32 token may
    differ from the reference only where margin <= bound, or behind such a difference.
    """
    if actions.dtype is not torch.float64 or model.offset.dtype is not torch.float64:
        raise ValueError(
            f"error bounds need float64 reference and actions; got {model.offset.dtype} and {actions.dtype}"
        )
    latents, error = latent_error_bound(model, actions)
    layers = _dynamic_layers if model.conditioning is Conditioning.DYNAMIC else _affine_layers
    tokens, margins, bounds = zip(*layers(model.quantizer, latents, error), strict=True)
    return torch.stack(tokens, -1), torch.stack(margins, -1), torch.stack(bounds, -1)


def _affine_layers(
    quantizer: ResidualQuantizer, latents: Tensor, error: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, margins and bounds of layers with constant mean and scale; error [..., D] grows by roundings only."""
    for step, mean, scale in zip(quantizer.layers(latents), quantizer.mean, quantizer.scale, strict=True):
        conditioned_error = (error + UNIT * (mean.abs() + (step.residual - mean).abs())) / scale
        yield step.tokens, quantizer.decision_margins(step.conditioned), _bin_error(quantizer, step, conditioned_error)
        level = quantizer.grid[step.tokens].abs()
        next_residual = (step.residual - step.dequantised).abs()
        error = error + UNIT * (4 * level * scale + 4 * mean.abs() + next_residual)


def _dynamic_layers(
    quantizer: ResidualQuantizer, latents: Tensor, error: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same for layers normalised by their own step, where the error is a vector over the step's latents.

    To first order the error e of the residual reaches x through (P - x x^T / (D - 1)) e / sigma, with P taking off
    the mean: a projection, so its Euclidean norm never grows. The next residual is off by that projection and by
    (grid - x) x^T e / (D - 1), whose norm is |grid - x| |e| / sqrt(D - 1). Norms are carried, [..., 1] each.
    """
    latent_dim = quantizer.latent_dim
    size = error.norm(dim=-1, keepdim=True)
    for step in quantizer.layers(latents):
        assert step.stats is not None
        mean, scale = step.stats[..., :1], step.stats[..., 1:]
        deviation = (step.residual - mean).abs()
        # Roundings of the mean, the deviation and sigma themselves.
        mean_error = gamma(latent_dim + 1) * step.residual.abs().mean(-1, keepdim=True)
        deviation_error = mean_error + UNIT * deviation
        scale_error = (
            deviation_error.norm(dim=-1, keepdim=True) / (latent_dim - 1) ** 0.5 + gamma(latent_dim + 4) * scale
        )
        # sigma itself moves by up to |e| / sqrt(D - 1): divide by its smallest value, which is second order.
        least = scale - size / (latent_dim - 1) ** 0.5 - scale_error
        conditioned_error = (size + deviation_error + step.conditioned.abs() * scale_error) / least
        conditioned_error = torch.where(least > 0, conditioned_error, torch.inf)
        yield step.tokens, quantizer.decision_margins(step.conditioned), _bin_error(quantizer, step, conditioned_error)
        level = quantizer.grid[step.tokens]
        missed = (level - step.conditioned).norm(dim=-1, keepdim=True) / (latent_dim - 1) ** 0.5
        taken = level.abs() * scale
        rounding = (
            deviation_error
            + level.abs() * scale_error
            + UNIT * (4 * taken + mean.abs() + (step.residual - step.dequantised).abs())
        )
        size = (1 + missed) * size + rounding.norm(dim=-1, keepdim=True)


def _bin_error(quantizer: ResidualQuantizer, step: LayerStep, conditioned_error: Tensor) -> Tensor:
    """From an error of x to one in bin widths: a rounded quotient, a rounded product, a rounded sum."""
    half_range = (quantizer.num_levels - 1) / 2
    magnitude = (step.conditioned.abs() + 1) * half_range
    return conditioned_error * half_range + 5 * UNIT * magnitude
