"""Chunk tokens of a dataset: episodes are kept apart, units are chosen, and few data make fewer classes."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfsq.calibration import chunk_fitting
from rfsq.calibration.chunk_fitting import ChunkParts, chunk_parts, fit_chunk_tokens
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.settings import ChunkConfig, ChunkNormaliser
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.errors import DataError, SettingsError
from tests.calibration.test_chunk import Episodes, smooth_episodes

SMALL = ChunkConfig(chunk_length=4, classes=6, tokens=12)


def dataset_of(episodes: Episodes) -> ActionDataset:
    return ActionDataset(
        tuple(episode.astype(np.float32) for episode in episodes),
        tuple(f"demo_{index}" for index in range(len(episodes))),
        ("",) * len(episodes),
        "a lab",
    )


def worst_error(checkpoint: ChunkCheckpoint, episodes: Episodes) -> npt.NDArray[np.float64]:
    """Of each dimension, in the robot's units."""
    model, length = checkpoint.model(dtype=torch.float64), checkpoint.sizes.chunk_length
    chunks = np.concatenate([episode[: len(episode) // length * length] for episode in episodes])
    actions = torch.from_numpy(chunks.reshape(-1, length, chunks.shape[1]))
    found: Tensor = (model.decode(model.encode(actions)) - actions).abs().amax(dim=(0, 1))
    return found.numpy()


def test_episodes_are_fitted_to_and_judged_on_apart(demonstrations: ActionDataset, split: EpisodeSplit) -> None:
    parts = chunk_parts(demonstrations)
    for part, expected in (
        (parts.training, split.train), (parts.calibration, split.calibration), (parts.judging, split.validation),
    ):  # fmt: skip
        assert part.names == expected.names


def test_what_was_fitted_is_written_down() -> None:
    dataset = dataset_of(smooth_episodes(3, [50] * 10, seed=0))
    found = fit_chunk_tokens(dataset, SMALL).provenance
    assert found["config"] == {
        "chunk_length": 4, "classes": 6, "vocabulary": 1024, "tokens": 12, "normaliser": "auto", "order": "own",
        "seed": 0,
    }  # fmt: skip
    assert found["data"] == {
        "source": "a lab",
        "sha256": dataset.sha256,
        "selection": "parts of a split by episode",
        "training": {"episodes": 6, "steps": 300},
        "calibration": {"episodes": 2, "steps": 100},
    }
    assert found["remarks"] == [
        "normaliser: none, chosen by auto: all actions lie within 1 and every dimension that moves spans 0.2 or more"
    ]


def test_the_same_data_give_the_same_bits_and_another_seed_others() -> None:
    dataset = dataset_of(smooth_episodes(3, [50] * 10, seed=0))
    first, second, other = (fit_chunk_tokens(dataset, replace(SMALL, seed=seed)).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", [ChunkNormaliser.AUTO, ChunkNormaliser.MIN_MAX])
def test_actions_of_any_size_are_brought_into_range_and_grippers_stay(name: ChunkNormaliser) -> None:
    offset, unit = np.array([100.0, -3.0, 0.0]), np.array([50.0, 0.001, 1.0])
    episodes = [episode * unit + offset for episode in smooth_episodes(3, [50] * 10, seed=0)]
    for episode in episodes:
        # A gripper that opens with 1 and closes with 0.
        episode[:, 2] = episode[:, 2] > 0
    checkpoint = fit_chunk_tokens(dataset_of(episodes), replace(SMALL, normaliser=name))
    assert checkpoint.normaliser is not None
    assert (checkpoint.normaliser.offset[2], checkpoint.normaliser.scale[2]) == (0, 1)
    assert (worst_error(checkpoint, episodes) < 0.05 * unit).all()
    assert checkpoint.provenance["remarks"][0].startswith("normaliser: min-max, ")


@given(st.integers(0, 2**32))
def test_no_action_that_was_fitted_to_lies_beyond_the_range(seed: int) -> None:
    generator = np.random.default_rng(seed)
    offset, unit = generator.normal(size=3) * 1000, 10.0 ** generator.uniform(-2, 3, 3)
    episodes = [episode * unit + offset for episode in smooth_episodes(3, [20] * 2, seed)]
    dataset = dataset_of(episodes)
    found, _ = chunk_fitting.chunk_normaliser(chunk_parts(dataset), ChunkNormaliser.MIN_MAX)
    assert found is not None
    assert (np.abs(dataset.steps().astype(np.float64) - found.offset) <= found.scale).all()


def test_the_range_is_as_much_wider_as_one_episode_reached_beyond_the_others() -> None:
    episodes = [np.linspace(-1, 1, 20)[:, None] * [10.0, 50.0] for _ in range(10)]
    # To 25 in a range of ±10 is two and a half times as far; to 75 in one of ±50 is half as far again.
    episodes[3] = episodes[3] * [2.5, 1]
    episodes[7] = episodes[7] * [1, 1.5]
    dataset = dataset_of(episodes)
    found, why = chunk_fitting.chunk_normaliser(ChunkParts(dataset, dataset.select([0]), dataset), ChunkNormaliser.AUTO)
    assert found is not None
    assert found.scale == pytest.approx((2.5 * 25, 2.5 * 75))
    assert why.endswith("of 2.5 times the range seen, since one episode reached so far beyond the others")


@pytest.mark.parametrize("reach", [1.0, 100.0])
def test_a_wild_episode_widens_it_no_more_than_escape_can_bear_and_limits_not_at_all(reach: float) -> None:
    # A last dimension of unit size, a gripper, stays as it is.
    episodes = [np.linspace(-1, 1, 20)[:, None] * [10.0, 1.0] for _ in range(10)]
    episodes[3] = episodes[3] * [reach, 1]
    dataset = dataset_of(episodes)
    found, _ = chunk_fitting.chunk_normaliser(ChunkParts(dataset, dataset, dataset), ChunkNormaliser.AUTO)
    assert found is not None
    assert found.scale == pytest.approx((10 * reach * (4 if reach > 1 else 1), 1))


def test_episodes_that_reach_farther_than_any_seen_are_coded_too() -> None:
    generator = np.random.default_rng(0)
    episodes = [episode * generator.uniform(3, 12, size=2) for episode in smooth_episodes(2, [60] * 30, seed=0)]
    dataset = dataset_of(episodes[:20])
    checkpoint = fit_chunk_tokens(dataset, ChunkConfig(chunk_length=4, classes=8))
    farthest = np.abs(dataset.steps()).max(axis=0)
    beyond = [episode * 1.2 * farthest / np.abs(episode).max(axis=0) for episode in episodes[20:]]
    assert (worst_error(checkpoint, beyond) < 0.05 * farthest).all()


def test_nothing_beyond_the_range_is_decoded_where_no_normaliser_is_wanted() -> None:
    episodes = [2 * episode for episode in smooth_episodes(3, [50] * 10, seed=0)]
    checkpoint = fit_chunk_tokens(dataset_of(episodes), replace(SMALL, normaliser=ChunkNormaliser.NONE))
    assert checkpoint.normaliser is None
    farthest = np.abs(np.concatenate(episodes)).max(axis=0)
    np.testing.assert_allclose(worst_error(checkpoint, episodes), farthest - 1, atol=0.1)


@pytest.mark.parametrize("place", [0.25, 700.0])
def test_a_dimension_at_rest_decodes_where_it_rests(place: float) -> None:
    episodes = smooth_episodes(3, [50] * 10, seed=0)
    for episode in episodes:
        episode[:, 1] = place
    checkpoint = fit_chunk_tokens(dataset_of(episodes), SMALL)
    assert worst_error(checkpoint, episodes)[1] < 1e-4 * place


def test_one_wild_episode_is_named() -> None:
    episodes = smooth_episodes(3, [50] * 10, seed=0)
    wild = chunk_parts(dataset_of(episodes)).training.names[0]
    episodes[int(wild.removeprefix("demo_"))][7, 1] = 1000
    remarks = fit_chunk_tokens(dataset_of(episodes), SMALL).provenance["remarks"]
    assert any(f"dimension 1 spans 1e+03 by episode {wild!r}, without it" in remark for remark in remarks)


@pytest.mark.parametrize(("lengths", "classes"), [([8] * 10, 11), ([3] * 10, 5), ([60] * 10, 64)])
def test_few_windows_make_fewer_classes(lengths: list[int], classes: int) -> None:
    checkpoint = fit_chunk_tokens(dataset_of(smooth_episodes(3, lengths, seed=0)), ChunkConfig(chunk_length=4))
    assert checkpoint.sizes.num_classes == classes
    warned = [remark for remark in checkpoint.provenance["remarks"] if "classes in place of 64" in remark]
    assert len(warned) == (classes < 64)


@pytest.mark.parametrize("episodes", [1, 3])
def test_few_episodes_serve_for_everything_and_a_warning_says_so(episodes: int) -> None:
    dataset = dataset_of(smooth_episodes(3, [90] * episodes, seed=0))
    parts = chunk_parts(dataset)
    assert parts.training is parts.calibration is parts.judging is dataset
    remarks = fit_chunk_tokens(dataset, SMALL).provenance["remarks"]
    assert any("cannot be split, so the verdict is of the very data" in remark for remark in remarks)


@pytest.mark.parametrize(("action_dim", "chunk_length", "tokens"), [(1, 1, 2), (1, 2, 4), (3, 8, 43), (7, 8, 45)])
def test_a_small_chunk_has_as_many_tokens_as_it_can_use(action_dim: int, chunk_length: int, tokens: int) -> None:
    config = ChunkConfig(chunk_length, classes=16, normaliser=ChunkNormaliser.NONE)
    dataset = dataset_of(smooth_episodes(action_dim, [50] * 10, seed=0))
    found = chunk_fitting._sizes(dataset, config)[0]
    assert found.num_tokens == tokens
    most = found.most_tokens
    assert chunk_fitting._sizes(dataset, replace(config, tokens=most))[0].num_tokens == most
    with pytest.raises(SettingsError, match=f"{most + 1} tokens are more than a chunk .*expected at most {most}"):
        chunk_fitting._sizes(dataset, replace(config, tokens=most + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 1000}, "vocabulary is 1000; expected a power of two from 16 to 65,536"),
        ({"vocabulary": 2**17}, "vocabulary is 131072; expected"),
        ({"normaliser": "quantile"}, "normaliser is 'quantile'; expected one of auto, none, min-max"),
        ({"classes": 1}, "num_classes is 1; expected an integer from 2 to 256"),
        ({"classes": 64, "vocabulary": 32}, "fewer classes or a larger vocabulary"),
        ({"chunk_length": 0}, "chunk_length is 0; expected an integer from 1"),
        ({"tokens": 0}, "num_tokens is 0; expected an integer from 1"),
        ({"tokens": 30}, "30 tokens are more than a chunk of 12 values can use; expected at most 21"),
        ({"seed": 2**70}, "expected one of 64 bits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    dataset = dataset_of(smooth_episodes(3, [50] * 10, seed=0))
    with pytest.raises((CalibrationError, SettingsError), match=message):
        fit_chunk_tokens(dataset, replace(SMALL, **settings))


def test_actions_that_are_no_numbers_are_refused() -> None:
    (*episodes, broken) = smooth_episodes(3, [50] * 10, seed=0)
    broken[3, 1] = np.nan
    with pytest.raises(DataError, match="step 3, dimension 1: nan"):
        fit_chunk_tokens(dataset_of([*episodes, broken]), SMALL)
