"""What a study of policies found: frozen, as JSON, and as tables."""

from collections.abc import Iterable
from dataclasses import dataclass

from rfsq.calibration.tables import Part, Table
from rfsq.evidence.results import Document, Spread
from rfsq.evidence.tables import number

_NONE = "–"


@dataclass(frozen=True)
class PrefixReport:
    """The first `tokens` tokens of a chunk. bits_per_step: mean; token_mse: of the recorded actions' own tokens;
    policy_mse: of the tokens that the policies say. Both on the judged episodes, in normalised units²."""

    tokens: int
    bits_per_step: float
    token_mse: float
    policy_mse: Spread


@dataclass(frozen=True)
class PolicyReport:
    """name: of the tokens; policy: how it says them; prefixes: rising, the last of all tokens."""

    name: str
    policy: str
    vocabulary: int
    prefixes: tuple[PrefixReport, ...]

    @property
    def whole(self) -> PrefixReport:
        """All tokens."""
        return self.prefixes[-1]


@dataclass(frozen=True)
class PolicyResults(Document):
    """judged: the part of the episodes that errors are of; device: what trained; settings: of every training;
    regression_mse: of policies that say actions and no tokens."""

    format, version, again = "rfsq-policies", 1, ("evidence/policy_study.py",)

    source: str
    sha256: str
    judged: str
    device: str
    versions: dict[str, str]
    settings: dict[str, float]
    regression_mse: Spread | None
    reports: tuple[PolicyReport, ...]


def parts(results: PolicyResults) -> dict[str, Part]:
    """By the names that documents give them."""
    return {"policies": table(results), "policy prefixes": prefix_table(results)}


def table(results: PolicyResults) -> Table:
    """All tokens of each tokenizer, with a column for each kind of policy."""
    kinds = list(dict.fromkeys(report.policy for report in results.reports))
    rows = []
    for reports in _by_name(results.reports):
        whole = reports[0].whole
        row = {
            "what a policy says": reports[0].name,
            "tokens": str(whole.tokens),
            "words": f"{reports[0].vocabulary:,}",
            "bits a step": f"{whole.bits_per_step:.1f}",
            "MSE of the tokens": f"{whole.token_mse:.1e}",
        }
        found = {report.policy: number(report.whole.policy_mse) for report in reports}
        rows.append(row | {f"MSE of the policy, {kind}": found.get(kind, _NONE) for kind in kinds})
    if results.regression_mse is not None:
        plain = dict.fromkeys(rows[0], _NONE) | {"what a policy says": "the actions themselves, by least squares"}
        rows.append(plain | {f"MSE of the policy, {kinds[0]}": number(results.regression_mse)})
    return Table.of(f"Episodes of {results.judged}, normalised units²", rows)


def prefix_table(results: PolicyResults) -> Table:
    """The policy's error at each number of tokens, of what decodes from prefixes."""
    reports = [report for report in results.reports if len(report.prefixes) > 1]
    counts = sorted({prefix.tokens for report in reports for prefix in report.prefixes})
    rows = []
    for report in reports:
        found = {prefix.tokens: number(prefix.policy_mse) for prefix in report.prefixes}
        row = {"what a policy says": report.name, "policy": report.policy}
        rows.append(row | {str(count): found.get(count, _NONE) for count in counts})
    return Table.of("MSE of the policy from the first tokens alone, normalised units²", rows)


def _by_name(reports: Iterable[PolicyReport]) -> list[list[PolicyReport]]:
    found: dict[str, list[PolicyReport]] = {}
    for report in reports:
        found.setdefault(report.name, []).append(report)
    return list(found.values())
