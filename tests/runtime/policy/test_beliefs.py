"""Beliefs in torch: the definition's values and gradients, wherever a policy is trained, and no others' constants."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.beliefs import BitProbabilities, bits_of_tokens, chunk_belief, step_belief
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer as ChunkReference
from rfsq.runtime import BundleError, FingerprintError, InvalidInputError, UnbuiltPrefixError
from rfsq.runtime.bundle.beliefs import BELIEF_MODES, Belief, BeliefMode
from rfsq.runtime.bundle.decoding import read_decoding, write_decoding
from rfsq.runtime.bundle.errors import SelfTestError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.manifest import DECODING_NAME
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer
from tests.bundles import Recipe, deploy
from tests.chunk_bundles import SMALL, ChunkRecipe, deployed_chunk_tokens, write_chunk_bundle
from tests.once import once

CERTAIN_MODES: tuple[BeliefMode, ...] = ("expected", "likeliest mode")
DECODABLE = (DeployMode.NONE, DeployMode.CALIBRATED, DeployMode.RECOVERED)
STEP = Recipe()
T, A = SMALL.chunk_length, SMALL.action_dim
Logits = tuple[Tensor, ...]


@pytest.fixture(scope="module")
def chunk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "chunk bundle", lambda path: write_chunk_bundle(path, ChunkRecipe()))


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of tokens, given in one form: an adapter, logits of any number of chunks, and the definition."""

    adapter: ActionRFSQAE | ChunkTokenizer
    logits: Callable[..., Logits]
    definition: Callable[[Logits, BeliefMode], Belief[Tensor]]

    def decode(self, logits: Logits, **options: Any) -> Belief[Tensor]:
        return self.adapter.decode_logits(_given(logits), **options)

    @property
    def units(self) -> Tensor:
        return torch.tensor(self.adapter.tokenizer.model.action_units, dtype=torch.float64)


def _given(parts: Logits) -> Any:
    return parts[0] if len(parts) == 1 else parts


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities_of(logits: Logits) -> Logits:
    return (logits[0].softmax(-1), *(bits.sigmoid() for bits in logits[1:]))


def step_case(adapter: ActionRFSQAE, model: ActionAutoencoder, prefix: int | None = None) -> Case:
    entry = adapter.tokenizer.model
    layers, coarse = prefix or entry.depth, entry.prefixes[0]

    def logits(count: int = 3, **how: Any) -> Logits:
        return (random(*entry.tokens_shape(count, layers), entry.vocabulary, **how),)

    def definition(given: Logits, mode: BeliefMode) -> Belief[Tensor]:
        return step_belief(model, given[0].softmax(-1), mode, coarse, None)

    return Case(adapter, logits, definition)


def chunk_case(adapter: ChunkTokenizer, model: ChunkReference, form: str, length: int | None = None) -> Case:
    sizes = model.sizes
    count_tokens = length or sizes.num_tokens
    num_bits = count_tokens * sizes.token_bits - sizes.class_bits

    def words(count: int = 3, **how: Any) -> Logits:
        return (random(count, count_tokens, 2**sizes.token_bits, **how),)

    def pair(count: int = 3, **how: Any) -> Logits:
        return random(count, sizes.num_classes, **how), random(count, num_bits, **how)

    def definition(given: Logits, mode: BeliefMode) -> Belief[Tensor]:
        if len(given) == 1:
            return chunk_belief(model, bits_of_tokens(given[0].softmax(-1), sizes), mode, None)
        bits = given[1].sigmoid().unsqueeze(1).expand(-1, sizes.num_classes, -1)
        return chunk_belief(model, BitProbabilities(given[0].softmax(-1), bits), mode, None)

    return Case(adapter, words if form == "words" else pair, definition)


@pytest.fixture(scope="module")
def cases(bundle_of: Callable[[Recipe], Path], chunk_folder: Path) -> Mapping[str, Case]:
    model = deployed_chunk_tokens(ChunkRecipe()).reference.model
    chunk, step = ChunkTokenizer.from_bundle(chunk_folder), ActionRFSQAE.from_bundle(bundle_of(STEP))
    return {
        "steps": step_case(step, deploy(STEP).reference),
        "words": chunk_case(chunk, model, "words"),
        "pair": chunk_case(chunk, model, "pair"),
    }


@pytest.fixture(params=["steps", "words", "pair"])
def case(request: pytest.FixtureRequest, cases: Mapping[str, Case]) -> Case:
    return cases[request.param]


def assert_is(found: Belief[Tensor], expected: Belief[Tensor], units: Tensor, tolerance: float) -> None:
    """tolerance: of actions, in normalised units; a tenth of a gate's for deviations."""
    assert ((found.actions - expected.actions) / units).abs().max() <= tolerance
    largest = expected.std.amax((1, 2), keepdim=True)
    assert (found.std - expected.std).abs().le(1e-5 * torch.maximum(expected.std, largest / 100)).all()
    torch.testing.assert_close(found.mode_probability.double(), expected.mode_probability, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.mode, expected.mode)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("mode", CERTAIN_MODES)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 5e-7), (torch.float32, 5e-6)])
def test_values_are_those_of_the_definition(
    kind: torch.dtype, tolerance: float, mode: BeliefMode, scale: float, case: Case
) -> None:
    logits = tuple(part.float().double() for part in case.logits(6, scale=scale))
    found = case.decode(tuple(part.to(kind) for part in logits), mode=mode)
    assert {found.actions.dtype, found.std.dtype, found.mode_probability.dtype} == {kind}
    assert found.mode.dtype is torch.int64
    assert_is(found, case.definition(logits, mode), case.units, tolerance)


@pytest.mark.parametrize("mode", CERTAIN_MODES)
@pytest.mark.parametrize("deployed", DECODABLE)
def test_every_kind_of_steps_and_every_prefix(
    deployed: DeployMode, mode: BeliefMode, bundle_of: Callable[[Recipe], Path]
) -> None:
    recipe = replace(STEP, mode=deployed)
    adapter, model = ActionRFSQAE.from_bundle(bundle_of(recipe)), deploy(recipe).reference
    for prefix in adapter.tokenizer.model.prefixes:
        case = step_case(adapter, model, prefix)
        assert_is(case.decode(case.logits(), mode=mode), case.definition(case.logits(), mode), case.units, 5e-7)


SIZES = (
    SMALL,
    # Two classes, one of them escape; one bit of the first token behind the class; no bit behind it.
    ChunkSizes(action_dim=2, chunk_length=2, num_classes=2, token_bits=4, num_tokens=3),
    ChunkSizes(action_dim=1, chunk_length=3, num_classes=8, token_bits=4, num_tokens=6),
    ChunkSizes(action_dim=2, chunk_length=3, num_classes=16, token_bits=4, num_tokens=8),
)


@pytest.mark.parametrize("mode", CERTAIN_MODES)
@pytest.mark.parametrize("form", ["words", "pair"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_and_number_of_chunk_tokens(
    sizes: ChunkSizes, form: str, mode: BeliefMode, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = ChunkRecipe(sizes)
    name = f"chunk bundle {sizes.num_classes} {sizes.token_bits} {sizes.num_tokens}"
    path = once(tmp_path_factory, name, lambda output: write_chunk_bundle(output, recipe))
    adapter, model = ChunkTokenizer.from_bundle(path), deployed_chunk_tokens(recipe).reference.model
    for length in range(1, sizes.num_tokens + 1):
        case = chunk_case(adapter, model, form, length)
        logits = case.logits(2 * sizes.num_classes)
        # Every class is the likeliest of some chunk, escape too.
        share = 2**sizes.token_bits // 2**sizes.class_bits if form == "words" else 1
        for index in range(sizes.num_classes):
            logits[0][(index, 0, index * share) if form == "words" else (index, index)] += 20
        found, expected = case.decode(logits, mode=mode), case.definition(logits, mode)
        assert set(found.mode.tolist()) == {*range(sizes.num_classes)}
        assert_is(found, expected, case.units, 5e-7)


def test_numpys_answers_are_the_same(case: Case) -> None:
    logits = tuple(part.float() for part in case.logits(4))
    given = _given(tuple(part.numpy() for part in logits))
    for mode in CERTAIN_MODES:
        for temperature in (1.0, 0.5, 3.0):
            found = case.decode(logits, mode=mode, temperature=temperature)
            expected = case.adapter.tokenizer.decode_logits(given, mode=mode, temperature=temperature)
            np.testing.assert_allclose(found.actions.numpy(), expected.actions, rtol=0, atol=1e-5)
            np.testing.assert_allclose(found.std.numpy(), expected.std, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.mode_probability.numpy(), expected.mode_probability, atol=1e-6)
            np.testing.assert_array_equal(found.mode.numpy(), expected.mode)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_probabilities_are_as_good_as_logits(temperature: float, case: Case) -> None:
    logits = case.logits()
    found = case.adapter.decode_probabilities(_given(probabilities_of(logits)), temperature=temperature)
    expected = case.decode(logits, temperature=temperature)
    assert_is(found, expected, case.units, 1e-9)
    # Of half precision, with the sums that it leaves.
    halves = tuple(part.bfloat16() for part in probabilities_of(logits))
    rough = case.adapter.decode_probabilities(_given(halves)).actions
    assert ((rough - case.decode(logits).actions) / case.units).abs().max() < 0.1


def size_of(logits: Logits) -> int:
    """How many temperatures there are."""
    return logits[0].shape[-2] if len(logits) == 1 else 1 + logits[1].shape[-1]


def test_each_layer_token_or_bit_has_a_temperature_of_its_own(case: Case) -> None:
    logits = tuple(part.float() for part in case.logits())
    temperatures = [0.5 + 0.25 * index for index in range(size_of(logits))]
    expected = case.adapter.tokenizer.decode_logits(
        _given(tuple(part.numpy() for part in logits)), temperature=temperatures
    )
    for given in (temperatures, tuple(temperatures), np.array(temperatures), torch.tensor(temperatures)):
        found = case.decode(logits, temperature=given)
        np.testing.assert_allclose(found.actions.numpy(), expected.actions, rtol=0, atol=1e-5)


# What is certain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", BELIEF_MODES)
def test_what_is_certain_decodes_as_its_tokens_do(mode: BeliefMode, case: Case) -> None:
    entry = case.adapter.tokenizer.model
    tokens = torch.randint(entry.vocabulary, entry.tokens_shape(6), generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(*tokens.shape, entry.vocabulary).scatter(-1, tokens.unsqueeze(-1), 1).log().requires_grad_()
    belief = case.adapter.decode_logits(logits, mode=mode)
    expected = case.adapter.tokenizer.decode(tokens.int().numpy())
    np.testing.assert_allclose(belief.actions.detach().numpy(), expected, rtol=0, atol=2e-6)
    assert (belief.std == 0).all()
    assert (belief.mode_probability == 1).all()
    (belief.actions.sum() + belief.std.sum() + belief.mode_probability.sum()).backward()
    assert logits.grad is not None
    # Nothing moves what is certain, and nothing is NaN.
    assert (logits.grad == 0).all()


def test_certain_classes_and_bits_have_a_gradient_that_is_a_number(cases: Mapping[str, Case]) -> None:
    case = cases["pair"]
    parts = tuple((30 * part.sign()).clamp(max=0.0).requires_grad_() for part in case.logits())
    probabilities = tuple((part > 0).double().requires_grad_() for part in case.logits())
    one_class = functional.one_hot(torch.arange(3), SMALL.num_classes).double().requires_grad_()
    for call, given in (
        (case.adapter.decode_logits, parts),
        (case.adapter.decode_probabilities, (one_class, probabilities[1])),
    ):
        for temperature in (1.0, 0.5, 2.0):
            belief = call(given, temperature=temperature)
            (belief.actions.sum() + belief.std.sum()).backward()
            assert all(part.grad is not None and part.grad.isfinite().all() for part in given)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CERTAIN_MODES)
def test_gradients_are_those_of_the_definition(mode: BeliefMode, case: Case) -> None:
    mixed = random(3, *case.adapter.tokenizer.model.actions_shape(1)[1:], seed=3)

    def gradients(decode: Callable[[Logits, BeliefMode], Belief[Tensor]]) -> list[Tensor]:
        logits = tuple(part.requires_grad_() for part in case.logits())
        belief = decode(logits, mode)
        total = (belief.actions * mixed).sum() + (belief.std * mixed.flip(0)).sum() + belief.mode_probability.sum()
        return list(torch.autograd.grad(total, logits))

    found = gradients(lambda logits, how: case.decode(logits, mode=how))
    for part, expected in zip(found, gradients(case.definition), strict=True):
        assert (part - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("mode", CERTAIN_MODES)
def test_gradients_are_those_of_differences(mode: BeliefMode, case: Case) -> None:
    logits = tuple(part.requires_grad_() for part in case.logits(1))

    def everything(*parts: Tensor) -> tuple[Tensor, ...]:
        belief = case.decode(parts, mode=mode)
        return belief.actions, belief.std, belief.mode_probability

    assert torch.autograd.gradcheck(everything, logits, fast_mode=True)
    shares = tuple(part.detach().requires_grad_() for part in probabilities_of(logits))

    def of_shares(*parts: Tensor) -> tuple[Tensor, ...]:
        # The last is what the others leave, so that it stays a distribution.
        whole = torch.cat((parts[0][..., :-1], 1 - parts[0][..., :-1].sum(-1, keepdim=True)), dim=-1)
        belief = case.adapter.decode_probabilities(_given((whole, *parts[1:])), mode=mode)
        return belief.actions, belief.std

    assert torch.autograd.gradcheck(of_shares, shares, fast_mode=True)


def test_a_temperature_can_be_learnt(case: Case) -> None:
    logits = case.logits(1)
    temperature = torch.full((size_of(logits),), 1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda each: case.decode(logits, temperature=each).std, (temperature,), fast_mode=True
    )


def test_a_policy_learns_actions_through_the_tokenizer(case: Case) -> None:
    """From logits of 0, by the error of actions alone."""
    wanted = case.decode(case.logits(4, scale=4.0)).actions.float()
    logits = tuple(torch.zeros_like(part, dtype=torch.float32).requires_grad_() for part in case.logits(4))
    optimiser = torch.optim.Adam(logits, lr=0.2)
    errors = []
    for _ in range(60):
        loss = functional.mse_loss(case.decode(logits).actions, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[-1] < 0.05 * errors[0]


# Samples --------------------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_sample_is_the_same_for_the_same_seed(case: Case) -> None:
    logits = case.logits(8)
    first, again, other = (case.decode(logits, mode="sample", generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.actions, again.actions)
    assert torch.equal(first.mode, again.mode)
    assert not torch.equal(first.actions, other.actions)


def test_samples_are_spread_as_numpys_are(case: Case) -> None:
    count, one = 4000, case.logits(1)
    logits = tuple(part.float().expand(count, *part.shape[1:]) for part in one)
    drawn = case.decode(logits, mode="sample", generator=seeded())
    given = _given(tuple(part.contiguous().numpy() for part in logits))
    other = case.adapter.tokenizer.decode_logits(given, mode="sample", seed=0)
    for name in ("actions", "std"):
        found, expected = getattr(drawn, name).numpy(), getattr(other, name)
        mean, std = expected.mean(0), expected.std(0)
        bound = 5 * (2 / count) ** 0.5 * std + 1e-6
        assert (abs(found.mean(0) - mean) <= bound).all()
        # A class that is drawn seldom makes tails long: how far deviations are off follows from the fourth moment.
        tails = ((expected - mean) ** 4).mean(0) / std**4
        assert (abs(found.std(0) - std) <= bound * ((tails - 1) / 2) ** 0.5 + 1e-6).all()
    # The probability is the likeliest one's, whatever was drawn.
    torch.testing.assert_close(drawn.mode_probability[:1].double(), case.decode(one).mode_probability)
    assert len(drawn.mode.unique(dim=0)) > 1


def test_a_sample_has_the_gradient_of_what_is_expected_within_its_mode(cases: Mapping[str, Case]) -> None:
    case = cases["pair"]
    classes, bits = (part.requires_grad_() for part in case.logits(4))
    drawn = case.decode((classes, bits), mode="sample", generator=seeded())
    known = functional.one_hot(drawn.mode, SMALL.num_classes).double().log()
    within = case.decode((known, bits), mode="likeliest mode")
    assert not torch.equal(drawn.actions, within.actions)
    torch.testing.assert_close(drawn.std, within.std)
    found, expected = (torch.autograd.grad(belief.actions.sum(), bits)[0] for belief in (drawn, within))
    torch.testing.assert_close(found, expected)


def test_a_drawn_chunk_is_one_that_tokens_decode_to(cases: Mapping[str, Case]) -> None:
    case = cases["steps"]
    entry = case.adapter.tokenizer.model
    # Two levels are likely in each place, so that a sample is one of few.
    logits = torch.full((64, *entry.tokens_shape(1)[1:], entry.vocabulary), -torch.inf)
    logits[..., :2] = 0
    drawn = case.adapter.decode_logits(logits, mode="sample", generator=seeded())
    rest = drawn.actions - case.adapter.decode_logits(logits, mode="expected").actions
    assert (rest.abs() > 1e-3).any()
    assert set(drawn.mode.unique().tolist()) == {0, 1}


# Where policies are trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0)])
def test_any_leading_axes(leading: tuple[int, ...], case: Case) -> None:
    count = int(np.prod(leading))
    logits = case.logits(max(count, 1))
    flat = case.decode(tuple(part[:count] for part in logits))
    found = case.decode(tuple(part[:count].reshape((*leading, *part.shape[1:])) for part in logits))
    for part, expected in zip(vars(found).values(), vars(flat).values(), strict=True):
        assert torch.equal(part, expected.reshape((*leading, *expected.shape[1:])))


@pytest.mark.parametrize("length", [0, 1, 5])
def test_steps_of_any_length(length: int, cases: Mapping[str, Case]) -> None:
    case = cases["steps"]
    (logits,) = case.logits(5)
    steps = logits.flatten(0, 1)[:length]
    found, whole = case.adapter.decode_logits(steps), case.adapter.decode_logits(logits)
    assert torch.allclose(found.actions, whole.actions.flatten(0, 1)[:length])
    # Of the least certain coarse token; of no steps nothing is unsure.
    coarse = steps.softmax(-1)[..., : found.mode.shape[-1], :].amax(-1)
    assert found.mode_probability == (coarse.min() if length else 1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_what_is_given_in_half_precision_is_computed_in_float32(kind: torch.dtype, case: Case) -> None:
    logits = tuple(part.to(kind).requires_grad_() for part in case.logits())
    found = case.decode(logits)
    assert found.actions.dtype is torch.float32
    assert torch.equal(found.actions, case.decode(tuple(part.float() for part in logits)).actions)
    found.actions.sum().backward()
    assert all(part.grad is not None and part.grad.dtype is kind for part in logits)


def test_autocast_changes_nothing(case: Case) -> None:
    logits = tuple(part.float() for part in case.logits())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.decode(logits)
    assert torch.equal(found.actions, case.decode(logits).actions)
    assert torch.equal(found.std, case.decode(logits).std)


def test_what_inference_mode_met_first_can_be_trained_with(bundle_of: Callable[[Recipe], Path]) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_of(STEP))
    logits = torch.zeros(*adapter.tokenizer.model.tokens_shape(1), adapter.tokenizer.model.vocabulary)
    with torch.inference_mode():
        adapter.decode_logits(logits)
    adapter.decode_logits(logits.requires_grad_()).actions.sum().backward()
    assert logits.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("steps", {}),
        ("steps", {"temperature": 2.0}),
        ("steps", {"temperature": [1.5, 1.0, 2.0], "mode": "likeliest mode"}),
        ("words", {}),
        ("pair", {"mode": "likeliest mode"}),
    ],
)
def test_compiled_it_is_one_graph(name: str, options: dict[str, Any], cases: Mapping[str, Case]) -> None:
    case = cases[name]
    logits = tuple(part.float().requires_grad_() for part in case.logits())

    def loss(*parts: Tensor) -> Tensor:
        belief = case.decode(parts, **options)
        return belief.actions.square().sum() + belief.std.sum()

    expected = loss(*logits)
    found = torch.compile(loss, backend="eager", fullgraph=True)(*logits)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(total, logits, allow_unused=True) for total in (found, expected))
    for part, other in zip(*gradients, strict=True):
        torch.testing.assert_close(part, other)


@pytest.mark.slow
def test_a_first_call_in_compiled_code_is_left_out_of_the_graph(bundle_of: Callable[[Recipe], Path]) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_of(STEP))
    logits = torch.zeros(*adapter.tokenizer.model.tokens_shape(1), adapter.tokenizer.model.vocabulary)
    compiled = torch.compile(lambda given: adapter.decode_logits(given).actions, backend="eager")
    assert torch.equal(compiled(logits), adapter.decode_logits(logits).actions)


def test_inside_transforms_it_is_a_function_as_any_other(case: Case) -> None:
    logits = tuple(part[:, None] for part in case.logits())
    found = torch.func.vmap(lambda *parts: case.decode(parts).actions)(*logits)
    torch.testing.assert_close(found, case.decode(logits).actions)
    total = torch.func.grad(lambda first: case.decode((first, *logits[1:])).actions.sum())(logits[0])
    assert total.shape == logits[0].shape


def test_a_first_call_inside_a_transform_is_refused_and_a_later_one_is_not(bundle_of: Callable[[Recipe], Path]) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_of(STEP))
    logits = torch.zeros(2, *adapter.tokenizer.model.tokens_shape(1), adapter.tokenizer.model.vocabulary)
    decode = torch.func.vmap(lambda given: adapter.decode_logits(given).actions)
    with pytest.raises(InvalidInputError, match=r"for the first time .* call it once before"):
        decode(logits)
    adapter.decode_logits(logits)
    assert decode(logits).shape == (2, *adapter.tokenizer.model.actions_shape(1))


def test_it_adds_nothing_to_a_policy(case: Case) -> None:
    before = set(case.adapter.state_dict())
    case.decode(case.logits())
    assert set(case.adapter.state_dict()) == before == {"tokenizer_fingerprint"}
    assert not [*torch.nn.ModuleList([case.adapter]).parameters()]


# What is refused ------------------------------------------------------------------------------------------------------


def altered(logits: Logits, value: float) -> Logits:
    """With this for the last number of the first part."""
    first = logits[0].clone()
    first[(-1,) * first.ndim] = value
    return first, *logits[1:]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_illegal_logits_are_named_on_the_cpu_and_mark_their_chunk_elsewhere(value: float, case: Case) -> None:
    logits = altered(case.logits(), value)
    name = "classes" if len(logits) == 2 else "logits"
    place = re.escape(f"{name}{[size - 1 for size in logits[0].shape]} is {value}")
    with pytest.raises(InvalidInputError, match=place):
        case.decode(logits)


@pytest.mark.parametrize("mode", ["expected", "likeliest mode"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_where_nobody_looks_all_of_a_chunk_is_marked_whatever_is_wrong_with_it(
    value: float, mode: BeliefMode, case: Case
) -> None:
    for part, place in itertools.product(range(len(case.logits())), (0, -1)):
        logits = [found.clone() for found in case.logits()]
        # Of the last chunk the first number, or the last.
        logits[part][(-1, *(place,) * (logits[part].ndim - 1))] = value
        belief = torch.func.vmap(lambda *parts: vars(case.decode(parts, mode=mode)))(*(one[:, None] for one in logits))
        for name in ("actions", "std", "mode_probability"):
            assert belief[name].isnan().flatten(1).all(1).tolist() == [False, False, True], name
            assert not belief[name][:2].isnan().any(), name
        assert (belief["mode"] == -1).flatten(1).all(1).tolist() == [False, False, True]


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_temperature_that_is_none_is_refused_as_a_tensor_too(value: float, case: Case) -> None:
    with pytest.raises(InvalidInputError, match="expected positive numbers"):
        case.decode(case.logits(), temperature=torch.tensor(value))
    compiled = torch.func.vmap(lambda *parts: case.decode(parts, temperature=torch.tensor(-1.0)).actions)
    assert compiled(*(part[:, None] for part in case.logits())).isnan().all()


@pytest.mark.parametrize("value", [-0.5, 2.0, torch.nan])
def test_what_is_no_distribution_is_named_or_marked(value: float, case: Case) -> None:
    given = altered(probabilities_of(case.logits()), value)
    with pytest.raises(InvalidInputError, match=r"expected a (probability|distribution)"):
        case.adapter.decode_probabilities(_given(given))
    for temperature in (1.0, 2.0):
        found = torch.func.vmap(
            lambda *parts, t=temperature: case.adapter.decode_probabilities(_given(parts), temperature=t).actions
        )(*(part[:, None] for part in given))
        assert found.isnan().flatten(1).any(1).tolist() == [False, False, True]


def test_what_does_not_fit_is_refused(cases: Mapping[str, Case]) -> None:
    steps, words, pair = (cases[name] for name in ("steps", "words", "pair"))
    (by_step,), (by_word,), (classes, bits) = (case.logits() for case in (steps, words, pair))
    calls: list[tuple[ActionRFSQAE | ChunkTokenizer, Any, str]] = [
        (steps.adapter, by_step[..., :4], r"expected \[\.\.\., T, 4, l, 5\]"),
        (steps.adapter, by_step[0, 0], r"expected \[\.\.\., T, 4, l, 5\]"),
        (steps.adapter, (by_step, by_step), "logits are a tuple; expected one array"),
        (steps.adapter, by_step.numpy(), "for numpy arrays there is runtime.ActionTokenizer"),
        (steps.adapter, by_step.long(), "logits have type torch.int64; expected floats"),
        (steps.adapter, by_step.to("meta"), "on the meta device"),
        (words.adapter, by_word[..., :9], r"expected \[\.\.\., l, 256\], or a pair of classes \[\.\.\., 6\]"),
        (words.adapter, by_word[0, 0], r"expected \[\.\.\., l, 256\]"),
        (words.adapter, [classes, bits], "logits is a builtins.list; expected a torch.Tensor"),
        (words.adapter, (classes,), "a tuple of 1 was given; expected the pair"),
        (words.adapter, (classes[:, 1:], bits), r"classes have shape \[3, 5\]; expected \[\.\.\., C\]"),
        (words.adapter, (classes, bits[:2]), r"bits have shape \[2, 69\] on cpu; expected \[3, 'n'\]"),
        (words.adapter, (classes, bits[:, 1:]), "as many as l whole tokens have behind the class, 5 and then 8 more"),
        (words.adapter, (classes, bits.int()), "bits have type torch.int32; expected floats"),
    ]
    for adapter, given, message in calls:
        with pytest.raises(InvalidInputError, match=message):
            adapter.decode_logits(given)
    with pytest.raises(UnbuiltPrefixError, match="this bundle decodes 2, 3 layers"):
        steps.adapter.decode_logits(by_step[..., :1, :])
    with pytest.raises(UnbuiltPrefixError, match="this bundle decodes any first of 9 tokens"):
        words.adapter.decode_logits(by_word[:, :0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode is 'mean'; expected 'expected', "),
        ({"generator": torch.Generator()}, "mode 'expected' draws nothing"),
        ({"temperature": 0.0}, "expected positive numbers"),
        ({"temperature": [1.0, 2.0]}, "temperature has shape"),
        ({"temperature": "warm"}, "temperature is a builtins.str"),
        ({"temperature": torch.ones(2)}, r"temperature has shape \[2\] and type torch.float32"),
        ({"temperature": torch.ones((), dtype=torch.int64)}, "type torch.int64; expected floats"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str, case: Case) -> None:
    with pytest.raises(InvalidInputError, match=message):
        case.decode(case.logits(), **options)


def test_tokens_that_do_not_decode_alone_have_no_beliefs(bundle_of: Callable[[Recipe], Path]) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_of(replace(STEP, mode=DeployMode.DYNAMIC)))
    with pytest.raises(InvalidInputError, match="need the mean and sigma of every layer"):
        adapter.decode_logits(torch.zeros(1, 2, 4, 3, 5))


# The constants --------------------------------------------------------------------------------------------------------


def rebuilt(source: Path, output: Path, change: Callable[[bytes], bytes | None]) -> Path:
    """A bundle with another file of constants, or none, and hashes that are right."""
    bundle = open_bundle(source)
    with stage_bundle(output) as staged:
        for file in bundle.manifest.files:
            content = change(bundle.content(file)) if file == DECODING_NAME else bundle.content(file)
            if content is not None:
                staged.write(file, content)
        staged.seal(bundle.manifest)
    return output


@pytest.fixture(params=["steps", "chunk"])
def source(request: pytest.FixtureRequest, bundle_of: Callable[[Recipe], Path], chunk_folder: Path) -> Path:
    return bundle_of(STEP) if request.param == "steps" else chunk_folder


def opened(path: Path) -> tuple[ActionRFSQAE | ChunkTokenizer, Tensor]:
    """The adapter of a bundle, and logits that it takes."""
    model = open_bundle(path).manifest.model
    kind = ActionRFSQAE if model.token_grid else ChunkTokenizer
    return kind.from_bundle(path), torch.zeros(*model.tokens_shape(1), model.vocabulary)


def test_a_bundle_from_before_says_to_build_it_again(source: Path, tmp_path: Path) -> None:
    adapter, logits = opened(rebuilt(source, tmp_path / "old", lambda _: None))
    with pytest.raises(InvalidInputError, match=r"has no decoding\.npz; build it again .* fingerprint stays the same"):
        adapter.decode_logits(logits)
    # All else works as before.
    assert adapter.tokenizer.decode_logits(logits.numpy()).actions.shape == (1, *logits.shape[:0], *_chunk(adapter))


def _chunk(adapter: ActionRFSQAE | ChunkTokenizer) -> tuple[int, ...]:
    return adapter.tokenizer.model.actions_shape(1)[1:]


def test_a_file_that_was_altered_opens_no_bundle(source: Path, tmp_path: Path) -> None:
    path = rebuilt(source, tmp_path / "copy", bytes)
    file = path / DECODING_NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoding\.npz .* was altered"):
        opened(path)
    file.unlink()
    with pytest.raises(BundleError, match=r"decoding\.npz is missing"):
        opened(path)


def test_a_file_of_something_else_is_refused_at_the_first_call(source: Path, tmp_path: Path) -> None:
    adapter, logits = opened(rebuilt(source, tmp_path / "other", lambda _: b"no arrays"))
    with pytest.raises(BundleError, match=r"decoding\.npz is not an \.npz"):
        adapter.decode_logits(logits)


def test_wrong_constants_do_not_decode(source: Path, tmp_path: Path) -> None:
    model = open_bundle(source).manifest.model

    def change(content: bytes) -> bytes:
        decoding = read_decoding(content, model)
        name = "first_bias" if model.token_grid else "mean"
        return write_decoding(replace(decoding, **{name: getattr(decoding, name) + np.float32(1e-3)}))

    adapter, logits = opened(rebuilt(source, tmp_path / "wrong", change))
    for _ in range(2):
        with pytest.raises(SelfTestError, match=r"decoding\.npz decodes are off by .* build the bundle again"):
            adapter.decode_logits(logits)


def test_a_bundle_that_took_the_place_of_this_one_is_not_read(chunk_folder: Path, tmp_path: Path) -> None:
    path = rebuilt(chunk_folder, tmp_path / "bundle", bytes)
    adapter, logits = opened(path)
    write_chunk_bundle(path, ChunkRecipe(seed=1), overwrite=True)
    with pytest.raises(FingerprintError):
        adapter.decode_logits(logits)


def test_copies_decode_the_same(case: Case) -> None:
    logits = case.logits()
    expected = case.decode(logits).actions
    for made in (copy.deepcopy(case.adapter), pickle.loads(pickle.dumps(case.adapter))):  # noqa: S301  # made here
        made.half()
        assert torch.equal(made.decode_logits(_given(logits)).actions, expected)
    # A tokenizer of arrays is copied without constants, which it does not need.
    tokenizer = pickle.loads(pickle.dumps(case.adapter.tokenizer))  # noqa: S301  # made here
    assert tokenizer.fingerprint == case.adapter.fingerprint


def test_another_tokenizers_policy_does_not_decode(case: Case) -> None:
    adapter = copy.deepcopy(case.adapter)
    adapter.tokenizer_fingerprint = torch.zeros(32)
    with pytest.raises(FingerprintError):
        adapter.decode_logits(_given(case.logits()))
