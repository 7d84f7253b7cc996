"""What `rfsq_ref.train` promises: the same seed gives the same weights, the best epoch is kept and its curve too, and
data of other robots go all the way from the file to decoded tokens."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.calibration.fitting import calibrate, recover
from rfsq.calibration.settings import CalibrationConfig, RecoveredConfig
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, load_actions, split_episodes
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from rfsq.rfsq_ref.normaliser import describe, describe_normaliser, fit_normaliser, suggested_normaliser
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.settings import NormaliserKind, TrainConfig
from rfsq.rfsq_ref.train import main
from rfsq.rfsq_ref.training import EpochRecord, TrainResult, history_of, history_path, load_history, save_result, train

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
        return float(((checkpoint.model()(actions) - actions) ** 2).mean())


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
    # The last dimension, between 3.2 and 4.8, is no gripper command of unit size either.
    expected = fit_normaliser(split_episodes(data).train.steps(), NormaliserKind.MIN_MAX, untouched=())
    assert checkpoint.normaliser == expected
    assert checkpoint.provenance["training"]["normaliser"] == "min-max"
    # The errors count in the normalised units.
    actions = torch.from_numpy(split_episodes(data).validation.steps().copy())
    with torch.no_grad():
        errors = (checkpoint.model()(actions) - actions) / torch.tensor(expected.scale)
    assert float(errors.square().mean()) == pytest.approx(checkpoint.provenance["validation_mse"], rel=1e-4)


def test_a_diverged_training_gives_no_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"training diverged.*--learning-rate"):
        train(DATA, replace(QUICK, learning_rate=1e30))


def test_an_action_whose_error_overflows_is_refused_before_training() -> None:
    episodes = [episode.copy() for episode in DATA.episodes]
    episodes[split_place()][5, 3] = 1e19
    data = replace(DATA, episodes=tuple(episodes))
    name = DATA.names[split_place()]
    with pytest.raises(
        DataError, match=rf"sines, episode '{name}', step 5, dimension 3: \d\S*e\+1[89]; expected at most 1e"
    ):
        train(data, QUICK)
    # Brought into [-1, 1] it could be trained, but no bundle holds such units.
    with pytest.raises(DataError, match=r"dimension 3 lies around 5e\+18, .* use other units"):
        train(data, replace(QUICK, epochs=1, normaliser=NormaliserKind.MIN_MAX))


def split_place() -> int:
    """Of the first training episode."""
    return DATA.names.index(split_episodes(DATA).train.names[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("num_episodes", -1),
        ("patience", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


# Early stopping ------------------------------------------------------------------------------------------------------

FEW = smooth_episodes(count=5, steps=4)


def epochs_before_stopping(errors: list[float], patience: int) -> int:
    """How many epochs run: the first after which the lowest error is `patience` epochs old, else all."""
    for count in range(1, len(errors) + 1):
        if patience and count - 1 - int(np.argmin(errors[:count])) >= patience:
            return count
    return len(errors)


def train_with(errors: list[float], patience: int) -> TrainResult:
    """Real training steps, but these validation errors."""
    script = iter(errors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rfsq.rfsq_ref.training._evaluate", lambda *_: next(script))
        return train(FEW, replace(QUICK, epochs=len(errors), patience=patience))


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=10), st.integers(0, 4))
def test_training_stops_when_the_validation_error_has_not_fallen_for_so_many_epochs(
    errors: list[float], patience: int
) -> None:
    count = epochs_before_stopping(errors, patience)
    stopped = train_with(errors, patience)
    assert [record.validation_mse for record in stopped.history] == errors[:count]
    assert stopped.checkpoint.provenance["epoch"] == 1 + int(np.argmin(errors[:count]))
    # The schedule knows nothing of the patience: what ran is the beginning of the whole run.
    assert train_with(errors, 0).history[:count] == stopped.history


def test_the_default_patience_leaves_the_embedded_recipe_as_it_is() -> None:
    """They kept epoch 100 and 91 of 100; a stop would have to come before either."""
    for path in (ROBUST_CHECKPOINT, NAIVE_CHECKPOINT):
        provenance = load_checkpoint(path).provenance
        assert provenance["training"]["epochs"] - provenance["epoch"] < TrainConfig().patience
    assert {name: value for name, value in asdict(TrainConfig()).items() if name not in ("patience", "device")} == (
        load_checkpoint(ROBUST_CHECKPOINT).provenance["training"]
    )


# Devices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "CUDA GPUs here; use cpu"), ("meta", "expected cpu or cuda"), ("abacus", "torch does not know")],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"device is '{device}'.*{message}"):
        train(DATA, replace(QUICK, device=device))


@pytest.mark.gpu
def test_training_on_a_gpu_gives_nearly_the_same_model_and_repeats(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    on_cpu = train(DATA, QUICK).history
    arguments = [sys.executable, str(SCRIPT), "--data", str(write_data(tmp_path)), "--device", "cuda", "--epochs", "2"]
    for name in ("first", "second"):
        output = tmp_path / f"{name}.safetensors"
        subprocess.run([*arguments, "--output", str(output)], cwd=tmp_path, check=True)
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    on_gpu = train(DATA, replace(QUICK, device="cuda")).history
    assert on_gpu[0].validation_mse == pytest.approx(on_cpu[0].validation_mse, rel=0.05)


# Learning curves -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> TrainResult:
    return train(DATA, replace(QUICK, epochs=5, seed=3))


def test_the_learning_curve_is_kept_beside_the_checkpoint(result: TrainResult, tmp_path: Path) -> None:
    save_result(result, tmp_path / "folder" / "model.safetensors")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "model.history.json", "model.history.png", "model.safetensors",
    ]  # fmt: skip
    history = load_history(history_path(tmp_path / "folder" / "model.safetensors"))
    checkpoint = load_checkpoint(tmp_path / "folder" / "model.safetensors")
    assert history == history_of(result)
    assert history.epochs == result.history
    assert history.training == checkpoint.provenance["training"]
    assert history.training["seed"] == 3
    assert history.data["sha256"] == DATA.sha256
    assert history.versions["torch"] == torch.__version__
    assert history.kept_epoch == 1 + int(np.argmin([record.validation_mse for record in history.epochs]))


def test_equal_trainings_write_equal_curves(result: TrainResult, tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_result(result, tmp_path / name / "model.safetensors")
    for file in ("model.history.json", "model.history.png", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_the_drawing_is_a_png_in_which_the_curve_can_be_seen(result: TrainResult, tmp_path: Path) -> None:
    from matplotlib.image import imread

    save_result(result, tmp_path / "model.safetensors")
    pixels = imread(tmp_path / "model.history.png")
    assert pixels.shape[0] >= 400
    # Its orange point: the kept epoch.
    orange = (np.abs(pixels[..., :3] - np.array([0xD9, 0x73, 0x0D]) / 255) < 0.02).all(axis=-1)
    assert orange.sum() > 20


def test_a_curve_that_cannot_be_written_leaves_nothing_behind(
    result: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device; choose"):
        save_result(result, tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


GOOD = {
    "format": "rfsq-training-history", "version": 1, "training": {"seed": 0}, "data": {}, "versions": {},
    "kept_epoch": 1, "epochs": [{"epoch": 1, "train_mse": 0.5, "validation_mse": 0.25}],
}  # fmt: skip


def test_a_curve_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert load_history(tmp_path / "a.json").epochs == (EpochRecord(1, 0.5, 0.25),)


def test_the_curve_of_a_training_that_diverged_later_reads_back(tmp_path: Path) -> None:
    diverged = {"epoch": 2, "train_mse": float("nan"), "validation_mse": float("inf")}
    (tmp_path / "a.json").write_text(json.dumps({**GOOD, "epochs": [*GOOD["epochs"], diverged]}))
    assert load_history(tmp_path / "a.json").epochs[1].validation_mse == float("inf")


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", json.dumps({**GOOD, "version": 2}), json.dumps({**GOOD, "kept_epoch": 2}),
        json.dumps({**GOOD, "epochs": [{"epoch": 1}]}), json.dumps({**GOOD, "more": 1}), "[" * 100_000, None,
    ],
    ids=[
        "empty", "list", "no fields", "other version", "kept no epoch", "broken record", "unknown field", "deep",
        "missing",
    ],
)  # fmt: skip
def test_a_file_that_is_no_curve_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.json is no learning curve.*give the NAME\.history\.json") as refused:
        load_history(tmp_path / "a.json")
    assert not re.search(r"\w(Error|Exception)\b", str(refused.value))


# Data of other robots, from the file to decoded tokens ---------------------------------------------------------------


def metres_and_radians(unit: FloatArray) -> FloatArray:
    """Positions to 5 cm, angles to half a turn."""
    half = unit.shape[1] // 2
    return np.concatenate([0.05 * unit[:, :half], 3.1 * unit[:, half:]], axis=1)


def bytes_as_numbers(unit: FloatArray) -> FloatArray:
    return np.round((unit + 1) * 127.5).astype(np.float32)


def with_last(unit: FloatArray, value: float) -> FloatArray:
    """A gripper that never moves."""
    return np.concatenate([unit[:, :-1], np.full_like(unit[:, -1:], value)], axis=1)


RANGES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "metres and radians": metres_and_radians,
    "0 to 255": bytes_as_numbers,
    "gripper always open": lambda unit: with_last(unit, -1.0),
    "gripper always at 255": lambda unit: with_last(unit, 255.0),
    "middle never moves": lambda unit: np.where(np.arange(unit.shape[1]) == 1, np.float32(0.3), unit),
}


def write_npz(folder: Path, episodes: list[FloatArray]) -> Path:
    path = folder / "robot.npz"
    np.savez(path, actions=np.concatenate(episodes), episode_ends=np.cumsum([len(episode) for episode in episodes]))
    return path


def write_robomimic(folder: Path, episodes: list[FloatArray]) -> Path:
    path = folder / "robot.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift"})
        for index, episode in enumerate(episodes):
            file[f"data/demo_{index}/actions"] = episode.astype(np.float64)
            file[f"data/demo_{index}/obs/robot0_eef_pos"] = np.zeros((len(episode), 3))
    return path


def write_lerobot(folder: Path, episodes: list[FloatArray]) -> Path:
    """Version 2: one Parquet file per episode."""
    (folder / "robot/meta").mkdir(parents=True)
    (folder / "robot/data/chunk-000").mkdir(parents=True)
    (folder / "robot/meta/info.json").write_text('{"codebase_version": "v2.1"}')
    (folder / "robot/meta/tasks.jsonl").write_text('{"task_index": 0, "task": "lift the cube"}\n')
    for index, episode in enumerate(episodes):
        table = pa.table(
            {
                "action": pa.array(episode.tolist(), pa.list_(pa.float32())),
                "episode_index": np.full(len(episode), index),
                "frame_index": np.arange(len(episode)),
                "task_index": np.zeros(len(episode), np.int64),
            }
        )
        pq.write_table(table, folder / f"robot/data/chunk-000/episode_{index:06d}.parquet")
    return folder / "robot"


WRITERS = {"npz": write_npz, "robomimic": write_robomimic, "LeRobot": write_lerobot}


def unit_episodes(action_dim: int, lengths: list[int]) -> list[FloatArray]:
    """Two hidden rhythms, mixed into every dimension, within [-1, 1]."""
    generator = np.random.default_rng(0)
    mixing = generator.uniform(-0.5, 0.5, (2, action_dim))
    phases = generator.uniform(0, 6, (len(lengths), 2))
    return [
        (np.sin(np.arange(length)[:, None] / 5 + phase) @ mixing).astype(np.float32)
        for length, phase in zip(lengths, phases, strict=True)
    ]


LONG = [70] * 14
# Shorter than a chunk of 8 steps.
SHORT = [5, 3, 7, 1] * 16


def relative_error(checkpoint: Checkpoint, data: ActionDataset, conditioning: Conditioning, prefix: int) -> float:
    """Mean squared error of test actions decoded from tokens alone, in units of each moving dimension's variance."""
    actions = torch.from_numpy(split_episodes(data).test.steps())
    model = checkpoint.model(conditioning)
    with torch.no_grad():
        tokens, _ = model.encode(actions)
        decoded = model.decode(tokens[..., :prefix])
    assert decoded.shape == actions.shape
    assert decoded.isfinite().all()
    moves = actions.amax(0) > actions.amin(0)
    return float(((decoded - actions).square().mean(0)[moves] / actions.var(0)[moves]).mean())


OTHER_ROBOTS = [
    # Every range once, every writer with few and with many dimensions.
    *(
        (writer, action_dim, LONG, name)
        for (writer, action_dim), name in zip(
            [("npz", 4), ("robomimic", 14), ("LeRobot", 4), ("npz", 14), ("LeRobot", 14)], RANGES, strict=True
        )
    ),
    *((writer, 4, SHORT, "metres and radians") for writer in WRITERS),
]


@pytest.mark.parametrize(("writer", "action_dim", "lengths", "name"), OTHER_ROBOTS)
def test_data_of_another_robot_go_from_the_file_to_decoded_tokens(
    writer: str, action_dim: int, lengths: list[int], name: str, tmp_path: Path
) -> None:
    episodes = [RANGES[name](episode) for episode in unit_episodes(action_dim, lengths)]
    data = load_actions(WRITERS[writer](tmp_path, episodes))
    assert (len(data.episodes), data.action_dim) == (len(lengths), action_dim)
    config = TrainConfig(epochs=8, learning_rate=1e-2, latent_dim=6, num_layers=4, batch_size=32)
    checkpoint = train(data, replace(config, normaliser=suggested_normaliser(data))).checkpoint
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    checkpoint = calibrate(load_checkpoint(tmp_path / "model.safetensors"), data, CalibrationConfig())
    checkpoint = recover(checkpoint, data, (2, 4), RecoveredConfig(refine_steps=0))
    # Predicting the mean would give 1; a few epochs give much less.
    assert relative_error(checkpoint, data, Conditioning.CALIBRATED, 4) < 0.15
    assert relative_error(checkpoint, data, Conditioning.DYNAMIC, 4) < 0.5
    assert relative_error(checkpoint, data, Conditioning.DYNAMIC, 2) < 0.5


@pytest.mark.parametrize("kind", NormaliserKind)
def test_any_normaliser_serves_bytes_and_a_gripper_that_never_moves(kind: NormaliserKind) -> None:
    episodes = [with_last(bytes_as_numbers(episode), 255.0) for episode in unit_episodes(4, LONG)]
    data = replace(smooth_episodes(count=len(LONG)), episodes=tuple(episodes))
    checkpoint = train(data, replace(QUICK, epochs=8, normaliser=kind)).checkpoint
    checkpoint = calibrate(checkpoint, data, CalibrationConfig())
    assert relative_error(checkpoint, data, Conditioning.CALIBRATED, 4) < 0.15


@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
def test_a_normaliser_is_suggested_exactly_where_the_units_are_far_from_one(scale: float, offset: float) -> None:
    data = smooth_episodes(count=8, steps=30)
    scaled = replace(data, episodes=tuple((episode * scale + offset).astype(np.float32) for episode in data.episodes))
    steps = split_episodes(scaled).train.steps().astype(np.float64)
    far = np.abs(steps).max() > 2 or (np.ptp(steps, axis=0) < 0.2).any()
    assert suggested_normaliser(scaled) == (NormaliserKind.MIN_MAX if far else None)


def test_no_normaliser_is_suggested_for_the_embedded_demonstrations(demonstrations: ActionDataset) -> None:
    assert suggested_normaliser(demonstrations) is None


def test_training_says_which_normaliser_auto_chose_and_why(demonstrations: ActionDataset) -> None:
    assert describe_normaliser(demonstrations, "auto").startswith("normaliser: none, chosen by auto: all actions lie")
    data = smooth_episodes(count=8, steps=30)
    units = np.ones(data.action_dim)
    units[0], units[1] = 100.0, 1e-3
    scaled = replace(data, episodes=tuple((episode * units).astype(np.float32) for episode in data.episodes))
    said = describe_normaliser(scaled, "auto")
    assert said == (
        "normaliser: min-max, chosen by auto: dimension 0 reaches beyond 2 and dimension 1 spans less than 0.2, from "
        "its lowest to its highest action; every dimension is rescaled, those of unit size too, but for the last, "
        "taken for a gripper command by its unit size: a joint belongs in another place"
    )
    assert describe_normaliser(scaled, "none") == "normaliser: none, as asked"
    assert said in describe(scaled, "auto")


def test_training_names_what_rests_far_away_what_never_moves_and_that_all_is_rescaled() -> None:
    """A joint that rests at 3.1 and hardly moves both reaches far and spans little."""
    data = smooth_episodes(count=8, steps=30)
    episodes = []
    for episode in data.episodes:
        changed = episode.copy()
        changed[:, 0] = 3.1 + 0.01 * changed[:, 0]
        changed[:, 1] = 0.7
        changed[:, -1] *= 100.0
        episodes.append(changed)
    said = describe_normaliser(replace(data, episodes=tuple(episodes)), "auto")
    last = data.action_dim - 1
    assert said == (
        f"normaliser: min-max, chosen by auto: dimensions 0, {last} reach beyond 2 and dimension 0 spans less than "
        "0.2, from its lowest to its highest action; every dimension is rescaled, those of unit size too; dimension 1 "
        "never moves"
    )
    still = tuple(np.where(np.arange(data.action_dim) == 1, np.float32(0.5), episode) for episode in data.episodes)
    assert describe_normaliser(replace(data, episodes=still), "auto").endswith(
        "recipe expects; dimension 1 never moves"
    )
    assert "8 episodes, 240 steps" in describe(data, "auto")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_is_shown_on_a_terminal_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    train(DATA, TrainConfig(epochs=1), show_progress=True)
    assert bool(capsys.readouterr().err) is is_terminal


@pytest.mark.parametrize(
    ("low", "high", "touched"), [(-1, 1, False), (0, 1, False), (1, 1, False), (0, 255, True), (0, 0.08, True)]
)
def test_a_gripper_keeps_its_units_where_they_are_those_of_a_command(low: float, high: float, touched: bool) -> None:
    episodes = tuple(
        np.concatenate([episode[:, :-1], np.where(episode[:, -1:] > 0, high, low)], axis=1) for episode in DATA.episodes
    )
    data = replace(DATA, episodes=episodes)
    normaliser = train(data, replace(QUICK, epochs=1, normaliser=NormaliserKind.MIN_MAX)).checkpoint.normaliser
    assert normaliser is not None
    expected = ((low + high) / 2, (high - low) / 2) if touched else (0.0, 1.0)
    assert (normaliser.offset[-1], normaliser.scale[-1]) == pytest.approx(expected)


@pytest.mark.parametrize("writer", WRITERS)
def test_nan_is_refused_by_episode_and_step_before_anything_is_trained(
    writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = unit_episodes(4, LONG)
    episodes[5][33, 2] = np.nan
    path = WRITERS[writer](tmp_path, episodes)
    assert run_main(["--data", str(path), "--output", "model.safetensors"], tmp_path, monkeypatch) == 2
    assert "episode 5, step 33, dimension 2: nan" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


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
    assert (
        load_history(tmp_path / "build" / "checkpoints" / "naive.history.json").training
        == (checkpoint.provenance["training"])
    )


def test_several_seeds_give_several_checkpoints_and_their_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(["--seeds", "4", "0", "7", "--output", "out/m.safetensors"], tmp_path, monkeypatch) == 0
    assert not (tmp_path / "out/m.safetensors").exists()
    errors = []
    for seed in (4, 0, 7):
        checkpoint = load_checkpoint(tmp_path / f"out/m-seed{seed}.safetensors")
        assert checkpoint.provenance["training"]["seed"] == seed
        assert load_history(tmp_path / f"out/m-seed{seed}.history.json").training["seed"] == seed
        errors.append(checkpoint.provenance["validation_mse"])
    *printed, last = capsys.readouterr().out.splitlines()
    kept = [line for line in printed if ": kept epoch " in line]
    assert len(kept) == 3
    assert all(line.endswith("(normalised units²)") for line in (*kept, last))
    assert f"validation MSE {statistics.mean(errors):.3e}, standard deviation {statistics.stdev(errors):.1e}" in last


@pytest.mark.parametrize(
    ("choice", "kind", "said"),
    [
        (
            "auto",
            NormaliserKind.MIN_MAX,
            r"normaliser: min-max, chosen by auto: dimensions .* span less than 0\.2, from its lowest to its highest",
        ),
        ("none", None, "normaliser: none, as asked$"),
    ],
)
def test_the_command_normalises_actions_in_other_units_unless_told_not_to_and_says_why(
    choice: str,
    kind: NormaliserKind | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_npz(tmp_path, [0.01 * episode for episode in DATA.episodes])
    arguments = ["--data", str(path), "--normaliser", choice, "--output", "m.safetensors"]
    assert run_main(arguments, tmp_path, monkeypatch) == 0
    normaliser = load_checkpoint(tmp_path / "m.safetensors").normaliser
    assert (normaliser and normaliser.kind) == kind
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("normaliser: "))
    assert re.match(said, line), line


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
        (["--seeds", "1", "1"], "--seeds 1 1 has one twice"),
        (["--device", "cuda:99"], "CUDA GPUs here"),
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
