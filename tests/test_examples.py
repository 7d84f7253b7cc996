"""The examples in docstrings run, and give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("runtime", "rfsq_ref", "calibration", "evidence", "export")
WITH_EXAMPLES = sorted(
    path.relative_to(ROOT)
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=str)
def test_examples_give_what_they_say(path: Path) -> None:
    found = doctest.testmod(import_module(".".join(("rfsq", *path.with_suffix("").parts))))
    assert found.attempted
    assert not found.failed
