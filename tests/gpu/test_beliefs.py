"""Beliefs on the generated CUDA of this GPU: the definition's answers from wherever numbers lie, in any batch, on any
stream, captured or not."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.beliefs import chunk_belief, step_belief
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime import ActionTokenizer, InvalidInputError
from rfsq.runtime.backends.beliefs import coarse_layers
from rfsq.runtime.backends.cuda_beliefs import _MOST_SLOT_BYTES, BeliefKernels
from rfsq.runtime.backends.gpu.driver import open_device
from rfsq.runtime.bundle.beliefs import Belief, BeliefMode
from rfsq.runtime.bundle.comparison import action_errors
from rfsq.runtime.bundle.models import ChunkModel
from tests.bundles import Recipe, deploy, write_bundle
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens, write_chunk_bundle

ACTION_ERROR, DEVIATION_ERROR = 1e-6, 1e-4
SIZES = ChunkSizes(8, 7)
#: Per-step tokens, and both forms of chunk tokens.
FORMS = ("calibrated", "recovered", "words", "pair")
Given = tuple[np.ndarray, ...]
Define = Callable[[tuple[torch.Tensor, ...], BeliefMode], Belief[torch.Tensor]]


@dataclass(frozen=True)
class Here:
    """A tokenizer, the definition in float64, and in which form its beliefs are given."""

    tokenizer: ActionTokenizer
    define: Define
    form: str

    def logits(self, batch: int, length: int, spread: float = 2.0, seed: int = 0) -> Given:
        model, random = self.tokenizer.model, np.random.default_rng(seed)
        shapes: tuple[tuple[int, ...], ...] = ((*model.tokens_shape(batch, length), model.vocabulary),)
        if self.form == "pair":
            assert isinstance(model, ChunkModel)
            shapes = (batch, model.num_classes), (batch, length * model.token_bits - model.class_bits)
        return tuple((random.standard_normal(shape) * spread).astype(np.float32) for shape in shapes)

    def on_gpu(self, given: Given, out: list[Any] | None = None, **terms: Any) -> list[np.ndarray]:
        """Actions, std and the mode's probability."""
        arrays = tuple(torch.from_numpy(part).cuda() for part in given)
        outputs = self.outputs(len(given[0])) if out is None else out
        self.tokenizer.decode_logits_into(arrays if len(arrays) > 1 else arrays[0], *outputs, **terms)
        return [output.cpu().numpy() for output in outputs]

    def outputs(self, batch: int) -> list[torch.Tensor]:
        shape = self.tokenizer.model.actions_shape(batch)
        return [torch.full(size, 77.0, device="cuda") for size in (shape, shape, (batch,))]

    @property
    def lengths(self) -> tuple[int, ...]:
        prefixes = self.tokenizer.prefixes
        return prefixes[0], prefixes[len(prefixes) // 2], prefixes[-1]


def define_steps(recipe: Recipe, coarse: int) -> Define:
    reference = deploy(recipe).reference
    return lambda exact, mode: step_belief(reference, exact[0], mode, coarse, None)


def define_chunks(recipe: ChunkRecipe) -> Define:
    from tests.export.test_chunk_c_beliefs import known

    model = deployed_chunk_tokens(recipe).reference.model
    return lambda exact, mode: chunk_belief(model, known(recipe.sizes, exact), mode, None)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Here]]:
    folder, capability = tmp_path_factory.mktemp("beliefs"), open_device().compute_capability
    found = {}
    for mode in (DeployMode.CALIBRATED, DeployMode.RECOVERED):
        recipe = Recipe(mode, ModelConfig(), chunk_length=8, prefixes=(3,), compute_capability=capability)
        path = write_bundle(folder / mode.value, recipe)
        tokenizer = ActionTokenizer.load(path, backend="cuda")
        define = define_steps(recipe, coarse_layers(tokenizer.model))
        found[mode.value] = Here(tokenizer, define, mode.value)
    chunk_recipe = ChunkRecipe(sizes=SIZES, compute_capability=capability)
    tokenizer = ActionTokenizer.load(write_chunk_bundle(folder / "chunks", chunk_recipe), backend="cuda")
    for form in ("words", "pair"):
        found[form] = Here(tokenizer, define_chunks(chunk_recipe), form)
    yield found
    for here in found.values():
        here.tokenizer.close()


@pytest.fixture(params=FORMS)
def here(request: pytest.FixtureRequest, tokenizers: dict[str, Here]) -> Here:
    return tokenizers[request.param]


def exactly(logits: Given, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Probabilities in float64; temperature: as float32 has its inverse."""
    first, *bits = (torch.from_numpy(part).double() * float(np.float32(1 / temperature)) for part in logits)
    return first.softmax(-1), *(part.sigmoid() for part in bits)


def one_hot(here: Here, tokens: np.ndarray) -> Given:
    model = here.tokenizer.model
    if here.form != "pair":
        return (np.float32(tokens[..., None] == np.arange(model.vocabulary)),)
    assert isinstance(model, ChunkModel)
    digits = (tokens[..., None] >> np.arange(model.token_bits - 1, -1, -1) & 1).reshape(len(tokens), -1)
    number = np.minimum(tokens[:, 0] >> model.token_bits - model.class_bits, model.num_classes - 1)
    bits = np.ascontiguousarray(digits[:, model.class_bits :], np.float32)
    return np.float32(number[:, None] == np.arange(model.num_classes)), bits


@pytest.mark.parametrize("mode", ["expected", "likeliest mode"])
def test_beliefs_are_those_of_the_definition_from_the_host_and_the_gpu(here: Here, mode: BeliefMode) -> None:
    units = np.array(here.tokenizer.model.action_units)
    for length in here.lengths:
        for spread, temperature in ((0.3, 1.0), (3.0, 0.7), (30.0, 1.0)):
            logits = here.logits(9, length, spread, seed=length)
            found = here.on_gpu(logits, mode=mode, temperature=temperature)
            expected = here.define(exactly(logits, temperature), mode)
            worst = action_errors(expected.actions.numpy(), found[0], units)
            assert worst.value <= ACTION_ERROR, worst
            std = expected.std.numpy()
            limit = DEVIATION_ERROR * std.max((1, 2), keepdims=True) + 1e-7 * units
            assert (np.abs(found[1] - std) <= limit).all()
            np.testing.assert_allclose(found[2], expected.mode_probability.numpy(), rtol=2e-6)
            belief = here.tokenizer.decode_logits(
                logits if len(logits) > 1 else logits[0], mode=mode, temperature=temperature
            )
            for one, other in zip((belief.actions, belief.std, belief.mode_probability), found, strict=True):
                assert np.array_equal(one, other)
            assert np.array_equal(belief.mode, expected.mode.numpy())


def test_what_is_certain_gives_the_bits_of_decode(here: Here) -> None:
    model = here.tokenizer.model
    for length in here.lengths:
        tokens = np.random.default_rng(1).integers(
            model.vocabulary, size=model.tokens_shape(50, length), dtype=np.int32
        )
        given = tuple(torch.from_numpy(part).cuda() for part in one_hot(here, tokens))
        decoded = torch.as_tensor(here.tokenizer.decode(torch.from_numpy(tokens).cuda()), device="cuda")
        for mode in ("expected", "likeliest mode"):
            out, std, probability = here.outputs(50)
            source = given if len(given) > 1 else given[0]
            here.tokenizer.decode_probabilities_into(source, out, std, probability, mode=mode)
            assert torch.equal(out.view(torch.int32), decoded.view(torch.int32))
            assert not std.any()
            assert (probability == 1).all()


def test_what_is_no_distribution_marks_its_chunk_and_no_other(here: Here) -> None:
    logits = here.logits(40, here.lengths[1])
    expected = here.on_gpu(logits)
    chosen = np.arange(0, 40, 7)
    for index in range(len(logits)):
        wrong = tuple(part.copy() for part in logits)
        for turn, chunk in enumerate(chosen):
            wrong[index][chunk].flat[turn * 131 % wrong[index][0].size] = (np.nan, np.inf)[turn % 2]
        found = here.on_gpu(wrong)
        for part, was in zip(found, expected, strict=True):
            assert np.isnan(part[chosen]).all()
            assert np.array_equal(np.delete(part, chosen, 0), np.delete(was, chosen, 0))
        arrays = tuple(torch.from_numpy(part).cuda() for part in wrong)
        belief = here.tokenizer.decode_logits(arrays if len(arrays) > 1 else arrays[0])
        mode = torch.as_tensor(belief.mode, device="cuda").cpu().numpy()
        assert (mode[chosen] == -1).all()
        assert (np.delete(mode, chosen, 0) >= 0).all()


def test_a_chunk_has_the_same_bits_in_every_batch(here: Here) -> None:
    slots = _MOST_SLOT_BYTES // BeliefKernels(_NoLibrary(), here.tokenizer.model).slot_bytes  # type: ignore[arg-type]
    count = slots + 3 if here.form in ("words", "pair") else 5000
    logits = here.logits(count, here.lengths[0])
    whole = here.on_gpu(logits)
    for part in (slice(0, 1), slice(5, 20), slice(1000, 1400), slice(count - 5, count)):
        some = here.on_gpu(tuple(np.ascontiguousarray(array[part]) for array in logits))
        assert all(np.array_equal(one, other[part]) for one, other in zip(some, whole, strict=True))


class _NoLibrary:
    def find(self, _name: str) -> None:
        return None


def test_a_bound_call_reads_what_is_there_when_it_is_launched(here: Here) -> None:
    length = here.lengths[1]
    first, second = here.logits(3, length, seed=1), here.logits(3, length, seed=2)
    arrays = tuple(torch.from_numpy(part).cuda() for part in first)
    source, outputs, stream = arrays if len(arrays) > 1 else arrays[0], here.outputs(3), torch.cuda.Stream()
    bound = here.tokenizer.bind_decode_logits(source, *outputs, mode="likeliest mode", stream=stream)
    alone = here.outputs(3)[:1]
    without = here.tokenizer.bind_decode_logits(source, *alone, mode="likeliest mode", stream=stream)
    for given in (first, second, first):
        expected = here.on_gpu(given, mode="likeliest mode")
        with torch.cuda.stream(stream):
            for array, part in zip(arrays, given, strict=True):
                array.copy_(torch.from_numpy(part))
            for _ in range(20):
                bound()
                without()
        stream.synchronize()
        for output, wanted in zip((*outputs, *alone), (*expected, expected[0]), strict=True):
            assert np.array_equal(output.cpu().numpy(), wanted)
    bound.close()
    without.close()


def test_calls_keep_the_order_of_their_stream(here: Here) -> None:
    logits = here.logits(64, here.lengths[1])
    expected = here.on_gpu(logits)
    stream, outputs = torch.cuda.Stream(), here.outputs(64)
    with torch.cuda.stream(stream):
        arrays = tuple(torch.from_numpy(part).cuda() for part in logits)
        spoilt = tuple(torch.zeros_like(array) for array in arrays)
        torch.cuda._sleep(50_000_000)
        for array, own in zip(spoilt, arrays, strict=True):
            array.copy_(own)
        here.tokenizer.decode_logits_into(spoilt if len(spoilt) > 1 else spoilt[0], *outputs)
        for array in spoilt:
            array.zero_()
    stream.synchronize()
    assert all(np.array_equal(output.cpu().numpy(), part) for output, part in zip(outputs, expected, strict=True))


def test_threads_share_a_tokenizer(here: Here) -> None:
    def ask(seed: int) -> bool:
        logits = here.logits(1 + seed % 3, here.lengths[seed % 3], seed=seed)
        belief = here.tokenizer.decode_logits(logits if len(logits) > 1 else logits[0], temperature=1.0 + seed % 2)
        found = here.on_gpu(logits, temperature=1.0 + seed % 2)
        return all(map(np.array_equal, (belief.actions, belief.std, belief.mode_probability), found))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_threads_bind_and_call_on_streams_of_their_own(here: Here) -> None:
    def ask(seed: int) -> bool:
        # More temperatures than engines keep ready: what is dropped waits while other threads capture.
        terms: dict[str, Any] = {"temperature": 1.0 + seed % 7 / 4}
        logits = here.logits(1 + seed % 3, here.lengths[seed % 3], seed=seed)
        stream, outputs, again = torch.cuda.Stream(), here.outputs(len(logits[0])), here.outputs(len(logits[0]))
        with torch.cuda.stream(stream):
            arrays = tuple(torch.from_numpy(part).cuda() for part in logits)
            source = arrays if len(arrays) > 1 else arrays[0]
            bound = here.tokenizer.bind_decode_logits(source, *outputs, **terms, stream=stream)
            bound()
            here.tokenizer.decode_logits_into(source, *again, **terms, stream=stream)
        stream.synchronize()
        bound.close()
        expected = here.tokenizer.decode_logits(logits if len(logits) > 1 else logits[0], **terms)
        wanted = (expected.actions, expected.std, expected.mode_probability)
        found = zip(outputs, again, wanted, strict=True)
        return all(np.array_equal(one.cpu(), part) and np.array_equal(two.cpu(), part) for one, two, part in found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_bench_times_logits_that_lie_on_the_gpu(here: Here) -> None:
    from rfsq.runtime.benchmark.gpu import device_belief_figures

    with ExitStack() as scope:
        figures = list(device_belief_figures(scope, here.tokenizer))
        assert [figure.operation for figure in figures] == ["logits", "logits, std", "logits, std, likeliest mode"]
        for figure in figures:
            assert figure.path == "device"
            assert (figure.take(3) > 0).all()


def test_what_the_gpu_does_not_take_is_refused(here: Here) -> None:
    arrays = tuple(torch.from_numpy(part).cuda() for part in here.logits(2, here.lengths[0]))
    source, outputs = arrays if len(arrays) > 1 else arrays[0], here.outputs(2)
    for call, message in (
        (lambda: here.tokenizer.decode_logits(source, mode="sample"), "samples are drawn of numpy arrays"),
        (lambda: here.tokenizer.decode_logits_into(source, *outputs, temperature=-1.0), "temperature"),
        (lambda: here.tokenizer.decode_probabilities_into(source, *outputs, temperature=2.0), "decode_logits"),
        (lambda: here.tokenizer.decode_logits_into(source, outputs[0], outputs[0]), "overlaps"),
        (lambda: here.tokenizer.decode_logits_into(source, outputs[0].double()), "float64"),
        (lambda: here.tokenizer.bind_decode_logits(source, outputs[2]), "expected float32"),
        (lambda: here.tokenizer.decode_logits_into(source, np.empty(1, np.float32)), "GPU"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_a_bundle_without_its_kernels_says_so(tmp_path: Path) -> None:
    from rfsq.runtime.backends.beliefs import decodes_beliefs
    from rfsq.runtime.backends.registry import create_backend
    from rfsq.runtime.bundle.folder import open_bundle

    recipe = Recipe(DeployMode.DYNAMIC, ModelConfig(), compute_capability=open_device().compute_capability)
    backend = create_backend("cuda", open_bundle(write_bundle(tmp_path / "bundle", recipe)))
    assert not decodes_beliefs(backend)
    backend.close()
