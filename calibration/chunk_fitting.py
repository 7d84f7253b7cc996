"""Chunk tokens of a dataset: which of its episodes are fitted to, in which units, and how many classes they allow."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rfsq.calibration.chunk import ChunkFitConfig, broad_classes, fit_chunk_code
from rfsq.calibration.chunk_windows import count_windows
from rfsq.calibration.data import MINIMUM_EPISODES, few_steps_warning, unsplit_warning
from rfsq.calibration.settings import BitOrder, ChunkConfig, ChunkNormaliser
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from rfsq.rfsq_ref.normaliser import Normaliser, fit_normaliser, fits_unnormalised, reasons_to_normalise, untouched
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.paths import counted

#: Of a learned class. On the embedded demonstrations 64 classes are better than any fewer down to four windows each,
#: and with two 4 classes have a tenth less squared error.
_LEAST_WINDOWS = 4
#: So many times wider, the range of a dimension costs two bits of every action in escape.
_FAR = 4.0
#: Beyond it chunk tokens say nothing.
_LIMIT = 1.0


@dataclass(frozen=True, eq=False)
class ChunkParts:
    """Episodes to fit classes to, to fit scales and gains to, and to judge on: others, where there are enough."""

    training: ActionDataset
    calibration: ActionDataset
    judging: ActionDataset


def chunk_parts(dataset: ActionDataset) -> ChunkParts:
    """The parts of a split by episode, judged on its validation part; too few episodes to split serve for all three."""
    if len(dataset.episodes) < MINIMUM_EPISODES:
        return ChunkParts(dataset, dataset, dataset)
    split = split_episodes(dataset)
    return ChunkParts(split.train, split.calibration, split.validation)


def fit_chunk_tokens(dataset: ActionDataset, config: ChunkConfig) -> ChunkCheckpoint:
    """Chunk tokens with their provenance: config, data, and `remarks`, lines that a person should read.

    The same data and config give the same bits, given the same number of threads of torch. Raises SettingsError for
    sizes that make no code, DataError for data that nothing can be fitted to.
    """
    parts = chunk_parts(dataset)
    normaliser, reason = chunk_normaliser(parts, config.normaliser)
    sizes, fewer = _sizes(parts.training, config)
    is_split = parts.training is not dataset
    warnings = [few_steps_warning(parts.training), "" if is_split else unsplit_warning(dataset), fewer]
    if normaliser is not None:
        warnings.append(_far_episode_warning(parts))
    fit = ChunkFitConfig(config.seed, has_shared_order=config.order is BitOrder.SHARED)
    constants = fit_chunk_code(parts.training.episodes, parts.calibration.episodes, sizes, fit, normaliser)
    provenance: dict[str, Any] = {
        "config": {**asdict(config), "normaliser": config.normaliser.value, "order": config.order.value},
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "selection": "parts of a split by episode" if is_split else "all of it, too few episodes to split",
            **{
                name: {"episodes": len(part.episodes), "steps": part.num_steps}
                for name, part in (("training", parts.training), ("calibration", parts.calibration))
            },
        },
        "remarks": [reason, *filter(None, warnings)],
        "torch": str(torch.__version__),
    }
    return ChunkCheckpoint(sizes, constants, normaliser, provenance)


def chunk_normaliser(parts: ChunkParts, wanted: ChunkNormaliser) -> tuple[Normaliser | None, str]:
    """What brings the training and calibration episodes, and more like them, into [-1, 1]; and why."""
    # Where few episodes serve for both parts, each counts once.
    fitted = [parts.training] if parts.calibration is parts.training else [parts.training, parts.calibration]
    ends = np.concatenate([_ends(part) for part in fitted])
    reasons = reasons_to_normalise(ends, _LIMIT)
    kind = wanted
    why = "as asked"
    if wanted is ChunkNormaliser.AUTO:
        kind = ChunkNormaliser.MIN_MAX if reasons else ChunkNormaliser.NONE
        why = f"chosen by auto: {' and '.join(reasons) or fits_unnormalised(_LIMIT)}"
    if kind is ChunkNormaliser.NONE:
        return None, f"normaliser: {kind}, {why}"
    headroom = _headroom(ends)
    if headroom > 1:
        why = f"{why}; of {headroom:.3g} times the range seen, since one episode reached so far beyond the others"
    found = fit_normaliser(ends, NormaliserKind.MIN_MAX, untouched(ends))
    return _covering(found, ends, headroom, untouched(ends)), f"normaliser: {kind}, {why}"


def _headroom(ends: FloatArray) -> float:
    """How far the next episode may reach, as a multiple of the range of those seen: as far as any of them reaches
    beyond the others, in the dimension where it is farthest. At most `_FAR`; 1 for a single episode.

    Nothing outside the range is ever decoded, while a wider one costs little: only escape's bound grows with it.
    """
    low, high = ends[::2].astype(np.float64), ends[1::2].astype(np.float64)
    if len(low) < 2:
        return 1.0
    others_low, others_high = -_largest_of_others(-low), _largest_of_others(high)
    half, middle = (others_high - others_low) / 2, (others_high + others_low) / 2
    reach = np.maximum(high - middle, middle - low)
    # Where the others rest, nothing says how far is far.
    return float(np.clip((reach / np.where(half > 0, half, np.inf)).max(), 1.0, _FAR))


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


def _far_episode_warning(parts: ChunkParts) -> str:
    """A warning about a single episode that makes the range of a dimension several times wider; else empty."""
    dataset = parts.training
    ends = _ends(dataset).reshape(len(dataset.episodes), 2, -1).astype(np.float64)
    span = np.ptp(ends, axis=(0, 1))
    farthest = {*ends[:, 0].argmin(axis=0).tolist(), *ends[:, 1].argmax(axis=0).tolist()}
    for index in sorted(farthest) if len(ends) > 1 else ():
        others = np.ptp(np.delete(ends, index, axis=0), axis=(0, 1))
        far = np.flatnonzero((others > 0) & (span > _FAR * others))
        if far.size:
            return (
                f"WARNING: dimension {far[0]} spans {span[far[0]]:.3g} by episode {dataset.names[index]!r}, without it "
                f"{others[far[0]]:.3g}: tokens spend their range on that episode; repair or drop it if it is wrong"
            )
    return ""


def _ends(dataset: ActionDataset) -> FloatArray:
    """The lowest and the highest action of each dimension in each episode: [2 * episodes, A]."""
    return np.stack([end(episode, axis=0) for episode in dataset.episodes for end in (np.min, np.max)])


def _sizes(training: ActionDataset, config: ChunkConfig) -> tuple[ChunkSizes, str]:
    """The sizes that the data allow, and a warning where they have fewer classes than were asked for."""

    def sizes(classes: int, tokens: int) -> ChunkSizes:
        token_bits = config.vocabulary.bit_length() - 1
        return ChunkSizes(training.action_dim, config.chunk_length, classes, token_bits, tokens)

    # The class may take all of the first token.
    least = 1 + ((config.classes - 1).bit_length() == config.vocabulary.bit_length() - 1)
    sizes(config.classes, least)
    windows = count_windows(training.episodes, config.chunk_length)
    most = max(1, windows // _LEAST_WINDOWS) + broad_classes(config.classes) + 1
    classes = min(config.classes, most)
    tokens = config.tokens
    if tokens is None:
        tokens = min(ChunkSizes.num_tokens, sizes(classes, least).most_tokens)
    warning = "" if classes == config.classes else (
        f"WARNING: {classes} classes in place of {config.classes}: the training episodes have "
        f"{counted(windows, 'window')} of {counted(config.chunk_length, 'step')}, and a learned class needs "
        f"{_LEAST_WINDOWS}; give more episodes"
    )  # fmt: skip
    return sizes(classes, tokens), warning
