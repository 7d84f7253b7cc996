"""What a policy's probabilities decode to, for the tokens of several tokenizers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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

LIKELIEST, WITHIN, DRAWN_MODE, EXPECTED, DRAWN, TRUE_MODE = (
    "likeliest tokens",
    "likeliest mode, expected within it",
    "drawn mode, expected within it",
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
    """How a policy is asked, and what its answers decode to."""

    #: Of the tokens said so far, how many the policy is shown.
    shown: int | None
    ways: tuple[str, ...]

    @abstractmethod
    def ask(self, policy: TokenPolicy, contexts: Tensor) -> tuple[Tensor, ...]:
        """What the policy answers to contexts [n, C]."""

    @abstractmethod
    def decode(self, answers: tuple[Tensor, ...], way: str, generator: torch.Generator) -> Tensor:
        """Actions [n, T, A], one of the `ways`; generator: of what is drawn."""

    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        """Actions of many contexts, in all ways; true: the tokens [n, L] of the recorded chunks."""
        del true
        generator = torch.Generator().manual_seed(0)
        found: dict[str, list[Tensor]] = {way: [] for way in self.ways}
        for part in torch.split(contexts, _ASKED):
            answers = self.ask(policy, part)
            for way in self.ways:
                found[way].append(self.decode(answers, way, generator))
        return {way: torch.cat(parts) for way, parts in found.items()}


@dataclass(frozen=True)
class OnePass(Believer):
    """All tokens at once, each by itself. coarse: layers of per-step tokens that are the mode."""

    tokens: PolicyTokens
    coarse: int = 1
    shown = 0

    @property
    def ways(self) -> tuple[str, ...]:  # type: ignore[override]
        return (LIKELIEST, WITHIN, EXPECTED) if isinstance(self.tokens, StepTokens) else (LIKELIEST, EXPECTED)

    def ask(self, policy: TokenPolicy, contexts: Tensor) -> tuple[Tensor, ...]:
        silence = torch.zeros(len(contexts), policy.num_tokens - 1, dtype=torch.long, device=contexts.device)
        return (policy(contexts, silence).double().softmax(-1).cpu(),)

    def decode(self, answers: tuple[Tensor, ...], way: str, generator: torch.Generator) -> Tensor:
        del generator
        (probabilities,), tokens = answers, self.tokens
        if way == LIKELIEST:
            return tokens.decode(probabilities.argmax(-1))
        if isinstance(tokens, StepTokens):
            return tokens.expected(probabilities, "expected" if way == EXPECTED else "likeliest mode", self.coarse)
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
    most_classes: int = 16
    shown = 1
    ways = (LIKELIEST, WITHIN, DRAWN_MODE, EXPECTED)

    @cached_property
    def model(self) -> ChunkTokenizer:
        return ChunkTokenizer(self.tokens.code.sizes, self.tokens.code.constants).double()

    def ask(self, policy: TokenPolicy, contexts: Tensor) -> tuple[Tensor, ...]:
        """Probabilities [n, C] of the classes; the likeliest [n, k], the most probable first; and those of the tokens
        behind, given each of these, [n, k, L - 1, V]."""
        count = self.model.sizes.num_classes
        nothing = torch.zeros(len(contexts), dtype=torch.long)
        classes = self._said(policy, contexts, nothing)[:, 0, :count]
        chosen = classes.topk(min(self.most_classes, count)).indices
        behind = [self._said(policy, contexts, column)[:, 1:] for column in chosen.unbind(1)]
        return classes, chosen, torch.stack(behind, dim=1)

    def decode(self, answers: tuple[Tensor, ...], way: str, generator: torch.Generator) -> Tensor:
        classes, chosen, behind = answers
        if way == LIKELIEST:
            return self.tokens.decode(torch.cat((chosen[:, :1], behind[:, 0].argmax(-1)), dim=1))
        # Of classes that were not asked about nothing is said.
        asked = torch.zeros_like(classes).scatter(1, chosen, classes.gather(1, chosen))
        bits = behind.new_full((*classes.shape, sum(self.tokens.cut[1:])), 0.5)
        bits[torch.arange(len(classes)).unsqueeze(1), chosen] = self._bits(behind)
        if way == DRAWN_MODE:
            drawn = torch.multinomial(asked, 1, generator=generator)[:, 0]
            asked = functional.one_hot(drawn, classes.shape[1]).to(bits)
        known = BitProbabilities(asked / asked.sum(1, keepdim=True), bits)
        return chunk_belief(self.model, known, "expected" if way == EXPECTED else "likeliest mode", None).actions

    def decoded(self, policy: TokenPolicy, contexts: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        """As if the policy had known the class, too."""
        parts = []
        for part, own in zip(torch.split(contexts, _ASKED), torch.split(true[:, 0], _ASKED), strict=True):
            behind = self._said(policy, part, own)[:, 1:].unsqueeze(1)
            certain = functional.one_hot(own, self.model.sizes.num_classes).to(behind)
            parts.append(self.decode((certain, own.unsqueeze(1), behind), WITHIN, torch.Generator()))
        return {**super().decoded(policy, contexts, true), TRUE_MODE: torch.cat(parts)}

    @staticmethod
    def _said(policy: TokenPolicy, contexts: Tensor, first: Tensor) -> Tensor:
        """Probabilities [n, L, V], those behind the first token where it is this [n]."""
        said = torch.zeros(len(first), policy.num_tokens - 1, dtype=torch.long, device=contexts.device)
        said[:, 0] = first
        probabilities: Tensor = policy(contexts, said).double().softmax(-1).cpu()
        return probabilities

    def _bits(self, probabilities: Tensor) -> Tensor:
        """[..., bits] of the tokens [..., L - 1, V] behind the first, each being 1."""
        parts = []
        for place, size in enumerate(self.tokens.cut[1:]):
            words = probabilities[..., place, : 1 << size]
            parts.append(words / words.sum(-1, keepdim=True) @ binary(torch.arange(1 << size), size).to(words))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class OneByOne(Believer):
    """Tokens one after the other: the likeliest, and drawn ones, whose chunks are averaged."""

    tokens: PolicyTokens
    shape: tuple[int, int]
    draws: int = 16
    shown = None
    ways = (LIKELIEST, DRAWN)

    def ask(self, policy: TokenPolicy, contexts: Tensor) -> tuple[Tensor, ...]:
        """The likeliest tokens [n, L], and drawn ones [draws, n, L]."""
        generator = torch.Generator(device=contexts.device).manual_seed(0)
        drawn = policy.say(contexts.repeat(self.draws, 1), draw=generator)
        return policy.say(contexts).cpu(), drawn.cpu().reshape(self.draws, len(contexts), -1)

    def decode(self, answers: tuple[Tensor, ...], way: str, generator: torch.Generator) -> Tensor:
        del generator
        likeliest, drawn = answers
        if way == LIKELIEST:
            return self.tokens.decode(likeliest)
        return self.tokens.decode(drawn.flatten(0, 1)).double().reshape(self.draws, -1, *self.shape).mean(0)


@dataclass(frozen=True)
class LeastSquares(Believer):
    """The values of a chunk [T, A] themselves."""

    shape: tuple[int, int]
    shown = None
    ways = (EXPECTED,)

    def ask(self, policy: TokenPolicy, contexts: Tensor) -> tuple[Tensor, ...]:
        return (policy.say(contexts).cpu(),)

    def decode(self, answers: tuple[Tensor, ...], way: str, generator: torch.Generator) -> Tensor:
        del way, generator
        return answers[0].reshape(-1, *self.shape)
