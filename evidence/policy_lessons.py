"""What policies that are driven in the simulator learn from: each tokenizer's tokens of the recorded chunks, as a file.

So that training needs none of the tokenizers' packages, and driving is sure that it decodes what was learnt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfsq.calibration.chunk import ChunkFitConfig, fit_chunk_code
from rfsq.calibration.chunk_windows import windows
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.policies import NOTHING
from rfsq.evidence.policy_recordings import Recording
from rfsq.evidence.policy_tokens import BinTokens, PolicyTokens, chunk_tokens, fit_fast_tokens
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkSizes
from rfsq.runtime.bundle.paths import replacing

CHUNK_LENGTH = 8
#: One of so many episodes of each task has only scales and gains of chunk tokens fitted to it.
_HELD_OUT = 5
_BINS, _FAST_SCALE = 6, 20.0
#: Of the cuts of chunk tokens.
CHUNK_TOKENS = "chunk tokens, shared order, 4 bits"
#: Tokens of policies that do not say them one after the other: how many of those said so far they are shown.
AT_ONCE, IN_TWO_PASSES = "64 bins, at once", "chunk tokens, shared order, in two passes"
SHOWN: Mapping[str, int] = {AT_ONCE: 0, IN_TWO_PASSES: 1}
#: Windows are plenty, and so many say as much.
_CHUNK_FIT = ChunkFitConfig(most_windows=15_000, has_shared_order=True)


@dataclass(frozen=True, eq=False)
class Lessons:
    """Tokens int64 [n, L] by the tokenizer's name, of every chunk; vocabularies: of these."""

    tokens: Mapping[str, Tensor]
    vocabularies: Mapping[str, int]


def parts_of(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Recording]]:
    """Those that tokenizers are fitted to, and those that their scales are fitted to."""
    held_out = recordings[::_HELD_OUT]
    return [each for index, each in enumerate(recordings) if index % _HELD_OUT], list(held_out)


def meant(recordings: Sequence[Recording]) -> Tensor:
    """float64 [n, T, A]: all chunks that the expert meant."""
    found = windows([recording.intended for recording in recordings], CHUNK_LENGTH)
    return found.reshape(len(found), CHUNK_LENGTH, -1)


def fit_chunk_tokens(recordings: Sequence[Recording]) -> ChunkCheckpoint:
    """Chunk tokens of what the recorded experts meant: some minutes, and other bits with other threads, so that they
    are fitted once. Raises DataError."""
    fitted, held_out = ([each.intended for each in part] for part in parts_of(recordings))
    sizes = ChunkSizes(fitted[0].shape[1], CHUNK_LENGTH)
    return ChunkCheckpoint(sizes, fit_chunk_code(fitted, held_out, sizes, _CHUNK_FIT), None, {})


def fitted_tokens(recordings: Sequence[Recording], chunk: ChunkCheckpoint) -> list[PolicyTokens]:
    """The tokenizers that need no training, the others fitted to what the recorded experts meant."""
    fitted, _ = parts_of(recordings)
    chunks = meant(fitted)
    shape = (CHUNK_LENGTH, chunks.shape[2])
    bins = fit_bins(np.concatenate([each.intended for each in fitted]), BinRange.FULL, _BINS)
    code = ChunkCode(chunk.sizes, chunk.constants).double()
    cuts = {each.cut[0]: each for each in chunk_tokens(code, "shared order")}
    one_by_one = BinTokens(f"{1 << _BINS} bins", 1 << _BINS, bins, shape)
    return [
        one_by_one,
        fit_fast_tokens(chunks, _FAST_SCALE),
        cuts[4],
        replace(one_by_one, name=AT_ONCE),
        replace(cuts[chunk.sizes.class_bits], name=IN_TWO_PASSES),
    ]


def encoded(tokens: Sequence[PolicyTokens], recordings: Sequence[Recording]) -> Lessons:
    chunks = meant(recordings)
    return Lessons({each.name: each.encode(chunks) for each in tokens}, {each.name: each.vocabulary for each in tokens})


def save_lessons(path: Path, lessons: Lessons) -> None:
    """Whole or not at all; NOTHING is the largest number."""
    arrays = {name: found.numpy().astype(np.uint16) for name, found in lessons.tokens.items()}
    facts = np.array(json.dumps(dict(lessons.vocabularies)))
    with replacing(path, error=EvidenceError) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, vocabularies=facts, **arrays)  # type: ignore[arg-type]


def load_lessons(path: Path) -> Lessons:
    """What `save_lessons` wrote. Raises EvidenceError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            vocabularies = json.loads(str(arrays["vocabularies"]))
            return Lessons({name: _numbers(arrays[name]) for name in vocabularies}, vocabularies)
    except (OSError, ValueError, KeyError) as error:
        raise EvidenceError(f"{path} holds no tokens of recordings: {error}; encode them first") from error


def _numbers(found: np.ndarray) -> Tensor:
    tokens = torch.from_numpy(found.astype(np.int64))
    return torch.where(tokens == np.iinfo(np.uint16).max, NOTHING, tokens)
