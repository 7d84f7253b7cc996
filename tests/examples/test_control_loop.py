"""examples/control_loop.py, run as a user runs it: every fault, each with its answer and its verdicts."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.fault_switch import FAULTS
from tests.processes import PATIENCE

ROOT = Path(__file__).parents[2]
#: What the arm needs: a bundle that really encodes its actions.
BUILT = ROOT / "build" / "bundle"
HAS_SIMULATOR = find_spec("robosuite") is not None
needs_simulator = pytest.mark.skipif(not HAS_SIMULATOR, reason="the simulator is not installed here: .[sim]")
ANSWERS = {
    "none": "at the end it is served",
    "bad": "answered by BAD_TOKEN",
    "late": "answered by STALE",
    "duplicate": "answered by STALE",
    "reordered": "answered by STALE",
    "killed": "at the end it stands still, with the gripper's last command",
    "hang": "answered by STALE",
    "backend": "answered by the spare backend",
    "nan": "answered by NONFINITE",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights: good enough for a robot that is none."""
    pytest.importorskip("onnx", reason="bundles are built with .[export]")
    from rfsq.rfsq_ref.autoencoder import ModelConfig
    from tests.bundles import Recipe, write_bundle

    recipe = Recipe(config=ModelConfig(), chunk_length=8, prefixes=(3,), has_engine=False)
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle", recipe)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/control_loop.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)


def assert_is_answered(found: subprocess.CompletedProcess[str], fault: str) -> None:
    assert found.returncode == 0, found.stdout + found.stderr
    (injected,) = re.findall(rf"^injected  {fault}(?: x(\d+))?: ", found.stdout, re.MULTILINE)
    assert fault in ("none", "backend", "nan") or int(injected) > 0
    assert re.search(r"^statuses  OK \d+", found.stdout, re.MULTILINE)
    assert re.search(r"^✓ 0 of \d+ actions outside limits or slew$", found.stdout, re.MULTILINE)
    assert f"✓ {ANSWERS[fault]}" in found.stdout
    assert "✗" not in found.stdout


def run_plain(bundle: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Where nothing goes wrong, with all that the system can do."""
    return run(bundle, "--seconds", 1.6, "--fault", fault, *(["--realtime"] if fault == "none" else []))


@pytest.mark.parametrize("faults", [tuple(FAULTS)[first::2] for first in range(2)], ids=" ".join)
def test_the_plain_loop_answers_every_fault(bundle: Path, faults: tuple[str, ...]) -> None:
    """Several loops at a time, for each sleeps most of its seconds."""
    with ThreadPoolExecutor(len(faults)) as pool:
        found = list(pool.map(lambda fault: run_plain(bundle, fault), faults))
    for one, fault in zip(found, faults, strict=True):
        assert_is_answered(one, fault)
        # What the system refuses is printed.
        names = re.findall(r"^[✓✗] (freeze_gc|lock_memory|cpus|fifo_priority): ", one.stdout, re.MULTILINE)
        assert names == (["freeze_gc", "lock_memory", "cpus", "fifo_priority"] if fault == "none" else [])


def test_the_plain_loop_takes_chunk_tokens(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="bundles are built with .[export]")
    from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle

    bundle = write_chunk_bundle(tmp_path / "bundle", ChunkRecipe())
    faults = ("none", "bad", "reordered")
    with ThreadPoolExecutor(len(faults)) as pool:
        found = list(pool.map(lambda fault: run_plain(bundle, fault), faults))
    for one, fault in zip(found, faults, strict=True):
        assert_is_answered(one, fault)


def test_what_cannot_be_run_is_said(bundle: Path, tmp_path: Path) -> None:
    refused = [([tmp_path], "manifest.json"), ([bundle, "--seconds", 1], "--seconds is 1")]
    if not HAS_SIMULATOR:
        refused.append(
            ([bundle, "--robosuite"], "pip install --editable '.[sim]' in an environment of its own (docs/training.md)")
        )
    with ThreadPoolExecutor(len(refused)) as pool:
        found = list(pool.map(lambda one: run(*one[0]), refused))
    for one, (_, word) in zip(found, refused, strict=True):
        assert one.returncode == 2
        assert word in one.stderr
        assert "Traceback" not in one.stderr


@needs_simulator
@pytest.mark.skipif(not BUILT.is_dir(), reason="no build/bundle here: make engine")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_arm_answers_every_fault(fault: str) -> None:
    found = run(BUILT, "--robosuite", "--fault", fault)
    assert_is_answered(found, fault)
    # With the policy goes the plan: it is enough that the arm stands still.
    assert fault == "killed" or "✓ Lift: solved at the end" in found.stdout


@needs_simulator
@pytest.mark.skipif(not BUILT.is_dir(), reason="no build/bundle here: make engine")
def test_an_unknown_task_is_said() -> None:
    found = run(BUILT, "--robosuite", "--task", "Juggle")
    assert found.returncode == 2
    assert "expected one of Lift" in found.stderr
