"""What `ActionTokenizer` does with probabilities and logits of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, overload

from .backends.contract import Backend, BoundCall, GpuArrayLike
from .bundle.arrays import AnyArray, Float32Array
from .bundle.errors import InvalidInputError, SelfTestError
from .bundle.models import ModelEntry
from .bundle.validation import is_gpu_array

if TYPE_CHECKING:
    from .backends.gpu.arrays import GpuResult
    from .backends.gpu.belief_arrays import GpuBeliefCalls
    from .beliefs import BeliefDecoder, Outputs
    from .bundle.belief_settings import BeliefSettings
    from .bundle.beliefs import Belief, BeliefMode
    from .bundle.golden import Golden

#: What a tokenizer has of beliefs, made anew where its bundle is opened again.
BELIEF_STATE = ("_belief_decoder", "_belief_failure", "_gpu_belief_calls")


class DecodesProbabilities(ABC):
    """Methods that decode probabilities and logits of tokens.

    p is float32: of per-step tokens [B, T, D, l, K], l a built prefix; of chunk tokens [B, l, V], any l from 1 to L, or
    the pair (classes [B, C], bits [B, n]), the escape class last, bits as many as l whole tokens have behind the class:
    the probability, or logit, that a bit is 1. Probabilities are at least 0 and sum to 1 within 1/256 (they are divided
    by their sum); logits are finite, or -inf for what is forbidden.

    mode: `expected` over all that p leaves open; `likeliest mode`, the likeliest class, or tokens of the fewest layers
    that decode, expected over the rest; `sample`. temperature: one number, or one for each layer [l], token [l], or
    class and bit [1 + n]; above 1 it makes probabilities more alike. settings: temperatures, and scales that make `std`
    honest, as they were fitted to this policy. docs/beliefs.md says when to use which.

    All raise InvalidInputError for anything else, UnbuiltPrefixError for an l that does not decode, FingerprintError
    for settings of another tokenizer, and InvalidInputError for bundles and backends that decode no probabilities.
    All raise SelfTestError, too: the first call, or `warmup` with `beliefs`, replays the golden beliefs, and none
    is answered by a backend that does not give the reference's answers.
    """

    golden: Golden | None
    _model: ModelEntry
    _backend: Backend
    #: Made at the first use, because it needs a backend that decodes beliefs; and why there is none.
    _belief_decoder: BeliefDecoder | None = None
    _belief_failure: str = ""
    _gpu_belief_calls: GpuBeliefCalls | None = None

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """Where the bundle was loaded from."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of what the tokens mean."""

    @abstractmethod
    def _require_open(self) -> None:
        """Raises TokenizerError where the tokenizer was closed."""

    def _beliefs(self) -> BeliefDecoder:
        self._require_open()
        if self._belief_decoder is None:
            # Threads that come at once replay twice, and neither answers before.
            self._belief_decoder = self._replayed_beliefs()
        return self._belief_decoder

    def _replayed_beliefs(self) -> BeliefDecoder:
        if self._belief_failure:
            raise SelfTestError(self._belief_failure)
        # Here, because few programs need them.
        from .backends.replay import replay_beliefs
        from .beliefs import BeliefDecoder

        decoder = BeliefDecoder(self._model, self.fingerprint, self._backend)
        if self.golden is not None:
            try:
                replay_beliefs(self.golden, self._model, self._backend).require(self._backend, self.folder)
            except SelfTestError as error:
                self._belief_failure = str(error)
                raise
        return decoder

    def _warm_beliefs(self, batch: int) -> None:
        # What failed may have been a signal's handler, or a GPU that another program had filled.
        self._belief_failure = ""
        self._beliefs().warmup(batch)

    def _gpu_beliefs(self, settings: object = None) -> GpuBeliefCalls:
        if settings is not None:
            raise InvalidInputError(
                "settings were given, and the arrays lie on the GPU; expected numpy arrays, whose std they scale: pass "
                "temperature=settings.temperature, and multiply std by settings.std_scale of the mode"
            )
        if self._gpu_belief_calls is None:
            # Here, because they need cuda-python.
            from .backends.gpu.belief_arrays import GpuBeliefCalls

            self._gpu_belief_calls = GpuBeliefCalls(self._model, self._backend)
        # Replayed, whoever comes first.
        self._beliefs()
        return self._gpu_belief_calls

    @overload
    def decode_probabilities(
        self,
        p: Float32Array | tuple[Float32Array, Float32Array],
        *,
        mode: BeliefMode = ...,
        temperature: object = ...,
        settings: BeliefSettings | None = ...,
        seed: int | None = ...,
    ) -> Belief[AnyArray]: ...

    @overload
    def decode_probabilities(
        self,
        p: GpuArrayLike | tuple[GpuArrayLike, GpuArrayLike],
        *,
        mode: BeliefMode = ...,
        temperature: object = ...,
        stream: object = ...,
    ) -> Belief[GpuResult]: ...

    def decode_probabilities(  # noqa: PLR0913  # what is given, and how
        self,
        p: object,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        settings: BeliefSettings | None = None,
        seed: int | None = None,
        stream: object = None,
    ) -> Belief[AnyArray] | Belief[GpuResult]:
        """actions and std float32 [B, T, A] in physical units, mode_probability float32 [B], and the mode int32. They
        are on the GPU where p is.

        seed: of samples; None for others each time. The same p and seed give the same sample.
        """
        if _are_on_gpu(p):
            return self._gpu_beliefs(settings).decode(p, mode, temperature, stream, is_logits=False)
        return self._beliefs().decode(p, mode, temperature, settings, seed, is_logits=False)

    @overload
    def decode_logits(
        self,
        logits: Float32Array | tuple[Float32Array, Float32Array],
        *,
        mode: BeliefMode = ...,
        temperature: object = ...,
        settings: BeliefSettings | None = ...,
        seed: int | None = ...,
    ) -> Belief[AnyArray]: ...

    @overload
    def decode_logits(
        self,
        logits: GpuArrayLike | tuple[GpuArrayLike, GpuArrayLike],
        *,
        mode: BeliefMode = ...,
        temperature: object = ...,
        stream: object = ...,
    ) -> Belief[GpuResult]: ...

    def decode_logits(  # noqa: PLR0913  # as above
        self,
        logits: object,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        settings: BeliefSettings | None = None,
        seed: int | None = None,
        stream: object = None,
    ) -> Belief[AnyArray] | Belief[GpuResult]:
        """`decode_probabilities` of the softmax of logits, and of the sigmoid of bits' logits."""
        if _are_on_gpu(logits):
            return self._gpu_beliefs(settings).decode(logits, mode, temperature, stream, is_logits=True)
        return self._beliefs().decode(logits, mode, temperature, settings, seed, is_logits=True)

    # What is given, four arrays to write into, and how.
    def decode_probabilities_into(  # noqa: PLR0913
        self,
        p: object,
        out: object,
        std_out: object | None = None,
        mode_probability_out: object | None = None,
        mode_out: object | None = None,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        settings: BeliefSettings | None = None,
        stream: object = None,
    ) -> None:
        """Like `decode_probabilities`, but for samples, into C-contiguous float32 [B, T, A], [B, T, A] and [B].

        mode_out: int32 [B], or [B, T, D, c] of per-step tokens. Any but the first may be None.
        """
        outputs = out, std_out, mode_probability_out, mode_out
        self._decode_into(p, outputs, mode, temperature, settings, stream, is_logits=False)

    def decode_logits_into(  # noqa: PLR0913  # as above
        self,
        logits: object,
        out: object,
        std_out: object | None = None,
        mode_probability_out: object | None = None,
        mode_out: object | None = None,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        settings: BeliefSettings | None = None,
        stream: object = None,
    ) -> None:
        """Like `decode_logits`, but for samples, into C-contiguous float32 [B, T, A], [B, T, A] and [B].

        mode_out: int32 [B], or [B, T, D, c] of per-step tokens. Any but the first may be None.
        """
        outputs = out, std_out, mode_probability_out, mode_out
        self._decode_into(logits, outputs, mode, temperature, settings, stream, is_logits=True)

    def bind_decode_probabilities(  # noqa: PLR0913  # as above
        self,
        p: object,
        out: object,
        std_out: object | None = None,
        mode_probability_out: object | None = None,
        mode_out: object | None = None,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        stream: object = None,
    ) -> BoundCall:
        """`decode_probabilities_into` on these arrays of the GPU, captured as a graph: what it returns is called as
        often as wanted.

        Runs once, and waits for the stream to do so.
        """
        outputs = out, std_out, mode_probability_out, mode_out
        return self._gpu_beliefs().bind(p, outputs, mode, temperature, stream, is_logits=False)

    def bind_decode_logits(  # noqa: PLR0913  # as above
        self,
        logits: object,
        out: object,
        std_out: object | None = None,
        mode_probability_out: object | None = None,
        mode_out: object | None = None,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        stream: object = None,
    ) -> BoundCall:
        """`decode_logits_into`, captured, as `bind_decode_probabilities` is."""
        outputs = out, std_out, mode_probability_out, mode_out
        return self._gpu_beliefs().bind(logits, outputs, mode, temperature, stream, is_logits=True)

    def _decode_into(  # noqa: PLR0913  # as above
        self,
        given: object,
        outputs: Outputs,
        mode: BeliefMode,
        temperature: object,
        settings: BeliefSettings | None,
        stream: object,
        *,
        is_logits: bool,
    ) -> None:
        if _are_on_gpu(given):
            calls = self._gpu_beliefs(settings)
            calls.decode_into(given, outputs, mode, temperature, stream, is_logits=is_logits)
        else:
            self._beliefs().decode_into(given, outputs, mode, temperature, settings, is_logits=is_logits)


def _are_on_gpu(given: object) -> bool:
    return any(map(is_gpu_array, given)) if isinstance(given, tuple) else is_gpu_array(given)
