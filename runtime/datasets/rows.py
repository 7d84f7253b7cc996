"""What a row of a converted dataset holds: the tokens of a step, or those of the chunk that begins there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    # The command reads these sizes where there is no numpy.
    from ..bundle.arrays import AnyArray

Content = Literal["tokens", "actions"]


@dataclass(frozen=True)
class FileSizes:
    """rows: of a file, which is made or remade as a whole; block: of a row group of Parquet or a chunk of Zarr, which
    is read at once."""

    rows: int
    block: int


#: Of files with a row for each step, and with a row for each chunk, which holds more and takes longer to make.
STEP_SIZES, CHUNK_SIZES = FileSizes(262_144, 65_536), FileSizes(32_768, 8192)


class TokenModel(ABC):
    """The sizes that give tokens and actions their shapes, as in the bundle, and how rows hold them.

    schema_version: of datasets of such tokens; dtype: of a token, as numpy names it; ordering: of the tokens of a row;
    unit: what a row of tokens is of; token_sizes: of files of them.
    """

    schema_version: ClassVar[int]
    dtype: ClassVar[str]
    ordering: ClassVar[str]
    unit: ClassVar[str]
    token_sizes: ClassVar[FileSizes]

    mode: str
    chunk_length: int
    action_dim: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the tokens of a row."""

    @abstractmethod
    def width(self, content: Content) -> int:
        """Values of a row: tokens, or the A actions of a step."""

    @abstractmethod
    def source_width(self, content: Content) -> int:
        """Values of a row of what `content` is made of."""

    def sizes(self, content: Content) -> FileSizes:
        return self.token_sizes if content == "tokens" else STEP_SIZES

    @abstractmethod
    def rows_of(self, lengths: AnyArray, content: Content) -> AnyArray:
        """How many rows episodes of so many steps have, [E]."""


@dataclass(frozen=True)
class StepTokens(TokenModel):
    """A row for each step, with its D * L tokens: each step is coded on its own."""

    schema_version: ClassVar[int] = 1
    dtype: ClassVar[str] = "|u1"
    ordering: ClassVar[str] = (
        "one byte per token, latent by latent: byte d * num_layers + l of a step is layer l of latent d"
    )
    unit: ClassVar[str] = "step"
    token_sizes: ClassVar[FileSizes] = STEP_SIZES

    mode: str
    chunk_length: int
    action_dim: int
    latent_dim: int
    num_layers: int
    num_levels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.latent_dim, self.num_layers)

    def width(self, content: Content) -> int:
        return self.latent_dim * self.num_layers if content == "tokens" else self.action_dim

    def source_width(self, content: Content) -> int:
        return self.width("actions" if content == "tokens" else "tokens")

    def rows_of(self, lengths: AnyArray, content: Content) -> AnyArray:
        del content
        return lengths


@dataclass(frozen=True)
class ChunkTokens(TokenModel):
    """A row for every `stride`-th step of an episode, with the first tokens of the T steps from there on.

    num_tokens: how many of them, at most the bundle's; stride: 1 to T, so that the first `stride` steps of all rows are
    every step once. Actions are made of rows with the tokens of a step's chunk, and then its place there.
    """

    schema_version: ClassVar[int] = 2
    dtype: ClassVar[str] = "<u2"
    ordering: ClassVar[str] = (
        "two bytes per token, little-endian: the first num_tokens tokens, coarse to fine, of the chunk_length steps "
        "that begin at the row's step; beyond the end of an episode its last action is repeated"
    )
    unit: ClassVar[str] = "chunk"
    token_sizes: ClassVar[FileSizes] = CHUNK_SIZES

    mode: str
    chunk_length: int
    action_dim: int
    num_tokens: int
    vocabulary: int
    stride: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_tokens,)

    def width(self, content: Content) -> int:
        return self.num_tokens if content == "tokens" else self.action_dim

    def source_width(self, content: Content) -> int:
        return self.chunk_length * self.action_dim if content == "tokens" else self.num_tokens + 1

    def rows_of(self, lengths: AnyArray, content: Content) -> AnyArray:
        return -(-lengths // self.stride) if content == "tokens" else lengths
