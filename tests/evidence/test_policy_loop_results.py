"""What policies achieved in the loop stays as it is in a file, and documents do without it."""

from pathlib import Path

from rfsq.calibration.tables import Table
from rfsq.evidence.policy_loop_results import EXPERT, LoopReport, LoopRun, PolicyLoopResults, parts, table

REPORTS = (
    LoopReport("Lift", EXPERT, None, None, None, (LoopRun(None, 2, ((0, 40), (1, 60)), None),)),
    LoopReport("Lift", "some tokens", 4, 8, "expected", (LoopRun(0, 2, ((1, 70),), 0.1), LoopRun(1, 2, (), 0.2))),
    LoopReport("Stack", EXPERT, None, None, None, (LoopRun(None, 2, (), None),)),
)
RESULTS = PolicyLoopResults({"Lift": 5, "Stack": 4}, 1.5, 400, "CPU", {"torch": "2"}, {"steps": 3}, REPORTS)


def test_a_file_gives_back_the_results(tmp_path: Path) -> None:
    RESULTS.write(tmp_path / "loop.json")
    assert PolicyLoopResults.read(tmp_path / "loop.json") == RESULTS


def test_rates_are_of_all_seeds_with_their_intervals_and_steps_of_what_was_solved() -> None:
    found = table(RESULTS)
    assert found.header == (
        "what a policy says",
        "decoded",
        "tokens",
        "steps executed",
        "Lift",
        "Stack",
        "Lift, steps",
        "Stack, steps",
        "Lift, error",
        "Stack, error",
    )
    assert found.rows == (
        (EXPERT, "–", "–", "–", str(REPORTS[0].rate), str(REPORTS[2].rate), "50", "–", "–", "–"),
        ("some tokens", "expected", "4", "8", str(REPORTS[1].rate), "–", "70", "–", "0.150", "–"),
    )
    assert str(REPORTS[1].rate).startswith("25% (")


def test_documents_say_on_what_and_how_often() -> None:
    found = parts(RESULTS)
    assert found["policy loop driven"] == (
        "Trained on one CPU, on 5 of Lift and 4 of Stack episodes; driven with 2 seeds each on 2 scenes of each task."
    )
    assert isinstance(found["policy loop"], Table)


def test_before_anything_was_driven_documents_have_no_table() -> None:
    assert parts(None) == dict.fromkeys(parts(RESULTS), "")


def test_while_only_the_expert_was_driven_nothing_is_said_of_policies() -> None:
    results = PolicyLoopResults({"Lift": 5}, 1.5, 400, "CPU", {}, {}, REPORTS[:1])
    assert parts(results)["policy loop driven"] == "Trained on one CPU, on 5 of Lift episodes."
