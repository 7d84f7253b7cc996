"""The tokenizers that ours is measured against, all fitted to the same training episodes."""

from pathlib import Path

import numpy as np

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.fast import fit_fast
from rfsq.evidence.residual_peers import ResidualConfig, ResidualFamily, residual_codecs, trained_residual
from rfsq.evidence.schemes import BinRange, Codec, fit_bins
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes

#: RT-2 and OpenVLA have 8 bits, 256 bins.
BIN_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
#: The paper's default is 10.
FAST_SCALES = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
#: The scale that is also decoded in part, and after how many tokens per value of a chunk (T * A).
PARTIAL_SCALE = 50.0
PARTIAL_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8)
# More chunks change nothing measurable, and byte-pair coding takes longer.
_MOST_CHUNKS = 20_000


def residual_configs(seed: int) -> tuple[ResidualConfig, ...]:
    """At our bits per layer: 44.9 for a layer of ResidualFSQ, 45 for five codebooks of 512 entries (ResidualVQ).

    ResidualFSQ is trained by our recipe, without and with quantiser dropout: with it the first two layers are better,
    without it all layers together. One limit is for the sake of time, and to the peer's disadvantage: ResidualVQ gets
    100 epochs without the quantiser, k-means, then 20 end to end, in batches of 256 instead of 64.
    """
    return (
        ResidualConfig(ResidualFamily.FSQ, num_quantizers=8, seed=seed),
        ResidualConfig(ResidualFamily.FSQ, num_quantizers=3, seed=seed, quantize_dropout=True),
        ResidualConfig(
            ResidualFamily.VQ, num_quantizers=15, seed=seed, unquantised_epochs=100, epochs=20, batch_size=256,
            learning_rate=3e-3,
        ),
    )  # fmt: skip


def peer_codecs(dataset: ActionDataset, chunk_length: int, *, seed: int, cache: Path) -> list[Codec]:
    """All peers, fitted to the training episodes of `split_episodes(dataset)` and not to its test episodes.

    seed: of what is trained (ResidualFSQ, ResidualVQ); bins and FAST have nothing random. cache: folder where trained
    models are kept. Raises DataError for too few episodes, EvidenceError
    for a damaged file in the cache.
    """
    train = split_episodes(dataset).train
    steps, chunks = train.steps(), training_chunks(train, chunk_length)
    codecs: list[Codec] = [fit_bins(steps, kind, bits) for kind in BinRange for bits in BIN_BITS]
    for scale in FAST_SCALES:
        whole = fit_fast(chunks, scale)
        codecs.append(whole)
        if scale == PARTIAL_SCALE:
            counts = sorted({max(1, round(share * chunks[0].size)) for share in PARTIAL_SHARES})
            codecs += [whole.first_tokens(count) for count in counts]
    for config in residual_configs(seed):
        codecs += residual_codecs(trained_residual(dataset, config, cache))
    return codecs


def training_chunks(episodes: ActionDataset, length: int) -> FloatArray:
    """Every window of `length` steps, as a policy is trained on them: float32 [B, length, A].

    A shorter episode gives one window, its last action repeated. At most 20,000 windows, evenly spaced.
    """
    if length < 1:
        raise EvidenceError(f"chunk length is {length}; expected at least 1")
    windows = []
    for episode in episodes.episodes:
        filled = np.pad(episode, ((0, max(0, length - len(episode))), (0, 0)), "edge")
        windows.append(np.lib.stride_tricks.sliding_window_view(filled, length, axis=0).transpose(0, 2, 1))
    found = np.concatenate(windows)
    return found[:: -(-len(found) // _MOST_CHUNKS)]
