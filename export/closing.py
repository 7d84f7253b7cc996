"""The tables that a build ends with: what each gate measured, and what the tokens are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rfsq.calibration.readout import held_out_warning
from rfsq.export.progress import table
from rfsq.export.reference import AS_TRAINED, REFITTED
from rfsq.runtime.bundle.fidelity import Fidelity
from rfsq.runtime.bundle.manifest import ParityEntry


def closing_tables(
    parity: Sequence[ParityEntry], quality: Mapping[str, float], verdict: Fidelity | None, judged_on: str
) -> str:
    """quality, verdict: of the steps that `judged_on` names, see `BuildResult`."""
    gates = [
        (
            f"{'✓' if entry.value <= entry.limit else '✗'} {entry.backend} ({entry.device}), {entry.gate}",
            f"{entry.value:.4g}",
            f"{entry.limit:.4g}",
            f"{entry.steps}",
        )
        for entry in parity
    ]
    parts = [table(("gate", "measured", "limit", "steps"), gates)]
    parts += _details(parity)
    if quality:
        rows = [(name, f"{value:.3e}") for name, value in quality.items()]
        heads = (f"{judged_on}, decoded from", "action MSE, normalised units²")
        remark = held_out_warning(quality[AS_TRAINED], quality.get(REFITTED), judged_on, "normalised units²")
        parts.append("\n".join((table(heads, rows), *filter(None, [remark]))))
    if verdict is not None:
        parts.append(verdict.table(f"{judged_on}, all layers"))
    return "\n" + "\n\n".join(parts)


def _details(parity: Sequence[ParityEntry]) -> list[str]:
    """What the gates have to say beside their numbers, with the engines that it is about."""
    engines: dict[str, list[str]] = {}
    for entry in parity:
        if entry.detail:
            engines.setdefault(f"{entry.gate}: {entry.detail}", []).append(f"{entry.backend} ({entry.device})")
    return [f"{', '.join(names)}, {text}" for text, names in engines.items()]
