"""Which of a draft's tokens are served: those of the longest run of first steps to which the main model agrees.

The main model judges all proposed layers in one pass: at every place it says its own token, given that the layers
before are as the draft has them. For each latent the draft is followed up to the first layer at which the two differ;
there the main model's token is taken, and what the draft says behind it is dropped: the middle level stands for it,
which adds next to nothing. This is the main model's correction of the draft.

To ask for equal tokens would accept nothing: the later layers split the action so finely that no policy knows them. A
step is accepted where draft and correction, both decoded, lie within `tolerance` in every dimension, in units of the
robot: 1 is the range that the bundle was made for. The first step that is not ends the run, as in speculative decoding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.speculative_models import TokenModel
from rfsq.runtime.torch_adapter import ActionRFSQAE


@dataclass(frozen=True, eq=False)
class Verdict:
    """Of N drafts of T steps. agreed: share of tokens that the main model says too, given what is before them.
    difference [N, T]: the largest of a step; accepted int64 [N]: how many first steps.
    early: tokens [N, T, D, l] that may be served, the draft's of accepted steps and the correction of the others.
    """

    agreed: float
    difference: Tensor
    accepted: Tensor
    early: Tensor

    @property
    def kept(self) -> Tensor:
        """Accepted steps, bool [N, T]."""
        return first_steps(self.accepted, self.difference.shape[1])

    @property
    def rate(self) -> float:
        """Accepted steps among all."""
        return self.kept.double().mean().item()


@dataclass(frozen=True)
class Speculation:
    """A draft and a main model around one tokenizer; layers: how many the draft says."""

    tokenizer: ActionRFSQAE
    draft: TokenModel
    main: TokenModel
    units: Tensor
    tolerance: float

    @property
    def layers(self) -> int:
        return self.draft.num_layers

    def propose(self, context: Tensor) -> Tensor:
        """The draft's coarse tokens [N, T, D, l]."""
        return self.draft.say(context, self.draft.silence(len(context)), range(self.layers))

    def verify(self, context: Tensor, proposed: Tensor) -> Verdict:
        said = self.main.judge(context, proposed)
        agrees = said == proposed
        followed = agrees.long().cumprod(dim=-1).bool()
        # The first layer at which they differ: all before it are followed.
        is_first = ~followed & torch.cat((torch.ones_like(followed[..., :1]), followed[..., :-1]), dim=-1)
        middle = (self.main.num_levels - 1) // 2
        corrected = torch.where(followed, proposed, torch.where(is_first, said, middle))
        decode = self.tokenizer.decode_from_indices
        difference = ((decode(proposed) - decode(corrected)).abs() / self.units).amax(dim=-1)
        accepted = (difference <= self.tolerance).long().cumprod(dim=-1).sum(dim=-1)
        early = torch.where(first_steps(accepted, proposed.shape[1])[..., None, None], proposed, corrected)
        return Verdict(agrees.double().mean().item(), difference, accepted, early)

    def finish(self, context: Tensor, verdict: Verdict) -> Tensor:
        """All layers [N, T, D, L]: accepted steps keep the draft's tokens, everything else is the main model's own."""
        kept = verdict.kept
        tokens = self.main.silence(len(context))
        tokens[..., : self.layers] = verdict.early
        if not kept.all():
            # L0 is there: nothing is before it, so verification has said it already.
            tokens = self.main.say(context, tokens, range(1, self.layers), kept)
        return self.main.say(context, tokens, range(self.layers, self.main.num_layers))

    def alone(self, context: Tensor) -> Tensor:
        """All layers by the main model, as without a draft."""
        return self.main.say(context, self.main.silence(len(context)), range(self.main.num_layers))

    def passes(self, accepted: int) -> int:
        """Of the main model from the beginning to all layers, verification included; alone it needs num_layers."""
        is_whole = accepted == self.main.places[0]
        return 1 + self.main.num_layers - (self.layers if is_whole else 1)


def first_steps(counts: Tensor, length: int) -> Tensor:
    """int64 [N] -> bool [N, length]: which steps are among the first so many."""
    return torch.arange(length) < counts[:, None]
