"""Arrays of the GPU are checked before anything runs, by what they say of themselves: no GPU is needed."""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer, InvalidInputError, TokenizerError, UnbuiltPrefixError
from tests.bundles import Recipe, deploy, make_manifest
from tests.runtime.backends.gpu.fake_gpu import FakeArray, FakeCuda, aligned, gpu

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends.gpu import arrays as gpu_arrays
from rfsq.runtime.backends.gpu.arrays import DEFAULT_STREAM, GpuArray, GpuResult, GpuStream, gpu_array, stream_of

# --- one array --------------------------------------------------------------------------------------------------------


def test_an_array_is_used_where_it_lies() -> None:
    source = gpu((2, 3), np.int32, stream=7)
    found = gpu_array("tokens", source)
    assert (found.address, found.shape, found.dtype) == (source.array.ctypes.data, (2, 3), np.dtype(np.int32))
    assert (found.is_writable, found.stream, found.owner, found.num_bytes) == (True, 7, source, 24)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (FakeArray(aligned((4, 6), np.float32)[:, ::2]), r"x is not C-contiguous: shape \[4, 3\], strides \[24, 8\]"),
        (FakeArray(aligned((4, 6), np.float32).T), r"x is not C-contiguous: .*`\.contiguous\(\)` in torch"),
        (gpu((4, 6), strides=(0, 4)), r"x is not C-contiguous: shape \[4, 6\], strides \[0, 4\] bytes"),
        (FakeArray(aligned((9,), np.float32)[1:]), r"x begins at the address 0x\w+4, which is no multiple of 16"),
        (gpu((4, 6), device=1), r"x does not lie in the memory of CUDA's device 0, .*CUDA_VISIBLE_DEVICES"),
        (gpu((4, 6), mask=gpu((4, 6), np.bool_)), "x has a mask; expected a plain array"),
    ],
    ids=["every other one", "transposed", "one row again and again", "misaligned", "another device", "masked"],
)
def test_an_array_that_cannot_be_used_as_it_is_is_refused(value: FakeArray, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        gpu_array("x", value)


def test_strides_of_axes_with_one_entry_do_not_matter() -> None:
    assert gpu_array("x", gpu((1, 2, 1, 3), strides=(999, 12, 5, 4))).shape == (1, 2, 1, 3)
    assert gpu_array("x", gpu((0, 2), strides=(999, 999))).num_bytes == 0


def test_where_an_array_without_dlpack_lies_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    source = gpu((2, 2), device=None)
    asked = []

    def is_on_device(address: int) -> bool:
        asked.append(address)
        return len(asked) == 1

    monkeypatch.setattr(gpu_arrays, "is_on_device", is_on_device)
    gpu_array("x", source)
    with pytest.raises(InvalidInputError, match="does not lie in the memory of CUDA's device 0"):
        gpu_array("x", source)
    assert asked == [source.array.ctypes.data] * 2


@pytest.mark.parametrize("error", [RuntimeError, TypeError, BufferError])
def test_what_a_library_says_of_its_own_array_is_quoted(error: type[Exception]) -> None:
    class Graded:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise error("Can't get __cuda_array_interface__ on Variable that requires grad.")

    with pytest.raises(InvalidInputError, match=r"actions cannot be read on the GPU: Can't get .* requires grad"):
        gpu_array("actions", Graded())


@pytest.mark.parametrize(
    ("start", "length", "is_shared"), [(0, 4, True), (4, 4, True), (7, 9, True), (8, 4, False), (-4, 4, False)]
)
def test_arrays_overlap_where_they_share_a_byte(start: int, length: int, is_shared: bool) -> None:
    one = GpuArray(4096, (8,), np.dtype(np.uint8), True, None, None)
    other = GpuArray(4096 + start, (length,), np.dtype(np.uint8), True, None, None)
    assert (one.overlaps(other), other.overlaps(one)) == (is_shared, is_shared)


# --- streams ----------------------------------------------------------------------------------------------------------


class OfCudaCore:
    """`__cuda_stream__` as the protocol has it."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 44)


class OfOldCudaCore:
    """Its first version had a property."""

    __cuda_stream__ = (0, 45)


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (None, DEFAULT_STREAM),
        (0, DEFAULT_STREAM),
        (41, 41),
        (SimpleNamespace(cuda_stream=42), 42),
        (SimpleNamespace(cuda_stream=0), DEFAULT_STREAM),
        (SimpleNamespace(ptr=43), 43),
        (SimpleNamespace(ptr=0), DEFAULT_STREAM),
        (OfCudaCore(), 44),
        (OfOldCudaCore(), 45),
    ],
    ids=["none", "zero", "number", "torch", "torch's default", "CuPy", "CuPy's default", "cuda.core", "its first"],
)
def test_streams_of_every_library_are_understood(stream: object, handle: int) -> None:
    assert stream_of(stream, {"actions": gpu_array("actions", gpu((1,)))}).handle == handle


def test_a_stream_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"stream is a str; expected a stream of torch, CuPy or cuda\.core"):
        stream_of("7", {})


def test_without_a_stream_of_the_caller_the_one_that_the_arrays_name_is_taken() -> None:
    arrays = {name: gpu_array(name, gpu((1,), stream=stream)) for name, stream in (("a", None), ("b", 9), ("c", 9))}
    assert stream_of(None, arrays).handle == stream_of(9, arrays).handle == 9


def test_the_per_thread_default_stream_is_refused() -> None:
    """Its handle means another stream in every thread, so nothing can be kept for it."""
    for stream, arrays in ((2, {}), (None, {"a": gpu_array("a", gpu((1,), stream=2))})):
        with pytest.raises(InvalidInputError, match="another one in every thread"):
            stream_of(stream, arrays)


def test_torchs_current_stream_is_that_of_tensors_which_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor(FakeArray):
        __module__ = "torch"

    current = SimpleNamespace(cuda_stream=77)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda _: current)))
    tensor = gpu_array("a", Tensor(aligned((4,), np.float32)))
    found = stream_of(None, {"a": tensor})
    assert (found.handle, found.owner) == (77, current)
    assert stream_of(5, {"a": tensor}).handle == 5
    assert stream_of(None, {"a": gpu_array("a", gpu((1,)))}).handle == DEFAULT_STREAM


def test_streams_that_differ_are_refused_naming_both() -> None:
    arrays = {name: gpu_array(name, gpu((1,), stream=stream)) for name, stream in (("a", 9), ("b", 10))}
    with pytest.raises(InvalidInputError, match="b belongs to the stream 0xa, this call works on 0x9"):
        stream_of(None, arrays)
    with pytest.raises(InvalidInputError, match="a belongs to the stream 0x9, this call works on 0xb"):
        stream_of(11, arrays)


# --- calls ------------------------------------------------------------------------------------------------------------

B, T, A, D, L = 5, 2, 3, 4, 3


class FakeBackend:
    """Notes what it is called with."""

    name, description, device, checked_steps = "tensorrt-rtx", "a fake", "a GPU", 0
    token_types: tuple[np.dtype, ...] = (np.dtype(np.int32),)

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[GpuArray], int]] = []

    def __getattr__(self, name: str) -> Callable[[Sequence[GpuArray], GpuStream], object]:
        def note(arrays: Sequence[GpuArray], stream: GpuStream) -> object:
            self.calls.append((name, list(arrays), stream.handle))
            return name

        if name not in ("encode_on_gpu", "decode_on_gpu", "bind_encode", "bind_decode"):
            raise AttributeError(name)
        return note

    def close(self) -> None:
        pass


class Opened:
    def __init__(self, mode: DeployMode) -> None:
        self.backend = FakeBackend()
        self.tokenizer = ActionTokenizer(make_manifest(deploy(Recipe(mode=mode))), self.backend)  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.backend.calls]


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    class Memory:
        def __init__(self, num_bytes: int) -> None:
            self.address = fake.allocate(num_bytes)

        def close(self) -> None:
            if self.address:
                fake.free(self.address)
            self.address = 0

    monkeypatch.setattr(gpu_arrays, "DeviceMemory", Memory)
    monkeypatch.setattr(gpu_arrays, "is_on_device", lambda address: address in fake.live)
    return fake


@pytest.fixture
def calibrated() -> Opened:
    return Opened(DeployMode.CALIBRATED)


@pytest.fixture
def dynamic() -> Opened:
    return Opened(DeployMode.DYNAMIC)


def actions(**options: Any) -> FakeArray:
    return gpu((B, T, A), **options)


def tokens(layers: int = L, **options: Any) -> FakeArray:
    return gpu((B, T, D, layers), np.int32, **options)


def stats(layers: int = L, **options: Any) -> FakeArray:
    return gpu((B, T, layers, 2), **options)


def test_arrays_reach_the_backend_in_the_order_of_its_graphs(calibrated: Opened, dynamic: Opened) -> None:
    a, t, s = actions(), tokens(), stats()
    calibrated.tokenizer.encode_into(a, t, stream=7)
    calibrated.tokenizer.decode_into(t, a)
    dynamic.tokenizer.encode_into(a, t, s, stream=8)
    dynamic.tokenizer.decode_into(t, a, s)
    found = [
        (name, [array.owner for array in arrays], stream)
        for opened in (calibrated, dynamic)
        for name, arrays, stream in opened.backend.calls
    ]
    assert found == [
        ("encode_on_gpu", [a, t], 7),
        ("decode_on_gpu", [t, a], DEFAULT_STREAM),
        ("encode_on_gpu", [a, t, s], 8),
        ("decode_on_gpu", [t, s, a], DEFAULT_STREAM),
    ]


def test_results_are_arrays_that_every_library_takes(dynamic: Opened, cuda: FakeCuda) -> None:
    found_tokens, found_stats = dynamic.tokenizer.encode_with_stats(actions(stream=9))
    found_actions = dynamic.tokenizer.decode(found_tokens, found_stats)
    for result, shape, typestr in (
        (found_tokens, (B, T, D, L), "<i4"),
        (found_stats, (B, T, L, 2), "<f4"),
        (found_actions, (B, T, A), "<f4"),
    ):
        interface = result.__cuda_array_interface__
        assert (interface["shape"], interface["typestr"], interface["stream"]) == (shape, typestr, 9)
        assert interface["data"][0] in cuda.live
    assert dynamic.names == ["encode_on_gpu", "decode_on_gpu"]
    del dynamic, found_tokens, found_stats, found_actions, result


def test_the_memory_of_a_result_goes_with_it(calibrated: Opened, cuda: FakeCuda) -> None:
    result = calibrated.tokenizer.encode(actions())
    assert isinstance(result, GpuResult)
    assert len(cuda.live) == 1
    calibrated.backend.calls.clear()
    del result
    assert cuda.live == {}


def test_statistics_have_to_have_a_place_where_nothing_is_allocated(dynamic: Opened) -> None:
    for call in (dynamic.tokenizer.encode_into, dynamic.tokenizer.bind_encode):
        with pytest.raises(InvalidInputError, match=r"stats_out is missing.*\[5, 2, 3, 2\]"):
            call(actions(), tokens())
    dynamic.tokenizer.encode(actions())
    assert [array.shape for array in dynamic.backend.calls[0][1]] == [(B, T, A), (B, T, D, L), (B, T, L, 2)]


@pytest.mark.parametrize("layers", [2, 3])
def test_every_built_prefix_is_decoded(calibrated: Opened, layers: int) -> None:
    calibrated.tokenizer.decode_into(tokens(layers), actions())
    assert calibrated.backend.calls[0][1][0].shape[3] == layers


Call = Callable[[ActionTokenizer], object]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(gpu((B, T, A), np.float64)), "actions have type float64; expected float32: nothing is con"),
        (lambda t: t.encode(gpu((B, T, A), ">f4")), "actions have type >f4; expected float32"),
        (lambda t: t.decode(gpu((B, T, D, L), np.int64)), "tokens have type int64; expected int32: .*torch.int32"),
        (lambda t: t.decode(gpu((B, T, D, L), np.uint8)), "tokens have type uint8; expected int32"),
        (lambda t: t.encode(gpu((T, A))), r"actions have shape \[2, 3\]; expected \[B, T, A\] = \[B, 2, 3\]"),
        (lambda t: t.encode(gpu((B, T, A + 1))), r"actions have shape \[5, 2, 4\]"),
        (lambda t: t.encode(gpu(())), r"actions have shape \[\]"),
        (lambda t: t.decode(gpu((), np.int32)), r"tokens have shape \[\]"),
        (lambda t: t.decode(gpu((B, T, L), np.int32)), r"tokens have shape \[5, 2, 3\]; expected \[B, T, D, l\]"),
        (lambda t: t.decode(gpu((B, T, D + 1, L), np.int32)), r"tokens have shape \[5, 2, 5, 3\]"),
        (lambda t: t.encode_into(actions(), tokens(2)), r"out is int32\[5, 2, 4, 2\]; expected int32\[5, 2, 4, 3\]"),
        (lambda t: t.encode_into(actions(), gpu((B, T, D, L))), r"out is float32\[.*\]; expected int32\["),
        (lambda t: t.decode_into(tokens(), gpu((B - 1, T, A))), r"out is float32\[4, 2, 3\]; expected float32\[5"),
        (lambda t: t.encode_into(actions(), tokens(is_read_only=True)), "out is read-only; expected an array that"),
        (lambda t: t.decode_into(tokens(), actions(is_read_only=True)), "out is read-only"),
        (lambda t: t.encode(actions(device=1)), "actions does not lie in the memory of CUDA's device 0"),
        (lambda t: t.decode_into(tokens(), actions(device=1)), "out does not lie in the memory of CUDA's device 0"),
        (lambda t: t.encode(FakeArray(aligned((B, T, 2 * A), np.float32)[..., ::2])), "actions is not C-contiguous"),
        (lambda t: t.decode_into(tokens(stream=7), actions(stream=8)), "out belongs to the stream 0x8"),
        (lambda t: t.encode_into(actions(stream=7), tokens(), stream=9), "actions belongs to the stream 0x7"),
        (lambda t: t.encode_into(actions(), np.empty((B, T, D, L), np.int32)), "out is a numpy.ndarray that does not"),
        (lambda t: t.decode_into(np.zeros((B, T, D, L), np.int32), actions()), r"out is a .*FakeArray; expected a num"),
        (lambda t: t.bind_encode(np.zeros((B, T, A), np.float32), tokens()), "actions is a numpy.ndarray that does "),
        (lambda t: t.bind_decode([1, 2], actions()), "tokens is a builtins.list that does not lie on the GPU"),
        (lambda t: t.decode(tokens(), stats()), "stats were given, but tokens of a 'calibrated' bundle are decoded"),
        (lambda t: t.encode_into(actions(), tokens(), stats()), "a 'calibrated' bundle has no stats"),
        (lambda t: t.bind_encode(actions(), tokens(), stats()), "a 'calibrated' bundle has no stats"),
        (lambda t: t.encode_with_stats(actions()), "a 'calibrated' bundle has no stats"),
        (lambda t: t.bind_encode(gpu((0, T, A)), gpu((0, T, D, L), np.int32)), "an empty batch cannot be bound"),
        (lambda t: t.bind_decode(gpu((0, T, D, L), np.int32), gpu((0, T, A))), "an empty batch cannot be bound"),
        (lambda t: t.encode(actions(), stream="main"), "stream is a str; expected a stream"),
    ],
)
def test_wrong_arrays_are_refused_by_name_before_anything_runs(calibrated: Opened, call: Call, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call(calibrated.tokenizer)
    assert calibrated.backend.calls == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.decode(tokens()), "tokens of a `dynamic` bundle cannot be decoded alone"),
        (lambda t: t.bind_decode(tokens(), actions()), "tokens of a `dynamic` bundle cannot be decoded alone"),
        (lambda t: t.decode(tokens(2), stats(3)), r"stats has shape \[5, 2, 3, 2\]; expected \[5, 2, 2, 2\]"),
        (lambda t: t.decode(tokens(), gpu((B, T, L, 2), np.float64)), "stats have type float64; expected float32"),
        (lambda t: t.decode(tokens(), np.zeros((B, T, L, 2), np.float32)), "stats is a numpy.ndarray that does not"),
        (lambda t: t.decode_into(tokens(stream=7), actions(), stats(stream=8)), "stats belongs to the stream 0x8"),
        (lambda t: t.encode_into(actions(), tokens(), stats(2)), r"stats_out is float32\[5, 2, 2, 2\]; expected"),
        (lambda t: t.encode_into(actions(), tokens(), stats(is_read_only=True)), "stats_out is read-only"),
    ],
)
def test_statistics_are_checked_like_everything_else(dynamic: Opened, call: Call, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call(dynamic.tokenizer)
    assert dynamic.backend.calls == []


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_a_prefix_that_was_not_built_is_refused_as_such(calibrated: Opened, layers: int) -> None:
    with pytest.raises(UnbuiltPrefixError, match=rf"tokens have {layers} layers .*; this bundle decodes 2 or 3"):
        calibrated.tokenizer.decode(tokens(layers))
    assert calibrated.backend.calls == []


def test_an_output_that_overlaps_an_input_is_refused(calibrated: Opened, dynamic: Opened) -> None:
    memory = aligned((1000,), np.int32)
    shared = FakeArray(memory[: B * T * D * L].reshape(B, T, D, L))
    over = FakeArray(memory[B * T * D * L - 8 :][: B * T * A].view(np.float32).reshape(B, T, A))
    for call in (
        lambda: calibrated.tokenizer.encode_into(over, shared),
        lambda: calibrated.tokenizer.decode_into(shared, over),
        lambda: calibrated.tokenizer.bind_encode(over, shared),
    ):
        with pytest.raises(InvalidInputError, match=r"out overlaps the memory of (actions|tokens)"):
            call()
    both = FakeArray(memory[: B * T * L * 2].view(np.float32).reshape(B, T, L, 2))
    with pytest.raises(InvalidInputError, match="overlaps the memory of"):
        dynamic.tokenizer.encode_into(actions(), shared, both)
    assert calibrated.backend.calls == dynamic.backend.calls == []


def test_inputs_may_share_their_memory(dynamic: Opened) -> None:
    memory = aligned((B * T * D * L,), np.int32)
    both = FakeArray(memory[: B * T * L * 2].view(np.float32).reshape(B, T, L, 2))
    dynamic.tokenizer.decode_into(FakeArray(memory.reshape(B, T, D, L)), actions(), both)
    assert dynamic.names == ["decode_on_gpu"]


def test_an_empty_batch_runs_nothing_and_has_empty_results(calibrated: Opened) -> None:
    assert calibrated.tokenizer.encode(gpu((0, T, A))).shape == (0, T, D, L)
    assert calibrated.tokenizer.decode(gpu((0, T, D, L), np.int32)).shape == (0, T, A)
    calibrated.tokenizer.encode_into(gpu((0, T, A)), gpu((0, T, D, L), np.int32))
    assert calibrated.backend.calls == []


def test_bound_calls_are_what_the_backend_gives(calibrated: Opened) -> None:
    assert calibrated.tokenizer.bind_encode(actions(), tokens(), stream=7) == "bind_encode"
    assert calibrated.tokenizer.bind_decode(tokens(), actions(), stream=7) == "bind_decode"
    assert [stream for _, _, stream in calibrated.backend.calls] == [7, 7]


def test_a_closed_tokenizer_takes_nothing(calibrated: Opened) -> None:
    calibrated.tokenizer.encode(actions())
    calibrated.tokenizer.close()
    for call in (calibrated.tokenizer.encode, calibrated.tokenizer.decode):
        with pytest.raises(TokenizerError, match="this tokenizer was closed"):
            call(actions())


def test_a_backend_for_numpy_arrays_alone_says_so(tokenizer: ActionTokenizer) -> None:
    if tokenizer.backend.name != "onnxruntime":
        pytest.skip("another backend works here")
    for call in (lambda: tokenizer.encode(actions()), lambda: tokenizer.bind_decode(tokens(), actions())):
        with pytest.raises(InvalidInputError, match="'onnxruntime' takes numpy arrays alone; load the bundle with one"):
            call()
