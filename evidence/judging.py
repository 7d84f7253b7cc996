"""What codecs of chunks are judged on: episodes that nothing was fitted to, actions unlike them, and wrong tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.metrics import Array, action_errors, units_of
from rfsq.evidence.results import CodecReport, metrics_of
from rfsq.evidence.schemes import Codec
from rfsq.evidence.settings import OscPose
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, chunk, split_episodes

#: Of the episodes, which may be judged.
PARTS = ("validation", "test")
#: Bits of a step at which codecs of chunks are compared.
BUDGETS = (5.0, 10.0, 20.0, 37.5, 45.0, 56.0)
#: Standard deviation of what is added to each action, and the factor of the smaller ones, in normalised units.
_NOISE, _SMALLER = 0.05, 0.5
#: Chunks in which each token is made wrong once.
_WRONG_CHUNKS = 256


@dataclass(frozen=True, eq=False)
class Parts:
    """Who may see which episodes. train, calibration: to fit to; validation: to choose settings and epochs by; judged:
    those of the verdict, which nothing was fitted to."""

    train: ActionDataset
    calibration: ActionDataset
    validation: ActionDataset
    judged: ActionDataset

    @property
    def fitted(self) -> ActionDataset:
        """Training and calibration episodes: chunk tokens are fitted to both, so their peers may be, too."""
        return joined(self.train, self.calibration)


def joined(first: ActionDataset, second: ActionDataset) -> ActionDataset:
    """The episodes of both."""
    return ActionDataset(
        first.episodes + second.episodes, first.names + second.names, first.tasks + second.tasks, first.source
    )


@dataclass(frozen=True, eq=False)
class Trial:
    """What codecs are judged on. judged: "validation", or "test" once all settings are chosen; physical: units of the
    actions, where they have any; budgets: bits of a step, rising. Raises EvidenceError for what is none of these."""

    dataset: ActionDataset
    judged: str = "validation"
    physical: OscPose | None = None
    budgets: tuple[float, ...] = BUDGETS

    def __post_init__(self) -> None:
        if self.judged not in PARTS:
            raise EvidenceError(f"judged on {self.judged!r}; expected one of {', '.join(PARTS)}")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or not self.budgets[0] > 0:
            raise EvidenceError(f"budgets are {self.budgets}; expected rising numbers of bits, like 5 10 20")

    @cached_property
    def units(self) -> Array:
        """What counts as 1 in each dimension: [A]."""
        return units_of(self.dataset.steps())

    def parts(self, left_out: str = "") -> Parts:
        """Those of `split_episodes`. left_out: a task whose episodes are judged and nothing else: those of the test,
        or all others. Raises EvidenceError for a task that no episode is of."""
        split = split_episodes(self.dataset)
        train, calibration, validation = split.train, split.calibration, split.validation
        if not left_out:
            return Parts(train, calibration, validation, split.test if self.judged == "test" else validation)
        tasks = set(self.dataset.tasks)
        if left_out not in tasks:
            raise EvidenceError(f"no episode is of the task {left_out!r}; expected one of {', '.join(sorted(tasks))}")
        unseen = split.test if self.judged == "test" else joined(joined(train, calibration), validation)
        train, calibration, validation = (
            _of_task(part, left_out, is_kept=False) for part in (train, calibration, validation)
        )
        return Parts(train, calibration, validation, _of_task(unseen, left_out, is_kept=True))

    def report(self, codec: Codec, judged: ActionDataset, chunk_length: int) -> CodecReport:
        """Errors of these episodes, and of what `unlike` makes of them."""
        report = judge_codec(codec, judged, chunk_length, self.units, self.physical)
        others = metrics_of(errors_unlike(codec, all_chunks(judged, chunk_length), self.units))
        return replace(report, metrics=report.metrics | others)


def all_chunks(episodes: ActionDataset, length: int) -> FloatArray:
    """[B, length, A], one behind the other, those at the ends filled up."""
    return np.concatenate([padded_chunks(episode, length) for episode in episodes.episodes])


def whole_chunks(episodes: ActionDataset, length: int) -> FloatArray:
    """[B, length, A], without what is left at the ends."""
    return np.concatenate([chunk(episode, length) for episode in episodes.episodes])


def _of_task(part: ActionDataset, task: str, *, is_kept: bool) -> ActionDataset:
    return part.select(index for index, found in enumerate(part.tasks) if (found == task) is is_kept)


def judge_codec(
    codec: Codec, judged: ActionDataset, chunk_length: int, units: Array, physical: OscPose | None
) -> CodecReport:
    """Every step of these episodes, the last chunk of each filled up with its last action; filling is not judged."""
    filled = [padded_chunks(episode, chunk_length) for episode in judged.episodes]
    chunks = np.concatenate(filled)
    # Filling is cheap to code, so that only whole chunks tell what a step takes.
    whole = whole_chunks(judged, chunk_length)
    decoded = codec.reconstruct(chunks)
    by_episode = np.split(decoded, np.cumsum([len(part) for part in filled])[:-1])
    found = [
        part.reshape(-1, part.shape[-1])[: len(episode)]
        for episode, part in zip(judged.episodes, by_episode, strict=True)
    ]
    return CodecReport(
        family=codec.family,
        series=codec.series,
        name=codec.name,
        partial=codec.partial,
        metrics=metrics_of(
            {"bits_per_step": codec.bits_per_step(whole if len(whole) else chunks)}
            | action_errors(judged.steps(), np.concatenate(found), units, physical)
        ),
    )


def padded_chunks(episode: FloatArray, length: int) -> FloatArray:
    """[n, A] to [ceil(n / length), length, A], the last action repeated."""
    missing = -len(episode) % length
    return np.concatenate([episode, np.repeat(episode[-1:], missing, axis=0)]).reshape(-1, length, episode.shape[1])


# Actions unlike the demonstrations ------------------------------------------------------------------------------------


def unlike(chunks: FloatArray, units: Array, seed: int = 0) -> dict[str, FloatArray]:
    """Chunks [B, T, A] by what was done to them: perturbed by noise, half as large, and random ones, even in each
    dimension over the range that the chunks have there. All stay in that range."""
    rng = np.random.default_rng(seed)
    low, high = chunks.min(axis=(0, 1)), chunks.max(axis=(0, 1))
    noisy = chunks + _NOISE * units * rng.standard_normal(chunks.shape)
    found = {
        "perturbed": np.clip(noisy, low, high),
        "scaled": _SMALLER * chunks,
        "random": rng.uniform(low, high, chunks.shape),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def errors_unlike(codec: Codec, chunks: FloatArray, units: Array) -> dict[str, float]:
    """Mean squared and largest errors in normalised units, such as `random_mse` and `random_max`, and bits, such as
    `random_bits`, of what `unlike` makes of chunks [B, T, A]."""
    found: dict[str, float] = {}
    for name, values in unlike(chunks, units).items():
        error = (codec.reconstruct(values).astype(np.float64) - values) / units
        found |= {f"{name}_mse": float(np.mean(error**2)), f"{name}_max": float(np.abs(error).max())}
        found[f"{name}_bits"] = codec.bits_per_step(values)
    return found


# Wrong tokens ---------------------------------------------------------------------------------------------------------


class TokenCodec(Protocol):
    """A codec whose tokens can be looked at. vocabulary: how many there are."""

    @property
    def vocabulary(self) -> int: ...

    def tokens(self, chunks: FloatArray) -> Any:
        """Of chunks [B, T, A]: a row of tokens for each, the rows of one length or not."""

    def decode(self, tokens: Any, length: int) -> FloatArray:
        """Rows of tokens to chunks [B, length, A]."""


def wrong_token_errors(codec: TokenCodec, chunks: FloatArray, units: Array, seed: int = 0) -> tuple[float, ...]:
    """The mean squared error of a chunk whose token at one place is another one, any other as likely: by place.

    Only chunks that have a token there count. Their number is that of the first 256 chunks [B, T, A].
    """
    rng = np.random.default_rng(seed)
    chunks = chunks[:_WRONG_CHUNKS]
    rows = [[int(token) for token in row] for row in codec.tokens(chunks)]
    found = []
    for place in range(max(map(len, rows))):
        having = [index for index, row in enumerate(rows) if len(row) > place]
        wrong = [_altered(rows[index], place, codec.vocabulary, rng) for index in having]
        decoded = codec.decode(wrong, chunks.shape[1])
        found.append(float(np.mean(((decoded.astype(np.float64) - chunks[having]) / units) ** 2)))
    return tuple(found)


def _altered(row: Sequence[int], place: int, vocabulary: int, rng: np.random.Generator) -> list[int]:
    other = (row[place] + int(rng.integers(1, vocabulary))) % vocabulary
    return [*row[:place], other, *row[place + 1 :]]
