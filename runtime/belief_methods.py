"""What `ActionTokenizer` does with probabilities and logits of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from .backends.contract import Backend, BoundCall
from .bundle.arrays import AnyArray, Float32Array, Int32Array
from .bundle.models import ModelEntry
from .bundle.validation import is_gpu_array

if TYPE_CHECKING:
    from .backends.gpu.arrays import GpuResult
    from .backends.gpu.belief_arrays import GpuBeliefCalls
    from .beliefs import BeliefDecoder, Outputs
    from .bundle.beliefs import Belief, BeliefMode


class DecodesProbabilities(ABC):
    """Methods that decode probabilities and logits of tokens.

    p is float32: of per-step tokens [B, T, D, l, K], l a built prefix; of chunk tokens [B, l, V], any l from 1 to L, or
    the pair (classes [B, C], bits [B, n]), the escape class last, bits as many as l whole tokens have behind the class:
    the probability, or logit, that a bit is 1. Probabilities are at least 0 and sum to 1 within 1/256 (they are divided
    by their sum); logits are finite, or -inf for what is forbidden.

    mode: `expected` over all that p leaves open; `likeliest mode`, the likeliest class, or tokens of the fewest layers
    that decode, expected over the rest; `sample`. temperature: one number, or one for each layer [l], token [l], or
    class and bit [1 + n]; above 1 it makes probabilities more alike. docs/beliefs.md says when to use which.

    All raise InvalidInputError for anything else, UnbuiltPrefixError for an l that does not decode, and
    InvalidInputError for bundles and backends that decode no probabilities.
    """

    _model: ModelEntry
    _backend: Backend
    #: Made at the first use, because it needs a backend that decodes beliefs.
    _belief_decoder: BeliefDecoder | None = None
    _gpu_belief_calls: GpuBeliefCalls | None = None

    @abstractmethod
    def decode(self, tokens: Int32Array) -> Float32Array:
        """Tokens to actions."""

    @abstractmethod
    def _require_open(self) -> None:
        """Raises TokenizerError where the tokenizer was closed."""

    def _gpu_beliefs(self) -> GpuBeliefCalls:
        self._require_open()
        if self._gpu_belief_calls is None:
            # Here, because they need cuda-python.
            from .backends.gpu.belief_arrays import GpuBeliefCalls

            self._gpu_belief_calls = GpuBeliefCalls(self._model, self._backend)
        return self._gpu_belief_calls

    def _beliefs(self) -> BeliefDecoder:
        self._require_open()
        if self._belief_decoder is None:
            # Here, because few programs need it.
            from .beliefs import BeliefDecoder

            self._belief_decoder = BeliefDecoder(self._model, self._backend, self.decode)
        return self._belief_decoder

    def decode_probabilities(
        self,
        p: object,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        seed: int | None = None,
        stream: object = None,
    ) -> Belief[AnyArray] | Belief[GpuResult]:
        """actions and std float32 [B, T, A] in physical units, mode_probability float32 [B], and the mode int32. They
        are on the GPU where p is.

        seed: of samples; None for others each time. The same p and seed give the same sample.
        """
        if _are_on_gpu(p):
            return self._gpu_beliefs().decode(p, mode, temperature, stream, is_logits=False)
        return self._beliefs().decode(p, mode, temperature, seed, is_logits=False)

    def decode_logits(
        self,
        logits: object,
        *,
        mode: BeliefMode = "expected",
        temperature: object = 1.0,
        seed: int | None = None,
        stream: object = None,
    ) -> Belief[AnyArray] | Belief[GpuResult]:
        """`decode_probabilities` of the softmax of logits, and of the sigmoid of bits' logits."""
        if _are_on_gpu(logits):
            return self._gpu_beliefs().decode(logits, mode, temperature, stream, is_logits=True)
        return self._beliefs().decode(logits, mode, temperature, seed, is_logits=True)

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
        stream: object = None,
    ) -> None:
        """Like `decode_probabilities`, but for samples, into C-contiguous float32 [B, T, A], [B, T, A] and [B].

        mode_out: int32 [B], or [B, T, D, c] of per-step tokens. Any but the first may be None.
        """
        self._decode_into(p, (out, std_out, mode_probability_out, mode_out), mode, temperature, stream, is_logits=False)

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
        stream: object = None,
    ) -> None:
        """Like `decode_logits`, but for samples, into C-contiguous float32 [B, T, A], [B, T, A] and [B].

        mode_out: int32 [B], or [B, T, D, c] of per-step tokens. Any but the first may be None.
        """
        self._decode_into(
            logits, (out, std_out, mode_probability_out, mode_out), mode, temperature, stream, is_logits=True
        )

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
        self, given: object, outputs: Outputs, mode: BeliefMode, temperature: object, stream: object, *, is_logits: bool
    ) -> None:
        if _are_on_gpu(given):
            self._gpu_beliefs().decode_into(given, outputs, mode, temperature, stream, is_logits=is_logits)
        else:
            self._beliefs().decode_into(given, outputs, mode, temperature, is_logits=is_logits)


def _are_on_gpu(given: object) -> bool:
    return any(map(is_gpu_array, given)) if isinstance(given, tuple) else is_gpu_array(given)
