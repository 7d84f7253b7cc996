"""Settings from numpy, of joints that are locked, and with gaps."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime import ControlConfig
from rfsq.runtime.control.errors import ControlConfigError
from rfsq.runtime.control.guard import ActionGuard

DOCUMENT = Path(__file__).parents[3] / "docs" / "control_loop.md"
VALUES: dict[str, Any] = {
    "period_s": 0.05,
    "action_low": [-1.0, -2.0, 0.0],
    "action_high": [1.0, 2.0, 0.125],
    "max_relative_step": [0.25, 0.5, float("inf")],
    "action_kind": ["delta", "absolute", "delta"],
    "gripper": [2],
}


# --- numpy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, object])
def test_arrays_and_numbers_of_numpy_are_taken_as_pythons_own(dtype: Any) -> None:
    given: dict[str, Any] = {
        **{name: np.array(VALUES[name], dtype) for name in ("action_low", "action_high", "max_relative_step")},
        "period_s": np.float32(0.25),
        "action_kind": np.array(VALUES["action_kind"]),
        "gripper": np.array([2]),
        "range_tolerance": np.array([0.0, 0.5, 1.0], np.float32),
        "max_consecutive_faults": np.int64(7),
        "deadline_us": np.int32(500),
        "pause_gc": np.bool_(False),
    }
    config = ControlConfig(**given)
    assert config == ControlConfig(
        **{**VALUES, "period_s": 0.25},
        range_tolerance=(0.0, 0.5, 1.0),
        max_consecutive_faults=7,
        deadline_us=500,
        pause_gc=False,
    )
    assert {type(number) for number in config.action_low + config.max_relative_step} == {float}
    assert [type(config.period_s), type(config.max_consecutive_faults), type(config.gripper[0])] == [float, int, int]
    # As a flight record keeps it.
    assert ControlConfig.from_values(json.loads(json.dumps(config.to_values()))) == config


def test_lists_of_numbers_of_numpy_are_taken() -> None:
    config = ControlConfig(**{**VALUES, "action_low": [np.float32(-1), np.int8(-2), 0]})
    assert config.action_low == (-1.0, -2.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_low": np.full(2, -1.0)}, "action_high has 3 values and action_low 2"),
        ({"action_high": np.ones((3, 1))}, r"action_high\[0\] is \[1.0\]; expected a number"),
        ({"action_high": np.float64(1.0)}, "action_high is 1.0; expected a list"),
        ({"action_low": np.array([True, False, True])}, r"action_low\[0\] is True; expected a number"),
        ({"action_low": np.array(["-1", "-2", "0"])}, r"action_low\[0\] is '-1'; expected a number"),
        ({"action_low": np.array([1j, 0, 0])}, r"action_low\[0\] is 1j; expected a number"),
        ({"action_low": np.ma.array([-1.0, -2.0, 0.0], mask=[0, 1, 0])}, r"action_low\[1\] is None"),
        ({"max_consecutive_faults": np.bool_(True)}, "max_consecutive_faults is True"),
        ({"max_consecutive_faults": np.float64(5)}, "max_consecutive_faults is 5.0; expected an integer"),
        ({"gripper": np.array([2.0])}, r"gripper\[0\] is 2.0; expected an integer"),
        ({"range_tolerance": np.array([0.1])}, "range_tolerance has 1 values and action_low 3"),
    ],
)
def test_arrays_that_make_no_sense_are_refused_as_lists_are(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig(**{**VALUES, **change})


# --- gaps -------------------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_listed() -> None:
    with pytest.raises(ControlConfigError) as caught:
        ControlConfig(0.02, action_high=(1.0,))  # type: ignore[call-arg]
    assert str(caught.value) == (
        "ControlConfig: action_low, max_relative_step, action_kind missing; there is no safe default: set them"
    )
    with pytest.raises(ControlConfigError, match=r"^robot.toml: period_s, action_low, .* missing"):
        ControlConfig.from_values({}, "robot.toml")
    # What no setting is called stays an error of the call.
    with pytest.raises(TypeError, match="speed"):
        ControlConfig(**VALUES, speed=1)


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize("values", [None, [], "period_s", {**VALUES, 5: 1, None: 2}], ids=str)
def test_what_are_no_settings_is_refused(values: Any) -> None:
    with pytest.raises(ControlConfigError, match=r"expected a dict|unknown keys 5, None"):
        ControlConfig.from_values(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_low": ENDLESS}, r"action_low\[0\] is .*; expected a number"),
        ({"action_low": np.array([[None]], object)}, r"action_low\[0\] is .*; expected a number"),
        ({"gripper": ENDLESS}, r"gripper\[0\] is .*; expected an integer"),
        ({"range_tolerance": "0.1"}, "range_tolerance is '0.1'; expected a list or a number"),
        ({"range_tolerance": None}, "range_tolerance is None; expected a list or a number"),
        ({"range_tolerance": [0.1, "0.1", 0.1]}, r"range_tolerance\[1\] is '0.1'; expected a number: correct"),
        ({"record_folder": ""}, "record_folder is ''; expected the name of a"),
        ({"record_folder": "a\0b"}, "record_folder is .*; expected the name of a"),
    ],
)
def test_what_no_setting_can_be_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig.from_values({**VALUES, **change})


def test_settings_can_be_copied_and_are_replaced_in_part() -> None:
    config = ControlConfig(**VALUES, range_tolerance=(0.0, 0.1, 0.2))
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config, range_tolerance=0.05).tolerances == ControlConfig(**VALUES).tolerances


# --- the tolerance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), True, "0.1", None, [0.1, -0.1, 0.1], [0.1, "x", 0.1]])
def test_a_tolerance_is_a_part_of_the_range(value: Any) -> None:
    with pytest.raises(ControlConfigError, match="range_tolerance"):
        ControlConfig(**VALUES, range_tolerance=value)


def test_a_tolerance_is_for_all_dimensions_or_for_each() -> None:
    assert ControlConfig(**VALUES, range_tolerance=0.25).tolerances == (0.5, 1.0, 0.03125)
    assert ControlConfig(**VALUES, range_tolerance=[0.0, 0.25, 1]).tolerances == (0.0, 1.0, 0.125)
    assert ControlConfig(**VALUES).to_values()["range_tolerance"] == 0.05


# --- locked joints ----------------------------------------------------------------------------------------------------


@given(place=st.floats(-1e30, 1e30), step=st.sampled_from([0.0, 0.1, float("inf")]), is_gripper=st.booleans())
def test_a_dimension_with_equal_limits_is_held_where_float32_can_hold_it(
    place: float, step: float, is_gripper: bool
) -> None:
    config = ControlConfig(
        **{
            **VALUES,
            "action_low": [-1.0, place, 0.0],
            "action_high": [1.0, place, 0.125],
            "max_relative_step": [0.25, step, 1.0],
            "gripper": [1, 2] if is_gripper else [2],
        }
    )
    nearest = float(np.float32(place))
    assert config.action_low[1] == config.action_high[1] == nearest
    assert config.locked == (1,)
    assert ActionGuard(config, 4, (0.0, place, 0.0)).sent[1] == nearest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_low": [0.5, -2.0, 0.0], "action_high": [0.5, 2.0, 0.125]}, "expected 0 among them"),
        ({"action_low": [-1.0, 2.5, 0.0]}, "the lower below the upper, or equal for a dimension that is locked"),
        ({"action_low": [-1.0, 0.7, 0.0], "action_high": [1.0, 0.7 + 1e-12, 0.125]}, "between which no float32 lies"),
        (
            {"action_low": [-1.0, 2.0, 0.0], "max_relative_step": [0.25, -1.0, 1.0]},
            "max_relative_step of dimension 1 is -1.0",
        ),
        (
            {"action_low": [-1.0, 2.0, 0.0], "max_relative_step": [0.25, float("nan"), 1.0]},
            "max_relative_step of dimension 1 is nan",
        ),
    ],
)
def test_what_cannot_be_locked_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig(**{**VALUES, **change})


def test_a_motion_is_locked_at_standing_still() -> None:
    config = ControlConfig(**{**VALUES, "action_low": [0, -2, 0], "action_high": [0, 2, 0.125]})
    assert config.locked == (0,)


def test_the_settings_of_the_document_are_settings(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    # A table comes after what is in none.
    text = "\n".join(sorted(blocks, key=lambda block: block.startswith("[")))
    path = tmp_path / "robot.toml"
    path.write_text(text, encoding="utf-8")
    config = ControlConfig.from_toml(path)
    assert len(blocks) == 2
    assert config.beliefs is not None
    assert (config.gripper, config.beliefs.when_uncertain) == ((6,), "slow")
