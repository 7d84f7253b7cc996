"""examples/time_tokenizer.c and `make time-c`: no warning, and every line that they promise; no time is judged."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from rfsq.export.c_builder import C_FLAGS, SOURCE_NAME
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from tests.bundles import Recipe, deploy, fingerprint_of, write_bundle
from tests.export.c_library import run, write_code

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "time_tokenizer.c"
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
NUMBER = r"(\d[\d.e+]*)"


def recipe_of(mode: DeployMode) -> Recipe:
    # The program sees of the sizes what the header says; small ones compile and run in a part of the time.
    return Recipe(mode, ModelConfig(3, 4, 8, 8, 7), chunk_length=8, prefixes=(3,), c_targets=(), has_engine=False)


def build(folder: Path, mode: DeployMode, compiler: str, flags: Sequence[str] = ()) -> Path:
    """Of the code in `folder`. flags: more of them, which win over those of a bundle's engines."""
    stats = ["-DHAS_STATS"] * mode.has_stats
    command = [compiler, *C_FLAGS, *STRICT, *stats, *flags, "-I.", EXAMPLE, SOURCE_NAME, "-o", "timed"]
    assert run(command, folder) == ""
    return folder / "timed"


def check(printed: str, recipe: Recipe, steps: int, calls: int = 100_000) -> None:
    """Every line that it promises, with numbers that can be true."""
    first, heading, *lines = printed.splitlines()
    assert first == f"fingerprint {fingerprint_of(recipe)[:16]}, {steps} steps"
    assert heading.startswith(f"one chunk of 8 steps, {calls} calls ")
    # No policy predicts the statistics of a dynamic model.
    beliefs = () if recipe.mode.has_stats else ("probabilities", "probabilities, std", "logits", "logits, std")
    names = ("empty call", "encode", "decode", *beliefs)
    single, batches = lines[: len(names)], lines[len(names) :]
    for name, line in zip(names, single, strict=True):
        found = re.fullmatch(rf"{name} +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}", line)
        assert found is not None, line
        median, p99, late, _, times_decode = map(float, found.groups())
        assert 0 <= median <= p99 <= late
        assert times_decode == {"empty call": 0, "decode": 1}.get(name, times_decode)
    sizes = []
    for line in batches:
        found = re.fullmatch(rf"(encode|decode) (\d+) chunks a call: {NUMBER} ns a step, {NUMBER} steps a second", line)
        assert found is not None, line
        sizes.append((found[1], int(found[2])))
        # Both are rounded for printing.
        assert float(found[3]) * float(found[4]) == pytest.approx(1e9, rel=0.05)
    assert sizes == [(name, size) for size in (1, 32, steps // 8) for name in ("encode", "decode")]


# By both compilers what the program itself has two of: with statistics and without. The tokenizer of every mode is
# compiled by both in test_c_compilers.py.
@pytest.mark.parametrize(
    ("mode", "compiler"),
    [
        (DeployMode.DYNAMIC, "gcc"),
        (DeployMode.DYNAMIC, "clang"),
        (DeployMode.CALIBRATED, "clang"),
        (DeployMode.RECOVERED, "gcc"),
    ],
)
def test_no_compiler_has_anything_to_say_and_it_prints_every_line(
    mode: DeployMode, compiler: str, tmp_path: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed: apt-get install {compiler}")
    recipe = recipe_of(mode)
    program = build(write_code(tmp_path, deploy(recipe)), mode, compiler)
    # Up to whole chunks.
    check(run([program, 497], tmp_path), recipe, 504)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: apt-get install gcc")
@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def test_a_prefix_can_be_timed_within_its_arrays(mode: DeployMode, tmp_path: Path) -> None:
    recipe = recipe_of(mode)
    # Each call takes the same way through the arrays, and what watches over it takes its time: in the compiler too,
    # which needs a quarter of it for code that is not unrolled.
    flags = [
        "-DDECODE=rfsq_decode_l3",
        "-DBELIEVE=rfsq_decode_beliefs_l3",
        "-DLAYERS=3",
        "-DSINGLE_CALLS=2000",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
    ]
    program = build(write_code(tmp_path, deploy(recipe)), mode, "gcc", flags)
    check(run([program, 80], tmp_path), recipe, 80, calls=2000)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: apt-get install gcc")
def test_a_wrong_command_line_shows_the_right_one(tmp_path: Path) -> None:
    code = write_code(tmp_path, deploy(recipe_of(DeployMode.CALIBRATED)))
    program = build(code, DeployMode.CALIBRATED, "gcc", ["-O1"])
    for arguments in (["0"], ["-8"], ["many"], ["8x"], ["9" * 30], ["1000000001"], ["8", "8"]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"usage: {program} [STEPS]\n")


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt-get install make")


def make(bundle: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "time-c", f"BUNDLE={bundle}", f"TIME_PROGRAM={folder / 'timed'}", "STEPS=400"]
    # As a person calls it, also where `make test` has started the tests.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_make
def test_make_times_a_bundle_with_the_flags_of_its_engines(tmp_path: Path) -> None:
    recipe = recipe_of(DeployMode.CALIBRATED)
    write_bundle(tmp_path / "bundle", recipe)
    done = make(tmp_path / "bundle", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    said, printed = done.stdout.split("\n", 1)
    assert f" {' '.join(C_FLAGS)} " in f"{said} "
    check(printed, recipe, 400)


@needs_make
def test_make_says_where_there_is_no_engine(tmp_path: Path) -> None:
    done = make(tmp_path / "missing", tmp_path)
    assert done.returncode != 0
    assert f"{tmp_path}/missing has no engines/c: build it with make engine" in done.stderr
