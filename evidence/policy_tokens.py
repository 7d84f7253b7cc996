"""What a policy says for a chunk: the tokens of several tokenizers, and what any first few of them decode to."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from math import log2
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rfsq.calibration.chunk import ChunkFitConfig, fit_chunk_code
from rfsq.calibration.chunk_windows import windows
from rfsq.evidence.fast import FastCodec, fit_fast
from rfsq.evidence.networks import ChunkNetwork, NetworkRecipe, train_network
from rfsq.evidence.oat import OatConfig, OatNetwork
from rfsq.evidence.policies import NOTHING
from rfsq.evidence.schemes import BinCodec, BinRange, fit_bins
from rfsq.evidence.workers import results_of
from rfsq.rfsq_ref.chunk_bits import binary, number
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit

#: Chunk tokens are judged at these numbers of tokens, and all of them.
_PREFIXES = (1, 2, 3, 4, 6, 8, 12, 16)
#: Chunks that a network encodes at a time.
_ENCODED = 2048


@dataclass(frozen=True, eq=False)
class PolicyTokens(ABC):
    """name: as a table shows it; vocabulary: of every token, with an end marker where there is one."""

    name: str
    vocabulary: int

    @abstractmethod
    def encode(self, chunks: Tensor) -> Tensor:
        """Actions [n, T, A] to int64 [n, L], the same L for any chunks that follow; NOTHING behind an end marker."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """The first l tokens [n, l], one of `prefixes`, whatever they are, to actions [n, T, A]."""

    @abstractmethod
    def bits(self, tokens: Tensor) -> float:
        """Mean of the first l tokens [n, l] of a chunk: log2 of the words that each chooses from."""

    @property
    @abstractmethod
    def prefixes(self) -> tuple[int, ...]:
        """At how many of the tokens it is judged, rising, all of them last."""


@dataclass(frozen=True, eq=False)
class BinTokens(PolicyTokens):
    """One token for each step and dimension, step by step. shape: T, A."""

    codec: BinCodec
    shape: tuple[int, int]

    def encode(self, chunks: Tensor) -> Tensor:
        return torch.from_numpy(self.codec.tokens(chunks.float().numpy())).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.codec.decode(tokens.reshape(-1, *self.shape).numpy()))

    def bits(self, tokens: Tensor) -> float:
        return float(tokens.shape[1] * self.codec.bits)

    @property
    def prefixes(self) -> tuple[int, ...]:
        return (self.shape[0] * self.shape[1],)


@dataclass(frozen=True, eq=False)
class FastTokens(PolicyTokens):
    """As many as each chunk takes, and an end marker. chunk_length: T; num_tokens: the most that are said."""

    codec: FastCodec
    chunk_length: int
    num_tokens: int

    @property
    def end(self) -> int:
        """The end marker, the last word."""
        return self.vocabulary - 1

    def encode(self, chunks: Tensor) -> Tensor:
        ids = [torch.tensor([*found, self.end]) for found in self.codec.tokens(chunks.float().numpy())]
        # The first row makes all rows as long as they may be.
        longest = torch.empty(self.num_tokens, dtype=torch.long)
        padded = pad_sequence([longest, *ids], batch_first=True, padding_value=NOTHING)
        return padded[1:, : self.num_tokens]

    def decode(self, tokens: Tensor) -> Tensor:
        ids = [row[:count] for row, count in zip(tokens.tolist(), self.counts(tokens).tolist(), strict=True)]
        return torch.from_numpy(self.codec.decode(ids, self.chunk_length))

    def counts(self, tokens: Tensor) -> Tensor:
        """How many tokens [n] stand before the end marker."""
        return (tokens != self.end).long().cumprod(dim=1).sum(dim=1)

    def bits(self, tokens: Tensor) -> float:
        """Without the end marker: where a chunk ends follows from what its tokens say."""
        return float(self.counts(tokens).double().mean()) * log2(self.end)

    @property
    def prefixes(self) -> tuple[int, ...]:
        return (self.num_tokens,)


@dataclass(frozen=True, eq=False)
class ChunkTokens(PolicyTokens):
    """The bits of chunk tokens, cut anew: a policy says so many of them with each token. code: in float64."""

    code: ChunkCode
    cut: tuple[int, ...]

    def encode(self, chunks: Tensor) -> Tensor:
        bits = _bits(self.code, chunks)
        parts = torch.split(bits[:, : sum(self.cut)], list(self.cut), dim=1)
        return torch.stack([number(part) for part in parts], dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """A word that a token of fewer bits does not have means the last that it has."""
        cut = self.cut[: tokens.shape[1]]
        said = zip(tokens.unbind(dim=1), cut, strict=True)
        bits = torch.cat([binary(token.clamp(max=(1 << size) - 1), size) for token, size in said], dim=1)
        sizes = self.code.sizes
        return self.code.decode_bits(bits).reshape(-1, sizes.chunk_length, sizes.action_dim)

    def bits(self, tokens: Tensor) -> float:
        return float(sum(self.cut[: tokens.shape[1]]))

    @property
    def prefixes(self) -> tuple[int, ...]:
        least = next(count for count, bits in enumerate(accumulate(self.cut), 1) if bits >= self.code.sizes.class_bits)
        return (*(count for count in _PREFIXES if least <= count < len(self.cut)), len(self.cut))


@dataclass(frozen=True, eq=False)
class NetworkTokens(PolicyTokens):
    """Those of a trained tokenizer."""

    network: ChunkNetwork

    def on_device(self) -> Self:
        """With the network where it is fast."""
        self.network.to(_device())
        return self

    @torch.no_grad()
    def encode(self, chunks: Tensor) -> Tensor:
        actions = chunks.float().to(self.network.offset.device)
        parts = torch.split(self.network.normalised(actions), _ENCODED)
        return torch.cat([self.network.encode_chunks(part) for part in parts]).cpu()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        chunks = self.network.decode_chunks(tokens.to(self.network.offset.device))
        return (chunks * self.network.units + self.network.offset).cpu()

    def bits(self, tokens: Tensor) -> float:
        return tokens.shape[1] * log2(self.vocabulary)

    @property
    def prefixes(self) -> tuple[int, ...]:
        return self.network.prefixes


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=4)
def _bits(code: ChunkCode, chunks: Tensor) -> Tensor:
    """All bits of chunks [n, T, A]: found once for all cuts."""
    return code.bits(code.encode(chunks.flatten(1).double()))


def all_tokens(split: EpisodeSplit, chunk_length: int, recipe: NetworkRecipe) -> list[PolicyTokens]:
    """Those that are compared, fitted to the training and calibration episodes, whose actions must lie in [-1, 1].

    recipe: of what is trained. Raises DataError or EvidenceError.
    """
    bins = [fit_bins(split.train.steps(), BinRange.FULL, bits) for bits in (8, 6)]
    shape = (chunk_length, split.train.action_dim)
    found: list[PolicyTokens] = [BinTokens(f"{1 << each.bits} bins", 1 << each.bits, each, shape) for each in bins]
    chunks = windows(split.train.episodes, chunk_length).reshape(-1, *shape)
    found += [fit_fast_tokens(chunks, scale) for scale in (10.0, 20.0)]
    sizes = ChunkSizes(split.train.action_dim, chunk_length)
    for is_shared, words in ((False, "own order"), (True, "shared order")):
        config = ChunkFitConfig(has_shared_order=is_shared)
        code = ChunkCode(
            sizes, fit_chunk_code(split.train.episodes, split.calibration.episodes, sizes, config)
        ).double()
        found += chunk_tokens(code, words)
    held_out = windows(split.calibration.episodes, chunk_length).reshape(-1, *shape)
    trainings = [
        (f"OAT, {count} registers", partial(oat_tokens, chunks.float(), held_out.float(), count, recipe))
        for count in (8, 16)
    ]
    # Side by side on a GPU, which one of them does not fill.
    workers = len(trainings) if torch.cuda.is_available() else 1
    return found + [each.on_device() for each in results_of(trainings, workers, partial(torch.set_num_threads, 1))]


def oat_tokens(chunks: Tensor, held_out: Tensor, count: int, recipe: NetworkRecipe) -> NetworkTokens:
    """OAT with so many registers, trained on chunks float32 [n, T, A], where there is a GPU on that; it comes back to
    the processor. held_out: others, by which its weights are chosen."""
    torch.manual_seed(recipe.seed)
    prefixes = tuple(prefix for prefix in (1, 2, 4, 8, 16) if prefix <= count)
    network = OatNetwork(OatConfig(chunks.shape[1], prefixes, dropout=0.0), chunks.shape[2])
    network.to(_device())
    train_network(network, chunks, held_out, recipe)
    return NetworkTokens(f"OAT, {count} registers", network.vocabulary, network.cpu())


def fit_fast_tokens(chunks: Tensor, scale: float) -> FastTokens:
    """Of chunks [n, T, A], the longest of which says how many tokens there are."""
    codec = fit_fast(chunks.float().numpy(), scale)
    longest = max(map(len, codec.tokens(chunks.float().numpy())))
    return FastTokens(codec.name, codec.tokenizer.get_vocab_size() + 1, codec, chunks.shape[1], longest + 1)


def chunk_tokens(code: ChunkCode, words: str) -> list[ChunkTokens]:
    """Sixteen tokens: as they are, smaller behind the class, and small from the first on."""
    whole, first = code.sizes.token_bits, code.sizes.class_bits
    cuts: Sequence[tuple[str, tuple[int, ...]]] = (
        (f"{whole} bits", (whole,) * 16),
        (f"{first} bits, then 4", (first, *(4,) * 15)),
        ("4 bits", (4,) * 16),
    )
    return [ChunkTokens(f"chunk tokens, {words}, {size}", 1 << max(cut), code, cut) for size, cut in cuts]


def contexts(episodes: ActionDataset, chunk_length: int, tasks: Sequence[str]) -> Tensor:
    """What a policy sees at each of the `windows`: float32 [n, C].

    The demonstrations hold actions and the name of the task alone. So it sees its own last two chunks, how far the
    commands so far have led, the time, whether it is the first step, and the task.
    """
    found = []
    for episode, task in zip(episodes.episodes, episodes.tasks, strict=True):
        actions, count = torch.from_numpy(episode.copy()), max(1, len(episode) - chunk_length + 1)
        before = torch.cat((torch.zeros(2 * chunk_length, actions.shape[1]), actions))
        last = before.unfold(0, 2 * chunk_length, 1)[:count].transpose(1, 2).flatten(1)
        way = torch.cat((torch.zeros(1, actions.shape[1]), actions.cumsum(dim=0)))[:count] / 10
        steps = torch.arange(count)
        clock = torch.stack((steps / 100, (steps == 0).float()), dim=1)
        named = torch.tensor([float(task == name) for name in tasks]).expand(count, -1)
        found.append(torch.cat((last, way, clock, named), dim=1))
    return torch.cat(found)
