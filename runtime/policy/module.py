"""A bundle inside of a policy of torch: frozen, known by its fingerprint, and not to be mistaken for another.

What the adapters of both kinds of tokens share. It does no arithmetic of its own: tensors go to an `ActionTokenizer`,
on the CPU as numpy views, on the GPU where they lie (`runtime.policy.adapter_calls`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..bundle.advice import quoted
from ..bundle.beliefs import Belief, BeliefMode
from ..bundle.errors import FingerprintError, InvalidInputError
from ..bundle.paths import as_path
from ..tokenizer import ActionTokenizer
from .adapter_calls import CPU, FINGERPRINT_KEY, Engines
from .tensor_beliefs import TensorBeliefs
from .tensors import checked_tensor


class BundleModule(nn.Module):
    """The only state is the fingerprint, a buffer: where the policy's checkpoint brings another one, loading it or the
    first call raises FingerprintError. `train`, `half` and the like change nothing.
    """

    tokenizer_fingerprint: Tensor

    def __init__(self, engines: object = None, *_sizes: object, **_settings: object) -> None:
        """Use `from_bundle`; with sizes or weights this raises InvalidInputError that says so."""
        name = type(self).__name__
        if not isinstance(engines, Engines):
            raise InvalidInputError(
                f"this {name} has no sizes or weights to choose: it is opened from a bundle, which brings both, with "
                f"{name}.from_bundle(PATH); {self._how_to_build()}"
            )
        super().__init__()
        self._engines = engines
        self._beliefs = TensorBeliefs(engines)
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.register_buffer(FINGERPRINT_KEY, engines.numbers.clone())
        #: The buffer on a GPU that was last found to be right, and its version.
        self._known: tuple[Tensor | None, int] = (None, 0)
        self.eval()

    @staticmethod
    def _how_to_build() -> str:
        return f"a checkpoint becomes one by {quoted('build', '--checkpoint FILE --output PATH')}"

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

    def decode_logits(
        self,
        logits: Tensor | tuple[Tensor, Tensor],
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        generator: torch.Generator | None = None,
    ) -> Belief[Tensor]:
        """What logits of tokens decode to, as `ActionTokenizer.decode_logits` does it; gradients reach the logits.

        logits: of any float type, on any device, with any leading axes: of per-step tokens [..., T, D, l, K], any T, l
        a built prefix; of chunk tokens [..., l, V], any l, or the pair (classes [..., C], bits [..., n]). actions and
        std come as float32, or float64 where logits are: [..., T, A] in physical units; mode_probability [...]; mode
        int64, [..., T, D, c] or [...].

        mode: in `likeliest mode` gradients reach what is decoded within it, and that mode's logits by
        mode_probability alone. `sample` gives what the drawn tokens decode to, with the gradient of what is expected
        within their mode (straight-through). temperature: as in `ActionTokenizer`, or a tensor, which may carry a
        gradient, and whose values nobody checks. generator: of what is drawn, on the device of the logits.

        Computed by torch, in float32 or better, whatever autocast says: within 1e-6 normalised units of the definition,
        where products are not allowed to be TF32. Raises what `ActionTokenizer.decode_logits` raises; on a GPU, in
        compiled code and in transforms of torch.func nobody looks at the values, and what is illegal becomes NaN.
        """
        return self._decoded(logits, mode, temperature, generator, is_logits=True)

    def decode_probabilities(
        self,
        p: Tensor | tuple[Tensor, Tensor],
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        generator: torch.Generator | None = None,
    ) -> Belief[Tensor]:
        """`decode_logits` of what softmax, and sigmoid for bits, gave; divided by their sums."""
        return self._decoded(p, mode, temperature, generator, is_logits=False)

    def _decoded(
        self,
        given: object,
        mode: BeliefMode,
        temperature: object,
        generator: torch.Generator | None,
        *,
        is_logits: bool,
    ) -> Belief[Tensor]:
        if not torch.compiler.is_compiling():
            # It reads a number, which would end a compiled graph.
            self._require_own()
        return self._beliefs.decode(given, mode, temperature, generator, is_logits=is_logits)

    def _checked_actions(self, value: object, shape: tuple[int, ...], letters: str) -> Tensor:
        """Actions float32 [..., *shape]. Raises InvalidInputError."""
        x = checked_tensor("x", value)
        if tuple(x.shape[-len(shape) :]) != shape:
            raise InvalidInputError(f"x has shape {list(x.shape)}; expected actions [{letters}]")
        if x.dtype is not torch.float32:
            raise InvalidInputError(
                f"x has type {x.dtype}; expected torch.float32, in which a bundle computes, also where the policy "
                "around it does not: pass x.float()"
            )
        return x

    @staticmethod
    def _without_gradient(x: Tensor) -> Tensor:
        """`x`, where no gradient is asked of what becomes of it. Raises InvalidInputError."""
        if x.requires_grad and torch.is_grad_enabled():
            raise InvalidInputError(
                "x requires a gradient, and a bundle has none: what it gives would count as constant, unnoticed. Pass "
                "x.detach(), or call under torch.no_grad(); for codes or tokens alone call encode"
            )
        return x

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
        """Compare the state of an adapter with the bundle, whose own weights stay.

        strict: whether missing and unexpected names are refused; other numbers always are. Raises FingerprintError with
        all that differs.
        """
        del assign
        if not isinstance(state_dict, Mapping):
            raise InvalidInputError(f"state_dict is a {type(state_dict).__qualname__}; expected a dict of tensors")
        compared = self._engines.compare_with(state_dict)
        if problems := compared.problems(strict=strict):
            raise FingerprintError(self._engines.refusal(problems))
        self._keep_own(state_dict)
        return _IncompatibleKeys([*compared.missing], [*compared.unexpected])

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
