"""Fit chunk tokens to demonstrations: classes, their bases and scales, and the order of bits. No gradients.

The recipe and what each part of it is worth: docs/chunk_tokens.md.
"""

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from rfsq.calibration.chunk_clusters import clusters, split
from rfsq.calibration.chunk_covariance import LEAST_VARIANCE, eigen, mixed
from rfsq.calibration.chunk_order import bit_order, class_order
from rfsq.calibration.chunk_windows import Episodes, batches, normalised, windows
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkCode, ChunkConstants, ChunkSizes, bit_counts, cell_middles, gain_range
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import check_positive, check_seed
from rfsq.runtime.bundle.paths import counted

#: Parents, from which the classes are split.
_PARENTS = 15
_ROUNDS = 8
#: Classes of the global mean and basis, whose variances are so many times the global ones.
_BROAD = (1.0, 6.0, 36.0)
#: Windows that a class's covariance, and its parent's, are shrunk by; the first two for chunks of 8 steps of 7
#: dimensions (`_Coding.shrinkage`).
_SHRINK_CLASS, _SHRINK_PARENT, _SHRINK_ENERGY, _SHRINK_SCALE = 40.0, 80.0, 20.0, 40.0
#: The same for gains.
_SHRINK_GAIN = 60.0
#: Of all tokens, the share in which each bit refines the same latent in every class.
_SHARED_TOKENS = 8 / 45
#: Of a separable covariance in the common ones: the calibration episodes choose.
_SHARES = (0.0, 0.05, 0.2)
#: Of all windows that are fitted to, and of all covariances: what takes a fourth of a gigabyte.
_MOST_VALUES = 2**25
#: Of a mean squared error that others are divided by.
_LEAST_ERROR = 1e-30


@dataclass(frozen=True)
class ChunkFitConfig:
    """seed: of the first classes and of the samples; most_windows: of the training episodes, and a fourth of them of
    the calibration episodes, sampled where there are more; budgets: numbers of tokens at which errors count;
    has_shared_order: whether the first bits refine the same latents in all classes."""

    seed: int = 0
    most_windows: int = 60_000
    budgets: tuple[int, ...] | None = None
    has_shared_order: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_positive(self, "most_windows")


@dataclass(frozen=True, eq=False)
class _Classes:
    """mean [C, N]; basis [C, N, K], columns by falling variance; variances [C, K]. K: of N, as many as have a bit."""

    mean: Tensor
    basis: Tensor
    variances: Tensor


@dataclass(frozen=True)
class _Coding:
    """What decides how well a class codes a window."""

    sizes: ChunkSizes
    budgets: tuple[int, ...]
    separable_share: float = 0.0

    @property
    def latents(self) -> int:
        """How many latents can have a bit at most: K of `_Classes`."""
        return min(self.sizes.num_values, self.sizes.code_bits)

    def shrinkage(self, windows: float) -> float:
        """Windows for these sizes that do what so many do for chunks of 8 steps of 7 dimensions; never fewer.

        A covariance has N values in each window, and of windows at every step only each Tth is new: so with N * T.
        """
        return windows * max(1.0, self.sizes.num_values * self.sizes.chunk_length / (8 * 7 * 8))

    def costs(self, x: Tensor, classes: _Classes) -> Tensor:
        """The error [n, C] of each class, summed over budgets, each over the mean of the best there."""
        errors = self.errors(x, classes)
        # Windows that all rest where a class has its mean may err by nothing.
        means = errors.min(dim=2).values.double().mean(dim=1).clamp(min=_LEAST_ERROR)
        return (errors / means[:, None, None].float()).sum(dim=0).double()

    def errors(self, x: Tensor, classes: _Classes) -> Tensor:
        """The squared error [budgets, n, C] of each class; in float32."""
        order = bit_order(classes.variances, self.sizes.code_bits)
        latents = int(order.max()) + 1
        ends = [budget * self.sizes.token_bits - self.sizes.class_bits for budget in self.budgets]
        counts = [bit_counts(order[:, :end], latents) for end in ends]
        errors = torch.empty(len(ends), len(x), len(classes.mean))
        for index in range(len(classes.mean)):
            scale = WIDTH * classes.variances[index, :latents].sqrt().float()
            found = []
            for values in batches(x, self.sizes):
                z, rest = _projected(values.float() - classes.mean[index].float(), classes.basis[index], latents)
                y = torch.tanh(z / scale)
                backs = (torch.atanh(cell_middles(y, count[index])) * scale for count in counts)
                found.append(torch.stack([(back - z).square().sum(dim=1) + rest for back in backs]))
            errors[..., index] = torch.cat(found, dim=1)
        return errors


def _projected(centred: Tensor, basis: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """The first latents [n, latents], and the square [n] of what they leave out of each window; in float32."""
    if len(basis) > basis.shape[1]:
        # With less than a bit for each value, what is left out is far above what rounding makes of the difference.
        z = centred @ basis[:, :latents].float()
        return z, (centred.square().sum(dim=1) - z.square().sum(dim=1)).clamp(min=0)
    z = centred @ basis.float()
    return z[:, :latents], z[:, latents:].square().sum(dim=1)


def default_budgets(num_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens at which errors count: of 45 these are 4, 8, 16, 30, 45."""
    return tuple(sorted({max(1, round(num_tokens * share)) for share in (4 / 45, 8 / 45, 16 / 45, 30 / 45, 1)}))


def shared_bits(sizes: ChunkSizes) -> int:
    """How many code bits have one order in all classes, where they are asked to."""
    return max(0, round(sizes.num_tokens * _SHARED_TOKENS) * sizes.token_bits - sizes.class_bits)


def fit_chunk_code(
    training: Episodes,
    calibration: Episodes,
    sizes: ChunkSizes,
    config: ChunkFitConfig = ChunkFitConfig(),
    normaliser: Normaliser | None = None,
) -> ChunkConstants:
    """Fit to training episodes [n, A], in the robot's units; scales and gains also to calibration episodes, others.

    On a terminal it shows its progress. Raises DataError for windows that are fewer than the learned classes, or all
    alike.
    """
    generator = torch.Generator().manual_seed(config.seed)
    most, length = min(config.most_windows, _MOST_VALUES // sizes.num_values), sizes.chunk_length
    x = normalised(windows(training, length, most, generator), sizes, normaliser)
    held_out = normalised(windows(calibration, length, -(-most // 4), generator), sizes, normaliser)
    coding = _Coding(sizes, config.budgets or default_budgets(sizes.num_tokens))
    learned = sizes.num_classes - 1 - broad_classes(sizes.num_classes)
    _check_windows(x, learned)
    common = _common(coding, x)
    share = min(_SHARES, key=lambda share: _broad_cost(coding, held_out, common[share]))
    coding = replace(coding, separable_share=share)
    described = _aligned(_learned(coding, x, learned, generator), common[share].basis[0])
    broad = _picked(common[share], slice(broad_classes(sizes.num_classes)))
    classes = _with(described, broad)
    used = torch.bincount(coding.costs(held_out, classes).argmin(dim=1), minlength=learned)[:learned]
    described = _picked(described, class_order(described.mean, used + 1.0))
    classes = _with(described, broad)
    for _ in range(2):
        chosen = coding.costs(held_out, classes).argmin(dim=1)
        classes = _with(_rescaled(described, held_out, chosen), broad)
    chosen = coding.costs(held_out, classes).argmin(dim=1)
    # Only now: classes that are found with their own orders err less.
    order = bit_order(classes.variances, sizes.code_bits, shared_bits(sizes) if config.has_shared_order else 0)
    latents = int(order.max()) + 1
    constants = ChunkConstants(
        mean=classes.mean.float(),
        basis=classes.basis[..., :latents].float(),
        scale=classes.variances[:, :latents].sqrt().float(),
        gain=_gains(held_out, chosen, classes, latents).float(),
        order=order,
        budgets=coding.budgets,
        weights=torch.ones(len(coding.budgets)),
    )
    return replace(constants, weights=_weights(ChunkCode(sizes, constants).double(), held_out, chosen))


def broad_classes(num_classes: int) -> int:
    """How many of so many classes are broad; they come behind those that are learned, and escape is the last."""
    return min(len(_BROAD), num_classes - 2)


def _check_windows(x: Tensor, learned: int) -> None:
    if len(x) < learned:
        raise DataError(
            f"{counted(len(x), 'window')} of training episodes for {learned:,} learned classes; expected at least one "
            "for each: give more episodes, or fewer classes"
        )
    if (x == x[0]).all():
        raise DataError(
            f"{counted(len(x), 'window')} of the training episodes, all alike, so there is nothing to fit; give "
            "episodes in which the robot moves, and which are longer than a chunk"
        )


def _learned(coding: _Coding, x: Tensor, count: int, generator: torch.Generator) -> _Classes:
    """So many classes, in two steps: parents, and the classes that these are split into."""
    parent = torch.zeros(min(_PARENTS, count), dtype=torch.long)
    is_split = count > len(parent)
    with tqdm(total=_ROUNDS * (1 + is_split), desc="  classes", unit="round", leave=False, disable=None) as progress:
        assigned = clusters(x, coding.sizes, len(parent), generator)
        assigned = _lloyd(coding, x, (assigned, parent), generator, progress)
        if is_split:
            assigned, parent = split(x, coding.sizes, assigned, (len(parent), count), generator)
            assigned = _lloyd(coding, x, (assigned, parent), generator, progress)
    return _described(coding, x, assigned, parent)


def most_learned(num_values: int) -> int:
    """How many classes of so many values are fitted at most: their covariances take a fourth of a gigabyte."""
    return max(1, _MOST_VALUES // num_values**2)


def _common(coding: _Coding, x: Tensor) -> dict[float, _Classes]:
    """The broad classes for each share of a separable covariance."""
    mean, covariance = x.mean(dim=0), torch.cov(x.T, correction=0).reshape(x.shape[1], x.shape[1])
    factors = torch.tensor(_BROAD, dtype=torch.float64).unsqueeze(-1)
    found = {}
    for share in _SHARES:
        variances, basis = eigen(mixed(covariance, coding.sizes.chunk_length, share), coding.latents)
        count = len(factors)
        found[share] = _Classes(mean.expand(count, -1), basis.expand(count, -1, -1), variances * factors)
    return found


def _broad_cost(coding: _Coding, x: Tensor, broad: _Classes) -> float:
    """The logarithms of the mean errors at the budgets, summed; each window in the class that codes it best."""
    best = coding.costs(x, broad).argmin(dim=1)
    errors = coding.errors(x, broad)[:, torch.arange(len(x)), best].double().mean(dim=1)
    return float(errors.clamp(min=_LEAST_ERROR).log().sum())


def _picked(classes: _Classes, which: slice | Tensor) -> _Classes:
    return _Classes(*(tensor[which] for tensor in vars(classes).values()))


def _with(classes: _Classes, broad: _Classes) -> _Classes:
    return _Classes(*(torch.cat((getattr(classes, name), getattr(broad, name))) for name in vars(classes)))


def _aligned(classes: _Classes, basis: Tensor) -> _Classes:
    """With the signs of latents chosen, which are free: as that latent of the common basis [N, N] which each of them
    is nearest to, so that the same bit says much the same in all classes."""
    overlaps = basis.T @ classes.basis
    nearest = overlaps.gather(1, overlaps.abs().argmax(dim=1, keepdim=True))
    return replace(classes, basis=torch.where(nearest < 0, -classes.basis, classes.basis))


def _described(coding: _Coding, x: Tensor, assigned: Tensor, parent: Tensor, spare: Tensor | None = None) -> _Classes:
    """Mean and shrunk covariance of each class: towards its parent's, and that towards the pooled one, each scaled.

    assigned: the class [n] of each window; parent: of each class; spare: windows at which empty classes start anew.
    """
    count, num_values = len(parent), x.shape[1]
    n = torch.bincount(assigned, minlength=count).double()
    mean = torch.zeros(count, num_values, dtype=torch.float64).index_add(0, assigned, x) / n.clamp(min=1).unsqueeze(-1)
    scatter = torch.zeros(count, num_values, num_values, dtype=torch.float64)
    for index in range(count):
        centred = x[assigned == index] - mean[index]
        scatter[index] = centred.T @ centred
    # With a floor: of few different windows, classes hold each exactly.
    pooled = scatter.sum(dim=0) / len(x) + LEAST_VARIANCE * torch.eye(num_values, dtype=torch.float64)
    pooled = mixed(pooled, coding.sizes.chunk_length, coding.separable_share)
    energy = float(_trace(pooled))
    parent_weight, class_weight = coding.shrinkage(_SHRINK_PARENT), coding.shrinkage(_SHRINK_CLASS)
    parents = int(parent.max()) + 1
    of_parent = torch.zeros(parents, num_values, num_values, dtype=torch.float64).index_add(0, parent, scatter)
    n_parent = torch.zeros(parents, dtype=torch.float64).index_add(0, parent, n)
    e_parent = (_trace(of_parent) / n_parent.clamp(min=1)).clamp(min=1e-4 * energy)
    of_parent = of_parent + parent_weight * pooled * (e_parent / energy)[:, None, None]
    of_parent /= (n_parent + parent_weight)[:, None, None]
    wanted = (_trace(scatter) + _SHRINK_ENERGY * _trace(of_parent)[parent]) / (n + _SHRINK_ENERGY)
    scaled = wanted.clamp(min=1e-4 * energy) / _trace(of_parent)[parent]
    variances = torch.empty(count, coding.latents, dtype=torch.float64)
    basis = torch.empty(count, num_values, coding.latents, dtype=torch.float64)
    for index in range(count):
        prior = of_parent[parent[index]] * scaled[index]
        covariance = (scatter[index] + class_weight * prior) / (n[index] + class_weight)
        variances[index], basis[index] = eigen(covariance, coding.latents)
    if spare is not None:
        empty = n < 3
        mean[empty] = spare[: int(empty.sum())]
    return _Classes(mean, basis, variances)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _lloyd(
    coding: _Coding, x: Tensor, start: tuple[Tensor, Tensor], generator: torch.Generator, progress: "tqdm[NoReturn]"
) -> Tensor:
    """Describe the classes, give each window to the one that codes it best, and again.

    start: the class [n] of each window, and the parent of each class.
    """
    assigned, parent = start
    count, spare = len(parent), None
    for _ in range(_ROUNDS):
        costs = coding.costs(x, _described(coding, x, assigned, parent, spare))
        least, assigned = costs.min(dim=1)
        # Where a class is left empty, it starts anew at a window that is coded badly.
        worst = least.topk(min(4 * count, len(x))).indices
        spare = x[worst[torch.randperm(len(worst), generator=generator)]]
        progress.update()
    return assigned


def _rescaled(classes: _Classes, x: Tensor, chosen: Tensor) -> _Classes:
    """With the variances that held-out windows of each class have, shrunk to the training's times a factor by rank."""
    learned = len(classes.mean)
    kept = chosen < learned
    x, chosen = x[kept], chosen[kept]
    squares = torch.zeros_like(classes.variances)
    for index in range(learned):
        z = (x[chosen == index] - classes.mean[index]) @ classes.basis[index]
        squares[index] = z.square().sum(dim=0)
    n = torch.bincount(chosen, minlength=learned).double().unsqueeze(-1)
    factor = ((squares / classes.variances).sum(dim=0) / n.sum().clamp(min=1)).clamp(0.8, 6)
    variances = (_SHRINK_SCALE * classes.variances * factor + squares) / (_SHRINK_SCALE + n)
    return _Classes(classes.mean, classes.basis, variances.clamp(min=LEAST_VARIANCE))


def _gains(x: Tensor, chosen: Tensor, classes: _Classes, latents: int) -> Tensor:
    """Least-squares gain [C, M, MOST_BITS + 1] of each number of bits, shrunk to that of all classes at this rank."""
    count = len(classes.mean)
    products = torch.zeros(2, count, latents, MOST_BITS + 1, dtype=torch.float64)
    for index in range(count):
        z = (x[chosen == index] - classes.mean[index]) @ classes.basis[index][:, :latents]
        scale = classes.variances[index, :latents].sqrt()
        y = torch.tanh(z / (WIDTH * scale))
        for bits in range(1, MOST_BITS + 1):
            level = WIDTH * torch.atanh(cell_middles(y, bits))
            products[0, index, :, bits] = (z / scale * level).sum(dim=0)
            products[1, index, :, bits] = level.square().sum(dim=0)
    pooled = products.sum(dim=1, keepdim=True) / max(len(x), 1)
    pooled = (pooled + pooled.mean(dim=2, keepdim=True)) / 2
    top, bottom = products + _SHRINK_GAIN * pooled
    gain = torch.where(bottom > 0, top / bottom.clamp(min=1e-12), 1.0)
    for bits in range(MOST_BITS + 1):
        gain[..., bits] = gain[..., bits].clamp(*gain_range(bits))
    return gain


def _weights(code: ChunkCode, x: Tensor, chosen: Tensor) -> Tensor:
    """One over the mean error at each budget."""
    errors = torch.zeros(len(code.budgets), dtype=torch.float64)
    for values, classes in zip(batches(x, code.sizes), batches(chosen, code.sizes), strict=True):
        tokens = code.encode_in(values, classes)
        errors += torch.stack([(code.decode(tokens[:, :budget]) - values).square().sum() for budget in code.budgets])
    return (len(x) / errors.clamp(min=len(x) * _LEAST_ERROR)).float()
