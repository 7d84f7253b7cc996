"""What the generator of the CUDA kernels and the backend that launches them agree on."""

from __future__ import annotations

from typing import Literal

TokenType = Literal["int32", "uint8"]
#: Types that tokens may have, by numpy's name, and their names in CUDA.
TOKEN_TYPES: dict[TokenType, str] = {"int32": "int", "uint8": "uint8"}
#: One more than the levels that a byte holds beside the mark of what is illegal.
_LEVELS_OF_BYTES = 256
#: A block for each step; or a whole warp for many, where the sizes allow it.
KernelKind = Literal["few", "many"]


def token_types(num_levels: int) -> tuple[TokenType, ...]:
    """Those that hold every level, and the mark of what is illegal."""
    return ("int32", "uint8") if num_levels < _LEVELS_OF_BYTES else ("int32",)


def kernel_name(prefix: int | None, token_type: str, kind: KernelKind) -> str:
    """prefix: None for the encoder."""
    role = "encode" if prefix is None else f"decode_l{prefix}"
    return f"{role}_{token_type}_{kind}"
