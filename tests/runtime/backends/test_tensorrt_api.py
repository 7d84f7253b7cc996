"""What `runtime.backends.tensorrt_api` promises about every TensorRT it may meet.

Stand-ins take the place of the libraries that cannot be installed everywhere; the real TensorRT-RTX is asked wherever
it is importable.
"""

import importlib.util
import logging
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rfsq.runtime.backends.tensorrt_api import (
    EngineRefusedError,
    EngineTensor,
    NoDeviceError,
    ProfileShapes,
    TrtApi,
    find_tensorrt,
)
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.errors import BackendUnavailableError, BundleError, InferenceError

ROOT = Path(__file__).parents[3]

needs_rtx = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))),
    reason="TensorRT-RTX is not importable: pip install '.[tensorrt-rtx]'",
)


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class DataType(IntEnum):
    FLOAT = 0
    INT32 = 3
    FP4 = 10


class TensorIOMode(IntEnum):
    INPUT = 1
    OUTPUT = 2


def stand_in(version: str, **features: object) -> ModuleType:
    """A module shaped like TensorRT's, with only the features named."""
    module = ModuleType("tensorrt")
    vars(module).update(
        __version__=version, ILogger=type("ILogger", (), {}), DataType=DataType, TensorIOMode=TensorIOMode, **features
    )
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Makes a stand-in the installed `tensorrt` for one test."""

    def as_tensorrt(module: ModuleType) -> TrtApi:
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        return find_tensorrt("tensorrt")

    return as_tensorrt


@pytest.fixture
def rtx() -> TrtApi:
    return find_tensorrt("tensorrt-rtx")


class TestFinding:
    def test_an_unknown_backend_is_refused_with_the_known_ones(self):
        with pytest.raises(BackendUnavailableError, match=r"'openvino'.*tensorrt, tensorrt-rtx"):
            find_tensorrt("openvino")

    @pytest.mark.parametrize(
        ("backend", "packages"),
        [("tensorrt", ["tensorrt"]), ("tensorrt-rtx", ["tensorrt_rtx", "tensorrt_rtx_bindings"])],
    )
    def test_a_missing_package_is_named_with_the_command_that_installs_it(self, backend, packages, monkeypatch):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

        assert not BACKENDS[backend].is_installed
        with pytest.raises(BackendUnavailableError) as refusal:
            find_tensorrt(backend)

        assert " or ".join(packages) in str(refusal.value)
        assert f"pip install --constraint constraints.txt --editable '.[{backend},gpu]'" in str(refusal.value)

    def test_a_package_that_does_not_load_says_why(self, monkeypatch, tmp_path):
        (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

        assert BACKENDS["tensorrt"].is_installed
        with pytest.raises(BackendUnavailableError, match=r"libnvinfer\.so\.10"):
            find_tensorrt("tensorrt")

    def test_an_installed_library_is_found_with_its_version(self, install):
        api = install(stand_in("10.13.2"))

        assert BACKENDS["tensorrt"].is_installed
        assert (api.backend, api.version) == ("tensorrt", "10.13.2")
        assert api.tag == "tensorrt-10.13.2"

    def test_a_library_is_given_one_logger_for_the_whole_process(self, install):
        assert install(stand_in("10.13.2")).logger is find_tensorrt("tensorrt").logger

    def test_the_robot_needs_none_of_the_export_packages(self):
        question = (
            "import sys, rfsq.runtime.backends.tensorrt_api; "
            "print([m for m in ('torch', 'onnx', 'polygraphy') if m in sys.modules])"
        )
        answer = subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == "[]"


class TestMessages:
    def test_messages_are_collected_with_their_severity_while_asked_for(self, install):
        api = install(stand_in("10.13.2"))
        api.logger.log(Severity.WARNING, "before")
        with api.collect_messages() as messages:
            api.logger.log(Severity.ERROR, "unsupported operator")
        api.logger.log(Severity.WARNING, "after")

        assert [(message.severity, message.text, message.is_error) for message in messages] == [
            ("ERROR", "unsupported operator", True)
        ]

    def test_messages_that_nobody_collects_reach_the_log_at_their_level(self, install, caplog):
        api = install(stand_in("10.13.2"))
        with caplog.at_level(logging.INFO, logger="rfsq.runtime.backends.tensorrt_api"):
            api.logger.log(Severity.WARNING, "seen")
            with api.collect_messages():
                api.logger.log(Severity.ERROR, "left to the collector")

        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (logging.WARNING, "TensorRT WARNING: seen")
        ]

    def test_a_failing_log_handler_cannot_end_the_process(self, install, monkeypatch):
        def explode(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(logging.getLogger("rfsq.runtime.backends.tensorrt_api"), "log", explode)
        install(stand_in("10.13.2")).logger.log(Severity.ERROR, "text")


class Config:
    """Remembers what is asked of an IBuilderConfig."""

    def __init__(self, accepts: bool = True) -> None:
        self.cleared: list[object] = []
        self.num_compute_capabilities = 0
        self.targets: dict[int, object] = {}
        self.accepts = accepts

    def clear_flag(self, flag: object) -> None:
        self.cleared.append(flag)

    def set_compute_capability(self, target: object, index: int) -> bool:
        self.targets[index] = target
        return self.accepts


class ComputeCapability(IntEnum):
    NONE = 0
    CURRENT = 1
    SM89 = 89
    SM120 = 120


class TestBuildSettings:
    def test_strong_typing_is_asked_for_where_it_is_a_choice(self, install):
        api = install(stand_in("10.13.2", NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1)))
        assert api.network_flags == 2

    def test_strong_typing_is_not_asked_for_where_it_is_the_only_way(self, install):
        api = install(stand_in("11.0.0", NetworkDefinitionCreationFlag=SimpleNamespace()))
        assert api.network_flags == 0

    def test_tf32_is_cleared_where_the_flag_exists(self, install):
        config = Config()
        install(stand_in("10.13.2", BuilderFlag=SimpleNamespace(TF32="tf32"))).apply_build_settings(config, ())
        assert config.cleared == ["tf32"]

    def test_a_library_without_a_tf32_flag_is_left_alone(self, install):
        config = Config()
        install(stand_in("12.0.0", BuilderFlag=SimpleNamespace())).apply_build_settings(config, ())
        assert config.cleared == []

    def test_targets_are_named_by_their_number(self, install):
        api = install(stand_in("1.6", ComputeCapability=ComputeCapability))
        config = Config()
        api.apply_build_settings(config, ("12.0", "8.9"))

        assert api.compute_capabilities == ("8.9", "12.0")
        assert config.num_compute_capabilities == 2
        assert config.targets == {0: ComputeCapability.SM120, 1: ComputeCapability.SM89}

    @pytest.mark.parametrize("name", ["8.7", "89", "sm89", "CURRENT", ""])
    def test_an_unknown_target_is_refused_with_the_valid_ones(self, install, name):
        api = install(stand_in("1.6", ComputeCapability=ComputeCapability))
        config = Config()
        with pytest.raises(ValueError, match=r"valid are 8\.9, 12\.0"):
            api.apply_build_settings(config, (name,))
        assert config.targets == {}

    def test_a_library_without_targets_says_to_build_on_the_robot(self, install):
        api = install(stand_in("10.13.2"))
        with pytest.raises(ValueError, match="build on the target"):
            api.apply_build_settings(Config(), ("8.7",))

    def test_a_target_that_the_library_turns_down_is_an_error(self, install):
        api = install(stand_in("1.6", ComputeCapability=ComputeCapability))
        with pytest.raises(ValueError, match=r"refused compute capability '8\.9'"):
            api.apply_build_settings(Config(accepts=False), ("8.9",))


class Engine:
    """Answers like an ICudaEngine with one input and one output."""

    num_io_tensors = 2
    _shapes = {"tokens": (-1, 8, 16, 3), "actions": (-1, 8, 7)}  # noqa: RUF012

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "tokens" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.INT32 if name == "tokens" else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert (name, profile_index) == ("tokens", 0)
        return [(batch, 8, 16, 3) for batch in (1, 4, 64)]


def runtime_that(answer: object, *errors: str) -> type:
    """A Runtime class whose engines are `answer`, after logging `errors`; host code is allowed unless forbidden."""

    class Runtime:
        def __init__(self, logger: object) -> None:
            self._logger = logger
            self.engine_host_code_allowed = True

        def deserialize_cuda_engine(self, serialized: bytes) -> object:
            assert serialized
            for text in errors:
                self._logger.log(Severity.ERROR, text)
            return answer

    return Runtime


def tensors_of(api: TrtApi, content: bytes) -> tuple[EngineTensor, ...]:
    runtime = api.create_runtime()
    return api.engine_tensors(api.deserialize(runtime, content))


class TestRunning:
    def test_an_engine_is_described_tensor_by_tensor(self, install):
        assert tensors_of(install(stand_in("10.13.2", Runtime=runtime_that(Engine()))), b"engine") == (
            EngineTensor(
                "tokens",
                "input",
                "int32",
                (-1, 8, 16, 3),
                ProfileShapes((1, 8, 16, 3), (4, 8, 16, 3), (64, 8, 16, 3)),
            ),
            EngineTensor("actions", "output", "float32", (-1, 8, 7)),
        )

    def test_host_code_in_engines_is_forbidden(self, install):
        api = install(stand_in("10.13.2", Runtime=runtime_that(Engine())))
        assert api.create_runtime().engine_host_code_allowed is False

    def test_a_refused_engine_quotes_tensorrt(self, install):
        runtime = runtime_that(None, "magicTag == kEXPECTED failed", "then (cudaError 35: driver)")
        api = install(stand_in("10.13.2", Runtime=runtime))

        with pytest.raises(EngineRefusedError, match=r"magicTag == kEXPECTED failed") as refusal:
            tensors_of(api, b"engine")
        assert isinstance(refusal.value, BundleError)

    def test_without_a_gpu_an_engine_is_not_judged(self, install):
        api = install(stand_in("10.13.2", Runtime=runtime_that(None, "(cudaError 35: driver version)")))
        with pytest.raises(NoDeviceError, match="no usable GPU here: driver version; check the driver"):
            tensors_of(api, b"engine")

    def test_a_runtime_that_cannot_start_for_want_of_a_gpu_is_no_bundle_error(self, install):
        def runtime(logger: object) -> None:
            logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("factory function returned nullptr")

        api = install(stand_in("10.13.2", Runtime=runtime))
        with pytest.raises(NoDeviceError, match="error: 35"):
            api.create_runtime()


@needs_rtx
class TestRealTensorRtRtx:
    def test_it_is_found(self, rtx):
        assert BACKENDS["tensorrt-rtx"].is_installed
        assert rtx.version == rtx.module.__version__

    def test_it_offers_targets_to_build_for_without_a_gpu(self, rtx):
        assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(rtx.compute_capabilities)
        assert "9.0" not in rtx.compute_capabilities

    def test_its_settings_arrive_in_a_real_configuration(self, rtx):
        builder = rtx.module.Builder(rtx.logger)
        config = builder.create_builder_config()
        assert config.get_flag(rtx.module.BuilderFlag.TF32)

        rtx.apply_build_settings(config, ("8.9", "12.0"))

        assert not config.get_flag(rtx.module.BuilderFlag.TF32)
        assert [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)] == [
            "SM89",
            "SM120",
        ]
        assert builder.create_network(rtx.network_flags).get_flag(
            rtx.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        )

    def test_host_code_in_engines_is_forbidden(self, rtx):
        assert rtx.create_runtime().engine_host_code_allowed is False

    def test_bytes_that_are_no_engine_are_refused_in_its_own_words(self, rtx):
        with pytest.raises(EngineRefusedError, match="magicTag"):
            tensors_of(rtx, b"no engine at all" * 100)


class Strategy(IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class MeasuredContext:
    """One that needs 100 bytes a chunk."""

    def __init__(self) -> None:
        self.batch, self.given = 0, []

    def update_device_memory_size_for_shapes(self) -> int:
        return 100 * self.batch

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        self.given.append((address, num_bytes))


class MeasuredEngine:
    """Remembers how contexts were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def create_runtime_config(self) -> SimpleNamespace:
        config = SimpleNamespace()
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, *how: object) -> MeasuredContext:
        self.asked.append(how)
        return MeasuredContext()


CHOICE = {"ExecutionContextAllocationStrategy": Strategy, "IExecutionContext": MeasuredContext}


class TestMemoryOfContexts:
    """By default a context takes what the largest batch of its engine needs, whatever it is for."""

    def test_a_context_takes_none_and_says_what_its_shapes_need(self, install):
        api, engine = install(stand_in("10.13.2", **CHOICE)), MeasuredEngine()
        context = api.create_context(engine, None)
        assert engine.asked == [(Strategy.USER_MANAGED,)]
        assert api.memory_size(context) == 0
        context.batch = 3
        assert api.memory_size(context) == 300

    def test_where_contexts_have_settings_it_is_one_of_these(self, install):
        kinds = SimpleNamespace(EAGER="eager")
        features = {**CHOICE, "DynamicShapesKernelSpecializationStrategy": kinds}
        api, engine = install(stand_in("10.13.2", **features)), MeasuredEngine()
        api.create_context(engine, "cache")
        ((config,),) = engine.asked
        assert (config.cache, config.strategy) == ("cache", Strategy.USER_MANAGED)

    def test_a_library_without_the_choice_takes_its_own(self, install):
        api, engine = install(stand_in("9.0")), MeasuredEngine()
        context = api.create_context(engine, None)
        context.batch = 3
        assert engine.asked == [()]
        assert api.memory_size(context) == 0

    def test_what_tensorrt_complains_of_is_an_error(self, install):
        api = install(stand_in("10.13.2", **CHOICE))

        class Failing(MeasuredContext):
            def update_device_memory_size_for_shapes(self) -> int:
                api.logger.log(Severity.ERROR, "shapes are not set")
                return 0

        with pytest.raises(InferenceError, match="could not say how much memory an engine needs: shapes are not set"):
            api.memory_size(Failing())

    @needs_rtx
    def test_tensorrt_rtx_has_the_choice(self, rtx):
        assert rtx._without_memory.name == "USER_MANAGED"
