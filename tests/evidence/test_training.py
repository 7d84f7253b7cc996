"""Checkpoints are found where they are, and trained once where they are not."""

from dataclasses import replace
from pathlib import Path

import pytest

from rfsq.evidence.jobs import cached_path, trained_checkpoint
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.settings import TrainConfig

SHORT = TrainConfig(epochs=1, hidden_width=8, num_layers=2)


@pytest.mark.parametrize(("use_layernorm", "file"), [(True, ROBUST_CHECKPOINT), (False, NAIVE_CHECKPOINT)])
def test_the_embedded_checkpoints_are_the_recipes_seed_0(
    demonstrations: ActionDataset, tmp_path: Path, use_layernorm: bool, file: Path
) -> None:
    found, history = trained_checkpoint(demonstrations, TrainConfig(use_layernorm=use_layernorm), tmp_path)

    assert found.provenance["checkpoint_sha256"] == load_checkpoint(file).provenance["checkpoint_sha256"]
    assert history.kept_epoch == found.provenance["epoch"]
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_trained_once(robot: ActionDataset, tmp_path: Path) -> None:
    first, _ = trained_checkpoint(robot, SHORT, tmp_path)
    (kept,) = tmp_path.glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    again, _ = trained_checkpoint(robot, SHORT, tmp_path)

    assert kept.stat().st_mtime_ns == written
    assert first.provenance["checkpoint_sha256"] == again.provenance["checkpoint_sha256"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 2}, {"use_layernorm": False}, {"learning_rate": 1e-4}])
def test_another_setting_is_another_file(robot: ActionDataset, tmp_path: Path, change: dict[str, object]) -> None:
    assert cached_path(robot, SHORT, tmp_path) != cached_path(robot, replace(SHORT, **change), tmp_path)


def test_other_data_are_another_file(robot: ActionDataset, tmp_path: Path) -> None:
    fewer = robot.select(range(len(robot.episodes) - 1))

    assert cached_path(robot, SHORT, tmp_path) != cached_path(fewer, SHORT, tmp_path)


def test_a_damaged_file_is_an_error_not_another_training(robot: ActionDataset, tmp_path: Path) -> None:
    trained_checkpoint(robot, SHORT, tmp_path)
    (kept,) = tmp_path.glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-50])

    with pytest.raises(CheckpointError):
        trained_checkpoint(robot, SHORT, tmp_path)
