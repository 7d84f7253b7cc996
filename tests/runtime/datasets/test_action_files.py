"""Files of actions that cannot be taken as they are: both readers refuse them in the same words, and never wait."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime.datasets.array_layouts import table_by_numbers
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.sources import open_source
from tests.runtime.datasets.samples import (
    lerobot_table,
    random_episodes,
    write_hdf5,
    write_lerobot_v2,
    write_lerobot_v3,
    write_npz,
)

LENGTHS = (4, 7, 2)
EPISODES = random_episodes(LENGTHS)
STEPS = np.concatenate(EPISODES)
ENDS = np.cumsum(LENGTHS)
NUMBERS = np.repeat(np.arange(3), LENGTHS)


def refusal(path: Path, **options: Any) -> str:
    """What both readers say."""

    def read() -> None:
        source = open_source(path, **options)
        source.open(3).read(0, source.num_steps)

    with pytest.raises(SourceError) as source:
        read()
    with pytest.raises(DataError) as data:
        load_actions(path, **options)
    assert str(source.value) == str(data.value)
    return str(data.value)


def read_alike(path: Path, **options: Any) -> list[np.ndarray]:
    """The episodes that both readers give."""
    source = open_source(path, **options)
    steps = source.open(3).read(0, source.num_steps)
    episodes = list(load_actions(path, **options).episodes)
    np.testing.assert_array_equal(steps.values, np.concatenate(episodes))
    lengths = np.diff(np.flatnonzero(np.diff(steps.episode, prepend=-1, append=-1)))
    assert lengths.tolist() == [len(episode) for episode in episodes]
    return episodes


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


# Regular files alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "npy", "hdf5", "h5", "parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(suffix: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert f"x.{suffix} is no regular file; expected a" in refusal(path)


def test_a_pipe_of_tensors_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt is no regular file; expected a \.pt file"):
        load_actions(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("write", "pattern"),
    [
        (write_lerobot_v2, "data/*/*.parquet"),
        (write_lerobot_v2, "meta/info.json"),
        (write_lerobot_v2, "meta/episodes.jsonl"),
        (write_lerobot_v3, "meta/episodes/*/*.parquet"),
        (lambda folder, _: folder.mkdir() or write_hdf5(folder / "x.hdf5", EPISODES).parent, "x.hdf5"),
    ],
)
def test_a_pipe_in_a_folder_is_refused_without_waiting(
    write: Callable[[Path, Any], Path], pattern: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "x", EPISODES)
    file = sorted(folder.glob(pattern))[-1]
    file.unlink()
    os.mkfifo(file)
    assert "regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.parquet"])
def test_tasks_are_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = write_lerobot_v2(tmp_path / "x", EPISODES)
    os.mkfifo(folder / "meta" / name)
    with pytest.raises(DataError, match="is no regular file"):
        load_actions(folder)


@pytest.mark.parametrize("name", ["x.npz", "x.hdf5", "x.parquet"])
def test_a_reader_does_not_wait_for_what_took_the_place_of_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        pq.write_table(lerobot_table(EPISODES), path)
    else:
        (write_npz if name == "x.npz" else write_hdf5)(path, EPISODES)
    reader = open_source(path).open(3)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="regular file"):
        reader.read(0, 2)


# Which array is the actions -------------------------------------------------------------------------------------------


def test_an_array_that_is_not_called_actions_has_to_be_named(tmp_path: Path) -> None:
    path = npz(tmp_path, observations=STEPS)
    assert "x.npz has no action array; found observations; expected `actions`" in refusal(path)
    np.testing.assert_array_equal(read_alike(path, key="observations")[0], STEPS)


def test_numbered_arrays_of_anything_but_episodes_have_to_be_named(tmp_path: Path) -> None:
    path = npz(tmp_path, **{f"states_{index}": episode for index, episode in enumerate(EPISODES)}, notes=np.zeros(3))
    assert "has no action array; found notes, states_0, states_1, states_2" in refusal(path)
    found = read_alike(path, key="states")
    assert [len(episode) for episode in found] == list(LENGTHS)
    assert "x.npz has no 'state'; found" in refusal(path, key="state")


def test_arrays_that_nobody_named_may_be_anything_where_they_are_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", STEPS)
    np.testing.assert_array_equal(read_alike(tmp_path / "x.npz")[0], STEPS)
    np.savez(tmp_path / "x.npz", STEPS, STEPS)
    assert "has no action array; found arr_0, arr_1" in refusal(tmp_path / "x.npz")
    assert len(read_alike(tmp_path / "x.npz", key="arr")) == 2


CANDIDATES = [("actions", "action"), ("action", "data/actions"), ("data/actions", "data/action")]


@pytest.mark.parametrize("names", CANDIDATES)
def test_two_action_arrays_that_differ_are_refused_with_both_named(names: tuple[str, str], tmp_path: Path) -> None:
    path = npz(tmp_path, **dict(zip(names, (STEPS, STEPS + 1), strict=True)))
    assert f"x.npz has {names[0]!r} and {names[1]!r}, which differ; expected one array of actions" in refusal(path)
    np.testing.assert_array_equal(read_alike(path, key=names[1])[0], STEPS + 1)


@pytest.mark.parametrize("other", [STEPS[:5], STEPS.astype(np.float64), np.zeros(3), np.array({"by": "me"}, object)])
def test_arrays_of_other_shapes_or_types_differ(other: np.ndarray, tmp_path: Path) -> None:
    assert "which differ" in refusal(npz(tmp_path, actions=STEPS, action=other))


def test_two_action_arrays_that_hold_the_same_are_one(tmp_path: Path) -> None:
    path = npz(tmp_path, actions=STEPS, action=STEPS, episode_ends=ENDS)
    assert len(read_alike(path)) == 3


def test_data_are_actions_only_where_nothing_has_a_clearer_name(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_alike(npz(tmp_path, data=STEPS))[0], STEPS)
    np.testing.assert_array_equal(read_alike(npz(tmp_path, data=STEPS + 1, actions=STEPS))[0], STEPS)


def test_two_action_arrays_in_an_hdf5_file_are_refused_unless_they_hold_the_same(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", EPISODES)
    with h5py.File(path, "a") as file:
        for index, episode in enumerate(EPISODES):
            file[f"data/demo_{index}/action"] = episode.astype(np.float64)
    assert len(read_alike(path)) == 3
    with h5py.File(path, "a") as file:
        file["data/demo_1/action"][3, 1] += 1
    assert "x.hdf5, data/demo_1 has 'actions' and 'action', which differ" in refusal(path)
    assert len(read_alike(path, key="action")) == 3


def test_tensors_are_chosen_as_arrays_are(tmp_path: Path) -> None:
    def refused(content: object, message: str) -> None:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(DataError, match=message):
            load_actions(tmp_path / "x.pt")

    steps = torch.from_numpy(STEPS)
    refused({"observations": steps}, r"has no action array; found observations; .*--key")
    refused({"actions": steps, "action": steps + 1}, "'actions' and 'action', which differ")
    refused({"actions": [steps, steps], "action": [steps, steps + 1]}, "'actions' and 'action', which differ")
    refused({"actions": [steps, None, steps]}, "'actions' has a NoneType at place 1; expected tensors alone")
    refused({"actions": steps, "episode_ends": torch.tensor([4, 9]), "episode_index": torch.arange(13)}, "for 13 steps")
    for other in ([steps], steps):
        refused(
            {"demo_0": [steps, steps], "demo_1": other},
            r"'demo_0' is a list; expected a tensor .*torch.cat",
        )
        refused({"demo_0": steps, "demo_1": [steps]}, "'demo_1' is a list")
    refused({"actions": steps, "episode_ends": [4, 9]}, "episode_ends of 2 episodes for 13 steps")
    refused({"actions": steps, "episode_index": 3}, r"'episode_index' is int64 \[\]; expected integers in one")


def test_lists_of_numbers_beside_tensors_say_where_episodes_end(tmp_path: Path) -> None:
    for ends in (ENDS.tolist(), list(torch.from_numpy(ENDS))):
        torch.save({"actions": torch.from_numpy(STEPS), "episode_ends": ends}, tmp_path / "x.pt")
        assert [len(episode) for episode in load_actions(tmp_path / "x.pt").episodes] == list(LENGTHS)


def test_a_file_that_ends_early_is_called_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", STEPS)
    source = open_source(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:150])
    with pytest.raises(SourceError, match=r"x\.npy cannot be read as a file of arrays"):
        source.open(3).read(0, 13)


# Where episodes end ---------------------------------------------------------------------------------------------------


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "ends and numbers": {"episode_ends": [4, 13], "episode_index": NUMBERS},
    "two kinds of ends": {"episode_ends": ENDS, "meta/episode_ends": [5, 11, 13]},
    "the shape and ends": {"actions": np.stack([EPISODES[0]] * 3), "episode_ends": [5, 12]},
    "the shape and numbers": {"actions": np.stack([EPISODES[0]] * 3), "episode_index": np.arange(12)},
}


@pytest.mark.parametrize("arrays", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_statements_about_episodes_that_contradict_each_other_are_refused(
    arrays: dict[str, Any], tmp_path: Path
) -> None:
    message = refusal(npz(tmp_path, **{"actions": STEPS, **arrays}))
    assert "say different ends of episodes" in message
    assert "save the file without the wrong one" in message


def test_statements_about_episodes_that_agree_are_taken(tmp_path: Path) -> None:
    path = npz(tmp_path, actions=STEPS, episode_ends=ENDS, episode_index=np.repeat([5, 7, 9], LENGTHS))
    assert len(read_alike(path)) == 3
    stacked = np.stack([EPISODES[0]] * 3)
    assert len(read_alike(npz(tmp_path, actions=stacked, episode_ends=[4, 8, 12]))) == 3


@pytest.mark.parametrize("number", [2**63, 2**63 + 5, 2**64 - 1])
def test_episode_numbers_beyond_int64_are_refused(number: int, tmp_path: Path) -> None:
    numbers = np.full(13, number, np.uint64)
    message = f"holds {number}; expected integers below 2**63"
    assert f"x.npz: episode_index {message}" in refusal(npz(tmp_path, actions=STEPS, episode_index=numbers))
    assert message in refusal(npz(tmp_path, actions=STEPS, episode_ends=np.array([number, 13], np.uint64)))
    for name in ("episode_index", "frame_index"):
        table = lerobot_table([STEPS])
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(numbers))
        pq.write_table(table, tmp_path / "x.parquet")
        assert f"x.parquet: column {name!r} {message}" in refusal(tmp_path / "x.parquet")


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(1, 8))
def test_episodes_begin_where_the_number_rises_however_it_is_read(numbers: list[int], slice_steps: int) -> None:
    expected = np.array(sorted(set(numbers)), np.int64)
    ascending = np.repeat(expected, 3)

    def slices(values: np.ndarray) -> Iterator[np.ndarray]:
        return (values[row : row + slice_steps] for row in range(0, len(values), slice_steps))

    table = table_by_numbers(slices(ascending), "x")
    assert table.starts.tolist() == list(range(0, len(ascending) + 1, 3))
    assert table.numbers.tolist() == expected.tolist()
    if len(ascending) > 3:
        with pytest.raises(SourceError, match="falls at step 3 of the file"):
            table_by_numbers(slices(ascending[::-1]), "x")


# HDF5: what is not in the file ----------------------------------------------------------------------------------------


def hdf5(folder: Path, write: Callable[[h5py.File], object]) -> Path:
    """A file whose second episode is written by `write`."""
    with h5py.File(folder / "other.h5", "w") as file:
        file["actions"] = EPISODES[1]
        file["demo_1/actions"] = EPISODES[1]
    path = folder / "x.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = EPISODES[0]
        write(file)
    return path


def raw_storage(file: h5py.File) -> None:
    raw = str(Path(file.filename).with_name("raw.bin"))
    file.create_dataset("data/demo_1/actions", data=EPISODES[1], external=[(raw, 0, h5py.h5f.UNLIMITED)])


def cut_raw_storage(file: h5py.File) -> None:
    raw_storage(file)
    file.flush()
    raw = Path(file.filename).with_name("raw.bin")
    raw.write_bytes(raw.read_bytes()[:20])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(EPISODES[1].shape, np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "actions", EPISODES[1].shape)
    file.create_virtual_dataset("data/demo_1/actions", layout)


def link(place: str, target: object) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        file[place] = target

    return write


def soft_link_to_a_link(file: h5py.File) -> None:
    file["elsewhere"] = h5py.ExternalLink("other.h5", "demo_1")
    file["data/demo_1"] = h5py.SoftLink("/elsewhere")


def partly_written(file: h5py.File) -> None:
    array = file.create_dataset("data/demo_1/actions", (100, 3), np.float32, chunks=(10, 3))
    array[:90] = 1


def circle(file: h5py.File) -> None:
    file["data/demo_1"] = h5py.SoftLink("/around")
    file["around"] = h5py.SoftLink("/data/demo_1")


OUTSIDE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "raw storage": (raw_storage, "data/demo_1/actions has its numbers elsewhere, in "),
    "raw storage that was cut": (cut_raw_storage, "data/demo_1/actions has its numbers elsewhere, in "),
    "a virtual array": (virtual, "data/demo_1/actions has its numbers elsewhere, in other.h5; expected all in this"),
    "a link to an episode elsewhere": (
        link("data/demo_1", h5py.ExternalLink("other.h5", "demo_1")),
        "data/demo_1 is a link to 'demo_1' in another file, 'other.h5'; expected all in this file",
    ),
    "a link to an array elsewhere": (
        link("data/demo_1/actions", h5py.ExternalLink("other.h5", "actions")),
        "data/demo_1/actions is a link to 'actions' in another file, 'other.h5'",
    ),
    "a link to such a link": (
        soft_link_to_a_link,
        "x.hdf5, elsewhere is a link to 'demo_1' in another file, 'other.h5'",
    ),
    "never written": (
        lambda file: file.create_dataset("data/demo_1/actions", (20, 3), np.float32),
        "data/demo_1/actions has room for [20, 3], but not all was written; expected every step",
    ),
    "never written in chunks": (
        lambda file: file.create_dataset("data/demo_1/actions", (20, 3), np.float32, chunks=(7, 3)),
        "data/demo_1/actions has room for [20, 3], but not all was written",
    ),
    "written in part": (partly_written, "data/demo_1/actions has room for [100, 3], but not all was written"),
    "no shape": (
        link("data/demo_1/actions", h5py.Empty(np.float32)),
        "data/demo_1/actions is empty and has no shape; expected an array",
    ),
    "a link to nothing": (
        link("data/demo_1/actions", h5py.SoftLink("/gone")),
        "data/demo_1/actions is a link to '/gone', which is not in the file",
    ),
    "a link to no episode": (
        link("data/demo_1", h5py.SoftLink("gone")),
        "data/demo_1 is a link to 'gone', which is not in the file",
    ),
    "a link into an array": (
        link("data/demo_1", h5py.SoftLink("/data/demo_0/actions/x")),
        "data/demo_1 is a link to '/data/demo_0/actions/x', which is not in the file",
    ),
    "links in a circle": (circle, "and so on without an end"),
}


@pytest.mark.parametrize(("write", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_actions_that_are_not_in_the_file_are_refused(
    write: Callable[[h5py.File], object], message: str, tmp_path: Path
) -> None:
    assert message in refusal(hdf5(tmp_path, write))


def test_a_link_to_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    path = hdf5(tmp_path, link("data/demo_1", h5py.ExternalLink("pipe.h5", "demo_1")))
    assert "in another file, 'pipe.h5'" in refusal(path)


@pytest.mark.parametrize("target", ["/spare/demo_1", "../x", "demo_9"])
def test_links_within_the_file_are_followed(target: str, tmp_path: Path) -> None:
    def write(file: h5py.File) -> None:
        file["spare/demo_1/actions"] = EPISODES[1]
        file["data/demo_1"] = h5py.SoftLink("/spare/demo_1")
        # Nobody asks for these.
        file["data_of_others"] = h5py.ExternalLink("gone.h5", "/")
        file["data/demo_0/states"] = h5py.SoftLink(target)

    found = read_alike(hdf5(tmp_path, write))
    np.testing.assert_array_equal(found[1], EPISODES[1])


@pytest.mark.parametrize(
    "options", [{}, {"chunks": (3, 3)}, {"chunks": (3, 3), "compression": "gzip"}, {"maxshape": (None, 3)}]
)
def test_however_numbers_are_stored_in_the_file_they_are_read(options: dict[str, Any], tmp_path: Path) -> None:
    found = read_alike(
        hdf5(tmp_path, lambda file: file.create_dataset("data/demo_1/actions", data=EPISODES[1], **options))
    )
    np.testing.assert_array_equal(found[1], EPISODES[1])


def test_a_filter_key_has_to_be_a_list_that_was_written(tmp_path: Path) -> None:
    def write(file: h5py.File) -> None:
        file["data/demo_1/actions"] = EPISODES[1]
        file["mask/group/inner"] = np.zeros(3)
        file.create_dataset("mask/unwritten", (2,), "S8")
        file["mask/outside"] = h5py.ExternalLink("other.h5", "actions")

    path = hdf5(tmp_path, write)
    assert "x.hdf5, mask/group is a group; expected a list of names" in refusal(path, filter_key="group")
    assert "x.hdf5, mask/unwritten has room for [2], but not all was written" in refusal(path, filter_key="unwritten")
    assert "mask/outside is a link to 'actions' in another file" in refusal(path, filter_key="outside")


# LeRobot --------------------------------------------------------------------------------------------------------------


def test_a_folder_that_lacks_steps_calibrates_nothing_either(tmp_path: Path) -> None:
    folder = write_lerobot_v2(tmp_path / "x", EPISODES)
    sorted(folder.glob("data/*/*.parquet"))[-1].unlink()
    assert "meta/info.json (total_frames) states 13 steps, the files in data/ have 11" in refusal(folder)
