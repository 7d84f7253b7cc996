"""Windows of episodes: what chunk tokens are fitted to and judged on, sampled where there are too many."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import InRobotUnits
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.normaliser import Normaliser

#: Actions [steps, A] of each.
Episodes = Sequence[npt.NDArray[np.floating]]


def count_windows(episodes: Episodes, length: int) -> int:
    """How many windows of so many steps the episodes [n, A] have, one each where they are shorter."""
    return sum(max(1, len(episode) - length + 1) for episode in episodes)


def windows(
    episodes: Episodes,
    length: int,
    most: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Windows, float64 [n, length * A], of episodes [n, A], which are filled up with their last action where shorter.

    Every window; of more than `most` a sample: one of each of so many equal stretches. Nothing larger than the result
    is made.
    """
    counts = np.array([count_windows([episode], length) for episode in episodes])
    ends = counts.cumsum()
    total = int(ends[-1])
    if most is None or total <= most:
        places = np.arange(total)
    else:
        within = torch.rand(most, generator=generator, dtype=torch.float64).numpy()
        places = ((np.arange(most) + within) * (total / most)).astype(np.int64).clip(max=total - 1)
    steps = np.arange(length)
    found = np.empty((len(places), length, episodes[0].shape[1]))
    cuts = [0, *np.searchsorted(places, ends).tolist()]
    for index, episode in enumerate(episodes):
        chosen = slice(cuts[index], cuts[index + 1])
        starts = places[chosen] - (ends[index] - counts[index])
        found[chosen] = episode[np.minimum(starts[:, None] + steps, len(episode) - 1)]
    return torch.from_numpy(found).flatten(1)


def batches(x: Tensor, sizes: ChunkSizes) -> Iterator[Tensor]:
    """Rows of x, so many at a time that what a class needs for them takes less than a hundred megabytes."""
    return iter(torch.split(x, max(1, 2**18 // sizes.num_values)))


def normalised(x: Tensor, sizes: ChunkSizes, normaliser: Normaliser | None) -> Tensor:
    """Windows [n, N] in units of the code, clipped to what it can say."""
    model = InRobotUnits(sizes.action_dim, normaliser).double()
    actions = x.reshape(-1, sizes.chunk_length, sizes.action_dim)
    return ((actions - model.offset) / model.units).flatten(1).clamp(-1, 1)
