"""Per-dimension affine normalisation of actions: normalised = (physical - offset) / scale.

And whether to train on normalised actions: what `auto` chooses for a dataset, and why.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.models import LARGEST_UNIT, LEAST_UNIT
from rfsq.runtime.bundle.paths import as_path, counted, shortlist
from rfsq.runtime.bundle.reading import build, read_json

#: `quantile` maps these two quantiles onto -1 and 1, as the OpenVLA and pi0 data statistics do.
QUANTILES = (0.01, 0.99)
#: float32 rounds numbers of this size by 1e-6, the most by which rounding alone may move a normalised action.
_FAR = 16.0
#: Of a file, in bytes. The numbers of the widest model take half of it.
_SIZE_LIMIT = 2**22
#: Largest action and smallest half range of a moving dimension that the published recipe, which does not normalise,
#: learns well: beyond 2 the error of one dimension drowns the others, below 0.1 it is drowned.
UNNORMALISED_LIMIT, UNNORMALISED_RANGE = 2.0, 0.1


@dataclass(frozen=True)
class Normaliser:
    """An affine map of each action dimension.

    offset, scale: one number per action dimension in the robot's units; untouched dimensions have 0 and 1."""

    kind: NormaliserKind
    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.scale) or not self.offset:
            raise DataError(
                f"normaliser with {len(self.offset)} offsets and {len(self.scale)} scales; expected one of each for "
                "each dimension"
            )
        # The model holds float32 numbers: what is finite and above 0 in float64 may be infinite or 0 there.
        with np.errstate(over="ignore"):
            offset, scale = np.array(self.offset, np.float32), np.array(self.scale, np.float32)
        if not (np.isfinite(offset).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise DataError(
                f"normaliser offset {shortlist(self.offset)} and scale {shortlist(self.scale)}; expected finite "
                "float32 numbers, and every scale positive: fit it again or correct the file"
            )
        for dimension, unit in enumerate(self.scale):
            if not LEAST_UNIT <= unit <= LARGEST_UNIT:
                raise DataError(
                    f"dimension {dimension} lies around {self.offset[dimension]:.3g}, within {unit:.3g}; expected a "
                    f"scale from {LEAST_UNIT:g} to {LARGEST_UNIT:g}, which a bundle holds: use other units"
                )

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind.value, "offset": list(self.offset), "scale": list(self.scale)}


def fit_normaliser(
    actions: npt.NDArray[np.float32], kind: NormaliserKind, untouched: Sequence[int] = (-1,)
) -> Normaliser:
    """Fit to actions [N, A]; `untouched` dimensions (the gripper, last by default) keep offset 0 and scale 1.

    A dimension that moves by less than float32 resolves gets scale 1, or more where it rests far from zero, so that
    normalised actions stay finite. The numbers are exact in float32, because engines fold float32 numbers.

    >>> fit_normaliser(np.array([[0.0, 1.0], [4.0, -1.0]], np.float32), NormaliserKind.MIN_MAX)
    Normaliser(kind=<NormaliserKind.MIN_MAX: 'min-max'>, offset=(2.0, 0.0), scale=(2.0, 1.0))
    """
    values = actions.astype(np.float64)
    if kind is NormaliserKind.MEAN_STD:
        offset, scale = values.mean(axis=0), values.std(axis=0)
    else:
        bounds = (0.0, 1.0) if kind is NormaliserKind.MIN_MAX else QUANTILES
        low, high = np.quantile(values, bounds, axis=0)
        offset, scale = (low + high) / 2, (high - low) / 2
    float32 = np.finfo(np.float32)
    moves = scale > np.maximum(float32.eps * np.abs(offset), float32.tiny)
    scale = np.where(moves, scale, np.maximum(1.0, np.abs(offset) / _FAR))
    for dimension in untouched:
        offset[dimension], scale[dimension] = 0.0, 1.0
    return Normaliser(kind, *(tuple(numbers.astype(np.float32).tolist()) for numbers in (offset, scale)))


def normaliser_from_json(fields: Any) -> Normaliser:
    """From `{"kind", "offset", "scale"}` among other keys; raises DataError naming what is missing or wrong."""
    known = Normaliser.__dataclass_fields__
    given = {name: fields[name] for name in known if name in fields} if isinstance(fields, dict) else fields
    try:
        return build(Normaliser, given, "it")
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f'normaliser needs "kind" ({", ".join(NormaliserKind)}), "offset" and "scale", each a list of float32 '
            f"numbers; found: {error}"
        ) from error


def read_normaliser(path: str | os.PathLike[str]) -> Normaliser:
    """From a JSON file with `kind`, `offset` and `scale`. Raises DataError."""
    path = as_path(path, "the normaliser", DataError)
    try:
        return normaliser_from_json(read_json(path, _SIZE_LIMIT))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable JSON file: {error}; give a file with kind, offset and scale"
        ) from error


# What a training chooses ----------------------------------------------------------------------------------------------


def suggested_normaliser(dataset: ActionDataset) -> NormaliserKind | None:
    """`min-max` where the training episodes are not of about unit size, None where the published recipe fits.

    `min-max`, because a dimension that rarely moves has quantiles without a range between them.
    """
    return NormaliserKind.MIN_MAX if reasons_to_normalise(split_episodes(dataset).train.steps()) else None


def reasons_to_normalise(steps: FloatArray, limit: float = UNNORMALISED_LIMIT) -> list[str]:
    """Why actions [N, A] should be normalised: which dimensions reach beyond `limit`, and which move too little; empty
    where there is no reason."""
    is_large, is_narrow = np.abs(steps).max(axis=0) > limit, _moves_less_than(steps, UNNORMALISED_RANGE)
    reasons = []
    if is_large.any():
        reasons.append(f"{_of_dimensions(is_large, 'reaches', 'reach')} beyond {limit:g}")
    if is_narrow.any():
        narrow = _of_dimensions(is_narrow, "spans", "span")
        reasons.append(f"{narrow} less than {2 * UNNORMALISED_RANGE:g}, from its lowest to its highest action")
    return reasons


def fits_unnormalised(limit: float = UNNORMALISED_LIMIT) -> str:
    """What holds where there is no reason to normalise."""
    return f"all actions lie within {limit:g} and every dimension that moves spans {2 * UNNORMALISED_RANGE:g} or more"


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
    reasons = reasons_to_normalise(steps)
    why = " and ".join(reasons) or f"{fits_unnormalised()}, as the published recipe expects"
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
