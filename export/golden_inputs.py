"""Inputs that show a wrong constant: just outside float32's tolerance of a bin's edge, where the constant moves most.

A constant that is off by a relative error e moves a value in front of the quantiser by e times the value's sensitivity
to it. A token shows that where the value lies nearer to an edge than it is moved, and farther than float32 may move it
by rounding. So for every layer and latent steps are sought close to an edge, on either side, and of these the ones are
kept that are most sensitive to some constant. Decoders answer without steps: there the most sensitive tokens are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rfsq.export.plan import AffineQuantizer, DeployMode, middle_level, plan_encoder, token_map
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array
from rfsq.runtime.bundle.gates import GATES

#: The relative error of one constant that has to show wherever it can.
ERROR = 1e-4
#: Steps that edges are sought between: of the range, and of ones so many times as wide, where activations are extreme.
_WIDTHS = (1.0, 1.0, 2.0, 4.0)
#: So many steps at most, and at least where a build is asked for few steps.
_POOL = (512, 4096)
#: Edges that are sought for each layer and latent, and for all of them together; and numbers that are held for them.
_EDGES_EACH, _EDGES, _MOST_NUMBERS = 16, (256, 1024), 20_000_000
#: Of so many steps that a build judges, one more edge is sought, and 4 more steps to seek it between.
_STEPS_PER_EDGE = 100
#: How far from its edge a value is put, in tolerances: rounding never explains that it is on the other side.
_DISTANCE = 1.02
_FARTHEST = 2.0
_BISECTIONS = 32
#: A constant is seen to by a step that shows it with so much to spare, where there is one.
_ROOM = 3.0


@dataclass(frozen=True)
class _Edges:
    """Steps [N, A] close to an edge between two bins; of each the latent and the layer that the edge is of."""

    steps: Float32Array
    latent: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]


def sensitive_steps(
    model: ActionAutoencoder,
    prefixes: Sequence[int],
    low: Float64Array,
    high: Float64Array,
    *,
    limit: float,
    num_steps: int,
    random: np.random.Generator,
) -> Float32Array:
    """Steps [N, A], none of which is there in vain.

    prefixes: of the decoders; low, high [A]: the range; limit: the largest |action|; num_steps: that the build judges.
    """
    edges = num_steps // _STEPS_PER_EDGE
    pool = _pool(low, high, limit, int(np.clip(4 * edges, *_POOL)), random)
    found = _steps_at_edges(model, pool, int(np.clip(edges, *_EDGES)), random)
    chosen = np.unique(found.steps[_cover(_encoder_effects(model, found))], axis=0)
    # With statistics of their own, tokens alone decode to nothing.
    is_decoded = model.conditioning is not Conditioning.DYNAMIC or model.recovered
    decoded = [_cover(_decoder_effects(model, pool, prefix)) for prefix in prefixes] if is_decoded else []
    return np.concatenate([chosen, *(pool[steps] for steps in decoded)])


def _pool(low: Float64Array, high: Float64Array, limit: float, size: int, random: np.random.Generator) -> Float32Array:
    middle, half = (low + high) / 2, (high - low) / 2
    parts = [middle + width * half * random.uniform(-1, 1, (size // len(_WIDTHS), len(low))) for width in _WIDTHS]
    return np.clip(np.concatenate(parts), -limit, limit).astype(np.float32)


# --- steps at edges ---------------------------------------------------------------------------------------------------


def _steps_at_edges(
    model: ActionAutoencoder, pool: Float32Array, num_edges: int, random: np.random.Generator
) -> _Edges:
    """On both sides of an edge, `_DISTANCE` tolerances away from it, where float32 has steps so close."""
    first, second, latent, layer = _pairs(model, pool, num_edges, random)
    near, far = _bisected(model, first, second, latent, layer)
    sides = []
    for inner, outer in ((near, first), (far, second)):
        _, _, explained = token_error_bounds(model, torch.from_numpy(inner).double())
        tolerance = explained.numpy()[np.arange(len(inner)), latent, layer]
        sides.append(_moved_out(model, inner, outer, latent, layer, tolerance))
    steps, latent = np.concatenate(sides), np.tile(latent, 2)
    _, margins, bounds = (part.numpy() for part in token_error_bounds(model, torch.from_numpy(steps).double()))
    # A near-tie in an earlier layer would excuse what happens behind it; of any latent, where they move each other.
    is_tie = margins <= bounds
    if model.conditioning is Conditioning.DYNAMIC:
        is_tie = is_tie.any(1, keepdims=True) | np.zeros_like(is_tie)
    rows = np.arange(len(steps))
    is_behind = np.zeros((len(steps), is_tie.shape[-1]), np.bool_)
    is_behind[:, 1:] = np.logical_or.accumulate(is_tie[rows, latent], 1)[:, :-1]
    margin, bound = margins[rows, latent], bounds[rows, latent]
    # Edges of other layers may lie in the same place.
    found, layer = np.nonzero(~is_behind & (margin > bound) & (margin <= _FARTHEST * bound))
    return _Edges(steps[found], latent[found], layer)


def _pairs(
    model: ActionAutoencoder, pool: Float32Array, num_edges: int, random: np.random.Generator
) -> tuple[Float32Array, Float32Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Steps of the pool that one latent's tokens of the first layers agree on, and those of the next layer do not."""
    with torch.no_grad():
        tokens = model.encode(torch.from_numpy(pool).double())[0].numpy()
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
    first, second, of_latent, of_layer = np.concatenate(pairs, axis=1)
    return pool[first], pool[second], of_latent, of_layer


def _bisected(
    model: ActionAutoencoder,
    first: Float32Array,
    second: Float32Array,
    latent: npt.NDArray[np.int64],
    layer: npt.NDArray[np.int64],
) -> tuple[Float32Array, Float32Array]:
    """Neighbours on the way from `first` to `second`, on either side of where the latent's tokens change."""
    considered = torch.arange(model.config.num_layers) <= torch.from_numpy(layer)[:, None]
    rows = torch.arange(len(first))

    def tokens(steps: Tensor) -> Tensor:
        return model.encode(steps.double())[0][rows, torch.from_numpy(latent)] * considered

    near, far = torch.from_numpy(first), torch.from_numpy(second)
    with torch.no_grad():
        own = tokens(near)
        for _ in range(_BISECTIONS):
            middle = ((near.double() + far.double()) / 2).float()
            same = (tokens(middle) == own).all(1)[:, None]
            near, far = torch.where(same, middle, near), torch.where(same, far, middle)
    return near.numpy(), far.numpy()


def _moved_out(
    model: ActionAutoencoder,
    inner: Float32Array,
    outer: Float32Array,
    latent: npt.NDArray[np.int64],
    layer: npt.NDArray[np.int64],
    tolerance: Float64Array,
) -> Float32Array:
    """From the edge towards `outer`, just so far that the margin is beyond the tolerance."""
    wanted = torch.from_numpy(_DISTANCE * tolerance)
    rows, latents, layers = torch.arange(len(inner)), torch.from_numpy(latent), torch.from_numpy(layer)

    def is_outside(steps: Tensor) -> Tensor:
        conditioned = [part.conditioned for part in model.quantizer.layers(model.encode_latents(steps.double()))]
        margins = model.quantizer.decision_margins(torch.stack(conditioned, -1)[rows, latents, layers])
        return (margins > wanted)[:, None]

    near, far = torch.from_numpy(inner), torch.from_numpy(outer)
    with torch.no_grad():
        for _ in range(_BISECTIONS):
            middle = ((near.double() + far.double()) / 2).float()
            outside = is_outside(middle)
            near, far = torch.where(outside, near, middle), torch.where(outside, middle, far)
    return far.numpy()


# --- what a constant moves --------------------------------------------------------------------------------------------


def _encoder_effects(model: ActionAutoencoder, found: _Edges) -> Float32Array:
    """[constants, N]: how often over the margin a step's value is moved across its edge by `ERROR` of one constant.

    Twice as many rows as constants: one too large, and one too small.
    """
    with torch.no_grad():
        first, second = _linear_layers(model.encoder)
        inputs = (torch.from_numpy(found.steps).double() - model.offset) / model.units
        before = first(inputs)
        hidden = model.encoder[1](before)
        latents = torch.tanh(second(hidden))
        tokens = model.quantizer.quantize(latents).tokens
    before.requires_grad_(True)
    (slope,) = torch.autograd.grad(model.encoder[1](before).sum(), before)
    rows = torch.arange(len(latents))
    latents.requires_grad_(True)
    conditioned = torch.stack([part.conditioned for part in model.quantizer.layers(latents, tokens)], -1)
    values = (conditioned[rows, torch.from_numpy(found.latent), torch.from_numpy(found.layer)] + 1) * (
        (model.config.num_levels - 1) / 2
    )
    (by_latent,) = torch.autograd.grad(values.sum(), latents)
    with torch.no_grad():
        # By what goes into tanh, and into Mish.
        outer = by_latent * (1 - latents**2)
        inner = (outer @ second.weight) * slope
        effects = [
            torch.einsum("nh,na,ha->han", inner, inputs, first.weight).flatten(0, 1),
            (inner * first.bias).T,
            torch.einsum("nd,nh,dh->dhn", outer, hidden, second.weight).flatten(0, 1),
            (outer * second.bias).T,
        ]
        values = values.detach()
        edge = torch.clamp(torch.round(values - 0.5), 0, model.config.num_levels - 2) + 0.5
        plan = plan_encoder(model, DeployMode(model.conditioning.value), 1)
        if isinstance(plan.quantizer, AffineQuantizer):
            counts = tokens.numpy() - middle_level(model.config.num_levels)
            effects.append(torch.from_numpy(_bin_effects(plan.quantizer, latents.numpy(), counts, found)))
        towards = ERROR * torch.cat(effects) / (edge - values)
    return torch.cat((towards, -towards)).float().numpy()


def _bin_effects(
    quantizer: AffineQuantizer, latents: Float64Array, counts: npt.NDArray[np.int64], found: _Edges
) -> Float64Array:
    """[2 L D, N]: of every ratio, then of every shift, on the value that lies at an edge; counts [N, D, L]."""
    ratio, shift = quantizer.ratio.astype(np.float64), quantizer.shift.astype(np.float64)
    rows = np.arange(len(latents))
    effects = np.zeros((2, *ratio.shape, len(latents)))
    rest = latents
    for layer in range(len(ratio)):
        behind = np.where(found.layer >= layer, _product(ratio, layer, found), 0)
        effects[0, layer, found.latent, rows] = (rest * ratio[layer])[rows, found.latent] * behind
        effects[1, layer, found.latent, rows] = shift[layer][found.latent] * behind
        rest = rest * ratio[layer] + shift[layer] - counts[..., layer]
    return effects.reshape(2 * ratio.size, len(latents))


def _product(ratio: Float64Array, layer: int, found: _Edges) -> Float64Array:
    """[N]: of the ratios of the layers behind `layer`, up to the one that lies at an edge."""
    own = ratio[:, found.latent]
    inside = (np.arange(len(ratio))[:, None] > layer) & (np.arange(len(ratio))[:, None] <= found.layer)
    return np.asarray(np.where(inside, own, 1).prod(0))


@torch.no_grad()
def _decoder_effects(model: ActionAutoencoder, pool: Float32Array, prefix: int) -> Float32Array:
    """[constants, N]: how often over the gate the action of a step's tokens is moved by `ERROR` of one constant."""
    first, second = _linear_layers(model.decoder)
    matrix, offset = (torch.from_numpy(part) for part in token_map(model, prefix))
    # In one step and in two: engines have either.
    constants = (
        first.weight.shape[0] * (matrix.shape[1] + 1)
        + matrix.numel()
        + sum(part.numel() for part in model.decoder.parameters())
    )
    pool = pool[: max(_MOST_NUMBERS // constants, 64)]
    tokens = model.encode(torch.from_numpy(pool).double())[0][..., :prefix].flatten(1).double()
    latents = tokens @ matrix.T + offset
    before = (latents @ first.weight.T + first.bias).requires_grad_(True)
    with torch.enable_grad():
        hidden = model.decoder[1](before)
        (slope,) = torch.autograd.grad(hidden.sum(), before)
    # The dimension that a hidden unit, or a latent, moves most.
    by_hidden = slope.abs() * second.weight.abs().amax(0)
    by_latent = torch.einsum("ah,nh,hd->nad", second.weight, slope, first.weight).abs().amax(1)
    folded = first.weight @ matrix
    effects = [
        torch.einsum("nh,nk,hk->hkn", by_hidden, tokens, folded.abs()).flatten(0, 1),
        (by_hidden * (first.weight @ offset + first.bias).abs()).T,
        torch.einsum("nd,nk,dk->dkn", by_latent, tokens, matrix.abs())[matrix != 0],
        (by_latent * offset.abs()).T,
        torch.einsum("nh,nd,hd->hdn", by_hidden, latents.abs(), first.weight.abs()).flatten(0, 1),
        (by_hidden * first.bias.abs()).T,
        torch.einsum("nh,ah->ahn", hidden.detach().abs(), second.weight.abs()).flatten(0, 1),
        second.bias.abs()[:, None].expand(-1, len(pool)),
    ]
    return (ERROR / GATES.action_error * torch.cat(effects)).float().numpy()


def _linear_layers(part: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    first, second = part[0], part[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    return first, second


def _cover(effects: Float32Array) -> npt.NDArray[np.int64]:
    """Few steps that show every constant that any step shows, with `_ROOM` to spare where one has it."""
    best = effects.max(1, initial=0)
    shown = best > 1
    suits = effects[shown] >= np.minimum(best[shown], _ROOM)[:, None]
    counts = suits.sum(0)
    is_open = np.ones(len(suits), np.bool_)
    chosen = []
    while is_open.any():
        step = int(counts.argmax())
        new = is_open & suits[:, step]
        chosen.append(step)
        counts = counts - suits[new].sum(0)
        is_open &= ~new
    return np.array(sorted(chosen), np.int64)
