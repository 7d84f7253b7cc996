#!/usr/bin/env python3
"""Write the tables in README.md and docs/ anew from the measured results in docs/results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. Exit status: 0 when every document was up to date,
1 when one was not (it is then written, unless --check is given), 2 when a result is missing.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.console import explain_missing_packages

    explain_missing_packages()

import argparse
import re
from collections.abc import Mapping

from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.study_report import parts
from rfsq.calibration.study_result import result_from_json
from rfsq.calibration.tables import Table
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.results import Comparison, read_json, write_text
from rfsq.evidence.rollout_files import read_report
from rfsq.evidence.rollout_report import conclusions, tables_of
from rfsq.evidence.tables import UNQUANTISED_TITLES, layer_table, number, peer_table, summary_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
_BLOCK = re.compile(r"(<!-- results: (?P<name>[^>]+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """Every document that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Markdown by name. Raises EvidenceError where a result is missing or damaged."""
    comparison = read_json(results / "comparison.json")
    study = result_from_json(_text(results / "calibration.json"))
    rollout = read_report(results / "rollout.json")
    return {
        **{f"calibration {name}": _markdown(part) for name, part in parts(study).items()},
        **{f"rollout {name}": table.markdown() for name, table in tables_of(rollout).items()},
        "rollout conclusions": "\n".join(
            f"- {task}: {' '.join(conclusions(report))}" for task, report in rollout.items()
        ),
        "comparison": _short_table(comparison).markdown(),
        "comparison summary": summary_table(comparison).markdown(),
        "comparison calibrated layers": layer_table(comparison.scheme("calibrated"), comparison).markdown(),
        "peers": peer_table(comparison).markdown(),
        "peer verdict": "\n".join(f"- {sentence}" for sentence in comparison.peer_verdict),
        "findings": "\n".join(
            f"- {finding.claim}: {'yes' if finding.holds else '**no**'}; {finding.measured}"
            for finding in comparison.findings
        ),
    }


def _markdown(part: Table | str) -> str:
    return part if isinstance(part, str) else part.markdown()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise EvidenceError(f"cannot read {path}: {error.strerror}; write it with calibration/study.py") from error


def rewritten(text: str, found: Mapping[str, str]) -> str:
    """The document with every table as it is now. Raises EvidenceError for a name that no result has."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise EvidenceError(f"no result is called {name!r}; expected one of {', '.join(found)}")
        return f"{match[1]}{found[name]}\n"

    return _BLOCK.sub(replaced, text)


def _short_table(comparison: Comparison) -> Table:
    """A row for each way of decoding: all layers, L0–L2, and millimetres."""
    rows = []
    titles = {
        "naive": "naive",
        "dynamic": "robust, with its side information (`dynamic`)",
        "published": "robust, published `decode_from_indices`, tokens alone",
        "recovered": "the same tokens, `recovered` decoder, tokens alone",
        "calibrated": "robust, **`calibrated`**, tokens alone (default)",
    }
    for report in comparison.schemes:
        coarse, whole = report.groups[0].metrics, report.groups[-1].metrics
        cells = (number(whole["action_mse"]), number(coarse["action_mse"]), number(whole["position_mm"]))
        rows.append((titles[report.scheme], *cells))
    for kind, metrics in comparison.unquantised.items():
        rows.append(
            (
                UNQUANTISED_TITLES.get(kind, f"{kind}, no quantiser"),
                number(metrics["action_mse"]),
                "–",
                number(metrics["position_mm"]),
            )
        )
    coarse_label = comparison.schemes[0].groups[0].label
    header = ("action MSE, normalised units²", "all layers", coarse_label, "position error, mm")
    return Table("", header, tuple(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    outdated = 0
    try:
        found = tables()
        for path in documents():
            text = path.read_text(encoding="utf-8")
            new = rewritten(text, found)
            if new != text:
                outdated += 1
                print(f"{path.relative_to(ROOT)} is out of date" + ("" if options.check else ": written anew"))
                if not options.check:
                    write_text(path, new)
    except (EvidenceError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
