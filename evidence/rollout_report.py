"""What a closed-loop run found, as tables and as files: success with intervals, tracking, success by tolerance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from rfsq.calibration.tables import Part, Table, as_text
from rfsq.evidence.episodes import Episode, Identity, read_episodes
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.results import Document
from rfsq.evidence.rollout_statistics import CONFIDENCE, Paired, Rate
from rfsq.evidence.rollouts import RAW
from rfsq.evidence.simulation import PRECISION_TASKS, Spread
from rfsq.rfsq_ref.experts import TASKS
from rfsq.runtime.bundle.advice import quoted

#: In mm; chosen before any result was seen.
TOLERANCES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0)
#: Of each task and cell in a whole run; with fewer the report says that it is unfinished.
SCENES = 50
#: The loss of success against raw actions that "enough layers" excludes.
MARGIN = 0.10
#: The two that the tolerance has to separate, and the cells that are counted in layers, coarsest first.
NAIVE, CALIBRATED = "naive", "calibrated, all"
CALIBRATED_LAYERS = ("calibrated, L0", "calibrated, L0-L1", "calibrated, L0-L2", "calibrated, L0-L4", CALIBRATED)
#: All tasks in one row, where every cell has the same scenes.
POOLED = "all tasks"
_NONE = "–"


@dataclass(frozen=True)
class CellReport:
    """One cell of one task.

    reached: success after any step; steps: mean; tracking: means over the episodes of each episode's mean and 95th
    percentile, and the largest of all; precision_mm: 50th, 90th, 95th and 100th percentile over the solved episodes,
    None where the task has no measure or nothing was solved; tolerances: at each of TOLERANCES, solved and at least so
    precise.
    """

    codec: str
    success: Rate
    reached: Rate
    steps: float
    tracking_mm: tuple[float, float, float]
    tracking_deg: tuple[float, float, float]
    precision_mm: tuple[float, float, float, float] | None
    tolerances: tuple[Rate, ...]


@dataclass(frozen=True)
class TaskReport:
    """All cells on the same scenes.

    planned: scenes of the whole run; separated_by_success: the Wilson intervals of naive and calibrated do not overlap;
    separating_mm: those of TOLERANCES at which they do not overlap and calibrated solves more, naive_ahead_mm: and
    naive solves more; against_naive: all calibrated layers less naive; against_raw: calibrated cells less raw, by cell;
    layers_needed: the fewest calibrated layers, as a cell's name, that exclude a loss of more than MARGIN against raw.
    Each None or empty where a cell it needs was not run, or there is none.
    """

    cells: dict[str, CellReport]
    planned: int
    separated_by_success: bool | None
    separating_mm: tuple[float, ...]
    naive_ahead_mm: tuple[float, ...]
    against_naive: Paired | None
    against_raw: dict[str, Paired]
    layers_needed: str | None

    @property
    def n(self) -> int:
        """Scenes that are compared."""
        return next(iter(self.cells.values())).success.n

    def title(self, task: str) -> str:
        """For the head of a column."""
        return f"{task} (n = {self.n})"


@dataclass(frozen=True)
class RolloutResult(Document):
    """What rollout.json holds.

    confidence: of all intervals; tolerances_mm: what success is judged at; run: what the episodes depend on; tasks:
    see reports_of."""

    format, version, again = "rfsq-rollout-report", 2, ("rollout", "--report-only")

    confidence: float
    tolerances_mm: tuple[float, ...]
    run: Identity
    tasks: dict[str, TaskReport]


def solved_within(episodes: Sequence[Episode], tolerance: float) -> Rate:
    """Solved, and at least as precise as `tolerance`, in mm."""
    solved = sum(
        episode.result.success and episode.result.precision_mm is not None and episode.result.precision_mm <= tolerance
        for episode in episodes
    )
    return Rate.of(solved, len(episodes))


def cell_report(episodes: Sequence[Episode]) -> CellReport:
    """Sum up the episodes of one cell, at least one. Precision is there where every task has a measure of it."""
    results = [episode.result for episode in episodes]
    measured = [found.precision_mm for found in results if found.success and found.precision_mm is not None]
    precise = {episode.task for episode in episodes} <= set(PRECISION_TASKS)
    return CellReport(
        codec=episodes[0].codec,
        success=Rate.of(sum(found.success for found in results), len(results)),
        reached=Rate.of(sum(found.reached for found in results), len(results)),
        steps=float(np.mean([found.steps for found in results])),
        tracking_mm=_tracking([found.tracking_mm for found in results]),
        tracking_deg=_tracking([found.tracking_deg for found in results]),
        precision_mm=_quantiles(measured) if precise and measured else None,
        tolerances=tuple(solved_within(episodes, tolerance) for tolerance in TOLERANCES) if precise else (),
    )


def _tracking(errors: Sequence[Spread]) -> tuple[float, float, float]:
    means, p95s = [error.mean for error in errors], [error.p95 for error in errors]
    return float(np.mean(means)), float(np.mean(p95s)), max(error.max for error in errors)


def _quantiles(values: Sequence[float]) -> tuple[float, float, float, float]:
    middle, p90, p95, largest = np.percentile(values, [50, 90, 95, 100])
    return float(middle), float(p90), float(p95), float(largest)


def tolerances_ahead(one: CellReport, other: CellReport) -> tuple[float, ...]:
    """Those of TOLERANCES, in mm, at which `one` solves more than `other` and the intervals do not overlap."""
    return tuple(
        tolerance
        for tolerance, better, worse in zip(TOLERANCES, one.tolerances, other.tolerances, strict=False)
        if better.low > worse.high
    )


def task_report(episodes: Sequence[Episode]) -> TaskReport:
    """Compare the cells of one task, or of several with the same cells. All have the same scenes, at least one."""
    ordered = sorted(episodes, key=lambda episode: (_place(episode.cell), episode.task, episode.index))
    by_cell = {cell: list(found) for cell, found in groupby(ordered, attrgetter("cell"))}
    cells = {cell: cell_report(found) for cell, found in by_cell.items()}
    solved = {cell: [episode.result.success for episode in found] for cell, found in by_cell.items()}
    naive, calibrated = cells.get(NAIVE), cells.get(CALIBRATED)
    against_raw = {
        name: Paired.of(solved[name], solved[RAW]) for name in CALIBRATED_LAYERS if name in cells and RAW in cells
    }
    return TaskReport(
        cells=cells,
        planned=SCENES * len({episode.task for episode in episodes}),
        separated_by_success=not naive.success.overlaps(calibrated.success) if naive and calibrated else None,
        separating_mm=tolerances_ahead(calibrated, naive) if naive and calibrated else (),
        naive_ahead_mm=tolerances_ahead(naive, calibrated) if naive and calibrated else (),
        against_naive=Paired.of(solved[CALIBRATED], solved[NAIVE]) if naive and calibrated else None,
        against_raw=against_raw,
        layers_needed=next((name for name, paired in against_raw.items() if paired.low > -MARGIN), None),
    )


def common_scenes(episodes: Sequence[Episode]) -> list[Episode]:
    """The scenes that all cells of their task have finished: a run that was stopped compares the same scenes, too."""
    done: dict[str, dict[str, set[int]]] = {}
    for episode in episodes:
        done.setdefault(episode.task, {}).setdefault(episode.cell, set()).add(episode.index)
    common = {task: set.intersection(*cells.values()) for task, cells in done.items()}
    return [episode for episode in episodes if episode.index in common[episode.task]]


def reports_of(episodes: Sequence[Episode]) -> dict[str, TaskReport]:
    """By task, and POOLED where there are several tasks with the same cells: the scenes that all of them have.

    Raises EvidenceError where no scene is finished in all cells.
    """
    compared = common_scenes(episodes)
    ordered = sorted(compared, key=lambda episode: list(TASKS).index(episode.task))
    by_task = {task: list(part) for task, part in groupby(ordered, attrgetter("task"))}
    if not by_task:
        raise EvidenceError(f"no scene is finished in all cells yet; wait, or run {quoted('rollout')} to the end")
    shared = set.intersection(*({episode.index for episode in part} for part in by_task.values()))
    same_cells = len({frozenset(episode.cell for episode in part) for part in by_task.values()}) == 1
    if len(by_task) > 1 and shared and same_cells:
        by_task[POOLED] = [episode for episode in compared if episode.index in shared]
    return {task: task_report(part) for task, part in by_task.items()}


def _place(cell: str) -> tuple[int, str]:
    """Ours in the order of the method, then the others by name."""
    ours = (RAW, NAIVE, "published decoder", "recovered decoder", *CALIBRATED_LAYERS)
    return (ours.index(cell), "") if cell in ours else (len(ours), cell)


def parts(reports: dict[str, TaskReport]) -> dict[str, Part]:
    """By name: every table, and what the intervals of each task say."""
    said = tuple(f"{task}: {' '.join(conclusions(report))}" for task, report in reports.items())
    return {**tables_of(reports), "conclusions": said}


def table(reports: dict[str, TaskReport]) -> str:
    """For a terminal: every table, and what the numbers of each task say."""
    return as_text(parts(reports).values())


def short_table(reports: dict[str, TaskReport]) -> str:
    """For a terminal: shares alone, and what the intervals of all tasks, or of the last, say."""
    rates = {cell: [f"{rate.rate:.0%}" if rate else None for rate in found] for cell, found in _solved(reports).items()}
    task, last = list(reports.items())[-1]
    said = fill(f"{task}: {' '.join(conclusions(last))}", 100)
    return as_text([_by_task("Solved; -v prints intervals and every table", "cell", list(reports), rates), said])


def conclusions(report: TaskReport) -> list[str]:
    """What the intervals say about naive, calibrated and raw, in words."""
    found: list[str] = []
    if report.n < report.planned:
        found.append(f"Unfinished: {report.n} of {report.planned} scenes.")
    if report.against_naive is not None:
        naive, calibrated = report.cells[NAIVE], report.cells[CALIBRATED]
        apart = "come apart" if report.separated_by_success else "overlap"
        found.append(
            f"Solved by naive {naive.success.successes}, by all calibrated layers {calibrated.success.successes} of "
            f"{report.n}: the intervals {apart}, difference on the same scenes in points {report.against_naive} (exact "
            "McNemar test)."
        )
        if naive.tolerances and calibrated.tolerances:
            found.append(_tolerance_words(report))
    if report.against_raw:
        margin = f"a loss of more than {100 * MARGIN:.0f} points of success to raw actions (95 %, paired)"
        found.append(
            f"With no number of calibrated layers do these scenes exclude {margin}."
            if report.layers_needed is None
            else f"Fewest layers with which these scenes exclude {margin}: {report.layers_needed}."
        )
    return found


def _tolerance_words(report: TaskReport) -> str:
    tried = f"{len(TOLERANCES)} tolerances tried"
    said = [
        f"{name} solves more within {_spans(tolerances)}"
        for name, tolerances in (("calibrated", report.separating_mm), ("naive", report.naive_ahead_mm))
        if tolerances
    ]
    if not said:
        return f"At none of the {tried} do their intervals come apart."
    return f"With intervals apart, {' and '.join(said)} ({tried}, not corrected for their number)."


def _spans(tolerances: Sequence[float]) -> str:
    """In words: neighbours among TOLERANCES are joined; "2 mm alone", "1 mm and 2 to 5 mm"."""
    # In a run of neighbours, places in both lists grow alike.
    runs = groupby(enumerate(tolerances), lambda found: TOLERANCES.index(found[1]) - found[0])
    spans = [[tolerance for _, tolerance in run] for _, run in runs]
    words = [f"{span[0]:g}" + (f" to {span[-1]:g}" if len(span) > 1 else "") + " mm" for span in spans]
    if len(tolerances) == 1:
        return f"{words[0]} alone"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def cells_of(reports: Mapping[str, TaskReport]) -> list[str]:
    """The cells of any task, in the order of the method."""
    return sorted({cell for report in reports.values() for cell in report.cells}, key=_place)


def _solved(reports: Mapping[str, TaskReport]) -> dict[str, list[Rate | None]]:
    """Of every cell in each task, None where a task does not have it."""
    cells = [report.cells for report in reports.values()]
    return {cell: [of[cell].success if cell in of else None for of in cells] for cell in cells_of(reports)}


def _by_task(title: str, head: str, tasks: list[str], rows: Mapping[str, Sequence[object]]) -> Table:
    """A column for each task, below a first one of names."""
    return Table(
        title, (head, *tasks), tuple((name, *(str(cell or _NONE) for cell in of)) for name, of in rows.items())
    )


def tables_of(reports: dict[str, TaskReport]) -> dict[str, Table]:
    """Success by task, its paired differences, and tracking and success by tolerance where tasks are pooled, or by
    task where they are not. A cell that a task does not have is "–" there."""
    titles = [report.title(task) for task, report in reports.items()]
    found = {"success": _by_task("Solved, with 95 % Wilson intervals", "cell", titles, _solved(reports))}
    pairs = {f"{CALIBRATED} less naive": [report.against_naive for report in reports.values()]} | {
        f"{cell} less raw": [report.against_raw.get(cell) for report in reports.values()] for cell in CALIBRATED_LAYERS
    }
    pairs = {name: differences for name, differences in pairs.items() if any(differences)}
    if pairs:
        title = "Difference of success on the same scenes in points, 95 % interval (Newcombe), exact McNemar test"
        found["paired"] = _by_task(title, "cells", titles, pairs)
    shown = {POOLED: reports[POOLED]} if POOLED in reports else reports
    first = next(report.title(task) for task, report in shown.items()) if len(shown) == 1 else "task, cell"
    rows = [
        (cell if len(shown) == 1 else f"{report.title(task)}, {cell}", measured)
        for task, report in shown.items()
        for cell, measured in report.cells.items()
    ]
    accuracy = [
        {
            first: name,
            "tracking mm, mean": f"{measured.tracking_mm[0]:.2f}",
            "tracking mm, p95": f"{measured.tracking_mm[1]:.2f}",
            "tracking mm, largest": f"{measured.tracking_mm[2]:.2f}",
            "tracking °, mean": f"{measured.tracking_deg[0]:.2f}",
            "off the goal by mm, median": _NONE if measured.precision_mm is None else f"{measured.precision_mm[0]:.1f}",
            "off the goal by mm, p95": _NONE if measured.precision_mm is None else f"{measured.precision_mm[2]:.1f}",
        }
        for name, measured in rows
    ]
    found["tracking"] = Table.of("How far the arm is from where the raw actions would have put it", accuracy)
    tolerant = [
        {first: name}
        | {f"{mm:g} mm": f"{rate.rate:.0%}" for mm, rate in zip(TOLERANCES, measured.tolerances, strict=True)}
        for name, measured in rows
        if measured.tolerances
    ]
    if tolerant:
        found["tolerance"] = Table.of("Solved and at least so precise", tolerant)
    return found


def report_files(folder: Path) -> tuple[Path, ...]:
    """What write_report writes."""
    return folder / "rollout.json", folder / "rollout.png"


def write_report(episodes: Path, folder: Path, *, is_verbose: bool = True) -> tuple[str, dict[str, Any]]:
    """rollout.png and rollout.json in `folder` from a file of episodes, also an unfinished one.

    The JSON comes last: where it is, the picture is too, unless matplotlib is missing.
    Returns what there is to read, every table where `is_verbose`, and what the JSON holds. Raises EvidenceError where
    there are no episodes, or the folder cannot be written.
    """
    identity, found = read_episodes(episodes)
    reports = reports_of(found)
    text = table(reports) if is_verbose else short_table(reports)
    if find_spec("matplotlib"):
        from rfsq.evidence.rollout_plots import draw

        draw(reports, folder / "rollout.png")
    else:
        text += "\n\nno picture: matplotlib is not installed here; --report-only elsewhere draws it"
    return text, RolloutResult(CONFIDENCE, TOLERANCES, identity, reports).write(folder / "rollout.json")
