"""What commands say while they work: in words that are right for one, and in place on a terminal alone."""

import sys

import pytest

from rfsq.runtime.bundle.console import ProgressLine, aligned, duration
from rfsq.runtime.bundle.paths import counted


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> tuple[Clock, ProgressLine]:
    clock = Clock()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    return clock, ProgressLine(clock)


def test_a_log_gets_a_line_every_ten_seconds_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, line = shown(monkeypatch, is_terminal=False)
    for seconds in range(25):
        clock.now = 100.0 + seconds
        line.show(f"{seconds} s")
    line.clear()
    assert capsys.readouterr() == ("", "10 s\n20 s\n")


def test_on_a_terminal_one_line_is_renewed_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, line = shown(monkeypatch, is_terminal=True)
    for text, seconds in (("one", 0.0), ("too soon", 0.1), ("two\x1b", 0.3)):
        clock.now = 100.0 + seconds
        line.show(text)
    line.clear()
    assert capsys.readouterr() == ("", "\r\x1b[Kone\r\x1b[Ktwo\\x1b\r\x1b[K")


def test_durations_and_numbers_are_read_as_they_are_spoken() -> None:
    assert [duration(seconds) for seconds in (0.0, 0.9, 1.0, 59.4, 60, 3599, 7320)] == [
        "less than 1 s",
        "less than 1 s",
        "1 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 02 min",
    ]
    assert [counted(number, "step") for number in (0, 1, 2, 22_016)] == ["0 steps", "1 step", "2 steps", "22,016 steps"]


def test_a_table_is_as_wide_as_its_cells_with_numbers_to_the_right() -> None:
    assert list(aligned([("gate", "found"), ("wrong tokens", "0"), ("error", "1.5e-06")], is_ruled=True)) == [
        "gate            found",
        "---------------------",
        "wrong tokens        0",
        "error         1.5e-06",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert list(aligned([("gate", "found")], is_ruled=True)) == ["gate  found", "-----------"]
