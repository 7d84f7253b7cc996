"""What the calibration study found: rows, and their JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rfsq.calibration.errors import CalibrationError
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.reading import build, parse_json

_DIGITS = 6


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one value), lowest and highest of `count` values."""

    mean: float
    deviation: float | None
    low: float
    high: float
    count: int


#: One for every prefix of 1 ... L layers.
Spreads = tuple[Spread, ...]


@dataclass(frozen=True)
class SettingRow:
    """One setting on the test episodes, over the checkpoints.

    action_mse: mean squared action error; max_error: largest |action error|; random: mean squared difference that
    quantising makes to actions drawn evenly from the recorded ranges; worst_case: bound on the latent error for any
    latent in [-1, 1].
    """

    setting: str
    action_mse: Spreads
    max_error: Spreads
    random: Spreads
    worst_case: Spreads


@dataclass(frozen=True)
class TaskRow:
    """Action MSE on the test episodes of a task, over that of the unquantised autoencoder; over tasks and checkpoints.

    Unquantised means: of the same checkpoint on the same steps, with the readout that the setting fits to all
    calibration episodes, or with the decoder as it was trained where it fits none.

    seen: fitted to the calibration episodes of all tasks; unseen: of all tasks but the tested one; other: of one other
    task alone, over all pairs.
    """

    setting: str
    seen: Spreads
    unseen: Spreads
    other: Spreads


@dataclass(frozen=True)
class EpisodesRow:
    """A setting fitted to random choices of `num_episodes` episodes, over choices and checkpoints; as SettingRow."""

    setting: str
    num_episodes: int
    action_mse: Spreads


@dataclass(frozen=True)
class ReadoutRow:
    """A readout by its ridge; None: the decoder as it was trained. Without a quantiser, as all layers are nearly.

    cross_validated, test: action MSE on calibration episodes that were left out of the fit, and on the test episodes;
    random, unseen, other: action MSE over that of the decoder as it was trained, on actions drawn evenly from the
    recorded ranges, and on tasks as in TaskRow. None: could not be measured.
    """

    ridge: float | None
    cross_validated: Spread | None
    test: Spread
    random: Spread
    unseen: Spread | None
    other: Spread | None


@dataclass(frozen=True)
class LayerRow:
    """What one more layer brings in the default setting; its errors are those of the settings.

    bits: per step, up to this layer; gain: factor by which the layer lowers the action MSE (None for the first);
    worst_case_gain: the bound on the latent error (before L0: 1); levels_used: share of the K * D levels that occur in
    the test episodes; pays_on_data, pays_in_worst_case: study.PAYS_ON_DATA and PAYS_IN_WORST_CASE in the mean.
    """

    layer: int
    bits: float
    gain: Spread | None
    worst_case_gain: Spread
    levels_used: Spread
    pays_on_data: bool
    pays_in_worst_case: bool


@dataclass(frozen=True)
class StudyResult:
    """All sections; one that could not be measured is empty, and `omitted` says why.

    default: what calibration does unless it is told otherwise; unquantised, unquantised_readout: action MSE on the test
    episodes without a quantiser, through the decoder as it was trained and through the readout.
    """

    source: str
    data_sha256: str
    checkpoints: tuple[str, ...]
    default: Mapping[str, float | str]
    calibration_episodes: int
    calibration_steps: int
    test_episodes: int
    test_steps: int
    unquantised: Spread
    unquantised_readout: Spread
    settings: tuple[SettingRow, ...]
    tasks: tuple[TaskRow, ...]
    episodes: tuple[EpisodesRow, ...]
    readout: tuple[ReadoutRow, ...]
    layers: tuple[LayerRow, ...]
    omitted: Mapping[str, str]
    torch: str
    seconds: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value, to _DIGITS significant digits."""
    deviation = rounded(statistics.stdev(values)) if len(values) > 1 else None
    return Spread(rounded(statistics.fmean(values)), deviation, rounded(min(values)), rounded(max(values)), len(values))


def spreads(per_value: Sequence[Sequence[float]]) -> Spreads:
    """From [values][prefixes]."""
    return tuple(spread(values) for values in zip(*per_value, strict=True))


def rounded(value: float) -> float:
    """To _DIGITS significant digits; those behind differ between processors."""
    return float(f"{value:.{_DIGITS}g}")


def result_to_json(result: StudyResult) -> str:
    """Strict JSON (no NaN, no infinity: ValueError), keys sorted."""
    return json.dumps(asdict(result), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def result_from_json(text: str) -> StudyResult:
    """The inverse of result_to_json. CalibrationError for anything else."""
    try:
        return build(StudyResult, parse_json(text), "the result")
    except ValueError as error:
        raise CalibrationError(
            f"this is no result of the calibration study ({error}); write it with {quoted('calibration/study.py')}"
        ) from error
