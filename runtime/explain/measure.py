"""Chunks decoded from every number of tokens, and how far each is from what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..bundle.arrays import Float32Array, Float64Array, Int32Array, last_rounding
from ..bundle.fidelity import Grade, fidelity
from ..bundle.models import ChunkModel, ModelEntry
from ..tokenizer import ActionTokenizer, codes_of
from .classes import class_mean, classes_of, in_words
from .samples import Samples


@dataclass(frozen=True)
class ShownChunk:
    """One chunk. episode and step: where it begins; class_number: None for tokens without classes.

    tokens: of chunk tokens, each; empty for per-step tokens, of which a chunk has too many to read; actions [T][A] as
    recorded, decoded [P][T][A] from each prefix, in the robot's units; rms, largest: errors [P] in normalised units;
    position_mm: the mean distance [P] over the steps, None where the unit is unknown.
    """

    episode: int
    step: int
    class_number: int | None
    tokens: tuple[int, ...]
    actions: Float64Array
    decoded: Float64Array
    rms: Float64Array
    largest: Float64Array
    position_mm: Float64Array | None


@dataclass(frozen=True)
class ShownClass:
    """share: of the counted chunks; mean: float64 [T, A] in the robot's units, None of escape; words: what it is."""

    share: float
    mean: Float64Array | None
    words: str


@dataclass(frozen=True)
class Explanation:
    """What a page shows of a bundle, with P prefixes, on some data.

    bits: of a step, [P]; bounds: the most by which a value in the calibrated range errs, rounded to float32 at the end,
    in normalised units, for the prefixes that have a bound; largest: of each dimension in the data, [A]; median, p99:
    of the chunks' RMS errors over all counted ones, [P], normalised; grades: what each prefix is worth on all counted
    ones, as a build grades it; position_unit: metres that 1 is in the first three dimensions, or None; counted: chunks
    that median and p99 are of; num_chunks: of the data.
    """

    names: tuple[str, ...]
    prefixes: tuple[int, ...]
    bits: tuple[float, ...]
    bounds: dict[int, float]
    largest: Float32Array
    median: Float64Array
    p99: Float64Array
    grades: tuple[Grade, ...]
    position_unit: float | None
    counted: int
    num_chunks: int
    chunks: tuple[ShownChunk, ...]
    classes: dict[int, ShownClass]


def explain(
    tokenizer: ActionTokenizer, samples: Samples, names: Sequence[str], position_unit: float | None = None
) -> Explanation:
    """Encode the samples, and decode them from every prefix.

    names: of the A dimensions; position_unit: metres that a unit of each of the first three is, None where it is
    unknown. Raises InvalidInputError for actions that the bundle does not take, and InferenceError.
    """
    model = tokenizer.model
    codes = codes_of(tokenizer, samples.actions)
    actions, shown = samples.actions.astype(np.float64), samples.shown
    units = np.array(model.action_units)
    rms, largest, position, decoded, grades = [], [], [], [], []
    for prefix in model.prefixes:
        part = codes.prefix(prefix)
        found = tokenizer.decode(part.tokens, part.stats).astype(np.float64)
        error = found - actions
        rms.append(np.sqrt(np.square(error / units).mean(axis=(1, 2))))
        largest.append(np.abs(error / units).max(axis=(1, 2)))
        position.append(1e3 * (position_unit or 0) * np.linalg.norm(error[shown, :, :3], axis=2).mean(axis=1))
        decoded.append(found[shown])
        grades.append(_grade(model, actions, found))
    numbers = classes_of(model, codes.tokens) if isinstance(model, ChunkModel) else None
    chunks = tuple(
        ShownChunk(
            episode=int(samples.episode[place]),
            step=int(samples.step[place]),
            class_number=None if numbers is None else int(numbers[place]),
            tokens=tuple(codes.tokens[place].tolist()) if isinstance(model, ChunkModel) else (),
            actions=actions[place],
            decoded=np.stack([found[index] for found in decoded]),
            rms=np.array([errors[place] for errors in rms]),
            largest=np.array([errors[place] for errors in largest]),
            position_mm=np.array([errors[index] for errors in position]) if position_unit else None,
        )
        for index, place in enumerate(shown.tolist())
    )
    return Explanation(
        names=tuple(names),
        prefixes=model.prefixes,
        bits=tuple(map(model.bits_per_step, model.prefixes)),
        bounds=_bounds(model),
        largest=samples.largest,
        median=np.median(rms, axis=1),
        p99=np.percentile(rms, 99, axis=1),
        grades=tuple(grades),
        position_unit=position_unit,
        counted=len(actions),
        num_chunks=samples.num_chunks,
        chunks=chunks,
        classes=_classes(tokenizer, model, codes.tokens, samples, names) if isinstance(model, ChunkModel) else {},
    )


def _grade(model: ModelEntry, actions: Float64Array, decoded: Float64Array) -> Grade:
    """Of chunks [S, T, A], in the robot's units."""
    steps, found = (values.reshape(-1, model.action_dim) for values in (actions, decoded))
    return fidelity(steps, found, model.action_units, model.action_offset).grade


def _bounds(model: ModelEntry) -> dict[int, float]:
    if not isinstance(model, ChunkModel):
        return {}
    # Behind the code comes the rounding to float32 in the robot's units, much of a unit far from zero.
    rounding = float((last_rounding(model.action_offset, model.action_units) / model.action_units).max())
    return {budget: bound + rounding for budget, bound in zip(model.budgets, model.bounds, strict=True)}


def _classes(
    tokenizer: ActionTokenizer, model: ChunkModel, tokens: Int32Array, samples: Samples, names: Sequence[str]
) -> dict[int, ShownClass]:
    """Those of the chunks that are shown."""
    numbers = classes_of(model, tokens)
    found = {}
    for number in np.unique(numbers[samples.shown]).tolist():
        share = float((numbers == number).mean())
        if number == model.num_classes - 1:
            found[number] = ShownClass(share, None, "no class holds this chunk, and each value is coded by itself")
        else:
            mean = class_mean(tokenizer.decode, model, number)
            found[number] = ShownClass(share, mean, in_words(mean, samples.largest, names))
    return found
