"""What the encoder's tokens are, and how they are decoded: the modes of a bundle (docs/architecture.md)."""

from __future__ import annotations

import typing
from typing import Literal

Mode = Literal["none", "dynamic", "calibrated", "recovered"]
MODES: tuple[Mode, ...] = typing.get_args(Mode)
#: For people.
MEANING: dict[Mode, str] = {
    "none": "naive RFSQ, tokens decode on their own",
    "dynamic": "published Robust RFSQ, decoding needs the stats that encoding gives",
    "calibrated": "Robust RFSQ with constant mean and scale, tokens decode on their own",
    "recovered": "published Robust RFSQ tokens, decoded on their own by a fitted map",
}
