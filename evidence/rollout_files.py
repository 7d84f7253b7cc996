"""The report of a closed-loop run as files: rollout.json and rollout.png."""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rfsq.evidence.episodes import Identity, read_episodes
from rfsq.evidence.results import read_json_object, write_json_object
from rfsq.evidence.rollout_report import TOLERANCES, TaskReport, reports_of, short_table, table
from rfsq.evidence.rollout_statistics import CONFIDENCE
from rfsq.runtime.bundle.advice import command

FORMAT = "rfsq-rollout-report"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class RolloutResult:
    """What rollout.json holds.

    confidence: of all intervals; tolerances_mm: what success is judged at; run: what the episodes depend on; tasks:
    see reports_of."""

    confidence: float
    tolerances_mm: tuple[float, ...]
    run: Identity
    tasks: dict[str, TaskReport]


def read_result(path: Path) -> RolloutResult:
    """What write_report wrote. Raises EvidenceError for anything else."""
    return read_json_object(RolloutResult, path, FORMAT, FORMAT_VERSION, command("rollout", "--report-only"))


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
    result = RolloutResult(CONFIDENCE, TOLERANCES, identity, reports)
    return text, write_json_object(asdict(result), folder / "rollout.json", FORMAT, FORMAT_VERSION)
