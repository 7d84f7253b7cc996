"""Two small policies of one kind, and how they are trained. A large model would stand in the place of the main one."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.speculative_data import Windows
from rfsq.runtime.bundle.manifest import ModelEntry


@dataclass(frozen=True)
class Size:
    """Of a model, and for how long it is trained."""

    width: int
    depth: int
    epochs: int
    batch: int = 512
    learning_rate: float = 2e-3


class TokenModel(nn.Module):
    """Context and the tokens of the layers before -> logits of one layer, for all T steps and D latents at once.

    So a chunk is said layer by layer, one pass each; and what somebody else has proposed is judged in one pass over a
    batch, a row for each layer.
    """

    def __init__(self, context_size: int, tokenizer: ModelEntry, num_layers: int, size: Size) -> None:
        super().__init__()
        self.num_layers, self.num_levels = num_layers, tokenizer.num_levels
        self.places = (tokenizer.chunk_length, tokenizer.latent_dim)
        count = math.prod(self.places)
        widths = [context_size + (count + 1) * num_layers] + [size.width] * size.depth
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after), nn.GELU(), nn.Dropout(0.1)]
        self.trunk = nn.Sequential(*parts, nn.Linear(size.width, count * self.num_levels))
        # What a layer leaves over depends on the same latent's tokens before: no way around, through the trunk.
        self.own = nn.Parameter(torch.zeros(num_layers, tokenizer.latent_dim, num_layers, self.num_levels))

    def forward(self, context: Tensor, tokens: Tensor, layer: Tensor) -> Tensor:
        """context [N, C], tokens [N, T, D, at least num_layers], layer [N] -> logits [N, T, D, K] of that layer.

        Tokens of that layer and those behind it are not looked at.
        """
        numbers = torch.arange(self.num_layers)
        levels = tokens[..., : self.num_layers] * (2 / (self.num_levels - 1)) - 1
        levels = levels * (numbers < layer[:, None, None, None])
        seen = torch.cat((context, levels.flatten(1), (numbers == layer[:, None]).float()), dim=1)
        logits: Tensor = self.trunk(seen).unflatten(1, (*self.places, self.num_levels))
        return logits + torch.einsum("ntdl,ndlk->ntdk", levels, self.own[layer])

    @torch.inference_mode()
    def say(self, context: Tensor, tokens: Tensor, layers: range, kept: Tensor | None = None) -> Tensor:
        """tokens [N, T, D, num_layers] with these layers said anew, one pass each; but for steps kept [N, T]."""
        tokens = tokens.clone()
        for layer in layers:
            said = self(context, tokens, torch.full((len(context),), layer)).argmax(dim=-1)
            tokens[..., layer] = said if kept is None else torch.where(kept[..., None], tokens[..., layer], said)
        return tokens

    def silence(self, count: int) -> Tensor:
        """Tokens [count, T, D, num_layers] to begin with."""
        return torch.zeros((count, *self.places, self.num_layers), dtype=torch.int64)

    @torch.inference_mode()
    def judge(self, context: Tensor, proposed: Tensor) -> Tensor:
        """proposed [N, T, D, l] -> what this model says at each place, if all layers before are as proposed.

        All layers in one pass: nothing waits for anything.
        """
        count, layers = len(context), proposed.shape[-1]
        tokens = self.silence(count)
        tokens[..., :layers] = proposed
        layer = torch.arange(layers).repeat_interleave(count)
        logits = self(context.repeat(layers, 1), tokens.repeat(layers, 1, 1, 1), layer)
        said: Tensor = logits.argmax(dim=-1).unflatten(0, (layers, count)).movedim(0, -1)
        return said


def train(model: TokenModel, windows: Windows, size: Size, generator: torch.Generator) -> float:
    """The last epoch's mean cross-entropy in bits per token. Every window of a batch trains one layer."""
    optimiser = torch.optim.AdamW(model.parameters(), size.learning_rate, weight_decay=0.05)
    steps = size.epochs * math.ceil(len(windows) / size.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    shares = training_shares(windows.codes[..., : model.num_layers], model.num_levels)
    total = 0.0
    model.train()
    for _ in range(size.epochs):
        total = 0.0
        for batch in torch.randperm(len(windows), generator=generator).split(size.batch):  # type: ignore[no-untyped-call]
            codes = windows.codes[batch]
            layer = torch.multinomial(shares, len(batch), replacement=True, generator=generator)
            target = codes.gather(-1, layer[:, None, None, None].expand(*codes.shape[:3], 1))
            logits = model(windows.context[batch], codes, layer)
            loss = functional.cross_entropy(logits.flatten(0, 2), target.flatten())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item() * len(batch)
    model.eval()
    return total / len(windows) / math.log(2)


def training_shares(codes: Tensor, num_levels: int) -> Tensor:
    """How often each layer is trained: by its entropy, for one that never changes is learnt at once."""
    shares = torch.stack([(codes == level).double().mean(dim=(0, 1, 2)) for level in range(num_levels)])
    entropy: Tensor = torch.special.entr(shares).sum(dim=0)
    return entropy + 0.05
