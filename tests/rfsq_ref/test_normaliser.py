"""What `rfsq_ref.normaliser` promises: each kind's range, the gripper left alone, nothing infinite."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.normaliser import (
    QUANTILES,
    Normaliser,
    NormaliserKind,
    fit_normaliser,
    normaliser_from_json,
    read_normaliser,
)
from tests.rfsq_ref.units import normalise, restore

KINDS = list(NormaliserKind)
ACTIONS = np.random.default_rng(0).normal(2, 3, (5000, 7)).astype(np.float32)
FIELDS = {"kind": "min-max", "offset": [0.0, 1.0], "scale": [1.0, 2.0]}


def test_min_max_maps_the_extremes_onto_the_unit_interval() -> None:
    normalised = normalise(fit_normaliser(ACTIONS, NormaliserKind.MIN_MAX), ACTIONS)[:, :-1]
    np.testing.assert_allclose(normalised.min(0), -1, atol=1e-6)
    np.testing.assert_allclose(normalised.max(0), 1, atol=1e-6)


def test_quantile_maps_the_quantiles_onto_the_unit_interval() -> None:
    normalised = normalise(fit_normaliser(ACTIONS, NormaliserKind.QUANTILE), ACTIONS)[:, :-1]
    np.testing.assert_allclose(np.quantile(normalised, QUANTILES, axis=0), [[-1] * 6, [1] * 6], atol=1e-6)


def test_mean_std_gives_zero_mean_and_unit_deviation() -> None:
    normalised = normalise(fit_normaliser(ACTIONS, NormaliserKind.MEAN_STD), ACTIONS)[:, :-1]
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.std(0), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gripper_is_left_alone(kind: NormaliserKind) -> None:
    normaliser = fit_normaliser(ACTIONS, kind)
    assert (normaliser.offset[-1], normaliser.scale[-1]) == (0.0, 1.0)
    np.testing.assert_array_equal(normalise(normaliser, ACTIONS)[:, -1], ACTIONS[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_other_dimensions_can_be_left_alone(kind: NormaliserKind) -> None:
    normaliser = fit_normaliser(ACTIONS, kind, untouched=(0, 2))
    assert [scale == 1.0 for scale in normaliser.scale] == [True, False, True, False, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 3.3, -1e-3])
def test_a_dimension_that_never_moves_keeps_its_unit(kind: NormaliserKind, value: float) -> None:
    actions = ACTIONS.copy()
    actions[:, 1] = value
    normaliser = fit_normaliser(actions, kind)
    assert normaliser.scale[1] == 1.0
    np.testing.assert_allclose(normalise(normaliser, actions)[:, 1], 0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_float32_step_of_a_dimension_that_rests_far_from_zero_is_small_in_its_unit(kind: NormaliserKind) -> None:
    actions = ACTIONS.copy()
    actions[:, 1] = 255.0
    normaliser = fit_normaliser(actions, kind)
    assert np.spacing(np.float32(255.0)) / normaliser.scale[1] < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_exact_in_float32(kind: NormaliserKind) -> None:
    normaliser = fit_normaliser(ACTIONS, kind)
    for number in normaliser.offset + normaliser.scale:
        assert float(np.float32(number)) == number


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 30), st.integers(1, 5)),
        elements=st.floats(-(2.0**39), 2.0**39, width=32),
    ),
    st.sampled_from(KINDS),
)
def test_actions_in_any_units_that_a_bundle_holds_can_be_normalised_and_restored(
    actions: np.ndarray, kind: NormaliserKind
) -> None:
    movement = np.ptp(actions.astype(np.float64), axis=0)
    assume(((movement == 0) | (movement > 1e-9)).all())
    normaliser = fit_normaliser(actions, kind)
    normalised = normalise(normaliser, actions)
    assert np.isfinite(normalised).all()
    largest = np.abs(actions).max() + np.max(normaliser.scale)
    np.testing.assert_allclose(restore(normaliser, normalised), actions, atol=1e-12 * largest)


@pytest.mark.parametrize("size", [1e-30, 1e-14, 1e13, 1e35])
@pytest.mark.parametrize("kind", KINDS)
def test_other_units_are_refused_by_dimension(kind: NormaliserKind, size: float) -> None:
    """Before anything is trained or fitted in them: a bundle would be refused."""
    actions = ACTIONS * np.array([1, size, 1, 1, 1, 1, 1], np.float32)
    with pytest.raises(DataError, match=r"dimension 1 lies around .* from 1e-12 to 1e\+12, .*: use other units"):
        fit_normaliser(actions, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_json_gives_back_the_same(kind: NormaliserKind, tmp_path: Path) -> None:
    normaliser = fit_normaliser(ACTIONS, kind)
    (tmp_path / "normaliser.json").write_text(json.dumps(normaliser.to_json()))
    assert read_normaliser(tmp_path / "normaliser.json") == normaliser


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "z-score"}, "min-max, quantile, mean-std"),
        ({"kind": None}, "min-max, quantile, mean-std"),
        ({"offset": [0.0]}, "1 offsets and 2 scales"),
        ({"offset": [], "scale": []}, "0 offsets and 0 scales"),
        ({"scale": [1.0, 0.0]}, "scale positive"),
        ({"scale": [1.0, -2.0]}, "scale positive"),
        ({"scale": [1.0, 1e-60]}, "scale positive"),
        ({"scale": [1.0, 1e60]}, "finite"),
        ({"offset": [0.0, float("nan")]}, "finite"),
        ({"offset": [0.0, "left"]}, "offset"),
        ({"scale": 3}, "scale"),
        ({"offset": "12"}, "each a list of float32 numbers; found: it.offset is '12'; expected a list"),
        ({"offset": {"0": 1, "1": 2}}, "expected a list$"),
        ({"offset": [True, 1.0]}, r"it.offset\[0\] is True; expected a number"),
        ({"offset": ["0", "1"]}, "expected a number"),
        ({"offset": [0, 10**400]}, r"list of float32 numbers; found: it.offset\[1\] is .*; expected a number"),
    ],
)
def test_fields_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        normaliser_from_json(FIELDS | change)


@pytest.mark.parametrize("missing", list(FIELDS))
def test_missing_fields_are_named(missing: str) -> None:
    with pytest.raises(DataError, match=missing):
        normaliser_from_json({name: value for name, value in FIELDS.items() if name != missing})


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'"text"', b"[" * 100_000, b"1" * 5000])
def test_files_that_hold_no_normaliser_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "normaliser.json").write_bytes(content)
    with pytest.raises(DataError):
        read_normaliser(tmp_path / "normaliser.json")


def test_no_more_is_read_than_a_normaliser_can_take(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match="is not a readable JSON file: it is not a regular file; give a file with"):
            read_normaliser(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(DataError, match="it has 8796093022208 bytes; expected at most 4194304"):
        read_normaliser(tmp_path / "sparse")


def test_the_refusal_of_many_numbers_stays_short() -> None:
    with pytest.raises(DataError) as refused:
        normaliser_from_json(FIELDS | {"offset": [0.0] * 60_000, "scale": [-1.0] * 60_000})
    assert len(str(refused.value)) < 1000


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json"):
        read_normaliser(tmp_path / "nowhere.json")


def test_a_normaliser_checks_itself() -> None:
    with pytest.raises(DataError, match="2 offsets and 1 scales"):
        Normaliser(NormaliserKind.MIN_MAX, (0.0, 0.0), (1.0,))
