"""Chunk tokens of a dataset: episodes are kept apart, units are chosen, and few data make fewer classes."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from rfsq.calibration import chunk_fitting
from rfsq.calibration.chunk import most_learned
from rfsq.calibration.chunk_fitting import chunk_parts, fit_chunk_tokens
from rfsq.calibration.chunk_normaliser import chunk_normaliser
from rfsq.calibration.chunk_report import report_chunk
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.settings import ChunkConfig, ChunkNormaliser
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit, split_episodes
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
        "selection": "parts of a split by episode, its test part for the classes, too",
        "training": {"episodes": 7, "steps": 350},
        "calibration": {"episodes": 2, "steps": 100},
    }
    assert found["remarks"] == [
        "normaliser: none, chosen by auto: all actions lie within 1 and every dimension that moves spans 0.2 or more"
    ]


def test_the_same_data_give_the_same_bits_and_another_seed_others() -> None:
    dataset = dataset_of(smooth_episodes(3, [50] * 10, seed=0))
    first, second, other = (
        fit_chunk_tokens(dataset, replace(SMALL, classes=12, seed=seed)).tensors() for seed in (0, 0, 1)
    )
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


@pytest.mark.parametrize("part", ["training", "calibration", "judging"])
def test_one_wild_episode_is_named_and_none_is_clipped(part: str) -> None:
    episodes = smooth_episodes(3, [50] * 10, seed=0)
    wild = getattr(chunk_parts(dataset_of(episodes)), part).names[0]
    episodes[int(wild.removeprefix("demo_"))][7, 1] = 1000
    found = fit_chunk_tokens(dataset_of(episodes), SMALL)
    remarks = found.provenance["remarks"]
    assert any(f"dimension 1 spans 1e+03 by episode {wild!r}, without it" in remark for remark in remarks)
    assert found.normaliser is not None
    assert found.normaliser.offset[1] + found.normaliser.scale[1] > 1000


def test_few_episodes_spare_none_for_a_test(demonstrations: ActionDataset) -> None:
    few = demonstrations.select(range(8))
    parts, split = chunk_parts(few), split_episodes(few)
    assert parts.training.names == split.train.names + split.test.names
    assert (parts.calibration.names, parts.judging.names) == (split.calibration.names, split.validation.names)
    assert "its test part for the classes, too" in fit_chunk_tokens(few, SMALL).provenance["data"]["selection"]
    assert chunk_parts(demonstrations.select(range(40))).selection == "parts of a split by episode"


@pytest.mark.parametrize(("lengths", "classes"), [([8] * 10, 12), ([3] * 10, 5), ([60] * 10, 64)])
def test_few_windows_make_fewer_classes(lengths: list[int], classes: int) -> None:
    checkpoint = fit_chunk_tokens(dataset_of(smooth_episodes(3, lengths, seed=0)), ChunkConfig(chunk_length=4))
    assert checkpoint.sizes.num_classes == classes
    warned = [remark for remark in checkpoint.provenance["remarks"] if "classes in place of 64" in remark]
    assert len(warned) == (classes < 64)


@pytest.mark.parametrize("size", [1e-30, 1e13])
@pytest.mark.parametrize("chosen", [ChunkNormaliser.AUTO, ChunkNormaliser.MIN_MAX])
def test_actions_in_units_that_no_bundle_holds_are_refused_before_the_fit(size: float, chosen: ChunkNormaliser) -> None:
    episodes = [episode * np.array([1, size, 1]) for episode in smooth_episodes(3, [60] * 6, seed=0)]
    with pytest.raises(DataError, match=r"dimension 1 lies around .*; expected a scale .*use other units"):
        chunk_normaliser(dataset_of(episodes), chosen)


@pytest.mark.parametrize(("place", "warns"), [(0.0, False), (900.0, False), (1e6, True)])
def test_the_bound_holds_for_a_dimension_far_from_zero_and_a_warning_says_why_it_is_wide(
    place: float, warns: bool
) -> None:
    """Float32 positions lie a sixteenth apart at a million."""
    episodes = [
        np.concatenate((np.sin(np.arange(150)[:, None] / (5 + seed)) + place, episode[:, 1:]), axis=1)
        for seed, episode in enumerate(smooth_episodes(3, [150] * 8, seed=0))
    ]
    dataset = dataset_of(episodes)
    checkpoint = fit_chunk_tokens(dataset, ChunkConfig(chunk_length=4, classes=8, tokens=20))
    model, parts = checkpoint.model(), chunk_parts(dataset)
    actions = torch.from_numpy(np.concatenate([episode[:148] for episode in parts.training.episodes])).reshape(-1, 4, 3)
    for budget in model.code.budgets:
        error = (model.decode(model.encode(actions)[:, :budget]).double() - actions.double()).abs().amax(dim=(0, 1))
        assert (error <= model.bound(budget) * (1 + 1e-6)).all()
    said = [remark for remark in checkpoint.provenance["remarks"] if "as far from zero as it moves" in remark]
    assert len(said) == warns
    assert all("dimension 0 lies" in remark and "rounds its actions by up to 0.0312" in remark for remark in said)
    (last,) = (row for row in report_chunk(checkpoint, parts.judging).prefixes if row.num_tokens == 20)
    assert last.bound is not None
    assert last.bound[0] >= 0.03 if warns else last.bound[0] < 0.03


def test_chunks_of_many_values_make_fewer_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rfsq.calibration.chunk._MOST_VALUES", 5 * 24**2)
    checkpoint = fit_chunk_tokens(dataset_of(smooth_episodes(3, [90] * 6, seed=0)), ChunkConfig(classes=16, tokens=8))
    assert checkpoint.sizes.num_classes == 5 + 3 + 1
    assert any(
        remark.startswith("WARNING: 9 classes in place of 16: of chunks of 24 values, more take too much memory")
        for remark in checkpoint.provenance["remarks"]
    )


def test_a_bimanual_robot_has_all_its_classes() -> None:
    """Of 14 dimensions and 50 steps."""
    assert most_learned(14 * 50) >= 60


@pytest.mark.parametrize("episodes", [1, 3])
def test_few_episodes_serve_for_everything_and_a_warning_says_so(episodes: int) -> None:
    dataset = dataset_of(smooth_episodes(3, [90] * episodes, seed=0))
    parts = chunk_parts(dataset)
    assert parts.training is parts.calibration is parts.judging is dataset
    remarks = fit_chunk_tokens(dataset, SMALL).provenance["remarks"]
    assert any("cannot be split, so the verdict is of the very data" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("action_dim", "chunk_length", "tokens"),
    [(1, 1, 2), (1, 2, 2), (3, 8, 20), (6, 8, 39), (7, 8, 45), (7, 16, 89), (26, 8, 165), (26, 16, 256)],
)
def test_every_value_of_a_chunk_gets_as_many_bits_where_none_are_asked_for(
    action_dim: int, chunk_length: int, tokens: int
) -> None:
    config = ChunkConfig(chunk_length, classes=16, normaliser=ChunkNormaliser.NONE)
    dataset = dataset_of(smooth_episodes(action_dim, [50] * 10, seed=0))
    found = chunk_fitting._sizes(dataset, config)[0]
    assert found.num_tokens == tokens
    most = min(found.most_tokens, 256)
    assert chunk_fitting._sizes(dataset, replace(config, tokens=most))[0].num_tokens == most
    with pytest.raises(SettingsError, match=rf"({most + 1} tokens are more than a chunk .*|expected .*) {most}"):
        chunk_fitting._sizes(dataset, replace(config, tokens=most + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 1000}, "vocabulary is 1000; expected a power of two from 16 to 65,536"),
        ({"vocabulary": 2**17}, "vocabulary is 131072; expected"),
        ({"normaliser": "quantile"}, "normaliser is 'quantile'; expected one of auto, none, min-max, or a JSON file"),
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
    with pytest.raises((CalibrationError, SettingsError, DataError), match=message):
        fit_chunk_tokens(dataset, replace(SMALL, **settings))


def test_actions_that_are_no_numbers_are_refused() -> None:
    (*episodes, broken) = smooth_episodes(3, [50] * 10, seed=0)
    broken[3, 1] = np.nan
    with pytest.raises(DataError, match="step 3, dimension 1: nan"):
        fit_chunk_tokens(dataset_of([*episodes, broken]), SMALL)
