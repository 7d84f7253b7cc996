#!/usr/bin/env python3
"""Generate demonstrations of a simulated Panda arm: scripted experts, five robosuite tasks, one compact file.

The file holds exactly the float32 actions that were sent to the simulator. Every episode draws everything random
from its own seed, so the same arguments and package versions give the same bytes with any number of workers. On
another kind of processor the simulator rounds differently: the same episodes, of the same lengths, with actions that
differ by up to 3e-4 (measured on ten of them).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.rfsq_ref.generate_demonstrations")

import argparse
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from rfsq.rfsq_ref.errors import SettingsError, UnusableError
from rfsq.rfsq_ref.expert import ACTION_DIM, POSITION_UNIT, ROTATION_UNIT
from rfsq.rfsq_ref.experts import EXPERTS
from rfsq.rfsq_ref.settings import check_positive, check_tasks
from rfsq.runtime.bundle.advice import install
from rfsq.runtime.bundle.command import CommandParser, Outcome, run
from rfsq.runtime.bundle.console import aligned, end_by_interrupts
from rfsq.runtime.bundle.paths import refuse_existing, replacing

GENERATOR_VERSION = 1
CONTROL_FREQUENCY = 20
CONTROLLER = "OSC_POSE"
DEFAULT_OUTPUT = Path(__file__).resolve().parent / "assets" / "demonstrations.npz"
MAX_ATTEMPTS_PER_EPISODE = 3
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


class SimulatorError(UnusableError):
    """The simulator is missing, has a version it does not work with, or cannot give what was asked for."""


@dataclass(frozen=True)
class GenerationConfig:
    """What to generate; `tasks` in the order in which they are written."""

    episodes_per_task: int = 25
    seed: int = 0
    output: Path = DEFAULT_OUTPUT
    workers: int = 2
    tasks: tuple[str, ...] = tuple(EXPERTS)
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "episodes_per_task", "workers")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; expected 0 or more")
        check_tasks(self.tasks, EXPERTS)


@dataclass(frozen=True)
class Attempt:
    """One episode to run; `index` counts the attempts of its task."""

    task: str
    index: int
    seed: int


@dataclass(frozen=True)
class Episode:
    """What came of an attempt: actions float32 [steps, 7] as sent, and whether the task was solved at the end."""

    attempt: Attempt
    actions: NDArray[np.float32]
    success: bool


def attempt_of(seed: int, task: str, index: int) -> Attempt:
    """The seed depends on the task's place among all tasks, not among those chosen."""
    sequence = np.random.SeedSequence((seed, list(EXPERTS).index(task), index))
    return Attempt(task, index, int(sequence.generate_state(1, np.uint32)[0]))


def check_simulator(*others: str) -> dict[str, str]:
    """Versions of robosuite, mujoco, numpy and `others`, which decide what comes out of a simulation.

    Raises SimulatorError where one of them is missing, or is known to break.
    """
    try:
        versions = {name: version(name) for name in ("robosuite", "mujoco", "numpy", *others)}
    except PackageNotFoundError as error:
        raise SimulatorError(
            f"{error.name} is not installed, and the simulation needs it; run: {install('sim')}"
        ) from error
    if int(versions["mujoco"].split(".")[0]) >= 4:
        raise SimulatorError(
            f"mujoco {versions['mujoco']} is installed, and robosuite {versions['robosuite']} breaks with mujoco 4; "
            f"pin it: pip install 'mujoco==3.3.1' (or {install('sim')})"
        )
    return versions


def make_environment(task: str, seed: int) -> Any:
    """A robosuite environment without rendering; two with the same task and seed behave the same."""
    # robosuite warns dozens of times per environment about robots and files nobody here uses.
    logging.getLogger("robosuite_logs").addFilter(_errors_only)
    import robosuite
    from robosuite.controllers import load_composite_controller_config

    return robosuite.make(
        task,
        robots="Panda",
        controller_configs=load_composite_controller_config(controller="BASIC", robot="Panda"),
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        control_freq=CONTROL_FREQUENCY,
        ignore_done=True,
        hard_reset=False,
        seed=seed,
    )


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def run_attempt(attempt: Attempt) -> Episode:
    """Drive one episode from reset to the expert's end. A fresh environment: nothing is left of earlier episodes."""
    environment = make_environment(attempt.task, attempt.seed)
    try:
        expert = EXPERTS[attempt.task]()
        expert.reset(np.random.default_rng(attempt.seed))
        observation = environment.reset()
        actions: list[NDArray[np.float32]] = []
        while not expert.done and len(actions) < expert.max_steps:
            actions.append(expert.act(observation))
            observation = environment.step(actions[-1])[0]
        return Episode(attempt, np.stack(actions), bool(environment._check_success()))
    finally:
        environment.close()


def collect(config: GenerationConfig) -> list[Episode]:
    """Run attempts until every task has its episodes; all attempts, ordered by task and index.

    Each round runs as many attempts as are missing, so which attempts are made does not depend on the workers.
    """
    episodes: list[Episode] = []
    # Spawned workers start clean: a forked one would share the simulator's native state.
    with multiprocessing.get_context("spawn").Pool(config.workers, end_by_interrupts) as pool:
        while missing := list(_missing_attempts(config, episodes)):
            found = pool.imap_unordered(run_attempt, missing)
            episodes += tqdm(found, "demonstrations", len(missing), unit="episode", disable=None)
    return sorted(episodes, key=lambda found: (config.tasks.index(found.attempt.task), found.attempt.index))


def _missing_attempts(config: GenerationConfig, episodes: list[Episode]) -> Iterator[Attempt]:
    for task in config.tasks:
        successes = [episode.success for episode in episodes if episode.attempt.task == task]
        tried, kept = len(successes), sum(successes)
        missing = config.episodes_per_task - kept
        if missing and tried >= MAX_ATTEMPTS_PER_EPISODE * config.episodes_per_task:
            raise SimulatorError(
                f"{task}: {kept} of {tried} attempts succeeded, expected {config.episodes_per_task}; "
                "the expert and the simulator versions do not fit together"
            )
        for index in range(tried, tried + missing):
            yield attempt_of(config.seed, task, index)


def arrays_of(
    config: GenerationConfig, attempts: Sequence[Episode], versions: dict[str, str]
) -> dict[str, NDArray[Any]]:
    """The file's arrays: actions [N, 7], episode_ends / task_index / episode_seeds [E], task_names, metadata."""
    kept = [episode for episode in attempts if episode.success]
    return {
        "actions": np.concatenate([episode.actions for episode in kept]),
        "episode_ends": np.cumsum([len(episode.actions) for episode in kept], dtype=np.int64),
        "task_index": np.array([config.tasks.index(episode.attempt.task) for episode in kept], dtype=np.int64),
        "task_names": np.array(config.tasks),
        "episode_seeds": np.array([episode.attempt.seed for episode in kept], dtype=np.int64),
        "metadata": np.array(json.dumps(_metadata(config, attempts, versions), sort_keys=True)),
    }


def _metadata(config: GenerationConfig, attempts: Sequence[Episode], versions: dict[str, str]) -> dict[str, Any]:
    tried = Counter(episode.attempt.task for episode in attempts)
    kept = Counter(episode.attempt.task for episode in attempts if episode.success)
    return {
        "generator_version": GENERATOR_VERSION,
        "versions": versions,
        "seed": config.seed,
        "episodes_per_task": config.episodes_per_task,
        "robot": "Panda",
        "controller": CONTROLLER,
        "control_frequency_hz": CONTROL_FREQUENCY,
        "action_names": list(ACTION_NAMES),
        "action_range": [-1.0, 1.0],
        "position_m_per_unit": POSITION_UNIT,
        "rotation_rad_per_unit": ROTATION_UNIT,
        "gripper": "negative opens, positive closes",
        "discarded": {task: tried[task] - kept[task] for task in config.tasks},
        "success_rate": {task: round(kept[task] / tried[task], 4) for task in config.tasks},
    }


def save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Whole or not at all: an interrupted run leaves the old file or none."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def table(config: GenerationConfig, attempts: Sequence[Episode]) -> str:
    """One line per task and a total."""
    rows = [("task", "kept", "discarded", "steps", "success")]
    for label, tasks in [*((task, (task,)) for task in config.tasks), ("total", config.tasks)]:
        tried = [episode for episode in attempts if episode.attempt.task in tasks]
        kept = [episode for episode in tried if episode.success]
        steps = sum(len(episode.actions) for episode in kept)
        rate = len(kept) / len(tried)
        rows.append((label, f"{len(kept)}", f"{len(tried) - len(kept)}", f"{steps}", f"{rate:.1%}"))
    return "\n".join(aligned(rows))


def generate(config: GenerationConfig) -> list[Episode]:
    """Generate, save, and return all attempts, the failed ones too. Raises SimulatorError, OutputExistsError."""
    refuse_existing([config.output], overwrite=config.overwrite)
    versions = check_simulator()
    attempts = collect(config)
    arrays = arrays_of(config, attempts, versions)
    if arrays["actions"].shape[1] != ACTION_DIM or not np.all(np.abs(arrays["actions"]) <= 1.0):
        raise SimulatorError("the experts gave actions outside [-1, 1] or not of 7 values; nothing was written")
    save(config.output, arrays)
    return attempts


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser(), _work, arguments)


def parser() -> CommandParser:
    """All arguments of the command, each with the name of a setting."""
    defaults = GenerationConfig()
    parser = CommandParser(
        "rfsq_ref/generate_demonstrations.py", f"generate demonstrations in a simulator, which needs {install('sim')}"
    )
    parser.add_output("file", defaults.output)
    parser.add_argument(
        "--tasks", nargs="+", default=defaults.tasks, metavar="TASK", help=f"of {', '.join(EXPERTS)}; default: all"
    )
    parser.add_settings(
        defaults, {"episodes_per_task": "solved episodes", "seed": "of scenes and experts", "workers": "processes"}
    )
    return parser


def config_of(options: argparse.Namespace) -> GenerationConfig:
    """Raises SettingsError for settings that make no sense."""
    given = {name: getattr(options, name) for name in GenerationConfig.__dataclass_fields__}
    return GenerationConfig(**{**given, "tasks": tuple(options.tasks)})


def _work(options: argparse.Namespace) -> Outcome:
    config = config_of(options)
    attempts = generate(config)
    print(table(config, attempts))
    size = config.output.stat().st_size
    kept = sum(attempt.success for attempt in attempts)
    document = {"output": str(config.output), "bytes": size, "attempts": len(attempts), "episodes": kept}
    return Outcome(f"✓ {config.output} ({size / 1e6:.2f} MB)", document)
