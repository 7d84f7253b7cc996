"""One pytest session in a process of its own: to learn which test runs which line, or to judge one mutant."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import Phase, settings

#: Module (its file below the root) and line.
Line = tuple[str, int]


@dataclass
class Test:
    """What one test costs and which lines it runs, with those of the fixtures that it uses."""

    seconds: float
    cpu_seconds: float
    lines: set[Line] = field(default_factory=set)


def run_pytest(files: Sequence[str], temporary: Path, plugin: object) -> int:
    """The exit status of pytest; the same examples of hypothesis each time, and what fails is not made smaller."""
    settings.register_profile(
        "mutants", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
    )
    arguments = [*files, "-x", "-q", "--assert=plain", f"--basetemp={temporary}", "-p", "no:cacheprovider"]
    return int(pytest.main([*arguments, "-p", "no:faulthandler"], plugins=[plugin, _Profile()]))


class _Profile:
    def pytest_configure(self) -> None:
        settings.load_profile("mutants")


class Recorder:
    """Lines of `modules` that each test runs. Those of a fixture count for every test that uses it.

    A test with the mark `own_trace` sets its own function for that, which no other sees past: it counts for all lines.
    """

    def __init__(self, root: Path, modules: Sequence[str]) -> None:
        self._of_file = {str(root / "rfsq" / module): self._line_recorder(module) for module in modules}
        self._every = {
            (module, number)
            for module in modules
            for number, _ in enumerate((root / module).read_text().splitlines(), start=1)
        }
        self.tests: dict[str, Test] = {}
        #: Run while the tests were collected: what stands outside of functions.
        self.imported: set[Line] = set()
        self._fixtures: dict[str, set[Line]] = {}
        self._into = [self.imported]

    def start(self) -> None:
        sys.settrace(self._trace)
        threading.settrace(self._trace)

    def stop(self) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]  # Its stub lacks what its documentation names.

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        lines: set[Line] = set()
        self._into = [lines]
        begin, cpu = time.perf_counter(), _cpu_seconds()
        if item.get_closest_marker("own_trace") is None:
            self.start()  # A test may have ended tracing.
        else:
            lines |= self._every
            self.stop()
        try:
            return (yield)
        finally:
            self.tests[item.nodeid] = Test(time.perf_counter() - begin, _cpu_seconds() - cpu, lines)
            for name in getattr(item, "fixturenames", ()):
                lines |= self._fixtures.get(name, set())

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        lines = self._fixtures.setdefault(fixturedef.argname, set())
        self._into.append(lines)
        try:
            return (yield)
        finally:
            self._into.remove(lines)
            self._into[-1].update(lines)

    def write(self, file: Path) -> None:
        tests = {name: [test.seconds, test.cpu_seconds, sorted(test.lines)] for name, test in self.tests.items()}
        file.write_text(json.dumps([tests, sorted(self.imported)]))

    @staticmethod
    def read(file: Path) -> tuple[dict[str, Test], set[Line]]:
        """Tests by their names, and the lines run at import."""
        tests, imported = json.loads(file.read_text())
        return (
            {name: Test(seconds, cpu, set(map(tuple, lines))) for name, (seconds, cpu, lines) in tests.items()},
            set(map(tuple, imported)),
        )

    def _trace(self, frame: FrameType, _event: str, _argument: object) -> Any:
        record = self._of_file.get(frame.f_code.co_filename)
        if record is not None:
            record(frame, "line", None)
        return record

    def _line_recorder(self, module: str) -> Callable[[FrameType, str, object], Any]:
        """One for all calls: tests that count memory would see one that is made for each."""

        def record(frame: FrameType, event: str, _argument: object) -> Any:
            if event == "line":
                self._into[-1].add((module, frame.f_lineno))
            return record

        return record


class Chosen:
    """Runs these tests alone, in this order; a test that takes far longer than it should ends the process."""

    def __init__(self, tests: Mapping[str, Test]) -> None:
        self._tests = tests
        self._order = {name: index for index, name in enumerate(tests)}
        # Open as long as the process lives.
        self._nowhere = os.open(os.devnull, os.O_WRONLY)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        expected = self._tests[item.nodeid]
        # The time of the processor tells a loop without end on a busy machine, too; the other one tells a deadlock.
        signal.setitimer(signal.ITIMER_PROF, 5 + 5 * expected.cpu_seconds)
        faulthandler.dump_traceback_later(30 + 10 * expected.seconds, exit=True, file=self._nowhere)


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
