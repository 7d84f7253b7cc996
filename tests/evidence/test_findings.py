"""Every claim is computed from the numbers, and fails where they say otherwise."""

from dataclasses import replace

import pytest

from rfsq.evidence.findings import REFITTED, compared, find, improvement_over_naive, judge_peers, times, title
from rfsq.evidence.results import CodecReport, Comparison, ReportRow, SchemeReport, Spread


def with_errors(report: SchemeReport, errors: tuple[float, ...]) -> SchemeReport:
    """The same report with these action MSEs, one for each prefix and both seeds; groups follow."""

    def changed(row: ReportRow, error: float) -> ReportRow:
        return replace(row, metrics={**row.metrics, "action_mse": Spread.of([error, error])})

    prefixes = tuple(changed(row, error) for row, error in zip(report.prefixes, errors, strict=True))
    groups = tuple(
        changed(row, error) for row, error in zip(report.groups, (errors[2], errors[0], errors[-1]), strict=True)
    )
    return replace(report, prefixes=prefixes, groups=groups)


#: Measured once, one number for each prefix.
PATTERN = {
    "naive": (6e-4,) * 8,
    "dynamic": (1e-2, 1e-3, 1.1e-4, 5e-5, 2e-5, 1e-5, 7e-6, 5.5e-6),
    "published": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.2),
    "recovered": (1e-3, 5e-4, 1e-4, 8e-5, 7e-5, 6e-5, 5.6e-5, 5.6e-5),
    "calibrated": (3e-3, 1e-4, 1.4e-5, 7.2e-6, 7.1e-6, 7.1e-6, 7.1e-6, 7.1e-6),
}


def pattern(comparison: Comparison, **changes: tuple[float, ...]) -> tuple[SchemeReport, ...]:
    return tuple(with_errors(report, {**PATTERN, **changes}[report.scheme]) for report in comparison.schemes)


def held(comparison: Comparison, schemes: tuple[SchemeReport, ...]) -> list[bool]:
    unquantised = {REFITTED: {"action_mse": Spread.of([7.1e-6, 7.1e-6])}}
    data = replace(comparison.data, mean_action_mse=0.16)
    return [finding.holds for finding in find(schemes, unquantised, data)]


def test_the_designs_numbers_bear_every_claim_out(comparison: Comparison) -> None:
    assert held(comparison, pattern(comparison)) == [True] * 7


@pytest.mark.parametrize(
    ("failing", "changes"),
    [
        # Naive tokens as good as calibrated ones are also better than two layers of these, and than recovered ones.
        ({0, 5, 6}, {"naive": (8e-6,) * 8}),
        ({1}, {"naive": (6e-4,) * 7 + (5e-4,)}),
        ({2}, {"published": (1e-3,) * 8}),
        ({3}, {"calibrated": (3e-3, 1e-4, 1.4e-5) + (7.6e-6,) * 5}),
        ({4}, {"calibrated": (3e-3, 5e-4, 2e-4) + (7.1e-6,) * 5}),
        ({5}, {"calibrated": (3e-3, 7e-4, 1.4e-5) + (7.1e-6,) * 5}),
        ({6}, {"recovered": (7e-4,) * 8}),
    ],
)
def test_a_claim_fails_where_its_numbers_do_and_no_other(
    comparison: Comparison, failing: set[int], changes: dict[str, tuple[float, ...]]
) -> None:
    assert held(comparison, pattern(comparison, **changes)) == [index not in failing for index in range(7)]


def test_improvement_takes_the_worst_pair_of_seeds(comparison: Comparison) -> None:
    schemes = list(pattern(comparison))
    naive = schemes[0].groups[-1]
    schemes[0] = replace(
        schemes[0],
        groups=(*schemes[0].groups[:-1], replace(naive, metrics={"action_mse": Spread.of([1e-3, 1e-5])})),
    )

    assert improvement_over_naive(schemes) == pytest.approx(1 - 7.1e-6 / 1e-5)


def peer(family: str, bits: float, error: float) -> CodecReport:
    metrics = {"bits_per_step": Spread.of([bits]), "action_mse": Spread.of([error]), "max_error": Spread.of([1.0])}
    return CodecReport(family, family, f"{family}-{bits:.0f}", False, metrics)


def test_peers_that_win_are_named_first(comparison: Comparison) -> None:
    peers = [peer("bins", 42.0, 1e-4), peer("bins", 56.0, 5e-6), peer("other", 44.0, 1e-2), peer("large", 500.0, 1e-9)]

    coarsest, _, _, _, needed = judge_peers(pattern(comparison), peers)

    assert "less error: bins 1.00e-04 (bins-42, 42 bits)" in coarsest
    assert "more error: other 1.00e-02" in coarsest
    assert "no setting within the budget: large" in coarsest
    assert "peers need: bins 56 bits" in needed
    assert "not reached by other" in needed


def test_without_peers_there_is_no_verdict(comparison: Comparison) -> None:
    assert judge_peers(comparison.schemes, ()) == ()


@pytest.mark.parametrize(
    ("share", "words"), [(0.481, "48.1% less"), (-0.481, "48.1% more"), (0.0, "no less"), (1e-5, "no less")]
)
def test_a_share_says_which_way_it_goes(share: float, words: str) -> None:
    assert compared(share) == words


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((118.9, 153.5), "118.9 to 153.5 times less error"),
        ((0.25, 0.5), "2.0 to 4.0 times more error"),
        ((0.5, 4.0), "from 2.0 times more to 4.0 times less error"),
        ((81_630.0,), "81,630 times less error"),
    ],
)
def test_a_ratio_says_which_way_it_goes(ratios: tuple[float, ...], words: str) -> None:
    assert times(*ratios) == words


def test_the_headline_follows_from_the_figures() -> None:
    assert "naive tokens lose" in title(0.9)
    assert "lose to naive" in title(-0.5)
    assert "alike" in title(0.0)
