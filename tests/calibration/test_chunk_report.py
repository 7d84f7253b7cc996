"""What the report of chunk tokens says is what is so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.calibration.chunk_fitting import chunk_parts, fit_chunk_tokens
from rfsq.calibration.chunk_report import (
    ChunkReport,
    ClassKind,
    class_use,
    draw_chunk,
    format_chunk_report,
    report_chunk,
    reported_prefixes,
)
from rfsq.calibration.chunk_windows import windows
from rfsq.calibration.report import report_to_json, staged_report
from rfsq.calibration.settings import ChunkConfig
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from tests.calibration.test_chunk import smooth_episodes
from tests.calibration.test_chunk_fitting import dataset_of

UNIT = np.array([40.0, 1.0, 0.5])


@pytest.fixture(scope="module")
def dataset() -> ActionDataset:
    return dataset_of([episode * UNIT for episode in smooth_episodes(3, [70] * 20, seed=0)])


@pytest.fixture(scope="module")
def checkpoint(dataset: ActionDataset) -> ChunkCheckpoint:
    return fit_chunk_tokens(dataset, ChunkConfig(chunk_length=4, classes=8, tokens=16))


@pytest.fixture(scope="module")
def judging(dataset: ActionDataset) -> ActionDataset:
    """With a motion that no learned class holds."""
    (*episodes, last) = chunk_parts(dataset).judging.episodes
    return dataset_of([*episodes, last * np.where(np.arange(len(last)) % 2, 1, -1)[:, None]])


@pytest.fixture(scope="module")
def report(checkpoint: ChunkCheckpoint, judging: ActionDataset) -> ChunkReport:
    return report_chunk(checkpoint, judging)


def errors(checkpoint: ChunkCheckpoint, episodes: ActionDataset, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Of every window, in the robot's units; and its class."""
    model = checkpoint.model(dtype=torch.float64)
    actions = windows(episodes.episodes, 4).reshape(-1, 4, 3)
    tokens = model.encode(actions)
    return model.decode(tokens[:, :num_tokens]) - actions, model.code.classes(model.code.bits(tokens))


def test_errors_of_a_prefix_are_those_of_decoding(
    report: ChunkReport, checkpoint: ChunkCheckpoint, judging: ActionDataset
) -> None:
    assert checkpoint.normaliser is not None
    for row in report.prefixes:
        error, _ = errors(checkpoint, judging, row.num_tokens)
        steps = error.flatten(0, 1).numpy()
        assert row.bits_per_step == row.num_tokens * 10 / 4
        assert row.mse == pytest.approx(np.square(steps / checkpoint.normaliser.scale).mean())
        assert row.rms == pytest.approx(np.sqrt(np.square(steps).mean(axis=0)))
        assert row.p99 == pytest.approx(np.quantile(np.abs(steps), 0.99, axis=0))
        assert row.largest == pytest.approx(np.abs(steps).max(axis=0))
    assert (report.num_episodes, report.num_windows) == (len(judging.episodes), len(error))
    assert report.fidelity.rmse == pytest.approx(report.prefixes[-1].rms)


def test_no_error_is_larger_than_the_bound_where_there_is_one(report: ChunkReport, checkpoint: ChunkCheckpoint) -> None:
    bounded = [row for row in report.prefixes if row.bound is not None]
    assert [row.num_tokens for row in bounded] == [*checkpoint.constants.budgets]
    for row in bounded:
        assert row.bound is not None
        assert all(error <= bound * (1 + 1e-6) for error, bound in zip(row.largest, row.bound, strict=True))


def test_classes_share_the_windows_and_their_errors_are_the_whole(
    report: ChunkReport, checkpoint: ChunkCheckpoint, judging: ActionDataset
) -> None:
    _, classes = errors(checkpoint, judging, 1)
    counts = torch.bincount(classes, minlength=8).tolist()
    assert [row.share for row in report.classes] == [count / len(classes) for count in counts]
    assert [row.kind for row in report.classes] == [*["learned"] * 4, *["broad"] * 3, "escape"]
    for place, prefix in enumerate(report.prefixes):
        assert sum(row.share * row.mse[place] for row in report.classes if row.mse) == pytest.approx(prefix.mse)
    assert all(bool(row.mse) == (row.share > 0) for row in report.classes)


@pytest.mark.parametrize(
    ("num_tokens", "budgets", "expected"),
    [(45, (4, 8, 16, 30, 45), (1, 2, 4, 8, 16, 30, 36, 45)), (1, (1,), (1,)), (2, (1, 2), (1, 2))],
)
def test_a_few_numbers_of_tokens_are_reported(
    num_tokens: int, budgets: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert reported_prefixes(num_tokens, budgets) == expected


def test_a_screen_has_the_prefixes_and_more_is_there_to_be_asked_for(report: ChunkReport) -> None:
    short, long = (format_chunk_report(report, is_verbose=is_verbose).splitlines() for is_verbose in (False, True))
    rows = [line.split()[0] for line in short if line[:1].isdigit() and "words" not in line]
    assert rows == [str(row.num_tokens) for row in report.prefixes]
    assert len(short) <= 20
    for title in ("RMS error, robot units", "largest error, robot units", "bound, robot units", "MSE of each class"):
        assert [line for line in long if line.startswith(title)]
        assert not [line for line in short if line.startswith(title)]
    last = report.prefixes[-1]
    assert any(line.split()[-1] == f"{last.rms[0]:.2e}" for line in long if line.startswith("dimension 0 "))


def test_actions_beyond_the_range_are_warned_of(checkpoint: ChunkCheckpoint, judging: ActionDataset) -> None:
    far = dataset_of([episode * np.array([1.0, 5.0, 1.0]) for episode in judging.episodes])
    found = report_chunk(checkpoint, far)
    model = checkpoint.model(dtype=torch.float64)
    normalised = model.normalised(windows(far.episodes, 4).reshape(-1, 4, 3))
    assert found.clipped == pytest.approx(float((normalised.abs() > 1).double().mean()))
    assert found.clipped > 0
    printed = format_chunk_report(replace(found, dimensions=("pan", "lift", "gripper")))
    low, high = far.steps()[:, 1].min(), far.steps()[:, 1].max()
    assert "actions lie beyond the range of the tokens, and decode as its ends, where no bound holds" in printed
    assert f"dimension 1 (lift) runs from {low:.4g} to {high:.4g}, the range from " in printed
    assert f"Of all numbers {100 * found.clipped:.2g}% lie there" in printed
    assert "lie beyond" not in format_chunk_report(report_chunk(checkpoint, judging))


def test_what_a_build_says_of_classes_is_what_the_report_says(
    checkpoint: ChunkCheckpoint, judging: ActionDataset
) -> None:
    report, model = report_chunk(checkpoint, judging), checkpoint.model(dtype=torch.float64)
    chunks = windows(judging.episodes, 4).reshape(-1, 4, 3).float().numpy()
    (line,) = class_use(model, chunks)
    assert line in format_chunk_report(report)
    assert class_use(model, chunks[:0]) == []


def test_dimensions_have_the_names_that_the_data_give_them(checkpoint: ChunkCheckpoint, judging: ActionDataset) -> None:
    found = report_chunk(checkpoint, replace(judging, dimensions=("pan", "lift", "gripper")))
    assert "dimensions: 0 pan, 1 lift, 2 gripper" in format_chunk_report(found, is_verbose=False)
    assert [line for line in format_chunk_report(found).splitlines() if line.startswith("lift ")]


def test_data_that_only_broad_classes_code_are_warned_of(report: ChunkReport) -> None:
    def with_share(share: float) -> str:
        kinds = [row.kind for row in report.classes]
        place = kinds.index(ClassKind.BROAD)
        rows = [replace(row, share=share if index == place else 0.0) for index, row in enumerate(report.classes)]
        rows[0] = replace(rows[0], share=1 - share)
        return format_chunk_report(replace(report, classes=tuple(rows)))

    assert "WARNING: broad classes code 51% of the windows" in with_share(0.51)
    assert "WARNING: broad" not in with_share(0.5)


def test_many_windows_are_sampled(
    checkpoint: ChunkCheckpoint, judging: ActionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfsq.calibration.chunk_report._MOST_WINDOWS", 20)
    assert report_chunk(checkpoint, judging).num_windows == 20


def test_actions_of_another_robot_are_refused(checkpoint: ChunkCheckpoint) -> None:
    with pytest.raises(DataError, match="a lab has 2 action dimensions, the chunk tokens 3"):
        report_chunk(checkpoint, dataset_of(smooth_episodes(2, [20], seed=0)))


@pytest.mark.slow
def test_json_is_whole_and_files_repeat(report: ChunkReport, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        with staged_report(report, tmp_path / folder, draw_chunk, {"data": "a lab"}):
            pass
    for name in ("report.json", "report.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    content = json.loads((tmp_path / "first" / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(report_to_json(report, {"data": "a lab"}))
    assert [row["num_tokens"] for row in content["prefixes"]] == [row.num_tokens for row in report.prefixes]
    assert content["classes"][-1]["kind"] == ClassKind.ESCAPE
