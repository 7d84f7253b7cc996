"""Whether to train on normalised actions: what `auto` chooses for a dataset, and why."""

import numpy as np
import numpy.typing as npt

from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.paths import counted, shortlist

#: Largest action and smallest half range of a moving dimension that the published recipe, which does not normalise,
#: learns well: beyond 2 the error of one dimension drowns the others, below 0.1 it is drowned.
UNNORMALISED_LIMIT, UNNORMALISED_RANGE = 2.0, 0.1


def suggested_normaliser(dataset: ActionDataset) -> NormaliserKind | None:
    """`min-max` where the training episodes are not of about unit size, None where the published recipe fits.

    `min-max`, because a dimension that rarely moves has quantiles without a range between them.
    """
    is_large, is_narrow = _unfit(split_episodes(dataset).train.steps())
    return NormaliserKind.MIN_MAX if (is_large | is_narrow).any() else None


def _unfit(steps: FloatArray) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """bool [A] each: dimensions that reach too far for the published recipe, and those that move too little."""
    return np.abs(steps).max(axis=0) > UNNORMALISED_LIMIT, _moves_less_than(steps, UNNORMALISED_RANGE)


def untouched(steps: FloatArray) -> tuple[int, ...]:
    """The last dimension where it is a gripper command that has unit size already, like -1 and 1 or 0 and 1."""
    last = steps[:, -1:]
    return (-1,) if np.abs(last).max() <= 1 and not _moves_less_than(last, 0.5).any() else ()


def _moves_less_than(steps: FloatArray, half_range: float) -> npt.NDArray[np.bool_]:
    """bool [A]: dimensions that move, but not as much; one that never moves needs no precision."""
    ranges = steps.max(axis=0).astype(np.float64) - steps.min(axis=0)
    moves_less: npt.NDArray[np.bool_] = (ranges > 0) & (ranges < 2 * half_range)
    return moves_less


def chosen_normaliser(name: str, dataset: ActionDataset) -> NormaliserKind | None:
    """What `auto`, `none` or a kind's name means for this dataset. ValueError for other names."""
    if name == "auto":
        return suggested_normaliser(dataset)
    return None if name == "none" else NormaliserKind(name)


def describe(dataset: ActionDataset, normaliser: str) -> str:
    """What is about to be trained on, and how its actions are normalised, by the name that was given, and why."""
    return (
        f"training on {dataset.source}: {counted(len(dataset.episodes), 'episode')}, "
        f"{counted(dataset.num_steps, 'step')}, split by episode\n"
        f"{describe_normaliser(dataset, normaliser)}"
    )


def describe_normaliser(dataset: ActionDataset, name: str) -> str:
    """What `auto` has chosen for this dataset and why, or what was asked for."""
    chosen = chosen_normaliser(name, dataset) or "none"
    if name != "auto":
        return f"normaliser: {chosen}, as asked"
    steps = split_episodes(dataset).train.steps()
    is_large, is_narrow = _unfit(steps)
    reasons = []
    if is_large.any():
        reasons.append(f"{_of_dimensions(is_large, 'reaches', 'reach')} beyond {UNNORMALISED_LIMIT:g}")
    if is_narrow.any():
        narrow = _of_dimensions(is_narrow, "spans", "span")
        reasons.append(f"{narrow} less than {2 * UNNORMALISED_RANGE:g}, from its lowest to its highest action")
    why = " and ".join(reasons) or (
        f"all actions lie within {UNNORMALISED_LIMIT:g} and every dimension that moves spans "
        f"{2 * UNNORMALISED_RANGE:g} or more, as the published recipe expects"
    )
    parts = [f"normaliser: {chosen}, chosen by auto: {why}"]
    if reasons:
        gripper = ", but for the last, taken for a gripper command by its unit size: a joint belongs in another place"
        last = gripper if untouched(steps) else ""
        parts.append(f"every dimension is rescaled, those of unit size too{last}")
    is_still = np.ptp(steps, axis=0) == 0
    if is_still.any():
        parts.append(_of_dimensions(is_still, "never moves", "never move"))
    return "; ".join(parts)


def _of_dimensions(found: npt.NDArray[np.bool_], verb: str, verbs: str) -> str:
    """Such as `dimension 3 never moves`; verbs: of several."""
    numbers = np.flatnonzero(found).tolist()
    listed = shortlist(numbers)
    return f"dimension {listed} {verb}" if len(numbers) == 1 else f"dimensions {listed} {verbs}"
