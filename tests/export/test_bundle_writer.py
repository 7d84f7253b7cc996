"""A bundle appears at its output whole and sealed, or nothing changes there."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rfsq.export import bundle_writer
from rfsq.export.bundle_writer import StagedBundle, stage_bundle
from rfsq.export.errors import ExportError
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.folder import open_bundle, unlisted_files
from rfsq.runtime.bundle.golden import write_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME, MANIFEST_NAME, SCHEMA_VERSION, Manifest
from tests.bundles import (
    Recipe,
    bundle_files,
    deploy,
    export_graphs,
    fingerprint_of,
    golden_vectors,
    make_manifest,
    write_bundle,
)

ROOT = Path(__file__).parents[2]
DEPLOYED = deploy(Recipe(has_engine=False))
MANIFEST = make_manifest(DEPLOYED)
GRAPHS = export_graphs(DEPLOYED)
GOLDEN = golden_vectors(DEPLOYED)


def fill(staged: StagedBundle, manifest: Manifest = MANIFEST) -> None:
    for file, content in GRAPHS.items():
        staged.write(file, content)
    staged.write(GOLDEN_NAME, write_golden(GOLDEN))
    staged.seal(manifest)


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_sealed_bundle_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folders" / "bundle"
    with stage_bundle(output) as staged:
        fill(staged)
        assert not output.exists()
        assert staged.folder.parent.parent == output.parent
        ActionTokenizer.load(staged.folder).close()
    assert siblings(output.parent) == ["bundle"]
    # What anyone may enter that the user's other folders are for.
    (tmp_path / "usual").mkdir()
    assert output.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert bundle_files(output) == sorted([*GRAPHS, "golden.npz", MANIFEST_NAME])
    ActionTokenizer.load(output).close()


def test_the_manifest_lists_what_was_written(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "bundle") as staged:
        staged.write("deep/er/file.bin", b"123")
        fill(staged)
    opened = open_bundle(tmp_path / "bundle")
    assert opened.manifest.files["deep/er/file.bin"].size == 3
    assert opened.content("deep/er/file.bin") == b"123"
    assert unlisted_files(opened.folder, opened.manifest.files) == ()


def test_sealing_again_replaces_the_manifest(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "bundle") as staged:
        fill(staged)
        staged.seal(replace(MANIFEST, tools={}))
        assert open_bundle(staged.folder).manifest.tools == {}
        sealed = staged.seal(MANIFEST)
    assert open_bundle(tmp_path / "bundle").manifest == sealed
    assert sealed.tools == MANIFEST.tools


def test_a_bundle_opens_for_its_gates_and_for_nothing_else_before_they_have_run(tmp_path: Path) -> None:
    unproven = replace(MANIFEST, parity=())
    with stage_bundle(tmp_path / "bundle") as staged:
        fill(staged)
        staged.seal(unproven, is_proven=False)
        assert not staged.is_sealed
        assert open_bundle(staged.folder, is_proven=False).manifest.parity == ()
        with pytest.raises(BundleError, match="onnxruntime on CPU lacks the gates encode: wrong tokens"):
            open_bundle(staged.folder)
        with pytest.raises(ExportError, match="onnxruntime on CPU lacks the gates"):
            staged.seal(unproven)
        staged.seal(MANIFEST)
        assert staged.is_sealed


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_bundle(tmp_path / name, Recipe()) for name in ("first", "elsewhere"))
    for file in bundle_files(first):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@pytest.mark.parametrize("error", [ValueError, ExportError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("is_there", [False, True])
def test_any_exception_leaves_everything_as_it_was(error: type[BaseException], is_there: bool, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    if is_there:
        write_bundle(output, Recipe(seed=7))
    before = {file: (output / file).read_bytes() for file in bundle_files(output)}

    def build() -> None:
        with stage_bundle(output, overwrite=True) as staged:
            fill(staged)
            raise error

    with pytest.raises(error):
        build()
    assert siblings(tmp_path) == (["bundle"] if is_there else [])
    assert {file: (output / file).read_bytes() for file in bundle_files(output)} == before


def test_what_is_not_sealed_is_not_written(tmp_path: Path) -> None:
    for forget in (lambda staged: staged.write("a", b""), lambda staged: (fill(staged), staged.write("late", b""))):
        with pytest.raises(ExportError, match="was not sealed"), stage_bundle(tmp_path / "bundle") as staged:
            forget(staged)
    assert siblings(tmp_path) == []


@pytest.mark.parametrize("file", ["../outside", "/tmp/outside", "a/../b", MANIFEST_NAME, "encoder.onnx"])
def test_files_outside_written_twice_or_in_the_manifests_place_are_refused(file: str, tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "bundle") as staged:
        fill(staged)
        with pytest.raises(ExportError, match=r"outside the bundle|already written"):
            staged.write(file, b"y")
    ActionTokenizer.load(tmp_path / "bundle").close()
    assert siblings(tmp_path) == ["bundle"]


def test_a_manifest_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    for manifest, message in (
        (
            replace(MANIFEST, model=replace(MANIFEST.model, action_limit=1)),
            "action_limit is 1; expected a number with a point",
        ),
        (replace(MANIFEST, provenance={"loss": float("nan")}), "cannot be read back"),
        (replace(MANIFEST, provenance={"path": Path("x")}), "cannot be read back"),
        (replace(MANIFEST, model=replace(MANIFEST.model, latent_dim=9)), "states the tensors"),
        (replace(MANIFEST, model=replace(MANIFEST.model, num_levels=2)), r"states the tensors .*'probabilities'"),
        (replace(MANIFEST, fingerprint="f9"), "64 lowercase hexadecimal digits"),
    ):
        with pytest.raises(ExportError, match=message), stage_bundle(tmp_path / "bundle") as staged:
            fill(staged, manifest)


# --- an output that is there already ----------------------------------------------------------------------------------


def test_a_bundle_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    output = write_bundle(tmp_path / "bundle", Recipe(seed=7))
    fingerprint = open_bundle(output).manifest.fingerprint
    with pytest.raises(ExportError, match=r"already holds a bundle; .*--overwrite"), stage_bundle(output):
        pytest.fail("started")
    assert open_bundle(output).manifest.fingerprint == fingerprint
    with stage_bundle(output, overwrite=True) as staged:
        fill(staged)
        assert open_bundle(output).manifest.fingerprint == fingerprint
    assert open_bundle(output).manifest.fingerprint == MANIFEST.fingerprint
    assert siblings(tmp_path) == ["bundle"]


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", "[" * 100_000, '{"name": "web app", "schema_version": 3}'])
def test_a_folder_with_another_kind_of_manifest_is_never_replaced(text: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "bundle")
    (tmp_path / "bundle" / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with (
        pytest.raises(ExportError, match="not empty and no bundle"),
        stage_bundle(tmp_path / "bundle", overwrite=True),
    ):
        pytest.fail("started")
    assert siblings(tmp_path / "bundle") == [MANIFEST_NAME, "precious"]


def test_files_that_the_manifest_does_not_list_are_named_and_kept(tmp_path: Path) -> None:
    output = write_bundle(tmp_path / "bundle", Recipe())
    make_folder(output / "notes")
    (output / "link").symlink_to("..")
    with (
        pytest.raises(ExportError, match="does not list: link, notes/precious; move them elsewhere"),
        stage_bundle(output, overwrite=True),
    ):
        pytest.fail("started")
    assert (output / "notes" / "precious").exists()


def with_other_version(text: str) -> str:
    version = f'"schema_version": {SCHEMA_VERSION}'
    assert version in text
    return text.replace(version, '"schema_version": 99')


def test_a_damaged_bundle_and_one_of_another_version_are_replaced(tmp_path: Path) -> None:
    output = write_bundle(tmp_path / "bundle", Recipe(seed=7))
    (output / "encoder.onnx").unlink()
    (output / "golden.npz").write_bytes(b"damaged")
    text = (output / MANIFEST_NAME).read_text(encoding="utf-8")
    (output / MANIFEST_NAME).write_text(with_other_version(text), encoding="utf-8")
    write_bundle(output, Recipe(), overwrite=True)
    ActionTokenizer.load(output).close()


def test_the_root_is_no_output() -> None:
    with pytest.raises(ExportError, match="/ is no place for a bundle; choose a folder in it"), stage_bundle("/"):
        pytest.fail("started")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with stage_bundle(tmp_path / "bundle") as staged:
        fill(staged)
    assert open_bundle(tmp_path / "bundle").manifest.fingerprint == MANIFEST.fingerprint


def make_file(path: Path) -> None:
    path.write_text("precious", encoding="utf-8")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("x", encoding="utf-8")


def make_link(path: Path) -> None:
    path.with_name("target").mkdir()
    path.symlink_to("target")


@pytest.mark.parametrize("make", [make_file, make_folder, make_link])
def test_anything_else_is_never_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    before = siblings(tmp_path)
    with (
        pytest.raises(ExportError, match=r"is not a folder|is a link; give the folder|not empty and no bundle"),
        stage_bundle(tmp_path / "bundle", overwrite=True),
    ):
        pytest.fail("started")
    assert siblings(tmp_path) == before


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "bundle"

    def build() -> None:
        with stage_bundle(output) as staged:
            fill(staged)
            write_bundle(tmp_path / "other", Recipe(seed=7)).rename(output)

    with pytest.raises(ExportError, match="already holds a bundle"):
        build()
    assert open_bundle(output).manifest.fingerprint != MANIFEST.fingerprint
    assert siblings(tmp_path) == ["bundle"]


def test_no_moment_is_without_a_bundle_where_the_system_can_exchange_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first" / "a").mkdir(parents=True)
    (tmp_path / "second").mkdir()
    if not bundle_writer._exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("cannot exchange folders here")
    assert (siblings(tmp_path / "first"), siblings(tmp_path / "second")) == ([], ["a"])
    output = write_bundle(tmp_path / "bundle", Recipe(seed=7))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: pytest.fail("moved") if self == output else rename(self, to))
    write_bundle(output, Recipe(), overwrite=True)
    ActionTokenizer.load(output).close()
    assert siblings(tmp_path) == ["bundle", "first", "second"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_overwritten_bundle_is_gone_and_nothing_else_left(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(bundle_writer, "_exchange", lambda *_: False)
    output = write_bundle(tmp_path / "bundle", Recipe(seed=7))
    write_bundle(output, Recipe(has_engine=False), overwrite=True)
    assert unlisted_files(output, open_bundle(output).manifest.files) == ()
    assert siblings(tmp_path) == ["bundle"]


def refuse_renames(patch: pytest.MonkeyPatch, error: OSError, is_refused: Callable[[Path], bool], output: Path) -> None:
    """Of these paths to `output`, on a file system that cannot exchange two folders."""
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == output and is_refused(self):
            raise error
        return rename(self, target)

    patch.setattr(Path, "rename", failing)
    patch.setattr(bundle_writer, "_exchange", lambda *_: False)


def test_the_old_bundle_comes_back_when_the_new_one_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write_bundle(tmp_path / "bundle", Recipe(seed=7))
    fingerprint = open_bundle(output).manifest.fingerprint
    refuse_renames(monkeypatch, OSError(28, "No space left on device"), lambda path: path.name == "new", output)
    with (
        pytest.raises(ExportError, match="cannot be written: No space left on device"),
        stage_bundle(output, overwrite=True) as staged,
    ):
        fill(staged)
    assert open_bundle(output).manifest.fingerprint == fingerprint
    assert siblings(tmp_path) == ["bundle"]


def test_an_old_bundle_that_cannot_be_put_back_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write_bundle(tmp_path / "bundle", Recipe(seed=7))
    fingerprint = open_bundle(output).manifest.fingerprint
    with monkeypatch.context() as patch:
        refuse_renames(patch, OSError(5, "Input/output error"), lambda _: True, output)
        with (
            pytest.raises(ExportError, match=r"is now at .*/old and cannot be put back: Input/output error"),
            stage_bundle(output, overwrite=True) as staged,
        ):
            fill(staged)
    # The next build puts it back.
    with pytest.raises(ExportError, match="already holds a bundle"), stage_bundle(output):
        pytest.fail("started")
    assert open_bundle(output).manifest.fingerprint == fingerprint
    assert siblings(tmp_path) == ["bundle"]


# --- where nothing can be written -------------------------------------------------------------------------------------


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    with pytest.raises(ExportError, match="file"), stage_bundle(tmp_path / "file" / "bundle"):
        pytest.fail("started")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ExportError, match="cannot be written: Permission denied; choose another --output"),
        stage_bundle(tmp_path / "bundle"),
    ):
        pytest.fail("started")


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ExportError, match="No space left on device"), stage_bundle(tmp_path / "bundle") as staged:
        staged.write("encoder.onnx", b"x")
    assert siblings(tmp_path) == []


# --- processes that end in the middle ---------------------------------------------------------------------------------

STUCK = """
import sys, time
from rfsq.export.bundle_writer import stage_bundle
with stage_bundle(sys.argv[1], overwrite=True) as staged:
    staged.write("encoder.onnx", b"x")
    print("ready", flush=True)
    time.sleep(3600)
"""


def start_stuck(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, an interrupt is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_a_killed_build_leaves_no_bundle_and_the_next_one_clears_up(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    kill(start_stuck(output))
    (left,) = siblings(tmp_path)
    assert left.startswith(".bundle.staged-")
    write_bundle(output, Recipe())
    assert siblings(tmp_path) == ["bundle"]


def test_a_strangers_folder_with_the_name_of_a_dead_build_is_left_alone(tmp_path: Path) -> None:
    strange = tmp_path / ".bundle.staged-abcd0123"
    for name in ("new", "old"):
        (strange / name).mkdir(parents=True)
        (strange / name / "1.jpg").write_bytes(b"x")
    empty = tmp_path / ".bundle.staged-abcd4567"
    empty.mkdir()
    write_bundle(tmp_path / "bundle", Recipe())
    assert siblings(tmp_path) == [strange.name, "bundle"]
    assert [(strange / name / "1.jpg").read_bytes() for name in ("new", "old")] == [b"x", b"x"]


def test_an_interrupted_build_clears_up_itself(tmp_path: Path) -> None:
    process = start_stuck(tmp_path / "bundle")
    process.send_signal(signal.SIGINT)
    process.wait()
    assert siblings(tmp_path) == []


def test_a_build_that_still_runs_is_left_alone_whatever_its_process_number(tmp_path: Path) -> None:
    """In two containers that share a volume both may be process 1; here this very process begins two builds."""
    process = start_stuck(tmp_path / "bundle")
    try:
        with stage_bundle(tmp_path / "bundle") as staged:
            write_bundle(tmp_path / "bundle", Recipe(seed=7))
            assert len(siblings(tmp_path)) == 3
            fill(staged)
            # It can be published yet.
            (tmp_path / "bundle").rename(tmp_path / "other")
    finally:
        kill(process)
    assert open_bundle(tmp_path / "bundle").manifest.fingerprint == MANIFEST.fingerprint


KILLED_BETWEEN = """
import os, sys
from pathlib import Path
from tests.bundles import Recipe, write_bundle
from rfsq.export import bundle_writer
bundle_writer._exchange = lambda *_: False
rename = Path.rename
def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), 9)
Path.rename = rename_and_die
write_bundle(Path(sys.argv[1]), Recipe(), overwrite=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build left that was killed between two renames."""
    folder = tmp_path_factory.mktemp("killed")
    output = write_bundle(folder / "bundle", Recipe(seed=7))
    result = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(output)], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not output.exists()
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_bundle_set_aside_by_a_killed_build_comes_back(overwrite: bool, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True, symlinks=True)
    output, fingerprint = tmp_path / "bundle", fingerprint_of(Recipe(seed=7))
    if overwrite:
        with pytest.raises(ZeroDivisionError), stage_bundle(output, overwrite=True):
            raise ZeroDivisionError
    else:
        with pytest.raises(ExportError, match="already holds a bundle"), stage_bundle(output):
            pytest.fail("started")
    assert open_bundle(output).manifest.fingerprint == fingerprint
    assert siblings(tmp_path) == ["bundle"]


def test_who_opens_a_bundle_that_a_killed_build_has_set_aside_is_told_how_to_put_it_back(
    killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True, symlinks=True)
    output = tmp_path / "bundle"
    with pytest.raises(BundleError, match="a build that was killed has set aside the one") as refused:
        open_bundle(output)
    subprocess.run(shlex.split(str(refused.value).rpartition(" with ")[2]), check=True)
    assert open_bundle(output).manifest.fingerprint == fingerprint_of(Recipe(seed=7))


def test_only_what_builds_of_this_output_left_is_removed(tmp_path: Path) -> None:
    kept = {".other.staged-abcdefgh", ".bundle.staged-notes", "bundle.staged-abcdefgh", ".bundle.staged-abcdefgh.txt"}
    for name in (*kept, ".bundle.staged-abcdefgh"):
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.staged-linktous").symlink_to(".other.staged-abcdefgh")
    write_bundle(tmp_path / "bundle", Recipe())
    assert set(siblings(tmp_path)) == {*kept, "bundle", ".bundle.staged-linktous"}
