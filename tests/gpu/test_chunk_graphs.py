"""Engines of chunk tokens on this GPU: the answers of the float64 reference, for every batch and number of tokens."""

import numpy as np
import pytest

from rfsq.export.chunk_graphs import chunk_decoder_graph, chunk_encoder_graph
from rfsq.export.chunk_plan import plan_chunk_code
from rfsq.export.engines import Profile, build_engine
from rfsq.export.graph_builder import LinearForm
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.runtime.backends.gpu.driver import DeviceMemory, PinnedArray, Stream, copy_to_device, copy_to_host
from rfsq.runtime.backends.tensorrt_api import find_tensorrt
from tests.export.chunk_models import fitted_tokenizer, held_out_actions
from tests.export.test_chunk_graphs import Exported, assert_decodes, assert_encodes, share_of_escape
from tests.gpu.conftest import TENSORRT


class Engine:
    """An engine of one input and one output, between arrays of the host."""

    def __init__(self, backend: str, content: bytes, most_tokens: int) -> None:
        self._api = find_tensorrt(backend)
        self._runtime = self._api.create_runtime()
        built = build_engine(backend, content, Profile(1, 1, 4096), (), most_tokens)
        self._engine = self._api.deserialize(self._runtime, built.serialized)
        self._context = self._api.create_context(self._engine, None)
        self._input, self._output = (tensor.name for tensor in self._api.engine_tensors(self._engine))

    def run(self, values: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        stream, given, found = Stream(), PinnedArray(values.shape, values.dtype), PinnedArray(shape, dtype)
        memories = DeviceMemory(given.num_bytes), DeviceMemory(found.num_bytes)
        given.array[...] = values
        copy_to_device(memories[0].address, given.address, given.num_bytes, stream.handle)
        assert self._context.set_input_shape(self._input, values.shape)
        scratch = DeviceMemory(self._api.memory_size(self._context))
        self._context.set_device_memory(scratch.address, scratch.num_bytes)
        for name, memory in zip((self._input, self._output), memories, strict=True):
            assert self._context.set_tensor_address(name, memory.address)
        assert self._context.execute_async_v3(stream.handle)
        copy_to_host(found.address, memories[1].address, found.num_bytes, stream.handle)
        stream.synchronize()
        copied = found.array.copy()
        for resource in (given, found, scratch, *memories, stream):
            resource.close()
        return copied


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory, split: EpisodeSplit) -> Exported:
    tokenizer = fitted_tokenizer(tmp_path_factory, split)
    plan, form = plan_chunk_code(tokenizer), LinearForm.REDUCE
    return Exported(tokenizer, {form: chunk_encoder_graph(plan, form)}, {form: chunk_decoder_graph(plan, form)})


@pytest.fixture(scope="module", params=TENSORRT)
def engines(request: pytest.FixtureRequest, code: Exported) -> tuple[Engine, Engine]:
    most = code.sizes.num_tokens
    graphs = code.encoders[LinearForm.REDUCE], code.decoders[LinearForm.REDUCE]
    encoder, decoder = (Engine(request.param, content, most) for content in graphs)
    return encoder, decoder


def test_engines_encode_as_the_reference(code: Exported, engines: tuple[Engine, Engine], split: EpisodeSplit) -> None:
    kept, far = held_out_actions(split), code.far_actions(300)
    for actions, is_kept in ((kept, True), (far, False), (kept[:1], True)):
        found = engines[0].run(actions, (len(actions), code.sizes.num_tokens), np.int32)
        assert (share_of_escape(code, found) < 0.5) == is_kept
        assert_encodes(code, found, actions)


def test_engines_decode_every_number_of_tokens(code: Exported, engines: tuple[Engine, Engine]) -> None:
    for length in range(1, code.sizes.num_tokens + 1):
        for batch in (1, 40):
            tokens = code.random_tokens(batch, length, seed=length)
            assert_decodes(code, engines[1].run(tokens, (batch, 8, 7), np.float32), tokens)


def test_engines_mark_what_is_illegal(code: Exported, engines: tuple[Engine, Engine]) -> None:
    tokens = code.random_tokens(3, 5)
    tokens[1, 2] = 1024
    decoded = engines[1].run(tokens, (3, 8, 7), np.float32)
    assert np.isnan(decoded).reshape(3, -1).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(decoded[[0, 2]]).all()
    for wrong in (np.nan, np.inf, -np.inf):
        actions = code.far_actions(3)
        actions[1, 3, 2] = wrong
        found = engines[0].run(actions, (3, code.sizes.num_tokens), np.int32)
        assert (found == -1).all(axis=1).tolist() == [False, True, False]
