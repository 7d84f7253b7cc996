"""What is known of every backend before it is loaded: one `BackendSpec` each, in the one table `BACKENDS`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from .advice import install

#: What in a bundle its engines are compiled from: generated sources, or the graphs in the form `reduce`.
EngineSource = Literal["c", "cuda", "graphs"]


@dataclass(frozen=True)
class BackendSpec:
    """A backend, and what it promises beyond the contract (`backends/contract.py`).

    factory: module in `runtime/backends` and what makes the backend there, called with the bundle and `arguments`;
    packages: of these Python packages one has to be installed, none where it is empty; extras: of this project, which
    bring them, or else the distribution; engine_source: None for a backend that runs the bundle's graphs as they are.
    is_on_gpu: it takes arrays of the GPU where they lie, whose values the host does not read, so in calls of any size
    it marks what is illegal (`MarksIllegalValues`). survives_fork: a child of fork may call what its parent has loaded;
    without, the call raises InferenceError. checked_steps: in calls of up to so many steps it checks values itself and
    raises IllegalValueError. has_targets: one machine runs several kinds of its engines, each for another kind of
    processor (`backends/cpu_targets.py`); the factory takes the kind as its last argument, and the best one without.
    decodes_beliefs: it decodes probabilities, of bundles that have golden vectors for that (`backends/beliefs.py`).

    >>> BACKENDS["c"].is_on_gpu, BACKENDS["cuda"].engine_source
    (False, 'cuda')
    """

    name: str
    factory: tuple[str, str]
    engine_source: EngineSource | None
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    distribution: str = "onnxruntime"
    is_on_gpu: bool = False
    survives_fork: bool = False
    checked_steps: int = 0
    has_targets: bool = False
    decodes_beliefs: bool = False

    @property
    def install(self) -> str:
        """What the reader types to install it.

        >>> BACKENDS["onnxruntime"].install
        'pip install onnxruntime'
        """
        return install(*self.extras) if self.extras else f"pip install {self.distribution}"

    @property
    def is_installed(self) -> bool:
        """Whether its package is there. Nothing is imported, so a broken installation counts.

        >>> BACKENDS["c"].is_installed
        True
        """
        return not self.packages or any(map(is_package_installed, self.packages))


def is_package_installed(name: str) -> bool:
    """Whether Python finds a package of this name.

    >>> is_package_installed("numpy"), is_package_installed("no_such_package")
    (True, False)
    """
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        # A module that somebody put into sys.modules by hand has no spec.
        return True


_SPECS = (
    # Its calls check all values before they compute: those of 64 steps stay in the processor's first cache.
    BackendSpec(
        "c",
        ("c", "CBackend"),
        "c",
        survives_fork=True,
        checked_steps=64,
        has_targets=True,
        decodes_beliefs=True,
    ),
    BackendSpec(
        "cuda",
        ("cuda", "CudaBackend"),
        "cuda",
        packages=("cuda",),
        extras=("gpu",),
        is_on_gpu=True,
        decodes_beliefs=True,
    ),
    BackendSpec(
        "tensorrt-rtx",
        ("tensorrt", "TrtBackend"),
        "graphs",
        arguments=("tensorrt-rtx",),
        # The wheels install the bindings alone; NVIDIA's own installers add the name without the suffix.
        packages=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        extras=("tensorrt-rtx", "gpu"),
        is_on_gpu=True,
        decodes_beliefs=True,
    ),
    BackendSpec(
        "tensorrt",
        ("tensorrt", "TrtBackend"),
        "graphs",
        arguments=("tensorrt",),
        packages=("tensorrt",),
        extras=("tensorrt", "gpu"),
        is_on_gpu=True,
        decodes_beliefs=True,
    ),
    BackendSpec(
        "onnxruntime",
        ("onnxruntime", "OrtBackend"),
        None,
        packages=("onnxruntime",),
        survives_fork=True,
        decodes_beliefs=True,
    ),
    BackendSpec(
        "onnxruntime-cuda",
        ("onnxruntime_cuda", "OrtCudaBackend"),
        None,
        packages=("onnxruntime",),
        distribution="onnxruntime-gpu",
        is_on_gpu=True,
        decodes_beliefs=True,
    ),
)
#: By name, in the order in which `auto` tries them: the fastest decoder of one chunk of numpy arrays first
#: (docs/gpu.md). ONNX Runtime on the GPU comes last: a single chunk takes it longer than on the processor.
BACKENDS: dict[str, BackendSpec] = {spec.name: spec for spec in _SPECS}


def compiled_from(*sources: EngineSource) -> tuple[str, ...]:
    """Backends whose engines are compiled from these.

    >>> compiled_from("graphs")
    ('tensorrt-rtx', 'tensorrt')
    """
    return tuple(name for name, spec in BACKENDS.items() if spec.engine_source in sources)
