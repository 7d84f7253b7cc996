#!/usr/bin/env python3
"""Compare chunk tokens with other tokenizers of chunks at equal bits, on episodes that nothing was fitted to."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    # Before the imports below, some of which may be missing.
    run_script("rfsq.evidence.compare_chunks")

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from rfsq.calibration.tables import as_text
from rfsq.evidence.chunk_comparison import ChunkComparisonConfig, compare_chunks
from rfsq.evidence.chunk_results import CHUNKS_JSON, findings, parts
from rfsq.evidence.judging import BUDGETS, PARTS, Trial
from rfsq.evidence.settings import SEEDS, OscPose
from rfsq.evidence.train_peers import PEERS_JSON, PeerResults
from rfsq.rfsq_ref.data import DEMONSTRATIONS, load_actions
from rfsq.runtime.bundle.command import DONE, WANTING, CommandParser, Outcome, path_argument, run
from rfsq.runtime.bundle.paths import refuse_existing

#: Where the documents find it. What is measured on other data stays apart.
_RESULTS, _OWN = Path("docs/results") / CHUNKS_JSON, Path("build") / CHUNKS_JSON


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser(
        "evidence/compare_chunks.py",
        "compare chunk tokens with other tokenizers of chunks at equal bits",
        wanting="chunk tokens are not better where they should be",
    )
    parser.add_data()
    parser.add_output(f"the result; default: {_RESULTS}, with --data {_OWN}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S", help="default: 0 1 2")
    parser.add_argument(
        "--judged", choices=PARTS, default=PARTS[0],
        help="episodes of the verdict; the test once all settings are chosen; default: validation",
    )  # fmt: skip
    parser.add_argument(
        "--trained", type=path_argument, default=PEERS_JSON, metavar="F",
        help="what evidence/train_peers.py wrote, left out where it is missing; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--unseen", action=argparse.BooleanOptionalAction, default=True, help="leave out each task, too; default: yes"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=list(BUDGETS), metavar="X",
        help=f"bits of a step; default: {' '.join(f'{bits:g}' for bits in BUDGETS)}",
    )  # fmt: skip
    parser.add_argument(
        "--multiples", type=int, nargs="+", default=list(ChunkComparisonConfig.multiples), metavar="M",
        help="chunk lengths of FAST and BEAST, as multiples of that of chunk tokens; default: 1 2 4",
    )  # fmt: skip
    parser.add_settings(ChunkComparisonConfig, {"chunk_length": "of chunk tokens", "workers": "processes"})
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    output = options.output or (_RESULTS if options.data is None else _OWN)
    refuse_existing([output], overwrite=options.overwrite)
    trial = Trial(
        load_actions(options.data or DEMONSTRATIONS, key=options.key, filter_key=options.filter_key),
        options.judged,
        OscPose() if options.data is None else None,
        tuple(options.budgets),
    )
    trained = PeerResults.read(options.trained) if options.trained.exists() else None
    config = ChunkComparisonConfig(
        seeds=tuple(options.seeds),
        multiples=tuple(options.multiples),
        **{name: getattr(options, name) for name in ("chunk_length", "unseen", "workers")},
    )
    found = compare_chunks(trial, config, trained)
    found.write(output)
    print(as_text(filter(None, parts(found).values())), flush=True)
    claims = findings(found)
    failed = [claim.claim for claim in claims if not claim.holds]
    verdict = f"{'✗' if failed else '✓'} {len(claims) - len(failed)} of {len(claims)} claims hold"
    return Outcome(f"{verdict}; wrote {output}", asdict(found), WANTING if failed else DONE)
