"""The chunks of a page are whole, of one episode each, and spread over all of the data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import InvalidInputError
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.explain import samples
from rfsq.runtime.explain.samples import choose_samples
from tests.runtime.datasets.samples import write_npz


def test_every_chunk_is_that_of_its_episode(
    chunk_tokenizer: ActionTokenizer, data: Path, episodes: list[np.ndarray]
) -> None:
    found = choose_samples(open_source(data), chunk_tokenizer.model)
    assert found.num_chunks == len(found.actions) == 9
    assert [*zip(found.episode.tolist(), found.step.tolist(), strict=True)] == [
        (0, 0), (0, 4), (0, 8), (2, 0), (2, 4), (2, 8), (2, 12), (2, 16), (3, 0),
    ]  # fmt: skip
    for chunk, episode, step in zip(found.actions, found.episode, found.step, strict=True):
        np.testing.assert_array_equal(chunk, episodes[episode][step : step + 4])


def test_the_largest_action_is_that_of_all_steps(
    chunk_tokenizer: ActionTokenizer, data: Path, episodes: list[np.ndarray]
) -> None:
    found = choose_samples(open_source(data), chunk_tokenizer.model)
    np.testing.assert_array_equal(found.largest, np.abs(np.concatenate(episodes)).max(axis=0))


def test_without_a_choice_episodes_of_all_the_data_are_shown(chunk_tokenizer: ActionTokenizer, data: Path) -> None:
    found = choose_samples(open_source(data), chunk_tokenizer.model)
    # Episode 1 is shorter than a chunk.
    assert {*found.episode[found.shown].tolist()} == {0, 2, 3}


def test_the_chosen_episodes_are_shown_in_their_order_and_all_are_counted(
    chunk_tokenizer: ActionTokenizer, data: Path
) -> None:
    found = choose_samples(open_source(data), chunk_tokenizer.model, [3, 0, 3])
    assert found.episode[found.shown].tolist() == [3, 0, 0, 0]
    assert len(found.actions) == 9


def test_of_long_data_a_part_is_counted_and_what_is_shown_is_in_it(
    chunk_tokenizer: ActionTokenizer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MOST_COUNTED", 3)
    found = choose_samples(open_source(data), chunk_tokenizer.model, [2])
    assert found.num_chunks == 9
    # The first, the middle and the last, and all of episode 2.
    assert found.episode.tolist() == [0, 2, 2, 2, 2, 2, 3]
    assert found.step[found.shown].tolist() == [0, 4, 8, 12, 16]


def test_a_page_does_not_grow_with_the_size_of_a_chunk(
    chunk_tokenizer: ActionTokenizer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_MOST_NUMBERS", 1)
    found = choose_samples(open_source(data), chunk_tokenizer.model)
    assert found.episode[found.shown].tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("episode", "said"),
    [
        (7, r"--episode 7 is not in the data; expected of 0, 1, 2, 3"),
        (1, r"--episode 1 is shorter than a chunk of 4 steps; choose a longer episode"),
    ],
)
def test_an_episode_that_cannot_be_shown_is_refused(
    episode: int, said: str, chunk_tokenizer: ActionTokenizer, data: Path
) -> None:
    with pytest.raises(InvalidInputError, match=said):
        choose_samples(open_source(data), chunk_tokenizer.model, [episode])


def test_data_without_a_whole_chunk_are_refused(chunk_tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    short = write_npz(tmp_path / "short.npz", [np.zeros((3, 3), np.float32)] * 2)
    with pytest.raises(InvalidInputError, match=r"no episode of short\.npz has 4 steps"):
        choose_samples(open_source(short), chunk_tokenizer.model)


def test_an_action_that_the_bundle_does_not_take_is_refused(chunk_tokenizer: ActionTokenizer, data: Path) -> None:
    with pytest.raises(ValueError, match="expected finite numbers of at most"):
        choose_samples(open_source(data), replace(chunk_tokenizer.model, action_limit=0.1))
