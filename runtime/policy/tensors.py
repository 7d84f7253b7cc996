"""Which tensors have numbers now that may be read: torch has many that have none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..bundle.errors import InvalidInputError

#: The modes of torch in which tensors are stand-ins.
_RECORDING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.FUNCTIONAL)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_plain(value: object) -> bool:
    """Whether `value` is a tensor whose memory holds its numbers as they are."""
    return isinstance(value, Tensor) and _peculiarity(value) is None and not value.is_neg()


def checked_tensor(name: str, value: object) -> Tensor:
    """A tensor whose memory backends may read now. Raises InvalidInputError for every other kind of tensor or value."""
    if not isinstance(value, Tensor):
        raise InvalidInputError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}; expected a torch.Tensor: for numpy "
            "arrays there is runtime.ActionTokenizer"
        )
    if is_recorded():
        raise InvalidInputError(
            f"{name} is being traced, and of a bundle only the results of this one call would be recorded, or none: "
            "leave the tokenizer out of torch.jit.trace, torch.export, torch.onnx.export and make_fx; bundles hold its "
            "graphs as ONNX"
        )
    if torch._C._are_functorch_transforms_active():
        levels = ", ".join(level.key().name for level in get_interpreter_stack() or ())
        raise InvalidInputError(
            f"{name} is inside torch.func ({levels}), where tensors have no memory that a bundle could read or write: "
            "call the tokenizer outside, on whole batches, and pass in what it gave"
        )
    if peculiarity := _peculiarity(value):
        raise InvalidInputError(f"{name} is {peculiarity}; expected a plain dense tensor")
    return value.resolve_neg() if value.is_neg() else value


def runs_on_numbers() -> bool:
    """Whether this code runs on numbers now: it is not compiled, recorded, or inside a transform of torch.func."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not is_recorded()


def is_recorded() -> bool:
    """Whether calls are recorded or tensors are stand-ins, so that what a backend writes into memory is lost."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
        # Other modes, such as a profiler's, see each call and let it happen.
        modes = [*map(torch._C._get_dispatch_mode, _RECORDING_MODES), get_proxy_mode()]
        return any(mode is not None for mode in modes)
    return False


def _peculiarity(value: Tensor) -> str | None:
    """Why the memory of a tensor does not hold its numbers; None if it does, or holds them negated."""
    kind = type(value)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {kind.__module__}.{kind.__qualname__}, which has no memory of its own"
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided:
        return str(value.layout)
    if value.is_quantized:
        return "quantised"
    try:
        if value.data_ptr() or not (value.is_meta or value.numel()):
            return None
    except RuntimeError:
        # A leftover of a transform of torch.func.
        return "without memory"
    return "on the meta device" if value.is_meta else "without memory: it was freed, or never was"
