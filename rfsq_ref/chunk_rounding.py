"""How far float32 rounding can move what chunk tokens are decided by: latents, costs of classes, errors at budgets.

The model of rounding is that of `rounding.py`: variances in units of u^2 are carried through the formulas to first
order, and a bound is DEVIATIONS standard deviations. Each formula is one of `export/chunk_plan.py`; covered are also
`rfsq_ref/chunk_code.py` in float32, and sums in any order that does not depend on their terms. Not covered, and meant
to be noticed: TF32, half precision, perturbed constants, and a mean that is folded into the product with the basis.

What is decided on has jumps: a latent near the edge of a cell may be in either, and then errors at the budgets are
others. So costs and errors are intervals, of rounding and of all cells that a latent may be in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkCode
from rfsq.rfsq_ref.chunk_escape import escape_bound
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.rounding import DEVIATIONS, FUNCTION, UNDERFLOW, UNIT, summation_variance

#: Error of a value of escape: the reference itself rounds in float64, and numbers near zero vanish beside 1.
_FLOAT64 = 2.0**-48


@dataclass(frozen=True, eq=False)
class Chunks:
    """values: float64 [n, N], normalised and clipped to [-1, 1]; variance: [n, N], of what float32 makes of them."""

    values: Tensor
    variance: Tensor

    def __getitem__(self, rows: Tensor) -> "Chunks":
        return Chunks(self.values[rows], self.variance[rows])

    @property
    def slack(self) -> Tensor:
        """The bound on the error of values, [n, N]."""
        return (DEVIATIONS * UNIT * self.variance.sqrt()).clamp(min=_FLOAT64)


def normalised_chunks(tokenizer: ChunkTokenizer, actions: Tensor) -> Chunks:
    """actions: float64 [n, T, A] in robot units, of a float64 tokenizer; raises ValueError for another dtype."""
    if actions.dtype is not torch.float64 or tokenizer.offset.dtype is not torch.float64:
        raise ValueError(
            f"error bounds need float64 reference and actions; got {tokenizer.offset.dtype} and {actions.dtype}"
        )
    values = tokenizer.normalised(actions)
    # The offset, the unit, and their quotient or product.
    variance = 3 * values**2 + UNDERFLOW**2
    # What is surely beyond an end is clipped to that end, exactly.
    is_clipped = values.abs() - DEVIATIONS * UNIT * variance.sqrt() > 1
    return Chunks(values.clamp(-1, 1), variance.masked_fill(is_clipped, 0))


@dataclass(frozen=True, eq=False)
class Spread:
    """The latents of one class as they are decoded at one budget, each [n, M].

    decoded: of the cell that the latent is in; low, high: of the lowest and the highest cell that it may be in;
    are_neighbours: whether these are one cell, or side by side; variance: of what float32 makes of `decoded`.
    """

    decoded: Tensor
    low: Tensor
    high: Tensor
    are_neighbours: Tensor
    variance: Tensor

    @property
    def shift(self) -> Tensor:
        """How far another cell's may be from `decoded`."""
        return torch.maximum(self.high - self.decoded, self.decoded - self.low)


@dataclass(frozen=True, eq=False)
class Latents:
    """One class's latents of n chunks.

    centred [n, N]: chunks less the mean; moved [n, N]: the variance of that; z [n, M]; own [n, M]: the variance that
    the product with the basis adds; error [n, M]: the bound on z; y [n, M]: companded, in [-1, 1]; slack [n, M]: the
    bound on y + 1, what the digits are taken from.
    """

    centred: Tensor
    moved: Tensor
    z: Tensor
    own: Tensor
    error: Tensor
    y: Tensor
    slack: Tensor

    def __getitem__(self, rows: Tensor) -> "Latents":
        return Latents(*(part[rows] for part in vars(self).values()))

    def digits(self, slacks: float = 0.0) -> Tensor:
        """The MOST_BITS binary digits int64 [n, M] of y moved by so many times its slack."""
        place = (self.y + slacks * self.slack + 1) * 2.0 ** (MOST_BITS - 1)
        return torch.floor(place).clamp(0, 2**MOST_BITS - 1).long()


def latents_of(code: ChunkCode, chunks: Chunks, index: int) -> Latents:
    """Of the class `index`, which is not escape."""
    basis, inverse_width = code.basis[index], 1 / (WIDTH * code.scale[index])
    centred = chunks.values - code.mean[index]
    z, squares = centred @ basis, centred**2 @ basis**2
    moved = chunks.variance + centred**2
    own = summation_variance(len(basis), z, squares) + squares + len(basis) * UNDERFLOW**2
    variance = own + moved @ basis**2
    t = z * inverse_width
    # WIDTH, its product with the scale, and the quotient; folded there is less.
    t_variance = variance * inverse_width**2 + 3 * t**2
    # The largest slope of tanh in the interval of error, not the one at its centre.
    nearest = (t.abs() - DEVIATIONS * UNIT * t_variance.sqrt()).clamp(min=0)
    slope = 1 - torch.tanh(nearest) ** 2
    y = torch.tanh(t)
    # tanh is one of exp as a rule, whose error is one of units of 1. Then 1 is added, which rounds too.
    y_variance = slope**2 * t_variance + FUNCTION**2 + (y + 1) ** 2
    return Latents(
        centred=centred,
        moved=moved,
        z=z,
        own=own,
        error=DEVIATIONS * UNIT * variance.sqrt(),
        y=y,
        slack=DEVIATIONS * UNIT * y_variance.sqrt(),
    )


def _spread(code: ChunkCode, latents: Latents, index: int, budget: int) -> Spread:
    """Of the class `index`, at the budget of this place in `code.budgets`."""
    count = code.counts[budget, index]
    gain = code.gain[index].gather(1, count.unsqueeze(1)).squeeze(1)
    width = WIDTH * gain * code.scale[index]
    low, middle, high = (latents.digits(slacks) >> MOST_BITS - count for slacks in (-1, 0, 1))
    level = _atanh_of(middle, count)
    decoded = width * level
    least, most = decoded.clone(), decoded.clone()
    moves = high > low
    for cells, found in ((low, least), (high, most)):
        found[moves] = width.expand_as(found)[moves] * _atanh_of(cells[moves], count.expand_as(cells)[moves])
    # An error of a library may lean to one side, in all latents and at all budgets (`rounding.py` says why so much).
    shared = max(1.0, level.shape[1] * len(code.budgets) / DEVIATIONS**2)
    # atanh, as a logarithm, errs in units of 1; the width has three roundings before its product.
    variance = shared * (width * FUNCTION * level.abs().clamp(min=1)) ** 2 + 4 * decoded**2
    return Spread(decoded, least, most, high - low <= 1, variance)


def _atanh_of(cells: Tensor, count: Tensor) -> Tensor:
    """Of the middle of cells, numbered among 2^count in (-1, 1)."""
    return torch.atanh((2 * cells + 1) / torch.exp2(count.double()) - 1)


@dataclass(frozen=True, eq=False)
class CostInterval:
    """cost: float64 [n]; low, high: [n], between which float32's lies."""

    cost: Tensor
    low: Tensor
    high: Tensor


def cost_interval(code: ChunkCode, latents: Latents, index: int) -> CostInterval:
    """What a class costs (`ChunkCode.costs`)."""
    z = latents.z
    cost, low, high, variance, fourth = z.new_zeros(5, len(z))
    gradient = torch.zeros_like(z)
    for budget, weight in enumerate(code.weights):
        spread = _spread(code, latents, index, budget)
        errors = torch.stack((z - spread.decoded, z - spread.low, z - spread.high))
        squares = errors**2
        least = squares.amin(dim=0).where(spread.are_neighbours, 0)
        most = squares.amax(dim=0)
        own = spread.variance + most
        # Of second order, and where another cell has another slope.
        beyond = latents.error**2 + (DEVIATIONS * UNIT) ** 2 * own + 2 * spread.shift * latents.error
        cost += weight * squares[0].sum(dim=1)
        low += weight * (least - beyond).sum(dim=1)
        high += weight * (most + beyond).sum(dim=1)
        gradient += 2 * weight * errors[0]
        # What is decoded and the difference; then the square and the weight.
        variance += weight**2 * (4 * most * own + 2 * most**2).sum(dim=1)
        fourth += weight**2 * (most**2).sum(dim=1)
    variance += summation_variance(z.shape[1] * len(code.budgets), high, fourth)
    # Where there are as many latents as values, they hold all.
    total = code.weights.sum() * (z.shape[1] < code.sizes.num_values)
    rest, rest_variance = _rest(latents)
    beyond = total * (latents.error**2).sum(dim=1)
    cost, low, high = (part + total * rest for part in (cost, low - beyond, high + beyond))
    variance += total**2 * (rest_variance + (len(code.budgets) + 1) * rest**2)
    gradient -= 2 * total * z
    # An error of a value of the chunk moves all latents, and what none holds.
    of_centred = gradient @ code.basis[index].T + 2 * total * latents.centred
    variance += (gradient**2 * latents.own).sum(dim=1) + (of_centred**2 * latents.moved).sum(dim=1)
    bound = DEVIATIONS * UNIT * variance.sqrt()
    return CostInterval(cost, low - bound, high + bound)


def _rest(latents: Latents) -> tuple[Tensor, Tensor]:
    """What no latent holds, [n], and the variance of the squares and sums that give it."""
    variance = torch.zeros(len(latents.z), dtype=latents.z.dtype)
    sums = []
    for values in (latents.centred, latents.z):
        squares = values**2
        sums.append(squares.sum(dim=1))
        fourth = (squares**2).sum(dim=1)
        variance += summation_variance(values.shape[1], sums[-1], fourth) + fourth
    rest = (sums[0] - sums[1]).clamp(min=0)
    return rest, variance + rest**2


def keep_excess(code: ChunkCode, chunks: Chunks, latents: Latents, index: int) -> tuple[Tensor, Tensor]:
    """By how much a class errs more than escape may, at the value and budget where that is most of its bound: [n].

    And the bound [n], by rounding and cells. A class surely keeps escape's bound where excess <= -bound, may keep it
    where excess <= bound, and never keeps it elsewhere: then one budget where it does not is enough to know.
    """
    basis, mean = code.basis[index], code.mean[index]
    excess, bound = torch.full_like(latents.z[:, 0], -torch.inf), torch.ones_like(latents.z[:, 0])
    rows = torch.arange(len(excess))
    # The last budgets are the narrowest.
    for budget in reversed(range(len(code.budgets))):
        limit = escape_bound(code.budget_bits[budget], code.sizes.num_values)
        spread = _spread(code, latents[rows], index, budget)
        decoded = spread.decoded @ basis.T + mean
        squares = spread.decoded**2 @ (basis**2).T
        variance = summation_variance(basis.shape[1] + 1, decoded, squares + mean**2) + squares
        error = (decoded.clamp(-1, 1) - chunks.values[rows]).abs()
        variance += spread.variance @ (basis**2).T + chunks.variance[rows] + error**2 + limit**2
        may_move = DEVIATIONS * UNIT * variance.sqrt() + spread.shift @ basis.abs().T
        worst = ((error - limit) / may_move).argmax(dim=1, keepdim=True)
        found = [part.gather(1, worst).squeeze(1) for part in (error - limit, may_move)]
        is_worse = found[0] / found[1] > excess[rows] / bound[rows]
        excess[rows[is_worse]], bound[rows[is_worse]] = found[0][is_worse], found[1][is_worse]
        rows = rows[excess[rows] <= bound[rows]]
    return excess, bound


@dataclass(frozen=True, eq=False)
class Choice:
    """What the class of n chunks is decided by, each [n, C - 1].

    cost, low, high: see `CostInterval`; excess, bound: see `keep_excess`. Classes that cost too much for that to matter
    are not asked whether they keep escape's bound: they may.
    """

    cost: Tensor
    low: Tensor
    high: Tensor
    excess: Tensor
    bound: Tensor

    def acceptable(self) -> Tensor:
        """Which classes float32 may choose: bool [n, C], escape the last.

        One that may keep escape's bound, where none that surely keeps it surely costs less; escape, where none surely
        keeps it.
        """
        surely = self.excess <= -self.bound
        least = self.high.where(surely, torch.inf).amin(dim=1, keepdim=True)
        may = (self.excess <= self.bound) & (self.low <= least)
        return torch.cat((may, ~surely.any(dim=1, keepdim=True)), dim=1)

    def margins(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How far the next class is from taking over from those `chosen` [n], and by how much float32 may move that.

        Both [n]: shares of the costs, or of the normalised range where errors at the budgets decide.
        """
        own = chosen.clamp(max=self.cost.shape[1] - 1).unsqueeze(1)
        escaped = (chosen == self.cost.shape[1]).unsqueeze(1)
        is_own = (torch.arange(self.cost.shape[1]) == own) & ~escaped
        gap = (self.cost - self.cost.gather(1, own)).clamp(min=0)
        gap_bound = self.high.gather(1, own) - self.cost.gather(1, own) + self.cost - self.low
        scale = self.cost + gap_bound
        # Another class takes over where it keeps the bound and costs less (escape gives way to any that keeps it); the
        # chosen one gives way where it does not keep it.
        by_bound = torch.where(is_own, -self.excess, self.excess).clamp(min=0)
        by_cost = (gap / gap_bound > by_bound / self.bound) & ~is_own & ~escaped
        margin = torch.where(by_cost, gap / scale, by_bound)
        bound = torch.where(by_cost, gap_bound / scale, self.bound)
        nearest = (margin / bound).argmin(dim=1, keepdim=True)
        return margin.gather(1, nearest).squeeze(1), bound.gather(1, nearest).squeeze(1)


def choice(code: ChunkCode, chunks: Chunks) -> Choice:
    """What float32 may make of the choice of a class."""
    classes = range(code.sizes.escape)
    found = [cost_interval(code, latents_of(code, chunks, index), index) for index in classes]
    cost, low, high = (torch.stack([getattr(part, name) for part in found], dim=1) for name in ("cost", "low", "high"))
    excess, bound = torch.zeros_like(cost), torch.ones_like(cost)

    def ask(asked: Tensor) -> None:
        for index in classes:
            rows = asked[:, index].nonzero()[:, 0]
            if len(rows):
                part = chunks[rows]
                excess[rows, index], bound[rows, index] = keep_excess(code, part, latents_of(code, part, index), index)

    # The cheapest nearly always keeps the bound: then only those of about its cost are of interest.
    cheapest = high.argmin(dim=1, keepdim=True)
    is_cheapest = torch.arange(len(classes)) == cheapest
    ask(is_cheapest)
    surely = (excess <= -bound).gather(1, cheapest)
    ask(((low <= high.gather(1, cheapest)) | ~surely) & ~is_cheapest)
    return Choice(cost, low, high, excess, bound)
