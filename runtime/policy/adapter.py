"""`ActionRFSQAE`: the published torch model's interface, backed by a bundle, for policy code.

Nothing else in `runtime` imports this module, since it needs torch. It does no arithmetic of its own: tensors go to an
`ActionTokenizer`, on the CPU as numpy views, on the GPU where they lie (`runtime.policy.adapter_calls`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..bundle.advice import quoted
from ..bundle.checkpoint_layouts import compare_config, recorded_weights
from ..bundle.checkpoint_states import states_in
from ..bundle.errors import FingerprintError, InvalidInputError
from ..bundle.models import StepModel
from ..bundle.paths import as_path
from ..bundle.validation import InputValidator
from ..tokenizer import ActionTokenizer
from .adapter_calls import CPU, FINGERPRINT_KEY, Call, Engines, checked_indices, checked_tensor, uncompiled

_LOG = logging.getLogger(__name__)


class ActionRFSQAE(nn.Module):
    """The published model's calls on a bundle: B any batch size, T any length, both may be 0; other leading axes too.

    Frozen: results carry no graph, and `train`, `half` and the like change nothing. The only state is the fingerprint,
    a buffer: where the policy's checkpoint brings another one, loading it or the first call raises FingerprintError.
    Tensors may lie anywhere, and results lie where the input did. On the CPU wrong values raise InvalidInputError; on
    the GPU the host does not read them: a token that is no level makes the actions of its step NaN, an action that is
    not finite makes the tokens of its step -1.

    action_dim A, num_layers L, num_levels K as published; hidden_dim and latent_dim are both D, which the published
    config calls hidden_dim; use_layernorm: whether residuals are normalised, by constants or otherwise.
    """

    tokenizer_fingerprint: Tensor

    def __init__(self, engines: object = None, *_sizes: object, **_settings: object) -> None:
        """Use `from_bundle`; with the published model's arguments this raises InvalidInputError that says so."""
        if not isinstance(engines, Engines):
            raise InvalidInputError(
                "this ActionRFSQAE has no sizes or weights to choose: it is opened from a bundle, which brings both, "
                "with ActionRFSQAE.from_bundle(PATH); a checkpoint becomes one by "
                f"{quoted('build', '--checkpoint FILE --output PATH')}"
            )
        super().__init__()
        self._engines = engines
        model = engines.model
        self.action_dim: int = model.action_dim
        self.hidden_dim: int = model.latent_dim
        self.latent_dim: int = model.latent_dim
        self.num_layers: int = model.num_layers
        self.num_levels: int = model.num_levels
        self.use_layernorm: bool = model.mode != "none"
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.register_buffer(FINGERPRINT_KEY, engines.numbers.clone())
        #: The buffer on a GPU that was last found to be right, and its version.
        self._known: tuple[Tensor | None, int] = (None, 0)
        self.rfsq = _Quantiser(engines.model)
        self.eval()

    @classmethod
    def from_bundle(
        cls, path: str | os.PathLike[str], backend: str = "auto", expect_fingerprint: str | None = None
    ) -> Self:
        """Open and verify the bundle at `path`; raises what `ActionTokenizer.load` raises.

        backend: `auto` for the best one that works here, and once tensors of a GPU come, or the module is moved there,
        for the best of those that take them; a name for that one alone. A backend on the CPU serves tensors of the GPU
        too: they are copied to it and back. expect_fingerprint: of the tokenizer that the policy was trained with.
        """
        return cls(Engines(as_path(path, "the bundle"), backend, expect_fingerprint))

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer: the same fingerprint, the same meaning of tokens."""
        return self._engines.fingerprint

    @property
    def tokenizer(self) -> ActionTokenizer:
        """The tokenizer that takes numpy arrays."""
        self._require_own()
        return self._engines.on_host

    @uncompiled
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """actions float32 [B, T, A] -> what their codes decode to, float32 [B, T, A], and codes int64 [B, T, D, L].

        Raises InvalidInputError where a gradient would have to flow to `x`: there is none.
        """
        x = self._checked_actions(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise InvalidInputError(
                "x requires a gradient, and a bundle has none: what it gives would count as constant, unnoticed. Pass "
                "x.detach(), or call under torch.no_grad(); for codes alone call encode"
            )
        call = self._call_for(x)
        codes, stats = self._encode(call, x)
        actions = call.empty((*codes.shape[:2], self.action_dim), torch.float32)
        call.tokenizer.decode_into(call.array(codes), call.array(actions), call.array(stats), stream=call.stream())
        return call.result(actions), call.result(codes).long()

    @uncompiled
    def encode(self, x: Tensor) -> Tensor:
        """actions float32 [B, T, A] -> codes int64 [B, T, D, L], with no gradient, whatever `x` requires."""
        x = self._checked_actions(x)
        call = self._call_for(x)
        return call.result(self._encode(call, x)[0]).long()

    @uncompiled
    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """codes of any integer type [B, T, D, l], l a built prefix -> actions float32 [B, T, A].

        `codes[..., :3]` is a prefix, as it lies. Raises InvalidInputError for a `dynamic` bundle, whose tokens do not
        decode alone, and UnbuiltPrefixError for an l that was not built.
        """
        indices = checked_indices(indices, self._engines.model)
        call = self._call_for(indices, trailing=2)
        tokens = call.tokens(indices, self.num_levels)
        chunks = call.chunks(tokens)
        actions = call.empty((*chunks.shape[:2], self.action_dim), torch.float32)
        try:
            call.tokenizer.decode_into(call.array(chunks), call.array(actions), stream=call.stream())
        except InvalidInputError:
            call.refuse_in_place(InputValidator.tokens, tokens)
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

    def _checked_actions(self, value: object) -> Tensor:
        x = checked_tensor("x", value)
        if x.ndim < 1 or x.shape[-1] != self.action_dim:
            raise InvalidInputError(f"x has shape {list(x.shape)}; expected actions [B, T, {self.action_dim}]")
        if x.dtype is not torch.float32:
            raise InvalidInputError(
                f"x has type {x.dtype}; expected torch.float32, in which a bundle computes, also where the policy "
                "around it does not: pass x.float()"
            )
        return x

    def _call_for(self, tensor: Tensor, trailing: int = 1) -> Call:
        """trailing: how many axes a step has."""
        self._require_own()
        tokenizer, is_in_place = self._engines.tokenizer_for(tensor.device)
        return Call(tokenizer, tensor.shape[: tensor.ndim - trailing], tensor.device, is_in_place)

    def _encode(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens int32 and, for `dynamic` bundles, stats of whole chunks."""
        chunks, model = call.chunks(x.detach()), self._engines.model
        tokens = call.empty((*chunks.shape[:2], model.latent_dim, model.num_layers), torch.int32)
        stats = None
        if model.has_stats:
            stats = call.empty((*chunks.shape[:2], model.num_layers, 2), torch.float32)
        try:
            call.tokenizer.encode_into(call.array(chunks), call.array(tokens), call.array(stats), stream=call.stream())
        except InvalidInputError:
            call.refuse_in_place(InputValidator.actions, x)
            raise
        return tokens, stats

    # The rest of a torch module ---------------------------------------------------------------------------------------

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Begins with an empty one, since policy code asks the first parameter for the model's device and type.

        It is not among the parameters of a policy around it: nothing can unfreeze it, and nothing needs its gradient.
        """
        if recurse:
            device = self.tokenizer_fingerprint.device
            yield nn.Parameter(torch.empty(0, dtype=torch.float32, device=device), requires_grad=False)
        yield from super().parameters(recurse)

    def reset_parameters(self) -> None:
        """Write the bundle's fingerprint again; torch and transformers call this when a module's tensors are new."""
        with torch.no_grad():
            self.tokenizer_fingerprint.copy_(self._engines.numbers)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raises InvalidInputError for True."""
        if requires_grad:
            raise InvalidInputError(
                "a bundle cannot be trained: its weights are compiled. Train the published model, and build a bundle "
                f"from its checkpoint with {quoted('build', '--checkpoint FILE')}"
            )
        return super().requires_grad_(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Compare a checkpoint with the bundle, whose own weights stay.

        state_dict: a published state dict or the file around it ('model_state_dict' or 'model', with or without
        'config'), or the adapter's own. strict: whether missing and unexpected names are refused; other numbers always
        are. Raises FingerprintError with all that differs.
        """
        del assign
        if not isinstance(state_dict, Mapping):
            raise InvalidInputError(f"state_dict is a {type(state_dict).__qualname__}; expected a dict of tensors")
        problems = compare_config(state_dict.get("config"), self._engines.model)
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

    def _load_from_state_dict(  # noqa: PLR0913  # torch says with what it calls
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Called when the state of a policy around it is loaded; torch raises RuntimeError with what error_msgs gets.

        The policy learnt the tokens of the tokenizer that was saved with it, so the right weights are not enough.
        """
        del local_metadata, strict
        state = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if not state:
            missing_keys.append(prefix + FINGERPRINT_KEY)
            return
        compared = self._engines.compare_with(state)
        missing_keys += [prefix + name for name in compared.missing]
        unexpected_keys += [prefix + name for name in compared.unexpected]
        if compared.differences:
            error_msgs.append(self._engines.refusal(compared.differences))
        elif self._engines.speaks_otherwise(state):
            error_msgs.append(
                "this policy was saved with the published tokenizer, and calibrated tokens, which "
                f"{self._engines.path} ({self.fingerprint}) has, mean something else: take a `recovered` bundle; or, "
                f"to train the policy on calibrated tokens, leave out what begins with {prefix!r} and load with "
                "strict=False"
            )
        else:
            self._keep_own(state)

    def _require_own(self) -> None:
        """Check the fingerprint in the buffer, which transformers, accelerate and others replace unasked.

        Waits for a GPU the first time, and again after somebody has written there.
        """
        numbers = self.tokenizer_fingerprint
        if numbers.is_cpu and numbers.dtype is torch.float32 and torch.equal(numbers, self._engines.numbers):
            return
        if numbers.is_meta:
            raise InvalidInputError(
                "the tokenizer lies on the meta device, where a policy is before its checkpoint is loaded; load it, or "
                "call to_empty(device=...) on the policy"
            )
        version = 0 if numbers.is_inference() else numbers._version  # noqa: SLF001  # torch counts there who writes
        if not numbers.is_cpu and numbers is self._known[0] and version == self._known[1]:
            return
        if differences := self._engines.differences_from(numbers):
            raise FingerprintError(self._engines.refusal(differences))
        self._known = numbers, version

    def _keep_own(self, state: Mapping[str, Any]) -> None:
        """Write the bundle's fingerprint after a state that is the bundle's: the buffer may have held another."""
        given = state.get(FINGERPRINT_KEY)
        if self.tokenizer_fingerprint.is_meta:
            self.tokenizer_fingerprint = torch.empty_like(
                self._engines.numbers, device=given.device if isinstance(given, Tensor) else CPU
            )
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, never to another type; the fingerprint stays, also where `to_empty` would lose it."""
        before = self.tokenizer_fingerprint
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.tokenizer_fingerprint.device
        self.tokenizer_fingerprint = (self._engines.numbers.clone() if before.is_meta else before).to(device)
        if device.type == "cuda":
            # Now rather than at the first call, which may be in a control loop.
            self._engines.tokenizer_for(device)
        return self

    def extra_repr(self) -> str:
        model = self._engines.model
        return (
            f"{self._engines.path}, {model.mode}, fingerprint {self.fingerprint[:8]}, "
            f"{self._engines.on_host.backend.name}"
        )


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
