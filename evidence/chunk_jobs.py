"""What one job measures of codecs of chunks at the budgets: chunk tokens of one seed, or peers that are fitted here."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from rfsq.calibration.chunk_normaliser import chunk_normaliser
from rfsq.calibration.settings import ChunkNormaliser
from rfsq.evidence.beast import beast_codecs
from rfsq.evidence.chunk_codec import chunk_codecs, fit_chunk_model, sizes_for
from rfsq.evidence.fast import VOCABULARY, fast_codecs
from rfsq.evidence.findings import best_within
from rfsq.evidence.judging import Parts, TokenCodec, Trial, all_chunks, judge_codec, whole_chunks, wrong_token_errors
from rfsq.evidence.peers import BIN_BITS, training_chunks
from rfsq.evidence.results import CodecReport, Spread
from rfsq.evidence.schemes import BinRange, Codec, fit_bins


@dataclass(frozen=True)
class Judged:
    """reports: of each codec; wrong_tokens: by the codec's name, see `wrong_token_errors`."""

    reports: tuple[CodecReport, ...]
    wrong_tokens: dict[str, tuple[Spread, ...]] = field(default_factory=dict)


def wrong_tokens_of(codec: TokenCodec, trial: Trial, parts: Parts, length: int) -> tuple[Spread, ...]:
    """Of the judged chunks, by place."""
    found = wrong_token_errors(codec, all_chunks(parts.judged, length), trial.units)
    return tuple(Spread.of([error]) for error in found)


def chunk_job(trial: Trial, length: int, seed: int, left_out: str = "") -> Judged:
    """Chunk tokens of one seed, as a build fits them: to training episodes, scales to calibration episodes too."""
    parts = trial.parts(left_out)
    normaliser, _ = chunk_normaliser(trial.dataset, ChunkNormaliser.AUTO)
    sizes = sizes_for(trial.budgets[-1], trial.dataset.action_dim, length)
    codecs = chunk_codecs(fit_chunk_model(parts.train, parts.calibration, sizes, normaliser, seed), trial.budgets)
    reports = tuple(trial.report(codec, parts.judged, length) for codec in codecs)
    if left_out:
        return Judged(reports)
    return Judged(reports, {codecs[-1].name: wrong_tokens_of(codecs[-1], trial, parts, length)})


def fast_job(trial: Trial, length: int, vocabulary: int = VOCABULARY, left_out: str = "") -> Judged:
    """FAST, as finely as each budget allows on the judged episodes themselves."""
    parts = trial.parts(left_out)
    windows, judged = training_chunks(parts.fitted, length), whole_chunks(parts.judged, length)
    codecs = fast_codecs(windows, judged, trial.budgets, vocabulary)
    reports = tuple(trial.report(codec, parts.judged, length) for codec in codecs)
    if left_out:
        return Judged(reports)
    return Judged(reports, {codec.name: wrong_tokens_of(codec, trial, parts, length) for codec in codecs})


def beast_job(trial: Trial, length: int, left_out: str = "") -> Judged:
    """BEAST, with the number of coefficients that is best for each budget on the judged episodes themselves."""
    parts = trial.parts(left_out)
    return _best(beast_codecs(training_chunks(parts.fitted, length), trial.budgets), trial, parts, length)


def bins_job(trial: Trial) -> Judged:
    """Uniform bins, the best within each budget on the judged episodes themselves. Those of the whole range have that
    of chunk tokens."""
    parts = trial.parts()
    steps = dict.fromkeys(BinRange, parts.fitted.steps())
    normaliser, _ = chunk_normaliser(trial.dataset, ChunkNormaliser.AUTO)
    if normaliser is not None:
        offset, scale = np.array([normaliser.offset, normaliser.scale], np.float32)
        steps[BinRange.FULL] = np.stack([offset - scale, offset + scale])
    codecs = (fit_bins(steps[kind], kind, bits) for kind in BinRange for bits in (1, *BIN_BITS))
    return _best(codecs, trial, parts, 1)


def _best(codecs: Iterable[Codec], trial: Trial, parts: Parts, length: int) -> Judged:
    """Those that are the best within a budget."""
    found = {codec.name: codec for codec in codecs}
    reports = [judge_codec(codec, parts.judged, length, trial.units, None) for codec in found.values()]
    best = [report.name for bits in trial.budgets for report in best_within(reports, bits).values() if report]
    return Judged(tuple(trial.report(found[name], parts.judged, length) for name in dict.fromkeys(best)))
