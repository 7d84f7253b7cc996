"""A covariance of few numbers, found from few windows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.calibration.chunk_covariance import mixed, separable


def product(steps: int, dims: int, seed: int = 0) -> Tensor:
    """A covariance of steps times one of dimensions."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(n, 2 * n, generator=generator, dtype=torch.float64) for n in (steps, dims)]
    return torch.kron(*(factor @ factor.T for factor in factors))


@pytest.mark.parametrize(("steps", "dims"), [(1, 1), (1, 5), (6, 1), (4, 3), (16, 5)])
def test_a_product_is_found_as_it_is(steps: int, dims: int) -> None:
    expected = product(steps, dims)
    torch.testing.assert_close(separable(expected, steps), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_few_windows_say_more_of_a_product_than_of_any_covariance() -> None:
    expected = product(8, 6)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randn(60, 48, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(expected).T
    sample = torch.cov(windows.T, correction=0)

    def missed(covariance: Tensor) -> float:
        """Kullback-Leibler divergence of normal distributions, in nats."""
        ratio = torch.linalg.solve(covariance, expected)
        return float(ratio.diagonal().sum() - len(ratio) - torch.linalg.slogdet(ratio).logabsdet) / 2

    assert missed(separable(sample, 8)) < 0.05 * missed(sample)
    assert missed(mixed(sample, 8, 0.2)) < 0.5 * missed(sample)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_what_is_mixed_has_the_same_energy(share: float) -> None:
    generator = np.random.default_rng(0)
    sample = torch.from_numpy(np.cov(generator.normal(size=(12, 30)))) + product(4, 3)
    found = mixed(sample, 4, share)
    assert float(found.trace()) == pytest.approx(float(sample.trace()))
    assert torch.equal(found, sample) is (share == 0)
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_dimensions_and_steps_that_never_move_have_a_product_too() -> None:
    covariance = product(4, 3)
    still = covariance.reshape(4, 3, 4, 3)
    still[:, 1], still[:, :, :, 1] = 0, 0
    found = mixed(covariance, 4, 0.2)
    assert torch.isfinite(found).all()
    assert float(found.reshape(4, 3, 4, 3)[:, 1, :, 1].abs().max()) < 1e-3 * float(found.max())
