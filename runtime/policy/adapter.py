"""`ActionRFSQAE`: the published torch model's interface, backed by a bundle, for policy code.

Nothing else in `runtime` imports this module, since it needs torch. It does no arithmetic of its own: tensors go to an
`ActionTokenizer`, on the CPU as numpy views, on the GPU where they lie (`runtime.policy.adapter_calls`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from ..bundle.checkpoint_layouts import compare_config, recorded_weights
from ..bundle.checkpoint_states import states_in
from ..bundle.errors import FingerprintError, InvalidInputError
from ..bundle.models import StepModel
from ..bundle.validation import InputValidator, check_prefix
from .adapter_calls import StepCall, checked_indices, uncompiled
from .module import BundleModule

_LOG = logging.getLogger(__name__)


class ActionRFSQAE(BundleModule):
    """The published model's calls on a bundle: B any batch size, T any length, both may be 0; other leading axes too.

    Frozen: results carry no graph, and `train`, `half` and the like change nothing. The only state is the fingerprint,
    a buffer: where the policy's checkpoint brings another one, loading it or the first call raises FingerprintError.
    Tensors may lie anywhere, and results lie where the input did. On the CPU wrong values raise InvalidInputError; on
    the GPU the host does not read them: a token that is no level makes the actions of its step NaN, an action that is
    not finite makes the tokens of its step -1.

    action_dim A, num_layers L, num_levels K as published; hidden_dim and latent_dim are both D, which the published
    config calls hidden_dim; use_layernorm: whether residuals are normalised, by constants or otherwise.
    """

    def __init__(self, engines: object = None, *_sizes: object, **_settings: object) -> None:
        """Use `from_bundle`; with the published model's arguments this raises InvalidInputError that says so."""
        super().__init__(engines, *_sizes, **_settings)
        model = self._engines.model
        if not isinstance(model, StepModel):
            raise InvalidInputError(
                f"ActionRFSQAE is the published model, and {self._engines.path} has {model.mode} tokens, which are no "
                "codes of steps: open it with ChunkTokenizer.from_bundle"
            )
        self._model = model
        self.action_dim: int = model.action_dim
        self.hidden_dim: int = model.latent_dim
        self.latent_dim: int = model.latent_dim
        self.num_layers: int = model.num_layers
        self.num_levels: int = model.num_levels
        self.use_layernorm: bool = model.mode != "none"
        self.rfsq = _Quantiser(model)

    @uncompiled
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """actions float32 [B, T, A] -> what their codes decode to, float32 [B, T, A], and codes int64 [B, T, D, L].

        Raises InvalidInputError where a gradient would have to flow to `x`: there is none.
        """
        x = self._without_gradient(self._checked_actions(x, (self.action_dim,), f"B, T, {self.action_dim}"))
        call = self._call_for(x)
        codes, stats = self._encode(call, x)
        actions = call.empty((*codes.shape[:2], self.action_dim), torch.float32)
        call.tokenizer.decode_into(call.array(codes), call.array(actions), call.array(stats), stream=call.stream())
        return call.result(actions), call.result(codes).long()

    @uncompiled
    def encode(self, x: Tensor) -> Tensor:
        """actions float32 [B, T, A] -> codes int64 [B, T, D, L], with no gradient, whatever `x` requires."""
        x = self._checked_actions(x, (self.action_dim,), f"B, T, {self.action_dim}")
        call = self._call_for(x)
        return call.result(self._encode(call, x)[0]).long()

    @uncompiled
    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """codes of any integer type [B, T, D, l], l a built prefix -> actions float32 [B, T, A].

        `codes[..., :3]` is a prefix, as it lies. Raises InvalidInputError for a `dynamic` bundle, whose tokens do not
        decode alone, and UnbuiltPrefixError for an l that was not built.
        """
        indices = checked_indices(indices, self._model)
        check_prefix(tuple(indices.shape), self._model)
        call = self._call_for(indices, trailing=2)
        tokens = call.tokens(indices, self.num_levels)
        chunks = call.chunks(tokens)
        actions = call.empty((*chunks.shape[:2], self.action_dim), torch.float32)
        try:
            call.tokenizer.decode_into(call.array(chunks), call.array(actions), stream=call.stream())
        except InvalidInputError:
            call.refuse_in_place(InputValidator.check_tokens, tokens)
            raise
        return call.result(actions)

    def decoder(self, latents: CodedLatents) -> Tensor:
        """The second half of `decode_from_indices`: takes what `rfsq.decode_from_indices` returned."""
        if not isinstance(latents, CodedLatents):
            raise InvalidInputError(
                f"latents are a {type(latents).__qualname__}; expected what rfsq.decode_from_indices returned: a "
                "bundle decodes tokens in one step, and has no decoder of latents"
            )
        return self.decode_from_indices(latents.indices)

    def _call_for(self, tensor: Tensor, trailing: int = 1) -> StepCall:
        """trailing: how many axes a step has."""
        self._require_own()
        tokenizer, is_in_place = self._engines.tokenizer_for(tensor.device)
        return StepCall(tokenizer, tensor.shape[: tensor.ndim - trailing], tensor.device, is_in_place)

    def _encode(self, call: StepCall, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens int32 and, for `dynamic` bundles, stats of whole chunks."""
        chunks, model = call.chunks(x.detach()), self._model
        tokens = call.empty((*chunks.shape[:2], model.latent_dim, model.num_layers), torch.int32)
        stats = None
        if model.has_stats:
            stats = call.empty((*chunks.shape[:2], model.num_layers, 2), torch.float32)
        try:
            call.tokenizer.encode_into(call.array(chunks), call.array(tokens), call.array(stats), stream=call.stream())
        except InvalidInputError:
            call.refuse_in_place(InputValidator.check_actions, x)
            raise
        return tokens, stats

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Compare a checkpoint with the bundle, whose own weights stay.

        state_dict: a published state dict or the file around it ('model_state_dict' or 'model', with or without
        'config'), or the adapter's own. strict: whether missing and unexpected names are refused; other numbers always
        are. Raises FingerprintError with all that differs.
        """
        del assign
        if not isinstance(state_dict, Mapping):
            raise InvalidInputError(f"state_dict is a {type(state_dict).__qualname__}; expected a dict of tensors")
        problems = compare_config(state_dict.get("config"), self._model)
        missing: list[str] = []
        unexpected: list[str] = []
        states = states_in(state_dict, recorded_weights(self._engines.on_host.manifest))
        for state in states:
            compared = self._engines.compare_with(state)
            problems += compared.problems(strict=strict)
            missing += compared.missing
            unexpected += compared.unexpected
        if problems:
            raise FingerprintError(self._engines.refusal(problems))
        if any(self._engines.speaks_otherwise(state) for state in states):
            _LOG.warning(
                "%s has calibrated tokens, which mean something else than those that this checkpoint made as "
                "published: a policy has to be trained on them",
                self._engines.path,
            )
        self._keep_own(state_dict)
        return _IncompatibleKeys(missing, unexpected)


@dataclass(frozen=True)
class CodedLatents:
    """Stands for the latents [..., D] of tokens; only `decoder` takes it, since a bundle computes no latents."""

    indices: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.indices.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def to(self, device: torch.device | str) -> CodedLatents:
        return CodedLatents(self.indices.to(device))

    def view(self, *shape: int) -> CodedLatents:
        """Reshape the steps; the last axis stays D. Published code calls `view(-1, D)` before its decoder."""
        return CodedLatents(self.indices.reshape(*shape, self.indices.shape[-1]))

    reshape = view

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"latents of a bundle have no {name!r}: they are no numbers, only what `decoder` takes; actions come from "
            "decode_from_indices"
        )


class _Quantiser:
    """The published model's `rfsq`, as far as decoding needs it; not a module, since it has no state."""

    def __init__(self, model: StepModel) -> None:
        self._model = model

    def decode_from_indices(self, indices: Tensor) -> CodedLatents:
        """The first half of `ActionRFSQAE.decode_from_indices`, for `decoder`."""
        return CodedLatents(checked_indices(indices, self._model))
