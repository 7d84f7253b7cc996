"""What engines are judged on: held-out episodes, their surroundings, random actions, edges of ranges and of bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rfsq.export.golden_inputs import Span, bins_of, bisected, sensitive_steps, to_edge
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array, in_chunks

EDGES = "edges"
#: More corners than this are sampled, not listed.
_MOST_CORNERS = 256
_NEAR_TIES = 512
#: Standard deviation of the steps around episodes, as a share of the range.
_SPREAD = 0.05
#: Neighbours of a step that are tried, by so many float32 numbers away in each dimension.
_NEIGHBOURS, _REACH = 4096, 3
#: Float32's errors have about a fortieth of their bound as standard deviation: as far from an edge as this share of it,
#: one step in six flips, and more do where errors are larger.
_SHARE_OF_BOUND = 1 / 16


@dataclass(frozen=True)
class Section:
    """actions: float32 [N, T, A] in physical units."""

    name: str
    actions: Float32Array

    @property
    def num_steps(self) -> int:
        return int(np.prod(self.actions.shape[:2]))


def parity_sections(
    model: ActionAutoencoder,
    episodes: Float32Array,
    *,
    chunk_length: int,
    limit: float,
    num_steps: int,
    prefixes: Sequence[int] = (),
    seed: int = 0,
) -> tuple[Section, ...]:
    """Sections of at least `num_steps` control steps together.

    model: the float64 reference; episodes: steps [N, A] it was not fitted to; limit: the largest |action| allowed;
    prefixes: of the decoders whose constants the edges shall show too.
    """
    random = np.random.default_rng(seed)
    span = _span(model, episodes, limit)
    near = max(num_steps - len(episodes), 0) // 2 if len(episodes) else 0
    centres = episodes[random.integers(max(len(episodes), 1), size=near)]
    around = centres + _SPREAD * (span.high - span.low) * random.standard_normal(centres.shape)
    uniform = random.uniform(span.low, span.high, (max(num_steps - len(episodes) - near, chunk_length), len(span.low)))
    edges = edge_steps(model, span, random)
    sensitive = sensitive_steps(model, prefixes, span, num_steps, random)
    steps: dict[str, npt.NDArray[np.floating]] = {
        "episodes": episodes,
        "around them": around,
        "uniform random": uniform,
        EDGES: np.concatenate((edges, sensitive)),
    }
    return tuple(Section(name, in_chunks(part.astype(np.float32), chunk_length)) for name, part in steps.items())


def edge_steps(model: ActionAutoencoder, span: Span, random: np.random.Generator) -> Float32Array:
    """Steps [N, A]: zeros, the corners of the range, subnormal and huge values, and actions closest to a bin's edge."""
    low, high, limit, action_dim = span.low, span.high, span.limit, len(span.low)
    corners = random.choice([-1.0, 1.0], (_MOST_CORNERS, action_dim))
    if 2**action_dim <= _MOST_CORNERS:
        corners = np.array(np.meshgrid(*[[-1.0, 1.0]] * action_dim)).reshape(action_dim, -1).T
    signs = random.choice([-1.0, 1.0], (16, action_dim))
    tiny, least = np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal
    huge = [signs[:4] * min(size, limit) for size in (1e3, 1e6, 1e12, limit)]
    lone = np.concatenate([np.eye(action_dim) * size for size in (-limit, -min(1e4, limit), min(1e4, limit), limit)])
    return np.concatenate(
        [
            np.zeros((1, action_dim)),
            -np.zeros((1, action_dim)),
            (low + high) / 2 + corners * (high - low) / 2,
            corners,
            *(signs * size for size in (least, 7 * least, tiny / 2, tiny)),
            *huge,
            lone,
            near_ties := near_tie_steps(model, span, random),
            neighbours_at_rounding_distance(model, near_ties[::2], random),
        ]
    ).astype(np.float32)


@torch.no_grad()
def near_tie_steps(model: ActionAutoencoder, span: Span, random: np.random.Generator) -> Float32Array:
    """Steps [N, A] as close to an edge between two bins, of any layer, as float32 actions can come.

    Between two random actions with different tokens there is an edge: found by bisection on the float64 reference,
    for each pair on the tokens of the first layers up to one drawn at random.
    """
    pairs = random.uniform(span.low, span.high, (2, _NEAR_TIES, len(span.low)))
    first, second = torch.from_numpy(pairs.astype(np.float32))
    ignored = _ignored_layers(model, _NEAR_TIES, random)

    def tokens(actions: torch.Tensor) -> torch.Tensor:
        return model.encode(actions.double())[0].masked_fill(ignored, 0)

    of_first = tokens(first)
    ties = bisected(first, second, lambda steps: (tokens(steps) == of_first).flatten(1).all(1))
    return torch.cat(ties).numpy()


def _ignored_layers(model: ActionAutoencoder, count: int, random: np.random.Generator) -> torch.Tensor:
    """bool [count, 1, L]: the layers behind one drawn at random; with all, the narrow bins of the last count alone."""
    depth = torch.from_numpy(random.integers(1, model.config.num_layers + 1, count))
    return (torch.arange(model.config.num_layers) >= depth[:, None])[:, None, :]


@torch.no_grad()
def neighbours_at_rounding_distance(
    model: ActionAutoencoder, steps: Float32Array, random: np.random.Generator
) -> Float32Array:
    """For each of the steps [N, A] a float32 action beside it that lies as far from an edge as float32 rounds.

    Where joints rest far from zero, float32 actions lie so far apart that hardly any on a line comes near an edge: a
    count of flips would be one of chance. Among the neighbours in all dimensions there are some. Which they are follows
    from how far each dimension's next number moves the value that is decided on.
    """
    ignored = _ignored_layers(model, len(steps), random)

    def bins(actions: Float32Array) -> torch.Tensor:
        return bins_of(model, model.encode_latents(torch.from_numpy(actions).double()))

    here = bins(steps)
    missing = to_edge(model, here)
    nearest = missing.abs().masked_fill(ignored, torch.inf).flatten(1).argmin(1, keepdim=True)

    def of_nearest(values: torch.Tensor) -> Float64Array:
        found: Float64Array = values.flatten(1).gather(1, nearest).numpy()
        return found

    effects = []
    for dimension in range(steps.shape[1]):
        moved = steps.copy()
        moved[:, dimension] += np.spacing(np.abs(moved[:, dimension]))
        effects.append(of_nearest(bins(moved) - here))
    bounds = token_error_bounds(model, torch.from_numpy(steps).double())[2]
    moves = random.integers(-_REACH, _REACH + 1, (_NEIGHBOURS, steps.shape[1]))
    wanted = of_nearest(bounds) * random.uniform(-_SHARE_OF_BOUND, _SHARE_OF_BOUND, (len(steps), 1))
    missed = np.abs(np.hstack(effects) @ moves.T - of_nearest(missing) - wanted)
    neighbours: Float32Array = (steps + moves[missed.argmin(1)] * np.spacing(np.abs(steps))).astype(np.float32)
    return neighbours


def _span(model: ActionAutoencoder, episodes: Float32Array, limit: float) -> Span:
    """The normalised range [-1, 1], widened to what the episodes hold."""
    offset, units = model.offset.numpy(), model.units.numpy()
    return Span(
        np.minimum(offset - units, episodes.min(axis=0, initial=np.inf)),
        np.maximum(offset + units, episodes.max(axis=0, initial=-np.inf)),
        limit,
    )
