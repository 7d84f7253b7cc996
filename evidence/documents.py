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

from rfsq.calibration import study_report
from rfsq.calibration.study_result import result_from_json
from rfsq.calibration.tables import as_markdown
from rfsq.evidence import belief_results, chunk_results, policy_loop_results, policy_results, rollout_report
from rfsq.evidence import tables as tables_parts
from rfsq.evidence.chunk_results import CHUNKS_JSON, ChunkComparison
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.results import Comparison, write_text
from rfsq.runtime.bundle.command import DONE, WANTING, CommandParser, Outcome, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
_BLOCK = re.compile(r"(<!-- results: (?P<name>[^>]+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """Every document that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Markdown by name, nothing of what drives the simulator where that was not driven.

    Raises EvidenceError, CalibrationError or OSError where another result is missing, or one is damaged.
    """
    study = result_from_json((results / "calibration.json").read_text(encoding="utf-8"))
    rollout = rollout_report.RolloutResult.read(results / "rollout.json")
    comparison = Comparison.read(results / "comparison.json")
    found = tables_parts.parts(comparison)
    if beside := chunk_results.read_beside(comparison, results / CHUNKS_JSON):
        found |= chunk_results.parts(*beside)
    humanoid = chunk_results.parts(ChunkComparison.read(results / "humanoid.json"))
    found |= {f"humanoid {name}": part for name, part in humanoid.items()}
    found |= policy_results.parts(policy_results.PolicyResults.read(results / policy_results.POLICIES_JSON))
    found |= belief_results.parts(belief_results.BeliefResults.read(results / belief_results.BELIEFS_JSON))
    loop = results / policy_loop_results.POLICY_LOOP_JSON
    found |= policy_loop_results.parts(policy_loop_results.PolicyLoopResults.read(loop) if loop.exists() else None)
    for source, parts in (("calibration", study_report.parts(study)), ("rollout", rollout_report.parts(rollout.tasks))):
        found |= {f"{source} {name}": part for name, part in parts.items()}
    return {name: as_markdown(part) for name, part in found.items()}


def rewritten(text: str, found: Mapping[str, str]) -> str:
    """The document with every table as it is now. Raises EvidenceError for a name that no result has."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise EvidenceError(f"no result is called {name!r}; expected one of {', '.join(found)}")
        return f"{match[1]}{found[name]}\n"

    return _BLOCK.sub(replaced, text)


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
