"""What a comparison of codecs of chunks found, and its tables and sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rfsq.calibration.tables import Part, Table
from rfsq.evidence.chunk_codec import FAMILY
from rfsq.evidence.findings import best_within
from rfsq.evidence.results import CodecReport, Comparison, Document, Finding, Spread, metrics_of
from rfsq.evidence.tables import number, short

CHUNKS_JSON = "chunks.json"
#: From here on unseen tasks are to be coded no worse than by FAST, in bits of a step.
UNSEEN_FROM = 10.0
#: The share of FAST's error that chunk tokens may have.
_SHARE = 0.5
#: Places of wrong tokens that a table shows.
_PLACES = (0, 1, 2, 4, 8, 16, 30, 44)
_ERRORS = {
    "action_mse": "action MSE, normalised units²",
    "position_mm_p99": "99th percentile of the position error, mm",
    "max_error": "largest error, normalised units",
}
_UNLIKE = {
    "perturbed": "with noise of 0.05",
    "scaled": "half as large",
    "random": "random in the range of each dimension",
}
_NONE = "–"


@dataclass(frozen=True)
class ChunkComparison(Document):
    """judged: the part of the episodes that errors are of; gaussian: the least error of a Gaussian code at each of the
    budgets, in bits of a step; reports: of all codecs; unseen: the same by the task that they were fitted without, on
    its episodes; wrong_tokens: of those that are the best within some budget, by codec or, where parts decode, of all
    tokens, by series, see `wrong_token_errors`; remarks: what is missing and why."""

    format, version, again = "rfsq-chunk-comparison", 1, ("evidence/compare_chunks.py",)

    source: str
    sha256: str
    judged: str
    seeds: tuple[int, ...]
    budgets: tuple[float, ...]
    versions: dict[str, str]
    gaussian: tuple[float, ...]
    reports: tuple[CodecReport, ...]
    unseen: dict[str, tuple[CodecReport, ...]]
    wrong_tokens: dict[str, tuple[Spread, ...]]
    remarks: tuple[str, ...]


def per_step(comparison: Comparison) -> tuple[CodecReport, ...]:
    """Tokens of single steps, from a comparison on the test episodes: calibrated ones, ResidualVQ and ResidualFSQ."""
    calibrated = comparison.scheme("calibrated")
    ours = (
        CodecReport(
            "per-step tokens, calibrated", "calibrated", f"calibrated {row.label}", row is not calibrated.prefixes[-1],
            row.metrics | metrics_of({"bits_per_step": calibrated.bits(row)}),
        )
        for row in calibrated.prefixes
    )  # fmt: skip
    return (*ours, *(peer for peer in comparison.peers if peer.family in ("ResidualVQ", "ResidualFSQ")))


def read_beside(comparison: Comparison, path: Path) -> tuple[ChunkComparison, tuple[CodecReport, ...]] | None:
    """What was found on the same demonstrations, and tokens of single steps where the same episodes were judged.

    None where the file is missing or of other demonstrations. Raises EvidenceError for a damaged one.
    """
    found = ChunkComparison.read(path) if path.exists() else None
    if found is None or found.sha256 != comparison.data.sha256:
        return None
    return found, per_step(comparison) if found.judged == "test" else ()


def parts(found: ChunkComparison, others: Sequence[CodecReport] = ()) -> dict[str, Part]:
    """By the names that documents give them. others: reports on the same episodes."""
    reports = (*found.reports, *others)
    errors = {name: title for name, title in _ERRORS.items() if name in found.reports[0].metrics}
    tables: dict[str, Part] = {"chunks judged": _judged(found)}
    tables |= {f"chunks {name}": _error_table(found, reports, name, title) for name, title in errors.items()}
    tables["chunks settings"] = _settings_table(found, reports)
    if found.unseen:
        tables |= {f"chunks unseen {name}": _unseen_table(found, name, title) for name, title in errors.items()}
    tables["chunks unlike"] = _unlike_table(found)
    tables["chunks wrong tokens"] = _wrong_table(found)
    claims = tuple(
        f"{claim.claim}: {'yes' if claim.holds else '**no**'}; {claim.measured}" for claim in findings(found, others)
    )
    return tables | {"chunks findings": claims, "chunks remarks": found.remarks}


def _judged(found: ChunkComparison) -> str:
    seeds = f"{len(found.seeds)} seeds of chunk tokens"
    return f"Judged on the {found.judged} episodes of {found.source}; means of {seeds} and of each training's."


# Tables ---------------------------------------------------------------------------------------------------------------


def _error_table(found: ChunkComparison, reports: Sequence[CodecReport], metric: str, title: str) -> Table:
    rows = [_row(family, found.budgets, _metric_of(best, metric)) for family, best in by_family(found, reports)]
    if metric == "action_mse":
        bound = (short(Spread.of([error])) for error in found.gaussian)
        rows.append(_row("one Gaussian's bound", found.budgets, bound))
    return Table.of(f"{title}, by bits of a step", rows)


def _settings_table(found: ChunkComparison, reports: Sequence[CodecReport]) -> Table:
    return Table.of(
        "The settings within each budget that have the least error",
        (
            {"budget": f"{budget:g}", "tokenizer": report.name, "bits/step": f"{report.bits:.1f}"}
            | {title: number(report.metrics[name]) for name, title in _ERRORS.items() if name in report.metrics}
            for place, budget in enumerate(found.budgets)
            for _, best in by_family(found, reports)
            if (report := best[place])
        ),
    )


def _unseen_table(found: ChunkComparison, metric: str, title: str) -> Table:
    return Table.of(
        f"Tasks that were left out of the fit: {title}, by bits of a step",
        (
            _row(f"{task}: {family}", found.budgets, _metric_of(best, metric))
            for task, reports in found.unseen.items()
            for family, best in by_family(found, reports)
        ),
    )


def _unlike_table(found: ChunkComparison) -> Table:
    """Of the settings that have the least error on the demonstrations; their bits where these differ."""

    def cells(best: Sequence[CodecReport | None], kind: str) -> Iterator[str]:
        for report in best:
            if report is None or f"{kind}_mse" not in report.metrics:
                yield _NONE
                continue
            bits = report.metrics[f"{kind}_bits"].mean
            taken = "" if abs(bits - report.bits) < 0.1 else f" ({bits:.0f} bits)"
            yield short(report.metrics[f"{kind}_mse"]) + taken

    return Table.of(
        "Actions unlike the demonstrations: action MSE, normalised units², by bits of a step of the demonstrations",
        (
            _row(f"{said}: {family}", found.budgets, cells(best, kind))
            for kind, said in _UNLIKE.items()
            for family, best in by_family(found, found.reports)
        ),
    )


def _wrong_table(found: ChunkComparison) -> Table:
    return Table.of(
        "One token is wrong: action MSE of its chunk, normalised units², by the token's place",
        (
            {"tokens": name} | {str(place): short(errors[place]) if place < len(errors) else _NONE for place in _PLACES}
            for name, errors in found.wrong_tokens.items()
        ),
    )


def _row(name: str, budgets: Sequence[float], cells: Iterator[str]) -> dict[str, str]:
    return {"tokenizer": name} | {f"{budget:g}": cell for budget, cell in zip(budgets, cells, strict=True)}


def _metric_of(best: Sequence[CodecReport | None], metric: str) -> Iterator[str]:
    return (short(report.metrics[metric]) if report and metric in report.metrics else _NONE for report in best)


def by_family(
    found: ChunkComparison, reports: Sequence[CodecReport]
) -> list[tuple[str, tuple[CodecReport | None, ...]]]:
    """The setting of the least error within each budget, for each family."""
    best = [best_within(reports, budget) for budget in found.budgets]
    return [(family, tuple(at[family] for at in best)) for family in best[0]]


# Findings -------------------------------------------------------------------------------------------------------------


def findings(found: ChunkComparison, others: Sequence[CodecReport] = ()) -> tuple[Finding, ...]:
    """What chunk tokens are for, checked at each budget."""
    budgets, reports = found.budgets, (*found.reports, *others)
    claim = f"chunk tokens have at most {_SHARE:.0%} of FAST's error at every budget"
    claims = [_claim(claim, _ratios(found.reports, "FAST", budgets), _SHARE)]
    if "position_mm_p99" in found.reports[0].metrics:
        claim = "the 99th percentile of their position error is below FAST's at every budget"
        claims.append(_claim(claim, _ratios(found.reports, "FAST", budgets, "position_mm_p99")))
    for family in dict.fromkeys(report.family for report in reports):
        if family not in (FAMILY, "FAST"):
            claim = f"they have less error than {family} at every budget that it reaches"
            claims.append(_claim(claim, _ratios(reports, family, budgets)))
    high = [budget for budget in budgets if budget >= UNSEEN_FROM]
    for task, unseen in found.unseen.items():
        claim = f"without {task} in the fit, they code it with at most FAST's error from {UNSEEN_FROM:g} bits on"
        claims.append(_claim(claim, _ratios(unseen, "FAST", high)))
    return tuple(claims)


def _ratios(
    reports: Sequence[CodecReport], other: str, budgets: Sequence[float], metric: str = "action_mse"
) -> dict[float, float]:
    """Ours over the other's, at the budgets that both reach."""
    found = {}
    for budget in budgets:
        best = best_within(reports, budget)
        ours, theirs = best.get(FAMILY), best.get(other)
        if ours and theirs:
            found[budget] = ours.metrics[metric].mean / theirs.metrics[metric].mean
    return found


def _claim(claim: str, ratios: dict[float, float], most: float = 1.0) -> Finding:
    shown = ", ".join(f"{ratio:.2g} at {budget:g}" for budget, ratio in ratios.items())
    return Finding(claim, f"ratio {shown} bits a step", all(ratio <= most for ratio in ratios.values()))
