"""Probabilities and logits of tokens, decoded by a tokenizer: the definition's answers, or typed errors."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.beliefs import BitProbabilities, bits_of_tokens, chunk_belief, step_belief
from rfsq.runtime import ActionTokenizer, InvalidInputError, TokenizerError, UnbuiltPrefixError
from rfsq.runtime.backends import graph_beliefs
from rfsq.runtime.backends.beliefs import BeliefAnswer, BeliefQuestion
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle import backend_specs
from rfsq.runtime.bundle.belief_validation import BeliefValidator
from rfsq.runtime.bundle.beliefs import Belief, BeliefMode
from rfsq.runtime.bundle.comparison import action_errors, std_error
from rfsq.runtime.bundle.errors import IllegalValueError
from rfsq.runtime.bundle.models import ChunkModel
from tests.bundles import Recipe, random_model
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

#: Those on the processor.
BACKENDS = [name for name, spec in backend_specs.BACKENDS.items() if spec.decodes_beliefs and not spec.is_on_gpu]
STEP_MODES = (DeployMode.CALIBRATED, DeployMode.RECOVERED, DeployMode.NONE)
MODES: tuple[BeliefMode, ...] = ("expected", "likeliest mode")


@dataclass(frozen=True, eq=False)
class Case:
    """A tokenizer, and its model in float64."""

    tokenizer: ActionTokenizer
    model: Any

    @property
    def is_chunk(self) -> bool:
        return isinstance(self.tokenizer.model, ChunkModel)

    def logits(self, prefix: int, count: int = 5, *, seed: int = 0) -> Any:
        """Of tokens, from vague to nearly certain."""
        random = np.random.default_rng(seed)
        shape = (*self.tokenizer.model.tokens_shape(count, prefix), self.tokenizer.model.vocabulary)
        scale = np.resize([0.5, 2, 8], count).reshape(-1, *[1] * (len(shape) - 1))
        return (random.standard_normal(shape) * scale).astype(np.float32)

    def pair(self, prefix: int, count: int = 5, *, seed: int = 0) -> tuple[Any, Any]:
        """Logits of classes and bits."""
        model, random = self.tokenizer.model, np.random.default_rng(seed)
        assert isinstance(model, ChunkModel)
        num_bits = prefix * model.token_bits - model.class_bits
        scale = np.resize([0.5, 2, 8], count)[:, None]
        sizes = model.num_classes, num_bits
        classes, bits = ((random.standard_normal((count, size)) * scale).astype(np.float32) for size in sizes)
        return classes, bits

    def expected(self, logits: Any, mode: BeliefMode) -> Belief[torch.Tensor]:
        """By the definition."""
        if isinstance(logits, tuple):
            classes, bits = (torch.from_numpy(part).double() for part in logits)
            ones = bits.sigmoid().unsqueeze(1).expand(-1, classes.shape[1], -1)
            return chunk_belief(self.model, BitProbabilities(classes.softmax(-1), ones), mode, None)
        shares = torch.from_numpy(logits).double().softmax(-1)
        if self.is_chunk:
            return chunk_belief(self.model, bits_of_tokens(shares, self.model.sizes), mode, None)
        return step_belief(self.model, shares, mode, self.tokenizer.prefixes[0], None)

    def assert_is(self, found: Belief[Any], expected: Belief[torch.Tensor]) -> None:
        units = self.tokenizer.model.action_units
        assert found.actions.dtype == found.std.dtype == found.mode_probability.dtype == np.float32
        assert found.mode.dtype == np.int32
        assert action_errors(expected.actions.numpy(), found.actions, units).value < 1e-6
        assert std_error(expected.std.numpy(), found.std, units) < 1e-5
        np.testing.assert_allclose(found.mode_probability, expected.mode_probability.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(found.mode, expected.mode.numpy())


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=[*STEP_MODES, "chunk"], ids=str)
def case(
    request: pytest.FixtureRequest, backend: str, bundle_of: Callable[[Recipe], Path], chunk_bundle: Path
) -> Iterator[Case]:
    if request.param == "chunk":
        model, folder = deployed_chunk_tokens(ChunkRecipe()).reference.model, chunk_bundle
    else:
        recipe = Recipe(mode=request.param, c_targets=host_targets()[:1])
        model, folder = random_model(recipe), bundle_of(recipe)
    with ActionTokenizer.load(folder, backend=backend) as tokenizer:
        yield Case(tokenizer, model)


@pytest.fixture
def steps(bundle: Path) -> Iterator[Case]:
    with ActionTokenizer.load(bundle, backend="onnxruntime") as tokenizer:
        yield Case(tokenizer, random_model(Recipe()))


@pytest.fixture
def chunks(chunk_bundle: Path, backend: str) -> Iterator[Case]:
    with ActionTokenizer.load(chunk_bundle, backend=backend) as tokenizer:
        yield Case(tokenizer, deployed_chunk_tokens(ChunkRecipe()).reference.model)


def softmax(logits: Any) -> Any:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def one_hot(tokens: Any, size: int) -> Any:
    return np.eye(size, dtype=np.float32)[tokens]


def random_tokens(case: Case, prefix: int, count: int, *, seed: int = 0) -> Any:
    model = case.tokenizer.model
    shape = model.tokens_shape(count, prefix)
    return np.random.default_rng(seed).integers(model.vocabulary, size=shape, dtype=np.int32)


# The answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_beliefs_are_those_of_the_definition(case: Case, mode: BeliefMode) -> None:
    for prefix in case.tokenizer.prefixes:
        logits = case.logits(prefix)
        expected = case.expected(logits, mode)
        case.assert_is(case.tokenizer.decode_logits(logits, mode=mode), expected)
        case.assert_is(case.tokenizer.decode_probabilities(softmax(logits), mode=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_so_are_those_of_classes_and_bits(chunks: Case, mode: BeliefMode) -> None:
    for prefix in chunks.tokenizer.prefixes:
        logits = chunks.pair(prefix)
        chunks.assert_is(chunks.tokenizer.decode_logits(logits, mode=mode), chunks.expected(logits, mode))


@pytest.mark.parametrize("mode", [*MODES, "sample"])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_tokens_that_are_certain_decode_to_the_same_bits_as_alone(case: Case, mode: BeliefMode, count: int) -> None:
    for prefix in case.tokenizer.prefixes:
        tokens = random_tokens(case, prefix, count)
        decoded = case.tokenizer.decode(tokens)
        belief = case.tokenizer.decode_probabilities(one_hot(tokens, case.tokenizer.model.vocabulary), mode=mode)
        assert belief.actions.tobytes() == decoded.tobytes()
        assert not belief.std.any()
        assert (belief.mode_probability == 1).all()


def test_tokens_that_are_certain_among_others_do_so_too(case: Case) -> None:
    prefix = case.tokenizer.prefixes[-1]
    shares, tokens = softmax(case.logits(prefix)), random_tokens(case, prefix, 5)
    shares[3] = one_hot(tokens[3], case.tokenizer.model.vocabulary)
    belief = case.tokenizer.decode_probabilities(shares)
    assert belief.actions[3].tobytes() == case.tokenizer.decode(tokens)[3].tobytes()
    assert not belief.std[3].any()
    assert belief.std[[0, 1, 2, 4]].any(axis=(1, 2)).all()


@pytest.mark.parametrize("logit", [17.4, 20, 25])
def test_what_is_nearly_certain_keeps_its_deviation(chunks: Case, logit: float) -> None:
    classes, (_, mixed) = one_hot(np.arange(5), 6), chunks.pair(9)
    # float32 rounds a probability near 1 to 1 long before it rounds one near 0 to 0.
    signs = (np.sign(mixed), np.ones_like(mixed), -np.ones_like(mixed))
    nearly_bits = [(classes * np.float32(1000), sign * np.float32(logit)) for sign in signs]
    nearly_class = classes * np.float32(logit), np.where(mixed > 0, np.float32(1e30), np.float32(-np.inf))
    for given in (*nearly_bits, nearly_class):
        belief = chunks.tokenizer.decode_logits(given)
        chunks.assert_is(belief, chunks.expected(given, "expected"))
        assert belief.std.any(axis=(1, 2)).all()


def test_words_that_are_forbidden_are_never_meant(case: Case) -> None:
    prefix = case.tokenizer.prefixes[-1]
    tokens, logits = random_tokens(case, prefix, 5), case.logits(prefix)
    forbidden = np.where(one_hot(tokens, case.tokenizer.model.vocabulary) > 0, logits, np.float32(-np.inf))
    assert case.tokenizer.decode_logits(forbidden).actions.tobytes() == case.tokenizer.decode(tokens).tobytes()


def test_logits_of_any_finite_size_decode(case: Case) -> None:
    prefix = case.tokenizer.prefixes[-1]
    signs = np.sign(case.logits(prefix)) * np.finfo(np.float32).max
    belief = case.tokenizer.decode_logits(signs.astype(np.float32))
    assert np.isfinite(belief.actions).all()
    assert np.isfinite(belief.std).all()


def test_sums_that_half_precision_has_rounded_are_divided_away(case: Case) -> None:
    prefix = case.tokenizer.prefixes[-1]
    shares = softmax(case.logits(prefix))
    expected = case.tokenizer.decode_probabilities(shares)
    found = case.tokenizer.decode_probabilities(shares * np.float32(1.0035))
    np.testing.assert_allclose(found.actions, expected.actions, atol=1e-6)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-4, atol=1e-7)


def test_many_chunks_are_computed_in_parts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = case.logits(case.tokenizer.prefixes[-1], 7)
    whole = case.tokenizer.decode_logits(logits)
    monkeypatch.setattr(graph_beliefs, "_SLICE", 1)
    parts = case.tokenizer.decode_logits(logits)
    np.testing.assert_allclose(parts.actions, whole.actions, atol=1e-6)
    np.testing.assert_allclose(parts.std, whole.std, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(parts.mode, whole.mode)


def test_no_chunks_are_no_beliefs(case: Case) -> None:
    belief = case.tokenizer.decode_logits(case.logits(case.tokenizer.prefixes[0], 0))
    assert belief.actions.shape == belief.std.shape == case.tokenizer.model.actions_shape(0)
    assert belief.mode_probability.shape == (0,)
    assert len(belief.mode) == 0


@pytest.mark.parametrize("temperature", [1.0, 1e17])
def test_the_mode_that_is_named_is_the_one_that_is_decoded(case: Case, temperature: float) -> None:
    prefix = case.tokenizer.prefixes[-1]
    # By so little that float64 has no room for it beside 1.
    logits = case.logits(prefix) * np.float32(1e-19 * temperature)
    belief = case.tokenizer.decode_logits(logits, mode="likeliest mode", temperature=temperature)
    is_of_mode = np.ones(logits.shape, np.bool_)
    if case.is_chunk:
        # The class is the first three bits of the first word, and numbers behind the last class mean it, too.
        is_of_mode[:, 0] = np.arange(256) // 32 == belief.mode[:, None]
        is_of_mode[belief.mode == 5, 0, 5 * 32 :] = True
    else:
        is_of_mode[..., : belief.mode.shape[-1], :] = one_hot(belief.mode, 5)
    known = np.where(is_of_mode, logits, np.float32(-np.inf))
    expected = case.tokenizer.decode_logits(known, temperature=temperature)
    np.testing.assert_allclose(belief.actions, expected.actions, atol=1e-6)


# Temperature ----------------------------------------------------------------------------------------------------------


def test_a_temperature_divides_logits_and_flattens_probabilities(case: Case) -> None:
    prefix = case.tokenizer.prefixes[-1]
    logits = case.logits(prefix)
    each = np.linspace(0.5, 3, prefix).astype(np.float32)
    for temperature, divided in ((2.0, logits / 2), (each, logits / each[:, None])):
        expected = case.expected(divided, "expected")
        case.assert_is(case.tokenizer.decode_logits(logits, temperature=temperature), expected)
        of_shares = case.tokenizer.decode_probabilities(softmax(logits), temperature=temperature)
        np.testing.assert_allclose(of_shares.actions, expected.actions.numpy(), atol=1e-5)


def test_one_layer_alone_may_have_a_temperature(case: Case) -> None:
    prefix = case.tokenizer.prefixes[-1]
    logits, each = case.logits(prefix), np.ones(prefix, np.float32)
    each[-1] = 3
    found = case.tokenizer.decode_probabilities(softmax(logits), temperature=each)
    case.assert_is(found, case.expected(logits / each[:, None], "expected"))


def test_class_and_bits_have_temperatures_of_their_own(chunks: Case) -> None:
    classes, bits = chunks.pair(3)
    each = np.linspace(0.5, 3, 1 + bits.shape[1]).astype(np.float32)
    expected = chunks.expected((classes / each[0], bits / each[1:]), "expected")
    chunks.assert_is(chunks.tokenizer.decode_logits((classes, bits), temperature=each), expected)
    certain = np.ones_like(bits)
    shares = softmax(classes), certain
    warm, cold = (chunks.tokenizer.decode_probabilities(shares, temperature=value) for value in (3.0, 1.0))
    assert (warm.mode_probability < cold.mode_probability).all()
    # What is certain stays so.
    within = chunks.tokenizer.decode_probabilities(shares, temperature=3.0, mode="likeliest mode")
    assert not within.std.any()


# Samples --------------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_as_the_seed_has_it_and_as_often_as_they_are_likely(case: Case) -> None:
    prefix, count = case.tokenizer.prefixes[-1], 3000
    logits = np.repeat(case.logits(prefix, 1), count, axis=0)
    belief = case.tokenizer.decode_logits(logits, mode="sample", seed=3)
    again = case.tokenizer.decode_logits(logits, mode="sample", seed=3)
    other = case.tokenizer.decode_logits(logits, mode="sample", seed=4)
    assert belief.actions.tobytes() == again.actions.tobytes() != other.actions.tobytes()
    shares = softmax(logits[:1])
    if case.is_chunk:
        likely = bits_of_tokens(torch.from_numpy(shares).double(), case.model.sizes).classes[0].numpy()
        found = np.bincount(belief.mode, minlength=len(likely)) / count
    else:
        likely, found = shares[0, 0, 0, 0], np.bincount(belief.mode[:, 0, 0, 0], minlength=5) / count
    assert np.abs(found - likely).max() < 0.05
    # Of samples numpy says it, in float64.
    expected = case.tokenizer.decode_logits(logits[:1]).mode_probability
    np.testing.assert_allclose(belief.mode_probability, np.repeat(expected, count), rtol=1e-6)


def test_a_sample_of_classes_and_bits_is_the_tokens_that_were_drawn(chunks: Case) -> None:
    logits = chunks.pair(9, 200)
    belief = chunks.tokenizer.decode_logits(logits, mode="sample", seed=0)
    # Every chunk is one that tokens decode to, and has the class that it says.
    tokens = chunks.tokenizer.encode(belief.actions)
    assert np.abs(chunks.tokenizer.decode(tokens) - belief.actions).max() < 1.5
    certain = np.where(logits[1] > 0, np.float32(1), np.float32(0))
    drawn = chunks.tokenizer.decode_probabilities((one_hot(belief.mode, 6), certain), mode="sample", seed=0)
    assert (drawn.mode == belief.mode).all()
    assert not drawn.std.any()


def test_a_class_and_its_bits_are_drawn_independently(chunks: Case) -> None:
    classes, bits = chunks.pair(9, 1)
    classes[...], bits[...] = -np.inf, 1e30
    classes[:, :2], bits[:, 0] = 0, 0
    pair = np.repeat(classes, 100, axis=0), np.repeat(bits, 100, axis=0)
    belief = chunks.tokenizer.decode_logits(pair, mode="sample", seed=5)
    # Two classes, each with both values of the one bit that is unsure.
    assert len({(int(mode), actions.tobytes()) for mode, actions in zip(belief.mode, belief.actions, strict=True)}) == 4


def test_a_sample_s_deviation_is_that_within_its_mode(steps: Case) -> None:
    logits = steps.logits(3)
    belief = steps.tokenizer.decode_logits(logits, mode="sample", seed=0)
    known = softmax(logits)
    known[..., :2, :] = one_hot(belief.mode, 5)
    np.testing.assert_allclose(belief.std, steps.tokenizer.decode_probabilities(known).std, rtol=1e-5)


@pytest.mark.parametrize("is_pair", [False, True])
def test_a_sample_of_many_chunks_is_the_same_in_parts_of_any_size(
    case: Case, is_pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_pair and not case.is_chunk:
        return
    prefix = case.tokenizer.prefixes[-1]
    logits = case.pair(prefix, 7) if is_pair else case.logits(prefix, 7)
    whole = case.tokenizer.decode_logits(logits, mode="sample", seed=3)
    for numbers in (1, 3000):
        monkeypatch.setattr(graph_beliefs, "_SLICE", numbers)
        parts = case.tokenizer.decode_logits(logits, mode="sample", seed=3)
        assert parts.actions.tobytes() == whole.actions.tobytes()
        np.testing.assert_array_equal(parts.mode, whole.mode)
        np.testing.assert_allclose(parts.std, whole.std, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(parts.mode_probability, whole.mode_probability, rtol=1e-6)


@pytest.mark.parametrize("how", [{}, {"mode": "sample", "seed": 0}, {"temperature": 2.0}], ids=str)
def test_many_chunks_take_little_more_memory_than_they_have(
    case: Case, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_beliefs, "_SLICE", 2**14)
    shares = softmax(case.logits(case.tokenizer.prefixes[-1], 200))
    case.tokenizer.decode_probabilities(shares[:2], **how)
    tracemalloc.start()
    try:
        case.tokenizer.decode_probabilities(shares, **how)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A temperature makes logits of probabilities, as many numbers once more.
    assert peak < shares.nbytes * (1.5 if "temperature" in how else 0.5) + 2**20


def test_a_sample_of_what_is_nearly_certain_keeps_its_deviation(chunks: Case) -> None:
    classes, (_, mixed) = one_hot(np.arange(5), 6), chunks.pair(9)
    given = classes * np.float32(1000), np.sign(mixed) * np.float32(20)
    belief = chunks.tokenizer.decode_logits(given, mode="sample", seed=0)
    expected = chunks.tokenizer.decode_logits(given, mode="likeliest mode")
    np.testing.assert_allclose(belief.std, expected.std, rtol=1e-4)
    assert belief.std.any(axis=(1, 2)).all()


# Into arrays ----------------------------------------------------------------------------------------------------------


def outputs(case: Case, count: int) -> tuple[Any, Any, Any]:
    shape = case.tokenizer.model.actions_shape(count)
    return np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(count, np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_results_are_written_into_arrays_of_the_caller_again_and_again(case: Case, mode: BeliefMode) -> None:
    prefix, (out, std, probability) = case.tokenizer.prefixes[-1], outputs(case, 5)
    logits = case.logits(prefix)
    for seed in range(3):
        logits[...] = case.logits(prefix, seed=seed)
        expected = case.tokenizer.decode_logits(logits, mode=mode)
        likeliest = np.full_like(expected.mode, -1)
        case.tokenizer.decode_logits_into(logits, out, std, probability, likeliest, mode=mode)
        np.testing.assert_array_equal(out, expected.actions)
        np.testing.assert_array_equal(std, expected.std)
        np.testing.assert_array_equal(probability, expected.mode_probability)
        np.testing.assert_array_equal(likeliest, expected.mode)
        out[...] = 0
        case.tokenizer.decode_probabilities_into(softmax(logits), out, mode=mode)
        np.testing.assert_allclose(out, expected.actions, atol=1e-5)


class NamedPair(NamedTuple):
    classes: Any
    bits: Any


def test_a_named_tuple_is_a_pair_as_well(chunks: Case) -> None:
    logits, arrays = NamedPair(*chunks.pair(3)), outputs(chunks, 5)
    expected = chunks.tokenizer.decode_logits(tuple(logits))
    np.testing.assert_array_equal(chunks.tokenizer.decode_logits(logits).actions, expected.actions)
    for given in (logits, logits, tuple(logits)):
        arrays[0][...] = 0
        chunks.tokenizer.decode_logits_into(given, *arrays)
        np.testing.assert_array_equal(arrays[0], expected.actions)


def test_a_tuple_that_is_no_pair_is_refused_even_after_a_call_with_its_arrays(chunks: Case) -> None:
    (classes, bits), arrays = chunks.pair(1, 1), outputs(chunks, 1)
    chunks.tokenizer.decode_logits_into((classes, bits), *arrays)
    with pytest.raises(InvalidInputError, match="a tuple of 3 was given"):
        chunks.tokenizer.decode_logits_into((classes, bits, bits), *arrays)


def test_what_overlaps_or_cannot_be_written_is_refused(steps: Case) -> None:
    logits, (out, std, probability) = steps.logits(3), outputs(steps, 5)
    refuse = pytest.raises(InvalidInputError, match="overlaps")
    with refuse:
        steps.tokenizer.decode_logits_into(logits, out, out)
    with pytest.raises(InvalidInputError, match=r"std_out is float32\[4, 2, 3\]"):
        steps.tokenizer.decode_logits_into(logits, out, std[:4])
    with pytest.raises(InvalidInputError, match=r"mode_probability_out is float64\[5\]"):
        steps.tokenizer.decode_logits_into(logits, out, std, probability.astype(np.float64))
    with pytest.raises(InvalidInputError, match=r"mode_out is int64\[5, 2, 4, 2\]; expected a numpy.ndarray int32"):
        steps.tokenizer.decode_logits_into(logits, out, mode_out=np.zeros((5, 2, 4, 2), np.int64))
    out.flags.writeable = False
    with pytest.raises(InvalidInputError, match="out is not writable"):
        steps.tokenizer.decode_logits_into(logits, out)
    with pytest.raises(InvalidInputError, match="out is a builtins"):
        steps.tokenizer.decode_logits_into(logits, None)
    with pytest.raises(InvalidInputError, match="samples are drawn by"):
        steps.tokenizer.decode_logits_into(logits, std, mode="sample")


# What is refused ------------------------------------------------------------------------------------------------------


class Checking:
    """A backend that checks small calls itself, and counts calls."""

    name, description, device, checked_steps = "checking", "", "here", 64

    def __init__(self, inner: Any) -> None:
        self._inner, self.calls, self.refuses = inner, 0, False

    def decode_into(self, *arrays: Any) -> None:
        self._inner.decode_into(*arrays)

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        self.calls += 1
        if self.refuses:
            raise IllegalValueError("not all are legal")
        self._inner.decode_belief_into(question, answer)

    def close(self) -> None:
        """Nothing is open."""


def test_a_backend_that_checks_small_calls_is_believed_and_its_refusal_named(steps: Case) -> None:
    backend = Checking(steps.tokenizer.backend)
    tokenizer = ActionTokenizer(steps.tokenizer.manifest, backend)  # type: ignore[arg-type]  # a part of one
    logits, (out, std, probability) = steps.logits(3), outputs(steps, 5)
    for arrays in ((out,), (out, std), (out, std, probability)):
        for _ in range(3):
            tokenizer.decode_logits_into(logits, *arrays)
    assert backend.calls == 9
    np.testing.assert_array_equal(out, steps.tokenizer.decode_logits(logits).actions)
    backend.refuses, logits[1, 0, 2, 1, 4] = True, np.nan
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"logits\[1, 0, 2, 1, 4\] is nan"):
            tokenizer.decode_logits_into(logits, out, std, probability)
    logits[...] = 0
    with pytest.raises(IllegalValueError, match="not all are legal"):
        tokenizer.decode_logits_into(logits, out, std, probability)


def test_arrays_that_have_changed_their_form_are_looked_at_again(steps: Case) -> None:
    tokenizer = ActionTokenizer(steps.tokenizer.manifest, Checking(steps.tokenizer.backend))  # type: ignore[arg-type]
    logits, (out, std, probability) = steps.logits(3), outputs(steps, 5)
    tokenizer.decode_logits_into(logits, out, std, probability)
    out.flags.writeable = False
    with pytest.raises(InvalidInputError, match="out is not writable"):
        tokenizer.decode_logits_into(logits, out, std, probability)
    out.flags.writeable = True
    tokenizer.decode_logits_into(logits, out)
    with pytest.raises(InvalidInputError, match="out is a builtins"):
        tokenizer.decode_logits_into(logits, None)
    for options in ({"mode": np.array(["expected", "x"])}, {"temperature": "2"}):
        with pytest.raises(InvalidInputError, match=f"{next(iter(options))} is"):
            tokenizer.decode_logits_into(logits, out, std, probability, **options)
    # Another question about the same arrays is another call.
    tokenizer.decode_logits_into(logits, out, std, probability, mode="likeliest mode")
    np.testing.assert_array_equal(out, steps.tokenizer.decode_logits(logits, mode="likeliest mode").actions)
    for temperature in (2.0, (2.0, 1.0, 3.0), (2.0, 1.0, 3.0), (2.0, 1.0, 4.0)):
        tokenizer.decode_logits_into(logits, out, std, probability, temperature=temperature)
        expected = steps.tokenizer.decode_logits(logits, temperature=temperature)
        np.testing.assert_array_equal(out, expected.actions)
    tokenizer.decode_logits_into(logits, out, std, probability, temperature=2.0)
    np.testing.assert_array_equal(out, steps.tokenizer.decode_logits(logits, temperature=2.0).actions)


def test_a_backend_without_beliefs_and_an_older_bundle_say_what_to_do(
    steps: Case, bundle_of: Callable[[Recipe], Path]
) -> None:
    class Without:
        name, checked_steps = "without", 0

    tokenizer = ActionTokenizer(steps.tokenizer.manifest, Without())  # type: ignore[arg-type]  # a part of one
    with pytest.raises(InvalidInputError, match="'without' of this bundle decodes no probabilities"):
        tokenizer.decode_logits(steps.logits(3))
    with ActionTokenizer.load(bundle_of(Recipe(has_beliefs=False)), backend="onnxruntime") as older:
        older.decode(older.encode(np.zeros((1, 2, 3), np.float32)))
        with pytest.raises(InvalidInputError, match="build the bundle again"):
            older.decode_logits(steps.logits(3))


def test_a_bundle_whose_tokens_do_not_decode_alone_is_refused(dynamic_tokenizer: ActionTokenizer) -> None:
    with pytest.raises(InvalidInputError, match=r"no policy predicts.*--conditioning calibrated"):
        dynamic_tokenizer.decode_logits(np.zeros((1, 2, 4, 3, 5), np.float32))


def test_a_closed_tokenizer_decodes_nothing(bundle: Path) -> None:
    tokenizer = ActionTokenizer.load(bundle, backend="onnxruntime")
    tokenizer.close()
    with pytest.raises(TokenizerError, match="was closed"):
        tokenizer.decode_logits(np.zeros((1, 2, 4, 3, 5), np.float32))


def test_layers_that_were_not_built_are_refused(steps: Case) -> None:
    with pytest.raises(UnbuiltPrefixError, match="of l = 1 layers"):
        steps.tokenizer.decode_logits(steps.logits(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode is 'mean'; expected 'expected', 'likeliest mode' or 'sample'"),
        ({"mode": ["expected"]}, r"mode is \['expected'\]"),
        ({"mode": np.array(["expected", "x"])}, r"mode is array\(\['expected', 'x'\]"),
        ({"seed": 1}, "a seed was given, and mode 'expected' draws nothing"),
        ({"mode": "sample", "seed": -1}, "seed is -1"),
        ({"mode": "sample", "seed": 1.5}, "seed is 1.5"),
    ],
)
def test_modes_and_seeds_that_make_no_sense_are_refused(steps: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        steps.tokenizer.decode_logits(steps.logits(3), **options)


def test_arrays_that_come_again_are_not_validated_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a control loop saves. Others are, and the same in another way; and all where a backend checks no values."""
    validated: list[object] = []
    given = BeliefValidator.given

    def noting(self: BeliefValidator, value: object, **how: Any) -> Any:
        validated.append(value)
        return given(self, value, **how)

    monkeypatch.setattr(BeliefValidator, "given", noting)
    logits = case.logits(case.tokenizer.prefixes[-1], 1)
    other, out = logits.copy(), np.empty(case.tokenizer.model.actions_shape(1), np.float32)
    for array in (logits, logits, other, other, other):
        case.tokenizer.decode_logits_into(array, out)
    case.tokenizer.decode_logits_into(other, out, mode="likeliest mode")
    every = [logits, logits, other, other, other, other]
    expected = [logits, other, other] if case.tokenizer.backend.checked_steps else every
    assert list(map(id, validated)) == list(map(id, expected))
