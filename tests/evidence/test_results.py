"""A comparison is written and read back as what it was, or refused."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.results import Comparison, Spread


def test_what_is_written_is_read_back_equal(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "comparison.json"

    comparison.write(path)

    assert Comparison.read(path) == comparison
    assert [entry.name for entry in path.parent.iterdir()] == ["comparison.json"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_a_spread_is_mean_and_sample_deviation(values: list[float]) -> None:
    spread = Spread.of(values)
    mean = math.fsum(values) / len(values)

    assert spread.mean == pytest.approx(mean, abs=1e-6)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert spread.deviation == pytest.approx(deviation, rel=1e-6, abs=1e-6)


def test_one_value_has_no_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 0.0, (3.0,))


def _without(fields: dict[str, object]) -> None:
    del fields["peers"]


def _wrong_type(fields: dict[str, object]) -> None:
    fields["improvement"] = "much"


def _other_version(fields: dict[str, object]) -> None:
    fields["format_version"] = 99


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_without, "damaged"), (_wrong_type, "damaged: .* is 'much'; expected a number"), (_other_version, "99")],
)
def test_another_file_is_refused(comparison: Comparison, tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "comparison.json"
    comparison.write(path)
    fields = json.loads(path.read_text())
    damage(fields)  # type: ignore[operator]
    path.write_text(json.dumps(fields))

    with pytest.raises(EvidenceError, match=message):
        Comparison.read(path)


def test_a_missing_or_torn_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"write it with `python rfsq_ref/compare.py`"):
        Comparison.read(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format": ')
    with pytest.raises(EvidenceError, match="cannot read"):
        Comparison.read(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(EvidenceError, match="expected"):
        Comparison.read(tmp_path / "list.json")


def test_what_cannot_be_written_leaves_nothing(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(EvidenceError, match="choose a writable folder"):
        comparison.write(tmp_path / "file" / "comparison.json")
    assert (tmp_path / "file").read_text() == "in the way"
