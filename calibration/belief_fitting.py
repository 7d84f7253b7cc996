"""From a file of a policy's logits to temperatures, scales and a report of how honest beliefs are."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.calibration.beliefs import (
    WITHIN_ONE,
    WITHIN_TWO,
    BeliefReport,
    BitLogits,
    PolicyLogits,
    StepLogits,
    TokenLogits,
    settings_of,
)
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.tables import Table
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.fingerprint import chunk_fingerprint, fingerprint
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.bundle.manifest import Manifest
from rfsq.runtime.bundle.paths import counted, replacing, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STEP, _TOKENS, _BITS = {"logits"}, {"logits"}, {"class_logits", "bit_logits"}
_LARGEST_ID = 2**62
#: Of choices, shown without -v.
_FEW = 12


def load_logits(path: Path, tokens: Checkpoint | ChunkCheckpoint, bundle: Manifest) -> tuple[PolicyLogits, list[int]]:
    """What a policy said, and the episode of each chunk. bundle: what decodes it, built from `tokens`.

    The file is an .npz with `actions` [N, T, A], the recorded chunks in physical units, `episode` [N], and what the
    policy said of each: `logits` [N, T, D, l, K] of per-step tokens or [N, l, V] of chunk tokens; or, of these,
    `class_logits` [N, C] and `bit_logits` [N, n], given the likeliest class. Raises CalibrationError.
    """
    _require_same(tokens, bundle)
    arrays = _read(path)
    actions, episodes = _floats(arrays, "actions", path), arrays["episode"]
    if actions.ndim != 3 or not actions.numel():
        raise CalibrationError(f"{path}: actions have shape {list(actions.shape)}; expected chunks [N, T, A]")
    if not torch.isfinite(actions).all():
        raise CalibrationError(f"{path}: actions hold NaN or infinity; leave these chunks out, with their logits")
    if episodes.shape != (len(actions),) or episodes.dtype.kind not in "iu" or (episodes > _LARGEST_ID).any():
        raise CalibrationError(
            f"{path}: episode is {episodes.dtype} {list(episodes.shape)}; expected an integer for each of "
            f"{len(actions)} chunks"
        )
    said = {name: _floats(arrays, name, path) for name in arrays.keys() - {"actions", "episode"}}
    for name, logits in said.items():
        is_whole = logits.ndim >= 2 and logits.numel() > 0 and len(logits) == len(actions)
        # Of bits, which are 1 or 0, each has a logit alone.
        largest = logits.amax(-1) if is_whole and name != "bit_logits" else torch.zeros(1)
        if not is_whole or (logits.isnan() | logits.isposinf()).any() or not torch.isfinite(largest).all():
            raise CalibrationError(
                f"{path}: {name} {list(logits.shape)} must have one row for each of {len(actions)} chunks, no NaN, no "
                "+inf, and a finite logit in each distribution"
            )
    if isinstance(tokens, ChunkCheckpoint):
        return _of_chunks(path, tokens, bundle, actions, said), episodes.tolist()
    return _of_steps(path, tokens, bundle, actions, said), episodes.tolist()


def _require_same(tokens: Checkpoint | ChunkCheckpoint, bundle: Manifest) -> None:
    """Raises CalibrationError for a checkpoint that the bundle was not built from."""
    mode = bundle.model.mode
    if isinstance(tokens, ChunkCheckpoint):
        found = chunk_fingerprint(tokens)
    elif mode == "chunk" or (mode == "recovered" and bundle.model.depth not in tokens.recovered):
        found = ""
    else:
        found = fingerprint(tokens, mode)
    if found != bundle.fingerprint:
        raise CalibrationError(
            f"the bundle {bundle.fingerprint[:16]}, of {mode} tokens, was not built from this checkpoint; give the "
            f"one that it was built from: where the build itself fitted it, {quoted('calibrate')} with the same data "
            "gives the same"
        )
    if bundle.model.has_stats:
        raise CalibrationError(
            f"{mode} tokens do not decode alone, so no beliefs of them do; build a calibrated bundle"
        )


def _of_chunks(
    path: Path, tokens: ChunkCheckpoint, bundle: Manifest, actions: Tensor, said: dict[str, Tensor]
) -> PolicyLogits:
    sizes, model = tokens.sizes, tokens.model(dtype=torch.float64)
    _check(path, "actions", actions, (sizes.chunk_length, sizes.action_dim))
    if said.keys() == _TOKENS:
        length = min(said["logits"].shape[1], sizes.num_tokens)
        _check(path, "logits", said["logits"], (length, 1 << sizes.token_bits))
        return TokenLogits(BeliefKind(bundle.fingerprint, "tokens", length, 0), model, actions, said["logits"])
    if said.keys() == _BITS:
        _check(path, "class_logits", said["class_logits"], (sizes.num_classes,))
        bits = said["bit_logits"]
        whole = min(max((bits.shape[1] + sizes.class_bits) // sizes.token_bits, 1), sizes.num_tokens)
        _check(path, "bit_logits", bits, (whole * sizes.token_bits - sizes.class_bits,))
        kind = BeliefKind(bundle.fingerprint, "classes and bits", whole, 0)
        return BitLogits(kind, model, actions, said["class_logits"], said["bit_logits"])
    raise CalibrationError(
        f"{path} has {', '.join(sorted(said)) or 'no logits'}; expected logits [N, l, V], or class_logits [N, C] and "
        "bit_logits [N, n], for chunk tokens"
    )


def _of_steps(
    path: Path, tokens: Checkpoint, bundle: Manifest, actions: Tensor, said: dict[str, Tensor]
) -> PolicyLogits:
    config, prefixes = tokens.config, bundle.model.prefixes
    _check(path, "actions", actions, (actions.shape[1], config.action_dim))
    if said.keys() != _STEP:
        raise CalibrationError(
            f"{path} has {', '.join(sorted(said)) or 'no logits'}; expected logits [N, T, D, l, K] for per-step tokens"
        )
    logits = said["logits"]
    length = logits.shape[3] if logits.ndim == 5 and logits.shape[3] in prefixes else prefixes[-1]
    _check(path, "logits", logits, (actions.shape[1], config.latent_dim, length, config.num_levels))
    conditioning = Conditioning.DYNAMIC if bundle.model.mode == "recovered" else Conditioning(bundle.model.mode)
    if bundle.model.mode == "recovered" and length not in tokens.recovered:
        raise CalibrationError(f"the checkpoint has no recovered decoder of {length} layers, as the bundle has")
    kind = BeliefKind(bundle.fingerprint, "tokens", length, prefixes[0])
    return StepLogits(kind, tokens.model(conditioning, dtype=torch.float64), actions, logits)


def _check(path: Path, name: str, array: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(array.shape[1:]) != shape:
        raise CalibrationError(
            f"{path}: {name} have shape {list(array.shape)}; expected [N, {', '.join(map(str, shape))}], as the "
            "tokenizer has it"
        )


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    # zipfile and numpy raise many kinds of errors for what is no archive of arrays.
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} is no .npz of arrays: {error}; write it with numpy.savez") from error
    if strange := sorted(name for name, array in arrays.items() if not isinstance(array, np.ndarray)):
        raise CalibrationError(f"{path}: {', '.join(strange)} are no arrays; write the file with numpy.savez")
    if missing := {"actions", "episode"} - arrays.keys():
        raise CalibrationError(
            f"{path} lacks {', '.join(sorted(missing))}; expected the recorded chunks and the episode of each"
        )
    return arrays


def _floats(arrays: dict[str, npt.NDArray[Any]], name: str, path: Path) -> Tensor:
    if arrays[name].dtype.kind != "f":
        raise CalibrationError(f"{path}: {name} is {shown(str(arrays[name].dtype))}; expected floating-point numbers")
    return torch.from_numpy(arrays[name].astype(np.float64))


def write_settings(report: BeliefReport, path: Path) -> None:
    """What the runtime takes. Raises CalibrationError."""
    with replacing(path, error=CalibrationError) as temporary:
        temporary.write_text(settings_of(report).text(), encoding="utf-8")


def format_beliefs(report: BeliefReport, *, is_verbose: bool) -> str:
    """Tables to read. is_verbose: whether every choice has a row."""
    shown_choices = report.choices if is_verbose else report.choices[:_FEW]
    rows = [
        {
            "choice": choice.name,
            "temperature": f"{choice.temperature:.2f}",
            "nats": f"{choice.nll[0]:.3f}",
            "after": f"{choice.nll[1]:.3f}",
            "calibration error": f"{100 * choice.ece[0]:.1f}%",
            "after it": f"{100 * choice.ece[1]:.1f}%",
        }
        for choice in shown_choices
    ]
    spreads = [
        {
            "decoded": spread.mode,
            f"within 1 std ({100 * WITHIN_ONE:.0f}%)": f"{100 * spread.within_one[0]:.1f}%",
            "after": f"{100 * spread.within_one[1]:.1f}%",
            f"within 2 std ({100 * WITHIN_TWO:.0f}%)": f"{100 * spread.within_two[0]:.1f}%",
            "after it": f"{100 * spread.within_two[1]:.1f}%",
            "scale of std": " ".join(f"{value:.2f}" for value in spread.scale or ()) or "none",
        }
        for spread in report.spreads
    ]
    title = f"of {counted(report.episodes, 'episode')}, each judged by a fit that leaves it out, {report.folds} fits"
    parts = [Table.of(f"what the policy chooses, {title}", rows).text()]
    if len(shown_choices) < len(report.choices):
        parts.append(f"{len(report.choices) - len(shown_choices)} more choices: -v shows all")
    parts.append(Table.of("recorded actions within the standard deviation", spreads).text())
    return "\n\n".join([*parts, *report.remarks])


def draw_beliefs(report: BeliefReport) -> "Figure":
    """Confidence against accuracy, before and after, and the shares of actions within one and two deviations."""
    from rfsq.calibration.belief_plots import draw_belief_report

    return draw_belief_report(report)
