"""Chunk tokens of a dataset: which chunk each row is of, and that all steps come back."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from rfsq.rfsq_ref.data import load_actions
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.errors import FingerprintError, InvalidInputError, TokenizerError
from rfsq.runtime.bundle.fidelity import fidelity
from rfsq.runtime.datasets import conversion
from rfsq.runtime.datasets import tokenize as tokenize_dataset
from rfsq.runtime.datasets.coding import ChunkCoder
from rfsq.runtime.datasets.errors import IllegalActionError, TokenDatasetError, VerificationError
from rfsq.runtime.datasets.finish import complete
from rfsq.runtime.datasets.format import INFO_NAME, Outlier
from rfsq.runtime.datasets.job import plan, token_model
from rfsq.runtime.datasets.job_folder import begin, locked
from rfsq.runtime.datasets.ray import RayWorker, raise_refusal
from rfsq.runtime.datasets.token_reader import open_token_dataset
from tests.chunk_bundles import SMALL, ChunkRecipe, write_chunk_bundle
from tests.once import once
from tests.runtime.datasets.command import arguments, files, interrupt_at_the_end, refusal, run
from tests.runtime.datasets.samples import random_episodes, write_lerobot_v3, write_npz

#: Two parts where every step begins a chunk; episodes of one step, of less than a chunk, and of no whole chunks.
LENGTHS = (9001, 1, 3, 401)
T, L = SMALL.chunk_length, SMALL.num_tokens

#: The tokens of random constants are worth nothing.
WORTHLESS = 1


@pytest.fixture(scope="module")
def episodes() -> list[np.ndarray]:
    return random_episodes(LENGTHS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, episodes: list[np.ndarray]) -> Path:
    return write_lerobot_v3(tmp_path_factory.mktemp("source") / "demonstrations", episodes, row_group=1000)


@pytest.fixture(scope="session")
def chunk_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With generated C, compiled for this processor; not to be changed."""
    recipe = ChunkRecipe(c_targets=(host_targets()[0],))
    return once(tmp_path_factory, "chunk bundle for datasets", lambda path: write_chunk_bundle(path, recipe))


@pytest.fixture(scope="module")
def tokenizer(chunk_bundle: Path) -> ActionTokenizer:
    return ActionTokenizer.load(chunk_bundle)


def made(source: Path, output: Path, bundle: Path, *options: str) -> Path:
    assert tokenize_dataset.main(arguments(source, output, bundle, *options)) in (0, WORTHLESS)
    return output


def windows(episode: np.ndarray, stride: int) -> np.ndarray:
    """[n, T, A], one by one."""
    found = []
    for start in range(0, len(episode), stride):
        chunk = list(episode[start : start + T])
        found.append(chunk + [episode[-1]] * (T - len(chunk)))
    return np.array(found)


def columns(output: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, episodes and frames, read by pyarrow alone."""
    table = pyarrow.dataset.dataset(output / "data").to_table()
    column = table.column("tokens").combine_chunks()
    tokens = np.frombuffer(column.buffers()[1], "<u2").reshape(len(column), -1)
    return tokens, table.column("episode_index").to_numpy(), table.column("frame_index").to_numpy()


@pytest.mark.parametrize("stride", [1, 3, T])
def test_a_row_holds_the_tokens_of_the_chunk_that_begins_at_its_step(
    stride: int,
    source: Path,
    episodes: list[np.ndarray],
    tokenizer: ActionTokenizer,
    chunk_bundle: Path,
    tmp_path: Path,
) -> None:
    given = [] if stride == 1 else ["--stride", str(stride)]
    output = made(source, tmp_path / "tokens.parquet", chunk_bundle, *given)
    tokens, episode, frame = columns(output)
    expected = np.concatenate([windows(actions, stride) for actions in episodes])
    np.testing.assert_array_equal(tokens, tokenizer.encode(expected))
    places = [(number, start) for number, length in enumerate(LENGTHS) for start in range(0, length, stride)]
    assert list(zip(episode.tolist(), frame.tolist(), strict=True)) == places
    rows = [len(range(0, length, stride)) for length in LENGTHS]
    assert pq.read_table(output / "episodes.parquet").to_pydict() == {
        "episode_index": [0, 1, 2, 3],
        "name": [f"episode_{number}" for number in range(4)],
        "first_row": [0, *np.cumsum(rows)[:-1].tolist()],
        "num_steps": list(LENGTHS),
    }


def test_what_was_verified_is_counted_in_chunks(
    source: Path, chunk_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(source, tmp_path / "tokens", chunk_bundle)
    printed = capsys.readouterr().out
    # Each step stands in several chunks, and all chunks of these episodes are read back, or a sample of them.
    count = min(sum(LENGTHS), 4096)
    assert f"✓ verified: {count:,} chunks of {T} steps read back equal what the tokenizer gives" in printed
    assert f", on {count:,} chunks of {T} steps of the source" in printed
    made(tmp_path / "tokens", tmp_path / "again.npz", chunk_bundle, "--decode")
    assert f"✓ verified: {count:,} steps read back" in capsys.readouterr().out


def test_the_description_says_what_a_row_is(source: Path, chunk_bundle: Path, tmp_path: Path) -> None:
    output = made(source, tmp_path / "tokens.parquet", chunk_bundle, "--stride", "4", "--tokens", "5")
    info = json.loads((output / INFO_NAME).read_text(encoding="utf-8"))
    assert (info["schema_version"], info["num_steps"], info["num_episodes"]) == (2, sum(LENGTHS), 4)
    assert info["num_chunks"] == sum(-(-length // 4) for length in LENGTHS)
    assert info["model"] == {
        "mode": "chunk",
        "chunk_length": T,
        "action_dim": 3,
        "num_tokens": 5,
        "vocabulary": 256,
        "stride": 4,
    }
    assert "two bytes per token, little-endian" in info["ordering"]
    file = pq.ParquetFile(output / "data/chunk-000/file-000.parquet")
    assert file.schema_arrow.field("tokens").type == pa.binary(10)
    assert file.metadata.metadata[b"rfsq.schema_version"] == b"2"


def test_fewer_tokens_are_the_first_of_all(source: Path, chunk_bundle: Path, tmp_path: Path) -> None:
    every, few = (
        columns(made(source, tmp_path / f"{count}.parquet", chunk_bundle, "--stride", "4", "--tokens", str(count)))[0]
        for count in (L, 2)
    )
    assert few.shape[1] == 2
    np.testing.assert_array_equal(few, every[:, :2])


def test_zarr_is_read_by_its_own_library(source: Path, chunk_bundle: Path, tmp_path: Path) -> None:
    import zarr

    given = ("--stride", "3")
    tokens, episode, frame = columns(made(source, tmp_path / "tokens.parquet", chunk_bundle, *given))
    for compression in ("zstd", "none"):
        output = made(source, tmp_path / f"{compression}.zarr", chunk_bundle, *given, "--compression", compression)
        group = zarr.open_group(str(output), mode="r")
        assert group["data/tokens"].dtype == np.uint16
        np.testing.assert_array_equal(group["data/tokens"][:], tokens)
        np.testing.assert_array_equal(group["data/episode_index"][:], episode)
        np.testing.assert_array_equal(group["data/frame_index"][:], frame)
        ends = np.cumsum([len(range(0, length, 3)) for length in LENGTHS])
        assert group["meta/episode_ends"][:].tolist() == ends.tolist()
        assert group["meta/episode_steps"][:].tolist() == list(LENGTHS)


@pytest.mark.parametrize(("stride", "name"), [(1, "a.npz"), (3, "a.hdf5"), (T, "a.parquet"), (T, "a.npz")])
@pytest.mark.parametrize("tokens", [L, 4])
def test_every_step_is_decoded_once_from_the_chunk_that_begins_nearest_before(
    stride: int,
    name: str,
    tokens: int,
    source: Path,
    episodes: list[np.ndarray],
    tokenizer: ActionTokenizer,
    chunk_bundle: Path,
    tmp_path: Path,
) -> None:
    coded = tmp_path / ("tokens.zarr" if stride == 3 else "tokens.parquet")
    made(source, coded, chunk_bundle, "--stride", str(stride), "--tokens", str(tokens))
    run(coded, tmp_path / name, chunk_bundle, "--decode")
    dataset = load_actions(tmp_path / name)
    assert [len(actions) for actions in dataset.episodes] == list(LENGTHS)
    for actions, found in zip(episodes, dataset.episodes, strict=True):
        codes = tokenizer.encode(windows(actions, stride))[:, :tokens]
        expected = tokenizer.decode(codes)[:, :stride].reshape(-1, 3)[: len(actions)]
        np.testing.assert_array_equal(found, expected)


def test_the_reader_gives_rows_of_tokens(source: Path, chunk_bundle: Path, tmp_path: Path) -> None:
    output = made(source, tmp_path / "tokens.zarr", chunk_bundle, "--stride", "4")
    with ActionTokenizer.load(chunk_bundle) as tokenizer:
        dataset = open_token_dataset(output, expect_fingerprint=tokenizer.fingerprint)
        rows = dataset.open(dataset.info.width).read(2250, 2254)
        # The last of the first episode, the second, the third, and the first of the fourth.
        assert rows.episode.tolist() == [0, 1, 2, 3]
        assert rows.frame.tolist() == [9000, 0, 0, 0]
        assert (rows.values.dtype, rows.values.shape) == (np.uint16, (4, L))
        assert tokenizer.decode(rows.values).shape == (4, T, 3)
    assert dataset.episode_lengths().tolist() == list(LENGTHS)
    with pytest.raises(FingerprintError):
        open_token_dataset(output, expect_fingerprint="0" * 64)


def test_workers_and_interrupts_change_no_byte(
    source: Path,
    chunk_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    once_through = files(made(source, tmp_path / "once.parquet", chunk_bundle, "--workers", "1"))
    output = tmp_path / "again.parquet"
    interrupt_at_the_end(arguments(source, output, chunk_bundle), monkeypatch)
    capsys.readouterr()
    assert files(made(source, output, chunk_bundle)) == once_through
    assert f"going on: 2 parts, {sum(LENGTHS):,} chunks, finished by an earlier run" in capsys.readouterr().out


def test_a_gap_between_frames_is_passed_over(chunk_bundle: Path, tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    (actions,) = random_episodes((6,))
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 3)
    source, frames = tmp_path / "gap.parquet", [0, 1, 7, 8, 9, 20]
    pq.write_table(pa.table({"action": column, "episode_index": [5] * 6, "frame_index": frames}), source)
    tokens, episode, frame = columns(made(source, tmp_path / "every.parquet", chunk_bundle))
    assert (episode.tolist(), frame.tolist()) == ([5] * 6, frames)
    np.testing.assert_array_equal(tokens, tokenizer.encode(windows(actions, 1)))
    coded = made(source, tmp_path / "once.parquet", chunk_bundle, "--stride", "4")
    run(coded, tmp_path / "back.parquet", chunk_bundle, "--decode")
    table = pyarrow.dataset.dataset(tmp_path / "back.parquet" / "data").to_table()
    # From the first step of each chunk on.
    assert table.column("frame_index").to_pylist() == [0, 1, 2, 3, 9, 10]


def test_a_worker_elsewhere_does_the_same_job(source: Path, chunk_bundle: Path, tmp_path: Path) -> None:
    here = files(made(source, tmp_path / "here.parquet", chunk_bundle))
    output = tmp_path / "there.parquet"
    options = tokenize_dataset.parser().parse_args(arguments(source, output, chunk_bundle))
    with ActionTokenizer.load(chunk_bundle) as tokenizer:
        model = token_model(tokenizer.model, options)
        job = plan(conversion.open_actions(options, tokenizer, model), tokenizer, model, options, "parquet")
        with locked(job.output):
            begin(job, overwrite=False, restart=False)
            worker = RayWorker(pickle.dumps(job))
            for part in range(job.num_parts):
                raise_refusal(worker({"part": part}))
            complete(job, tokenizer, overwrite=False)
    assert files(output) == here


def test_another_stride_does_not_go_on_in_its_place(
    source: Path, chunk_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    interrupt_at_the_end(arguments(source, output, chunk_bundle), monkeypatch)
    message = refusal(*arguments(source, output, chunk_bundle, "--stride", "2"), kind=TokenizerError)
    assert '"stride": 1' in message
    assert '"stride": 2' in message


def test_an_illegal_action_is_refused_at_its_own_step(chunk_bundle: Path, tmp_path: Path) -> None:
    actions = random_episodes((40, 50))
    actions[1][17, 2] = np.nan
    source = write_npz(tmp_path / "bad.npz", actions)
    message = refusal(*arguments(source, tmp_path / "out.parquet", chunk_bundle), kind=IllegalActionError)
    assert "episode 1, step 17, dimension 2: nan" in message


def test_an_action_far_outside_is_named_by_its_own_step(chunk_bundle: Path, tmp_path: Path) -> None:
    actions = random_episodes((40, 50))
    actions[1][17, 2] = 1e4
    made(write_npz(tmp_path / "far.npz", actions), tmp_path / "out.parquet", chunk_bundle, "--stride", "4")
    info = json.loads((tmp_path / "out.parquet" / INFO_NAME).read_text(encoding="utf-8"))
    found = info["verification"]["farthest"]
    assert (found["episode"], found["step"], found["dimension"], found["value"]) == (1, 17, 2, 1e4)


def test_an_action_that_is_clipped_is_named_with_the_range(
    chunk_bundle: Path, tokenizer: ActionTokenizer, tmp_path: Path
) -> None:
    unit, offset = tokenizer.model.action_units, tokenizer.model.action_offset
    actions = [np.clip(one, np.subtract(offset, unit), np.add(offset, unit)) for one in random_episodes((40, 50))]
    source = write_npz(tmp_path / "within.npz", actions)
    made(source, tmp_path / "within.parquet", chunk_bundle)
    assert "farthest" not in (tmp_path / "within.parquet" / INFO_NAME).read_text(encoding="utf-8")
    actions[1][17, 2] = offset[2] + 1.01 * unit[2]
    made(write_npz(tmp_path / "beyond.npz", actions), tmp_path / "beyond.parquet", chunk_bundle)
    info = json.loads((tmp_path / "beyond.parquet" / INFO_NAME).read_text(encoding="utf-8"))
    found = info["verification"]["farthest"]
    assert (found["episode"], found["step"], found["dimension"]) == (1, 17, 2)
    assert found["reach"] == pytest.approx(1.01)


def test_the_warning_of_a_clipped_action_says_the_range_and_what_helps() -> None:
    actions = random_episodes((40,))[0]
    worth = fidelity(actions, actions, (1.0, 1.0, 2.0), (0.0, 0.0, 1.0))
    far = Outlier(reach=1.5, value=4.0, episode=3, step=17, dimension=2)
    assert tokenize_dataset._about(far, worth, is_chunk=True).startswith(
        "WARNING: episode 3, step 17, dimension 2 is 4, beyond the range of the tokens, from -1 to 3, and decodes as "
        "the end of that. Fit them again to actions that reach as far, or to the limits of the robot"
    )


def test_what_does_not_belong_together_is_refused(
    source: Path, chunk_bundle: Path, c_bundle: Path, tmp_path: Path
) -> None:
    def refused(bundle: Path, *options: str) -> str:
        return refusal(*arguments(source, tmp_path / "out.parquet", bundle, *options), kind=InvalidInputError)

    assert "--stride is 5; expected 1 ... 4" in refused(chunk_bundle, "--stride", "5")
    assert "--tokens is 10; expected 1 ... 9" in refused(chunk_bundle, "--tokens", "10")
    assert "--stride and --tokens is for chunk tokens" in refused(c_bundle, "--stride", "2", "--tokens", "3")
    assert "leave them out" in refused(chunk_bundle, "--decode", "--stride", "2")


def test_verification_finds_tokens_that_are_not_those_of_the_source(
    source: Path, chunk_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ChunkCoder.encode

    def wrong(self: ChunkCoder, rows: np.ndarray) -> np.ndarray:
        tokens = encode(self, rows)
        tokens[0, -1] ^= 1
        return tokens

    monkeypatch.setattr(ChunkCoder, "encode", wrong)
    message = refusal(*arguments(source, tmp_path / "out.parquet", chunk_bundle), kind=VerificationError)
    assert "what was read back at row 0 is not what the tokenizer gives" in message


@pytest.mark.parametrize("change", [('"schema_version": 2', '"schema_version": 1'), ('"stride": 4', '"stride": 2')])
def test_an_altered_description_is_refused(
    change: tuple[str, str], source: Path, chunk_bundle: Path, tmp_path: Path
) -> None:
    output = made(source, tmp_path / "tokens.parquet", chunk_bundle, "--stride", "4")
    text = (output / INFO_NAME).read_text(encoding="utf-8")
    assert change[0] in text
    (output / INFO_NAME).write_text(text.replace(*change), encoding="utf-8")
    message = refusal(*arguments(output, tmp_path / "x.npz", chunk_bundle, "--decode"), kind=TokenDatasetError)
    assert "was altered after it was written" in message
