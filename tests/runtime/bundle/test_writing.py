"""Files are whole or not there, and nobody else's file is in the way."""

import os
from pathlib import Path

import pytest

from rfsq.runtime.bundle.paths import replacing


def test_the_file_takes_its_place_when_all_went_well(tmp_path: Path) -> None:
    with replacing(tmp_path / "folder/x") as temporary:
        temporary.write_bytes(b"new")
        assert not (tmp_path / "folder/x").exists()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["x"]


def test_nothing_of_it_is_left_when_not(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x") as temporary:
        raise ZeroDivisionError(temporary.write_bytes(b"new"))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_that_bears_a_temporary_name_is_left_alone(tmp_path: Path) -> None:
    """Left by another process of this number, or anyone's."""
    other = tmp_path / f".x.{os.getpid()}.tmp"
    other.write_bytes(b"mine")
    with replacing(tmp_path / "x") as temporary:
        temporary.write_bytes(b"new")
    assert other.read_bytes() == b"mine"
