"""What `rfsq_ref.train_modal` promises: the training of rfsq_ref/train.py, on a volume, whatever machine runs it.

Modal's local call runs the function here, without an account; the volume is then a plain folder.
"""

import importlib
import inspect
import shutil
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.rfsq_ref.checkpoints import load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.rfsq_ref.training import history_of, load_history, train
from rfsq.runtime.bundle.errors import OutputExistsError

ROOT = Path(__file__).parents[2]
QUICK = TrainConfig(epochs=3, hidden_width=8, latent_dim=4, num_layers=3, learning_rate=1e-2)
# Modal says that a call on this machine sees no volume: it is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:The train_remote function is executing locally")


@pytest.fixture(scope="module")
def train_modal() -> Any:
    """Imported when it is needed: Modal takes half a second."""
    pytest.importorskip("modal", reason="modal is not installed: pip install '.[dev]'")
    return importlib.import_module("rfsq.rfsq_ref.train_modal")


@pytest.fixture
def volume(train_modal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the volume, with data on it."""
    folder = tmp_path / "volume"
    (folder / "data").mkdir(parents=True)
    steps = np.random.default_rng(0).uniform(-1, 1, (60, 3)).astype(np.float32)
    np.savez(folder / "data/robot.npz", actions=steps, relative=steps / 100, episode_ends=np.arange(6, 61, 6))
    monkeypatch.setattr(train_modal, "VOLUME_PATH", folder)
    # It would hold for every later test of this process.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    return folder


@pytest.mark.parametrize("use_layernorm", [True, False])
def test_the_checkpoint_on_the_volume_is_that_of_the_training_here(
    train_modal: Any, use_layernorm: bool, volume: Path, tmp_path: Path
) -> None:
    config = replace(QUICK, use_layernorm=use_layernorm)
    facts = train_modal.train_remote.local(config, "none", "data/robot.npz", "", "checkpoints/m.safetensors")
    here = train(load_actions(volume / "data/robot.npz"), config)
    save_checkpoint(here.checkpoint, tmp_path / "here.safetensors")
    assert (volume / "checkpoints/m.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    assert load_history(volume / "checkpoints/m.history.json") == history_of(here)
    assert facts == here.checkpoint.provenance


def test_the_key_and_the_normaliser_are_passed_on(train_modal: Any, volume: Path) -> None:
    train_modal.train_remote.local(QUICK, "auto", "data/robot.npz", "relative", "m.safetensors")
    normaliser = load_checkpoint(volume / "m.safetensors").normaliser
    assert normaliser is not None, "hundredths are not of unit size"
    assert max(normaliser.scale) < 0.011


def test_without_data_it_trains_on_the_embedded_demonstrations(train_modal: Any, volume: Path) -> None:
    facts = train_modal.train_remote.local(replace(QUICK, epochs=1, num_episodes=1), "auto", "", "", "m.safetensors")
    assert facts["data"]["source"] == "demonstrations.npz"
    assert load_checkpoint(volume / "m.safetensors").config.action_dim == 7


def test_what_cannot_be_trained_leaves_no_checkpoint(train_modal: Any, volume: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.npz does not exist"):
        train_modal.train_remote.local(QUICK, "auto", "data/nowhere.npz", "", "m.safetensors")
    assert not (volume / "m.safetensors").exists()


@pytest.mark.parametrize("output", ["/tmp/m.safetensors", "../m.safetensors", "checkpoints/../../m.safetensors"])
def test_an_output_off_the_volume_is_refused_before_anything_is_trained(
    train_modal: Any, output: str, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(train_modal, "train", trained)
    message = (
        r"would leave the volume, and be lost; expected a path relative to it.* such as checkpoints/m\.safetensors"
    )
    with pytest.raises(CheckpointError, match=message):
        train_modal.train_remote.local(QUICK, "none", "data/robot.npz", "", output)
    with pytest.raises(CheckpointError, match=r"does not end with '\.safetensors'"):
        train_modal.train_remote.local(QUICK, "none", "data/robot.npz", "", "checkpoints/m.pt")
    with pytest.raises(CheckpointError, match=message):
        called_with(train_modal, monkeypatch, output=output)
    assert [path.name for path in volume.rglob("*") if path.is_file()] == ["robot.npz"]


def test_a_checkpoint_on_the_volume_is_replaced_only_when_that_is_asked_for(train_modal: Any, volume: Path) -> None:
    (volume / "m.history.json").write_text("an hour of work")
    arguments = (replace(QUICK, epochs=1), "none", "data/robot.npz", "", "m.safetensors")
    with pytest.raises(OutputExistsError, match=r"m\.history\.json exists; give another name, or --overwrite"):
        train_modal.train_remote.local(*arguments)
    assert [path.name for path in volume.glob("m.*")] == ["m.history.json"]
    train_modal.train_remote.local(*arguments, overwrite=True)
    assert (volume / "m.safetensors").exists()


# The command line ----------------------------------------------------------------------------------------------------


def called_with(train_modal: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, ...]:
    """What the local entry point, called as Modal's parser calls it, hands to the remote function."""
    calls: list[tuple[Any, ...]] = []

    class Remote:
        @staticmethod
        def remote(*arguments: Any) -> dict[str, Any]:
            calls.append(arguments)
            return {"epoch": 7, "train_mse": 1e-3, "validation_mse": 2e-3}

    monkeypatch.setattr(train_modal, "train_remote", Remote)
    train_modal.main(**options)
    return calls[0]


def test_the_options_become_the_settings_of_a_training_on_a_gpu(
    train_modal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, *others = called_with(train_modal, monkeypatch, use_layernorm="True", num_episodes=50, epochs=100)
    assert config == TrainConfig(use_layernorm=True, num_episodes=50, epochs=100, device="cuda")
    assert others == ["auto", "", "", "checkpoints/robust.safetensors", False]
    output = capsys.readouterr().out
    assert "kept epoch 7: train MSE 1.000e-03, validation MSE 2.000e-03 (normalised units²)\n" in output
    assert "modal volume get rfsq-training checkpoints/robust.safetensors ." in output
    assert "modal volume get rfsq-training checkpoints/robust.history.json ." in output


def test_naive_training_and_own_data_are_asked_for_by_name(train_modal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, *others = called_with(
        train_modal,
        monkeypatch,
        use_layernorm="False",
        data="data/a.h5",
        key="act",
        normaliser="quantile",
        seed=3,
        patience=0,
        overwrite=True,
    )
    assert config == TrainConfig(use_layernorm=False, seed=3, patience=0, device="cuda")
    assert others == ["quantile", "data/a.h5", "act", "checkpoints/naive.safetensors", True]


def test_use_layernorm_takes_true_and_false_as_words(train_modal: Any) -> None:
    """Modal makes a flag of a bool, and a choice of words of a Literal of strings."""
    entry = train_modal.main.info.raw_f
    hints = typing.get_type_hints(entry)
    assert hints["use_layernorm"] == typing.Literal["True", "False"]
    del hints["return"]
    del hints["use_layernorm"]
    assert hints.pop("overwrite") is bool, "a flag, as in rfsq_ref/train.py"
    assert set(hints.values()) <= {str, int, float}, "Modal parses no others"
    assert all(parameter.default is not parameter.empty for parameter in inspect.signature(entry).parameters.values())


def test_the_defaults_are_those_of_the_training_here(train_modal: Any) -> None:
    defaults = {
        name: value.default for name, value in inspect.signature(train_modal.main.info.raw_f).parameters.items()
    }
    for name in ("num_episodes", "epochs", "batch_size", "learning_rate", "patience", "seed"):
        assert defaults[name] == getattr(TrainConfig(), name)
    assert defaults["use_layernorm"] == str(TrainConfig().use_layernorm)


# In the container ----------------------------------------------------------------------------------------------------


def test_it_imports_as_modal_lays_the_files_out_in_its_container(train_modal: Any, tmp_path: Path) -> None:
    """`modal run FILE` imports the file by its bare name, from a folder that the package lies beside."""
    package = tmp_path / Path(train_modal.PACKAGE_PATH).name
    shutil.copytree(ROOT / "runtime", package / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "rfsq_ref", package / "rfsq_ref", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "rfsq/__init__.py", package)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    shutil.copy(ROOT / "rfsq_ref/train_modal.py", mounted)
    code = "import train_modal, rfsq.rfsq_ref as r; print(r.__file__, train_modal.train_remote.local.__name__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=mounted, env={"PYTHONPATH": str(mounted)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == str(package / "rfsq_ref/__init__.py")
