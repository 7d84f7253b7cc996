"""What `evidence.rollout_report` promises: the intervals of Wilson's formula, and words that follow from them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from evidence.closed_loop import EpisodeResult, Spread
from evidence.episodes import Episode, Identity, open_episodes
from evidence.errors import EvidenceError
from evidence.rollout_report import (
    CALIBRATED_LAYERS,
    POOLED,
    TOLERANCES,
    Rate,
    common_scenes,
    read_report,
    reports_of,
    solved_within,
    table,
    tables_of,
    wilson,
    write_report,
)

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


# Tolerances ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=30), st.sets(st.integers(0, 29)))
def test_a_looser_tolerance_never_solves_less_and_never_more_than_was_solved(
    off: list[float | None], failed: set[int]
) -> None:
    found = episodes("raw", off, failed=tuple(failed))
    counts = [solved_within(found, tolerance).successes for tolerance in (*TOLERANCES, 1e9)]
    assert counts == sorted(counts)
    assert counts[-1] == sum(mm is not None and index not in failed for index, mm in enumerate(off))


def test_the_largest_tolerance_that_separates_is_found() -> None:
    naive, calibrated = episodes("naive", [6.0] * 50), episodes("calibrated, all", [1.2] * 50)
    report = reports_of(naive + calibrated)["Stack"]
    assert report.separated_by_success is False
    # At 5 mm naive solves nothing any more; at 7.5 mm both solve everything.
    assert report.separating_mm == 5.0


def test_a_naive_cell_that_is_better_does_not_count_as_separated() -> None:
    report = reports_of(episodes("naive", [1.0] * 50) + episodes("calibrated, all", [6.0] * 50))["Stack"]
    assert report.separating_mm is None
    assert "At no tolerance do their intervals come apart." in table({"Stack": report})


def test_tasks_without_a_measure_have_no_tolerances() -> None:
    report = reports_of(episodes("naive", [None] * 9, "Lift") + episodes("calibrated, all", [None] * 9, "Lift"))["Lift"]
    assert report.cells["naive"].tolerances == ()
    assert report.cells["naive"].precision_mm is None
    assert report.separating_mm is None


# Layers and cells ----------------------------------------------------------------------------------------------------


def test_the_fewest_layers_that_reach_raw_actions() -> None:
    found = episodes("raw", [1.0] * 50)
    for name, failures in zip(CALIBRATED_LAYERS, (40, 20, 1, 0, 0), strict=True):
        found += episodes(name, [1.0] * 50, failed=tuple(range(failures)))
    assert reports_of(found)["Stack"].layers_needed == CALIBRATED_LAYERS[2]
    assert reports_of(episodes(CALIBRATED_LAYERS[0], [1.0]))["Stack"].layers_needed is None


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

    found = read_report(tmp_path / "rollout.json")

    assert found["Stack"].cells["naive"].success == Rate.of(3, 3)
    tables = tables_of(found)
    assert tables["success"].rows[1] == ("naive", "100% (44% … 100%)")
    assert [row[0] for row in tables["tolerance"].rows] == ["raw", "naive"]
    (tmp_path / "rollout.json").write_text("{}")
    with pytest.raises(EvidenceError, match=r"write it anew with `python rfsq_ref/rollout.py --report-only`"):
        read_report(tmp_path / "rollout.json")


def test_the_report_does_not_depend_on_the_order_in_which_episodes_ended() -> None:
    found = episodes("raw", [1.0] * 4) + episodes("naive", [3.0] * 4) + episodes("a peer", [3.0] * 4)
    mixed = [found[index] for index in np.random.default_rng(0).permutation(len(found))]
    assert table(reports_of(mixed)) == table(reports_of(found))
    assert list(reports_of(mixed)["Stack"].cells) == ["raw", "naive", "a peer"]


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
    text = write_report(tmp_path / "episodes.jsonl", tmp_path / "results")
    content = json.loads((tmp_path / "results" / "rollout.json").read_text())
    assert content["run"]["versions"] == {"robosuite": "1.5.2"}
    assert content["run"]["seed"] == 0
    cell = content["tasks"]["Stack"]["cells"]["naive"]
    assert cell["success"] == {"successes": 4, "n": 4, "rate": 1.0, "low": pytest.approx(0.5101, abs=1e-4), "high": 1.0}
    assert [rate["successes"] for rate in cell["tolerances"]] == [
        3 if mm >= 3 else 0 for mm in content["tolerances_mm"]
    ]
    assert (tmp_path / "results" / "rollout.png").read_bytes().startswith(b"\x89PNG")
    assert "4/4 100.0 % [51.0, 100.0]" in text
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["rollout.json", "rollout.png"]
