"""Engines for this machine, added to a bundle from elsewhere: what is added, what is refused, and what that leaves."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rfsq.export import engines
from rfsq.export.build_engine import config_of, main, parser
from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.c_builder import CLibrary
from rfsq.export.engines import Profile
from rfsq.export.on_target import TargetConfig
from rfsq.runtime import ActionTokenizer, BackendUnavailableError
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.replay import ReplayResult
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.gates import Check
from rfsq.runtime.bundle.golden import Golden, read_golden
from rfsq.runtime.bundle.manifest import C_SOURCE, GOLDEN_NAME, EngineEntry, Manifest
from tests.backends import without_packages
from tests.bundles import Recipe, bundle_files, c_entry, deploy, generate_c, proven, write_bundle
from tests.export.machine import needs_no_gpu, needs_rtx

ROOT = Path(__file__).parents[2]
RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("written") / "bundle", Recipe(c_targets=()))


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "bundle")


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
    assert config_of(parser().parse_args(["--from-bundle", "b"])) == TargetConfig(Path("b"))


def test_backends_and_batch_sizes_can_be_chosen() -> None:
    arguments = ["--from-bundle", "b", "--backends", "tensorrt", RTX, "--profile", "1", "2", "8"]
    assert config_of(parser().parse_args(arguments)) == TargetConfig(Path("b"), ("tensorrt", RTX), Profile(1, 2, 8))


OTHERS = {
    "--checkpoint": ["x.pt"],
    "--use-layernorm": [],
    "--weights": ["ema"],
    "--normaliser": ["x.json"],
    "--data": ["x.npz"],
    "--key": ["x"],
    "--filter-key": ["x"],
    "--readout": ["off"],
    "--output": ["elsewhere"],
    "--overwrite": [],
    "--conditioning": ["dynamic"],
    "--prefixes": ["1", "2"],
    "--chunk-length": ["4"],
    "--compute-capabilities": ["8.9"],
    "--parity-steps": ["7"],
    "--kind": ["chunk"],
    "--classes": ["8"],
    "--vocabulary": ["64"],
    "--tokens": ["9"],
    "--order": ["shared"],
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
    assert known == {*OTHERS, "--from-bundle", "--backend", "--profile", "--json"}


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda"])
def test_a_backend_without_engines_is_refused(backend: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["--from-bundle", bundle, "--backends", backend], capsys)
    assert f"backends ['{backend}'] have no engines to add; there are c, cuda, tensorrt-rtx, tensorrt" in message


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


def without_gpu(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def refuse() -> None:
        raise BackendUnavailableError(reason)

    monkeypatch.setattr("rfsq.export.engines._gpu", refuse)


def test_without_anything_to_build_engines_with_it_is_said_what_to_install(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_packages(monkeypatch, "tensorrt")
    monkeypatch.setattr("rfsq.export.engines.find_compiler", lambda: None)
    before = tree(bundle)
    without_gpu(monkeypatch, "there is no GPU")
    message = refused(["--from-bundle", bundle], capsys)
    assert "no engine can be added here: install gcc or clang for C, or TensorRT with pip" in message
    assert "pip install --constraint constraints.txt --editable '.[tensorrt-rtx,gpu]'" in message
    assert "c: no C compiler is here" in message
    assert tree(bundle) == before


@pytest.mark.usefixtures("one_target")
def test_without_a_choice_what_cannot_be_proven_here_is_left_out_and_the_rest_is_kept(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX is installed, as `make engine` does, and there is no GPU."""
    before = open_bundle(bundle).manifest
    without_packages(monkeypatch, "tensorrt")
    monkeypatch.setitem(BACKENDS, RTX, replace(BACKENDS[RTX], packages=()))
    without_gpu(monkeypatch, "CUDA finds no usable GPU here")
    assert main(["--from-bundle", str(bundle), "-v"]) == 0
    out = capsys.readouterr().out
    # Nor is it compiled first, which takes a while.
    assert "compile tensorrt-rtx" not in out
    assert re.search(r"^✓ .* has validated engines for c here\n", out, re.MULTILINE)
    assert re.search(r"^– tensorrt-rtx is left out: CUDA finds no usable GPU here$", out, re.MULTILINE)
    after = open_bundle(bundle).manifest
    assert [entry.status for entry in c_engines(after)] == ["validated"]
    assert [entry for entry in after.engines if entry.backend != "c"] == list(before.engines)


@needs_rtx
@needs_no_gpu
@pytest.mark.usefixtures("one_target")
def test_what_cannot_be_run_once_it_is_built_takes_the_place_of_nothing(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where TensorRT-RTX refuses the GPU that is there."""
    before = open_bundle(bundle).manifest
    monkeypatch.setattr("rfsq.export.engines._gpu", lambda: "a GPU")
    without_packages(monkeypatch, "cuda")
    assert main(["--from-bundle", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "compile tensorrt-rtx" in out
    assert re.search(r"^– tensorrt-rtx is left out: .*no usable GPU here", out, re.MULTILINE)
    after = open_bundle(bundle).manifest
    assert [entry for entry in after.engines if entry.backend != "c"] == list(before.engines)
    assert [entry.status for entry in c_engines(after)] == ["validated"]
    assert before.files.items() <= after.files.items()


@pytest.mark.usefixtures("without_tensorrt")
def test_where_nothing_can_be_built_each_reason_is_told(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    without_gpu(monkeypatch, "there is no GPU")
    before = tree(bundle)
    message = refused(["--from-bundle", bundle], capsys)
    assert re.search(r"(?s)no engine can be added here: .*\n  c: .*false.*ended with status 1", message)
    assert tree(bundle) == before


@needs_rtx
@needs_no_gpu
def test_without_a_gpu_nothing_is_added(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engines could be built, but nobody could say whether they are right."""
    before = tree(bundle)
    message = refused(["--from-bundle", bundle, "--backends", RTX], capsys)
    assert re.search(r"error: .*no usable GPU here.*check the driver with nvidia-smi", message, re.DOTALL)
    assert message.endswith("\nadd what can be proven here with --backend c\n")
    assert tree(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {entry.status for entry in open_bundle(bundle).manifest.engines} == {"built"}


# --- C ----------------------------------------------------------------------------------------------------------------


def c_engines(manifest: Manifest) -> list[EngineEntry]:
    return [entry for entry in manifest.engines if entry.backend == "c"]


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch, "tensorrt")


@pytest.mark.usefixtures("without_tensorrt")
def test_c_is_compiled_for_every_target_of_this_processor_and_proven(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_bundle(bundle).manifest
    assert main(["--from-bundle", str(bundle)]) == 0
    assert re.search(r"^✓ compile c ", capsys.readouterr().out, re.MULTILINE)
    after = open_bundle(bundle).manifest
    assert [entry.targets for entry in c_engines(after)] == [(target,) for target in host_targets()]
    for entry in c_engines(after):
        assert (entry.status, entry.precision, entry.device) == ("validated", "fp32", entry.targets[0])
        assert entry.source_sha256 == before.files[C_SOURCE].sha256
    proven = {(entry.backend, entry.device) for entry in after.parity if entry.backend == "c"}
    assert proven == {("c", target) for target in host_targets()}
    assert set(before.parity) < set(after.parity)
    # All else is as it was.
    assert [entry for entry in after.engines if entry.backend != "c"] == list(before.engines)
    assert (after.fingerprint, after.model, after.graphs) == (before.fingerprint, before.model, before.graphs)
    with ActionTokenizer.load(bundle) as tokenizer:
        assert tokenizer.backend.name == "c"


@pytest.mark.usefixtures("without_tensorrt", "one_target")
def test_adding_c_again_changes_nothing(bundle: Path) -> None:
    assert main(["--from-bundle", str(bundle)]) == 0
    first = tree(bundle)
    assert main(["--from-bundle", str(bundle), "--backends", "c"]) == 0
    assert tree(bundle) == first


@pytest.mark.usefixtures("without_tensorrt")
def test_what_is_there_and_proven_here_is_neither_compiled_nor_proven_again(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of the machine that built it is over many more steps than the golden vectors have."""
    least = host_targets()[-1]
    monkeypatch.setattr("rfsq.export.engines.host_targets", lambda: (least,))
    assert main(["--from-bundle", str(bundle)]) == 0
    strong = with_steps(bundle, 122_816)
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["--from-bundle", str(bundle), "--backend", "c"]) == 0
    out = capsys.readouterr().out
    after = open_bundle(bundle).manifest
    assert [entry.targets for entry in c_engines(after)] == [(least,), *((name,) for name in host_targets()[:-1])]
    assert set(strong.parity) <= set(after.parity)
    assert f"– c for {least}: already there, proven over 122,816 steps\n" in out
    told = re.findall(r"c for (\S+): \d+ gates hold over ([\d,]+) steps", out)
    model, golden = after.model, open_golden(bundle)
    steps = f"{len(golden.actions) * model.chunk_length:,}"
    assert told == [(name, steps) for name in host_targets()[:-1]]
    # One line a target: what each gate measured is told with -v.
    assert "wrong tokens" not in out
    assert len(out.splitlines()) <= 3 + 2 * len(host_targets())
    before = tree(bundle)
    assert main(["--from-bundle", str(bundle), "--backend", "c"]) == 0
    assert "compile" not in capsys.readouterr().out
    assert tree(bundle) == before


def test_an_interrupt_names_the_bundle(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rfsq.export.on_target.compilable", interrupt)
    assert main(["--from-bundle", str(bundle)]) == 130
    assert capsys.readouterr().err == f"interrupted; {bundle} is as it was\n"


@pytest.mark.usefixtures("without_tensorrt", "one_target")
def test_with_v_each_gate_is_told_with_its_target(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-bundle", str(bundle), "-v"]) == 0
    assert re.search(rf"c for {host_targets()[0]}, ✓ .*encode.*: wrong tokens: 0 ", capsys.readouterr().out)


@pytest.mark.usefixtures("without_tensorrt", "one_target")
def test_an_engine_that_is_there_and_wrong_here_is_compiled_anew(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--from-bundle", str(bundle)]) == 0
    first = tree(bundle)
    red = ReplayResult((Check("encode: wrong tokens", 1, 0, ""),))
    monkeypatch.setattr("rfsq.export.on_target.replay", lambda *_: red)
    assert main(["--from-bundle", str(bundle)]) == 1
    captured = capsys.readouterr()
    assert "already there" not in captured.out
    assert "wrong tokens" in captured.err
    assert tree(bundle) == first


def with_steps(bundle: Path, steps: int) -> Manifest:
    """The bundle with a proof of its C engines over so many steps, as a build gives it."""
    opened = open_bundle(bundle)
    parity = tuple(replace(entry, steps=steps) if entry.backend == "c" else entry for entry in opened.manifest.parity)
    with stage_bundle(bundle, overwrite=True) as staged:
        for file in opened.manifest.files:
            staged.write(file, opened.content(file))
        return staged.seal(replace(opened.manifest, parity=parity))


def open_golden(bundle: Path) -> Golden:
    opened = open_bundle(bundle)
    return read_golden(opened.content(GOLDEN_NAME), opened.manifest.model)


@pytest.mark.usefixtures("without_tensorrt", "one_target")
def test_engines_for_other_processors_stay(bundle: Path) -> None:
    """As in a bundle that goes to several robots."""
    strange = replace(c_entry(generate_c(deploy(Recipe(c_targets=()))), "riscv64"), file="engines/c/riscv64/x.so")
    with stage_bundle(bundle, overwrite=True) as staged:
        opened = open_bundle(bundle)
        for file in opened.manifest.files:
            staged.write(file, opened.content(file))
        staged.write(strange.file, b"for another processor")
        proofs = proven("c", "riscv64", opened.manifest.model)
        engines = (*opened.manifest.engines, strange)
        staged.seal(replace(opened.manifest, engines=engines, parity=(*opened.manifest.parity, *proofs)))
    assert main(["--from-bundle", str(bundle)]) == 0
    assert [entry.targets for entry in c_engines(open_bundle(bundle).manifest)] == [
        ("riscv64",),
        host_targets()[:1],
    ]


@pytest.mark.usefixtures("without_tensorrt", "one_target")
def test_c_that_does_not_compile_or_is_wrong_leaves_the_bundle_as_it_was(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(bundle)
    real = engines.compile_c

    def broken(header: str, source: str, target: str) -> CLibrary:
        return real(header, f"{source}\nno C", target)

    def wrong(header: str, source: str, target: str) -> CLibrary:
        changed = re.sub(r"(ENCODER_FIRST_BIAS\[\d+\] = \{\s*)-?0x[^,]+", r"\g<1>3.0f", source)
        assert changed != source
        return real(header, changed, target)

    monkeypatch.setattr(engines, "compile_c", broken)
    assert "error: " in refused(["--from-bundle", bundle], capsys)
    assert tree(bundle) == before
    monkeypatch.setattr(engines, "compile_c", wrong)
    assert main(["--from-bundle", str(bundle)]) == 1
    assert re.search(r"c.*: .*wrong tokens", capsys.readouterr().err)
    assert tree(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# --- what a robot has -------------------------------------------------------------------------------------------------

#: What adding engines must do without; the reference, the calibration and the export of graphs need it.
ABSENT = [
    "torch",
    "safetensors",
    "rfsq_ref",
    "calibration",
    "onnx",
    "polygraphy",
    "h5py",
    "pyarrow",
    "tqdm",
    "matplotlib",
    "scipy",
]
#: What C must do without, too: a robot that has numpy, a compiler and nothing else.
NO_LIBRARY = ("onnxruntime", "cuda", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")

GUARDED = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.removeprefix("rfsq.").partition(".")[0] in sys.argv[1].split(","):
            raise ImportError(f"the robot has no {name}")
sys.meta_path.insert(0, Absent())
sys.modules.update(dict.fromkeys(filter(None, sys.argv[2].split(","))))
from rfsq.export.build_engine import main
sys.exit(main(sys.argv[3:]))
"""


def without_torch(*arguments: object, absent: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """absent: more packages that are not installed."""
    return subprocess.run(
        [sys.executable, "-c", GUARDED, ",".join(ABSENT), ",".join(absent), *map(str, arguments)],
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


@pytest.mark.parametrize("chosen", [(), ("--backends", "c")], ids=["what can be proven", "c alone"])
def test_numpy_and_a_compiler_are_all_that_c_needs(chosen: Sequence[str], bundle: Path) -> None:
    finished = without_torch("--from-bundle", bundle, *chosen, absent=NO_LIBRARY)
    assert finished.returncode == 0, finished.stderr
    assert [entry.status for entry in c_engines(open_bundle(bundle).manifest)] == ["validated"] * len(host_targets())


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
