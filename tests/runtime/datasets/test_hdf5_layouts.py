"""HDF5 of demonstrations as it is found in the wild: both readers take the same episodes of it, or refuse it alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.sources import open_source
from tests.runtime.datasets.samples import write_lerobot_v3

LENGTHS = (4, 7, 2, 5, 3, 6, 1, 8, 9, 2, 3, 4)
EPISODES = [
    np.random.default_rng(index).uniform(-1, 1, (length, 3)).astype(np.float32) for index, length in enumerate(LENGTHS)
]


def write(path: Path, **arrays: npt.NDArray[Any]) -> Path:
    """Each array at its place, with slashes written as two underscores."""
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array
    return path


def numbered(pattern: str) -> dict[str, npt.NDArray[Any]]:
    return {pattern.format(index): episode for index, episode in enumerate(EPISODES)}


def robomimic(path: Path) -> Path:
    masks = {"mask__train": [b"demo_10", b"demo_2", b"demo_0"], "mask__valid": [b"demo_1"], "mask__empty": []}
    return write(path, **numbered("data__demo_{}__actions"), **{k: np.array(v, "S8") for k, v in masks.items()})


def maniskill(path: Path) -> Path:
    write(path, **numbered("traj_{}__actions"))
    with h5py.File(path, "a") as file:
        for index, episode in enumerate(EPISODES):
            file[f"traj_{index}/success"] = np.zeros(len(episode), bool)
            file[f"traj_{index}/env_states/actors/cube"] = np.zeros((len(episode) + 1, 13), np.float32)
    return path


def bare(path: Path) -> Path:
    return write(path, **numbered("demo_{}__action"), meta__version=np.array(1))


def aloha_file(path: Path, index: int = 0) -> Path:
    steps = len(EPISODES[index])
    return write(
        path,
        action=EPISODES[index],
        observations__qpos=np.zeros((steps, 3), np.float32),
        observations__images__top=np.zeros((steps, 2, 2, 3), np.uint8),
    )


def aloha_folder(path: Path) -> Path:
    for index in range(len(EPISODES)):
        aloha_file(path / f"episode_{index}.hdf5", index)
    return path


def read_both(path: Path, **arguments: Any) -> tuple[list[npt.NDArray[np.float32]], list[str]]:
    """Episodes and names; both readers agree."""
    dataset = load_actions(path, **arguments)
    source = open_source(path, **arguments)
    reader = source.open(dataset.action_dim)
    try:
        steps = reader.read(0, source.num_steps)
    finally:
        reader.close()
    assert np.array_equal(steps.values, dataset.steps())
    starts = np.flatnonzero(np.diff(steps.episode, prepend=-1))
    assert np.array_equal(starts, np.cumsum([0, *map(len, dataset.episodes[:-1])]))
    return list(dataset.episodes), list(dataset.names)


def refusal(path: Path, **arguments: Any) -> str:
    """What both readers say."""
    with pytest.raises(SourceError) as source:
        open_source(path, **arguments)
    with pytest.raises(DataError) as data:
        load_actions(path, **arguments)
    assert str(source.value) == str(data.value)
    return str(data.value)


@pytest.mark.parametrize(
    ("writer", "name", "names"),
    [
        (robomimic, "a.hdf5", "demo_{}"),
        (bare, "a.h5", "demo_{}"),
        (maniskill, "trajectory.h5", "traj_{}"),
        (aloha_folder, "task", "episode_{}"),
    ],
)
def test_every_layout_gives_its_episodes_in_order(
    writer: Callable[[Path], Path], name: str, names: str, tmp_path: Path
) -> None:
    episodes, found = read_both(writer(tmp_path / name))
    assert all(np.array_equal(*pair) for pair in zip(episodes, EPISODES, strict=True))
    assert found == [names.format(index) for index in range(len(EPISODES))]


def test_a_file_of_aloha_is_one_episode(tmp_path: Path) -> None:
    episodes, names = read_both(aloha_file(tmp_path / "episode_7.hdf5"))
    assert (len(episodes), names) == (1, ["episode_7"])
    assert load_actions(tmp_path / "episode_7.hdf5").tasks == (tmp_path.name,)


def test_episodes_of_one_folder_are_of_one_task(tmp_path: Path) -> None:
    assert set(load_actions(aloha_folder(tmp_path / "fold_the_towel")).tasks) == {"fold_the_towel"}


def test_a_folder_of_files_with_many_episodes_keeps_both_names(tmp_path: Path) -> None:
    maniskill(tmp_path / "all" / "first.h5")
    bare(tmp_path / "all" / "second.hdf5")
    _, names = read_both(tmp_path / "all")
    assert names[:2] == ["first/traj_0", "first/traj_1"]
    assert names[-1] == "second/demo_11"


def test_another_array_is_read_where_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", **numbered("demo_{}__obs__joint_actions"), **numbered("demo_{}__action"))
    with h5py.File(path, "a") as file:
        file["demo_0/obs/joint_actions"][:] = 5
    episodes, _ = read_both(path, key="obs/joint_actions")
    assert (episodes[0] == 5).all()
    assert np.array_equal(episodes[1], EPISODES[1])


# Filter keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["train", "mask/train"])
def test_a_filter_key_chooses_episodes(given: str, tmp_path: Path) -> None:
    path = robomimic(tmp_path / "a.hdf5")
    episodes, names = read_both(path, filter_key=given)
    assert names == ["demo_0", "demo_2", "demo_10"]
    assert all(np.array_equal(episodes[place], EPISODES[index]) for place, index in enumerate((0, 2, 10)))
    assert len(read_both(path)[0]) == len(EPISODES)


def test_filter_keys_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "a.hdf5")
    assert "has no filter key 'test'; found empty, train, valid: choose one" in refusal(path, filter_key="test")
    assert "the filter key 'empty' lists no episodes" in refusal(path, filter_key="empty")
    with h5py.File(path, "a") as file:
        file["mask/other"] = np.array([f"demo_{index}".encode() for index in range(11, 60)])
    message = refusal(path, filter_key="other")
    assert "lists demo_12, demo_13, demo_14, demo_15, demo_16, demo_17 and 42 more, which are not" in message
    assert "has no filter key 'train'; found none" in refusal(bare(tmp_path / "b.h5"), filter_key="train")
    assert "is one episode, and has no filter keys" in refusal(aloha_file(tmp_path / "c.h5"), filter_key="train")
    np.savez(tmp_path / "a.npz", actions=EPISODES[0])
    for function, error in ((load_actions, DataError), (open_source, SourceError)):
        with pytest.raises(error, match="is no HDF5 file, and has no filter keys"):
            function(tmp_path / "a.npz", filter_key="train")  # type: ignore[operator]


def test_a_lerobot_folder_has_no_filter_keys(tmp_path: Path) -> None:
    folder = write_lerobot_v3(tmp_path / "demonstrations", EPISODES)
    assert len(read_both(folder)[0]) == len(EPISODES)
    message = refusal(folder, filter_key="train")
    assert message.startswith("folder demonstrations holds no HDF5 files, and has no filter keys; leave --filter-key")


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_refusal_names_a_few_places_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", **numbered("traj_{}__commands"))
    message = refusal(path)
    assert "holds traj_0, traj_1, traj_10, traj_11, traj_2, traj_3 and 6 more; traj_0 holds commands; " in message
    assert "name the action array with --key" in message
    assert len(read_both(path, key="commands")[0]) == len(EPISODES)


def test_an_episode_without_actions_among_others_is_refused(tmp_path: Path) -> None:
    path = maniskill(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        del file["traj_5/actions"]
    assert "a.h5, traj_5 has no action array; found env_states, success; expected `actions`" in refusal(path)


def test_many_episodes_in_one_row_are_not_taken_for_one(tmp_path: Path) -> None:
    path = write(tmp_path / "d4rl.hdf5", actions=np.zeros((30, 3)), terminals=np.zeros(30), timeouts=np.zeros(30))
    assert "has many episodes in one row (actions beside terminals, timeouts); expected one" in refusal(path)


def test_the_instruction_of_a_file_is_read_as_before(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "a_demo.hdf5")
    assert set(load_actions(path).tasks) == {"a"}
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "lift it"})
    assert set(load_actions(path).tasks) == {"lift it"}
