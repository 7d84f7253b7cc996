"""OAT, ordered action tokens (Liu et al. 2026, arXiv 2602.04215), after the paper.

An encoder reads the steps of a chunk and R registers. Steps attend to all steps, register r to all steps and to the
registers up to r. Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505) makes each register a token. A
decoder, whose queries are the steps' positions, attends to the tokens. Nested dropout puts one learned vector in the
place of all tokens behind a random prefix, so that every prefix decodes.

Of the paper: two layers of encoder, four of decoder, 256 wide, heads of 64, levels 8, 5, 5 and 5, mean squared error,
gradients of at most 1. Otherwise than there, to its advantage here: a learning rate that falls to 0 in the place of a
moving average of weights, and actions in the units in which errors are judged.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.networks import ChunkNetwork, decoder_layers, encoder_layers
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import check_positive

#: By so much the outermost levels lie within what the bound reaches.
_SLACK = 1e-3


@dataclass(frozen=True)
class OatConfig:
    """prefixes: how many registers nested dropout keeps, each as often; the last is the number of registers.

    levels: of the scalars of one token; width, heads, dropout: of both transformers.
    """

    chunk_length: int = 8
    prefixes: tuple[int, ...] = (1, 2, 4, 8)
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = 256
    heads: int = 4
    encoder_depth: int = 2
    decoder_depth: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "chunk_length", "width", "heads", "encoder_depth", "decoder_depth", error=EvidenceError)
        if not self.prefixes or list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[0] < 1:
            raise EvidenceError(f"prefixes are {self.prefixes}; expected rising numbers of tokens like 1, 2, 4, 8")
        if not self.levels or min(self.levels) < 2:
            raise EvidenceError(f"levels are {self.levels}; expected at least one number, each 2 or more")

    @property
    def registers(self) -> int:
        return self.prefixes[-1]


class ScalarQuantizer(nn.Module):
    """Latents [..., S] to codes [..., S] in [-1, 1] of so many levels each, with straight-through gradients."""

    counts: Tensor
    reach: Tensor
    offset: Tensor
    shift: Tensor
    bases: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        counts = torch.tensor(levels)
        reach = (counts - 1) * (1 + _SLACK) / 2
        # An even number of levels has none in the middle: all move by half a level.
        offset = (counts % 2 == 0) * 0.5
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.atanh(offset / reach), persistent=False)
        bases = torch.cumprod(torch.tensor((1, *levels[:-1])), dim=0)
        self.register_buffer("bases", bases, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        bounded = torch.tanh(latents + self.shift) * self.reach - self.offset
        codes: Tensor = (bounded + (bounded.round() - bounded).detach()) / (self.counts // 2)
        return codes

    def tokens(self, codes: Tensor) -> Tensor:
        """Codes [..., S] to tokens int64 [...]."""
        half = self.counts // 2
        return ((codes * half + half).round().long() * self.bases).sum(dim=-1)

    def codes(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        half = self.counts // 2
        return (tokens.unsqueeze(-1) // self.bases % self.counts - half) / half


class OatNetwork(ChunkNetwork):
    """Encoder, scalar quantiser, decoder."""

    encoder_mask: Tensor
    decoder_mask: Tensor
    kept_counts: Tensor

    def __init__(self, config: OatConfig, action_dim: int, normaliser: Normaliser | None = None) -> None:
        super().__init__(action_dim, normaliser)
        self.chunk_length, self.prefixes = config.chunk_length, config.prefixes
        self.vocabulary = math.prod(config.levels)
        length, registers, width = config.chunk_length, config.registers, config.width
        self.embed = nn.Linear(action_dim, width)
        self.step_places = nn.Parameter(0.02 * torch.randn(length, width))
        self.register_tokens = nn.Parameter(torch.randn(registers, width))
        self.encoder = encoder_layers(config, config.encoder_depth)
        self.to_latents = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(config.levels)))
        self.quantizer = ScalarQuantizer(config.levels)
        self.from_codes = nn.Linear(len(config.levels), width)
        self.token_places = nn.Parameter(0.02 * torch.randn(registers, width))
        self.missing = nn.Parameter(0.02 * torch.randn(width))
        self.queries = nn.Parameter(torch.randn(length, width))
        self.decoder = decoder_layers(config, config.decoder_depth)
        self.to_actions = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, action_dim))
        # True where attention is forbidden.
        seen = torch.zeros(length + registers, length + registers, dtype=torch.bool)
        seen[:length, length:] = True
        seen[length:, length:] = torch.ones(registers, registers, dtype=torch.bool).triu(1)
        self.register_buffer("encoder_mask", seen, persistent=False)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("decoder_mask", later, persistent=False)
        self.register_buffer("kept_counts", torch.tensor(config.prefixes), persistent=False)

    def codes(self, chunks: Tensor) -> Tensor:
        """Normalised chunks [B, T, A] to codes [B, R, S]."""
        steps = self.embed(chunks) + self.step_places
        x = torch.cat((steps, self.register_tokens.expand(len(chunks), -1, -1)), dim=1)
        for layer in self.encoder:
            x = layer(x, src_mask=self.encoder_mask)
        codes: Tensor = self.quantizer(self.to_latents(x[:, chunks.shape[1] :]))
        return codes

    def decode_codes(self, codes: Tensor, kept: Tensor) -> Tensor:
        """Codes [B, R, S], of which the first kept [B, 1] count, to normalised chunks [B, T, A]."""
        memory = self.from_codes(codes) + self.token_places
        is_kept = torch.arange(memory.shape[1], device=codes.device) < kept
        memory = torch.where(is_kept.unsqueeze(-1), memory, self.missing)
        x = self.queries.expand(len(codes), -1, -1)
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=self.decoder_mask)
        chunks: Tensor = self.to_actions(x)
        return chunks

    def loss(self, chunks: Tensor) -> Tensor:
        chosen = torch.randint(len(self.kept_counts), (len(chunks), 1), device=chunks.device)
        return mse_loss(self.decode_codes(self.codes(chunks), self.kept_counts[chosen]), chunks)

    def encode_chunks(self, chunks: Tensor) -> Tensor:
        return self.quantizer.tokens(self.codes(chunks))

    def decode_chunks(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        codes = self.quantizer.codes(nn.functional.pad(tokens, (0, self.prefixes[-1] - count)))
        return self.decode_codes(codes, torch.full((len(tokens), 1), count, device=tokens.device))
