"""What the command `rfsq_ref/rollout.py` promises: settings, exit status, and a report of what is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rfsq.evidence.episodes import Episode, Identity, open_episodes
from rfsq.evidence.rollout_command import config_of, main, parser
from rfsq.evidence.settings import RolloutConfig
from rfsq.evidence.simulation import EpisodeResult, Spread

ROOT = Path(__file__).resolve().parent.parent.parent


def test_arguments_become_settings() -> None:
    flags = "--tasks Lift Door --cells raw naive --episodes 3 --seed 4 --chunk 2 --workers 5 --episodes-dir here"
    assert config_of(parser().parse_args([*flags.split(), "--restart-changed"])) == RolloutConfig(
        ("Lift", "Door"), ("raw", "naive"), 3, 4, 2, 5, False, True, Path("here")
    )
    assert config_of(parser().parse_args([])) == RolloutConfig()
    assert config_of(parser().parse_args(["--peers"])).peers


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--episodes 0", "episodes is 0; expected at least 1"), ("--tasks Cooking", "expected different ones of")],
)
def test_settings_that_make_no_sense_are_an_error_of_two(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.split()) == 2
    assert message in capsys.readouterr().err


def test_the_episodes_that_are_there_are_reported_without_a_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = Spread(0.0, 0.0, 0.0)
    with open_episodes(tmp_path / "episodes.jsonl", Identity(1, 0, 8, {}, {})) as file:
        file.append(Episode("Stack", "raw", "c", 0, 1, EpisodeResult(True, True, 100, spread, spread, 2.0)))
    assert main(["--report-only", "--episodes-dir", str(tmp_path), "--output", str(tmp_path / "results"), "-v"]) == 0
    assert "100% (21% … 100%)" in capsys.readouterr().out
    assert (tmp_path / "results" / "rollout.json").is_file()


def test_a_report_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report-only", "--episodes-dir", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "run `python rfsq_ref/rollout.py` first" in capsys.readouterr().err


def test_it_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "rfsq_ref" / "rollout.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=True,
    )
    assert "--report-only" in done.stdout
