"""Is a policy as sure as it should be? Temperatures of its logits and scales of its spreads, from windows held out.

A temperature for each layer, token or bit maximises the likelihood of the recorded tokens (Guo et al. 2017, On
Calibration of Modern Neural Networks, arXiv 1706.04599). Tokens are taken to be independent where beliefs are decoded,
and they are not: so each action dimension has a scale, too, with which about as many errors lie within one standard
deviation, and within two, as of a Gaussian. Both are fitted to all episodes, and judged by fits that each leave out
some of them: every episode is judged by what was not fitted to it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfsq.calibration.errors import CalibrationError
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.beliefs import BitProbabilities, bits_of_tokens, chunk_belief, step_belief
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.runtime.bundle.belief_settings import BeliefSettings
from rfsq.runtime.bundle.beliefs import Belief, BeliefKind, BeliefMode

#: Shares of a Gaussian within one and two standard deviations.
WITHIN_ONE, WITHIN_TWO = 0.682689, 0.954500
#: By how much a share may miss these.
ROOM_ONE, ROOM_TWO = 0.05, 0.03
MODES: tuple[BeliefMode, ...] = ("expected", "likeliest mode")
#: Beyond these a policy knows nothing, or all.
_SHARPEST, _FLATTEST = 1 / 20, 100.0
_NEWTON_STEPS, _PARTS, _SCALES = 60, 15, 11
#: Fits that judge, each on the episodes that it leaves out.
_FOLDS = 5
#: Spreads that are so much too small are those of what was taken as certain, and none of an action.
_MOST_SCALE = 100.0
#: A logit of what will not be.
_UNLIKELY = -1e4
#: Chunks that are decoded at a time.
_DECODED = 512


@dataclass(frozen=True, eq=False)
class Choice:
    """One choice of a policy, many times. logits: float64 [M, V]; taken: int64 [M], what was recorded."""

    name: str
    logits: Tensor
    taken: Tensor


class PolicyLogits(ABC):
    """What a policy said of N recorded chunks. kind: in which form, and of which tokenizer; actions: float64
    [N, T, A]."""

    kind: BeliefKind
    actions: Tensor

    @abstractmethod
    def choices(self, rows: Tensor) -> list[Choice]:
        """Of the chunks `rows`: as many as there are temperatures."""

    @abstractmethod
    def belief(self, rows: Tensor, temperature: Tensor, mode: BeliefMode) -> Belief[Tensor]:
        """What they decode to; temperature: one for each choice."""


@dataclass(frozen=True, eq=False)
class StepLogits(PolicyLogits):
    """Per-step tokens: [N, T, D, l, K]."""

    kind: BeliefKind
    model: ActionAutoencoder
    actions: Tensor
    logits: Tensor

    def choices(self, rows: Tensor) -> list[Choice]:
        tokens, size = self.model.encode(self.actions[rows])[0], self.logits.shape[-1]
        return [
            Choice(f"layer {layer}", self.logits[rows][..., layer, :].reshape(-1, size), tokens[..., layer].flatten())
            for layer in range(self.logits.shape[-2])
        ]

    def belief(self, rows: Tensor, temperature: Tensor, mode: BeliefMode) -> Belief[Tensor]:
        probabilities = (self.logits[rows] / temperature.unsqueeze(-1)).softmax(-1)
        return step_belief(self.model, probabilities, mode, self.kind.coarse, None)


@dataclass(frozen=True, eq=False)
class TokenLogits(PolicyLogits):
    """Chunk tokens of a vocabulary: [N, l, V]."""

    kind: BeliefKind
    model: ChunkTokenizer
    actions: Tensor
    logits: Tensor

    def choices(self, rows: Tensor) -> list[Choice]:
        tokens = self.model.encode(self.actions[rows])
        return [
            Choice(f"token {place}", self.logits[rows, place], tokens[:, place])
            for place in range(self.logits.shape[1])
        ]

    def belief(self, rows: Tensor, temperature: Tensor, mode: BeliefMode) -> Belief[Tensor]:
        probabilities = (self.logits[rows] / temperature.unsqueeze(-1)).softmax(-1)
        return chunk_belief(self.model, bits_of_tokens(probabilities, self.model.sizes), mode, None)


@dataclass(frozen=True, eq=False)
class BitLogits(PolicyLogits):
    """Chunk tokens as class [N, C] and bits [N, n], these of the likeliest class."""

    kind: BeliefKind
    model: ChunkTokenizer
    actions: Tensor
    classes: Tensor
    bits: Tensor

    def choices(self, rows: Tensor) -> list[Choice]:
        code, classes, bits = self.model.code, self.classes[rows], self.bits[rows]
        chunks = self.model.normalised(self.actions[rows]).clamp(-1, 1)
        taken = code.bits(code.encode_in(chunks, classes.argmax(1)))[:, code.sizes.class_bits :]
        two = torch.stack((torch.zeros_like(bits), bits), dim=-1)
        of_bits = [Choice(f"bit {place}", two[:, place], taken[:, place]) for place in range(bits.shape[1])]
        return [Choice("class", classes, code.choose(chunks)), *of_bits]

    def belief(self, rows: Tensor, temperature: Tensor, mode: BeliefMode) -> Belief[Tensor]:
        classes = (self.classes[rows] / temperature[0]).softmax(-1)
        bits = (self.bits[rows] / temperature[1:]).sigmoid()
        by_class = bits.unsqueeze(1).expand(-1, classes.shape[1], -1)
        return chunk_belief(self.model, BitProbabilities(classes, by_class), mode, None)


@dataclass(frozen=True)
class ChoiceReport:
    """temperature: fitted to all. Of windows that the judging fit left out, before and after: nll, mean negative
    log-likelihood of what was recorded; ece, the expected calibration error of the likeliest."""

    name: str
    temperature: float
    nll: tuple[float, float]
    ece: tuple[float, float]


@dataclass(frozen=True)
class SpreadReport:
    """scale: of each action dimension, fitted to all; None where most spreads are 0 or nearly so, which no scale mends.
    Of the same windows: within_one, within_two, share of all errors within so many standard deviations, before and
    after."""

    mode: BeliefMode
    scale: tuple[float, ...] | None
    within_one: tuple[float, float]
    within_two: tuple[float, float]


@dataclass(frozen=True)
class Reliability:
    """confidence, accuracy: mean of the likeliest's probability and share of its being right, for parts of all choices
    by their probability, empty parts left out; share: of all."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    share: tuple[float, ...]


@dataclass(frozen=True)
class BeliefReport:
    """kind: what was fitted to; episodes: how many; folds: how many fits judge; reliability: before and after; remarks:
    what a person should know."""

    kind: BeliefKind
    episodes: int
    folds: int
    choices: tuple[ChoiceReport, ...]
    spreads: tuple[SpreadReport, ...]
    reliability: tuple[Reliability, Reliability]
    remarks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Said:
    """Of one choice, M times. nll: of what was recorded; confidence: the likeliest's probability; right: whether that
    is what was recorded, 0 or 1."""

    nll: Tensor
    confidence: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class _Fit:
    """temperature: of each choice; scales: [A] of each mode, or None."""

    temperature: Tensor
    scales: dict[BeliefMode, Tensor | None]


@torch.no_grad()
def calibrate_beliefs(given: PolicyLogits, episodes: Sequence[int], seed: int = 0) -> BeliefReport:
    """Fit to all episodes, and judge by fits that each leave out some of them. episodes: of each chunk, any numbers.

    Raises CalibrationError for fewer than two episodes.
    """
    own = torch.tensor(list(episodes))
    names = torch.tensor(sorted(set(episodes)))
    if len(names) < 2:
        raise CalibrationError(
            f"all windows are of {len(names)} episode; expected two at least, to fit to some and judge on others"
        )
    shuffled = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    parts = torch.tensor_split(shuffled, min(_FOLDS, len(names)))
    whole, folds = _fit(given, torch.arange(len(own))), []
    for part in parts:
        is_judged = torch.isin(own, part)
        folds.append((is_judged.nonzero()[:, 0], _fit(given, (~is_judged).nonzero()[:, 0])))
    before, after = _said(given, folds)
    reports = tuple(
        ChoiceReport(name, float(value), *_compared(before[name], after[name]))
        for name, value in zip(before, whole.temperature, strict=True)
    )
    spreads = tuple(_spread(given, folds, whole, mode) for mode in MODES)
    return BeliefReport(
        kind=given.kind,
        episodes=len(names),
        folds=len(parts),
        choices=reports,
        spreads=spreads,
        reliability=(reliability(list(before.values())), reliability(list(after.values()))),
        remarks=(*_temperature_remarks(reports), *map(_spread_remark, (part for part in spreads if not part.scale))),
    )


def _fit(given: PolicyLogits, rows: Tensor) -> _Fit:
    temperature = torch.tensor([fit_temperature(choice) for choice in given.choices(rows)], dtype=torch.float64)
    return _Fit(
        temperature, {mode: _scale(_deviations(given, rows, temperature, mode).flatten(0, 1)) for mode in MODES}
    )


def _said(given: PolicyLogits, folds: Sequence[tuple[Tensor, _Fit]]) -> tuple[dict[str, Said], dict[str, Said]]:
    """By the names of choices: as it is, and with temperatures that were fitted to other episodes."""
    found: tuple[dict[str, list[Said]], dict[str, list[Said]]] = {}, {}
    for rows, fit in folds:
        for choice, temperature in zip(given.choices(rows), fit.temperature, strict=True):
            for side, value in zip(found, (1.0, float(temperature)), strict=True):
                side.setdefault(choice.name, []).append(said_of(choice, value))
    before, after = ({name: _joined(parts) for name, parts in side.items()} for side in found)
    return before, after


def said_of(choice: Choice, temperature: float = 1.0) -> Said:
    """With this temperature."""
    logs = (_finite(choice.logits) / temperature).log_softmax(-1)
    likeliest = logs.max(-1)
    nll = -logs.gather(1, choice.taken.unsqueeze(1))[:, 0]
    return Said(nll, likeliest.values.exp(), (likeliest.indices == choice.taken).double())


def _joined(parts: Sequence[Said]) -> Said:
    return Said(*(torch.cat([getattr(part, name) for part in parts]) for name in ("nll", "confidence", "right")))


def _compared(before: Said, after: Said) -> tuple[tuple[float, float], tuple[float, float]]:
    """nll, and calibration errors."""
    sides = before, after
    nll, ece = [float(side.nll.mean()) for side in sides], [calibration_error([side]) for side in sides]
    return (nll[0], nll[1]), (ece[0], ece[1])


def _temperature_remarks(reports: Sequence[ChoiceReport]) -> list[str]:
    """Of a policy that knows nothing, or all, or whose logits are no logits of these chunks."""
    found = []
    for limit, meaning in (
        (_FLATTEST, "the policy knows nothing of them; do the logits belong to these chunks, and to this tokenizer?"),
        (_SHARPEST, "the policy is always right; was it trained on these chunks?"),
    ):
        names = [report.name for report in reports if math.isclose(report.temperature, limit, rel_tol=1e-6)]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            found.append(f"the temperature of {shown} is at its limit, {limit:g}: {meaning}")
    return found


def _spread_remark(spread: SpreadReport) -> str:
    return (
        f"most standard deviations of {spread.mode!r} are 0, or far too small, which no scale makes honest: it has none"
    )


def fit_temperature(choice: Choice) -> float:
    """The temperature with the greatest likelihood: Newton's method on its inverse, in which the logarithm of the
    likelihood is concave."""
    logits = _finite(choice.logits)
    taken = logits.gather(1, choice.taken.unsqueeze(1))[:, 0].mean()
    inverse = 1.0
    for _ in range(_NEWTON_STEPS):
        p = (inverse * logits).softmax(-1)
        mean = (p * logits).sum(-1)
        slope = float(taken - mean.mean())
        curve = float(((p * logits.square()).sum(-1) - mean.square()).mean())
        step = slope / curve if curve > 0 else 0.0
        # Never further than twice or half: far away the curve is not that of a parabola.
        following = min(max(inverse + step, inverse / 2), inverse * 2)
        following = min(max(following, 1 / _FLATTEST), 1 / _SHARPEST)
        if abs(following - inverse) <= 1e-9 * inverse:
            break
        inverse = following
    return 1 / inverse


def _finite(logits: Tensor) -> Tensor:
    """The largest at 0, and forbidden words as unlikely ones, so that nothing is multiplied with infinity."""
    return (logits - logits.amax(-1, keepdim=True)).clamp(min=_UNLIKELY)


def reliability(said: Sequence[Said]) -> Reliability:
    """Of all choices together."""
    confidence, right = (torch.cat([getattr(part, name) for part in said]) for name in ("confidence", "right"))
    part = (confidence * _PARTS).long().clamp(max=_PARTS - 1)
    count = torch.bincount(part, minlength=_PARTS)
    kept = count > 0
    means = [
        tuple((torch.zeros(_PARTS).double().index_add(0, part, values)[kept] / count[kept]).tolist())
        for values in (confidence, right)
    ]
    return Reliability(means[0], means[1], tuple((count[kept] / len(part)).tolist()))


def calibration_error(said: Sequence[Said]) -> float:
    """The expected calibration error of the likeliest: mean distance of confidence and accuracy over the parts."""
    found = reliability(said)
    return sum(
        share * abs(confidence - accuracy)
        for confidence, accuracy, share in zip(found.confidence, found.accuracy, found.share, strict=True)
    )


def _spread(given: PolicyLogits, folds: Sequence[tuple[Tensor, _Fit]], whole: _Fit, mode: BeliefMode) -> SpreadReport:
    """The scale of the whole fit, judged by those of the folds."""
    before, after = [], []
    for rows, fit in folds:
        before.append(_deviations(given, rows, torch.ones_like(fit.temperature), mode))
        scale = fit.scales[mode]
        off = _deviations(given, rows, fit.temperature, mode)
        after.append(off if scale is None else off / scale)
    (one_before, one_after), (two_before, two_after) = (
        [float((torch.cat(part) <= most).double().mean()) for part in (before, after)] for most in (1, 2)
    )
    found = whole.scales[mode]
    return SpreadReport(
        mode, None if found is None else tuple(found.tolist()), (one_before, one_after), (two_before, two_after)
    )


def _scale(errors: Tensor) -> Tensor | None:
    """[A] for errors [M, A] in standard deviations; None where most of these are 0 or far too small.

    They have longer tails than a Gaussian, so no scale gives both of its shares: of those between the scale for the one
    and the scale for the other it is the one with the least misses.
    """
    one, two = torch.from_numpy(np.quantile(errors.numpy(), (WITHIN_ONE, WITHIN_TWO), axis=0, method="higher"))
    if not ((one > 0) & (two <= 2 * _MOST_SCALE)).all():
        return None
    blend = torch.linspace(0, 1, _SCALES).double().unsqueeze(1)
    tried = one ** (1 - blend) * (two / 2) ** blend
    one_off = (_within(errors, tried) - WITHIN_ONE) / ROOM_ONE
    two_off = (_within(errors, 2 * tried) - WITHIN_TWO) / ROOM_TWO
    best: Tensor = tried.gather(0, (one_off.square() + two_off.square()).argmin(0, keepdim=True))[0]
    return best


def _within(errors: Tensor, most: Tensor) -> Tensor:
    """The share of the errors [M, A] that are at most this [S, A], for each dimension: [S, A]."""
    return torch.stack([(errors <= each).double().mean(0) for each in most])


def _deviations(given: PolicyLogits, rows: Tensor, temperature: Tensor, mode: BeliefMode) -> Tensor:
    """How many standard deviations each action [N, T, A] is off; of 0 infinitely many, or none where it is right."""
    found = []
    for part in torch.split(rows, _DECODED):
        belief = given.belief(part, temperature, mode)
        off = (belief.actions - given.actions[part]).abs()
        found.append(torch.where(off > 0, off / belief.std, 0))
    return torch.cat(found)


def settings_of(report: BeliefReport) -> BeliefSettings:
    """What a robot needs of a report."""
    return BeliefSettings(
        report.kind,
        tuple(choice.temperature for choice in report.choices),
        {spread.mode: spread.scale for spread in report.spreads if spread.scale is not None},
    )
