"""The folder of a job in progress: only ours is touched, and what a refusal leaves stands in nobody's way."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rfsq.runtime.bundle.errors import TokenizerError
from rfsq.runtime.bundle.ownership import Ownership
from rfsq.runtime.bundle.paths import LINKS_IN_A_CIRCLE, sync
from rfsq.runtime.datasets import conversion
from rfsq.runtime.datasets import tokenize as tokenize_dataset
from rfsq.runtime.datasets.errors import IllegalActionError, OutputError, SourceError, VerificationError
from rfsq.runtime.datasets.job_folder import locked
from rfsq.runtime.datasets.token_reader import open_token_dataset
from rfsq.runtime.datasets.writers import move, put
from tests.runtime.datasets.command import LENGTHS, arguments, files, interrupt_at_the_end, refusal, run
from tests.runtime.datasets.samples import random_episodes, write_hdf5, write_npz


@pytest.fixture(scope="module")
def episodes() -> list[np.ndarray]:
    return random_episodes(LENGTHS)


@pytest.fixture
def source(tmp_path: Path, episodes: list[np.ndarray]) -> Path:
    """20,001 steps in three parts; a test may change it."""
    return write_npz(tmp_path / "x.npz", episodes)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, c_bundle: Path, episodes: list[np.ndarray]) -> dict[str, str]:
    """Files of the dataset that `source` gives."""
    folder = tmp_path_factory.mktemp("expected")
    run(write_npz(folder / "x.npz", episodes), folder / "out.parquet", c_bundle)
    return files(folder / "out.parquet")


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- whose folder it is -----------------------------------------------------------------------------------------------

HEX = "0123456789abcdef"


@pytest.mark.parametrize("options", [[], ["--restart"], ["--overwrite"]])
@pytest.mark.parametrize(
    "content",
    [
        {f"{HEX}/1.jpg": b"x"},
        {f"{HEX}/data/1.jpg": b"x", "job.json": b"{}"},
        {f"{HEX}/replaced/1.jpg": b"x", "lock": b""},
        {"lock": b"mine"},
        {"job.json": b"{}"},
        {f"decoded-{HEX}/decoded.npz": b"x", "lock": b""},
        {"decoded.npz": b"x"},
    ],
)
def test_a_folder_with_the_right_names_that_was_not_written_here_is_left_alone(
    content: dict[str, bytes], options: list[str], source: Path, c_bundle: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "out.parquet.partial"
    for name, text in content.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(text)
    before = files(partial)
    message = refusal(*arguments(source, tmp_path / "out.parquet", c_bundle, *options), kind=OutputError)
    assert "which was not written here; move it elsewhere, or give another --output" in message
    assert files(partial) == before


def test_a_strangers_folder_in_one_of_ours_is_left_alone(
    source: Path, c_bundle: Path, tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "out.parquet", tmp_path / "out.parquet.partial"
    interrupt_at_the_end(arguments(source, output, c_bundle), monkeypatch)
    (partial / HEX).mkdir()
    (partial / HEX / "1.jpg").write_bytes(b"x")
    given = arguments(source, output, c_bundle, "--restart")
    assert f"holds {HEX}, which was not written here" in refusal(*given, kind=OutputError)
    (partial / HEX).rename(tmp_path / "mine")
    run(source, output, c_bundle)
    assert files(output) == tokens
    assert not partial.exists()


def test_an_empty_folder_and_what_systems_leave_everywhere_are_no_obstacle(
    source: Path, c_bundle: Path, tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "out.parquet", tmp_path / "out.parquet.partial"
    partial.mkdir()
    run(source, output, c_bundle)
    assert not partial.exists()
    for name in (".DS_Store", "._dataset.json", "data/Thumbs.db"):
        (output / name).write_bytes(b"x")
    interrupt_at_the_end(arguments(source, output, c_bundle, "--overwrite"), monkeypatch)
    (partial / ".DS_Store").write_bytes(b"x")
    run(source, output, c_bundle, "--overwrite")
    assert files(output) == tokens
    # Nobody wants it, but it was not written here.
    assert everything(partial) == [".DS_Store"]


def test_what_an_earlier_run_finished_is_not_the_dataset_of_another(
    source: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "out.parquet", tmp_path / "out.parquet.partial"
    other = write_npz(tmp_path / "other.npz", random_episodes([40]))
    run(other, output, c_bundle)
    given = arguments(source, output, c_bundle)
    interrupt_at_the_end([*given, "--overwrite"], monkeypatch)
    # Somebody clears up by hand, and leaves what says which job it was.
    for folder in partial.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    assert (partial / "job.json").is_file()
    assert f"{output} exists; give another name, or --overwrite" in refusal(*given, kind=OutputError)
    assert open_token_dataset(output).num_steps == 40
    run(source, output, c_bundle, "--overwrite")
    assert open_token_dataset(output).num_steps == sum(LENGTHS)


def test_hidden_files_in_an_output_are_not_lost(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    run(source, output, c_bundle)
    (output / ".notes").write_bytes(b"x")
    given = arguments(source, output, c_bundle, "--overwrite")
    assert "also holds .notes, which dataset.json does not list" in refusal(*given, kind=OutputError)


def test_a_link_is_no_place_to_work_in(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.parquet.partial").symlink_to(tmp_path / "elsewhere")
    assert "is a link; remove it" in refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=OutputError)
    assert everything(tmp_path / "elsewhere") == []


def test_a_dataset_that_was_set_aside_is_not_discarded_by_another_command(
    source: Path, c_bundle: Path, tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    run(source, output, c_bundle, "--format", "parquet")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target) == output.resolve():
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        assert tokenize_dataset.main(arguments(source, output, c_bundle, "--format", "parquet", "--overwrite")) == 130
    assert not output.exists()
    run(source, tmp_path / "tokens.parquet", c_bundle)
    given = arguments(tmp_path / "tokens.parquet", output, c_bundle, "--decode", "--format", "npz", "--restart")
    assert "exists; give another name" in refusal(*given, kind=OutputError)
    assert files(output) == tokens


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_place_where_no_folder_can_be_made_is_refused_at_once(
    source: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, tried = Path.mkdir, []

    def refused(path: Path, *given: Any, **named: Any) -> None:
        if path.name.endswith(".partial"):
            tried.append(path)
            raise FileNotFoundError(2, "No such file or directory", str(path))
        mkdir(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", refused)
    message = refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=OutputError)
    assert "out.parquet.partial cannot be written: [Errno 2] No such file or directory" in message
    assert len(tried) < 100


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, where no folder can be made")
def test_a_file_system_that_makes_no_folders_is_refused(source: Path, c_bundle: Path) -> None:
    refusal(*arguments(source, Path("/proc/out.parquet"), c_bundle), kind=OutputError)


def test_a_file_where_the_folder_should_be_is_refused(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out.parquet.partial").write_bytes(b"x")
    message = refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=OutputError)
    assert "File exists" in message or "Not a directory" in message


def test_a_lock_that_is_no_file_is_refused(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.parquet.partial"
    partial.mkdir()
    os.mkfifo(partial / "lock")
    given = arguments(source, tmp_path / "out.parquet", c_bundle)
    refusal(*given, kind=OutputError)
    (partial / "lock").unlink()
    (partial / "lock").symlink_to(tmp_path / "nothing")
    refusal(*given, kind=OutputError)
    assert not (tmp_path / "nothing").exists()


def test_a_file_system_without_locks_is_refused_in_words(
    source: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_given: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    message = refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=OutputError)
    assert "cannot be locked: [Errno 37] No locks available; its file system must offer locks" in message


def test_the_one_that_holds_the_lock_keeps_the_other_out(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with locked(output), pytest.raises(OutputError, match="is in use"), locked(output):
        pass
    assert everything(tmp_path) == []


def test_a_folder_that_is_taken_away_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process ends between the steps in which this one locks the folder."""
    real, left = os.open, [3]

    def gone(path: Any, *given: Any, **named: Any) -> int:
        if Path(path).name == "lock" and left[0]:
            left[0] -= 1
            Path(path).parent.rmdir()
        return real(path, *given, **named)

    monkeypatch.setattr(os, "open", gone)
    with locked(tmp_path / "out"):
        assert Ownership.read(tmp_path / "out.partial/lock") is not None
    assert left == [0]


def test_a_worker_that_outlives_its_job_lays_no_folder_out_again(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "x").write_bytes(b"x")
    for write in (
        lambda: put(b"x", tmp_path / "data", "a/b/c", tmp_path / "scratch"),
        lambda: move(tmp_path / "x", tmp_path / "data", "a/b/c"),
    ):
        with pytest.raises(FileNotFoundError):
            write()
        assert not (tmp_path / "data").exists()


def test_a_file_system_that_cannot_force_names_to_the_disk_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", refused)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "x")


# --- records ----------------------------------------------------------------------------------------------------------


def add_seven_steps(path: Path, *, hash_anew: bool = False, work: str = "") -> None:
    from rfsq.runtime.datasets.parts import PartRecord

    content = json.loads(path.read_bytes())
    content["runs"][0][3] += 7
    content["runs"][0][2] += 7
    if hash_anew:
        record = PartRecord.parse(path.read_bytes(), work)
        runs = tuple(tuple(run) for run in content["runs"])
        path.write_bytes(PartRecord(record.part, record.files, record.digests, runs).text(work))  # type: ignore[arg-type]
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("hash_anew", [False, True])
def test_a_record_that_was_altered_by_hand_makes_no_wrong_dataset(
    hash_anew: bool,
    source: Path,
    c_bundle: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out.parquet"
    interrupt_at_the_end(arguments(source, output, c_bundle), monkeypatch)
    (path,) = output.with_name("out.parquet.partial").glob("*/done/000000001.json")
    add_seven_steps(path, hash_anew=hash_anew, work=path.parent.parent.name)
    run(source, output, c_bundle)
    assert files(output) == tokens


@pytest.mark.parametrize("damage", ["altered", "removed", "of another part"])
def test_a_record_that_changes_while_the_job_runs_is_refused_and_made_anew(
    damage: str,
    source: Path,
    c_bundle: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, run_local = tmp_path / "out.parquet", conversion.run_local

    def change_at_the_end(*given: Any) -> None:
        run_local(*given)
        first, second, _ = sorted(output.with_name("out.parquet.partial").glob("*/done/*.json"))
        if damage == "altered":
            add_seven_steps(second)
        elif damage == "removed":
            second.unlink()
        else:
            second.write_bytes(first.read_bytes())

    given = arguments(source, output, c_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "run_local", change_at_the_end)
        with pytest.raises(OutputError, match=r"000000001\.json"):
            conversion.convert(tokenize_dataset.parser().parse_args(given))
    assert not output.exists()
    run(source, output, c_bundle)
    assert files(output) == tokens


@pytest.fixture
def begun(source: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that was interrupted when all parts were done."""
    given = arguments(source, tmp_path / "out.parquet", c_bundle)
    interrupt_at_the_end(given, monkeypatch)
    return given


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["identity", "stamps", "refused"]), inner),
)


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=any_json | st.binary())
def test_a_job_description_of_another_shape_is_refused(content: Any, begun: list[str], tmp_path: Path) -> None:
    # What was refused may be replaced.
    assume(not (isinstance(content, dict) and isinstance(content.get("refused"), str) and content["refused"]))
    path = tmp_path / "out.parquet.partial/job.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert "--restart" in refusal(*begun, kind=OutputError)


def test_a_job_description_that_is_nested_too_deep_is_refused(begun: list[str], tmp_path: Path) -> None:
    (tmp_path / "out.parquet.partial/job.json").write_bytes(b"[" * 100_000)
    assert "is damaged: " in refusal(*begun, kind=OutputError)


# --- refused, repaired, run again -------------------------------------------------------------------------------------


def with_nan(episodes: list[np.ndarray], step: int) -> list[np.ndarray]:
    steps = np.concatenate(episodes)
    steps[step, 1] = np.nan
    return np.split(steps, np.cumsum(LENGTHS)[:-1])


@pytest.mark.parametrize("step", [0, 20_000])
@pytest.mark.parametrize("options", [[], ["--steps-per-file", "16384"]])
def test_a_repaired_source_is_taken_where_the_damaged_one_was_refused(
    step: int,
    options: list[str],
    source: Path,
    episodes: list[np.ndarray],
    c_bundle: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.parquet"
    write_npz(source, with_nan(episodes, step))
    given = arguments(source, output, c_bundle, "--workers", "1")
    message = refusal(*given, kind=IllegalActionError)
    write_npz(source, episodes)
    capsys.readouterr()
    run(source, output, c_bundle, *options)
    # Where parts were done they stay for the same command, and whoever takes their place says so.
    assert (f"an earlier run was refused ({message})" in capsys.readouterr().out) == (step > 0)
    assert options or files(output) == tokens


def test_a_refusal_before_anything_is_done_leaves_nothing(
    source: Path, episodes: list[np.ndarray], c_bundle: Path, tmp_path: Path
) -> None:
    write_npz(source, with_nan(episodes, 0))
    refusal(*arguments(source, tmp_path / "out.parquet", c_bundle, "--workers", "1"), kind=IllegalActionError)
    content = bytearray(source.read_bytes())
    content[len(content) // 3] ^= 1
    source.write_bytes(content)
    refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=SourceError)
    assert everything(tmp_path) == [source.name]


def test_after_a_refusal_the_same_command_goes_on_with_what_is_done(
    source: Path,
    c_bundle: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file server that was away for a moment."""
    from rfsq.runtime.datasets.source_base import StepReader

    read = StepReader.read

    def away(reader: Any, start: int, stop: int) -> Any:
        if start > 16_000:
            raise SourceError("x.npz cannot be read: Stale file handle")
        return read(reader, start, stop)

    output = tmp_path / "out.parquet"
    given = arguments(source, output, c_bundle, "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(StepReader, "read", away)
        assert tokenize_dataset.main(given) == 2
    assert tokenize_dataset.main(given) == 0
    assert "going on: 2 parts" in capsys.readouterr().out
    assert files(output) == tokens


def test_parts_that_are_not_what_the_tokenizer_gives_are_not_used_again(
    source: Path, c_bundle: Path, tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rfsq.runtime.datasets.coding import StepCoder

    encode = StepCoder.encode

    def wrong(self: StepCoder, actions: np.ndarray) -> np.ndarray:
        found = encode(self, actions)
        found[0, 0] ^= 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(StepCoder, "encode", wrong)
        refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=VerificationError)
    assert everything(tmp_path) == [source.name]
    run(source, tmp_path / "out.parquet", c_bundle)
    assert files(tmp_path / "out.parquet") == tokens


def test_a_job_that_had_finished_no_part_stands_in_nobodys_way(
    source: Path, c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_given: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "run_local", interrupted)
        assert tokenize_dataset.main(arguments(source, output, c_bundle)) == 130
    run(source, output, c_bundle, "--compression", "none")
    assert "an earlier run had finished no part" in capsys.readouterr().out


# --- a source that changes --------------------------------------------------------------------------------------------


def change_one_step_unseen(source: Path, episodes: list[np.ndarray]) -> None:
    """Another action far from every sample; the size and the time of writing stay as they were."""
    before = source.stat()
    steps = np.concatenate(episodes)
    steps[1000] += np.float32(0.25)
    write_npz(source, np.split(steps, np.cumsum(LENGTHS)[:-1]))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = source.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def at_the_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something happen once, when all parts are made."""
    run_local = conversion.run_local

    def arrange(happens: Callable[[], object]) -> None:
        def replaced(*given: Any) -> None:
            run_local(*given)
            monkeypatch.setattr(conversion, "run_local", run_local)
            happens()

        monkeypatch.setattr(conversion, "run_local", replaced)

    return arrange


def test_a_source_that_changes_and_keeps_size_and_time_is_refused(
    source: Path,
    episodes: list[np.ndarray],
    c_bundle: Path,
    tmp_path: Path,
    at_the_end: Callable[[Callable[[], object]], None],
) -> None:
    at_the_end(lambda: change_one_step_unseen(source, episodes))
    given = arguments(source, tmp_path / "out.parquet", c_bundle)
    with pytest.raises(SourceError, match=r"x\.npz has changed while it was read"):
        conversion.convert(tokenize_dataset.parser().parse_args(given))
    assert not (tmp_path / "out.parquet").exists()
    # The next run finds which parts were made from what is no longer there.
    run(source, tmp_path / "out.parquet", c_bundle)
    run(source, tmp_path / "anew.parquet", c_bundle)
    assert files(tmp_path / "out.parquet") == files(tmp_path / "anew.parquet")


def test_parts_of_a_source_that_changed_between_two_runs_are_made_anew(
    begun: list[str], source: Path, episodes: list[np.ndarray], c_bundle: Path, tmp_path: Path
) -> None:
    change_one_step_unseen(source, episodes)
    assert tokenize_dataset.main(begun) == 0
    run(source, tmp_path / "anew.parquet", c_bundle)
    assert files(tmp_path / "out.parquet") == files(tmp_path / "anew.parquet")


def test_a_source_that_is_only_touched_is_compared_and_kept(
    source: Path,
    c_bundle: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    at_the_end: Callable[[Callable[[], object]], None],
    begun: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A backup makes a hard link, between two runs and during one."""
    (tmp_path / "backup").hardlink_to(source)
    capsys.readouterr()
    assert tokenize_dataset.main(begun) == 0
    assert "going on: 3 parts" in capsys.readouterr().out
    assert files(tmp_path / "out.parquet") == tokens
    at_the_end((tmp_path / "backup").unlink)
    run(source, tmp_path / "again.parquet", c_bundle)
    assert files(tmp_path / "again.parquet") == tokens


# --- where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_permissions_follow_the_umask_and_no_byte_does(
    mask: int, source: Path, c_bundle: Path, tokens: dict[str, str], tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        run(source, tmp_path / "out.parquet", c_bundle)
    finally:
        os.umask(before)
    assert files(tmp_path / "out.parquet") == tokens
    for path in (tmp_path / "out.parquet").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask


def test_a_path_may_be_relative_or_begin_with_a_tilde(
    source: Path, c_bundle: Path, tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bundle").symlink_to(c_bundle)
    run(Path(source.name), Path("out.parquet"), Path("bundle"))
    run(Path("~") / source.name, Path("~/home.parquet"), Path("~/bundle"))
    assert files(tmp_path / "out.parquet") == files(tmp_path / "home.parquet") == tokens
    assert not (tmp_path / "~").exists()
    with pytest.raises(SystemExit) as caught:
        tokenize_dataset.main(arguments(source, Path("~nobody-of-this-name/x.parquet"), c_bundle))
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["日本 ü", "a\nb", "%s {} \\", "-", "x" * 230])
def test_any_name_will_do(
    name: str, episodes: list[np.ndarray], c_bundle: Path, tokens: dict[str, str], tmp_path: Path
) -> None:
    source = write_npz(tmp_path / f"{name}.npz", episodes)
    output = tmp_path / f"{name}.parquet"
    run(source, output, c_bundle)
    found = files(output)
    assert {key: value for key, value in found.items() if key != "dataset.json"} == {
        key: value for key, value in tokens.items() if key != "dataset.json"
    }
    run(output, tmp_path / f"{name}.out.npz", c_bundle, "--decode")


def test_a_name_that_is_no_utf_8_is_escaped_in_what_is_written(
    episodes: list[np.ndarray], c_bundle: Path, tmp_path: Path
) -> None:
    name = "cafe\udce9"
    source = write_npz(tmp_path / f"{name}.npz", episodes)
    run(source, tmp_path / "out.parquet", c_bundle)
    assert open_token_dataset(tmp_path / "out.parquet").info.source.name == "cafe\\udce9.npz"
    refusal(*arguments(source, tmp_path / f"{name}.parquet", c_bundle), kind=OutputError)
    folder = tmp_path / name
    folder.mkdir()
    write_hdf5(folder / f"{name}.hdf5", episodes)
    run(folder, tmp_path / "hdf5.parquet", c_bundle)


def test_a_pipe_is_no_dataset(c_bundle: Path, tmp_path: Path) -> None:
    for name in ("x.npz", "x.npy", "x.hdf5", "x.parquet"):
        os.mkfifo(tmp_path / name)
        message = refusal(*arguments(tmp_path / name, tmp_path / "out.parquet", c_bundle), kind=SourceError)
        assert f"{name} is no regular file" in message


def test_a_circle_of_links_is_refused(
    source: Path, c_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "circle.parquet").symlink_to(tmp_path / "circle.parquet")
    for places in ((source, tmp_path / "circle.parquet"), (tmp_path / "circle.parquet", tmp_path / "out.parquet")):
        with pytest.raises(SystemExit, match="2"):
            tokenize_dataset.main(arguments(*places, c_bundle))
        assert f"{LINKS_IN_A_CIRCLE}\n" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_refused(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    long = "x" * 300
    refusal(*arguments(source, tmp_path / f"{long}.parquet", c_bundle), kind=OutputError)
    refusal(*arguments(tmp_path / long, tmp_path / "out.parquet", c_bundle), kind=SourceError)
    refusal(*arguments(tmp_path / long, tmp_path / "out.npz", c_bundle, "--decode"), kind=TokenizerError)
    # Short enough itself, but not with what is added to it meanwhile.
    refusal(*arguments(source, tmp_path / f"{long[:245]}.parquet", c_bundle), kind=OutputError)
