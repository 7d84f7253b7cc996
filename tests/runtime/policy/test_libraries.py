"""Policies of transformers, and what accelerate places, with the adapter inside: saved, loaded, refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from rfsq.runtime import FingerprintError
from rfsq.runtime.policy.adapter import ActionRFSQAE
from rfsq.runtime.policy.adapter_calls import FINGERPRINT_KEY
from tests.bundles import Recipe, random_actions
from tests.runtime.policy.policies import Policy

KEY = f"tokenizer.{FINGERPRINT_KEY}"


@pytest.fixture(scope="module")
def made() -> Any:
    return importlib.import_module("tests.runtime.policy.transformers_policies")


@pytest.fixture(scope="session")
def other(bundle_of: Callable[[Recipe], Path]) -> Path:
    """A bundle of the same sizes whose tokens mean something else."""
    return bundle_of(Recipe(seed=1))


@pytest.fixture
def x() -> Tensor:
    return torch.from_numpy(random_actions(Recipe(), 2))


@pytest.fixture
def saved(made: Any, bundle: Path, tmp_path: Path) -> Path:
    made.Vla(made.VlaConfig(str(bundle))).save_pretrained(tmp_path)
    return tmp_path


def fingerprint_of(path: Path) -> str:
    return ActionRFSQAE.from_bundle(path).fingerprint


def check_both_named(error: BaseException, path: Path, other: Path) -> None:
    assert fingerprint_of(path) in str(error)
    assert f"saved with the tokenizer {fingerprint_of(other)}" in str(error)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_what_was_saved_is_loaded(made: Any, options: dict[str, Any], saved: Path, bundle: Path, x: Tensor) -> None:
    loaded, found = made.Vla.from_pretrained(saved, output_loading_info=True, **options)
    assert not any(found.values()), found
    adapter = ActionRFSQAE.from_bundle(bundle)
    assert torch.equal(loaded.tokenizer.encode(x), adapter.encode(x))
    assert loaded.dtype is options.get("dtype", torch.float32)
    assert loaded.half().tokenizer(x)[0].dtype is torch.float32


def test_beside_another_bundle_the_first_call_is_refused(
    made: Any, saved: Path, bundle: Path, other: Path, x: Tensor
) -> None:
    loaded = made.Vla.from_pretrained(saved, config=made.VlaConfig(str(other)))
    codes = torch.zeros((1, 2, 4, 3), dtype=torch.int64)
    for call in (
        lambda: loaded(x),
        lambda: loaded.tokenizer.encode(x),
        lambda: loaded.tokenizer.decode_from_indices(codes),
    ):
        with pytest.raises(FingerprintError) as caught:
            call()
        check_both_named(caught.value, other, bundle)


def test_a_base_model_without_a_tokenizer_is_a_start_where_the_policy_says_so(
    made: Any, saved: Path, x: Tensor
) -> None:
    """In `_init_weights`, where transformers has modules begin that its checkpoint has not."""
    file = saved / "model.safetensors"
    state = safetensors.torch.load_file(file)
    del state[KEY]
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    loaded, found = made.FineTuned.from_pretrained(saved, output_loading_info=True)
    assert found["missing_keys"] == {KEY}
    loaded.tokenizer.encode(x)


def test_what_begins_there_does_not_excuse_another_bundle(
    made: Any, saved: Path, bundle: Path, other: Path, x: Tensor
) -> None:
    loaded = made.FineTuned.from_pretrained(saved, config=made.VlaConfig(str(other)))
    with pytest.raises(FingerprintError) as caught:
        loaded.tokenizer.encode(x)
    check_both_named(caught.value, other, bundle)


# --- accelerate -------------------------------------------------------------------------------------------------------


def empty(path: Path, *, include_buffers: bool) -> Policy:
    import accelerate

    with accelerate.init_empty_weights(include_buffers=include_buffers):
        return Policy(path)


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"tokenizer": "cpu", "head": "disk"}])
def test_a_checkpoint_is_loaded_into_empty_weights_and_placed(
    device_map: dict[str, str] | None, include_buffers: bool, bundle: Path, other: Path, x: Tensor, tmp_path: Path
) -> None:
    import accelerate

    def placed(trained_with: Path) -> Policy:
        file = tmp_path / "policy.safetensors"
        safetensors.torch.save_model(Policy(trained_with), file, metadata={"format": "pt"})
        model = empty(bundle, include_buffers=include_buffers)
        accelerate.load_checkpoint_and_dispatch(
            model, str(file), device_map=device_map, offload_folder=tmp_path / "off"
        )
        model(x)
        return model

    assert torch.equal(placed(bundle).tokenizer.encode(x), ActionRFSQAE.from_bundle(bundle).encode(x))
    with pytest.raises((FingerprintError, RuntimeError)) as caught:
        placed(other)
    check_both_named(caught.value, bundle, other)


@pytest.mark.parametrize("include_buffers", [False, True])
def test_empty_weights_are_assigned_or_made_anew(include_buffers: bool, bundle: Path, other: Path, x: Tensor) -> None:
    policy = Policy(bundle)
    assigned = empty(bundle, include_buffers=include_buffers)
    assigned.load_state_dict(policy.state_dict(), assign=True)
    assert torch.equal(assigned(x), policy(x))
    made = empty(bundle, include_buffers=include_buffers).to_empty(device="cpu")
    assert torch.equal(made.tokenizer.encode(x), policy.tokenizer.encode(x))
    with pytest.raises(RuntimeError) as caught:
        empty(bundle, include_buffers=include_buffers).load_state_dict(Policy(other).state_dict(), assign=True)
    check_both_named(caught.value, bundle, other)
