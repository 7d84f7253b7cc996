"""`python rfsq_ref/compare.py` as a person runs it, on the files of robots it has never seen."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rfsq.calibration.fitting import recover
from rfsq.calibration.settings import CalibrationConfig, ReadoutConfig, RecoveredConfig
from rfsq.evidence.compare_command import main
from rfsq.evidence.report import full_text
from rfsq.evidence.results import Comparison
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from tests.evidence.conftest import robot_dataset, write_npz

ROOT = Path(__file__).resolve().parents[2]
#: Everything that takes long is left out.
QUICK = ["--no-peers", "--no-calibration-study", "--seeds", "0", "--epochs", "2", "--workers", "1"]


def write_hdf5(path: Path, dataset: ActionDataset) -> None:
    with h5py.File(path, "w") as file:
        for index, episode in enumerate(dataset.episodes):
            file[f"data/demo_{index}/actions"] = episode


def write_parquet(path: Path, dataset: ActionDataset) -> None:
    table = {
        "action": [step.tolist() for episode in dataset.episodes for step in episode],
        "episode_index": [index for index, episode in enumerate(dataset.episodes) for _ in episode],
        "frame_index": [step for episode in dataset.episodes for step in range(len(episode))],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def _leave_out_gauss_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longest of all, and no flag of the command changes it."""

    def regressed(
        checkpoint: Checkpoint, dataset: ActionDataset, prefixes: tuple[int, ...], config: RecoveredConfig
    ) -> Checkpoint:
        return recover(checkpoint, dataset, prefixes, replace(config, refine_steps=0))

    monkeypatch.setattr("rfsq.evidence.jobs.recover", regressed)


@pytest.mark.parametrize(
    ("name", "write", "action_dim"),
    [("robot.npz", write_npz, 4), ("robot.hdf5", write_hdf5, 14), ("robot.parquet", write_parquet, 4)],
)
def test_any_robots_file_gives_a_report(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: object,
    action_dim: int,
) -> None:
    """Other ranges, 4 and 14 dimensions, one that never moves, and an episode shorter than a chunk."""
    write(tmp_path / name, robot_dataset(action_dim))  # type: ignore[operator]
    _leave_out_gauss_newton(monkeypatch)
    # Drawing takes long, and does not depend on the file's format: the script below draws.
    monkeypatch.setattr("rfsq.evidence.report.figures", lambda *_: {})
    arguments = [
        "--data",
        tmp_path / name,
        "--output",
        tmp_path / "report",
        "--cache",
        tmp_path / "cache",
        "-v",
        *QUICK,
    ]

    status = main(list(map(str, arguments)))

    comparison = Comparison.read(tmp_path / "report" / "comparison.json")
    assert status == (0 if comparison.improvement > 0.3 else 1)
    assert comparison.data.action_dim == action_dim
    assert comparison.settings["normaliser"] == "min-max"
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"comparison.json", "comparison.txt", "report.html"}
    printed, told = capsys.readouterr()
    ended = re.findall(r"^(\d) of (\d) jobs are done: (?:peers|robust|naive)$", told, re.MULTILINE)
    assert [int(number) for number, _ in ended] == list(range(1, int(ended[0][1]) + 1))
    assert "robust calibrated, tokens alone" in printed
    assert printed.count("layer by layer") == len(comparison.schemes)


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_the_readout_that_is_asked_for_reaches_the_fit(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(
        _checkpoint: Checkpoint, _dataset: ActionDataset, _config: CalibrationConfig, readout: ReadoutConfig
    ) -> None:
        raise DataError(f"asked to fit a readout: {readout.choice.value}")

    monkeypatch.setattr("rfsq.evidence.jobs.calibrate", fit)
    arguments = ["--robust", str(ROBUST_CHECKPOINT), "--output", str(tmp_path / "report"), "--readout", choice, *QUICK]
    assert main(arguments) == 2
    assert f"asked to fit a readout: {choice}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--readout", "always"])


def test_the_text_grades_the_tokens_and_its_tables_have_units(comparison: Comparison) -> None:
    text = full_text(comparison)
    for seed in (0, 1):
        label = f"calibrated tokens of seed {seed}, all layers"
        assert re.search(rf"^{label}, good; in robot units: RMS error at most ", text, re.MULTILINE)
    assert "WARNING" not in text
    heads = [line for line in text.splitlines() if "action MSE" in line and "max error" in line]
    # The summary, and each scheme layer by layer.
    assert len(heads) == 1 + len(comparison.schemes)
    assert all("action MSE, normalised units²" in line and "max error, normalised units" in line for line in heads)


def test_a_nan_is_refused_with_its_episode_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = {f"episode_{index}": np.zeros((20, 4), np.float32) for index in range(5)}
    episodes["episode_3"][7, 2] = np.nan
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        for index, episode in enumerate(episodes.values()):
            file[f"data/demo_{index}/actions"] = episode

    assert main(["--data", str(tmp_path / "bad.hdf5"), "--output", str(tmp_path / "report"), *QUICK]) == 2
    error = capsys.readouterr().err
    assert "demo_3" in error
    assert "step 7" in error
    assert not (tmp_path / "report").exists()


def test_status_1_says_that_calibrated_tokens_did_not_improve(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(improvement: float) -> object:
        changed = Comparison(**{**vars(comparison), "improvement": improvement})
        return lambda *_, **__: changed

    statuses = {}
    for improvement in (0.31, 0.30, -1.0):
        monkeypatch.setattr("rfsq.evidence.report.compare", found(improvement))
        monkeypatch.setattr("rfsq.evidence.report.write_report", lambda *_: None)
        statuses[improvement] = main(["--output", str(tmp_path), *QUICK])
    assert statuses == {0.31: 0, 0.30: 1, -1.0: 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "expected different ones"),
        (["--workers", "0"], "workers is 0"),
        (["--position-unit", "0"], "position unit is 0.0; expected a number above 0"),
        (["--rotation-unit", "nan"], "rotation unit is nan; expected a number above 0"),
        (["--rotation-unit", "-1"], "rotation unit is -1.0; expected a number above 0"),
        (["--naive", str(ROBUST_CHECKPOINT)], "swap --naive and --robust"),
        (["--robust", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--output", "/dev/null/report"], "no writable folder"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*QUICK, "--output", str(tmp_path / "report"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_the_script_runs_from_anywhere_with_workers(tmp_path: Path) -> None:
    write_npz(tmp_path / "robot.npz", robot_dataset(episodes=8))
    command = [sys.executable, str(ROOT / "rfsq_ref" / "compare.py"), "--data", "robot.npz", "--output", "report"]
    command += [*QUICK, "--workers", "2"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert finished.returncode in (0, 1), finished.stderr
    assert finished.stdout.endswith("into report\n")
    assert Comparison.read(tmp_path / "report" / "comparison.json").data.source == "robot.npz"
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"comparison.json", "comparison.txt", "report.html", "figures"}
    assert len(list((tmp_path / "report" / "figures").iterdir())) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "report", "robot.npz"]


def test_page_and_figures_are_drawn_anew_from_the_results_that_git_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("comparison.json", "calibration.json", "chunks.json", "rollout.json"):
        (tmp_path / name).write_bytes((ROOT / "docs" / "results" / name).read_bytes())
    assert main(["--report-only", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<h2>{name}</h2>" in page for name in ("Error by layer", "Calibration choices", "Closed loop"))
    assert (tmp_path / "comparison.json").read_bytes() == (ROOT / "docs/results/comparison.json").read_bytes()
    assert {path.name for path in (ROOT / "docs/results/figures").iterdir()} <= {
        path.name for path in (tmp_path / "figures").iterdir()
    }
    assert main(["--report-only", "--output", str(tmp_path)]) == 2
    assert "report.html" in capsys.readouterr().err
    assert main(["--report-only", "--output", str(tmp_path / "nothing")]) == 2


def test_a_section_on_the_closed_loop_is_shown_for_the_same_demonstrations(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfsq.evidence.report.compare", lambda *_, **__: comparison)
    rate = {"successes": 3, "n": 4, "rate": 0.75, "low": 0.3, "high": 0.95}
    cell = {"codec": "c", "success": rate, "reached": rate, "steps": 9.0, "tracking_mm": [1.0, 2.0, 3.0],
            "tracking_deg": [0.1, 0.2, 0.3], "precision_mm": None, "tolerances": []}  # fmt: skip
    task = {"cells": {"raw": cell}, "planned": 50, "separated_by_success": None, "separating_mm": [],
            "naive_ahead_mm": [], "against_naive": None, "against_raw": {}, "layers_needed": None}  # fmt: skip
    shown = {}
    for sha256 in (comparison.data.sha256, "another"):
        run = {"loop_version": 1, "seed": 0, "chunk": 8, "versions": {}, "hashes": {"demonstrations": sha256}}
        content = {"format": "rfsq-rollout-report", "format_version": 2, "confidence": 0.95, "tolerances_mm": [],
                   "run": run, "tasks": {"Stack": task}}  # fmt: skip
        (tmp_path / "rollout.json").write_text(json.dumps(content))
        sections: list[tuple[str, str]] = []
        monkeypatch.setattr("rfsq.evidence.report.write_report", lambda *found, kept=sections: kept.extend(found[1]))
        main(["--output", str(tmp_path), *QUICK])
        shown[sha256] = "75% (30% … 95%)" in "".join(content for _, content in sections)
    assert shown == {comparison.data.sha256: True, "another": False}
