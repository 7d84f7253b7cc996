"""The calls of an `ActionTokenizer` on arrays of the GPU: checked like numpy arrays, but for their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from ...bundle.errors import InvalidInputError, UnbuiltPrefixError
from ...bundle.manifest import ModelEntry
from ...bundle.validation import is_gpu_array, stats_needed, type_advice
from ..contract import BoundCall
from .arrays import GpuArray, GpuResult, GpuStream, gpu_array, stream_of

_DType = np.dtype[Any]
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)


@runtime_checkable
class TakesGpuArrays(Protocol):
    """What a backend on the GPU has beside the contract of all backends; arrays in the order of its graphs."""

    @property
    def token_types(self) -> tuple[np.dtype[Any], ...]:
        """Those that tokens may have; int32 is always one."""

    def encode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def decode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def bind_encode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...

    def bind_decode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...


class GpuCalls:
    """Encodes and decodes where the arrays lie, on the caller's stream."""

    def __init__(self, model: ModelEntry, backend: TakesGpuArrays) -> None:
        self._model, self._backend = model, backend

    def encode(self, actions: object, stream: object) -> GpuResult:
        """actions float32 [B, T, A] -> tokens int32 [B, T, D, L]."""
        return self._encode_new(actions, stream)[0]

    def encode_with_stats(self, actions: object, stream: object) -> tuple[GpuResult, GpuResult]:
        """... and stats float32 [B, T, L, 2]."""
        tokens, stats = self._encode_new(actions, stream)
        return tokens, stats

    def _encode_new(self, actions: object, stream: object) -> tuple[GpuResult, ...]:
        source = self._actions("actions", actions)
        own = stream_of(stream, {"actions": source})
        shapes: list[tuple[tuple[int, ...], _DType]] = [(self._model.tokens_shape(source.shape[0]), _INT32)]
        if self._model.has_stats:
            shapes.append((self._model.stats_shape(source.shape[0]), _FLOAT32))
        results = tuple(GpuResult(shape, dtype, own) for shape, dtype in shapes)
        self.encode_into(source, results[0], results[1] if self._model.has_stats else None, own)
        return results

    def encode_into(self, actions: object, out: object, stats_out: object | None, stream: object) -> None:
        """Into arrays of the GPU."""
        arrays, handle = self._encoding(actions, out, stats_out, stream)
        if arrays[0].shape[0]:
            self._backend.encode_on_gpu(arrays, handle)

    def bind_encode(self, actions: object, out: object, stats_out: object | None, stream: object) -> BoundCall:
        """`encode_into`, captured."""
        arrays, handle = self._encoding(actions, out, stats_out, stream)
        _require_chunks(arrays[0])
        return self._backend.bind_encode(arrays, handle)

    def decode(self, tokens: object, stats: object | None, stream: object) -> GpuResult:
        """tokens int32 [B, T, D, l] -> actions float32 [B, T, A]."""
        source = self._tokens("tokens", tokens)
        own = stream_of(stream, {"tokens": source})
        actions = GpuResult(self._model.actions_shape(source.shape[0]), _FLOAT32, own)
        self.decode_into(source, actions, stats, own)
        return actions

    def decode_into(self, tokens: object, out: object, stats: object | None, stream: object) -> None:
        """Into an array of the GPU."""
        arrays, handle = self._decoding(tokens, out, stats, stream)
        if arrays[0].shape[0]:
            self._backend.decode_on_gpu(arrays, handle)

    def bind_decode(self, tokens: object, out: object, stats: object | None, stream: object) -> BoundCall:
        """`decode_into`, captured."""
        arrays, handle = self._decoding(tokens, out, stats, stream)
        _require_chunks(arrays[0])
        return self._backend.bind_decode(arrays, handle)

    def _encoding(
        self, actions: object, out: object, stats_out: object | None, stream: object
    ) -> tuple[list[GpuArray], GpuStream]:
        source = self._actions("actions", actions)
        batch, layers = source.shape[0], self._model.num_layers
        named = {"actions": source, "out": self._token_output(out, self._model.tokens_shape(batch, layers))}
        if self._model.has_stats:
            if stats_out is None:
                raise InvalidInputError(
                    "stats_out is missing: the engine of a `dynamic` bundle always gives statistics; pass a float32 "
                    f"array {list(self._model.stats_shape(batch, layers))} on the GPU for them"
                )
            named["stats_out"] = _output("stats_out", stats_out, _FLOAT32, self._model.stats_shape(batch, layers))
        return _checked(named, ("actions",), stream)

    def _decoding(
        self, tokens: object, out: object, stats: object | None, stream: object
    ) -> tuple[list[GpuArray], GpuStream]:
        source = self._tokens("tokens", tokens)
        batch, layers = source.shape[0], source.shape[3]
        named = {"tokens": source}
        if self._model.has_stats:
            if stats is None:
                raise InvalidInputError(stats_needed())
            named["stats"] = _input("stats", stats, _FLOAT32, self._model.stats_shape(batch, layers))
        elif stats is not None:
            raise InvalidInputError(
                f"stats were given, but tokens of a {self._model.mode!r} bundle are decoded without; leave stats out"
            )
        named["out"] = _output("out", out, _FLOAT32, self._model.actions_shape(batch))
        return _checked(named, ("tokens", "stats"), stream)

    def _actions(self, name: str, value: object) -> GpuArray:
        array = _read(name, value)
        self._check_tail(array, name, "B, T, A", (self._model.chunk_length, self._model.action_dim))
        _check_type(name, array, _FLOAT32)
        return array

    def _tokens(self, name: str, value: object) -> GpuArray:
        array = _read(name, value)
        tail = (self._model.chunk_length, self._model.latent_dim)
        self._check_tail(array, name, "B, T, D, l", (*tail, array.shape[-1] if array.shape else 0))
        if array.shape[3] not in self._model.prefixes:
            raise UnbuiltPrefixError(
                f"tokens have {array.shape[3]} layers (shape {list(array.shape)}); this bundle decodes "
                f"{', '.join(map(str, self._model.prefixes))}: pass the first so many layers, or build the bundle "
                "with --prefixes"
            )
        if array.dtype not in self._backend.token_types:
            _check_type(name, array, _INT32)
        return array

    def _token_output(self, value: object, shape: tuple[int, ...]) -> GpuArray:
        array = _read("out", value)
        return _output("out", array, array.dtype if array.dtype in self._backend.token_types else _INT32, shape)

    def _check_tail(self, array: GpuArray, name: str, letters: str, tail: tuple[int, ...]) -> None:
        if len(array.shape) != len(tail) + 1 or array.shape[1:] != tail:
            expected = ", ".join(map(str, ("B", *tail)))
            raise InvalidInputError(f"{name} have shape {list(array.shape)}; expected [{letters}] = [{expected}]")


def _read(name: str, value: object) -> GpuArray:
    if isinstance(value, GpuArray):
        return value
    if not is_gpu_array(value):
        raise InvalidInputError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__} that does not lie on the GPU, beside "
            "arrays that do; pass all of them from the GPU, or all of them as numpy.ndarray"
        )
    return gpu_array(name, value)


def _input(name: str, value: object, dtype: np.dtype[np.float32], shape: tuple[int, ...]) -> GpuArray:
    array = _read(name, value)
    _check_type(name, array, dtype)
    if array.shape != shape:
        raise InvalidInputError(f"{name} has shape {list(array.shape)}; expected {list(shape)}")
    return array


def _output(name: str, value: object, dtype: _DType, shape: tuple[int, ...]) -> GpuArray:
    array = _read(name, value)
    if array.dtype != dtype or array.shape != shape:
        raise InvalidInputError(
            f"{name} is {array.dtype}{list(array.shape)}; expected {dtype}{list(shape)} to write the results into"
        )
    if not array.is_writable:
        raise InvalidInputError(f"{name} is read-only; expected an array that results can be written into")
    return array


def _check_type(name: str, array: GpuArray, dtype: _DType) -> None:
    if array.dtype != dtype:
        advice = type_advice(array.dtype, np.dtype(dtype), f".to(torch.{dtype}) or .astype(cupy.{dtype})")
        raise InvalidInputError(
            f"{name} have type {array.dtype}; expected {dtype}: nothing is converted on the GPU unasked, {advice}"
        )


def _checked(
    named: dict[str, GpuArray], inputs: tuple[Literal["actions", "tokens", "stats"], ...], stream: object
) -> tuple[list[GpuArray], GpuStream]:
    """The arrays in the engine's order, and the stream to work on."""
    outputs = [name for name in named if name not in inputs]
    for output in outputs:
        for other in named:
            if other != output and named[output].overlaps(named[other]):
                raise InvalidInputError(f"{output} overlaps the memory of {other}; give it memory of its own")
    return list(named.values()), stream_of(stream, named)


def _require_chunks(array: GpuArray) -> None:
    if not array.shape[0]:
        raise InvalidInputError("an empty batch cannot be bound; expected at least one chunk")
