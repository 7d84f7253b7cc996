"""Checkpoints as training leaves them: compiled, distributed, averaged, in a Lightning module, as bare safetensors."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rfsq.rfsq_ref.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.runtime.bundle.checkpoint_states import find_states, is_average, states_in
from tests.rfsq_ref.published_model import ActionRFSQAE


def model_of(seed: int = 0) -> ActionRFSQAE:
    torch.manual_seed(seed)
    return ActionRFSQAE(use_layernorm=True)


@pytest.fixture(scope="module")
def model() -> ActionRFSQAE:
    return model_of()


@pytest.fixture(scope="module")
def averaged() -> dict[str, Tensor]:
    """Other numbers under the same names."""
    return model_of(1).state_dict()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def load_saved(content: Any, folder: Path, **arguments: Any) -> Checkpoint:
    torch.save(content, folder / "model.pt")
    return load_checkpoint(folder / "model.pt", **{"use_layernorm": True, **arguments})


def assert_weights(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    assert set(checkpoint.weights) == {name for name in state if not name.startswith("rfsq.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.weights.items())


def lightning(state: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` writes."""
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": dict(state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "use_layernorm": True, "hidden_dim": 64},
        **others,
    }


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model(model: ActionRFSQAE, tmp_path: Path) -> None:
    checkpoint = load_saved({"model": torch.compile(model).state_dict(), "config": model.config}, tmp_path)
    assert_weights(checkpoint, model.state_dict())
    assert checkpoint.remarks == ("taken off the names of tensors: '_orig_mod'",)


def test_a_compiled_part_of_a_model(tmp_path: Path) -> None:
    whole = model_of()
    expected = copy.deepcopy(whole.state_dict())
    whole.encoder = torch.compile(whole.encoder)
    assert "encoder._orig_mod.0.weight" in whole.state_dict()
    assert_weights(load_saved(whole.state_dict(), tmp_path), expected)


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_compiled_before_and_after(model: ActionRFSQAE, tmp_path: Path) -> None:
    distributed = nn.parallel.DistributedDataParallel(torch.compile(model))
    checkpoint = load_saved({"model_state_dict": torch.compile(distributed).state_dict()}, tmp_path)
    assert_weights(checkpoint, model.state_dict())
    assert checkpoint.remarks == ("taken off the names of tensors: '_orig_mod.module._orig_mod'",)


def test_a_model_with_activation_checkpointing(tmp_path: Path) -> None:
    whole = model_of()
    expected = copy.deepcopy(whole.state_dict())
    whole.encoder[0] = checkpoint_wrapper(whole.encoder[0])
    # The wrapper hides itself from state_dict, but not from the names of parameters.
    named = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    assert any("_checkpoint_wrapped_module" in name for name in named)
    assert_weights(load_saved({name: tensor.detach() for name, tensor in named.items()}, tmp_path), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    around=st.lists(st.sampled_from(["_orig_mod", "module", "model", "_fsdp_wrapped_module", "policy"]), max_size=5),
    inside=st.lists(st.sampled_from(["_orig_mod", "module", "_fsdp_wrapped_module"]), max_size=3),
    key=st.sampled_from(["", "model_state_dict", "model", "state_dict"]),
)
def test_wrappers_in_any_order_and_depth(
    around: list[str], inside: list[str], key: str, model: ActionRFSQAE, tmp_path: Path
) -> None:
    def wrapped(name: str) -> str:
        first, _, rest = name.partition(".")
        return ".".join([*around, first, *(inside if first == "encoder" else []), rest])

    state = {wrapped(name): tensor for name, tensor in model.state_dict().items()}
    checkpoint = load_saved({key: state} if key else state, tmp_path)
    assert_weights(checkpoint, model.state_dict())
    assert bool(checkpoint.remarks) == bool(around or inside)
    (adapters,) = states_in({key: state} if key else state)
    assert adapters.keys() == model.state_dict().keys()


def test_a_name_in_two_spellings_is_refused(model: ActionRFSQAE, tmp_path: Path) -> None:
    state = {**model.state_dict(), "_orig_mod.encoder.0.weight": torch.zeros(64, 7)}
    with pytest.raises(CheckpointError, match=r"does not know: \['_orig_mod.encoder.0.weight'\]"):
        load_saved(state, tmp_path)


@pytest.mark.parametrize(("ours", "others"), [("module.", ""), ("", "_orig_mod."), ("", "module."), ("a.", "b.")])
def test_a_second_spelling_without_grids_is_refused(
    ours: str, others: str, model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path
) -> None:
    bare = {f"{others}{name}": tensor for name, tensor in averaged.items() if not name.startswith("rfsq.")}
    state = {**{f"{ours}{name}": tensor for name, tensor in model.state_dict().items()}, **bare}
    with pytest.raises(CheckpointError, match=rf"does not know: \['{others}decoder.0.bias"):
        load_saved({"model": state}, tmp_path)
    # The adapter is to find them as well, and not in place of the model's.
    (found,) = states_in({"model": state})
    assert all(found[name] is tensor for name, tensor in zip(model.state_dict(), state.values(), strict=False))
    assert len(found) == len(state)


def test_a_model_without_grids_elsewhere_is_said_not_to_be_taken(
    model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path
) -> None:
    bare = {name: tensor for name, tensor in averaged.items() if not name.startswith("rfsq.")}
    for place in ("ema", "vision"):
        checkpoint = load_saved({"model": model.state_dict(), place: bare}, tmp_path)
        assert_weights(checkpoint, model.state_dict())
        assert checkpoint.remarks == (f"not taken, for they have no quantiser: '{place}'",)
        with pytest.raises(CheckpointError, match=f"0 models under '{place}'"):
            load_saved({"model": model.state_dict(), place: bare}, tmp_path, weights=place)


def test_names_of_an_average_are_not_said_to_be_foreign(
    model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {f"online.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema.{name}": tensor for name, tensor in averaged.items()}
    assert load_saved(state, tmp_path).remarks == (
        "weights taken: 'online'; not taken: 'ema'; --weights ema takes those",
        "taken off the names of tensors: 'online'",
    )


def test_a_refusal_names_a_few_tensors_alone(model: ActionRFSQAE, tmp_path: Path) -> None:
    vision = {f"vision.{index:02}.weight": torch.zeros(1) for index in range(43)}
    with pytest.raises(CheckpointError, match=r"'vision.05.weight' and 37 more\]$"):
        load_saved({**model.state_dict(), **vision}, tmp_path)


# Lightning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["model", "net", "tokenizer.rfsq"])
def test_a_lightning_checkpoint_says_how_it_was_trained(attribute: str, model: ActionRFSQAE, tmp_path: Path) -> None:
    state = {f"{attribute}.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = load_saved(lightning(state), tmp_path, use_layernorm=None)
    assert_weights(checkpoint, model.state_dict())
    assert checkpoint.provenance["epoch"] == 3
    assert checkpoint.remarks == (f"taken off the names of tensors: '{attribute}'",)


def test_hyper_parameters_with_a_config_are_held_to_it(model: ActionRFSQAE, tmp_path: Path) -> None:
    content = lightning(model.state_dict(), hyper_parameters={"config": {**model.config, "num_layers": 9}})
    with pytest.raises(CheckpointError, match="config says num_layers = 9, its tensors have 8"):
        load_saved(content, tmp_path)


def test_an_average_inside_the_lightning_module(
    model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    checkpoint = load_saved(lightning(state), tmp_path)
    assert_weights(checkpoint, model.state_dict())
    assert "not taken: 'state_dict.ema_model'; --weights state_dict.ema_model takes those" in checkpoint.remarks[0]
    assert_weights(load_saved(lightning(state), tmp_path, weights="ema_model"), averaged)


def test_an_average_in_a_callback(model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path) -> None:
    content = lightning(model.state_dict(), callbacks={"EMA": {"decay": 0.99, "ema_weights": averaged}})
    assert_weights(load_saved(content, tmp_path), model.state_dict())
    assert_weights(load_saved(content, tmp_path, weights="callbacks.EMA.ema_weights"), averaged)


# More than one model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model_state_dict", "model", "state_dict"])
@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_state_dict", "ema_model", "teacher"])
def test_the_model_itself_is_the_default_and_the_average_is_named(
    key: str, name: str, model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path
) -> None:
    content = {name: averaged, key: model.state_dict(), "config": model.config, "epoch": 5}
    checkpoint = load_saved(content, tmp_path)
    assert_weights(checkpoint, model.state_dict())
    assert checkpoint.remarks == (f"weights taken: {key!r}; not taken: {name!r}; --weights {name} takes those",)
    chosen = load_saved(content, tmp_path, weights=name)
    assert_weights(chosen, averaged)
    assert chosen.provenance["weights"] == name
    assert chosen.remarks == (f"weights taken: {name!r}; not taken: {key!r}; --weights {key} takes those",)


def test_an_averaged_model_of_torch(model: ActionRFSQAE, tmp_path: Path) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model_of(2))
    average.update_parameters(model_of(3))
    content = {"model": model.state_dict(), "ema": average.state_dict(), "config": model.config}
    assert_weights(load_saved(content, tmp_path), model.state_dict())
    found = load_saved(content, tmp_path, weights="ema")
    assert_weights(found, average.module.state_dict())
    assert "counters beside the weights ignored: n_averaged" in found.remarks


def test_an_average_alone_is_taken_and_said(averaged: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = load_saved({"ema": averaged, "optimizer": {"state": {}}}, tmp_path)
    assert_weights(checkpoint, averaged)
    assert checkpoint.remarks == (
        "weights taken: 'ema', an average over the training by its name, and the only model here",
    )


def test_an_average_without_names_is_not_passed_over_in_silence(model: ActionRFSQAE, tmp_path: Path) -> None:
    content = {"model": model.state_dict(), "ema": {"decay": 0.9, "shadow_params": list(model.parameters())}}
    assert "['ema'] not taken: no tensors in it have the names of this model" in load_saved(content, tmp_path).remarks


def test_equal_averages_are_said_to_be_equal(model: ActionRFSQAE, tmp_path: Path) -> None:
    content = {"model": model.state_dict(), "ema": copy.deepcopy(model.state_dict())}
    assert load_saved(content, tmp_path).remarks == ("holds both 'model' and 'ema', with equal tensors",)


def test_two_trained_models_are_chosen_between_by_name(
    model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path
) -> None:
    content = {"model_state_dict": model.state_dict(), "model": averaged}
    with pytest.raises(CheckpointError, match=r"they differ: it is not clear which .*Choose with --weights"):
        load_saved(content, tmp_path)
    chosen = load_saved(content, tmp_path, weights="model")
    assert_weights(chosen, averaged)
    assert chosen.provenance["weights"] == "model"
    others = {"first": model.state_dict(), "second": averaged}
    with pytest.raises(CheckpointError, match="holds 2 models: 'first', 'second'; choose one of them with --weights"):
        load_saved(others, tmp_path)
    assert_weights(load_saved(others, tmp_path, weights="second"), averaged)


def test_weights_that_are_not_there_are_refused_with_those_that_are(model: ActionRFSQAE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"0 models under 'ema'; it has the weights 'model': name one of them"):
        load_saved({"model": model.state_dict()}, tmp_path, weights="ema")
    save_checkpoint(load_saved(model.state_dict(), tmp_path), tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="holds one model; leave --weights out"):
        load_checkpoint(tmp_path / "own.safetensors", weights="model")


def test_a_tokenizer_inside_a_policy_is_taken_by_name(model: ActionRFSQAE, tmp_path: Path) -> None:
    state = {f"policy.tokenizer.{name}": tensor for name, tensor in model.state_dict().items()}
    state["policy.head.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"does not know: \['policy.head.weight'\]"):
        load_saved({"model": state}, tmp_path)
    checkpoint = load_saved({"model": state}, tmp_path, weights="model.policy.tokenizer")
    assert_weights(checkpoint, model.state_dict())
    assert "1 tensors around these weights not taken: policy.head.weight" in checkpoint.remarks


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ema", True), ("model_ema", True), ("EMA.state", True), ("swa_model", True), ("schema", False), ("model", False)],
)
def test_averages_are_told_by_their_names(name: str, expected: bool) -> None:
    assert is_average(name) is expected


def test_dicts_that_hold_each_other_end(model: ActionRFSQAE, tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": model.state_dict()}
    content["again"] = {"all": content}
    assert [state.label for state in find_states(content)[0]] == ["model"]
    assert_weights(load_saved(content, tmp_path), model.state_dict())


# Bare safetensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_bare_state_dict_in_safetensors(
    prefix: str, metadata: dict[str, str] | None, model: ActionRFSQAE, tmp_path: Path
) -> None:
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "bare.safetensors", metadata=metadata)
    assert_weights(load_checkpoint(tmp_path / "bare.safetensors", use_layernorm=True), model.state_dict())
    with pytest.raises(CheckpointError, match=r"pass use_layernorm \(--use-layernorm or --no-use-layernorm\)"):
        load_checkpoint(tmp_path / "bare.safetensors")


def test_an_average_in_bare_safetensors(model: ActionRFSQAE, averaged: dict[str, Tensor], tmp_path: Path) -> None:
    state = {**model.state_dict(), **{f"ema.{name}": tensor for name, tensor in averaged.items()}}
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "b.safetensors")
    checkpoint = load_checkpoint(tmp_path / "b.safetensors", use_layernorm=True)
    assert_weights(checkpoint, model.state_dict())
    assert checkpoint.remarks == ("weights taken: the file itself; not taken: 'ema'; --weights ema takes those",)
    assert_weights(load_checkpoint(tmp_path / "b.safetensors", use_layernorm=True, weights="ema"), averaged)
