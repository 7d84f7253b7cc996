"""How far float32 arithmetic can move a quantiser's decision: a probabilistic error bound, computed per token.

Used to tell a near-tie, which every correct float32 implementation may decide either way, from a wrong token.

Model: fl(a op b) = (a op b)(1 + e), where the errors e of different roundings have mean zero given the earlier ones
and |e| <= u. Then a sum of s_i e_i stays below DEVIATIONS * u * sqrt(sum s_i^2), but for a probability of
2 exp(-DEVIATIONS^2 / 2) (Azuma and Hoeffding; Higham and Mary 2019, "A new approach to probabilistic rounding error
analysis"; Connolly, Higham and Mary 2021, "Stochastic rounding and its probabilistic backward error analysis").
So variances, in units of u^2, are carried through the model to first order, with the exact derivative of every layer
at the step at hand. A bound that holds for certain, without this model, would excuse two of three tokens of the last
`dynamic` layer.

Covered are the model as PyTorch runs it in float32 and the deployment graph: the offset taken off first, units and
constants folded and rounded once, Mish as x n / (n + 2), layers counted in bins. Sums may be taken in any order that
does not depend on their terms. Not covered, and meant to be noticed: TF32, half precision, perturbed weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, linear_layers
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON, Conditioning, ResidualQuantizer

#: Unit roundoff of float32.
UNIT = 2.0**-24
#: Standard deviations that a bound allows for: one token in 4e13 may exceed it.
DEVIATIONS = 8.0
#: Error in units of u of elementary functions (exp, log, tanh): common libraries are good to 2 units in the last place.
FUNCTION = 4.0
#: Largest slope and curvature of Mish, near x = 1.19 and x = -0.09 (computed from its derivatives).
MISH_SLOPE = 1.0885
MISH_CURVATURE = 0.6443
#: Relative error of Mish in units of u: exp, log and tanh one after the other and a product. None of them amplifies
#: the relative error of the one before. exp, two sums, two products and a quotient of the graph's form give less.
MISH_ERROR = 3 * FUNCTION + 1
#: Error in units of u of a grid value in [-1, 1] that is computed as level * step - 1 with a rounded step.
GRID_ERROR = 5.0
#: Sums and products that reach this may overflow float32, where no bound can be given.
_LARGEST = 2.0**126
#: Absolute error of a result that underflows, in units of u and with room for a few thousand of them.
UNDERFLOW = 2.0**-126 * 4096 / UNIT
#: Steps whose covariances are held at a time.
_BLOCK = 2048

_Layer = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Noise:
    """Variances, in units of u^2, of what float32 makes of N steps' latents; all float64.

    latents [N, D]; hidden [N, H]: of the hidden units, which all latents share; own [N, D]: of each latent alone;
    slope [N, D] and weight [D, H]: their product is the derivative of a latent by a hidden unit; overflow [N, 1]:
    whether float32 may overflow.
    """

    latents: Tensor
    hidden: Tensor
    own: Tensor
    slope: Tensor
    weight: Tensor
    overflow: Tensor

    def variance(self) -> Tensor:
        """[N, D]."""
        return self.slope**2 * (self.hidden @ (self.weight**2).T) + self.own

    def covariance(self) -> Tensor:
        """[N, D, D]."""
        products = (self.weight[:, None] * self.weight).flatten(0, 1)
        shared = (self.hidden @ products.T).reshape(*self.own.shape, self.own.shape[-1])
        return self.slope[..., None] * shared * self.slope[..., None, :] + torch.diag_embed(self.own)


def summation_variance(terms: int, total: Tensor, squares: Tensor) -> Tensor:
    """Variance, in units of u^2, of the error of summing `terms` numbers one by one; same shape as `total`.

    total: their sum; squares: the sum of their squares. Every partial sum S_k rounds once, and the mean of
    sum_k S_k^2 over all orders is (n + 1) (total^2 / 3 + squares / 6). Blocked and pairwise summation round less.
    """
    return (terms + 1) * (total**2 / 3 + squares / 6)


def latent_error_bound(model: ActionAutoencoder, actions: Tensor) -> tuple[Tensor, Tensor]:
    """float64 latents [..., D] of a float64 model and the bound on their float32 error, same shape.

    The bound is infinite where float32 may overflow. Raises ValueError for another dtype.
    """
    _require_float64(model, actions)
    latents, bounds = [], []
    with torch.no_grad():
        for block in _blocks(actions, 1):
            noise = _latent_noise(model, block)
            latents.append(noise.latents)
            bounds.append(torch.where(noise.overflow, torch.inf, DEVIATIONS * UNIT * noise.variance().sqrt()))
    shape = (*actions.shape[:-1], model.config.latent_dim)
    return torch.cat(latents).reshape(shape), torch.cat(bounds).reshape(shape)


def token_error_bounds(
    model: ActionAutoencoder, actions: Tensor, follow: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference tokens, decision margins and float32 error bounds, each [..., D, L], for actions [..., A].

    model and actions are float64 (ValueError otherwise). Margins and bounds are in bin widths of their layer: a
    float32 token may differ from the reference only where margin <= bound, or behind such a difference. follow: tokens
    int64 [..., D, L] of a float32 implementation that take the place of the reference's own before each decision; then
    no difference is behind another. A bound is infinite where float32 may overflow or where the error is too large for
    a first-order analysis.
    """
    _require_float64(model, actions)
    layers = _dynamic_layers if model.conditioning is Conditioning.DYNAMIC else _affine_layers
    parts_of_actions = _blocks(actions, 1)
    parts_of_follow = [None] * len(parts_of_actions) if follow is None else _blocks(follow, 2)
    blocks = []
    with torch.no_grad():
        for block, followed in zip(parts_of_actions, parts_of_follow, strict=True):
            noise = _latent_noise(model, block)
            parts = zip(*layers(model, noise, followed), strict=True)
            tokens, margins, bounds = (torch.stack(part, -1) for part in parts)
            blocks.append((tokens, margins, torch.where(noise.overflow[..., None], torch.inf, bounds)))
    shape = (*actions.shape[:-1], model.config.latent_dim, model.config.num_layers)
    tokens, margins, bounds = (torch.cat(parts).reshape(shape) for parts in zip(*blocks, strict=True))
    return tokens, margins, bounds


def _require_float64(model: ActionAutoencoder, actions: Tensor) -> None:
    if actions.dtype is not torch.float64 or model.offset.dtype is not torch.float64:
        raise ValueError(
            f"error bounds need float64 reference and actions; got {model.offset.dtype} and {actions.dtype}"
        )


def _blocks(values: Tensor, dims: int) -> tuple[Tensor, ...]:
    """Values of all steps, of some steps at a time; the last `dims` dimensions are those of one step."""
    return torch.split(values.reshape(-1, *values.shape[-dims:]), _BLOCK)


def _latent_noise(model: ActionAutoencoder, actions: Tensor) -> _Noise:
    first, second = linear_layers(model.encoder)
    weight = first.weight / model.units
    # The offset is taken off before anything is summed, so that what rounds is what is left of the action.
    from_offset = actions - model.offset
    inner = from_offset @ weight.T + first.bias
    squares = from_offset**2 @ (weight**2).T + first.bias**2
    # Besides the sum, every term sees a product, the offset, the unit, and a weight that was rounded when folded.
    inner_variance = summation_variance(first.in_features + 1, inner, squares) + 4 * squares + UNDERFLOW**2
    hidden = model.encoder[1](inner)
    inner_error = DEVIATIONS * UNIT * inner_variance.sqrt()
    gate = torch.tanh(softplus(inner))
    slope = (gate + inner * torch.sigmoid(inner) * (1 - gate**2)).abs() + MISH_CURVATURE * inner_error
    # A library's error may lean to one side. Such a bias, shared by n units, is covered by the independent errors of
    # DEVIATIONS^2 >= n units (Cauchy and Schwarz); for more than that, the variance grows with them.
    shared = max(1.0, first.out_features / DEVIATIONS**2)
    hidden_variance = slope.clamp(max=MISH_SLOPE) ** 2 * inner_variance + shared * (MISH_ERROR * hidden) ** 2
    outer = hidden @ second.weight.T + second.bias
    squares = hidden**2 @ (second.weight**2).T + second.bias**2
    outer_variance = (
        summation_variance(second.in_features + 1, outer, squares) + 2 * squares + hidden.shape[-1] * UNDERFLOW**2
    )
    outer_error = (hidden_variance @ (second.weight**2).T + outer_variance).sqrt() * DEVIATIONS * UNIT
    latents = torch.tanh(outer)
    # The largest slope of tanh in the interval of error, not the one at its centre.
    slope = 1 - torch.tanh((outer.abs() - outer_error).clamp(min=0)) ** 2
    shared = max(1.0, second.out_features / DEVIATIONS**2)
    largest = torch.maximum(
        (from_offset.abs() @ weight.abs().T + first.bias.abs()).amax(-1, keepdim=True),
        (hidden.abs() @ second.weight.abs().T + second.bias.abs()).amax(-1, keepdim=True),
    )
    return _Noise(
        latents=latents,
        hidden=hidden_variance,
        own=slope**2 * outer_variance + shared * (FUNCTION * latents) ** 2 + UNDERFLOW**2,
        slope=slope,
        weight=second.weight,
        overflow=~(largest < _LARGEST),
    )


def _affine_layers(model: ActionAutoencoder, noise: _Noise, follow: Tensor | None) -> Iterator[_Layer]:
    """Tokens, margins and bounds of layers with constant mean and scale: the latents stay apart."""
    quantizer = model.quantizer
    variance = noise.variance()
    steps = quantizer.layers(noise.latents, follow)
    for step, mean, scale in zip(steps, quantizer.mean, quantizer.scale, strict=True):
        # The graph counts from a level; between two levels, for an even number of them, the mean is half a bin off.
        half_bin = scale / (quantizer.num_levels - 1)
        taken_off = (mean.abs() + half_bin) ** 2 + ((step.residual - mean).abs() + half_bin) ** 2
        bound = _bin_bound(quantizer, step.conditioned, (variance + taken_off) / scale**2)
        yield step.tokens, quantizer.decision_margins(step.conditioned), bound
        level = step.grid_values.abs() * scale + half_bin
        variance = (
            variance
            + taken_off
            # Grid value, constant and product.
            + 3 * level**2
            + step.dequantised**2
            + (step.residual - step.dequantised) ** 2
        )


def _dynamic_layers(model: ActionAutoencoder, noise: _Noise, follow: Tensor | None) -> Iterator[_Layer]:
    """The same for layers normalised by their own step, whose latents share their errors: covariances [N, D, D].

    With P the projection that takes off the mean and v = (r - mu) / (raw (D - 1)), where sigma = raw + epsilon, an
    error e of the residual moves sigma by v.e, x by (P - x v^T) e / sigma and the next residual by (P - grid v^T) e.
    Rounding mu moves all latents alike, which the next layer's P takes off again.
    """
    quantizer = model.quantizer
    latent_dim = quantizer.latent_dim
    covariance = noise.covariance()
    for step in quantizer.layers(noise.latents, follow):
        assert step.stats is not None
        mean, scale = step.stats[..., :1], step.stats[..., 1:]
        deviation = step.residual - mean
        # A residual without any spread has no direction; float64's smallest number keeps the quotient finite.
        raw = (scale - SIGMA_EPSILON).clamp(min=torch.finfo(scale.dtype).tiny ** 0.25)
        direction = deviation / (raw * (latent_dim - 1))
        centred = covariance - covariance.mean(-1, keepdim=True)
        centred = centred - centred.mean(-2, keepdim=True)
        shared = (centred @ direction[..., None]).squeeze(-1)
        sigma_variance = (shared * direction).sum(-1, keepdim=True).clamp(min=0)
        mean_variance = _sum_of(step.residual) / latent_dim**2 + mean**2
        sigma_rounding = _sigma_rounding(deviation, raw) + scale**2 + _bend(centred, raw) ** 2

        own = centred.diagonal(dim1=-2, dim2=-1)
        own = own - 2 * step.conditioned * shared + step.conditioned**2 * (sigma_variance + sigma_rounding)
        bound = _bin_bound(quantizer, step.conditioned, (own.clamp(min=0) + mean_variance + deviation**2) / scale**2)
        # sigma may be smaller by its own error, a second-order effect; half of sigma is beyond any such analysis.
        share = DEVIATIONS * UNIT * (sigma_variance + sigma_rounding).sqrt() / scale
        bound = torch.where(share < 0.5, bound / (1 - share), torch.inf)
        yield step.tokens, quantizer.decision_margins(step.conditioned), bound

        level = step.grid_values
        mixed = level[..., :, None] * shared[..., None, :]
        common = (sigma_variance + sigma_rounding)[..., None] * level[..., :, None] * level[..., None, :]
        rounding = (
            deviation**2
            + (GRID_ERROR**2 + level**2) * scale**2
            + step.dequantised**2
            + (step.residual - step.dequantised) ** 2
        )
        covariance = centred - mixed - mixed.mT + common + torch.diag_embed(rounding)


def _sum_of(values: Tensor) -> Tensor:
    """Variance of summing over the latents, [N, D] to [N, 1]."""
    return summation_variance(values.shape[-1], values.sum(-1, keepdim=True), (values**2).sum(-1, keepdim=True))


def _sigma_rounding(deviation: Tensor, raw: Tensor) -> Tensor:
    """Variance [N, 1] of the roundings inside the standard deviation, `raw` without epsilon."""
    squares = deviation**2
    total = squares.sum(-1, keepdim=True).clamp(min=torch.finfo(raw.dtype).tiny)
    # Every square sees the deviation's rounding twice and its own once; then a quotient and a root.
    relative = (_sum_of(squares) + 5 * (squares**2).sum(-1, keepdim=True)) / total**2
    return raw**2 * (relative / 4 + 2)


def _bend(covariance: Tensor, raw: Tensor) -> Tensor:
    """Standard deviation [N, 1], in units of u, that the first-order change of sigma leaves out.

    |d + e| - |d| differs from its first order by at most |e|^2 / (2 |d|), and is never more than |e|.
    """
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    spread = variances.sum(-1, keepdim=True).clamp(min=0) / (variances.shape[-1] - 1)
    return torch.minimum(DEVIATIONS * UNIT * spread / (2 * raw), spread.sqrt())


def _bin_bound(quantizer: ResidualQuantizer, conditioned: Tensor, variance: Tensor) -> Tensor:
    """From a variance of x to a bound in bin widths: two rounded quotients or products, sums and constants."""
    half_range = (quantizer.num_levels - 1) / 2
    rounding = 2 * (half_range * conditioned) ** 2 + 3 * (half_range * (conditioned.abs() + 1)) ** 2
    return DEVIATIONS * UNIT * (half_range**2 * variance + rounding).sqrt()
