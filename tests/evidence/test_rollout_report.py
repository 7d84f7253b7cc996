"""What `evidence.rollout_report` promises: the intervals of Wilson's formula, and words that follow from them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.evidence.episodes import Episode, Identity, open_episodes
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.rollout_report import (
    CALIBRATED_LAYERS,
    MARGIN,
    POOLED,
    SCENES,
    TOLERANCES,
    RolloutResult,
    common_scenes,
    conclusions,
    reports_of,
    solved_within,
    table,
    tables_of,
    write_report,
)
from rfsq.evidence.rollout_statistics import Paired, Rate, mcnemar, newcombe_paired, wilson
from rfsq.evidence.settings import RolloutConfig
from rfsq.evidence.simulation import EpisodeResult, Spread

IDENTITY = Identity(1, 0, 8, {"robosuite": "1.5.2"}, {"robust": "ab"})
EXACT = Spread(0.0, 0.0, 0.0)


def episodes(
    cell: str, off: list[float | None], task: str = "Stack", failed: tuple[int, ...] = (), tracking: float = 0.0
) -> list[Episode]:
    """One per entry of `off`, solved unless its index is among `failed`."""
    spread = Spread(tracking, 2 * tracking, 3 * tracking)
    return [
        Episode(task, cell, "c", index, index, EpisodeResult(index not in failed, True, 100 + index, spread, EXACT, mm))
        for index, mm in enumerate(off)
    ]


# Wilson --------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99])
)
def test_the_interval_is_that_of_scipy(counts: tuple[int, int], confidence: float) -> None:
    from scipy.stats import binomtest

    found = wilson(*counts, confidence)
    expected = binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("counts", [(1, 0), (-1, 5), (6, 5)])
def test_counts_that_cannot_be_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected between 0 and n"):
        wilson(*counts)


@given(st.integers(0, 50), st.integers(0, 50))
def test_intervals_overlap_both_ways_or_not_at_all(first: int, second: int) -> None:
    a, b = Rate.of(first, 50), Rate.of(second, 50)
    assert a.overlaps(b) == b.overlaps(a)
    assert a.overlaps(a)
    assert Rate.of(0, 50).overlaps(Rate.of(50, 50)) is False


# Pairs ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(gained: int, lost: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("counts", "interval"),
    [
        # Cavo et al. 2012, as the R package contingencytables tests it (Fagerland, Lydersen, Laake 2017, chapter 8).
        ((59, 6, 16, 80), (-0.1186, -0.0046)),
        # The mirror image.
        ((59, 16, 6, 80), (0.0046, 0.1186)),
    ],
)
def test_the_paired_interval_is_the_published_one(
    counts: tuple[int, int, int, int], interval: tuple[float, float]
) -> None:
    assert newcombe_paired(*counts) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("shares", [(0.9, 0.02, 0.06, 0.02), (0.4, 0.2, 0.2, 0.2), (0.7, 0.0, 0.1, 0.2)])
def test_the_paired_interval_holds_the_true_difference_about_as_often_as_it_says(shares: tuple[float, ...]) -> None:
    """Over every possible table of 30 pairs, each with its probability."""
    from scipy.stats import multinomial

    n = 30
    tables = [(a, b, c, n - a - b - c) for a in range(n + 1) for b in range(n + 1 - a) for c in range(n + 1 - a - b)]
    chances = multinomial.pmf(np.array(tables), n, np.array(shares))
    true = shares[1] - shares[2]
    coverage = sum(
        chance
        for counts, chance in zip(tables, chances, strict=True)
        if chance > 1e-12 and (interval := newcombe_paired(*counts))[0] <= true <= interval[1]
    )
    assert 0.93 < coverage < 0.995


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any))
def test_the_paired_interval_holds_what_was_found_and_turns_over_with_it(counts: tuple[int, int, int, int]) -> None:
    both, gained, lost, neither = counts
    low, high = newcombe_paired(*counts)
    assert -1 - 1e-9 <= low <= (gained - lost) / sum(counts) <= high <= 1 + 1e-9
    assert newcombe_paired(both, lost, gained, neither) == pytest.approx((-high, -low), abs=1e-12)


def test_scenes_are_paired_one_by_one() -> None:
    paired = Paired.of([True, True, True, False, False], [True, False, False, True, False])
    assert (paired.n, paired.gained, paired.lost, paired.difference) == (5, 2, 1, 0.2)
    assert (paired.low, paired.high) == newcombe_paired(1, 2, 1, 1)
    with pytest.raises(ValueError, match="argument"):
        Paired.of([True], [True, False])


def test_no_difference_has_no_negative_zero() -> None:
    assert str(Paired.of([True] * 50, [True] * 50)) == "+0.0 [−7.1, +7.1], p = 1.000"
    assert str(Paired.of([False] * 30, [True] * 30)).endswith("p < 0.001")


def test_pooled_scenes_are_paired_within_their_task() -> None:
    found = [
        *episodes("naive", [1.0] * 4, failed=(0, 1)),
        *episodes("calibrated, all", [1.0] * 4),
        *episodes("naive", [1.0] * 4, "PickPlaceCan"),
        *episodes("calibrated, all", [1.0] * 4, "PickPlaceCan", failed=(0, 1)),
    ]
    paired = reports_of(found)[POOLED].against_naive
    assert paired is not None
    assert (paired.n, paired.gained, paired.lost, paired.p_value) == (8, 2, 2, 1.0)


def test_naive_and_calibrated_are_tested_on_the_same_scenes() -> None:
    """Eight scenes more, none fewer: two-sided 2 / 2^8."""
    found = episodes("naive", [1.0] * 50, failed=tuple(range(8))) + episodes("calibrated, all", [1.0] * 50)
    report = reports_of(found)["Stack"]
    assert report.against_naive is not None
    assert report.against_naive.p_value == 2 / 2**8
    assert "Solved by naive 42, by all calibrated layers 50 of 50: the intervals come apart" in table({"Stack": report})
    assert "p = 0.008 (exact McNemar test)" in table({"Stack": report})


# Tolerances ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=30), st.sets(st.integers(0, 29)))
def test_a_looser_tolerance_never_solves_less_and_never_more_than_was_solved(
    off: list[float | None], failed: set[int]
) -> None:
    found = episodes("raw", off, failed=tuple(failed))
    counts = [solved_within(found, tolerance).successes for tolerance in (*TOLERANCES, 1e9)]
    assert counts == sorted(counts)
    assert counts[-1] == sum(mm is not None and index not in failed for index, mm in enumerate(off))


def test_every_tolerance_that_separates_is_found_and_said() -> None:
    naive, calibrated = episodes("naive", [6.0] * 50), episodes("calibrated, all", [1.2] * 50)
    report = reports_of(naive + calibrated)["Stack"]
    assert report.separated_by_success is False
    # At 1 mm neither solves anything, at 7.5 mm both solve everything.
    assert report.separating_mm == (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
    assert "calibrated solves more within 1.5 to 5 mm (14 tolerances tried" in table({"Stack": report})


@pytest.mark.parametrize(
    ("naive", "words"),
    [
        ([2.5] * 50, "within 2 mm alone (14"),
        ([2.5] * 25 + [6.0] * 25, "within 2 to 5 mm (14"),
        ([1.8] * 50, None),
    ],
)
def test_a_single_tolerance_is_not_called_a_range(naive: list[float | None], words: str | None) -> None:
    report = reports_of(episodes("naive", naive) + episodes("calibrated, all", [1.9] * 50))["Stack"]
    said = " ".join(conclusions(report))
    assert words in said if words else "At none of the 14 tolerances tried do their intervals come apart." in said


def test_tolerances_with_a_gap_are_listed() -> None:
    found = episodes("naive", [*[2.5] * 25, *[4.5] * 25]) + episodes("calibrated, all", [*[1.9] * 25, *[3.5] * 25])
    report = reports_of(found)["Stack"]
    assert report.separating_mm == (2.0, 4.0)
    assert "within 2 mm and 4 mm (14" in table({"Stack": report})


def test_a_naive_cell_that_is_better_is_not_hidden() -> None:
    report = reports_of(episodes("naive", [1.0] * 50) + episodes("calibrated, all", [6.0] * 50))["Stack"]
    assert report.separating_mm == ()
    assert report.naive_ahead_mm == (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
    assert "naive solves more within 1 to 5 mm" in table({"Stack": report})


def test_tasks_without_a_measure_have_no_tolerances() -> None:
    report = reports_of(episodes("naive", [None] * 9, "Lift") + episodes("calibrated, all", [None] * 9, "Lift"))["Lift"]
    assert report.cells["naive"].tolerances == ()
    assert report.cells["naive"].precision_mm is None
    assert report.separating_mm == report.naive_ahead_mm == ()
    assert "tolerances" not in table({"Lift": report})


# Layers and cells ----------------------------------------------------------------------------------------------------


def test_the_fewest_layers_that_lose_no_more_than_the_margin_to_raw_actions() -> None:
    found = episodes("raw", [1.0] * 50)
    for name, failures in zip(CALIBRATED_LAYERS, (40, 20, 1, 0, 0), strict=True):
        found += episodes(name, [1.0] * 50, failed=tuple(range(failures)))
    report = reports_of(found)["Stack"]
    # One scene of 50 fewer is 2 points, but its interval reaches beyond 10; without any loss it does not.
    assert report.against_raw[CALIBRATED_LAYERS[2]].low < -MARGIN < report.against_raw[CALIBRATED_LAYERS[3]].low
    assert report.layers_needed == CALIBRATED_LAYERS[3]
    assert f"more than 10 points of success to raw actions (95 %, paired): {CALIBRATED_LAYERS[3]}." in " ".join(
        conclusions(report)
    )
    assert reports_of(episodes(CALIBRATED_LAYERS[0], [1.0]))["Stack"].layers_needed is None


def test_few_scenes_show_nothing_about_layers_and_the_run_is_called_unfinished() -> None:
    found = [one for cell in ("raw", *CALIBRATED_LAYERS) for one in episodes(cell, [1.0] * 11)]
    report = reports_of(found)["Stack"]
    said = conclusions(report)
    assert report.layers_needed is None
    assert "Unfinished: 11 of 50 scenes." in said
    assert any(line.startswith("With no number of calibrated layers do these scenes exclude a loss") for line in said)
    whole = reports_of([one for cell in ("raw", "naive") for one in episodes(cell, [1.0] * 50)])["Stack"]
    assert "Unfinished" not in " ".join(conclusions(whole))
    pooled = reports_of(found + episodes("raw", [1.0] * 11, "Door"))
    assert POOLED not in pooled
    both = reports_of(episodes("raw", [1.0] * 11) + episodes("raw", [1.0] * 9, "Door"))[POOLED]
    assert "Unfinished: 18 of 100 scenes." in conclusions(both)


def test_a_whole_run_is_that_of_the_command() -> None:
    assert RolloutConfig().episodes == SCENES


def test_a_cell_is_summed_up_over_its_episodes() -> None:
    report = reports_of(episodes("raw", [1.0, 2.0, 9.0, None], failed=(2,), tracking=0.5))["Stack"].cells["raw"]
    assert report.success == Rate.of(3, 4)
    assert report.reached == Rate.of(4, 4)
    assert report.steps == 101.5
    assert report.tracking_mm == (0.5, 1.0, 1.5)
    # Of the solved ones alone.
    assert report.precision_mm == pytest.approx(tuple(np.percentile([1.0, 2.0], [50, 90, 95, 100])))


def test_only_scenes_that_all_cells_have_finished_are_compared() -> None:
    found = episodes("raw", [1.0] * 5) + episodes("naive", [1.0] * 3) + episodes("raw", [1.0], "Lift")
    assert {(one.task, one.cell, one.index) for one in common_scenes(found)} == {
        *(("Stack", cell, index) for cell in ("raw", "naive") for index in range(3)),
        ("Lift", "raw", 0),
    }
    with pytest.raises(EvidenceError, match="no scene is finished in all cells yet"):
        reports_of([*episodes("raw", [1.0])[:1], *episodes("naive", [1.0, 1.0])[1:]])


def test_tasks_with_the_same_cells_are_pooled_over_the_scenes_that_all_have() -> None:
    both = episodes("raw", [1.0] * 3, failed=(0,)) + episodes("raw", [1.0] * 3, "Lift")
    assert reports_of(both)[POOLED].cells["raw"].success == Rate.of(5, 6)
    assert reports_of(both + episodes("raw", [1.0] * 4, "Door"))[POOLED].cells["raw"].success == Rate.of(8, 9)
    assert POOLED not in reports_of(both + episodes("naive", [1.0] * 3, "Door"))


def test_precision_is_pooled_where_every_task_has_a_measure_of_it() -> None:
    stack, can, lift = (episodes("raw", [1.0, 8.0], task) for task in ("Stack", "PickPlaceCan", "Lift"))
    pooled = reports_of(stack + can)[POOLED].cells["raw"]
    assert pooled.tolerances[TOLERANCES.index(5.0)] == Rate.of(2, 4)
    assert reports_of(stack + lift)[POOLED].cells["raw"].tolerances == ()


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    with open_episodes(tmp_path / "episodes.jsonl", IDENTITY) as file:
        for episode in episodes("raw", [1.0] * 3) + episodes("naive", [3.0, None, 2.0]):
            file.append(episode)
    write_report(tmp_path / "episodes.jsonl", tmp_path)

    found = RolloutResult.read(tmp_path / "rollout.json").tasks

    assert found["Stack"].cells["naive"].success == Rate.of(3, 3)
    tables = tables_of(found)
    assert found == reports_of(episodes("raw", [1.0] * 3) + episodes("naive", [3.0, None, 2.0]))
    assert tables["success"].header == ("cell", "Stack (n = 3)")
    assert tables["success"].rows[1] == ("naive", "100% (44% … 100%)")
    assert tables["tracking"].header[0] == tables["tolerance"].header[0] == "Stack (n = 3)"
    assert [row[0] for row in tables["tolerance"].rows] == ["raw", "naive"]
    (tmp_path / "rollout.json").write_text("{}")
    with pytest.raises(EvidenceError, match=r"write it anew with `python rfsq_ref/rollout.py --report-only`"):
        RolloutResult.read(tmp_path / "rollout.json")


def test_the_report_does_not_depend_on_the_order_in_which_episodes_ended() -> None:
    found = episodes("raw", [1.0] * 4) + episodes("naive", [3.0] * 4) + episodes("a peer", [3.0] * 4)
    mixed = [found[index] for index in np.random.default_rng(0).permutation(len(found))]
    assert table(reports_of(mixed)) == table(reports_of(found))
    assert list(reports_of(mixed)["Stack"].cells) == ["raw", "naive", "a peer"]


def test_tables_say_how_many_scenes_each_column_has() -> None:
    found = [
        *(one for cell in ("raw", "calibrated, L0", "naive", "calibrated, all") for one in episodes(cell, [1.0] * 11)),
        *(
            one
            for cell in ("raw", "calibrated, L0", "naive", "calibrated, all")
            for one in episodes(cell, [1.0] * 10, "PickPlaceCan", failed=(0, 1) if "L0" in cell else ())
        ),
    ]
    tables = tables_of(reports_of(found))
    columns = ("Stack (n = 11)", "PickPlaceCan (n = 10)", "all tasks (n = 20)")
    assert tables["success"].header == ("cell", *columns)
    assert tables["paired"].header == ("cells", *columns)
    assert [row[0] for row in tables["paired"].rows] == [
        "calibrated, all less naive",
        "calibrated, L0 less raw",
        "calibrated, all less raw",
    ]
    assert re.fullmatch(r"−20\.0 \[−\d+\.\d, \+\d+\.\d\], p = 0\.500", tables["paired"].rows[1][2])
    assert tables["tracking"].header[0] == tables["tolerance"].header[0] == "all tasks (n = 20)"


def test_tasks_with_different_cells_have_dashes_where_one_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [
        *episodes("raw", [1.0] * 3),
        *episodes("a peer", [1.0] * 3),
        *episodes("raw", [None] * 2, "Door"),
        *episodes("naive", [None] * 2, "Door"),
    ]
    tables = tables_of(reports_of(found))
    assert [(row[0], *("–" if text == "–" else "rate" for text in row[1:])) for row in tables["success"].rows] == [
        ("raw", "rate", "rate"),
        ("naive", "–", "rate"),
        ("a peer", "rate", "–"),
    ]
    assert [row[0] for row in tables["tracking"].rows] == [
        "Stack (n = 3), raw", "Stack (n = 3), a peer", "Door (n = 2), raw", "Door (n = 2), naive",
    ]  # fmt: skip
    assert [row[0] for row in tables["tolerance"].rows] == ["Stack (n = 3), raw", "Stack (n = 3), a peer"]
    from rfsq.evidence.rollout_plots import draw

    draw(reports_of(found), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_report_is_strict_json_with_what_it_came_from_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with open_episodes(tmp_path / "episodes.jsonl", IDENTITY) as file:
        for one in (
            episodes("raw", [1.0] * 4)
            + episodes("naive", [3.0, None, 3.0, 3.0])
            + episodes("raw", [None] * 2, "Door")
            + episodes("naive", [None] * 2, "Door")
        ):
            file.append(one)
    text, _ = write_report(tmp_path / "episodes.jsonl", tmp_path / "results")
    content = json.loads((tmp_path / "results" / "rollout.json").read_text())
    assert content["run"]["versions"] == {"robosuite": "1.5.2"}
    assert content["run"]["seed"] == 0
    cell = content["tasks"]["Stack"]["cells"]["naive"]
    assert cell["success"] == {"successes": 4, "n": 4, "rate": 1.0, "low": pytest.approx(0.5101, abs=1e-4), "high": 1.0}
    assert [rate["successes"] for rate in cell["tolerances"]] == [
        3 if mm >= 3 else 0 for mm in content["tolerances_mm"]
    ]
    assert (tmp_path / "results" / "rollout.png").read_bytes().startswith(b"\x89PNG")
    assert "100% (51% … 100%)" in text
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["rollout.json", "rollout.png"]


def test_a_picture_that_cannot_be_drawn_leaves_nothing_and_no_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    with open_episodes(tmp_path / "episodes.jsonl", IDENTITY) as file:
        for one in episodes("raw", [1.0] * 2):
            file.append(one)

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(EvidenceError, match=r"cannot write .*rollout\.png: No space left on device"):
        write_report(tmp_path / "episodes.jsonl", tmp_path / "results")
    assert not (tmp_path / "results").exists()
