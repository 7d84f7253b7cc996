"""Every function that takes a path takes the same paths, and refuses the same things with its own type of error."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.errors import ExportError
from rfsq.rfsq_ref.checkpoints import load_checkpoint
from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from rfsq.rfsq_ref.own_format import check_output
from rfsq.rfsq_ref.training import load_history
from rfsq.runtime import ActionTokenizer, ControlConfig, ControlConfigError, FingerprintError, InvalidInputError
from rfsq.runtime.bundle.errors import BundleError, OutputExistsError, TokenizerError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.paths import as_path, refuse_existing, replacing, shown
from rfsq.runtime.control.errors import FlightRecordError
from rfsq.runtime.control.recorder import read_record
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.datasets.token_reader import open_token_dataset
from rfsq.runtime.policy.adapter import ActionRFSQAE
from rfsq.runtime.qualification.agreement import compare


def stage(path: Any) -> None:
    with stage_bundle(path):
        pass


#: Every public function that takes a path, and what it raises for one that is none.
FUNCTIONS: dict[str, tuple[Callable[[Any], object], type[Exception]]] = {
    "ActionTokenizer.load": (ActionTokenizer.load, InvalidInputError),
    "open_bundle": (open_bundle, InvalidInputError),
    "ActionRFSQAE.from_bundle": (ActionRFSQAE.from_bundle, InvalidInputError),
    "ControlConfig.from_toml": (ControlConfig.from_toml, ControlConfigError),
    "read_record": (read_record, FlightRecordError),
    "open_source": (open_source, SourceError),
    "open_token_dataset": (open_token_dataset, InvalidInputError),
    "compare": (lambda path: compare(path, "new", None), InvalidInputError),  # type: ignore[arg-type]
    "load_actions": (load_actions, DataError),
    "load_checkpoint": (load_checkpoint, CheckpointError),
    "check_output": (check_output, CheckpointError),
    "load_history": (load_history, CheckpointError),
    "stage_bundle": (stage, ExportError),
}


class Place:
    """A path-like that is no pathlib.Path, such as other libraries hand about."""

    def __init__(self, path: Any) -> None:
        self._path = path

    def __fspath__(self) -> Any:
        return self._path


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"is None \(NoneType\); expected a str or a pathlib.Path"),
        (b"build/bundle", r"is b'build/bundle' \(bytes\); .*decode it with os.fsdecode"),
        (3, r"is 3 \(int\); expected a str"),
        (Place(b"bundle"), r"is b'bundle' \(bytes\)"),
        ("", "is ''; expected the name of a file or folder"),
        ("a\0b", r"is 'a\\x00b'; expected the name"),
        ("a\ud800", "characters that no file name can have"),
        ("~nobody-of-that-name/bundle", "no such user's home is known here"),
    ],
    ids=["none", "bytes", "number", "path-like of bytes", "empty", "null", "surrogate", "no user"],
)
def test_what_is_no_path_is_refused_by_type(name: str, path: Any, message: str) -> None:
    function, error = FUNCTIONS[name]
    with pytest.raises(error, match=message):
        function(path)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("check_output", "stage_bundle")])
@pytest.mark.parametrize("made", [str, Path, Place], ids=["str", "Path", "path-like"])
def test_a_home_folder_is_expanded(
    name: str, made: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    function, _ = FUNCTIONS[name]
    with pytest.raises((TokenizerError, DataError, CheckpointError), match=f"{tmp_path}/nothing-here"):
        function(made("~/nothing-here"))


@pytest.mark.parametrize("made", [str, Path, Place], ids=["str", "Path", "path-like"])
def test_a_bundle_at_home_is_loaded(
    made: Callable[[str], Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(bundle.parent))
    with ActionTokenizer.load(made(f"~/{bundle.name}")) as tokenizer:
        assert tokenizer.fingerprint == open_bundle(bundle).manifest.fingerprint
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    stage_and_leave(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == []


def stage_and_leave(home: Path) -> None:
    """Output goes home as well, and into no folder that is called `~`."""
    with pytest.raises(ExportError, match=f"the bundle for {home}/made was not sealed"):
        stage("~/made")


def test_a_missing_file_of_settings_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ControlConfigError, match=r"loop\.toml does not exist; give a TOML file"):
        ControlConfig.from_toml(tmp_path / "loop.toml")
    with pytest.raises(ControlConfigError, match="cannot be read: it is not a regular file; expected a TOML file"):
        ControlConfig.from_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("period_s = ")
    with pytest.raises(ControlConfigError, match=r"bad\.toml is no TOML"):
        ControlConfig.from_toml(tmp_path / "bad.toml")


def test_a_missing_flight_record_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FlightRecordError, match=r"is no flight record: it does not exist; pass a \.npz"):
        read_record(tmp_path / "flight.npz")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="\0~", exclude_categories=("Cs",)), min_size=1))
def test_any_other_text_stays_as_it_is(text: str) -> None:
    assert as_path(text) == Path(text)
    assert as_path(os.fspath(Path(text))) == Path(text)


# Output ---------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    with replacing(path, error=InvalidInputError) as temporary:
        temporary.write_text(text)
        meanwhile()


@pytest.fixture(params=["links", "no links"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a file to be written, on a file system with hard links and on one without."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    return tmp_path / "made" / "numbers.txt"


def test_of_two_commands_with_one_output_the_first_is_kept_and_the_second_is_told(path: Path) -> None:
    refuse_existing([path], overwrite=False)
    with pytest.raises(OutputExistsError, match=r"numbers\.txt was written by another process meanwhile, and is kept"):
        write(path, "second", lambda: path.write_text("first"))
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_that_leads_nowhere_is_not_replaced_either(path: Path) -> None:
    refuse_existing([path], overwrite=False)
    with pytest.raises(OutputExistsError):
        write(path, "second", lambda: path.symlink_to("nowhere"))
    assert path.is_symlink()


def test_what_a_command_has_written_itself_it_may_write_anew(path: Path) -> None:
    refuse_existing([path], overwrite=False)
    write(path, "a half")
    write(path, "the whole")
    assert path.read_text() == "the whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [True, None], ids=["overwrite", "no command"])
def test_all_else_is_replaced(overwrite: bool | None, path: Path) -> None:
    if overwrite:
        refuse_existing([path], overwrite=False)
        refuse_existing([path], overwrite=True)
    path.parent.mkdir()
    path.write_text("old")
    write(path, "new")
    assert path.read_text() == "new"


def test_a_folder_that_may_not_be_looked_into_is_said_to_be_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(InvalidInputError, match="Permission denied; choose a writable folder"):
        write(tmp_path / "numbers.txt", "1")


def test_a_file_that_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    def fill_up() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_beside_and_fill_up() -> None:
        (tmp_path / "a" / "beside").touch()
        fill_up()

    path = tmp_path / "a" / "b" / "c"
    with pytest.raises(InvalidInputError, match="make room"):
        write(path, "much", fill_up)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInputError, match="make room"):
        write(path, "much", write_beside_and_fill_up)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "beside"]


# Fingerprints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [0, 1, 7])
def test_a_fingerprint_that_is_too_short_is_said_to_be_too_short(digits: int, bundle: Path) -> None:
    whole = open_bundle(bundle).manifest.fingerprint
    message = f"'{whole[:digits]}', of {digits} characters; expected a str of 8 to 64 hexadecimal digits"
    with pytest.raises(InvalidInputError, match=message) as refused:
        ActionTokenizer.load(bundle, expect_fingerprint=whole[:digits])
    assert "mean something else" not in str(refused.value)
    with pytest.raises(InvalidInputError, match=message):
        ActionRFSQAE.from_bundle(bundle, expect_fingerprint=whole[:digits])


@pytest.mark.parametrize("given", ["build/bundle", "f" * 65, "0123456G", 12345678, b"01234567"])
def test_what_is_no_fingerprint_is_refused_as_such(given: Any, bundle: Path) -> None:
    with pytest.raises(InvalidInputError, match="expected a str of 8 to 64 hexadecimal digits"):
        ActionTokenizer.load(bundle, expect_fingerprint=given)


def test_another_tokenizer_is_still_another_tokenizer(bundle: Path) -> None:
    whole = open_bundle(bundle).manifest.fingerprint
    ActionTokenizer.load(bundle, expect_fingerprint=whole[:8]).close()
    ActionTokenizer.load(bundle, expect_fingerprint=whole).close()
    with pytest.raises(FingerprintError, match="its tokens mean something else"):
        ActionTokenizer.load(bundle, expect_fingerprint="0" * 8 if whole[:8] != "0" * 8 else "1" * 8)


def test_a_bundle_that_is_not_there_is_no_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        ActionTokenizer.load(tmp_path / "nothing")


def test_any_value_of_a_file_can_be_shown_in_a_message() -> None:
    assert shown({"a": [1]}) == "{'a': [1]}"
    assert shown("x" * 1000, most=5) == "'xxxx…"
    assert shown(10**5000) == "a value of type int with thousands of digits"
    assert shown([10**5000]) == "a value of type list with thousands of digits"
