"""Fits what makes a checkpoint's tokens decodable on their own.

`calibrated` gives new, better tokens (the policy is trained on them); `recovered` keeps the published tokens of a
Robust RFSQ checkpoint. The weights stay as they are.
"""

from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any

from rfsq.calibration.constants import fit_constants, worst_case_errors
from rfsq.calibration.data import Selection, calibration_episodes, selection_of
from rfsq.calibration.readout import fit_readout
from rfsq.calibration.recovered import fit_recovered_details
from rfsq.calibration.report import recovered_latent_reach
from rfsq.calibration.settings import DEFAULT_READOUT, CalibrationConfig, Method, ReadoutConfig, RecoveredConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset


def calibrate(
    checkpoint: Checkpoint,
    dataset: ActionDataset,
    config: CalibrationConfig,
    readout: ReadoutConfig = DEFAULT_READOUT,
) -> Checkpoint:
    """The checkpoint with conditioning constants, a readout where one is kept and, under `calibrated`, provenance.

    Earlier ones are replaced. provenance["calibrated"]["remark"]: str, what became of the readout, and why.
    """
    episodes = calibration_episodes(checkpoint, dataset)
    constants = fit_constants(checkpoint, episodes, config)
    bound = float(worst_case_errors(constants, checkpoint.config.num_levels)[-1])
    fitted = replace(checkpoint, readout=None).with_fit(constants=constants)
    is_training_data = selection_of(checkpoint, dataset) is Selection.TRAINING_SPLIT
    fit = fit_readout(fitted, episodes, readout, is_training_data=is_training_data)
    facts = _provenance(checkpoint, dataset, episodes, asdict(config)) | {
        "worst_case_latent_error": bound,
        "readout": fit.facts(readout),
        "remark": fit.remark,
    }
    return fitted.with_fit(readout=fit.readout, provenance={Method.CALIBRATED.value: facts})


def recover(
    checkpoint: Checkpoint, dataset: ActionDataset, prefixes: tuple[int, ...], config: RecoveredConfig
) -> Checkpoint:
    """The checkpoint with recovered decoders and, under `recovered`, their provenance; earlier ones are replaced.

    provenance["recovered"]["remark"]: str, what a person should know about the fit; mostly empty.
    """
    episodes = calibration_episodes(checkpoint, dataset)
    fits = fit_recovered_details(checkpoint, episodes, prefixes, config)
    facts = _provenance(checkpoint, dataset, episodes, asdict(config)) | {
        "prefixes": {
            str(prefix): {
                "rank": fit.regression.rank,
                "unknowns": fit.unknowns,
                "condition": fit.regression.condition,
                "refinements": fit.refinements,
                "ridge": fit.ridge,
                "worst_case_latent_error": recovered_latent_reach(fit.decoder, checkpoint.config.num_levels) + 1,
            }
            for prefix, fit in fits.items()
        },
        "remark": "\n".join(fit.remark for fit in fits.values() if fit.remark),
    }
    decoders = {prefix: fit.decoder for prefix, fit in fits.items()}
    return checkpoint.with_fit(recovered=decoders, provenance={Method.RECOVERED.value: facts})


def _provenance(
    checkpoint: Checkpoint, dataset: ActionDataset, episodes: ActionDataset, config: dict[str, Any]
) -> dict[str, Any]:
    return {
        "config": {name: value.value if isinstance(value, StrEnum) else value for name, value in config.items()},
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "selection": selection_of(checkpoint, dataset).value,
            "episodes": len(episodes.episodes),
            "steps": episodes.num_steps,
        },
    }
