"""The soak: short ones of every setup hold but for what a busy machine decides, and what grows or fails is found."""

import math
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rfsq.runtime import ActionTokenizer, ControlDecoder
from rfsq.runtime.control.config import ActionKind, Strategy
from rfsq.runtime.qualification import soak as control_soak
from rfsq.runtime.qualification.soak import KEPT_LIMIT, RSS_LIMIT, SoakReport, SoakSetup, main, soak
from rfsq.runtime.qualification.trial_inputs import config_for

#: Of a soak on a quiet machine.
GOOD = SoakReport(
    description="a backend",
    ticks=1_000_000,
    seconds=20.0,
    step_us=(9.0, 12.0, 20.0, 900.0),
    bare_us=(3.0, 4.0, 8.0, 500.0),
    added_us=6.0,
    quick_added_us=5.5,
    line_us=4.0,
    rss_growth=0,
    kept=0,
    transient=1500,
    traced_ticks=10_000,
    others={},
    limited=0.0,
    has_worker=False,
)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("use_worker", [False, True])
def test_nothing_grows_and_nothing_fails(
    strategy: Strategy, use_worker: bool, either_tokenizer: ActionTokenizer
) -> None:
    # One reference to an object on each tick would keep eight times as much as is allowed.
    report = soak(
        either_tokenizer,
        1500,
        SoakSetup(
            strategy=strategy,
            use_worker=use_worker,
            fallback=either_tokenizer if use_worker else None,
            action_kind=ActionKind.ABSOLUTE if use_worker else ActionKind.DELTA,
            warm_ticks=500,
            traced_ticks=1000,
        ),
    )
    assert report.others == {}
    assert report.rss_growth < RSS_LIMIT
    assert report.kept <= KEPT_LIMIT
    assert report.transient > 0
    for p50, p99, p999, most in (report.step_us, report.bare_us):
        assert 0 < p50 <= p99 <= p999 <= most
    assert report.ratio > 1
    for part in (strategy, "absolute" if use_worker else "delta", *["worker", "falls back on"] * use_worker):
        assert str(part) in report.description


@pytest.mark.parametrize("use_worker", [False, True])
def test_nothing_grows_and_nothing_fails_where_chunks_come_as_beliefs(
    use_worker: bool, either_tokenizer: ActionTokenizer
) -> None:
    # Python keeps up to 2,000 tuples of each length in stock, which fewer ticks do not fill.
    setup = SoakSetup(use_worker=use_worker, beliefs=True, warm_ticks=300, traced_ticks=2000)
    report = soak(either_tokenizer, 800, setup)
    assert report.others == {}
    assert report.rss_growth < RSS_LIMIT
    assert report.kept <= KEPT_LIMIT
    assert report.description.endswith("beliefs")
    assert "tokenizer.decode_logits_into" in str(report)


def test_the_slew_limit_holds_nothing_back_but_jumps(
    tokenizer: ActionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert soak(tokenizer, 500, SoakSetup(warm_ticks=100, traced_ticks=100)).limited == 0
    # The random model of this bundle makes small jumps.
    monkeypatch.setattr(
        control_soak,
        "config_for",
        lambda *given, **changes: config_for(*given, max_relative_step=(1e-3,) * 3, **changes),
    )
    report = soak(tokenizer, 500, SoakSetup(jumps=True, warm_ticks=100, traced_ticks=100))
    assert report.limited > 0.9
    assert report.others == {}


def test_statistics_are_served_too(dynamic_tokenizer: ActionTokenizer) -> None:
    assert soak(dynamic_tokenizer, 500, SoakSetup(warm_ticks=100, traced_ticks=100)).others == {}


def test_a_status_that_is_not_ok_is_found(tokenizer: ActionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    step, ticks = ControlDecoder.step, 0

    def failing(self: ControlDecoder, tokens: Any, **options: Any) -> Any:
        nonlocal ticks
        ticks += 1
        return step(self, tokens - 100 if ticks == 700 else tokens, **options)

    monkeypatch.setattr(ControlDecoder, "step", failing)
    report = soak(tokenizer, 1000, SoakSetup(warm_ticks=100, traced_ticks=100))
    assert report.others == {"BAD_TOKEN": 1}
    assert not report.holds


def test_what_other_threads_keep_meanwhile_is_not_counted(
    tokenizer: ActionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do that hand the results of tests on."""
    step, kept = ControlDecoder.step, list[bytearray]()

    with ThreadPoolExecutor(1) as other:

        def beside(self: ControlDecoder, tokens: Any, **options: Any) -> Any:
            other.submit(lambda: kept.append(bytearray(500))).result()
            return step(self, tokens, **options)

        monkeypatch.setattr(ControlDecoder, "step", beside)
        report = soak(tokenizer, 10, SoakSetup(warm_ticks=10, traced_ticks=500))
    assert 500 * len(kept) > 10 * KEPT_LIMIT
    assert report.kept <= KEPT_LIMIT


def test_what_a_tick_keeps_is_found(tokenizer: ActionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    step, kept, pages = ControlDecoder.step, [], []

    def keeping(self: ControlDecoder, tokens: Any, **options: Any) -> Any:
        kept.append(b"x" * (5000 + len(kept) % 7))
        # Of the system, for Python may have enough left of what was freed before.
        if len(kept) % 1000 == 0:
            pages.append(mmap.mmap(-1, RSS_LIMIT))
            pages[-1].write(bytes(RSS_LIMIT))
        return step(self, tokens, **options)

    monkeypatch.setattr(ControlDecoder, "step", keeping)
    report = soak(tokenizer, 2000, SoakSetup(warm_ticks=100, traced_ticks=500))
    assert report.kept > 1_000_000
    assert report.rss_growth > RSS_LIMIT
    assert not report.holds


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"quick_added_us": 8.3}, False),
        # A machine that is ten times as slow.
        ({"quick_added_us": 55.0, "line_us": 40.0}, True),
        # What the quickest do not see is the machine's.
        ({"added_us": 60.0}, True),
        ({"quick_added_us": 30.0, "has_worker": True}, True),
        ({"rss_growth": 2**20}, False),
        ({"kept": 1025}, False),
        ({"others": {"STALE": 1}}, False),
    ],
)
def test_each_limit_can_be_missed(change: dict[str, Any], holds: bool) -> None:
    report = replace(GOOD, **change)
    assert report.holds is holds
    assert str(report).count("✗") == (not holds)


def test_the_report_states_difference_and_ratio() -> None:
    assert "add 6.00 us to the backend (median), 3.0 times; the quickest 1.38 times what a line of" in str(GOOD)
    assert "p50 9.00  p99 12.00  p99.9 20.00  max 900 us" in str(GOOD)


def test_the_command(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # How fast this machine is decides nothing here.
    monkeypatch.setattr(control_soak, "ADDED_LIMIT", math.inf)
    short = partial(replace, warm_ticks=500, traced_ticks=500)
    monkeypatch.setattr(control_soak, "soak", lambda tokenizer, ticks, setup: soak(tokenizer, ticks, short(setup)))
    options = [
        "--ticks",
        "1000",
        "--strategy",
        "weighted_average",
        "--absolute",
        "--worker",
        "--fallback",
        "onnxruntime",
        "--jumps",
    ]
    assert main([str(bundle), *options]) == 0
    printed = capsys.readouterr().out
    assert "1000 ticks on ONNX Runtime" in printed
    assert "weighted_average, absolute, worker, falls back on ONNX Runtime" in printed
    monkeypatch.setattr(control_soak, "soak", lambda *_, **__: replace(GOOD, kept=5000))
    assert main([str(bundle)]) == 1
    assert main([str(bundle.parent / "none")]) == 2
    assert "no bundle at" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(bundle), "--ticks", "0"])
