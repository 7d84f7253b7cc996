"""Everything here runs on a CUDA GPU. Without one it is skipped, with the reason; RFSQ_REQUIRE_GPU=1 fails instead."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.backend_specs import BACKENDS, compiled_from
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import Bundle, open_bundle

HERE = Path(__file__).parent
#: Of the two TensorRTs, the ones that are installed here.
TENSORRT = tuple(name for name in compiled_from("graphs") if BACKENDS[name].is_installed)
#: Those with engines of their own, which travel in a bundle.
ENGINES = ("cuda", *TENSORRT)


def missing() -> str:
    """Why nothing of this can run here; empty where it can."""
    for package in ("cuda.bindings", "torch", "polygraphy"):
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            return f"{package} is not installed"
    from rfsq.runtime.backends.gpu.driver import open_device

    try:
        open_device()
    except BackendUnavailableError as error:
        return str(error)
    return "" if TENSORRT else "no TensorRT is installed: pip install '.[tensorrt-rtx,gpu]'"


def skip_or_fail(reason: str) -> None:
    if os.environ.get("RFSQ_REQUIRE_GPU") == "1":
        pytest.fail(f"RFSQ_REQUIRE_GPU is 1, and {reason}")
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    reason = missing()
    if reason:
        skip_or_fail(reason)


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint with engines for every TensorRT here, all validated on this GPU."""
    from rfsq.export.build_config import BuildConfig
    from rfsq.export.pipeline import build

    output = tmp_path_factory.mktemp("gpu") / "bundle"
    build(BuildConfig(output=output, backends=("onnxruntime", *ENGINES), parity_steps=20_000))
    return output


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return open_bundle(bundle_path)


@pytest.fixture(params=ENGINES)
def tokenizer(request: pytest.FixtureRequest, bundle_path: Path) -> Iterator[ActionTokenizer]:
    """On an engine that takes arrays of the GPU."""
    with ActionTokenizer.load(bundle_path, backend=request.param) as opened:
        yield opened


@pytest.fixture(scope="session")
def cpu_tokenizer(bundle_path: Path) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(bundle_path, backend="onnxruntime") as opened:
        yield opened
