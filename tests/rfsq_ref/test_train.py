"""What `rfsq_ref.train` promises: the same seed gives the same weights, and the best epoch is kept."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq_ref.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from rfsq_ref.data import ActionDataset, load_actions, split_episodes
from rfsq_ref.errors import DataError
from rfsq_ref.normaliser import NormaliserKind, fit_normaliser
from rfsq_ref.quantizer import Conditioning
from rfsq_ref.train import TrainConfig, main, train

SCRIPT = Path(__file__).parents[2] / "rfsq_ref" / "train.py"
QUICK = TrainConfig(epochs=3, learning_rate=1e-2, hidden_width=16, latent_dim=6, num_layers=4)


def smooth_episodes(count: int = 20, steps: int = 60, action_dim: int = 5, offset: float = 0.0) -> ActionDataset:
    """Sines with random phases: easy to learn, different in every episode."""
    generator = np.random.default_rng(0)
    time = np.arange(steps)[:, None] / 10
    phases = generator.uniform(0, 6, (count, 1, action_dim))
    episodes = (0.8 * np.sin(time + phases) + offset).astype(np.float32)
    return ActionDataset(tuple(episodes), tuple(f"demo_{n}" for n in range(count)), ("",) * count, "sines")


DATA = smooth_episodes()


def same_weights(first: Checkpoint, second: Checkpoint) -> bool:
    return all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


def validation_mse(checkpoint: Checkpoint, data: ActionDataset) -> float:
    actions = torch.from_numpy(split_episodes(data).validation.steps().copy())
    with torch.no_grad():
        return float(((checkpoint.model()(actions).actions - actions) ** 2).mean())


def write_data(folder: Path) -> Path:
    ends = np.cumsum([len(episode) for episode in DATA.episodes])
    np.savez(folder / "actions.npz", actions=DATA.steps(), episode_ends=ends)
    return folder / "actions.npz"


@pytest.mark.parametrize("use_layernorm", [True, False])
def test_the_same_seed_gives_the_same_bytes(use_layernorm: bool, tmp_path: Path) -> None:
    config = replace(QUICK, use_layernorm=use_layernorm)
    for name in ("first", "second"):
        # Whatever happened before must not matter.
        torch.rand(7)
        save_checkpoint(train(DATA, config).checkpoint, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_another_seed_gives_other_weights() -> None:
    assert not same_weights(train(DATA, QUICK).checkpoint, train(DATA, replace(QUICK, seed=1)).checkpoint)


@pytest.mark.parametrize("use_layernorm", [True, False])
def test_the_loss_goes_down(use_layernorm: bool) -> None:
    history = train(DATA, replace(QUICK, epochs=12, use_layernorm=use_layernorm)).history
    assert [record.epoch for record in history] == list(range(1, 13))
    assert history[-1].train_mse < 0.3 * history[0].train_mse
    assert history[-1].validation_mse < 0.3 * history[0].validation_mse


def test_robust_training_beats_naive_training() -> None:
    robust = train(DATA, replace(QUICK, epochs=12)).history[-1]
    naive = train(DATA, replace(QUICK, epochs=12, use_layernorm=False)).history[-1]
    assert robust.validation_mse < naive.validation_mse


def test_the_epoch_with_the_lowest_validation_error_is_kept() -> None:
    # So fast that the error goes up and down.
    result = train(DATA, replace(QUICK, epochs=10, learning_rate=0.1))
    errors = [record.validation_mse for record in result.history]
    best = int(np.argmin(errors))
    assert best < len(errors) - 1, "the last epoch is the best: this test shows nothing"
    assert result.checkpoint.provenance["epoch"] == best + 1
    assert result.checkpoint.provenance["validation_mse"] == errors[best]
    assert validation_mse(result.checkpoint, DATA) == pytest.approx(errors[best], rel=1e-5)


def test_the_conditioning_and_the_sizes_are_those_asked_for() -> None:
    checkpoint = train(DATA, QUICK).checkpoint
    assert checkpoint.trained_with is Conditioning.DYNAMIC
    assert (checkpoint.config.action_dim, checkpoint.config.latent_dim) == (5, 6)
    assert (checkpoint.config.hidden_width, checkpoint.config.num_layers, checkpoint.config.num_levels) == (16, 4, 7)
    assert train(DATA, replace(QUICK, use_layernorm=False)).checkpoint.trained_with is Conditioning.NONE


def test_fewer_episodes_are_the_first_training_episodes() -> None:
    provenance = train(DATA, replace(QUICK, num_episodes=3)).checkpoint.provenance
    assert provenance["data"] == {"source": "sines", "sha256": DATA.sha256, "training_steps": 3 * 60}
    assert train(DATA, QUICK).checkpoint.provenance["data"]["training_steps"] == split_episodes(DATA).train.num_steps


def test_only_training_episodes_are_trained_on() -> None:
    """Other validation, calibration and test episodes may choose another epoch, never other weights of an epoch."""
    held_out = {
        name for part in ("validation", "calibration", "test") for name in getattr(split_episodes(DATA), part).names
    }
    changed = replace(
        DATA,
        episodes=tuple(
            -episode if name in held_out else episode for name, episode in zip(DATA.names, DATA.episodes, strict=True)
        ),
    )
    config = replace(QUICK, epochs=1)
    assert same_weights(train(DATA, config).checkpoint, train(changed, config).checkpoint)


def test_more_episodes_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="12 are there; lower --num-episodes"):
        train(DATA, replace(QUICK, num_episodes=13))


def test_a_normaliser_is_fitted_to_the_training_episodes_and_travels_with_the_weights() -> None:
    data = smooth_episodes(offset=4.0)
    checkpoint = train(data, replace(QUICK, epochs=12, normaliser=NormaliserKind.MIN_MAX)).checkpoint
    expected = fit_normaliser(split_episodes(data).train.steps(), NormaliserKind.MIN_MAX)
    assert checkpoint.normaliser == expected
    assert checkpoint.provenance["training"]["normaliser"] == "min-max"
    # The errors count in the normalised units.
    actions = torch.from_numpy(split_episodes(data).validation.steps().copy())
    with torch.no_grad():
        errors = (checkpoint.model()(actions).actions - actions) / torch.tensor(expected.scale)
    assert float(errors.square().mean()) == pytest.approx(checkpoint.provenance["validation_mse"], rel=1e-4)


def test_a_diverged_training_gives_no_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"training diverged.*--learning-rate"):
        train(DATA, replace(QUICK, learning_rate=1e30))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("num_episodes", -1), ("learning_rate", 0.0), ("learning_rate", float("nan"))],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


# Command line --------------------------------------------------------------------------------------------------------


def test_the_command_trains_and_writes_a_robust_checkpoint(tmp_path: Path) -> None:
    arguments = ["--epochs", "2", "--num-episodes", "4", "--hidden-width", "8", "--num-layers", "3", "--seed", "5"]
    run = subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--data", write_data(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "kept epoch" in run.stdout
    checkpoint = load_checkpoint(tmp_path / "build" / "checkpoints" / "robust.safetensors")
    assert checkpoint.trained_with is Conditioning.DYNAMIC
    assert (checkpoint.config.num_layers, checkpoint.config.hidden_width) == (3, 8)
    training = checkpoint.provenance["training"]
    assert (training["seed"], training["epochs"], training["num_episodes"]) == (5, 2, 4)
    assert checkpoint.provenance["data"]["sha256"] == load_actions(tmp_path / "actions.npz").sha256


def run_main(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command in this process, whose torch it would make deterministic for good."""
    write_data(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    return main(["--data", "actions.npz", "--epochs", "1", "--hidden-width", "8", *arguments])


def test_the_command_trains_a_naive_checkpoint_with_a_normaliser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(["--no-use-layernorm", "--normaliser", "quantile"], tmp_path, monkeypatch) == 0
    checkpoint = load_checkpoint(tmp_path / "build" / "checkpoints" / "naive.safetensors")
    assert checkpoint.trained_with is Conditioning.NONE
    assert checkpoint.normaliser is not None
    assert checkpoint.normaliser.kind is NormaliserKind.QUANTILE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--epochs", "0"], "epochs is 0"),
        (["--num-episodes", "1000"], "lower --num-episodes"),
        (["--num-levels", "1"], "num_levels is 1"),
        (["--latent-dim", "1"], "latent_dim >= 2"),
        (["--key", "velocities"], "no 'velocities'"),
        (["--output", "actions.npz/model.safetensors"], "cannot write"),
        (["--output", "model.pt"], "does not end with"),
    ],
)
def test_errors_are_explained_and_exit_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_main(arguments, tmp_path, monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["actions.npz"]
