"""`ChunkTokenizer`: the reference model's calls on a bundle of chunk tokens, on tensors of torch, for policy code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bundle.advice import quoted
from ..bundle.errors import InvalidInputError
from ..bundle.models import StepModel
from ..bundle.validation import InputValidator, check_prefix
from .adapter_calls import Call, checked_integers, uncompiled
from .module import BundleModule


class ChunkTokenizer(BundleModule):
    """Chunks of T actions to L tokens and back; any leading axes, sizes 0 among them.

    Frozen: results carry no graph, and `train`, `half` and the like change nothing. The only state is the fingerprint,
    a buffer: where the policy's checkpoint brings another one, loading it or the first call raises FingerprintError.
    Tensors may lie anywhere, and results lie where the input did. On the CPU wrong values raise InvalidInputError; on
    the GPU the host does not read them (docs/gpu.md).

    chunk_length T, action_dim A, num_tokens L, vocabulary: how many values a token has.
    """

    def __init__(self, engines: object = None, *_sizes: object, **_settings: object) -> None:
        """Use `from_bundle`; with sizes or constants this raises InvalidInputError that says so."""
        super().__init__(engines, *_sizes, **_settings)
        model = self._engines.model
        if isinstance(model, StepModel):
            raise InvalidInputError(
                f"ChunkTokenizer takes chunk tokens, and {self._engines.path} has {model.mode} tokens, one for each "
                "step, layer and latent: open it with ActionRFSQAE.from_bundle"
            )
        self.chunk_length: int = model.chunk_length
        self.action_dim: int = model.action_dim
        self.num_tokens: int = model.depth
        self.vocabulary: int = model.vocabulary

    @staticmethod
    def _how_to_build() -> str:
        return f"demonstrations become one by {quoted('build', '--kind chunk --calibration-data F --output PATH')}"

    @uncompiled
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """actions float32 [..., T, A] -> what their tokens decode to, float32 [..., T, A], and tokens int64 [..., L].

        Raises InvalidInputError where a gradient would have to flow to `x`: there is none.
        """
        tokens = self.encode(self._without_gradient(self._checked_chunks(x)))
        return self.decode(tokens), tokens

    @uncompiled
    def encode(self, x: Tensor) -> Tensor:
        """actions float32 [..., T, A] -> tokens int64 [..., L], with no gradient, whatever `x` requires."""
        x = self._checked_chunks(x)
        call = self._call_for(x, trailing=2)
        chunks = call.chunks(x.detach())
        tokens = call.empty((len(chunks), self.num_tokens), torch.int32)
        try:
            call.tokenizer.encode_into(call.array(chunks), call.array(tokens), stream=call.stream())
        except InvalidInputError:
            call.refuse_in_place(InputValidator.check_actions, x)
            raise
        return call.result(tokens).long()

    @uncompiled
    def decode(self, tokens: Tensor) -> Tensor:
        """The first l tokens of chunks, integers [..., l], l from 1 to L -> actions float32 [..., T, A].

        Of any type that holds the vocabulary. `tokens[..., :8]` is such a beginning, as it lies. Raises
        InvalidInputError, and UnbuiltPrefixError for another l.
        """
        tokens = checked_integers("tokens", tokens, self._engines.model)
        if not tokens.ndim:
            raise InvalidInputError("tokens have shape []; expected tokens [..., l]")
        check_prefix(tuple(tokens.shape), self._engines.model)
        call = self._call_for(tokens, trailing=1)
        taken = call.tokens(tokens, self.vocabulary)
        chunks = call.chunks(taken)
        actions = call.empty((len(chunks), self.chunk_length, self.action_dim), torch.float32)
        try:
            call.tokenizer.decode_into(call.array(chunks), call.array(actions), stream=call.stream())
        except InvalidInputError:
            call.refuse_in_place(InputValidator.check_tokens, taken)
            raise
        return call.result(actions)

    def _checked_chunks(self, x: object) -> Tensor:
        shape = (self.chunk_length, self.action_dim)
        return self._checked_actions(x, shape, f"..., {shape[0]}, {shape[1]}")

    def _call_for(self, tensor: Tensor, trailing: int) -> Call:
        """trailing: how many axes a chunk has."""
        self._require_own()
        tokenizer, is_in_place = self._engines.tokenizer_for(tensor.device)
        return Call(tokenizer, tensor.shape[: tensor.ndim - trailing], tensor.device, is_in_place)
