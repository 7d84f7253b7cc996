"""What policies that drive the simulator achieved: frozen, as JSON, and as tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rfsq.calibration.tables import Part, Table
from rfsq.evidence.results import Document
from rfsq.evidence.rollout_statistics import Rate

POLICY_LOOP_JSON = "policy_loop.json"
EXPERT = "the expert itself"
_NONE = "–"


@dataclass(frozen=True)
class LoopRun:
    """One policy on all scenes of a task. seed: of the policy, None for the expert; solved: the scenes' numbers, and
    after how many steps; error: mean square of its actions less what the expert meant there, None of the expert."""

    seed: int | None
    scenes: int
    solved: tuple[tuple[int, int], ...]
    error: float | None


@dataclass(frozen=True)
class LoopReport:
    """name: of what the policy says; tokens: how many of them; executed: steps of a chunk before it is asked again;
    way: how its probabilities are decoded; None where there are none. runs: of each seed, on the same scenes."""

    task: str
    name: str
    tokens: int | None
    executed: int | None
    way: str | None
    runs: tuple[LoopRun, ...]

    @property
    def rate(self) -> Rate:
        """Of all runs together."""
        return Rate.of(sum(len(run.solved) for run in self.runs), sum(run.scenes for run in self.runs))

    @property
    def error(self) -> float | None:
        """Mean of the runs."""
        found = [run.error for run in self.runs if run.error is not None]
        return fmean(found) if found else None

    @property
    def steps(self) -> float | None:
        """Median of the scenes that were solved."""
        found = [steps for run in self.runs for _, steps in run.solved]
        return median(found) if found else None


@dataclass(frozen=True)
class PolicyLoopResults(Document):
    """recorded: solved episodes by task; noise: of the recordings, over the expert's usual; most_steps: after which a
    scene counts as not solved; device: what trained; settings: of every training."""

    format, version, again = "rfsq-policy-loop", 2, ("evidence/policy_loop.py", "drive")

    recorded: dict[str, int]
    noise: float
    most_steps: int
    device: str
    versions: dict[str, str]
    settings: dict[str, float]
    reports: tuple[LoopReport, ...]


def parts(results: PolicyLoopResults | None) -> dict[str, Part]:
    """By the names that documents give them; nothing of None."""
    if results is None:
        return {"policy loop driven": "", "policy loop": ""}
    return {"policy loop driven": _driven(results), "policy loop": table(results)}


def _driven(results: PolicyLoopResults) -> str:
    recorded = " and ".join(f"{count} of {task}" for task, count in results.recorded.items())
    trained = f"Trained on one {results.device}, on {recorded} episodes"
    asked = [report for report in results.reports if report.name != EXPERT]
    if not asked:
        return f"{trained}."
    seeds, scenes = (sorted(found) for found in zip(*((len(r.runs), r.runs[0].scenes) for r in asked), strict=True))
    return f"{trained}; driven with {_span(seeds)} seeds each on {_span(scenes)} scenes of each task."


def _span(numbers: Sequence[int]) -> str:
    return " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def table(results: PolicyLoopResults) -> Table:
    """A row for what is said, and a column for each task."""
    tasks = list(results.recorded)
    rows: dict[tuple[str, str | None, int | None, int | None], dict[str, str]] = {}
    for report in results.reports:
        row = rows.setdefault((report.name, report.way, report.tokens, report.executed), {})
        row[report.task] = str(report.rate)
        row[f"{report.task}, error"] = _NONE if report.error is None else f"{report.error:.3f}"
        row[f"{report.task}, steps"] = _NONE if report.steps is None else f"{report.steps:.0f}"
    header = (
        "what a policy says",
        "decoded",
        "tokens",
        "steps executed",
        *tasks,
        *(f"{task}, {what}" for what in ("steps", "error") for task in tasks),
    )
    body = tuple(
        (name, way or _NONE, _number(tokens), _number(executed), *(row.get(column, _NONE) for column in header[4:]))
        for (name, way, tokens, executed), row in rows.items()
    )
    return Table(
        "Scenes solved, with 95 % intervals, median steps until then, and mean squares off the expert", header, body
    )


def _number(value: int | None) -> str:
    return _NONE if value is None else str(value)
