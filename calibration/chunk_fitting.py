"""Chunk tokens of a dataset: which of its episodes are fitted to, and how many classes and tokens they get."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rfsq.calibration.chunk import ChunkFitConfig, broad_classes, fit_chunk_code, most_learned
from rfsq.calibration.chunk_normaliser import chunk_normaliser, far_episode_warning, far_from_zero_warning
from rfsq.calibration.chunk_windows import count_windows
from rfsq.calibration.data import MINIMUM_EPISODES, few_steps_warning, joined, unsplit_warning
from rfsq.calibration.settings import BitOrder, ChunkConfig
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset, split_episodes
from rfsq.runtime.bundle.models import CHUNK_LIMITS
from rfsq.runtime.bundle.paths import counted

#: Of a learned class. On the embedded demonstrations 64 classes are better than any fewer down to four windows each,
#: and with two 4 classes have a tenth less squared error.
_LEAST_WINDOWS = 4
#: Fewer episodes than these have none to spare for a test. With those of the test part, fits to 4 of the embedded ones
#: have a quarter of the squared error in others at 10 bits a step, to 8 and 12 of them nine tenths, to 32 the same.
_FEW_EPISODES = 20
#: Of tokens that nobody has chosen, for each value of a chunk, beside those of the class: 45 tokens of 10 bits for the
#: 56 values of the embedded demonstrations.
_VALUE_BITS = 7.9


@dataclass(frozen=True, eq=False)
class ChunkParts:
    """Episodes to fit classes to, to fit scales and gains to, and to judge on: others, where there are enough.

    selection: which these are, for people."""

    training: ActionDataset
    calibration: ActionDataset
    judging: ActionDataset
    selection: str


def chunk_parts(dataset: ActionDataset) -> ChunkParts:
    """The parts of a split by episode, judged on its validation part; too few episodes to split serve for all three.

    Of few episodes those of the test part are trained on, too.
    """
    if len(dataset.episodes) < MINIMUM_EPISODES:
        return ChunkParts(dataset, dataset, dataset, "all of it, too few episodes to split")
    split, selection = split_episodes(dataset), "parts of a split by episode"
    if len(dataset.episodes) >= _FEW_EPISODES:
        return ChunkParts(split.train, split.calibration, split.validation, selection)
    training = joined(split.train, split.test)
    return ChunkParts(training, split.calibration, split.validation, f"{selection}, its test part for the classes, too")


def fit_chunk_tokens(dataset: ActionDataset, config: ChunkConfig) -> ChunkCheckpoint:
    """Chunk tokens with their provenance: config, data, and `remarks`, lines that a person should read.

    The same data and config give the same bits, given the same number of threads of torch. Raises SettingsError for
    sizes that make no code, DataError for data that nothing can be fitted to.
    """
    parts = chunk_parts(dataset)
    normaliser, reason = chunk_normaliser(dataset, config.normaliser)
    sizes, fewer = _sizes(parts.training, config)
    unsplit = unsplit_warning(dataset) if parts.training is dataset else ""
    warnings = [few_steps_warning(parts.training), unsplit, fewer]
    if normaliser is not None:
        warnings += [far_episode_warning(dataset), far_from_zero_warning(normaliser)]
    fit = ChunkFitConfig(config.seed, has_shared_order=config.order is BitOrder.SHARED)
    constants = fit_chunk_code(parts.training.episodes, parts.calibration.episodes, sizes, fit, normaliser)
    provenance: dict[str, Any] = {
        "config": {**asdict(config), "normaliser": Path(config.normaliser).name, "order": config.order.value},
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "selection": parts.selection,
            **{
                name: {"episodes": len(part.episodes), "steps": part.num_steps}
                for name, part in (("training", parts.training), ("calibration", parts.calibration))
            },
        },
        "remarks": [reason, *filter(None, warnings)],
        "torch": str(torch.__version__),
    }
    return ChunkCheckpoint(sizes, constants, normaliser, provenance)


def fitted_on(provenance: Mapping[str, Any]) -> str:
    """A line about the data of a fit that `fit_chunk_tokens` has made."""
    data = provenance["data"]
    parts = [
        f"{counted(data[part]['episodes'], 'episode')} ({counted(data[part]['steps'], 'step')}) {use}"
        for part, use in (("training", "for the classes"), ("calibration", "for scales and gains"))
    ]
    return f"fitted on {' and '.join(parts)} of {data['source']}: {data['selection']}"


def _default_tokens(sizes: ChunkSizes) -> int:
    """As many for each value as those of the embedded demonstrations, and no more than there may be."""
    wanted = math.ceil((sizes.class_bits + _VALUE_BITS * sizes.num_values) / sizes.token_bits)
    return max(sizes.num_tokens, min(wanted, sizes.most_tokens, CHUNK_LIMITS["num_tokens"][1]))


def _sizes(training: ActionDataset, config: ChunkConfig) -> tuple[ChunkSizes, str]:
    """The sizes that the data allow, and a warning where they have fewer classes than were asked for."""

    def sizes(classes: int, tokens: int) -> ChunkSizes:
        token_bits = config.vocabulary.bit_length() - 1
        return ChunkSizes(training.action_dim, config.chunk_length, classes, token_bits, tokens)

    # The class may take all of the first token.
    least = 1 + ((config.classes - 1).bit_length() == config.vocabulary.bit_length() - 1)
    sizes(config.classes, least)
    windows = count_windows(training.episodes, config.chunk_length)
    others = broad_classes(config.classes) + 1
    by_windows, by_values = max(1, windows // _LEAST_WINDOWS), most_learned(training.action_dim * config.chunk_length)
    classes = min(config.classes, min(by_windows, by_values) + others)
    tokens = config.tokens
    if tokens is None:
        tokens = _default_tokens(sizes(classes, least))
    why = (
        f"the training episodes have {counted(windows, 'window')} of {counted(config.chunk_length, 'step')}, and a "
        f"learned class needs {_LEAST_WINDOWS}; give more episodes"
        if by_windows <= by_values
        else f"of chunks of {sizes(classes, tokens).num_values:,} values, more take too much memory and time; for more "
        "classes choose a smaller --chunk-length"
    )
    warning = "" if classes == config.classes else f"WARNING: {classes} classes in place of {config.classes}: {why}"
    return sizes(classes, tokens), warning
