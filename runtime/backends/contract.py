"""The one contract of all backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..bundle.advice import command
from ..bundle.arrays import Float32Array, Int32Array
from ..bundle.errors import BackendUnavailableError
from ..bundle.folder import Bundle
from ..bundle.manifest import EngineEntry

#: Backends count chunks in 32 bits.
MOST_CHUNKS = 2**31 - 1


class GpuArrayLike(Protocol):
    """An array on the GPU, as torch, CuPy and JAX give it; DLPack alone will do at run time."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class BoundCall(Protocol):
    """A call on fixed arrays of the GPU, captured where the engine can: calling it allocates nothing.

    It keeps the arrays and the engine alive until it is closed. The arrays may be written between calls, in the order
    of the stream that it was bound to.
    """

    def __call__(self) -> None:
        """Put the work on the stream; it may not be done when this returns. Raises InferenceError."""

    def close(self) -> None:
        """Wait for the stream and let everything go; it cannot be called afterwards."""


class Backend(Protocol):
    """Runs encoder and decoders of one bundle; `BackendSpec` (`bundle/backend_specs.py`) says how backends differ.

    Arrays are C-contiguous, of exactly these types, and hold legal values: the caller has validated them, except in
    calls of at most `checked_steps` steps. What a backend promises of illegal values, gates judge (`refusal.py`). Both
    methods fill arrays of the caller, and raise InferenceError where the library fails.

    Threads: both methods may be called from any thread, and from several at once.
    Signals: a handler may call them, also where it has interrupted such a call.
    Fork: with `survives_fork` they work in a child as in its parent; without, the child's calls raise InferenceError.
    Arrays of the GPU: with `is_on_gpu` they are taken where they lie (`gpu/arrays.py` has the methods).

    name: as in the table of backends; description: library, version and device, for logs and reports; device: what it
    runs on, a GPU or a kind of processor; checked_steps: in calls of up to so many steps it checks the values itself,
    and raises IllegalValueError with nothing written. None of them changes.

    Some have two properties more. engines_in_use: the `EngineInUse`s of a backend that runs engines of the bundle.
    variants: by name, the backends around kernels that the contract does not reach, such as those for tokens of another
    type; they are closed with the backend itself.
    """

    name: str
    description: str
    device: str
    checked_steps: int

    def encode_into(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        """actions [B, T, A] -> tokens [B, T, D, L], or [B, L] of chunk tokens, and, where wanted, stats [B, T, L, 2]
        (`dynamic` bundles)."""

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        """tokens [B, T, D, l] or [B, l], l a prefix that decodes, and stats [B, T, l, 2] of `dynamic` bundles ->
        actions [B, T, A]."""

    def close(self) -> None:
        """Free what the library holds; the backend cannot be used afterwards."""


class MarksIllegalValues(Protocol):
    """A backend whose host does not read values of the GPU: what is illegal there is marked.

    All actions of a step with a token that is no level become NaN; all tokens of a step with an action that is not
    finite, or beyond the limit, become -1, which is 255 among bytes. Of chunk tokens the whole chunk is marked so, and
    -1 is 65535 among words of 16 bits.
    """

    @property
    def token_types(self) -> tuple[np.dtype[Any], ...]:
        """Those that tokens may have; the first, int32, is that of numpy arrays on their way through."""


@dataclass(frozen=True)
class EngineInUse:
    """An engine of the bundle that a backend runs.

    entry: what the manifest says of it; kernel_cache: kernels that its library has compiled for it meanwhile, or empty.
    """

    entry: EngineEntry
    kernel_cache: bytes = b""


def engines_of(backend: Any) -> Sequence[EngineInUse]:
    """The engines that a backend runs; none for one that runs the bundle's graphs as they are."""
    found: Sequence[EngineInUse] = backend.engines_in_use if hasattr(type(backend), "engines_in_use") else ()
    return found


def engine_for(bundle: Bundle, backend: str, targets: Sequence[str], wanted: str) -> EngineEntry:
    """The engine for the first of `targets` that the bundle has one for; wanted: what to call it where it has none.

    Raises BackendUnavailableError.
    """
    engines = [entry for entry in bundle.manifest.engines if entry.backend == backend]
    for target in targets:
        for entry in engines:
            if target in entry.targets:
                return entry
    built = ", ".join(target for entry in engines for target in entry.targets)
    raise no_engine(bundle, wanted, built and f"engines for {built}")


def no_engine(bundle: Bundle, wanted: str, found: str) -> BackendUnavailableError:
    """What to raise where a bundle has no engine that runs here; found: those that it has of this kind, or nothing."""
    return BackendUnavailableError(
        f"{bundle.folder} has no {wanted}{found and f', but {found}'}; build engines for this machine, on it: "
        f"{command('build', f'--from-bundle {bundle.folder}')}"
    )


def judged(backend: Any) -> dict[str, Backend]:
    """What gates have to judge: the backend, without a name, and its variants."""
    # Of the class: a wrapper that hands unknown names on is judged itself, and not what it wraps.
    return {"": backend, **(backend.variants if hasattr(type(backend), "variants") else {})}
