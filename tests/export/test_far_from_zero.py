"""Joints that rest far from zero, in units of their own movement: every engine is as good there as it is at zero."""

import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from rfsq.export.graph_builder import LinearForm
from rfsq.export.plan import DecoderPlan, DeployMode, EncoderPlan, plan_decoder, plan_encoder
from rfsq.export.proving import failures
from rfsq.rfsq_ref.autoencoder import ModelConfig, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.settings import NormaliserKind
from tests.bundles import Deployed, Recipe, deploy, export_graphs, generate_c, generate_cuda
from tests.export.c_library import OK, Library
from tests.export.cuda_on_cpu import CudaOnCpu
from tests.export.plan_numpy import CODES, MODES, PlanBackend
from tests.export.test_parity import CHUNK, COARSE, FULL, NEAR_TIES, PREFIXES, STEPS, WRONG, Case
from tests.rfsq_ref.models import make_model, shrinking_constants
from tests.rfsq_ref.units import restore

RATIOS = [0, 4, 6, 10, 20, 100, 1000]
#: No power of two, so that folding them rounds.
SCALES = (0.3, 0.7, 1.1, 0.05, 2.3, 1.7, 0.9)
#: Compiles in a third of the time.
QUICK = ("-std=c11", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
#: Of steps that the kernels for few steps take: a block for each of them takes long on a processor.
MOST_FEW_STEPS = 64


@pytest.fixture(scope="module")
def compilers() -> None:
    for program in ("gcc", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install {program}")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the threads of a block need ucontext, of glibc")


def resting(checkpoint: Checkpoint, ratios: Sequence[float], scales: Sequence[float] = SCALES) -> Checkpoint:
    """The checkpoint for a robot whose dimension i rests at ratios[i] times its scale."""
    offset, scale = (np.array(values, np.float32) for values in (np.multiply(ratios, scales), scales))
    normaliser = Normaliser(NormaliserKind.MIN_MAX, tuple(map(float, offset)), tuple(map(float, scale)))
    return replace(checkpoint, normaliser=normaliser)


def case_of(checkpoint: Checkpoint, mode: DeployMode, normalised: np.ndarray) -> Case:
    assert checkpoint.normaliser is not None
    steps = restore(checkpoint.normaliser, normalised).astype(np.float32)
    return Case.of(checkpoint, mode, steps, PREFIXES)


@pytest.fixture(scope="module")
def checkpoint_of(calibrated: Checkpoint, naive: Checkpoint) -> Callable[[DeployMode], Checkpoint]:
    def get(mode: DeployMode) -> Checkpoint:
        if mode is DeployMode.RECOVERED:
            # Any affine map will do for a decoder; what it is worth is judged elsewhere.
            sizes, random = calibrated.config, torch.Generator().manual_seed(0)
            decoders = {}
            for prefix in PREFIXES:
                matrix = torch.randn(sizes.latent_dim, sizes.latent_dim * prefix, generator=random) / 100
                decoders[prefix] = RecoveredDecoder(matrix.double(), -3 * matrix.double().sum(1))
            return replace(calibrated, recovered=decoders)
        return naive if mode is DeployMode.NONE else calibrated

    return get


# --- backends ---------------------------------------------------------------------------------------------------------


class CompiledC:
    name, description, device, checked_steps = "c", "the generated C", "this processor", 0

    def __init__(self, folder: Path, deployed: Deployed) -> None:
        self._library = Library(folder, deployed, flags=QUICK)

    def encode_into(self, actions: np.ndarray, tokens: np.ndarray, stats: np.ndarray | None) -> None:
        status, tokens[...], found = self._library.encode(actions)
        assert status == OK
        if stats is not None:
            stats[...] = found

    def decode_into(self, tokens: np.ndarray, stats: np.ndarray | None, actions: np.ndarray) -> None:
        status, actions[...] = self._library.decode(tokens, stats)
        assert status == OK


class CompiledCuda:
    """By the kernels for many steps, where there are any; a few steps go through the others, to the same bits."""

    name, description, device, checked_steps = "cuda", "the generated CUDA", "this processor", 0

    def __init__(self, folder: Path, deployed: Deployed) -> None:
        self._kernels = CudaOnCpu(folder, deployed)

    def encode_into(self, actions: np.ndarray, tokens: np.ndarray, stats: np.ndarray | None) -> None:
        steps = actions.reshape(-1, actions.shape[-1])
        if not self._kernels.has(None, "int32", "many"):
            flat, found = self._kernels.encode(steps, "int32", "few")
        else:
            flat, found = self._kernels.encode(steps, "int32", "many")
            few, _ = self._kernels.encode(steps[:MOST_FEW_STEPS], "int32", "few")
            assert np.array_equal(few, flat[:MOST_FEW_STEPS])
        tokens[...] = flat.reshape(tokens.shape)
        if stats is not None:
            assert found is not None
            stats[...] = found.reshape(stats.shape)

    def decode_into(self, tokens: np.ndarray, stats: np.ndarray | None, actions: np.ndarray) -> None:
        flat = tokens.reshape(-1, *tokens.shape[2:])
        if stats is not None or not self._kernels.has(tokens.shape[-1], "int32", "many"):
            found = self._kernels.decode(flat, None if stats is None else stats.reshape(-1, *stats.shape[2:]), "few")
        else:
            found = self._kernels.decode(flat, None, "many")
            few = self._kernels.decode(flat[:MOST_FEW_STEPS], None, "few")
            assert np.array_equal(few, found[:MOST_FEW_STEPS])
        actions[...] = found.reshape(actions.shape)


def deployed_of(case: Case) -> Deployed:
    recipe = Recipe(case.reference.mode, case.checkpoint.config, CHUNK, PREFIXES)
    return Deployed(recipe, case.reference.model, case.reference.model)


def judge_every_implementation(case: Case, folder: Path) -> None:
    backends = [case.numpy_backend(), *(case.backend(form=form) for form in LinearForm)]
    backends += [CompiledC(folder / "c", deployed_of(case)), CompiledCuda(folder / "cuda", deployed_of(case))]
    for backend in backends:
        entries = case.judge(backend)
        assert failures(entries) == [], backend.description
        assert next(entry for entry in entries if entry.gate == WRONG).value == 0
    # A count so small that twice as many is no limit but chance would let anything pass.
    assert sum(answers.float32.num_near_ties for answers in case.answers) >= 25


# --- green ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [[0, 0, 0, 1000, 0, 0, 0], [6] * 7, [100] * 7], ids=["one far", "near", "far"])
def test_plans_and_graphs_pass_every_gate_wherever_joints_rest(
    ratios: list[float], calibrated: Checkpoint, split: EpisodeSplit
) -> None:
    case = case_of(resting(calibrated, ratios), DeployMode.CALIBRATED, split.test.steps()[: STEPS // 2])
    for backend in (case.numpy_backend(), case.backend(form=LinearForm.GEMM)):
        assert failures(case.judge(backend)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "ratios"),
    [
        *(pytest.param(mode, RATIOS, id=f"{mode.value}, mixed") for mode in CODES),
        pytest.param(DeployMode.NONE, [1000] * 7, id="none, all far"),
    ],
)
@pytest.mark.usefixtures("compilers")
def test_every_implementation_passes_every_gate(
    mode: DeployMode,
    ratios: list[float],
    checkpoint_of: Callable[[DeployMode], Checkpoint],
    split: EpisodeSplit,
    tmp_path: Path,
) -> None:
    judge_every_implementation(
        case_of(resting(checkpoint_of(mode), ratios), mode, split.test.steps()[: STEPS // 2]), tmp_path
    )


@pytest.mark.slow
@pytest.mark.usefixtures("compilers")
def test_a_humanoid_of_26_joints_passes_every_gate(tmp_path: Path) -> None:
    """Joint targets in radians: some joints swing around zero, others move by hundredths around a bent knee."""
    random = np.random.default_rng(0)
    sizes = ModelConfig(action_dim=26)
    weights = make_model(sizes, Conditioning.DYNAMIC, gain=1.5).state_dict()
    scales = np.exp(random.uniform(np.log(0.005), np.log(0.5), 26))
    rests = random.uniform(-2, 2, 26)
    checkpoint = Checkpoint(sizes, Conditioning.DYNAMIC, weights, constants=shrinking_constants(8, 16, 7))
    case = case_of(
        resting(checkpoint, rests / scales, scales), DeployMode.CALIBRATED, random.uniform(-1, 1, (STEPS // 2, 26))
    )
    judge_every_implementation(case, tmp_path)


# --- the error scales with the units ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("power", [-10, 3])
def test_other_units_change_no_token_and_scale_every_action(
    mode: DeployMode, power: int, checkpoint_of: Callable[[DeployMode], Checkpoint], split: EpisodeSplit
) -> None:
    """By a power of two, which rounds nothing: millimetres or metres, a robot does the very same."""
    factor = np.float32(2.0**power)
    normalised = split.test.steps()[:400].reshape(-1, CHUNK, 7)
    results = []
    for scale in (np.float32(1), factor):
        checkpoint = resting(checkpoint_of(mode), RATIOS, [float(np.float32(one) * scale) for one in SCALES])
        assert checkpoint.normaliser is not None
        model = checkpoint.model(mode.conditioning, dtype=torch.float64).requires_grad_(False)
        backend = PlanBackend(plan_encoder(model, mode, CHUNK), {8: plan_decoder(model, mode, CHUNK, 8)})
        if scale == 1:
            actions = restore(checkpoint.normaliser, normalised).astype(np.float32)
        tokens = np.empty((*actions.shape[:2], 16, 8), np.int32)
        stats = np.empty((*actions.shape[:2], 8, 2), np.float32) if mode.has_stats else None
        decoded = np.empty_like(actions)
        backend.encode_into(actions * scale, tokens, stats)
        backend.decode_into(tokens, stats, decoded)
        results.append((tokens, decoded / scale))
    (tokens, decoded), (other_tokens, other_decoded) = results
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_array_equal(decoded, other_decoded)


# --- and costs nothing where there is no offset -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_subtracted_or_added_where_there_is_no_offset(mode: DeployMode) -> None:
    for has_normaliser in (True, False):
        deployed = deploy(Recipe(mode, has_normaliser=has_normaliser))
        for content in export_graphs(deployed).values():
            graph = onnx.load_model_from_string(content).graph
            assert sum("offset" in node.input for node in graph.node) == has_normaliser
        for source in (generate_c(deployed).source, generate_cuda(deployed)):
            assert f"#define HAS_OFFSET {int(has_normaliser)}\n" in source
            assert bool(re.search(r"float OFFSETS?\[\d+\] = ", source)) == has_normaliser


# --- red --------------------------------------------------------------------------------------------------------------


def with_folded_offset(plan: EncoderPlan) -> EncoderPlan:
    """The offset inside the first bias, as large as it is."""
    folded = plan.first.weight.astype(np.float64) @ plan.offset.astype(np.float64)
    bias = (plan.first.bias - folded).astype(np.float32)
    return replace(plan, first=replace(plan.first, bias=bias), offset=np.zeros_like(plan.offset))


def with_offset_in_the_bias(plan: DecoderPlan) -> DecoderPlan:
    bias = plan.second.bias + plan.offset
    return replace(plan, second=replace(plan.second, bias=bias), offset=np.zeros_like(plan.offset))


@pytest.fixture(scope="module")
def far(calibrated: Checkpoint, split: EpisodeSplit) -> Case:
    return case_of(resting(calibrated, [1000] * 7), DeployMode.CALIBRATED, split.test.steps()[: STEPS // 2])


def folded_backend(case: Case) -> PlanBackend:
    model = case.reference.model
    encoder = with_folded_offset(plan_encoder(model, DeployMode.CALIBRATED, CHUNK))
    decoders = {
        prefix: with_offset_in_the_bias(plan_decoder(model, DeployMode.CALIBRATED, CHUNK, prefix))
        for prefix in PREFIXES
    }
    return PlanBackend(encoder, decoders)


def test_an_offset_folded_into_biases_turns_the_gates_red(far: Case) -> None:
    """Which is what engines did: thousands of tokens flip, and the bias's own rounding is beyond the limit."""
    assert far.red(folded_backend(far)) >= {WRONG, NEAR_TIES, COARSE, FULL}


@pytest.mark.parametrize("ratio", [10, 20])
def test_so_it_does_nearer_to_zero(ratio: float, calibrated: Checkpoint, split: EpisodeSplit) -> None:
    case = case_of(resting(calibrated, [ratio] * 7), DeployMode.CALIBRATED, split.test.steps()[: STEPS // 2])
    assert NEAR_TIES in case.red(folded_backend(case))


@pytest.mark.parametrize("name", ["decoder.2.weight", "decoder.2.bias"])
def test_a_decoder_off_by_two_hundred_thousandths_is_noticed_behind_float32s_own_steps(far: Case, name: str) -> None:
    """A float32 a thousand units from zero is three times as far from the next: one action does not tell, many do."""
    weights = dict(far.checkpoint.weights)
    readout = far.checkpoint.readout
    if readout is not None:
        weights |= {"decoder.2.weight": readout.weight, "decoder.2.bias": readout.bias}
    spoiled = weights[name].clone()
    spoiled.view(-1)[spoiled.numel() // 2] += 2e-5 if name.endswith("bias") else 5e-5
    altered = far.altered(weights={**weights, name: spoiled}, readout=None)
    assert far.red(far.backend(altered)) == {COARSE, FULL}
