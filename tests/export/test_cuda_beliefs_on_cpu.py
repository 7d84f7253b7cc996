"""What the generated CUDA makes of probabilities of per-step tokens, on the processor: the definition's answers,
decode's bits where all is certain, marks for what is illegal."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.beliefs import step_belief
from rfsq.runtime.bundle.comparison import action_errors
from tests.bundles import Recipe, deploy
from tests.export.cuda_on_cpu import CudaOnCpu
from tests.export.test_c_beliefs import ACTION_ERROR, DEVIATION_ERROR, one_hot, random_logits, softmax
from tests.export.test_cuda_on_cpu import Case, pytestmark  # noqa: F401  # the same machine is needed

#: Sizes that no vector divides, tokens that lanes share, second layers that have no room in shared memory.
RECIPES = {
    "published": Recipe(config=ModelConfig(), chunk_length=8, prefixes=(1, 3)),
    "recovered": Recipe(DeployMode.RECOVERED, ModelConfig(), chunk_length=2, prefixes=(3,)),
    "none": Recipe(DeployMode.NONE, ModelConfig(5, 3, 13, 3, 3), chunk_length=3, prefixes=(1,)),
    "one step": Recipe(config=ModelConfig(9, 12, 35, 5, 6), chunk_length=1, prefixes=(4,)),
    "40 levels": Recipe(config=ModelConfig(3, 6, 10, 3, 40), chunk_length=2, prefixes=(2,)),
    "301 levels": Recipe(config=ModelConfig(2, 4, 8, 2, 301), chunk_length=2, prefixes=(1,)),
    "wide hidden": Recipe(DeployMode.RECOVERED, ModelConfig(7, 16, 800, 2, 7), chunk_length=1, prefixes=(1,)),
    "wide latents": Recipe(config=ModelConfig(3, 300, 7, 1, 3), chunk_length=1, prefixes=(1,)),
    "least": Recipe(config=ModelConfig(1, 1, 1, 1, 2), chunk_length=1, prefixes=(1,)),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def compiled(name: str) -> Case:
        deployed = deploy(RECIPES[name])
        kernels = CudaOnCpu(tmp_path_factory.mktemp("cuda"), deployed)
        return Case(deployed, kernels, np.empty(0, np.float32), 0)

    return compiled


def assert_believed(here: Case, found: list[np.ndarray], exact: torch.Tensor, keeps_mode: bool, coarse: int) -> None:
    reference = here.deployed.reference
    belief = step_belief(reference, exact, "likeliest mode" if keeps_mode else "expected", coarse, None)
    actions, std, mode_probability, mode = found
    worst = action_errors(belief.actions.numpy(), actions, reference.units.numpy())
    assert worst.value <= ACTION_ERROR, worst
    expected = belief.std.numpy()
    # Of what float32 squares to 0, nothing is left.
    limit = DEVIATION_ERROR * expected.max((1, 2), keepdims=True) + 1e-15 * reference.units.numpy()
    assert (np.abs(std - expected) <= limit).all()
    np.testing.assert_allclose(mode_probability, belief.mode_probability.numpy(), rtol=1e-6)
    assert np.array_equal(mode, belief.mode.numpy())


@pytest.mark.parametrize("name", RECIPES)
def test_beliefs_are_those_of_the_definition(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    for prefix in here.deployed.prefixes:
        for spread in (0.3, 3.0, 60.0):
            logits = random_logits(RECIPES[name], 3, prefix, spread)
            sharpness = np.random.default_rng(1).uniform(0.5, 2, prefix).astype(np.float32)
            given = softmax(logits).float().numpy()
            given_exactly = torch.from_numpy(given).double()
            given_exactly /= given_exactly.sum(-1, keepdim=True)
            for keeps_mode in (False, True):
                found = here.kernels.beliefs(logits, is_logits=True, keeps_mode=keeps_mode, sharpness=sharpness)
                assert_believed(here, found, softmax(logits, sharpness), keeps_mode, 1)
                backwards = here.kernels.beliefs(
                    logits, is_logits=True, keeps_mode=keeps_mode, sharpness=sharpness, is_backwards=True
                )
                assert all(map(np.array_equal, found, backwards))
                found = here.kernels.beliefs(given, is_logits=False, keeps_mode=keeps_mode)
                assert_believed(here, found, given_exactly, keeps_mode, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_certain_gives_the_bits_of_decode(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    config, length = RECIPES[name].config, RECIPES[name].chunk_length
    for prefix in here.deployed.prefixes:
        tokens = np.random.default_rng(prefix).integers(
            config.num_levels, size=(2, length, config.latent_dim, prefix), dtype=np.int32
        )
        decoded = here.kernels.decode(tokens.reshape(-1, *tokens.shape[2:]), None, "few")
        for is_logits in (False, True):
            given = one_hot(tokens, config.num_levels, is_logits=is_logits)
            for keeps_mode in (False, True):
                actions, std, probability, mode = here.kernels.beliefs(
                    given, is_logits=is_logits, keeps_mode=keeps_mode
                )
                assert np.array_equal(actions.reshape(decoded.shape).view(np.int32), decoded.view(np.int32))
                assert not std.any()
                assert (probability == 1).all()
                assert np.array_equal(mode, tokens[..., :1])


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_distribution_marks_its_chunk_and_no_other(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    prefix = here.deployed.prefixes[-1]
    logits = random_logits(RECIPES[name], 6, prefix, 1.0)
    levels = logits.shape[-1]
    for is_logits, values in ((True, (np.nan, np.inf, None)), (False, (np.nan, -1e-6, 1.1, np.inf))):
        given = logits if is_logits else softmax(logits).float().numpy()
        expected = here.kernels.beliefs(given, is_logits=is_logits)
        for chunk, value in enumerate(values):
            own = given[chunk].reshape(-1, levels)[chunk * 7 % (given[chunk].size // levels)]
            own[...] = -np.inf if value is None else own
            own[chunk % levels] = own[chunk % levels] if value is None else value
            for output, mark in zip(expected, (np.nan, np.nan, np.nan, -1), strict=True):
                output[chunk] = mark
        for is_backwards in (False, True):
            found = here.kernels.beliefs(given, is_logits=is_logits, is_backwards=is_backwards)
            for part, wanted in zip(found, expected, strict=True):
                assert np.array_equal(part, wanted, equal_nan=part.dtype == np.float32)


def test_what_nobody_wants_is_not_written(case: Callable[[str], Case]) -> None:
    here = case("published")
    logits = random_logits(RECIPES["published"], 2, 3, 1.0)
    [actions] = here.kernels.beliefs(logits, is_logits=True, has_all=False)
    assert np.array_equal(actions, here.kernels.beliefs(logits, is_logits=True)[0])


def test_logits_of_any_finite_size_do_not_overflow(case: Callable[[str], Case]) -> None:
    here = case("published")
    largest = np.finfo(np.float32).max
    logits = np.where(random_logits(RECIPES["published"], 1, 3, 1.0) > 0, largest, -largest).astype(np.float32)
    for sharpness in (1e-38, 1.0, 3e38):
        found = here.kernels.beliefs(logits, is_logits=True, sharpness=np.full(3, sharpness, np.float32))
        assert all(np.isfinite(part).all() for part in found)
