"""Engines for the GPU of this machine, added to a bundle from elsewhere: what is refused, and what that leaves."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from export.build_engine import main, parse_arguments
from export.on_target import TargetConfig
from export.trt_builder import Profile
from runtime.bundle import open_bundle
from tests.bundles import Recipe, bundle_files, write_bundle
from tests.export.machine import needs_no_gpu, needs_rtx

ROOT = Path(__file__).parents[2]
RTX = "tensorrt-rtx"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", Recipe())


def tree(folder: Path) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in bundle_files(folder)}


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status: object = main(list(map(str, arguments)))
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2, captured
    assert "Traceback" not in captured.err
    assert "validated engines" not in captured.out
    return captured.err


# --- arguments --------------------------------------------------------------------------------------------------------


def test_the_bundle_is_all_that_is_needed() -> None:
    assert parse_arguments(["--from-bundle", "b"]) == TargetConfig(Path("b"))


def test_backends_and_batch_sizes_can_be_chosen() -> None:
    arguments = ["--from-bundle", "b", "--backends", "tensorrt", RTX, "--profile", "1", "2", "8"]
    assert parse_arguments(arguments) == TargetConfig(Path("b"), ("tensorrt", RTX), Profile(1, 2, 8))


OTHERS = {
    "--checkpoint": ["x.pt"],
    "--use-layernorm": [],
    "--normaliser": ["x.json"],
    "--calibration-data": ["x.npz"],
    "--key": ["x"],
    "--output": ["elsewhere"],
    "--overwrite": [],
    "--conditioning": ["dynamic"],
    "--prefixes": ["1", "2"],
    "--chunk-length": ["4"],
    "--compute-capabilities": ["8.9"],
    "--parity-steps": ["7"],
}


@pytest.mark.parametrize("flag", OTHERS)
def test_what_a_finished_bundle_cannot_change_is_refused_by_name(
    flag: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(bundle)
    message = refused(["--from-bundle", bundle, flag, *OTHERS[flag]], capsys)
    assert f"{flag} cannot be changed in a bundle that is built; leave them out with --from-bundle" in message
    assert tree(bundle) == before


def test_all_such_flags_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["--from-bundle", "b", "--prefixes", 2, "--checkpoint", "x.pt", "--overwrite"], capsys)
    assert "--checkpoint, --overwrite, --prefixes cannot be changed" in message


def test_every_flag_is_either_for_the_target_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that is added one day must not be passed over."""
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert known == {*OTHERS, "--from-bundle", "--backends", "--profile"}


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda", "openvino"])
def test_a_backend_without_engines_is_refused(backend: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["--from-bundle", bundle, "--backends", backend], capsys)
    assert f"backends ['{backend}'] have no engines to add; there are tensorrt, tensorrt-rtx" in message


# --- bundles and machines that cannot be used -------------------------------------------------------------------------


@needs_rtx
def test_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no bundle at" in refused(["--from-bundle", tmp_path / "missing"], capsys)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_an_altered_bundle_is_refused_and_left_alone(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "reduce" / "encoder.onnx").write_bytes(b"x" * (bundle / "reduce" / "encoder.onnx").stat().st_size)
    before = tree(bundle)
    assert "reduce/encoder.onnx in " in refused(["--from-bundle", bundle], capsys)
    assert tree(bundle) == before


def test_without_any_tensorrt_its_installation_is_shown(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.on_target.available_tensorrt", lambda: ())
    before = tree(bundle)
    assert "no TensorRT is installed here: install one with pip install '.[tensorrt-rtx,gpu]'" in refused(
        ["--from-bundle", bundle], capsys
    )
    assert tree(bundle) == before


@needs_rtx
@needs_no_gpu
def test_without_a_gpu_nothing_is_added(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engines could be built, but nobody could say whether they are right."""
    before = tree(bundle)
    message = refused(["--from-bundle", bundle, "--backends", RTX], capsys)
    assert re.search(r"error: .*no usable GPU here.*check the driver with nvidia-smi", message, re.DOTALL)
    assert tree(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {entry.status for entry in open_bundle(bundle).manifest.engines} == {"built"}


# --- what a robot has -------------------------------------------------------------------------------------------------

#: What adding engines must do without; the reference, the calibration and the export of graphs need it.
ABSENT = ("torch", "safetensors", "rfsq_ref", "calibration", "h5py", "pyarrow")

GUARDED = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ImportError(f"the robot has no {{name}}")
sys.meta_path.insert(0, Absent())
from export.build_engine import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARDED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_guard_against_torch_works(tmp_path: Path) -> None:
    """Or the test below would prove nothing."""
    finished = without_torch("--output", tmp_path / "bundle")
    assert finished.returncode == 1
    assert "ImportError: the robot has no " in finished.stderr
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@needs_no_gpu
def test_engines_are_compiled_without_torch(bundle: Path) -> None:
    before = tree(bundle)
    finished = without_torch("--from-bundle", bundle, "--backends", RTX)
    assert finished.returncode == 2, finished.stderr
    assert re.search(r"^✓ open bundle ", finished.stdout, re.MULTILINE)
    assert re.search(r"^✓ compile tensorrt-rtx ", finished.stdout, re.MULTILINE)
    assert "finds no usable GPU here" in finished.stderr
    assert "the robot has no" not in finished.stderr
    assert tree(bundle) == before
