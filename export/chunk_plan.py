"""The arithmetic of chunk tokens as it is deployed: what the emitters of ONNX, C and CUDA write down.

Formulas: docs/chunk_tokens.md. Constants are folded in float64 and rounded to float32 once. The normaliser's offset is
taken off first and added last, as for per-step tokens (`plan.py` says why).

Encoding a chunk x = clip((action - offset) * inverse_units, -1, 1), for each class but escape:

    z = (x - mean) basis;  y = tanh(z * inverse_width);  digits = clip(floor((y + 1) 2^17), 0, 2^18 - 1)
    at each budget, n bits: cell = digits >> (18 - n);  level = (2 cell + 1) / 2^n - 1;  e = z - width[n] atanh(level)
    cost = sum over budgets of weight * (|e|^2 + what no latent holds)

The cheapest class that errs nowhere, at no budget, by more than `bounds` is sent: its number, then bit rank[j] of the
digits of latent order[j], the highest first. Where there is none, escape is sent.

Decoding: bit j doubles the cell of latent order[j] and adds itself; then x = mean + basis (width[n] atanh(level)),
clipped to [-1, 1]; action = x * units + offset.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkSizes
from rfsq.rfsq_ref.chunk_escape import escape_bound
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.runtime.bundle.arrays import Float32Array

#: A quarter of float32's range: an action less the offset is finite.
ACTION_LIMIT = 2.0**126


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Tables of the C - 1 classes but escape; N = T * A values, M latents.

    offset, units, inverse_units: float32 [A]; mean: float32 [C - 1, N]; basis: float32 [C - 1, N, M]; inverse_width:
    float32 [C - 1, M]; width: float32 [C - 1, M, MOST_BITS + 1], what atanh of a level of so many bits is multiplied
    by; order: int64 [C - 1, code_bits]; counts: int64 [budgets, C - 1, M], the bits of each latent at each budget;
    budget_bits: code bits there; bounds: by how much a value may err there; weights: float32 [budgets].
    """

    sizes: ChunkSizes
    offset: Float32Array
    units: Float32Array
    inverse_units: Float32Array
    mean: Float32Array
    basis: Float32Array
    inverse_width: Float32Array
    width: Float32Array
    order: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    budget_bits: tuple[int, ...]
    bounds: tuple[float, ...]
    weights: Float32Array

    @property
    def num_latents(self) -> int:
        """M."""
        return int(self.basis.shape[-1])


def plan_chunk_code(tokenizer: ChunkTokenizer) -> ChunkPlan:
    """tokenizer: in float64."""
    code = tokenizer.code

    def rounded(values: npt.NDArray[np.floating]) -> Float32Array:
        return np.asarray(values, np.float32)

    units, scale = tokenizer.units.numpy(), code.scale.numpy()
    return ChunkPlan(
        sizes=code.sizes,
        offset=rounded(tokenizer.offset.numpy()),
        units=rounded(units),
        inverse_units=rounded(1 / units),
        mean=rounded(code.mean.numpy()),
        basis=rounded(code.basis.numpy()),
        inverse_width=rounded(1 / (WIDTH * scale)),
        width=rounded(WIDTH * scale[..., None] * code.gain.numpy()),
        order=code.order.numpy(),
        counts=code.counts.numpy(),
        budget_bits=code.budget_bits,
        bounds=tuple(escape_bound(bits, code.sizes.num_values) for bits in code.budget_bits),
        weights=rounded(code.weights.numpy()),
    )
