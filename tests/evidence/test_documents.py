"""Every number in a table of the README and the docs comes from a result file."""

import pytest

from rfsq.evidence.documents import RESULTS, ROOT, documents, rewritten, tables
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.results import read_json


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
    comparison = read_json(RESULTS / "comparison.json")
    for label, place in {"L0–L2": 0, "all": 2}.items():
        errors = [
            comparison.scheme(name).groups[place].metrics["action_mse"].values[0]
            for name in ("naive", "recovered", "calibrated")
        ]
        shown = " | ".join(f"{error:.1e}".replace("e-0", "e-") for error in errors)
        assert f"| action MSE on held-out episodes, {label} | {shown} |" in text
