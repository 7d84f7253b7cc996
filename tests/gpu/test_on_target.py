"""On the robot: engines are added to a bundle from elsewhere, without torch, without the checkpoint, all or nothing."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rfsq.export.bundle_writer import stage_bundle
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE, CUDA_SOURCE
from tests.bundles import bundle_files
from tests.gpu.conftest import ENGINES, TENSORRT

ROOT = Path(__file__).parents[2]

WITHOUT_TORCH = """
import sys
from pathlib import Path
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors", "rfsq_ref", "calibration"):
            raise ImportError(f"{name} is not on the robot")
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
from rfsq.export.build_engine import main
sys.exit(main(sys.argv[2:]))
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.fixture
def travelled(bundle: Bundle, tmp_path: Path) -> Path:
    """As it leaves a machine without TensorRT: graphs and golden vectors."""
    output = tmp_path / "bundle"
    sources = {C_HEADER, C_SOURCE, CUDA_SOURCE}
    dropped = {file for file in bundle.manifest.files if file.startswith("engines/")} - sources
    with stage_bundle(output) as staged:
        for file in bundle.manifest.files.keys() - dropped:
            staged.write(file, bundle.content(file))
        parity = tuple(entry for entry in bundle.manifest.parity if entry.backend == "onnxruntime")
        staged.seal(replace(bundle.manifest, engines=(), parity=parity))
    return output


def test_engines_are_added_proven_and_recorded(travelled: Path) -> None:
    before = open_bundle(travelled).manifest
    done = run("--from-bundle", travelled)
    assert done.returncode == 0, done.stderr
    after = open_bundle(travelled).manifest
    assert (after.fingerprint, after.model, after.graphs) == (before.fingerprint, before.model, before.graphs)
    assert {engine.backend for engine in after.engines} == {"c", *ENGINES}
    assert {(engine.status, engine.precision) for engine in after.engines} == {("validated", "fp32")}
    proven = [entry for entry in after.parity if entry.backend in ENGINES]
    assert len(proven) >= 9 * len(ENGINES)
    assert all(entry.value <= entry.limit for entry in proven)
    assert [entry for entry in after.parity if entry.backend == "onnxruntime"] == list(before.parity)
    for name in ("c", *ENGINES):
        ActionTokenizer.load(travelled, backend=name).close()


def test_a_second_time_replaces_what_the_first_one_added(travelled: Path) -> None:
    assert run("--from-bundle", travelled).returncode == 0
    first = set(bundle_files(travelled))
    assert run("--from-bundle", travelled).returncode == 0
    assert set(bundle_files(travelled)) == first


def test_engines_that_are_asked_for_and_find_no_gpu_leave_the_bundle_as_it_was(
    travelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: (travelled / file).read_bytes() for file in bundle_files(travelled)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("--from-bundle", travelled, "--backends", "c", *ENGINES)
    assert done.returncode == 2
    assert "GPU" in done.stderr
    assert {file: (travelled / file).read_bytes() for file in bundle_files(travelled)} == before


def test_graphs_that_do_not_give_the_golden_answers_are_not_added(travelled: Path, tmp_path: Path) -> None:
    """Graphs and golden vectors of two models, sealed as one bundle: only running them can tell."""
    other = tmp_path / "swapped"
    with stage_bundle(other) as staged:
        source = open_bundle(travelled)
        for file in source.manifest.files:
            content = source.content(file)
            if file == "golden.npz":
                # The steps in another order are other answers.
                from rfsq.runtime.bundle.golden import read_golden, write_golden

                golden = read_golden(content, source.manifest.model)
                content = write_golden(replace(golden, actions=golden.actions[::-1].copy()))
            staged.write(file, content)
        staged.seal(source.manifest)
    before = {file: (other / file).read_bytes() for file in bundle_files(other)}
    done = run("--from-bundle", other)
    assert done.returncode == 1
    assert "wrong tokens" in done.stderr
    assert {file: (other / file).read_bytes() for file in bundle_files(other)} == before


@pytest.mark.skipif("tensorrt-rtx" not in TENSORRT, reason="only TensorRT-RTX compiles kernels on the robot")
def test_kernels_compiled_once_travel_with_the_engine(bundle_path: Path, bundle: Bundle, tmp_path: Path) -> None:
    engines = [engine for engine in bundle.manifest.engines if engine.backend == "tensorrt-rtx"]
    assert all(engine.kernel_cache and bundle.manifest.files[engine.kernel_cache].size > 0 for engine in engines)
    # One flipped byte, and the bundle is refused before TensorRT sees it.
    copy = tmp_path / "altered"
    shutil.copytree(bundle_path, copy)
    path = copy / engines[0].kernel_cache
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="it was altered"):
        open_bundle(copy)
