"""What `rfsq_ref.generate_demonstrations` promises without a simulator: arguments, seeds, retries and the file."""

import json
import stat
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.rfsq_ref import generate_demonstrations as generator
from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.experts import EXPERTS
from rfsq.rfsq_ref.generate_demonstrations import (
    MAX_ATTEMPTS_PER_EPISODE,
    Attempt,
    Episode,
    GenerationConfig,
    SimulatorError,
    arrays_of,
    attempt_of,
    check_simulator,
    config_of,
    main,
    parser,
    save,
    table,
)

CONFIG = GenerationConfig(episodes_per_task=2, seed=4, tasks=("Lift", "Door"))
VERSIONS = {"robosuite": "1.5.2", "mujoco": "3.3.1", "numpy": "2.0.0"}


def episode(task: str, index: int, steps: int, success: bool = True) -> Episode:
    actions = np.random.default_rng(index).uniform(-1, 1, (steps, 7)).astype(np.float32)
    return Episode(attempt_of(CONFIG.seed, task, index), actions, success)


ATTEMPTS = [
    episode("Lift", 0, 5),
    episode("Lift", 1, 9, success=False),
    episode("Lift", 2, 4),
    episode("Door", 0, 6),
    episode("Door", 1, 3),
]


class SerialPool:
    """Stands in for the pool of processes: fails every attempt whose seed is in `failing`."""

    failing: set[int] = set()  # noqa: RUF012
    made: list[Attempt] = []  # noqa: RUF012

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "SerialPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap_unordered(self, function: object, attempts: list[Attempt]) -> Any:
        del function
        self.made.extend(attempts)
        # Out of order, as workers finish.
        for attempt in reversed(attempts):
            yield Episode(attempt, np.zeros((2, 7), np.float32), attempt.seed not in self.failing)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[SerialPool]:
    class Context:
        Pool = SerialPool

    monkeypatch.setattr(SerialPool, "failing", set())
    monkeypatch.setattr(SerialPool, "made", [])
    monkeypatch.setattr(generator.multiprocessing, "get_context", lambda _: Context)
    return SerialPool


# Attempts ------------------------------------------------------------------------------------------------------------


def test_every_attempt_has_its_own_seed() -> None:
    seeds = [attempt_of(seed, task, index).seed for seed in (0, 1) for task in EXPERTS for index in range(50)]
    assert len(set(seeds)) == len(seeds)


def test_the_seed_does_not_depend_on_which_tasks_are_chosen(pool: type[SerialPool]) -> None:
    generator.collect(GenerationConfig(episodes_per_task=2, tasks=("Door",)))
    alone = {attempt.seed for attempt in pool.made}
    pool.made.clear()
    generator.collect(GenerationConfig(episodes_per_task=2))
    assert alone == {attempt.seed for attempt in pool.made if attempt.task == "Door"}


def test_failed_attempts_are_made_good_and_the_order_is_that_of_the_attempts(pool: type[SerialPool]) -> None:
    pool.failing.update(attempt_of(4, "Lift", index).seed for index in (0, 2))
    episodes = generator.collect(CONFIG)
    assert [(found.attempt.task, found.attempt.index, found.success) for found in episodes] == [
        ("Lift", 0, False),
        ("Lift", 1, True),
        ("Lift", 2, False),
        ("Lift", 3, True),
        ("Door", 0, True),
        ("Door", 1, True),
    ]


def test_a_task_that_never_succeeds_ends_with_an_error(pool: type[SerialPool]) -> None:
    pool.failing.update(attempt_of(4, "Door", index).seed for index in range(100))
    with pytest.raises(SimulatorError, match="Door: 0 of 6 attempts succeeded, expected 2"):
        generator.collect(CONFIG)
    assert sum(attempt.task == "Door" for attempt in pool.made) == 2 * MAX_ATTEMPTS_PER_EPISODE


# The file ------------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_successful_episodes_as_sent(tmp_path: Path) -> None:
    save(tmp_path / "new" / "demonstrations.npz", arrays_of(CONFIG, ATTEMPTS, VERSIONS))
    kept = [found for found in ATTEMPTS if found.success]
    dataset = load_actions(tmp_path / "new" / "demonstrations.npz")
    assert dataset.tasks == ("Lift", "Lift", "Door", "Door")
    for found, expected in zip(dataset.episodes, kept, strict=True):
        np.testing.assert_array_equal(found, expected.actions)
    with np.load(tmp_path / "new" / "demonstrations.npz") as arrays:
        assert arrays["episode_seeds"].tolist() == [found.attempt.seed for found in kept]
        metadata = json.loads(str(arrays["metadata"]))
    assert metadata["versions"] == VERSIONS
    assert metadata["seed"] == 4
    assert metadata["discarded"] == {"Lift": 1, "Door": 0}
    assert metadata["success_rate"] == {"Lift": 0.6667, "Door": 1.0}


def test_the_same_episodes_give_the_same_bytes_in_a_readable_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save(tmp_path / f"{name}.npz", arrays_of(CONFIG, ATTEMPTS, VERSIONS))
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    assert stat.S_IMODE((tmp_path / "first.npz").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.npz", "second.npz"]


def test_an_interrupted_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demonstrations.npz").write_bytes(b"old")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "demonstrations.npz", arrays_of(CONFIG, ATTEMPTS, VERSIONS))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("demonstrations.npz", b"old")]


def test_the_table_counts_every_attempt() -> None:
    lines = [line.split() for line in table(CONFIG, ATTEMPTS).splitlines()[1:]]
    assert lines == [
        ["Lift", "2", "1", "9", "66.7%"],
        ["Door", "2", "0", "9", "100.0%"],
        ["total", "4", "1", "18", "80.0%"],
    ]


@pytest.mark.parametrize("actions", [np.full((3, 7), 1.5, np.float32), np.zeros((3, 6), np.float32)])
def test_actions_that_no_robot_should_get_are_not_written(
    actions: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [Episode(Attempt(task, 0, 0), actions, True) for task in CONFIG.tasks]
    monkeypatch.setattr(generator, "check_simulator", lambda: VERSIONS)
    monkeypatch.setattr(generator, "collect", lambda _: wrong)
    config = GenerationConfig(tasks=CONFIG.tasks, output=tmp_path / "demonstrations.npz")
    with pytest.raises(SimulatorError, match="nothing was written"):
        generator.generate(config)
    assert list(tmp_path.iterdir()) == []


# Arguments and versions ----------------------------------------------------------------------------------------------


def test_arguments_become_a_configuration() -> None:
    numbers = ["--episodes-per-task", "3", "--seed", "8", "--workers", "1"]
    assert config_of(
        parser().parse_args([*numbers, "--output", "out.npz", "--tasks", "Door", "Lift"])
    ) == GenerationConfig(3, 8, Path("out.npz"), 1, ("Door", "Lift"))
    assert config_of(parser().parse_args([])) == GenerationConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--episodes-per-task 0", "episodes_per_task is 0; expected at least 1"),
        ("--workers 0", "workers is 0; expected at least 1"),
        ("--seed -1", "seed is -1; expected 0 or more"),
        ("--tasks Fly", "expected different ones of"),
        ("--tasks Lift Lift", "expected different ones of"),
    ],
)
def test_arguments_that_make_no_sense_exit_with_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_a_missing_simulator_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(generator, "version", missing)
    assert main(["--episodes-per-task", "1", "--overwrite"]) == 2
    assert capsys.readouterr().err == (
        "error: robosuite is not installed, and the simulation needs it; run: pip install --editable '.[sim]' "
        "in an environment of its own (docs/training.md)\n"
    )


def test_a_simulator_that_breaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "version", (VERSIONS | {"mujoco": "4.0.1"}).__getitem__)
    with pytest.raises(SimulatorError, match=r"mujoco 4\.0\.1 .* pip install 'mujoco==3\.3\.1'"):
        check_simulator()
    monkeypatch.setattr(generator, "version", VERSIONS.__getitem__)
    assert check_simulator() == VERSIONS
