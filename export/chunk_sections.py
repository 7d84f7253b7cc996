"""What engines of chunk tokens are judged on: held-out episodes, their surroundings, random chunks of several kinds,
chunks of every class, and edges: of ranges, of cells, and between classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rfsq.export.golden_inputs import Span, bisected
from rfsq.export.reference import EDGES, Section
from rfsq.rfsq_ref.chunk_code import WIDTH
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.chunk_rounding import Chunks, choice, latents_of, normalised_chunks
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array

#: Standard deviation of the chunks around episodes, as a share of the range.
_SPREAD = 0.05
#: Standard deviations of the steps of random walks, as powers of ten of half the range: from rest to all of it.
_WALKS = (-3.0, -0.3)
#: Standard deviations of the latents of chunks of a class, in scales of that class.
_WIDTHS = (0.3, 1.0, 2.0)
#: How far beside the edge of a cell, in bounds: a flip there is no near-tie, and an error of a constant shows.
_BESIDE = 1.5
#: The most chunks on one side of an edge, and from how many of each class they are sought.
_BESIDES, _POOL = 4096, 16
#: Of the way from a tie of classes to where it was sought from, the nearest first.
_NEARNESS = 2.0 ** torch.arange(-20, 0)
_TIES, _GRID, _SIGNS, _CONSTANT = 24, 32, 4, 8


def chunk_sections(
    model: ChunkTokenizer, episodes: Float32Array, *, limit: float, num_steps: int, seed: int = 0
) -> tuple[Section, ...]:
    """Sections of at least `num_steps` control steps together.

    model: the float64 reference; episodes: chunks [N, T, A] it was not fitted to; limit: the largest |action| allowed.
    """
    sizes, random = model.sizes, np.random.default_rng(seed)
    span = _span(model, episodes, limit)
    rest = max(-(-num_steps // sizes.chunk_length) - len(episodes), 0)
    # Random values are nearly all sent in escape, which takes the reference long.
    uniform = max(rest // 8, 1)
    around = rest // 4 if len(episodes) else 0
    of_classes = max(rest // 4, sizes.escape)
    smooth = max(rest - uniform - around - of_classes, 1)
    centres = episodes[random.integers(max(len(episodes), 1), size=around)]
    shape = (sizes.chunk_length, sizes.action_dim)
    chunks: dict[str, Float64Array | Float32Array] = {
        "episodes": episodes,
        "around them": centres + _SPREAD * (span.high - span.low) * random.standard_normal(centres.shape),
        "uniform random": random.uniform(span.low, span.high, (uniform, *shape)),
        "smooth random": _walks(span, (smooth, *shape), random),
        "of every class": _in_robot_units(model, _of_classes(model, of_classes, random)),
        "beside edges of cells": _beside_cells(model, span, random),
        EDGES: np.concatenate([*_edges(model, span, random)]),
    }
    return tuple(
        Section(name, np.ascontiguousarray(np.clip(part, -limit, limit).astype(np.float32)))
        for name, part in chunks.items()
    )


def _span(model: ChunkTokenizer, episodes: Float32Array, limit: float) -> Span:
    """The normalised range [-1, 1], widened to what the episodes hold."""
    offset, units = model.offset.numpy(), model.units.numpy()
    return Span(
        np.minimum(offset - units, episodes.min(axis=(0, 1), initial=np.inf)),
        np.maximum(offset + units, episodes.max(axis=(0, 1), initial=-np.inf)),
        limit,
    )


def _in_robot_units(model: ChunkTokenizer, values: Tensor) -> Float64Array:
    """Normalised chunks [n, N] as actions float64 [n, T, A]."""
    chunks = values.reshape(-1, model.sizes.chunk_length, model.sizes.action_dim)
    return np.asarray((chunks * model.units + model.offset).numpy(), np.float64)


def _walks(span: Span, shape: tuple[int, int, int], random: np.random.Generator) -> Float64Array:
    """Random walks [n, T, A] from anywhere in the range, slow ones and fast ones."""
    sizes = 10 ** random.uniform(*_WALKS, (shape[0], 1, 1)) * (span.high - span.low) / 2
    starts = random.uniform(span.low, span.high, (shape[0], 1, shape[2]))
    walks: Float64Array = starts + (sizes * random.standard_normal(shape)).cumsum(axis=1)
    return walks


def _of_classes(model: ChunkTokenizer, count: int, random: np.random.Generator) -> Tensor:
    """Normalised chunks [count, N]: means plus random latents, of one class after the other."""
    code = model.code
    found = []
    for index in range(model.sizes.escape):
        rows = len(range(index, count, model.sizes.escape))
        widths = random.choice(_WIDTHS, (rows, 1)) * random.standard_normal((rows, code.scale.shape[1]))
        found.append(code.mean[index] + code.scale[index] * torch.from_numpy(widths) @ code.basis[index].T)
    return torch.cat(found)


@torch.no_grad()
def _beside_cells(model: ChunkTokenizer, span: Span, random: np.random.Generator) -> Float64Array:
    """For classes and latents that have bits two chunks [n, T, A], on either side of an edge between its finest cells.

    So near that float32 just does not reach across, but a constant of this latent that is a little off does.
    """
    code, sizes = model.code, model.sizes
    pool = _pool(model, span, random)
    chosen = code.choose(pool)
    found = [np.empty((0, sizes.chunk_length, sizes.action_dim))]
    for index in range(sizes.escape):
        bits = torch.bincount(code.order[index], minlength=code.scale.shape[1])
        refined = torch.from_numpy(random.permutation(bits.nonzero()[:, 0].numpy())[: max(_BESIDES // sizes.escape, 1)])
        own = pool[chosen == index]
        if not len(own) or not len(refined):
            continue
        rows = torch.arange(len(refined))
        values = own[torch.from_numpy(random.integers(len(own), size=len(rows)))]
        # As they are after being rounded.
        actions = torch.from_numpy(_in_robot_units(model, values)).float().double()
        at = latents_of(code, normalised_chunks(model, actions), index)
        y, slack = at.y[rows, refined], at.slack[rows, refined]
        cells = torch.exp2(bits[refined].double() - 1)
        edge = torch.minimum((y * cells).round().clamp(min=1 - cells), cells - 1) / cells
        for side in (-_BESIDE, _BESIDE):
            wanted = WIDTH * code.scale[index, refined] * torch.atanh(edge + side * slack)
            moved = (wanted - at.z[rows, refined]).unsqueeze(1) * code.basis[index].T[refined]
            found.append(actions.numpy() + _in_robot_units(model, moved) - model.offset.numpy())
    return random.permutation(np.concatenate(found))


def _pool(model: ChunkTokenizer, span: Span, random: np.random.Generator) -> Tensor:
    """Normalised chunks [n, N] of as many classes as can be."""
    count, sizes = _POOL * model.sizes.escape, model.sizes
    walks = torch.from_numpy(_walks(span, (count // 4, sizes.chunk_length, sizes.action_dim), random))
    return torch.cat((_of_classes(model, count, random), model.normalised(walks))).clamp(-1, 1)


def _edges(model: ChunkTokenizer, span: Span, random: np.random.Generator) -> Iterator[Float64Array]:
    """Zeros, ends of the range, chunks at rest, subnormal and huge values, edges of escape's grid, ties of classes."""
    shape = (model.sizes.chunk_length, model.sizes.action_dim)
    middle, half = (span.low + span.high) / 2, (span.high - span.low) / 2
    yield np.zeros((1, *shape))
    yield -np.zeros((1, *shape))
    for size in ((_CONSTANT, 1, shape[1]), (_CONSTANT, *shape)):
        yield np.broadcast_to(middle + half * random.choice([-1.0, 1.0], size), (_CONSTANT, *shape))
    yield np.broadcast_to(random.uniform(span.low, span.high, (_CONSTANT, 1, shape[1])), (_CONSTANT, *shape))
    tiny, least = np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal
    for number in (least, 7 * least, tiny / 2, tiny, 1e3, 1e6, 1e12, span.limit):
        yield min(number, span.limit) * random.choice([-1.0, 1.0], (_SIGNS, *shape))
    yield _grid(model, random)
    yield _class_ties(model, random)


def _grid(model: ChunkTokenizer, random: np.random.Generator) -> Float64Array:
    """Random chunks [n, T, A] whose values lie beside edges of escape's grid: rounding just does not reach across.

    On an edge itself torch, which codes escape in float64, tells nothing of how often float32 errs.
    """
    levels = 3 * 2 ** random.integers(0, 9, (_GRID, 1))
    edges = torch.from_numpy(2 * random.integers(1, levels, (_GRID, model.sizes.num_values)) / levels - 1)
    slack = normalised_chunks(model, torch.from_numpy(_in_robot_units(model, edges))).slack
    sides = torch.from_numpy(random.choice([-_BESIDE, _BESIDE], edges.shape))
    return _in_robot_units(model, edges + sides * slack)


@torch.no_grad()
def _class_ties(model: ChunkTokenizer, random: np.random.Generator) -> Float64Array:
    """Chunks [n, T, A] as close to a tie between classes as float32 can come, on either side; and chunks beside them,
    just where rounding does not explain another class any more."""
    chunks = torch.from_numpy(_in_robot_units(model, _of_classes(model, 2 * _TIES, random))).float()
    # Neighbours in the order of classes are alike as a rule; any two are wanted.
    order = torch.from_numpy(random.permutation(len(chunks)))
    first, second = torch.chunk(chunks[order].flatten(1), 2)

    def normalised(flat: Tensor) -> Chunks:
        return normalised_chunks(model, torch.unflatten(flat.double(), 1, chunks.shape[1:]))

    def classes(flat: Tensor) -> Tensor:
        return model.code.choose(normalised(flat).values)

    of_first = classes(first)
    differ = of_first != classes(second)
    first, second, of_first = first[differ], second[differ], of_first[differ]
    near, far = bisected(first, second, lambda flat: classes(flat) == of_first)
    found = [near, far]
    for tie, end in ((near, first), (far, second)):
        # All at once: each way is short, and a choice of few chunks takes as long as one of many.
        ways = (tie + _NEARNESS[:, None, None] * (end - tie)).flatten(0, 1)
        margins, bounds = choice(model.code, normalised(ways)).margins(classes(tie).repeat(len(_NEARNESS)))
        is_beside = (margins > _BESIDE * bounds).reshape(len(_NEARNESS), -1)
        nearest = is_beside.long().argmax(dim=0)
        found.append(ways.reshape(len(_NEARNESS), *tie.shape)[nearest, torch.arange(len(tie))])
    return np.asarray(torch.unflatten(torch.cat(found).double(), 1, chunks.shape[1:]).numpy())
