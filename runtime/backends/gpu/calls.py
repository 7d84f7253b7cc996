"""The calls of an `ActionTokenizer` on arrays of the GPU: checked like numpy arrays, but for their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...bundle.errors import InvalidInputError
from ...bundle.manifest import ModelEntry
from ...bundle.validation import check_prefix, check_shape, check_whether_stats, is_gpu_array, kind_of, type_advice
from ..contract import BoundCall, MarksIllegalValues
from .arrays import GpuArray, GpuResult, GpuStream, gpu_array, stream_of

_DType = np.dtype[Any]
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
_OUTPUTS = {"out", "stats_out"}
#: The arrays in the engine's order, and the stream to work on.
_Call = tuple[list[GpuArray], GpuStream]


@runtime_checkable
class TakesGpuArrays(MarksIllegalValues, Protocol):
    """What a backend on the GPU has beside the contract of all backends; arrays in the order of its graphs."""

    def encode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def decode_on_gpu(self, arrays: Sequence[GpuArray], stream: GpuStream) -> None: ...

    def bind_encode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...

    def bind_decode(self, arrays: Sequence[GpuArray], stream: GpuStream) -> BoundCall: ...


class GpuCalls:
    """Encodes and decodes where the arrays lie, on the caller's stream."""

    def __init__(self, model: ModelEntry, backend: TakesGpuArrays) -> None:
        self._model, self._backend = model, backend

    def encode(self, actions: object, stream: object) -> tuple[GpuResult, ...]:
        """actions float32 [B, T, A] -> tokens int32 [B, T, D, L] and, in `dynamic` bundles, stats [B, T, L, 2]."""
        source = self._actions(actions)
        own, batch = stream_of(stream, {"actions": source}), source.shape[0]
        tokens = GpuResult(self._model.tokens_shape(batch), _INT32, own)
        stats = GpuResult(self._model.stats_shape(batch), _FLOAT32, own) if self._model.has_stats else None
        self.encode_into(source, tokens, stats, own)
        return (tokens,) if stats is None else (tokens, stats)

    def encode_into(self, actions: object, out: object, stats_out: object | None, stream: object) -> None:
        """Into arrays of the GPU."""
        arrays, handle = self._encoding(actions, out, stats_out, stream)
        if arrays[0].shape[0]:
            self._backend.encode_on_gpu(arrays, handle)

    def bind_encode(self, actions: object, out: object, stats_out: object | None, stream: object) -> BoundCall:
        """`encode_into`, captured."""
        return self._backend.bind_encode(*_bindable(self._encoding(actions, out, stats_out, stream)))

    def decode(self, tokens: object, stats: object | None, stream: object) -> GpuResult:
        """tokens int32 [B, T, D, l] -> actions float32 [B, T, A]."""
        source = self._tokens(tokens)
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
        return self._backend.bind_decode(*_bindable(self._decoding(tokens, out, stats, stream)))

    def _encoding(self, actions: object, out: object, stats_out: object | None, stream: object) -> _Call:
        source = self._actions(actions)
        batch = source.shape[0]
        named = {"actions": source}
        named["out"] = _output("out", out, self._backend.token_types, self._model.tokens_shape(batch))
        if self._model.has_stats:
            shape = self._model.stats_shape(batch)
            if stats_out is None:
                raise InvalidInputError(
                    "stats_out is missing: the engine of a `dynamic` bundle always gives statistics; pass a float32 "
                    f"array {list(shape)} on the GPU for them"
                )
            named["stats_out"] = _output("stats_out", stats_out, (_FLOAT32,), shape)
        return _checked(named, stream)

    def _decoding(self, tokens: object, out: object, stats: object | None, stream: object) -> _Call:
        source = self._tokens(tokens)
        batch, layers = source.shape[0], source.shape[3]
        named = {"tokens": source}
        check_whether_stats(stats, self._model)
        if stats is not None:
            named["stats"] = _input("stats", stats, (_FLOAT32,))
            shape = self._model.stats_shape(batch, layers)
            if named["stats"].shape != shape:
                raise InvalidInputError(f"stats has shape {list(named['stats'].shape)}; expected {list(shape)}")
        named["out"] = _output("out", out, (_FLOAT32,), self._model.actions_shape(batch))
        return _checked(named, stream)

    def _actions(self, value: object) -> GpuArray:
        array = _input("actions", value, (_FLOAT32,))
        check_shape("actions", array.shape, "B, T, A", (self._model.chunk_length, self._model.action_dim))
        return array

    def _tokens(self, value: object) -> GpuArray:
        array = _input("tokens", value, self._backend.token_types)
        check_shape("tokens", array.shape, "B, T, D, l", (self._model.chunk_length, self._model.latent_dim))
        check_prefix(array.shape, self._model)
        return array


def _read(name: str, value: object) -> GpuArray:
    if isinstance(value, GpuArray):
        return value
    if not is_gpu_array(value):
        raise InvalidInputError(
            f"{name} is a {kind_of(value)} that does not lie on the GPU, beside arrays that do; pass all of them from "
            "the GPU, or all of them as numpy.ndarray"
        )
    return gpu_array(name, value)


def _input(name: str, value: object, accepted: Sequence[_DType]) -> GpuArray:
    """accepted: its types, the one to advise first."""
    array = _read(name, value)
    if array.dtype not in accepted:
        wanted = accepted[0]
        advice = type_advice(array.dtype, wanted, f".to(torch.{wanted}) or .astype(cupy.{wanted})")
        raise InvalidInputError(
            f"{name} have type {array.dtype}; expected {wanted}: nothing is converted on the GPU unasked, {advice}"
        )
    return array


def _output(name: str, value: object, accepted: Sequence[_DType], shape: tuple[int, ...]) -> GpuArray:
    """accepted: its types, the one to advise first."""
    array = _read(name, value)
    if array.dtype not in accepted or array.shape != shape:
        expected = array.dtype if array.dtype in accepted else accepted[0]
        raise InvalidInputError(
            f"{name} is {array.dtype}{list(array.shape)}; expected {expected}{list(shape)} to write the results into"
        )
    if not array.is_writable:
        raise InvalidInputError(f"{name} is read-only; expected an array that results can be written into")
    return array


def _checked(named: dict[str, GpuArray], stream: object) -> _Call:
    """named: in the engine's order."""
    for output in (name for name in named if name in _OUTPUTS):
        for other in named:
            if other != output and named[output].overlaps(named[other]):
                raise InvalidInputError(f"{output} overlaps the memory of {other}; give it memory of its own")
    return list(named.values()), stream_of(stream, named)


def _bindable(call: _Call) -> _Call:
    if not call[0][0].shape[0]:
        raise InvalidInputError("an empty batch cannot be bound; expected at least one chunk")
    return call
