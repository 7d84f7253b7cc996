"""What `evidence.rollouts` promises: the same scenes in every cell, what is done stays done, and sound settings."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rfsq.evidence import rollouts
from rfsq.evidence.episodes import Episode, Identity, Job, read_episodes
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.rollouts import jobs_of, run_rollouts, seed_of
from rfsq.evidence.schemes import RawCodec
from rfsq.evidence.settings import DEFAULT_TASKS, TASK_NAMES, RolloutConfig
from rfsq.evidence.simulation import EpisodeResult, Spread
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.experts import EXPERTS, HELD_OUT_EXPERTS, TASKS
from rfsq.rfsq_ref.generate_demonstrations import SimulatorError, attempt_of

IDENTITY = Identity(1, 0, 8, {"robosuite": "1.5.2"}, {})
FINGERPRINTS = {"a": "of a", "b": "of b"}
CONFIG = RolloutConfig(tasks=("Stack", "Door"), episodes=3)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Instead of processes and a simulator: what was run, and after how many episodes the process is killed."""
    state: dict[str, Any] = {"run": [], "kill_after": None}

    def run(_work: object, jobs: list[Job], *_: object, **__: object) -> Iterator[Episode]:
        for number, job in enumerate(jobs):
            if number == state["kill_after"]:
                raise Killed
            state["run"].append(job)
            spread = Spread(0.0, 0.0, 0.0)
            result = EpisodeResult(job.seed % 2 == 0, True, job.seed % 97, spread, spread, 1.0)
            yield Episode(job.task, job.cell, job.codec, job.index, job.seed, result)

    monkeypatch.setattr(rollouts, "in_processes", run)
    monkeypatch.setattr(rollouts, "identity_of", lambda config: replace(IDENTITY, seed=config.seed, chunk=config.chunk))
    monkeypatch.setattr(rollouts, "codecs", lambda **_: {name: RawCodec(name) for name in ("a", "b")})
    monkeypatch.setattr(rollouts, "fingerprint", lambda codec: f"of {codec.name}")
    return state


def test_every_cell_has_the_same_scenes_and_tasks_do_not_share_them() -> None:
    jobs = jobs_of(CONFIG, FINGERPRINTS, set())
    seeds = {cell: [(job.task, job.seed) for job in jobs if job.cell == cell] for cell in ("a", "b")}
    assert seeds["a"] == seeds["b"]
    assert len({job.seed for job in jobs}) == 6
    alone = jobs_of(replace(CONFIG, tasks=("Door",)), {"b": "of b"}, set())
    assert {(job.index, job.seed) for job in alone} == {(job.index, job.seed) for job in jobs if job.task == "Door"}


def test_no_scene_is_one_of_the_demonstrations() -> None:
    """With seed 0, whose first attempts made them."""
    shown = {attempt_of(0, task, index).seed for task in EXPERTS for index in range(75)}
    assert shown.isdisjoint(seed_of(0, task, index) for task in TASKS for index in range(200))


def test_scenes_go_first_so_that_a_stopped_run_has_all_cells_alike() -> None:
    jobs = jobs_of(CONFIG, FINGERPRINTS, set())
    assert [job.index for job in jobs] == sorted(job.index for job in jobs)
    assert [(job.task, job.cell) for job in jobs[:4]] == [("Stack", "a"), ("Stack", "b"), ("Door", "a"), ("Door", "b")]


def test_a_killed_run_goes_on_where_it_was_and_ends_as_if_it_had_not_been(
    workers: dict[str, Any], tmp_path: Path
) -> None:
    straight = run_rollouts(replace(CONFIG, folder=tmp_path / "straight"))
    for kill_after in (0, 5, 2, None):
        workers |= {"run": [], "kill_after": kill_after}
        config = replace(CONFIG, folder=tmp_path / "killed")
        if kill_after is None:
            resumed = run_rollouts(config)
            assert len(workers["run"]) == 12 - 7
        else:
            with pytest.raises(Killed):
                run_rollouts(config)
    assert sorted(resumed, key=lambda episode: episode.key) == sorted(straight, key=lambda episode: episode.key)
    workers["run"] = []
    run_rollouts(replace(CONFIG, folder=tmp_path / "killed"))
    assert workers["run"] == []


def test_cells_and_episodes_can_be_added_later(workers: dict[str, Any], tmp_path: Path) -> None:
    run_rollouts(replace(CONFIG, folder=tmp_path, cells=("a",), episodes=2))
    run_rollouts(replace(CONFIG, folder=tmp_path))
    keys = [(job.task, job.cell, job.index) for job in workers["run"]]
    assert len(keys) == len(set(keys)) == 12
    assert len(read_episodes(tmp_path / "episodes.jsonl")[1]) == 12


def test_a_codec_that_has_changed_is_refused_before_anything_runs(
    workers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, folder=tmp_path)
    run_rollouts(config)
    monkeypatch.setattr(rollouts, "fingerprint", lambda codec: "other" if codec.name == "b" else f"of {codec.name}")
    workers["run"] = []
    with pytest.raises(EvidenceError, match="'b' with codec of b, now it is other"):
        run_rollouts(config)
    assert workers["run"] == []
    run_rollouts(replace(config, restart_changed=True))
    assert {job.cell for job in workers["run"]} == {"b"}
    assert len(workers["run"]) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "episodes is 0; expected at least 1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"tasks": ("Cooking",)}, r"tasks are \['Cooking'\]; expected different ones of"),
        ({"tasks": ()}, "tasks are"),
        ({"tasks": ("Lift", "Lift")}, "tasks are"),
        ({"peers": True, "chunk": 4}, "the peers are trained for chunks of 8 steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        RolloutConfig(**settings)


def test_by_default_there_are_four_tasks_two_of_which_no_centimetre_forgives() -> None:
    assert tuple(TASKS) == TASK_NAMES
    assert len(DEFAULT_TASKS) >= 4
    assert set(DEFAULT_TASKS) <= set(TASKS)
    assert {"NutAssemblySquare", "NutAssemblyTight"} <= set(DEFAULT_TASKS)
    assert set(HELD_OUT_EXPERTS).isdisjoint(EXPERTS)


def test_without_the_simulator_the_run_says_what_to_install(tmp_path: Path) -> None:
    if find_spec("robosuite"):
        pytest.skip("the simulator is installed here")
    with pytest.raises(SimulatorError, match=r"pip install --editable '\.\[sim\]' in an environment of its own"):
        run_rollouts(replace(CONFIG, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def driven(jobs: list[Any]) -> tuple[list[Any], Exception | None]:
    """What one worker makes of these expressions, and what ended it."""
    found: list[Any] = []
    try:
        # The jobs are expressions: a spawned worker can find `eval`, but nothing of this file.
        for result in in_processes(eval, jobs, 1, int):
            found.append(result)
    except (EvidenceError, ArithmeticError) as error:
        return found, error
    return found, None


def test_a_worker_that_dies_ends_the_run_with_what_was_done_and_says_to_start_again() -> None:
    """A multiprocessing.Pool would wait for it for ever."""
    found, error = driven(["1 + 1", "2 + 1", "__import__('os').kill(__import__('os').getpid(), 9)", *["4 + 1"] * 50])
    assert sorted(found) == [2, 3]
    assert isinstance(error, EvidenceError)
    assert "a worker process died" in str(error)
    assert "start again, and it goes on where it was" in str(error)


def test_workers_do_every_job_once_and_a_failing_one_is_not_hidden() -> None:
    found, error = driven([*(f"{number} + 1" for number in range(20)), "1 / 0"])
    assert sorted(found) == list(range(1, 21))
    assert isinstance(error, ZeroDivisionError)


def test_what_was_begun_before_a_job_failed_is_kept_and_no_other_begins(capfd: pytest.CaptureFixture[str]) -> None:
    # The failure is heard of in less time than twenty of these take.
    found, error = driven(["1 / 0", "7", *["__import__('time').sleep(0.3)"] * 50])
    assert isinstance(error, ZeroDivisionError)
    assert "a job failed: ZeroDivisionError" in capfd.readouterr().err
    # Some wait in the queue of the processes when the failure is heard of.
    assert 7 in found
    assert len(found) < 20


def test_any_number_of_workers_gives_the_same_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite", reason="the simulator is not installed here: pip install '.[sim]'")
    monkeypatch.setattr(rollouts, "codecs", lambda **_: {name: RawCodec(name) for name in ("a", "b")})
    config = RolloutConfig(tasks=("Lift",), episodes=1)
    found = [run_rollouts(replace(config, workers=workers, folder=tmp_path / str(workers))) for workers in (1, 2)]
    assert sorted(map(str, found[0])) == sorted(map(str, found[1]))
    assert all(episode.result.tracking_mm.max == 0.0 for episode in found[0])
