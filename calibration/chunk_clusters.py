"""Where the classes of chunk tokens begin: windows alike, and classes of many windows split."""

import torch
from torch import Tensor

from rfsq.calibration.chunk_covariance import eigen
from rfsq.calibration.chunk_windows import batches
from rfsq.rfsq_ref.chunk_code import ChunkSizes


def clusters(x: Tensor, sizes: ChunkSizes, count: int, generator: torch.Generator) -> Tensor:
    """The class [n] of each window [n, N]: k-means on the leading principal scores and two log band energies."""
    if count == 1:
        return torch.zeros(len(x), dtype=torch.long)
    num_values = x.shape[1]
    _, basis = eigen(torch.cov(x.T, correction=0).reshape(num_values, num_values), num_values)
    mean, few = x.mean(dim=0), max(1, min(8, num_values // 4))
    features = torch.cat([_features((part - mean) @ basis, few) for part in batches(x, sizes)])
    features[:, :few] /= features[:, :few].std(dim=0).clamp(min=1e-6)
    centres = features[torch.randperm(len(x), generator=generator)[:count]]
    assigned = torch.zeros(len(x), dtype=torch.long)
    for _ in range(25):
        assigned = torch.cdist(features, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add(0, assigned, features)
        counts = torch.bincount(assigned, minlength=count).unsqueeze(-1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return assigned


def _features(scores: Tensor, few: int) -> Tensor:
    """The first few principal scores [n, few], and two log band energies of the others."""
    middle = max(2, min(24, scores.shape[1] // 2))
    bands = [scores[:, few:middle], scores[:, middle:]]
    energies = [band.square().mean(dim=1, keepdim=True).clamp(min=1e-12).log() * 0.7 for band in bands if band.numel()]
    return torch.cat([scores[:, :few], *energies], dim=1)


def split(
    x: Tensor, sizes: ChunkSizes, assigned: Tensor, counts: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Split so many parents into so many classes, more of them where more windows are: the class of each window, and
    the parent of each class."""
    parents, count = counts
    n = torch.bincount(assigned, minlength=parents).double()
    wanted = n.pow(0.7) / n.pow(0.7).sum() * count
    children = wanted.floor().clamp(min=1).long()
    while int(children.sum()) < count:
        children[int((wanted - children).argmax())] += 1
    while int(children.sum()) > count:
        children[int(torch.where(children > 1, children - wanted, -torch.inf).argmax())] -= 1
    found, parent, base = torch.zeros_like(assigned), [], 0
    for index, number in enumerate(children.tolist()):
        members = (assigned == index).nonzero()[:, 0]
        if number > 1 and len(members) > 2 * number:
            found[members] = base + clusters(x[members], sizes, number, generator)
        else:
            found[members] = base
        parent += [index] * number
        base += number
    return found, torch.tensor(parent)
