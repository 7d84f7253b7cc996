"""What a build starts from fits together, or is refused with what to do instead."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.calibration.data import Selection
from rfsq.calibration.settings import RecoveredConfig
from rfsq.export import sources
from rfsq.export.plan import DeployMode
from rfsq.export.sources import choose_mode, fit_for, load_build_data, needs_fit, open_checkpoint
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, save_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind

NORMALISER = Normaliser(NormaliserKind.QUANTILE, (0.5,) * 7, (2.0,) * 6 + (1.0,))


def write_normaliser(path: Path, normaliser: Normaliser) -> Path:
    path.write_text(json.dumps(normaliser.to_json()), encoding="utf-8")
    return path


def write_episodes(path: Path, action_dim: int, episodes: int = 10) -> Path:
    random = np.random.default_rng(0)
    np.savez(path, **{f"episode_{n}": random.uniform(-1, 1, (50, action_dim)).astype("f4") for n in range(episodes)})
    return path


# --- checkpoint and normaliser ----------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_normaliser_takes_the_one_that_is_given(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ROBUST_CHECKPOINT, normaliser_file=write_normaliser(tmp_path / "n.json", NORMALISER))
    assert checkpoint.normaliser == NORMALISER
    model = checkpoint.model(dtype=torch.float64)
    assert model.offset.tolist() == [0.5] * 7
    assert open_checkpoint(ROBUST_CHECKPOINT).normaliser is None


def test_a_checkpoint_keeps_its_own_normaliser(robust: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(replace(robust, normaliser=NORMALISER), tmp_path / "own.safetensors")
    assert open_checkpoint(tmp_path / "own.safetensors").normaliser == NORMALISER
    same = write_normaliser(tmp_path / "same.json", NORMALISER)
    assert open_checkpoint(tmp_path / "own.safetensors", normaliser_file=same).normaliser == NORMALISER


def test_two_normalisers_that_differ_are_refused(robust: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(replace(robust, normaliser=NORMALISER), tmp_path / "own.safetensors")
    other = write_normaliser(tmp_path / "other.json", replace(NORMALISER, offset=(0.25,) * 7))
    with pytest.raises(CheckpointError, match=r"own\.safetensors brings a normaliser .* differs from .*other\.json"):
        open_checkpoint(tmp_path / "own.safetensors", normaliser_file=other)


def test_a_normaliser_of_another_robot_is_refused(tmp_path: Path) -> None:
    file = write_normaliser(tmp_path / "n.json", Normaliser(NormaliserKind.MIN_MAX, (0.0,) * 6, (1.0,) * 6))
    with pytest.raises(CheckpointError, match=r"n\.json is for 6 dimensions, .*robust\.safetensors has 7; give the"):
        open_checkpoint(ROBUST_CHECKPOINT, normaliser_file=file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not a readable JSON file"),
        ("{}", r"""n\.json: normaliser needs "kind" .*found: it lacks the keys \['kind', """),
        ('{"kind": "min-max", "offset": [0], "scale": [0]}', "every scale positive"),
        ('{"kind": "min-max", "offset": [NaN], "scale": [1]}', "NaN is no JSON number"),
        ('{"kind": "min-max", "offset": [1e999], "scale": [1]}', "expected finite"),
        ("[1, 2]", r'n\.json: normaliser needs "kind" .*found: it is \[1, 2\]; expected an object'),
    ],
)
def test_a_file_that_is_no_normaliser_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        open_checkpoint(ROBUST_CHECKPOINT, normaliser_file=tmp_path / "n.json")


def test_a_normaliser_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.json"):
        open_checkpoint(ROBUST_CHECKPOINT, normaliser_file=tmp_path / "missing.json")


# --- mode -------------------------------------------------------------------------------------------------------------


def test_robust_is_calibrated_and_naive_stays_as_it_is_unless_asked_otherwise(
    robust: Checkpoint, naive: Checkpoint
) -> None:
    assert choose_mode(robust, None) is DeployMode.CALIBRATED
    assert choose_mode(naive, None) is DeployMode.NONE
    for mode in (DeployMode.CALIBRATED, DeployMode.RECOVERED, DeployMode.DYNAMIC):
        assert choose_mode(robust, mode) is mode
    for mode in (DeployMode.CALIBRATED, DeployMode.NONE):
        assert choose_mode(naive, mode) is mode


def test_a_mode_that_the_checkpoint_cannot_give_is_refused_with_those_that_it_can(
    robust: Checkpoint, naive: Checkpoint
) -> None:
    with pytest.raises(CheckpointError, match=r"'dynamic' and cannot be deployed as 'none'; choose dynamic or calib"):
        choose_mode(robust, DeployMode.NONE)
    for mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED):
        expected = f"'none' and cannot be deployed as '{mode.value}'; choose none or calibrated$"
        with pytest.raises(CheckpointError, match=expected):
            choose_mode(naive, mode)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [ROBUST_CHECKPOINT, NAIVE_CHECKPOINT])
@pytest.mark.parametrize("is_needed", [True, False])
def test_embedded_checkpoints_are_judged_on_the_embedded_test_episodes(
    file: Path, is_needed: bool, split: EpisodeSplit
) -> None:
    data = load_build_data(open_checkpoint(file), None, is_needed=is_needed)
    np.testing.assert_array_equal(data.held_out, split.test.steps())
    assert data.dataset is not None
    assert Selection.TRAINING_SPLIT.value in data.description
    assert data.judged_on == "held-out episodes"


@pytest.mark.parametrize("provenance", [{}, {"data": {"sha256": "0" * 64}}, {"data": {}}, {"data": "a robot's"}])
def test_the_embedded_demonstrations_calibrate_no_checkpoint_of_another_robot(
    provenance: dict, robust: Checkpoint
) -> None:
    stranger = replace(robust, provenance=provenance)
    with pytest.raises(DataError, match=r"not trained on the embedded demonstrations .*--data FILE"):
        load_build_data(stranger, None, is_needed=True)


def test_a_checkpoint_that_needs_no_data_is_built_without(robust: Checkpoint) -> None:
    data = load_build_data(replace(robust, provenance={}), None, is_needed=False)
    assert data.dataset is None
    assert data.held_out.shape == (0, 7)
    assert data.held_out.dtype == np.float32
    assert "random actions alone" in data.description
    assert data.judged_on == ""


@pytest.mark.parametrize("is_needed", [True, False])
def test_data_that_is_given_is_taken_and_its_test_episodes_are_held_out(
    robust: Checkpoint, is_needed: bool, tmp_path: Path
) -> None:
    stranger = replace(robust, provenance={})
    data = load_build_data(stranger, write_episodes(tmp_path / "own.npz", 7, episodes=20), is_needed=is_needed)
    assert data.dataset is not None
    assert 0 < len(data.held_out) < data.dataset.num_steps
    assert "own.npz: 20 episodes" in data.description
    assert Selection.OTHER_SPLIT.value in data.description
    assert ("the data only judge" in data.description) is not is_needed
    assert "WARNING" not in data.description
    assert data.judged_on == "held-out episodes"

    fitted = fit_for(stranger, DeployMode.CALIBRATED, (3, 8), data.dataset)
    seen = fitted.provenance["calibrated"]["data"]["steps"]
    assert seen + len(data.held_out) == data.dataset.num_steps


def test_episodes_too_few_to_hold_any_out_are_not_called_held_out(robust: Checkpoint, tmp_path: Path) -> None:
    path = write_episodes(tmp_path / "own.npz", 7, episodes=3)
    judged_on = {is_needed: load_build_data(robust, path, is_needed=is_needed).judged_on for is_needed in (True, False)}
    assert judged_on == {
        True: "the calibration data themselves, too few to split",
        False: "all episodes given, too few to split",
    }


def test_a_fit_to_very_few_steps_is_warned_of_on_a_line_of_its_own(robust: Checkpoint, tmp_path: Path) -> None:
    path = write_episodes(tmp_path / "own.npz", 7, episodes=3)
    _, warning, unsplit = load_build_data(robust, path, is_needed=True).description.splitlines()
    assert warning.startswith("WARNING: only 150 steps to calibrate on; expected 200")
    assert unsplit == (
        "WARNING: 3 episodes cannot be split, so the verdict is of the very data that are fitted to, and new ones may "
        "be worse: give 4 episodes or more"
    )
    assert "WARNING" not in load_build_data(robust, path, is_needed=False).description


def test_data_without_borders_between_episodes_are_warned_of_with_the_remedy(
    robust: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "flat.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (1000, 7)).astype(np.float32))
    first, warning = load_build_data(robust, path, is_needed=True).description.splitlines()
    assert first.startswith("flat.npy: 1 episode; all of it, too few episodes to split; in numbers or episode borders")
    assert warning.startswith("WARNING: 1 episode cannot be split, so the verdict is of the very data")
    assert "no episode_ends and no episode_index was found in flat.npy, so all 1000 steps count as one" in warning
    assert "episode_ends=ends" in warning
    # The same numbers with borders.
    np.savez(tmp_path / "ends.npz", actions=np.load(path), episode_ends=np.arange(100, 1001, 100))
    assert "WARNING" not in load_build_data(robust, tmp_path / "ends.npz", is_needed=True).description


def test_data_of_another_action_dimension_is_refused(robust: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"six\.npz has 6 action dimensions, the checkpoint 7"):
        load_build_data(robust, write_episodes(tmp_path / "six.npz", 6), is_needed=True)


@pytest.mark.parametrize("file", [ROBUST_CHECKPOINT, NAIVE_CHECKPOINT])
@pytest.mark.parametrize("is_needed", [True, False])
@pytest.mark.parametrize(("offset", "scale"), [(1e6, 1.0), (0.0, 1e15)])
def test_actions_far_out_of_the_range_of_the_model_are_refused(
    file: Path, is_needed: bool, offset: float, scale: float, tmp_path: Path
) -> None:
    walk = np.cumsum(np.random.default_rng(0).normal(0, 0.05, (5, 40, 7)), 1).clip(-1, 1)
    np.savez(tmp_path / "far.npz", actions=(offset + scale * walk).astype(np.float32))
    message = (
        r"steps drive every latent to the end of its range, .*checkpoint's units, expected about 1.*--normaliser FILE"
    )
    with pytest.raises(DataError, match=message):
        load_build_data(open_checkpoint(file), tmp_path / "far.npz", is_needed=is_needed)


def test_the_key_names_the_array(robust: Checkpoint, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "two.npz", targets=random.uniform(-1, 1, (9, 7)), others=np.zeros((9, 3)))
    data = load_build_data(robust, tmp_path / "two.npz", key="targets", is_needed=False)
    assert data.held_out.shape == (9, 7)
    with pytest.raises(DataError, match="nothing"):
        load_build_data(robust, tmp_path / "two.npz", key="nothing", is_needed=False)


# --- fits -------------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_fitted(robust: Checkpoint, naive: Checkpoint, calibrated: Checkpoint) -> None:
    assert needs_fit(robust, DeployMode.CALIBRATED, (3, 8))
    assert not needs_fit(calibrated, DeployMode.CALIBRATED, (3, 8))
    assert not needs_fit(robust, DeployMode.DYNAMIC, (3, 8))
    assert not needs_fit(naive, DeployMode.NONE, (3, 8))
    assert needs_fit(naive, DeployMode.CALIBRATED, (3, 8))


def test_recovered_decoders_are_fitted_unless_there_is_one_for_every_prefix(
    robust: Checkpoint, demonstrations: ActionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How good they are is calibration's.
    monkeypatch.setattr(sources, "RecoveredConfig", lambda: RecoveredConfig(refine_steps=0))
    assert needs_fit(robust, DeployMode.RECOVERED, (1, 8))
    fitted = fit_for(robust, DeployMode.RECOVERED, (1,), demonstrations)
    assert set(fitted.recovered) == {1}
    assert not needs_fit(fitted, DeployMode.RECOVERED, (1,))
    assert needs_fit(fitted, DeployMode.RECOVERED, (1, 2))
    assert fitted.weights is robust.weights
