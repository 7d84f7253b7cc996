"""One constant that is off by 1e-4 of itself is caught by the golden vectors wherever it changes an answer."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.export.golden_inputs import ERROR, Span, sensitive_steps
from rfsq.export.parity import golden_vectors
from rfsq.export.plan import Affine, AffineQuantizer, DecoderPlan, DeployMode, EncoderPlan, plan_decoder, plan_encoder
from rfsq.export.reference import EDGES, Reference, Section
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.runtime import ActionTokenizer, SelfTestError
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.arrays import in_chunks
from rfsq.runtime.bundle.comparison import action_errors, compare_tokens
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.golden import Golden
from tests.bundles import Recipe, deploy, write_bundle
from tests.bundles import golden_vectors as answers_of
from tests.export.plan_numpy import decode, encode

STEPS = 120_000
SECOND_BIAS = "ENCODER_SECOND_BIAS"
Plan = EncoderPlan | DecoderPlan


@dataclass(frozen=True)
class Constant:
    """One number of a plan, and where it is."""

    part: str
    index: tuple[int, ...]

    def changed(self, plan: Plan, factor: float) -> Plan:
        outer, _, inner = self.part.partition(".")
        layer = getattr(plan, outer)
        values = getattr(layer, inner).copy()
        values[self.index] *= np.float32(factor)
        return replace(plan, **{outer: replace(layer, **{inner: values})})


def constants(plan: Plan) -> Iterator[Constant]:
    """All that the emitters write down and numpy computes with."""
    parts = {"first": ("weight", "bias"), "second": ("weight", "bias")}
    if isinstance(plan, EncoderPlan) and isinstance(plan.quantizer, AffineQuantizer):
        parts["quantizer"] = ("ratio", "shift")
    for outer, inners in parts.items():
        layer: Affine | AffineQuantizer = getattr(plan, outer)
        for inner in inners:
            for index in np.ndindex(getattr(layer, inner).shape):
                yield Constant(f"{outer}.{inner}", index)


def wrong_tokens(plan: EncoderPlan, golden: Golden, num_levels: int, *, is_coupled: bool) -> int:
    tokens, _ = encode(plan, golden.actions, dtype=np.float32)
    return compare_tokens(
        golden.tokens, tokens, golden.margins, golden.bounds, num_levels=num_levels, is_step_coupled=is_coupled
    ).num_wrong


def action_error(plan: DecoderPlan, golden: Golden, units: np.ndarray) -> float:
    found = decode(plan, golden.tokens[..., : plan.prefix], None, dtype=np.float32)
    return action_errors(golden.decoded[plan.prefix], found, units).value


def check_caught(
    plan: Plan, sample: list[Constant], judge: Callable[[Any, Golden], float], limit: float, many: Golden, few: Golden
) -> int:
    """What `many` inputs notice, the `few` do too; how many changes that were, one for each constant and direction.

    An error of which four fifths are noticed is not at the very border of what can be.
    """
    assert judge(plan, many) <= limit
    assert judge(plan, few) <= limit
    noticed, unseen, clearly_unseen = 0, [], []
    for constant in sample:
        for direction in (1, -1):
            changed = constant.changed(plan, 1 + direction * ERROR)
            if judge(changed, many) > limit:
                noticed += 1
                if not judge(changed, few) > limit:
                    unseen.append(constant)
                    if judge(constant.changed(plan, 1 + 0.8 * direction * ERROR), many) > limit:
                        clearly_unseen.append(constant)
    assert clearly_unseen == []
    assert len(unseen) <= noticed / 10, unseen
    return noticed


def chosen(model: ActionAutoencoder, prefixes: tuple[int, ...], num_steps: int = STEPS) -> np.ndarray:
    middle, half = model.offset.numpy(), model.units.numpy()
    random = np.random.default_rng(0)
    return sensitive_steps(model, prefixes, Span(middle - half, middle + half, 1e30), num_steps, random)


def test_where_no_step_comes_near_an_edge_none_is_chosen_for_one() -> None:
    deployed = deploy(Recipe(mode=DeployMode.CALIBRATED, config=ModelConfig(2, 3, 5, 3, 5), prefixes=(2,)))
    middle, random = np.full(2, 1e6), np.random.default_rng(0)
    span = Span(middle - 1, middle + 1, 1e30)
    steps = sensitive_steps(deployed.reference, deployed.prefixes, span, 500, random)
    assert steps.shape[1:] == (2,)


def drawn(model: ActionAutoencoder, count: int) -> np.ndarray:
    """Steps that have nothing to do with how the others were found, over the range and beyond."""
    random, middle, half = np.random.default_rng(99), model.offset.numpy(), model.units.numpy()
    widths = random.choice([1.0, 2.0, 4.0], (count, 1))
    return (middle + widths * half * random.uniform(-1, 1, (count, len(middle)))).astype(np.float32)


@pytest.mark.parametrize("mode", list(DeployMode))
def test_every_constant_of_a_small_model_is_seen_to(mode: DeployMode) -> None:
    recipe = Recipe(mode=mode, config=ModelConfig(2, 3, 5, 3, 5), chunk_length=1, prefixes=(2,))
    deployed = deploy(recipe)
    model, prefixes = deployed.reference, deployed.prefixes
    few, many = (answers_for(recipe, in_chunks(steps, 1)) for steps in (chosen(model, prefixes), drawn(model, 4000)))
    encoder = plan_encoder(model, mode, 1)
    is_coupled = mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED)
    numbers = list(constants(encoder))
    noticed = check_caught(
        encoder,
        numbers,
        lambda plan, golden: wrong_tokens(plan, golden, 5, is_coupled=is_coupled),
        GATES.wrong_tokens,
        many,
        few,
    )
    # Naive layers behind the first change nothing.
    assert noticed > (0 if mode is DeployMode.NONE else len(numbers))
    for prefix in () if mode is DeployMode.DYNAMIC else prefixes:
        decoder = plan_decoder(model, mode, 1, prefix)
        noticed = check_caught(
            decoder,
            list(constants(decoder)),
            lambda plan, golden: action_error(plan, golden, model.units.numpy()),
            GATES.action_error,
            many,
            few,
        )
        assert noticed > 0


@pytest.fixture(scope="module")
def reference(calibrated: Checkpoint) -> Reference:
    return Reference(calibrated, DeployMode.CALIBRATED, (8,))


@pytest.fixture(scope="module")
def few(reference: Reference) -> Golden:
    """The golden vectors that are chosen for this."""
    section = Section(EDGES, in_chunks(chosen(reference.model, (8,)), 1))
    return golden_vectors(reference, [section])


@pytest.mark.parametrize("part", ["quantizer.ratio", "quantizer.shift", "second.bias", "first.weight"])
def test_constants_of_the_embedded_model_are_seen_to(part: str, reference: Reference, few: Golden) -> None:
    encoder = plan_encoder(reference.model, DeployMode.CALIBRATED, 1)
    sample = [constant for constant in constants(encoder) if constant.part == part]
    many = reference.golden(reference.answer(in_chunks(drawn(reference.model, 3000), 1)).expected)
    noticed = check_caught(
        encoder,
        sample[:: len(sample) // 12],
        lambda plan, golden: wrong_tokens(plan, golden, 7, is_coupled=False),
        GATES.wrong_tokens,
        many,
        few,
    )
    assert noticed > 0


def test_they_are_few_and_lie_on_either_side_of_edges_of_every_latent(reference: Reference, few: Golden) -> None:
    assert 100 < len(few.actions) < 1500
    close = ((few.bounds < few.margins) & (few.margins <= 2 * few.bounds)).any(axis=(0, 1))
    # The last layers are for what lies beyond the usual range.
    assert close[:, :4].all()
    # A build of few steps, as tests are, seeks fewer.
    assert len(chosen(reference.model, (8,), 500)) < len(few.actions)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here: apt-get install gcc")
@pytest.mark.slow
@pytest.mark.usefixtures("one_target")
def test_a_number_that_is_changed_in_the_c_source_fails_the_self_test(tmp_path: Path) -> None:
    recipe = Recipe(config=ModelConfig(2, 3, 5, 3, 5), c_targets=(host_targets()[-1],), has_engine=False)
    model = deploy(recipe).reference
    steps = in_chunks(chosen(model, deploy(recipe).prefixes), recipe.chunk_length)
    for table, factor in (("BIN_RATIO", 1), *((name, 1 + ERROR) for name in ("BIN_RATIO", "BIN_SHIFT", SECOND_BIAS))):
        deployed = deploy(recipe)
        deployed.alter_c = lambda source, table=table, factor=factor: scaled(source, table, factor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.bundles.random_actions", lambda *_arguments: steps)
            bundle = write_bundle(tmp_path / f"{table} {factor}", deployed)
        with contextlib.nullcontext() if factor == 1 else pytest.raises(SelfTestError):
            ActionTokenizer.load(bundle, backend="c")


def scaled(source: str, table: str, factor: float) -> str:
    """With the first number of the table multiplied."""
    begin = re.search(rf"{table}[^=]*= {{\s*{{?\s*", source)
    assert begin is not None
    number = re.match(r"[^f,}]+", source[begin.end() :])
    assert number is not None
    value = float.fromhex(number[0]) if "x" in number[0] else float(number[0])
    assert value != 0
    return source[: begin.end()] + repr(value * factor) + source[begin.end() + number.end() :]


def answers_for(recipe: Recipe, actions: np.ndarray) -> Golden:
    deployed = deploy(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.bundles.random_actions", lambda *_arguments: actions)
        return answers_of(deployed)
