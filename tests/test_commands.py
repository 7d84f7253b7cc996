"""What every command promises: a missing package and existing output end it with status 2, a bug with a traceback."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfsq.calibration import fit, study
from rfsq.evidence import compare_command as compare
from rfsq.evidence import rollout_command as rollout
from rfsq.export import build_engine
from rfsq.rfsq_ref import generate_demonstrations, train
from rfsq.runtime.benchmark import command as bench
from rfsq.runtime.bundle.advice import COMMANDS, EXTRAS, install, install_package
from rfsq.runtime.bundle.errors import InvalidInputError, OutputExistsError
from rfsq.runtime.bundle.paths import refuse_existing, shortlist
from tests.bundles import Recipe, write_bundle

ROOT = Path(__file__).parents[1]
#: What a robot or a fresh environment may lack.
OPTIONAL = (
    "torch",
    "tqdm",
    "h5py",
    "pyarrow",
    "matplotlib",
    "scipy",
    "tokenizers",
    "safetensors",
    "onnx",
    "polygraphy",
)

#: Every import is looked up as usual, but for those packages: as where they are not installed.
_HIDING = """
import importlib.machinery, sys
hidden = {hidden!r}
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in hidden:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [
    Finder if finder is importlib.machinery.PathFinder else finder
    for finder in sys.meta_path
    if isinstance(finder, type) and finder.__module__.startswith("_frozen_importlib")
]
"""


def run_without(
    hidden: tuple[str, ...], folder: Path, script: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """The script as a person runs it, in an environment that lacks `hidden`."""
    (folder / "sitecustomize.py").write_text(_HIDING.format(hidden=hidden))
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def scripts() -> list[Path]:
    """Every file that a person runs."""
    rooms = ("rfsq_ref", "calibration", "evidence", "export", "examples")
    found = [path for room in rooms for path in sorted((ROOT / room).glob("*.py"))]
    return [path for path in found if path.read_text().startswith("#!")]


# Missing packages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("rfsq_ref/train.py", []),
        ("rfsq_ref/compare.py", []),
        ("rfsq_ref/rollout.py", []),
        ("calibration/fit.py", []),
        ("calibration/fit.py", ["--kind", "chunk"]),
        ("calibration/study.py", []),
        ("evidence/compare_chunks.py", []),
        ("evidence/documents.py", ["--check"]),
        ("evidence/train_peers.py", []),
        ("export/build_engine.py", []),
        ("examples/speculative_decoding.py", ["bundle"]),
    ],
)
def test_a_command_without_its_packages_says_what_to_install(script: str, arguments: list[str], tmp_path: Path) -> None:
    done = run_without(OPTIONAL, tmp_path, script, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    found = re.fullmatch(r"error: this command needs (\w+), which cannot be imported \(.*\); (pip install .*)", line)
    assert found is not None, line
    assert found[1] in OPTIONAL
    entry = next((entry for entry in COMMANDS.values() if entry.script == script), None)
    assert found[2] == (install(*entry.extras) if entry else install_package(found[1]))
    assert {path.name for path in tmp_path.iterdir()} <= {"sitecustomize.py", "__pycache__"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "package"), [("calibration/study.py", "matplotlib"), ("export/build_engine.py", "tqdm")]
)
def test_one_missing_package_is_enough(script: str, package: str, tmp_path: Path) -> None:
    done = run_without((package,), tmp_path, script)
    assert done.returncode == 2, done.stderr
    assert f"this command needs {package}, which cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("runtime/tokenize_dataset.py", ["BUNDLE", "--output", "out.parquet"]),
        ("runtime/compat.py", ["BUNDLE", "BUNDLE"]),
    ],
)
def test_data_whose_package_is_missing_are_no_verdict(
    script: str, arguments: list[str], bundle: Path, tmp_path: Path
) -> None:
    data = tmp_path / "episodes.hdf5"
    data.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    given = [bundle if argument == "BUNDLE" else argument for argument in arguments]
    done = run_without(("h5py",), tmp_path, script, *given, "--data", data)
    assert done.returncode == 2, done.stderr
    assert "needs h5py, which cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_engine_is_added_on_a_robot_that_has_numpy_alone(bundle: Path, tmp_path: Path) -> None:
    hidden = (*OPTIONAL, "rfsq.rfsq_ref", "rfsq.calibration", "rfsq.evidence")
    done = run_without(hidden, tmp_path, "export/build_engine.py", "--from-bundle", bundle, "--backends", "c")
    assert done.returncode == 0, done.stderr
    assert run_without(hidden, tmp_path, "runtime/selftest.py", bundle, "--backend", "c").returncode == 0


def test_a_training_without_matplotlib_keeps_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rfsq.rfsq_ref.training.find_spec", lambda _: None)
    arguments = ["--epochs", "1", "--num-episodes", "1", "--hidden-width", "8"]
    assert train.main([*arguments, "--output", str(tmp_path / "m.safetensors")]) == 0
    assert "no drawing of the curve: matplotlib is not installed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "m.history.json"}


def test_a_module_of_ours_that_is_missing_is_a_bug(tmp_path: Path) -> None:
    done = run_without(("rfsq.calibration",), tmp_path, "evidence/documents.py")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: this is a fault of the program; please report the lines above\n")


def test_the_adapter_without_torch_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "adapt.py").write_text("import rfsq.runtime.torch_adapter\n")
    hiding = f"{_HIDING.format(hidden=('torch',))}\nimport runpy; runpy.run_path({str(tmp_path / 'adapt.py')!r})"
    done = subprocess.run([sys.executable, "-c", hiding], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: the adapter needs torch, which is not installed; {install_package('torch')}"
    )


def test_every_script_explains_what_is_missing() -> None:
    silent = [
        path.name
        for path in scripts()
        if not re.search(
            r"^    (explain_missing_packages|prepare_console|run_command|run_script)\(", path.read_text(), re.MULTILINE
        )
    ]
    # Started by another script alone, which reads what it says.
    assert silent == ["bench_peers.py"]


def test_what_a_message_advises_to_install_brings_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    offered = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra, packages in EXTRAS.items():
        brought = [re.split(r"[><=~]", wanted)[0] for wanted in offered[extra]]
        ours = [name for wanted in brought if wanted.startswith("rfsq") for name in EXTRAS[wanted[12:-1]]]
        assert {*packages} <= {*brought, *ours}, extra
    # Nothing that a machine without the project needs is left out.
    assert {*EXTRAS["export"]} == {re.split(r"[><=~]", wanted)[0] for wanted in offered["export"]}


@pytest.mark.parametrize("parser", [compare._parser, rollout.parser])
def test_a_report_without_a_folder_of_its_own_goes_where_all_that_is_built_goes(parser: Callable[[], Any]) -> None:
    assert parser().parse_args([]).output.parts[0] == "build"


# Bugs ----------------------------------------------------------------------------------------------------------------


def broken(*_: object, **__: object) -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (train, "rfsq_ref.training.train", []),
        (fit, "calibration.fitting.calibrate", []),
        (fit, "calibration.chunk_fitting.fit_chunk_tokens", ["--kind", "chunk"]),
        (study, "calibration.study.study", []),
        (compare, "evidence.report.compare", ["--no-peers"]),
        (rollout, "evidence.rollouts.run_rollouts", ["--output", "."]),
        (generate_demonstrations, "rfsq_ref.generate_demonstrations.generate", []),
        (build_engine, "export.build_engine._run", []),
        (build_engine, "export.build_engine.config_of", []),
    ],
)
def test_a_bug_does_not_pass_for_a_fault_of_the_input(
    module: Any, name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"rfsq.{name}", broken)
    with pytest.raises(ValueError, match="a bug"):
        module.main(arguments)


def test_a_bug_in_the_settings_of_a_build_is_no_fault_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rfsq.export.build_config.BuildConfig", broken)
    with pytest.raises(ValueError, match="a bug"):
        build_engine.main([])


# Output --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.safetensors", "m.history.json", "m.history.png"])
def test_a_training_replaces_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(train.main, ["--output", tmp_path / "m.safetensors"], tmp_path / name, capsys)


def test_trainings_of_several_seeds_replace_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", tmp_path / "m.safetensors", "--seeds", 0, 1]
    check_refusal(train.main, arguments, tmp_path / "m-seed1.safetensors", capsys)


@pytest.mark.parametrize("kind", ["step", "chunk"])
@pytest.mark.parametrize("name", ["m.safetensors", "report/report.json", "report/report.png"])
def test_a_fit_replaces_nothing(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kind", kind, "--output", tmp_path / "m.safetensors", "--report-dir", tmp_path / "report"]
    check_refusal(fit.main, arguments, tmp_path / name, capsys)


@pytest.mark.parametrize(
    ("main", "flag", "name"),
    [
        (study.main, "--output", "calibration.json"),
        (study.main, "--output", "calibration.png"),
        (compare.main, "--output", "comparison.json"),
        (compare.main, "--output", "report.html"),
        (compare.main, "--output", "calibration.json"),
        (rollout.main, "--output", "rollout.json"),
    ],
)
def test_a_report_replaces_nothing(
    main: Callable[[list[str]], int], flag: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(main, [flag, tmp_path], tmp_path / name, capsys)


def test_generated_demonstrations_replace_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(generate_demonstrations.main, ["--output", tmp_path / "d.npz"], tmp_path / "d.npz", capsys)


def test_figures_of_a_bench_replace_nothing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(bench.main, [bundle, "--output", tmp_path / "o"], tmp_path / "o" / "bench.txt", capsys)


def check_refusal(
    main: Callable[[list[str]], int], arguments: list[object], there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2 and a message at once, and the file that is there is as it was."""
    there.parent.mkdir(exist_ok=True)
    there.write_text("an hour of work")
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert f"error: {there} exists; give another name, or --overwrite to replace it" in captured.err
    assert captured.out == ""
    assert there.read_text() == "an hour of work"


@pytest.mark.slow
def test_overwrite_replaces_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--epochs", "1", "--num-episodes", "1", "--hidden-width", "8", "--output", "m.safetensors"]
    assert train.main(arguments) == 0
    first = Path("m.safetensors").read_bytes()
    assert train.main([*arguments, "--seed", "1"]) == 2
    assert Path("m.safetensors").read_bytes() == first
    assert train.main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert Path("m.safetensors").read_bytes() != first


def test_every_command_with_an_output_knows_the_rule() -> None:
    modules = [ROOT / f"{entry.module.replace('.', '/')}.py" for entry in COMMANDS.values()]
    writing = [path for path in {*scripts(), *modules} if re.search(r'"--output"|add_output', path.read_text())]
    assert len(writing) >= 7
    assert [path.name for path in writing if not re.search(r'"--overwrite"|add_output', path.read_text())] == []


def test_what_is_there_is_named_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    folder, link, free = (tmp_path / name for name in ("folder", "link", "free"))
    refuse_existing([link, free], overwrite=True, folders=[folder])
    refuse_existing([free], overwrite=False)
    with pytest.raises(OutputExistsError, match=r"link, .*folder exist; give another name, or --overwrite to replace"):
        refuse_existing([link, free], overwrite=False, folders=[folder])
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match="folder is a folder, and a file is to be written there"):
            refuse_existing([free, folder], overwrite=overwrite)


def test_a_long_list_is_cut_short() -> None:
    assert shortlist(range(7)) == "0, 1, 2, 3, 4, 5, 6"
    assert shortlist(range(43)) == "0, 1, 2, 3, 4, 5 and 37 more"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", Recipe(c_targets=()))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_a_document_names_no_fingerprint_for_the_next_fit_gives_another(path: Path) -> None:
    """Who pastes what is shown would be refused; it is read from the bundle instead."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"""expect_fingerprint=["'][0-9a-f]+|fingerprint [0-9a-f]{8,}""", text) == []


def test_every_bar_is_for_a_terminal_alone() -> None:
    """In a log file each step of one is a line of its own."""
    rooms = ("rfsq_ref", "calibration", "evidence", "export", "examples")
    found = []
    for path in (path for room in rooms for path in (ROOT / room).glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tqdm":
                given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "disable"]
                found.append((path.name, call.lineno, *given))
    assert found
    assert [bar for bar in found if not (len(bar) == 3 and str(bar[2]).startswith("None"))] == []
