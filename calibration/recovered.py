"""The `recovered` decoder: published tokens of a `dynamic` checkpoint, decoded without their side information.

Per prefix of l layers an affine map z = M tokens + b (docs/architecture.md), fitted in steps:

1. the mean map: every layer's mean and sigma at their means over the calibration steps, 2 l numbers in all;
2. ridge regression of what the mean map leaves of the latents, on features: the grid level of a token times the mean
   sigma of its layer, which is what the token is worth on average. One penalty on these features trusts the fine
   layers, which mean little without their own sigma, less than the coarse ones, and shrinks towards the mean map;
3. Gauss-Newton with Levenberg-Marquardt damping (Nocedal and Wright, Numerical Optimization, 2nd ed., chapter 10) on
   the squared error of the *action*, penalised for leaving the map of the second step. No affine map can undo a sigma
   that changes from step to step, but the decoder's hidden layer partly can once the map aims at actions. The latents
   it gives may then lie outside [-1, 1].

A dense map has hundreds of numbers per latent, which few episodes do not determine. So the ridge is chosen, and the
second and third step are kept, by the action error on episodes that were left out; without that the mean map stays.

The map is rounded to a multiple of about 2^-16 of its largest entry: the linear algebra differs between processors by
1e-10 of it, and the map is part of a tokenizer's identity.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rfsq.calibration.affine_maps import Features, Regression, refinements, regress
from rfsq.calibration.data import episode_folds, is_certain_gain, reference_actions, reference_latents, rounded
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.settings import DEFAULT_RECOVERED, RecoveredConfig, Target, Weighting
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import Conditioning

#: What a draft model predicts.
COARSE_LAYERS = 3
#: What cross-validation chooses from.
_RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0)
#: Parts that episodes are left out in: five for the regression, two for Gauss-Newton, a fit of which takes seconds.
_FOLDS, _REFINED_FOLDS = 5, 2
#: Tried for Gauss-Newton beside the ridge of the regression: smaller ones gain little on the embedded calibration
#: episodes, and send the latents far outside [-1, 1].
_REFINED_RIDGE = 1e-6
#: `inverse-magnitude` takes no step for slower than this share of the mean squared action.
_SLOWEST = 0.01


def default_prefixes(num_layers: int) -> tuple[int, ...]:
    """The coarse layers and all of them."""
    return tuple(sorted({min(COARSE_LAYERS, num_layers), num_layers}))


@dataclass(frozen=True)
class RecoveredFit:
    """The map of one prefix.

    regression: the second step; decoder: after `refinements` accepted Gauss-Newton steps; ridge: None where the mean
    map stays."""

    regression: Regression
    decoder: RecoveredDecoder
    refinements: int
    ridge: float | None

    @property
    def unknowns(self) -> int:
        """Columns of the map, the most that the rank can be."""
        return self.decoder.matrix.shape[1]

    @property
    def remark(self) -> str:
        """A warning about this fit; empty where the tokens determine the whole map."""
        if self.ridge is None:
            return (
                f"WARNING: tokens of {self.unknowns // len(self.decoder.offset)} layers are decoded with the mean side "
                "information alone: no fitted map surely wins on calibration episodes left out of the fit; give more "
                "episodes"
            )
        if self.regression.rank == self.unknowns:
            return ""
        return (
            f"WARNING: the tokens of the calibration data determine {self.regression.rank} of {self.unknowns} columns "
            f"of the map from {self.unknowns // len(self.decoder.offset)} layers. Tokens that never changed there, or "
            "only together, are not told apart: actions unlike these data may decode wrongly; give more varied "
            "episodes, unless some latents never change at all"
        )


def fit_recovered_details(
    checkpoint: Checkpoint,
    episodes: ActionDataset,
    prefixes: Iterable[int],
    config: RecoveredConfig = DEFAULT_RECOVERED,
) -> dict[int, RecoveredFit]:
    """One fit per prefix, with rank and condition.

    Raises CalibrationError for a checkpoint that is not `dynamic`, prefixes outside 1 ... L, and tokens that never
    change; DataError for another action dimension, latents that are not finite, or no more steps than unknowns.
    """
    wanted = sorted(set(prefixes))
    _check_checkpoint(checkpoint, wanted)
    actions = reference_actions(checkpoint, episodes)
    unknowns = checkpoint.config.latent_dim * wanted[-1] + 1
    if len(actions) <= unknowns:
        raise DataError(
            f"{len(actions)} steps to fit {unknowns} unknowns per latent (latent dimension x {wanted[-1]} layers + 1); "
            "expected more steps than unknowns: give more calibration data or shorter --prefixes"
        )
    model = checkpoint.model(dtype=torch.float64).requires_grad_(False)
    latents = reference_latents(model, actions)
    quantized = model.quantizer.quantize(latents)
    assert quantized.stats is not None
    target = quantized.latents if config.target is Target.DEQUANTISED else latents
    shares, lengths = _step_shares(model, actions, config.weighting), tuple(map(len, episodes.episodes))
    return {
        prefix: _fit_prefix(
            _Steps(
                model, quantized.tokens[..., :prefix], quantized.stats[:, :prefix], actions, target, shares, lengths
            ),
            config,
        )
        for prefix in wanted
    }


def _check_checkpoint(checkpoint: Checkpoint, prefixes: list[int]) -> None:
    if checkpoint.trained_with is not Conditioning.DYNAMIC:
        raise CalibrationError(
            f"this checkpoint was trained with conditioning {checkpoint.trained_with.value!r}; only tokens of a "
            "'dynamic' (Robust RFSQ) one lack side information to recover: its tokens decode as they are, or use "
            "--method calibrated for better ones"
        )
    num_layers = checkpoint.config.num_layers
    if not prefixes or prefixes[0] < 1 or prefixes[-1] > num_layers:
        raise CalibrationError(
            f"prefixes {prefixes}; expected at least one, each of 1 to {num_layers} layers, which this checkpoint has"
        )


def _step_shares(model: ActionAutoencoder, actions: Tensor, weighting: Weighting) -> Tensor:
    """Weights [N] that add up to 1."""
    if weighting is Weighting.INVERSE_MAGNITUDE:
        energy = ((actions - model.offset) / model.units).square().sum(dim=-1)
        chosen = 1 / energy.clamp(min=max(_SLOWEST * float(energy.mean()), torch.finfo(torch.float64).tiny))
    else:
        chosen = torch.ones(len(actions), dtype=torch.float64)
    chosen = chosen / chosen.max()
    return chosen / chosen.sum()


@dataclass(frozen=True, eq=False)
class _Steps:
    """Steps of whole episodes, to which the map of a prefix is fitted.

    tokens [N, D, l], stats [N, l, 2], actions [N, A], target [N, D] and shares [N] have one row per step; lengths: of
    the episodes.
    """

    model: ActionAutoencoder
    tokens: Tensor
    stats: Tensor
    actions: Tensor
    target: Tensor
    shares: Tensor
    lengths: tuple[int, ...]

    def select(self, episodes: Sequence[int]) -> "_Steps":
        """Some of the episodes; the shares of their steps stay what they are of the whole."""
        starts = np.cumsum((0, *self.lengths))
        rows = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in episodes])
        by_step = {name: getattr(self, name)[rows] for name in ("tokens", "stats", "actions", "target", "shares")}
        return replace(self, lengths=tuple(self.lengths[index] for index in episodes), **by_step)

    def whole(self) -> "_Steps":
        """With shares that add up to 1."""
        return replace(self, shares=self.shares / self.shares.sum())

    def squares(self, decoder: RecoveredDecoder) -> Tensor:
        """Weighted squared action error, in normalised units, of each episode."""
        decoded = self.model.decode_latents(decoder.latents(self.tokens))
        error = ((decoded - self.actions) / self.model.units).square().sum(dim=-1) * self.shares
        return torch.stack([part.sum() for part in torch.split(error, list(self.lengths))])

    def features(self) -> Features:
        sigma = self.stats[..., 1].mean(dim=0)
        # Over that of the first layer.
        return Features.of(self.tokens, sigma / sigma[0], self.model.config.num_levels, self.shares)

    def mean_map(self) -> RecoveredDecoder:
        """Mean and sigma of every layer at their means, the same for all latents."""
        mean, sigma = (self.shares @ self.stats.flatten(1)).reshape(-1, 2).T
        latent_dim = self.model.config.latent_dim
        matrix = torch.zeros(latent_dim, latent_dim, len(sigma), dtype=torch.float64)
        matrix[range(latent_dim), range(latent_dim)] = sigma * 2 / (self.model.config.num_levels - 1)
        return RecoveredDecoder(matrix.flatten(1), (mean - sigma).sum().expand(latent_dim).contiguous())

    def regressions(self, ridges: Sequence[float]) -> list[Regression]:
        """The mean map, and what it leaves regressed, one for each ridge."""
        mean_map = self.mean_map()
        found = regress(self.features(), self.target - mean_map.latents(self.tokens), ridges)
        return [replace(rest, decoder=mean_map + rest.decoder) for rest in found]

    def refined(self, start: RecoveredDecoder, ridge: float, steps: int) -> list[RecoveredDecoder]:
        """`start`, and the map after each of at most so many Gauss-Newton steps."""
        wanted = (self.actions - self.model.offset) / self.model.units
        found = islice(refinements(self.model, self.features(), wanted, start, ridge), steps)
        return [start, *tqdm(found, "  recover", steps, unit="step", leave=False, disable=None)]


def _fit_prefix(data: _Steps, config: RecoveredConfig) -> RecoveredFit:
    if (data.tokens == data.tokens[:1]).all():
        raise CalibrationError(
            f"all {len(data.tokens)} steps of the calibration data have the same tokens in the first "
            f"{data.tokens.shape[-1]} layers, so every token would decode to one action; give episodes in which the "
            "robot moves"
        )
    ridge, steps = config.ridge, config.refine_steps
    if ridge is None:
        ridge, steps = _cross_validated(data, steps)
    if ridge is None:
        return RecoveredFit(data.regressions([0.0])[0], _rounded(data.mean_map()), 0, None)
    (regression,) = data.regressions([ridge])
    maps = data.refined(regression.decoder, ridge, steps)
    return RecoveredFit(regression, _rounded(maps[-1]), len(maps) - 1, ridge)


def _cross_validated(data: _Steps, refine_steps: int) -> tuple[float | None, int]:
    """The ridge, None where the mean map stays, and how often to refine."""
    if len(data.lengths) < 2:
        return None, 0

    def left_out(most: int, fit: Callable[[_Steps], list[RecoveredDecoder]]) -> Tensor:
        """Squared errors [maps, episodes], each by a map that was fitted without it."""
        by_episode: dict[int, Tensor] = {}
        for kept, judged in episode_folds(len(data.lengths), most):
            tested = data.select(judged)
            errors = torch.stack([tested.squares(one) for one in fit(data.select(kept).whole())], dim=1)
            by_episode.update(zip(judged, errors, strict=True))
        return torch.stack([by_episode[index] for index in range(len(data.lengths))], dim=1)

    def mean_and_regressed(kept: _Steps) -> list[RecoveredDecoder]:
        return [kept.mean_map(), *(found.decoder for found in kept.regressions(_RIDGES))]

    mean, *by_ridge = left_out(_FOLDS, mean_and_regressed)
    place = min(range(len(_RIDGES)), key=lambda place: float(by_ridge[place].sum()))
    ridge = _RIDGES[place]
    if not is_certain_gain(mean, by_ridge[place]):
        return None, 0
    if not refine_steps:
        return ridge, 0
    # Aimed at actions, a map can do with less of a penalty than one that is aimed at latents.
    tried = sorted({ridge, _REFINED_RIDGE}, reverse=True)

    def regressed_and_refined(kept: _Steps) -> list[RecoveredDecoder]:
        starts = [found.decoder for found in kept.regressions(tried)]
        refined = [kept.refined(start, each, refine_steps)[-1] for start, each in zip(starts, tried, strict=True)]
        return [starts[tried.index(ridge)], *refined]

    before, *after = left_out(_REFINED_FOLDS, regressed_and_refined)
    best = min(range(len(tried)), key=lambda place: float(after[place].sum()))
    return (tried[best], refine_steps) if is_certain_gain(before, after[best]) else (ridge, 0)


def _rounded(decoder: RecoveredDecoder) -> RecoveredDecoder:
    """As `rounded`, by the largest entry: every token has the same range, so its absolute error is what counts."""
    largest = decoder.matrix.abs().max()
    return RecoveredDecoder(rounded(decoder.matrix, largest), rounded(decoder.offset, largest))
