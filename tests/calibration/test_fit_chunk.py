"""`python calibration/fit.py --kind chunk`, from demonstrations to chunk tokens."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rfsq.calibration import chunk_fitting
from rfsq.calibration.chunk_fitting import fit_chunk_tokens
from rfsq.calibration.fit import main
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint, load_chunk_checkpoint
from tests.calibration.test_chunk import Episodes, smooth_episodes
from tests.runtime.datasets.samples import write_robomimic


def run(folder: Path, *arguments: object) -> int:
    outputs = ["--kind", "chunk", "--output", folder / "chunk.safetensors", "--report-dir", folder / "report"]
    return main([str(argument) for argument in (*outputs, *arguments)])


def fitted(folder: Path) -> ChunkCheckpoint:
    return load_chunk_checkpoint(folder / "chunk.safetensors")


def save_episodes(path: Path, episodes: Episodes) -> Path:
    lengths = [len(episode) for episode in episodes]
    np.savez(path, actions=np.concatenate(episodes).astype(np.float32), episode_ends=np.cumsum(lengths))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_episodes(tmp_path / "lab.npz", smooth_episodes(3, [50] * 10, seed=0))


@pytest.fixture
def blank_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes longer than the fit that it is about."""
    monkeypatch.setattr("rfsq.calibration.chunk_report_plots.draw_chunk_report", lambda _: Figure(figsize=(1, 1)))


has_blank_picture = pytest.mark.usefixtures("blank_picture")


def test_the_embedded_demonstrations_need_nothing_but_the_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--classes", 8, "-v") == 0
    found = fitted(tmp_path)
    assert (found.sizes.action_dim, found.sizes.chunk_length, found.sizes.num_tokens) == (7, 8, 45)
    assert (found.sizes.token_bits, found.normaliser) == (10, None)
    printed = capsys.readouterr().out
    assert "fitted on 75 episodes (13,121 steps) for the classes and 19 episodes (3,295 steps) for scales" in printed
    # Judged on the validation part: neither on what was fitted, nor on the test part.
    assert "judged on 12 episodes (2,180 windows) of demonstrations.npz" in printed
    assert re.search(r"^30 +37\.5  \d\.\d+e-06 ", printed, re.MULTILINE)
    assert re.search(r"^dimension 6, robot units .*good$", printed, re.MULTILINE)
    assert "WARNING" not in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    facts = dict(found.provenance)
    del facts["checkpoint_sha256"]
    assert report["provenance"] == facts
    assert report["sizes"]["num_classes"] == 8
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000


@has_blank_picture
def test_another_robot_has_its_own_sizes(tmp_path: Path) -> None:
    data = save_episodes(tmp_path / "hands.npz", smooth_episodes(26, [60] * 20, seed=0))
    arguments = ("--data", data, "--chunk-length", 16, "--classes", 6, "--vocabulary", 4096, "--tokens", 20)
    assert run(tmp_path, *arguments) == 0
    sizes = fitted(tmp_path).sizes
    assert (sizes.action_dim, sizes.chunk_length, sizes.num_classes) == (26, 16, 6)
    assert (sizes.token_bits, sizes.num_tokens) == (12, 20)
    actions = torch.zeros(2, 16, 26)
    assert fitted(tmp_path).model().encode(actions).shape == (2, 20)


@has_blank_picture
def test_actions_in_the_robots_units_get_a_normaliser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [episode * np.array([90.0, 0.01, 1.0]) for episode in smooth_episodes(3, [50] * 10, seed=0)]
    data = save_episodes(tmp_path / "degrees.npz", episodes)
    assert run(tmp_path, "--data", data, "--classes", 6, "--chunk-length", 4) == 0
    found = fitted(tmp_path)
    assert found.normaliser is not None
    printed = capsys.readouterr().out
    assert "normaliser: min-max, chosen by auto: dimension 0 reaches beyond 1 and dimension 1 spans less" in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    for row in report["prefixes"]:
        assert row["bound"] is None or row["bound"][0] == pytest.approx(
            row["bound"][1] * found.normaliser.scale[0] / found.normaliser.scale[1]
        )


@has_blank_picture
def test_two_runs_write_the_same_bytes(tmp_path: Path, data: Path) -> None:
    for folder in ("first", "second"):
        assert run(tmp_path / folder, "--data", data, "--classes", 12, "--seed", 3) == 0
    for name in ("chunk.safetensors", "report/report.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@has_blank_picture
def test_without_an_output_files_have_the_name_of_the_data(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--kind", "chunk", "--data", str(data), "--classes", "4", "-q"]) == 0
    assert Path("build/checkpoints/lab-chunk.safetensors").is_file()
    assert Path("build/reports/lab-chunk/report.json").is_file()


@has_blank_picture
def test_both_orders_of_the_same_data_have_files_of_their_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for order in ("own", "shared"):
        assert main(["--kind", "chunk", "--data", str(data), "--classes", "4", "--order", order, "-q"]) == 0
    names = {path.name for path in Path("build/checkpoints").iterdir()}
    assert names == {"lab-chunk.safetensors", "lab-chunk-shared.safetensors"}


@has_blank_picture
def test_limits_of_a_robot_are_a_file(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"kind": "min-max", "offset": [0, 0, 0], "scale": [3, 3, 3]}), encoding="utf-8")
    assert run(tmp_path, "--data", data, "--classes", 4, "--normaliser", limits) == 0
    normaliser = fitted(tmp_path).normaliser
    assert normaliser is not None
    assert normaliser.scale == (3, 3, 3)
    assert "normaliser: that of limits.json, as asked" in capsys.readouterr().out


@has_blank_picture
def test_other_formats_are_read_as_everywhere(tmp_path: Path) -> None:
    episodes = [episode.astype(np.float32) for episode in smooth_episodes(3, [30] * 6, seed=0)]
    write_robomimic(tmp_path / "lab.hdf5", episodes)
    assert run(tmp_path, "--data", tmp_path / "lab.hdf5", "--chunk-length", 4) == 0
    assert fitted(tmp_path).provenance["data"]["training"]["episodes"] == 4


@has_blank_picture
def test_one_episode_is_fitted_to_with_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save_episodes(tmp_path / "one.npz", smooth_episodes(3, [40], seed=0))
    assert run(tmp_path, "--data", data) == 0
    printed = capsys.readouterr().out
    assert "WARNING: only 40 steps to calibrate on" in printed
    assert "WARNING: 1 episode cannot be split" in printed
    assert "WARNING: 12 classes in place of 64" in printed


@has_blank_picture
def test_poor_tokens_are_warned_of_and_worthless_ones_have_the_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = smooth_episodes(3, [50] * 10, seed=0)
    data = save_episodes(tmp_path / "lab.npz", episodes)
    assert run(tmp_path, "--data", data, "--classes", 2, "--tokens", 4) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("WARNING: the tokens are poor"))
    assert "fit to more actions like these (python calibration/fit.py --kind chunk), or take more tokens" in warning
    assert last.startswith("✓ wrote ")
    far = save_episodes(tmp_path / "far.npz", [episode + 9 * np.array([0, 1, 0]) for episode in episodes])
    assert run(tmp_path, "--data", far, "--normaliser", "none", "--overwrite") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if "lie beyond the range of the tokens" in line)
    assert "without a normaliser the range is -1 to 1. Of all numbers 33% lie there" in warning
    assert last.startswith("WARNING: the tokens are worthless")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", ROBUST_CHECKPOINT], "--checkpoint given, which kind 'chunk' does not use; drop it"),
        (["--method", "calibrated"], "--method given, which kind 'chunk'"),
        (["--coverage", "1", "--ridge", "1"], "--coverage, --ridge given, which kind 'chunk'"),
        (["--no-use-layernorm"], "--use-layernorm given, which kind 'chunk'"),
        (["--kind", "step", "--tokens", "8", "--seed", "0"], "--tokens, --seed given, which kind 'step' does not use"),
        (["--vocabulary", "1000"], "vocabulary is 1000; expected a power of two"),
        (["--tokens", "200"], "200 tokens are more than a chunk of 56 values can use; expected at most 101"),
        (["--data", "missing.npz"], "missing.npz does not exist"),
        (["--output", "chunk.pt"], "chunk.pt does not end with '.safetensors'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert list(tmp_path.iterdir()) == []


@has_blank_picture
def test_of_two_fits_to_one_output_the_first_is_kept_and_the_second_is_told(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "chunk.safetensors"

    def while_another_finishes(*arguments: Any) -> ChunkCheckpoint:
        output.write_bytes(b"of another process")
        return fit_chunk_tokens(*arguments)

    monkeypatch.setattr(chunk_fitting, "fit_chunk_tokens", while_another_finishes)
    assert run(tmp_path, "--data", data, "--classes", 2, "--tokens", 4) == 2
    assert "chunk.safetensors was written by another process meanwhile, and is kept" in capsys.readouterr().err
    assert output.read_bytes() == b"of another process"
    assert sorted(tmp_path.iterdir()) == [output, data]


@has_blank_picture
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", refuse)
    assert run(tmp_path, "--data", data, "--classes", 2, "--tokens", 4) == 2
    assert "No space left on device; choose a writable folder, or make room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]


def test_a_robot_that_stands_still_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save_episodes(tmp_path / "still.npz", [np.full((40, 3), 0.5)] * 6)
    assert run(tmp_path, "--data", data) == 2
    assert "give episodes in which the robot moves" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["still.npz"]
