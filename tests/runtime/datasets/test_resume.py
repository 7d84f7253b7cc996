"""Killed, interrupted or disturbed, a conversion goes on to the same bytes, and destroys nothing of anyone's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rfsq.runtime.datasets import conversion
from rfsq.runtime.datasets import tokenize as tokenize_dataset
from rfsq.runtime.datasets.errors import OutputError, SourceError
from rfsq.runtime.datasets.format import INFO_NAME
from rfsq.runtime.datasets.token_reader import open_token_dataset
from tests.runtime.datasets.command import LENGTHS, ROOT, arguments, files, interrupt_at_the_end, refusal, run
from tests.runtime.datasets.samples import (
    random_episodes,
    write_lerobot_v3,
    write_npz,
    write_robomimic,
)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeRobot v3, 20,001 steps; not to be changed."""
    return write_lerobot_v3(tmp_path_factory.mktemp("source") / "demonstrations", random_episodes(LENGTHS))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, source: Path, c_bundle: Path) -> Path:
    """A dataset of tokens in three parts; not to be changed."""
    output = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    run(source, output, c_bundle)
    return output


#: Runs the command again and again in forked children, which is faster than to begin with Python each time.
FORKED = """
import hashlib, json, os, random, shutil, sys, time
from pathlib import Path
import h5py, numpy, pyarrow, pyarrow.parquet, pyarrow.types, pyarrow.compute
from rfsq.runtime.datasets.tokenize import main
from tests.runtime.datasets.command import open_once

# With its first array pyarrow imports pandas, where there is one.
pyarrow.array(numpy.zeros(1))

def child(arguments, prepare=lambda: None):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    prepare()
    # Nothing here cuts the power, and others may keep the disk busy.
    os.fsync = lambda _: None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main(arguments))

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def files(folder):
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
"""

#: Each child is killed before another operation on files of the output.
EVERY_OPERATION = f"""{FORKED}
arguments, output, before = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
CHANGES = {{"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}}

def killed_before(fatal):
    seen = 0
    def hook(event, given):
        nonlocal seen
        if event not in CHANGES or not str(given[0]).startswith(str(output.parent)):
            return
        if event != "open" or given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), 9)
    return lambda: sys.addaudithook(hook)

def fresh():
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    if before.exists():
        shutil.copytree(before, output)

fresh()
# Here, so that every child finds loaded what it needs.
assert main(arguments) == 0
open_once(arguments)
expected, fatal = files(output.parent), 1
killed = 0
while True:
    fresh()
    found = status(child(arguments, killed_before(fatal)))
    if found == 0:
        break
    assert found == -9, found
    # 2: all was done but for an empty folder, so that the output exists.
    assert status(child(arguments)) in (0, 2), f"not finished after a kill before change {{fatal}}"
    assert files(output.parent) == expected, f"other files after a kill before change {{fatal}}"
    killed += 1
    fatal += int(sys.argv[4])
print(killed)
"""

#: Ten children are killed after their next part, and somewhat later; then one is not.
RANDOM_MOMENTS = f"""{FORKED}
arguments, output = json.loads(sys.argv[1]), Path(sys.argv[2])
expected = json.loads(sys.argv[3])

def finished_parts():
    return len(list(output.with_name(output.name + ".partial").glob("*/done/*.json")))

def hashes():
    return {{str(Path(name).relative_to(output)): digest for name, digest in files(output).items()}}

open_once(arguments)
rng, kills = random.Random(0), 0
while kills < 10:
    before, pid, ended = finished_parts(), child(arguments), (0, 0)
    while finished_parts() == before and not ended[0]:
        time.sleep(0.001)
        ended = os.waitpid(pid, os.WNOHANG)
    time.sleep(rng.uniform(0, 0.003))
    if not ended[0]:
        os.kill(pid, 9)
        kills += status(pid) == -9
    if output.exists():
        # It was too fast: as good as any other, and begun again.
        assert hashes() == expected
        shutil.rmtree(output)
assert status(child(arguments)) == 0
assert hashes() == expected
assert not output.with_name(output.name + ".partial").exists()
"""


def run_script(code: str, *given: str) -> str:
    """What it prints."""
    result = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("name", "options", "every"), [("x.parquet", [], 1), ("x.zarr", [], 5), ("x.parquet", ["--overwrite"], 3)]
)
def test_killed_before_any_change_to_a_file_it_goes_on_to_the_same_result(
    name: str, options: list[str], every: int, c_bundle: Path, tmp_path: Path
) -> None:
    source = write_npz(tmp_path / "source.npz", random_episodes([9000, 50]))
    output = tmp_path / "out" / name
    given = json.dumps(arguments(source, output, c_bundle, "--workers", "1", *options))
    # A dataset to be replaced must be another one, or nobody would see whether it was.
    old = tmp_path / "old"
    if options:
        run(write_npz(tmp_path / "old.npz", random_episodes([40])), old, c_bundle, "--format", "parquet")
    assert int(run_script(EVERY_OPERATION, given, str(output), str(old), str(every)).split()[-1]) >= 10
    if name == "x.parquet" and not options:
        run(source, tmp_path / "undisturbed.parquet", c_bundle)
        assert files(output) == files(tmp_path / "undisturbed.parquet")


@pytest.fixture(scope="session")
def long_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200,000 steps in 25 parts; not to be changed."""
    return write_npz(tmp_path_factory.mktemp("long") / "long.npz", random_episodes([700] * 286)[:286])


@pytest.fixture(scope="session")
def long_tokens(tmp_path_factory: pytest.TempPathFactory, long_source: Path, c_bundle: Path) -> Path:
    output = tmp_path_factory.mktemp("long_tokens") / "long.parquet"
    run(long_source, output, c_bundle)
    return output


def finished_parts(output: Path) -> int:
    return len(list(output.with_name(output.name + ".partial").glob("*/done/*.json")))


def test_ten_kills_at_random_moments_change_no_byte(
    long_source: Path, long_tokens: Path, c_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.parquet"
    given = json.dumps(arguments(long_source, output, c_bundle))
    run_script(RANDOM_MOMENTS, given, str(output), json.dumps(files(long_tokens)))


def test_a_damaged_part_of_an_earlier_run_is_made_anew(
    source: Path, c_bundle: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    interrupt_at_the_end(arguments(source, output, c_bundle), monkeypatch)
    (part,) = output.with_name("out.parquet.partial").glob("*/data/data/chunk-000/file-001.parquet")
    part.write_bytes(part.read_bytes()[:-1000])
    run(source, output, c_bundle)
    assert files(output) == files(tokens)


@pytest.mark.parametrize("left", [b"", b"{}", b'{"part": 1'])
def test_what_a_power_cut_leaves_is_made_anew_or_refused(
    left: bytes, source: Path, c_bundle: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    given = arguments(source, output, c_bundle)
    interrupt_at_the_end(given, monkeypatch)
    (record,) = output.with_name("out.parquet.partial").glob("*/done/000000001.json")
    record.write_bytes(left)
    identity = output.with_name("out.parquet.partial") / "job.json"
    content = identity.read_bytes()
    identity.write_bytes(left)
    assert "--restart" in refusal(*given, kind=OutputError)
    identity.write_bytes(content)
    run(source, output, c_bundle)
    assert files(output) == files(tokens)


def test_a_source_that_changes_meanwhile_is_refused(
    c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_npz(tmp_path / "x.npz", random_episodes(LENGTHS))
    run_local = conversion.run_local

    def change_at_the_end(*given: Any) -> None:
        run_local(*given)
        os.utime(source)

    monkeypatch.setattr(conversion, "run_local", change_at_the_end)
    output = tmp_path / "out.parquet"
    given = arguments(source, output, c_bundle, "--restart")
    assert "x.npz has changed while it was read" in refusal(*given, kind=SourceError)
    assert not output.exists()


def test_another_job_does_not_go_on_in_its_place(
    source: Path, c_bundle: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    interrupt_at_the_end(arguments(source, output, c_bundle), monkeypatch)
    other = arguments(source, output, c_bundle, "--compression", "none")
    assert "another job, which differs in compression" in refusal(*other, kind=OutputError)
    moved = write_lerobot_v3(tmp_path / source.name, random_episodes(LENGTHS, seed=1))
    other = arguments(moved, output, c_bundle)
    assert "another job, which differs in source" in refusal(*other, kind=OutputError)
    run(source, output, c_bundle, "--restart")
    assert files(output) == files(tokens)


def test_other_episodes_of_a_file_do_not_go_on_in_its_place(
    c_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of the same number of steps, so that nothing else tells the two jobs apart."""
    path = write_robomimic(tmp_path / "a.hdf5", random_episodes([40] * 4), train=[0, 2], valid=[1, 3])
    output = tmp_path / "out.parquet"
    interrupt_at_the_end(arguments(path, output, c_bundle, "--filter-key", "train"), monkeypatch)
    message = refusal(*arguments(path, output, c_bundle, "--filter-key", "valid"), kind=OutputError)
    assert re.search(
        'another job, which differs in source .*"filter_key": "train".* now .*"filter_key": "valid"', message
    )
    assert "differs in source" in refusal(*arguments(path, output, c_bundle), kind=OutputError)
    # The same list, spelled as it stands in the file.
    run(path, output, c_bundle, "--filter-key", "mask/train")
    assert open_token_dataset(output).info.source.filter_key == "train"


def test_two_processes_do_not_work_at_one_output(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    import fcntl

    partial = tmp_path / "out.parquet.partial"
    partial.mkdir()
    with (partial / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refusal(*arguments(source, tmp_path / "out.parquet", c_bundle), kind=OutputError)
    assert "is in use: another process is making" in message
    run(source, tmp_path / "out.parquet", c_bundle)


def test_an_output_that_exists_is_replaced_on_request_alone(source: Path, c_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    output.mkdir()
    (output / "mine.txt").write_text("x", encoding="utf-8")
    given = arguments(source, output, c_bundle)
    assert "exists; give another name, or --overwrite" in refusal(*given, kind=OutputError)
    # Nor what is no dataset.
    assert "is not a dataset that was written here" in refusal(*given, "--overwrite", kind=OutputError)
    assert list(tmp_path.rglob("*")) == [output, output / "mine.txt"]
    # A name is not enough, and not all in a dataset's folder is the dataset's.
    (output / "mine.txt").rename(output / INFO_NAME)
    assert "is not a dataset that was written here" in refusal(*given, "--overwrite", kind=OutputError)
    shutil.rmtree(output)
    run(write_npz(tmp_path / "x.npz", random_episodes([40])), output, c_bundle)
    (output / "data/mine.txt").write_text("x", encoding="utf-8")
    message = refusal(*given, "--overwrite", kind=OutputError)
    assert "also holds data/mine.txt, which dataset.json does not list" in message
    (output / "data/mine.txt").unlink()
    run(source, output, c_bundle, "--overwrite")
    assert open_token_dataset(output).num_steps == 20_001


def test_an_output_in_its_input_is_refused(source: Path, tokens: Path, c_bundle: Path) -> None:
    before = files(source), files(tokens)
    for given, made in ((source, source / "x.parquet"), (source, source.parent), (tokens, tokens)):
        options = ["--decode"] if given is tokens else []
        options += ["--overwrite", "--format", "parquet"]
        message = refusal(*arguments(given, made, c_bundle, *options), kind=OutputError)
        assert "is --data or lies in it, or --data in it" in message
    assert (files(source), files(tokens)) == before


@pytest.mark.parametrize("name", ["out.parquet", "out.hdf5"])
def test_a_full_disk_is_said_and_the_job_goes_on_when_there_is_room(
    name: str, source: Path, c_bundle: Path, tmp_path: Path
) -> None:
    output, options = tmp_path / name, []
    if name != "out.parquet":
        run(source, tmp_path / "tokens.parquet", c_bundle)
        source, options = tmp_path / "tokens.parquet", ["--decode"]
    code = (
        "import json, resource, signal, sys; from rfsq.runtime.datasets.tokenize import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
        "sys.exit(main(json.loads(sys.argv[1])))"
    )
    given = json.dumps(arguments(source, output, c_bundle, *options))
    result = subprocess.run([sys.executable, "-c", code, given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert re.search("error: .*partial cannot be written: .* make room or choose another place", result.stderr)
    assert not output.exists()
    run(source, output, c_bundle, *options)
    assert output.exists()


@pytest.mark.parametrize("options", [[], ["--restart"], ["--overwrite"]])
@pytest.mark.parametrize("name", ["out.parquet", "out.npz"])
def test_a_foreign_folder_where_the_work_is_done_is_left_alone(
    name: str, options: list[str], source: Path, c_bundle: Path, tokens: Path, tmp_path: Path
) -> None:
    partial = tmp_path / f"{name}.partial"
    (partial / "photographs").mkdir(parents=True)
    (partial / "photographs/1.jpg").write_bytes(b"x")
    before = files(partial)
    is_decoded = name == "out.npz"
    given = arguments(tokens if is_decoded else source, tmp_path / name, c_bundle, *options)
    message = refusal(*given, *(["--decode"] if is_decoded else []), kind=OutputError)
    assert "holds photographs, which was not written here" in message
    assert files(partial) == before


def test_an_output_killed_between_its_two_renames_is_not_lost(
    source: Path, c_bundle: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    run(write_npz(tmp_path / "old.npz", random_episodes([40])), output, c_bundle)
    old = files(output)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target) == output.resolve():
            raise KeyboardInterrupt
        return rename(path, target)

    given = arguments(source, output, c_bundle, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        assert tokenize_dataset.main(given) == 130
    assert not output.exists()
    assert "exists; give another name" in refusal(*arguments(source, output, c_bundle, "--restart"), kind=OutputError)
    assert files(output) == old
    assert tokenize_dataset.main(given) == 0
    assert files(output) == files(tokens)


def test_a_link_as_output_is_followed(source: Path, c_bundle: Path, tokens: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.parquet"
    link.symlink_to(tmp_path / "elsewhere.parquet")
    for options in ([], ["--overwrite"]):
        run(source, link, c_bundle, *options)
        assert link.is_symlink()
        assert files(tmp_path / "elsewhere.parquet") == files(tokens)


def test_decoding_into_a_file_does_not_discard_a_job_that_is_to_go_on(
    source: Path, c_bundle: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    interrupt_at_the_end(arguments(source, output, c_bundle, "--format", "parquet"), monkeypatch)
    given = arguments(tokens, output, c_bundle, "--decode", "--format", "npz")
    assert "holds the beginning of another job" in refusal(*given, kind=OutputError)
    assert finished_parts(output) == 3
    assert tokenize_dataset.main([*given, "--restart"]) == 0
    assert not output.with_name("out.partial").exists()
