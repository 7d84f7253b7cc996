"""A normaliser beside the model is named, wherever a training script has put it; other numbers are not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rfsq.rfsq_ref.checkpoints import load_checkpoint
from rfsq.rfsq_ref.left_statistics import left_statistics
from tests.rfsq_ref.published_model import ActionRFSQAE

SEVEN = torch.ones(7)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"normalizer": {"mean": SEVEN, "std": SEVEN}}, ["normalizer.mean", "normalizer.std"]),
        ({"action_stats": {"min": SEVEN, "max": SEVEN}}, ["action_stats.min", "action_stats.max"]),
        ({"action_mean": SEVEN[None]}, ["action_mean"]),
        ({"config": {"action_low": [-1] * 7}}, ["config.action_low"]),
        (
            {"hyper_parameters": {"norm_stats": {"libero": {"action": {"q01": (0.5,) * 7}}}}},
            ["hyper_parameters.norm_stats.libero.action.q01"],
        ),
        ({"normalizer": [SEVEN, SEVEN]}, ["normalizer.0", "normalizer.1"]),
        ({"unnormalize_outputs.buffer_action.scale": SEVEN}, ["unnormalize_outputs.buffer_action.scale"]),
        ({"actionStd": SEVEN}, ["actionStd"]),
        (
            {"action_scale": 0.05, "config": {"action_offset": torch.tensor(0.1)}},
            ["action_scale", "config.action_offset"],
        ),
    ],
)
def test_what_looks_like_a_normaliser_is_named(beside: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = ActionRFSQAE(use_layernorm=True).state_dict()
    torch.save({"model": state, "use_layernorm": True, **beside}, tmp_path / "model.pt")
    (remark,) = load_checkpoint(tmp_path / "model.pt", use_layernorm=True).remarks
    listed = ", ".join(expected)
    assert remark.startswith(f"not taken, though it may be a normaliser of the actions: {listed}; where the model was")
    assert remark.endswith("give that with --normaliser")


@pytest.mark.parametrize(
    "beside",
    [
        {"epoch": 3, "train_mse": 0.1, "mean_action_loss": 0.2, "max_epochs": 9},
        {"optimizer": {"state": {7: {"max_exp_avg_sq": SEVEN}}, "param_groups": [{"betas": (0.9, 0.99)}]}},
        {"optimizer_states": [{"state": {7: {"max_exp_avg_sq": SEVEN}}}]},
        {"scaler": {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 0}},
        {"grad_norm": 0.5, "lr_schedulers": [{"min_lrs": [1e-4], "base_lrs": [1e-3]}]},
        {"state_stats": {"mean": torch.ones(9)}},
        {"normalizer": None, "config": {"norm_type": "quantile"}},
        {"norm_model": {"decoder.2.bias": SEVEN}},
    ],
)
def test_other_numbers_of_a_training_are_not(beside: dict[str, Any]) -> None:
    assert left_statistics(beside, 7) == []


def test_the_search_ends_where_dicts_hold_each_other() -> None:
    content: dict[str, Any] = {"stats": {"mean": SEVEN}}
    content["stats"]["all"] = content
    deep: dict[str, Any] = {}
    content["deep"] = deep
    for _ in range(5000):
        deep["deep"] = deep = {}
    assert left_statistics(content, 7) == ["stats.mean"]
