"""What the numbers say, in sentences: each claim is computed, and says so where it does not hold."""

from collections.abc import Sequence
from operator import attrgetter

from rfsq.evidence.results import SPILL, CodecReport, DataFacts, Finding, Metrics, ReportRow, SchemeReport

#: How the comparison calls the robust autoencoder, and the one whose last layer calibration has refitted.
AS_TRAINED, REFITTED = "robust autoencoder", "robust autoencoder, readout refitted"
#: Less action MSE than naive by this share at least, in the worst pairing of seeds.
REQUIRED_IMPROVEMENT = 0.30
#: Layers count as doing nothing where they change the error by less than this share.
_NOTHING = 0.01
#: Calibrated tokens may cost this share of the unquantised autoencoder's error.
_CALIBRATION_COST = 0.05
_MSE = "MSE in normalised units²"


def improvement_over_naive(schemes: Sequence[SchemeReport]) -> float:
    """1 - worst calibrated action MSE / best naive action MSE over the seeds, all layers."""
    by_name = {report.scheme: report for report in schemes}
    return 1 - by_name["calibrated"].mse.high / by_name["naive"].mse.low


def compared(share: float) -> str:
    """A share of error that is taken away, in words: "12.0% less", "3.0% more" where it is negative, or "no less"."""
    return "no less" if not round(share, 3) else f"{abs(share):.1%} {'less' if share > 0 else 'more'}"


def times(low: float, high: float | None = None) -> str:
    """Ratios of errors in words, from the lowest to the highest: how many times less the second has, or more."""
    high = low if high is None else high
    word = "less" if low > 1 else "more"
    if low <= 1 <= high:
        return f"from {_digits(1 / low)} times more to {_digits(high)} times less error"
    first, last = (low, high) if low > 1 else (1 / high, 1 / low)
    return f"{_digits(first)}{'' if first == last else f' to {_digits(last)}'} times {word} error"


def _digits(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def title(improvement: float) -> str:
    """The headline of the page, as the figures have it."""
    if improvement > 0:
        return "What robust tokens keep and naive tokens lose"
    if improvement < 0:
        return "Robust tokens lose to naive ones here"
    return "Robust tokens and naive ones are alike here"


def find(schemes: Sequence[SchemeReport], unquantised: dict[str, Metrics], data: DataFacts) -> tuple[Finding, ...]:
    """The claims that this project makes about its tokens, checked over all seeds."""
    by_name = {report.scheme: report for report in schemes}
    naive, published, calibrated = (by_name[name] for name in ("naive", "published", "calibrated"))
    improvement = improvement_over_naive(schemes)
    changes = [row.mse.over(naive.prefixes[0].mse) for row in naive.prefixes[1:]]
    change = max((abs(value - 1) for ratio in changes for value in ratio.values), default=0.0)
    # Where no refit was kept, the decoder is that of the autoencoder as it was trained.
    decoder = unquantised[REFITTED if REFITTED in unquantised else AS_TRAINED]
    cost = calibrated.mse.over(decoder["action_mse"]).high - 1
    coarse = by_name["dynamic"].groups[0].mse.over(calibrated.groups[0].mse)
    found = [
        Finding(
            f"calibrated tokens have more than {REQUIRED_IMPROVEMENT:.0%} less error than naive ones",
            f"{compared(improvement)}; {_MSE}: worst calibrated seed {calibrated.mse.high:.2e}, "
            f"best naive seed {naive.mse.low:.2e}",
            improvement > REQUIRED_IMPROVEMENT,
        ),
        Finding(
            f"naive layers behind {naive.prefixes[0].label} do nothing",
            f"they change the error by {change:.2%} at most",
            change < _NOTHING,
        ),
        Finding(
            "published tokens alone, decoded as published, are worse than always decoding the mean action",
            f"{_MSE}: best seed {published.mse.low:.2e}; mean action {data.mean_action_mse:.2e}",
            published.mse.low > data.mean_action_mse,
        ),
        Finding(
            f"calibrated tokens alone cost at most {_CALIBRATION_COST:.0%} over their decoder without a quantiser",
            f"{cost:+.1%} in the worst seed",
            cost <= _CALIBRATION_COST,
        ),
        Finding(
            f"calibrated {calibrated.groups[0].label} beat dynamic ones with their side information",
            times(coarse.low, coarse.high),
            coarse.low > 1,
        ),
    ]
    pairs = list(zip(calibrated.prefixes, naive.prefixes, strict=False))
    if len(pairs) > 1:
        shown = (f"{ours.label} {ours.mse.high:.1e} against {theirs.mse.low:.1e}" for ours, theirs in pairs[:3])
        claim = "calibrated tokens beat naive ones from two layers on, in the worst pair of seeds"
        holds = all(ours.mse.high < theirs.mse.low for ours, theirs in pairs[1:])
        found.append(Finding(claim, f"{_MSE}: {', '.join(shown)}", holds))
    # Missing where too few calibration steps determine no recovered decoder.
    if recovered := by_name.get("recovered"):
        gain = times(published.mse.over(recovered.mse).low)
        claim = "the recovered decoder makes the same tokens better than naive ones"
        measured = f"worst seed {recovered.mse.high:.2e} normalised units²; {gain} than published decoding"
        found.append(Finding(claim, measured, recovered.mse.high < naive.mse.low))
    return tuple(found)


def judge_peers(schemes: Sequence[SchemeReport], peers: Sequence[CodecReport]) -> tuple[str, ...]:
    """Where peers win and where calibrated tokens do, at each of three budgets and at equal error."""
    if not peers:
        return ()
    (calibrated,) = (report for report in schemes if report.scheme == "calibrated")
    rows = {row.label: row for row in (*calibrated.prefixes[:2], calibrated.groups[0], calibrated.groups[-1])}
    return (*(_at_budget(calibrated, row, peers) for row in rows.values()), _at_equal_error(calibrated, peers))


def _at_budget(calibrated: SchemeReport, row: ReportRow, peers: Sequence[CodecReport]) -> str:
    """The best peers within the bits of some calibrated layers."""
    budget, ours = calibrated.bits(row), row.mse.mean
    best = best_within(peers, budget)
    found = {
        "less error": [_described(peer) for peer in best.values() if peer and peer.mse < ours],
        "more error": [_described(peer) for peer in best.values() if peer and peer.mse >= ours],
        "no setting within the budget": [family for family, peer in best.items() if peer is None],
    }
    parts = [f"At {budget:.0f} bits per step ({_MSE}, calibrated {row.label}: {ours:.2e})"]
    parts += [f"{what}: {', '.join(those)}" for what, those in found.items() if those]
    return "; ".join(parts) + "."


def _at_equal_error(calibrated: SchemeReport, peers: Sequence[CodecReport]) -> str:
    """The bits with which peers are as good as all calibrated layers."""
    target = calibrated.mse.mean
    good = [peer for peer in peers if peer.mse <= target]
    needed = {family: _best(good, family, "bits") for family in _families(peers)}
    reached = [f"{peer.family} {peer.bits:.0f} bits ({peer.name})" for peer in needed.values() if peer]
    missed = [family for family, peer in needed.items() if peer is None]
    least = min(calibrated.bits(row) for row in calibrated.prefixes if row.mse.mean <= target * 1.0001)
    head = f"For the MSE of all calibrated layers ({target:.2e} normalised units², with {least:.0f} bits per step)"
    if not reached:
        return f"{head} no peer setting is good enough."
    return f"{head} peers need: {', '.join(reached)}" + (f"; not reached by {', '.join(missed)}." if missed else ".")


def _families(peers: Sequence[CodecReport]) -> list[str]:
    return list(dict.fromkeys(peer.family for peer in peers))


def best_within(peers: Sequence[CodecReport], budget: float) -> dict[str, CodecReport | None]:
    """By family, the peer with the least error among those that need at most so many bits for a step."""
    affordable = [peer for peer in peers if peer.bits <= SPILL * budget]
    return {family: _best(affordable, family, "mse") for family in _families(peers)}


def _best(peers: Sequence[CodecReport], family: str, least: str) -> CodecReport | None:
    return min((peer for peer in peers if peer.family == family), key=attrgetter(least), default=None)


def _described(peer: CodecReport) -> str:
    return f"{peer.family} {peer.mse:.2e} ({peer.name}, {peer.bits:.0f} bits)"
