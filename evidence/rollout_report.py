"""What a closed-loop run found: success with Wilson intervals, tracking, precision, the tolerance that separates."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from evidence.cells import RAW
from evidence.closed_loop import PRECISION_TASKS
from evidence.episodes import Episode, Identity, read_episodes
from evidence.errors import EvidenceError
from evidence.results import read_json_object, typed, write_text
from evidence.simulation import TASKS
from evidence.tables import Table

FORMAT = "rfsq-rollout-report"
FORMAT_VERSION = 1
_COMMAND = "python rfsq_ref/rollout.py --report-only"
CONFIDENCE = 0.95
#: In mm; chosen before any result was seen.
TOLERANCES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0)
#: The two that the tolerance has to separate, and the cells that are counted in layers, coarsest first.
NAIVE, CALIBRATED = "naive", "calibrated, all"
CALIBRATED_LAYERS = ("calibrated, L0", "calibrated, L0-L1", "calibrated, L0-L2", "calibrated, L0-L4", CALIBRATED)
#: All tasks in one row, where every cell has the same scenes.
POOLED = "all tasks"


@dataclass(frozen=True)
class Rate:
    """successes of n, with the Wilson interval [low, high]."""

    successes: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, n: int) -> "Rate":
        return cls(successes, n, successes / n, *wilson(successes, n))

    def overlaps(self, other: "Rate") -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.successes}/{self.n} {100 * self.rate:5.1f} % [{100 * self.low:4.1f}, {100 * self.high:5.1f}]"


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
    """cells by name. separated_by_success: the intervals of naive and calibrated do not overlap; separating_mm: the
    largest of TOLERANCES at which they do not, None if there is none; layers_needed: the fewest calibrated layers, as a
    cell's name, whose interval overlaps that of raw actions, None if there is none. Each also None where a cell it
    needs was not run."""

    cells: dict[str, CellReport]
    separated_by_success: bool | None
    separating_mm: float | None
    layers_needed: str | None


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a success rate: those p whose score test does not refuse `successes` of `n`.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927), 209-212:
    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n). Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}; expected between 0 and n, and n above 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def solved_within(episodes: Sequence[Episode], tolerance: float) -> Rate:
    """Solved, and at least as precise as `tolerance`, in mm."""
    solved = sum(
        episode.result.success and episode.result.precision_mm is not None and episode.result.precision_mm <= tolerance
        for episode in episodes
    )
    return Rate.of(solved, len(episodes))


def cell_report(episodes: Sequence[Episode]) -> CellReport:
    """Of all episodes of one cell, at least one; precision where every task has a measure of it."""
    results = [episode.result for episode in episodes]
    measured = [found.precision_mm for found in results if found.success and found.precision_mm is not None]
    precise = {episode.task for episode in episodes} <= set(PRECISION_TASKS)
    return CellReport(
        codec=episodes[0].codec,
        success=Rate.of(sum(found.success for found in results), len(results)),
        reached=Rate.of(sum(found.reached for found in results), len(results)),
        steps=float(np.mean([found.steps for found in results])),
        tracking_mm=(
            float(np.mean([found.tracking_mm.mean for found in results])),
            float(np.mean([found.tracking_mm.p95 for found in results])),
            max(found.tracking_mm.max for found in results),
        ),
        tracking_deg=(
            float(np.mean([found.tracking_deg.mean for found in results])),
            float(np.mean([found.tracking_deg.p95 for found in results])),
            max(found.tracking_deg.max for found in results),
        ),
        precision_mm=_quantiles(measured) if precise and measured else None,
        tolerances=tuple(solved_within(episodes, tolerance) for tolerance in TOLERANCES) if precise else (),
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float, float, float]:
    middle, p90, p95, largest = np.percentile(values, [50, 90, 95, 100])
    return float(middle), float(p90), float(p95), float(largest)


def separating_tolerance(naive: CellReport, calibrated: CellReport) -> float | None:
    """The largest of TOLERANCES at which calibrated solves more and the intervals do not overlap; in mm."""
    apart = [
        tolerance
        for tolerance, worse, better in zip(TOLERANCES, naive.tolerances, calibrated.tolerances, strict=False)
        if better.low > worse.high
    ]
    return max(apart, default=None)


def task_report(episodes: Sequence[Episode]) -> TaskReport:
    """Of the episodes of one task, or of several with the same cells; at least one."""
    by_cell: dict[str, list[Episode]] = {}
    for episode in sorted(episodes, key=lambda episode: (_place(episode.cell), episode.index)):
        by_cell.setdefault(episode.cell, []).append(episode)
    cells = {cell: cell_report(found) for cell, found in by_cell.items()}
    naive, calibrated, raw = (cells.get(name) for name in (NAIVE, CALIBRATED, RAW))
    return TaskReport(
        cells=cells,
        separated_by_success=not naive.success.overlaps(calibrated.success) if naive and calibrated else None,
        separating_mm=separating_tolerance(naive, calibrated) if naive and calibrated else None,
        layers_needed=None
        if raw is None
        else next(
            (name for name in CALIBRATED_LAYERS if name in cells and cells[name].success.overlaps(raw.success)), None
        ),
    )


def common_scenes(episodes: Sequence[Episode]) -> list[Episode]:
    """Of every task the scenes that all its cells have finished: a run that was stopped compares the same scenes."""
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
    by_task: dict[str, list[Episode]] = {}
    for episode in sorted(compared, key=lambda episode: list(TASKS).index(episode.task)):
        by_task.setdefault(episode.task, []).append(episode)
    if not by_task:
        raise EvidenceError("no scene is finished in all cells yet; wait, or run python rfsq_ref/rollout.py to the end")
    shared = set.intersection(*({episode.index for episode in part} for part in by_task.values()))
    same_cells = len({frozenset(episode.cell for episode in part) for part in by_task.values()}) == 1
    if len(by_task) > 1 and shared and same_cells:
        by_task[POOLED] = [episode for episode in compared if episode.index in shared]
    return {task: task_report(part) for task, part in by_task.items()}


def _place(cell: str) -> tuple[int, str]:
    """Ours in the order of the method, then the others by name."""
    ours = (RAW, NAIVE, "published decoder", "recovered decoder", *CALIBRATED_LAYERS)
    return (ours.index(cell), "") if cell in ours else (len(ours), cell)


def table(reports: dict[str, TaskReport]) -> str:
    """For a terminal: a block per task, and what it says."""
    lines: list[str] = []
    for task, report in reports.items():
        lines += [
            "",
            f"{task:<30}{'success [95 %]':<28}{'steps':>6}{'tracking mm: mean, p95, max':>30}{'deg: mean':>11}"
            f"{'off by mm: p50, p95':>22}",
        ]
        for cell, found in report.cells.items():
            tracking = "{:.2f} {:7.2f} {:7.1f}".format(*found.tracking_mm)
            precise = "" if found.precision_mm is None else f"{found.precision_mm[0]:.1f} {found.precision_mm[2]:6.1f}"
            lines.append(
                f"  {cell:<28}{found.success!s:<28}{found.steps:>6.0f}{tracking:>30}{found.tracking_deg[0]:>11.2f}"
                f"{precise:>22}"
            )
        lines += [f"  {line}" for line in conclusions(report)]
    return "\n".join(lines[1:])


def conclusions(report: TaskReport) -> list[str]:
    """What the intervals say about naive, calibrated and raw, in words."""
    found: list[str] = []
    if report.separated_by_success is not None:
        word = "separates" if report.separated_by_success else "does not separate"
        found.append(f"Success {word} naive from all calibrated layers.")
        if all(cell.tolerances for cell in report.cells.values()):
            found.append(
                "At no tolerance do their intervals come apart."
                if report.separating_mm is None
                else f"Asked for {report.separating_mm:g} mm or less, calibrated solves more: the intervals come apart."
            )
    if RAW in report.cells and any(name in report.cells for name in CALIBRATED_LAYERS):
        found.append(
            "No number of calibrated layers reaches the interval of raw actions."
            if report.layers_needed is None
            else f"Fewest layers whose interval overlaps that of raw actions: {report.layers_needed}."
        )
    return found


def tables_of(reports: dict[str, TaskReport]) -> dict[str, Table]:
    """Success by task, tracking and precision over all of them, and success by tolerance where tasks are pooled."""
    cells = list(next(iter(reports.values())).cells)
    success = [
        (cell, *(f"{found.rate:.0%} ({found.low:.0%} … {found.high:.0%})" for found in _successes(reports, cell)))
        for cell in cells
    ]
    n = next(iter(next(iter(reports.values())).cells.values())).success.n
    found = {"success": Table(f"Solved, of {n} scenes a task", ("cell", *reports), tuple(success))}
    widest = reports[POOLED] if POOLED in reports else next(iter(reports.values()))
    accuracy = [
        (
            cell,
            *(f"{value:.2f}" for value in report.tracking_mm),
            f"{report.tracking_deg[0]:.2f}",
            *(("–", "–") if report.precision_mm is None else (f"{report.precision_mm[i]:.1f}" for i in (0, 2))),
        )
        for cell, report in widest.cells.items()
    ]
    header: tuple[str, ...] = (
        "cell",
        "tracking mm, mean",
        "p95",
        "largest",
        "tracking °, mean",
        "off the goal by mm, median",
        "p95",
    )
    found["tracking"] = Table(
        "How far the arm is from where the raw actions would have put it", header, tuple(accuracy)
    )
    if all(report.tolerances for report in widest.cells.values()):
        tolerant = [
            (cell, *(f"{rate.rate:.0%}" for rate in report.tolerances)) for cell, report in widest.cells.items()
        ]
        header = ("cell", *(f"{tolerance:g} mm" for tolerance in TOLERANCES))
        found["tolerance"] = Table("Solved and at least so precise", header, tuple(tolerant))
    return found


def _successes(reports: dict[str, TaskReport], cell: str) -> list[Rate]:
    return [report.cells[cell].success for report in reports.values()]


def read_report(path: Path) -> dict[str, TaskReport]:
    """The reports that write_report wrote. Raises EvidenceError for anything else."""
    content = read_json_object(path, FORMAT, FORMAT_VERSION, _COMMAND)
    try:
        reports: dict[str, TaskReport] = typed(dict[str, TaskReport], content["tasks"])
    except (TypeError, ValueError, KeyError) as error:
        raise EvidenceError(f"{path} is damaged: {error}; write it anew with rollout.py --report-only") from error
    return reports


def demonstrations_of(path: Path) -> str:
    """Hash of the demonstrations that the codecs of a report were fitted to. Raises EvidenceError."""
    content = read_json_object(path, FORMAT, FORMAT_VERSION, _COMMAND)
    return str(content["run"]["hashes"]["demonstrations"])


def content_of(identity: Identity, reports: dict[str, TaskReport]) -> dict[str, Any]:
    """As it is written to JSON."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "confidence": CONFIDENCE,
        "tolerances_mm": list(TOLERANCES),
        "run": asdict(identity),
        "tasks": {task: asdict(report) for task, report in reports.items()},
    }


def write_report(episodes: Path, folder: Path) -> str:
    """rollout.json and rollout.png in `folder` from a file of episodes, also an unfinished one; the table as text.

    Raises EvidenceError where there are no episodes, or the folder cannot be written.
    """
    identity, found = read_episodes(episodes)
    reports = reports_of(found)
    content = content_of(identity, reports)
    write_text(folder / "rollout.json", json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        return table(reports) + "\n\nno picture: matplotlib is not installed here; --report-only elsewhere draws it"
    from evidence.rollout_plots import draw

    draw(reports, folder / "rollout.png")
    return table(reports)
