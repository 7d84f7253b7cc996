"""Which backends there are, how `auto` chooses among them, and what ONNX Runtime's own one promises."""

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer, BackendUnavailableError, BundleError, InferenceError, SelfTestError
from rfsq.runtime.backends import onnxruntime as ort_backend
from rfsq.runtime.backends import registry as backends
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.registry import GPU_BACKENDS, create_backend
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from tests.backends import offer as offer_backends
from tests.backends import without_packages
from tests.bundles import Recipe, deploy, export_graphs, random_actions, write_bundle
from tests.processes import ends_well


class Borrowed:
    """ONNX Runtime under another name, for choosing among."""

    def __init__(self, name: str, bundle: Bundle, *, is_wrong: bool = False) -> None:
        self._backend = ort_backend.OrtBackend(bundle)
        self.name, self.description = name, f"borrowed {name}"
        self.device, self.checked_steps = "a borrowed processor", 0
        self.is_wrong, self.is_closed = is_wrong, False

    def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
        self._backend.encode_into(actions, tokens, stats)

    def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
        self._backend.decode_into(tokens, stats, actions)
        if self.is_wrong:
            actions += 1

    def close(self) -> None:
        self.is_closed = True
        self._backend.close()


def offer(monkeypatch: pytest.MonkeyPatch, name: str, *, is_wrong: bool = False) -> list[Borrowed]:
    """Register a backend; every one made is appended to the list."""
    made: list[Borrowed] = []

    def factory(bundle: Bundle) -> Backend:
        made.append(Borrowed(name, bundle, is_wrong=is_wrong))
        return made[-1]

    offer_backends(monkeypatch, {name: factory})
    return made


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_auto_takes_onnxruntime_where_nothing_else_can_run_and_says_why(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="rfsq.runtime")
    with ActionTokenizer.load(bundle) as tokenizer:
        assert tokenizer.backend.name == "onnxruntime"
    chosen = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(chosen) == 1
    assert chosen[0].startswith("backend onnxruntime (ONNX Runtime")
    assert "passed its self-test" in chosen[0]
    assert "not cuda: CUDA finds no usable GPU here" in caplog.text


def test_auto_prefers_the_faster_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "tensorrt")
    offer(monkeypatch, "c")
    with ActionTokenizer.load(bundle) as tokenizer:
        assert tokenizer.backend.name == "c"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    cuda_api = pytest.importorskip("rfsq.runtime.backends.gpu.driver")

    def find_none() -> None:
        raise BackendUnavailableError("CUDA finds no usable GPU here")

    monkeypatch.setattr(cuda_api, "open_device", find_none)


@pytest.mark.usefixtures("no_gpu")
def test_auto_passes_over_one_that_fails_its_self_test(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = offer(monkeypatch, "cuda", is_wrong=True)
    with ActionTokenizer.load(bundle) as tokenizer:
        assert tokenizer.backend.name == "onnxruntime"
    assert [backend.is_closed for backend in made] == [True]
    assert len(warnings_of(caplog)) == 2
    assert "✗ decode 3 layers" in warnings_of(caplog)[0]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.usefixtures("no_gpu")
def test_auto_warns_where_the_bundle_has_no_engine_for_this_processor(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ActionTokenizer.load(bundle).close()
    (warned,) = warnings_of(caplog)
    assert warned.startswith(f"onnxruntime takes the place of the C engine, which is faster: {bundle} has no C engine")
    assert warned.endswith(f"python export/build_engine.py --from-bundle {bundle}")
    # Whoever names a backend knows why.
    caplog.clear()
    ActionTokenizer.load(bundle, backend="onnxruntime").close()
    assert warnings_of(caplog) == []


def test_auto_warns_where_the_engine_is_for_a_lesser_processor(
    c_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ActionTokenizer.load(c_bundle).close()
    assert warnings_of(caplog) == []
    (own, *_) = host_targets()
    for module in ("cpu_targets", "c"):
        monkeypatch.setattr(f"rfsq.runtime.backends.{module}.host_targets", lambda: ("x86-64-v9", own))
    ActionTokenizer.load(c_bundle).close()
    (warned,) = warnings_of(caplog)
    assert warned.startswith(f"the C engine is for {own}, and this processor runs x86-64-v9: compile one for it")


def take_away(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As where the bundle has no engine for the GPU, or its library is missing."""

    def refused(name: str) -> Callable[[Bundle], Backend]:
        def factory(_bundle: Bundle) -> Backend:
            raise BackendUnavailableError(f"no engine of {name}\nand more")

        return factory

    offer_backends(monkeypatch, {name: refused(name) for name in names})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that CUDA finds."""
    cuda_api = pytest.importorskip("rfsq.runtime.backends.gpu.driver")
    device = cuda_api.GpuDevice("H100", "9.0", 2**36, "12.8", 132)
    monkeypatch.setattr(cuda_api, "open_device", lambda: device)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("taken", ["onnxruntime", "onnxruntime-cuda"])
def test_auto_warns_where_the_gpu_has_no_engine(
    taken: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_away(monkeypatch, "cuda", "tensorrt-rtx", "tensorrt", *(["onnxruntime"] if taken != "onnxruntime" else []))
    made = offer(monkeypatch, taken)
    ActionTokenizer.load(bundle).close()
    assert [backend.name for backend in made] == [taken]
    _, warned = warnings_of(caplog)
    assert warned.startswith(f"{taken} takes the place of an engine for H100")
    assert (
        f"which is faster: build one for it, on this machine: python export/build_engine.py --from-bundle {bundle}"
        in warned
    )
    assert "(cuda: no engine of cuda; tensorrt" in warned


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("taken", ["c", "cuda", "tensorrt-rtx", "tensorrt"])
def test_auto_warns_of_no_gpu_where_an_engine_is_taken_for_it_or_a_faster_one(
    taken: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_away(monkeypatch, "c", "cuda", "tensorrt-rtx", "tensorrt")
    offer(monkeypatch, taken)
    ActionTokenizer.load(bundle).close()
    assert not any("H100" in warned for warned in warnings_of(caplog))


@pytest.mark.usefixtures("no_gpu")
def test_auto_warns_of_no_gpu_where_there_is_none(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_away(monkeypatch, "cuda", "tensorrt-rtx", "tensorrt")
    for is_installed in (True, False):
        if not is_installed:
            monkeypatch.setitem(sys.modules, "rfsq.runtime.backends.gpu.driver", None)
        caplog.clear()
        ActionTokenizer.load(bundle).close()
        (warned,) = warnings_of(caplog)
        assert warned.startswith("onnxruntime takes the place of the C engine")


def test_a_backend_asked_for_by_name_is_never_replaced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = offer(monkeypatch, "cuda", is_wrong=True)
    with pytest.raises(SelfTestError, match=r"cuda .borrowed cuda. does not give the reference's answers"):
        ActionTokenizer.load(bundle, backend="cuda")
    assert made[0].is_closed
    with pytest.raises(BackendUnavailableError, match=r"has no C engine for .*; build engines"):
        ActionTokenizer.load(bundle, backend="c")
    without_packages(monkeypatch, "tensorrt")
    monkeypatch.setattr("rfsq.runtime.backends.registry._GPU_TRACES", ("/",))
    for name in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(BackendUnavailableError, match=rf"{name} is not installed; .* '\.\[{name},gpu\]'"):
            ActionTokenizer.load(bundle, backend=name)


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_backend_of_an_absent_gpu_advises_no_package(
    name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_packages(monkeypatch, "tensorrt")
    monkeypatch.setattr("rfsq.runtime.backends.registry._GPU_TRACES", ())
    with pytest.raises(BackendUnavailableError, match=f"^no NVIDIA GPU is here, and {name} needs one ") as caught:
        ActionTokenizer.load(bundle, backend=name)
    assert not re.search("pip|nvidia-smi", str(caught.value))


def test_an_unknown_name_is_refused_naming_the_known_ones(bundle: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="no backend 'onnx'; there are auto, c, cuda, tensorrt-rtx"):
        ActionTokenizer.load(bundle, backend="onnx")


def test_auto_says_why_each_one_cannot_be_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_bundle: Bundle) -> Backend:
        raise BackendUnavailableError("it is not here")

    offer_backends(monkeypatch, dict.fromkeys(backends.PREFERENCE, refuse))
    with pytest.raises(BackendUnavailableError) as caught:
        ActionTokenizer.load(bundle)
    for name in backends.PREFERENCE:
        assert f"  {name}: it is not here" in str(caught.value)


def test_a_missing_package_is_named_with_its_cure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BackendUnavailableError, match="onnxruntime is not installed; install it with: pip install"):
        ActionTokenizer.load(bundle, backend="onnxruntime")


def test_what_fails_during_the_self_test_is_closed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = offer(monkeypatch, "c")

    def interrupt(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Borrowed, "decode_into", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ActionTokenizer.load(bundle)
    assert made[0].is_closed


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 2**40], ids=["bound to the caller's arrays", "copied through bound buffers"])
@pytest.mark.parametrize("mode", list(DeployMode))
def test_both_ways_of_binding_give_the_same_answers(
    limit: int, mode: DeployMode, bundle_of: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(mode=mode)
    actions = random_actions(recipe, 9)
    with ActionTokenizer.load(bundle_of(recipe)) as tokenizer:
        expected = tokenizer.encode_with_stats(actions) if mode.has_stats else (tokenizer.encode(actions), None)
        decoded = tokenizer.decode(*expected)
    monkeypatch.setattr(ort_backend, "_COPY_LIMIT_BYTES", limit)
    with ActionTokenizer.load(bundle_of(recipe)) as tokenizer:
        for _ in range(2):
            found = tokenizer.encode_with_stats(actions) if mode.has_stats else (tokenizer.encode(actions), None)
            for first, second in zip(expected, found, strict=True):
                np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(tokenizer.encode(actions), found[0])
            np.testing.assert_array_equal(tokenizer.decode(*found), decoded)


def test_only_a_few_batch_sizes_stay_bound(bundle: Path) -> None:
    backend = ort_backend.OrtBackend(open_bundle(bundle))
    for batch in (*range(1, 20), 3):
        actions = np.zeros((batch, 2, 3), np.float32)
        backend.encode_into(actions, np.empty((batch, 2, 4, 3), np.int32), None)
    bound = [shape[0] for shape, _ in backend._encoder._bound]
    assert bound == [17, 18, 19, 3]


def test_every_number_of_chunk_tokens_stays_bound_beside_its_batch_size(chunk_bundle: Path) -> None:
    backend = ort_backend.OrtBackend(open_bundle(chunk_bundle))
    for batch in range(1, 6):
        for count in range(1, 10):
            tokens = np.zeros((batch, count), np.int32)
            backend.decode_into(tokens, None, np.empty((batch, 4, 3), np.float32))
    bound = [shape for shape, _ in backend._decoders[9]._bound]
    assert bound == [(batch, count) for batch in range(2, 6) for count in range(1, 10)]


def test_more_threads_give_the_same_tokens(bundle: Path) -> None:
    actions = random_actions(Recipe(), 200)
    one, two = np.empty((2, 200, 2, 4, 3), np.int32)
    ort_backend.OrtBackend(open_bundle(bundle), num_threads=1).encode_into(actions, one, None)
    ort_backend.OrtBackend(open_bundle(bundle), num_threads=2).encode_into(actions, two, None)
    np.testing.assert_array_equal(one, two)


# --- weights from elsewhere -------------------------------------------------------------------------------------------


def with_external_weights(onnx_bytes: bytes, location: Path, folder: Path) -> bytes:
    """The same graph, but for one weight that is now in the file `folder / location`."""
    graph = onnx.load_model_from_string(onnx_bytes)
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == "inner.weight")
    (folder / location).write_bytes(tensor.raw_data)
    entries = {"location": str(location), "offset": "0", "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return bytes(graph.SerializeToString())


@pytest.mark.parametrize("is_absolute", [False, True])
@pytest.mark.parametrize("is_marker_known", [False, True])
def test_weights_outside_the_hashed_bytes_are_refused(
    is_marker_known: bool, is_absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their marker and, should that miss them, by ONNX Runtime's own setting."""
    deployed = deploy(Recipe())
    location = tmp_path / "weights" if is_absolute else Path("weights")
    encoder = with_external_weights(export_graphs(deployed)["encoder.onnx"], location, tmp_path)
    deployed.graphs["encoder.onnx"] = encoder
    folder = write_bundle(tmp_path / "bundle", deployed)
    monkeypatch.chdir(tmp_path)
    # The attack works where nothing is done about it.
    if not is_absolute:
        ort.InferenceSession(encoder, providers=["CPUExecutionProvider"])
    if is_marker_known:
        expected, message = BundleError, "encoder.onnx names another file to read weights from"
    else:
        monkeypatch.setattr(ort_backend, "_EXTERNAL_DATA", b"never in a graph")
        expected, message = BackendUnavailableError, "refuses encoder.onnx"
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(expected, match=message):
            ActionTokenizer.load(folder, backend=backend)


# --- threads, forks and signals ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("batch", [2, 5000], ids=["bound buffers", "bound to the caller's arrays"])
def test_a_child_forked_while_other_threads_encode_encodes_too(batch: int, tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), batch)
    expected = tokenizer.encode(actions)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            tokenizer.encode(actions)

    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        # At most forks one of them is within a call: that none is at any of twelve has a chance below 1 in 4,000.
        for _ in range(12):
            pid = os.fork()
            if pid == 0:
                try:
                    same = all((tokenizer.encode(actions) == expected).all() for _ in range(3))
                    os._exit(0 if same else 1)
                finally:
                    os._exit(2)
            assert ends_well(pid)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_child_that_forks_while_it_holds_the_buffers_goes_on(bundle: Path) -> None:
    """As from a signal handler: the child returns into the very call that was interrupted."""
    backend = ort_backend.OrtBackend(open_bundle(bundle))
    graph, actions = backend._encoder, random_actions(Recipe(), 1)
    expected, found = np.empty((2, 1, 2, 4, 3), np.int32)
    backend.encode_into(actions, expected, None)

    class Forking(np.ndarray):
        def __setitem__(self, index: Any, value: Any) -> None:
            self.pid = os.fork()
            super().__setitem__(index, value)

    ((key, ((source, *others), session, binding)),) = graph._bound.items()
    forking = source.view(Forking)
    graph._bound = {key: ((forking, *others), session, binding)}
    backend.encode_into(actions, found, None)
    if forking.pid == 0:
        try:
            backend.encode_into(actions, found, None)
            os._exit(0 if (found == expected).all() and not graph._lock.locked() else 1)
        finally:
            os._exit(2)
    assert ends_well(forking.pid)
    np.testing.assert_array_equal(found, expected)


def test_a_call_within_a_call_does_not_wait_for_it(bundle: Path) -> None:
    """As from a signal handler, which runs in the thread that it interrupts."""
    backend = ort_backend.OrtBackend(open_bundle(bundle))
    tokens, expected, found = np.zeros((1, 2, 4, 3), np.int32), *np.empty((2, 1, 2, 3), np.float32)
    backend.decode_into(tokens, None, expected)
    with backend._decoders[3]._lock:
        backend.decode_into(tokens, None, found)
    np.testing.assert_array_equal(found, expected)


def test_closing_while_others_encode_harms_nobody(bundle: Path) -> None:
    actions = random_actions(Recipe(), 1)
    for _ in range(10):
        backend, under_way = ort_backend.OrtBackend(open_bundle(bundle)), threading.Barrier(4)

        def spin(backend: Backend, under_way: threading.Barrier) -> None:
            tokens = np.empty((1, 2, 4, 3), np.int32)
            backend.encode_into(actions, tokens, None)
            under_way.wait()
            while True:
                backend.encode_into(actions, tokens, None)

        with ThreadPoolExecutor(3) as pool:
            spinning = [pool.submit(spin, backend, under_way) for _ in range(3)]
            under_way.wait()
            backend.close()
            assert all(isinstance(future.exception(), InferenceError) for future in spinning)


# --- messages of the library ------------------------------------------------------------------------------------------


def test_a_library_that_fails_while_it_runs_is_quoted(bundle: Path) -> None:
    backend = create_backend("onnxruntime", open_bundle(bundle))
    with pytest.raises(InferenceError, match=r"(?s)ONNX Runtime .* failed: .*Got: 4 Expected: 3"):
        backend.encode_into(np.zeros((1, 2, 4), np.float32), np.empty((1, 2, 4, 3), np.int32), None)
    # And it goes on afterwards.
    backend.encode_into(np.zeros((1, 2, 3), np.float32), np.empty((1, 2, 4, 3), np.int32), None)


@pytest.mark.skipif(not hasattr(ort, "set_default_logger_callback"), reason="this ONNX Runtime cannot forward messages")
def test_messages_of_onnxruntime_go_to_logging(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    deployed = deploy(Recipe())
    graph = onnx.load_model_from_string(export_graphs(deployed)["encoder.onnx"])
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "left_over"))
    deployed.graphs["encoder.onnx"] = graph.SerializeToString()
    ActionTokenizer.load(write_bundle(tmp_path / "bundle", deployed)).close()
    warned = [
        text for name, level, text in caplog.record_tuples if (name, level) == (ort_backend.__name__, logging.WARNING)
    ]
    assert any("left_over" in text for text in warned)
    assert capfd.readouterr().err == ""


def test_onnx_runtime_reports_to_nobody(bundle: Path, tmp_path: Path) -> None:
    """From 1.32 on its import alone would start a thread that keeps a database in the home folder."""
    code = f"from runtime import ActionTokenizer; ActionTokenizer.load({str(bundle)!r}, backend='onnxruntime')"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], env={**environment, **home}, check=True)
    assert list(tmp_path.iterdir()) == []
