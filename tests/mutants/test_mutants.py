"""The measure of the tests is tested itself: which faults it makes, and that a mutant is what the tests then see."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, TESTS
from tests.mutants.forks import forked
from tests.mutants.mutations import mutations


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b <= c", {"x = (a <= b <= c)", "x = (a < b < c)"}),
        ("x = a is not b", {"x = (a is b)"}),
        ("x = a + b", {"x = (a - b)"}),
        ("x = a and b", {"x = (a or b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = 3", {"x = 4"}),
        ("x = 0.5", {"x = 1.0"}),
        ("x = 'word'", {'x = ""'}),
        ("x = ''", {'x = "mutant"'}),
        ("x = True", {"x = False"}),
        ("x += a", {"x -= a", "pass"}),
        ("x.y = a", {"pass"}),
        ("x = np.ceil(a)", {"x = np.floor(a)"}),
        ("f(a)", {"pass"}),
        ("raise E(f'{a}' + 'b')", {"pass"}),
        ("def f(a=1): return a", {"def f(a=2): return a", "def f(a=1): return None"}),
        ("if a: pass", {"if True: pass", "if False: pass"}),
        ("while a: break", {"while False: break", "while a: continue"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if True]", "x = [a for a in b if False]"}),
        ("x = a if b else c", {"x = a if True else c", "x = a if False else c"}),
    ],
)
def test_each_kind_of_fault_is_made(source: str, expected: set[str]) -> None:
    assert {mutation.apply(source) for mutation in mutations(source)} == expected


@pytest.mark.parametrize(
    "source",
    [
        "'''Docstring.'''",
        "x: Literal[1]",
        "assert a < 1",
        "@f(1)\nclass A: pass",
        "f'{a:.1f}'",
        "import a",
        "x = None",
        "x = zip(a, b, strict=True)",
    ],
)
def test_what_no_behaviour_follows_from_is_left_alone(source: str) -> None:
    assert mutations(source) == []


def test_a_mutation_says_where_it_is() -> None:
    source = "class A:\n    def f(self, a):\n        if (\n            a == 'ß'\n        ):\n            return a > 1\n"
    found = {mutation.after: mutation for mutation in mutations(source)}
    comparison, constant = found['a == ""'], found["return a > 2"]
    assert (comparison.scope, comparison.line, comparison.first_line, comparison.last_line) == ("A.f", 4, 3, 5)
    assert (constant.line, constant.first_line, constant.last_line) == (6, 6, 6)
    assert constant.before == "return a > 1"


@pytest.mark.parametrize("module", TESTS)
def test_every_mutant_is_python(module: str) -> None:
    source = (ROOT / module).read_text()
    found = mutations(source)
    assert found
    for mutation in found[::20]:
        changed = mutation.apply(source)
        assert changed != source
        ast.parse(changed)


@pytest.mark.parametrize("module", TESTS)
def test_every_module_has_tests(module: str) -> None:
    assert all(any(ROOT.glob(pattern)) for pattern in TESTS[module])


def test_a_process_that_a_test_starts_runs_the_mutant(tmp_path: Path) -> None:
    mutant = tmp_path / "mutant.py"
    mutant.write_text("X = 'the mutant'\n")
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "module.py").write_text("X = 'the source'\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "mutants" / "hook"), str(tmp_path)]),
        "RFSQ_MUTANT": f"room.module:{mutant}",
    }
    command = [sys.executable, "-c", "import room.module as m; print(m.X, m.__file__)"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == f"the mutant {tmp_path / 'room' / 'module.py'}\n"


def test_tasks_run_in_processes_of_their_own(tmp_path: Path) -> None:
    def die(_: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def fail(_: int) -> int:
        raise ValueError("a reason")

    tasks = [lambda _: 0, lambda _: 7, die, fail]
    ended = {task.index: (task.status, task.output.read_text()) for task in forked(tasks, 1, tmp_path)}
    assert ended == {0: (0, ""), 1: (7, ""), 2: (-signal.SIGKILL, ""), 3: (3, "ValueError: a reason\n")}
