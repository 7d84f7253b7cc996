"""The one import root: what it is called, what it brings, and the command of that name."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rfsq.runtime.bundle.advice import COMMANDS

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("names", [("runtime", "rfsq.runtime"), ("rfsq.runtime", "runtime")])
def test_one_process_uses_one_of_the_two_names(names: tuple[str, str]) -> None:
    done = run("-c", "; ".join(f"import {name}" for name in names))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {names[0]} is imported already, and is the same code as {names[1]}: use one of the two names "
        "everywhere"
    )


def test_a_module_of_the_user_may_be_called_runtime(tmp_path: Path) -> None:
    (tmp_path / "runtime.py").write_text("ActionTokenizer = 'mine'\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import runtime; from rfsq.runtime import ActionTokenizer\n"
    done = run("-c", code + "print(runtime.ActionTokenizer, ActionTokenizer.__module__)", cwd=tmp_path)
    assert done.stdout == "mine rfsq.runtime.tokenizer\n", done.stderr


@pytest.mark.parametrize("package", ["runtime", "rfsq.runtime"])
def test_every_public_name_is_there_and_is_loaded_when_it_is_used(package: str) -> None:
    code = (
        f"import sys, {package} as package\n"
        "assert set(package.__all__) <= set(dir(package))\n"
        f"assert not any(name.startswith({package + '.'!r}) for name in sys.modules)\n"
        "package.ActionTokenizer\n"
        f"assert not any(name.startswith({package + '.control.'!r}) for name in sys.modules)\n"
        "for name in package.__all__: getattr(package, name)\n"
        "try:\n    package.Missing\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    assert run("-c", code).stdout == f"module '{package}' has no attribute 'Missing'\n"


def test_the_documented_names_of_a_copied_folder_are_there(tmp_path: Path) -> None:
    (tmp_path / "runtime").symlink_to(ROOT / "runtime")
    code = "from runtime import ActionTokenizer, ControlConfig, ControlDecoder, TokenVocabulary\n"
    code += "from runtime.torch_adapter import ActionRFSQAE\nprint(ActionRFSQAE.__module__)\n"
    assert run("-c", code, cwd=tmp_path).stdout == "runtime.policy.adapter\n"


def test_the_command_lists_its_commands() -> None:
    for arguments in ((), ("--help",)):
        done = run("-m", "rfsq", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)


def test_an_unknown_command_is_refused() -> None:
    done = run("-m", "rfsq", "biuld")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'biuld' is no command; expected one of build, selftest, ")


def test_what_the_reference_may_not_use_of_runtime_is_listed_whole() -> None:
    """A new package or dataset file of `runtime` stands on one side of the contract in pyproject.toml."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (found for found in contracts if found.get("source_modules") == ["rfsq.rfsq_ref"])
    forbidden = {name.removeprefix("rfsq.runtime.") for name in contract["forbidden_modules"]}
    readers = {"array_layouts", "episodes", "errors", "hdf5", "lerobot", "npz", "source_base", "sources"}
    packages = {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")} - {"bundle", "datasets"}
    files = {path.stem for path in (ROOT / "runtime/datasets").glob("*.py")} - readers - {"__init__"}
    assert forbidden == packages | {"tokenizer", "belief_methods", "beliefs"} | {f"datasets.{name}" for name in files}


@pytest.mark.parametrize("room", ["export", "runtime/datasets"])
def test_the_map_of_a_room_names_every_file(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    assert files - set(re.findall(r"\w+", text)) == set()
