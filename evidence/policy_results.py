"""What a study of policies found: frozen, as JSON, and as tables."""

from collections.abc import Iterable
from dataclasses import dataclass

from rfsq.calibration.tables import Part, Table
from rfsq.evidence.results import Document, Finding, Spread
from rfsq.evidence.tables import number
from rfsq.runtime.bundle.paths import counted

POLICIES_JSON = "policies.json"
AUTOREGRESSIVE = "autoregressive"
_NONE = "–"


@dataclass(frozen=True)
class PrefixReport:
    """The first `tokens` tokens of a chunk. bits_per_step: mean; token_mse: of the recorded actions' own tokens, None
    where these were not kept; policy_mse: of the tokens that the policies say. Errors are of the judged episodes, in
    normalised units²."""

    tokens: int
    bits_per_step: float
    token_mse: float | None
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
    sentences = tuple(
        f"{found.claim}: {'yes' if found.holds else '**no**'}; {found.measured}" for found in findings(results)
    )
    return {
        "policies judged": _judged(results),
        "policies": table(results),
        "policy findings": sentences,
        "policy prefixes": prefix_table(results),
    }


def _judged(results: PolicyResults) -> str:
    """On what, and how often."""
    counts = sorted({len(report.whole.policy_mse.values) for report in results.reports})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"Trained on an {results.device} with {seeds} seeds each, and judged on the {results.judged} episodes of "
        f"{results.source}."
    )


def findings(results: PolicyResults) -> tuple[Finding, ...]:
    """The best of each family by its mean, tokens said one after the other and as many of them as are best, against the
    best chunk tokens."""
    errors = {
        f"{report.name}, {counted(prefix.tokens, 'token')}": prefix.policy_mse
        for report in results.reports
        if report.policy == AUTOREGRESSIVE
        for prefix in report.prefixes
    }

    def best(family: str) -> str | None:
        return min((name for name in errors if family in name), key=lambda name: errors[name].mean, default=None)

    found, ours = [], best("chunk tokens")
    for family, share, claim in (("bins", 1.0, ""), ("OAT", 1.0, ""), ("FAST", 0.5, "half of ")):
        theirs = best(family)
        if ours is not None and theirs is not None:
            measured = f"{number(errors[ours])} ({ours}) against {number(errors[theirs])} ({theirs})"
            holds = errors[ours].mean <= share * errors[theirs].mean
            found.append(Finding(f"chunk tokens have at most {claim}the error of {family}", measured, holds))
    return tuple(found)


def table(results: PolicyResults) -> Table:
    """All tokens of each tokenizer, with a column for each kind of policy."""
    kinds = list(dict.fromkeys([AUTOREGRESSIVE, *(report.policy for report in results.reports)]))
    rows = []
    for reports in _by_name(results.reports):
        whole = reports[0].whole
        row = {
            "what a policy says": reports[0].name,
            "tokens": str(whole.tokens),
            "words": f"{reports[0].vocabulary:,}",
            "bits a step": f"{whole.bits_per_step:.1f}",
            "MSE of the tokens": _NONE if whole.token_mse is None else f"{whole.token_mse:.1e}",
        }
        found = {report.policy: number(report.whole.policy_mse) for report in reports}
        rows.append(row | {f"MSE of the policy, {kind}": found.get(kind, _NONE) for kind in kinds})
    if results.regression_mse is not None:
        plain = dict.fromkeys(rows[0], _NONE) | {"what a policy says": "the actions themselves, by least squares"}
        rows.append(plain | {f"MSE of the policy, {AUTOREGRESSIVE}": number(results.regression_mse)})
    return Table.of(f"{results.judged.capitalize()} episodes, normalised units²", rows)


def prefix_table(results: PolicyResults) -> Table:
    """The policy's error at each number of tokens, of what decodes from prefixes."""
    reports = [report for report in results.reports if len(report.prefixes) > 1]
    counts = sorted({prefix.tokens for report in reports for prefix in report.prefixes})
    rows = []
    for report in reports:
        found = {prefix.tokens: number(prefix.policy_mse) for prefix in report.prefixes}
        rows.append((report.name, report.policy, *(found.get(count, _NONE) for count in counts)))
    header = ("what a policy says", "policy", *map(str, counts))
    return Table("MSE of the policy from the first tokens alone, normalised units²", header, tuple(rows))


def _by_name(reports: Iterable[PolicyReport]) -> list[list[PolicyReport]]:
    found: dict[str, list[PolicyReport]] = {}
    for report in reports:
        found.setdefault(report.name, []).append(report)
    return list(found.values())
