"""Inputs that show a wrong constant: just outside float32's tolerance of a bin's edge, where the constant moves most.

A constant that is off by a relative error e moves a value in front of the quantiser by e times the value's sensitivity
to it. A token shows that where the value lies nearer to an edge than it is moved, and farther than float32 may move it
by rounding. So for every layer and latent steps are sought close to an edge, on either side, and of these the ones are
kept that are most sensitive to some constant. Decoders answer without steps: there the most sensitive tokens are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.export.plan import DeployMode, middle_level, plan_encoder
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, linear_layers
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array
from rfsq.runtime.bundle.gates import GATES

#: The relative error of one constant that has to show wherever it can.
ERROR = 1e-4
#: Steps that edges are sought between: of the range, and of ones so many times as wide, where activations are extreme.
_WIDTHS = (1.0, 1.0, 2.0, 4.0)
#: The fewest and the most steps that edges are sought between.
_POOL = (512, 4096)
#: The most edges of one layer and latent, the fewest and the most of all, and the most numbers that are held for them.
_EDGES_EACH, _EDGES, _MOST_NUMBERS = 16, (256, 1024), 20_000_000
#: A build seeks one edge for so many steps that it judges, and seeks it between 4 steps.
_STEPS_PER_EDGE = 100
#: How far from its edge a value is put, in tolerances: rounding never explains that it is on the other side.
_DISTANCE = 1.02
_FARTHEST = 2.0
#: Halving an interval of float32 numbers this often leaves neighbours.
_BISECTIONS = 40
#: A step is chosen for a constant that it shows so many times over, or as often as any step does where that is less.
_ROOM = 3.0


@dataclass(frozen=True)
class Span:
    """What steps are drawn from, in physical units. low, high: the range, [A]; limit: the largest |action|."""

    low: Float64Array
    high: Float64Array
    limit: float


@dataclass(frozen=True)
class _Edges:
    """Steps float32 [N, A] close to an edge between two bins; int64 [N] each, of what latent and layer the edge is."""

    steps: Tensor
    latent: Tensor
    layer: Tensor

    def of_own(self, values: Tensor) -> Tensor:
        """[N] of values [N, D, L]: each step's value of its own latent and layer."""
        return values[torch.arange(len(self.steps)), self.latent, self.layer]


def bisected(inside: Tensor, outside: Tensor, is_inside: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Float32 neighbours [N, A] on the straight ways between pairs of steps, on either side of where `is_inside` ends.

    is_inside: of steps [N, A], bool [N]; true of `inside`, not of `outside`.
    """
    for _ in range(_BISECTIONS):
        middle = ((inside.double() + outside.double()) / 2).float()
        stays = is_inside(middle)[:, None]
        inside, outside = torch.where(stays, middle, inside), torch.where(stays, outside, middle)
    return inside, outside


def bins_of(model: ActionAutoencoder, latents: Tensor, follow: Tensor | None = None) -> Tensor:
    """What is decided on, float64 [N, D, L] in bin widths: edges lie at 0 ... K - 2.

    latents: [N, D]; follow: tokens [N, D, L] that are taken off in place of the quantiser's own.
    """
    conditioned = [layer.conditioned for layer in model.quantizer.layers(latents, follow)]
    return (torch.stack(conditioned, -1) + 1) * ((model.config.num_levels - 1) / 2) - 0.5


def to_edge(model: ActionAutoencoder, bins: Tensor) -> Tensor:
    """How far, and in which direction, the nearest edge is from each of `bins`; the same shape."""
    return bins.round().clamp(0, model.config.num_levels - 2) - bins


def sensitive_steps(
    model: ActionAutoencoder, prefixes: Sequence[int], span: Span, num_steps: int, random: np.random.Generator
) -> Float32Array:
    """Steps [N, A], each of which shows a constant that no other does.

    prefixes: of the decoders; num_steps: that the build judges.
    """
    edges = num_steps // _STEPS_PER_EDGE
    pool = _pool(span, int(np.clip(4 * edges, *_POOL)), random)
    found = _steps_at_edges(model, pool, int(np.clip(edges, *_EDGES)), random)
    chosen = torch.unique(found.steps[_cover(_encoder_effects(model, found))], dim=0)
    # With statistics of their own, tokens alone decode to nothing.
    is_decoded = model.conditioning is not Conditioning.DYNAMIC or model.recovered
    decoded = [pool[_cover(_decoder_effects(model, pool, prefix))] for prefix in prefixes] if is_decoded else []
    return torch.cat([chosen, *decoded]).numpy()


def _pool(span: Span, size: int, random: np.random.Generator) -> Tensor:
    middle, half = (span.low + span.high) / 2, (span.high - span.low) / 2
    shape = size // len(_WIDTHS), len(middle)
    parts = np.concatenate([middle + width * half * random.uniform(-1, 1, shape) for width in _WIDTHS])
    return torch.from_numpy(np.clip(parts, -span.limit, span.limit).astype(np.float32))


# --- steps at edges ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _steps_at_edges(model: ActionAutoencoder, pool: Tensor, num_edges: int, random: np.random.Generator) -> _Edges:
    """On both sides of an edge, `_DISTANCE` tolerances away from it, where float32 has steps so close."""
    first, second = _pairs(model, pool, num_edges, random)
    rows = torch.arange(len(first.steps))
    considered = torch.arange(model.config.num_layers) <= first.layer[:, None]

    def own_tokens(steps: Tensor) -> Tensor:
        return model.encode(steps.double())[0][rows, first.latent] * considered

    of_first = own_tokens(first.steps)
    near, far = bisected(first.steps, second.steps, lambda steps: (own_tokens(steps) == of_first).all(1))
    steps = torch.cat((_moved_out(model, near, first), _moved_out(model, far, second)))
    latent = first.latent.repeat(2)
    _, margins, bounds = token_error_bounds(model, steps.double())
    # A near-tie in an earlier layer would excuse what happens behind it; of any latent, where they move each other.
    is_tie = margins <= bounds
    if model.conditioning is Conditioning.DYNAMIC:
        is_tie = is_tie.any(1, keepdim=True).expand_as(is_tie)
    rows = torch.arange(len(steps))
    ties_so_far = is_tie[rows, latent].cumsum(1)
    is_behind = ties_so_far > is_tie[rows, latent]
    margin, bound = margins[rows, latent], bounds[rows, latent]
    # Edges of other layers may lie in the same place.
    found, layer = torch.nonzero(~is_behind & (margin > bound) & (margin <= _FARTHEST * bound), as_tuple=True)
    return _Edges(steps[found], latent[found], layer)


def _pairs(
    model: ActionAutoencoder, pool: Tensor, num_edges: int, random: np.random.Generator
) -> tuple[_Edges, _Edges]:
    """Steps of the pool that one latent's tokens of the first layers agree on, and those of the next layer do not."""
    tokens = model.encode(pool.double())[0].numpy()
    latents, layers = tokens.shape[1:]
    constants = sum(part.numel() for part in model.encoder.parameters()) + 2 * latents * layers
    most = min(_EDGES_EACH, max(min(num_edges, _MOST_NUMBERS // constants) // (latents * layers), 2))
    pairs: list[npt.NDArray[np.int64]] = []
    for latent in range(latents):
        # The tokens so far, as one number.
        before = np.zeros(len(pool), np.int64)
        for layer in range(layers):
            own = tokens[:, latent, layer]
            order = np.lexsort((random.random(len(pool)), own, before))
            places = np.flatnonzero((before[order[1:]] == before[order[:-1]]) & (own[order[1:]] != own[order[:-1]]))
            places = random.permutation(places)[:most]
            which = np.full((2, len(places)), [[latent], [layer]], np.int64)
            pairs.append(np.stack((order[places], order[places + 1], *which)))
            before = np.unique(before * model.config.num_levels + own, return_inverse=True)[1]
    first, second, of_latent, of_layer = torch.from_numpy(np.concatenate(pairs, axis=1))
    return _Edges(pool[first], of_latent, of_layer), _Edges(pool[second], of_latent, of_layer)


def _moved_out(model: ActionAutoencoder, inner: Tensor, outer: _Edges) -> Tensor:
    """From the edge towards `outer`, just so far that the margin is beyond the tolerance."""
    wanted = _DISTANCE * outer.of_own(token_error_bounds(model, inner.double())[2])

    def is_close(steps: Tensor) -> Tensor:
        bins = bins_of(model, model.encode_latents(steps.double()))
        return ~(outer.of_own(to_edge(model, bins)).abs() > wanted)

    return bisected(inner, outer.steps, is_close)[1]


# --- what a constant moves --------------------------------------------------------------------------------------------


def _encoder_effects(model: ActionAutoencoder, found: _Edges) -> Tensor:
    """[constants, N]: how often over the margin a step's value is moved across its edge by `ERROR` of one constant.

    Twice as many rows as constants: one too large, and one too small.
    """
    first, second = linear_layers(model.encoder)
    quantizer = plan_encoder(model, DeployMode(model.conditioning.value), 1).quantizer
    parts = [first.weight, first.bias, second.weight, second.bias]
    if quantizer is not None:
        parts += [torch.from_numpy(part).double() for part in (quantizer.ratio, quantizer.shift)]
    # One of each for every step, so that one gradient has them all.
    constants = [part.detach().expand(len(found.steps), *part.shape).requires_grad_() for part in parts]
    weight, bias, second_weight, second_bias = constants[:4]
    inputs = (found.steps.double() - model.offset) / model.units
    hidden = model.encoder[1](torch.einsum("nha,na->nh", weight, inputs) + bias)
    latents = torch.tanh(torch.einsum("ndh,nh->nd", second_weight, hidden) + second_bias)
    tokens = model.quantizer.quantize(latents.detach()).tokens
    bins = bins_of(model, latents, tokens)
    distance = found.of_own(to_edge(model, bins.detach()))
    if quantizer is not None:
        ratio, shift = constants[4:]
        bins = _affine_bins(latents, ratio, shift, tokens - middle_level(model.config.num_levels))
    gradients = torch.autograd.grad(found.of_own(bins).sum(), constants)
    effects = [(gradient * part.detach()).flatten(1).T for gradient, part in zip(gradients, constants, strict=True)]
    towards = ERROR * torch.cat(effects) / distance
    return torch.cat((towards, -towards)).float()


def _affine_bins(latents: Tensor, ratio: Tensor, shift: Tensor, counts: Tensor) -> Tensor:
    """The values [N, D, L] that an `AffineQuantizer` decides on. ratio, shift [N, L, D]; counts [N, D, L]."""
    bins, rest = [], latents
    for layer in range(ratio.shape[1]):
        bins.append(rest * ratio[:, layer] + shift[:, layer])
        rest = bins[-1] - counts[..., layer]
    return torch.stack(bins, -1)


@torch.no_grad()
def _decoder_effects(model: ActionAutoencoder, pool: Tensor, prefix: int) -> Tensor:
    """[constants, N]: how often over the gate the action of a step's tokens is moved by `ERROR` of one constant."""
    first, second = linear_layers(model.decoder)
    matrix, offset = model.token_map(prefix)
    folded, folded_bias = first.weight @ matrix, first.weight @ offset + first.bias
    # In one step and in two: engines have either.
    constants = sum(part.numel() for part in (folded, folded_bias, matrix, *model.decoder.parameters()))
    pool = pool[: max(_MOST_NUMBERS // constants, 64)]
    tokens = model.encode(pool.double())[0][..., :prefix].flatten(1).double()
    latents = tokens @ matrix.T + offset
    before = (latents @ first.weight.T + first.bias).requires_grad_(True)
    with torch.enable_grad():
        hidden = model.decoder[1](before)
        (slope,) = torch.autograd.grad(hidden.sum(), before)
    # The dimension of the action that a hidden unit, or a latent, moves most.
    by_hidden = slope.abs() * second.weight.abs().amax(0)
    by_latent = torch.einsum("ah,nh,hd->nad", second.weight, slope, first.weight).abs().amax(1)
    by_action = torch.ones(len(pool), len(second.bias), dtype=torch.float64)
    effects = [
        *_layer_effects(folded, folded_bias, tokens, by_hidden),
        *_layer_effects(matrix, offset, tokens, by_latent),
        *_layer_effects(first.weight, first.bias, latents, by_hidden),
        *_layer_effects(second.weight, second.bias, hidden.detach(), by_action),
    ]
    return (ERROR / GATES.action_error * torch.cat(effects)).float()


def _layer_effects(weight: Tensor, bias: Tensor, inputs: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """[weights, N] and [biases, N]: by how much their own size each moves an action.

    inputs: of the layer, [N, I]; worth: by how much one of its outputs moves it, [N, O].
    """
    by_weight = torch.einsum("no,ni,oi->oin", worth, inputs.abs(), weight.abs())
    return by_weight.flatten(0, 1), (worth * bias.abs()).T


def _cover(effects: Tensor) -> npt.NDArray[np.int64]:
    """Few steps that show every constant that any step shows, with `_ROOM` to spare where one has it."""
    best = effects.numpy().max(1, initial=0)
    shown = best > 1
    suits = effects.numpy()[shown] >= np.minimum(best[shown], _ROOM)[:, None]
    counts = suits.sum(0)
    is_open = np.ones(len(suits), np.bool_)
    chosen = []
    while is_open.any():
        chosen.append(int(counts.argmax()))
        new = is_open & suits[:, chosen[-1]]
        counts = counts - suits[new].sum(0)
        is_open &= ~new
    return np.array(sorted(chosen), np.int64)
