"""Incomplete, contradictory and odd datasets: tokenising and calibration give one answer to each, in the same words."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rfsq.calibration import fit
from rfsq.rfsq_ref import train
from rfsq.rfsq_ref.data import ActionDataset, load_actions
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.paths import LINKS_IN_A_CIRCLE
from rfsq.runtime.datasets import conversion
from rfsq.runtime.datasets import tokenize as tokenize_dataset
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.datasets.token_reader import open_token_dataset
from rfsq.runtime.qualification import compat
from tests.runtime.datasets.samples import (
    lerobot_table,
    random_episodes,
    write_hdf5,
    write_hdf5_folder,
    write_info,
    write_lerobot_v2,
    write_lerobot_v3,
    write_npz,
    write_npz_of_arrays,
    write_robomimic,
)

LENGTHS = (5, 3, 4, 6)
EPISODES = random_episodes(LENGTHS)
STEPS = np.concatenate(EPISODES)
ENDS = np.cumsum(LENGTHS)
NUMBERS = np.repeat(np.arange(4), LENGTHS)
Write = Callable[[Path], Path]


def changed(value: float) -> list[np.ndarray]:
    episodes = [episode.copy() for episode in EPISODES]
    episodes[2][1, 2] = value
    return episodes


def npz(**arrays: Any) -> Write:
    return lambda folder: np.savez(folder / "x.npz", **arrays) or folder / "x.npz"


def hdf5(change: Callable[[h5py.File], object]) -> Write:
    def write(folder: Path) -> Path:
        path = write_hdf5(folder / "x.hdf5", EPISODES)
        with h5py.File(path, "a") as file:
            change(file)
        return path

    return write


def write_arrays(path: Path, **arrays: np.ndarray) -> Path:
    """HDF5 of episodes that lie in the file itself."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"{name}/actions"] = array
    return path


def write_row(path: Path, **arrays: np.ndarray) -> Path:
    """HDF5 of many episodes in one array, and what says where they end."""
    with h5py.File(path, "w") as file:
        for name, array in {"actions": STEPS, **arrays}.items():
            file[name] = array
    return path


def npy(shape: tuple[int, ...]) -> Write:
    """A header that states this shape, and as many numbers as its product."""

    def write(folder: Path) -> Path:
        with (folder / "x.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(STEPS.tobytes()[: int(np.prod(shape)) * 4])
        return folder / "x.npy"

    return write


def replaced(file: h5py.File, **arrays: Any) -> None:
    """`demo_1` of the file gets this."""
    del file["data/demo_1"]
    for name, array in arrays.items():
        file[f"data/demo_1/{name}"] = array


def parquet(change: Callable[[pa.Table], pa.Table] = lambda table: table, *, as_list: bool = False) -> Write:
    def write(folder: Path) -> Path:
        pq.write_table(change(lerobot_table(EPISODES, as_list=as_list)), folder / "x.parquet")
        return folder / "x.parquet"

    return write


def column(name: str, values: Sequence[Any], kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values, kind))


def actions(place: int, value: list[float | None] | None) -> Callable[[pa.Table], pa.Table]:
    """Of a column of lists, one is another."""
    rows: list[Any] = STEPS.tolist()
    return column("action", [*rows[:place], value, *rows[place + 1 :]], pa.list_(pa.float32()))


def order(*rows: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.take([*rows, *range(len(rows), len(table))])


def v2(change: Callable[[Path], object] = lambda _: None, episodes: Sequence[np.ndarray] = EPISODES) -> Write:
    return lambda folder: _changed(write_lerobot_v2(folder / "x", episodes), change)


def v3(change: Callable[[Path], object] = lambda _: None, episodes: Sequence[np.ndarray] = EPISODES) -> Write:
    return lambda folder: _changed(write_lerobot_v3(folder / "x", episodes), change)


def _changed(folder: Path, change: Callable[[Path], object]) -> Path:
    change(folder)
    return folder


def info(version: str = "v3.0", **more: Any) -> Callable[[Path], None]:
    return lambda folder: write_info(folder, version, EPISODES, **more)


def listed(*episodes: tuple[Any, Any], info_says: dict[str, Any] | None = None) -> Callable[[Path], None]:
    """Number and length of each, in meta/episodes of v2."""

    def change(folder: Path) -> None:
        lines = [json.dumps({"episode_index": number, "length": length}) for number, length in episodes]
        (folder / "meta/episodes.jsonl").write_text("\n".join(lines), encoding="utf-8")
        write_info(folder, "v2.1", EPISODES, **(info_says or {}))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            for path in sorted(folder.glob(name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def copied(folder: Path) -> None:
    """As a file manager does; meta/ does not say how many there are."""
    totals(folder)
    first = folder / "data/chunk-000/episode_000000.parquet"
    shutil.copy(first, first.with_name("episode_000000 (copy).parquet"))


def renumbered(folder: Path) -> None:
    """A file that bears the number of another episode."""
    pq.write_table(lerobot_table([EPISODES[1]], 3), folder / "data/chunk-000/episode_000001.parquet")


def of_another_robot(folder: Path) -> None:
    path = folder / "data/chunk-001/episode_000003.parquet"
    pq.write_table(lerobot_table(random_episodes([6], width=4), 3, as_list=True), path)


def cut_off(write: Write, kept: float) -> Write:
    def cut(folder: Path) -> Path:
        path = write(folder)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        return path

    return cut


def totals(folder: Path) -> Path:
    """meta/ says nothing but the version."""
    without("meta/*")(folder)
    (folder / "meta/info.json").write_text('{"codebase_version": "v2.1"}', encoding="utf-8")
    return folder


def features(**column: Any) -> Callable[[Path], None]:
    """What info.json states of the actions."""
    return info("v2.1", features={"action": {"dtype": "float32", "shape": [3], "names": None, **column}})


def part_of(total: int, there: int) -> Callable[[Path], None]:
    """Of a folder that says it has `total` episodes, the first `there`; every other statement agrees with them."""

    def change(folder: Path) -> None:
        steps = int(sum(LENGTHS[:there]))
        without(*(f"data/*/episode_{index:06d}.parquet" for index in range(there, 4)), "meta/episodes.jsonl")(folder)
        write_info(folder, "v2.1", EPISODES, total_episodes=total, total_frames=steps)

    return change


REFUSED: dict[str, tuple[Write, str]] = {
    # LeRobot
    "files missing": (v2(without("data/chunk-001")), r"\(total_frames\) states 18 steps, the files in data/ have 8"),
    "files missing, no totals": (
        v2(lambda folder: [info("v2.1", total_frames=None)(folder), without("data/chunk-001")(folder)]),
        "meta/episodes states 18 steps, ",
    ),
    "files missing, v3": (v3(without("data/*/file-001.parquet")), "states 18 steps, the files in data/ have 8"),
    "41 of 125 episodes": (v2(part_of(4, 2)), "meta/info.json states 4 episodes, the files in data/ have 2"),
    "no files": (v2(without("data")), "holds meta; expected"),
    "stale total of steps": (v3(info(total_frames=17)), r"\(total_frames\) states 17 steps, .* have 18"),
    "stale total of episodes": (v3(info(total_episodes=5)), "states 5 episodes, meta/episodes lists 4"),
    "other lengths": (v2(listed((0, 3), (1, 5), (2, 4), (3, 6))), "episode 0 has 5 steps where 3 are stated"),
    "other numbers": (v2(listed((0, 5), (1, 3), (2, 4), (7, 6))), "episode 3 stands where 7 is stated"),
    "an episode listed twice": (
        v2(listed((0, 5), (1, 3), (2, 4), (3, 6), (3, 6), info_says={"total_episodes": 5})),
        "meta/episodes states 24 steps, the files in data/ have 18",
    ),
    "an episode listed in two halves": (
        v2(listed((0, 2), (0, 3), (1, 3), (2, 4), (3, 6), info_says={"total_episodes": 5})),
        "states 5 episodes, its steps make 4, and episode 0 has 5 steps where 2 are stated",
    ),
    "a negative length": (
        v2(listed((0, 5), (1, 3), (2, 14), (3, -4))),
        "episode 2 has 4 steps where 14 are stated",
    ),
    "a list without lengths": (v2(text("meta/episodes.jsonl", '{"episode_index": 0}')), "cannot be read as JSON lines"),
    "a list that ends early": (v2(text("meta/episodes.jsonl", '{"episode_index": 0, "len')), "cannot be read as JSON"),
    "a file twice": (v2(copied), "episode 0, step 0 follows episode 0, step 4; expected ascending"),
    "a number twice": (v2(renumbered), "episode 2, step 0 follows episode 3, step 2; expected ascending"),
    "an old version": (v2(info("v1.6")), r"states the layout v1\.6; expected v2 or v3"),
    "a new version": (v3(info("v4.0")), r"states the layout v4\.0; expected v2 or v3"),
    "info that is a list": (v3(text("meta/info.json", "[]")), r"info\.json holds \[\]; expected an object"),
    "tasks without numbers": (v2(text("meta/tasks.jsonl", '{"task": "x"}')), r"tasks\.jsonl cannot be read"),
    "a Git LFS pointer": (
        v2(text("data/chunk-000/episode_000001.parquet", "version https://git-lfs.github.com/spec/v1")),
        "is a Git LFS pointer",
    ),
    "another robot in a folder": (v2(of_another_robot), "has 4 action dimensions, but another step has 3"),
    "infinity": (v3(episodes=changed(np.inf)), "episode 2, step 1, dimension 2: inf; expected finite"),
    # Parquet
    "rows out of order": (parquet(order(0, 2, 1)), "episode 0, step 1 follows episode 0, step 2; expected ascending"),
    "episodes out of order": (parquet(order(*range(5, 8), *range(5))), "episode 0, step 0 follows episode 1, step 2"),
    "a row twice": (parquet(order(0, 0)), "episode 0, step 0 follows episode 0, step 0"),
    "interleaved without frames": (
        parquet(lambda table: order(5, 0)(table).drop_columns(["frame_index"])),
        "episode_index falls at step 1",
    ),
    "no episodes": (parquet(lambda table: table.drop_columns(["episode_index"])), "no column 'episode_index'"),
    "no actions": (parquet(lambda table: table.drop_columns(["action"])), "no column 'action'"),
    "a missing action": (parquet(actions(6, None)), "episode 1, step 1: column 'action' has a missing value"),
    "a missing number": (parquet(actions(6, [0, None, 0])), "episode 1, step 1: column 'action' has a missing value"),
    "a shorter action": (parquet(actions(6, [0, 0])), "step 1 has 2 action dimensions, but another step has 3"),
    "an empty action": (parquet(actions(0, [])), "'action' begins with an empty list"),
    "integers in Parquet": (
        parquet(column("action", [[0, 1, 2]] * 18)),
        "column 'action' is list.*expected lists of floating-point numbers",
    ),
    "numbers of tasks that are none": (
        parquet(lambda table: table.append_column("task_index", pa.array([0.5] * 18))),
        "column 'task_index' is double; expected integers",
    ),
    "an episode without a number": (
        parquet(column("episode_index", [None, *NUMBERS.tolist()[1:]])),
        "'episode_index' has a missing value",
    ),
    "half of Parquet": (cut_off(parquet(), 0.5), "cannot be read as a Parquet file"),
    # HDF5
    "not written to the end": (
        hdf5(lambda file: file.create_dataset("data/demo_4/actions", (9, 3), "f4", chunks=(2, 3))),
        "not all was written",
    ),
    "an episode elsewhere": (
        hdf5(lambda file: file["data"].__setitem__("demo_4", h5py.ExternalLink("y.hdf5", "/"))),
        "in another file, 'y.hdf5'",
    ),
    "an episode without actions": (hdf5(lambda file: replaced(file, states=STEPS)), "demo_1 has no action array"),
    "two arrays that differ": (
        hdf5(lambda file: file.__setitem__("data/demo_2/action", EPISODES[2] + 1)),
        "'actions' and 'action', which differ",
    ),
    "another robot in a file": (
        hdf5(lambda file: replaced(file, actions=np.zeros((3, 4)))),
        "demo_1/actions has 4 action dimensions, but .*demo_0/actions has 3",
    ),
    "no steps in an episode": (hdf5(lambda file: replaced(file, actions=np.zeros((0, 3)))), "at least one step"),
    "integers in HDF5": (hdf5(lambda file: replaced(file, actions=np.zeros((3, 3), int))), "is int64"),
    "nan in HDF5": (lambda folder: write_hdf5(folder / "x.h5", changed(np.nan)), "step 1, dimension 2: nan; expected"),
    "half of HDF5": (cut_off(hdf5(lambda _: None), 0.5), "cannot be read as an HDF5 file"),
    # numpy
    "too large for float32": (
        npz(actions=np.where(STEPS[4, 1] == STEPS, 1e39, STEPS.astype(np.float64)), episode_ends=ENDS),
        "episode 0, step 4, dimension 1: inf; expected finite",
    ),
    "beyond what any unit explains": (
        npz(actions=np.where(STEPS[4, 1] == STEPS, np.float32(1e30), STEPS), episode_ends=ENDS),
        r"episode 0, step 4, dimension 1: 1\S*e\+30; expected finite numbers of at most 1e\+20: repair or drop",
    ),
    "ends before the end": (npz(actions=STEPS, episode_ends=ENDS[:-1]), "the last being the number of steps"),
    "ends that descend": (npz(actions=STEPS, episode_ends=[9, 5, 18]), "of 3 episodes for 18 steps; expected"),
    "ends against numbers": (npz(actions=STEPS, episode_ends=[9, 18], episode_index=NUMBERS), "say different ends"),
    "numbers that fall": (npz(actions=STEPS, episode_index=NUMBERS[::-1]), "episode_index falls at step 6"),
    "numbers for other steps": (npz(actions=STEPS, episode_index=NUMBERS[:-1]), "18 steps, but episode_index"),
    "tasks for other episodes": (npz(actions=STEPS, episode_ends=ENDS, task_index=[0]), "one integer for each of 4"),
    "tasks that are no list": (
        npz(actions=STEPS, episode_ends=ENDS, task_index=[0] * 4, task_names="x"),
        "expected one text for each task number",
    ),
    "no clear name": (npz(observations=STEPS), "has no action array"),
    "arrays of two robots": (npz(demo_0=STEPS, demo_1=STEPS[:, :2]), "'demo_1' has 2 action dimensions, but .* has 3"),
    "objects": (npz(actions=np.array([{}], object)), "array of Python objects"),
    "half an archive": (cut_off(npz(actions=STEPS), 0.5), "cannot be read as a .npz file"),
}

#: Sources that say two things.
CONTRADICTORY: dict[str, tuple[Write, str]] = {
    "no info": (v2(without("meta/info.json")), "x has no meta/info.json; expected all of a LeRobot folder"),
    "no meta": (v3(without("meta")), "x has no meta/info.json; expected all of a LeRobot folder"),
    "info without a version": (v3(text("meta/info.json", "{}")), "states no codebase_version; expected v2 or v3"),
    "actions of another shape": (
        v2(features(shape=[4])),
        r"states that 'action' is float32 \[4\], the files in data/ have float32 \[3\]; expected the same",
    ),
    "actions of another type": (
        v3(features(dtype="float64")),
        r"states that 'action' is float64 \[3\], the files in data/ have float32 \[3\]; expected the same",
    ),
    "features that are a list": (v3(info(features=[])), r"meta/info\.json cannot be read as JSON \(it is built in"),
    "a negative number of an episode": (
        parquet(column("episode_index", (NUMBERS - 1).tolist())),
        "column 'episode_index' holds -1; expected integers of 0 or more",
    ),
    "a negative number in numpy": (npz(actions=STEPS, episode_index=NUMBERS - 2), "episode_index holds -2; expected"),
    "a file twice with other zeros": (
        v2(
            lambda folder: shutil.copy(
                folder / "data/chunk-000/episode_000000.parquet", folder / "data/chunk-000/episode_0.parquet"
            )
        ),
        r"'data/chunk-000/episode_\w+\.parquet' and 'data/chunk-000/episode_\w+\.parquet', which bear the same number",
    ),
    "LeRobot and HDF5 in a folder": (
        v2(lambda folder: write_hdf5(folder / "y.hdf5", EPISODES)),
        "holds data, meta, y.hdf5, both LeRobot's data and HDF5 files; expected one",
    ),
    "an array beside episodes": (
        hdf5(lambda file: file.__setitem__("action", STEPS)),
        "x.hdf5 has actions in action and in data/demo_0, data/demo_1 and 2 more; expected one set",
    ),
    "episodes in two places": (
        hdf5(lambda file: file.__setitem__("demo_7/actions", STEPS)),
        "x.hdf5 has actions in demo_7 and in data/demo_0, data/demo_1 and 2 more; expected one set",
    ),
    "episodes of two names": (
        hdf5(lambda file: file.__setitem__("data/traj_0/actions", STEPS)),
        "has actions in demo_0, demo_1 and 2 more and in traj_0; expected one set",
    ),
    "episodes of two names, without a group": (
        lambda folder: write_arrays(folder / "x.h5", demo_0=STEPS, traj_1=STEPS),
        "x.h5 has actions in demo_0 and in traj_1; expected one set",
    ),
    "a number twice with other zeros": (
        hdf5(lambda file: file.__setitem__("data/demo_01/actions", STEPS)),
        r"x\.hdf5 has 'demo_0?1' and 'demo_0?1', which bear the same number",
    ),
    "a file of HDF5 twice with other zeros": (
        lambda folder: [write_hdf5(folder / name, EPISODES) for name in ("x_1.hdf5", "x_01.hdf5")] and folder,
        r"has 'x_0?1\.hdf5' and 'x_0?1\.hdf5', which bear the same number",
    ),
    "an array beside arrays of episodes": (
        npz(actions=STEPS, demo_0=STEPS[:5], demo_1=STEPS[5:]),
        "x.npz has actions in actions and in demo_0, demo_1; expected one set",
    ),
    "an array twice with other zeros": (npz(demo_1=STEPS, demo_01=STEPS), "which bear the same number"),
    "an array twice with another separator": (
        npz(demo_0=STEPS, demo_1=STEPS, demo1=STEPS),
        "'demo_?1' and 'demo_?1', which bear",
    ),
    "a vague name beside arrays of episodes": (
        npz(data=STEPS, demo_0=STEPS[:5], demo_1=STEPS[5:]),
        "x.npz has no action array; found data, demo_0, demo_1",
    ),
    "a vague name beside numbered actions": (
        npz(data=STEPS, actions_0=STEPS),
        "no action array; found data, actions_0",
    ),
    "a number twice with another separator": (
        hdf5(lambda file: file.__setitem__("data/demo1/actions", STEPS)),
        r"x\.hdf5 has 'demo_?1' and 'demo_?1', which bear the same number",
    ),
    "a file of HDF5 twice with another suffix": (
        lambda folder: [write_hdf5(folder / name, EPISODES) for name in ("a1.hdf5", "a1.h5")] and folder,
        r"has 'a1\.\w+' and 'a1\.\w+', which bear the same number or name",
    ),
    "another number of samples": (
        hdf5(lambda file: file["data/demo_1"].attrs.__setitem__("num_samples", 4)),
        r"x\.hdf5, data/demo_1 \(num_samples\) states 4 steps, its actions have 3; expected the same",
    ),
    "numbers of episodes beside one array of HDF5": (
        lambda folder: write_row(folder / "x.h5", episode_index=NUMBERS),
        r"x\.h5 has many episodes in one row \(actions beside episode_index\)",
    ),
    "ends of episodes beside one array of HDF5": (
        lambda folder: write_row(folder / "x.h5", **{"meta/episode_ends": ENDS}),
        r"x\.h5 has many episodes in one row \(actions beside meta/episode_ends\)",
    ),
    "a column beside another": (
        parquet(
            lambda table: table.append_column("actions", pa.array((STEPS + 1).tolist(), pa.list_(pa.float32(), 3)))
        ),
        "x.parquet has 'action' and 'actions', which differ; expected one array",
    ),
    "a length that is no integer": (
        v2(listed((0, 5), (1, 3), (2, 4), (3, 6.9))),
        r"episodes\.jsonl cannot be read as JSON lines",
    ),
    "a length in quotation marks": (
        v2(listed((0, 5), (1, 3), (2, 4), (3, "6"))),
        r"episodes\.jsonl cannot be read as JSON lines",
    ),
    "a number of more digits than Python reads": (
        npz(**{"demo_" + "1" * 5000: STEPS, "demo_" + "1" * 5000 + "2": STEPS[:, :2]}),
        "has 2 action dimensions, but .* has 3",
    ),
    "a negative size": (npy((-18, -3)), r"'actions' has the shape \[-18, -3\]; expected sizes of 0 or more"),
    "a size that is no number": (npy((True, 3)), r"'actions' has the shape \[True, 3\]; expected sizes of 0 or more"),
}
REFUSED |= CONTRADICTORY

ACCEPTED: dict[str, Write] = {
    "LeRobot v2": v2(),
    "LeRobot v3": v3(),
    "nothing but a version": v2(totals),
    "the features of the actions": v2(features()),
    "no features of the actions": v3(info(features={"observation.state": {"dtype": "float32", "shape": [1]}})),
    "episodes listed in another order": v2(listed((3, 6), (1, 3), (0, 5), (2, 4))),
    "info without totals": v3(text("meta/info.json", '{"codebase_version": "v3.0"}')),
    "an episode in two files": v2(
        lambda folder: [
            pq.write_table(
                lerobot_table(EPISODES, as_list=True)[part], folder / f"data/chunk-000/episode_{name}.parquet"
            )
            for name, part in (("000000", slice(0, 3)), ("000001", slice(3, 8)))
        ]
    ),
    "frames with gaps": parquet(column("frame_index", np.arange(18) * 3)),
    "episodes with gaps": parquet(column("episode_index", NUMBERS * 5 + 2)),
    "Parquet without frames": parquet(lambda table: table.drop_columns(["frame_index"])),
    "Parquet of float64": parquet(column("action", STEPS.astype(np.float64).tolist(), pa.list_(pa.float64(), 3))),
    "lists of any length": parquet(as_list=True),
    "a number for some tasks": parquet(
        lambda table: table.append_column("task_index", pa.array([1, None] * 9, pa.int64()))
    ),
    "HDF5": hdf5(lambda _: None),
    "a folder of HDF5": lambda folder: write_hdf5_folder(folder / "x", EPISODES),
    "two columns that are equal": parquet(lambda table: table.append_column("actions", table.column("action"))),
    "two arrays that are equal": hdf5(lambda file: file.__setitem__("data/demo_2/action", EPISODES[2].astype("f8"))),
    "ends and numbers that agree": npz(actions=STEPS, episode_ends=ENDS, episode_index=NUMBERS + 7),
    "numbers alone": lambda folder: write_npz(folder / "x.npz", EPISODES, is_compressed=True, numbered=True),
    "an array for each episode": lambda folder: write_npz_of_arrays(folder / "x.npz", EPISODES),
    "no borders": npz(actions=STEPS),
    "column by column": npz(actions=np.asfortranarray(STEPS), episode_ends=ENDS),
    "column by column, compressed": lambda folder: (
        np.savez_compressed(folder / "x.npz", actions=np.asfortranarray(STEPS)) or folder / "x.npz"
    ),
    "big-endian": npz(actions=STEPS.astype(">f4"), episode_ends=ENDS),
}


def tokenise(source: Path, bundle: Path) -> Path:
    output = source.parent / "out.parquet"
    conversion.convert(
        tokenize_dataset.parser().parse_args(
            [str(bundle), "--data", str(source), "--output", str(output), "--workers", "1"]
        )
    )
    return output


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_what_one_refuses_the_other_refuses_for_the_same_reason(
    write: Write, message: str, c_bundle: Path, tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(SourceError, match=message) as tokenising:
        tokenise(path, c_bundle)
    with pytest.raises(DataError) as calibrating:
        load_actions(path)
    # The limit is the bundle's where there is one.
    words = [re.sub(r"(of at most) \S+:", r"\1:", str(caught.value)) for caught in (tokenising, calibrating)]
    assert words[0] == words[1]
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("write", ACCEPTED.values(), ids=ACCEPTED)
def test_what_one_takes_the_other_takes_and_both_see_the_same(write: Write, c_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path)
    dataset = load_actions(path)
    np.testing.assert_array_equal(dataset.steps(), STEPS)
    assert read_in_slices(path).tobytes() == STEPS.tobytes()
    assert_holds(tokenise(path, c_bundle), dataset, c_bundle)


def read_in_slices(path: Path) -> np.ndarray:
    source = open_source(path)
    reader = source.open(3)
    try:
        return np.concatenate([reader.read(row, min(row + 4, 18)).values for row in range(0, source.num_steps, 4)])
    finally:
        reader.close()


def refusals(path: Path, bundle: Path, capsys: pytest.CaptureFixture[str], *options: str) -> set[str]:
    """What all commands that take demonstrations say; bundles limit what a legal action is, and checkpoints do not."""
    data, output = ["--data", str(path), *options], str(path.parent / "out")
    found = set()
    for main, given in (
        (tokenize_dataset.main, [str(bundle), *data, "--output", f"{output}.zarr"]),
        (compat.main, [str(bundle), str(bundle), *data]),
        (fit.main, [*data, "--output", f"{output}.safetensors"]),
        (train.main, [*data, "--output", f"{output}.safetensors"]),
    ):
        try:
            status = main(given)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        assert status == 2
        found.add(capsys.readouterr().err.splitlines()[-1].partition("error: ")[2])
    return found


@pytest.mark.parametrize(("write", "message"), CONTRADICTORY.values(), ids=CONTRADICTORY)
def test_every_command_refuses_what_says_two_things(
    write: Write, message: str, c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (words,) = refusals(write(tmp_path), c_bundle, capsys)
    assert re.search(message, words)


def test_every_command_refuses_a_filter_that_lists_an_episode_twice(
    c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_robomimic(tmp_path / "x.hdf5", EPISODES, train=[0, 2, 0])
    (words,) = refusals(path, c_bundle, capsys, "--filter-key", "train")
    assert "x.hdf5: the filter key 'train' lists demo_0 more than once; choose another" in words


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.hdf5", "x.parquet", "lerobot_v3"])
def test_every_command_refuses_an_empty_key(
    name: str, c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).touch()
    for option in ("--key", "--filter-key"):
        (words,) = refusals(tmp_path / name, c_bundle, capsys, option, "")
        assert words.startswith(f"{option} ({option[2:].replace('-', '_')}=) is empty; expected a name")


def test_links_in_a_circle_are_worded_alike_everywhere(
    c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.hdf5").symlink_to(tmp_path / "y.hdf5")
    (tmp_path / "y.hdf5").symlink_to(tmp_path / "x.hdf5")
    # One command has a second name for --data.
    (words,) = {words.partition(": ")[2] for words in refusals(tmp_path / "x.hdf5", c_bundle, capsys)}
    assert re.fullmatch(f"it is .*; {LINKS_IN_A_CIRCLE}", words)
    # In a folder as well.
    for error, read in ((SourceError, open_source), (DataError, load_actions)):
        with pytest.raises(error, match=rf"x\.hdf5 cannot be read: {LINKS_IN_A_CIRCLE}$"):
            read(tmp_path)
        with pytest.raises(error, match=rf"the data is .*; {LINKS_IN_A_CIRCLE}$"):
            read(tmp_path / "x.hdf5")


def test_no_refusal_names_an_error_of_python(tmp_path: Path) -> None:
    for name, (write, _) in REFUSED.items():
        (tmp_path / name.replace("/", "")).mkdir()
        with pytest.raises(DataError) as caught:
            load_actions(write(tmp_path / name.replace("/", "")))
        assert not re.search(r"\b[A-Z]\w*(Error|Exception)\b|BadZipFile|ArrowInvalid", str(caught.value)), name


def assert_holds(output: Path, dataset: ActionDataset, bundle: Path) -> None:
    """The tokens are those of the actions that calibration sees, in the same episodes."""
    tokens = open_token_dataset(output)
    lengths = np.diff(tokens.episodes().starts).tolist()
    assert lengths == [len(episode) for episode in dataset.episodes]
    with ActionTokenizer.load(bundle, backend="c") as tokenizer:
        length = tokenizer.model.chunk_length
        padded = np.concatenate([dataset.steps(), np.zeros((-dataset.num_steps % length, 3), np.float32)])
        expected = tokenizer.encode(padded.reshape(-1, length, 3)).reshape(len(padded), -1)[: dataset.num_steps]
    np.testing.assert_array_equal(tokens.open(expected.shape[1]).read(0, tokens.num_steps).values, expected)
