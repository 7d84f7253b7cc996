"""All peers together: one list of codecs, fitted to the training episodes alone, on robots of any kind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rfsq.evidence import peers
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.peers import (
    BIN_BITS,
    FAST_SCALES,
    PARTIAL_SCALE,
    ResidualFamily,
    peer_codecs,
    residual_configs,
    training_chunks,
)
from rfsq.evidence.schemes import BinRange, Codec
from rfsq.rfsq_ref.data import ActionDataset, split_episodes
from tests.evidence.conftest import robot_dataset

_CHUNK = 8
#: The real configurations, with too little training to be any good.
_QUICK = tuple(
    replace(config, epochs=1, unquantised_epochs=0, num_quantizers=2, codebook_size=64)
    for config in residual_configs(0)
)


@pytest.fixture(scope="module", autouse=True)
def _quick_training() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "residual_configs", lambda _seed: _QUICK)
        yield


@pytest.fixture(scope="module")
def codecs(robot: ActionDataset, tmp_path_factory: pytest.TempPathFactory) -> list[Codec]:
    return peer_codecs(robot, _CHUNK, seed=0, cache=tmp_path_factory.mktemp("cache"))


def test_all_families_are_there_and_every_name_is_its_own(codecs: list[Codec]) -> None:
    assert all(isinstance(codec, Codec) for codec in codecs)
    assert {codec.family for codec in codecs} == {"bins", "FAST", "ResidualFSQ", "ResidualVQ"}
    assert len({codec.name for codec in codecs}) == len(codecs)
    assert sum(codec.family == "bins" for codec in codecs) == len(BIN_BITS) * len(BinRange)
    assert sum(codec.family == "FAST" and not codec.partial for codec in codecs) == len(FAST_SCALES)


def test_every_codec_decodes_every_robot_and_chunk_length(tmp_path: Path) -> None:
    for dimensions in (4, 14):
        dataset = robot_dataset(action_dim=dimensions, episodes=8)
        for codec in peer_codecs(dataset, 4, seed=0, cache=tmp_path):
            for length in (4, 3):
                chunks = dataset.episodes[1][: 2 * length].reshape(2, length, dimensions)
                decoded = codec.reconstruct(chunks)
                assert decoded.dtype == np.float32, codec.name
                assert decoded.shape == chunks.shape, codec.name
                assert np.isfinite(decoded).all(), codec.name
                assert codec.bits_per_step(chunks) > 0, codec.name


def test_what_is_not_for_training_changes_no_codec(robot: ActionDataset, codecs: list[Codec], tmp_path: Path) -> None:
    test = {name for part in ("calibration", "test") for name in getattr(split_episodes(robot), part).names}
    changed = ActionDataset(
        tuple(
            3 * episode + 1 if name in test else episode
            for name, episode in zip(robot.names, robot.episodes, strict=True)
        ),
        robot.names,
        robot.tasks,
        robot.source,
    )
    chunks = split_episodes(robot).validation.episodes[0][:16].reshape(2, _CHUNK, 4)

    for before, after in zip(codecs, peer_codecs(changed, _CHUNK, seed=0, cache=tmp_path), strict=True):
        np.testing.assert_array_equal(before.reconstruct(chunks), after.reconstruct(chunks), err_msg=before.name)


def test_fast_is_also_decoded_in_part(codecs: list[Codec], robot: ActionDataset) -> None:
    chunks = split_episodes(robot).validation.episodes[0][:16].reshape(2, _CHUNK, 4)
    parts = [codec for codec in codecs if codec.family == "FAST" and codec.partial]
    whole = next(codec for codec in codecs if codec.name == f"FAST, scale {PARTIAL_SCALE:g}")

    bits = [codec.bits_per_step(chunks) for codec in [*parts, whole]]

    assert len(parts) >= 3
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


def test_peers_have_our_bits_per_layer() -> None:
    ours = 16 * np.log2(7)
    for config in residual_configs(0):
        tokens_of_a_layer = {ResidualFamily.FSQ: 1, ResidualFamily.VQ: 5}[config.family]
        for layers in (1, 3):
            assert tokens_of_a_layer * layers <= config.num_quantizers
            bits = tokens_of_a_layer * layers * config.bits_per_quantizer
            assert bits == pytest.approx(layers * ours, rel=0.005)


def test_training_windows_are_all_of_an_episodes_and_short_ones_are_filled_up() -> None:
    episodes = (np.arange(10, dtype=np.float32).reshape(5, 2), np.array([[7, 8]], np.float32))
    dataset = ActionDataset(episodes, ("a", "b"), ("", ""), "test")

    chunks = training_chunks(dataset, 3)

    np.testing.assert_array_equal(chunks[:3], [episodes[0][start : start + 3] for start in range(3)])
    np.testing.assert_array_equal(chunks[3:], np.full((1, 3, 2), [7, 8]))


def test_a_long_dataset_is_thinned_out_evenly() -> None:
    steps = np.arange(50_000, dtype=np.float32)[:, None]
    chunks = training_chunks(ActionDataset((steps,), ("a",), ("",), "test"), 2)

    assert 10_000 < len(chunks) <= 20_000
    assert len(np.unique(np.diff(chunks[:, 0, 0]))) == 1
    assert chunks[-1, 0, 0] > 49_990


def test_no_chunk_is_shorter_than_a_step(robot: ActionDataset, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="at least 1"):
        peer_codecs(robot, 0, seed=0, cache=tmp_path)
