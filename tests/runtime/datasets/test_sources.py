"""Demonstrations are read in slices exactly as the reference reads them whole, or refused with their place."""

import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rfsq.rfsq_ref.data import load_actions
from rfsq.runtime.datasets import lerobot as dataset_lerobot
from rfsq.runtime.datasets import npz as dataset_npz
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.source_base import Steps
from rfsq.runtime.datasets.sources import open_source
from tests.runtime.datasets.samples import (
    LAYOUTS,
    lerobot_table,
    random_episodes,
    write_hdf5,
    write_info,
    write_layout,
    write_lerobot_v2,
    write_lerobot_v3,
    write_npz,
)

LENGTHS = (5, 1, 9, 12)


def read(path: Path, slices: list[tuple[int, int]], width: int = 3) -> list[Steps]:
    reader = open_source(path).open(width)
    try:
        return [reader.read(start, stop) for start, stop in slices]
    finally:
        reader.close()


def test_the_advice_for_other_formats_makes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE.csv").write_text("x,y,grip\n0.5,-0.25,1\n0,0.125,-1\n", encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        open_source("FILE.csv")
    exec(str(caught.value).rpartition(" by ")[2], {"np": np})  # as a reader does
    (steps,) = read(tmp_path / "episodes.npz", [(0, 2)])
    assert steps.values.tolist() == [[0.5, -0.25, 1], [0, 0.125, -1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_steps_that_the_reference_reads(layout: str, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    path = write_layout(layout, tmp_path, episodes)
    reference = load_actions(path)
    source = open_source(path)
    assert source.num_steps == reference.num_steps == sum(LENGTHS)
    (steps,) = read(path, [(0, source.num_steps)])
    assert steps.values.dtype == np.float32
    np.testing.assert_array_equal(steps.values, reference.steps())
    np.testing.assert_array_equal(steps.episode, np.repeat(np.arange(4), LENGTHS))
    np.testing.assert_array_equal(steps.frame, np.concatenate([np.arange(length) for length in LENGTHS]))
    names = source.episode_names(np.arange(4))
    assert [name.removesuffix(".parquet") for name in names] == [
        name if layout == "libero" else name.split("/")[-1] if "hdf5" not in layout else f"robomimic/{name}"
        for name in reference.names
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_any_slices_in_any_order_are_those_of_the_whole(
    layout: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_lerobot, "_BATCH_STEPS", batch)
    path = write_layout(layout, tmp_path, random_episodes(LENGTHS))
    total = sum(LENGTHS)
    rng = np.random.default_rng(0)
    ends = [sorted(rng.choice(total + 1, 2, replace=False).tolist()) for _ in range(40)]
    ascending = [(start, min(start + 4, total)) for start in range(0, total, 4)]
    slices = [(0, total), *ascending, *map(tuple, ends)]
    whole, *parts = read(path, slices)
    for (start, stop), part in zip(slices[1:], parts, strict=True):
        np.testing.assert_array_equal(part.values, whole.values[start:stop])
        np.testing.assert_array_equal(part.episode, whole.episode[start:stop])
        np.testing.assert_array_equal(part.frame, whole.frame[start:stop])


def test_episode_numbers_are_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_npz, "_SLICE_STEPS", 4)
    for is_compressed in (False, True):
        path = write_npz(tmp_path / "x.npz", random_episodes(LENGTHS), is_compressed=is_compressed, numbered=True)
        (steps,) = read(path, [(0, sum(LENGTHS))])
        np.testing.assert_array_equal(steps.episode, np.repeat(np.arange(4), LENGTHS))
        np.testing.assert_array_equal(steps.frame, np.concatenate([np.arange(length) for length in LENGTHS]))


def test_a_named_array_is_read(tmp_path: Path) -> None:
    (episode,) = random_episodes([6])
    np.savez(tmp_path / "x.npz", actions=np.zeros((6, 3)), wanted=episode)
    reader = open_source(tmp_path / "x.npz", "wanted").open(3)
    np.testing.assert_array_equal(reader.read(0, 6).values, episode)


def test_an_array_of_equally_long_episodes_is_cut_into_them(tmp_path: Path) -> None:
    episodes = np.stack(random_episodes([6, 6]))
    np.savez(tmp_path / "x.npz", actions=episodes)
    np.save(tmp_path / "x.npy", episodes)
    for path in (tmp_path / "x.npz", tmp_path / "x.npy"):
        (steps,) = read(path, [(4, 9)])
        np.testing.assert_array_equal(steps.values, episodes.reshape(-1, 3)[4:9])
        assert steps.episode.tolist() == [0, 0, 1, 1, 1]
        assert steps.frame.tolist() == [4, 5, 0, 1, 2]


@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8", ">f8"])
def test_other_floating_point_numbers_are_rounded(kind: str, tmp_path: Path) -> None:
    actions = random_episodes([6])[0].astype(kind)
    np.savez(tmp_path / "x.npz", actions=actions)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["data/demo_0/actions"] = actions
    for path in (tmp_path / "x.npz", tmp_path / "x.hdf5"):
        (steps,) = read(path, [(0, 6)])
        np.testing.assert_array_equal(steps.values, actions.astype(np.float32))


def leave_debris(folder: Path) -> None:
    """Beside every file and folder, what macOS, Windows, Jupyter and network file systems leave."""
    for path in [*folder.rglob("*")]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 AppleDouble")
        (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
        if path.is_file():
            (path.parent / ".ipynb_checkpoints" / path.name).write_bytes(path.read_bytes())
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0000000000000001.parquet", "._x.hdf5"):
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize("layout", ["lerobot_v2", "lerobot_v3", "libero"])
def test_what_systems_leave_beside_files_is_not_read(layout: str, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    path = write_layout(layout, tmp_path, episodes)
    leave_debris(path)
    np.testing.assert_array_equal(read(path, [(0, sum(LENGTHS))])[0].values, np.concatenate(episodes))
    np.testing.assert_array_equal(load_actions(path).steps(), np.concatenate(episodes))


@pytest.mark.parametrize("name", ["stored.npz", "arrays.npz"])
def test_what_macos_packs_into_an_archive_is_not_read(name: str, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    path = write_layout(name, tmp_path, episodes)
    with zipfile.ZipFile(path, "a") as archive:
        for member in archive.namelist():
            archive.writestr(f"__MACOSX/._{member}", b"\x00\x05\x16\x07 AppleDouble")
    np.testing.assert_array_equal(read(path, [(0, sum(LENGTHS))])[0].values, np.concatenate(episodes))
    np.testing.assert_array_equal(load_actions(path).steps(), np.concatenate(episodes))


def test_a_folder_of_nothing_else_is_refused_and_they_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "._x.hdf5").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert "holds nothing; expected" in refusal(tmp_path)


# --- refused ----------------------------------------------------------------------------------------------------------


def refusal(path: Path, width: int = 3) -> str:
    def read_whole() -> None:
        source = open_source(path)
        source.check()
        source.open(width).read(0, source.num_steps)

    with pytest.raises(SourceError) as caught:
        read_whole()
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_dimensions_is_refused(layout: str, tmp_path: Path) -> None:
    path = write_layout(layout, tmp_path, random_episodes(LENGTHS, width=5))
    assert "has 5 action dimensions; the bundle's model has 3" in refusal(path)


@pytest.mark.parametrize("layout", ["one.parquet", "robomimic.hdf5", "stored.npz", "compressed.npz"])
@pytest.mark.parametrize("kept", [0, 3, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(layout: str, kept: float, tmp_path: Path) -> None:
    path = write_layout(layout, tmp_path, random_episodes([400, 300]))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    message = refusal(path)
    assert path.name in message
    assert "copy" in message or "save" in message


@pytest.mark.parametrize("layout", ["stored.npz", "compressed.npz"])
def test_a_changed_byte_in_an_archive_is_refused(layout: str, tmp_path: Path) -> None:
    path = write_layout(layout, tmp_path, random_episodes([400, 300]))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert "cannot be read as a .npz file" in refusal(path)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    assert "does not exist; expected .npz" in refusal(tmp_path / "nothing.npz")
    assert "holds nothing; expected" in refusal(tmp_path)
    (tmp_path / "x.csv").write_text("1,2,3", encoding="utf-8")
    assert "has the suffix '.csv'; expected" in (refused := refusal(tmp_path / "x.csv"))
    assert "np.savez('episodes.npz', demo_0=np.loadtxt('FILE.csv', delimiter=',', skiprows=1))" in refused
    for suffix in ("npz", "hdf5", "parquet"):
        (tmp_path / f"lfs.{suffix}").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
        assert "is a Git LFS pointer" in refusal(tmp_path / f"lfs.{suffix}")
        (tmp_path / f"text.{suffix}").write_text("not what it says", encoding="utf-8")
        assert "starts with b'no" in refusal(tmp_path / f"text.{suffix}")


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", actions=np.array([{"a": 1}], dtype=object))
    assert "'actions' is an array of Python objects, such as episodes of different lengths" in refusal(
        tmp_path / "x.npz"
    )


def test_arrays_that_are_no_actions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, actions=np.zeros((4, 3), np.int32))
    assert "'actions' is int32 [4, 3]; expected floating-point" in refusal(path)
    np.savez(path, actions=np.zeros((0, 3)))
    assert "not empty" in refusal(path)
    np.savez(path, actions=np.asfortranarray(np.zeros((2, 4, 3))))
    assert "is stored column by column" in refusal(path)
    np.savez(path, states=np.zeros((4, 3)), rewards=np.zeros(4))
    assert "has no action array; found rewards, states" in refusal(path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert "has no action array; found nothing" in refusal(path)


def test_arrays_that_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    (episode,) = random_episodes([6])
    more = {"notes": np.array({"by": "me"}, dtype=object), "states": np.asfortranarray(np.zeros((6, 3)))}
    np.savez(tmp_path / "x.npz", actions=episode, **more)
    (steps,) = read(tmp_path / "x.npz", [(0, 6)])
    np.testing.assert_array_equal(steps.values, episode)


def test_numbered_arrays_of_several_episodes_each_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", demo_0=np.zeros((2, 4, 3)), demo_1=np.zeros((2, 4, 3)))
    assert "'demo_0' is one of 2 arrays of episodes and has the shape [2, 4, 3]" in refusal(tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_an_array_twice_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz", random_episodes([6]))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("actions.npy", archive.read("actions.npy"))
    assert "holds 'actions' twice" in refusal(path)


def test_sums_of_episode_numbers_and_of_parquet_pages_are_checked(tmp_path: Path) -> None:
    episodes = random_episodes([6000, 5000])
    path = write_npz(tmp_path / "x.npz", episodes, numbered=True)
    content = path.read_bytes()
    # The last step of the first episode becomes the first of the second: plausible but for the sum.
    at = content.rindex(np.array([0, 1], "<i8").tobytes())
    path.write_bytes(content[:at] + np.array([1, 1], "<i8").tobytes() + content[at + 16 :])
    assert "Bad CRC-32" in refusal(path)
    path = tmp_path / "x.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(lerobot_table(episodes), path, **plain)
    content = bytearray(path.read_bytes())
    content[content.index(episodes[0][100].tobytes())] ^= 1
    path.write_bytes(content)
    assert "CRC checksum verification failed" in refusal(path)


@pytest.mark.parametrize("ends", [[3, 5], [3, 3, 6], [4, 2, 6], [], [7]])
def test_ends_that_do_not_cut_the_steps_are_refused(ends: list[int], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", actions=np.zeros((6, 3)), episode_ends=np.array(ends, np.int64))
    assert "for 6 steps; expected the exclusive end of every episode" in refusal(tmp_path / "x.npz")


def test_episode_numbers_that_fall_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", actions=np.zeros((6, 3)), episode_index=np.array([0, 0, 1, 1, 0, 0]))
    assert "episode_index falls at step 4 of the file" in refusal(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", actions=np.zeros((6, 3)), episode_index=np.zeros(5, np.int64))
    assert "6 steps, but episode_index [5]" in refusal(tmp_path / "x.npz")


def test_hdf5_without_demonstrations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros(3)
    assert "x.hdf5 holds observations; expected data/demo_N/actions" in refusal(path)
    write_hdf5(path, random_episodes([4]))
    with h5py.File(path, "a") as file:
        file["data/demo_1/states"] = np.zeros((3, 3))
    assert "x.hdf5, data/demo_1 has no action array; found states" in refusal(path)
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"] = np.zeros((3, 3), np.int64)
    assert "x.hdf5, data/demo_1/actions is int64 [3, 3]; expected floating-point" in refusal(path)


# --- LeRobot ----------------------------------------------------------------------------------------------------------


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def test_missing_columns_and_wrong_types_are_refused(tmp_path: Path) -> None:
    path, table = tmp_path / "x.parquet", lerobot_table(random_episodes([4]))
    for name in ("action", "episode_index"):
        pq.write_table(table.drop_columns([name]), path)
        assert f"x.parquet has no column {name!r}; found observation.state" in refusal(path)
    pq.write_table(with_column(table, "action", pa.array([["a"]] * 4)), path)
    assert "column 'action' is list" in refusal(path)
    pq.write_table(with_column(table, "frame_index", pa.array([0.0, 1.0, 2.0, 3.0])), path)
    assert "column 'frame_index' is double; expected integers" in refusal(path)
    pq.write_table(table.slice(0, 0), path)
    assert "x.parquet has no rows" in refusal(path)


def test_missing_and_ragged_values_are_refused_with_episode_and_step(tmp_path: Path) -> None:
    path, table = tmp_path / "x.parquet", lerobot_table(random_episodes([3, 3]))
    rows = table.column("action").to_pylist()
    for wrong, message in (
        (None, "x.parquet, episode 1, step 1: column 'action' has a missing value"),
        ([0.0, None, 0.0], "x.parquet, episode 1, step 1: column 'action' has a missing value"),
        ([0.0, 0.0], "x.parquet, episode 1, step 1 has 2 action dimensions, but another step has 3"),
    ):
        column = pa.array([*rows[:4], wrong, rows[5]], pa.list_(pa.float32()))
        pq.write_table(with_column(table, "action", column), path)
        assert message in refusal(path)
    pq.write_table(with_column(table, "episode_index", pa.array([0, 0, 0, 1, None, 1])), path)
    assert "column 'episode_index' has a missing value" in refusal(path)


def test_a_plain_number_is_an_action_of_one_dimension(tmp_path: Path) -> None:
    table = lerobot_table(random_episodes([4]))
    pq.write_table(
        with_column(table, "action", table.column("observation.state").combine_chunks()), tmp_path / "x.parquet"
    )
    (steps,) = read(tmp_path / "x.parquet", [(0, 4)], width=1)
    np.testing.assert_array_equal(steps.values[:, 0], table.column("observation.state").to_numpy())


@pytest.mark.parametrize("write", [write_lerobot_v2, write_lerobot_v3])
def test_a_folder_that_lacks_what_meta_states_is_refused(write: object, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    folder = write(tmp_path / "x", episodes)  # type: ignore[operator]
    last = sorted(folder.glob("data/*/*.parquet"))[-1]
    content = last.read_bytes()
    last.unlink()
    assert "meta/info.json (total_frames) states 27 steps, the files in data/ have" in refusal(folder)
    (folder / "meta/info.json").write_text("[1]")
    assert "meta/info.json holds [1]; expected an object" in refusal(folder)
    (folder / "meta/info.json").unlink()
    assert "x has no meta/info.json; expected all of a LeRobot folder" in refusal(folder)
    (folder / "meta/info.json").write_text('{"codebase_version": "v2.1"}')
    assert "meta/episodes states 27 steps, the files in data/ have" in refusal(folder)
    last.write_bytes(content)
    assert open_source(folder).num_steps == 27
    write_info(folder, "v3.0", episodes, total_episodes=5)
    assert "states 5 episodes, meta/episodes lists 4" in refusal(folder)


@pytest.mark.parametrize(
    "listed", [{"episode_index": [2**70], "length": [1]}, {"episode_index": [None], "length": [27]}]
)
def test_numbers_of_episodes_that_are_none_are_refused(listed: dict[str, list[object]], tmp_path: Path) -> None:
    folder = write_lerobot_v2(tmp_path / "x", random_episodes(LENGTHS))
    line = {name: values[0] for name, values in listed.items()}
    (folder / "meta/episodes.jsonl").write_text(json.dumps(line), encoding="utf-8")
    assert "cannot be read as" in refusal(folder)
    (folder / "meta/episodes.jsonl").unlink()
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    number = listed["episode_index"][0]
    table = pa.table({"episode_index": pa.array([None if number is None else 0.5]), "length": listed["length"]})
    pq.write_table(table, folder / "meta/episodes/chunk-000/file-000.parquet")
    refusal(folder)


def test_other_versions_of_lerobot_are_refused(tmp_path: Path) -> None:
    folder = write_lerobot_v2(tmp_path / "x", random_episodes(LENGTHS))
    write_info(folder, "v4.0", random_episodes(LENGTHS))
    assert "states the layout v4.0; expected v2 or v3" in refusal(folder)
    (folder / "meta/info.json").write_text("{", encoding="utf-8")
    assert "info.json cannot be read as JSON" in refusal(folder)
    (folder / "meta/info.json").write_text(json.dumps({}), encoding="utf-8")
    assert "meta/info.json states no codebase_version; expected v2 or v3" in refusal(folder)


def test_files_are_in_natural_order(tmp_path: Path) -> None:
    episodes = random_episodes([2] * 12)
    folder = tmp_path / "x"
    (folder / "data/chunk-0").mkdir(parents=True)
    for index, episode in enumerate(episodes):
        pq.write_table(lerobot_table([episode], index), folder / f"data/chunk-0/episode_{index}.parquet")
    write_info(folder, "v2.1", episodes)
    (steps,) = read(folder, [(0, 24)])
    np.testing.assert_array_equal(steps.values, np.concatenate(episodes))


def test_npz_reads_ascending_slices_of_a_compressed_array_without_beginning_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_npz(tmp_path / "x.npz", random_episodes([3000]), is_compressed=True)
    opened = []
    original = zipfile.ZipFile.open
    source = open_source(path)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *given, **named: opened.append(1) or original(*given, **named))
    reader = source.open(3)
    for start in range(0, 3000, 300):
        reader.read(start, start + 300)
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pan", "lift", "gripper"], ("pan", "lift", "gripper")),
        ([["pan", "lift", "gripper"]], ("pan", "lift", "gripper")),
        ({"arm": ["pan", "lift"], "hand": ["gripper"]}, ("pan", "lift", "gripper")),
        (["pan", "lift"], ()),
        (["pan", "", "gripper"], ()),
        ([1, 2, 3], ()),
        ("pan", ()),
        (None, ()),
    ],
)
def test_dimensions_have_the_names_that_lerobot_states(
    names: object, expected: tuple[str, ...], tmp_path: Path
) -> None:
    episodes = random_episodes((5, 6))
    folder = write_lerobot_v3(tmp_path / "robot", episodes)
    features = {"action": {"dtype": "float32", "shape": [3], "names": names}}
    write_info(folder, "v3.0", episodes, features=features)
    assert open_source(folder).action_names == expected
    dataset = load_actions(folder)
    assert dataset.dimensions == dataset.select([1]).dimensions == expected
    assert dataset.dimension(2) == ("dimension 2 (gripper)" if expected else "dimension 2")
