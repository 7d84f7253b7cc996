"""Settings of beliefs stay as they are in a file, scale what is told, and are refused where they cannot be meant."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime import BeliefSettings, InvalidInputError, load_belief_settings
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.bundle.errors import FingerprintError

POSITIVE = st.floats(1e-12, 1e12)
KIND = BeliefKind("0123456789abcdef" * 4, "tokens", 2, 1)
SETTINGS = BeliefSettings(KIND, (1.5, 2.0), {"expected": (0.5, 2.0)})


@given(
    st.lists(POSITIVE, min_size=1, max_size=5),
    st.dictionaries(st.sampled_from(["expected", "likeliest mode"]), st.lists(POSITIVE, min_size=1, max_size=3)),
    st.sampled_from(["tokens", "classes and bits"]),
)
def test_a_file_gives_back_the_settings(
    tmp_path_factory: pytest.TempPathFactory, temperature: list[float], scales: dict[str, list[float]], form: Any
) -> None:
    kind = replace(KIND, form=form)
    settings = BeliefSettings(kind, tuple(temperature), {mode: tuple(scale) for mode, scale in scales.items()})
    path = tmp_path_factory.mktemp("settings") / "beliefs.json"
    path.write_text(settings.text(), encoding="utf-8")
    assert load_belief_settings(path) == settings


def test_settings_hold_for_what_they_were_fitted_to_and_for_nothing_else() -> None:
    SETTINGS.check(replace(KIND))
    with pytest.raises(FingerprintError, match=r"of the tokenizer 0123456789abcdef, and this one is 0{16}: fit them"):
        SETTINGS.check(replace(KIND, fingerprint="0" * 64))
    for other, words in (
        (replace(KIND, form="classes and bits"), "classes and bits, l = 2, the first 1 of them the mode"),
        (replace(KIND, length=3), "tokens, l = 3, the first 1 of them the mode"),
        (replace(KIND, coarse=2), "tokens, l = 2, the first 2 of them the mode"),
        (replace(KIND, coarse=0), "tokens, l = 2"),
    ):
        with pytest.raises(InvalidInputError, match=f"what is decoded is {words}: fit them again"):
            SETTINGS.check(other)


def test_scales_are_those_of_the_mode_and_of_the_robot() -> None:
    scale = SETTINGS.scale("expected", 2)
    assert scale.dtype == np.float32
    assert scale.tolist() == [0.5, 2.0]
    with pytest.raises(InvalidInputError, match="0 scales of std for 'likeliest mode'; expected 2"):
        SETTINGS.scale("likeliest mode", 2)
    with pytest.raises(InvalidInputError, match="2 scales of std for 'expected'; expected 3"):
        SETTINGS.scale("expected", 3)


NO_NUMBERS: list[Any] = [
    *([1.0, number] for number in (0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-60)),
    *((), None, 1.5, "12", ("1",), (True,), [True, 2.0], [[1.0]], [None], {"a": 1.0}, 10**400, [10**400]),
]


@pytest.mark.parametrize("numbers", NO_NUMBERS, ids=repr)
def test_what_are_no_scales_is_refused(numbers: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"temperature is .*expected"):
        BeliefSettings(KIND, numbers, {})
    with pytest.raises(InvalidInputError, match=r"std_scale of 'expected' is .*expected"):
        BeliefSettings(KIND, (1.0,), {"expected": numbers})


@pytest.mark.parametrize("scales", [None, [("expected", (1.0,))], {"expcted": (1.0,)}])
def test_scales_of_no_mode_are_refused(scales: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"std_scale (is|has) .*; expected"):
        BeliefSettings(KIND, (1.0,), scales)


def test_settings_are_nobody_else_s() -> None:
    temperature, scale = np.ones(2, np.float32), [0.5]
    settings = BeliefSettings(KIND, temperature, {"expected": scale})  # type: ignore[arg-type, dict-item]
    temperature[0], scale[0] = 9, -5
    assert settings == BeliefSettings(KIND, (1.0, 1.0), {"expected": (0.5,)})
    with pytest.raises(TypeError):
        settings.std_scale["sample"] = (1.0,)  # type: ignore[index]


@pytest.mark.parametrize(
    "changed",
    [
        *({"fingerprint": wrong} for wrong in ("", "0123", "0" * 63 + "G", "0" * 65, 0, None, b"0" * 64)),
        *({"form": wrong} for wrong in ("words", "", None, ["tokens"])),
        *({"length": wrong} for wrong in (0, -1, 2.0, "2", True, None)),
        *({"coarse": wrong} for wrong in (-1, 3, 1.0, True)),
    ],
)
def test_what_settings_cannot_hold_for_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"kind.* is .*expected"):
        BeliefSettings(replace(KIND, **changed), (1.0,), {})


@pytest.mark.parametrize("kind", [None, "0" * 64, ("0" * 64, "tokens", 2, 1)])
def test_a_kind_is_a_belief_kind(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match="expected a BeliefKind"):
        BeliefSettings(kind, (1.0,), {})


def changed_text(**changed: Any) -> str:
    content = json.loads(SETTINGS.text()) | changed
    return json.dumps({name: value for name, value in content.items() if value is not ...})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("no JSON", "Expecting value"),
        ("[]", "does not say format"),
        (changed_text(format="another"), "does not say format"),
        (changed_text(format=...), "does not say format"),
        (changed_text(version=3), "has version 3, expected 2"),
        (changed_text(version=..., kind=...), "has version 1, expected 2, which says what it was fitted to"),
        (changed_text(kind=...), r"lacks the keys \['kind'\]"),
        (changed_text(kind={}), "it.kind lacks the keys"),
        (changed_text(std_scale=...), r"lacks the keys \['std_scale'\]"),
        (changed_text(temperature=["1"]), "expected a number"),
        (changed_text(temperature=[True, 2.0]), "expected a number"),
        (changed_text(temperature=[-1.0]), "expected a list of one or more positive numbers"),
        (changed_text(more=1), r"unknown keys \['more'\]"),
        (changed_text(std_scale={"expcted": [1.0]}), "expected modes"),
        (SETTINGS.text().replace('"temperature"', '"temperature": [9], "temperature"'), "stands there twice"),
        (SETTINGS.text().replace('"expected"', '"expected": [9, 9], "expected"'), "stands there twice"),
    ],
)
def test_files_that_hold_none_are_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "beliefs.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=f"holds no settings of beliefs .*{problem}.*; fit them with"):
        load_belief_settings(path)
    with pytest.raises(InvalidInputError, match="holds no settings of beliefs"):
        load_belief_settings(tmp_path / "nothing.json")
