"""`ActionTokenizer`: continuous actions to tokens and back, on the robot."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, overload

import numpy as np

from .backends.contract import MOST_CHUNKS, Backend, BoundCall, GpuArrayLike
from .backends.registry import GPU_BACKENDS, select_backend
from .belief_methods import BELIEF_STATE, DecodesProbabilities
from .bundle.arrays import Codes, Float32Array, Int32Array
from .bundle.errors import CannotCopyError, IllegalValueError, InvalidInputError, TokenizerError
from .bundle.fidelity import Grade
from .bundle.folder import open_bundle
from .bundle.manifest import GOLDEN_NAME, Manifest
from .bundle.models import ModelEntry
from .bundle.validation import CheckedPair, InputValidator, is_gpu_array

if TYPE_CHECKING:
    from .backends.gpu.arrays import GpuCalls, GpuResult
    from .bundle.golden import Golden

_LOG = logging.getLogger(__name__)


class ActionTokenizer(DecodesProbabilities):
    """A bundle, opened and verified. B is any batch size, 0 included; T, A, D, L and K are the model's. Per-step
    tokens are int32 [B, T, D, L], chunk tokens int32 [B, L]: so wherever [B, T, D, L] stands below.

    Actions are in physical units. Every method may be called from any thread. Wrong input raises InvalidInputError
    before anything is computed or written; a library that fails while it runs raises InferenceError.

    With a backend on the GPU, arrays of the GPU (torch, CuPy, JAX: `__cuda_array_interface__` or DLPack) are taken too
    and used where they lie, in the order of a stream: `stream`, a cudaStream_t or a stream of torch, CuPy or
    cuda.core; else the one that the arrays name; else CUDA's default stream. Such calls return before the work is
    done. Their shapes and types are checked as everywhere, but the host does not read their values: a token that is no
    level makes all actions of its step NaN, an action that is not finite makes all tokens of its step -1.

    A copy, pickled or not, opens the bundle again: by the same absolute path, on the same backend, and only where it
    has the same fingerprint. It raises what `load` raises. Each copy is closed for itself.
    """

    def __init__(self, manifest: Manifest, backend: Backend, golden: Golden | None = None) -> None:
        self._manifest, self._model = manifest, manifest.model
        #: The golden vectors that the backend was tested with; None without a test.
        self.golden = golden
        self._backend = backend
        self._validator = InputValidator(manifest.model)
        self._unchecked_chunks = backend.checked_steps // manifest.model.chunk_length
        #: Arrays of `encode_into` and `decode_into` that came twice in a row: only their values are looked at again.
        self._encoded = self._decoded = CheckedPair(np.empty(0), np.empty(0))
        self._last_encoded = self._last_decoded = (0, 0)
        self._gpu_calls: GpuCalls | None = None
        self._is_closed = False
        #: What `load` is called with to open the same again, by an absolute path.
        self._origin: dict[str, Any] | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        expect_fingerprint: str | None = None,
        verify: bool = True,
    ) -> Self:
        """Open the bundle at `path`: every file is hashed, then the golden vectors are replayed on the backend.

        backend: a name, or `auto` for the best one that works here. expect_fingerprint: of the tokenizer that the
        policy was trained with, in full or its first digits (8 at least); what to do with another, the error says.
        verify: whether to replay the golden vectors, those of beliefs before the first is decoded; hashes are always
        checked. A bundle whose build found its tokens worthless is loaded with a warning in the log.

        Raises BundleError for a bundle that is missing, incomplete or altered, FingerprintError for another tokenizer,
        BackendUnavailableError where no backend can be used, SelfTestError where its answers are wrong, and
        InvalidInputError where expect_fingerprint is no text or too short, `path` no path, or `backend` no text.
        """
        if not isinstance(backend, str):
            raise InvalidInputError(f"backend is {backend!r:.60}; expected a name such as 'auto' or 'onnxruntime'")
        bundle = open_bundle(path)
        if expect_fingerprint is not None:
            # Here, as below, so that a load without it does not import it.
            from .bundle.compatibility import check_fingerprint

            check_fingerprint(bundle.manifest.fingerprint, expect_fingerprint)
        golden = None
        if verify:
            from .bundle.golden import read_golden

            golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
        tokenizer = cls(bundle.manifest, select_backend(backend, bundle, golden), golden)
        quality = bundle.manifest.quality
        if quality is not None and quality.fidelity.grade is Grade.WORTHLESS:
            found = quality.fidelity.warning_in(bundle.manifest.model.mode).removeprefix("WARNING: ")
            _LOG.warning(
                "%s, judged by the build on %s of %s: %s", bundle.folder, quality.judged_on, quality.source, found
            )
        tokenizer._origin = {
            "path": bundle.folder.absolute(),
            "backend": tokenizer.backend.name,
            "expect_fingerprint": tokenizer.fingerprint,
            "verify": verify,
        }
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """How to open the bundle again, and what a subclass has added. Raises CannotCopyError."""
        if self._is_closed:
            raise CannotCopyError("this tokenizer was closed, and cannot be copied or pickled: load the bundle again")
        if self._origin is None:
            raise CannotCopyError(
                "this tokenizer was made around a backend, and cannot be copied or pickled: there is no bundle to open "
                "again; expected one that ActionTokenizer.load has opened"
            )
        return {name: value for name, value in vars(self).items() if name not in _OPENED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        origin: dict[str, Any] = state["_origin"]
        try:
            opened = ActionTokenizer.load(**origin)
        except TokenizerError as error:
            raise type(error)(
                f"a copied or pickled tokenizer opens its bundle again, {origin['path']} with the fingerprint "
                f"{origin['expect_fingerprint']} on {origin['backend']!r}, and it cannot be opened here: {error}"
            ) from error
        vars(self).update(vars(opened) | state)

    @property
    def fingerprint(self) -> str:
        """Identity of grid, constants, weights and normaliser: the same fingerprint, the same meaning of tokens."""
        return self._manifest.fingerprint

    @property
    def folder(self) -> Path | None:
        """Where the bundle was loaded from, absolute; None for a tokenizer that was made around a backend."""
        return None if self._origin is None else self._origin["path"]

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._manifest

    @property
    def model(self) -> ModelEntry:
        """Sizes, mode, prefixes and units."""
        return self._manifest.model

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The numbers l of layers, of chunk tokens 1 ... L, that can be decoded, ascending; the last is L."""
        return self._model.prefixes

    @property
    def backend(self) -> Backend:
        """What runs the graphs; its `description` names library, version and device."""
        return self._backend

    @overload
    def encode(self, actions: Float32Array) -> Int32Array: ...

    @overload
    def encode(self, actions: GpuArrayLike, *, stream: object = None) -> GpuResult: ...

    def encode(self, actions: object, *, stream: object = None) -> Int32Array | GpuResult:
        """actions float32 [B, T, A] -> tokens int32, per-step ones [B, T, D, L] or chunk tokens [B, L].

        They are on the GPU where the actions are.
        """
        if is_gpu_array(actions):
            return self._on_gpu().encode(actions, stream)[0]
        valid = self._validator.actions(actions, unchecked=self._unchecked_chunks)
        tokens = np.empty(self._model.tokens_shape(len(valid)), np.int32)
        self._encode(valid, tokens, None)
        return tokens

    @overload
    def encode_with_stats(self, actions: Float32Array) -> tuple[Int32Array, Float32Array]: ...

    @overload
    def encode_with_stats(self, actions: GpuArrayLike, *, stream: object = None) -> tuple[GpuResult, GpuResult]: ...

    def encode_with_stats(
        self, actions: object, *, stream: object = None
    ) -> tuple[Int32Array, Float32Array] | tuple[GpuResult, GpuResult]:
        """For `dynamic` bundles: tokens int32 [B, T, D, L] and stats float32 [B, T, L, 2], which decoding needs.

        stats hold mean and sigma of every step and layer, in latent units. Raises InvalidInputError for other bundles.
        """
        self._require_stats()
        if is_gpu_array(actions):
            gpu_tokens, gpu_stats = self._on_gpu().encode(actions, stream)
            return gpu_tokens, gpu_stats
        valid = self._validator.actions(actions, unchecked=self._unchecked_chunks)
        tokens = np.empty(self._model.tokens_shape(len(valid)), np.int32)
        stats = np.empty(self._model.stats_shape(len(valid)), np.float32)
        self._encode(valid, tokens, stats)
        return tokens, stats

    def encode_into(
        self, actions: object, out: object, stats_out: object | None = None, *, stream: object = None
    ) -> None:
        """Like `encode`, into C-contiguous int32 [B, T, D, L] and, for `dynamic` bundles, float32 [B, T, L, 2].

        Allocates no array after the first call with a batch size where actions are C-contiguous float32.
        """
        if stats_out is None and self._encoded.is_of(actions, out):
            # Their forms were checked a call ago.
            self._encode(actions, out, None)  # type: ignore[arg-type]  # they are the arrays that it knows
            return
        if stats_out is not None:
            self._require_stats()
        if is_gpu_array(actions):
            self._on_gpu().encode_into(actions, out, stats_out, stream)
            return
        valid = self._validator.actions(actions, unchecked=self._unchecked_chunks)
        # As it was given: a copy that validation made shares no memory with anything.
        source = cast(Float32Array, actions)
        tokens = self._validator.output("out", out, np.int32, self._model.tokens_shape(len(valid)), source)
        stats = None
        if stats_out is not None:
            shape = self._model.stats_shape(len(valid))
            stats = self._validator.output("stats_out", stats_out, np.float32, shape, source, tokens)
        self._encode(valid, tokens, stats)
        pair = (id(actions), id(out))
        if pair == self._last_encoded and valid is actions and stats is None and len(valid) <= self._unchecked_chunks:
            self._encoded = CheckedPair(valid, tokens)
        self._last_encoded = pair

    def bind_encode(
        self, actions: object, out: object, stats_out: object | None = None, *, stream: object = None
    ) -> BoundCall:
        """`encode_into` on these arrays of the GPU, captured as a graph: what it returns is called as often as wanted.

        Runs once, and waits for the stream to do so.
        """
        if stats_out is not None:
            self._require_stats()
        return self._on_gpu().bind_encode(actions, out, stats_out, stream)

    @overload
    def decode(self, tokens: Int32Array, stats: Float32Array | None = None) -> Float32Array: ...

    @overload
    def decode(self, tokens: GpuArrayLike, stats: object | None = None, *, stream: object = None) -> GpuResult: ...

    def decode(self, tokens: object, stats: object | None = None, *, stream: object = None) -> Float32Array | GpuResult:
        """Per-step tokens int32 (int64, uint8) [B, T, D, l], l a built prefix, or the first l chunk tokens int32
        (int64, uint16) [B, l], any l from 1 to L -> actions float32 [B, T, A].

        stats: float32 [B, T, l, 2], needed by `dynamic` bundles and refused by all others. Raises UnbuiltPrefixError
        for an l that was not built.
        """
        if is_gpu_array(tokens):
            return self._on_gpu().decode(tokens, stats, stream)
        valid = self._validator.tokens(tokens, unchecked=self._unchecked_chunks)
        valid_stats = self._validator.stats(stats, valid)
        actions = np.empty(self._model.actions_shape(len(valid)), np.float32)
        self._decode(valid, valid_stats, actions)
        return actions

    def decode_into(self, tokens: object, out: object, stats: object | None = None, *, stream: object = None) -> None:
        """Like `decode`, into C-contiguous float32 [B, T, A].

        Allocates no array after the first call with a batch size where tokens are C-contiguous int32.
        """
        if stats is None and self._decoded.is_of(tokens, out):
            # Their forms were checked a call ago.
            self._decode(tokens, None, out)  # type: ignore[arg-type]  # they are the arrays that it knows
            return
        if is_gpu_array(tokens):
            self._on_gpu().decode_into(tokens, out, stats, stream)
            return
        valid = self._validator.tokens(tokens, unchecked=self._unchecked_chunks)
        valid_stats = self._validator.stats(stats, valid)
        # The arrays as they were given: a copy that validation made shares no memory with anything.
        inputs = cast("tuple[Int32Array, ...]", (tokens,) if stats is None else (tokens, stats))
        actions = self._validator.output("out", out, np.float32, self._model.actions_shape(len(valid)), *inputs)
        self._decode(valid, valid_stats, actions)
        pair = (id(tokens), id(out))
        if pair == self._last_decoded and valid is tokens and stats is None and len(valid) <= self._unchecked_chunks:
            self._decoded = CheckedPair(valid, actions)
        self._last_decoded = pair

    def bind_decode(
        self, tokens: object, out: object, stats: object | None = None, *, stream: object = None
    ) -> BoundCall:
        """`decode_into` on these arrays of the GPU, captured as a graph: what it returns is called as often as wanted.

        Runs once, and waits for the stream to do so.
        """
        return self._on_gpu().bind_decode(tokens, out, stats, stream)

    def warmup(self, batch: int = 1, *, beliefs: bool = False) -> None:
        """Run encoder and every decoder once, so that the first real call with this B is as fast as the others.

        beliefs: those of beliefs, too, after the golden ones were replayed, after a refusal once more; raises what
        decoding them raises. Raises InvalidInputError for what is no number of chunks, or of more than memory holds.
        """
        if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or not 1 <= batch <= MOST_CHUNKS:
            raise InvalidInputError(f"batch is {batch!r:.60}; expected an int from 1 to {MOST_CHUNKS}")
        try:
            actions = np.zeros(self._model.actions_shape(batch), np.float32)
            tokens = np.empty(self._model.tokens_shape(batch), np.int32)
            stats = np.empty(self._model.stats_shape(batch), np.float32) if self._model.has_stats else None
        except (MemoryError, ValueError) as error:
            # ValueError: more bytes than numpy can count.
            raise InvalidInputError(f"batch is {batch}, more chunks than memory holds here: {error}") from error
        self.encode_into(actions, tokens, stats)
        for prefix in self.prefixes:
            part = Codes(tokens, stats).prefix(prefix)
            self.decode_into(part.tokens, actions, part.stats)
        if beliefs:
            self._warm_beliefs(batch)

    def close(self) -> None:
        """Free the backend; the tokenizer cannot be used afterwards. Closing twice is harmless."""
        if not self._is_closed:
            self._is_closed = True
            self._backend.close()

    def __repr__(self) -> str:
        model = self.model
        folder = "no bundle" if self.folder is None else repr(str(self.folder))
        return (
            f"{type(self).__name__}({folder}, {model.mode}, fingerprint {self.fingerprint[:16]}, "
            f"{model.sizes_text}, decodes {model.prefixes_text}, backend {self._backend.name}"
            f"{', closed' if self._is_closed else ''})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _on_gpu(self) -> GpuCalls:
        self._require_open()
        if self._gpu_calls is None:
            if self._backend.name not in GPU_BACKENDS:
                raise InvalidInputError(
                    f"the arrays lie on the GPU, and the backend {self._backend.name!r} takes numpy arrays alone; load "
                    f"the bundle with one of {', '.join(GPU_BACKENDS)}, or pass numpy arrays"
                )
            # Here, because they need cuda-python.
            from .backends.gpu.arrays import GpuCalls, TakesGpuArrays

            self._gpu_calls = GpuCalls(self.model, cast(TakesGpuArrays, self._backend))
        return self._gpu_calls

    def _encode(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        self._require_open()
        if not actions.shape[0]:
            return
        try:
            self._backend.encode_into(actions, tokens, stats)
        except IllegalValueError:
            # Raises an error that names the value and its place.
            self._validator.actions(actions)
            raise

    def _decode(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        self._require_open()
        if not tokens.shape[0]:
            return
        try:
            self._backend.decode_into(tokens, stats, actions)
        except IllegalValueError:
            # Raises an error that names the value and its place.
            self._validator.tokens(tokens)
            raise

    def _require_open(self) -> None:
        if self._is_closed:
            raise TokenizerError("this tokenizer was closed; load the bundle again")

    def _require_stats(self) -> None:
        if not self.model.has_stats:
            raise InvalidInputError(
                f"a {self.model.mode!r} bundle has no stats: its tokens decode on their own; use encode and decode"
            )


def codes_of(tokenizer: ActionTokenizer, actions: Float32Array) -> Codes:
    """Tokens of actions [B, T, A], and their stats where this bundle has any: what decoding needs."""
    if tokenizer.model.has_stats:
        return Codes(*tokenizer.encode_with_stats(actions))
    return Codes(tokenizer.encode(actions), None)


#: What `load` makes anew; all else that an instance has is of a subclass, and goes with its copies.
_OPENED = frozenset(
    {
        *("_manifest", "_model", "golden", "_backend", "_validator", "_unchecked_chunks"),
        *("_encoded", "_decoded", "_last_encoded", "_last_decoded", "_gpu_calls", "_is_closed", *BELIEF_STATE),
    }
)
