"""Graphs of chunk tokens: the answers of the float64 reference, from two runtimes, for every number of tokens."""

import copy
import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from rfsq.export.chunk_builder import ChunkBuilder
from rfsq.export.chunk_escape import escape_digits
from rfsq.export.chunk_graphs import LENGTH, chunk_decoder_graph, chunk_encoder_graph
from rfsq.export.chunk_plan import ACTION_LIMIT, plan_chunk_code
from rfsq.export.engines import Profile, build_engine, differences, inspect_engine
from rfsq.export.graph_builder import BATCH, IR_VERSION, OPSET, LinearForm, batched
from rfsq.export.parity import check_graph
from rfsq.rfsq_ref.chunk_bits import MOST_BITS, binary
from rfsq.rfsq_ref.chunk_code import ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS, BLOCK_VALUES, escape_encode
from rfsq.rfsq_ref.chunk_judging import judge_chunk_tokens
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.manifest import GraphEntry, TensorEntry
from tests.export.chunk_models import fitted_tokenizer, held_out_actions, random_tokenizer
from tests.export.runtimes import EVERYWHERE, MARKED, PRODUCTS, RUNTIMES, OnnxRuntime
from tests.export.test_trt_builder import needs_rtx

#: Of every kind: one class beside escape; numbers of classes that are no power of two; escape cut off within its words,
#: behind them, and with digits to spare; values that fill their words and do not; large words.
SIZES = [
    ChunkSizes(7, 8, num_classes=9),
    ChunkSizes(2, 3, num_classes=5, num_tokens=8),
    ChunkSizes(1, 1, num_classes=2, token_bits=5, num_tokens=3),
    ChunkSizes(3, 2, num_classes=4, token_bits=6, num_tokens=2),
    ChunkSizes(5, 4, num_classes=7, token_bits=16, num_tokens=20),
]
NORMALISER = Normaliser(NormaliserKind.QUANTILE, (0.5, -2.0), (0.25, 3.0))


@dataclass(frozen=True, eq=False)
class Exported:
    tokenizer: ChunkTokenizer
    encoders: dict[LinearForm, bytes]
    decoders: dict[LinearForm, bytes]

    @property
    def sizes(self) -> ChunkSizes:
        return self.tokenizer.sizes

    @property
    def graphs(self) -> list[bytes]:
        return [*self.encoders.values(), *self.decoders.values()]

    def random_tokens(self, count: int, length: int, seed: int = 0) -> np.ndarray:
        """Every second chunk of a class number drawn from all that its bits can say, escape's among them."""
        random, words = np.random.default_rng(seed), 2**self.sizes.token_bits
        tokens = random.integers(words, size=(count, length), dtype=np.int32)
        tokens[::4, 0] = words - 1
        return tokens

    def decoded(self, tokens: np.ndarray) -> np.ndarray:
        return self.tokenizer.decode(torch.from_numpy(tokens)).numpy()

    def kept_actions(self, count: int, seed: int = 0) -> np.ndarray:
        """Actions that classes hold: some way from their means, along their latents and a little off them."""
        random, reference = np.random.default_rng(seed), self.tokenizer.code
        classes = torch.from_numpy(random.integers(self.sizes.escape, size=count))
        latents = torch.from_numpy(random.normal(size=(count, reference.scale.shape[1])))
        chunks = reference.chunks(latents * reference.scale[classes], classes).clamp(-1, 1).numpy()
        return self._in_units(chunks + random.normal(scale=1e-4, size=chunks.shape))

    def far_actions(self, count: int, seed: int = 0) -> np.ndarray:
        """Actions that hardly any class holds, some of them outside the range."""
        return self._in_units(np.random.default_rng(seed).uniform(-1.2, 1.2, (count, self.sizes.num_values)))

    def _in_units(self, chunks: np.ndarray) -> np.ndarray:
        actions = chunks.reshape(len(chunks), self.sizes.chunk_length, self.sizes.action_dim)
        return (actions * self.tokenizer.units.numpy() + self.tokenizer.offset.numpy()).astype(np.float32)


def exported(tokenizer: ChunkTokenizer) -> Exported:
    plan = plan_chunk_code(tokenizer)
    return Exported(
        tokenizer,
        {form: chunk_encoder_graph(plan, form) for form in LinearForm},
        {form: chunk_decoder_graph(plan, form) for form in LinearForm},
    )


@pytest.fixture(scope="module", params=[*SIZES, "with normaliser"], ids=str)
def any_code(request: pytest.FixtureRequest) -> Exported:
    if request.param == "with normaliser":
        return exported(random_tokenizer(ChunkSizes(2, 4, num_classes=6, num_tokens=9), 1, NORMALISER))
    return exported(random_tokenizer(request.param, 0))


@pytest.fixture(scope="module")
def small_code() -> Exported:
    return exported(random_tokenizer(ChunkSizes(2, 3, num_classes=5, num_tokens=8), 0))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, split: EpisodeSplit) -> Exported:
    return exported(fitted_tokenizer(tmp_path_factory, split))


def run(runtime: type, content: bytes, **feed: np.ndarray) -> np.ndarray:
    (found,) = runtime(content).run(feed)
    return found


# --- decoding ---------------------------------------------------------------------------------------------------------


def assert_decodes(code: Exported, found: np.ndarray, tokens: np.ndarray) -> None:
    """In normalised units an error of 1e-6 for latents up to 1: one of 16 is itself rounded by 1e-6 in float32."""
    assert found.dtype == np.float32
    error = np.abs(found - code.decoded(tokens)) / code.tokenizer.units.numpy()
    assert (error.max(axis=(1, 2), initial=0) <= 1e-6 * largest_latents(code, tokens)).all()


def largest_latents(code: Exported, tokens: np.ndarray) -> np.ndarray:
    """The largest latent of each chunk, and 1 where all are smaller."""
    reference = code.tokenizer.code
    bits = reference.bits(torch.from_numpy(tokens))
    classes = reference.classes(bits)
    kept = classes.clamp(max=code.sizes.escape - 1)
    latents = reference.latents(*reference.companded(bits[:, code.sizes.class_bits :], kept), kept)
    largest = torch.where(classes < code.sizes.escape, latents.abs().amax(dim=1), 1.0)
    return largest.clamp(min=1.0).numpy()


def test_one_graph_decodes_every_number_of_tokens(any_code: Exported) -> None:
    for content in any_code.decoders.values():
        session = OnnxRuntime(content)
        for length in range(1, any_code.sizes.num_tokens + 1):
            tokens = any_code.random_tokens(40, length, seed=length)
            assert_decodes(any_code, session.run({"tokens": tokens})[0], tokens)


@pytest.mark.parametrize(("runtime", "form"), EVERYWHERE)
def test_both_runtimes_decode_alike(any_code: Exported, runtime: type, form: LinearForm) -> None:
    most = any_code.sizes.num_tokens
    for length in {1, (most + 1) // 2, most}:
        tokens = any_code.random_tokens(9, length)
        assert_decodes(any_code, run(runtime, any_code.decoders[form], tokens=tokens), tokens)


@pytest.mark.parametrize(("runtime", "form"), EVERYWHERE)
def test_class_numbers_and_words_that_no_encoder_sends_decode_as_the_last(
    small_code: Exported, runtime: type, form: LinearForm
) -> None:
    """Five classes, of which escape is number 4; words of escape from 243 on are its 242."""
    sizes = small_code.sizes
    tokens = np.repeat(small_code.random_tokens(1, sizes.num_tokens), 256, axis=0)
    bits = np.array([[int(bit) for bit in f"{number:03b}{word:08b}"] for number in range(4, 8) for word in range(256)])
    places = 1 << np.arange(sizes.token_bits - 1, -1, -1)
    for number in range(4):
        rows = bits[number * 256 : (number + 1) * 256]
        tokens[:, 0], second = rows[:, :10] @ places, rows[:, 10:] @ places[:1]
        tokens[:, 1] = tokens[:, 1] % 512 + second
        found = run(runtime, small_code.decoders[form], tokens=tokens)
        assert_decodes(small_code, found, tokens)
        assert (found[243:] == found[242]).all()


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
@pytest.mark.parametrize(("runtime", "form"), EVERYWHERE)
def test_any_batch_is_taken(small_code: Exported, runtime: type, form: LinearForm, batch: int) -> None:
    actions = small_code.kept_actions(7)[:batch]
    tokens = run(runtime, small_code.encoders[form], actions=actions)
    assert tokens.shape == (batch, small_code.sizes.num_tokens)
    assert_encodes(small_code, tokens, actions)
    decoded = run(runtime, small_code.decoders[form], tokens=tokens)
    assert decoded.shape == actions.shape
    assert_decodes(small_code, decoded, tokens)


# --- encoding ---------------------------------------------------------------------------------------------------------


def assert_encodes(code: Exported, found: np.ndarray, actions: np.ndarray) -> None:
    """The reference's tokens, but for those that float32's rounding explains. And they are about as rare as in torch's
    own float32, or the bounds would excuse everything."""
    assert found.dtype == np.int32
    inputs = torch.from_numpy(actions)
    expected = code.tokenizer.encode(inputs.double())
    compared = judge_chunk_tokens(code.tokenizer, inputs.double(), expected.numpy(), found)
    assert compared.num_wrong == 0, compared.first_wrong
    in_float32 = copy.deepcopy(code.tokenizer).float().encode(inputs)
    flips, torch_flips = ((tokens != expected).any(dim=1).sum() for tokens in (torch.from_numpy(found), in_float32))
    assert flips <= 2 * torch_flips + 2


def share_of_escape(code: Exported, tokens: np.ndarray) -> float:
    reference = code.tokenizer.code
    return float((reference.classes(reference.bits(torch.from_numpy(tokens))) == code.sizes.escape).double().mean())


@pytest.mark.parametrize(("runtime", "form"), EVERYWHERE)
def test_both_runtimes_encode_as_the_reference(any_code: Exported, runtime: type, form: LinearForm) -> None:
    kept, far = any_code.kept_actions(60), any_code.far_actions(20)
    found = run(runtime, any_code.encoders[form], actions=np.concatenate((kept, far)))
    assert share_of_escape(any_code, found[: len(kept)]) < 0.5
    assert_encodes(any_code, found, np.concatenate((kept, far)))


@pytest.mark.parametrize("form", LinearForm)
def test_a_fitted_code_encodes_held_out_chunks_as_the_reference(
    fitted: Exported, split: EpisodeSplit, form: LinearForm
) -> None:
    actions = held_out_actions(split)
    session = OnnxRuntime(fitted.encoders[form])
    tokens = session.run({"actions": actions})[0]
    assert share_of_escape(fitted, tokens) < 0.05
    assert_encodes(fitted, tokens, actions)
    decoder = OnnxRuntime(fitted.decoders[form])
    for length in range(1, fitted.sizes.num_tokens + 1):
        part = np.ascontiguousarray(tokens[length::50, :length])
        assert np.abs(decoder.run({"tokens": part})[0] - fitted.decoded(part)).max() <= 1e-6
        part = fitted.random_tokens(40, length, seed=length)
        assert_decodes(fitted, decoder.run({"tokens": part})[0], part)
    far = fitted.far_actions(300)
    tokens = session.run({"actions": far})[0]
    assert share_of_escape(fitted, tokens) > 0.9
    assert_encodes(fitted, tokens, far)


def test_an_error_that_clipping_takes_away_is_none() -> None:
    """A class whose first value is always 3, which decodes as 1, and whose bits all go to the second."""
    sizes = ChunkSizes(1, 2, num_classes=2, token_bits=12, num_tokens=1)
    constants = ChunkConstants(
        mean=torch.tensor([[3.0, 0.0]]),
        basis=torch.eye(2)[None],
        scale=torch.ones(1, 2),
        gain=torch.ones(1, 2, MOST_BITS + 1),
        order=torch.ones(1, 11, dtype=torch.long),
        budgets=(1,),
        weights=torch.ones(1),
    )
    code = exported(ChunkTokenizer(sizes, constants).double())
    actions = np.float32([[[1.0], [0.2]], [[0.5], [0.2]]])
    for runtime, form in EVERYWHERE:
        tokens = run(runtime, code.encoders[form], actions=actions)
        assert_encodes(code, tokens, actions)
        assert [share_of_escape(code, row[None]) for row in tokens] == [0, 1]


def numbers_near_edges() -> np.ndarray:
    """float32 [n] next to edges of escape's cells, and those at which rounding goes wrong first."""
    random, levels = np.random.default_rng(0), 3 * 2**MOST_BITS
    cells = np.unique(np.concatenate((random.integers(levels, size=600), [0, 1, levels // 3, levels // 2, levels - 1])))
    edges = np.concatenate((2 * cells / levels - 1, [1 / 3, -1 / 3, 1.0])).astype(np.float32)
    below, above = np.nextafter(edges, np.float32(-2)), np.nextafter(edges, np.float32(2))
    tiny = np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 3e-8, -3e-8, 2.0**-18, -(2.0**-18)])
    return np.concatenate((edges, below, above, tiny, random.uniform(-1, 1, 600).astype(np.float32))).clip(-1, 1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_escape_finds_the_cell_of_every_float32(runtime: type) -> None:
    """In rational numbers; and so does the reference, but for what its float64 cannot tell from 0."""
    values = numbers_near_edges()
    values = values[: len(values) // 7 * 7].reshape(-1, 7)
    sizes = ChunkSizes(7, 1, num_classes=2, num_tokens=12)
    build = ChunkBuilder(LinearForm.GEMM)
    for name in escape_digits(build, sizes, "chunks"):
        build.apply("Identity", [name], f"found.{name}")
    outputs = [batched("found.words", TensorProto.FLOAT, 2), batched("found.finer", TensorProto.FLOAT, 7)]
    content = build.model("escape", [batched("chunks", TensorProto.FLOAT, 7)], outputs)
    words, finer = (found.astype(np.int64) for found in runtime(content).run({"chunks": values}))

    last = 3 * 2**MOST_BITS - 1
    cells = [min(int((Fraction(float(x)) + 1) * 3 * 2**MOST_BITS / 2), last) for x in values.reshape(-1)]
    assert finer.reshape(-1).tolist() == [cell % 2**MOST_BITS for cell in cells]
    digits = np.zeros((len(values), 10), np.int64)
    digits[:, :7] = np.reshape([cell >> MOST_BITS for cell in cells], values.shape)
    assert (words == digits.reshape(-1, 2, BLOCK_VALUES) @ 3 ** np.arange(BLOCK_VALUES - 1, -1, -1)).all()

    is_clear = ((np.abs(values) > 1e-15) | (values >= 0)).all(axis=1)
    assert is_clear.mean() > 0.9
    expected = escape_encode(torch.from_numpy(values[is_clear]), 2 * BLOCK_BITS + 7 * MOST_BITS)
    found = binary(torch.from_numpy(words), BLOCK_BITS).flatten(1), binary(torch.from_numpy(finer), MOST_BITS)
    code = torch.cat((found[0], found[1].transpose(1, 2).flatten(1)), dim=1)
    assert torch.equal(code[is_clear], expected)


# --- the forms for GPUs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runtime", "form"), list(itertools.product(RUNTIMES, MARKED)))
def test_an_illegal_token_marks_its_chunk_and_no_other(small_code: Exported, runtime: type, form: LinearForm) -> None:
    session, words = runtime(small_code.decoders[form]), 2**small_code.sizes.token_bits
    for length in (1, 5, 8):
        tokens = small_code.random_tokens(3, length)
        tokens[1, :2] = [0, words - 1][:length]
        (before,) = session.run({"tokens": tokens})
        assert np.isfinite(before).all()
        for place, number in itertools.product(range(length), [-1, words, 2**16, -(2**31), 2**31 - 1]):
            wrong = tokens.copy()
            wrong[1, place] = number
            (found,) = session.run({"tokens": wrong})
            assert np.isnan(found[1]).all(), (place, number)
            np.testing.assert_array_equal(found[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(("runtime", "form"), list(itertools.product(RUNTIMES, MARKED)))
def test_an_illegal_action_marks_its_chunk_and_no_other(small_code: Exported, runtime: type, form: LinearForm) -> None:
    session, actions = runtime(small_code.encoders[form]), small_code.kept_actions(3)
    limit = np.float32(ACTION_LIMIT)
    beyond = np.nextafter(limit, np.float32(np.inf))
    (before,) = session.run({"actions": actions})
    for (step, dimension), number in itertools.product(np.ndindex(3, 2), [np.nan, np.inf, -np.inf, beyond, -beyond]):
        wrong = actions.copy()
        wrong[1, step, dimension] = number
        (found,) = session.run({"actions": wrong})
        assert (found[1] == -1).all(), (step, dimension, number)
        np.testing.assert_array_equal(found[[0, 2]], before[[0, 2]])
    actions[1, 0] = limit, -limit
    assert_encodes(small_code, session.run({"actions": actions})[0], actions)


# --- form -------------------------------------------------------------------------------------------------------------


def entry_of(code: Exported, role: str, form: LinearForm) -> GraphEntry:
    sizes = code.sizes
    actions = TensorEntry("actions", "float32", (-1, sizes.chunk_length, sizes.action_dim))
    if role == "encoder":
        tokens = TensorEntry("tokens", "int32", (-1, sizes.num_tokens))
        return GraphEntry("encoder.onnx", "encoder", sizes.num_tokens, form.value, (actions,), (tokens,))
    tokens = TensorEntry("tokens", "int32", (-1, -1))
    return GraphEntry("decoder.onnx", "decoder", sizes.num_tokens, form.value, (tokens,), (actions,))


def test_graphs_are_sound_and_every_shape_is_known(any_code: Exported) -> None:
    for role, graphs in (("encoder", any_code.encoders), ("decoder", any_code.decoders)):
        for form, content in graphs.items():
            assert check_graph(entry_of(any_code, role, form), content) == []


def test_batch_and_length_are_dynamic_and_named(small_code: Exported) -> None:
    for content in small_code.decoders.values():
        (tokens,) = onnx.load_model_from_string(content).graph.input
        assert [dim.dim_param for dim in tokens.type.tensor_type.shape.dim] == [BATCH, LENGTH]


def test_every_constant_and_every_node_is_used(any_code: Exported) -> None:
    for content in any_code.graphs:
        graph = onnx.load_model_from_string(content).graph
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        made = {constant.name for constant in graph.initializer} | {name for node in graph.node for name in node.output}
        assert made | {value.name for value in graph.input} == used


def test_the_form_for_tensorrt_has_no_matrix_product(any_code: Exported) -> None:
    for graphs in (any_code.encoders, any_code.decoders):
        for form, content in graphs.items():
            model = onnx.load_model_from_string(content)
            operators = {node.op_type for node in model.graph.node}
            assert bool(operators & PRODUCTS) == (form is not LinearForm.REDUCE)
            # ONNX Runtime would not run on the GPU what follows from shapes.
            assert not operators & {"Shape", "Size"}
            assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
            assert model.ir_version == IR_VERSION


@needs_rtx
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_tensorrt_compiles_one_engine_for_all_batches_and_lengths(any_code: Exported, role: str) -> None:
    content = (any_code.encoders if role == "encoder" else any_code.decoders)[LinearForm.REDUCE]
    built = build_engine("tensorrt-rtx", content, Profile(1, 1, 4096), (), any_code.sizes.num_tokens)
    _, tensors = inspect_engine(built)
    assert list(differences(built, entry_of(any_code, role, LinearForm.REDUCE), tensors)) == []
    assert built.warnings == ()
    if role == "decoder":
        most = any_code.sizes.num_tokens
        assert [tensor.profile for tensor in tensors if tensor.mode == "input"] == [((1, 1), (1, most), (4096, most))]
