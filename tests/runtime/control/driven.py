"""A control loop in a process of its own, which imports this module and neither torch nor the tests."""

from pathlib import Path
from typing import Any

import numpy as np

from rfsq.runtime import ActionTokenizer, ControlDecoder, Status
from rfsq.runtime.qualification.trial_inputs import chunks_of, config_for
from tests.processes import PATIENCE


def drive(folder: Path, start: Any, found: Any) -> None:
    """500 ticks beside the other process."""
    with ActionTokenizer.load(folder) as tokenizer:
        tokens, _, limit = chunks_of(tokenizer, 16)
        config = config_for(tokenizer, limit)
        now = 10**12
        with ControlDecoder(tokenizer, config, position=(0.0,) * config.action_dim, clock=lambda: now) as decoder:
            decoder.warmup()
            start.wait(PATIENCE)
            total = 0.0
            for tick in range(500):
                now += round(config.period_s * 1e9)
                total += float(np.abs(decoder.step(tokens[tick % 16]).actions).sum())
            found.put((decoder.health.statuses[Status.OK], total))


def serve(decoder: ControlDecoder, tokens: Any) -> tuple[Any, ...]:
    """Settings, backends, and what is sent without a chunk and with one, of a decoder that came from elsewhere."""
    with decoder:
        before = repr(decoder)
        decoder.warmup()
        held = decoder.step().actions.tolist()
        served = decoder.step(tokens)
        return decoder.config, before, held, served.status, served.actions.tolist()
