"""The command: what it writes, that nothing interrupts it for good, and what it refuses."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import FingerprintError, InvalidInputError, TokenizerError
from rfsq.runtime.bundle.fidelity import Grade, fidelity
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.datasets import action_files, job_folder
from rfsq.runtime.datasets import tokenize as tokenize_dataset
from rfsq.runtime.datasets.errors import IllegalActionError, OutputError, SourceError, TokenDatasetError
from rfsq.runtime.datasets.format import INFO_NAME, info_text, parse_info
from rfsq.runtime.datasets.progress import Progress
from rfsq.runtime.datasets.token_reader import open_token_dataset
from tests.bundles import Recipe
from tests.runtime.datasets.command import LENGTHS, PART, ROOT, arguments, files, refusal, run
from tests.runtime.datasets.samples import (
    LAYOUTS,
    lerobot_table,
    random_episodes,
    write_layout,
    write_lerobot_v3,
    write_npz,
    write_robomimic,
)

#: D, L of the small bundles.
SHAPE = (4, 3)


@pytest.fixture(scope="session")
def episodes() -> list[np.ndarray]:
    return random_episodes(LENGTHS)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, episodes: list[np.ndarray]) -> Path:
    """LeRobot v3, 20,001 steps; not to be changed."""
    return write_lerobot_v3(tmp_path_factory.mktemp("source") / "demonstrations", episodes)


@pytest.fixture(scope="session")
def expected(c_bundle: Path, episodes: list[np.ndarray]) -> np.ndarray:
    """uint8 [N, D, L]: what the tokenizer gives for the steps, chunk by chunk."""
    steps = np.concatenate(episodes)
    with ActionTokenizer.load(c_bundle) as tokenizer:
        return tokenizer.encode(np.concatenate([steps, steps[-1:]]).reshape(-1, 2, 3)).reshape(-1, *SHAPE)[:-1]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, source: Path, c_bundle: Path) -> Path:
    """A dataset of tokens in three parts; not to be changed."""
    output = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    run(source, output, c_bundle)
    return output


@pytest.fixture
def altered(tokens: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "altered"
    for name in files(tokens):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((tokens / name).read_bytes())
    return copy


# --- what is written --------------------------------------------------------------------------------------------------


def test_parquet_has_a_row_for_every_step(tokens: Path, expected: np.ndarray) -> None:
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(tokens / "data").to_table()
    column = table.column("tokens").combine_chunks()
    assert column.type == pa.binary(12)
    found = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, *SHAPE)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(table.column("episode_index").to_numpy(), np.repeat(np.arange(4), LENGTHS))
    np.testing.assert_array_equal(table.column("frame_index").to_numpy(), np.concatenate(list(map(np.arange, LENGTHS))))
    assert sorted(files(tokens)) == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-000/file-002.parquet",
        INFO_NAME,
        "episodes.parquet",
    ]


def test_parquet_lists_its_episodes(tokens: Path) -> None:
    assert pq.read_table(tokens / "episodes.parquet").to_pydict() == {
        "episode_index": [0, 1, 2, 3],
        "name": [f"episode_{number}" for number in range(4)],
        "first_row": [0, 9000, 9001, 13001],
        "num_steps": list(LENGTHS),
    }


def test_zarr_is_read_by_its_own_library(
    source: Path, c_bundle: Path, expected: np.ndarray, tmp_path: Path, tokens: Path
) -> None:
    for compression in ("zstd", "none"):
        output = tmp_path / f"{compression}.zarr"
        run(source, output, c_bundle, "--compression", compression)
        import zarr

        group = zarr.open_group(str(output), mode="r")
        np.testing.assert_array_equal(group["data/tokens"][:], expected)
        np.testing.assert_array_equal(group["data/tokens"][8190:8195], expected[8190:8195])
        np.testing.assert_array_equal(group["data/episode_index"][:], np.repeat(np.arange(4), LENGTHS))
        assert group["data/frame_index"][-1] == LENGTHS[-1] - 1
        assert group["meta/episode_ends"][:].tolist() == np.cumsum(LENGTHS).tolist()
        assert group["meta/episode_index"][:].tolist() == [0, 1, 2, 3]
        assert [name.decode() for name in group["meta/episode_name"][:]] == [f"episode_{index}" for index in range(4)]
        info = json.loads((tokens / INFO_NAME).read_text(encoding="utf-8"))
        assert group.attrs["rfsq.fingerprint"] == info["fingerprint"]
        assert group.attrs["rfsq.source_sha256"] == info["source"]["sha256"]
        assert group.attrs["rfsq.model"] == info["model"]


def test_a_filter_key_chooses_the_episodes_that_are_written(
    episodes: list[np.ndarray], c_bundle: Path, tmp_path: Path
) -> None:
    short = [episode[:50] for episode in episodes]
    path = write_robomimic(tmp_path / "a.hdf5", short, train=[3, 0], valid=[2])
    run(path, tmp_path / "train.parquet", c_bundle, "--filter-key", "mask/train")
    dataset = open_token_dataset(tmp_path / "train.parquet")
    chosen = np.concatenate([short[0], short[3]])
    with ActionTokenizer.load(c_bundle) as tokenizer:
        np.testing.assert_array_equal(
            pq.read_table(tmp_path / "train.parquet/data").column("tokens").to_pylist(),
            [
                step.astype(np.uint8).tobytes()
                for step in tokenizer.encode(chosen.reshape(-1, 2, 3)).reshape(-1, *SHAPE)
            ],
        )
    listed = pq.read_table(tmp_path / "train.parquet/episodes.parquet").to_pydict()
    assert listed["name"] == ["a/demo_0", "a/demo_3"]
    assert dataset.info.source.filter_key == "train"


def test_a_filter_key_that_chooses_nothing_is_refused(
    tokens: Path, episodes: list[np.ndarray], c_bundle: Path, tmp_path: Path
) -> None:
    path, output = write_robomimic(tmp_path / "a.hdf5", episodes[1:2], train=[0]), tmp_path / "out.parquet"
    for given, message in (
        ((path, output, c_bundle, "--filter-key", "test"), "has no filter key 'test'; found train"),
        ((write_npz(tmp_path / "a.npz", episodes), output, c_bundle, "--filter-key", "train"), "leave --filter-key"),
    ):
        assert message in refusal(*arguments(*given), kind=SourceError)
    decoded = arguments(tokens, output, c_bundle, "--decode", "--filter-key", "train")
    assert "--decode takes every token of --data; leave it out" in refusal(*decoded, kind=InvalidInputError)
    assert not output.exists()


def test_where_all_episodes_are_taken_nothing_is_said_of_filter_keys(tokens: Path) -> None:
    """So that what was written before there were any is read and spelled as ever."""
    text = (tokens / INFO_NAME).read_text(encoding="utf-8")
    assert "filter_key" not in text
    assert parse_info(text, tokens / INFO_NAME).source.filter_key is None


def test_metadata_say_what_the_tokens_mean(tokens: Path, c_bundle: Path, source: Path) -> None:
    info = json.loads((tokens / INFO_NAME).read_text(encoding="utf-8"))
    with ActionTokenizer.load(c_bundle) as tokenizer:
        assert info["fingerprint"] == tokenizer.fingerprint
        assert info["made_with"]["device"] == tokenizer.backend.description
    assert info["schema_version"] == 1
    model = {
        "mode": "calibrated",
        "chunk_length": 2,
        "action_dim": 3,
        "latent_dim": 4,
        "num_layers": 3,
        "num_levels": 5,
    }
    assert info["model"] == model
    assert "byte d * num_layers + l" in info["ordering"]
    assert (info["num_steps"], info["num_episodes"]) == (20_001, 4)
    assert info["source"]["name"] == source.name
    assert 0 < info["verification"]["mean_error"] < info["verification"]["max_error"]
    # A file that was taken out of its folder still says it.
    metadata = pq.read_metadata(tokens / "data/chunk-000/file-001.parquet").metadata
    assert metadata[b"rfsq.fingerprint"].decode() == info["fingerprint"]
    assert metadata[b"rfsq.schema_version"].decode() == "1"
    assert json.loads(metadata[b"rfsq.model"]) == model
    assert metadata[b"rfsq.first_row"] == b"8192"
    assert {b"rfsq.ordering", b"rfsq.source_sha256"} <= metadata.keys()


def test_the_source_hash_is_that_of_the_steps(tokens: Path, episodes: list[np.ndarray]) -> None:
    steps = np.concatenate(episodes)
    number = np.repeat(np.arange(4), LENGTHS)
    frame = np.concatenate(list(map(np.arange, LENGTHS)))
    digests = [
        hashlib.sha256(b"".join(part[row : row + PART].tobytes() for part in (steps, number, frame))).digest()
        for row in range(0, len(steps), PART)
    ]
    info = json.loads((tokens / INFO_NAME).read_text(encoding="utf-8"))
    assert info["source"]["sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tokens_and_the_same_source_hash(
    layout: str, c_bundle: Path, tokens: Path, episodes: list[np.ndarray], tmp_path: Path
) -> None:
    run(write_layout(layout, tmp_path, episodes), tmp_path / "out.parquet", c_bundle)
    for name in ("data/chunk-000/file-000.parquet", "data/chunk-000/file-002.parquet"):
        assert (tmp_path / "out.parquet" / name).read_bytes() == (tokens / name).read_bytes()
    found, expected = (open_token_dataset(folder).info for folder in (tmp_path / "out.parquet", tokens))
    assert found.source.sha256 == expected.source.sha256


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("backend", ["c", "onnxruntime"])
def test_the_number_of_workers_changes_no_byte(
    workers: str, backend: str, source: Path, c_bundle: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "one.parquet", c_bundle, "--backend", backend)
    run(source, tmp_path / "other.parquet", c_bundle, "--backend", backend, "--workers", workers)
    assert files(tmp_path / "one.parquet") == files(tmp_path / "other.parquet")


def test_memory_does_not_grow_with_the_dataset(c_bundle: Path, tmp_path: Path) -> None:
    peaks = []
    for steps in (500_000, 3_500_000):
        np.savez(tmp_path / "x.npz", actions=np.resize(random_episodes([10_000])[0], (steps, 3)))
        # Not getrusage, which begins with the memory of the process that starts this one.
        code = (
            "import re, sys; from rfsq.runtime.datasets.tokenize import main; assert main(sys.argv[1:]) == 0; "
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
        )
        given = arguments(tmp_path / "x.npz", tmp_path / f"{steps}.parquet", c_bundle)[:5]
        result = subprocess.run(
            [sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    # The actions alone grew by 36 MB, the tokens by as much.
    assert peaks[1] - peaks[0] < 30
    assert peaks[1] < 500


def test_the_command_needs_numpy_pyarrow_and_the_backend_alone(
    source: Path, c_bundle: Path, tokens: Path, tmp_path: Path
) -> None:
    others = ("torch", "onnx", "onnxruntime", "polygraphy", "zarr", "tqdm", "ray", "h5py", "rfsq_ref", "export")
    code = (
        f"import sys\nfor name in {others}:\n    sys.modules[name] = None\n"
        "from rfsq.runtime.datasets.tokenize import main\nsys.exit(main(sys.argv[1:]))"
    )
    given = arguments(source, tmp_path / "out.parquet", c_bundle)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert files(tmp_path / "out.parquet") == files(tokens)
    given += ["--restart", "--engine", "ray"]
    given[4] = str(tmp_path / "ray.parquet")
    result = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: --engine ray needs Ray, which cannot be imported" in result.stderr


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, -1e30])
def test_an_illegal_action_is_refused_with_file_episode_and_step(value: float, c_bundle: Path, tmp_path: Path) -> None:
    episodes = random_episodes(LENGTHS)
    episodes[2][1234, 1] = value
    folder = write_lerobot_v3(tmp_path / "x", episodes)
    message = refusal(*arguments(folder, tmp_path / "out.parquet", c_bundle), kind=IllegalActionError)
    assert message.startswith(
        f"data/chunk-000/file-001.parquet, episode 2, step 1234, dimension 1: {np.float32(value)};"
    )
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("place", [100, PART - 1, PART, LENGTHS[0] - 1])
def test_steps_out_of_order_are_refused(place: int, c_bundle: Path, tmp_path: Path) -> None:
    table = lerobot_table(random_episodes(LENGTHS))
    order = np.arange(len(table))
    order[[place, place + 1]] = order[[place + 1, place]]
    pq.write_table(table.take(order), tmp_path / "x.parquet")
    given = arguments(tmp_path / "x.parquet", tmp_path / "out.parquet", c_bundle)
    assert "; expected ascending episodes, each in one piece" in refusal(*given, kind=SourceError)


def test_other_lengths_than_stated_are_refused(c_bundle: Path, tmp_path: Path) -> None:
    folder = write_lerobot_v3(tmp_path / "x", random_episodes([50, 60]))
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pa.table({"episode_index": [0, 1], "length": [60, 50]}), path)
    given = arguments(folder, tmp_path / "out.parquet", c_bundle)
    assert "episode 0 has 50 steps where 60 are stated" in refusal(*given, kind=SourceError)
    pq.write_table(pa.table({"episode_index": [0, 7], "length": [50, 60]}), path)
    assert "episode 1 stands where 7 is stated" in refusal(*given, kind=SourceError)


@pytest.mark.parametrize("steps", [1, 511, 513, 4095, 4097])
def test_the_verification_counts_every_step_once(steps: int, c_bundle: Path, tmp_path: Path) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 3)).astype(np.float32)
    run(write_npz(tmp_path / "x.npz", [actions]), tmp_path / "x.parquet", c_bundle)
    assert open_token_dataset(tmp_path / "x.parquet").info.verification.steps == min(steps, 4096)


def test_unfit_bundles_and_options_are_refused(
    source: Path, bundle_of: Callable[[Recipe], Path], c_bundle: Path, tmp_path: Path
) -> None:
    from rfsq.export.plan import DeployMode

    dynamic = bundle_of(Recipe(mode=DeployMode.DYNAMIC))
    output = tmp_path / "out.parquet"
    assert "tokens of a `dynamic` bundle mean nothing" in refusal(
        *arguments(source, output, dynamic), kind=TokenizerError
    )
    given = arguments(source, output, c_bundle, "--expect-fingerprint", "0" * 64)
    assert "expected '0000" in refusal(*given, kind=FingerprintError)
    for steps in ("1", "1000"):
        said = refusal(*arguments(source, output, c_bundle), "--steps-per-file", steps, kind=TokenizerError)
        assert said.endswith(
            f"--steps-per-file is {steps}; expected a multiple of 65536, or a smaller multiple of 8192"
        )
    assert "--ray-address is for --engine ray alone" in refusal(
        *arguments(source, output, c_bundle), "--ray-address", "localhost:1", kind=TokenizerError
    )
    assert "whose name tells no format; tokens are written as parquet, zarr" in refusal(
        *arguments(source, tmp_path / "out.v2", c_bundle), kind=OutputError
    )
    assert "is the format 'npz'; tokens are written as parquet, zarr" in refusal(
        *arguments(source, tmp_path / "out.npz", c_bundle), kind=OutputError
    )
    assert list(tmp_path.iterdir()) == []


# --- back to actions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["parquet", "zarr"])
@pytest.mark.parametrize("name", ["actions.npz", "actions.hdf5", "actions.parquet"])
def test_tokens_become_the_actions_that_the_tokenizer_gives(
    storage: str, name: str, source: Path, c_bundle: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    encoded, output = tmp_path / f"tokens.{storage}", tmp_path / name
    run(source, encoded, c_bundle)
    run(encoded, output, c_bundle, "--decode")
    with ActionTokenizer.load(c_bundle) as tokenizer:
        padded = np.concatenate([expected, expected[-1:]]).reshape(-1, 2, *SHAPE)
        actions = tokenizer.decode(padded).reshape(-1, 3)[:-1]
    # In a layout that everything here reads.
    read = load_actions(output)
    assert [len(episode) for episode in read.episodes] == list(LENGTHS)
    np.testing.assert_array_equal(read.steps(), actions)


def test_decoded_actions_are_held_against_their_own_table_of_contents(
    tokens: Path, c_bundle: Path, tmp_path: Path
) -> None:
    run(tokens, tmp_path / "x.parquet", c_bundle, "--decode")
    (tmp_path / "x.parquet/data/chunk-000/file-002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"dataset\.json \(num_steps\) states 20001 steps, the files in data/ have 16384"
    ):
        load_actions(tmp_path / "x.parquet")


def test_decoded_files_are_whole_and_the_same_each_time(tokens: Path, c_bundle: Path, tmp_path: Path) -> None:
    for suffix in ("npz", "hdf5"):
        output = tmp_path / f"x.{suffix}"
        run(tokens, output, c_bundle, "--decode")
        first = output.read_bytes()
        given = arguments(tokens, output, c_bundle, "--decode")
        assert "exists; give another name, or --overwrite" in refusal(*given, kind=OutputError)
        run(tokens, output, c_bundle, "--decode", "--overwrite")
        assert output.read_bytes() == first
        run(tokens, tmp_path / suffix, c_bundle, "--decode", "--format", suffix)
        assert (tmp_path / suffix).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdf5", "npz", "x.hdf5", "x.npz"]


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
@pytest.mark.parametrize("limit", [200, 5000, 100_000, 241_000])
def test_a_decoded_file_that_may_not_grow_is_an_error_and_leaves_nothing(
    limit: int, suffix: str, tokens: Path, c_bundle: Path, tmp_path: Path
) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1));"
    code = f"import sys; {limited} from rfsq.runtime.datasets.tokenize import main; sys.exit(main())"
    given = arguments(tokens, tmp_path / f"x.{suffix}", c_bundle, "--decode")
    found = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    # The C engine may have no room either, which a line says.
    *_, line = lines = found.stderr.splitlines()
    assert len(lines) <= 2
    assert re.search(r"^error: .* cannot be written: \[Errno 27\] File too large; make room or choose another", line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_overwriting_replaces_no_file_that_was_not_written_here(
    suffix: str, tokens: Path, c_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"x.{suffix}"
    given = arguments(tokens, output, c_bundle, "--decode", "--overwrite")

    def refused() -> None:
        before = output.is_file() and output.read_bytes()
        assert f"{output} was not written here" in refusal(*given, kind=OutputError)
        assert (output.is_file() and output.read_bytes()) == before

    output.write_text("notes")
    refused()
    write_npz(output, random_episodes([3])) if suffix == "npz" else write_robomimic(output, random_episodes([3]))
    refused()
    output.unlink()
    os.mkfifo(output)
    refused()


@pytest.mark.parametrize("steps", [1000, 4500, 9000, 9001, 13_001])
def test_slices_end_anywhere_in_decoded_episodes(
    steps: int, tokens: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tokens, tmp_path / "whole.hdf5", c_bundle, "--decode")
    monkeypatch.setattr(action_files, "_SLICE_STEPS", steps)
    run(tokens, tmp_path / "cut.hdf5", c_bundle, "--decode")
    whole, cut = (load_actions(tmp_path / f"{name}.hdf5") for name in ("whole", "cut"))
    assert [len(episode) for episode in cut.episodes] == list(LENGTHS)
    assert cut.sha256 == whole.sha256


def test_decoded_hdf5_bears_the_numbers_of_the_episodes(c_bundle: Path, tmp_path: Path) -> None:
    table = lerobot_table(random_episodes([30, 40]), first=7)
    pq.write_table(table, tmp_path / "x.parquet")
    run(tmp_path / "x.parquet", tmp_path / "tokens.parquet", c_bundle)
    run(tmp_path / "tokens.parquet", tmp_path / "x.hdf5", c_bundle, "--decode")
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert {name: len(file[f"data/{name}/actions"]) for name in file["data"]} == {"demo_7": 30, "demo_8": 40}


def test_tokens_of_another_tokenizer_are_refused(
    tokens: Path, bundle_of: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    other = bundle_of(Recipe(seed=1))
    message = refusal(*arguments(tokens, tmp_path / "x.npz", other, "--decode"), kind=FingerprintError)
    for part in ("have the fingerprint", "expected", "use the bundle that made them", "docs/integration.md"):
        assert part in message
    # What can be done about a policy is on that page.
    assert "(A) retrain" not in message
    with pytest.raises(FingerprintError):
        open_token_dataset(tokens, expect_fingerprint="0" * 64)
    fingerprint = open_token_dataset(tokens).info.fingerprint
    assert open_token_dataset(tokens, expect_fingerprint=fingerprint[:8]).num_steps == 20_001
    with pytest.raises(InvalidInputError, match="of 7 characters"):
        open_token_dataset(tokens, expect_fingerprint=fingerprint[:7])


def test_another_schema_version_is_refused(altered: Path, c_bundle: Path, tmp_path: Path) -> None:
    path = altered / INFO_NAME
    text = path.read_text(encoding="utf-8")
    for version in ("0", "3", "true", '"1"', "null", "1.5"):
        path.write_text(text.replace('"schema_version": 1', f'"schema_version": {version}'), encoding="utf-8")
        message = refusal(*arguments(altered, tmp_path / "x.npz", c_bundle, "--decode"), kind=TokenDatasetError)
        assert f"has schema version {json.loads(version)!r}; this runtime reads 1 and 2" in message


@pytest.mark.parametrize("name", ["data/chunk-000/file-001.parquet", "episodes.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_truncated_altered_and_missing_files_are_refused(
    name: str, damage: str, altered: Path, c_bundle: Path, tmp_path: Path
) -> None:
    path = altered / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    for output in ("x.npz", "x.parquet"):
        message = refusal(*arguments(altered, tmp_path / output, c_bundle, "--decode"), kind=TokenDatasetError)
        assert name in message
        assert "copy the dataset again, or tokenise the source again" in message
        assert not (tmp_path / output).exists()


def test_truncated_and_missing_chunks_of_zarr_are_refused(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "x.zarr", c_bundle)
    for name in ("data/tokens/1.0.0", "data/frame_index/2", "meta/episode_ends/0", "data/tokens/.zarray"):
        path = tmp_path / "x.zarr" / name
        content = path.read_bytes()
        for damaged in (content[:-1], bytes(len(content)), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            if damaged == bytes(len(content)) and ".z" in name:
                continue  # The description of an array is for others: nothing here reads it.
            given = arguments(tmp_path / "x.zarr", tmp_path / "x.npz", c_bundle, "--decode")
            assert name in refusal(*given, kind=TokenDatasetError)
            path.write_bytes(content)


def test_an_altered_description_is_refused(altered: Path, c_bundle: Path, tmp_path: Path) -> None:
    path = altered / INFO_NAME
    text = path.read_text(encoding="utf-8")
    for changed in (
        text.replace('"num_steps": 20001', '"num_steps": 20000'),
        text.replace('"latent_dim": 4', '"latent_dim": 12').replace('"num_layers": 3', '"num_layers": 1'),
        text.replace('"schema_version": 1', '"schema_version": 1, "more": 2'),
        text[:-40],
        text + " ",
        "[]",
        "",
    ):
        path.write_text(changed, encoding="utf-8")
        refusal(*arguments(altered, tmp_path / "x.npz", c_bundle, "--decode"), kind=TokenDatasetError)


@pytest.mark.parametrize("output", ["x.npz", "x.parquet"])
def test_tokens_without_decode_are_told_of_it(output: str, tokens: Path, c_bundle: Path, tmp_path: Path) -> None:
    message = refusal(*arguments(tokens, tmp_path / output, c_bundle), kind=InvalidInputError)
    assert message == f"{tokens} holds tokens; turn them into actions with --decode"


def test_the_document_tells_what_was_written_apart_from_what_was_verified(
    source: Path, c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize_dataset.main([*arguments(source, tmp_path / "out.parquet", c_bundle), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["episodes"], document["steps"], document["verification"]["steps"]) == (4, 20_001, 4096)
    assert document["fingerprint"] == open_bundle(c_bundle).manifest.fingerprint
    assert document["grade"] in list(Grade)


def test_what_is_no_token_dataset_is_refused(tokens: Path, source: Path, c_bundle: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        return refusal(*arguments(path, tmp_path / "x.npz", c_bundle, "--decode"), kind=TokenDatasetError)

    assert "is no token dataset: expected a folder with dataset.json, found a folder without it" in message(source)
    assert "found nothing" in message(tmp_path / "nothing")
    assert "found a file" in message(tokens / INFO_NAME)
    (tmp_path / "begun.parquet.partial").mkdir()
    assert "is not finished: run the command that was making it again" in message(tmp_path / "begun.parquet")
    run(tokens, tmp_path / "actions.parquet", c_bundle, "--decode")
    assert "holds actions; expected tokens" in message(tmp_path / "actions.parquet")


# --- shown ------------------------------------------------------------------------------------------------------------


def test_progress_tells_rate_and_time_left() -> None:
    now = iter([0.0, 0.0, 2.0, 2.0])
    progress = Progress(10_000_000, 4_000_000, clock=lambda: next(now, 2.0))
    progress.begin()
    progress.add(2_000_000)
    assert progress.line() == "6,000,000 of 10,000,000 steps, 60.0%, 1.00 million steps/s, 4 s left"
    assert Progress(1, clock=lambda: 0.0).line() == "0 of 1 step, 0.0%, time left unknown"


@pytest.mark.parametrize(
    ("steps", "seconds", "speed"),
    [
        (0, 5.0, ""),
        # That took as long as it takes to begin.
        (20_001, 0.3, ""),
        (500, 10.0, "50 steps/s"),
        (99_000, 1.0, "99,000 steps/s"),
        (300_000, 3.0, "0.10 million steps/s"),
        (50_000_000, 10.0, "5.00 million steps/s"),
    ],
)
def test_a_rate_is_told_where_it_means_something(steps: int, seconds: float, speed: str) -> None:
    now = iter([0.0, 0.0])
    progress = Progress(10**9, clock=lambda: next(now, seconds))
    progress.begin()
    progress.add(steps)
    progress.finish()
    assert progress.speed == speed
    assert ("steps/s" in progress.line()) is bool(speed)


def test_the_command_says_what_it_did(
    source: Path, c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "out.zarr", c_bundle)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*: 20,001 steps in 3 parts; c, generated C for .*", lines[0])
    assert re.fullmatch(r"✓ 20,001 steps in (less than 1 s|\d+ s, .* steps/s)", lines[1])
    assert re.fullmatch(r"✓ verified: 4,096 steps read back equal what the tokenizer gives", lines[2])
    assert re.fullmatch(
        r"✓ .*out.zarr: 20,001 steps of 4 episodes, .* fingerprint [0-9a-f]{16}, source [0-9a-f]{16}", lines[3]
    )


def test_a_name_without_a_suffix_is_a_folder_of_parquet_and_its_data_opens_as_one_table(
    source: Path, c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "out", c_bundle)
    data = tmp_path / "out" / "data"
    assert f"pandas and pyarrow read {data}\n" in capsys.readouterr().out
    table = pq.read_table(data)
    assert (table.column_names, len(table)) == (["episode_index", "frame_index", "tokens"], 20_001)


def test_poor_tokens_are_told_by_dimension_and_worthless_ones_end_red(
    c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same words as a build's, from what is decoded; and again where the same command is run again."""
    steps = np.random.default_rng(3).uniform(-1, 1, (3000, 3)).astype(np.float32)
    run(write_npz(tmp_path / "own.npz", [steps]), tmp_path / "poor.parquet", c_bundle)
    with ActionTokenizer.load(c_bundle) as tokenizer:
        model, decoded = tokenizer.model, tokenizer.decode(tokenizer.encode(steps.reshape(-1, 2, 3))).reshape(-1, 3)
    found = fidelity(steps, decoded, model.action_units, model.action_offset)
    assert found.grade is Grade.POOR
    *_, line, warning = capsys.readouterr().out.splitlines()
    assert line.startswith("what the tokens are worth: poor; in robot units: ")
    assert warning == found.warning_in("calibrated")
    recorded = open_token_dataset(tmp_path / "poor.parquet").info.verification.fidelity
    assert recorded is not None
    assert recorded.rmse == pytest.approx(found.rmse)
    assert (recorded.largest, recorded.low, recorded.high) == (found.largest, found.low, found.high)

    degrees = write_npz(tmp_path / "degrees.npz", [np.degrees(steps)])
    given = arguments(degrees, tmp_path / "worthless.parquet", c_bundle)
    assert tokenize_dataset.main(given) == 1
    *_, warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith(
        "WARNING: the tokens are worthless: always sending the mean would do better, or about as "
    )
    assert "lie far outside of what the model was trained for" in warning
    assert "radians or degrees" in warning
    output = tmp_path / "worthless.parquet"
    assert last == f"WARNING: {output} is there all the same, and the exit status is 1: do not train a policy on it"
    assert (output / INFO_NAME).is_file()


def test_a_single_action_far_outside_is_named_wherever_it_lies(
    c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = random_episodes(LENGTHS)
    run(write_npz(tmp_path / "x.npz", episodes), tmp_path / "good.parquet", c_bundle)
    assert "farthest" not in (tmp_path / "good.parquet" / INFO_NAME).read_text()
    assert "is 1e+06" not in capsys.readouterr().out
    # Outside of the sample, in the second of three parts.
    episodes[2][[300, 310], 1] = 1e6, -9e5
    run(write_npz(tmp_path / "x.npz", episodes), tmp_path / "far.parquet", c_bundle)
    assert "WARNING: episode 2, step 300, dimension 1 is 1e+06, " in capsys.readouterr().out
    found = open_token_dataset(tmp_path / "far.parquet").info.verification.farthest
    assert found is not None
    assert (found.value, found.episode, found.step, found.dimension) == (1e6, 2, 300, 1)


def test_worthless_tokens_end_red_where_an_earlier_run_has_made_them(
    c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = np.degrees(np.random.default_rng(3).uniform(-1, 1, (300, 3))).astype(np.float32)
    given = arguments(write_npz(tmp_path / "degrees.npz", [steps]), tmp_path / "out.parquet", c_bundle)
    with monkeypatch.context() as patch:
        # As if killed when all was done but cleaning up.
        patch.setattr(job_folder, "_clean_up", lambda _: None)
        assert tokenize_dataset.main(given) == 1
    capsys.readouterr()
    assert tokenize_dataset.main(given) == 1
    printed = capsys.readouterr().out
    assert "was finished by an earlier run" in printed
    assert "WARNING: the tokens are worthless" in printed


def test_a_dataset_of_before_the_verdict_was_recorded_is_read(tokens: Path) -> None:
    info = open_token_dataset(tokens).info
    before = dataclasses.replace(info, verification=dataclasses.replace(info.verification, fidelity=None))
    text = info_text(before)
    assert "fidelity" not in text
    assert parse_info(text, tokens / INFO_NAME) == before


@pytest.mark.parametrize("name", ["num_steps", "num_episodes", "steps_per_block", "steps_per_file"])
def test_a_dataset_of_no_steps_is_refused(name: str, tokens: Path) -> None:
    text = info_text(dataclasses.replace(open_token_dataset(tokens).info, **{name: 0}))
    with pytest.raises(TokenDatasetError, match="states a dataset without steps, episodes or"):
        parse_info(text, tokens / INFO_NAME)


def test_verification_finds_tokens_that_are_not_those_of_the_source(
    source: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rfsq.runtime.datasets.coding import StepCoder

    encode = StepCoder.encode

    def wrong(self: StepCoder, actions: np.ndarray) -> np.ndarray:
        tokens = encode(self, actions)
        tokens[0, 0] ^= 1
        return tokens

    monkeypatch.setattr(StepCoder, "encode", wrong)
    message = refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=TokenizerError)
    assert "what was read back at row 0 is not what the tokenizer gives" in message
    assert not (tmp_path / "out.parquet").exists()
