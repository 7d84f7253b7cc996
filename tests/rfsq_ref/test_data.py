"""What `rfsq_ref.data` promises: every format gives the same episodes, nothing unusable passes, splits are honest."""

import doctest
import hashlib
import io
import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rfsq.rfsq_ref.data import (
    DEMONSTRATIONS,
    SPLIT_SHARES,
    ActionDataset,
    EpisodeSplit,
    FloatArray,
    chunk,
    load_actions,
    load_demonstrations,
    split_episodes,
)
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime.bundle.paths import counted

ROOT = Path(__file__).parents[2]
# Twelve episodes, so that demo_10 and demo_11 show whether names are sorted as numbers.
LENGTHS = (5, 3, 4, 6, 3, 5, 4, 3, 7, 3, 4, 8)
TEXTS = ("pick up the bowl", "open the drawer")


def episodes_of(lengths: tuple[int, ...], action_dim: int = 7, seed: int = 0) -> list[FloatArray]:
    generator = np.random.default_rng(seed)
    return [generator.uniform(-1, 1, (length, action_dim)).astype(np.float32) for length in lengths]


EPISODES = episodes_of(LENGTHS)
TASK_OF = [index % len(TEXTS) for index in range(len(EPISODES))]


def assert_holds(dataset: ActionDataset, expected: list[FloatArray]) -> None:
    assert len(dataset.episodes) == len(expected)
    for found, wanted in zip(dataset.episodes, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def dataset_of(tasks: list[str]) -> ActionDataset:
    """One-step episodes whose only number is their index."""
    episodes = tuple(np.full((1, 1), index, np.float32) for index in range(len(tasks)))
    return ActionDataset(episodes, tuple(f"demo_{index}" for index in range(len(tasks))), tuple(tasks), "made up")


# Writers of every format ---------------------------------------------------------------------------------------------


def write_hdf5(path: Path, episodes: list[npt.NDArray[Any]], name: str = "actions", **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs.update({key: json.dumps(value) for key, value in attributes.items()})
        for index, episode in enumerate(episodes):
            group.create_dataset(f"demo_{index}/{name}", data=episode)
            group.create_dataset(f"demo_{index}/obs/joint_states", data=np.zeros((len(episode), 9)))
        file.create_dataset("mask/train", data=np.zeros(3))
    return path


def lerobot_table(episodes: dict[int, FloatArray], tasks: list[int] = TASK_OF, fixed_size: bool = True) -> pa.Table:
    """The columns LeRobot writes, and one that must not be read."""
    actions = np.concatenate(list(episodes.values()))
    lengths = [len(episode) for episode in episodes.values()]
    width = actions.shape[1]
    kind = pa.list_(pa.float32(), width) if fixed_size else pa.list_(pa.float32())
    return pa.table(
        {
            "observation.state": pa.array([[0.0]] * len(actions)),
            "action": pa.array(actions.tolist(), kind),
            "action.delta": pa.array([[1.0]] * len(actions)),
            "timestamp": pa.array(np.zeros(len(actions), np.float32)),
            "frame_index": pa.array(np.concatenate([np.arange(length) for length in lengths])),
            "episode_index": pa.array(np.repeat(list(episodes), lengths)),
            "index": pa.array(np.arange(len(actions))),
            "task_index": pa.array(np.repeat([tasks[index] for index in episodes], lengths)),
        }
    )


def write_meta(folder: Path, version: str) -> None:
    (folder / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "total_episodes": len(EPISODES), "features": {"action": {"shape": [7]}}}
    (folder / "meta/info.json").write_text(json.dumps(info))


def write_lerobot_v2(folder: Path, episodes: list[FloatArray] = EPISODES) -> Path:
    """One file per episode, two to a chunk folder; JSON lines beside them."""
    write_meta(folder, "v2.1")
    for index, episode in enumerate(episodes):
        path = folder / f"data/chunk-{index // 2:03d}/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(lerobot_table({index: episode}, fixed_size=False), path)
    lines = [json.dumps({"task_index": index, "task": text}) for index, text in enumerate(TEXTS)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"episode_index": index, "length": len(rows)}) for index, rows in enumerate(episodes)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_lerobot_v3(folder: Path, text_column: str = "__index_level_0__") -> Path:
    """Many episodes per file; the task texts in the index that pandas wrote."""
    write_meta(folder, "v3.0")
    for number, span in enumerate((range(7), range(7, len(EPISODES)))):
        path = folder / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(lerobot_table({index: EPISODES[index] for index in span}), path)
    # Not in the order of their numbers.
    tasks = pa.table({"task_index": [1, 0], text_column: [TEXTS[1], TEXTS[0]]})
    pq.write_table(tasks, folder / "meta/tasks.parquet")
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    listed = pa.table({"episode_index": range(len(EPISODES)), "length": LENGTHS})
    pq.write_table(listed, folder / "meta/episodes/chunk-000/file-000.parquet")
    return folder


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def ours(path: Path, **more: Any) -> Path:
    arrays = {"actions": np.concatenate(EPISODES), "episode_ends": np.cumsum(LENGTHS), **more}
    return npz(path, **arrays)


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# Every format gives the same episodes --------------------------------------------------------------------------------

VARYING_LENGTHS: dict[str, Callable[[Path], Path]] = {
    "our npz": lambda tmp: ours(tmp / "a.npz", metadata="{}"),
    "replay buffer": lambda tmp: npz(
        tmp / "a.npz", **{"data/action": np.concatenate(EPISODES), "meta/episode_ends": np.cumsum(LENGTHS)}
    ),
    "npz with episode_index": lambda tmp: npz(
        tmp / "a.npz", actions=np.concatenate(EPISODES), episode_index=np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    ),
    "npz of numbered arrays": lambda tmp: npz(
        tmp / "a.npz", **{f"demo_{index}": episode for index, episode in enumerate(EPISODES)}
    ),
    "float64 npz": lambda tmp: npz(
        tmp / "a.npz", actions=np.concatenate(EPISODES).astype(np.float64), episode_ends=np.cumsum(LENGTHS)
    ),
    "pt list": lambda tmp: torch_file(tmp / "a.pt", [torch.from_numpy(episode) for episode in EPISODES]),
    "pt dict of a list": lambda tmp: torch_file(
        tmp / "a.pt", {"data": [torch.from_numpy(episode) for episode in EPISODES], "fps": 20}
    ),
    "hdf5": lambda tmp: write_hdf5(tmp / "a.hdf5", EPISODES),
    "h5": lambda tmp: write_hdf5(tmp / "a.h5", EPISODES),
    "LeRobot v2": lambda tmp: write_lerobot_v2(tmp / "a"),
    "LeRobot v3": lambda tmp: write_lerobot_v3(tmp / "a"),
}


@pytest.mark.parametrize("write", VARYING_LENGTHS.values(), ids=VARYING_LENGTHS)
def test_every_format_gives_the_same_episodes(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    dataset = load_actions(write(tmp_path))
    assert_holds(dataset, EPISODES)
    assert dataset.action_dim == 7
    assert dataset.num_steps == sum(LENGTHS)
    assert len(set(dataset.names)) == len(EPISODES)
    assert dataset.source.partition(".")[0] == "a"


STACKED = np.stack(episodes_of((4,) * 3))
EQUAL_LENGTHS: dict[str, Callable[[Path], object]] = {
    "a.npz": lambda path: np.savez(path, actions=STACKED),
    "a.npy": lambda path: np.save(path, STACKED),
    "a.pt": lambda path: torch.save(torch.from_numpy(STACKED), path),
}


@pytest.mark.parametrize(("name", "save"), EQUAL_LENGTHS.items(), ids=EQUAL_LENGTHS)
def test_three_dimensions_are_episodes_of_equal_length(
    tmp_path: Path, name: str, save: Callable[[Path], object]
) -> None:
    save(tmp_path / name)
    assert_holds(load_actions(tmp_path / name), list(STACKED))


SINGLE: dict[str, Callable[[Path], object]] = {
    "actions.npz": lambda path: np.savez(path, actions=EPISODES[0], states=np.zeros((9, 9))),
    "nameless.npz": lambda path: np.savez(path, EPISODES[0]),
    "two.npy": lambda path: np.save(path, np.asfortranarray(EPISODES[0])),
    "tensor.pt": lambda path: torch.save(torch.from_numpy(EPISODES[0]).requires_grad_(), path),
    "actions.pt": lambda path: torch.save({"actions": torch.from_numpy(EPISODES[0]), "x": torch.zeros(3)}, path),
    "big_endian.NPY": lambda path: path.open("wb").write(npy_bytes(EPISODES[0].astype(">f4"))),
}


def npy_bytes(array: FloatArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "save"), SINGLE.items(), ids=SINGLE)
def test_two_dimensions_are_one_episode(tmp_path: Path, name: str, save: Callable[[Path], object]) -> None:
    save(tmp_path / name)
    assert_holds(load_actions(tmp_path / name), EPISODES[:1])


def test_bfloat16_tensors_are_widened(tmp_path: Path) -> None:
    tensor = torch.from_numpy(EPISODES[0]).to(torch.bfloat16)
    assert_holds(load_actions(torch_file(tmp_path / "a.pt", tensor)), [tensor.float().numpy()])


def test_steps_of_interleaved_episodes_are_refused(tmp_path: Path) -> None:
    """Where many would read them in slices, nobody could."""
    actions = np.arange(10, dtype=np.float32)[:, None]
    with pytest.raises(DataError, match="episode_index falls at step 1 of the file"):
        load_actions(npz(tmp_path / "a.npz", actions=actions, episode_index=np.array([3, 1] * 5)))


KEYED: dict[str, Callable[[Path], object]] = {
    "a.npz": lambda path: np.savez(path, relative=EPISODES[0], actions=EPISODES[1]),
    "a.pt": lambda path: torch.save({"relative": torch.from_numpy(EPISODES[0]), "actions": torch.zeros(2, 2)}, path),
    "list.pt": lambda path: torch.save({"relative": [torch.from_numpy(EPISODES[0])], "actions": torch.zeros(2)}, path),
    "a.hdf5": lambda path: write_hdf5(path, EPISODES[:1], name="relative"),
    "a.parquet": lambda path: pq.write_table(
        lerobot_table({0: EPISODES[0]}).rename_columns(
            ["s", "relative", "action", "t", "frame_index", "episode_index", "i", "task_index"]
        ),
        path,
    ),
}


@pytest.mark.parametrize(("name", "save"), KEYED.items(), ids=KEYED)
def test_key_names_the_action_array(tmp_path: Path, name: str, save: Callable[[Path], object]) -> None:
    save(tmp_path / name)
    assert_holds(load_actions(tmp_path / name, key="relative"), EPISODES[:1])


# Names and tasks -----------------------------------------------------------------------------------------------------


def test_names_are_in_natural_order(tmp_path: Path) -> None:
    assert load_actions(write_hdf5(tmp_path / "a.hdf5", EPISODES)).names == tuple(f"demo_{i}" for i in range(12))


def test_our_layout_names_the_tasks(tmp_path: Path) -> None:
    dataset = load_actions(ours(tmp_path / "a.npz", task_index=TASK_OF, task_names=np.array(TEXTS)))
    assert dataset.tasks == tuple(TEXTS[index] for index in TASK_OF)


def test_unknown_tasks_are_empty_and_unnamed_ones_numbered(tmp_path: Path) -> None:
    assert set(load_actions(ours(tmp_path / "a.npz")).tasks) == {""}
    assert load_actions(ours(tmp_path / "b.npz", task_index=TASK_OF)).tasks == tuple(f"task_{i}" for i in TASK_OF)


@pytest.mark.parametrize(
    "write",
    [
        write_lerobot_v2,
        write_lerobot_v3,
        lambda folder: write_lerobot_v3(folder, text_column="task"),
    ],
    ids=["v2", "v3", "v3 with a named index"],
)
def test_lerobot_tasks_are_looked_up_by_number(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    dataset = load_actions(write(tmp_path / "dataset"))
    assert dataset.tasks == tuple(TEXTS[index] for index in TASK_OF)
    assert dataset.names == tuple(f"episode_{index}" for index in range(len(EPISODES)))
    assert dataset.source == "dataset"


def test_a_single_parquet_file_is_enough(tmp_path: Path) -> None:
    pq.write_table(lerobot_table(dict(enumerate(EPISODES))), tmp_path / "a.parquet", row_group_size=7)
    dataset = load_actions(tmp_path / "a.parquet")
    assert_holds(dataset, EPISODES)
    assert set(dataset.tasks) == {"task_0", "task_1"}


def test_parquet_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    table = lerobot_table(dict(enumerate(EPISODES)))
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    pq.write_table(shuffled, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: episode 1, step 1 follows episode 5, step 4; expected ascending"):
        load_actions(tmp_path / "a.parquet")


def test_only_the_needed_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image columns are a thousand times larger than actions."""
    pq.write_table(lerobot_table({0: EPISODES[0]}), tmp_path / "a.parquet")
    columns_read: set[str] = set()
    read, iter_batches = pq.ParquetFile.read, pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: Any, **options: Any) -> pa.Table:
        table = read(self, *args, **options)
        columns_read.update(table.column_names)
        return table

    def spy_on_batches(self: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(self, *args, **options):
            columns_read.update(batch.schema.names)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy_on_batches)
    load_actions(tmp_path / "a.parquet")
    assert columns_read == {"action", "episode_index", "frame_index", "task_index"}


def test_parquet_needs_neither_frames_nor_tasks(tmp_path: Path) -> None:
    table = lerobot_table(dict(enumerate(EPISODES))).select(["action", "episode_index"])
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = load_actions(tmp_path / "a.parquet")
    assert_holds(dataset, EPISODES)
    assert set(dataset.tasks) == {""}


def test_a_one_dimensional_action_is_a_plain_number(tmp_path: Path) -> None:
    table = pa.table({"action": pa.array([1.0, 2.0], pa.float32()), "episode_index": [0, 0]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert_holds(load_actions(tmp_path / "a.parquet"), [np.array([[1], [2]], np.float32)])


@pytest.mark.parametrize(
    ("attributes", "task"),
    [
        ({"problem_info": {"language_instruction": '"open the drawer"'}, "env_args": {"env_name": "X"}}, TEXTS[1]),
        ({"problem_info": {"language_instruction": TEXTS[1].split()}}, TEXTS[1]),
        ({"env_args": {"env_name": "Lift"}}, "Lift"),
        ({"env_args": "not an object"}, "put_the_bowl"),
        ({}, "put_the_bowl"),
    ],
    ids=["LIBERO", "LIBERO words", "robomimic", "unusable", "file name"],
)
def test_hdf5_task(tmp_path: Path, attributes: dict[str, Any], task: str) -> None:
    dataset = load_actions(write_hdf5(tmp_path / "put_the_bowl_demo.hdf5", EPISODES[:2], **attributes))
    assert dataset.tasks == (task, task)


def test_a_libero_folder_has_one_task_per_file(tmp_path: Path) -> None:
    suite = tmp_path / "libero_goal"
    suite.mkdir()
    write_hdf5(suite / "open_demo.hdf5", EPISODES[:2])
    write_hdf5(suite / "close_demo.h5", EPISODES[2:4])
    (suite / "readme.txt").write_text("not data")
    dataset = load_actions(suite)
    assert_holds(dataset, EPISODES[2:4] + EPISODES[:2])
    assert dataset.tasks == ("close", "close", "open", "open")
    assert dataset.names == ("close_demo/demo_0", "close_demo/demo_1", "open_demo/demo_0", "open_demo/demo_1")


# What a dataset promises ---------------------------------------------------------------------------------------------


def test_episodes_are_read_only_contiguous_float32() -> None:
    original = np.asfortranarray(np.zeros((3, 2)))
    (episode,) = ActionDataset((original,), ("demo_0",), ("",), "made up").episodes
    assert (episode.dtype, episode.flags.c_contiguous, episode.flags.writeable) == (np.float32, True, False)
    original[:] = 1
    assert not episode.any(), "the dataset must not change with the array it was made from"


def test_steps_are_all_episodes_one_after_the_other(tmp_path: Path) -> None:
    steps = load_actions(ours(tmp_path / "a.npz")).steps()
    np.testing.assert_array_equal(steps, np.concatenate(EPISODES))
    assert steps.dtype == np.float32


def test_select_keeps_order_names_and_tasks() -> None:
    chosen = dataset_of(["a", "b", "c"]).select([2, 0])
    assert (chosen.names, chosen.tasks) == (("demo_2", "demo_0"), ("c", "a"))
    assert_holds(chosen, [np.array([[2]], np.float32), np.array([[0]], np.float32)])


def test_sha256_is_that_of_shapes_and_bytes() -> None:
    dataset = ActionDataset((np.array([[1, 2]], np.float32),), ("demo_0",), ("",), "made up")
    assert dataset.sha256 == hashlib.sha256(b"1x2;" + b"\x00\x00\x80\x3f\x00\x00\x00\x40").hexdigest()


@pytest.mark.parametrize(
    "other",
    [[np.zeros((4, 2))], [np.zeros((2, 4))], [np.zeros((1, 2)), np.zeros((3, 2))], [np.array([[0, 0], [0, 1.0]] * 2)]],
    ids=["shape", "transposed", "cut elsewhere", "value"],
)
def test_sha256_tells_datasets_apart(other: list[FloatArray]) -> None:
    def sha256(*episodes: FloatArray) -> str:
        return ActionDataset(episodes, ("x",) * len(episodes), ("",) * len(episodes), "made up").sha256

    reference = sha256(np.zeros((2, 2)), np.zeros((2, 2)))
    assert sha256(*other) != reference
    assert sha256(np.zeros((2, 2)), np.zeros((2, 2), np.float32)) == reference


def test_source_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hdf5(tmp_path / "a.hdf5", EPISODES[:1])
    monkeypatch.chdir(tmp_path)
    assert load_actions(".").source == tmp_path.name
    assert load_actions(tmp_path / "a.hdf5").source == "a.hdf5"


# What is refused, and how the refusal helps --------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated(path: Path) -> Path:
    return write_bytes(path, path.read_bytes()[: path.stat().st_size // 2])


def broken(value: float) -> list[FloatArray]:
    episodes = [episode.copy() for episode in EPISODES]
    episodes[3][2, 1] = value
    return episodes


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def hdf5_without_data(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["trajectories"] = np.zeros((3, 7))
    return path


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def lerobot_with_two_widths(folder: Path) -> Path:
    write_lerobot_v2(folder)
    path = folder / "data/chunk-001/episode_000003.parquet"
    pq.write_table(lerobot_table({3: episodes_of((LENGTHS[3],), 6)[0]}, fixed_size=False), path)
    return folder


def lerobot_with_a_copy(folder: Path) -> Path:
    write_lerobot_v2(folder)
    (folder / "meta/episodes.jsonl").unlink()
    first = folder / "data/chunk-000/episode_000000.parquet"
    return write_bytes(first.with_name("episode_000000 (copy).parquet"), first.read_bytes()).parents[2]


def lerobot_with_bad_tasks(folder: Path, content: str) -> Path:
    write_lerobot_v2(folder)
    (folder / "meta/tasks.jsonl").write_text(content)
    return folder


RAGGED = [[0.0] * 7, [0.0] * 6]
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing file": (lambda tmp: tmp / "a.npz", r"a\.npz does not exist"),
    "unknown suffix": (lambda tmp: write_bytes(tmp / "a.csv", b"1,2"), r"suffix '\.csv'; expected \.npz"),
    "folder of something else": (
        lambda tmp: folder_with(tmp / "a", "x.csv"),
        r"holds x\.csv; expected .*a folder of HDF5 files",
    ),
    "empty folder": (lambda tmp: folder_with(tmp / "a"), "holds nothing"),
    **{
        f"empty {suffix}": (lambda tmp, suffix=suffix: write_bytes(tmp / f"a.{suffix}", b""), r"is empty \(0 bytes\)")
        for suffix in ("npz", "npy", "pt", "hdf5", "parquet")
    },
    **{
        f"not really {suffix}": (
            lambda tmp, suffix=suffix: write_bytes(tmp / f"a.{suffix}", b"no such thing" * 20),
            rf"a\.{suffix} (cannot be read as|starts with|is damaged)",
        )
        for suffix in ("npz", "npy", "pt", "hdf5", "parquet")
    },
    "Git LFS pointer": (
        lambda tmp: write_bytes(tmp / "a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "half an npz": (lambda tmp: truncated(ours(tmp / "a.npz")), "cannot be read as a .npz file"),
    "half an hdf5": (lambda tmp: truncated(write_hdf5(tmp / "a.hdf5", EPISODES)), "cannot be read as an HDF5 file"),
    "pickle as npz": (lambda tmp: write_bytes(tmp / "a.npz", pickle.dumps([1])), "pickle, which could run code"),
    "pickle as npy": (lambda tmp: write_bytes(tmp / "a.npy", pickle.dumps([1])), "pickle, which could run code"),
    "objects in npz": (lambda tmp: npz(tmp / "a.npz", actions=np.array([{}, 1], object)), "array of Python objects"),
    "objects in pt": (
        lambda tmp: torch_file(tmp / "a.pt", {"actions": Path("x")}),
        "more than tensors.*could run code",
    ),
    "number in pt": (lambda tmp: torch_file(tmp / "a.pt", 3), "holds a int; expected a tensor"),
    "no action array": (
        lambda tmp: npz(tmp / "a.npz", states=EPISODES[0], rewards=np.zeros(3)),
        "no action array; found rewards, states;.*--key",
    ),
    "differently named arrays": (lambda tmp: npz(tmp / "a.npz", p_1=EPISODES[0], q_1=EPISODES[0]), "found p_1, q_1"),
    "no arrays": (lambda tmp: npz(tmp / "a.npz"), "found nothing|starts with"),
    "no tensors": (lambda tmp: torch_file(tmp / "a.pt", {"fps": 20}), r"holds no tensor; found fps \(int\)"),
    "no action column": (
        lambda tmp: parquet(tmp / "a.parquet", state=[1.0], episode_index=[0]),
        "no column 'action'; found state, episode_index",
    ),
    "no episode column": (lambda tmp: parquet(tmp / "a.parquet", action=[[1.0]]), "no column 'episode_index'"),
    "no data group": (lambda tmp: hdf5_without_data(tmp / "a.h5"), "holds trajectories; expected data/demo_N/actions"),
    "no actions in a demo": (
        lambda tmp: write_hdf5(tmp / "a.h5", EPISODES, name="act"),
        "data/demo_0 has no action array; found act, obs",
    ),
    "no demos": (lambda tmp: write_hdf5(tmp / "a.h5", []), "holds no episodes"),
    "one number per step": (
        lambda tmp: npz(tmp / "a.npz", actions=np.zeros(5)),
        r"'actions' is float64 \[5\]; expected .*\[N, A\]",
    ),
    "four dimensions": (
        lambda tmp: npz(tmp / "a.npz", actions=np.zeros((2,) * 4)),
        r"'actions' is float64 \[2, 2, 2, 2\]; expected",
    ),
    "wrong rank in a demo": (
        lambda tmp: write_hdf5(tmp / "a.h5", [np.zeros(5)]),
        r"a\.h5, data/demo_0/actions is float64 \[5\]; expected .*\[steps",
    ),
    "two action spaces": (
        lambda tmp: write_hdf5(tmp / "a.h5", [np.zeros((3, 7)), np.zeros((3, 7)), np.zeros((3, 6))]),
        r"data/demo_2/actions has 6 action dimensions, but a\.h5, data/demo_0/actions has 7; expected the same",
    ),
    "two action spaces in LeRobot": (
        lambda tmp: lerobot_with_two_widths(tmp / "a"),
        r"episode_000003\.parquet, episode 3, step 0 has 6 action dimensions, but .* has 7; expected the same",
    ),
    "two widths in a column": (
        lambda tmp: parquet(tmp / "a.parquet", action=RAGGED, episode_index=[0, 0]),
        "episode 0, step 1 has 6 action dimensions, but another step has 7",
    ),
    "missing action": (
        lambda tmp: parquet(tmp / "a.parquet", action=[[1.0], None], episode_index=[0, 0]),
        "episode 0, step 1: column 'action' has a missing value",
    ),
    "missing number": (
        lambda tmp: parquet(tmp / "a.parquet", action=[[1.0], [None]], episode_index=[0, 0]),
        "episode 0, step 1: column 'action' has a missing value",
    ),
    "missing number in a later episode": (
        lambda tmp: parquet(
            tmp / "a.parquet",
            action=pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, None], [7.0, 8.0]], pa.list_(pa.float32(), 2)),
            episode_index=[3, 8, 8, 8],
            frame_index=[0, 20, 30, 40],
        ),
        "episode 8, step 30: column 'action' has a missing value",
    ),
    "NaN in LeRobot": (
        lambda tmp: write_lerobot_v2(tmp / "a", broken(np.nan)),
        r"episode_000003\.parquet, episode 3, step 2, dimension 1: nan",
    ),
    "NaN in npz": (
        lambda tmp: ours(tmp / "a.npz", actions=np.concatenate(broken(np.nan))),
        "episode 3, step 2, dimension 1: nan",
    ),
    "bytes in HDF5": (
        lambda tmp: write_hdf5(tmp / "a.h5", [np.zeros((3, 7), np.uint8)]),
        r"a\.h5, data/demo_0/actions is uint8 \[3, 7\]; expected floating-point .*: convert them with \.astype",
    ),
    "integers in Parquet": (
        lambda tmp: parquet(tmp / "a.parquet", action=[[0, 255]], episode_index=[0]),
        r"column 'action' is list<.*int64>; expected lists of floating-point numbers: convert them",
    ),
    "nested lists in Parquet": (
        lambda tmp: parquet(tmp / "a.parquet", action=[[[0.0, 1.0]], [[0.0, 1.0]]], episode_index=[0, 0]),
        r"column 'action' is list<.*list<.*double>>; expected lists of floating-point numbers",
    ),
    "no rows": (
        lambda tmp: parquet(
            tmp / "a.parquet", action=pa.array([], pa.list_(pa.float32())), episode_index=np.zeros(0, int)
        ),
        "has no rows",
    ),
    "frame twice": (
        lambda tmp: lerobot_with_a_copy(tmp / "a"),
        "episode 0, step 0 follows episode 0, step 4; expected ascending .*remove the duplicate file or row",
    ),
    "fractional episode number": (
        lambda tmp: parquet(tmp / "a.parquet", action=[[1.0]], episode_index=[0.5]),
        "column 'episode_index' is double; expected integers",
    ),
    "episode numbers for other steps": (
        lambda tmp: npz(tmp / "a.npz", actions=EPISODES[0], episode_index=np.zeros(3, int)),
        r"5 steps, but episode_index \[3\]; expected one for each",
    ),
    "damaged task list": (lambda tmp: lerobot_with_bad_tasks(tmp / "a", "{"), r"tasks\.jsonl cannot be read"),
    "task list without numbers": (lambda tmp: lerobot_with_bad_tasks(tmp / "a", '{"task": "x"}'), "task_index"),
    "strings": (
        lambda tmp: npz(tmp / "a.npz", actions=np.array([["a", "b"]])),
        r"'actions' is <U1 \[1, 2\]; expected floating-point",
    ),
    "tokens instead of actions": (
        lambda tmp: npz(tmp / "a.npz", actions=np.zeros((3, 7), int)),
        r"'actions' is int64 \[3, 7\]",
    ),
    "complex": (lambda tmp: npz(tmp / "a.npz", actions=np.zeros((3, 7), complex)), "'actions' is complex128"),
    "NaN": (
        lambda tmp: write_hdf5(tmp / "a.h5", broken(np.nan)),
        "data/demo_3, episode 3, step 2, dimension 1: nan; expected finite",
    ),
    "infinity": (
        lambda tmp: write_hdf5(tmp / "a.h5", broken(-np.inf)),
        "data/demo_3, episode 3, step 2, dimension 1: -inf; expected finite",
    ),
    "beyond what any unit explains, in a file of torch": (
        lambda tmp: torch.save(torch.full((2, 2), 1e30), tmp / "a.pt") or tmp / "a.pt",
        r"step 0, dimension 0: 1\S*e\+30; expected finite numbers of at most 1e\+20",
    ),
    "too large for float32": (
        lambda tmp: npz(tmp / "a.npz", actions=np.full((2, 2), 1e39)),
        r"step 0, dimension 0: inf; expected finite numbers of at most 1e\+20",
    ),
    "empty episode": (
        lambda tmp: ours(tmp / "a.npz", episode_ends=[5, 5, sum(LENGTHS)]),
        "episode_ends of 3 episodes for 55 steps; .*each with at least one step",
    ),
    "zero dimensions": (
        lambda tmp: npz(tmp / "a.npz", actions=np.zeros((3, 0))),
        r"'actions' is float64 \[3, 0\]; expected .*, not empty",
    ),
    "no steps": (
        lambda tmp: npz(tmp / "a.npz", actions=np.zeros((0, 7))),
        r"'actions' is float64 \[0, 7\]; expected .*, not empty",
    ),
    "no episodes": (
        lambda tmp: npz(tmp / "a.npz", actions=np.zeros((0, 5, 7))),
        r"\[0, 5, 7\]; expected .*, not empty",
    ),
    "ends before the data's end": (
        lambda tmp: ours(tmp / "a.npz", episode_ends=[5, 8]),
        "episode_ends of 2 episodes for 55 steps; .*the last being the number of steps",
    ),
    "starts before the data's start": (
        lambda tmp: ours(tmp / "a.npz", episode_ends=[-5, 55]),
        "episode_ends of 2 episodes for 55 steps; .*each with at least one step",
    ),
    "descending ends": (
        lambda tmp: ours(tmp / "a.npz", episode_ends=[8, 5, 55]),
        "of 3 episodes for 55 steps; .*ascending",
    ),
    "fractional ends": (lambda tmp: ours(tmp / "a.npz", episode_ends=[8.0, 55.0]), r"float64 \[2\]; expected integers"),
    "no ends": (lambda tmp: ours(tmp / "a.npz", episode_ends=np.zeros(0, int)), "episode_ends of 0 episodes"),
    "too few tasks": (lambda tmp: ours(tmp / "a.npz", task_index=[0]), "one integer for each of 12 episodes"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError, match=message) as refusal:
        load_actions(path)
    assert "weights_only" not in str(refusal.value), "nobody may be advised to load code"
    assert "allow_pickle=True" not in str(refusal.value)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (tmp_path / "was_run",)

    np.savez(tmp_path / "a.npz", actions=np.array([Touch()], object))
    np.save(tmp_path / "a.npy", np.array([Touch()], object))
    torch.save({"actions": Touch()}, tmp_path / "a.pt")
    for name in ("a.npz", "a.npy", "a.pt"):
        with pytest.raises(DataError):
            load_actions(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "a.hdf5", "a.parquet"])
def test_a_wrong_key_is_answered_with_the_names_found(tmp_path: Path, name: str) -> None:
    KEYED[name](tmp_path / name)
    with pytest.raises(DataError, match=r"no (column )?'joint'; found .*relative"):
        load_actions(tmp_path / name, key="joint")


def test_npy_has_no_keys(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", EPISODES[0])
    with pytest.raises(DataError, match="leave key out"):
        load_actions(tmp_path / "a.npy", key="actions")


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("torch", "a.pt", "export"), ("h5py", "a.h5", "datasets"), ("pyarrow.parquet", "a.parquet", "datasets")],
    ids=lambda value: value,
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs {module.partition('.')[0]}.*pip install .*--editable '\.\[{extra}\]'"):
        load_actions(write_bytes(tmp_path / name, b"anything"))


def test_reading_our_own_file_needs_numpy_alone() -> None:
    code = (
        "import sys; from rfsq.rfsq_ref.data import load_demonstrations, split_episodes\n"
        "split_episodes(load_demonstrations())\n"
        "print(sorted({'torch', 'h5py', 'pyarrow'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("names", "tasks"), [(("a", "b"), ("",)), (("a",), ())], ids=["more names than episodes", "fewer tasks"]
)
def test_every_episode_has_one_name_and_one_task(names: tuple[str, ...], tasks: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="expected one name and one task per episode"):
        ActionDataset((np.zeros((1, 1), np.float32),), names, tasks, "made up")


# Splitting -----------------------------------------------------------------------------------------------------------

task_lists = st.lists(st.sampled_from(["lift", "stack", "door", "wipe", ""]), min_size=4, max_size=120)
seeds = st.integers(0, 1000)


def members(part: ActionDataset) -> list[int]:
    return [int(episode[0, 0]) for episode in part.episodes]


def parts_of(split: EpisodeSplit) -> tuple[ActionDataset, ...]:
    return split.train, split.validation, split.calibration, split.test


@given(task_lists, seeds)
def test_parts_are_disjoint_complete_and_never_empty(tasks: list[str], seed: int) -> None:
    parts = [members(part) for part in parts_of(split_episodes(dataset_of(tasks), seed=seed))]
    assert sorted(chain.from_iterable(parts)) == list(range(len(tasks)))
    assert all(parts)


@given(task_lists, seeds)
def test_the_same_seed_gives_the_same_split(tasks: list[str], seed: int) -> None:
    first, second = (split_episodes(dataset_of(tasks), seed=seed) for _ in range(2))
    assert [part.names for part in parts_of(first)] == [part.names for part in parts_of(second)]


# With fewer than ten episodes an empty part takes one from the largest.
@given(task_lists.filter(lambda tasks: len(tasks) >= 10), seeds)
# Rounded task by task, validation would get two of thirty.
@example(["lift"] * 11 + ["door"] * 7 + ["wipe"] * 5 + ["stack"] * 7, 0)
def test_parts_have_their_share_and_so_has_every_task(tasks: list[str], seed: int) -> None:
    parts = parts_of(split_episodes(dataset_of(tasks), seed=seed))
    for part, share in zip(parts, SPLIT_SHARES, strict=True):
        assert abs(len(part.episodes) - share * len(tasks)) < 1
        for task, count in Counter(tasks).items():
            assert abs(part.tasks.count(task) - share * count) < 1 - 1e-9


@given(task_lists, seeds)
def test_the_first_episodes_of_a_part_cover_its_tasks_evenly(tasks: list[str], seed: int) -> None:
    train = split_episodes(dataset_of(tasks), seed=seed).train
    distinct = len(set(train.tasks))
    assert len(set(train.tasks[:distinct])) == distinct


def test_another_seed_gives_another_split() -> None:
    dataset = dataset_of(["lift"] * 40)
    assert len({split_episodes(dataset, seed=seed).test.names for seed in range(5)}) == 5


def test_the_split_is_the_same_on_every_machine() -> None:
    """Calibration finds the training episodes of an older checkpoint by splitting again: these must never change."""
    split = split_episodes(dataset_of(["lift", "stack"] * 6))
    assert [members(part) for part in parts_of(split)] == [[10, 11, 4, 9, 0, 7, 1], [6], [2, 5], [8, 3]]


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_episodes_say_how_many_are_needed(count: int) -> None:
    with pytest.raises(DataError, match=rf"made up has {counted(count, 'episode')}; 4 are needed.*record more"):
        split_episodes(dataset_of(["lift"] * count))


def test_too_few_because_no_border_was_found_says_how_to_give_them(tmp_path: Path) -> None:
    """One flat array is one episode only where the file does not say otherwise."""
    actions = np.zeros((40, 3), np.float32)
    np.savez(tmp_path / "flat.npz", actions=actions)
    dataset = load_actions(tmp_path / "flat.npz")
    assert not dataset.has_borders
    with pytest.raises(DataError, match=r"flat\.npz has 1 episode; .*no episode_ends and no episode_index was found"):
        split_episodes(dataset)
    for borders in ({"episode_ends": np.array([40])}, {"episode_index": np.zeros(40, np.int64)}):
        np.savez(tmp_path / "cut.npz", actions=actions, **borders)
        dataset = load_actions(tmp_path / "cut.npz")
        assert (dataset.has_borders, dataset.missing_borders) == (True, "")
        with pytest.raises(DataError, match=r"cut\.npz has 1 episode; .*record more"):
            split_episodes(dataset)


# Examples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rfsq.rfsq_ref.data", "rfsq.runtime.datasets.sources"])
def test_the_examples_of_the_documentation_run(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed


# Chunks --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 12))
def test_chunks_are_consecutive_steps_without_the_tail(steps: int, action_dim: int, length: int) -> None:
    (actions,) = episodes_of((steps,), action_dim)
    chunks = chunk(actions, length)
    assert chunks.shape == (steps // length, length, action_dim)
    np.testing.assert_array_equal(chunks.reshape(-1, action_dim), actions[: steps // length * length])


@pytest.mark.parametrize(("shape", "length"), [((8,), 2), ((8, 7, 1), 2), ((8, 7), 0)])
def test_chunks_of_anything_else_are_refused(shape: tuple[int, ...], length: int) -> None:
    with pytest.raises(DataError, match="cannot cut"):
        chunk(np.zeros(shape, np.float32), length)


# Round trips and the embedded file -----------------------------------------------------------------------------------


# What one file in ten would show is missed once in seventy runs; no two runs draw the same.
@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=14), action_dim=st.integers(1, 9), seed=seeds)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], action_dim: int, seed: int) -> None:
    episodes = episodes_of(tuple(lengths), action_dim, seed)
    folder = tmp_path_factory.mktemp("round_trip")
    npz(folder / "a.npz", actions=np.concatenate(episodes), episode_ends=np.cumsum(lengths))
    write_hdf5(folder / "a.h5", episodes)
    pq.write_table(lerobot_table(dict(enumerate(episodes)), [0] * len(episodes)), folder / "a.parquet")
    datasets = [load_actions(folder / name) for name in ("a.npz", "a.h5", "a.parquet")]
    for dataset in datasets:
        assert_holds(dataset, episodes)
    assert len({dataset.sha256 for dataset in datasets}) == 1


def test_the_embedded_demonstrations() -> None:
    dataset = load_demonstrations()
    assert len(dataset.episodes) >= 50
    assert dataset.num_steps >= 15_000
    assert dataset.action_dim == 7
    assert np.abs(dataset.steps()).max() <= 1
    assert len(set(dataset.tasks)) >= 3
    assert "" not in dataset.tasks
    assert dataset.source == "demonstrations.npz"
    assert DEMONSTRATIONS.stat().st_size <= 1_200_000


def test_every_part_of_the_embedded_demonstrations_has_every_task() -> None:
    dataset = load_demonstrations()
    for part in parts_of(split_episodes(dataset)):
        assert set(part.tasks) == set(dataset.tasks)


def test_values_that_a_mask_hides_are_no_actions() -> None:
    masked = np.ma.masked_array(np.zeros((3, 2)), mask=[[False, True]] * 3)
    with pytest.raises(DataError, match="a masked array, whose hidden values are no actions"):
        ActionDataset((masked,), ("a",), ("",), "here")


def test_episodes_in_an_array_of_objects_are_refused_as_that_and_not_as_damage(tmp_path: Path) -> None:
    """As numpy saves a list of episodes of different lengths."""
    ragged = np.empty(2, object)
    ragged[:] = [np.zeros((3, 2), np.float32), np.zeros((5, 2), np.float32)]
    np.save(tmp_path / "a.npy", ragged)
    np.savez(tmp_path / "a.npz", actions=ragged)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError) as caught:
            load_actions(tmp_path / name)
        assert f"{name}: 'actions' is an array of Python objects, such as episodes of" in str(caught.value)
        assert "np.savez(path, demo_0=..., demo_1=...)" in str(caught.value)
        assert "undamaged" not in str(caught.value)
    # What the message advises is read.
    np.savez(tmp_path / "b.npz", demo_0=ragged[0], demo_1=ragged[1])
    assert [len(episode) for episode in load_actions(tmp_path / "b.npz").episodes] == [3, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"action": torch.zeros(3, 2)}] * 2,
            r"a list with dict in it; .*one \[steps, A\] for each episode: save such",
        ),
        ([torch.zeros(3, 2), [1.0]], "a list with list in it"),
        (
            {"episodes": [{"action": torch.zeros(3, 2)}], "fps": 30},
            r"no tensor; found episodes \(list\), fps \(int\)",
        ),
        ({"states": torch.zeros(3, 2), "obs": torch.zeros(3, 2)}, r"found obs, states; .* with --key"),
    ],
)
def test_what_a_torch_file_holds_instead_of_actions_is_told(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=message):
        load_actions(tmp_path / "a.pt")
