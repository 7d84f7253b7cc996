"""What chunk tokens are worth, prefix by prefix and class by class: tables to read, report.json and report.png."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.calibration.chunk import broad_classes
from rfsq.calibration.chunk_windows import batches, windows
from rfsq.calibration.data import mean_square
from rfsq.calibration.tables import Table
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime.bundle.fidelity import Fidelity, Grade, fidelity
from rfsq.runtime.bundle.paths import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What `fidelity` calls these tokens.
MODE = "chunk"
#: To judge on, sampled where there are more.
_MOST_WINDOWS = 20_000
#: Of the windows, what broad classes code where there are enough data. Of the embedded demonstrations they code none.
_MOST_BROAD = 0.5


class ClassKind(StrEnum):
    """Of windows alike, of all windows at one of three sizes, or of windows that no other class holds."""

    LEARNED = "learned"
    BROAD = "broad"
    ESCAPE = "escape"


@dataclass(frozen=True)
class PrefixReport:
    """The first num_tokens tokens of every window. mse: in normalised units²; the others for each action dimension in
    the robot's units: root mean square, 99th percentile and largest of the errors, and the most by which an action
    within the normaliser's range can err, None for numbers of tokens that the code does not bound."""

    num_tokens: int
    bits_per_step: float
    mse: float
    rms: tuple[float, ...]
    p99: tuple[float, ...]
    largest: tuple[float, ...]
    bound: tuple[float, ...] | None


@dataclass(frozen=True)
class ClassReport:
    """share: of the windows that the class codes; mse: of those, for each prefix, empty where there are none."""

    kind: ClassKind
    share: float
    mse: tuple[float, ...]


@dataclass(frozen=True)
class ChunkReport:
    """dimensions: their names, or none; clipped: share of the numbers in all actions that lie beyond what tokens can
    say; classes: by their number; fidelity: of all tokens."""

    source: str
    num_episodes: int
    num_windows: int
    sizes: ChunkSizes
    dimensions: tuple[str, ...]
    clipped: float
    prefixes: tuple[PrefixReport, ...]
    classes: tuple[ClassReport, ...]
    fidelity: Fidelity


def reported_prefixes(num_tokens: int, budgets: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of tokens to report on: of 45 these are 1, 2, 4, 8, 16, 30, 36, 45."""
    return tuple(sorted({1, min(2, num_tokens), *budgets, round(0.8 * num_tokens) or 1, num_tokens}))


@torch.no_grad()
def report_chunk(checkpoint: ChunkCheckpoint, episodes: ActionDataset) -> ChunkReport:
    """Judge on windows of these episodes. DataError for another action dimension than the tokens'."""
    sizes = checkpoint.sizes
    if episodes.action_dim != sizes.action_dim:
        raise DataError(
            f"{episodes.source} has {episodes.action_dim} action dimensions, the chunk tokens {sizes.action_dim}; "
            "judge them on actions of the robot that they were fitted to"
        )
    model = checkpoint.model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = windows(episodes.episodes, sizes.chunk_length, _MOST_WINDOWS, generator)
    actions = rows.reshape(-1, sizes.chunk_length, sizes.action_dim)
    tokens = torch.cat([model.encode(part) for part in batches(actions, sizes)])
    classes = _classes_of(model, tokens)
    prefixes, errors = [], []
    for num_tokens in reported_prefixes(sizes.num_tokens, model.code.budgets):
        error = _decoded(model, tokens[:, :num_tokens]) - actions
        prefixes.append(_prefix(model, num_tokens, error))
        errors.append((error / model.units).square().mean(dim=(1, 2)))
    deepest = (actions + error).flatten(0, 1)
    return ChunkReport(
        source=episodes.source,
        num_episodes=len(episodes.episodes),
        num_windows=len(actions),
        sizes=sizes,
        dimensions=episodes.dimensions,
        clipped=float((model.normalised(actions).abs() > 1).double().mean()),
        prefixes=tuple(prefixes),
        classes=_classes(sizes, classes, torch.stack(errors, dim=1)),
        fidelity=fidelity(actions.flatten(0, 1).numpy(), deepest.numpy(), model.units.tolist(), model.offset.tolist()),
    )


def _classes_of(model: ChunkTokenizer, tokens: Tensor) -> Tensor:
    return model.code.classes(model.code.bits(tokens))


@torch.no_grad()
def class_use(model: ChunkTokenizer, chunks: npt.NDArray[np.float32]) -> list[str]:
    """Lines about the classes that code chunks [n, T, A], none without any; model: in float64."""
    if not len(chunks):
        return []
    actions = torch.from_numpy(chunks).double()
    classes = torch.cat([_classes_of(model, model.encode(part)) for part in batches(actions, model.sizes)])
    counts = torch.bincount(classes, minlength=model.sizes.num_classes).double()
    return _use(model.sizes, (counts / len(chunks)).tolist())


def _decoded(model: ChunkTokenizer, tokens: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in batches(tokens, model.sizes)])


def draw_chunk(report: ChunkReport) -> "Figure":
    """The picture of a report."""
    # Not above, as in `draw_calibration`.
    from rfsq.calibration.chunk_report_plots import draw_chunk_report

    return draw_chunk_report(report)


def _prefix(model: ChunkTokenizer, num_tokens: int, error: Tensor) -> PrefixReport:
    """error: [n, T, A] in the robot's units."""
    sizes, steps = model.sizes, error.flatten(0, 1).abs().numpy()
    is_bounded = num_tokens in model.code.budgets
    return PrefixReport(
        num_tokens=num_tokens,
        bits_per_step=num_tokens * sizes.token_bits / sizes.chunk_length,
        mse=mean_square(error / model.units),
        rms=tuple(np.sqrt(np.square(steps).mean(axis=0)).tolist()),
        p99=tuple(np.quantile(steps, 0.99, axis=0).tolist()),
        largest=tuple(steps.max(axis=0).tolist()),
        bound=tuple(model.bound(num_tokens).tolist()) if is_bounded else None,
    )


def _classes(sizes: ChunkSizes, classes: Tensor, errors: Tensor) -> tuple[ClassReport, ...]:
    """classes: [n], of the windows; errors: [n, prefixes], their mean squared errors in normalised units²."""
    found = []
    for index, kind in enumerate(_kinds(sizes)):
        members = errors[classes == index]
        mse = tuple(members.mean(dim=0).tolist()) if len(members) else ()
        found.append(ClassReport(kind, len(members) / len(errors), mse))
    return tuple(found)


def _kinds(sizes: ChunkSizes) -> list[ClassKind]:
    """Of each class."""
    broad = broad_classes(sizes.num_classes)
    learned = sizes.num_classes - 1 - broad
    return [ClassKind.LEARNED] * learned + [ClassKind.BROAD] * broad + [ClassKind.ESCAPE]


# Text ---------------------------------------------------------------------------------------------------------------


def format_chunk_report(report: ChunkReport, *, is_verbose: bool = True) -> str:
    """A table with a row per prefix, and how the classes are used; is_verbose: also the errors of each dimension in the
    robot's units, those of each class, and good dimensions."""
    title = (
        f"chunk tokens, judged on {counted(report.num_episodes, 'episode')} ({counted(report.num_windows, 'window')}) "
        f"of {report.source}; normalised units; all but the MSE of the worst dimension"
    )
    sizes = report.sizes
    lines = [
        f"{sizes.num_tokens} tokens of {2**sizes.token_bits:,} words for {counted(sizes.chunk_length, 'step')} of "
        f"{counted(sizes.action_dim, 'dimension')}, in {sizes.num_classes} classes",
        Table.of(title, (_row(prefix, report.fidelity.unit) for prefix in report.prefixes)).text(),
        *_use(sizes, [row.share for row in report.classes]),
    ]
    if clipping := report.fidelity.clipping_in(MODE, report.dimensions):
        lines.append(f"{clipping}. Of all numbers {100 * report.clipped:.2g}% lie there")
    if report.dimensions:
        lines.append(f"dimensions: {', '.join(f'{place} {name}' for place, name in enumerate(report.dimensions))}")
    if is_verbose:
        columns: dict[str, Callable[[PrefixReport], tuple[float, ...] | None]] = {
            "RMS error": lambda prefix: prefix.rms,
            "99 % of errors are below": lambda prefix: prefix.p99,
            "largest error": lambda prefix: prefix.largest,
            "bound": lambda prefix: prefix.bound,
        }
        lines += ["", *(_by_dimension(report, name, column) for name, column in columns.items()), _by_class(report)]
    if is_verbose or report.fidelity.grade is not Grade.GOOD:
        lines.append(report.fidelity.text("decoded from all tokens", MODE))
    return "\n".join(lines)


def _row(prefix: PrefixReport, unit: tuple[float, ...]) -> dict[str, str]:
    def worst(values: tuple[float, ...] | None) -> str:
        return "–" if values is None else f"{max(value / one for value, one in zip(values, unit, strict=True)):.2e}"

    return {
        "tokens": str(prefix.num_tokens),
        "bits a step": f"{prefix.bits_per_step:.4g}",
        "MSE": f"{prefix.mse:.2e}",
        "RMS error": worst(prefix.rms),
        "99 % below": worst(prefix.p99),
        "largest": worst(prefix.largest),
        "bound": worst(prefix.bound),
    }


def _use(sizes: ChunkSizes, shares: Sequence[float]) -> list[str]:
    """Lines about the shares of the windows that each class codes."""
    by_kind: dict[ClassKind, list[float]] = {kind: [] for kind in ClassKind}
    for kind, share in zip(_kinds(sizes), shares, strict=True):
        by_kind[kind].append(share)
    learned, broad = by_kind[ClassKind.LEARNED], sum(by_kind[ClassKind.BROAD])
    lines = [
        f"classes: {sum(share > 0 for share in learned)} of {len(learned)} learned ones code {sum(learned):.2%} of the "
        f"windows, one of them at most {max(learned):.2%}; broad ones {broad:.2%}, escape "
        f"{sum(by_kind[ClassKind.ESCAPE]):.2%}"
    ]
    if broad > _MOST_BROAD:
        lines.append(
            f"WARNING: broad classes code {broad:.0%} of the windows: the training episodes have little that is like "
            "them, so that the first tokens err more than they could; give more episodes"
        )
    return lines


def _by_dimension(report: ChunkReport, name: str, column: Callable[[PrefixReport], tuple[float, ...] | None]) -> str:
    rows = []
    for dimension in range(report.sizes.action_dim):
        row = {"tokens": report.dimensions[dimension] if report.dimensions else f"dimension {dimension}"}
        for prefix in report.prefixes:
            values = column(prefix)
            if values is not None:
                row[str(prefix.num_tokens)] = f"{values[dimension]:.2e}"
        rows.append(row)
    return Table.of(f"{name}, robot units", rows).text() + "\n"


def _by_class(report: ChunkReport) -> str:
    rows = []
    for index, found in enumerate(report.classes):
        errors = [f"{error:.2e}" for error in found.mse] or ["–"] * len(report.prefixes)
        columns = {str(prefix.num_tokens): error for prefix, error in zip(report.prefixes, errors, strict=True)}
        rows.append({"class": f"{index} {found.kind}", "share": f"{found.share:.2%}", **columns})
    return Table.of("MSE of each class by tokens, normalised units²", rows).text() + "\n"
