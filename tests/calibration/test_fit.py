"""`python calibration/fit.py`, from checkpoint to checkpoint."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rfsq.calibration.constants import worst_case_errors
from rfsq.calibration.data import Selection
from rfsq.calibration.fit import main
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import (
    NAIVE_CHECKPOINT,
    ROBUST_CHECKPOINT,
    Checkpoint,
    checkpoint_of,
    load_checkpoint,
    save_checkpoint,
)
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.rfsq_ref.published_model import ActionRFSQAE
from tests.runtime.datasets.samples import write_robomimic

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str | Path) -> int:
    outputs = ["--output", folder / "fitted.safetensors", "--report-dir", folder / "report"]
    return main([str(argument) for argument in (*outputs, *arguments)])


def fitted(folder: Path) -> Checkpoint:
    return load_checkpoint(folder / "fitted.safetensors")


def save_actions(path: Path, episodes: int = 4, steps: int = 60, action_dim: int = 7) -> Path:
    actions = np.random.default_rng(0).uniform(-1, 1, (episodes, steps, action_dim)).astype(np.float32)
    np.savez(path, actions=actions)
    return path


@pytest.fixture
def blank_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes several times as long as the fit that it is about."""
    monkeypatch.setattr("rfsq.calibration.report_plots.draw_report", lambda _: Figure(figsize=(1, 1)))


has_blank_picture = pytest.mark.usefixtures("blank_picture")


def test_defaults_fit_the_embedded_checkpoint(
    tmp_path: Path, calibrated: Checkpoint, demonstrations: ActionDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "-v") == 0
    found = fitted(tmp_path)
    assert found.constants is not None
    assert calibrated.constants is not None
    assert torch.equal(found.constants.scale, calibrated.constants.scale)
    assert torch.equal(found.constants.mean, calibrated.constants.mean)
    facts, remark = (found.provenance["calibrated"][name] for name in ("readout", "remark"))
    assert found.provenance["calibrated"] == {
        "config": {
            "objective": "range",
            "coverage": 1.0,
            "granularity": "layer",
            "headroom": 0.1,
            "worst_case": 4e-4,
        },
        "data": {
            "source": "demonstrations.npz",
            "sha256": demonstrations.sha256,
            "selection": Selection.TRAINING_SPLIT.value,
            "episodes": 19,
            "steps": 3295,
        },
        "worst_case_latent_error": float(worst_case_errors(calibrated.constants, 7)[-1]),
        "readout": facts,
        "remark": remark,
    }
    assert facts["choice"] == "auto"
    assert facts["kept"]
    assert facts["cross_validated_ratio"] < 0.5
    assert "the decoder's last layer is refitted" in remark
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["provenance"] == found.provenance["calibrated"]
    # Judged on the test part, not on what was fitted.
    assert report["num_steps"] == 3336
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "fitted on 19 episodes (3295 steps) of demonstrations.npz: part of the training data" in printed
    assert "judged on 19 episodes (3336 steps)" in printed
    assert "demonstrations.npz; action MSE in robot units², latents have no unit\n" in printed
    assert re.search(r"^autoencoder as trained, no quantiser, action MSE  1\.5\d+e-05$", printed, re.MULTILINE)
    assert re.search(r"^readout refitted, no quantiser +\d", printed, re.MULTILINE)
    # Each dimension in the robot's units, and nothing to warn of.
    assert re.search(r"^dimension 6, robot units .*%  +good$", printed, re.MULTILINE)
    assert "WARNING" not in printed


@has_blank_picture
def test_a_fit_that_does_not_surely_win_is_not_kept_but_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So large a penalty wins next to nothing."""
    data = save_actions(tmp_path / "other.npz", steps=20)
    assert run(tmp_path, "--calibration-data", data, "--readout-ridge", "1e6") == 0
    assert fitted(tmp_path).readout is None
    printed = capsys.readouterr().out
    assert "stays as it was trained: refitted it has 1 times the squared error" in printed
    assert "random actions from the range that the model was trained for would have 1 times their squared" in printed
    assert run(tmp_path, "--calibration-data", data, "--readout", "on", "--overwrite") == 0
    assert fitted(tmp_path).readout is not None


@has_blank_picture
def test_worthless_tokens_have_the_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Degrees for a checkpoint that was trained in radians."""
    actions = np.degrees(np.random.default_rng(0).uniform(-1, 1, (4, 100, 7))).astype(np.float32)
    np.savez(tmp_path / "degrees.npz", actions=actions)
    assert run(tmp_path, "--calibration-data", tmp_path / "degrees.npz", "--readout", "off") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WARNING: the tokens are worthless")
    assert "radians or degrees" in last


@has_blank_picture
def test_poor_tokens_are_warned_of_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice as far as the model was trained for."""
    actions = 2 * np.random.default_rng(0).uniform(-1, 1, (4, 100, 7)).astype(np.float32)
    np.savez(tmp_path / "wide.npz", actions=actions)
    assert run(tmp_path, "--calibration-data", tmp_path / "wide.npz", "--readout", "off") == 0
    *_, row, warning, wrote = capsys.readouterr().out.splitlines()
    assert re.search("^dimension 6, robot units .*% +poor$", row)
    assert warning.startswith("WARNING: the tokens are poor: decoded actions lose more than 1% of the variance in ")
    assert wrote.startswith("✓ wrote ")


@has_blank_picture
def test_the_weights_that_are_asked_for_are_fitted_and_it_is_said_what_was_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    models = {name: ActionRFSQAE(7, 4, 2, 5, use_layernorm=True, width=8).state_dict() for name in ("model", "ema")}
    torch.save({**models, "config": {"use_layernorm": True}}, tmp_path / "trained.pt")
    arguments = ("--checkpoint", tmp_path / "trained.pt", "--calibration-data", save_actions(tmp_path / "other.npz"))
    for flags, taken, left in (((), "model", "ema"), (("--weights", "ema", "--overwrite"), "ema", "model")):
        assert run(tmp_path, *arguments, *flags) == 0
        printed = capsys.readouterr().out.splitlines()
        assert f"weights taken: '{taken}'; not taken: '{left}'; --weights {left} takes those" in printed
        found = fitted(tmp_path)
        assert torch.equal(found.weights["encoder.0.weight"], models[taken]["encoder.0.weight"])
    assert found.provenance["weights"] == "ema"
    assert run(tmp_path, *arguments, "--weights", "teacher", "--overwrite") == 2
    assert "has the weights 'model', 'ema': name one of them" in capsys.readouterr().err


@has_blank_picture
def test_the_episodes_of_a_filter_key_are_fitted_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = np.random.default_rng(0).uniform(-1, 1, (6, 40, 7)).astype(np.float32)
    path = write_robomimic(tmp_path / "a.hdf5", list(episodes), train=[0, 1, 2, 4])
    arguments = ("--calibration-data", path, "--readout", "off", "--filter-key", "train")
    assert run(tmp_path, *arguments) == 0
    found = fitted(tmp_path).provenance["calibrated"]["data"]
    judged = re.search(r"judged on (\d) episode", capsys.readouterr().out)
    assert judged
    assert found["episodes"] + int(judged[1]) == 4


@has_blank_picture
def test_without_a_readout_the_decoder_stays_as_it_was_trained(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, "--checkpoint", tmp_path / "fitted.safetensors", "--readout", "off", "--overwrite") == 0
    found = fitted(tmp_path)
    assert found.readout is None
    assert found.provenance["calibrated"]["readout"]["choice"] == "off"
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["readout_mse"] is None
    assert report["layers"][-1]["action_mse"] == pytest.approx(report["autoencoder_mse"], rel=0.05)


@has_blank_picture
def test_recovered_tokens_decode_from_the_written_file(tmp_path: Path, test_actions: torch.Tensor) -> None:
    assert run(tmp_path, "--method", "recovered", "--prefixes", "2", "1", "--refine-steps", "1") == 0
    found = fitted(tmp_path)
    assert sorted(found.recovered) == [1, 2]
    model = found.model(dtype=torch.float64).requires_grad_(False)
    tokens, _ = model.encode(test_actions)
    error = float((model.decode(tokens[..., :2]) - test_actions).square().mean())
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["layers"][1]["action_mse"] == pytest.approx(error)
    facts = found.provenance["recovered"]["prefixes"]["2"]
    assert (facts["rank"], facts["unknowns"], facts["refinements"]) == (32, 32, 1)
    assert facts["condition"] > 1
    assert found.provenance["recovered"]["remark"] == ""


@has_blank_picture
def test_both_fits_live_in_one_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path, "--method", "recovered", "--prefixes", "1", "--refine-steps", "0") == 0
    assert run(tmp_path, "--checkpoint", tmp_path / "fitted.safetensors", "--overwrite") == 0
    found = fitted(tmp_path)
    assert found.constants is not None
    assert sorted(found.recovered) == [1]
    assert {"calibrated", "recovered", "training"} <= found.provenance.keys()


@has_blank_picture
def test_other_data_keep_a_part_to_judge_by_and_say_so(tmp_path: Path) -> None:
    data = save_actions(tmp_path / "other.npz")
    assert run(tmp_path, "--calibration-data", data, "--objective", "mse", "--granularity", "layer") == 0
    facts = fitted(tmp_path).provenance["calibrated"]
    assert facts["data"]["selection"] == Selection.OTHER_SPLIT.value
    assert (facts["data"]["episodes"], facts["data"]["steps"]) == (3, 180)
    assert (facts["config"]["objective"], facts["config"]["granularity"]) == ("mse", "layer")


@has_blank_picture
def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    """As does the same picture: see test_report.py."""
    data = save_actions(tmp_path / "other.npz")
    for name in ("first", "second"):
        assert run(tmp_path / name, "--calibration-data", data) == 0
    for file in ("fitted.safetensors", "report/report.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@has_blank_picture
def test_published_file_needs_to_be_told_how_it_was_trained(
    tmp_path: Path, robust: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = torch.linspace(-1, 1, robust.config.num_levels)
    grids = {f"rfsq.layers.{layer}.boundaries": grid.clone() for layer in range(robust.config.num_layers)}
    torch.save({**robust.weights, **grids}, tmp_path / "published.pt")
    data = save_actions(tmp_path / "other.npz")
    arguments = ("--checkpoint", tmp_path / "published.pt", "--calibration-data", data)
    assert run(tmp_path, *arguments) == 2
    assert "--use-layernorm" in capsys.readouterr().err
    assert run(tmp_path, *arguments, "--no-use-layernorm") == 0
    assert fitted(tmp_path).trained_with is Conditioning.NONE


def test_script_runs_from_anywhere(tmp_path: Path) -> None:
    data = save_actions(tmp_path / "other.npz")
    script = ROOT / "calibration" / "fit.py"
    result = subprocess.run(
        [sys.executable, str(script), "--calibration-data", str(data)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "build/checkpoints/robust-calibrated.safetensors").is_file()
    assert (tmp_path / "build/reports/robust-calibrated/report.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing.safetensors"], "no checkpoint at missing.safetensors"),
        (["--calibration-data", "missing.npz"], "missing.npz does not exist"),
        (["--coverage", "0"], "coverage is 0.0; expected a share"),
        (["--ridge", "1"], "--ridge given, which method 'calibrated' does not use"),
        (["--method", "recovered", "--coverage", "1"], "--coverage given, which method 'recovered' does not use"),
        (["--method", "recovered", "--prefixes", "9"], "each of 1 to 8 layers"),
        (["--method", "recovered", "--ridge", "-1"], "ridge is -1.0; expected 0 or"),
        (["--method", "recovered", "--checkpoint", str(NAIVE_CHECKPOINT)], "trained with conditioning 'none'"),
        (["--checkpoint", str(ROBUST_CHECKPOINT), "--no-use-layernorm"], "says use_layernorm = True"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert list(tmp_path.iterdir()) == []


def test_wrong_action_dimension_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save_actions(tmp_path / "other.npz", action_dim=6)
    assert run(tmp_path, "--calibration-data", data) == 2
    assert "6 action dimensions, the checkpoint 7" in capsys.readouterr().err


@has_blank_picture
def test_the_embedded_demonstrations_calibrate_no_checkpoint_of_another_robot(
    tmp_path: Path, robust: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_checkpoint(replace(robust, provenance={"data": {"source": "a lab"}}), foreign)
    assert run(tmp_path / "out", "--checkpoint", foreign) == 2
    assert "its data: a lab" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", "--checkpoint", foreign, "--calibration-data", save_actions(tmp_path / "o.npz")) == 0


@has_blank_picture
def test_a_fit_that_the_data_hardly_determine_is_remarked_upon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_poses = np.zeros((4, 40, 7), np.float32)
    two_poses[:, ::2, 0] = 1
    np.savez(tmp_path / "poses.npz", actions=two_poses)
    arguments = ("--method", "recovered", "--prefixes", "1", "--calibration-data", tmp_path / "poses.npz")
    assert run(tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    remark = fitted(tmp_path).provenance["recovered"]["remark"]
    assert remark.startswith("WARNING: the tokens of the calibration data determine 1 of 16 columns")
    assert remark in printed
    assert "WARNING: only 120 steps to calibrate on" in printed


def test_actions_that_never_change_recover_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "still.npz", actions=np.zeros((4, 60, 7), np.float32))
    arguments = ("--method", "recovered", "--prefixes", "1", "--calibration-data", tmp_path / "still.npz")
    assert run(tmp_path, *arguments) == 2
    assert "give episodes in which the robot moves" in capsys.readouterr().err
    assert not (tmp_path / "fitted.safetensors").exists()


def test_a_robust_checkpoint_with_one_latent_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ModelConfig(action_dim=7, latent_dim=1, hidden_width=2, num_layers=2, num_levels=3)
    naive = checkpoint_of(ActionAutoencoder(sizes, Conditioning.NONE), {})
    save_checkpoint(replace(naive, trained_with=Conditioning.DYNAMIC), tmp_path / "one.safetensors")
    arguments = ("--checkpoint", tmp_path / "one.safetensors", "--calibration-data", save_actions(tmp_path / "o.npz"))
    assert run(tmp_path, *arguments) == 2
    assert "error: conditioning 'dynamic' needs latent_dim >= 2" in capsys.readouterr().err


def test_an_output_that_could_not_be_read_again_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--output", tmp_path / "fitted.pt") == 2
    assert "fitted.pt does not end with '.safetensors'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_leaves_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run(tmp_path, "--report-dir", tmp_path / "file" / "report") == 2
    assert "choose a writable folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
