"""A policy with the adapter inside is trained, averaged, moved, saved and loaded as any other, whoever does it.

Its checkpoint beside another bundle is refused, at the latest by the first call, and both fingerprints are named.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim import swa_utils

from rfsq.runtime import FingerprintError, InvalidInputError
from rfsq.runtime.policy.adapter import ActionRFSQAE
from rfsq.runtime.policy.adapter_calls import FINGERPRINT_KEY
from tests.bundles import Recipe, random_actions
from tests.runtime.policy.policies import Policy, train_together, trained

KEY = f"tokenizer.{FINGERPRINT_KEY}"


@pytest.fixture(scope="session")
def other(bundle_of: Callable[[Recipe], Path]) -> Path:
    """A bundle of the same sizes whose tokens mean something else."""
    return bundle_of(Recipe(seed=1))


@pytest.fixture
def policy(bundle: Path) -> Policy:
    return Policy(bundle)


@pytest.fixture
def foreign(other: Path) -> dict[str, Tensor]:
    """The state of a policy that was trained with the other bundle."""
    return dict(Policy(other).state_dict())


@pytest.fixture
def x() -> Tensor:
    return torch.from_numpy(random_actions(Recipe(), 2))


def on_meta(path: Path) -> Policy:
    with torch.device("meta"):
        return Policy(path)


def check_refused(call: Callable[[], object], policy: Policy, foreign: dict[str, Tensor]) -> None:
    """By the adapter itself, or by torch in its name."""
    with pytest.raises((FingerprintError, RuntimeError)) as caught:
        call()
    found = bytes(map(int, foreign[KEY])).hex()
    assert f"saved with the tokenizer {found}" in str(caught.value)
    assert policy.tokenizer.fingerprint in str(caught.value)


def check_every_call_refused(policy: Policy, x: Tensor, foreign: dict[str, Tensor]) -> None:
    codes = torch.zeros((1, 2, 4, 3), dtype=torch.int64)
    latents = policy.tokenizer.rfsq.decode_from_indices(codes)
    for call in (
        lambda: policy(x),
        lambda: policy.tokenizer.encode(x),
        lambda: policy.tokenizer.decode_from_indices(codes),
        lambda: policy.tokenizer.decoder(latents),
        lambda: policy.tokenizer.tokenizer,
    ):
        check_refused(call, policy, foreign)


# --- whoever loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}])
def test_torchs_distributed_checkpoints_are_written_and_read(
    options: dict[str, bool], policy: Policy, bundle: Path, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    state = get_model_state_dict(policy, options=StateDictOptions(**options))
    assert state.keys() == {KEY, "head.weight", "head.bias"}
    again = Policy(bundle)
    set_model_state_dict(again, state, options=StateDictOptions(**options))
    assert torch.equal(again(x), policy(x))
    check_refused(
        lambda: set_model_state_dict(again, dict(foreign), options=StateDictOptions(**options)), again, foreign
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_that_is_read_in_place_is_refused_too(
    policy: Policy, other: Path, x: Tensor, foreign: dict[str, Tensor], tmp_path: Path
) -> None:
    dcp.save(dict(Policy(other).state_dict()), checkpoint_id=tmp_path)
    state = dict(policy.state_dict())
    dcp.load(state, checkpoint_id=tmp_path)
    check_every_call_refused(policy, x, foreign)
    check_refused(lambda: policy.load_state_dict(state), policy, foreign)


@pytest.mark.parametrize("numeric", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_a_tensor_that_is_put_in_place_is_looked_at(
    numeric: torch.dtype, policy: Policy, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    """As transformers and accelerate do, which do not call load_state_dict, in whatever type the policy has."""
    own = policy.tokenizer.tokenizer_fingerprint
    expected = policy(x)
    policy.tokenizer.tokenizer_fingerprint = own.to(numeric)
    assert torch.equal(policy(x), expected)
    policy.tokenizer.tokenizer_fingerprint = foreign[KEY].to(numeric)
    check_every_call_refused(policy, x, foreign)
    policy.tokenizer.tokenizer_fingerprint = own
    with torch.no_grad():
        own.data.copy_(foreign[KEY])
    check_every_call_refused(policy, x, foreign)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(31), torch.full((32,), torch.nan), torch.full((32,), 300.0), torch.zeros(())]
)
def test_what_is_no_fingerprint_is_refused_with_advice(wrong: Tensor, policy: Policy, x: Tensor) -> None:
    """Where a checkpoint brings none, transformers leaves memory that nobody has written."""
    before = policy.tokenizer.tokenizer_fingerprint
    policy.tokenizer.tokenizer_fingerprint = wrong
    with pytest.raises(FingerprintError, match=r"of a policy without a tokenizer.*call reset_parameters\(\)"):
        policy.tokenizer.encode(x)
    policy.tokenizer.tokenizer_fingerprint = torch.full_like(before, torch.nan)
    policy.tokenizer.reset_parameters()
    assert torch.equal(policy.tokenizer.tokenizer_fingerprint, before)
    policy.tokenizer.encode(x)


def test_a_good_state_ends_what_a_bad_one_began(policy: Policy, x: Tensor, foreign: dict[str, Tensor]) -> None:
    state = copy.deepcopy(policy.state_dict())
    policy.tokenizer.tokenizer_fingerprint = foreign[KEY]
    policy.load_state_dict(state)
    policy.tokenizer.encode(x)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_load_state_dict_refuses_at_once(
    assign: bool, strict: bool, policy: Policy, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    check_refused(lambda: policy.load_state_dict(foreign, strict=strict, assign=assign), policy, foreign)
    state = copy.deepcopy(policy.state_dict())
    policy.load_state_dict(state, strict=strict, assign=assign)
    assert policy.state_dict().keys() == state.keys()
    policy.tokenizer.encode(x)


# --- the meta device --------------------------------------------------------------------------------------------------


def test_a_policy_is_built_on_the_meta_device_and_assigned(
    policy: Policy, bundle: Path, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    for built in (on_meta(bundle), Policy(bundle).to("meta")):
        assert built.head.weight.is_meta
        built.load_state_dict(policy.state_dict(), assign=True)
        assert torch.equal(built(x), policy(x))
    for built in (on_meta(bundle), Policy(bundle).to("meta")):
        check_refused(lambda built=built: built.load_state_dict(foreign, assign=True), built, foreign)


def test_memory_that_to_empty_leaves_unwritten_is_the_bundles_again(
    policy: Policy, bundle: Path, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    for built in (on_meta(bundle), Policy(bundle).to("meta"), Policy(bundle)):
        built.to_empty(device="cpu")
        built.tokenizer.encode(x)
        check_refused(lambda built=built: built.load_state_dict(foreign), built, foreign)
        built.load_state_dict(policy.state_dict())
        assert torch.equal(built(x), policy(x))


def test_distributed_checkpoints_are_read_into_a_policy_on_the_meta_device(
    policy: Policy, bundle: Path, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    options = StateDictOptions(full_state_dict=True)
    built = on_meta(bundle)
    set_model_state_dict(built, dict(policy.state_dict()), options=options)
    assert torch.equal(built(x), policy(x))
    check_refused(lambda: set_model_state_dict(on_meta(bundle), dict(foreign), options=options), built, foreign)


def test_on_the_meta_device_no_call_is_served(policy: Policy, x: Tensor) -> None:
    policy.to("meta")
    with pytest.raises(InvalidInputError, match=r"lies on the meta device.*load it, or call to_empty"):
        policy.tokenizer.encode(x)


# --- copies, averages, types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "averaging",
    [
        {},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.999)},
        {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    ],
)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_averages_keep_their_tokenizer(
    use_buffers: bool, averaging: dict[str, Any], policy: Policy, x: Tensor, other: Path
) -> None:
    averaged = swa_utils.AveragedModel(policy, use_buffers=use_buffers, **averaging)
    for _ in range(50):
        averaged.update_parameters(policy)
    assert torch.equal(averaged.module.tokenizer.encode(x), policy.tokenizer.encode(x))
    policy.load_state_dict(averaged.module.state_dict())
    with pytest.raises(RuntimeError, match="was saved with the tokenizer"):
        Policy(other).load_state_dict(averaged.module.state_dict())


@pytest.mark.parametrize("numeric", [torch.float32, torch.float16, torch.bfloat16])
def test_averages_by_hand_keep_their_tokenizer(numeric: torch.dtype, policy: Policy, x: Tensor) -> None:
    """Over the state dict, copied and in place, as training code has it."""
    policy.to(numeric)
    averaged = copy.deepcopy(policy)
    for _ in range(500):
        for mean, value in zip(averaged.state_dict().values(), policy.state_dict().values(), strict=True):
            mean.copy_(0.9999 * mean + (1 - 0.9999) * value)
            mean.mul_(0.999).add_(value, alpha=0.001)
    assert torch.equal(averaged.tokenizer.encode(x), policy.tokenizer.encode(x))
    policy.load_state_dict(averaged.state_dict())


def test_an_average_of_two_tokenizers_is_none(policy: Policy, foreign: dict[str, Tensor]) -> None:
    soup = {name: 0.5 * (tensor + foreign[name]) for name, tensor in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match="was saved with the tokenizer"):
        policy.load_state_dict(soup)


@pytest.mark.parametrize("numeric", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_policy_of_another_type_has_the_same_tokenizer(numeric: torch.dtype, policy: Policy, x: Tensor) -> None:
    codes = policy.tokenizer.encode(x)
    assert policy.to(numeric).head.weight.dtype is numeric
    assert policy.tokenizer.tokenizer_fingerprint.dtype is torch.float32
    assert torch.equal(policy.tokenizer.encode(x), codes)
    assert torch.equal(copy.deepcopy(policy).tokenizer.encode(x), codes)


def test_copies_keep_what_was_put_in_place(policy: Policy, x: Tensor, foreign: dict[str, Tensor]) -> None:
    policy.tokenizer.tokenizer_fingerprint = foreign[KEY]
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(policy),
        torch.load(file, weights_only=False),
        policy.half(),
        policy.to_empty(device="cpu"),
    ):
        check_refused(lambda copied=copied: copied.tokenizer.encode(x), policy, foreign)


def test_a_policy_made_in_inference_mode_can_be_loaded_outside_of_it(bundle: Path, x: Tensor) -> None:
    with torch.inference_mode():
        adapter = ActionRFSQAE.from_bundle(bundle)
        codes = adapter.encode(x)
    adapter.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter.encode(x), codes)


@pytest.mark.slow
def test_compiled_code_gets_the_same_answers_and_refusals(
    policy: Policy, x: Tensor, foreign: dict[str, Tensor]
) -> None:
    compiled = torch.compile(policy.tokenizer.encode, backend="eager")
    for batch in (x, x.flip(0)):
        assert torch.equal(compiled(batch), policy.tokenizer.encode(batch))
    policy.tokenizer.tokenizer_fingerprint = foreign[KEY]
    check_refused(lambda: compiled(x), policy, foreign)


# --- training ---------------------------------------------------------------------------------------------------------


def test_nothing_of_the_tokenizer_is_among_the_policys_parameters(policy: Policy) -> None:
    policy.requires_grad_(True)
    assert {name for name, _ in policy.named_parameters()} == {"head.weight", "head.bias"}
    assert list(policy.tokenizer.named_parameters()) == []
    asked = next(policy.tokenizer.parameters())
    assert (type(asked), asked.numel(), asked.dtype, asked.device.type) == (nn.Parameter, 0, torch.float32, "cpu")
    assert not asked.requires_grad
    # What frameworks go through, module by module, to place and initialise it.
    assert list(policy.tokenizer.parameters(recurse=False)) == []


def test_a_policy_whose_parameters_were_all_unfrozen_is_trained(policy: Policy, x: Tensor) -> None:
    for parameter in policy.parameters():
        parameter.requires_grad = True
    losses = trained(policy, x)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_two_processes_train_it_together_by_ddp_and_fsdp(bundle: Path, other: Path, tmp_path: Path) -> None:
    # Spawned ones would import torch first, which takes longer than all they do; but with a GPU, autograd may have
    # threads here that a child of fork would miss.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    shared = (tmp_path / "meeting", bundle, other, tmp_path / "report")
    processes = [context.Process(target=train_together, args=(rank, *shared), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank, judged in ((0, "own tokenizer"), (1, "another tokenizer refused, 2 named")):
        found = (tmp_path / f"report.{rank}").read_text().splitlines()
        assert found == ["DDP", judged, "FSDP2", "FSDP2 from meta", "FSDP1"]
