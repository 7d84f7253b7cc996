"""What `runtime.policy.adapter` needs around a bundle: backends that take tensors, and calls in whole chunks.

It also tells whether a state dict is the bundle's: by the fingerprint in it, or weight by weight. Imports torch.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends.registry import GPU_BACKENDS, OBSTACLES
from ..bundle.advice import command, quoted
from ..bundle.checkpoint_layouts import StateComparison, compare_state, is_grid, recorded_hashes
from ..bundle.errors import InvalidInputError
from ..bundle.models import ModelEntry, StepModel, step_model
from ..bundle.validation import InputValidator
from ..tokenizer import ActionTokenizer
from .tensors import checked_tensor, is_plain

_LOG = logging.getLogger(__name__)
_Self = TypeVar("_Self")
_Result = TypeVar("_Result")

_TAKEN_BY_EVERY_TOKENIZER = (torch.int32, torch.int64)
_WIDER = {
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    # What int64 cannot hold becomes negative: no level before, no level after.
    torch.uint64: torch.int64,
}
#: In bytes, for the widest load of a kernel.
_ALIGNMENT = 16
CPU = torch.device("cpu")
#: The only entry of the adapter's own state dict: the fingerprint's 32 bytes, as float32 numbers.
FINGERPRINT_KEY = "tokenizer_fingerprint"
#: Averaging the weights of policies averages these numbers too, and each may then be off by so much. All 32 numbers of
#: another fingerprint are so near with a chance of (9 / 256)^32.
_ROUNDING = 4
#: The GPU that backends work on.
_DEVICE = 0


def _not_decodable() -> str:
    build = command("build", "--conditioning recovered")
    return (
        "tokens of a `dynamic` bundle cannot be decoded alone: every layer was normalised by a mean and a sigma of its "
        "own step, which do not travel with the tokens; the published decode_from_indices left them out, and was wrong "
        "by orders of magnitude. Reconstructions come from forward; to decode tokens, build the bundle anew: "
        f"`{build}` (the same tokens, approximate, for a policy that speaks them already) or "
        "`--conditioning calibrated` (new tokens, exact, for a policy to be trained)"
    )


class Engines:
    """A bundle on the backend asked for and, with `auto`, on one more that takes tensors of the GPU once they come.

    It also tells whether a state dict is the bundle's, by the fingerprint in it or weight by weight.

    Copies are the same object, and what is pickled opens the bundle again, which must still be the same tokenizer.
    """

    def __init__(self, path: str | Path, backend: str, expect_fingerprint: str | None) -> None:
        self.on_host = ActionTokenizer.load(path, backend=backend, expect_fingerprint=expect_fingerprint)
        assert self.on_host.folder is not None  # it was loaded
        self.path, self._backend = self.on_host.folder, backend
        self.model = self.on_host.model
        self.fingerprint = self.on_host.fingerprint
        #: The fingerprint as a state dict has it. On the CPU, also where a policy is built on the meta device.
        self.numbers = torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.float32, device=CPU)
        # By device that tensors came from; None where no backend takes them in place.
        self._on_gpu: dict[torch.device, ActionTokenizer | None] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> Engines:
        return self

    def __reduce__(self) -> tuple[type[Engines], tuple[Path, str, str]]:
        return Engines, (self.path, self._backend, self.fingerprint)

    def tokenizer_for(self, device: torch.device) -> tuple[ActionTokenizer, bool]:
        """The tokenizer for tensors on this device, and whether it takes them where they lie."""
        if device.type == "cpu":
            return self.on_host, True
        with self._lock:
            if device not in self._on_gpu:
                self._on_gpu[device] = self._open_for(device)
            found = self._on_gpu[device]
        return (self.on_host, False) if found is None else (found, True)

    def _open_for(self, device: torch.device) -> ActionTokenizer | None:
        obstacles = []
        if device.type != "cuda" or device.index != _DEVICE:
            obstacles.append(f"backends work on cuda:{_DEVICE} alone; choose the GPU with CUDA_VISIBLE_DEVICES")
        elif self.on_host.backend.name in GPU_BACKENDS:
            return self.on_host
        elif self._backend != "auto":
            obstacles.append(f"{self._backend!r} was asked for, and runs on the CPU")
        for name in () if obstacles else GPU_BACKENDS:
            try:
                opened = ActionTokenizer.load(self.path, backend=name, expect_fingerprint=self.fingerprint)
            except OBSTACLES as error:
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

    def compare_with(self, state: Mapping[str, Any]) -> StateComparison:
        """How `state`, the adapter's own or a published one, differs from the bundle's."""
        tensors = {name: value for name, value in state.items() if isinstance(name, str) and is_plain(value)}
        if len(tensors) < len(state):
            others = sorted(str(name) for name in state if name not in tensors)
            return _no_state(f"{', '.join(others[:8])} are none")
        if FINGERPRINT_KEY in tensors:
            unexpected = tuple(sorted(tensors.keys() - {FINGERPRINT_KEY}))
            return StateComparison((), unexpected, self.differences_from(tensors[FINGERPRINT_KEY]))
        if not isinstance(self.model, StepModel):
            return StateComparison(missing=(FINGERPRINT_KEY,), unexpected=tuple(sorted(tensors)))
        hashes = recorded_hashes(self.on_host.manifest)
        if hashes is None:
            problem = (
                "the bundle does not say which tensors it was built from: leave load_state_dict out, since the bundle "
                "brings its weights, or build it again"
            )
            return StateComparison(differences=(problem,))
        grids = [value.dtype for name, value in tensors.items() if is_grid(name) and value.is_floating_point()]
        try:
            arrays = {name: value.detach().cpu().float().numpy() for name, value in tensors.items()}
        except RuntimeError as error:
            # Nested tensors, and types that torch stores but does not compute with.
            return _no_state(str(error))
        resolution = max((torch.finfo(dtype).eps for dtype in grids), default=0.0)
        return compare_state(arrays, hashes, self.model, resolution=resolution)

    def differences_from(self, numbers: Tensor) -> tuple[str, ...]:
        """How the numbers of a fingerprint differ from the bundle's own: one line, or none."""
        own, found = self.numbers, numbers.detach().cpu().float()
        if found.shape == own.shape and bool(((found - own).abs() <= _ROUNDING).all()):
            return ()
        levels = [round(number) if math.isfinite(number) else -1 for number in found.flatten().tolist()]
        if len(levels) != len(own) or not all(0 <= level <= 255 for level in levels):
            return (
                f"its {FINGERPRINT_KEY} holds none: the checkpoint is damaged, or of a policy without a tokenizer, and "
                "what loaded it has left this memory unwritten; then call reset_parameters() on the tokenizer",
            )
        return (f"it was saved with the tokenizer {bytes(levels).hex()}",)

    def speaks_otherwise(self, state: Mapping[str, Any]) -> bool:
        """Whether a published model with this state makes other tokens than the bundle."""
        is_published = FINGERPRINT_KEY not in state and "calibrated.mean" not in state
        return is_published and self.model.mode == "calibrated"

    def refusal(self, problems: Sequence[str]) -> str:
        """The message for a state that is not the bundle's: what differs, and what to do."""
        model = self.model
        lines = "\n".join(f"  {problem}" for problem in problems)
        if not isinstance(model, StepModel):
            return (
                f"this state is not shown to be of {self.path} ({self.fingerprint}):\n{lines}\n"
                "open the bundle that the policy was trained with; its fingerprint is its name"
            )
        data = " --data EPISODES" if model.mode in ("calibrated", "recovered") else ""
        given = f"--checkpoint FILE --conditioning {model.mode} --chunk-length {model.chunk_length}{data} --output DIR"
        return (
            f"this state is not shown to be what {self.path} ({self.fingerprint}) was built from:\n"
            f"{lines}\n"
            f"load the bundle that belongs to it, or build one: {quoted('build', given)}"
        )


class Call:
    """One call: chunks with leading axes of any shape, as a batch that a tokenizer takes, and back.

    is_whole: whether the tensors are such a batch already; work_device: where they are worked on, the CPU where the
    tokenizer does not take them in place.
    """

    __slots__ = ("_is_on_gpu", "_leading", "device", "is_whole", "tokenizer", "work_device")

    def __init__(
        self, tokenizer: ActionTokenizer, leading: torch.Size, device: torch.device, is_in_place: bool
    ) -> None:
        self.tokenizer, self.device, self._leading = tokenizer, device, leading
        self.work_device = device if is_in_place else CPU
        self._is_on_gpu = self.work_device.type == "cuda"
        self.is_whole = len(leading) == 1

    def chunks(self, tensor: Tensor) -> Tensor:
        """[*leading, ...] -> [N, ...] on the device of the work."""
        chunks = tensor if self.work_device == self.device else tensor.to(self.work_device)
        if not self.is_whole:
            chunks = self._batched(chunks, tensor.shape[len(self._leading) :])
        # On the CPU any strides will do: the tokenizer makes its own copy where it has to.
        if self._is_on_gpu:
            chunks = chunks.contiguous()
            chunks = chunks.clone() if chunks.data_ptr() % _ALIGNMENT else chunks
        return chunks

    def result(self, chunks: Tensor) -> Tensor:
        """[N, ...] -> [*leading, ...] where the input lies."""
        if not self.is_whole:
            chunks = self._as_given(chunks)
        return chunks if self.work_device == self.device else chunks.to(self.device)

    def _batched(self, tensor: Tensor, trailing: torch.Size) -> Tensor:
        return tensor.reshape(math.prod(self._leading), *trailing)

    def _as_given(self, chunks: Tensor) -> Tensor:
        return chunks.reshape(*self._leading, *chunks.shape[1:])

    def stream(self) -> object:
        """The stream that torch works on there; None on the CPU."""
        return torch.cuda.current_stream(self.work_device) if self._is_on_gpu else None

    def array(self, tensor: Tensor | None) -> Any:
        """What the tokenizer takes: memory of the CPU as a numpy view, memory of the GPU as it is."""
        return tensor if tensor is None or self._is_on_gpu else tensor.numpy()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array for results, on the device of the work."""
        return torch.empty(shape, dtype=dtype, device=self.work_device)

    def tokens(self, indices: Tensor, num_levels: int) -> Tensor:
        """Indices in a type that the tokenizer takes."""
        if self._is_on_gpu:
            return narrowed(indices, num_levels)
        taken = (*_TAKEN_BY_EVERY_TOKENIZER, getattr(torch, self.tokenizer.model.narrow_type))
        return indices if indices.dtype in taken else indices.to(_WIDER[indices.dtype])

    def refuse_in_place(self, check: Callable[[InputValidator, Any], object], tensor: Tensor) -> None:
        """Refuse values that were refused in chunks again, by their place in the tensor; of a type that is taken."""
        if not self.is_whole and not self._is_on_gpu:
            check(InputValidator(self.tokenizer.model), tensor.detach().to(CPU).numpy())


class StepCall(Call):
    """One call: steps with leading axes of any shape, as the whole chunks that a tokenizer takes, and back.

    Every step is coded on its own, so any T can be cut into the bundle's: the last chunk is filled up with zeros, which
    are legal as actions and as tokens.
    """

    __slots__ = ("_model", "_num_steps")

    def __init__(
        self, tokenizer: ActionTokenizer, leading: torch.Size, device: torch.device, is_in_place: bool
    ) -> None:
        super().__init__(tokenizer, leading, device, is_in_place)
        self._model = step_model(tokenizer.model, "the published model's class")
        self._num_steps = math.prod(leading)
        self.is_whole = len(leading) == 2 and leading[1] == self._model.chunk_length

    def _batched(self, tensor: Tensor, trailing: torch.Size) -> Tensor:
        length = self._model.chunk_length
        padding = -self._num_steps % length
        steps = tensor.reshape(self._num_steps, *trailing)
        if padding:
            steps = torch.cat((steps, steps.new_zeros((padding, *trailing))))
        return steps.reshape(len(steps) // length, length, *trailing)

    def _as_given(self, chunks: Tensor) -> Tensor:
        return chunks.flatten(0, 1)[: self._num_steps].reshape(*self._leading, *chunks.shape[2:])


def uncompiled(method: Callable[[_Self, Tensor], _Result]) -> Callable[[_Self, Tensor], _Result]:
    """`method`, left out of the graph when torch.compile compiles the code around it: it cannot follow a backend.

    Only then is torch.compiler.disable called, since it imports all of the compiler.
    """

    @functools.wraps(method)
    def call(self: _Self, value: Tensor) -> _Result:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(method)(self, value)  # type: ignore[no-any-return, no-untyped-call]
        return method(self, value)

    return call


def _no_state(problem: str) -> StateComparison:
    return StateComparison(differences=(f"it is no state dict of plain tensors: {problem}",))


def checked_integers(name: str, value: object, model: ModelEntry) -> Tensor:
    """Tokens of an integer type that holds all of this model's. Raises InvalidInputError for everything else."""
    indices = checked_tensor(name, value)
    if indices.dtype not in (*_TAKEN_BY_EVERY_TOKENIZER, *_WIDER):
        named = "levels" if isinstance(model, StepModel) else "tokens"
        raise InvalidInputError(
            f"{name} have type {indices.dtype}; expected integers, {named} 0 ... {model.vocabulary - 1}: take the "
            "argmax of logits, over their last axis"
        )
    if (most := torch.iinfo(indices.dtype).max) < model.vocabulary - 1:
        raise InvalidInputError(
            f"{name} have type {indices.dtype}, which holds no more than {most}, and this bundle's go up to "
            f"{model.vocabulary - 1}: larger ones have become others; pass them in the type in which they were chosen"
        )
    return indices


def checked_indices(value: object, model: StepModel) -> Tensor:
    """Codes [..., D, l] of an integer type. Raises InvalidInputError for everything else, and for `dynamic` bundles."""
    if model.has_stats:
        raise InvalidInputError(_not_decodable())
    indices = checked_integers("indices", value, model)
    if indices.ndim < 2 or indices.shape[-2] != model.latent_dim:
        raise InvalidInputError(
            f"indices have shape {list(indices.shape)}; expected codes [B, T, {model.latent_dim}, l]"
        )
    return indices


def narrowed(indices: Tensor, num_levels: int) -> Tensor:
    """Indices as int32; clamped first, since the lower half of an illegal int64 could be a level."""
    if indices.dtype in (torch.uint32, torch.uint64):
        indices = indices.to(torch.int64)
    if indices.dtype is torch.int64:
        indices = indices.clamp(-1, num_levels)
    return indices.to(torch.int32)
