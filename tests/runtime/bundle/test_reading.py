"""Files of others are opened once, without waiting, and read no further than expected."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rfsq.runtime.bundle.reading import OpenFolder, UnfitFileError, parse_json, read_file, read_json
from rfsq.runtime.control.config import ControlConfig
from rfsq.runtime.control.errors import ControlConfigError, FlightRecordError
from rfsq.runtime.control.recorder import read_record
from rfsq.runtime.datasets.errors import TokenDatasetError
from rfsq.runtime.datasets.format import INFO_NAME, read_info
from rfsq.runtime.datasets.writers import hash_file


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A sparse file of 8 TB."""
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**43)
    return tmp_path / "huge"


def test_a_file_is_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file", 5) == read_file(tmp_path / "link", 6) == b"12345"
    with pytest.raises(UnfitFileError, match="it has 5 bytes; expected at most 4"):
        read_file(tmp_path / "file", 4)


def test_what_grows_while_it_is_read_is_read_no_further_than_it_went_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, look = tmp_path / "file", os.fstat
    path.write_bytes(b"12345")

    def look_then_grow(descriptor: int) -> os.stat_result:
        found = look(descriptor)
        path.write_bytes(b"1234567890")
        return found

    monkeypatch.setattr(os, "fstat", look_then_grow)
    assert read_file(path, 6) == b"12345"


@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/zero"])
def test_only_regular_files_are_read(name: str, pipe: Path) -> None:
    (pipe.parent / "folder").mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UnfitFileError, match="not a regular file"):
        read_file(pipe.parent / name, 10)
    with OpenFolder(pipe.parent) as folder, pytest.raises(OSError, match=r"not a regular file|No such file"):
        folder.opened(name.lstrip("/")).__enter__()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_every_reader_of_single_files_refuses_pipes_and_what_is_too_large(pipe: Path, huge: Path) -> None:
    for path in (pipe, huge):
        with pytest.raises(ControlConfigError, match=r"cannot be read: it .*; expected a TOML file"):
            ControlConfig.from_toml(path)
        with pytest.raises(FlightRecordError, match="is no flight record"):
            read_record(path)
    with pytest.raises(OSError, match="not a regular file"):
        hash_file(pipe)
    huge.rename(huge.with_name(INFO_NAME))
    with pytest.raises(TokenDatasetError, match=f"it has {2**43} bytes; expected at most"):
        read_info(huge.parent)


def test_deep_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000 + "]" * 5000, encoding="utf-8")
    with pytest.raises(ControlConfigError, match="is no TOML"):
        ControlConfig.from_toml(tmp_path / "deep.toml")


def test_a_flight_record_that_unfolds_to_more_than_any_is_refused_unread(tmp_path: Path) -> None:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", b"\0" * 1000)
        archive.infolist()[0].file_size = 2**32 - 2
        archive.writestr("more.npy", b"\0" * 1000)
        archive.infolist()[1].file_size = 2**32 - 2
    (tmp_path / "bomb.npz").write_bytes(output.getvalue())
    with pytest.raises(FlightRecordError, match=rf"its arrays take {2 * (2**32 - 2)} bytes; expected at most {2**32}"):
        read_record(tmp_path / "bomb.npz")


def test_a_flight_record_whose_header_promises_terabytes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive, archive.open("tokens.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<i4", "fortran_order": False, "shape": (2**52,)})
    with pytest.raises(FlightRecordError, match="is no flight record: Unable to allocate"):
        read_record(tmp_path / "bomb.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nests deeper than 32 levels"),
        ("[" * 33 + "]" * 33, "nests deeper than 32 levels"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("-Infinity", "-Infinity is no JSON number"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands there twice"),
        ('[{"a": [{"b": {}, "b": 2}]}]', "the key 'b' stands there twice"),
        ('{"x\\u0061": 1, "xa": 1}', "the key 'xa' stands there twice"),
        ("1" * 5000, "4300 digits"),
        (b"\xff", "invalid start byte"),
        ("", "Expecting value"),
    ],
)
def test_json_is_read_strictly_and_no_deeper_than_expected(text: str | bytes, message: str) -> None:
    assert parse_json("[" * 31 + "1" + "]" * 31)[0][0] is not None
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_of_a_file_is_bounded_as_the_file_is(tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "file").write_text('{"a": [1]}')
    assert read_json(tmp_path / "file", 10) == {"a": [1]}
    with pytest.raises(UnfitFileError, match="it has 10 bytes; expected at most 9"):
        read_json(tmp_path / "file", 9)
    with pytest.raises(UnfitFileError, match="not a regular file"):
        read_json(pipe, 9)
