"""The gates can fail: whatever makes an engine differ from the reference by more than float32 must turns one red."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.export.graph_builder import LinearForm
from rfsq.export.graphs import decoder_graph, encoder_graph
from rfsq.export.parity import Judge, batches, golden_vectors
from rfsq.export.plan import DeployMode, action_limit, plan_decoder, plan_encoder
from rfsq.export.proving import failures
from rfsq.export.reference import EDGES, Answers, Reference, Section, parity_sections
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.quantizer import ConditioningConstants
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.backends.onnxruntime import OrtBackend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.folder import Bundle
from rfsq.runtime.bundle.gates import near_tie_cap
from rfsq.runtime.bundle.manifest import (
    SCHEMA_VERSION,
    GraphEntry,
    Manifest,
    ParityEntry,
    graph_tensors,
)
from rfsq.runtime.bundle.models import ModelEntry, StepModel
from tests.export.plan_numpy import PlanBackend, exact

#: The edges, which tell most, come on top of the steps: 2,500 or more.
CHUNK, PREFIXES, STEPS = 8, (3, 8), 2000
WRONG, NEAR_TIES = "encode: wrong tokens", "encode: near-tie flips"
STATS = "encode: stats error"
COARSE, FULL = (f"decode {prefix} layers: action error" for prefix in PREFIXES)


@dataclass
class Case:
    """A checkpoint in one mode, the reference's answers, and backends made from it or from an altered copy."""

    checkpoint: Checkpoint
    reference: Reference
    model: ModelEntry
    sections: Sequence[Section]
    answers: list[Answers]

    @classmethod
    def of(cls, checkpoint: Checkpoint, mode: DeployMode, held_out: np.ndarray, prefixes: Sequence[int]) -> "Case":
        reference = Reference(checkpoint, mode, prefixes)
        sizes = checkpoint.config
        limit = action_limit(plan_encoder(reference.model, mode, CHUNK))
        sections = parity_sections(reference.model, held_out, chunk_length=CHUNK, limit=limit, num_steps=STEPS)
        model = StepModel(
            mode=mode.value,
            chunk_length=CHUNK,
            action_dim=sizes.action_dim,
            latent_dim=sizes.latent_dim,
            hidden_width=sizes.hidden_width,
            num_layers=sizes.num_layers,
            num_levels=sizes.num_levels,
            prefixes=tuple(prefixes),
            action_limit=limit,
            action_units=tuple(reference.model.units.tolist()),
            action_offset=tuple(reference.model.offset.tolist()),
        )
        return cls(checkpoint, reference, model, sections, list(batches(reference, sections)))

    def altered(self, **changes: object) -> ActionAutoencoder:
        """The float64 model of the checkpoint with these fields replaced."""
        checkpoint = replace(self.checkpoint, **changes)
        return Reference(checkpoint, self.reference.mode, self.reference.prefixes).model

    def backend(self, model: ActionAutoencoder | None = None, form: LinearForm = LinearForm.GEMM) -> OrtBackend:
        """The robot's own, on graphs of the model: the reference's by default. It takes either form for its own."""
        model, mode = model or self.reference.model, self.reference.mode
        contents = {"encoder.onnx": encoder_graph(plan_encoder(model, mode, CHUNK), form)}
        graphs = [GraphEntry("encoder.onnx", "encoder", 8, "gemm", *graph_tensors(self.model, "encoder", 8))]
        for prefix in self.reference.prefixes:
            file = f"decoder_l{prefix}.onnx"
            contents[file] = decoder_graph(plan_decoder(model, mode, CHUNK, prefix), form)
            graphs.append(GraphEntry(file, "decoder", prefix, "gemm", *graph_tensors(self.model, "decoder", prefix)))
        manifest = Manifest(SCHEMA_VERSION, "0" * 64, self.model, tuple(graphs), (), (), {}, {}, {})
        return OrtBackend(Bundle(Path("in memory"), manifest, contents))

    def numpy_backend(self, product: Callable[[np.ndarray, np.ndarray], np.ndarray] = exact) -> PlanBackend:
        model, mode = self.reference.model, self.reference.mode
        decoders = {prefix: plan_decoder(model, mode, CHUNK, prefix) for prefix in self.reference.prefixes}
        return PlanBackend(plan_encoder(model, mode, CHUNK), decoders, product)

    def judge(self, backend: object) -> tuple[ParityEntry, ...]:
        judge = Judge(backend, self.reference, self.model, variant="", seed=0)
        for answers in self.answers:
            judge.judge(answers)
        return judge.entries()

    def red(self, backend: object) -> set[str]:
        """Names of the gates that fail; each has a line that says by how much."""
        entries = self.judge(backend)
        lines = failures(entries)
        red = [entry for entry in entries if not entry.value <= entry.limit]
        assert len(lines) == len(red)
        for line, entry in zip(lines, red, strict=True):
            assert line.startswith(f"{backend.name}, {entry.gate}: {entry.value:g} over {entry.steps} steps")
            assert f"expected at most {entry.limit:g}" in line
        return {entry.gate for entry in red}


@pytest.fixture(scope="module")
def case(calibrated: Checkpoint, split: EpisodeSplit) -> Case:
    """With the readout in its place, where a test can spoil it like any other weight."""
    assert calibrated.readout is not None
    readout = {"decoder.2.weight": calibrated.readout.weight, "decoder.2.bias": calibrated.readout.bias}
    calibrated = replace(calibrated, weights={**calibrated.weights, **readout}, readout=None)
    return Case.of(calibrated, DeployMode.CALIBRATED, split.test.steps()[: STEPS // 2], PREFIXES)


@pytest.fixture(scope="module")
def dynamic(robust: Checkpoint, split: EpisodeSplit) -> Case:
    return Case.of(robust, DeployMode.DYNAMIC, split.test.steps()[: STEPS // 2], PREFIXES)


@pytest.fixture(scope="module", params=[DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def either(request: pytest.FixtureRequest, case: Case, dynamic: Case) -> Case:
    return case if request.param is DeployMode.CALIBRATED else dynamic


# --- green ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LinearForm)
def test_the_robots_own_code_passes_every_gate(either: Case, form: LinearForm) -> None:
    entries = either.judge(either.backend(form=form))
    assert failures(entries) == []
    names = [WRONG, NEAR_TIES, *([STATS] if either.model.has_stats else []), COARSE, FULL]
    assert [entry.gate for entry in entries] == names
    steps = sum(section.num_steps for section in either.sections)
    assert steps >= STEPS
    assert {(entry.backend, entry.steps) for entry in entries} == {("onnxruntime", steps)}
    # Nothing passes because nothing was measured.
    assert all(entry.value > 0 for entry in entries if entry.gate != WRONG)
    assert {entry.detail for entry in entries if entry.gate != NEAR_TIES} == {""}


def test_another_float32_implementation_passes_too(either: Case) -> None:
    assert failures(either.judge(either.numpy_backend())) == []


def test_torchs_own_float32_has_near_ties_and_nothing_else(either: Case) -> None:
    for answers in either.answers:
        assert answers.float32.num_wrong == 0, answers.float32.first_wrong
        assert answers.expected.near_tie_cap == near_tie_cap(answers.float32.num_near_ties)
    assert sum(answers.float32.num_near_ties for answers in either.answers) > 0


def test_near_ties_are_shown_per_layer_beside_torchs(case: Case) -> None:
    (detail,) = (entry.detail for entry in case.judge(case.backend()) if entry.gate == NEAR_TIES)
    found, of_torch = (list(map(int, part.split(": ")[-1].split())) for part in detail.split("; "))
    assert len(found) == len(of_torch) == 8
    assert sum(of_torch) == sum(answers.float32.num_near_ties for answers in case.answers)
    assert detail.startswith("L0 to L7: ")


# --- red: other numbers in the graph ----------------------------------------------------------------------------------

WEIGHTS = [
    f"{part}.{layer}.{kind}" for part in ("encoder", "decoder") for layer in (0, 2) for kind in ("weight", "bias")
]


def perturbed(checkpoint: Checkpoint, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """Weights of which one number, the one in the middle, is changed."""
    tensor = checkpoint.weights[name].clone()
    flat = tensor.view(-1)
    flat[len(flat) // 2] = change(flat[len(flat) // 2])
    return {**checkpoint.weights, name: tensor}


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weight_off_by_a_thousandth_is_noticed(either: Case, name: str) -> None:
    weights = perturbed(either.checkpoint, name, lambda weight: weight + 1e-3)
    red = either.red(either.backend(either.altered(weights=weights)))
    assert (WRONG if name.startswith("encoder") else FULL) in red
    # The other half of the model is right and stays green.
    assert not red & ({COARSE, FULL} if name.startswith("encoder") else {WRONG, NEAR_TIES, STATS})


def test_a_decoder_bias_off_by_two_hundred_thousandths_is_noticed(case: Case) -> None:
    weights = perturbed(case.checkpoint, "decoder.2.bias", lambda bias: bias + 2e-5)
    assert case.red(case.backend(case.altered(weights=weights))) == {COARSE, FULL}


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """To a mantissa of 10 bits, the nearest and ties to even, as a tensor core does with its inputs."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits += 0xFFF + ((bits >> 13) & 1)
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def test_tf32_rounding_is_what_it_says() -> None:
    step = 2.0**-10
    values = np.float32([1, 1 + step, 1 + 0.49 * step, 1 + 0.51 * step, 1 + 0.5 * step, 1 + 1.5 * step, -3, 0])
    expected = np.float32([1, 1 + step, 1, 1 + step, 1, 1 + 2 * step, -3, 0])
    np.testing.assert_array_equal(round_to_tf32(values), expected)


def test_weights_rounded_to_tf32_are_noticed(either: Case) -> None:
    weights = {
        name: torch.from_numpy(round_to_tf32(tensor.numpy())) if name.endswith("weight") else tensor
        for name, tensor in either.checkpoint.weights.items()
    }
    assert {WRONG, COARSE, FULL} <= either.red(either.backend(either.altered(weights=weights)))


def test_weights_in_half_precision_are_noticed(either: Case) -> None:
    weights = {name: tensor.half().float() for name, tensor in either.checkpoint.weights.items()}
    assert {WRONG, COARSE, FULL} <= either.red(either.backend(either.altered(weights=weights)))


def test_products_in_tf32_are_noticed(either: Case) -> None:
    """What TensorRT-RTX and ONNX Runtime's CUDA provider do unless told otherwise."""

    def tensor_core(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        # Inputs are rounded, products and sums are not.
        return (round_to_tf32(values).astype(np.float64) @ round_to_tf32(weight).astype(np.float64).T).astype(
            np.float32
        )

    assert {WRONG, COARSE, FULL} <= either.red(either.numpy_backend(tensor_core))


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_two_swapped_layers_are_noticed(case: Case, layer: int) -> None:
    order = list(range(8))
    order[layer : layer + 2] = layer + 1, layer
    constants = case.checkpoint.constants
    swapped = ConditioningConstants(constants.mean[order], constants.scale[order])
    assert {WRONG, FULL} <= case.red(case.backend(case.altered(constants=swapped)))


def test_one_constant_off_by_a_thousandth_of_itself_is_noticed(case: Case) -> None:
    constants = case.checkpoint.constants
    scale = constants.scale.clone()
    scale[1, 5] *= 1.001
    assert WRONG in case.red(case.backend(case.altered(constants=ConditioningConstants(constants.mean, scale))))


# --- red: other behaviour ---------------------------------------------------------------------------------------------


class Wrapped:
    """A right backend, whose answers a test may spoil."""

    name = "spoiled"
    description = "a right backend with spoiled answers"
    device, checked_steps = "this test", 0

    def __init__(
        self,
        right: OrtBackend,
        *,
        encode: Callable[..., None] = lambda *_: None,
        decode: Callable[..., None] = lambda *_: None,
    ) -> None:
        self._right, self._encode, self._decode = right, encode, decode

    def encode_into(self, actions: np.ndarray, tokens: np.ndarray, stats: np.ndarray | None) -> None:
        self._right.encode_into(actions, tokens, stats)
        self._encode(actions, tokens, stats)

    def decode_into(self, tokens: np.ndarray, stats: np.ndarray | None, actions: np.ndarray) -> None:
        self._right.decode_into(tokens, stats, actions)
        self._decode(tokens, stats, actions)

    def close(self) -> None:
        self._right.close()


def spoil_one(value: float) -> Callable[..., None]:
    """One number of an output array, the last argument, becomes `value`."""

    def spoil(*arrays: np.ndarray) -> None:
        arrays[-1].reshape(-1)[-1] = value

    return spoil


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_no_number_is_noticed(either: Case, value: float) -> None:
    assert either.red(Wrapped(either.backend(), decode=spoil_one(value))) == {COARSE, FULL}


@pytest.mark.parametrize("call", [0, 3, 9])
def test_one_bad_answer_among_many_is_noticed(case: Case, call: int) -> None:
    """The worst counts, not the last."""
    calls = iter(range(1000))

    def spoil(_tokens: np.ndarray, _stats: None, actions: np.ndarray) -> None:
        if next(calls) == call:
            actions[0, 0, 0] += 3e-5

    assert len(case.red(Wrapped(case.backend(), decode=spoil))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_no_number_are_noticed(dynamic: Case, value: float) -> None:
    assert STATS in dynamic.red(Wrapped(dynamic.backend(), encode=spoil_one(value)))


def test_statistics_that_are_a_little_off_are_noticed(dynamic: Case) -> None:
    def spoil(_actions: np.ndarray, _tokens: np.ndarray, stats: np.ndarray) -> None:
        stats[..., 0, 1] += 1.5e-5

    assert STATS in dynamic.red(Wrapped(dynamic.backend(), encode=spoil))


def output_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Of encoding (actions, tokens, stats) or decoding (tokens, stats, actions)."""
    return arrays[1] if arrays[0].dtype == np.float32 else arrays[2]


@dataclass
class Late:
    """Gives the answer to the question before, where that has the same shape."""

    last: dict[tuple[int, ...], np.ndarray]

    def __call__(self, *arrays: np.ndarray) -> None:
        out = output_of(arrays)
        fresh = out.copy()
        out[...] = self.last.get(out.shape, np.zeros_like(out))
        self.last[out.shape] = fresh


def test_the_answer_to_the_question_before_is_noticed(case: Case) -> None:
    assert WRONG in case.red(Wrapped(case.backend(), encode=Late({})))
    assert case.red(Wrapped(case.backend(), decode=Late({}))) == {COARSE, FULL}


def test_a_backend_that_does_nothing_is_noticed(case: Case) -> None:
    def nothing(*arrays: np.ndarray) -> None:
        output_of(arrays)[...] = 0

    assert {WRONG, COARSE, FULL} <= case.red(Wrapped(case.backend(), encode=nothing, decode=nothing))


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("batch", [0, 2, 3])
def test_a_single_wrong_token_is_noticed_and_named(case: Case, off: int, batch: int) -> None:
    golden = case.reference.golden(case.answers[batch].expected)
    clear = (golden.margins > golden.bounds) & (golden.tokens + off >= 0) & (golden.tokens + off < 7)
    # In the last layer, so that it alone is wrong.
    *_, place = (tuple(index) for index in np.argwhere(clear) if index[-1] == 7)
    calls = iter(range(len(case.answers)))

    def spoil(_actions: np.ndarray, tokens: np.ndarray, _stats: None) -> None:
        if next(calls) == batch:
            tokens[place] += off

    entries = case.judge(Wrapped(case.backend(), encode=spoil))
    (line,) = failures(entries)
    expected = int(golden.tokens[place])
    assert line.startswith(f"spoiled, {WRONG}: 1 over ")
    assert f"is {expected + off}, expected {expected}: margin" in line
    # Counted over all batches, as if they were one.
    before = sum(len(answers.expected.tokens) for answers in case.answers[:batch])
    assert f"token {[before + int(place[0]), *map(int, place[1:])]} " in line


@pytest.mark.parametrize("value", [-1, 7, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_a_token_that_does_not_exist_is_noticed(case: Case, value: int) -> None:
    def spoil(_actions: np.ndarray, tokens: np.ndarray, _stats: None) -> None:
        tokens[0, 0, 0, 0] = value

    assert WRONG in case.red(Wrapped(case.backend(), encode=spoil))


def test_a_decoder_that_is_right_for_the_encoders_tokens_alone_is_noticed(case: Case) -> None:
    """A policy may send tokens that no encoder gives."""
    known = {hashlib.sha256(answers.expected.tokens[..., :prefix].tobytes()).digest()
             for answers in case.answers for prefix in PREFIXES}  # fmt: skip

    def spoil(tokens: np.ndarray, _stats: None, actions: np.ndarray) -> None:
        if hashlib.sha256(tokens.tobytes()).digest() not in known:
            actions += 1

    assert case.red(Wrapped(case.backend(), decode=spoil)) == {COARSE, FULL}


# --- near-ties --------------------------------------------------------------------------------------------------------


class Encoded:
    """Gives the prepared tokens, batch by batch; decodes rightly."""

    name = "prepared"
    description = "prepared tokens"
    device, checked_steps = "this test", 0

    def __init__(self, case: Case, tokens: Sequence[np.ndarray], stats: Sequence[np.ndarray] | None = None) -> None:
        self._right, self._tokens, self._stats = case.backend(), iter(tokens), iter(stats or ())
        self.decode_into, self.close = self._right.decode_into, self._right.close

    def encode_into(self, _actions: np.ndarray, tokens: np.ndarray, stats: np.ndarray | None) -> None:
        tokens[...] = next(self._tokens)
        if stats is not None:
            stats[...] = next(self._stats)


def float32_tokens(case: Case) -> list[np.ndarray]:
    model = case.checkpoint.model(case.reference.mode.conditioning)
    with torch.no_grad():
        return [model.encode(torch.from_numpy(answers.expected.actions))[0].numpy() for answers in case.answers]


def test_a_backend_may_flip_the_near_ties_that_torch_flips(case: Case) -> None:
    entries = case.judge(Encoded(case, float32_tokens(case)))
    assert failures(entries) == []
    flips = next(entry for entry in entries if entry.gate == NEAR_TIES)
    # Twice as many may flip, and the scatter; of all batches together, whatever their number.
    assert flips.limit == near_tie_cap(int(flips.value)) > near_tie_cap(0)


def with_every_near_tie_flipped(case: Case, answers: Answers) -> np.ndarray:
    """Every token that float32 could give differently, moved across the edge it lies at; later layers go on from it."""
    model, actions = case.reference.model, torch.from_numpy(answers.expected.actions).double()
    tokens = torch.from_numpy(answers.expected.tokens).long()
    with torch.no_grad():
        latents = model.encode_latents(actions)
        for layer in range(model.config.num_layers):
            decisions, margins, bounds = token_error_bounds(model, actions, tokens)
            *_, step = itertools.islice(model.quantizer.layers(latents, tokens), layer + 1)
            side = torch.sign((step.conditioned + 1) * 3 - step.tokens).long()
            is_near_tie = margins[..., layer] <= bounds[..., layer]
            tokens[..., layer] = torch.where(is_near_tie, (step.tokens + side).clamp(0, 6), decisions[..., layer])
    return tokens.numpy()


def test_a_backend_may_not_flip_every_near_tie(case: Case) -> None:
    tokens = [with_every_near_tie_flipped(case, answers) for answers in case.answers]
    entries = case.judge(Encoded(case, tokens))
    by_name = {entry.gate: entry for entry in entries}
    assert by_name[WRONG].value == 0
    assert by_name[NEAR_TIES].value > 1.5 * by_name[NEAR_TIES].limit
    assert any(f"prepared, {NEAR_TIES}" in line and "torch float32" in line for line in failures(entries))


def test_where_torch_flips_no_near_tie_another_may_flip_some(case: Case) -> None:
    """Of few steps, as of a small dataset."""
    actions = np.concatenate([answers.expected.actions[~answers.float32.flipped.any(-1)] for answers in case.answers])
    few = replace(case, answers=[case.reference.answer(actions)])
    (answers,) = few.answers
    assert answers.float32.num_near_ties == 0
    every = with_every_near_tie_flipped(few, answers)
    some = answers.expected.tokens.copy()
    chunk, step = np.argwhere((every != some).any(axis=(-2, -1)))[0]
    some[chunk, step] = every[chunk, step]
    by_name = {entry.gate: entry for entry in few.judge(Encoded(few, [some]))}
    assert (by_name[WRONG].value, by_name[NEAR_TIES].limit) == (0, 35)
    assert 1 <= by_name[NEAR_TIES].value <= 35
    assert few.red(Encoded(few, [every])) == {NEAR_TIES}


def test_a_near_tie_excuses_the_level_next_to_it_alone(case: Case) -> None:
    tokens = []
    for answers in case.answers:
        golden = case.reference.golden(answers.expected)
        excusable = (golden.margins <= golden.bounds) & (np.arange(8) == 0)
        tokens.append(np.where(excusable, (golden.tokens + 3) % 7, golden.tokens))
    assert WRONG in case.red(Encoded(case, tokens))


@pytest.mark.parametrize("value", [0, 6, 7, np.iinfo(np.int32).min])
def test_what_lies_behind_a_flip_is_judged_along_the_flip(either: Case, value: int) -> None:
    """A flip excuses itself, and what follows from it; not what happens to stand behind it."""
    right = float32_tokens(either)
    spoiled = []
    for answers, tokens in zip(either.answers, right, strict=True):
        differs = (tokens != answers.expected.tokens).any(axis=-2, keepdims=True)
        behind = np.logical_or.accumulate(differs, axis=-1)
        behind[..., 1:], behind[..., 0] = behind[..., :-1].copy(), False
        spoiled.append(np.where(behind, value, tokens))
    assert any((one != other).any() for one, other in zip(right, spoiled, strict=True))
    stats = [answers.expected.stats for answers in either.answers] if either.model.has_stats else None
    assert WRONG not in either.red(Encoded(either, right, stats))
    assert WRONG in either.red(Encoded(either, spoiled, stats))


# --- golden vectors ---------------------------------------------------------------------------------------------------


def test_golden_vectors_hold_the_start_of_every_section_and_all_edges(case: Case) -> None:
    golden = golden_vectors(case.reference, case.sections)
    parts = [section.actions if section.name == EDGES else section.actions[:24] for section in case.sections]
    np.testing.assert_array_equal(golden.actions, np.concatenate(parts))
    assert set(golden.decoded) == set(PREFIXES)
    assert golden.near_tie_cap > 0


def test_a_chunk_whose_statistics_float32_cannot_give_is_no_golden_vector(dynamic: Case, case: Case) -> None:
    """Actions a thousand times beyond the range: sums cancel, and what is left of a residual is rounding."""
    ill_conditioned = np.zeros((2, CHUNK, 7), np.float32)
    ill_conditioned[1, 3] = 1000 * np.array([-1, -1, 1, -1, -1, -1, 1])
    sections = [Section(EDGES, ill_conditioned)]
    assert dynamic.reference.answer(ill_conditioned).round_trip[1, 3] > 1e-5
    np.testing.assert_array_equal(golden_vectors(dynamic.reference, sections).actions, ill_conditioned[:1])
    # Without statistics the same tokens decode to the same actions.
    assert len(golden_vectors(case.reference, sections).actions) == 2


def test_the_golden_vectors_alone_notice_what_the_gates_notice(case: Case) -> None:
    golden = golden_vectors(case.reference, case.sections)
    assert replay(golden, case.model, case.backend()).passed
    for name in WEIGHTS:
        weights = perturbed(case.checkpoint, name, lambda weight: weight + 1e-3)
        assert not replay(golden, case.model, case.backend(case.altered(weights=weights))).passed, name


def test_batches_cover_every_step_once_and_in_order(case: Case) -> None:
    actions = np.concatenate([answers.expected.actions for answers in case.answers])
    np.testing.assert_array_equal(actions, np.concatenate([section.actions for section in case.sections]))


def test_nan_is_red() -> None:
    entry = ParityEntry("onnxruntime", "some gate", 8, float("nan"), 1.0, "", "CPU")
    assert failures((entry,)) == ["onnxruntime, some gate: nan over 8 steps; expected at most 1"]
    assert failures((replace(entry, value=1.0),)) == []
    assert failures((replace(entry, value=1.0000001, detail="why"),)) == [
        "onnxruntime, some gate: 1 over 8 steps; expected at most 1 (why)"
    ]
