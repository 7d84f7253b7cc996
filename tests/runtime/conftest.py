"""Bundles that tests only read, built once for all workers; tests that alter one take a copy."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.cpu_targets import host_targets
from tests.bundles import Recipe, write_bundle
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.once import once


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The bundle of a recipe; not to be changed."""
    built: dict[Recipe, Path] = {}

    def get(recipe: Recipe) -> Path:
        if recipe not in built:
            name = f"bundle {hashlib.sha256(repr(recipe).encode()).hexdigest()}"
            built[recipe] = once(tmp_path_factory, name, lambda path: write_bundle(path, recipe))
        return built[recipe]

    return get


@pytest.fixture(scope="session")
def bundle(bundle_of: Callable[[Recipe], Path]) -> Path:
    """`calibrated`, small; not to be changed."""
    return bundle_of(Recipe())


@pytest.fixture(scope="session")
def c_bundle(bundle_of: Callable[[Recipe], Path]) -> Path:
    """One that knows its actions, with generated C, compiled for this processor; not to be changed."""
    return bundle_of(Recipe(c_targets=(host_targets()[0],), knows_actions=True))


@pytest.fixture(scope="session")
def chunk_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunk tokens, with generated C, compiled for this processor; not to be changed."""
    recipe = ChunkRecipe(c_targets=host_targets()[:1])
    return once(tmp_path_factory, "bundle of chunk tokens", lambda path: write_chunk_bundle(path, recipe))


@pytest.fixture
def altered(bundle: Path, tmp_path: Path) -> Path:
    """A copy of `bundle` that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "altered"))


@pytest.fixture(scope="session")
def altered_once(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for the many examples of a property, which put back what they change."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("altered") / "bundle"))


@pytest.fixture(scope="session")
def tokenizer(bundle: Path) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(bundle) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def chunk_tokenizer(chunk_bundle: Path) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(chunk_bundle, backend="c") as loaded:
        yield loaded


@pytest.fixture(scope="session", params=["per-step tokens", "chunk tokens"])
def either_tokenizer(
    request: pytest.FixtureRequest, tokenizer: ActionTokenizer, chunk_tokenizer: ActionTokenizer
) -> ActionTokenizer:
    """One of each kind."""
    return chunk_tokenizer if request.param == "chunk tokens" else tokenizer


@pytest.fixture(scope="session")
def dynamic_tokenizer(bundle_of: Callable[[Recipe], Path]) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(bundle_of(Recipe(mode=DeployMode.DYNAMIC))) as loaded:
        yield loaded
