"""FASTerVQ (Liu et al. 2025, arXiv 2512.04952), a small one after the paper: residual vector quantisation of chunks
that are taken for pictures of one channel.

The picture has steps as rows and dimensions as columns. It is cut into patches: rows into spans of equal length,
columns by what they are (position, rotation, gripper), the narrower groups filled up with zeros. A transformer makes
a latent of each patch, every latent is quantised by the same residual codebooks, and another transformer makes patches
of them. Tokens come layer by layer, so that the first layers are a coarser code; training leaves out a random number of
the last ones.

The paper's loss is an absolute error, in time and of the cosine transform. Here it is the squared error, to its
advantage, as squared errors are judged; that of the orthonormal transform is the same number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.networks import ChunkNetwork, encoder_layers
from rfsq.evidence.settings import ARM_DIMENSIONS
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import check_positive

#: Position, rotation, gripper.
_ARM_GROUPS = (3, 3, 1)
#: Of the moving averages that are the codebooks, and the share of a token below which an entry starts anew.
_DECAY, _UNUSED = 0.99, 0.02
_COMMITMENT = 0.25


@dataclass(frozen=True)
class FasterConfig:
    """span: steps of a patch; groups: how many dimensions of each column of patches; layers, codebook_size, code_dim:
    of the residual codebooks; width, heads, depth, dropout: of both transformers."""

    chunk_length: int = 8
    span: int = 8
    groups: tuple[int, ...] = _ARM_GROUPS
    layers: int = 12
    codebook_size: int = 4096
    code_dim: int = 32
    width: int = 256
    heads: int = 4
    depth: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(
            self, "chunk_length", "span", "layers", "codebook_size", "code_dim", "width", "depth", error=EvidenceError
        )
        if self.chunk_length % self.span:
            raise EvidenceError(f"spans of {self.span} steps do not fill a chunk of {self.chunk_length}; expected so")

    @property
    def patches(self) -> int:
        return self.chunk_length // self.span * len(self.groups)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Whole layers."""
        return tuple(range(self.patches, self.patches * self.layers + 1, self.patches))


def arm_groups(action_dim: int) -> tuple[int, ...]:
    """Columns of patches: of arms of 7 dimensions as the paper has them, else three dimensions each."""
    if action_dim % ARM_DIMENSIONS == 0:
        return _ARM_GROUPS * (action_dim // ARM_DIMENSIONS)
    return (3,) * (action_dim // 3) + ((action_dim % 3,) if action_dim % 3 else ())


class ResidualCodebooks(nn.Module):
    """Layer by layer the nearest entry, which is taken off the latent. Entries are moving averages of what was nearest
    to them; one that is hardly used starts anew at a latent of the batch."""

    entries: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, layers: int, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(layers, size, dim))
        self.register_buffer("sums", torch.zeros(layers, size, dim))
        # All unused: the first batch is what they start at.
        self.register_buffer("counts", torch.zeros(layers, size))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [M, C] to tokens int64 [M, N], the entries [M, N, C] that they name, and the mean square [] of what
        each residual is away from its entry. In training the entries move."""
        residual, tokens, codes, commitments = latents, [], [], []
        for layer in range(len(self.entries)):
            entries = self.entries[layer]
            with torch.no_grad():
                nearest = nearest_entries(residual, entries)
                if self.training:
                    self._move(layer, residual, nearest)
            # As they are now: in training they have just moved.
            code = self.entries[layer][nearest].clone()
            commitments.append(mse_loss(residual, code))
            residual = residual - code
            tokens.append(nearest)
            codes.append(code)
        return torch.stack(tokens, dim=1), torch.stack(codes, dim=1), torch.stack(commitments).mean()

    def _move(self, layer: int, residual: Tensor, nearest: Tensor) -> None:
        size = self.counts.shape[1]
        hits = torch.zeros(size, device=residual.device).index_add_(0, nearest, torch.ones_like(residual[:, 0]))
        sums = torch.zeros_like(self.sums[layer]).index_add_(0, nearest, residual)
        self.counts[layer].lerp_(hits, 1 - _DECAY)
        self.sums[layer].lerp_(sums, 1 - _DECAY)
        fresh = residual[torch.randint(len(residual), (size,), device=residual.device)]
        is_unused = self.counts[layer] < _UNUSED * len(residual) / size
        self.counts[layer].copy_(torch.where(is_unused, 1.0, self.counts[layer]))
        self.sums[layer].copy_(torch.where(is_unused.unsqueeze(-1), fresh, self.sums[layer]))
        self.entries[layer].copy_(self.sums[layer] / self.counts[layer].unsqueeze(-1))


def nearest_entries(vectors: Tensor, entries: Tensor) -> Tensor:
    """The index [M] of the entry [K, C] that is nearest to each vector [M, C]."""
    distances = entries.square().sum(dim=1) - 2 * vectors @ entries.T
    return distances.argmin(dim=1)


class FasterNetwork(ChunkNetwork):
    """Patches, encoder, residual codebooks, decoder, patches."""

    def __init__(self, config: FasterConfig, action_dim: int, normaliser: Normaliser | None = None) -> None:
        super().__init__(action_dim, normaliser)
        if sum(config.groups) != action_dim:
            raise EvidenceError(f"groups {config.groups} have not {action_dim} dimensions together; expected so")
        self.config, self.vocabulary = config, config.codebook_size
        self.chunk_length, self.prefixes = config.chunk_length, config.prefixes
        width, values = config.width, config.span * max(config.groups)
        self.embed = nn.Linear(values, width)
        self.patch_places = nn.Parameter(0.02 * torch.randn(config.patches, width))
        self.encoder = encoder_layers(config, config.depth)
        self.to_latents = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.code_dim))
        self.codebooks = ResidualCodebooks(config.layers, config.codebook_size, config.code_dim)
        self.from_codes = nn.Linear(config.code_dim, width)
        self.code_places = nn.Parameter(0.02 * torch.randn(config.patches, width))
        self.decoder = encoder_layers(config, config.depth)
        self.to_patches = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, values))

    def patches(self, chunks: Tensor) -> Tensor:
        """Chunks [B, T, A] to patches [B, P, span * widest group], spans of steps outside."""
        groups, span = self.config.groups, self.config.span
        columns = torch.split(chunks, list(groups), dim=2)
        wide = torch.stack([pad(column, (0, max(groups) - column.shape[2])) for column in columns], dim=2)
        return (
            wide.reshape(len(chunks), -1, span, *wide.shape[2:])
            .transpose(2, 3)
            .reshape(len(chunks), self.config.patches, -1)
        )

    def picture(self, patches: Tensor) -> Tensor:
        """The inverse of `patches`."""
        groups, span = self.config.groups, self.config.span
        spans = patches.reshape(len(patches), -1, len(groups), span, max(groups)).transpose(2, 3)
        columns = spans.reshape(len(patches), -1, len(groups), max(groups)).unbind(dim=2)
        return torch.cat([column[..., :size] for column, size in zip(columns, groups, strict=True)], dim=2)

    def latents(self, chunks: Tensor) -> Tensor:
        """Normalised chunks [B, T, A] to latents [B * P, C]."""
        x = self.embed(self.patches(chunks)) + self.patch_places
        for layer in self.encoder:
            x = layer(x)
        latents: Tensor = self.to_latents(x)
        return latents.flatten(0, 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Sums of entries [B * P, C] to normalised chunks [B, T, A]."""
        x = self.from_codes(codes.reshape(-1, self.config.patches, codes.shape[-1])) + self.code_places
        for layer in self.decoder:
            x = layer(x)
        patches: Tensor = self.to_patches(x)
        return self.picture(patches)

    def loss(self, chunks: Tensor) -> Tensor:
        latents = self.latents(chunks)
        _, codes, commitment = self.codebooks(latents)
        # All patches of a chunk lose the same layers.
        kept = torch.randint(1, self.config.layers + 1, (len(chunks), 1), device=chunks.device)
        is_kept = torch.arange(self.config.layers, device=chunks.device) < kept
        is_kept = is_kept.unsqueeze(1).expand(-1, self.config.patches, -1).flatten(0, 1)
        chosen = (codes * is_kept.unsqueeze(-1)).sum(dim=1)
        # Straight through: the gradient of what was quantised goes to the latent.
        decoded = self.decode_codes(latents + (chosen - latents).detach())
        loss: Tensor = mse_loss(decoded, chunks) + _COMMITMENT * commitment
        return loss

    def encode_chunks(self, chunks: Tensor) -> Tensor:
        found: Tensor = self.codebooks(self.latents(chunks))[0]
        tokens: Tensor = found.reshape(len(chunks), self.config.patches, -1).transpose(1, 2).flatten(1)
        return tokens

    def decode_chunks(self, tokens: Tensor) -> Tensor:
        """See ChunkNetwork. A layer that is not whole counts for the patches whose tokens are there."""
        count, patches = tokens.shape[1], self.config.patches
        layers = -(-count // patches)
        by_patch = pad(tokens, (0, layers * patches - count)).reshape(-1, layers, patches).transpose(1, 2)
        place = torch.arange(layers, device=tokens.device) * patches
        is_there = place + torch.arange(patches, device=tokens.device).unsqueeze(-1) < count
        entries = self.codebooks.entries[torch.arange(layers, device=tokens.device), by_patch]
        codes: Tensor = (entries * is_there.unsqueeze(-1)).sum(dim=2)
        return self.decode_codes(codes.flatten(0, 1))
