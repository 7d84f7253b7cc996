#!/usr/bin/env python3
"""Write the tables in README.md and docs/ anew from the measured results in docs/results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.evidence.documents")

import argparse
import re
from collections.abc import Mapping, Sequence

from rfsq.calibration.study_report import parts
from rfsq.calibration.study_result import result_from_json
from rfsq.calibration.tables import Table
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.findings import best_within
from rfsq.evidence.results import Comparison, Spread, read_json, write_text
from rfsq.evidence.rollout_files import read_result
from rfsq.evidence.rollout_report import tables_of, verdicts
from rfsq.evidence.tables import layer_table, peer_table, summary_table
from rfsq.runtime.bundle.command import DONE, WANTING, CommandParser, Outcome, run

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
    rollout = read_result(results / "rollout.json").tasks
    return {
        **{f"calibration {name}": _markdown(part) for name, part in parts(study).items()},
        **{f"rollout {name}": table.markdown() for name, table in tables_of(rollout).items()},
        "rollout conclusions": "\n".join(f"- {words}" for words in verdicts(rollout)),
        "comparison": _short_table(comparison).markdown(),
        "comparison summary": summary_table(comparison).markdown(),
        "comparison calibrated layers": layer_table(comparison.scheme("calibrated")).markdown(),
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
    """Each way of decoding, the coarse layers of the default, and the best setting of each peer within their bits."""
    titles = {
        "naive": "naive",
        "dynamic": "robust, with side information",
        "published": "robust, published decoder",
        "recovered": "robust, `recovered`",
        "calibrated": "**robust, `calibrated`** (default)",
    }
    ours = [
        (titles[report.scheme], report.bits(report.groups[-1]), report.groups[-1].metrics)
        for report in comparison.schemes
    ]
    default = comparison.scheme("calibrated")
    coarse = default.groups[0]
    budget = default.bits(coarse)
    ours.append((f"**the same, {coarse.label}**", budget, coarse.metrics))
    families = dict.fromkeys(peer.family for peer in comparison.peers)
    best = [peer for family in families if (peer := best_within(comparison.peers, family, budget))]
    rows = [*ours, *((peer.name, peer.metrics["bits_per_step"].mean, peer.metrics) for peer in best)]
    header = ("tokens", "bits a step", "MSE", "mm")
    cells = [
        (name, f"{bits:.0f}", _short(found["action_mse"]), _short(found["position_mm"])) for name, bits, found in rows
    ]
    return Table("", header, tuple(cells))


def _short(value: Spread) -> str:
    """Two digits of the mean; 2.7e−6 rather than 2.7e-06, with a minus that no line ends at."""
    if value.mean >= 1e-2:
        return f"{value.mean:.2g}" if value.mean < 100 else f"{value.mean:.0f}"
    return f"{value.mean:.1e}".replace("e-0", "e−").replace("e-", "e−")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser(
        "evidence/documents.py",
        "write the tables in README.md and docs/ anew from the results in docs/results",
        wanting="a document was not up to date",
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    found, outdated = tables(), []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, found)
        if new != text:
            outdated.append(str(path.relative_to(ROOT)))
            print(f"{outdated[-1]} is out of date" + ("" if options.check else ": written anew"))
            if not options.check:
                write_text(path, new)
    verdict = f"✗ {len(outdated)} documents were out of date" if outdated else "✓ every document is up to date"
    return Outcome(verdict, {"outdated": outdated}, WANTING if outdated else DONE)
