"""`ActionRFSQAE`, what policy code calls: the published model's interface, backed by a bundle.

The one module here that imports torch, and nothing here imports it: whoever wants it has torch. It does no arithmetic
of its own; tensors go to an `ActionTokenizer`, on the CPU as numpy views, on the GPU where they lie.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from runtime.backends import GPU_BACKENDS, PREFERENCE
from runtime.checkpoint_layouts import (
    StateComparison,
    compare_config,
    compare_state,
    is_grid,
    recorded_hashes,
    recorded_weights,
)
from runtime.checkpoint_states import states_in
from runtime.errors import (
    BackendUnavailableError,
    FingerprintError,
    InferenceError,
    InvalidInputError,
    SelfTestError,
)
from runtime.manifest import ModelEntry
from runtime.paths import as_path
from runtime.tokenizer import ActionTokenizer
from runtime.trt_api import EngineRefusedError
from runtime.validation import InputValidator

_LOG = logging.getLogger(__name__)

#: The only entry of the adapter's own state dict: the fingerprint's 32 bytes.
FINGERPRINT_KEY = "tokenizer_fingerprint"

_TAKEN_BY_TOKENIZER = (torch.int32, torch.int64, torch.uint8)
_WIDER = {
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    # What int64 cannot hold becomes negative: no level before, no level after.
    torch.uint64: torch.int64,
}
#: What the widest load of a kernel needs.
_ALIGNMENT = 16
_CPU = torch.device("cpu")
#: The GPU that backends work on.
_DEVICE = 0

_NOT_DECODABLE = (
    "tokens of a `dynamic` bundle cannot be decoded alone: every layer was normalised by a mean and a sigma of its own "
    "step, which do not travel with the tokens; the published decode_from_indices left them out, and was wrong by "
    "orders of magnitude. Reconstructions come from forward; to decode tokens, build the bundle anew: `python "
    "export/build_engine.py --conditioning recovered` (the same tokens, approximate, for a policy that speaks them "
    "already) or `--conditioning calibrated` (new tokens, exact, for a policy to be trained)"
)


class ActionRFSQAE(nn.Module):
    """The published model's calls on a bundle: B any batch size, T any length, both may be 0; other leading axes too.

    Frozen: results carry no graph, and `train`, `half` and the like change nothing. Tensors may lie anywhere, and
    results lie where the input did. On the CPU wrong values raise InvalidInputError; on the GPU the host does not read
    them: a token that is no level makes the actions of its step NaN, an action that is not finite makes the tokens of
    its step -1.

    action_dim A, num_layers L, num_levels K as published; hidden_dim and latent_dim are both D, which the published
    config calls hidden_dim; use_layernorm: whether residuals are normalised, by constants or otherwise.
    """

    def __init__(self, engines: object = None, *_sizes: object, **_settings: object) -> None:
        """Use `from_bundle`; the published model's arguments are taken to say so."""
        if not isinstance(engines, _Engines):
            raise InvalidInputError(
                "this ActionRFSQAE has no sizes or weights to choose: it is opened from a bundle, which brings both, "
                "with ActionRFSQAE.from_bundle(PATH); a checkpoint becomes one by `python export/build_engine.py "
                "--checkpoint FILE --output PATH`"
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
        # Policy code asks the first parameter for the model's device and type. Without numbers: nothing can be learnt.
        self.anchor = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
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
        return cls(_Engines(as_path(path, "the bundle"), backend, expect_fingerprint))

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer: the same fingerprint, the same meaning of tokens."""
        return self._engines.fingerprint

    @property
    def tokenizer(self) -> ActionTokenizer:
        """What numpy arrays go to."""
        return self._engines.on_host

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
        call = self._engines.call_for(x)
        codes, stats = self._encode(call, x)
        actions = call.empty((*codes.shape[:2], self.action_dim), torch.float32)
        call.tokenizer.decode_into(call.array(codes), call.array(actions), call.array(stats), stream=call.stream())
        return call.result(actions), call.result(codes).long()

    def encode(self, x: Tensor) -> Tensor:
        """actions float32 [B, T, A] -> codes int64 [B, T, D, L], with no gradient, whatever `x` requires."""
        x = self._checked_actions(x)
        call = self._engines.call_for(x)
        return call.result(self._encode(call, x)[0]).long()

    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """codes of any integer type [B, T, D, l], l a built prefix -> actions float32 [B, T, A].

        `codes[..., :3]` is a prefix, as it lies. Raises InvalidInputError for a `dynamic` bundle, whose tokens do not
        decode alone, and UnbuiltPrefixError for an l that was not built.
        """
        indices = _checked_indices(indices, self._engines.model)
        call = self._engines.call_for(indices, trailing=2)
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
        """The second half of `decode_from_indices`, on what `rfsq.decode_from_indices` gave."""
        if not isinstance(latents, CodedLatents):
            raise InvalidInputError(
                f"latents are a {type(latents).__qualname__}; expected what rfsq.decode_from_indices returned: a "
                "bundle decodes tokens in one step, and has no decoder of latents"
            )
        return self.decode_from_indices(latents.indices)

    def _checked_actions(self, value: object) -> Tensor:
        x = _checked_tensor("x", value)
        if x.ndim < 1 or x.shape[-1] != self.action_dim:
            raise InvalidInputError(f"x has shape {list(x.shape)}; expected actions [B, T, {self.action_dim}]")
        if x.dtype is not torch.float32:
            raise InvalidInputError(
                f"x has type {x.dtype}; expected torch.float32, in which a bundle computes, also where the policy "
                "around it does not: pass x.float()"
            )
        return x

    def _encode(self, call: _Call, x: Tensor) -> tuple[Tensor, Tensor | None]:
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

    # What a torch module is asked beside ------------------------------------------------------------------------------

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raises InvalidInputError for True."""
        if requires_grad:
            raise InvalidInputError(
                "a bundle cannot be trained: its weights are compiled. Train the published model, and build a bundle "
                "from its checkpoint with `python export/build_engine.py --checkpoint FILE`"
            )
        return super().requires_grad_(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Compare: the bundle brings its own weights, and a checkpoint can only be the one that they came from or not.

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
            problems += self._compare(state, missing, unexpected, strict=strict)
        if problems:
            raise FingerprintError(self._refusal(problems))
        if any(map(self._speaks_otherwise, states)):
            _LOG.warning(
                "%s has calibrated tokens, which mean something else than those that this checkpoint made as "
                "published: a policy has to be trained on them",
                self._engines.path,
            )
        return _IncompatibleKeys(missing, unexpected)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The fingerprint alone, as a tensor: a policy's checkpoint then says which tokenizer it belongs to."""
        del keep_vars
        content = bytearray.fromhex(self.fingerprint)
        destination[prefix + FINGERPRINT_KEY] = torch.frombuffer(content, dtype=torch.uint8).to(self.anchor.device)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As a part of a policy whose state is loaded: torch raises RuntimeError with what is added to error_msgs.

        The policy learnt the tokens of the tokenizer that was saved with it, so the right weights are not enough.
        """
        del local_metadata, strict
        state = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if not state:
            missing_keys.append(prefix + FINGERPRINT_KEY)
            return
        missing: list[str] = []
        unexpected: list[str] = []
        problems = self._compare(state, missing, unexpected, strict=False)
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected]
        if problems:
            error_msgs.append(self._refusal(problems))
        elif self._speaks_otherwise(state):
            error_msgs.append(
                "this policy was saved with the published tokenizer, and calibrated tokens, which "
                f"{self._engines.path} ({self.fingerprint}) has, mean something else: take a `recovered` bundle; or, "
                f"to train the policy on calibrated tokens, leave out what begins with {prefix!r} and load with "
                "strict=False"
            )

    def _compare(
        self, state: Mapping[str, Any], missing: list[str], unexpected: list[str], *, strict: bool
    ) -> list[str]:
        tensors = {name: value for name, value in state.items() if isinstance(name, str) and _is_plain(value)}
        if len(tensors) < len(state):
            others = sorted(str(name) for name in state if name not in tensors)
            return [f"it is no state dict of plain tensors: {', '.join(others[:8])} are none"]
        if FINGERPRINT_KEY in tensors:
            compared = self._compare_fingerprint(tensors)
        else:
            hashes = recorded_hashes(self._engines.on_host.manifest)
            if hashes is None:
                return [
                    "the bundle does not say which tensors it was built from: leave load_state_dict out, since the "
                    "bundle brings its weights, or build it again"
                ]
            grids = [value.dtype for name, value in tensors.items() if is_grid(name) and value.is_floating_point()]
            compared = compare_state(
                {name: value.detach().cpu().float().numpy() for name, value in tensors.items()},
                hashes,
                self._engines.model,
                resolution=max((torch.finfo(dtype).eps for dtype in grids), default=0.0),
            )
        missing += compared.missing
        unexpected += compared.unexpected
        return compared.problems(strict=strict)

    def _compare_fingerprint(self, tensors: Mapping[str, Tensor]) -> StateComparison:
        found = bytes(tensors[FINGERPRINT_KEY].cpu().to(torch.uint8).flatten().tolist()).hex()
        return StateComparison(
            missing=(),
            unexpected=tuple(sorted(tensors.keys() - {FINGERPRINT_KEY})),
            differences=() if found == self.fingerprint else (f"it was saved with the tokenizer {found}",),
        )

    def _speaks_otherwise(self, state: Mapping[str, Any]) -> bool:
        """Whether a model of this state, as published, makes other tokens than the bundle."""
        is_published = FINGERPRINT_KEY not in state and "calibrated.mean" not in state
        return is_published and self._engines.model.mode == "calibrated"

    def _refusal(self, problems: Sequence[str]) -> str:
        model = self._engines.model
        lines = "\n".join(f"  {problem}" for problem in problems)
        data = " --calibration-data EPISODES" if model.mode in ("calibrated", "recovered") else ""
        return (
            f"this state is not shown to be what {self._engines.path} ({self.fingerprint}) was built from:\n"
            f"{lines}\n"
            "load the bundle that belongs to it, or build one: `python export/build_engine.py --checkpoint FILE "
            f"--conditioning {model.mode} --chunk-length {model.chunk_length}{data} --output DIR`"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to another device, and never to another type."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.anchor.data = self.anchor.data.float()
        if self.anchor.is_cuda:
            # Now rather than at the first call, which is somebody's loop.
            self._engines.tokenizer_for(self.anchor.device)
        return self

    def extra_repr(self) -> str:
        model = self._engines.model
        return (
            f"{self._engines.path}, {model.mode}, fingerprint {self.fingerprint[:8]}, "
            f"{self._engines.on_host.backend.name}"
        )


@dataclass(frozen=True)
class CodedLatents:
    """What stands for the latents [..., D] of tokens, for `decoder` alone: the bundle never makes them one by one."""

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
        """Of steps: the last axis stays D. Published code has them in a row, `view(-1, D)`, before its decoder."""
        return CodedLatents(self.indices.reshape(*shape, self.indices.shape[-1]))

    reshape = view

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"latents of a bundle have no {name!r}: they are no numbers, only what `decoder` takes; actions come from "
            "decode_from_indices"
        )


class _Quantiser:
    """The published model's `rfsq`, as far as decoding needs it; no module, since it has no state."""

    def __init__(self, model: ModelEntry) -> None:
        self._model = model

    def decode_from_indices(self, indices: Tensor) -> CodedLatents:
        """The first half of `ActionRFSQAE.decode_from_indices`, for `decoder`."""
        return CodedLatents(_checked_indices(indices, self._model))


class _Engines:
    """A bundle on the backend asked for and, with `auto`, on one more that takes tensors of the GPU once they come.

    Copies are the same object, and what is pickled opens the bundle again, which must still be the same tokenizer.
    """

    def __init__(self, path: Path, backend: str, expect_fingerprint: str | None) -> None:
        self.path, self._backend = path, backend
        self.on_host = ActionTokenizer.load(path, backend=backend, expect_fingerprint=expect_fingerprint)
        self.model, self.fingerprint = self.on_host.model, self.on_host.fingerprint
        # What was found for each device that tensors came from.
        self._on_gpu: dict[torch.device, ActionTokenizer | None] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> _Engines:
        return self

    def __reduce__(self) -> tuple[type[_Engines], tuple[Path, str, str]]:
        return _Engines, (self.path.absolute(), self._backend, self.fingerprint)

    def tokenizer_for(self, device: torch.device) -> tuple[ActionTokenizer, bool]:
        """The tokenizer for tensors there, and whether it takes them where they lie."""
        if device.type == "cpu":
            return self.on_host, True
        with self._lock:
            if device not in self._on_gpu:
                self._on_gpu[device] = self._open_for(device)
            found = self._on_gpu[device]
        return (self.on_host, False) if found is None else (found, True)

    def call_for(self, tensor: Tensor, trailing: int = 1) -> _Call:
        """trailing: how many axes a step has."""
        tokenizer, is_in_place = self.tokenizer_for(tensor.device)
        return _Call(tokenizer, tensor.shape[: tensor.ndim - trailing], tensor.device, is_in_place)

    def _open_for(self, device: torch.device) -> ActionTokenizer | None:
        obstacles = []
        if device.type != "cuda" or device.index != _DEVICE:
            obstacles.append(f"backends work on cuda:{_DEVICE} alone; choose the GPU with CUDA_VISIBLE_DEVICES")
        elif self.on_host.backend.name in GPU_BACKENDS:
            return self.on_host
        elif self._backend != "auto":
            obstacles.append(f"{self._backend!r} was asked for, and runs on the CPU")
        for name in () if obstacles else (name for name in PREFERENCE if name in GPU_BACKENDS):
            try:
                opened = ActionTokenizer.load(self.path, backend=name, expect_fingerprint=self.fingerprint)
            except (BackendUnavailableError, SelfTestError, InferenceError, EngineRefusedError) as error:
                obstacles.append(f"{name}: {error}")
                continue
            _LOG.info("tensors on %s go to %s (%s)", device, name, opened.backend.description)
            return opened
        _LOG.warning(
            "tensors on %s are copied to the CPU and back, since none takes them there:\n  %s",
            device,
            "\n  ".join(obstacles),
        )
        return None


class _Call:
    """One call: steps with leading axes of any shape, as the whole chunks that a tokenizer takes, and back.

    Every step is coded on its own, so any T can be cut into the bundle's: the last chunk is filled up with zeros, which
    are legal as actions and as tokens. is_whole: whether the tensors are chunks already; work_device: where they are
    worked on, the CPU where the tokenizer does not take them in place.
    """

    __slots__ = ("_is_on_gpu", "_leading", "_num_steps", "device", "is_whole", "tokenizer", "work_device")

    def __init__(
        self, tokenizer: ActionTokenizer, leading: torch.Size, device: torch.device, is_in_place: bool
    ) -> None:
        self.tokenizer, self.device, self._leading = tokenizer, device, leading
        self.work_device = device if is_in_place else _CPU
        self._is_on_gpu = self.work_device.type == "cuda"
        self._num_steps = math.prod(leading)
        self.is_whole = len(leading) == 2 and leading[1] == tokenizer.model.chunk_length

    def chunks(self, tensor: Tensor) -> Tensor:
        """[*leading, ...] -> [N, T, ...] on the device of the work."""
        chunks = tensor if self.work_device == self.device else tensor.to(self.work_device)
        if not self.is_whole:
            length, trailing = self.tokenizer.model.chunk_length, tensor.shape[len(self._leading) :]
            padding = -self._num_steps % length
            steps = chunks.reshape(self._num_steps, *trailing)
            if padding:
                steps = torch.cat((steps, steps.new_zeros((padding, *trailing))))
            chunks = steps.reshape(len(steps) // length, length, *trailing)
        # On the CPU any strides will do: the tokenizer makes its own copy where it has to.
        if self._is_on_gpu:
            chunks = chunks.contiguous()
            chunks = chunks.clone() if chunks.data_ptr() % _ALIGNMENT else chunks
        return chunks

    def result(self, chunks: Tensor) -> Tensor:
        """[N, T, ...] -> [*leading, ...] where the input lies."""
        if not self.is_whole:
            chunks = chunks.flatten(0, 1)[: self._num_steps].reshape(*self._leading, *chunks.shape[2:])
        return chunks if self.work_device == self.device else chunks.to(self.device)

    def stream(self) -> object:
        """The one that torch works on there."""
        return torch.cuda.current_stream(self.work_device) if self._is_on_gpu else None

    def array(self, tensor: Tensor | None) -> Any:
        """What the tokenizer takes: memory of the CPU as a numpy view, memory of the GPU as it is."""
        return tensor if tensor is None or self._is_on_gpu else tensor.numpy()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """For results, on the device of the work."""
        return torch.empty(shape, dtype=dtype, device=self.work_device)

    def tokens(self, indices: Tensor, num_levels: int) -> Tensor:
        """In a type that the tokenizer takes."""
        if self._is_on_gpu:
            return narrowed(indices, num_levels)
        return indices if indices.dtype in _TAKEN_BY_TOKENIZER else indices.to(_WIDER[indices.dtype])

    def refuse_in_place(self, check: Callable[[InputValidator, Any], object], tensor: Tensor) -> None:
        """For values that were refused in cut-up chunks: refuse them where they are in the tensor that was given."""
        if not self.is_whole and not self._is_on_gpu:
            leading = self._leading if len(self._leading) == 2 else (1, self._num_steps)
            given = tensor.detach().to(_CPU).reshape(*leading, *tensor.shape[len(self._leading) :])
            check(InputValidator(replace(self.tokenizer.model, chunk_length=leading[1])), given.numpy())


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_quantized


def _checked_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidInputError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}; expected a torch.Tensor: for numpy "
            "arrays there is runtime.ActionTokenizer"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise InvalidInputError(
            f"{name} is being traced, and of a bundle only the results of this one call would be recorded: leave the "
            "tokenizer out of torch.jit.trace and torch.onnx.export; bundles hold its graphs as ONNX"
        )
    if not _is_plain(value):
        kind = "on the meta device" if value.is_meta else "quantised" if value.is_quantized else str(value.layout)
        raise InvalidInputError(f"{name} is {kind}; expected a plain dense tensor")
    return value


def _checked_indices(value: object, model: ModelEntry) -> Tensor:
    if model.has_stats:
        raise InvalidInputError(_NOT_DECODABLE)
    indices = _checked_tensor("indices", value)
    if indices.dtype not in (*_TAKEN_BY_TOKENIZER, *_WIDER):
        raise InvalidInputError(
            f"indices have type {indices.dtype}; expected integers, levels 0 ... {model.num_levels - 1}: take the "
            "argmax of logits, over their last axis"
        )
    if indices.ndim < 2 or indices.shape[-2] != model.latent_dim:
        raise InvalidInputError(
            f"indices have shape {list(indices.shape)}; expected codes [B, T, {model.latent_dim}, l]"
        )
    return indices


def narrowed(indices: Tensor, num_levels: int) -> Tensor:
    """As int32, without making a level of what is none: int32 would take the lower digits of int64 alone."""
    if indices.dtype in (torch.uint32, torch.uint64):
        indices = indices.to(torch.int64)
    if indices.dtype is torch.int64:
        indices = indices.clamp(-1, num_levels)
    return indices.to(torch.int32)
