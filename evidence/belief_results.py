"""What a study of beliefs found: frozen, as JSON, and as tables."""

from dataclasses import dataclass

from rfsq.calibration.tables import Part, Table
from rfsq.evidence.results import Document, Spread
from rfsq.evidence.tables import number

BELIEFS_JSON = "beliefs.json"
_NONE = "–"


@dataclass(frozen=True)
class BeliefReport:
    """name: of the tokens; policy: how they are said; tokens: how many, 0 where it says actions; mse: of the judged
    chunks, in normalised units², by how the policy's probabilities were decoded."""

    name: str
    policy: str
    tokens: int
    mse: dict[str, Spread]


@dataclass(frozen=True)
class BeliefResults(Document):
    """judged: the part of the episodes that errors are of; device: what trained; settings: of every training."""

    format, version, again = "rfsq-beliefs", 1, ("evidence/belief_study.py",)

    source: str
    sha256: str
    judged: str
    device: str
    versions: dict[str, str]
    settings: dict[str, float]
    reports: tuple[BeliefReport, ...]


def parts(results: BeliefResults) -> dict[str, Part]:
    """By the names that documents give them."""
    counts = {len(spread.values) for report in results.reports for spread in report.mse.values()}
    sentence = (
        f"Trained on an {results.device} with {max(counts)} seeds each, and judged on the {results.judged} episodes of "
        f"{results.source}."
    )
    return {"beliefs judged": sentence, "beliefs": table(results)}


def table(results: BeliefResults) -> Table:
    """A row for each kind of policy, a column for each way of decoding."""
    ways = list(dict.fromkeys(way for report in results.reports for way in report.mse))
    rows = [
        {"what a policy says": report.name, "how": report.policy, "tokens": str(report.tokens or _NONE)}
        | {way: number(report.mse[way]) if way in report.mse else _NONE for way in ways}
        for report in results.reports
    ]
    return Table.of(f"{results.judged.capitalize()} episodes, normalised units²", rows)
