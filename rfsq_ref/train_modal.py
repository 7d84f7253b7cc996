"""The training of rfsq_ref/train.py on a Modal GPU, with data and checkpoints on a Modal volume.

    modal run rfsq_ref/train_modal.py --use-layernorm True --num-episodes 50 --epochs 100

Own data go to the volume first: `modal volume put rfsq-training episodes.hdf5 data/episodes.hdf5`, then
`--data data/episodes.hdf5`. Needs `pip install modal` and an account (`modal setup`). The model is tiny: a GPU is no
faster than one CPU core, and its weights differ from the CPU's in their last digits.
"""

import sys
from pathlib import Path, PurePosixPath

if not __package__:
    # Not in place of the first entry, as elsewhere: Modal needs that one.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal

import modal

from rfsq.rfsq_ref.data import load_actions, load_demonstrations
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.normaliser import chosen_normaliser, describe
from rfsq.rfsq_ref.own_format import SUFFIX, check_output
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.rfsq_ref.training import history_path, make_deterministic, result_files, save_result, train
from rfsq.runtime.bundle.paths import refuse_existing

_ROOT = Path(__file__).resolve().parent.parent
VOLUME_NAME = "rfsq-training"
#: Where the container sees the volume.
VOLUME_PATH = Path("/rfsq-training")
#: In the container: beside the folder that Modal lays this file into, where it is looked for.
PACKAGE_PATH = "/rfsq"
GPU = "L4"
TIMEOUT_S = 2 * 60 * 60
PACKAGES = ("torch", "numpy", "safetensors", "h5py", "pyarrow", "matplotlib", "tqdm")

app = modal.App("rfsq-training")
volume = modal.Volume.from_name(VOLUME_NAME, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version=f"{sys.version_info.major}.{sys.version_info.minor}")
    # The caller's versions, but not its build of them ("+cpu").
    .pip_install(*(f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES))
    # Room by room, with the embedded demonstrations: Modal follows no links.
    .add_local_file(_ROOT / "rfsq" / "__init__.py", f"{PACKAGE_PATH}/__init__.py")
    .add_local_dir(_ROOT / "runtime", f"{PACKAGE_PATH}/runtime", ignore=["**/__pycache__"])
    .add_local_dir(_ROOT / "rfsq_ref", f"{PACKAGE_PATH}/rfsq_ref", ignore=["**/__pycache__", "**/*.safetensors"])
)


def check_on_volume(output: str) -> None:
    """Raise CheckpointError for a checkpoint that would not be on the volume, and would be lost with the container."""
    path = PurePosixPath(output)
    if path.is_absolute() or ".." in path.parts:
        raise CheckpointError(
            f"output {output!r} would leave the volume, and be lost; expected a path relative to it, without '..', "
            f"such as checkpoints/{path.stem or 'robust'}{SUFFIX}"
        )
    check_output(path.name)


@app.function(image=image, gpu=GPU, volumes={str(VOLUME_PATH): volume}, timeout=TIMEOUT_S)
def train_remote(
    config: TrainConfig, normaliser: str, data: str, key: str, output: str, overwrite: bool = False
) -> dict[str, Any]:
    """Train, and write the checkpoint and its learning curve to the volume.

    normaliser: as `--normaliser` of rfsq_ref/train.py; data and output: relative to the volume, data "" for the
    embedded demonstrations; key: of the action array, "" for the usual one. Returns the checkpoint's provenance.
    Raises what loading, training and saving raise, and before them CheckpointError for an output
    off the volume and OutputExistsError for one that is there.
    """
    check_on_volume(output)
    refuse_existing(result_files(VOLUME_PATH / output), overwrite=overwrite)
    make_deterministic()
    dataset = load_actions(VOLUME_PATH / data, key=key or None) if data else load_demonstrations()
    config = replace(config, normaliser=chosen_normaliser(normaliser, dataset))
    print(describe(dataset, normaliser))
    result = train(dataset, config)
    save_result(result, VOLUME_PATH / output)
    # A call on this machine writes to a plain folder, and has no volume to commit.
    if not modal.is_local():
        volume.commit()
    return dict(result.checkpoint.provenance)


@app.local_entrypoint()
def main(
    use_layernorm: Literal["True", "False"] = "True",
    num_episodes: int = TrainConfig.num_episodes,
    epochs: int = TrainConfig.epochs,
    batch_size: int = TrainConfig.batch_size,
    learning_rate: float = TrainConfig.learning_rate,
    patience: int = TrainConfig.patience,
    seed: int = TrainConfig.seed,
    normaliser: str = "auto",
    data: str = "",
    key: str = "",
    output: str = "",
    overwrite: bool = False,
) -> None:
    """Modal makes the command line from these parameters: a bool would be a flag that takes no True or False."""
    robust = use_layernorm == "True"
    output = output or f"checkpoints/{'robust' if robust else 'naive'}{SUFFIX}"
    # Here as well, before a GPU is started.
    check_on_volume(output)
    config = TrainConfig(
        use_layernorm=robust,
        num_episodes=num_episodes,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        seed=seed,
        device="cuda",
    )
    kept = train_remote.remote(config, normaliser, data, key, output, overwrite)
    print(
        f"kept epoch {kept['epoch']}: train MSE {kept['train_mse']:.3e}, validation MSE {kept['validation_mse']:.3e} "
        "(normalised units²)\n"
        f"fetch it:  modal volume get {VOLUME_NAME} {output} .\n"
        f"its curve: modal volume get {VOLUME_NAME} {history_path(Path(output)).as_posix()} ."
    )
