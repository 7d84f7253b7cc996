"""What brings the actions of a robot into [-1, 1], beyond which chunk tokens say nothing.

A range is a property of the robot, not a statistic: it is that of all episodes, those that judge among them, and some
more. In a class it costs nothing, since latents are scaled to their deviations; only the bound of escape grows with it.
With a range of twice the width, errors of the embedded demonstrations are the same to 1 % at every budget.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rfsq.calibration.settings import ChunkNormaliser
from rfsq.rfsq_ref.data import ActionDataset, FloatArray
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.normaliser import (
    Normaliser,
    fit_normaliser,
    fits_unnormalised,
    read_normaliser,
    reasons_to_normalise,
    untouched,
)
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.arrays import last_rounding
from rfsq.runtime.bundle.paths import counted

#: How many times wider than what was seen a range is at least: a tenth of its span on either side.
_LEAST_HEADROOM = 1.2
#: Of the episodes to come, those that shall lie within the range.
_COVERED = 0.9
#: So many times wider, the range of a dimension costs two bits of every action in escape.
_FAR = 4.0
#: In units of its movement, up to which a dimension has float32 positions that are close enough (docs/building.md).
_FAR_FROM_ZERO = 1000.0
_LIMIT = 1.0


def chunk_normaliser(dataset: ActionDataset, wanted: ChunkNormaliser | str) -> tuple[Normaliser | None, str]:
    """The normaliser, and a line that says why. wanted: a choice, or the path of a JSON file as per-step builds take.

    Raises DataError for a file that is none, or of another robot.
    """
    if not isinstance(wanted, ChunkNormaliser):
        return _of_file(dataset, wanted)
    ends = _ends(dataset)
    reasons = reasons_to_normalise(ends, _LIMIT)
    kind, why = wanted, "as asked"
    if wanted is ChunkNormaliser.AUTO:
        kind = ChunkNormaliser.MIN_MAX if reasons else ChunkNormaliser.NONE
        why = f"chosen by auto: {' and '.join(reasons) or fits_unnormalised(_LIMIT)}"
    if kind is ChunkNormaliser.NONE:
        return None, f"normaliser: {kind}, {why}"
    headroom, episodes = _headroom(ends), counted(len(dataset.episodes), "episode")
    since = ", since one in ten reached so far beyond the others" if headroom > _LEAST_HEADROOM else ""
    kept = untouched(ends)
    found = _covering(fit_normaliser(ends, NormaliserKind.MIN_MAX, kept), ends, headroom, kept)
    return found, f"normaliser: {kind}, {why}; the range is {headroom:.3g} times that of all {episodes}{since}"


def far_episode_warning(dataset: ActionDataset) -> str:
    """A warning about a single episode that makes the range of a dimension several times wider; else empty."""
    ends = _ends(dataset).reshape(len(dataset.episodes), 2, -1).astype(np.float64)
    span = np.ptp(ends, axis=(0, 1))
    farthest = {*ends[:, 0].argmin(axis=0).tolist(), *ends[:, 1].argmax(axis=0).tolist()}
    for index in sorted(farthest) if len(ends) > 1 else ():
        others = np.ptp(np.delete(ends, index, axis=0), axis=(0, 1))
        far = np.flatnonzero((others > 0) & (span > _FAR * others))
        if far.size:
            return (
                f"WARNING: {dataset.dimension(far[0])} spans {span[far[0]]:.3g} by episode {dataset.names[index]!r}, "
                f"without it {others[far[0]]:.3g}: its motion counts for less beside the others', and its bound is "
                "larger; repair or drop that episode if it is wrong"
            )
    return ""


def far_from_zero_warning(normaliser: Normaliser) -> str:
    """A warning about a dimension that moves little where float32 is coarse; else empty."""
    offset, scale = np.array(normaliser.offset), np.array(normaliser.scale)
    distance = np.abs(offset) / scale
    far = int(distance.argmax())
    if distance[far] <= _FAR_FROM_ZERO:
        return ""
    return (
        f"WARNING: dimension {far} lies {distance[far]:.3g} times as far from zero as it moves: float32 rounds its "
        f"actions by up to {last_rounding(offset, scale)[far]:.3g}, recorded and decoded, and tokens can do nothing "
        "about it; take what it rests at off its actions"
    )


def _of_file(dataset: ActionDataset, path: str) -> tuple[Normaliser, str]:
    name = Path(path).name
    if not Path(path).exists():
        raise DataError(
            f"normaliser is {path!r}; expected one of {', '.join(ChunkNormaliser)}, or a JSON file with kind, offset "
            "and scale, and there is no such file"
        )
    normaliser = read_normaliser(path)
    if len(normaliser.scale) != dataset.action_dim:
        raise DataError(
            f"{name} is for {counted(len(normaliser.scale), 'dimension')}, {dataset.source} has {dataset.action_dim}; "
            "give the normaliser of this robot"
        )
    return normaliser, f"normaliser: that of {name}, as asked"


def _headroom(ends: FloatArray) -> float:
    """How far nine in ten of the next episodes reach, as a multiple of the range of those seen: as far as nine in ten
    of these reach in the range of the others, each in the dimension where it is farthest. From `_LEAST_HEADROOM` to
    `_FAR`.

    That much was needed, to a few hundredths, of 10, 20 and 40 episodes of a humanoid, of two arms and of the embedded
    ones.
    """
    low, high = ends[::2].astype(np.float64), ends[1::2].astype(np.float64)
    if len(low) < 2:
        return _LEAST_HEADROOM
    others_low, others_high = -_largest_of_others(-low), _largest_of_others(high)
    half, middle = (others_high - others_low) / 2, (others_high + others_low) / 2
    # Where the others rest, nothing says how far is far.
    reach = np.maximum(high - middle, middle - low) / np.where(half > 0, half, np.inf)
    return float(np.clip(np.quantile(reach.max(axis=1), _COVERED), _LEAST_HEADROOM, _FAR))


def _largest_of_others(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each row of values [n, A], the largest in the other rows: [n, A]."""
    second, first = np.sort(values, axis=0)[-2:]
    found: npt.NDArray[np.float64] = np.where(values == first, second, first)
    return found


def _covering(normaliser: Normaliser, ends: FloatArray, headroom: float, kept: tuple[int, ...]) -> Normaliser:
    """So many times wider, but for the dimensions that are kept. Rounded up: what lies beyond [-1, 1] by rounding alone
    would err by more than the bound."""
    reach = np.abs(ends.astype(np.float64) - normaliser.offset).max(axis=0)
    scale = np.where(
        reach > normaliser.scale, np.nextafter(reach.astype(np.float32), np.float32(np.inf)), normaliser.scale
    ).astype(np.float64)
    wider = np.full(len(scale), headroom)
    wider[list(kept)] = 1.0
    return replace(normaliser, scale=tuple((scale * wider).astype(np.float32).tolist()))


def _ends(dataset: ActionDataset) -> FloatArray:
    """The lowest and the highest action of each dimension in each episode: [2 * episodes, A]."""
    return np.stack([end(episode, axis=0) for episode in dataset.episodes for end in (np.min, np.max)])
