"""What brings the actions of a robot into [-1, 1], beyond which chunk tokens say nothing.

A range is a property of the robot, not a statistic: it is that of all episodes, those that judge among them, and some
more. In a class it costs nothing, since latents are scaled to their deviations; only the bound of escape grows with it.
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
from rfsq.runtime.bundle.paths import counted

#: Of its span, what a range has beyond the lowest and the highest action: new episodes reach farther.
_HEADROOM = 0.1
#: So many times wider, the range of a dimension makes its bound so many times larger.
_FAR = 4.0
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
    episodes = counted(len(dataset.episodes), "episode")
    return _with_headroom(ends), (
        f"normaliser: {kind}, {why}; the range is that of all {episodes}, and {_HEADROOM:.0%} of it more on either side"
    )


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


def _with_headroom(ends: FloatArray) -> Normaliser:
    low, high = ends.min(axis=0).astype(np.float64), ends.max(axis=0).astype(np.float64)
    more = _HEADROOM * (high - low)
    wider = np.stack([low - more, high + more]).astype(np.float32)
    return _covering(fit_normaliser(wider, NormaliserKind.MIN_MAX, untouched(ends)), ends)


def _covering(normaliser: Normaliser, ends: FloatArray) -> Normaliser:
    """With scales rounded up: what lies beyond [-1, 1] by rounding alone would err by more than the bound."""
    reach: npt.NDArray[np.float64] = np.abs(ends.astype(np.float64) - normaliser.offset).max(axis=0)
    scale = np.where(
        reach > normaliser.scale, np.nextafter(reach.astype(np.float32), np.float32(np.inf)), normaliser.scale
    )
    return replace(normaliser, scale=tuple(scale.tolist()))


def _ends(dataset: ActionDataset) -> FloatArray:
    """The lowest and the highest action of each dimension in each episode: [2 * episodes, A]."""
    return np.stack([end(episode, axis=0) for episode in dataset.episodes for end in (np.min, np.max)])
