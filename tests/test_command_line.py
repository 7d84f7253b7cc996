"""Every command takes the same words, ends with the same statuses, and shows as much as it was asked for."""

import ast
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime.bundle import advice
from rfsq.runtime.bundle.advice import COMMANDS
from rfsq.runtime.bundle.command import BACKENDS, CommandParser, Outcome
from rfsq.runtime.bundle.command import run as run_work
from rfsq.runtime.bundle.errors import InvalidInputError
from rfsq.runtime.qualification import compat, inspection, selftest
from tests.bundles import Recipe, random_actions, write_bundle

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "rfsq_ref", "calibration", "evidence", "export", "rfsq")
#: What no parser may need.
HEAVY = ("numpy", "torch", "onnx", "h5py", "pyarrow", "scipy", "matplotlib", "tqdm", "safetensors", "onnxruntime")
#: Arguments that a parser takes, and whose input nobody can use.
UNUSABLE = {
    "build": ["--checkpoint", "nowhere.pt", "--output", "out"],
    "selftest": ["nowhere"],
    "inspect": ["nowhere"],
    "bench": ["nowhere"],
    "compat": ["nowhere", "nowhere", "--data", "nowhere.npz"],
    "explain": ["nowhere", "--data", "nowhere.npz", "--output", "out.html"],
    "tokenize": ["nowhere", "--data", "nowhere.npz", "--output", "out.parquet"],
    "replay": ["nowhere", "nowhere.npz"],
    "calibrate": ["--checkpoint", "nowhere.pt", "--output", "out.safetensors", "--report-dir", "out"],
    "train": ["--data", "nowhere.npz", "--output", "out.safetensors"],
    "compare": ["--data", "nowhere.npz", "--output", "out"],
    "rollout": ["--report-only", "--episodes-dir", "nowhere", "--output", "out"],
}
every_command = pytest.mark.parametrize("name", COMMANDS)


def module(name: str) -> Any:
    return import_module(f"rfsq.{COMMANDS[name].module}")


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, env={"PATH": ""}
    )


# Help ----------------------------------------------------------------------------------------------------------------


def test_help_needs_no_package_and_ends_with_the_statuses() -> None:
    done = run(
        "-c",
        f"import sys, importlib\nfor name in {HEAVY}: sys.modules[name] = None\n"
        f"for name in {[entry.module for entry in COMMANDS.values()]}:\n"
        "    try: importlib.import_module(f'rfsq.{name}').main(['--help'])\n"
        "    except SystemExit as ended: print('status', ended.code, end='\\0')\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    *shown, rest = done.stdout.split("\0")
    assert (len(shown), rest) == (len(COMMANDS), "")
    for text in shown:
        words = " ".join(text.split())
        assert re.search(
            r"exit status: 0 done; 1 .*; 2 bad input or a missing package, as the message says; 130 interrupted", words
        )
        assert words.endswith("interrupted status 0")
        assert all(option in words for option in ("-v, --verbose", "-q, --quiet", "--json"))
        assert "%%" not in words


@every_command
def test_the_same_words_mean_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[CommandParser] = []
    monkeypatch.setattr(module(name), "run", lambda parser, *_: taken.append(parser))
    module(name).main([])
    actions = {option: action for action in taken[0]._actions for option in action.option_strings}
    positional = [action.metavar for action in taken[0]._actions if not action.option_strings]
    assert positional == {
        "compat": ["OLD", "NEW"], "replay": ["BUNDLE", "RECORD"],
        **{key: ["BUNDLE"] for key in ("selftest", "inspect", "bench", "explain", "tokenize")},
    }.get(name, [])  # fmt: skip
    assert ("--data" in actions) == ("--key" in actions) == ("--filter-key" in actions)
    assert ("--data" in actions) == (
        name in ("build", "calibrate", "train", "compare", "compat", "explain", "tokenize")
    )
    assert ("--output" in actions) == ("--overwrite" in actions)
    if "--backend" in actions:
        assert {*(actions["--backend"].choices or ())} - {"auto"} == {*BACKENDS}
        assert "default: " in str(actions["--backend"].help)
    if name in ("build", "calibrate"):
        assert actions["--calibration-data"] is actions["--data"]
    if name in ("build", "bench"):
        assert actions["--backends"] is actions["--backend"]


@pytest.mark.parametrize(
    ("name", "arguments", "advised"),
    [
        ("tokenize", ["a.npz", "b.parquet", "--bundle", "c"], "tokenize_dataset.py BUNDLE --data F --output PATH"),
        ("selftest", ["--bundle", "c"], "without --bundle: python runtime/selftest.py BUNDLE"),
        ("inspect", ["--bundle=c"], "without --bundle: python runtime/inspect_bundle.py BUNDLE"),
        ("bench", ["--quick", "--bundle", "c"], "without --bundle: python runtime/bench.py BUNDLE"),
        ("replay", ["a.npz", "--bundle", "c"], "without --bundle: python runtime/replay_flight.py BUNDLE RECORD"),
        ("build", ["--bundle", "c"], "build_engine.py --from-bundle DIR adds to one"),
        ("rollout", ["--results", "docs"], "--output now, and episodes are kept in --episodes-dir"),
    ],
)
def test_a_former_spelling_ends_with_the_new_one(
    name: str, arguments: list[str], advised: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module(name).main(arguments)
    assert ended.value.code == 2
    assert advised in capsys.readouterr().err


# Statuses and output -------------------------------------------------------------------------------------------------


@every_command
def test_a_choice_that_there_is_not_is_answered_with_those_that_there_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = (getattr(module(name), "parser", None) or module(name)._parser)()
    for action in parser._actions:
        if not action.choices or not action.option_strings:
            continue
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([action.option_strings[-1], "nothing"])
        # In their own words, not in Python's.
        said = capsys.readouterr().err.splitlines()[-1]
        assert all(re.search(rf"(?:['( ]){re.escape(str(choice))}(?:['),]|$)", said) for choice in action.choices), said
        assert "<" not in said


@every_command
def test_what_cannot_be_used_is_a_2_and_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ([], ["-q"], ["--json"]):
        assert module(name).main([*UNUSABLE[name], *options]) == 2
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert not [line for line in captured.out.splitlines() if not line.startswith("✗ load checkpoint")]


@every_command
def test_an_interrupt_is_130_and_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_options: object) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(module(name), "_work", work)
    assert module(name).main(UNUSABLE[name]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"interrupted(; .*)?\n", captured.err)


@every_command
@pytest.mark.parametrize("status", [0, 1])
def test_quiet_leaves_the_verdict_and_json_the_document(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_options: object) -> Outcome:
        print("a line")
        print("a note", file=sys.stderr)
        return Outcome("the verdict", {"value": float("inf"), "list": (1,)}, status)

    monkeypatch.setattr(module(name), "_work", work)
    shown = {}
    for option in ("-v", "-q", "--json"):
        assert module(name).main([*UNUSABLE[name], option]) == status
        shown[option] = capsys.readouterr()
    assert shown["-v"] == ("a line\nthe verdict\n", "a note\n")
    assert shown["-q"] == ("the verdict\n", "")
    assert shown["--json"].err == "a line\na note\n"
    assert json.loads(shown["--json"].out) == {"value": None, "list": [1]}


@pytest.mark.parametrize(
    "start",
    [
        ["runtime/selftest.py"],
        ["export/build_engine.py"],
        ["-m", "rfsq", "selftest"],
        ["-m", "runtime.qualification.soak"],
        ["-m", "rfsq.runtime.qualification.campaign"],
    ],
)
def test_ctrl_c_during_the_imports_is_no_traceback(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-c", _WITH_OURS.format(folder=str(tmp_path), start=start)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


#: Runs a script or module with a module of the test in the place of the library's.
_WITH_OURS = """
import runpy, sys
start = {start}
sys.argv = start[-1:] if start[0] != "-m" else ["rfsq", *start[2:]]
class Ours:
    def find_spec(name, path=None, target=None):
        import importlib.machinery
        return importlib.machinery.PathFinder.find_spec(name, [{folder!r}]) if name == "argparse" else None
sys.meta_path.insert(0, Ours)
sys.modules.pop("argparse", None)
if start[0] == "-m":
    runpy.run_module(start[1], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(start[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["build", "calibrate", "train", "compare"])
@pytest.mark.parametrize("flag", ["--key", "--filter-key"])
def test_a_choice_from_data_that_are_not_given_is_refused(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert module(name).main([flag, "other"]) == 2
    assert f"error: {flag} chooses from --data, which is not given" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("train", ["--output", "folder.safetensors"], "folder.safetensors is a folder, and a file is to be written"),
        ("train", ["--output", "file/model.safetensors"], "file is no writable folder"),
        (
            "calibrate",
            ["--output", "folder.safetensors"],
            "folder.safetensors is a folder, and a file is to be written",
        ),
        ("calibrate", ["--output", "a.safetensors", "--report-dir", "file"], "file is no writable folder"),
        ("calibrate", ["--kind", "chunk", "--report-dir", "file"], "file is no writable folder"),
        ("bench", ["bundle", "--output", "file"], "file is no writable folder"),
        ("explain", ["bundle", "--data", "a.npz", "--output", "file/page.html"], "file is no writable folder"),
        ("compare", ["--output", "file"], "file is no writable folder"),
        ("rollout", ["--output", "file", "--report-only"], "file is no writable folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    name: str, arguments: list[str], said: str, options: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("in the way")
    assert module(name).main([*arguments, *options]) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["inspect", "B"]])
@pytest.mark.parametrize("option", [None, "-q", "--json"])
def test_a_full_standard_output_is_a_2_and_named(arguments: list[str], option: str | None, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", Recipe())
    given = [str(bundle) if word == "B" else word for word in [*arguments, *([option] if option else [])]]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rfsq", *given],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: standard output cannot be written: No space left on device")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_a_standard_error_that_takes_nothing_changes_neither_status_nor_document(stderr: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", Recipe())
    for arguments, status in (
        (["inspect", bundle, "--json"], 0),
        (["bench", bundle, "--json", "--rounds", "1", "--batch", "1", "--starts", "0"], 0),
        (["inspect", tmp_path, "--json"], 2),
        (["inspect"], 2),
        (["no-command"], 2),
    ):
        words = [sys.executable, "-m", "rfsq", *map(str, arguments)]
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {stderr}', "sh", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == status
        if status:
            assert done.stdout == ""
        else:
            assert json.loads(done.stdout)


def test_a_standard_output_that_was_closed_is_a_2_and_named() -> None:
    words = [sys.executable, "-m", "rfsq", "--help"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 1>&-', "sh", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_name_that_is_not_utf8_is_no_traceback(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff\xc3\xa4")
    bundle = write_bundle(folder / "bundle", Recipe())
    for arguments in (
        ["inspect", bundle],
        ["inspect", bundle, "-v", "--json"],
        ["selftest", bundle],
        ["bench", bundle, "--rounds", "1", "--batch", "1", "--starts", "0", "--output", folder / "bench"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "rfsq", *map(str, arguments)],
            cwd=ROOT, env={**os.environ, **locale}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    named = json.loads((folder / "bench/bench.json").read_text())["bundle"]["bundle"]
    assert os.fsencode(named) == os.fsencode(bundle)


def test_a_full_standard_output_in_the_middle_is_not_blamed_on_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def work(_options: object) -> Outcome:
        try:
            print("a line")
        except OSError as error:
            raise InvalidInputError("the output cannot be written") from error
        return Outcome("")

    monkeypatch.setattr(selftest, "_work", work)
    monkeypatch.setattr(sys, "stdout", Full())
    assert selftest.main(["bundle"]) == 2
    assert capsys.readouterr().err.startswith("error: standard output cannot be written: No space left on device; ")


def test_a_lack_of_memory_is_a_2_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_options: object) -> Outcome:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(selftest, "_work", work)
    assert selftest.main(["bundle"]) == 2
    assert capsys.readouterr().err == "error: out of memory: Unable to allocate 9 GiB; ask for less at once\n"


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where these tests run in the background of a script, whose children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", Recipe())
    command = [sys.executable, str(ROOT / "runtime/bench.py"), str(bundle), "--starts", "0", "--rounds", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("measuring ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_an_import_that_swallows_ctrl_c_only_delays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As modules of Cython do."""
    code = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "swallowing.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def work(_: object) -> Outcome:
        import_module("swallowing")
        seen.append("imported")
        time.sleep(30)
        return Outcome("done")

    assert run_work(CommandParser("selftest"), work, []) == 130
    assert seen == ["imported"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_shown_fits_a_screen_and_names_the_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", Recipe())
    data = tmp_path / "data.npz"
    np.savez(data, actions=random_actions(Recipe(), 30).reshape(-1, 3))
    mains: dict[Callable[[list[str]], int], list[str]] = {
        selftest.main: [str(bundle)],
        inspection.main: [str(bundle)],
        compat.main: [str(bundle), str(bundle), "--data", str(data)],
    }
    lines = {}
    for main, arguments in mains.items():
        assert main(arguments) == 0
        lines[main] = capsys.readouterr().out.splitlines()
        assert len(lines[main]) <= 24
        assert main([*arguments, "-q"]) == 0
        assert capsys.readouterr().out.splitlines() == lines[main][-1:]
    for line in lines[selftest.main][1:-1]:
        names = line.removeprefix("– ").removeprefix("✓ ").partition(":")[0].split(", ")
        assert set(names) <= set(BACKENDS)


# Messages ------------------------------------------------------------------------------------------------------------


def test_no_message_names_by_hand_what_not_every_reader_has() -> None:
    by_hand = re.compile(
        r"'?\.\[[a-z]|docs/\w+\.md|python (-m )?(export|runtime|rfsq_ref|calibration|evidence|rfsq)[/.]"
        rf"|\brfsq ({'|'.join(COMMANDS)})\b|\bmake (engine|test)\b|\b(fit|train|compare|rollout)\.py"
    )
    found = []
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        if path.name in ("advice.py", "train_modal.py") or (path.parts[-2] in ROOMS and path.parts[-3] == "rfsq"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        found += [
            (str(path.relative_to(ROOT)), node.lineno, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and by_hand.search(node.value)
        ]
    assert found == []


def test_every_reader_gets_the_command_and_the_packages_that_he_has(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"command": ("build", "--from-bundle b"), "install": ("gpu",), "page": ("integration",)}
    answers = {}
    for layout in ("checkout", "installed", "copied"):
        monkeypatch.setattr(advice, "layout", lambda found=layout: found)
        answers[layout] = [getattr(advice, name)(*arguments) for name, arguments in given.items()]
        answers[layout].append(advice.command("selftest"))
        answers[layout] += [advice.install_package(name) for name in ("scipy", "torch", "robosuite")]
    assert answers == {
        "checkout": [
            "python export/build_engine.py --from-bundle b",
            "pip install --constraint constraints.txt --editable '.[gpu]'",
            "docs/integration.md",
            "python runtime/selftest.py",
            "pip install --constraint constraints.txt --editable '.[export,evidence]'",
            "pip install --constraint constraints.txt --editable '.[torch]'",
            "pip install --editable '.[sim]' in an environment of its own (docs/training.md)",
        ],
        "installed": [
            "rfsq build --from-bundle b",
            "pip install 'rfsq-deploy[gpu]'",
            "docs/integration.md in the sources of rfsq-deploy",
            "rfsq selftest",
            "pip install 'rfsq-deploy[export,evidence]'",
            "pip install 'rfsq-deploy[torch]'",
            "pip install 'rfsq-deploy[sim]' in an environment of its own "
            "(docs/training.md in the sources of rfsq-deploy)",
        ],
        "copied": [
            "rfsq build --from-bundle b (of rfsq-deploy: pip install its checkout or its wheel)",
            "pip install cuda-bindings cuda-core nvidia-cuda-nvrtc",
            "docs/integration.md in the sources of rfsq-deploy",
            "python runtime/selftest.py",
            "pip install scipy",
            "pip install torch",
            "pip install robosuite",
        ],
    }


@pytest.mark.parametrize(
    ("copied", "start", "said"),
    [
        ("rfsq", ["-m", "rfsq", "selftest"], "give the folder that `rfsq build` wrote"),
        (
            "runtime",
            ["runtime/selftest.py"],
            "give the folder that `rfsq build` (of rfsq-deploy: pip install its checkout",
        ),
    ],
)
def test_a_copy_knows_that_it_is_one(copied: str, start: list[str], said: str, tmp_path: Path) -> None:
    """As a wheel lies in site-packages, and as the folder alone lies on a robot."""
    shutil.copytree(ROOT / copied, tmp_path / copied, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    done = run(*start, "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
