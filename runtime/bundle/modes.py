"""What the encoder's tokens are, and how they are decoded: the modes of a bundle (docs/architecture.md)."""

from __future__ import annotations

import typing
from typing import Literal

#: Of per-step tokens: how the residuals of a layer are normalised.
StepMode = Literal["none", "dynamic", "calibrated", "recovered"]
STEP_MODES: tuple[StepMode, ...] = typing.get_args(StepMode)
Mode = Literal[StepMode, "chunk"]
#: For people.
MEANING: dict[Mode, str] = {
    "none": "naive RFSQ, tokens decode on their own",
    "dynamic": "published Robust RFSQ, decoding needs the stats that encoding gives",
    "calibrated": "Robust RFSQ with constant mean and scale, tokens decode on their own",
    "recovered": "published Robust RFSQ tokens, decoded on their own by a fitted map",
    "chunk": "chunk tokens: a Robust RFSQ over the whole chunk, decodable from any first few tokens",
}
