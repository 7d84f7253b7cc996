"""What a policy's probabilities decode to, for the tokens of several tokenizers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rfsq.evidence.faster import FasterNetwork
from rfsq.evidence.oat import OatNetwork
from rfsq.evidence.policies import TokenPolicy
from rfsq.evidence.policy_tokens import BinTokens, ChunkTokens, NetworkTokens, PolicyTokens
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.beliefs import BitProbabilities, chunk_belief, step_belief
from rfsq.rfsq_ref.chunk_bits import binary
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.runtime.bundle.beliefs import BeliefMode

LIKELIEST, WITHIN, EXPECTED, DRAWN, TRUE_MODE = (
    "likeliest tokens",
    "likeliest mode, expected within it",
    "expected",
    "mean of drawn chunks",
    "true mode, expected within it",
)
#: Contexts that a policy is asked about at a time.
_ASKED = 512


@dataclass(frozen=True, eq=False)
class StepTokens(PolicyTokens):
    """Calibrated per-step tokens: those of the first `layers` layers, one for each step, latent and layer."""

    model: ActionAutoencoder
    chunk_length: int
    layers: int

    @torch.no_grad()
    def encode(self, chunks: Tensor) -> Tensor:
        return self.model.encode(chunks.double())[0][..., : self.layers].flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return self.model.decode(tokens.reshape(*self._grid, self.layers))

    def expected(self, probabilities: Tensor, mode: BeliefMode, coarse: int) -> Tensor:
        """Of probabilities [n, T * D * layers, K]; coarse: layers of the mode."""
        by_layer = probabilities.reshape(*self._grid, self.layers, self.vocabulary)
        return step_belief(self.model, by_layer, mode, coarse, None).actions

    @property
    def _grid(self) -> tuple[int, int, int]:
        return (-1, self.chunk_length, self.model.config.latent_dim)

    def bits(self, tokens: Tensor) -> float:
        return float(tokens.shape[1] * torch.tensor(self.vocabulary).log2())

    @property
    def prefixes(self) -> tuple[int, ...]:
        return (self.chunk_length * self.model.config.latent_dim * self.layers,)


class Believer(ABC):
    """How a policy is asked, and what its answers decode to, each way by its name."""

    #: Of the tokens said so far, how many the policy is shown.
    shown: int | None

    @abstractmethod
    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        """Actions [n, T, A] for contexts [n, C]; true: the tokens [n, L] of the recorded chunks."""


@dataclass(frozen=True)
class OnePass(Believer):
    """All tokens at once, each by itself."""

    tokens: PolicyTokens
    coarse: int = 1
    shown = 0

    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        del true
        found: dict[str, list[Tensor]] = {}
        for part in torch.split(contexts, _ASKED):
            silence = torch.zeros(len(part), policy.num_tokens - 1, dtype=torch.long, device=part.device)
            probabilities = policy(part, silence).double().softmax(-1).cpu()
            found.setdefault(LIKELIEST, []).append(self.tokens.decode(probabilities.argmax(-1)))
            found.setdefault(EXPECTED, []).append(self._expected(probabilities))
            if isinstance(self.tokens, StepTokens):
                within = self.tokens.expected(probabilities, "likeliest mode", self.coarse)
                found.setdefault(WITHIN, []).append(within)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _expected(self, probabilities: Tensor) -> Tensor:
        tokens = self.tokens
        if isinstance(tokens, StepTokens):
            return tokens.expected(probabilities, "expected", self.coarse)
        if isinstance(tokens, BinTokens):
            words = torch.arange(tokens.vocabulary).unsqueeze(1).expand(-1, probabilities.shape[1])
            middles = tokens.decode(words).double().flatten(1)
            return torch.einsum("nlv,vl->nl", probabilities, middles).reshape(-1, *tokens.shape)
        assert isinstance(tokens, NetworkTokens)
        return expected_codes(tokens, probabilities)


def expected_codes(tokens: NetworkTokens, probabilities: Tensor) -> Tensor:
    """Through the decoder of a trained tokenizer: what all codes of a place are on average, [n, L, V]."""
    network, p = tokens.network, probabilities.float()
    if isinstance(network, OatNetwork):
        codes = network.quantizer.codes(torch.arange(network.vocabulary))
        chunks = network.decode_codes(p @ codes, torch.full((len(p), 1), p.shape[1]))
    else:
        assert isinstance(network, FasterNetwork)
        # Layer by layer the patches, as they are said.
        by_layer = p.reshape(len(p), -1, network.config.patches, network.vocabulary)
        entries = network.codebooks.entries[: by_layer.shape[1]]
        chunks = network.decode_codes(torch.einsum("nlpv,lvc->npc", by_layer, entries).flatten(0, 1))
    return chunks * network.units + network.offset


@dataclass(frozen=True, eq=False)
class TwoPasses(Believer):
    """Chunk tokens whose first is the class: that, then all others at once, for each of the likeliest classes."""

    tokens: ChunkTokens
    model: ChunkTokenizer
    most_classes: int = 16
    shown = 1

    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for part, own in zip(torch.split(contexts, _ASKED), torch.split(true, _ASKED), strict=True):
            for name, actions in self._decoded(policy, part, own[:, 0]).items():
                found.setdefault(name, []).append(actions)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        """true: the classes [n] of the recorded chunks."""
        rows, count = torch.arange(len(contexts)), self.model.sizes.num_classes
        first = self._asked(policy, contexts, true)[:, 0, :count]
        chosen = first.topk(min(self.most_classes, count)).indices
        behind = [self._asked(policy, contexts, column) for column in chosen.unbind(1)]
        # Of classes that were not asked about nothing is said.
        classes, bits = torch.zeros_like(first), first.new_full((*first.shape, sum(self.tokens.cut[1:])), 0.5)
        for column, probabilities in zip(chosen.unbind(1), behind, strict=True):
            classes[rows, column] = first[rows, column]
            bits[rows, column] = self._bits(probabilities)
        known = BitProbabilities(classes / classes.sum(1, keepdim=True), bits)
        of_true = self._bits(self._asked(policy, contexts, true)).unsqueeze(1).expand_as(bits)
        is_true = BitProbabilities(functional.one_hot(true, count).to(bits), of_true)
        likeliest = torch.cat((chosen[:, :1], behind[0][:, 1:].argmax(-1)), dim=1)
        return {
            LIKELIEST: self.tokens.decode(likeliest),
            WITHIN: chunk_belief(self.model, known, "likeliest mode", None).actions,
            EXPECTED: chunk_belief(self.model, known, "expected", None).actions,
            TRUE_MODE: chunk_belief(self.model, is_true, "likeliest mode", None).actions,
        }

    @staticmethod
    def _asked(policy: TokenPolicy, contexts: Tensor, first: Tensor) -> Tensor:
        """Probabilities [n, L, V], those behind the first token where it is this [n]."""
        said = torch.zeros(len(first), policy.num_tokens - 1, dtype=torch.long, device=contexts.device)
        said[:, 0] = first
        probabilities: Tensor = policy(contexts, said).double().softmax(-1).cpu()
        return probabilities

    def _bits(self, probabilities: Tensor) -> Tensor:
        """[n, bits] of the tokens behind the first, each being 1."""
        parts = []
        for place, size in enumerate(self.tokens.cut[1:], 1):
            words = probabilities[:, place, : 1 << size]
            parts.append(words / words.sum(-1, keepdim=True) @ binary(torch.arange(1 << size), size).to(words))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class OneByOne(Believer):
    """Tokens one after the other: the likeliest, and drawn ones, whose chunks are averaged."""

    tokens: PolicyTokens
    shape: tuple[int, int]
    draws: int = 16
    shown = None

    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        del true
        generator = torch.Generator(device=contexts.device).manual_seed(0)
        likeliest, drawn = [], []
        for part in torch.split(contexts, _ASKED):
            likeliest.append(self.tokens.decode(policy.say(part).cpu()))
            said = policy.say(part.repeat(self.draws, 1), draw=generator).cpu()
            drawn.append(self.tokens.decode(said).double().reshape(self.draws, len(part), *self.shape).mean(0))
        return {LIKELIEST: torch.cat(likeliest), DRAWN: torch.cat(drawn)}


@dataclass(frozen=True)
class LeastSquares(Believer):
    """The values of a chunk [T, A] themselves."""

    shape: tuple[int, int]
    shown = None

    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        del true
        return {EXPECTED: policy.say(contexts).cpu().reshape(-1, *self.shape)}
