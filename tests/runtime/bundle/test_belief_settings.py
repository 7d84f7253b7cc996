"""Settings of beliefs stay as they are in a file, scale what is told, and are refused where they cannot be meant."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime import BeliefSettings, InvalidInputError, load_belief_settings
from rfsq.runtime.bundle.beliefs import Belief

POSITIVE = st.floats(1e-12, 1e12)
SETTINGS = BeliefSettings((1.5, 2.0), {"expected": (0.5, 2.0)})


@given(
    st.lists(POSITIVE, min_size=1, max_size=5),
    st.dictionaries(st.sampled_from(["expected", "likeliest mode"]), st.lists(POSITIVE, min_size=1, max_size=3)),
)
def test_a_file_gives_back_the_settings(
    tmp_path_factory: pytest.TempPathFactory, temperature: list[float], scales: dict[str, list[float]]
) -> None:
    settings = BeliefSettings(tuple(temperature), {mode: tuple(scale) for mode, scale in scales.items()})
    path = tmp_path_factory.mktemp("settings") / "beliefs.json"
    path.write_text(settings.text(), encoding="utf-8")
    assert load_belief_settings(path) == settings


def belief(size: int = 2) -> Belief[Any]:
    ones = np.ones((3, 4, size), np.float32)
    return Belief(ones, ones, np.ones(3, np.float32), np.zeros(3, np.int32))


def test_scales_multiply_std_and_nothing_else() -> None:
    found = SETTINGS.scaled(belief(), "expected")
    assert found.std.dtype == np.float32
    np.testing.assert_array_equal(found.std, np.broadcast_to(np.float32([0.5, 2.0]), (3, 4, 2)))
    np.testing.assert_array_equal(found.actions, belief().actions)


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [(2, "likeliest mode", "'likeliest mode': none; expected 2"), (3, "expected", "2 of them; expected 3")],
)
def test_scales_of_another_mode_or_robot_are_refused(size: int, mode: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SETTINGS.scaled(belief(size), mode)


NO_NUMBERS: list[Any] = [
    *([1.0, number] for number in (0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-60)),
    *((), None, 1.5, "12", ("1",), (True,), [[1.0]], [None], {"a": 1.0}, 10**400, [10**400]),
]


@pytest.mark.parametrize("numbers", NO_NUMBERS, ids=repr)
def test_what_are_no_scales_is_refused(numbers: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"temperature is .*expected"):
        BeliefSettings(numbers, {})
    with pytest.raises(InvalidInputError, match=r"std_scale of 'expected' is .*expected"):
        BeliefSettings((1.0,), {"expected": numbers})


@pytest.mark.parametrize("scales", [None, [("expected", (1.0,))], {"expcted": (1.0,)}])
def test_scales_of_no_mode_are_refused(scales: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"std_scale (is|has) .*; expected"):
        BeliefSettings((1.0,), scales)


def test_settings_are_nobody_else_s() -> None:
    temperature, scale = np.ones(2, np.float32), [0.5]
    settings = BeliefSettings(temperature, {"expected": scale})  # type: ignore[arg-type, dict-item]
    temperature[0], scale[0] = 9, -5
    assert settings == BeliefSettings((1.0, 1.0), {"expected": (0.5,)})
    with pytest.raises(TypeError):
        settings.std_scale["sample"] = (1.0,)  # type: ignore[index]


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        json.dumps({"format": "another", "temperature": [1.0], "std_scale": {}}),
        json.dumps({"temperature": [1.0], "std_scale": {}}),
        json.dumps({"format": "rfsq-belief-settings", "temperature": [1.0]}),
        json.dumps({"format": "rfsq-belief-settings", "temperature": ["1"], "std_scale": {}}),
        json.dumps({"format": "rfsq-belief-settings", "temperature": [1.0], "std_scale": {}, "more": 1}),
        json.dumps({"format": "rfsq-belief-settings", "temperature": [-1.0], "std_scale": {}}),
        json.dumps({"format": "rfsq-belief-settings", "temperature": [1.0], "std_scale": {"expcted": [1.0]}}),
    ],
)
def test_files_that_hold_none_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "beliefs.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"holds no settings of beliefs: .*; write them with"):
        load_belief_settings(path)
    with pytest.raises(InvalidInputError, match="holds no settings of beliefs"):
        load_belief_settings(tmp_path / "nothing.json")
