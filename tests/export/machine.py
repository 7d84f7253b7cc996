"""What tests of builds ask of the machine they run on."""

import importlib.util

import pytest

from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.errors import BackendUnavailableError

needs_rtx = pytest.mark.skipif(
    not BACKENDS["tensorrt-rtx"].is_installed, reason="TensorRT-RTX is not importable: pip install '.[tensorrt-rtx]'"
)


def has_gpu() -> bool:
    """Whether what is built here is also run here."""
    if importlib.util.find_spec("cuda") is None:
        return False
    from rfsq.runtime.backends.gpu.driver import open_device

    try:
        open_device()
    except BackendUnavailableError:
        return False
    return True


needs_no_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU here: tests/gpu adds engines for it")
