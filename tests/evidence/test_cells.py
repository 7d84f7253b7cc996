"""What `evidence.cells` promises: every way of decoding tokens is a cell, and a cell can be told from another."""

from dataclasses import dataclass

import numpy as np
import pytest

from evidence import cells
from evidence.cells import RAW, choose_peers, fingerprint, rfsq_cells, select
from evidence.codecs import Codec, RawCodec, RfsqCodec
from evidence.errors import EvidenceError
from evidence.rollout_report import CALIBRATED_LAYERS, NAIVE
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.data import ActionDataset, chunk


@dataclass(frozen=True)
class Peer:
    name: str
    family: str
    rate: float
    partial: bool = False
    bits: int | None = None
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
    patch.setattr(cells, "RecoveredConfig", lambda: cells_recovered(refine_steps=0))
    try:
        return rfsq_cells(naive, robust, demonstrations.select(range(0, 125, 3)))
    finally:
        patch.undo()


cells_recovered = cells.RecoveredConfig


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


def test_of_every_family_the_nearest_whole_codec_is_taken_and_the_bins_of_eight_bits() -> None:
    peers = [
        Peer("bins 256", "bins", 56.0, bits=8),
        Peer("bins 2^19, worse", "bins", 133.0, bits=19, error=0.1),
        Peer("bins 2^19", "bins", 133.0, bits=19),
        Peer("fast fine", "FAST", 180.0),
        Peer("fast coarse", "FAST", 110.0),
        Peer("fast part", "FAST", 134.0, partial=True),
        Peer("vq", "ResidualVQ", 20.0),
    ]
    chosen = choose_peers(list(peers), np.zeros((1, 8, 7), np.float32), 134.8)
    assert set(chosen) == {"bins 256", "bins 2^19", "fast coarse", "vq"}


def test_cells_are_chosen_by_name_and_unknown_ones_refused() -> None:
    some: dict[str, Codec] = {"a": RawCodec("a"), "b": RawCodec("b")}
    assert select(some, ()) == some
    assert list(select(some, ("b",))) == ["b"]
    with pytest.raises(EvidenceError, match=r"no cells named \['c'\]; expected some of \['a', 'b'\]"):
        select(some, ("a", "c"))
