"""A small policy over action tokens: what it sees is a context, what it says are the tokens of a chunk.

One causal transformer stands for three policies, which differ in how many of the tokens said so far it is shown:

- autoregressive: all of them, one pass for each token;
- two passes: the first token alone, then all others at once;
- one pass: none, all tokens at once.

Trained with the mean cross-entropy of the tokens; it always says the likeliest token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.recording import recorded
from rfsq.rfsq_ref.settings import check_positive

#: A target where a sequence has no token: it is not trained.
NOTHING = -1


@dataclass(frozen=True)
class PolicyConfig:
    """width, depth, heads: of the transformer, whose weights are about 12 depth width^2 and 2 vocabulary width;
    shown: of the tokens said so far, how many it is shown, None for all; falling: what a token counts in the loss, as a
    multiple of the token before; steps, batch: of optimisation."""

    width: int = 256
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    steps: int = 1200
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 100
    shown: int | None = None
    falling: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "width", "depth", "heads", "steps", "batch", error=EvidenceError)
        if self.width % self.heads:
            raise EvidenceError(
                f"width {self.width} does not divide into {self.heads} heads; choose another of the two"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step: rising at first, then falling to 0 along a cosine."""
        rise = min(1.0, (step + 1) / max(1, min(self.warm_up, self.steps // 4)))
        return self.learning_rate * rise * (1 + math.cos(math.pi * step / self.steps)) / 2


class Block(nn.Module):
    """Attention to what stands before, then two layers at each place; each on normalised input, added to it."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, self.heads, self.dropout = config.width, config.heads, config.dropout
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [n, places, width] of the last places; before: what this gave second for those before them.

        What it makes of x, and the keys and values [2, n, heads, places so far, width / heads].
        """
        parts = self.attention(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        share = self.dropout if self.training else 0.0
        queries, kept = parts[0], parts[1:] if before is None else torch.cat((before, parts[1:]), dim=3)
        places, known = queries.shape[2], kept.shape[3]
        # A single place sees all that is there, and places that are the first see a triangle.
        mask = None
        if 1 < places < known:
            mask = torch.ones(places, known, dtype=torch.bool, device=x.device).tril(known - places)
        seen = functional.scaled_dot_product_attention(
            queries, kept[0], kept[1], attn_mask=mask, dropout_p=share, is_causal=places == known
        )
        x = x + functional.dropout(self.mixed(seen.transpose(1, 2).flatten(-2)), share)
        return x + functional.dropout(self.layers(self.before_layers(x)), share), kept


class TokenPolicy(nn.Module):
    """Contexts [n, C] and tokens [n, l] said so far, to logits [n, places, vocabulary] of the tokens behind each."""

    weights: Tensor

    def __init__(self, context_size: int, vocabulary: int, num_tokens: int, config: PolicyConfig) -> None:
        super().__init__()
        self.config, self.num_tokens = config, num_tokens
        self.shown = num_tokens if config.shown is None else min(config.shown, num_tokens)
        self.see = nn.Linear(context_size, config.width)
        self.words = nn.Embedding(vocabulary, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(num_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, vocabulary)
        nn.init.normal_(self.words.weight, std=0.02)
        weights = config.falling ** torch.arange(num_tokens, dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Place 0 sees the context; place j the tokens before j, of which all behind the first `shown` are hidden."""
        words = self.words(tokens.clamp(min=0))
        words = torch.cat((words[:, : self.shown], torch.zeros_like(words[:, self.shown :])), dim=1)
        x = torch.cat((self.see(context).unsqueeze(1), words), dim=1) + self.places[: words.shape[1] + 1]
        return self._logits(x, [None] * len(self.blocks))[0]

    def _logits(self, x: Tensor, before: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """Of the last places x [n, places, width], and what each block kept; before: what it had kept."""
        kept = []
        for block, had in zip(self.blocks, before, strict=True):
            x, has = block(x, had)
            kept.append(has)
        return self.head(self.norm(x)), kept

    def loss(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Weighted mean cross-entropy [] of tokens [n, num_tokens], those that are NOTHING left out."""
        logits = self(context, tokens[:, :-1])
        found = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=NOTHING, reduction="none")
        weights = torch.where(tokens == NOTHING, 0.0, self.weights)
        return (found * weights.flatten()).sum() / weights.sum()

    @torch.inference_mode()
    def say(self, context: Tensor, count: int | None = None, draw: torch.Generator | None = None) -> Tensor:
        """The likeliest tokens [n, count], one after the other as far as they are shown, the others at once.

        count: of the first tokens; None says all of them. draw: tokens are drawn from it, by their probabilities.
        """
        count = self.num_tokens if count is None else count
        said: list[Tensor] = []
        kept: list[Tensor | None] = [None] * len(self.blocks)
        x = self.see(context).unsqueeze(1) + self.places[:1]
        for place in range(min(self.shown, count - 1) + 1):
            if place == self.shown:
                # The rest at once, which does not see itself either.
                x = torch.cat((x, self.places[place + 1 : count].expand(len(context), -1, -1)), dim=1)
            logits, found = self._logits(x, kept)
            kept = list(found)
            said.append(logits.argmax(dim=-1) if draw is None else _drawn(logits, draw))
            if place + 1 < count:
                x = self.words(said[-1]) + self.places[place + 1]
        return torch.cat(said, dim=1)


class RegressionPolicy(TokenPolicy):
    """The same network that says the values of a chunk themselves, trained with their squared error: no tokens."""

    def __init__(self, context_size: int, num_values: int, config: PolicyConfig) -> None:
        super().__init__(context_size, num_values, 1, config)

    def loss(self, context: Tensor, tokens: Tensor) -> Tensor:
        """tokens: chunks [n, N]."""
        return functional.mse_loss(self.say(context), tokens)

    def say(self, context: Tensor, count: int | None = None, draw: torch.Generator | None = None) -> Tensor:
        """Chunks [n, N]; there are no tokens to count or draw."""
        del count, draw
        logits: Tensor = self(context, torch.zeros(len(context), 0, dtype=torch.long, device=context.device))
        return logits[:, 0]


def _drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Words [n, places] of logits [n, places, vocabulary]."""
    flat = torch.multinomial(logits.flatten(0, 1).softmax(dim=-1), 1, generator=draw)
    return flat.reshape(logits.shape[:2])


def policy_of(context_size: int, vocabulary: int | None, size: int, config: PolicyConfig) -> TokenPolicy:
    """Untrained. vocabulary: None where it says actions; size: how many tokens, or values, a chunk has."""
    if vocabulary is None:
        return RegressionPolicy(context_size, size, config)
    return TokenPolicy(context_size, vocabulary, size, config)


def _unwatched(steps: int, loss: Tensor) -> None:
    del steps, loss


def train_policy(
    policy: TokenPolicy,
    contexts: Tensor,
    targets: Tensor,
    seed: int,
    watch: Callable[[int, Tensor], None] = _unwatched,
) -> float:
    """Train on contexts [n, C] and targets, one row for each, on their device: the last steps' mean loss.

    watch: told after each step how many there were, and their mean loss [], to read which is to wait for the GPU.
    """
    config, device = policy.config, contexts.device
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = torch.zeros(config.batch, dtype=torch.long, device=device)
    rate, loss = torch.zeros((), device=device), torch.zeros((), device=device)
    # Fused: policies that share a GPU wait for each other's kernels, however small.
    optimiser = torch.optim.AdamW(
        policy.parameters(), rate, weight_decay=config.weight_decay, fused=True, capturable=device.type == "cuda"
    )

    def step() -> None:
        found = policy.loss(contexts[rows], targets[rows])
        optimiser.zero_grad(set_to_none=False)
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        loss.lerp_(found.detach(), 0.05)

    policy.train()
    # Recorded at a learning rate of 0, which trains nothing.
    run = recorded(step) if device.type == "cuda" else step
    for index in range(config.steps):
        rows.copy_(torch.randint(len(contexts), (config.batch,), generator=generator, device=device))
        rate.fill_(config.rate(index))
        run()
        watch(index + 1, loss)
    policy.eval()
    return float(loss)
