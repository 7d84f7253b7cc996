"""Small datasets of every layout that is read, made of the same episodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Episodes = Sequence[np.ndarray]


def random_episodes(lengths: Sequence[int], width: int = 3, seed: int = 0) -> list[np.ndarray]:
    """float32 [steps, width] each: steps that follow one another, as a robot's do, and turn round at the ends."""
    rng = np.random.default_rng(seed)
    walks = (np.cumsum(rng.normal(0, 0.1, (length, width)), axis=0) for length in lengths)
    return [(np.abs((walk - 1) % 4 - 2) - 1).astype(np.float32) for walk in walks]


def lerobot_table(episodes: Episodes, first: int = 0, *, as_list: bool = False) -> pa.Table:
    """Columns as LeRobot writes them, observations among them."""
    actions = np.concatenate(episodes)
    values = pa.array(actions.reshape(-1))
    width = actions.shape[1]
    if as_list:
        column = pa.ListArray.from_arrays(pa.array(np.arange(len(actions) + 1, dtype=np.int32) * width), values)
    else:
        column = pa.FixedSizeListArray.from_arrays(values, width)
    frame = np.concatenate([np.arange(len(episode)) for episode in episodes])
    number = np.concatenate([np.full(len(episode), first + index) for index, episode in enumerate(episodes)])
    return pa.table(
        {
            "observation.state": pa.array(actions[:, 0]),
            "action": column,
            "timestamp": pa.array((frame / 20).astype(np.float32)),
            "frame_index": pa.array(frame),
            "episode_index": pa.array(number),
        }
    )


def write_lerobot_v2(folder: Path, episodes: Episodes) -> Path:
    """A file for each episode, meta/episodes.jsonl."""
    for index, episode in enumerate(episodes):
        path = folder / f"data/chunk-{index // 2:03d}/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(lerobot_table([episode], index, as_list=True), path)
    write_info(folder, "v2.1", episodes)
    lines = [{"episode_index": index, "tasks": ["x"], "length": len(one)} for index, one in enumerate(episodes)]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_lerobot_v3(folder: Path, episodes: Episodes, *, per_file: int = 2, row_group: int = 1 << 20) -> Path:
    """Many episodes in a file, meta/episodes/*.parquet."""
    for index in range(0, len(episodes), per_file):
        path = folder / f"data/chunk-000/file-{index // per_file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(lerobot_table(episodes[index : index + per_file], index), path, row_group_size=row_group)
    write_info(folder, "v3.0", episodes)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    lengths = list(map(len, episodes))
    pq.write_table(pa.table({"episode_index": list(range(len(episodes))), "length": lengths}), path)
    return folder


def write_info(folder: Path, version: str, episodes: Episodes, **changed: Any) -> None:
    steps = sum(map(len, episodes))
    info = {"codebase_version": version, "total_episodes": len(episodes), "total_frames": steps, **changed}
    (folder / "meta").mkdir(exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")


def write_hdf5(path: Path, episodes: Episodes) -> Path:
    """As robomimic and LIBERO: float64."""
    with h5py.File(path, "w") as file:
        for index, episode in enumerate(episodes):
            file[f"data/demo_{index}/actions"] = episode.astype(np.float64)
    return path


def write_robomimic(path: Path, episodes: Episodes, **filters: Sequence[int]) -> Path:
    """With filter keys, each with the numbers of its episodes."""
    write_hdf5(path, episodes)
    with h5py.File(path, "a") as file:
        for name, numbers in filters.items():
            file[f"mask/{name}"] = np.array([f"demo_{number}".encode() for number in numbers])
    return path


def write_hdf5_folder(folder: Path, episodes: Episodes) -> Path:
    """A file for each task, as LIBERO."""
    folder.mkdir()
    half = len(episodes) // 2
    write_hdf5(folder / "task_2.hdf5", episodes[:half])
    write_hdf5(folder / "task_10.hdf5", episodes[half:])
    return folder


def write_npz(path: Path, episodes: Episodes, *, is_compressed: bool = False, numbered: bool = False) -> Path:
    """One array, and the ends of episodes or the number of each step's."""
    save = np.savez_compressed if is_compressed else np.savez
    lengths = list(map(len, episodes))
    if numbered:
        save(path, actions=np.concatenate(episodes), episode_index=np.repeat(np.arange(len(episodes)), lengths))
    else:
        save(path, actions=np.concatenate(episodes), episode_ends=np.cumsum(lengths))
    return path


def write_npz_of_arrays(path: Path, episodes: Episodes) -> Path:
    """An array for each episode."""
    np.savez(path, **{f"episode_{index}": episode for index, episode in enumerate(episodes)})
    return path


#: Every layout, by what `open_source` is given.
LAYOUTS = {
    "lerobot_v2": write_lerobot_v2,
    "lerobot_v3": write_lerobot_v3,
    "one.parquet": lambda path, episodes: pq.write_table(lerobot_table(episodes), path, row_group_size=7) or path,
    "robomimic.hdf5": write_hdf5,
    "libero": write_hdf5_folder,
    "stored.npz": write_npz,
    "compressed.npz": lambda path, episodes: write_npz(path, episodes, is_compressed=True, numbered=True),
    "arrays.npz": write_npz_of_arrays,
}


def write_layout(layout: str, folder: Path, episodes: Episodes) -> Path:
    return Path(LAYOUTS[layout](folder / layout, episodes))
