"""What one job of a comparison measures: a checkpoint, trained where it is missing, or the peers of one seed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rfsq.calibration.data import calibration_episodes, judging_episodes
from rfsq.calibration.fitting import calibrate, recover
from rfsq.calibration.settings import DEFAULT_CALIBRATION, Method, ReadoutChoice
from rfsq.evidence.findings import REFITTED
from rfsq.evidence.judging import judge_codec
from rfsq.evidence.metrics import Array, units_of
from rfsq.evidence.peers import peer_codecs
from rfsq.evidence.results import CodecReport, Curve, Metrics, SchemeReport
from rfsq.evidence.schemes import Calibrated, Dynamic, Judge, Naive, Published, Recovered, Scheme
from rfsq.evidence.settings import ComparisonConfig
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.own_format import SUFFIX
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.settings import TrainConfig
from rfsq.rfsq_ref.training import TrainingHistory, history_path, load_history, save_result, train
from rfsq.runtime.bundle.fidelity import fidelity

#: Of the episode that is drawn.
TRAJECTORY_STEPS = 240
#: To be raised when the recipe in rfsq.rfsq_ref.training changes what comes out of it.
RECIPE = 1


@dataclass(frozen=True)
class CheckpointResult:
    """What one checkpoint gives. schemes: by name; decoded: by label, the trajectory's steps [n, A]; remarks: what is
    missing and why, and how good the tokens are; is_refitted: whether calibration kept a readout."""

    name: str
    sha256: str
    curve: Curve | None
    unquantised: dict[str, Metrics]
    schemes: dict[str, SchemeReport]
    decoded: dict[str, Array]
    remarks: tuple[str, ...]
    is_refitted: bool


# One checkpoint ------------------------------------------------------------------------------------------------------


def checkpoint_job(
    dataset: ActionDataset, config: ComparisonConfig, kind: str, source: Checkpoint | int
) -> CheckpointResult:
    curve = None
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        training = config.training(use_layernorm=kind == "robust", seed=source)
        checkpoint, history = trained_checkpoint(dataset, training, config.cache)
        _, train_mse, validation_mse = zip(*(vars(record).values() for record in history.epochs), strict=True)
        curve = Curve(train_mse, validation_mse, history.kept_epoch)
    sha256 = str(checkpoint.provenance["checkpoint_sha256"])
    name = f"seed {source}" if isinstance(source, int) else sha256[:12]
    remarks, is_refitted = [], False
    if kind == "naive":
        schemes: list[Scheme] = [Naive(checkpoint)]
    else:
        checkpoint = calibrate(checkpoint, dataset, DEFAULT_CALIBRATION, config.readout)
        is_refitted = checkpoint.readout is not None
        if not is_refitted and config.readout.choice is ReadoutChoice.AUTO:
            remarks.append(f"robust {name}: {checkpoint.provenance[Method.CALIBRATED.value]['remark']}")
        schemes = [Dynamic(checkpoint), Published(checkpoint), Calibrated(checkpoint)]
        try:
            prefixes = range(1, checkpoint.config.num_layers + 1)
            schemes.insert(2, Recovered(recover(checkpoint, dataset, tuple(prefixes), config.recovered)))
        except DataError as error:
            # Few data calibrate, but do not determine a dense map: everything else can still be compared.
            remarks.append(f"no recovered decoder, so no such row: {error}")
    judged = judging_episodes(checkpoint, dataset)
    judge = Judge(
        judged.steps(), calibration_episodes(checkpoint, dataset).steps(), units_of(dataset.steps()), config.physical
    )
    unquantised = {f"{kind} autoencoder": judge.unquantised(checkpoint.model(dtype=torch.float64))}
    if kind == "robust":
        # Where no refit was kept, that of the autoencoder as trained: seeds that have one share a row with it.
        unquantised[REFITTED] = judge.unquantised(checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64))
        remarks += _verdict(schemes[-1], judged.steps(), name)
    example = judged.episodes[0][:TRAJECTORY_STEPS]
    return CheckpointResult(
        name=name,
        sha256=sha256,
        curve=curve,
        unquantised=unquantised,
        schemes={scheme.name: judge.report(scheme) for scheme in schemes},
        decoded={
            f"{scheme.name}, {what}": scheme.decode(example, layers)
            for scheme in schemes
            for what, layers in (("L0", 1), ("all layers", checkpoint.config.num_layers))
        },
        remarks=tuple(remarks),
        is_refitted=is_refitted,
    )


def _verdict(scheme: Scheme, actions: FloatArray, name: str) -> list[str]:
    """How well all layers decode each dimension, in the robot's units, and a warning where that is poor."""
    model = scheme.model
    decoded = scheme.decode(actions, model.config.num_layers)
    found = fidelity(actions, decoded, model.units.tolist(), model.offset.tolist())
    label = f"{scheme.name} tokens of {name}, all layers"
    warning = found.warning_in(model.conditioning.value)
    return [f"{label}, {found.line}", *([f"{label}: {warning}"] if warning else [])]


# What is trained -----------------------------------------------------------------------------------------------------


def trained_checkpoint(dataset: ActionDataset, config: TrainConfig, cache: Path) -> tuple[Checkpoint, TrainingHistory]:
    """Trained by this recipe on this dataset's training episodes: embedded, kept from an earlier run, or trained now.

    Raises CheckpointError for a damaged file, DataError for too few episodes.
    """
    path = ROBUST_CHECKPOINT if config.use_layernorm else NAIVE_CHECKPOINT
    if not _trained_by(load_checkpoint(path), dataset, config):
        path = cached_path(dataset, config, cache)
        if not path.is_file():
            save_result(train(dataset, config), path)
    return load_checkpoint(path), load_history(history_path(path))


def cached_path(dataset: ActionDataset, config: TrainConfig, cache: Path) -> Path:
    """Where a checkpoint is kept; the name carries a hash of all that decides its weights."""
    identity = json.dumps([RECIPE, dataset.sha256, asdict(config)], sort_keys=True)
    kind = "robust" if config.use_layernorm else "naive"
    return cache / f"{kind}-seed{config.seed}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}{SUFFIX}"


def _trained_by(checkpoint: Checkpoint, dataset: ActionDataset, config: TrainConfig) -> bool:
    provenance = checkpoint.provenance
    # A setting that is younger than the checkpoint had its default.
    recorded = {**asdict(TrainConfig()), **provenance["training"]}
    return bool(provenance["data"]["sha256"] == dataset.sha256 and recorded == asdict(config))


# Peers ---------------------------------------------------------------------------------------------------------------


def peers_job(dataset: ActionDataset, config: ComparisonConfig, seed: int) -> list[CodecReport]:
    judged = split_episodes(dataset).test
    units = units_of(dataset.steps())
    codecs = peer_codecs(dataset, config.chunk_length, seed=seed, cache=config.cache)
    return [judge_codec(codec, judged, config.chunk_length, units, config.physical) for codec in codecs]
