"""What neural tokenizers of chunks have in common: the contract, how they are trained, and their codecs."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.recording import recorded
from rfsq.evidence.schemes import Codec
from rfsq.rfsq_ref.autoencoder import InRobotUnits
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.settings import check_positive

IntArray = npt.NDArray[np.int64]
#: Steps over which the learning rate rises to its full height.
_WARM_UP = 100


class ChunkNetwork(InRobotUnits):
    """A tokenizer of whole chunks.

    chunk_length: T; vocabulary: of every token; prefixes: numbers of tokens, rising, the last of them all, from which
    training decodes and which are judged.
    """

    chunk_length: int
    vocabulary: int
    prefixes: tuple[int, ...]

    def loss(self, chunks: Tensor) -> Tensor:
        """What training makes small, in normalised units: normalised chunks [B, T, A] to []."""
        raise NotImplementedError

    def encode_chunks(self, chunks: Tensor) -> Tensor:
        """Normalised chunks [B, T, A] to tokens int64 [B, L]."""
        raise NotImplementedError

    def decode_chunks(self, tokens: Tensor) -> Tensor:
        """The first l tokens [B, l], 1 <= l <= L, to normalised chunks [B, T, A]."""
        raise NotImplementedError

    def normalised(self, actions: Tensor) -> Tensor:
        """Actions [..., A] in the robot's units."""
        return (actions - self.offset) / self.units


class TransformerSizes(Protocol):
    """width, heads, dropout: of every layer, whose hidden width is four times its width."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dropout(self) -> float: ...


def encoder_layers(sizes: TransformerSizes, depth: int) -> nn.ModuleList:
    """Layers of self-attention, normalised before each part."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            sizes.width, sizes.heads, 4 * sizes.width, sizes.dropout, "gelu", batch_first=True, norm_first=True
        )
        for _ in range(depth)
    )


def decoder_layers(sizes: TransformerSizes, depth: int) -> nn.ModuleList:
    """The same with attention to a memory behind it."""
    return nn.ModuleList(
        nn.TransformerDecoderLayer(
            sizes.width, sizes.heads, 4 * sizes.width, sizes.dropout, "gelu", batch_first=True, norm_first=True
        )
        for _ in range(depth)
    )


@dataclass(frozen=True)
class NetworkRecipe:
    """steps of AdamW, whose learning rate rises and then falls to 0 as a cosine; seconds: an end before all steps are
    done, the rate falls by what is nearer. checks: how often errors of validation chunks are taken."""

    steps: int = 50_000
    seconds: float | None = None
    batch_size: int = 256
    learning_rate: float = 5e-4
    checks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "checks", error=EvidenceError)


@dataclass(frozen=True)
class Check:
    """Errors during training, mean squares in normalised units: of training batches since the last check (train), and
    of validation chunks decoded from each prefix."""

    step: int
    train: float
    validation: tuple[float, ...]


@dataclass(frozen=True)
class Trained:
    """What a training did. kept_step: whose weights stay, those of the least mean logarithm of validation errors."""

    steps: int
    seconds: float
    kept_step: int
    checks: tuple[Check, ...]


def train_network(network: ChunkNetwork, train: Tensor, validation: Tensor, recipe: NetworkRecipe) -> Trained:
    """Train on chunks float32 [n, T, A] in the robot's units, in place, on the device on which the network is.

    Raises EvidenceError when it diverges. On a GPU the result differs a little from run to run.
    """
    device = network.offset.device
    torch.manual_seed(recipe.seed)
    train, validation = (network.normalised(chunks.to(device)) for chunks in (train, validation))
    step = _TrainingStep(network, train, recipe)
    found: list[Check] = []
    lowest, best = math.inf, copy.deepcopy(network.state_dict())
    start, count, kept, progress = time.monotonic(), 0, 0, 0.0
    while progress < 1:
        since, until = count, (math.floor(progress * recipe.checks + 1e-9) + 1) / recipe.checks
        while progress < until - 1e-9:
            # The clock of the machine counts only where seconds are given.
            progress = count / recipe.steps
            if recipe.seconds is not None:
                progress = max(progress, (time.monotonic() - start) / recipe.seconds)
            step(count, min(progress, 1.0))
            count += 1
            progress = max(progress, count / recipe.steps)
        errors = validation_errors(network, validation)
        found.append(Check(count, step.mean_loss(count - since), errors))
        score = sum(map(math.log, errors)) if all(map(math.isfinite, errors)) else math.inf
        if score < lowest:
            lowest, best = score, copy.deepcopy(network.state_dict())
            kept = count
    if not math.isfinite(lowest):
        raise EvidenceError(f"the network diverged in training: lower the learning rate, now {recipe.learning_rate}")
    network.load_state_dict(best)
    network.eval()
    return Trained(count, time.monotonic() - start, kept, tuple(found))


class _TrainingStep:
    """One step of training at a time; on a GPU it is recorded."""

    def __init__(self, network: ChunkNetwork, train: Tensor, recipe: NetworkRecipe) -> None:
        self._network, self._train, self._recipe = network, train, recipe
        self._rate = torch.zeros((), device=train.device)
        self._total = torch.zeros((), device=train.device)
        self._optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=self._rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
            capturable=train.device.type == "cuda",
        )
        self._run: Callable[[], None] = self._eager
        if train.device.type == "cuda":
            network.train()
            self._run = recorded(self._eager)
            self._total.zero_()

    def __call__(self, count: int, progress: float) -> None:
        height = min(1.0, (count + 1) / _WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
        self._rate.fill_(self._recipe.learning_rate * height)
        self._network.train()
        self._run()

    def mean_loss(self, steps: int) -> float:
        """Of so many steps, since this was called last."""
        mean = float(self._total) / steps
        self._total.zero_()
        return mean

    def _eager(self) -> None:
        chosen = torch.randint(len(self._train), (self._recipe.batch_size,), device=self._train.device)
        self._optimiser.zero_grad()
        loss = self._network.loss(self._train[chosen])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimiser.step()
        self._total += loss.detach()


@torch.no_grad()
def validation_errors(network: ChunkNetwork, chunks: Tensor) -> tuple[float, ...]:
    """Mean squared errors of normalised chunks [n, T, A] decoded from each prefix."""
    network.eval()
    tokens = network.encode_chunks(chunks)
    return tuple(float(mse_loss(network.decode_chunks(tokens[:, :prefix]), chunks)) for prefix in network.prefixes)


@dataclass(frozen=True, eq=False)
class NetworkCodec(Codec):
    """The first `prefix` tokens of a trained network; chunks of its length alone."""

    name: str
    family: str
    series: str
    partial: bool
    network: ChunkNetwork
    prefix: int

    @property
    def vocabulary(self) -> int:
        return self.network.vocabulary

    def tokens(self, chunks: FloatArray) -> IntArray:
        """float32 [B, T, A] to tokens int64 [B, prefix]."""
        with torch.no_grad():
            # A copy: datasets are read-only, and torch has no tensors that are.
            actions = torch.from_numpy(chunks.copy()).to(self.network.offset.device)
            tokens: IntArray = self.network.encode_chunks(self.network.normalised(actions)).cpu().numpy()
        return tokens[:, : self.prefix]

    def decode(self, tokens: npt.ArrayLike, length: int) -> FloatArray:
        """tokens [B, prefix] to actions float32 [B, length, A]; length: of the network's chunks."""
        del length
        with torch.no_grad():
            rows = torch.as_tensor(np.asarray(tokens), device=self.network.offset.device)
            chunks = self.network.decode_chunks(rows)
            decoded: FloatArray = (chunks * self.network.units + self.network.offset).cpu().numpy()
        return decoded

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        return self.decode(self.tokens(chunks), chunks.shape[1])

    def bits_per_step(self, chunks: FloatArray) -> float:
        """log2 of the vocabulary for each token."""
        steps: int = chunks.shape[1]
        return self.prefix * math.log2(self.network.vocabulary) / steps


def network_codecs(network: ChunkNetwork, family: str, series: str) -> list[NetworkCodec]:
    """One codec for every prefix that training decoded from."""
    prefixes = network.prefixes
    return [
        NetworkCodec(
            f"{series}, {prefix} of {prefixes[-1]} tokens", family, series, prefix < prefixes[-1], network, prefix
        )
        for prefix in prefixes
    ]
