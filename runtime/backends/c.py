"""The generated C engine: compiled for this kind of processor, called where the arrays lie."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.arrays import AnyArray, Float32Array, Int32Array
from ..bundle.backend_specs import BACKENDS
from ..bundle.errors import BackendUnavailableError, IllegalValueError
from ..bundle.folder import Bundle
from .beliefs import BeliefAnswer, BeliefQuestion
from .contract import EngineInUse, engine_for
from .cpu_targets import host_targets
from .graph_beliefs import step_mode

_byref, _size, _first_byte = ctypes.byref, ctypes.c_size_t, ctypes.c_char.from_buffer


class CBackend:
    """Encodes and decodes in the calling thread: no thread, no lock, no allocation, safe in signal handlers and fork.

    Arrays that come again, as those of a control loop do, come for half the price: their arguments are made once.
    target: one of `cpu_targets.host_targets()`, None for the best that the bundle has. Raises BackendUnavailableError
    where it has none for this machine, or the library does not load.
    """

    name = "c"
    checked_steps = BACKENDS["c"].checked_steps

    def __init__(self, bundle: Bundle, target: str | None = None) -> None:
        model = bundle.manifest.model
        targets = host_targets() if target is None else (target,)
        self._entry = engine_for(bundle, "c", targets, f"C engine for {' or '.join(targets)}")
        self.device = self._entry.targets[0]
        self.description = f"generated C for {self.device}, {self._entry.version}"
        try:
            library = _load(bundle.content(self._entry.file))
        except OSError as error:
            raise BackendUnavailableError(
                f"{self._entry.file} does not load here: {error}; compile it again on this machine with --from-bundle"
            ) from error
        self._encode = _function(library, "rfsq_encode")
        #: And what they take between tokens and batch: one function decodes any number of chunk tokens.
        self._decoders: dict[int, tuple[Callable[..., int], tuple[ctypes.c_size_t, ...]]] = {
            prefix: (_function(library, f"rfsq_decode_l{prefix}"), ())
            if model.token_grid
            else (_function(library, "rfsq_decode"), (_size(prefix),))
            for prefix in model.prefixes
        }
        # Older engines have none of these, and those of `dynamic` models neither.
        self._beliefs: dict[int, Callable[..., int]] = {
            prefix: function
            for prefix in model.prefixes
            if (function := getattr(library, f"rfsq_decode_beliefs_l{prefix}", None)) is not None
        }
        self._chunk_beliefs: Callable[..., int] | None = getattr(library, "rfsq_decode_beliefs", None)
        self._bit_beliefs: Callable[..., int] | None = getattr(library, "rfsq_decode_bit_beliefs", None)
        self._has_stats = model.has_stats
        # The last call of each kind is held as soon as its arrays have come twice in a row.
        nothing = np.empty(0, np.float32)
        self._encoding = self._decoding = _HeldCall(int, (), nothing, nothing, None)
        self._encoded = self._decoded = (0, 0)

    @property
    def engines_in_use(self) -> tuple[EngineInUse, ...]:
        return (EngineInUse(self._entry),)

    def encode_into(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        held = self._encoding
        # Written out, here and below: this is the call of the control loop.
        if (
            held.source() is actions
            and held.target() is tokens
            and held.stats() is stats
            and held.shape == actions.shape
        ):
            status = held.call()
        else:
            batch, pair = _size(len(actions)), (id(actions), id(tokens))
            if self._has_stats:
                pointer = None if stats is None else _pointer(stats)
                status = self._encode(_pointer(actions), batch, _pointer(tokens), pointer)
            else:
                status = self._encode(_pointer(actions), batch, _pointer(tokens))
            if pair == self._encoded:
                arguments = (actions, batch, tokens, stats) if self._has_stats else (actions, batch, tokens)
                self._encoding = _HeldCall(self._encode, arguments, actions, tokens, stats)
            self._encoded = pair
        if status:
            raise IllegalValueError("the C engine refuses the actions: not all are finite and within the model's limit")

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        held = self._decoding
        if (
            held.source() is tokens
            and held.target() is actions
            and held.stats() is stats
            and held.shape == tokens.shape
        ):
            status = held.call()
        else:
            (decode, sizes), batch = self._decoders[tokens.shape[-1]], _size(len(tokens))
            pair = (id(tokens), id(actions))
            if stats is None:
                status = decode(_pointer(tokens), *sizes, batch, _pointer(actions))
            else:
                status = decode(_pointer(tokens), _pointer(stats), batch, _pointer(actions))
            if pair == self._decoded:
                arguments = (tokens, *sizes, batch, actions) if stats is None else (tokens, stats, batch, actions)
                self._decoding = _HeldCall(decode, arguments, tokens, actions, stats)
            self._decoded = pair
        if status:
            raise IllegalValueError("the C engine refuses the tokens, or their statistics: not all are legal")

    @property
    def has_beliefs(self) -> bool:
        """Whether this engine decodes probabilities."""
        return bool(self._beliefs) or self._chunk_beliefs is not None

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        given, batch = question.given, _size(question.batch)
        terms: tuple[Any, ...] = (_pointer(question.sharpness), question.is_logits, question.keeps_mode)
        outputs: tuple[AnyArray | None, ...] = (answer.actions, answer.std, answer.mode_probability)
        function: Callable[..., int] | None
        if given[0].ndim == 5:
            function, terms = self._beliefs.get(given[0].shape[3]), (*terms, question.coarse)
        elif len(given) == 2:
            function, terms, outputs = self._bit_beliefs, (_size(given[1].shape[1]), *terms), (*outputs, answer.mode)
        else:
            function, terms, outputs = self._chunk_beliefs, (_size(given[0].shape[1]), *terms), (*outputs, answer.mode)
        if function is None:
            raise BackendUnavailableError("the C engine decodes no probabilities; build the bundle again")
        pointers = (None if output is None else _pointer(output) for output in outputs)
        if function(*map(_pointer, given), *terms, batch, *pointers):
            raise IllegalValueError("the C engine refuses what is given of tokens: not all of it are distributions")
        if answer.mode is not None and given[0].ndim == 5:
            answer.mode[...] = step_mode(question)

    def close(self) -> None:
        """Does nothing: the library stays loaded, since another thread may be in it, and it holds no memory."""


class _HeldCall:
    """A call with its arguments made, and the arrays it is for.

    The arrays are referenced weakly: they may go, and while they are here numpy resizes nothing that is referenced so,
    whatever it is told. That is what the addresses rely on, for to ask an array for its own takes a third of a
    microsecond. One thing breaks it, `array.__setstate__`, numpy's half of unpickling, which gives an array other
    memory in place: nothing else of numpy calls it, and a loop must not, on arrays that it decodes with.
    """

    __slots__ = ("call", "shape", "source", "stats", "target")

    def __init__(
        self,
        function: Callable[..., int],
        arguments: Sequence[Any],
        source: AnyArray,
        target: AnyArray,
        stats: AnyArray | None,
    ) -> None:
        self.source: Callable[[], AnyArray | None] = weakref.ref(source)
        self.target: Callable[[], AnyArray | None] = weakref.ref(target)
        self.stats: Callable[[], AnyArray | None] = type(None) if stats is None else weakref.ref(stats)
        self.shape = source.shape
        self.call = functools.partial(
            function,
            *(ctypes.c_void_p(part.ctypes.data) if isinstance(part, np.ndarray) else part for part in arguments),
        )


@cache
def _load(content: bytes) -> ctypes.CDLL:
    """The library of exactly these bytes, which were hashed: a file in the bundle may have changed since.

    Loaded once in a process, whatever opens it, and never unloaded. Raises OSError.
    """
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "librfsq_tokenizer.so"
            path.write_bytes(content)
            return ctypes.CDLL(str(path))
    # Nowhere in the file system, where a mount could forbid to run it.
    descriptor = os.memfd_create("rfsq_tokenizer", os.MFD_CLOEXEC)
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        # The loader knows libraries by their names, and the system gives the same number again: so no name comes twice.
        spelling = "./" * next(_SPELLINGS)
        return ctypes.CDLL(f"/proc/self/fd/{spelling}{descriptor}")
    finally:
        os.close(descriptor)


_SPELLINGS = itertools.count()


def _function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    # No argtypes: converting to them takes half a microsecond, and every argument has its C type already.
    function: Callable[..., int] | None = getattr(library, name, None)
    if function is None:
        raise BackendUnavailableError(f"the C engine has no function {name}; compile it again")
    return function


def _pointer(array: AnyArray) -> Any:
    """What passes as a pointer to the array's first byte; `array.ctypes` takes three times as long."""
    try:
        return _byref(_first_byte(array))  # type: ignore[arg-type]  # numpy's arrays are buffers to mypy from 3.12 on
    except (TypeError, ValueError):
        # Read-only, or empty.
        return ctypes.c_void_p(array.ctypes.data)
