"""The codecs that the closed loop compares, one cell of its table each."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rfsq.calibration.fitting import calibrate, recover
from rfsq.calibration.recovered import default_prefixes
from rfsq.calibration.settings import CalibrationConfig, RecoveredConfig
from rfsq.calibration.tables import prefix_name
from rfsq.evidence.codecs import BinRange, Codec, RawCodec, RfsqCodec
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.settings import CACHE
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, chunk, load_demonstrations, split_episodes
from rfsq.rfsq_ref.quantizer import Conditioning

RAW = "raw"
#: How many layers of the calibrated tokens are decoded, beside all of them.
CALIBRATED_PREFIXES = (1, 2, 3, 5)
#: Peers are taken at the setting nearest to this many layers of ours, the coarse tokens.
LIKE_BITS_LAYERS = 3
#: Bins as OpenVLA has them: a cell of its own, whatever its bits.
OPENVLA_BINS = f"256 bins, {BinRange.QUANTILE.value}"
#: Families whose prefixes are settings of the method, as ours are; FAST's first tokens are only a part of a chunk's.
PREFIX_FAMILIES = ("ResidualFSQ", "ResidualVQ")
#: Bits within this share of each other count as equally near.
_SAME_BITS = 0.05
_FINGERPRINT_CHUNKS = 64


def codecs(*, peers: bool = False, cache: Path = CACHE) -> dict[str, Codec]:
    """Cell names and their codecs, from the embedded checkpoints and demonstrations; float32 models.

    peers: also the methods of others, trained where `cache` does not hold them, for chunks of 8 steps. Fitting the
    recovered decoder takes tens of seconds. Raises CheckpointError or DataError for damaged files.
    """
    dataset = load_demonstrations()
    robust = load_checkpoint(ROBUST_CHECKPOINT)
    found = rfsq_cells(load_checkpoint(NAIVE_CHECKPOINT), robust, dataset)
    if peers:
        from rfsq.evidence.peers import peer_codecs

        # Chosen by what is not reported: the test episodes are.
        chunks = chunk(split_episodes(dataset).validation.steps(), 8)
        like = found[_calibrated(LIKE_BITS_LAYERS, robust)].bits_per_step(chunks)
        found |= choose_peers(peer_codecs(dataset, 8, seed=0, cache=cache), chunks, like)
    return found


def rfsq_cells(naive: Checkpoint, robust: Checkpoint, dataset: ActionDataset) -> dict[str, Codec]:
    """Raw actions, and every way of decoding tokens alone: naive, published, recovered, calibrated by layers."""
    layers = robust.config.num_layers
    calibrated = calibrate(robust, dataset, CalibrationConfig()).model(Conditioning.CALIBRATED)
    recovered = recover(robust, dataset, default_prefixes(layers), RecoveredConfig()).model()
    published = robust.model()
    found: list[Codec] = [
        RawCodec(RAW),
        RfsqCodec("naive", naive.model(), naive.config.num_layers),
        RfsqCodec("published decoder", published, layers, published=True),
        RfsqCodec("recovered decoder", recovered, layers),
    ]
    for prefix in [*(prefix for prefix in CALIBRATED_PREFIXES if prefix < layers), layers]:
        found.append(RfsqCodec(_calibrated(prefix, robust), calibrated, prefix))
    return {codec.name: codec for codec in found}


def _calibrated(prefix: int, robust: Checkpoint) -> str:
    """The cell of the first `prefix` layers."""
    return f"calibrated, {prefix_name(prefix, robust.config.num_layers)}"


def choose_peers(peers: list[Codec], chunks: FloatArray, like_bits: float) -> dict[str, Codec]:
    """Of every family the codec at about `like_bits` bits per step, and OpenVLA's bins.

    chunks: float32 [B, T, A] of the validation episodes. Of those of a family whose bits are within 5 % of the bits of
    the nearest, the one with the lowest mean square error on `chunks` is taken. Prefixes compete where they are a
    setting of the method (PREFIX_FAMILIES), other partial codecs do not.
    """
    families: dict[str, list[tuple[float, Codec]]] = {}
    chosen: dict[str, Codec] = {}
    for peer in peers:
        if not peer.partial or peer.family in PREFIX_FAMILIES:
            families.setdefault(peer.family, []).append((peer.bits_per_step(chunks), peer))
        if peer.name == OPENVLA_BINS:
            chosen[peer.name] = peer
    for settings in families.values():
        nearest, _ = min(settings, key=lambda setting: abs(setting[0] - like_bits))
        alike = [peer for bits, peer in settings if abs(bits - nearest) <= _SAME_BITS * nearest]
        best = min(alike, key=lambda peer: float(np.mean((peer.reconstruct(chunks) - chunks) ** 2)))
        chosen[best.name] = best
    return chosen


def fingerprint(codec: Codec) -> str:
    """Hash of the first chunks of the demonstrations as the codec decodes them, to tell one codec from another.

    It is of bytes, so it also differs between processors that round differently, as trajectories do.
    """
    chunks = chunk(load_demonstrations().steps(), 8)[:_FINGERPRINT_CHUNKS]
    return hashlib.sha256(codec.reconstruct(chunks).tobytes()).hexdigest()[:16]


def select(found: Mapping[str, Codec], names: tuple[str, ...]) -> dict[str, Codec]:
    """The cells of these names, all cells where no name is given. Raises EvidenceError for a name that is no cell."""
    unknown = [name for name in names if name not in found]
    if unknown:
        raise EvidenceError(f"no cells named {unknown}; expected some of {list(found)}")
    return {name: found[name] for name in names or found}
