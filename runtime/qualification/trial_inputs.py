"""Tokens and settings to try a decoder with, for any bundle and no robot."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..bundle.arrays import Float32Array, Float64Array, Int32Array
from ..control.config import ActionKind, ControlConfig
from ..tokenizer import ActionTokenizer, codes_of

PERIOD_S = 0.002
#: The largest action, in units of its dimension.
_RANGE = 0.5

Chunks = tuple[list[Int32Array], list[Float32Array | None], float]


def config_for(tokenizer: ActionTokenizer, limit: float, **changes: Any) -> ControlConfig:
    """Settings with limits of `limit` and a slew of a quarter of it; deltas, the last one a gripper, unless changed."""
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
    """The same for a motion that repeats after `count` ticks: chunk i is what a policy plans from tick i on."""
    model = tokenizer.model
    ticks = np.arange(count)[:, None, None] + np.arange(model.chunk_length)[:, None]
    return _coded(tokenizer, _RANGE * np.sin(2 * np.pi * ticks / count + np.arange(model.action_dim)))


def _coded(tokenizer: ActionTokenizer, chunks: Float64Array) -> Chunks:
    """Encode chunks [N, T, A], which are in units of each dimension."""
    model = tokenizer.model
    actions = (chunks * np.asarray(model.action_units) + np.asarray(model.action_offset)).astype(np.float32)
    codes = codes_of(tokenizer, actions)
    # Whatever chunk tokens say, they decode to something within the range. Others leave it where layers are missing.
    reach = [np.abs(tokenizer.decode(*codes.prefix(prefix))).max() for prefix in model.decoder_graphs]
    if not model.token_grid:
        reach.append(np.max(np.abs(model.action_units) + np.abs(model.action_offset)))
    limit = 1.5 * float(max(reach))
    stats = [None] * len(actions) if codes.stats is None else [part.copy() for part in codes.stats[:, None]]
    # Arrays of their own, as from a policy: those of one batch would evict each other from the caches.
    return [part.copy() for part in codes.tokens[:, None]], stats, limit
