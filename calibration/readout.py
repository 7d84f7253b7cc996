"""The readout of `calibrated` tokens: the decoder's last linear layer, refitted to the latents it will really get.

In training the decoder sees latents behind the quantiser of the training forward pass, and learns to undo what that
quantiser does to them on average. The calibrated conditioning hardly changes the latents, so that this correction does
harm: the same decoder, its last layer refitted to latents that are not quantised, can have several times less action
error (docs/calibration.md). That costs no bits and no time: the layer keeps its place and size.

The fit is a least squares problem that is shrunk towards the trained layer, in what it gives: with activations
h = [mish(W1 z + b1), 1] [N, H + 1] of the calibration episodes, the trained layer's error e [N, A] in normalised units
and activations a [M, H + 1] of random actions from the whole range of the robot, the change of [W2, b2] minimises
|e - h change^T|^2 / N + ridge |a change^T|^2 / M. What the episodes do not show stays as it was trained. A plain ridge
on the weights loses on tasks that were not recorded.

Few episodes, or ones of a single kind, can still make it worse. So `auto` keeps a refit only where it wins on episodes
that were left out of it, and its weights are not too large for float32, as they are where the model was hardly trained:
see `_Candidate.objection`. The episodes that judge a checkpoint play no part in this.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rfsq.calibration.data import (
    episode_folds,
    gain_certainty,
    needed_certainty,
    reference_actions,
    reference_latents,
    rounded,
)
from rfsq.calibration.recovered import default_prefixes
from rfsq.calibration.settings import DEFAULT_READOUT, ReadoutChoice, ReadoutConfig
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, Readout, linear_layers
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.gates import GATES

#: What cross-validation chooses from, and what one episode alone gets where a refit is asked for.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
LONE_RIDGE = 0.1
#: Episodes are left out in tenths, so that a fit is nearly the one that is kept, and in halves, which asks more of it.
_FOLDS = (10, 2)
#: Random actions, and the penalty on the weights themselves, as a share of that on what they give for random actions:
#: for activations that none of these has.
_RANDOM_ACTIONS, _WEIGHT_PENALTY = 1000, 1e-3
_SEED, _RANDOM_TOKENS = 0, 2000
#: Share of their squared error that random actions must gain where the episodes are not of the training data. Episodes
#: unlike the training data gain on themselves and lose elsewhere, which leaving some of them out does not show; what
#: random actions gain shows that the layer as it was trained was not yet the best for what it was trained on.
_RANDOM_GAIN = 0.02
#: Share by which the error of tokens may grow: that of a single layer is a thousand times what a refit is about, and
#: moves by a hundredth whatever is fitted.
_TOKEN_LOSS = 0.01
#: What float32 may err by with random tokens. A build finds up to 1.4 times as much, and its gate has to hold.
_MOST_ERROR = GATES.action_error / 1.5
#: Of a view's two weightings.
_WEIGHTINGS = ("normalised units", "the robot's units")
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class ReadoutFit:
    """What became of the layer.

    readout: None where the layer stays as it was trained; ridge: of what was tried last, None where nothing was.

    cross_validated: squared action error on episodes left out of the fit, over that of the layer as it was trained,
    the larger one of tenths and halves; None with a single episode.
    """

    readout: Readout | None = None
    ridge: float | None = None
    cross_validated: float | None = None
    remark: str = ""

    def facts(self, config: ReadoutConfig) -> dict[str, Any]:
        """For provenance."""
        ratio = self.cross_validated
        is_number = ratio is not None and math.isfinite(ratio)
        return {
            "choice": config.choice.value,
            "kept": self.readout is not None,
            "ridge": self.ridge,
            # What lies behind differs between processors.
            "cross_validated_ratio": float(f"{ratio:.4g}") if is_number else None,
        }


@dataclass(frozen=True, eq=False)
class _View:
    """The last layer's work on one kind of latents. name: of that kind, for messages.

    activations [n, H + 1], errors [n, A] of the layer as it was trained, in normalised units: one of an episode.
    weights: [2, A], of a dimension's squared error: alike in normalised units, and alike in the robot's.
    """

    name: str
    activations: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    weights: Tensor

    def squares(self, episodes: Iterable[int], change: Tensor | None = None) -> Tensor:
        """Squared errors [2, episodes], by both weightings, once the layer is changed by [H + 1, A]."""
        errors = (
            self.errors[index] if change is None else self.errors[index] - self.activations[index] @ change
            for index in episodes
        )
        return torch.stack([self.weights @ error.square().sum(dim=0) for error in errors], dim=1)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The least squares problem of one checkpoint.

    exact: latents that are not quantised, which the layer is fitted to; decoded: latents of tokens; random: random
    actions, of the whole range and of its inner half, as two episodes; trained: the layer [A, H + 1]; any_tokens:
    activations [2, n, H + 1] of random tokens, exact and as float32 has them; zeros without constants.
    """

    exact: _View
    decoded: tuple[_View, ...]
    random: _View
    trained: Tensor
    any_tokens: Tensor

    @property
    def episodes(self) -> range:
        return range(len(self.exact.errors))

    @cached_property
    def penalty(self) -> Tensor:
        """[H + 1, H + 1]: what a change gives for random actions, and a little of the change itself."""
        random = torch.cat(self.random.activations)
        penalty = random.T @ random / len(random)
        penalty.diagonal().add_(_WEIGHT_PENALTY * penalty.diagonal().mean())
        return penalty

    def solve(self, episodes: Sequence[int], ridges: Sequence[float]) -> list[Tensor]:
        """Changes [H + 1, A] fitted to these episodes, one per ridge."""
        features = torch.cat([self.exact.activations[index] for index in episodes])
        errors = torch.cat([self.exact.errors[index] for index in episodes])
        normal, target = features.T @ features / len(features), features.T @ errors / len(features)
        return [torch.cholesky_solve(target, torch.linalg.cholesky(normal + ridge * self.penalty)) for ridge in ridges]

    def random_ratio(self, change: Tensor) -> float:
        """Squared error of random actions once the layer is changed, over that before: the larger one of both kinds."""
        ratios = self.random.squares(range(2), change) / self.random.squares(range(2)).clamp(min=_TINY)
        return float(ratios.max())

    def float32_error(self, change: Tensor) -> float:
        """By how much float32 misses actions of any tokens, at most, in normalised units."""
        layer, (exact, rounded) = self.trained.T + change, self.any_tokens
        return float((_float32_sums(rounded, layer) - exact @ layer).abs().max())


@torch.no_grad()
def fit_readout(
    checkpoint: Checkpoint,
    episodes: ActionDataset,
    config: ReadoutConfig = DEFAULT_READOUT,
    *,
    is_training_data: bool = False,
) -> ReadoutFit:
    """Fit to the float64 reference's unquantised latents of these episodes; one readout serves every prefix.

    is_training_data: whether they are a part of what the checkpoint was trained on, so that they are like it. Where
    the checkpoint has conditioning constants, a refit must not lose on the tokens of the first layer, of the coarse
    ones and of all, either. Raises DataError for another action dimension or latents that are not finite.
    """
    if config.choice is ReadoutChoice.OFF:
        return ReadoutFit()
    problem = _problem(checkpoint, episodes)
    is_wanted = config.choice is ReadoutChoice.ON
    if len(problem.episodes) < 2:
        if not is_wanted:
            return ReadoutFit(
                remark="the decoder's last layer stays as it was trained: with one calibration episode no other can "
                "say whether refitting it helps; give two or more, or --readout on"
            )
        ridge = config.ridge or LONE_RIDGE
        return ReadoutFit(_changed(checkpoint, problem.solve(problem.episodes, [ridge])[0]), ridge)
    ridges = RIDGES if config.ridge is None else (config.ridge,)
    changes = dict(zip(ridges, problem.solve(problem.episodes, ridges), strict=True))
    candidates = _candidates(problem, changes, most_random=1.0 if is_training_data else 1 - _RANDOM_GAIN)
    passed = [found for found in candidates if not found.objection]
    exact = [found for found in candidates if not found.imprecision]
    best = min(passed or exact or candidates, key=lambda found: found.ratio)
    is_kept = bool(passed) or is_wanted
    readout = _changed(checkpoint, changes[best.ridge]) if is_kept else None
    return ReadoutFit(readout, best.ridge, best.ratio, best.remark(is_kept=is_kept))


@dataclass(frozen=True)
class _Candidate:
    """What a ridge is worth. ratio: squared error on episodes left out, over that of the trained layer; certainty: the
    gain over its standard error, of which `needed` are needed; lost: which of the other errors on episodes left out
    grew, and by what; random_ratio: as ratio, of random actions, of which most_random is allowed; float32_error: of
    actions, at most, in normalised units."""

    ridge: float
    ratio: float
    certainty: float
    needed: float
    lost: str
    random_ratio: float
    most_random: float
    float32_error: float

    @property
    def imprecision(self) -> str:
        """Says so where float32 could err by more than engines may; else empty."""
        if self.float32_error <= _MOST_ERROR:
            return ""
        return (
            f"its weights are so large that float32 errs by {self.float32_error:.2g} normalised units, and "
            f"{_MOST_ERROR:.2g} is the most that is allowed: train the model longer"
        )

    @property
    def objection(self) -> str:
        """The first rule that the refit breaks, with its figure; empty where it breaks none."""
        if self.imprecision:
            return self.imprecision
        if not self.certainty > self.needed:
            return (
                f"over the episodes left out the gain is {self.certainty:.2g} times its standard error, and more than "
                f"{self.needed:.2g} is asked for"
            )
        if self.lost:
            return self.lost
        if not self.random_ratio <= self.most_random:
            return (
                f"random actions from the range that the model was trained for would have {self.random_ratio:.3g} "
                f"times their squared error, and {self.most_random:g} is the most that is allowed"
            )
        return ""

    def remark(self, *, is_kept: bool) -> str:
        """A sentence on what became of the layer, and why."""
        measured = (
            f"{self.ratio:.3g} times the squared error on calibration episodes left out of the fit (ridge "
            f"{self.ridge:g})"
        )
        if not is_kept:
            return (
                f"the decoder's last layer stays as it was trained: refitted it has {measured}, but {self.objection}; "
                "--readout on refits it all the same"
            )
        if self.objection:
            return f"the decoder's last layer is refitted, as --readout on asks for: {measured}; but {self.objection}"
        return (
            f"the decoder's last layer is refitted: {measured}; the gain is {self.certainty:.2g} times its standard "
            f"error ({self.needed:.2g} is asked for), random actions have {self.random_ratio:.3g} times their squared "
            f"error ({self.most_random:g} is allowed)"
        )


def _candidates(problem: _Problem, changes: Mapping[float, Tensor], most_random: float) -> list[_Candidate]:
    """What each ridge is worth on episodes left out of its fit. changes: by ridge, [H + 1, A], fitted to all."""
    views = (problem.exact, *problem.decoded)
    before = torch.stack([view.squares(problem.episodes) for view in views])
    least = max(float(before[0, 0].sum()), _TINY)
    # One for each way of leaving out: [ridges, views, weightings, episodes].
    tables = []
    for most in _FOLDS:
        after = torch.empty(len(changes), *before.shape, dtype=torch.float64)
        for kept, left_out in episode_folds(len(problem.episodes), most):
            for place, change in enumerate(problem.solve(kept, list(changes))):
                after[place, :, :, left_out] = torch.stack([view.squares(left_out, change) for view in views])
        tables.append(after)
    return [
        _Candidate(
            ridge,
            ratio=max(float(found[0, 0].sum()) / least for found in by_fold),
            certainty=min(gain_certainty(before[0, 0], found[0, 0]) for found in by_fold),
            needed=needed_certainty(len(problem.episodes)),
            lost=next(filter(None, (_lost(views, before, found) for found in by_fold)), ""),
            random_ratio=problem.random_ratio(change),
            most_random=most_random,
            float32_error=problem.float32_error(change),
        )
        for (ridge, change), *by_fold in zip(changes.items(), *tables, strict=True)
    ]


def _lost(views: Sequence[_View], before: Tensor, after: Tensor) -> str:
    """Which squared error [views, 2, episodes] of episodes left out grows by more than it may; empty where none does.

    In the robot's units it must not grow at all. Decoded from tokens, whose own error hides the gain, it must not grow
    by more than chance makes it.
    """
    for number, view in enumerate(views):
        most = 1 + _TOKEN_LOSS if number else 1.0
        for unit, was, is_now in zip(_WEIGHTINGS, before[number].sum(dim=-1), after[number].sum(dim=-1), strict=True):
            if is_now > most * was:
                ratio = float(is_now / was.clamp(min=_TINY))
                return (
                    f"in {unit}, decoded from {view.name} of episodes left out, it has {ratio:.4g} times the squared "
                    f"error, and {most:g} is the most that is allowed"
                )
    return ""


def _problem(checkpoint: Checkpoint, episodes: ActionDataset) -> _Problem:
    has_constants = checkpoint.constants is not None
    model = checkpoint.model(Conditioning.CALIBRATED if has_constants else None, dtype=torch.float64)
    # The layer as it was trained, whatever was fitted before.
    _, last = linear_layers(checkpoint.model(dtype=torch.float64).decoder)
    lengths = [len(episode) for episode in episodes.episodes]
    actions = reference_actions(checkpoint, episodes)
    latents = reference_latents(model, actions)
    weights = torch.stack((torch.ones_like(model.units), model.units.square()))

    def view(name: str, latents: Tensor, actions: Tensor, lengths: Sequence[int]) -> _View:
        found = _with_ones(model.decoder[:2](latents))
        errors = (actions - model.offset) / model.units - last(found[:, :-1])
        return _View(name, torch.split(found, list(lengths)), torch.split(errors, list(lengths)), weights)

    decoded, any_tokens = [], latents.new_zeros(2, 1, last.in_features + 1)
    if has_constants:
        tokens = model.quantizer.quantize(latents).tokens
        generator = torch.Generator().manual_seed(_SEED)
        drawn = torch.randint(model.config.num_levels, (_RANDOM_TOKENS, *tokens.shape[1:]), generator=generator)
        exact = _with_ones(model.decoder[:2](model.dequantize(drawn)))
        any_tokens = torch.stack((exact, _float32_features(model, drawn)))
        for prefix in sorted({1, *default_prefixes(model.config.num_layers)}):
            layers = f"first {prefix} layers" if prefix > 1 else "first layer"
            kept = model.quantizer.dequantize(tokens[..., :prefix], None)
            decoded.append(view(f"the tokens of the {layers}", kept, actions, lengths))
    drawn = _random_actions(model, actions)
    return _Problem(
        exact=view("latents that are not quantised", latents, actions, lengths),
        decoded=tuple(decoded),
        random=view("latents of random actions", reference_latents(model, drawn), drawn, [_RANDOM_ACTIONS] * 2),
        trained=torch.cat((last.weight, last.bias.unsqueeze(1)), dim=1),
        any_tokens=any_tokens,
    )


def _float32_features(model: ActionAutoencoder, tokens: Tensor) -> Tensor:
    """Activations [n, H + 1] of tokens [n, D, L], as deployed, but for Mish: there processors differ, it is exact."""
    first, _ = linear_layers(model.decoder)
    matrix, offset = model.token_map(tokens.shape[-1])
    folded = torch.cat((first.weight @ matrix, (first.weight @ offset + first.bias).unsqueeze(1)), dim=1)
    inner = _float32_sums(_with_ones(tokens.flatten(1)), folded.T)
    return _with_ones(model.decoder[1](inner).float().double())


def _float32_sums(inputs: Tensor, layer: Tensor) -> Tensor:
    """inputs [n, I] @ layer [I, O] by float32, one product after the other: the same on every processor."""
    total = torch.zeros(len(inputs), layer.shape[1])
    for column, weights in zip(inputs.float().T, layer.float(), strict=True):
        total += column.unsqueeze(1) * weights
    return total.double()


def _with_ones(values: Tensor) -> Tensor:
    return torch.cat((values, torch.ones_like(values[:, :1])), dim=1)


def _random_actions(model: ActionAutoencoder, actions: Tensor) -> Tensor:
    """Float64 [2 _RANDOM_ACTIONS, A], evenly from the range that the checkpoint was trained for, so far as it is known,
    then from its inner half.

    The normaliser knows it. A checkpoint without one takes actions of about unit size around zero: as far as the
    largest of these.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shares = 2 * torch.rand(_RANDOM_ACTIONS, actions.shape[1], generator=generator, dtype=torch.float64) - 1
    reach = actions.abs().amax(dim=0) if model.normaliser is None else model.units
    return model.offset + torch.cat((shares, shares / 2)) * reach


def _changed(checkpoint: Checkpoint, change: Tensor) -> Readout:
    """The trained layer, changed by [H + 1, A], which is rounded first."""
    added = rounded(change, change.abs().max()).T
    weight = checkpoint.weights["decoder.2.weight"].double() + added[:, :-1]
    bias = checkpoint.weights["decoder.2.bias"].double() + added[:, -1]
    return Readout(weight.float().contiguous(), bias.float().contiguous())


def held_out_warning(trained: float, refitted: float | None, judged_on: str, units: str) -> str:
    """A warning that a refit lost where it is judged; empty where it did not, or there is none.

    trained, refitted: squared error of the layer as it was trained and as it was refitted, None without a refit; units:
    of both, squared.
    """
    if refitted is None or refitted <= trained:
        return ""
    return (
        f"the refitted readout lost on {judged_on}: action MSE {refitted:.3e} {units}, as trained {trained:.3e} "
        f"({refitted / max(trained, _TINY) - 1:+.1%}); --readout off keeps the trained layer"
    )
