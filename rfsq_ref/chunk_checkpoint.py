"""Chunk tokens as a file: sizes, constants and normaliser of a fit, in our own format."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.errors import CheckpointError, SettingsError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.own_format import (
    FORMATS,
    SUFFIX,
    check_hash,
    parse_header,
    read_content,
    read_safetensors,
    reading_header,
    write_own,
)
from rfsq.rfsq_ref.published_checkpoints import require_known, take
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.reading import build

_FORMAT = FORMATS[TokenKind.CHUNK]
#: Of the order in a file: it holds the number of every latent that there can be.
_ORDER_TYPE = torch.int16


@dataclass(frozen=True)
class _Header:
    """All that a file says beside its tensors, and its format and version."""

    sizes: ChunkSizes
    budgets: tuple[int, ...]
    normaliser: Normaliser | None
    provenance: dict[str, Any]


@dataclass(frozen=True)
class ChunkCheckpoint:
    """Fitted chunk tokens. provenance: JSON-like facts about the fit."""

    sizes: ChunkSizes
    constants: ChunkConstants
    normaliser: Normaliser | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def model(self, *, dtype: torch.dtype = torch.float32) -> ChunkTokenizer:
        """The tokenizer, in evaluation mode. Raises SettingsError where sizes, constants and normaliser do not fit."""
        return ChunkTokenizer(self.sizes, self.constants, self.normaliser).to(dtype).eval()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file: float32, and the order int16."""
        tensors = {name: value for name, value in vars(self.constants).items() if isinstance(value, Tensor)}
        return tensors | {"order": self.constants.order.to(_ORDER_TYPE)}


def save_chunk_checkpoint(checkpoint: ChunkCheckpoint, path: str | os.PathLike[str]) -> None:
    """Write our own format; raises as `write_own`. Equal checkpoints give equal files."""
    header = _Header(checkpoint.sizes, checkpoint.constants.budgets, checkpoint.normaliser, dict(checkpoint.provenance))
    write_own(TokenKind.CHUNK, asdict(header), checkpoint.tensors(), path)


def load_chunk_checkpoint(path: str | os.PathLike[str]) -> ChunkCheckpoint:
    """Read what `save_chunk_checkpoint` wrote. provenance["checkpoint_sha256"]: of the file. Raises CheckpointError."""
    fit = quoted("calibrate", "--kind chunk")
    path, content = read_content(path, f"fit one with {fit}")
    tensors, metadata = read_safetensors(content, path) if path.suffix == SUFFIX else ({}, {})
    if _FORMAT not in metadata:
        raise CheckpointError(f"{path} holds no chunk tokens; expected a {SUFFIX} file that {fit} wrote")
    with reading_header(path):
        fields = parse_header(metadata[_FORMAT], path)
        names = _Header.__dataclass_fields__
        header = build(_Header, {name: value for name, value in fields.items() if name in names}, "it")
    check_hash(fields, tensors, path)
    constants = _constants(tensors, header, path)
    require_known(tensors, path)
    sha256 = hashlib.sha256(content).hexdigest()
    checkpoint = ChunkCheckpoint(
        header.sizes, constants, header.normaliser, {**header.provenance, "checkpoint_sha256": sha256}
    )
    try:
        checkpoint.model()
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint


def _constants(tensors: dict[str, Tensor], header: _Header, path: Path) -> ChunkConstants:
    """Take them out of all tensors of a file. Raises CheckpointError."""
    classes, values = header.sizes.num_classes - 1, header.sizes.num_values
    latents = tensors["basis"].shape[-1] if "basis" in tensors and tensors["basis"].ndim else 0
    shapes = {
        "mean": (classes, values),
        "basis": (classes, values, latents),
        "scale": (classes, latents),
        "gain": (classes, latents, MOST_BITS + 1),
        "weights": (len(header.budgets),),
    }
    taken = {name: take(tensors, name, shape, path) for name, shape in shapes.items()}
    order = tensors.pop("order", None)
    if order is None or order.dtype is not _ORDER_TYPE:
        found = "no order" if order is None else f"an order of type {order.dtype}"
        raise CheckpointError(f"{path} has {found}; expected {_ORDER_TYPE}: fit again")
    return ChunkConstants(order=order.long(), budgets=header.budgets, **taken)
