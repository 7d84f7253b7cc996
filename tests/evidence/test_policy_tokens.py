"""What a policy says decodes to what the tokenizer itself decodes, however the bits are cut."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.calibration.chunk import fit_chunk_code
from rfsq.calibration.chunk_windows import windows
from rfsq.evidence.oat import OatConfig, OatNetwork
from rfsq.evidence.policies import NOTHING
from rfsq.evidence.policy_tokens import BinTokens, ChunkTokens, NetworkTokens, contexts, fit_fast_tokens
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit

LENGTH = 8


@pytest.fixture(scope="module")
def chunks(split: EpisodeSplit) -> Tensor:
    return windows(split.validation.episodes[:3], LENGTH)[::7].reshape(-1, LENGTH, split.train.action_dim)


@pytest.fixture(scope="module")
def code(split: EpisodeSplit) -> ChunkCode:
    sizes = ChunkSizes(7, LENGTH, num_classes=8, num_tokens=6)
    return ChunkCode(sizes, fit_chunk_code(split.train.episodes[::8], split.calibration.episodes[::4], sizes)).double()


@pytest.mark.parametrize("cut", [(10, 10, 10), (3, 7, 5, 5, 10), (4, 4, 4, 4, 4, 4, 6)])
def test_the_same_bits_decode_alike_however_they_are_cut(code: ChunkCode, chunks: Tensor, cut: tuple[int, ...]) -> None:
    tokens = ChunkTokens("cut", 1 << max(cut), code, cut)
    expected = code.decode(code.encode(chunks.flatten(1))[:, :3])
    torch.testing.assert_close(tokens.decode(tokens.encode(chunks)).flatten(1), expected)
    assert tokens.bits(tokens.encode(chunks)) == 30


def test_each_prefix_from_the_whole_class_on_is_judged_and_errs_less(code: ChunkCode, chunks: Tensor) -> None:
    tokens = ChunkTokens("cut", 16, code, (2, 2, *(4,) * 12))
    assert tokens.prefixes == (2, 3, 4, 6, 8, 12, 14)
    found = tokens.encode(chunks)
    errors = [float((tokens.decode(found[:, :count]) - chunks).square().mean()) for count in tokens.prefixes]
    assert errors == sorted(errors, reverse=True)


def test_a_word_that_a_token_does_not_have_means_its_last(code: ChunkCode) -> None:
    tokens = ChunkTokens("cut", 16, code, (3, 4))
    assert torch.equal(tokens.decode(torch.tensor([[15, 1]])), tokens.decode(torch.tensor([[7, 1]])))


def test_fast_says_an_end_marker_and_nothing_behind_it(chunks: Tensor) -> None:
    tokens = fit_fast_tokens(chunks, scale=10.0)
    found, expected = tokens.encode(chunks), tokens.codec.tokens(chunks.float().numpy())
    assert found.shape == (len(chunks), max(map(len, expected)) + 1)
    for row, ids in zip(found.tolist(), expected, strict=True):
        assert row == [*ids, tokens.end, *[NOTHING] * (len(row) - len(ids) - 1)]
    decoded = tokens.decode(found.where(found != NOTHING, 0))
    np.testing.assert_array_equal(decoded.numpy(), tokens.codec.reconstruct(chunks.float().numpy()))
    assert tokens.bits(found) / LENGTH == pytest.approx(tokens.codec.bits_per_step(chunks.float().numpy()))


def test_bins_are_said_step_by_step(chunks: Tensor) -> None:
    tokens = BinTokens("bins", 64, fit_bins(chunks.flatten(0, 1).numpy(), BinRange.FULL, 6), (LENGTH, 7))
    found = tokens.encode(chunks)
    assert tokens.prefixes == (found.shape[1],) == (56,)
    assert (tokens.decode(found) - chunks).abs().max() <= 1 / 64


def test_a_network_decodes_its_own_tokens(chunks: Tensor) -> None:
    torch.manual_seed(0)
    network = OatNetwork(OatConfig(prefixes=(1, 2), width=16, heads=2), 7).eval()
    tokens = NetworkTokens("OAT", network.vocabulary, network)
    found = tokens.encode(chunks)
    assert found.shape == (len(chunks), 2)
    assert tokens.decode(found[:, :1]).shape == chunks.shape


def test_a_context_shows_the_past_alone() -> None:
    actions = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    later = actions.copy()
    later[9:] += 1
    seen, other = (
        contexts(ActionDataset((episode,), ("one",), ("Lift",), "robot.npz"), LENGTH, ["Door", "Lift"])
        for episode in (actions, later)
    )
    assert len(seen) == 20 - LENGTH + 1
    assert torch.equal(seen[:10], other[:10])
    assert (seen[10:] != other[10:]).any(dim=1).all()
    # Its own last two chunks, how far they led, the time, and the task.
    torch.testing.assert_close(seen[9, 14:32], torch.from_numpy(actions[:9].ravel()))
    torch.testing.assert_close(seen[9, 32:], torch.tensor([*(actions[:9].sum(axis=0) / 10), 0.09, 0, 0, 1]))


def test_an_episode_shorter_than_a_chunk_has_one_context() -> None:
    episode = np.ones((3, 2), np.float32)
    assert len(contexts(ActionDataset((episode,), ("one",), ("",), "robot.npz"), LENGTH, [""])) == 1
