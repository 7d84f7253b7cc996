"""What a comparison found: frozen, written as JSON and read back as the same types."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from rfsq.evidence.errors import EvidenceError
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.paths import replacing
from rfsq.runtime.bundle.reading import build, parse_json

#: A setting that misses a budget of bits by rounding is still at that budget.
SPILL = 1.005


def write_text(path: Path, text: str) -> None:
    """Through a temporary sibling: the old file stays whole until the new one is. Raises EvidenceError."""
    with replacing(path, error=EvidenceError) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Document:
    """What is kept as JSON, behind the name and version of its format. again: the command that writes it anew."""

    format: ClassVar[str]
    version: ClassVar[int]
    again: ClassVar[tuple[str, ...]]

    def write(self, path: Path) -> dict[str, Any]:
        """As strict JSON; returns all of it. Raises EvidenceError."""
        content = {"format": self.format, "format_version": self.version, **asdict(self)}
        write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        return content

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote. Raises EvidenceError for anything else."""
        again = command(*cls.again)
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvidenceError(f"cannot read {path}: {error}; write it with `{again}`") from error
        is_one = isinstance(content, dict)
        found = (content.pop("format", None), content.pop("format_version", None)) if is_one else None
        if found != (cls.format, cls.version):
            expected = (cls.format, cls.version)
            raise EvidenceError(f"{path} is {found}; expected {expected}: write it anew with `{again}`")
        try:
            return build(cls, content, "it")
        except ValueError as error:
            raise EvidenceError(f"{path} is damaged: {error}; write it anew with `{again}`") from error


@dataclass(frozen=True)
class Spread:
    """One number over the seeds. deviation: standard deviation with n - 1, 0 for a single seed."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Raises statistics.StatisticsError where there are none."""
        mean = statistics.fmean(values)
        return cls(mean, statistics.stdev(values) if len(values) > 1 else 0.0, tuple(values))

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: "Spread") -> "Spread":
        """Its ratio to another, seed by seed."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)])


#: By name.
Metrics = dict[str, Spread]


def metrics_of(numbers: Mapping[str, float]) -> Metrics:
    """Of one seed."""
    return {name: Spread.of([value]) for name, value in numbers.items()}


def over_seeds(reports: Sequence[Any]) -> Any:
    """One report from one or more of the same form, each of other seeds: every Spread gets the values of all of them.

    What is no Spread is taken from the first.

    >>> over_seeds([{"action_mse": Spread.of([1.0])}, {"action_mse": Spread.of([3.0])}])["action_mse"].mean
    2.0
    """
    first = reports[0]
    if isinstance(first, Spread):
        return Spread.of([value for spread in reports for value in spread.values])
    if isinstance(first, dict):
        return {name: over_seeds([part[name] for part in reports]) for name in first}
    if isinstance(first, tuple):
        return tuple(map(over_seeds, zip(*reports, strict=True)))
    if is_dataclass(first):
        return replace(first, **over_seeds([vars(part) for part in reports]))  # type: ignore[type-var]
    return first


@dataclass(frozen=True)
class ReportRow:
    """Some layers of a scheme. label: "L0", "L0–L2", …; level_share: [K], how often each level is used.

    metrics: of action_errors, and residual_std: of what the layer, or the first of several, is given, over all steps
    and latents; entropy_bits: of one step's tokens of these layers, each latent and layer coded on its own, by its own
    frequencies; latent_mse: against the latents that were encoded.
    """

    label: str
    metrics: Metrics
    level_share: tuple[Spread, ...]

    @property
    def mse(self) -> Spread:
        """Of actions, in normalised units²."""
        return self.metrics["action_mse"]


@dataclass(frozen=True)
class SchemeReport:
    """One of rfsq.evidence.schemes. checkpoints: names, empty for a single one; bits_per_layer: of one step, tokens and
    side information where it must travel; error_share: share of |action error| in each bin of Comparison.error_edges.

    prefixes: decoded from the layers 0 … l for every l, with the use of layer l alone; groups: coarse, fine and all
    layers, fine ones decoded with the coarse ones at their mean.
    """

    scheme: str
    checkpoints: tuple[str, ...]
    bits_per_layer: float
    prefixes: tuple[ReportRow, ...]
    groups: tuple[ReportRow, ...]
    error_share: tuple[float, ...]

    @property
    def mse(self) -> Spread:
        """Of actions, all layers decoded, in normalised units²."""
        return self.groups[-1].mse

    def bits(self, row: ReportRow) -> float:
        """Of one step, in the layers of a row of `prefixes` or `groups`."""
        labels = [prefix.label for prefix in self.prefixes]
        if row.label in labels:
            return (labels.index(row.label) + 1) * self.bits_per_layer
        # The fine layers: all but the coarse ones.
        return (len(labels) - 1 - labels.index(self.groups[0].label)) * self.bits_per_layer


@dataclass(frozen=True)
class CodecReport:
    """A peer's setting. series: of settings that one curve joins;
    partial: decodes a part of another's tokens; metrics: of action_errors, and bits_per_step."""

    family: str
    series: str
    name: str
    partial: bool
    metrics: Metrics

    @property
    def mse(self) -> float:
        """Of actions, in normalised units², over the seeds."""
        return self.metrics["action_mse"].mean

    @property
    def bits(self) -> float:
        """Of one step."""
        return self.metrics["bits_per_step"].mean


@dataclass(frozen=True)
class Curve:
    """Mean squared errors of a training in normalised units, by epoch; the weights of kept_epoch (from 1) stay."""

    train: tuple[float, ...]
    validation: tuple[float, ...]
    kept_epoch: int


@dataclass(frozen=True)
class Trajectory:
    """One held-out episode: actions as recorded and by label as decoded, [steps][A]."""

    episode: str
    recorded: tuple[tuple[float, ...], ...]
    decoded: dict[str, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class Finding:
    """A claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class DataFacts:
    """What was trained and judged on. mean_action_mse: error of always decoding the mean
    training action."""

    source: str
    sha256: str
    action_dim: int
    episodes: dict[str, int]
    steps: dict[str, int]
    mean_action_mse: float
    physical: dict[str, float] | None


@dataclass(frozen=True)
class Comparison(Document):
    """Everything that a comparison found.

    unquantised: errors of the autoencoders alone; curves: of what was trained, by the names in checkpoints;
    error_edges: edges of the bins of |error| in normalised units that error_share counts; remarks: what is missing
    and why, and how good the tokens are in the robot's units."""

    format, version, again = "rfsq-comparison", 1, ("compare",)

    data: DataFacts
    seeds: tuple[int, ...]
    settings: dict[str, str]
    versions: dict[str, str]
    checkpoints: dict[str, str]
    curves: dict[str, Curve]
    unquantised: dict[str, Metrics]
    schemes: tuple[SchemeReport, ...]
    peers: tuple[CodecReport, ...]
    error_edges: tuple[float, ...]
    trajectory: Trajectory
    improvement: float
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]
    peer_verdict: tuple[str, ...]

    def scheme(self, name: str) -> SchemeReport:
        """By name. Raises KeyError."""
        return {report.scheme: report for report in self.schemes}[name]
