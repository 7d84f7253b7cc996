"""JSON becomes the dataclasses that it is declared to be, or is refused by the name of the place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from rfsq.runtime.bundle.reading import build


@dataclass(frozen=True)
class Part:
    name: str
    size: float | None
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    facts: Mapping[str, float | str]
    pair: tuple[int, bool] = (1, True)


GOOD: dict[str, Any] = {
    "parts": [{"name": "x", "size": 1, "kind": "b"}, {"name": "y", "size": None}],
    "facts": {"speed": 2, "by": "hand"},
    "pair": [3, False],
}


def test_content_is_built_as_it_is_declared() -> None:
    found = build(Whole, GOOD, "it")
    assert found == Whole((Part("x", 1.0, "b"), Part("y", None)), {"speed": 2.0, "by": "hand"}, (3, False))
    assert type(found.parts[0].size) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {}}, r"it\.parts is \{\}; expected a list"),
        ({"parts": [{"name": 1, "size": 1.0}]}, r"it\.parts\[0\]\.name is 1; expected text"),
        ({"parts": [{"name": "x"}]}, r"it\.parts\[0\] lacks the keys \['size'\]"),
        ({"parts": [{"name": "x", "size": 1.0, "kind": "c"}]}, "expected one of a, b"),
        ({"facts": {"speed": []}}, r"it\.facts\[.*speed.*\] is \[\]; expected text"),
        ({"pair": [1]}, r"it\.pair is \[1\]; expected a list of 2"),
        ({"pair": [True, True]}, r"it\.pair\[0\] is True; expected an integer"),
        ({"more": 1}, "unknown keys"),
    ],
)
def test_anything_else_is_refused_by_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Whole, GOOD | change, "it")


def test_one_spelling_alone_is_taken_where_files_have_one() -> None:
    exact = GOOD | {"parts": [{"name": "x", "size": 1.0}], "facts": {"speed": 2.0}}
    assert build(Whole, exact, "it", is_exact=True).parts[0].size == 1.0
    for part in ({"name": "x", "size": 1}, {"name": "x", "size": None}):
        with pytest.raises(ValueError, match=r"size is .*; expected a number"):
            build(Whole, exact | {"parts": [part]}, "it", is_exact=True)
