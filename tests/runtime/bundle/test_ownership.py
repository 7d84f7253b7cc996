"""A folder is ours by the secret in it, and by nothing that anyone would write by chance."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime.bundle.ownership import Ownership


def test_a_marker_is_read_back_and_no_two_are_alike(tmp_path: Path) -> None:
    first, second = (Ownership.begin(tmp_path / name) for name in "ab")
    assert Ownership.read(tmp_path / "a") == first
    assert first != second


def test_a_key_owns_the_names_that_it_gave_and_no_others(tmp_path: Path) -> None:
    first, second = (Ownership.begin(tmp_path / name) for name in "ab")
    for what in ("decoded", "0123456789abcdef", "with-dash", "é\udcff"):
        assert first.owns(first.name(what))
        assert not second.owns(first.name(what))
    for name in ("lock", "photographs", "0123456789abcdef", "decoded-0123456789abcdef", "", "-"):
        assert not first.owns(name)


@given(st.binary(max_size=200))
def test_no_other_text_is_a_marker(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "marker"
    path.write_bytes(text)
    assert Ownership.read(path) is None


def test_an_altered_truncated_or_missing_marker_is_none(tmp_path: Path) -> None:
    path = tmp_path / "marker"
    Ownership.begin(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert Ownership.read(path) is None
        path.write_bytes(content[:place])
        assert Ownership.read(path) is None
    path.unlink()
    assert Ownership.read(path) is None
    assert not Ownership.is_unfinished(path)
    path.mkdir()
    assert not Ownership.is_unfinished(path)
    assert Ownership.read(path) is None


def test_a_marker_that_was_not_written_to_its_end_is_known(tmp_path: Path) -> None:
    path = tmp_path / "marker"
    Ownership.begin(path)
    content = path.read_bytes()
    assert not Ownership.is_unfinished(path)
    for part in (b"", bytes(len(content)), content[:-1], content[:50]):
        path.write_bytes(part)
        assert Ownership.is_unfinished(path)
    for other in (b"mine", content[:10], b"\0x"):
        path.write_bytes(other)
        assert not Ownership.is_unfinished(path)


def test_a_marker_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match="No space"):
        Ownership.begin(tmp_path / "marker")
    assert list(tmp_path.iterdir()) == []
