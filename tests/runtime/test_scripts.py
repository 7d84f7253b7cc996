"""The robot's scripts: what they print and return, and that they need numpy and the backend alone."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rfsq.runtime.backends import onnxruntime as ort_backend
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.manifest import MANIFEST_NAME, manifest_text, parse_manifest
from rfsq.runtime.qualification import inspection as inspect_bundle
from rfsq.runtime.qualification import selftest
from tests.backends import offer, without_packages
from tests.bundles import Recipe, deploy, write_bundle

ROOT = Path(__file__).parents[2]
FORBIDDEN = (
    "torch",
    "onnx",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
    "rfsq.rfsq_ref",
    "rfsq.calibration",
    "rfsq.export",
)


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def isolated(code: str) -> str:
    """Run `code` where importing anything a robot does not have fails."""
    prelude = f"import sys\nfor name in {FORBIDDEN}:\n    sys.modules[name] = None\n"
    result = run("-W", "error", "-c", prelude + code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_importing_runtime_imports_numpy_and_no_backend() -> None:
    result = run(
        "-c",
        "import sys, runtime; runtime.ActionTokenizer; print(*sorted({name.split('.')[0] for name in sys.modules}))",
    )
    loaded = set(result.stdout.split())
    assert {"numpy", "runtime"} <= loaded
    assert loaded.isdisjoint({*FORBIDDEN, "onnxruntime"})


def test_importing_the_tokenizer_loads_few_modules() -> None:
    """What only some calls need is imported by them."""
    result = run(
        "-c",
        "import sys, runtime; runtime.ActionTokenizer\n"
        "print(*(name for name, module in sys.modules.items() if name.startswith('runtime.')"
        " and not hasattr(module, '__path__')))",
    )
    assert {name.removeprefix("runtime.") for name in result.stdout.split()} == {
        *("backends.contract", "backends.registry", "belief_methods", "tokenizer"),
        *(
            f"bundle.{name}"
            for name in (
                *(
                    "advice",
                    "arrays",
                    "backend_specs",
                    "errors",
                    "fidelity",
                    "folder",
                    "gates",
                    "manifest",
                    "models",
                    "contents",
                    "modes",
                ),
                *("paths", "reading", "validation"),
            )
        ),
    }


def test_loading_encoding_and_decoding_need_numpy_and_the_backend_alone(bundle: Path) -> None:
    printed = isolated(
        "import numpy as np\n"
        "from runtime import ActionTokenizer\n"
        f"with ActionTokenizer.load({str(bundle)!r}, backend='onnxruntime') as tokenizer:\n"
        "    tokens = tokenizer.encode(np.zeros((1, 2, 3), np.float32))\n"
        "    print(tokenizer.decode(tokens).shape)\n"
        "    loaded = {name.split('.')[0] for name in sys.modules if sys.modules[name] is not None}\n"
        "    print('torch' in loaded, 'onnx' in loaded)\n"
    )
    assert printed.split("\n")[:2] == ["(1, 2, 3)", "False False"]


def test_selftest_needs_numpy_and_the_backend_alone(bundle: Path) -> None:
    printed = isolated(f"from rfsq.runtime.qualification.selftest import main\nsys.exit(main([{str(bundle)!r}]))")
    assert "✓ onnxruntime:" in printed


@pytest.mark.parametrize("script", ["selftest.py", "inspect_bundle.py"])
def test_scripts_run_from_any_folder(script: str, bundle: Path, tmp_path: Path) -> None:
    result = run(str(ROOT / "runtime" / script), str(bundle), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert open_bundle(bundle).manifest.fingerprint in result.stdout


@pytest.mark.parametrize("script", ["selftest.py", "inspect_bundle.py"])
def test_scripts_print_on_any_terminal(script: str, bundle: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "runtime" / script), str(bundle)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u2713 " in result.stdout


@pytest.mark.parametrize("script", ["selftest.py", "inspect_bundle.py"])
def test_scripts_end_quietly_when_the_reader_of_a_pipe_has_left(script: str, bundle: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, str(ROOT / "runtime" / script), str(bundle)],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (-signal.SIGPIPE, b"")


def test_a_robot_without_cuda_python_loads_on_the_processor_and_says_what_the_gpu_needs(bundle: Path) -> None:
    printed = isolated(
        f"""
sys.modules["cuda"] = None
import logging
from rfsq.runtime import ActionTokenizer, BackendUnavailableError
from rfsq.runtime.backends import registry
registry._GPU_TRACES = ("/",)
# Not that faster code could be had: another test has that.
logging.getLogger("rfsq.runtime").setLevel(logging.ERROR)
print(ActionTokenizer.load({str(bundle)!r}).backend.name)
try:
    ActionTokenizer.load({str(bundle)!r}, backend="onnxruntime-cuda")
except BackendUnavailableError as error:
    print(error)
"""
    )
    name, message = printed.splitlines()
    assert name == "onnxruntime"
    assert message.startswith("what a backend on the GPU needs does not load: ")
    assert message.endswith("install cuda-python with: pip install --constraint constraints.txt --editable '.[gpu]'")


# --- selftest ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is installed where these tests run makes no difference: ONNX Runtime on the CPU is the one backend."""
    monkeypatch.setattr(ort_backend.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    without_packages(monkeypatch, "tensorrt")


@pytest.mark.usefixtures("without_gpu")
def test_selftest_names_all_backends_of_an_absent_gpu_in_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfsq.runtime.backends.registry._GPU_TRACES", ())
    assert selftest.main([str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "– cuda, tensorrt-rtx, tensorrt, onnxruntime-cuda: not tested: no NVIDIA GPU is here" in out
    assert "pip install" not in out
    # Where a driver is, each has its reason.
    monkeypatch.setattr("rfsq.runtime.backends.registry._GPU_TRACES", ("/",))
    assert selftest.main([str(bundle)]) == 0
    assert "\n– tensorrt: not tested: " in capsys.readouterr().out


def test_selftest_without_any_backend_gives_each_reason_once(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str, _bundle: object) -> None:
        raise BackendUnavailableError(f"no {name} today")

    monkeypatch.setattr("rfsq.runtime.backends.registry.create_backend", none)
    assert selftest.main([str(bundle)]) == 2
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("no onnxruntime today") == 1


@pytest.mark.usefixtures("without_gpu")
def test_selftest_shows_every_check_beside_its_limit(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([str(bundle), "-v"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("✓ 16 files")
    for line in (
        "– cuda: not tested: CUDA finds no usable GPU here",
        f"– c: not tested: {bundle} has no C engine for ",
        "– tensorrt: not tested: tensorrt is not installed; install it with: pip install --constraint "
        "constraints.txt --editable '.[tensorrt,gpu]'",
        "– onnxruntime-cuda: not tested: ONNX Runtime ",
    ):
        assert [found for found in lines if found.startswith(line)], line
    checks = [line for line in lines if line.startswith("onnxruntime: ✓")]
    assert "onnxruntime: ✓ encode, batch 6: wrong tokens: 0 ≤ 0" in checks
    assert sum("decode 2 layers" in line and line.split(": ")[-1].endswith("≤ 1e-05") for line in checks) == 3
    assert "✗" not in "".join(lines)


@pytest.mark.usefixtures("without_gpu")
def test_selftest_of_one_backend(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfsq.runtime.backends.registry._GPU_TRACES", ())
    assert selftest.main([str(bundle), "--backend", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU is here, and cuda needs one (")
    monkeypatch.setattr("rfsq.runtime.backends.registry._GPU_TRACES", ("/",))
    assert selftest.main([str(bundle), "--backend", "onnxruntime"]) == 0
    assert "not tested" not in capsys.readouterr().out
    assert selftest.main([str(bundle), "--backend", "tensorrt"]) == 2
    assert capsys.readouterr().err.startswith("error: tensorrt is not installed; install it with: pip install ")
    assert selftest.main([str(bundle), "--backend", "onnxruntime-cuda"]) == 2
    assert capsys.readouterr().err.endswith("was built without CUDA; install onnxruntime-gpu in its place\n")
    with pytest.raises(SystemExit) as caught:
        selftest.main([str(bundle), "--backend", "guess"])
    assert caught.value.code == 2


@pytest.mark.usefixtures("without_gpu")
def test_selftest_shows_all_failures_and_returns_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deployed = deploy(Recipe(seed=0))
    deployed.exported = deploy(Recipe(seed=1)).reference
    assert selftest.main([str(write_bundle(tmp_path / "bundle", deployed)), "-v"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for batch in (1, 2, 6):
        assert any(
            line.startswith(f"onnxruntime: ✗ encode, batch {batch}: wrong tokens") and "token [" in line
            for line in lines
        )
        for prefix in (2, 3):
            assert any(
                line.startswith(f"onnxruntime: ✗ decode {prefix} layers, batch {batch}: max |action error|")
                for line in lines
            )
    assert any(line.startswith("✗ onnxruntime: 13 of 20 checks ") for line in lines)


@pytest.mark.usefixtures("without_gpu")
def test_selftest_tests_the_c_engine_of_a_bundle_that_has_one(
    bundle_of: Callable[[Recipe], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(bundle_of(Recipe(c_targets=(host_targets()[0],))))
    assert selftest.main([folder]) == 0
    assert "✓ c: " in capsys.readouterr().out
    assert selftest.main([folder, "--backend", "c"]) == 0
    assert inspect_bundle.main([folder, "-v"]) == 0
    printed = capsys.readouterr().out
    assert f"c a compiler, for {host_targets()[0]}, from engines/c/rfsq_tokenizer.c, " in printed
    assert "✓ validated: it passed the parity gates" in printed


def test_loading_a_c_engine_needs_numpy_alone(bundle_of: Callable[[Recipe], Path]) -> None:
    printed = isolated(
        "sys.modules['onnxruntime'] = None\n"
        "import numpy as np\n"
        "from runtime import ActionTokenizer\n"
        f"with ActionTokenizer.load({str(bundle_of(Recipe(c_targets=(host_targets()[0],))))!r}) as tokenizer:\n"
        "    print(tokenizer.backend.name, tokenizer.encode(np.zeros((1, 2, 3), np.float32)).shape)\n"
    )
    assert printed == "c (1, 2, 4, 3)\n"


def test_selftest_without_any_backend_returns_2(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, {}, alone=True)
    assert selftest.main([str(bundle)]) == 2
    assert "no backend can be used" in capsys.readouterr().err


# --- inspect_bundle ---------------------------------------------------------------------------------------------------


def test_inspection_shows_what_is_in_the_bundle(altered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (altered / "notes.txt").write_text("x", encoding="utf-8")
    assert inspect_bundle.main([str(altered), "-v"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "mode         calibrated: Robust RFSQ with constant mean and scale",
        "T 2, A 3, D 4, L 3, K 5, hidden 8; decodes 2, 3 layers",
        "encoder.onnx: encoder, actions float32[B, 2, 3] -> tokens int32[B, 2, 4, 3]",
        "reduce/encoder.onnx: encoder, actions float32[B, 2, 3] -> tokens int32[B, 2, 4, 3]",
        "decoder_l2.onnx: decoder of 2 layers, tokens int32[B, 2, 4, 2] -> actions float32[B, 2, 3]",
        "tensorrt-rtx 1.6.1.120, for 8.9, from reduce/decoder.onnx, B 1 ... 64, tuned for 1",
        "– built, NOT validated: it was never run (inspected (network) but not run: no GPU)",
        "✓ onnxruntime, encode: wrong tokens: 0 ≤ 0 over 120000 steps",
        "not listed in the manifest, never read: notes.txt",
        '"file": "random"',
    ):
        assert part in printed
    assert "✓ validated" not in printed


def test_inspection_and_selftest_speak_of_chunk_tokens(chunk_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_bundle.main([str(chunk_bundle), "-v"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "mode         chunk: chunk tokens: a Robust RFSQ over the whole chunk",
        "T 4, A 3, 9 tokens of 256, 6 classes; decodes any first of 9 tokens",
        "encoder.onnx: encoder, actions float32[B, 4, 3] -> tokens int32[B, 9]",
        "decoder.onnx: decoder of at most 9 tokens, tokens int32[B, l] -> actions float32[B, 4, 3]",
    ):
        assert part in printed
    assert "layers" not in printed
    assert selftest.main([str(chunk_bundle), "-v", "--backend", "c"]) == 0
    printed = capsys.readouterr().out
    assert "c: ✓ decode 9 tokens, batch 1: max |action error|" in printed
    assert "c: ✓ decode fewer tokens, batch 12: max |action error|" in printed


def test_inspection_and_selftest_show_what_the_tokens_are_worth(
    bundle_of: Callable[[Recipe], Path], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = str(bundle_of(Recipe(error=2.0)))
    assert inspect_bundle.main([rated, "-v"]) == 0
    printed = capsys.readouterr().out
    assert "what the tokens are worth: worthless; in robot units: RMS error at most" in printed
    assert "on 50 steps of own.npz (held-out episodes)" in printed
    assert re.search(r"^  dimension 2, robot units .* worthless$", printed, re.MULTILINE)
    assert "  WARNING: the tokens are worthless" in printed
    assert inspect_bundle.main([rated, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"]["fidelity"]["steps"] == 50
    assert inspect_bundle.main([rated, "-q"]) == 0
    assert capsys.readouterr().out.endswith("sizes and sha256 as in the manifest; the tokens are worthless\n")
    assert selftest.main([rated]) == 0
    assert "– what the tokens are worth, by the build: worthless; in robot units: " in capsys.readouterr().out
    assert inspect_bundle.main([str(bundle), "-v"]) == 0
    assert "what the tokens are worth: not recorded" in capsys.readouterr().out


def test_inspection_obeys_no_control_characters(altered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = altered / MANIFEST_NAME
    manifest = parse_manifest(path.read_text(encoding="utf-8"))
    hostile = "\x1b[2J\r\n✓ all is well\x9b\u202e"
    manifest = replace(
        manifest,
        engines=(replace(manifest.engines[0], detail=hostile),),
        parity=(replace(manifest.parity[0], detail=hostile), *manifest.parity[1:]),
        tools={hostile: hostile},
        provenance={hostile: hostile},
    )
    path.write_text(manifest_text(manifest), encoding="utf-8")
    (altered / hostile).write_text("x", encoding="utf-8")
    for options in ([], ["-v"], ["-q"], ["--json"]):
        assert inspect_bundle.main([str(altered), *options]) == 0
        printed = capsys.readouterr().out
        assert all(character.isprintable() for character in printed.replace("\n", ""))
        assert not any("all is well" in line for line in printed.splitlines() if line.startswith("✓"))
    (altered / hostile).unlink()
    path.write_text(manifest_text(replace(manifest, files={hostile: manifest.files["golden.npz"]})), encoding="utf-8")
    for script in (inspect_bundle, selftest):
        assert script.main([str(altered)]) == 2
        assert all(character.isprintable() for character in capsys.readouterr().err.replace("\n", ""))


def test_inspection_as_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_bundle.main([str(bundle), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.pop("unlisted_files") == []
    written = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    del written["manifest_sha256"]
    # Of a bundle of before it was recorded.
    assert content.pop("quality") is None
    assert content == written


def test_inspection_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_bundle.main([str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err
