"""What policies learn is kept as it is, and nothing is fitted to the episodes that its scales are fitted to."""

from pathlib import Path

import pytest
import torch

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.policies import NOTHING
from rfsq.evidence.policy_lessons import CHUNK_LENGTH, Lessons, encoded, load_lessons, meant, parts_of, save_lessons
from rfsq.evidence.policy_tokens import BinTokens
from rfsq.evidence.schemes import BinRange, fit_bins
from tests.evidence.conftest import some_recordings


def test_no_episode_is_in_both_parts() -> None:
    recordings = some_recordings(11)
    fitted, held_out = ({each.seed for each in part} for part in parts_of(recordings))
    assert held_out == {0, 5, 10}
    assert fitted | held_out == set(range(11))
    assert not fitted & held_out


def test_a_file_gives_back_the_tokens_and_where_there_are_none(tmp_path: Path) -> None:
    tokens = torch.tensor([[3, 1024, NOTHING], [0, 7, 9]])
    save_lessons(tmp_path / "lessons.npz", Lessons({"some tokens, 2": tokens}, {"some tokens, 2": 1025}))
    found = load_lessons(tmp_path / "lessons.npz")
    assert found.vocabularies == {"some tokens, 2": 1025}
    assert torch.equal(found.tokens["some tokens, 2"], tokens)


def test_what_holds_no_tokens_says_to_encode_them(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"holds no tokens of recordings: .*; encode them first"):
        load_lessons(tmp_path / "lessons.npz")


def test_every_chunk_that_was_meant_is_encoded() -> None:
    recordings = some_recordings()
    chunks = meant(recordings)
    bins = fit_bins(chunks.flatten(0, 1).float().numpy(), BinRange.FULL, 6)
    found = encoded([BinTokens("64 bins", 64, bins, (CHUNK_LENGTH, 7))], recordings)
    assert found.tokens["64 bins"].shape == (len(chunks), CHUNK_LENGTH * 7)
    assert found.vocabularies == {"64 bins": 64}
