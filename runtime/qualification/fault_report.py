"""What the injected faults were answered with, and what was wrong: for people, and as a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Lines of problems that fit a screen beside the groups of faults.
_SHOWN = 8


@dataclass
class FaultReport:
    """Faults that were injected.

    answered: by kind, how often which answer was given; groups: the group of each kind; problems: what was wrong;
    failed: the kinds that it was wrong with. where: what the faults were injected into; facts: other figures, for the
    document; remarks: the same for people.
    """

    where: str = ""
    seconds: float = 0.0
    answered: dict[str, Counter[str]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def add(self, group: str, kind: str, answer: str, problems: Sequence[str]) -> None:
        """Count one fault, and note what was wrong with it."""
        self.groups[kind] = group
        self.answered.setdefault(kind, Counter())[answer] += 1
        self.problems += [f"{kind}: {problem}" for problem in problems]
        if problems:
            self.failed.add(kind)

    @property
    def faults(self) -> int:
        return sum(answers.total() for answers in self.answered.values())

    @property
    def holds(self) -> bool:
        return not self.problems

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.facts, "answered": self.answered, "problems": self.problems, "seconds": self.seconds}

    def text(self, *, is_verbose: bool = True) -> str:
        """A line for each kind of fault, or for each group of kinds alone; what failed comes first."""
        lines = [f"{self.faults} faults of {len(self.answered)} kinds {self.where}, {self.seconds:.1f} s:"]
        lines += sorted(self._kinds() if is_verbose else self._groups(), key=lambda line: "✗" not in line)
        lines += [*self.remarks, f"{_sign(self.holds)} {len(self.problems)} things were wrong"]
        shown = self.problems if is_verbose else self.problems[:_SHOWN]
        lines += shown
        if len(shown) < len(self.problems):
            lines.append(f"… and {len(self.problems) - len(shown)} more; -v shows them all")
        return "\n".join(lines)

    __str__ = text

    def _kinds(self) -> Iterator[str]:
        for kind, answers in sorted(self.answered.items()):
            yield f"  {_sign(kind not in self.failed)} {kind:60} {answers.total():5}  {_listed(answers)}"

    def _groups(self) -> Iterator[str]:
        for group in dict.fromkeys(self.groups.values()):
            kinds = [kind for kind, found in self.groups.items() if found == group]
            statuses: Counter[str] = Counter()
            for kind in kinds:
                for answer, count in self.answered[kind].items():
                    statuses[answer.removesuffix(" is_latched").removesuffix(" is_held")] += count
            sign = _sign(self.failed.isdisjoint(kinds))
            yield f"  {sign} {group:29} {len(kinds):2} kinds {statuses.total():6}  {_listed(statuses)}"


def _sign(is_right: bool) -> str:
    return "✓" if is_right else "✗"


def _listed(answers: Counter[str]) -> str:
    return ", ".join(f"{answer} {count}" for answer, count in answers.most_common())
