"""What the manifest says of a model: sizes, and what tokens and actions mean. There are two kinds of tokens.

Per-step tokens code each control step on its own, int32 [B, T, D, L]. Chunk tokens code all steps of a chunk together,
int32 [B, L] (docs/chunk_tokens.md). Either way the last axis goes from coarse to fine, and a prefix of it decodes.
"""

from __future__ import annotations

import math
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidInputError
from .modes import Mode, StepMode

#: Physical units per normalised one, from picometres in metres to encoders of many turns. Errors are judged in
#: normalised units: with units too large, no error would be one.
LEAST_UNIT, LARGEST_UNIT = 1e-12, 1e12
#: Least and largest sizes of a model of per-step tokens; beyond 2**24, float32 does not tell the levels of a grid
#: apart. A real model is far smaller, and a file that states more would take all memory before anything else is seen
#: to be wrong with it.
SIZE_LIMITS: Mapping[str, tuple[int, int]] = types.MappingProxyType(
    {
        "chunk_length": (1, 2**16),
        "action_dim": (1, 2**16),
        "latent_dim": (1, 2**16),
        "hidden_width": (1, 2**16),
        "num_layers": (1, 2**10),
        "num_levels": (2, 2**24),
    }
)
#: The same of chunk tokens.
CHUNK_LIMITS: Mapping[str, tuple[int, int]] = types.MappingProxyType(
    {
        "action_dim": (1, 64),
        "chunk_length": (1, 64),
        "num_classes": (2, 256),
        "token_bits": (4, 16),
        "num_tokens": (1, 256),
    }
)


class ModelEntry(ABC):
    """What both kinds state, and what follows from it. Sizes that only one kind has are in its own class.

    mode: how the tokens are made; chunk_length T; action_dim A; prefixes: how much of the last axis of tokens can be
    decoded, ascending, the last is `depth`; action_limit: the largest |action| (physical units) for which no float32
    intermediate can overflow; action_units, action_offset: physical units per normalised unit, and what is 0 there,
    one for each of A.
    """

    mode: Mode
    chunk_length: int
    action_dim: int
    prefixes: tuple[int, ...]
    action_limit: float
    action_units: tuple[float, ...]
    action_offset: tuple[float, ...]

    @property
    @abstractmethod
    def depth(self) -> int:
        """L: the length of the last axis of whole tokens."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many values a token has: 0 ... vocabulary - 1."""

    @property
    @abstractmethod
    def token_grid(self) -> tuple[int, ...]:
        """The axes of tokens between the first and the last: (T, D), or none."""

    @property
    @abstractmethod
    def size_limits(self) -> Mapping[str, tuple[int, int]]:
        """Least and largest of each size."""

    @property
    @abstractmethod
    def decoder_graphs(self) -> tuple[int, ...]:
        """The largest prefix that each of the decoder's graphs takes, ascending."""

    @property
    @abstractmethod
    def sizes_text(self) -> str:
        """The sizes in one line, by their letters."""

    @property
    @abstractmethod
    def depth_unit(self) -> str:
        """What the last axis of tokens counts, for people: layers or tokens."""

    @property
    def decoders(self) -> tuple[str, ...]:
        """What gates call that which they decode: `decoder_of` of each prefix, without repetition."""
        return tuple(dict.fromkeys(map(self.decoder_of, self.prefixes)))

    def decoder_of(self, prefix: int) -> str:
        """What gates call the decoding of so much of the last axis."""
        return f"{prefix} {self.depth_unit}"

    @property
    def prefixes_text(self) -> str:
        """Which prefixes decode, for people."""
        return f"{', '.join(map(str, self.prefixes))} {self.depth_unit}"

    @property
    def key_prefixes(self) -> tuple[int, ...]:
        """The prefixes that benchmarks and comparisons decode, ascending; the last is `depth`."""
        return self.prefixes

    @property
    def narrow_type(self) -> Literal["uint8", "uint16"]:
        """The narrow type that tokens may have beside int32: a vocabulary of many words does not fit into bytes."""
        return "uint8" if self.token_grid else "uint16"

    @property
    def step_latents(self) -> int:
        """How many latents of a step have L tokens of their own: D; of chunk tokens, which have L together, 1."""
        return self.token_grid[-1] if self.token_grid else 1

    @property
    def has_stats(self) -> bool:
        """Whether encoding gives, and decoding takes, mean and sigma of every layer (float32 [B, T, l, 2])."""
        return False

    @property
    def is_step_coupled(self) -> bool:
        """Whether a token depends on all latents of its step, so that one flip moves the later layers of them all."""
        return False

    def __repr__(self) -> str:
        """What a person wants to know; `dataclasses.asdict` has every field."""
        return f"{type(self).__name__}({self.mode}, {self.sizes_text}, decodes {self.prefixes_text})"

    def graph_of(self, prefix: int) -> int:
        """The largest prefix of the graph that decodes `prefix`."""
        return next(largest for largest in self.decoder_graphs if largest >= prefix)

    def bits_per_step(self, prefix: int) -> float:
        """What the tokens of a prefix take, side information apart: log2 of the vocabulary for each."""
        return math.prod(self.tokens_shape(1, prefix)) * math.log2(self.vocabulary) / self.chunk_length

    def actions_shape(self, batch: int) -> tuple[int, int, int]:
        """[B, T, A]."""
        return (batch, self.chunk_length, self.action_dim)

    def tokens_shape(self, batch: int, prefix: int | None = None) -> tuple[int, ...]:
        """[B, T, D, l] or [B, l]; prefix: l, None for all L."""
        return (batch, *self.token_grid, self.depth if prefix is None else prefix)

    def stats_shape(self, batch: int, prefix: int | None = None) -> tuple[int, int, int, int]:
        """[B, T, l, 2]; prefix: l, None for all L."""
        return (batch, self.chunk_length, self.depth if prefix is None else prefix, 2)


@dataclass(frozen=True, repr=False)
class StepModel(ModelEntry):
    """Per-step tokens. prefixes: the numbers of layers that there are decoders for."""

    mode: StepMode
    chunk_length: int
    action_dim: int
    latent_dim: int
    hidden_width: int
    num_layers: int
    num_levels: int
    prefixes: tuple[int, ...]
    action_limit: float
    action_units: tuple[float, ...]
    action_offset: tuple[float, ...]

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def vocabulary(self) -> int:
        return self.num_levels

    @property
    def token_grid(self) -> tuple[int, ...]:
        return (self.chunk_length, self.latent_dim)

    @property
    def size_limits(self) -> Mapping[str, tuple[int, int]]:
        return SIZE_LIMITS

    @property
    def decoder_graphs(self) -> tuple[int, ...]:
        return self.prefixes

    @property
    def depth_unit(self) -> str:
        return "layers"

    @property
    def sizes_text(self) -> str:
        return (
            f"T {self.chunk_length}, A {self.action_dim}, D {self.latent_dim}, L {self.num_layers}, K "
            f"{self.num_levels}, hidden {self.hidden_width}"
        )

    @property
    def has_stats(self) -> bool:
        return self.mode == "dynamic"

    @property
    def is_step_coupled(self) -> bool:
        return self.mode in ("dynamic", "recovered")


@dataclass(frozen=True, repr=False)
class ChunkModel(ModelEntry):
    """Chunk tokens. prefixes: all from 1 to L.

    num_classes C, escape among them; token_bits: of one token; num_tokens L; num_latents M; budgets: the numbers of
    tokens at which the encoder weighs errors, and at which a value in the calibrated range errs by no more than
    `bounds`, in normalised units.
    """

    mode: Literal["chunk"]
    chunk_length: int
    action_dim: int
    num_classes: int
    token_bits: int
    num_tokens: int
    num_latents: int
    prefixes: tuple[int, ...]
    budgets: tuple[int, ...]
    bounds: tuple[float, ...]
    action_limit: float
    action_units: tuple[float, ...]
    action_offset: tuple[float, ...]

    @property
    def depth(self) -> int:
        return self.num_tokens

    @property
    def vocabulary(self) -> int:
        return int(2**self.token_bits)

    @property
    def class_bits(self) -> int:
        """The first bits of token 0, which name the class."""
        return (self.num_classes - 1).bit_length()

    @property
    def code_bits(self) -> int:
        """Bits of a chunk behind those of its class."""
        return self.token_bits * self.num_tokens - self.class_bits

    @property
    def belief_columns(self) -> int:
        """Columns of bits that a belief graph takes: those of the first token for each class, those behind, and one."""
        return (self.token_bits - self.class_bits) * (self.num_classes - 1) + self.code_bits + 1

    @property
    def token_grid(self) -> tuple[int, ...]:
        return ()

    @property
    def size_limits(self) -> Mapping[str, tuple[int, int]]:
        return CHUNK_LIMITS

    @property
    def decoder_graphs(self) -> tuple[int, ...]:
        return (self.num_tokens,)

    @property
    def depth_unit(self) -> str:
        return "tokens"

    def decoder_of(self, prefix: int) -> str:
        return super().decoder_of(prefix) if prefix == self.num_tokens else "fewer tokens"

    @property
    def key_prefixes(self) -> tuple[int, ...]:
        """The first and the middle budget, and all: the others lie between."""
        return tuple(sorted({self.budgets[0], self.budgets[len(self.budgets) // 2], self.num_tokens}))

    @property
    def prefixes_text(self) -> str:
        return f"any first of {self.num_tokens} tokens"

    @property
    def sizes_text(self) -> str:
        return (
            f"T {self.chunk_length}, A {self.action_dim}, {self.num_tokens} tokens of {self.vocabulary}, "
            f"{self.num_classes} classes"
        )


def step_model(model: ModelEntry, what: str) -> StepModel:
    """The model of per-step tokens; what: which takes these alone. Raises InvalidInputError for chunk tokens."""
    if isinstance(model, StepModel):
        return model
    raise InvalidInputError(f"{what} takes per-step tokens alone, and this bundle has {model.mode} tokens")
