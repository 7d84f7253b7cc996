"""Tokens and settings to try a decoder with: any bundle, no robot."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..bundle.arrays import Float32Array, Float64Array, Int32Array
from ..control.config import ActionKind, ControlConfig
from ..tokenizer import ActionTokenizer

PERIOD_S = 0.002
#: Of a dimension's unit, to either side.
_RANGE = 0.5

Chunks = tuple[list[Int32Array], list[Float32Array | None], float]


def config_for(tokenizer: ActionTokenizer, limit: float, **changes: Any) -> ControlConfig:
    """Limits of `limit` and a slew of a quarter of it; all deltas, the last dimension a gripper, unless changed."""
    size = tokenizer.model.action_dim
    values: dict[str, Any] = {
        "period_s": PERIOD_S,
        "action_low": (-limit,) * size,
        "action_high": (limit,) * size,
        "max_relative_step": (limit / 4,) * size,
        "action_kind": (ActionKind.DELTA,) * size,
        "gripper": (size - 1,),
        "max_consecutive_faults": 0,
        **changes,
    }
    return ControlConfig(**values)


def chunks_of(tokenizer: ActionTokenizer, count: int) -> Chunks:
    """Tokens of random actions, their stats, and a limit that no decoded action reaches."""
    model = tokenizer.model
    shape = model.actions_shape(count)
    return _coded(tokenizer, np.random.default_rng(0).uniform(-_RANGE, _RANGE, shape))


def motion_of(tokenizer: ActionTokenizer, count: int) -> Chunks:
    """The same for a motion that comes round after `count` ticks: chunk i is what a policy sees from tick i on."""
    model = tokenizer.model
    ticks = np.arange(count)[:, None, None] + np.arange(model.chunk_length)[:, None]
    return _coded(tokenizer, _RANGE * np.sin(2 * np.pi * ticks / count + np.arange(model.action_dim)))


def _coded(tokenizer: ActionTokenizer, chunks: Float64Array) -> Chunks:
    """chunks [N, T, A] in units of each dimension."""
    model = tokenizer.model
    actions = (chunks * np.asarray(model.action_units) + np.asarray(model.action_offset)).astype(np.float32)
    tokens, stats, largest = [], [], 0.0
    for chunk in actions[:, None]:
        pair = tokenizer.encode_with_stats(chunk) if model.has_stats else (tokenizer.encode(chunk), None)
        tokens.append(pair[0])
        stats.append(pair[1])
        largest = max(largest, float(np.abs(tokenizer.decode(*pair)).max()))
    return tokens, stats, 1.5 * largest
