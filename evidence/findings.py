"""What the numbers say, in sentences: each claim is computed, and says so where it does not hold."""

from collections.abc import Sequence

from rfsq.evidence.results import CodecReport, DataFacts, Finding, Metrics, ReportRow, SchemeReport

#: How the comparison calls the robust autoencoder, and the one whose last layer calibration has refitted.
AS_TRAINED, REFITTED = "robust autoencoder", "robust autoencoder, readout refitted"
#: Less action MSE than naive by this share at least, in the worst pairing of seeds.
REQUIRED_IMPROVEMENT = 0.30
#: Layers count as doing nothing where they change the error by less than this share.
_NOTHING = 0.01
#: Calibrated tokens may cost this share of the unquantised autoencoder's error.
_CALIBRATION_COST = 0.05


def improvement_over_naive(schemes: Sequence[SchemeReport]) -> float:
    """1 - worst calibrated action MSE / best naive action MSE over the seeds, all layers."""
    by_name = {report.scheme: report for report in schemes}
    worst = max(_mse(by_name["calibrated"]))
    return 1 - worst / min(_mse(by_name["naive"]))


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
    change = max(
        (
            abs(after / before - 1)
            for row in naive.prefixes[1:]
            for before, after in zip(_values(naive.prefixes[0]), _values(row), strict=True)
        ),
        default=0.0,
    )
    # Where no refit was kept, the decoder is that of the autoencoder as it was trained.
    decoder = unquantised[REFITTED if REFITTED in unquantised else AS_TRAINED]
    cost = [found / least - 1 for found, least in zip(_mse(calibrated), decoder["action_mse"].values, strict=True)]
    coarse = [
        with_stats / alone
        for with_stats, alone in zip(_values(by_name["dynamic"].groups[0]), _values(calibrated.groups[0]), strict=True)
    ]
    found = [
        Finding(
            f"calibrated tokens have more than {REQUIRED_IMPROVEMENT:.0%} less error than naive ones",
            f"{compared(improvement)}; MSE in normalised units²: worst calibrated seed {max(_mse(calibrated)):.2e}, "
            f"best naive seed {min(_mse(naive)):.2e}",
            improvement > REQUIRED_IMPROVEMENT,
        ),
        Finding(
            f"naive layers behind {naive.prefixes[0].label} do nothing",
            f"they change the error by {change:.2%} at most",
            change < _NOTHING,
        ),
        Finding(
            "published tokens alone, decoded as published, are worse than always decoding the mean action",
            f"MSE in normalised units²: best seed {min(_mse(published)):.2e}; mean action {data.mean_action_mse:.2e}",
            min(_mse(published)) > data.mean_action_mse,
        ),
        Finding(
            f"calibrated tokens alone cost at most {_CALIBRATION_COST:.0%} over their decoder without a quantiser",
            f"{max(cost):+.1%} in the worst seed",
            max(cost) <= _CALIBRATION_COST,
        ),
        Finding(
            f"calibrated {calibrated.groups[0].label} beat dynamic ones with their side information",
            times(min(coarse), max(coarse)),
            min(coarse) > 1,
        ),
    ]
    return (*found, *_against_naive_layers(naive, calibrated), *_recovery(naive, published, by_name.get("recovered")))


def _against_naive_layers(naive: SchemeReport, calibrated: SchemeReport) -> list[Finding]:
    """Calibrated prefixes against naive ones, where both have several."""
    pairs = [
        (max(_values(ours)), min(_values(theirs)))
        for ours, theirs in zip(calibrated.prefixes, naive.prefixes, strict=False)
    ]
    if len(pairs) < 2:
        return []
    measured = ", ".join(
        f"{row.label} {ours:.1e} against {theirs:.1e}"
        for row, (ours, theirs) in zip(naive.prefixes[:3], pairs, strict=False)
    )
    claim = "calibrated tokens beat naive ones from two layers on, in the worst pair of seeds"
    holds = all(ours < theirs for ours, theirs in pairs[1:])
    return [Finding(claim, f"MSE in normalised units²: {measured}", holds)]


def _recovery(naive: SchemeReport, published: SchemeReport, recovered: SchemeReport | None) -> list[Finding]:
    """None where too few calibration steps determine no recovered decoder."""
    if recovered is None:
        return []
    worst = max(_mse(recovered))
    gain = min(bad / good for bad, good in zip(_mse(published), _mse(recovered), strict=True))
    claim = "the recovered decoder makes the same tokens better than naive ones"
    measured = f"worst seed {worst:.2e} normalised units²; {times(gain)} than published decoding"
    return [Finding(claim, measured, worst < min(_mse(naive)))]


def judge_peers(schemes: Sequence[SchemeReport], peers: Sequence[CodecReport]) -> tuple[str, ...]:
    """Where peers win and where calibrated tokens do, at each of three budgets and at equal error."""
    if not peers:
        return ()
    (calibrated,) = (report for report in schemes if report.scheme == "calibrated")
    rows = {row.label: row for row in (*calibrated.prefixes[:2], calibrated.groups[0], calibrated.groups[-1])}
    return (*(_at_budget(calibrated, row, peers) for row in rows.values()), _at_equal_error(calibrated, peers))


def _at_budget(calibrated: SchemeReport, row: ReportRow, peers: Sequence[CodecReport]) -> str:
    """The best peers within the bits of some calibrated layers."""
    budget, ours = calibrated.bits(row), row.metrics["action_mse"].mean
    best = {family: best_within(peers, family, budget) for family in _families(peers)}
    found = {
        "less error": [_described(peer) for peer in best.values() if peer and _peer_mse(peer) < ours],
        "more error": [_described(peer) for peer in best.values() if peer and _peer_mse(peer) >= ours],
        "no setting within the budget": [family for family, peer in best.items() if peer is None],
    }
    parts = [f"At {budget:.0f} bits per step (MSE in normalised units², calibrated {row.label}: {ours:.2e})"]
    parts += [f"{what}: {', '.join(those)}" for what, those in found.items() if those]
    return "; ".join(parts) + "."


def _at_equal_error(calibrated: SchemeReport, peers: Sequence[CodecReport]) -> str:
    """The bits with which peers are as good as all calibrated layers."""
    target = calibrated.groups[-1].metrics["action_mse"].mean
    good = [peer for peer in peers if _peer_mse(peer) <= target]
    needed = [min((peer for peer in good if peer.family == family), key=_bits) for family in _families(good)]
    reached = [f"{peer.family} {_bits(peer):.0f} bits ({peer.name})" for peer in needed]
    missed = [family for family in _families(peers) if family not in _families(good)]
    least = min(
        calibrated.bits(row) for row in calibrated.prefixes if row.metrics["action_mse"].mean <= target * 1.0001
    )
    head = f"For the MSE of all calibrated layers ({target:.2e} normalised units², with {least:.0f} bits per step)"
    if not reached:
        return f"{head} no peer setting is good enough."
    return f"{head} peers need: {', '.join(reached)}" + (f"; not reached by {', '.join(missed)}." if missed else ".")


def _families(peers: Sequence[CodecReport]) -> list[str]:
    return list(dict.fromkeys(peer.family for peer in peers))


def best_within(peers: Sequence[CodecReport], family: str, budget: float) -> CodecReport | None:
    """The peer of this family with the least error among those that need at most so many bits for a step."""
    # A setting that misses the budget by rounding is still at that budget.
    affordable = [peer for peer in peers if peer.family == family and _bits(peer) <= 1.005 * budget]
    return min(affordable, key=_peer_mse, default=None)


def _described(peer: CodecReport) -> str:
    return f"{peer.family} {_peer_mse(peer):.2e} ({peer.name}, {_bits(peer):.0f} bits)"


def _bits(peer: CodecReport) -> float:
    return peer.metrics["bits_per_step"].mean


def _peer_mse(peer: CodecReport) -> float:
    return peer.metrics["action_mse"].mean


def _values(row: ReportRow) -> tuple[float, ...]:
    return row.metrics["action_mse"].values


def _mse(report: SchemeReport) -> tuple[float, ...]:
    return _values(report.groups[-1])
