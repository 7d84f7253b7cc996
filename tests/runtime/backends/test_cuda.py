"""Which kernel of the generated CUDA is launched for how many steps, and which gates judge: no GPU is needed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pytest

from rfsq.runtime.bundle.manifest import CHUNKS_OF_WINDOW, bytes_of_window, sorter_name, tiles_of_window, token_types
from tests.bundles import Recipe, deploy, make_manifest
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends import cuda as cuda_backend
from rfsq.runtime.backends.cuda import FEW_CHUNKS, FEW_STEPS, CudaFunction, variants_of, with_tokens
from rfsq.runtime.backends.gpu.kernels import KernelArguments
from rfsq.runtime.bundle.errors import BackendUnavailableError

THREADS, RESIDENT = 256, 660


class FakeMemory:
    """Of the GPU. address: another for each."""

    addresses = itertools.count(256, 256)
    live: ClassVar[list[FakeMemory]] = []

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.address = num_bytes, next(self.addresses)
        self.live.append(self)

    def close(self) -> None:
        self.live.remove(self)


@pytest.fixture(autouse=True)
def live(monkeypatch: pytest.MonkeyPatch) -> list[FakeMemory]:
    monkeypatch.setattr(cuda_backend, "DeviceMemory", FakeMemory)
    monkeypatch.setattr(FakeMemory, "live", [])
    return FakeMemory.live


@dataclass
class FakeKernel:
    name: str
    launches: list[tuple[str, int]]
    threads: int = THREADS
    resident_blocks: int = RESIDENT

    def launch(self, blocks: int, _arguments: KernelArguments, _stream: int) -> None:
        self.launches.append((self.name, blocks))


@dataclass
class FakeLibrary:
    """Has every kernel but those whose name holds one of `missing`."""

    missing: tuple[str, ...] = ()
    launches: list[tuple[str, int]] = field(default_factory=list)

    def find(self, name: str) -> FakeKernel | None:
        return None if any(part in name for part in self.missing) else FakeKernel(name, self.launches)

    def kernel(self, name: str) -> FakeKernel:
        found = self.find(name)
        if found is None:
            raise BackendUnavailableError(f"the engine has no kernel {name}")
        return found


def chunk_functions_of(library: FakeLibrary) -> list[CudaFunction]:
    deployed = deployed_chunk_tokens(ChunkRecipe())
    return [
        CudaFunction(cast(Any, library), deployed.model, with_tokens(graph, token_type))
        for token_type in token_types(deployed.model.vocabulary, "uint16")
        for graph, _ in deployed.graphs()
        if graph.form == "reduce" and graph.role != "belief"
    ]


def functions_of(library: FakeLibrary) -> list[CudaFunction]:
    manifest = make_manifest(deploy(Recipe()))
    return [
        CudaFunction(cast(Any, library), manifest.model, with_tokens(graph, token_type))
        for token_type in token_types(manifest.model.num_levels)
        for graph in manifest.graphs_of("reduce")
    ]


def launched(function: CudaFunction, steps: int, library: FakeLibrary) -> tuple[str, int]:
    program = function.new_program()
    assert steps % function.per_chunk == 0
    graph = function.graph
    shape = graph.inputs[0].shape_of(steps // function.per_chunk, 5)
    program.bind(shape, [16] * (len(graph.inputs) + len(graph.outputs)))
    program.enqueue(1)
    return library.launches.pop()


def test_many_steps_take_threads_and_few_take_blocks() -> None:
    library = FakeLibrary()
    encoder = functions_of(library)[0]
    assert launched(encoder, FEW_STEPS, library) == ("encode_int32_few", FEW_STEPS)
    assert launched(encoder, FEW_STEPS + 2, library) == ("encode_int32_many", FEW_STEPS // THREADS + 1)


def test_chunks_of_chunk_tokens_take_blocks_and_many_of_them_share_some() -> None:
    library = FakeLibrary()
    encoder, decoder = chunk_functions_of(library)[:2]
    assert launched(encoder, 512, library) == ("encode_int32_few", 512)
    assert launched(encoder, 513, library) == ("encode_int32_many", 65)
    few = FEW_CHUNKS["decoder"]
    assert launched(decoder, few, library) == ("decode_l9_int32_few", few)
    assert list(variants_of(chunk_functions_of(library))) == [
        "many steps",
        "uint16 tokens",
        "uint16 tokens, many steps",
    ]


def test_many_chunks_are_sorted_before_they_are_decoded(live: list[FakeMemory]) -> None:
    library = FakeLibrary()
    classes = deployed_chunk_tokens(ChunkRecipe()).model.num_classes
    program = chunk_functions_of(library)[1].with_few(0).new_program()
    for windows, blocks in ((5, RESIDENT), (9, RESIDENT), (1, tiles_of_window(classes))):
        library.launches.clear()
        program.bind((CHUNKS_OF_WINDOW * windows - 1, 9), [16, 32])
        program.enqueue(1)
        assert library.launches == [(sorter_name(9, "int32"), windows), ("decode_l9_int32_many", blocks)]
    # What it has grown to once serves fewer, too.
    assert [memory.num_bytes for memory in live] == [9 * bytes_of_window(classes)]
    program.close()
    assert live == []


def test_an_engine_that_sorts_otherwise_decodes_one_by_one(live: list[FakeMemory]) -> None:
    library = FakeLibrary(missing=(sorter_name(9, "int32"),))
    function = chunk_functions_of(library)[1]
    assert not function.has_many
    assert launched(function, 10**6, library) == ("decode_l9_int32_few", 10**6)
    assert live == []


def test_few_chunks_need_no_memory(live: list[FakeMemory]) -> None:
    library = FakeLibrary()
    for function in (*chunk_functions_of(library), *functions_of(library)):
        launched(function, function.per_chunk, library)
    assert live == []


def test_a_decoder_of_chunk_tokens_is_told_how_many_there_are() -> None:
    """One kernel decodes any number; an encoder gives all."""
    encoder, decoder = chunk_functions_of(FakeLibrary())[:2]
    for function, shape, expected in ((encoder, (5, 4, 3), [16, 32, 5, 0]), (decoder, (5, 4), [16, 32, 5, 4, 0])):
        arguments = KernelArguments(function.num_arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_backend, "KernelArguments", lambda _count, made=arguments: made)
            program = function.new_program()
        program.bind(shape, [16, 32])
        assert list(arguments._values) == expected
    assert (encoder.graph.decodes, decoder.graph.decodes) == ((9,), tuple(range(1, 10)))


def test_sizes_without_kernels_for_many_steps_take_blocks_for_any_number() -> None:
    library = FakeLibrary(missing=("many",))
    functions = functions_of(library)
    assert launched(functions[0], 2**31 - 2, library) == ("encode_int32_few", 2**31 - 2)
    assert list(variants_of(functions)) == ["uint8 tokens"]


def test_every_kernel_is_judged_in_batches_as_small_as_those_of_gates() -> None:
    """Gates judge 8,192 steps at a time, golden vectors are fewer: neither would reach the kernels for more."""
    library = FakeLibrary(missing=("decode_l2_int32_many",))
    functions = functions_of(library)
    variants = variants_of(functions)
    assert list(variants) == ["many steps", "uint8 tokens", "uint8 tokens, many steps"]
    judged = {"": [function for function in functions if function.token_type == "int32"], **variants}
    names = {name: [launched(function, 2, library)[0] for function in functions] for name, functions in judged.items()}
    assert names == {
        "": ["encode_int32_few", "decode_l2_int32_few", "decode_l3_int32_few"],
        "many steps": ["encode_int32_many", "decode_l2_int32_few", "decode_l3_int32_many"],
        "uint8 tokens": ["encode_uint8_few", "decode_l2_uint8_few", "decode_l3_uint8_few"],
        "uint8 tokens, many steps": ["encode_uint8_many", "decode_l2_uint8_many", "decode_l3_uint8_many"],
    }
    # What the tokenizer runs is as it was.
    assert launched(functions[0], 2, library) == ("encode_int32_few", 2)


def test_an_engine_of_another_template_is_refused_by_the_kernel_that_it_lacks() -> None:
    with pytest.raises(BackendUnavailableError, match="no kernel decode_l3_uint8_few"):
        functions_of(FakeLibrary(missing=("l3_uint8",)))
