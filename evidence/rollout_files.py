"""The report of a closed-loop run as files: rollout.json and rollout.png."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rfsq.evidence.episodes import read_episodes
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.results import read_json_object, write_text
from rfsq.evidence.rollout_report import TOLERANCES, TaskReport, reports_of, table
from rfsq.evidence.rollout_statistics import CONFIDENCE
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.typed_json import build

FORMAT = "rfsq-rollout-report"
FORMAT_VERSION = 2


def read_report(path: Path) -> dict[str, TaskReport]:
    """The reports that write_report wrote. Raises EvidenceError for anything else."""
    again = command("rollout", "--report-only")
    content = read_json_object(path, FORMAT, FORMAT_VERSION, again)
    try:
        return build(dict[str, TaskReport], content["tasks"], "tasks")
    except (ValueError, KeyError) as error:
        raise EvidenceError(f"{path} is damaged: {error}; write it anew with `{again}`") from error


def demonstrations_of(path: Path) -> str:
    """Hash of the demonstrations that the codecs of a report were fitted to. Raises EvidenceError."""
    content = read_json_object(path, FORMAT, FORMAT_VERSION, command("rollout", "--report-only"))
    return str(content["run"]["hashes"]["demonstrations"])


def report_files(folder: Path) -> tuple[Path, ...]:
    """What write_report writes."""
    return folder / "rollout.json", folder / "rollout.png"


def write_report(episodes: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """rollout.png and rollout.json in `folder` from a file of episodes, also an unfinished one.

    The JSON comes last: where it is, the picture is too, unless matplotlib is missing.
    Returns the table as text, and what the JSON holds. Raises EvidenceError where there are no episodes, or the folder
    cannot be written.
    """
    identity, found = read_episodes(episodes)
    reports = reports_of(found)
    text = table(reports)
    if find_spec("matplotlib"):
        from rfsq.evidence.rollout_plots import draw

        draw(reports, folder / "rollout.png")
    else:
        text += "\n\nno picture: matplotlib is not installed here; --report-only elsewhere draws it"
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "confidence": CONFIDENCE,
        "tolerances_mm": TOLERANCES,
        "run": asdict(identity),
        "tasks": {task: asdict(report) for task, report in reports.items()},
    }
    written = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_text(folder / "rollout.json", written + "\n")
    return text, content
