"""What counts as a wrong token, a near-tie, and a difference behind one; and how actions are compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime.bundle.comparison import TokenComparison, action_errors, compare_tokens

D, L, LEVELS = 3, 4, 3


def compare(
    *changes: tuple[int, int], near_ties: tuple[tuple[int, int], ...] = (), coupled: bool = False
) -> TokenComparison:
    """One step [1, D, L] of zeros, with ones at `changes` (latent, layer); `near_ties` have margins within bounds."""
    expected, found = np.zeros((1, D, L), np.int32), np.zeros((1, D, L), np.int32)
    margins, bounds = np.full((1, D, L), 0.1), np.full((1, D, L), 1e-6)
    for latent, layer in changes:
        found[0, latent, layer] = 1
    for latent, layer in near_ties:
        margins[0, latent, layer] = 1e-7
    return compare_tokens(expected, found, margins, bounds, num_levels=LEVELS, is_step_coupled=coupled)


def counts(comparison: TokenComparison) -> tuple[list[int], list[int], list[int]]:
    return comparison.wrong.tolist(), comparison.near_ties.tolist(), comparison.behind.tolist()


def test_equal_tokens_have_no_differences() -> None:
    found = compare(near_ties=((0, 0),))
    assert counts(found) == ([0] * L, [0] * L, [0] * L)
    assert not found.flipped.any()
    assert found.first_wrong is None


def test_a_difference_above_its_bound_is_wrong_and_named() -> None:
    found = compare((1, 2))
    assert counts(found) == ([0, 0, 1, 0], [0] * L, [0] * L)
    assert str(found.first_wrong) == "token [0, 1, 2] is 1, expected 0: margin 1.00e-01 bins, float32 explains 1.00e-06"
    assert not found.flipped.any()


def test_a_difference_within_its_bound_is_a_near_tie() -> None:
    found = compare((1, 2), near_ties=((1, 2),))
    assert counts(found) == ([0] * L, [0, 0, 1, 0], [0] * L)
    assert found.flipped.tolist() == [True]


def test_a_margin_equal_to_its_bound_is_a_near_tie() -> None:
    one = np.ones((1, 1, 1))
    found = compare_tokens(one.astype(int), 2 * one.astype(int), one, one, num_levels=LEVELS, is_step_coupled=False)
    assert (found.num_wrong, found.num_near_ties) == (0, 1)


@pytest.mark.parametrize("margin", [np.nan, np.inf])
def test_what_is_not_a_number_excuses_nothing(margin: float) -> None:
    one = np.ones((1, 1, 1))
    found = compare_tokens(
        one.astype(int), 2 * one.astype(int), one * margin, one, num_levels=LEVELS, is_step_coupled=False
    )
    assert found.num_wrong == 1


def test_later_layers_of_a_flipped_latent_are_behind_it() -> None:
    found = compare((1, 1), (1, 2), (1, 3), near_ties=((1, 1), (1, 3)))
    assert counts(found) == ([0] * L, [0, 1, 0, 0], [0, 0, 1, 1])


def test_another_latent_is_not_behind_unless_the_step_is_coupled() -> None:
    changes, near_ties = ((1, 1), (2, 2)), ((1, 1),)
    assert counts(compare(*changes, near_ties=near_ties)) == ([0, 0, 1, 0], [0, 1, 0, 0], [0] * L)
    coupled = compare(*changes, near_ties=near_ties, coupled=True)
    assert counts(coupled) == ([0] * L, [0, 1, 0, 0], [0, 0, 1, 0])


def test_the_same_layer_of_another_latent_is_never_behind() -> None:
    found = compare((1, 1), (2, 1), near_ties=((1, 1),), coupled=True)
    assert counts(found) == ([0, 1, 0, 0], [0, 1, 0, 0], [0] * L)


@st.composite
def differing(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    expected, found = random.integers(0, 3, (2, *shape))
    return expected, np.where(random.random(shape) < 0.6, expected, found), random.random(shape), random.random(shape)


@given(differing(), st.booleans(), st.data())
def test_batches_merge_into_the_whole(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], coupled: bool, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(case[0]) - 1))
    whole = compare_tokens(*case, num_levels=LEVELS, is_step_coupled=coupled)
    first, second = (
        compare_tokens(*(part[piece] for part in case), num_levels=LEVELS, is_step_coupled=coupled)
        for piece in (slice(cut), slice(cut, None))
    )
    merged = first + second
    assert counts(merged) == counts(whole)
    assert merged.first_wrong == whole.first_wrong
    np.testing.assert_array_equal(merged.flipped, whole.flipped)


@given(differing(), st.booleans())
def test_every_difference_is_counted_exactly_once(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], coupled: bool
) -> None:
    found = compare_tokens(*case, num_levels=LEVELS, is_step_coupled=coupled)
    assert found.num_wrong + found.num_near_ties + found.behind.sum() == (case[0] != case[1]).sum()
    assert found.num_steps == case[0].shape[0] * case[0].shape[1]


def test_shapes_that_differ_are_refused() -> None:
    four, three = np.zeros((1, D, L)), np.zeros((1, D, L - 1))
    with pytest.raises(ValueError, match=r"\(1, 3, 3\).*expected one shape"):
        compare_tokens(four.astype(int), three.astype(int), four, four, num_levels=LEVELS, is_step_coupled=False)


def test_action_errors_are_in_normalised_units() -> None:
    expected = np.zeros((2, 3, 2))
    found = expected.copy()
    found[0, 1, 0], found[1, 2, 1] = 0.5, 3.0
    worst = action_errors(expected, found, (0.1, 10.0))
    assert (worst.value, worst.index) == (5.0, (0, 1, 0))
    assert str(worst) == "action [0, 1, 0] is 0.5, expected 0"


#: Of a joint that rests at zero, and of one a thousand units from there: one float32 is 6e-5 from the next.
RESTS = [0.0, 1.0, 1000.0, -1024.0, 1e30]


@given(
    st.sampled_from(RESTS),
    st.floats(-1, 1, allow_subnormal=False),
    st.floats(-1e-3, 1e-3, allow_subnormal=False),
)
def test_rounding_to_float32_is_no_error_and_never_hides_more_than_itself(
    rest: float, value: float, error: float
) -> None:
    expected = np.array([rest + value])
    computed = expected + error
    found = computed.astype(np.float32)
    judged = action_errors(expected, found, 0.5).value * 0.5
    difference, step = float(np.abs(found - expected)[0]), float(np.spacing(np.abs(found))[0])
    assert judged <= float(np.abs(computed - expected)[0])
    assert difference - step / 2 <= judged <= difference
    assert action_errors(expected, expected.astype(np.float32), 0.5).value == 0


@pytest.mark.parametrize("rest", RESTS[:4])
@pytest.mark.parametrize("error", [2e-5, -2e-5])
def test_an_error_before_the_rounding_is_seen_whole_among_many_actions(rest: float, error: float) -> None:
    expected = rest + np.random.default_rng(0).uniform(-1, 1, 10_000)
    judged = action_errors(expected, (expected + error).astype(np.float32), 1.0).value
    assert 0.95 * abs(error) <= judged <= abs(error) * (1 + 1e-6)


def test_the_float32_next_to_the_right_one_is_an_error() -> None:
    right = np.float32([1000, -1000, 1, 1, 0, 1e-45])
    for away in (np.inf, -np.inf):
        found = np.nextafter(right, np.float32(away))
        for one, other in zip(right, found, strict=True):
            half = abs(float(one) - float(other)) / 2
            assert action_errors(np.float64([one]), np.array([other]), 1.0).value == half


def test_the_largest_float32_is_no_excuse_for_what_is_larger() -> None:
    largest = np.finfo(np.float32).max
    assert action_errors(np.array([2.0 * float(largest)]), np.array([largest]), 1.0).value == float(largest)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_infinitely_wrong(value: float) -> None:
    worst = action_errors(np.zeros((1, 2)), np.array([[9.0, value]]), 1.0)
    assert (worst.value, worst.index) == (np.inf, (0, 1))


def test_no_actions_have_no_error() -> None:
    assert action_errors(np.empty((0, 2)), np.empty((0, 2)), 1.0).value == 0.0


def test_actions_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(2, 1\)"):
        action_errors(np.zeros((1, 2)), np.zeros((2, 1)), 1.0)


@pytest.mark.parametrize("value", [-1, LEVELS, np.iinfo(np.int32).min])
@pytest.mark.parametrize("coupled", [False, True])
def test_what_is_no_level_is_wrong_even_at_a_near_tie_and_behind_one(value: int, coupled: bool) -> None:
    expected, found = np.zeros((1, 1, 2), np.int32), np.full((1, 1, 2), value)
    ones = np.ones(expected.shape)
    compared = compare_tokens(expected, found, 0 * ones, ones, num_levels=LEVELS, is_step_coupled=coupled)
    assert counts(compared) == ([1, 1], [0, 0], [0, 0])


def test_a_level_farther_off_than_the_neighbour_takes_a_bound_of_whole_bins() -> None:
    expected, found = np.zeros((1, 1, 1), np.int32), np.full((1, 1, 1), 2)
    for bound, wrong in ((0.5, 1), (1.0, 1), (1.2, 0), (np.inf, 0)):
        one = np.full(expected.shape, 0.1)
        compared = compare_tokens(
            expected, found, one, np.full_like(one, bound), num_levels=LEVELS, is_step_coupled=False
        )
        assert (compared.num_wrong, compared.num_near_ties) == (wrong, 1 - wrong)


def test_along_the_found_tokens_nothing_is_behind_anything() -> None:
    expected, found = np.zeros((1, 1, 3), np.int32), np.ones((1, 1, 3), np.int32)
    margins, bounds = np.array([[[0.0, 0.4, 0.0]]]), np.full((1, 1, 3), 0.1)
    compared = compare_tokens(expected, found, margins, bounds, num_levels=LEVELS, is_step_coupled=None)
    assert counts(compared) == ([0, 1, 0], [1, 0, 1], [0, 0, 0])
