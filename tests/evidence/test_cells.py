"""What `evidence.rollouts` promises: every way of decoding tokens is a cell, and a cell can be told from another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.calibration.settings import RecoveredConfig
from rfsq.evidence import rollouts
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.rollout_report import CALIBRATED_LAYERS, NAIVE
from rfsq.evidence.rollouts import RAW, choose_peers, fingerprint, rfsq_cells, select
from rfsq.evidence.schemes import BinRange, Codec, RawCodec, RfsqCodec, fit_bins
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, chunk, split_episodes


@dataclass(frozen=True)
class Peer:
    name: str
    family: str
    rate: float
    partial: bool = False
    error: float = 0.0

    def reconstruct(self, chunks: np.ndarray) -> np.ndarray:
        return chunks + np.float32(self.error)

    def bits_per_step(self, chunks: np.ndarray) -> float:
        del chunks
        return self.rate


@pytest.fixture(scope="module")
def found(robust: Checkpoint, naive: Checkpoint, demonstrations: ActionDataset) -> dict[str, Codec]:
    patch = pytest.MonkeyPatch()
    # The full fit takes tens of seconds; a short one gives the same cells.
    patch.setattr(rollouts, "RecoveredConfig", lambda: RecoveredConfig(refine_steps=0))
    try:
        return rfsq_cells(naive, robust, demonstrations.select(range(0, 125, 3)))
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def chunks(demonstrations: ActionDataset) -> np.ndarray:
    return chunk(demonstrations.steps(), 8)[::7]


def test_the_cells_are_those_the_report_speaks_of(found: dict[str, Codec]) -> None:
    assert list(found) == [RAW, NAIVE, "published decoder", "recovered decoder", *CALIBRATED_LAYERS]
    assert all(isinstance(codec, Codec) and codec.name == name for name, codec in found.items())


def test_each_cell_decodes_as_its_name_says(found: dict[str, Codec], chunks: np.ndarray) -> None:
    error = {name: float(np.mean((codec.reconstruct(chunks) - chunks) ** 2)) for name, codec in found.items()}
    assert error[RAW] == 0.0
    assert error["published decoder"] > 1.0
    assert error["recovered decoder"] < 1e-3 * error["published decoder"]
    layers = [error[name] for name in CALIBRATED_LAYERS]
    assert layers[0] > layers[1] > layers[2] >= layers[-1]
    assert layers[-1] < 0.1 * error[NAIVE]


def test_calibrated_prefixes_are_paid_by_the_layer(found: dict[str, Codec], chunks: np.ndarray) -> None:
    per_layer = 16 * np.log2(7)
    bits = [found[name].bits_per_step(chunks) / per_layer for name in CALIBRATED_LAYERS]
    assert bits == pytest.approx([1, 2, 3, 5, 8])
    assert all(isinstance(found[name], RfsqCodec) for name in CALIBRATED_LAYERS)


def test_codecs_that_do_something_else_have_another_fingerprint(found: dict[str, Codec]) -> None:
    names = (RAW, NAIVE, "published decoder", "recovered decoder", *CALIBRATED_LAYERS[:3])
    assert len({fingerprint(found[name]) for name in names}) == len(names)
    assert fingerprint(found[NAIVE]) == fingerprint(found[NAIVE])
    assert fingerprint(found[RAW]) == fingerprint(RawCodec("another name"))


CHUNKS = np.zeros((1, 8, 7), np.float32)


def test_of_every_family_the_nearest_codec_is_taken_and_the_bins_of_openvla() -> None:
    peers = [
        Peer("256 bins, 1-99 %", "bins", 56.0, error=0.5),
        Peer("256 bins, min-max", "bins", 56.0, error=0.4),
        Peer("2^19 bins, worse", "bins", 133.0, error=0.1),
        Peer("2^19 bins", "bins", 133.0),
        Peer("fast fine", "FAST", 180.0),
        Peer("fast coarse", "FAST", 110.0, error=0.3),
        Peer("fast, first tokens", "FAST", 134.0, partial=True),
        Peer("fsq, 3 of 3", "ResidualFSQ", 134.8, error=0.2),
        Peer("vq", "ResidualVQ", 20.0),
    ]
    chosen = choose_peers(list(peers), CHUNKS, 134.8)
    assert set(chosen) == {"256 bins, 1-99 %", "2^19 bins", "fast coarse", "fsq, 3 of 3", "vq"}
    assert all(name == codec.name for name, codec in chosen.items())


def test_residual_peers_compete_with_their_prefixes_too_as_ours_is_one() -> None:
    peers = [
        Peer("fsq, 3 of 3", "ResidualFSQ", 134.8, error=0.2),
        Peer("fsq, 3 of 8", "ResidualFSQ", 134.8, partial=True, error=0.1),
        Peer("fsq, 8 of 8", "ResidualFSQ", 359.0),
        Peer("vq, 15 of 15", "ResidualVQ", 135.0, error=0.3),
        Peer("vq, 14 of 15", "ResidualVQ", 129.0, partial=True, error=0.2),
        Peer("vq, 13 of 15", "ResidualVQ", 117.0, partial=True, error=0.1),
    ]
    # 129 bits are within 5 % of 135 and the better codec, 117 are not.
    assert set(choose_peers(list(peers), CHUNKS, 134.8)) == {"fsq, 3 of 8", "vq, 14 of 15"}


def test_the_names_that_are_looked_for_are_those_of_the_peers(demonstrations: ActionDataset) -> None:
    peers = pytest.importorskip("rfsq.evidence.peers")
    assert set(rollouts.PREFIX_FAMILIES) == {family.value for family in peers.ResidualFamily}
    assert fit_bins(demonstrations.steps(), BinRange.QUANTILE, 8).name == rollouts.OPENVLA_BINS


def test_peers_are_chosen_on_the_validation_episodes(
    monkeypatch: pytest.MonkeyPatch, demonstrations: ActionDataset, tmp_path: Path
) -> None:
    peers = pytest.importorskip("rfsq.evidence.peers")
    like = RfsqCodec("calibrated, L0-L2", load_checkpoint(ROBUST_CHECKPOINT).model(), 3)
    seen: list[Any] = []

    def chosen(*arguments: Any) -> dict[str, Codec]:
        seen.extend(arguments)
        return {}

    monkeypatch.setattr(rollouts, "rfsq_cells", lambda *_: {like.name: like})
    monkeypatch.setattr(peers, "peer_codecs", lambda *_, **__: [])
    monkeypatch.setattr(rollouts, "choose_peers", chosen)
    rollouts.codecs(peers=True, cache=tmp_path)
    assert np.array_equal(seen[1], chunk(split_episodes(demonstrations).validation.steps(), 8))
    assert seen[2] == pytest.approx(3 * 16 * np.log2(7))


def test_cells_are_chosen_by_name_and_unknown_ones_refused() -> None:
    some: dict[str, Codec] = {"a": RawCodec("a"), "b": RawCodec("b")}
    assert select(some, ()) == some
    assert list(select(some, ("b",))) == ["b"]
    with pytest.raises(EvidenceError, match=r"no cells named \['c'\]; expected some of \['a', 'b'\]"):
        select(some, ("a", "c"))
