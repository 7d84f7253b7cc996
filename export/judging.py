"""Holds backends against every gate, and says what they measured and what the tokens are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from rfsq.calibration.readout import held_out_warning
from rfsq.export.parity import batches, judges_of
from rfsq.export.parity_data import Section
from rfsq.export.proving import failures
from rfsq.export.reference import AS_TRAINED, REFITTED, Reference
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.console import aligned
from rfsq.runtime.bundle.fidelity import Fidelity
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import ModelEntry, ParityEntry


def prove(
    model: ModelEntry,
    golden: Golden,
    reference: Reference,
    sections: Sequence[Section],
    backends: Sequence[Backend],
) -> tuple[tuple[ParityEntry, ...], list[str]]:
    """Run the backends through all gates; a line for every red one."""
    judges = judges_of(backends, reference, model)
    total = sum(section.num_steps for section in sections)
    with tqdm(total=total, desc="  parity", unit="step", unit_scale=True, leave=False, disable=None) as progress:
        for answers in batches(reference, sections):
            for judge in judges:
                judge.judge(answers)
            progress.update(answers.float32.num_steps)
    parity = tuple(entry for judge in judges for entry in judge.entries())
    problems = failures(parity)
    for backend in backends:
        problems += [f"{backend.name}, golden vectors: {check}" for check in replay(golden, model, backend).failures]
    return parity, problems


def closing_tables(
    parity: Sequence[ParityEntry], quality: Mapping[str, float], verdict: Fidelity | None, judged_on: str
) -> str:
    """quality: action MSE in normalised units, by what was decoded; both it and verdict of what `judged_on` names."""
    gates = [
        (
            f"{'✓' if entry.value <= entry.limit else '✗'} {entry.backend} ({entry.device}), {entry.gate}",
            f"{entry.value:.4g}",
            f"{entry.limit:.4g}",
            f"{entry.steps}",
        )
        for entry in parity
    ]
    parts = ["\n".join(aligned([("gate", "measured", "limit", "steps"), *gates], is_ruled=True))]
    parts += _details(parity)
    if quality:
        rows = [(name, f"{value:.3e}") for name, value in quality.items()]
        heads = (f"{judged_on}, decoded from", "action MSE, normalised units²")
        remark = held_out_warning(quality[AS_TRAINED], quality.get(REFITTED), judged_on, "normalised units²")
        parts.append("\n".join((*aligned([heads, *rows], is_ruled=True), *filter(None, [remark]))))
    if verdict is not None:
        parts.append(verdict.table(f"{judged_on}, all layers"))
    return "\n" + "\n\n".join(parts)


def _details(parity: Sequence[ParityEntry]) -> list[str]:
    """The remarks of the gates, each with the engines that it concerns."""
    engines: dict[str, list[str]] = {}
    for entry in parity:
        if entry.detail:
            engines.setdefault(f"{entry.gate}: {entry.detail}", []).append(f"{entry.backend} ({entry.device})")
    return [f"{', '.join(names)}, {text}" for text, names in engines.items()]
