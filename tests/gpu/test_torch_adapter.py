"""The adapter on the GPU: published policy code runs there unchanged, and tensors stay where they are."""

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.export.build_config import BuildConfig
from rfsq.export.pipeline import build
from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.gpu.driver import free_memory
from rfsq.runtime.backends.registry import GPU_BACKENDS
from rfsq.runtime.bundle.comparison import action_errors, compare_tokens
from rfsq.runtime.bundle.errors import InvalidInputError, UnbuiltPrefixError
from rfsq.runtime.bundle.folder import Bundle
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.golden import Golden, read_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME
from rfsq.runtime.policy.adapter import ActionRFSQAE
from rfsq.runtime.policy.adapter_calls import FINGERPRINT_KEY
from tests.gpu.conftest import ENGINES
from tests.gpu.test_arrays import random_actions
from tests.runtime.policy.published import act, act_through_rfsq, train_policy

#: Beside the bundle's own: a single step, a part of a chunk, several chunks and a part.
LENGTHS = (8, 1, 3, 16, 29)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.fixture(params=ENGINES)
def adapter(request: pytest.FixtureRequest, bundle_path: Path) -> ActionRFSQAE:
    """On an engine that takes arrays of the GPU."""
    return ActionRFSQAE.from_bundle(bundle_path, backend=request.param)


@pytest.fixture
def without_waiting() -> Iterator[Callable[[bool], None]]:
    """Called with True it makes every operation of torch an error that waits for the GPU, as copies to the host do."""

    def switch(is_on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if is_on else "default")

    yield switch
    switch(False)


@pytest.fixture(scope="module")
def both_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint with generated C and generated CUDA, so that each place has its own best engine."""
    output = tmp_path_factory.mktemp("both") / "bundle"
    build(BuildConfig(output=output, backends=("c", "onnxruntime", "cuda"), parity_steps=20_000))
    return output


@pytest.fixture(scope="module")
def golden(bundle: Bundle) -> Golden:
    return read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)


def actions_of(adapter: ActionRFSQAE, batch: int, steps: int | None = None, seed: int = 0) -> Tensor:
    """On the GPU."""
    actions = torch.from_numpy(random_actions(adapter.tokenizer, batch * (1 if steps is None else steps), seed))
    if steps is not None:
        actions = actions.flatten(0, 1)[: batch * steps].reshape(batch, steps, -1)
    return actions.cuda()


# --- published code runs unchanged ------------------------------------------------------------------------------------


def test_training_drafting_and_acting_run_on_the_gpu(adapter: ActionRFSQAE) -> None:
    chunks = actions_of(adapter, 4).cpu()
    observations = chunks.flatten(1)
    main, draft, losses = train_policy(adapter, observations, chunks, device="cuda")
    assert losses[-1] < losses[0]
    observation = observations[:1].cuda()
    assert draft(observation).shape[-2:] == (3, adapter.num_levels)
    indices = main(observation).argmax(-1)
    expected = torch.from_numpy(adapter.tokenizer.decode(indices.cpu().numpy()))
    for how in (act, act_through_rfsq):
        actions = how(adapter, main, observation)
        assert actions.is_cuda
        assert torch.equal(actions.cpu(), expected)


def test_labels_on_the_gpu_are_those_of_the_cpu(adapter: ActionRFSQAE) -> None:
    """Of the same engine: between engines a near-tie may differ."""
    chunks = actions_of(adapter, 300)
    recon, codes = adapter(chunks)
    on_cpu = adapter(chunks.cpu())
    assert (recon.is_cuda, codes.is_cuda, codes.dtype) == (True, True, torch.int64)
    assert torch.equal(codes.cpu(), on_cpu[1])
    assert torch.equal(recon.cpu(), on_cpu[0])


# --- forward, encode and decode equal the reference -------------------------------------------------------------------


def test_answers_are_the_references(adapter: ActionRFSQAE, golden: Golden) -> None:
    model = adapter.tokenizer.model
    x = torch.from_numpy(golden.actions.copy()).cuda()
    recon, codes = adapter(x)
    assert torch.equal(adapter.encode(x), codes)
    compared = compare_tokens(
        golden.tokens,
        codes.cpu().numpy(),
        golden.margins,
        golden.bounds,
        num_levels=model.num_levels,
        is_step_coupled=model.is_step_coupled,
    )
    assert compared.num_wrong == GATES.wrong_tokens, compared.first_wrong
    assert compared.num_near_ties <= golden.near_tie_cap
    steady = ~compared.flipped
    expected = golden.decoded[model.num_layers]
    error = action_errors(expected[steady], recon.cpu().numpy()[steady], model.action_units)
    assert error.value <= GATES.action_error
    tokens = torch.from_numpy(golden.tokens.copy()).cuda()
    for prefix in model.prefixes:
        decoded = adapter.decode_from_indices(tokens[..., :prefix]).cpu().numpy()
        assert action_errors(golden.decoded[prefix], decoded, model.action_units).value <= GATES.action_error


@pytest.mark.parametrize("steps", LENGTHS)
def test_decoding_the_codes_gives_forwards_reconstruction_bit_for_bit_at_any_length(
    steps: int, adapter: ActionRFSQAE
) -> None:
    x = actions_of(adapter, 5, steps)
    recon, codes = adapter(x)
    assert codes.shape == (5, steps, adapter.hidden_dim, adapter.num_layers)
    assert torch.equal(adapter.decode_from_indices(codes), recon)
    on_cpu = adapter(x.cpu())
    assert torch.equal(codes.cpu(), on_cpu[1])
    assert torch.equal(recon.cpu(), on_cpu[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (4,), (2, 3, 8), ()])
def test_leading_axes_may_be_any_and_empty(shape: tuple[int, ...], adapter: ActionRFSQAE) -> None:
    x = torch.rand((*shape, adapter.action_dim), device="cuda")
    recon, codes = adapter(x)
    assert (recon.shape, recon.is_cuda) == (x.shape, True)
    assert (codes.shape, codes.is_cuda) == ((*shape, adapter.hidden_dim, adapter.num_layers), True)
    assert torch.equal(adapter.decode_from_indices(codes), recon)


def test_forward_of_a_dynamic_bundle_keeps_its_statistics_inside(tmp_path: Path) -> None:
    build(
        BuildConfig(
            output=tmp_path / "bundle",
            conditioning=DeployMode.DYNAMIC,
            backends=("onnxruntime", "cuda"),
            parity_steps=20_000,
        )
    )
    adapter = ActionRFSQAE.from_bundle(tmp_path / "bundle", backend="cuda")
    for steps in LENGTHS:
        x = actions_of(adapter, 4, steps)
        recon, codes = adapter(x)
        on_cpu = adapter(x.cpu())
        assert torch.equal(codes.cpu(), on_cpu[1])
        assert torch.equal(recon.cpu(), on_cpu[0])
        with pytest.raises(InvalidInputError, match=r"--conditioning recovered.*--conditioning calibrated"):
            adapter.decode_from_indices(codes)


# --- tensors stay on the GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", LENGTHS)
def test_no_call_waits_for_the_gpu_or_copies_to_the_host(
    steps: int, adapter: ActionRFSQAE, without_waiting: Callable[[bool], None]
) -> None:
    x = actions_of(adapter, 4, steps)
    # The first calls may allocate.
    expected, codes = adapter(x)
    coarse = adapter.decode_from_indices(codes[..., :3])
    without_waiting(True)
    recon, again = adapter(x)
    encoded = adapter.encode(x)
    decoded, decoded_coarse = adapter.decode_from_indices(encoded), adapter.decode_from_indices(encoded[:, :, :, :3])
    without_waiting(False)
    assert torch.equal(encoded, codes)
    assert torch.equal(again, codes)
    for found in (recon, decoded):
        assert torch.equal(found, expected)
    assert torch.equal(decoded_coarse, coarse)


def test_the_test_above_can_fail(without_waiting: Callable[[bool], None]) -> None:
    tensor = torch.zeros(3, device="cuda")
    without_waiting(True)
    with pytest.raises(RuntimeError):
        tensor.cpu()


def test_work_is_done_in_the_order_of_torchs_current_stream(adapter: ActionRFSQAE) -> None:
    """What is read is still being made when the call comes; on another stream it would read what was there before."""
    ready = actions_of(adapter, 64)
    expected_recon, expected_codes = adapter(ready)
    busy, x, codes = torch.randn(4096, 4096, device="cuda"), torch.zeros_like(ready), torch.zeros_like(expected_codes)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            torch.matmul(busy, busy)
        x.copy_(ready)
        codes.copy_(expected_codes)
        recon, found = adapter(x)
        decoded = adapter.decode_from_indices(codes)
        # Overwritten behind the calls: too late for them.
        x.zero_()
        codes.zero_()
    stream.synchronize()
    assert torch.equal(found, expected_codes)
    assert torch.equal(recon, expected_recon)
    assert torch.equal(decoded, expected_recon)


def test_views_and_memory_that_no_kernel_could_load_work_all_the_same(adapter: ActionRFSQAE) -> None:
    x = actions_of(adapter, 6)
    recon, codes = adapter(x)
    shifted = torch.empty(x.numel() + 1, device="cuda")[1:].view(x.shape)
    shifted.copy_(x)
    assert shifted.data_ptr() % 16
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    for given in (shifted, transposed, x.expand(1, *x.shape)[0]):
        assert torch.equal(adapter.encode(given), codes)
    assert torch.equal(adapter.encode(x[::2]), codes[::2])
    odd = torch.empty(codes.numel() + 1, dtype=torch.int32, device="cuda")[1:].view(codes.shape)
    odd.copy_(codes)
    for given in (odd, codes.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(adapter.decode_from_indices(given), recon)
    assert torch.equal(adapter.decode_from_indices(codes[1::2]), recon[1::2])


def test_many_calls_leave_the_memory_as_it_was(adapter: ActionRFSQAE) -> None:
    batches = [actions_of(adapter, 7, steps) for steps in LENGTHS]

    def calls(count: int) -> None:
        for _ in range(count):
            for x in batches:
                recon, codes = adapter(x)
                adapter.decode_from_indices(codes[..., :3])
                del recon, codes
        torch.cuda.synchronize()
        gc.collect()

    calls(20)
    before, allocated = free_memory(), torch.cuda.memory_allocated()
    calls(200)
    assert torch.cuda.memory_allocated() == allocated
    assert before - free_memory() < 2**24


# --- types and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integer", INTEGERS)
def test_indices_may_be_of_any_integer_type(integer: torch.dtype, adapter: ActionRFSQAE) -> None:
    recon, codes = adapter(actions_of(adapter, 3))
    assert torch.equal(adapter.decode_from_indices(codes.to(integer)), recon)
    assert torch.equal(
        adapter.decode_from_indices(codes[..., :3].to(integer)), adapter.decode_from_indices(codes[..., :3])
    )


@pytest.mark.parametrize("level", [-1, 7, 2**31 - 1, -(2**31), 2**31, 2**32, 2**32 + 3, -(2**32), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("steps", [8, 3])
def test_a_token_that_is_no_level_makes_its_step_nan_and_no_other(
    steps: int, level: int, adapter: ActionRFSQAE
) -> None:
    """Also where int32 would take it for one."""
    recon, codes = adapter(actions_of(adapter, 4, steps))
    codes[2, 1, 3, 0] = level
    decoded = adapter.decode_from_indices(codes)
    assert decoded[2, 1].isnan().all()
    others = torch.ones(decoded.shape[:2], dtype=torch.bool, device="cuda")
    others[2, 1] = False
    assert torch.equal(decoded[others], recon[others])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps", [8, 3])
def test_an_action_that_is_no_number_is_marked_in_codes_and_reconstruction(
    steps: int, value: float, adapter: ActionRFSQAE
) -> None:
    x = actions_of(adapter, 4, steps)
    recon, codes = adapter(x)
    x[1, 2, 0] = value
    spoiled, spoiled_codes = adapter(x)
    assert (spoiled_codes[1, 2] == -1).all()
    assert spoiled[1, 2].isnan().all()
    others = torch.ones(x.shape[:2], dtype=torch.bool, device="cuda")
    others[1, 2] = False
    assert torch.equal(spoiled_codes[others], codes[others])
    assert torch.equal(spoiled[others], recon[others])


def test_wrong_types_shapes_and_gradients_are_refused_as_on_the_cpu(adapter: ActionRFSQAE) -> None:
    x = actions_of(adapter, 2)
    codes = adapter.encode(x)
    for wrong, words in (
        (x.double(), "torch.float64"),
        (x.half(), "torch.float16"),
        (x[..., :3], "expected actions"),
        (x.clone().requires_grad_(), "requires a gradient"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            adapter(wrong)
    assert torch.equal(adapter.encode(x.clone().requires_grad_()), codes)
    for wrong, words in (
        (codes.float(), "expected integers"),
        (codes.bool(), "expected integers"),
        (codes[:, :, 1:], "expected codes"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            adapter.decode_from_indices(wrong)
    with pytest.raises(UnbuiltPrefixError):
        adapter.decode_from_indices(codes[..., :2])


# --- which backend ----------------------------------------------------------------------------------------------------


def test_auto_takes_the_best_for_each_place(both_path: Path) -> None:
    """On the CPU generated C, and for tensors of the GPU generated CUDA, opened when they come."""
    adapter = ActionRFSQAE.from_bundle(both_path)
    assert adapter.tokenizer.backend.name == "c"
    x = actions_of(adapter, 3)
    on_cpu = adapter(x.cpu())
    with ActionTokenizer.load(both_path, backend="c") as expected:
        assert np.array_equal(on_cpu[1].numpy(), expected.encode(x.cpu().numpy()))
    assert adapter._engines._on_gpu == {}
    recon, codes = adapter(x)
    on_gpu, is_in_place = adapter._engines.tokenizer_for(x.device)
    assert (on_gpu.backend.name, is_in_place) == ("cuda", True)
    with ActionTokenizer.load(both_path, backend="cuda") as expected:
        assert np.array_equal(codes.cpu().numpy(), expected.encode(x.cpu().numpy()))
        assert np.array_equal(recon.cpu().numpy(), expected.decode(codes.int().cpu().numpy()))
    torch.testing.assert_close(adapter.decode_from_indices(codes.cpu()), recon.cpu(), rtol=0, atol=GATES.action_error)


def test_moving_the_module_opens_the_backend_before_the_first_call(both_path: Path) -> None:
    adapter = ActionRFSQAE.from_bundle(both_path)
    assert adapter._engines._on_gpu == {}
    assert adapter.to("cuda") is adapter
    assert next(adapter.parameters()).device == torch.device("cuda", 0)
    (opened,) = adapter._engines._on_gpu.values()
    assert opened is not None
    assert opened.backend.name in GPU_BACKENDS
    assert copy.deepcopy(adapter)._engines is adapter._engines
    # Tensors of either place are taken, whatever the module was moved to.
    x = actions_of(adapter, 2)
    assert adapter.encode(x).is_cuda
    assert not adapter.encode(x.cpu()).is_cuda
    assert next(adapter.half().cpu().parameters()).dtype is torch.float32


def test_a_backend_on_the_cpu_serves_tensors_of_the_gpu_by_copies_and_says_so(
    bundle_path: Path, cpu_tokenizer: ActionTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = ActionRFSQAE.from_bundle(bundle_path, backend="onnxruntime").cuda()
    for steps in (8, 3):
        x = actions_of(adapter, 4, steps)
        recon, codes = adapter(x)
        assert recon.is_cuda
        assert codes.is_cuda
        assert torch.equal(adapter.decode_from_indices(codes), recon)
        if steps == 8:
            assert np.array_equal(codes.cpu().numpy(), cpu_tokenizer.encode(x.cpu().numpy()))
        # The host reads these values.
        x[1, 2, 0] = np.nan
        codes[1, 2, 3, 4] = 7
        with pytest.raises(InvalidInputError, match=r"actions\[1, 2, 0\] is nan"):
            adapter(x)
        with pytest.raises(InvalidInputError, match=r"tokens\[1, 2, 3, 4\] is 7"):
            adapter.decode_from_indices(codes)
    assert sum("copied to the CPU and back" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="there is one GPU")
def test_tensors_of_another_gpu_are_served_by_copies(adapter: ActionRFSQAE) -> None:
    x = actions_of(adapter, 4)
    recon, codes = adapter(x.to("cuda:1"))
    assert (recon.device.index, codes.device.index) == (1, 1)
    assert torch.equal(codes.cpu(), adapter.encode(x).cpu())
    assert torch.equal(adapter.decode_from_indices(codes), recon)


# --- states -----------------------------------------------------------------------------------------------------------


def test_its_state_travels_with_the_module(adapter: ActionRFSQAE) -> None:
    adapter.to("cuda")
    state = adapter.state_dict()
    assert state[FINGERPRINT_KEY].is_cuda
    assert bytes(map(int, state[FINGERPRINT_KEY])).hex() == adapter.fingerprint
    adapter.load_state_dict(state)
    adapter.cpu().load_state_dict(state)
