"""Facts about what is embedded: enough demonstrations, and checkpoints that were trained on exactly these."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.rfsq_ref.checkpoints import ASSETS, NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, load_checkpoint
from rfsq.rfsq_ref.data import DEMONSTRATIONS, load_demonstrations, split_episodes
from rfsq.rfsq_ref.experts import EXPERTS
from rfsq.rfsq_ref.quantizer import Conditioning, published_dequantize

DATA = load_demonstrations()
CHECKPOINTS = pytest.mark.parametrize(
    ("path", "conditioning"),
    [(ROBUST_CHECKPOINT, Conditioning.DYNAMIC), (NAIVE_CHECKPOINT, Conditioning.NONE)],
    ids=["robust", "naive"],
)


def test_there_are_enough_demonstrations() -> None:
    assert len(DATA.episodes) >= 50
    assert DATA.num_steps >= 15_000
    assert len(set(DATA.tasks)) >= 3
    assert set(DATA.tasks) <= set(EXPERTS)


def test_demonstrations_are_actions_of_a_panda() -> None:
    steps = DATA.steps()
    assert steps.dtype == np.float32
    assert steps.shape[1] == 7
    assert np.abs(steps).max() <= 1.0
    # Every dimension is used, and no episode is a copy of another.
    assert (steps.std(0) > 0.02).all()
    assert len({episode.tobytes() for episode in DATA.episodes}) == len(DATA.episodes)


def test_demonstrations_say_where_they_come_from() -> None:
    with np.load(DEMONSTRATIONS) as arrays:
        metadata = json.loads(str(arrays["metadata"]))
        seeds = arrays["episode_seeds"]
    assert len(set(seeds.tolist())) == len(DATA.episodes)
    assert metadata["robot"] == "Panda"
    assert metadata["control_frequency_hz"] == 20
    assert set(metadata["versions"]) == {"robosuite", "mujoco", "numpy"}


@CHECKPOINTS
def test_embedded_checkpoints_load_and_are_what_their_names_say(path: Path, conditioning: Conditioning) -> None:
    checkpoint = load_checkpoint(path)
    assert checkpoint.trained_with is conditioning
    sizes = checkpoint.config
    assert (sizes.action_dim, sizes.latent_dim, sizes.hidden_width) == (7, 16, 64)
    assert (sizes.num_layers, sizes.num_levels) == (8, 7)
    assert checkpoint.normaliser is None
    assert checkpoint.constants is None


@CHECKPOINTS
def test_embedded_checkpoints_were_trained_on_the_embedded_data(path: Path, conditioning: Conditioning) -> None:
    provenance = load_checkpoint(path).provenance
    assert provenance["data"] == {
        "source": "demonstrations.npz",
        "sha256": DATA.sha256,
        "training_steps": split_episodes(DATA).train.num_steps,
    }
    assert provenance["training"]["use_layernorm"] is (conditioning is Conditioning.DYNAMIC)


@CHECKPOINTS
def test_embedded_checkpoints_reach_the_error_they_record(path: Path, conditioning: Conditioning) -> None:
    checkpoint = load_checkpoint(path)
    actions = torch.from_numpy(split_episodes(DATA).validation.steps().copy())
    with torch.no_grad():
        mse = float(((checkpoint.model()(actions) - actions) ** 2).mean())
    assert mse == pytest.approx(checkpoint.provenance["validation_mse"], rel=1e-3)
    assert mse < (1e-5 if conditioning is Conditioning.DYNAMIC else 2e-3)


def test_the_published_decoding_of_the_robust_checkpoint_is_useless() -> None:
    """Why calibration exists (docs/architecture.md)."""
    model = load_checkpoint(ROBUST_CHECKPOINT).model()
    actions = torch.from_numpy(split_episodes(DATA).test.steps().copy())
    with torch.no_grad():
        tokens, stats = model.encode(actions)
        published = model.decode_latents(published_dequantize(model.quantizer, tokens))
        decoded = model.decode(tokens, stats)
    assert ((published - actions) ** 2).mean() > 1.0
    assert ((decoded - actions) ** 2).mean() < 1e-4


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 2_000_000
