"""FAST (Pertsch et al. 2025, arXiv 2501.09747): discrete cosine transform of a chunk, rounding, byte-pair coding.

A chunk is normalised per dimension (1st and 99th percentile to -1 and 1, not clipped), transformed along time
(DCT-II, orthonormal), scaled and rounded, then written lowest frequency first with the dimensions interleaved, one
character per coefficient, and byte-pair coded by the `tokenizers` library.

Coefficients outside the range seen in training are clamped to it; the authors' code clamps below only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from rfsq.evidence.metrics import Array
from rfsq.evidence.results import SPILL
from rfsq.evidence.schemes import BinRange, Codec, action_range
from rfsq.rfsq_ref.data import FloatArray

#: The authors' size; a scale with more than half as many different coefficients gets the next power of two.
VOCABULARY = 1024
# Above all surrogates, and no character that any normalisation touches.
_FIRST_CHARACTER = 0x10000
#: A dimension whose range is over 32 times that of its percentiles is scaled by its range: its alphabet stays small.
_MOST_OUTLYING = 32.0
_MAX_TOKEN_LENGTH = 10_000
#: So much of a budget is near enough; how often a scale is tried for each, from the first; and bits a step for a scale
#: twice as fine.
_WASTE, _MOST_TRIALS, _FIRST_SCALE, _TYPICAL_SLOPE = 0.985, 8, 2.0, 5.0


@dataclass(frozen=True, eq=False)
class FastCodec(Codec):
    """FAST, fitted to training chunks.

    offset, units: float64 [A], normalised = (physical - offset) / units; least, most: coefficients seen.

    series: what one curve is drawn through; partial: decodes only the first `max_tokens` tokens of a chunk, taking all
    higher frequencies for 0.
    """

    name: str
    offset: Array
    units: Array
    scale: float
    least: int
    most: int
    tokenizer: Tokenizer
    family = "FAST"
    series: str = "FAST"
    partial: bool = False
    max_tokens: int | None = None

    def first_tokens(self, count: int) -> "FastCodec":
        """The same tokens, decoded from the first `count` of each chunk."""
        name = f"{self.name}, first {count} tokens"
        return replace(self, name=name, series="FAST, first tokens", partial=True, max_tokens=count)

    @property
    def vocabulary(self) -> int:
        size: int = self.tokenizer.get_vocab_size()
        return size

    def tokens(self, chunks: FloatArray) -> list[list[int]]:
        """Byte-pair tokens of chunks float32 [B, T, A], as many as each one takes."""
        found = _coefficients(chunks, self.offset, self.units, self.scale)
        texts = _texts(np.clip(found, self.least, self.most), self.least)
        return [encoding.ids[: self.max_tokens] for encoding in self.tokenizer.encode_batch(texts)]

    def decode(self, tokens: Sequence[Sequence[int]], length: int) -> FloatArray:
        """Tokens of B chunks of `length` steps to actions float32 [B, length, A]."""
        width = length * len(self.offset)
        coefficients = np.zeros((len(tokens), width))
        for row, ids in zip(coefficients, tokens, strict=True):
            text = "".join(self.tokenizer.id_to_token(token) or "" for token in ids)[:width]
            row[: len(text)] = [ord(character) - _FIRST_CHARACTER + self.least for character in text]
        by_frequency = coefficients.reshape(-1, length, len(self.offset)) / self.scale
        normalised: Array = idct(by_frequency, axis=1, norm="ortho")
        return (normalised * self.units + self.offset).astype(np.float32)

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        """See Codec; chunks of any length, best of the length that byte-pair coding was trained on."""
        return self.decode(self.tokens(chunks), chunks.shape[1])

    def bits_per_step(self, chunks: FloatArray) -> float:
        """All tokens of B chunks of T steps, times log2 of the vocabulary, over B * T steps.

        Every step of a chunk counts, filled-up ones too: over M real steps it is this times B * T / M.
        Tokens are as many as a chunk needs; where they end follows from what they say, so no end marker is counted.
        """
        count = float(np.mean([len(ids) for ids in self.tokens(chunks)]))
        steps: int = chunks.shape[1]
        return count * math.log2(self.vocabulary) / steps


def fit_fast(chunks: FloatArray, scale: float, vocabulary: int = VOCABULARY) -> FastCodec:
    """Fit to training chunks float32 [B, T, A]. scale: how finely coefficients are rounded, 10 in the paper."""
    offset, units = _normalisation(chunks.reshape(-1, chunks.shape[-1]))
    coefficients = _coefficients(chunks, offset, units, scale)
    least, most = int(coefficients.min()), int(coefficients.max())
    symbols = most - least + 1
    vocabulary = max(vocabulary, 1 << (2 * symbols - 1).bit_length())
    tokenizer = Tokenizer(BPE())
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(_FIRST_CHARACTER + symbol) for symbol in range(symbols)],
        max_token_length=_MAX_TOKEN_LENGTH,
    )
    tokenizer.train_from_iterator(_texts(coefficients, least), trainer, length=len(chunks))
    return FastCodec(f"FAST, scale {scale:g}", offset, units, scale, least, most, tokenizer)


def fast_codecs(
    chunks: FloatArray, judged: FloatArray, budgets: Sequence[float], vocabulary: int = VOCABULARY
) -> list[FastCodec]:
    """For each budget, in bits of a step, a scale with which tokens of the judged chunks take as many, or hardly less.

    How long tokens are is known only once they are made, so scales are tried. A budget that none is within is missing.
    """
    found, tried, scale = [], dict[float, float](), _FIRST_SCALE
    for budget in sorted(budgets):
        best: tuple[float, FastCodec] | None = None
        for _ in range(_MOST_TRIALS):
            codec = fit_fast(chunks, scale, vocabulary)
            bits = codec.bits_per_step(judged)
            tried[math.log2(scale)] = bits
            if bits <= SPILL * budget and (best is None or bits > best[0]):
                best = bits, codec
            if _WASTE * budget <= bits <= SPILL * budget:
                break
            scale = 2 ** _place_of(budget, tried)
        if best is not None:
            series = f"FAST, {chunks.shape[1]} steps, vocabulary {vocabulary}"
            found.append(replace(best[1], name=f"{series}, scale {best[1].scale:.3g}", series=series))
    return found


def _place_of(bits: float, tried: dict[float, float]) -> float:
    """The logarithm of the scale that lies between the trials next to so many bits, or beyond the nearest one."""
    below = [place for place, found in tried.items() if found <= bits]
    above = [place for place, found in tried.items() if found > bits]
    if not below or not above:
        nearest = max(below) if below else min(above)
        return nearest + (bits - tried[nearest]) / _TYPICAL_SLOPE
    low, high = max(below, key=tried.__getitem__), min(above, key=tried.__getitem__)
    return low + (high - low) * (bits - tried[low]) / (tried[high] - tried[low])


def _normalisation(steps: FloatArray) -> tuple[Array, Array]:
    low, high = action_range(steps, BinRange.QUANTILE)
    full_low, full_high = action_range(steps, BinRange.FULL)
    rarely_moves = full_high - full_low > _MOST_OUTLYING * (high - low)
    low, high = np.where(rarely_moves, full_low, low), np.where(rarely_moves, full_high, high)
    units = (high - low) / 2
    return (low + high) / 2, np.where(units > 0, units, 1.0)


def _coefficients(chunks: FloatArray, offset: Array, units: Array, scale: float) -> npt.NDArray[np.int64]:
    """[B, T, A] to rounded coefficients [B, T, A], frequencies instead of steps."""
    by_frequency: Array = dct((chunks.astype(np.float64) - offset) / units, axis=1, norm="ortho")
    return np.rint(by_frequency * scale).astype(np.int64)


def _texts(coefficients: npt.NDArray[np.int64], least: int) -> list[str]:
    """One character per coefficient; flattening [T, A] puts the lowest frequency of all dimensions first."""
    symbols = coefficients.reshape(len(coefficients), -1) - least + _FIRST_CHARACTER
    return ["".join(map(chr, row)) for row in symbols.tolist()]
