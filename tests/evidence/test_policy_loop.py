"""The command trains from files alone, without the simulator, and never writes over what is there."""

from pathlib import Path

import pytest

from rfsq.calibration.chunk import fit_chunk_code
from rfsq.evidence import policy_loop
from rfsq.evidence.policies import NOTHING
from rfsq.evidence.policy_lessons import (
    AT_ONCE,
    CHUNK_LENGTH,
    CHUNK_TOKENS,
    IN_TWO_PASSES,
    encoded,
    fitted_tokens,
    load_lessons,
    meant,
    parts_of,
    save_lessons,
)
from rfsq.evidence.policy_recordings import Recording, save_recordings
from rfsq.evidence.policy_tokens import BinTokens
from rfsq.evidence.policy_training import load_policies
from rfsq.evidence.policy_trials import decoders_of
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint, load_chunk_checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.bundle.command import UNUSABLE
from tests.evidence.conftest import fork_workers, some_recordings

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


def test_policies_are_trained_in_processes_and_each_says_so(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_workers(monkeypatch)
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


def test_what_is_encoded_decodes_with_what_was_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit_few_classes(recordings: list[Recording]) -> ChunkCheckpoint:
        fitted, held_out = ([each.intended for each in part] for part in parts_of(recordings))
        sizes = ChunkSizes(7, CHUNK_LENGTH, num_classes=8, num_tokens=16)
        return ChunkCheckpoint(sizes, fit_chunk_code(fitted, held_out, sizes))

    recordings = some_recordings()
    save_recordings(tmp_path / "recordings.npz", recordings, {})
    monkeypatch.setattr(policy_loop, "fit_chunk_tokens", fit_few_classes)
    assert policy_loop.main(["encode", "--folder", str(tmp_path)]) == 0
    learnt = load_lessons(tmp_path / "lessons.npz")
    assert list(learnt.tokens) == ["64 bins", "FAST, scale 20", CHUNK_TOKENS, AT_ONCE, IN_TWO_PASSES]
    tokens = fitted_tokens(recordings, load_chunk_checkpoint(tmp_path / "chunk.safetensors"))
    decoders = decoders_of(tokens, recordings, learnt, tmp_path)
    chunks = meant(recordings)
    for decoder in decoders:
        said = learnt.tokens[decoder.name]
        error = (decoder.decode(said.where(said != NOTHING, 0)) - chunks).square().mean()
        assert error < 0.2 * chunks.var()
