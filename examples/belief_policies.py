"""Two small policies that say what they believe, one for each kind of tokens, and what they are trained on.

Both see a context and are small networks of three layers: nothing here says how good a large policy would be.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfsq.runtime.bundle.beliefs import Belief
from rfsq.runtime.bundle.models import ChunkModel
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer

WIDTH = 512


def layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(WIDTH, outputs),
    )


class BelievingPolicy(nn.Module, ABC):
    """Contexts [N, C] to beliefs about the chunk that follows."""

    @abstractmethod
    def losses(self, context: Tensor, codes: Tensor) -> tuple[Tensor, Belief[Tensor]]:
        """In training: the mean cross-entropy of the recorded tokens [], and what is believed of the actions."""

    @abstractmethod
    def believe(self, context: Tensor) -> Belief[Tensor]:
        """What a robot would be told."""

    @abstractmethod
    def likeliest(self, context: Tensor) -> Tensor:
        """The actions [N, T, A] of the likeliest tokens: what is left where all else is thrown away."""


class StepPolicy(BelievingPolicy):
    """Logits of the coarse per-step tokens, all at once, and what is expected of them."""

    def __init__(self, context_size: int, tokenizer: ActionRFSQAE) -> None:
        super().__init__()
        model = tokenizer.tokenizer.model
        self.tokenizer, self.num_layers = tokenizer, model.prefixes[0]
        self.shape = (*model.tokens_shape(1, self.num_layers)[1:], model.vocabulary)
        self.network = layers(context_size, int(torch.Size(self.shape).numel()))

    def logits(self, context: Tensor) -> Tensor:
        """[N, T, D, l, K]."""
        return torch.unflatten(self.network(context), 1, self.shape)

    def losses(self, context: Tensor, codes: Tensor) -> tuple[Tensor, Belief[Tensor]]:
        logits = self.logits(context)
        entropy = functional.cross_entropy(logits.flatten(0, -2), codes[..., : self.num_layers].flatten())
        return entropy, self.tokenizer.decode_logits(logits)

    def believe(self, context: Tensor) -> Belief[Tensor]:
        return self.tokenizer.decode_logits(self.logits(context))

    def likeliest(self, context: Tensor) -> Tensor:
        return self.tokenizer.decode_from_indices(self.logits(context).argmax(-1))


class ChunkPolicy(BelievingPolicy):
    """Logits of the class, then those of all bits at once, given the class: in training the recorded one, afterwards
    the likeliest. Within the class the mean of the bits is decoded."""

    def __init__(self, context_size: int, tokenizer: ChunkTokenizer, num_tokens: int) -> None:
        super().__init__()
        model = tokenizer.tokenizer.model
        assert isinstance(model, ChunkModel)
        self.tokenizer, self.num_tokens = tokenizer, num_tokens
        self.num_classes, self.class_bits, self.token_bits = model.num_classes, model.class_bits, model.token_bits
        self.classes = layers(context_size, self.num_classes)
        self.bits = layers(context_size + self.num_classes, num_tokens * self.token_bits - self.class_bits)

    def losses(self, context: Tensor, codes: Tensor) -> tuple[Tensor, Belief[Tensor]]:
        said = codes[:, : self.num_tokens, None] >> torch.arange(self.token_bits - 1, -1, -1) & 1
        bits = said.flatten(1)[:, self.class_bits :].float()
        chosen = (codes[:, 0] >> self.token_bits - self.class_bits).clamp(max=self.num_classes - 1)
        classes = self.classes(context)
        entropy = functional.cross_entropy(classes, chosen)
        found = self._bits(context, chosen)
        entropy = entropy + functional.binary_cross_entropy_with_logits(found, bits) * bits.shape[1]
        # The recorded class is certain, so that the error is of the bits within it.
        known = functional.one_hot(chosen, self.num_classes).float().log()
        return entropy / (1 + bits.shape[1]), self.tokenizer.decode_logits((known, found), mode="likeliest mode")

    def believe(self, context: Tensor) -> Belief[Tensor]:
        classes = self.classes(context)
        bits = self._bits(context, classes.argmax(-1))
        return self.tokenizer.decode_logits((classes, bits), mode="likeliest mode")

    def likeliest(self, context: Tensor) -> Tensor:
        classes = self.classes(context)
        chosen = classes.argmax(-1)
        # Certain, each of them.
        bits = torch.where(self._bits(context, chosen) > 0, 1.0, 0.0)
        one = functional.one_hot(chosen, self.num_classes).float()
        return self.tokenizer.decode_probabilities((one, bits)).actions

    def _bits(self, context: Tensor, classes: Tensor) -> Tensor:
        """[N, bits], given these classes [N]."""
        return self.bits(torch.cat((context, functional.one_hot(classes, self.num_classes).float()), dim=1))
