"""Chunk tokens fitted to demonstrations: good on episodes that no fit has seen, and for any robot."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rfsq.calibration.chunk import (
    ChunkFitConfig,
    _Coding,
    _described,
    default_budgets,
    fit_chunk_code,
    shared_bits,
)
from rfsq.calibration.chunk_order import bit_order, class_order, distortions
from rfsq.calibration.chunk_windows import windows
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkSizes
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind

Episodes = list[npt.NDArray[np.float64]]


def smooth_episodes(action_dim: int, lengths: list[int], seed: int) -> Episodes:
    """Motions of a robot that speeds up and slows down, in [-1, 1]; the last dimension opens and closes."""
    generator = np.random.default_rng(seed)
    found = []
    for length in lengths:
        walk = np.cumsum(generator.normal(size=(length, action_dim)) * 0.05, axis=0)
        walk[:, -1] = np.where(np.arange(length) > length // 2, 1.0, -1.0)
        found.append(np.tanh(walk))
    return found


def errors(code: ChunkCode, episodes: Episodes) -> tuple[list[float], Tensor]:
    x = windows(episodes, code.sizes.chunk_length)[::5]
    tokens = code.encode(x)
    return [float((code.decode(tokens[:, :n]) - x).square().mean()) for n in code.budgets], tokens


def most_memory(work: Callable[[], object]) -> int:
    """The most bytes that torch held at a time for `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def test_classes_of_many_values_are_described_in_the_memory_of_their_covariances() -> None:
    sizes = ChunkSizes(action_dim=16, chunk_length=16, num_classes=40, num_tokens=8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, sizes.num_values, generator=generator, dtype=torch.float64)
    assigned, parent = torch.arange(800) % 40, torch.arange(40) % 4
    coding = _Coding(sizes, default_budgets(8))
    assert most_memory(lambda: _described(coding, x, assigned, parent)) < 2 * 40 * sizes.num_values**2 * 8
    found = _described(coding, x, assigned, parent)
    # Latents that can have no bit are not kept, and yet count.
    assert found.basis.shape == (40, sizes.num_values, sizes.code_bits)
    assert most_memory(lambda: coding.errors(x, found)) < 4e7
    whole = _described(replace(coding, sizes=replace(sizes, num_tokens=40)), x, assigned, parent)
    assert whole.basis.shape == (40, sizes.num_values, sizes.num_values)
    torch.testing.assert_close(coding.errors(x, found), coding.errors(x, whole), rtol=1e-5, atol=0)


def test_a_fit_takes_so_many_numbers_however_many_a_window_has(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ChunkSizes(3, 8, num_classes=4, num_tokens=6)
    train, calibration = (smooth_episodes(3, [200] * n, seed=n) for n in (4, 2))
    fewer = fit_chunk_code(train, calibration, sizes, ChunkFitConfig(most_windows=100))
    monkeypatch.setattr("rfsq.calibration.chunk._MOST_VALUES", 100 * 24 + 1)
    bounded = fit_chunk_code(train, calibration, sizes)
    assert torch.equal(bounded.basis, fewer.basis)
    assert torch.equal(bounded.gain, fewer.gain)


@pytest.mark.slow
def test_validation_episodes_of_the_demonstrations_are_coded_as_well_as_was_measured(split: EpisodeSplit) -> None:
    train, calibration, validation = (
        [np.asarray(episode, np.float64) for episode in part.episodes]
        for part in (split.train, split.calibration, split.validation)
    )
    sizes = ChunkSizes(action_dim=7, chunk_length=8, num_classes=16)
    code = ChunkCode(sizes, fit_chunk_code(train, calibration, sizes)).double()
    found, tokens = errors(code, validation[:6])
    # With 64 classes a fifth to a quarter less.
    assert all(error < most for error, most in zip(found, (1.7e-3, 5.5e-4, 1.1e-4, 4.5e-6, 1.2e-7), strict=True)), found
    assert (code.classes(code.bits(tokens)) == sizes.escape).double().mean() < 0.005


@pytest.mark.parametrize(("action_dim", "chunk_length"), [(2, 1), (2, 16), (26, 1), (26, 6)])
@pytest.mark.parametrize("num_classes", [2, 3, 20])
def test_any_robot_is_fitted_and_more_tokens_err_less(action_dim: int, chunk_length: int, num_classes: int) -> None:
    class_bits = (num_classes - 1).bit_length()
    most = min(30, (action_dim * chunk_length * MOST_BITS + class_bits) // 10)
    sizes = ChunkSizes(action_dim, chunk_length, num_classes, num_tokens=most)
    train, calibration, held_out = (smooth_episodes(action_dim, [60] * n, seed=n) for n in (12, 4, 3))
    code = ChunkCode(sizes, fit_chunk_code(train, calibration, sizes)).double()
    found, tokens = errors(code, held_out)
    assert found == sorted(found, reverse=True)
    spread = float(windows(held_out, chunk_length).var(dim=0).mean())
    assert found[-1] < 0.2 * spread
    x = windows(held_out, chunk_length)[::5]
    for budget in code.budgets:
        assert (code.decode(tokens[:, :budget]) - x).abs().max() <= code.bound(budget) + 1e-12


def test_few_demonstrations_of_many_dimensions_code_episodes_that_no_fit_has_seen() -> None:
    sizes = ChunkSizes(12, 16, num_classes=8, num_tokens=40)
    # 150 windows, most of them the same steps again, of 192 values.
    train, calibration, held_out = (smooth_episodes(12, [40] * n, seed=n) for n in (6, 2, 10))
    code = ChunkCode(sizes, fit_chunk_code(train, calibration, sizes)).double()
    found, _ = errors(code, held_out)
    # Without a share of a separable covariance 0.048, 0.041, 0.030, 0.019, 0.012.
    assert all(error < most for error, most in zip(found, (0.026, 0.015, 6e-3, 2.6e-3, 1.3e-3), strict=True)), found


def test_classes_are_shrunk_by_more_windows_where_there_is_more_to_find_and_fewer_windows_are_new() -> None:
    small, large = (_Coding(ChunkSizes(dims, length), ()) for dims, length in ((7, 8), (14, 16)))
    assert small.shrinkage(40.0) == 40.0
    assert large.shrinkage(40.0) == 2 * 2 * 2 * 40.0


def test_dimensions_that_never_move_stay_where_they_are() -> None:
    sizes = ChunkSizes(3, 4, num_classes=8, num_tokens=12)
    train, calibration, held_out = (smooth_episodes(3, [40] * n, seed=n) for n in (8, 4, 2))
    for episode in (*train, *calibration, *held_out):
        episode[:, 1] = 0.25
    code = ChunkCode(sizes, fit_chunk_code(train, calibration, sizes)).double()
    x = windows(held_out, 4)
    still = code.decode(code.encode(x)).reshape(-1, 4, 3)[..., 1]
    torch.testing.assert_close(still, torch.full_like(still, 0.25), rtol=0, atol=1e-4)


def test_episodes_shorter_than_a_chunk_are_filled_up() -> None:
    (short, long) = smooth_episodes(2, [3, 5], seed=0)
    found = windows([short, long], 5).reshape(-1, 5, 2).numpy()
    np.testing.assert_array_equal(found[0], np.concatenate([short, short[-1:], short[-1:]]))
    np.testing.assert_array_equal(found[1:], long[None])


def test_the_same_data_and_seed_give_the_same_constants_however_many_windows_there_are() -> None:
    sizes = ChunkSizes(2, 4, num_classes=6, num_tokens=8)
    train, calibration = (smooth_episodes(2, [50] * n, seed=n) for n in (8, 3))
    config = ChunkFitConfig(seed=3, most_windows=100)
    first, second = (vars(fit_chunk_code(train, calibration, sizes, config)) for _ in range(2))
    assert first["budgets"] == second["budgets"] == default_budgets(8)
    assert all(torch.equal(first[name], second[name]) for name in first if name != "budgets")


def test_each_bit_goes_where_the_error_falls_most() -> None:
    variances = torch.tensor([[1.0, 0.3, 1e-4]], dtype=torch.float64)
    order = bit_order(variances, 12)[0]
    left = variances[0].clone()
    for place, latent in enumerate(order.tolist()):
        counts = torch.bincount(order[:place], minlength=3)
        falls = variances[0] * (distortions()[counts] - distortions()[counts + 1])
        assert falls[latent] == falls.max()
        left[latent] = variances[0, latent] * distortions()[counts[latent] + 1]
    assert left.sum() < 0.01


def test_the_first_bits_may_be_the_same_in_all_classes_and_no_latent_loses_its_place() -> None:
    variances = torch.tensor([[4.0, 1.0, 1e-3], [0.3, 0.2, 0.1]], dtype=torch.float64)
    order, own = bit_order(variances, 20, 5), bit_order(variances, 20)
    assert (order[0, :5] == order[1, :5]).all()
    assert not (own[0, :5] == own[1, :5]).all()
    counts = torch.nn.functional.one_hot(order, 3).sum(dim=1)
    # In the end each class has given its bits to the latents that it would have given them to.
    assert (counts - torch.nn.functional.one_hot(own, 3).sum(dim=1)).abs().max() <= 1


def test_the_bits_of_a_class_say_first_where_classes_differ_most() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    means = (corners * torch.tensor([1.0, 9.0, 3.0]))[shuffled]
    ordered = means[class_order(means, torch.ones(8, dtype=torch.float64))]
    for bit, dimension in ((0, 1), (1, 2), (2, 0)):
        halves = ordered[:, dimension].reshape(2**bit, 2, -1)
        # All classes with a 0 there lie on one side, all with a 1 on the other.
        assert (halves == halves[..., :1]).all()
        assert (halves[:, 0] != halves[:, 1]).all()


@given(count=st.integers(1, 70), seed=st.integers(0, 9))
def test_an_order_of_classes_has_each_once(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 4, generator=generator, dtype=torch.float64).round()
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    assert sorted(class_order(means, weights).tolist()) == list(range(count))


def test_one_order_of_the_first_bits_leaves_the_classes_as_they_are() -> None:
    sizes = ChunkSizes(action_dim=3, chunk_length=4, num_classes=8, num_tokens=12)
    train, calibration = smooth_episodes(3, [60] * 12, seed=1), smooth_episodes(3, [60] * 4, seed=2)
    own, shared = (
        fit_chunk_code(train, calibration, sizes, ChunkFitConfig(has_shared_order=is_shared))
        for is_shared in (False, True)
    )
    assert torch.equal(own.mean, shared.mean)
    assert torch.equal(own.scale, shared.scale)
    first = shared_bits(sizes)
    assert 0 < first < sizes.code_bits
    assert (shared.order[:, :first] == shared.order[0, :first]).all()
    assert not (own.order[:, :first] == own.order[0, :first]).all()


def test_the_signs_of_latents_are_those_of_one_basis(split: EpisodeSplit) -> None:
    sizes = ChunkSizes(7, 8, num_classes=8)
    constants = fit_chunk_code(split.train.episodes[::8], split.calibration.episodes[::4], sizes)
    # The broad classes have it.
    overlaps = constants.basis[-1].T @ constants.basis[:-3]
    nearest = overlaps.gather(1, overlaps.abs().argmax(dim=1, keepdim=True))
    assert (nearest >= 0).all()


def test_a_bit_takes_most_of_a_normal_latent_away_and_more_bits_four_times_as_much_each() -> None:
    # One bit: 1 - 2 / pi, whatever the compander.
    assert float(distortions()[1]) == pytest.approx(1 - 2 / np.pi, abs=1e-6)
    ratios = distortions()[4:10] / distortions()[5:11]
    assert ((ratios > 3.3) & (ratios < 4.2)).all()


@pytest.mark.parametrize("most", [1, 7, 50, 99, 400])
def test_a_sample_is_of_all_episodes_evenly(most: int) -> None:
    episodes = smooth_episodes(2, [3, 40, 4, 80, 1], seed=0)
    every = windows(episodes, 4)
    found = windows(episodes, 4, most, torch.Generator().manual_seed(0))
    assert len(found) == min(most, len(every))
    places = [int((every == window).all(dim=1).nonzero()[0]) for window in found]
    assert places == sorted(places)
    stretch = len(every) / len(found)
    assert all(abs(place - index * stretch) <= stretch for index, place in enumerate(places))


def test_windows_of_ten_million_steps_take_no_more_memory_than_the_sample() -> None:
    # One episode seen many times: what is asked of each is what a real one would be asked.
    episodes = [np.random.default_rng(0).uniform(-1, 1, (1000, 7)).astype(np.float32)] * 10_000
    tracemalloc.start()
    try:
        found = windows(episodes, 8, 5_000, torch.Generator().manual_seed(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.shape == (5_000, 56)
    assert peak < 2 * found.nbytes


def test_a_fit_sees_no_more_windows_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*arguments: Any) -> Tensor:
        found = windows(*arguments)
        seen.append(len(found))
        return found

    monkeypatch.setattr("rfsq.calibration.chunk.windows", watched)
    train, calibration = (smooth_episodes(2, [50] * n, seed=n) for n in (8, 3))
    fit_chunk_code(train, calibration, ChunkSizes(2, 4, 6, num_tokens=8), ChunkFitConfig(most_windows=100))
    assert seen == [100, 25]


def test_units_of_the_robot_change_nothing_but_the_normaliser() -> None:
    sizes = ChunkSizes(2, 4, num_classes=6, num_tokens=8)
    train, calibration = (smooth_episodes(2, [50] * n, seed=n) for n in (8, 3))
    # Powers of two, so that no rounding is new.
    normaliser = Normaliser(NormaliserKind.MIN_MAX, (32.0, -4.0), (64.0, 0.5))
    robot = [[episode * normaliser.scale + normaliser.offset for episode in part] for part in (train, calibration)]
    plain, scaled = fit_chunk_code(train, calibration, sizes), fit_chunk_code(*robot, sizes, normaliser=normaliser)
    torch.testing.assert_close(scaled.scale, plain.scale)
    assert torch.equal(scaled.order, plain.order)


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([np.zeros((30, 2))], "27 windows of the training episodes, all alike"),
        ([np.eye(3, 2)], "1 window of training episodes for 2 learned classes"),
        ([np.full((30, 2), 5.0) + np.eye(30, 2)], "27 windows of the training episodes, all alike"),
    ],
)
def test_episodes_that_nothing_can_be_fitted_to_are_refused(episodes: Episodes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_chunk_code(episodes, episodes, ChunkSizes(2, 4, num_classes=6, num_tokens=8))


@pytest.mark.parametrize("held_out", [np.zeros((5, 2)), np.full((50, 2), 0.9), np.full((9, 2), 1e-30)])
def test_calibration_episodes_in_which_nothing_moves_leave_a_code_that_works(held_out: npt.NDArray[np.float64]) -> None:
    sizes = ChunkSizes(2, 4, num_classes=6, num_tokens=8)
    code = ChunkCode(sizes, fit_chunk_code(smooth_episodes(2, [50] * 8, seed=0), [held_out], sizes)).double()
    found, _ = errors(code, smooth_episodes(2, [50] * 3, seed=1))
    assert found[-1] < 0.01
