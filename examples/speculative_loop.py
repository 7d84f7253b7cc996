"""The policy in the control loop: what is accepted is served early, and the full decode takes its place.

No robot moves here: at every tick the policy sees what the held-out episode did until then, and what leaves the decoder
is compared with what it did next.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from examples.loop_report import Witness
from examples.speculative_acceptance import Speculation
from examples.speculative_arrivals import Arrival, arrivals
from examples.speculative_data import Eyes, start_of
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.runtime import ActionTokenizer, ControlConfig, ControlDecoder

#: 20 actions a second, as the demonstrations: six motions per tick, and a gripper's command, which stays.
CONFIG = ControlConfig.from_values(
    {
        "period_s": 0.05,
        "action_low": [-1.0] * 7,
        "action_high": [1.0] * 7,
        "max_relative_step": [0.4] * 6 + [math.inf],
        "action_kind": ["delta"] * 6 + ["absolute"],
        "gripper": [6],
        "out_of_range": "limit",
        # So that `is_limited` tells of the slew limit alone.
        "range_tolerance": 0,
    }
)
PERIOD_NS = round(CONFIG.period_s * 1e9)
#: Where the action of a tick comes from; held: from no chunk.
SOURCES = ("held", "draft", "correction", "full")


@dataclass
class Run:
    """What happened. pause: ticks between two looks, after which the main model alone has its first chunk.

    served: ticks by where their action came from; first: ticks from the start of an episode to its first action. lead:
    ticks between early and full, of each chunk of which both came. steps: the largest change of a motion at each swap.
    errors: squared, of each tick after the first pause. unsafe: outside limits or slew.
    """

    pause: int
    served: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    first: list[int] = field(default_factory=list)
    lead: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    looks: int = 0
    unsafe: int = 0
    limited: int = 0
    refused: int = 0

    @property
    def ticks(self) -> int:
        return sum(self.served.values())


def drive(
    speculation: Speculation, eyes: Eyes, episodes: ActionDataset, tokenizer: ActionTokenizer, *, with_draft: bool
) -> Run:
    """Every episode from its beginning, tick by tick."""
    run, clock = Run(eyes.chunk_length // 2), Clock()
    position = start_of(episodes.episodes[0]).tolist()
    with ControlDecoder(tokenizer, CONFIG, position=position, clock=lambda: clock.now_ns) as decoder:
        decoder.warmup()
        for episode, task in zip(episodes.episodes, episodes.tasks, strict=True):
            coming = arrivals(speculation, eyes, episode, task, with_draft=with_draft)
            run.looks += len({chunk.observed for chunk in coming})
            clock.begin()
            _drive_episode(decoder, clock, episode, {chunk.tick: chunk for chunk in coming}, run)
        run.refused = decoder.snapshot().refused_chunks
    return run


class Clock:
    """Simulated; each episode begins after the one before, for a decoder takes no chunk older than its last."""

    def __init__(self) -> None:
        self.now_ns = self._begin_ns = 0

    def begin(self) -> None:
        self._begin_ns = self.now_ns + PERIOD_NS

    def at(self, tick: int) -> int:
        return self._begin_ns + tick * PERIOD_NS


def _drive_episode(
    decoder: ControlDecoder, clock: Clock, episode: npt.NDArray[np.float32], coming: dict[int, Arrival], run: Run
) -> None:
    sent, served, first = start_of(episode), None, None
    decoder.reset(sent.tolist())
    # The motions that were sent last go on.
    sent = decoder.result.actions
    witness = Witness(CONFIG, tuple(sent.tolist()))
    for tick, wanted in enumerate(episode):
        clock.now_ns = clock.at(tick)
        if chunk := coming.get(tick):
            observed_ns = clock.at(chunk.observed)
            # A draft and its full decode bear one number, that of their observation.
            result = decoder.step(chunk.tokens, sequence=observed_ns // PERIOD_NS, observed_ns=observed_ns)
            if served is not None and served.is_early and served.observed == chunk.observed:
                run.lead.append(chunk.tick - served.tick)
                run.steps.append(float(np.abs(result.actions - sent)[:-1].max()))
            served = chunk
        else:
            result = decoder.step()
        witness.see(result)
        sent = result.actions.copy()
        source = "held" if result.is_held or served is None else served.source(tick)
        run.served[source] += 1
        run.limited += result.is_limited
        first = tick if first is None and source != "held" else first
        if tick >= run.pause:
            run.errors.append(float(np.square(sent - wanted).mean()))
    run.first += [] if first is None else [first]
    run.unsafe += witness.unsafe
