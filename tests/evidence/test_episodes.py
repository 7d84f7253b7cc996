"""What `evidence.episodes` promises: finished episodes survive a kill and are not mixed with those of another run."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.evidence.episodes import Episode, Identity, open_episodes, read_episodes
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.simulation import EpisodeResult, Spread

IDENTITY = Identity(1, 0, 8, {"robosuite": "1.5.2", "numpy": "1.26.4"}, {"robust": "ab"})


def episode(index: int, cell: str = "raw", codec: str = "c0", success: bool = True, off: float | None = 1.5) -> Episode:
    spread = Spread(0.1, 0.25, 1e-7 + index)
    return Episode("Stack", cell, codec, index, 7 + index, EpisodeResult(success, True, 99, spread, spread, off))


def write(path: Path, episodes: list[Episode], identity: Identity = IDENTITY) -> None:
    with open_episodes(path, identity) as file:
        for found in episodes:
            file.append(found)


def test_episodes_come_back_as_they_were_from_this_run_and_the_next(tmp_path: Path) -> None:
    path = tmp_path / "new" / "episodes.jsonl"
    write(path, [episode(0), episode(1, off=None)])
    assert read_episodes(path) == (IDENTITY, [episode(0), episode(1, off=None)])
    with open_episodes(path, IDENTITY) as file:
        assert [found.key for found in file.episodes] == [("Stack", "raw", 0), ("Stack", "raw", 1)]
        file.append(episode(2))
        # On the disk at once, not only at the end.
        assert len(read_episodes(path)[1]) == 3


@given(st.integers(0, 2000))
def test_a_file_cut_off_anywhere_goes_on_with_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "episodes.jsonl"
    episodes = [episode(index) for index in range(4)]
    write(path, episodes)
    content = path.read_bytes()
    kept = content[: min(cut, len(content))]
    path.write_bytes(kept)
    whole = max(kept.count(b"\n") - 1, 0)
    with open_episodes(path, IDENTITY) as file:
        assert file.episodes == episodes[:whole]
        for found in episodes[whole:]:
            file.append(found)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop_version": 2}, "made with loop_version 1; this run has loop_version 2"),
        ({"seed": 3}, "seed 0; this run has seed 3"),
        ({"chunk": 1}, "chunk 8; this run has chunk 1"),
        ({"versions": {"robosuite": "1.6"}}, "robosuite"),
        ({"hashes": {"robust": "cd"}}, "cannot be mixed; move the file away"),
    ],
)
def test_results_of_another_run_are_refused_and_left_alone(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    write(path, [episode(0)])
    before = path.read_bytes()
    with pytest.raises(EvidenceError, match=message), open_episodes(path, replace(IDENTITY, **change)):
        pass
    assert path.read_bytes() == before


def test_a_cell_whose_codec_has_changed_is_refused_or_driven_anew(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    write(path, [episode(0), episode(0, cell="naive", codec="n0"), episode(1)])
    with open_episodes(path, IDENTITY) as file:
        file.check_codec("naive", "n0")
        file.check_codec("never run", "x")
        with pytest.raises(EvidenceError, match=r"'naive' with codec n0, now it is n1: .*--restart-changed"):
            file.check_codec("naive", "n1")
        file.check_codec("naive", "n1", restart=True)
        assert file.episodes == [episode(0), episode(1)]
        file.append(episode(0, cell="naive", codec="n1"))
    assert read_episodes(path)[1] == [episode(0), episode(1), episode(0, cell="naive", codec="n1")]


@pytest.mark.parametrize("line", [b"not json", b'{"task": "Stack"}', b"[1]"])
def test_damage_before_the_last_line_is_refused_with_its_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    write(path, [episode(0), episode(1)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + line + b"\n" + lines[2])
    with pytest.raises(EvidenceError, match="damaged at line 2"):
        read_episodes(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text('{"format": "other"}\n')
    with pytest.raises(EvidenceError, match="damaged at line 1"):
        read_episodes(tmp_path / "episodes.jsonl")
    with pytest.raises(EvidenceError, match=r"run `python rfsq_ref/rollout\.py` first"):
        read_episodes(tmp_path / "missing.jsonl")


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    with open_episodes(path, IDENTITY), pytest.raises(EvidenceError, match="another run is writing"):
        write(path, [])


def test_numbers_that_json_does_not_know_are_never_written(tmp_path: Path) -> None:
    with open_episodes(tmp_path / "episodes.jsonl", IDENTITY) as file, pytest.raises(ValueError, match="not JSON"):
        file.append(episode(0, off=float("nan")))
    assert read_episodes(tmp_path / "episodes.jsonl")[1] == []
