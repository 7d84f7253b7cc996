"""What reaches the control loop, and on which tick, in simulated time: a run is the same anywhere.

The policy looks again whenever half of a chunk has passed, and the main model alone takes as long as that, as slow as
it may be: with 8 steps and 8 layers half a tick for each of its passes. The draft's time counts as nothing, as it would
beside a large model; beside this one it is more than that (speculative_latency.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from examples.speculative_acceptance import Speculation
from examples.speculative_data import Eyes


@dataclass(frozen=True, eq=False)
class Arrival:
    """A chunk on its way to the loop; accepted: how many of its first steps are the draft's; is_early: coarse."""

    observed: int
    tick: int
    tokens: npt.NDArray[np.int64]
    accepted: int
    is_early: bool

    def source(self, tick: int) -> str:
        """Whose action this chunk has for a tick."""
        if not self.is_early:
            return "full"
        return "draft" if tick - self.observed < self.accepted else "correction"


def arrivals(
    speculation: Speculation, eyes: Eyes, episode: npt.NDArray[np.float32], task: str, *, with_draft: bool
) -> list[Arrival]:
    """Of one episode, in the order of their ticks. A draft of which the first step is refused is not sent."""
    pause, layers = eyes.chunk_length // 2, speculation.main.num_layers
    looks = range(0, len(episode), pause)
    context = torch.from_numpy(np.stack([eyes.see(episode[:tick], task) for tick in looks]))

    def after(passes: int) -> int:
        return math.ceil(passes * pause / layers)

    if not with_draft:
        full = speculation.alone(context).numpy()
        return [Arrival(tick, tick + after(layers), full[[row]], 0, False) for row, tick in enumerate(looks)]
    verdict = speculation.verify(context, speculation.propose(context))
    early, full = verdict.early.numpy(), speculation.finish(context, verdict).numpy()
    found = []
    for row, tick in enumerate(looks):
        accepted = int(verdict.accepted[row])
        if accepted:
            found.append(Arrival(tick, tick + after(1), early[[row]], accepted, True))
        found.append(Arrival(tick, tick + after(speculation.passes(accepted)), full[[row]], accepted, False))
    return found
