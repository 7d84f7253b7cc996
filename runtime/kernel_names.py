"""What the generator of the CUDA kernels and the backend that launches them agree on."""

from __future__ import annotations

from typing import Literal

TokenType = Literal["int32", "uint8"]
#: Types that tokens may have, by numpy's name, and their names in CUDA.
TOKEN_TYPES: dict[TokenType, str] = {"int32": "int", "uint8": "uint8"}
#: A block for each step; or a whole warp for many, where the sizes allow it.
KernelKind = Literal["few", "many"]


def kernel_name(prefix: int | None, token_type: str, kind: KernelKind) -> str:
    """prefix: None for the encoder."""
    role = "encode" if prefix is None else f"decode_l{prefix}"
    return f"{role}_{token_type}_{kind}"
