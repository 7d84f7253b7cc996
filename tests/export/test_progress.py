"""The step list: one sign per step, what came out beside it, everything else below."""

import re
import sys

import pytest

from rfsq.export.progress import phase


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_step_that_ends_gets_a_check_mark_its_time_and_its_first_note(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("load checkpoint") as current:
        current.note("robust.safetensors")
    (line,) = lines_of(capsys)
    assert re.fullmatch(r"✓ load checkpoint +\d+\.\d s  robust\.safetensors", line)


def test_further_notes_stand_below_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("compile") as current:
        for note in ("encoder", "decoder", "done"):
            current.note(note)
    first, *rest = lines_of(capsys)
    assert [line.strip() for line in rest] == ["decoder", "done"]
    assert {line.index(note) for line, note in zip((first, *rest), ("encoder", "decoder", "done"), strict=True)} == {
        first.index("encoder")
    }


def test_a_step_without_notes_is_a_line_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("nothing to say"):
        pass
    (line,) = lines_of(capsys)
    assert line.startswith("✓ nothing to say ")


def test_a_skipped_step_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("calibrate") as current:
        current.skip("nothing to fit")
    (line,) = lines_of(capsys)
    assert re.fullmatch(r"– calibrate +\d+\.\d s  nothing to fit", line)


def test_a_failed_step_says_what_failed_and_the_build_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("parity gates") as current:
        current.fail("3 gates are red")
    with phase("next"):
        pass
    first, second = lines_of(capsys)
    assert re.fullmatch(r"✗ parity gates +\d+\.\d s  3 gates are red", first)
    assert second.startswith("✓ next ")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["note", "skip", "fail"])
def test_a_step_that_raises_is_failed_whatever_it_said_before(
    error: type[BaseException], before: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        with phase("export ONNX") as current:
            getattr(current, before)("so far")
            raise error("broken")

    with pytest.raises(error, match="broken"):
        run()
    (line,) = lines_of(capsys)
    assert re.fullmatch(r"✗ export ONNX +\d+\.\d s  so far", line)


def test_a_terminal_sees_the_step_begin_and_the_same_line_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with phase("calibrate"):
        assert capsys.readouterr().out == "… calibrate"
    assert capsys.readouterr().out.startswith("\r✓ calibrate ")


def test_without_a_terminal_nothing_is_written_before_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("calibrate"):
        assert capsys.readouterr().out == ""
    assert "\r" not in capsys.readouterr().out
