#!/usr/bin/env python3
"""Measure what each choice in calibration is worth, on episodes that nothing was fitted to.

For every checkpoint (usually the training seeds of one recipe) constants and readout are fitted to calibration
episodes and judged on the test episodes. Each number is a mean with its spread over the checkpoints.

The defaults were chosen with the results on the embedded test episodes in sight, except for the ridge, which
cross-validation on the calibration episodes chose: how the default compares with its neighbours there is no held-out
evidence for it.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.calibration.study")

import argparse
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from rfsq.calibration.constants import MINIMUM_STEPS
from rfsq.calibration.data import calibration_dataset, episode_folds, mean_square, reference_actions
from rfsq.calibration.readout import RIDGES
from rfsq.calibration.settings import DEFAULT_READOUT, Granularity, Objective, ReadoutChoice, ReadoutConfig
from rfsq.calibration.study_bench import (
    DEFAULT,
    SEED,
    WITHOUT_READOUT,
    Bench,
    Setting,
    added_mse,
    benches_of,
    gain_factors,
    latent_bounds,
    level_shares,
    prefix_errors,
    prefix_mse,
    unquantised_mse,
)
from rfsq.calibration.study_report import format_study, study_files, write_study
from rfsq.calibration.study_result import (
    EpisodesRow,
    LayerRow,
    ReadoutRow,
    SettingRow,
    StudyResult,
    TaskRow,
    rounded,
    spread,
    spreads,
)
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.runtime.bundle.command import CommandParser, Outcome, run
from rfsq.runtime.bundle.paths import refuse_existing

#: Random choices of calibration episodes for every number of them.
SUBSETS = 5
#: A layer pays on the data when it takes at least this share off the action MSE, ...
PAYS_ON_DATA = 0.05
#: ... and off the data when it takes at least this share off the bound on the latent error.
PAYS_IN_WORST_CASE = 0.5
#: Settings that are also fitted to single tasks and to few episodes.
_COMPARED: tuple[dict[str, Any], ...] = (
    {"granularity": Granularity.LATENT, "headroom": 0.25},
    {"granularity": Granularity.LATENT, "headroom": 0.5},
    {"granularity": Granularity.LAYER, "headroom": 0.1},
)
_CHANGES: tuple[dict[str, Any], ...] = (
    *({"granularity": granularity} for granularity in Granularity),
    *_COMPARED,
    *({"headroom": headroom} for headroom in (0.0, 0.1, 0.25, 0.5)),
    *({"objective": objective} for objective in Objective),
    *({"coverage": coverage} for coverage in (0.9, 0.99, 0.999, 1.0)),
    *({"worst_case": bound} for bound in (1e-4, 4e-4, 1e-2, 1.0)),
)
_FOLDS = 5


@torch.no_grad()
def study(checkpoints: Sequence[Checkpoint], dataset: ActionDataset, *, subsets: int = SUBSETS) -> StudyResult:
    """Measure settings, unseen tasks, number of episodes, readouts and the worth of layers.

    checkpoints: of one size, fitted or not; their own constants and readouts are not used. Sections for which the
    dataset has too few episodes or tasks are left out with a reason. Raises CalibrationError for no checkpoints or
    different ones, DataError for another action dimension, and where no episode can be held back for the test.
    """
    start = time.monotonic()
    benches = benches_of(checkpoints, dataset)
    calibration, test = benches[0].calibration, benches[0].test
    omitted = _omitted(calibration, test)
    tasks = [] if "tasks" in omitted else sorted({*calibration.tasks} & {*test.tasks})
    counts = [] if "episodes" in omitted else _episode_counts(len(calibration.episodes))
    # On a terminal alone.
    progress = partial(tqdm, disable=None, leave=False)
    compared = _settings(_COMPARED)
    choices = [(setting, count) for setting in compared for count in counts]
    return StudyResult(
        source=dataset.source,
        data_sha256=dataset.sha256,
        checkpoints=tuple(_label(checkpoint, place) for place, checkpoint in enumerate(checkpoints)),
        default={**asdict(DEFAULT.config), "readout": DEFAULT_READOUT.choice.value},
        calibration_episodes=len(calibration.episodes),
        calibration_steps=calibration.num_steps,
        test_episodes=len(test.episodes),
        test_steps=test.num_steps,
        unquantised=spread([unquantised_mse(bench.fit(WITHOUT_READOUT), bench.test_actions()) for bench in benches]),
        unquantised_readout=spread([unquantised_mse(bench.fit(DEFAULT), bench.test_actions()) for bench in benches]),
        settings=tuple(_setting_row(benches, setting) for setting in progress(_settings(_CHANGES), "settings")),
        tasks=tuple(_task_row(benches, setting, tasks) for setting in progress(compared if tasks else [], "tasks")),
        episodes=tuple(
            _episodes_row(benches, setting, count, subsets) for setting, count in progress(choices, "episodes")
        ),
        readout=tuple(_readout_row(benches, ridge, tasks) for ridge in progress([None, *RIDGES], "readout")),
        layers=_layer_rows(benches),
        omitted=omitted,
        torch=str(torch.__version__),
        seconds=round(time.monotonic() - start, 1),
    )


# What is measured ----------------------------------------------------------------------------------------------------


def _label(checkpoint: Checkpoint, place: int) -> str:
    training = checkpoint.provenance.get("training")
    seed = training.get("seed") if isinstance(training, Mapping) else None
    name = f"checkpoint {place}" if seed is None else f"seed {seed}"
    sha256 = checkpoint.provenance.get("checkpoint_sha256")
    return f"{name}, sha256 {sha256}" if isinstance(sha256, str) else name


def _omitted(calibration: ActionDataset, test: ActionDataset) -> dict[str, str]:
    """Why a section cannot be measured, by its name."""
    lengths = zip(calibration.names, map(len, calibration.episodes), strict=True)
    too_short = next((found for found in lengths if found[1] < MINIMUM_STEPS), None)
    reasons = {}
    if too_short:
        name, length = too_short
        reason = f"calibration episode {name!r} has {length} steps, too few to be fitted to alone"
        reasons = dict.fromkeys(("tasks", "episodes"), reason)
    shared = {*calibration.tasks} & {*test.tasks}
    if len(shared) < 2:
        named = ", ".join(sorted(task or "unnamed" for task in shared)) or "none"
        reasons["tasks"] = f"tasks with both calibration and test episodes: {named}; two are needed"
    if len(calibration.episodes) < 2:
        reasons["episodes"] = "one calibration episode alone, so there is no smaller number of them"
    return reasons


def _episode_counts(total: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return [2**power for power in range(total.bit_length()) if 2**power < total] + [total]


def _settings(changes: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """The default, each change of it that changes it, and the default with the decoder as it was trained."""
    found = {DEFAULT.config: DEFAULT}
    for change in changes:
        config = replace(DEFAULT.config, **change)
        found.setdefault(config, Setting(", ".join(_named(*choice) for choice in change.items()), config))
    return [*found.values(), WITHOUT_READOUT]


def _named(choice: str, value: object) -> str:
    if choice == "worst_case":
        return "worst case off" if value == 1 else f"worst case {value:g}"
    return f"{choice} {value:g}" if isinstance(value, float) else f"{choice} {value}"


# How it is measured --------------------------------------------------------------------------------------------------


def _setting_row(benches: Sequence[Bench], setting: Setting) -> SettingRow:
    models = [(bench, bench.fit(setting)) for bench in benches]
    errors = [prefix_errors(model, bench.test_actions()) for bench, model in models]
    return SettingRow(
        setting=setting.name,
        action_mse=spreads([[mean_square(error) for error in of_prefixes] for of_prefixes in errors]),
        max_error=spreads([[float(error.abs().max()) for error in of_prefixes] for of_prefixes in errors]),
        random=spreads([added_mse(model, bench.random) for bench, model in models]),
        worst_case=spreads([latent_bounds(model) for _, model in models]),
    )


def _task_row(benches: Sequence[Bench], setting: Setting, tasks: Sequence[str]) -> TaskRow:
    found: dict[str, list[list[float]]] = {"seen": [], "unseen": [], "other": []}
    for bench in benches:
        everything = bench.fit(setting)
        tested = {task: bench.test_actions(task) for task in tasks}
        floors = {task: unquantised_mse(everything, actions) for task, actions in tested.items()}
        seen = [("seen", everything, task) for task in tasks]
        for kind, model, task in (*seen, *bench.fit_to_tasks(setting, tasks)):
            found[kind].append([mse / floors[task] for mse in prefix_mse(model, tested[task])])
    return TaskRow(setting.name, **{kind: spreads(ratios) for kind, ratios in found.items()})


def _episodes_row(benches: Sequence[Bench], setting: Setting, count: int, subsets: int) -> EpisodesRow:
    total = len(benches[0].calibration.episodes)
    # The same choices for every setting.
    generator = torch.Generator().manual_seed(SEED + count)
    choices = [torch.randperm(total, generator=generator)[:count] for _ in range(subsets if count < total else 1)]
    found = [
        prefix_mse(bench.fit(setting, bench.calibration.select(chosen.tolist())), bench.test_actions())
        for bench in benches
        for chosen in choices
    ]
    return EpisodesRow(setting.name, count, spreads(found))


def _readout_row(benches: Sequence[Bench], ridge: float | None, tasks: Sequence[str]) -> ReadoutRow:
    setting = WITHOUT_READOUT if ridge is None else Setting(readout=ReadoutConfig(ReadoutChoice.ON, ridge))
    found: dict[str, list[float]] = {"cross_validated": [], "test": [], "random": [], "unseen": [], "other": []}
    for bench in benches:
        as_trained, everything = bench.fit(WITHOUT_READOUT), bench.fit(setting)
        episodes, squares = bench.calibration, 0.0
        for kept, left_out in episode_folds(len(episodes.episodes), _FOLDS):
            judged = episodes.select(left_out)
            actions = reference_actions(bench.checkpoint, judged)
            squares += unquantised_mse(bench.fit(setting, episodes.select(kept)), actions) * judged.num_steps
        if len(episodes.episodes) > 1:
            found["cross_validated"].append(squares / episodes.num_steps)
        found["test"].append(unquantised_mse(everything, bench.test_actions()))
        found["random"].append(unquantised_mse(everything, bench.random) / unquantised_mse(as_trained, bench.random))
        for kind, model, task in bench.fit_to_tasks(setting, tasks):
            actions = bench.test_actions(task)
            found[kind].append(unquantised_mse(model, actions) / unquantised_mse(as_trained, actions))
    several = {name: spread(found[name]) if found[name] else None for name in ("cross_validated", "unseen", "other")}
    return ReadoutRow(ridge, test=spread(found["test"]), random=spread(found["random"]), **several)


def _layer_rows(benches: Sequence[Bench]) -> tuple[LayerRow, ...]:
    models = [(bench, bench.fit(DEFAULT)) for bench in benches]
    gains = spreads([gain_factors(prefix_mse(model, bench.test_actions())) for bench, model in models])
    # Before the first layer, latents in [-1, 1] are known to within 1.
    bounds = spreads([gain_factors([1.0, *latent_bounds(model)]) for _, model in models])
    used = spreads([level_shares(model, bench.test_actions()) for bench, model in models])
    sizes = benches[0].checkpoint.config
    return tuple(
        LayerRow(
            layer=layer,
            bits=rounded((layer + 1) * sizes.latent_dim * math.log2(sizes.num_levels)),
            gain=gains[layer - 1] if layer else None,
            worst_case_gain=bounds[layer],
            levels_used=used[layer],
            pays_on_data=not layer or 1 - 1 / gains[layer - 1].mean >= PAYS_ON_DATA,
            pays_in_worst_case=1 - 1 / bounds[layer].mean >= PAYS_IN_WORST_CASE,
        )
        for layer in range(sizes.num_layers)
    )


# The command ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("calibration/study.py", "measure what each choice in calibration is worth")
    parser.add_checkpoint(nargs="+", action="extend")
    parser.add_data()
    parser.add_output("folder", Path("build/reports/calibration"))
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    # Sums come out in one order, whatever the machine has: the same data give the same numbers.
    torch.set_num_threads(1)
    # Refused now, not after minutes of fitting.
    refuse_existing(study_files(options.output), overwrite=options.overwrite)
    checkpoints = [
        load_checkpoint(path, use_layernorm=options.use_layernorm, weights=options.weights)
        for path in options.checkpoint or [ROBUST_CHECKPOINT]
    ]
    for remark in dict.fromkeys(remark for checkpoint in checkpoints for remark in checkpoint.remarks):
        print(remark)
    dataset = calibration_dataset(checkpoints[0], options.data, key=options.key, filter_key=options.filter_key)
    result = study(checkpoints, dataset)
    print(format_study(result, is_verbose=options.verbose))
    write_study(result, options.output)
    return Outcome(f"\n✓ wrote {options.output} in {result.seconds:.0f} s", asdict(result))
