"""The reference reads what the published training code saves, and gives the tokens that code gives."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import load_demonstrations
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.quantizer import Conditioning, published_dequantize
from tests.rfsq_ref.near_ties import Judge
from tests.rfsq_ref.published_model import ActionRFSQAE, layouts, train_a_little

DEMONSTRATED = torch.from_numpy(load_demonstrations().steps())
OTHER_SIZES = {"action_dim": 4, "hidden_dim": 6, "num_layers": 5, "num_levels": 6, "width": 24}


def published(*, robust: bool, seed: int = 0, **sizes: Any) -> ActionRFSQAE:
    """A model of the published kind, trained for a moment."""
    return copy.deepcopy(_published(robust, seed, **sizes))


@cache
def _published(robust: bool, seed: int, **sizes: Any) -> ActionRFSQAE:
    torch.manual_seed(seed)
    model = ActionRFSQAE(use_layernorm=robust, **sizes)
    return train_a_little(model, DEMONSTRATED[:, : model.config["action_dim"]])


def actions_of(model: ActionRFSQAE, chunks: int = 200) -> Tensor:
    """Chunks [B, 8, A], half demonstrated and half random."""
    action_dim = model.config["action_dim"]
    generator = torch.Generator().manual_seed(1)
    random = torch.rand(chunks // 2 * 8, action_dim, generator=generator) * 2 - 1
    return torch.cat((DEMONSTRATED[: chunks // 2 * 8, :action_dim], random)).unflatten(0, (-1, 8))


def load_saved(content: Any, folder: Path, **arguments: Any) -> Checkpoint:
    torch.save(content, folder / "published.pt")
    return load_checkpoint(folder / "published.pt", **arguments)


@pytest.fixture(scope="module")
def robust() -> ActionRFSQAE:
    return published(robust=True)


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [True, False], ids=["robust", "naive"])
@pytest.mark.parametrize("name", ["trained", "model key", "both keys", "state dict"])
def test_every_published_layout_gives_the_same_model(name: str, kind: bool, tmp_path: Path) -> None:
    model = published(robust=kind)
    checkpoint = load_saved(layouts(model)[name], tmp_path, use_layernorm=kind)
    assert checkpoint.trained_with is (Conditioning.DYNAMIC if kind else Conditioning.NONE)
    assert checkpoint.config.action_dim == 7
    assert checkpoint.config.latent_dim == 16
    assert checkpoint.config.hidden_width == 64
    assert checkpoint.config.num_layers == 8
    assert checkpoint.config.num_levels == 7
    state = model.state_dict()
    assert set(checkpoint.weights) == {name for name in state if not name.startswith("rfsq.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.weights.items())


@pytest.mark.parametrize("name", ["trained", "model key", "both keys"])
def test_a_config_says_how_the_model_was_trained(name: str, robust: ActionRFSQAE, tmp_path: Path) -> None:
    assert load_saved(layouts(robust)[name], tmp_path).trained_with is Conditioning.DYNAMIC


def test_facts_beside_the_weights_become_provenance(robust: ActionRFSQAE, tmp_path: Path) -> None:
    provenance = load_saved(layouts(robust)["trained"], tmp_path).provenance
    assert provenance["epoch"] == 12
    assert provenance["train_mse"] == 0.25


def test_a_bare_state_dict_does_not_say_how_it_was_trained(robust: ActionRFSQAE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass use_layernorm"):
        load_saved(layouts(robust)["state dict"], tmp_path)


@pytest.mark.parametrize("name", ["trained", "model key"])
def test_a_file_and_a_caller_that_disagree_are_refused(name: str, robust: ActionRFSQAE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="says use_layernorm = True, the caller says False"):
        load_saved(layouts(robust)[name], tmp_path, use_layernorm=False)


def test_both_keys_with_equal_tensors_are_remarked(robust: ActionRFSQAE, tmp_path: Path) -> None:
    remarks = load_saved(layouts(robust)["both keys"], tmp_path).remarks
    assert any("both 'model_state_dict' and 'model'" in remark for remark in remarks)


@pytest.mark.parametrize("change", ["value", "name", "dtype", "type"])
def test_both_keys_that_differ_are_refused(change: str, robust: ActionRFSQAE, tmp_path: Path) -> None:
    content = layouts(robust)["both keys"]
    bias = content["model"].pop("decoder.2.bias")
    content["model"] |= {
        "value": {"decoder.2.bias": bias + 1e-3},
        "name": {"decoder.2.offset": bias},
        "dtype": {"decoder.2.bias": bias.double()},
        "type": {"decoder.2.bias": 0.0},
    }[change]
    with pytest.raises(CheckpointError, match="they differ"):
        load_saved(content, tmp_path)


def test_unused_layer_norms_are_accepted_and_remarked(tmp_path: Path) -> None:
    model = published(robust=True, layernorm_parameters=True)
    assert model.state_dict()["rfsq.layers.7.layernorm.weight"].shape == (1,)
    checkpoint = load_saved(layouts(model)["trained"], tmp_path)
    assert checkpoint.remarks == ("16 layernorm parameters ignored: the published forward pass never uses them",)
    actions = actions_of(model, 20)
    assert torch.equal(checkpoint.model().encode(actions)[0], model.encode(actions))


# Tokens --------------------------------------------------------------------------------------------------------------


def assert_same_tokens(model: ActionRFSQAE, checkpoint: Checkpoint, actions: Tensor) -> None:
    """Equal but for near-ties: each with the float64 reference, and with each other in float32."""
    judge = Judge(checkpoint.model(dtype=torch.float64), actions)
    theirs, (ours, _) = model.encode(actions), checkpoint.model().encode(actions)
    for verdict in (judge.verdict(theirs), judge.verdict(ours), judge.verdict(theirs, expected=ours)):
        assert verdict.wrong == 0
        # A near-tie moves the rest of its step.
        assert verdict.near_ties <= 1e-4 * verdict.total
        assert verdict.differing <= 1e-3 * verdict.total


@pytest.mark.parametrize("sizes", [{}, OTHER_SIZES], ids=["default", "other"])
@pytest.mark.parametrize("kind", [True, False], ids=["robust", "naive"])
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_those_of_the_published_model(seed: int, kind: bool, sizes: dict[str, int], tmp_path: Path) -> None:
    model = published(robust=kind, seed=seed, **sizes)
    assert_same_tokens(model, load_saved(layouts(model)["trained"], tmp_path), actions_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("path", [ROBUST_CHECKPOINT, NAIVE_CHECKPOINT], ids=["robust", "naive"])
def test_embedded_checkpoints_give_the_published_tokens(path: Path, tmp_path: Path) -> None:
    embedded = load_checkpoint(path)
    model = ActionRFSQAE(use_layernorm=embedded.trained_with is Conditioning.DYNAMIC)
    model.load_state_dict(dict(embedded.weights) | model.rfsq.state_dict(prefix="rfsq."))
    assert_same_tokens(model, load_saved(layouts(model)["trained"], tmp_path), actions_of(model, 1000))


@pytest.mark.parametrize("kind", [True, False], ids=["robust", "naive"])
def test_reconstructions_are_those_of_the_published_model(kind: bool, tmp_path: Path) -> None:
    model = published(robust=kind).double()
    reference = load_saved(layouts(model)["trained"], tmp_path).model(dtype=torch.float64)
    actions = actions_of(model).double()
    with torch.no_grad():
        theirs, tokens = model(actions)
        same = (reference.encode(actions)[0] == tokens).flatten(2).all(-1)
        ours = reference(actions)
    assert same.float().mean() > 0.999
    torch.testing.assert_close(ours[same], theirs[same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [True, False], ids=["robust", "naive"])
def test_the_published_decoding_is_the_sum_of_grid_values(kind: bool, tmp_path: Path) -> None:
    model = published(robust=kind)
    reference = load_saved(layouts(model)["trained"], tmp_path).model()
    tokens = torch.randint(0, 7, (50, 8, 16, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = reference.decode_latents(published_dequantize(reference.quantizer, tokens))
    torch.testing.assert_close(ours, model.decode_from_indices(tokens), rtol=1e-5, atol=1e-5)
