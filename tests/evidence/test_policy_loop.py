"""The command trains from files alone, without the simulator, and never writes over what is there."""

from pathlib import Path

import pytest

from rfsq.evidence import policy_loop
from rfsq.evidence.policy_lessons import CHUNK_LENGTH, encoded, save_lessons
from rfsq.evidence.policy_recordings import save_recordings
from rfsq.evidence.policy_tokens import BinTokens
from rfsq.evidence.policy_training import load_policies
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.runtime.bundle.command import UNUSABLE
from tests.evidence.conftest import some_recordings

TINY = ["--oat-steps", "0", "--width", "8", "--depth", "1", "--steps", "2", "--batch", "4", "--workers", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recordings = some_recordings()
    save_recordings(tmp_path / "recordings.npz", recordings, {})
    bins = fit_bins(recordings[0].intended, BinRange.FULL, 6)
    save_lessons(tmp_path / "lessons.npz", encoded([BinTokens("64 bins", 64, bins, (CHUNK_LENGTH, 7))], recordings))
    return tmp_path


def train(folder: Path, *options: str) -> int:
    return policy_loop.main(["train", "--folder", str(folder), "--seeds", "0", "1", *TINY, *options])


def test_policies_are_trained_in_processes_and_each_says_so(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(folder) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("4 policies, 2 at a time, each with ")
    for name in ("64 bins", "actions"):
        for seed in (0, 1):
            assert f"{name}, seed {seed}: begins" in lines
            assert any(line.startswith(f"{name}, seed {seed}: loss ") for line in lines)
    found = {path.stem: sorted(load_policies(path).by_seed) for path in (folder / "weights").iterdir()}
    assert found == {"64-bins": [0, 1], "actions": [0, 1]}


@pytest.mark.parametrize("step", ["record", "encode", "train"])
def test_what_is_there_is_not_written_over_unless_asked_for(folder: Path, step: str) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "actions.safetensors").touch()
    assert policy_loop.main([step, "--folder", str(folder), *TINY]) == UNUSABLE
    assert (folder / "weights" / "actions.safetensors").stat().st_size == 0
