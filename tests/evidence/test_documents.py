"""Every number in a table of the README and the docs comes from a result file, and a first look fits a screen."""

import pytest

from rfsq.calibration.study_report import format_study
from rfsq.calibration.study_result import result_from_json
from rfsq.evidence.documents import RESULTS, ROOT, documents, rewritten, tables
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.report import short_text
from rfsq.evidence.results import Comparison
from rfsq.evidence.rollout_report import RolloutResult, short_table


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_documents_show_the_results_as_they_are(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text(encoding="utf-8")

    assert rewritten(text, tables()) == text


def test_the_readme_takes_its_comparison_from_the_results() -> None:
    readme = next(path for path in documents() if path.name == "README.md")

    assert "<!-- results: comparison -->" in readme.read_text(encoding="utf-8")


def test_a_table_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- results: one -->\nold\nrows\n<!-- end -->\nafter <!-- end -->"

    assert rewritten(text, {"one": "new"}) == "before\n<!-- results: one -->\nnew\n<!-- end -->\nafter <!-- end -->"
    assert rewritten(rewritten(text, {"one": "new"}), {"one": "new"}) == rewritten(text, {"one": "new"})


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(EvidenceError, match=r"no result is called 'two'; expected one of one"):
        rewritten("<!-- results: two -->\n<!-- end -->", {"one": ""})


def test_the_guide_to_integration_has_the_errors_of_the_embedded_seed() -> None:
    text = (ROOT / "docs" / "integration.md").read_text(encoding="utf-8")
    comparison = Comparison.read(RESULTS / "comparison.json")
    for label, place in {"L0–L2": 0, "all": 2}.items():
        errors = [
            comparison.scheme(name).groups[place].metrics["action_mse"].values[0]
            for name in ("naive", "recovered", "calibrated")
        ]
        shown = " | ".join(f"{error:.1e}".replace("e-0", "e-") for error in errors)
        assert f"| action MSE on held-out episodes, {label} | {shown} |" in text


def test_what_commands_print_at_first_fits_a_screen() -> None:
    study = result_from_json((RESULTS / "calibration.json").read_text(encoding="utf-8"))
    shown = {
        "compare": short_text(Comparison.read(RESULTS / "comparison.json")),
        "rollout": short_table(RolloutResult.read(RESULTS / "rollout.json").tasks),
        "study": format_study(study, is_verbose=False),
    }
    # A line that says what begins, and the verdict.
    assert {name for name, text in shown.items() if len(text.splitlines()) > 24 - 2} == set()
    assert {name for name, text in shown.items() if max(map(len, text.splitlines())) > 100} == set()
