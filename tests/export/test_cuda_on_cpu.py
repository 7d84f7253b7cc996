"""What the generated CUDA computes, on the processor: both kinds of kernels and of tokens, wrong values, tails."""

import functools
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.manifest import KernelKind, token_types
from tests.bundles import SMALL, Deployed, Recipe, deploy, random_actions, reference_decode
from tests.export.cuda_on_cpu import CudaOnCpu
from tests.export.plan_numpy import check_tokens

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: apt-get install g++"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the threads of a block need ucontext, of glibc"),
]

PUBLISHED = ModelConfig()
#: Sizes that no vector divides, more than a block has threads, one of everything, levels that no byte holds, second
#: layers that have no room in shared memory, and a prefix that suits the many kernels where all layers do not.
RECIPES = {
    "published": Recipe(config=PUBLISHED, prefixes=(3,)),
    "none": Recipe(config=SMALL, mode=DeployMode.NONE),
    "dynamic": Recipe(config=PUBLISHED, mode=DeployMode.DYNAMIC, prefixes=(3,)),
    "recovered": Recipe(config=ModelConfig(5, 3, 13, 3, 3), mode=DeployMode.RECOVERED),
    "odd, whole words": Recipe(config=ModelConfig(9, 12, 35, 5, 6), prefixes=(4,)),
    "prefix in whole words": Recipe(config=ModelConfig(3, 6, 10, 3, 4), prefixes=(2,)),
    "301 levels": Recipe(config=ModelConfig(2, 4, 8, 2, 301), prefixes=(1,)),
    "128 levels": Recipe(config=ModelConfig(3, 8, 20, 2, 128), prefixes=(1,)),
    "255 levels": Recipe(config=ModelConfig(3, 8, 20, 2, 255), prefixes=(1,)),
    "65537 levels": Recipe(config=ModelConfig(3, 4, 8, 1, 65537), prefixes=(1,)),
    "least": Recipe(config=ModelConfig(1, 1, 1, 1, 2), prefixes=(1,)),
    "wide latents": Recipe(config=ModelConfig(3, 300, 7, 1, 3), prefixes=(1,)),
    "wide hidden": Recipe(config=ModelConfig(7, 16, 800, 2, 7), prefixes=(1,)),
}
#: More than one block of a thread for each step, and a last warp that is not full; fewer where blocks are large.
STEPS = {name: 40 if name.startswith("wide") else 333 for name in RECIPES}


@dataclass(frozen=True)
class Case:
    deployed: Deployed
    kernels: CudaOnCpu
    actions: np.ndarray
    steps: int

    def kinds(self, prefix: int | None) -> list[tuple[KernelKind, str]]:
        kinds: tuple[KernelKind, ...] = ("few", "many")
        types = token_types(self.deployed.recipe.config.num_levels)
        return [(kind, token) for kind in kinds for token in types if self.kernels.has(prefix, token, kind)]

    def tokens(self, prefix: int) -> np.ndarray:
        sizes = self.deployed.recipe.config
        shape = (self.steps, sizes.latent_dim, prefix)
        return np.random.default_rng(prefix).integers(sizes.num_levels, size=shape, dtype=np.int32)

    def stats(self, prefix: int) -> np.ndarray | None:
        if not self.deployed.recipe.mode.has_stats:
            return None
        drawn = np.random.default_rng(prefix).uniform(0.01, 1, (self.steps, prefix, 2))
        return drawn.astype(np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def compiled(name: str) -> Case:
        deployed = deploy(RECIPES[name])
        actions = random_actions(deployed.recipe, STEPS[name])[:, 0]
        return Case(deployed, CudaOnCpu(tmp_path_factory.mktemp("cuda"), deployed), actions, STEPS[name])

    return compiled


@pytest.mark.parametrize("name", RECIPES)
def test_every_kernel_encodes_as_the_reference_and_all_alike(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    expected, stats = here.kernels.encode(here.actions, "int32", "few")
    check_tokens(here.deployed, here.actions[:, None], expected[:, None])
    if stats is not None:
        reference = here.deployed.reference.encode(torch.from_numpy(here.actions).double())[1].numpy()
        # Behind a near-tie flip the statistics are those of another residual.
        assert np.quantile(np.abs(stats - reference).max((1, 2)), 0.95) <= GATES.stats_error
    for kind, token_type in here.kinds(None):
        for is_backwards in (False, True):
            found, found_stats = here.kernels.encode(here.actions, token_type, kind, is_backwards=is_backwards)
            assert np.array_equal(found, expected)
            assert (stats is None) == (found_stats is None)
            assert stats is None or np.array_equal(stats, found_stats)


@pytest.mark.parametrize("name", RECIPES)
def test_every_kernel_decodes_as_the_reference_and_to_the_same_bits(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    units = here.deployed.reference.units.numpy()
    for prefix in here.deployed.prefixes:
        tokens, stats = here.tokens(prefix), here.stats(prefix)
        reference = reference_decode(
            here.deployed.reference,
            torch.from_numpy(tokens).long(),
            None if stats is None else torch.from_numpy(stats),
        )
        expected = here.kernels.decode(tokens, stats, "few")
        assert np.abs((expected - reference) / units).max() <= GATES.action_error / 4
        for kind, token_type in here.kinds(prefix):
            for is_backwards in (False, True):
                found = here.kernels.decode(tokens.astype(token_type), stats, kind, is_backwards=is_backwards)
                assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_a_token_that_is_no_level_makes_its_step_nan_and_no_other(case: Callable[[str], Case], name: str) -> None:
    here = case(name)
    num_levels = here.deployed.recipe.config.num_levels
    for prefix in here.deployed.prefixes:
        for kind, token_type in here.kinds(prefix):
            tokens, stats = here.tokens(prefix)[:40].astype(token_type), here.stats(prefix)
            stats = None if stats is None else stats[:40]
            expected = here.kernels.decode(tokens, stats, kind)
            # What looks like a level once it is cut to a byte is none either.
            levels = [num_levels, 127, 128, 200, 255, 256, 257, 2**16, 2**24, 2**31 - 1, -1, -256, -(2**31)]
            for step, level in enumerate(dict.fromkeys(levels)):
                if num_levels <= level <= np.iinfo(token_type).max or np.iinfo(token_type).min <= level < 0:
                    tokens[step, step % tokens.shape[1], step % prefix] = level
                    expected[step] = np.nan
            assert np.isnan(expected).any()
            assert np.array_equal(here.kernels.decode(tokens, stats, kind), expected, equal_nan=True)


@pytest.mark.parametrize("name", RECIPES)
def test_an_action_that_no_encoder_takes_makes_its_step_the_mark_and_no_other(
    case: Callable[[str], Case], name: str
) -> None:
    here = case(name)
    for kind, token_type in here.kinds(None):
        actions = here.actions[:40].copy()
        tokens, stats = here.kernels.encode(actions, token_type, kind)
        assert (tokens < here.deployed.recipe.config.num_levels).all()
        for step, value in enumerate((np.nan, np.inf, -np.inf, 3.4e38, -3.4e38)):
            actions[step * 7, step % actions.shape[1]] = value
            tokens[step * 7] = -1 if token_type == "int32" else 255
            if stats is not None:
                stats[step * 7] = np.nan
        found, found_stats = here.kernels.encode(actions, token_type, kind)
        assert np.array_equal(found, tokens)
        assert stats is None or np.array_equal(stats, found_stats, equal_nan=True)


def test_statistics_that_no_encoder_gives_make_their_step_nan_and_no_other(case: Callable[[str], Case]) -> None:
    here = case("dynamic")
    tokens, stats = here.tokens(3), here.stats(3)
    assert stats is not None
    expected = here.kernels.decode(tokens, stats, "few")
    for step, (place, value) in enumerate(((0, np.nan), (0, -4.1), (1, np.inf), (1, 0.0), (1, -0.5), (1, np.nan))):
        stats[step, step % 3, place] = value
        expected[step] = np.nan
    assert np.array_equal(here.kernels.decode(tokens, stats, "few"), expected, equal_nan=True)


@pytest.mark.parametrize("steps", [1, 31, 32, 33, 127, 256, 257])
def test_batches_of_every_size_end_where_they_end(case: Callable[[str], Case], steps: int) -> None:
    here = case("published")
    whole, _ = here.kernels.encode(here.actions, "int32", "many")
    for token_type in ("int32", "uint8"):
        tokens, _ = here.kernels.encode(here.actions[:steps], token_type, "many")
        assert np.array_equal(tokens, whole[:steps])
        actions = here.kernels.decode(tokens, None, "many")
        assert np.array_equal(actions, here.kernels.decode(whole, None, "many")[:steps])


def test_kernels_of_both_kinds_and_weights_with_and_without_room_are_among_these(case: Callable[[str], Case]) -> None:
    def has_many(name: str, prefix: int | None) -> bool:
        return case(name).kernels.has(prefix, "int32", "many")

    assert all(has_many(name, None) for name in ("published", "odd, whole words", "128 levels", "wide hidden"))
    assert has_many("prefix in whole words", 2)
    assert not has_many("prefix in whole words", None)
    assert not any(has_many(name, None) for name in ("dynamic", "recovered", "301 levels", "255 levels", "least"))


def test_a_barrier_too_few_is_seen(tmp_path: Path) -> None:
    """Or none of this would say anything of threads."""
    here = CudaOnCpu(tmp_path, deploy(RECIPES["published"]), without="__syncthreads();")
    actions = random_actions(RECIPES["published"], 4)[:, 0]
    forwards, _ = here.encode(actions, "int32", "few")
    backwards, _ = here.encode(actions, "int32", "few", is_backwards=True)
    assert not np.array_equal(forwards, backwards)
