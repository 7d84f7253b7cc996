"""How well decoded actions match, in the robot's units, and when people are warned."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.fidelity import POOR_SHARE, Fidelity, FidelitySums, fidelity


def some_actions(steps: int = 500) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal([0, 300, 0], [0.5, 20.0, 1.0], (steps, 3)).astype(np.float32)


def test_each_dimension_is_judged_in_its_own_unit() -> None:
    actions = some_actions().astype(np.float64)
    decoded = actions + np.array([0.01, -0.2, 0.0])
    decoded[7, 1] += 5
    found = fidelity(actions, decoded)
    error = decoded - actions
    assert found.rmse == pytest.approx(np.sqrt((error**2).mean(0)))
    assert found.largest == pytest.approx(np.abs(error).max(0))
    assert found.deviation == pytest.approx(actions.std(0))
    assert found.lost == pytest.approx((error**2).mean(0) / actions.var(0))
    assert found.warning == ""
    assert "robot units" in found.text("all layers")


def test_a_poor_model_is_warned_of_by_its_worst_dimensions() -> None:
    actions = some_actions()
    found = fidelity(actions, actions + np.array([0.11, 0.0, 0.2]))
    assert found.warning.startswith(
        "WARNING: decoded actions lose more than 1% of the variance in 2 of 3 dimensions (0, 2)"
    )
    assert "RMS error 0.11" in found.warning
    assert found.warning in found.text("all layers")
    assert "at most" in found.summary


@given(st.floats(0.01, 100))
def test_the_threshold_does_not_depend_on_units(scale: float) -> None:
    actions = some_actions().astype(np.float64)
    for share, is_poor in ((0.9 * POOR_SHARE, False), (1.1 * POOR_SHARE, True)):
        found = fidelity(scale * actions, scale * (actions + np.sqrt(share) * actions.std(0)))
        assert bool(found.warning) is is_poor


def test_a_dimension_that_rests_has_no_share_to_lose() -> None:
    actions = np.full((50, 1), 1e4, np.float32)
    found = fidelity(actions, actions + 1)
    assert found.lost == (None,)
    assert found.rmse == (1.0,)
    assert found.warning == ""
    assert "does not move" in found.text("all layers")


@given(st.floats(0, 1e300))
def test_any_share_takes_little_room(share: float) -> None:
    found = Fidelity(5, (share**0.5,), (1.0,), (1.0,))
    (shown,) = re.findall(r"([0-9.e+-]+)%$", found.text("all layers").splitlines()[1])
    assert len(shown) <= len("1.23e+100")
    assert float(shown) == pytest.approx(100 * share, rel=0.01, abs=0.001)


def test_batches_give_what_the_whole_gives() -> None:
    actions = some_actions()
    decoded = actions + np.float32(0.1)
    sums = FidelitySums(3)
    for start in range(0, 500, 123):
        sums.add(actions[start : start + 123], decoded[start : start + 123])
    assert sums.result().rmse == pytest.approx(fidelity(actions, decoded).rmse)
    assert sums.result().deviation == pytest.approx(actions.astype(np.float64).std(0), rel=1e-9)
