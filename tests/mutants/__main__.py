"""What would the tests miss? Puts one small fault after the other into the modules that safety rests on.

    python -m tests.mutants [runtime/bundle/golden.py …] [--sample 100] [--jobs 2]

For every module, the tests in `TESTS` run once, to learn which of them runs which line. Then, for each mutant, those
that run the changed line, the quickest first, until one fails. Libraries are imported once: every mutant is a fork of
this process. Prints a table and the survivors, and writes both to build/mutants.json. Exit status 0: in every module at
least 95 % were killed; 1: fewer; 2: the tests fail without any mutant, or an entry of equivalent.toml fits none.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.mutants.forks import forked
from tests.mutants.mutations import Mutation, mutations
from tests.mutants.session import Chosen, Line, Recorder, Test, run_pytest

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
HOOK = Path(__file__).with_name("hook")
#: Of the mutants that are not equivalent to the source.
LIMIT = 0.95
#: Seconds of tests for one mutant; those behind them, the slowest, are left out.
BUDGET = 40.0
#: Imported before the first fork: what takes long and is not ours.
LIBRARIES = (
    "numpy", "torch", "onnx", "onnxruntime", "pyarrow.parquet", "h5py", "zarr", "safetensors.torch", "scipy.stats",
    "matplotlib.pyplot", "hypothesis.extra.numpy", "anyio.pytest_plugin", "xdist.plugin", "_pytest.pytester", "pdb",
)  # fmt: skip

_CONTROL = "tests/runtime/control/test_*.py"
_BUNDLE = (
    *(f"tests/runtime/bundle/test_{name}.py" for name in ("bundle", "manifest", "golden", "validation")),
    "tests/runtime/test_tokenizer.py",
)
_REFERENCE = tuple(
    f"tests/rfsq_ref/test_{name}.py" for name in ("quantizer", "rounding", "rounding_numbers", "autoencoder")
)
_BELIEFS = (
    "tests/runtime/test_beliefs.py",
    "tests/runtime/test_honest_beliefs.py",
    "tests/runtime/bundle/test_belief_validation.py",
    "tests/runtime/bundle/test_probabilities.py",
)
#: Patterns of the tests that a module answers to.
TESTS: dict[str, tuple[str, ...]] = {
    "runtime/control/guard.py": (_CONTROL,),
    "runtime/control/queue.py": (_CONTROL,),
    "runtime/control/beliefs.py": (_CONTROL,),
    "runtime/control/decoder.py": (_CONTROL,),
    "runtime/control/loop.py": (_CONTROL,),
    "runtime/control/result.py": (_CONTROL,),
    "runtime/control/order.py": (_CONTROL,),
    "runtime/control/tick_log.py": (_CONTROL,),
    "runtime/bundle/validation.py": _BUNDLE,
    "runtime/bundle/folder.py": _BUNDLE,
    "runtime/bundle/manifest.py": (*_BUNDLE, "tests/export/test_bundle_writer.py"),
    "runtime/bundle/golden.py": _BUNDLE,
    "runtime/backends/replay.py": (*_BUNDLE, "tests/export/test_parity.py"),
    "runtime/bundle/gates.py": ("tests/runtime/bundle/test_gates.py", "tests/runtime/bundle/test_golden.py"),
    "export/parity.py": ("tests/export/test_parity*.py",),
    "rfsq_ref/quantizer.py": _REFERENCE,
    "rfsq_ref/rounding.py": _REFERENCE,
    "rfsq_ref/beliefs.py": ("tests/rfsq_ref/test_beliefs.py",),
    "runtime/bundle/probabilities.py": _BELIEFS,
    "runtime/bundle/belief_validation.py": _BELIEFS,
}


class CannotJudgeError(Exception):
    """Something other than a mutant is wrong."""


@dataclass(frozen=True)
class Mutant:
    """source: of the module, with the mutation in it."""

    module: str
    mutation: Mutation
    source: str
    tests: dict[str, Test]
    reason: str = ""

    def __str__(self) -> str:
        scope = f" in {self.mutation.scope}" if self.mutation.scope else ""
        return f"{self.module}:{self.mutation.line}{scope}\n    - {self.mutation.before}\n    + {self.mutation.after}"


@dataclass
class Score:
    killed: int = 0
    timed_out: int = 0
    equivalent: list[Mutant] = field(default_factory=list)
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.killed + len(self.survivors)

    @property
    def share(self) -> float:
        return self.killed / self.total if self.total else 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    begin = time.monotonic()
    # Whoever ends this ends its forks, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)
    # What is here already is not to be looked at again in every fork.
    gc.collect()
    gc.freeze()
    work = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        mutants = _mutants(options, work)
        scores = _judge(mutants, options, work)
    except CannotJudgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _report(scores, options.output)
    print(f"{len(mutants)} mutants in {time.monotonic() - begin:.0f} s")
    return 0 if all(score.share >= LIMIT for score in scores.values()) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", help=f"default: all of {', '.join(TESTS)}", metavar="module")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants of each module alone")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--lines", default="", help="mutants of these lines alone, such as 20-40", metavar="FIRST-LAST")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutants.json")
    options = parser.parse_args(arguments)
    unknown = [module for module in options.modules if module not in TESTS]
    if unknown:
        parser.error(f"no tests are named for {', '.join(unknown)}; expected some of {', '.join(TESTS)}")
    options.modules = options.modules or list(TESTS)
    return options


def _mutants(options: argparse.Namespace, work: Path) -> list[Mutant]:
    """All that are asked for, each with the tests that may see it."""
    covered = _coverage(options, work)
    first, _, last = options.lines.partition("-")
    found = []
    for module in options.modules:
        reasons = _reasons(module)
        source = (ROOT / module).read_text()
        every = mutations(source)
        unused = reasons.keys() - {_key(mutation) for mutation in every}
        if unused:
            scope, before, after = min(unused)
            raise CannotJudgeError(
                f"{EQUIVALENT.name} has an entry for {module} in {scope!r} that fits nothing there any more, remove it "
                f"or write it anew:\n    - {before}\n    + {after}"
            )
        if first:
            every = [mutation for mutation in every if int(first) <= mutation.line <= int(last or first)]
        if options.sample and options.sample < len(every):
            every = random.Random(f"{options.seed} {module}").sample(every, options.sample)
        tests, imported = covered[module]
        found += [
            Mutant(
                module, mutation, mutation.apply(source), _tests_of(module, mutation, tests, imported),
                reasons.get(_key(mutation), ""),
            )
            for mutation in every
        ]  # fmt: skip
    return found


def _key(mutation: Mutation) -> tuple[str, str, str]:
    return mutation.scope, mutation.before, mutation.after


def _reasons(module: str) -> dict[tuple[str, str, str], str]:
    """Why a mutant cannot be told from the source."""
    entries = tomllib.loads(EQUIVALENT.read_text()).get("mutant", []) if EQUIVALENT.exists() else []
    return {
        (entry["scope"], entry["before"], entry["after"]): entry["reason"]
        for entry in entries
        if entry["module"] == module
    }


def _tests_of(module: str, mutation: Mutation, tests: dict[str, Test], imported: set[Line]) -> dict[str, Test]:
    """The quickest first, as many as fit into the budget."""
    lines = {(module, line) for line in range(mutation.first_line, mutation.last_line + 1)}
    # What is made at import is used by whoever uses the module. What nobody was seen to run, a process may have run
    # that a test has started.
    is_for_all = lines & imported or not any(lines & test.lines for test in tests.values())
    chosen: dict[str, Test] = {}
    spent = 0.0
    for name, test in sorted(tests.items(), key=lambda named: named[1].cpu_seconds):
        sees = lines & test.lines or (is_for_all and any(file == module for file, _ in test.lines))
        if sees and (not chosen or spent + test.cpu_seconds <= BUDGET):
            chosen[name] = test
            spent += test.cpu_seconds
    return chosen


def _coverage(options: argparse.Namespace, work: Path) -> dict[str, tuple[dict[str, Test], set[Line]]]:
    """Module to its tests and to the lines that are run at import."""
    files = {module: _files(TESTS[module]) for module in options.modules}
    every = sorted({file for part in files.values() for file in part})
    print(f"learning which tests run which lines: {len(every)} files", flush=True)
    tasks = [partial(_record, file, options.modules, work) for file in every]
    for ended in forked(tasks, options.jobs, work):
        if ended.status != 0:
            raise CannotJudgeError(
                f"{every[ended.index]} fails without any mutant (exit status {ended.status}):\n"
                f"{ended.output.read_text()[-3000:]}\nlook at it with: python -m pytest {every[ended.index]}"
            )
    recorded = {file: Recorder.read(_record_file(work, file)) for file in every}
    return {
        module: (
            {name: test for file in files[module] for name, test in recorded[file][0].items()},
            {line for file in files[module] for line in recorded[file][1]},
        )
        for module in options.modules
    }


def _files(patterns: Sequence[str]) -> list[str]:
    return sorted({str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)})


def _record_file(work: Path, file: str) -> Path:
    return work / f"{file.replace('/', '-')}.json"


def _record(file: str, modules: Sequence[str], work: Path, place: int) -> int:
    recorder = Recorder(ROOT, modules)
    recorder.start()
    status = run_pytest([file], work / f"tests-{place}", recorder)
    recorder.stop()
    recorder.write(_record_file(work, file))
    return status


def _judge(mutants: Sequence[Mutant], options: argparse.Namespace, work: Path) -> dict[str, Score]:
    scores = {module: Score() for module in options.modules}
    judged = [mutant for mutant in mutants if not mutant.reason]
    for mutant in mutants:
        if mutant.reason:
            scores[mutant.module].equivalent.append(mutant)
    tasks = [partial(_run_mutant, mutant, work) for mutant in judged]
    for done, ended in enumerate(forked(tasks, options.jobs, work), 1):
        mutant, score = judged[ended.index], scores[judged[ended.index].module]
        if ended.status == 0:
            score.survivors.append(mutant)
            print(f"{done} of {len(judged)}: survived: {mutant}", flush=True)
        else:
            score.killed += 1
            score.timed_out += ended.status < 0
    for score in scores.values():
        score.survivors.sort(key=lambda mutant: mutant.mutation.start)
    return scores


def _run_mutant(mutant: Mutant, work: Path, place: int) -> int:
    if not mutant.tests:
        return 0
    source = work / f"mutant-{place}.py"
    source.write_text(mutant.source)
    module = "rfsq." + mutant.module.removesuffix(".py").replace("/", ".")
    os.environ["RFSQ_MUTANT"] = f"{module}:{source}"
    os.environ["PYTHONPATH"] = str(HOOK)
    sys.path.insert(0, str(HOOK))
    sys.modules.pop("sitecustomize", None)
    importlib.import_module("sitecustomize")
    files = sorted({name.partition("::")[0] for name in mutant.tests})
    return run_pytest(files, work / f"tests-{place}", Chosen(mutant.tests))


def _report(scores: dict[str, Score], output: Path) -> None:
    print(f"\n{'module':28}{'mutants':>8}{'killed':>8}{'survived':>10}{'equivalent':>12}{'share':>9}")
    for module, score in scores.items():
        sign = "✓" if score.share >= LIMIT else "✗"
        print(
            f"{module:28}{score.total:8}{score.killed:8}{len(score.survivors):10}{len(score.equivalent):12}"
            f"{100 * score.share:7.1f} % {sign}"
        )
    for score in scores.values():
        for mutant in score.survivors:
            print(f"{mutant}" if mutant.tests else f"{mutant}\n    no test runs this line")
    content = {
        module: {
            "mutants": score.total,
            "killed": score.killed,
            "timed_out": score.timed_out,
            "survivors": [_as_json(mutant) for mutant in score.survivors],
            "equivalent": [_as_json(mutant) for mutant in score.equivalent],
        }
        for module, score in scores.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(output)


def _as_json(mutant: Mutant) -> dict[str, object]:
    mutation = mutant.mutation
    return {
        "line": mutation.line,
        "scope": mutation.scope,
        "before": mutation.before,
        "after": mutation.after,
        "tests": len(mutant.tests),
        "reason": mutant.reason,
    }


if __name__ == "__main__":
    sys.exit(main())
