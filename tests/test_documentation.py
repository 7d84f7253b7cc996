"""Commands and code of README and docs run as they stand, and both spellings of a command say the same."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from rfsq.rfsq_ref.checkpoints import Checkpoint, save_checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.runtime import ActionTokenizer, ControlConfig, ControlDecoder
from rfsq.runtime.bundle.advice import COMMANDS
from rfsq.runtime.control.config import ActionKind
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.once import once
from tests.rfsq_ref.published_model import ActionRFSQAE
from tests.warm_python import run_warm

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What a block may be. Those that nothing runs are text, or are tested as the comment says.
LANGUAGES = {
    "bash": "run",
    "console": "the lines behind `$` are run",
    "python": "run, behind what the document showed before",
    "c": "compiled, against the header of a bundle",
    "cpp": "needs ROS; `tests/export/c` compiles its constants",
    "cmake": "needs CMake; its flags are those of `rfsq.export.c_builder`",
    "toml": "tests/runtime/control/test_config.py reads it",
    "text": "output, trees and arrows",
}
#: Commands that are not run here, and why.
NOT_RUN = {
    r"make (engine|test|quick|lint|package|mutants)": "CI runs them, or they take minutes",
    r"make time-c .*HAS_STATS": "needs a `dynamic` bundle; tests/export/test_c_timing.py has one",
    r"pip install|apt-get install|python3 -m venv|\.venv-sim/bin/pip": "installs packages",
    r"\.venv-sim/": "needs the simulator",
    r"RFSQ_REQUIRE_GPU=1": "needs a GPU",
    r"taskset |python runtime/bench.py build/bundle --output": "measures for minutes",
    r"python rfsq_ref/rollout.py": "needs the simulator, for hours",
    r"python export/build_engine.py --overwrite": "the bundle that every document starts from",
    r"python rfsq_ref/compare.py --(data|output|report-only)": "minutes, or as in tests/evidence/test_report.py",
    r"python evidence/documents.py": "writes into the docs; tests/evidence/test_documents.py does all else",
    r"nvidia-cuda-mps-control": "needs a GPU",
    r"python evidence/train_peers.py": "needs a GPU, for minutes; tests/evidence/test_chunk_comparison.py is quicker",
    r"python evidence/policy_study.py": "needs a GPU, for minutes; tests/evidence/test_policy_study.py is quicker",
    r"python evidence/belief_study.py": "needs a GPU, for minutes; tests/evidence/test_belief_study.py is quicker",
    r"python calibration/fit.py .*--beliefs": "needs a policy; tests/calibration/test_belief_fitting.py has one",
    r"python evidence/policy_loop.py": "needs a GPU and the simulator; tests/evidence/test_policy_loop.py is quicker",
    r"python evidence/compare_chunks.py": "minutes; tests/evidence/test_chunk_comparison.py is quicker",
    r"python -m tests\.parity": "take many minutes; tests/parity/test_sizes.py is quicker",
    r"python examples/control_loop.py": "judges its timing; tests/examples/test_control_loop.py runs it",
    r"python examples/belief_training.py": "many minutes; tests/examples/test_belief_training.py is quicker",
    r"python examples/speculative_decoding.py": "two minutes; tests/examples/test_speculative_decoding.py is quicker",
    r"python runtime/tokenize_dataset.py build/bundle --data IN .*--engine ray": "needs a Ray cluster",
}
#: Python that is not run here, by a line of it, and why.
PYTHON_NOT_RUN = {
    "    while True:": "needs a robot",
    'backend="cuda")': "needs a GPU",
}
#: What a document takes for granted.
BEFORE = {
    "integration.md": """
import numpy as np, torch
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.folder import open_bundle
old = new = open_bundle("build/bundle")
tokens = np.zeros((1, 8, 16, 8), np.int32)
recorded = np.zeros((4, 8, 7), np.float32)
chunk = torch.zeros(1, 8, 7)
logits = torch.zeros(1, 8, 16, 8, 7)
""",
    "beliefs.md": """
from pathlib import Path
from rfsq.runtime import BeliefSettings
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.bundle.folder import open_bundle
kind = BeliefKind(open_bundle("build/bundle").manifest.fingerprint, "tokens", 8, 3)
Path("build/beliefs").mkdir()
Path("build/beliefs/logits.json").write_text(BeliefSettings(kind, (1.2,) * 8, {"expected": (0.5,) * 7}).text())
""",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: language, text, and the line that it begins in."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def commands(block: Block) -> list[str]:
    """Each with its comment, lines that end in a backslash joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None)


def quickened(command: str) -> str:
    """Trained as long, judged on as many steps and timed as often as tests can wait for."""
    command = re.sub(r"\s+#.*", "", command)
    if "bench.py" in command:
        return f"{command} --backend c --rounds 1"
    if "make time-c" in command:
        return f"{command} STEPS=10000"
    if "study.py" in command:
        return command.replace("episodes.hdf5", "few_episodes.hdf5")
    if "--kind chunk" in command:
        command += " --classes 8"
        # Of `make engine` there is one already.
        command += " --overwrite" if "build_engine.py" in command else ""
    if "train.py" in command:
        return f"{command} --epochs 20"
    if "build_engine.py" not in command or "--from-bundle" in command:
        return command
    if re.search("--conditioning (recovered|dynamic)", command) and "--checkpoint" not in command:
        command += " --checkpoint model.pt --data episodes.hdf5"
    return f"{command} --parity-steps 2000 --backend c onnxruntime"


def bundle_of(command: str, folder: Path, factory: pytest.TempPathFactory) -> Path:
    """What a build makes in a folder like any other `workspace`: several documents show the same, which is done once.

    Returns a folder to copy from.
    """
    command = quickened(command)
    # The order of options does not matter.
    what = " ".join(sorted(re.split(r"\s+(?=--)", re.sub(r"\s*(--output \S+|--overwrite)", "", command))))

    def build(path: Path) -> None:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        shutil.copytree(folder / output_of(command), path.with_suffix(".partly"))
        path.with_suffix(".partly").rename(path)

    return once(factory, f"documented-{hashlib.sha256(what.encode()).hexdigest()[:8]}", build)


def output_of(command: str) -> str:
    """The folder of a build, from where it runs."""
    given = re.search(r"--output (\S+)", command)
    return given[1] if given else "build/chunk"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make engine` builds, and what a policy was trained on."""
    path = tmp_path_factory.mktemp("built") / "bundle"
    return bundle_of(f"python export/build_engine.py --output {path}", ROOT, tmp_path_factory)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def chunk_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of chunk tokens of the shipped demonstrations' sizes, with random constants."""
    recipe = ChunkRecipe(ChunkSizes(action_dim=7, chunk_length=8), has_normaliser=False)
    return once(tmp_path_factory, "documented-chunk-tokens", lambda path: write_chunk_bundle(path, recipe))


@pytest.fixture
def workspace(
    tmp_path: Path, built: Path, chunk_tokens: Path, demonstrations: ActionDataset, robust: Checkpoint
) -> Iterator[Path]:
    """A checkout after `make engine`, beside the files of a user that the documents name."""
    for name in ("rfsq", "rfsq_ref", "runtime", "calibration", "evidence", "export", "examples", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    shutil.copytree(built, tmp_path / "build" / "bundle")
    shutil.copytree(chunk_tokens, tmp_path / "build" / "chunk")
    (tmp_path / "OLD").symlink_to(built)
    (tmp_path / "NEW").symlink_to(built)
    # Of half the layers: maps of recovered decoders take seconds with eight.
    robust = replace(robust, config=replace(robust.config, num_layers=4))
    published = ActionRFSQAE(num_layers=4, use_layernorm=True)
    published.load_state_dict(robust.weights, strict=False)
    torch.save({"model": published.state_dict(), "config": published.config}, tmp_path / "model.pt")
    for name in ("seed0", "seed1"):
        save_checkpoint(robust, tmp_path / f"{name}.safetensors")
    for name, count, length in (("episodes", 12, 80), ("few_episodes", 8, 40)):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for index, episode in enumerate(demonstrations.episodes[:count]):
                file[f"data/demo_{index}/actions"] = episode[:length]
    np.zeros((1, 8, 16, 8), np.int32).tofile(tmp_path / "tokens.bin")
    config = ControlConfig(0.05, (-1.0,) * 7, (1.0,) * 7, (0.5,) * 7, (ActionKind.DELTA,) * 7)
    with ActionTokenizer.load(built) as tokenizer, ControlDecoder(tokenizer, config) as decoder:
        decoder.warmup()
        decoder.step(np.zeros((1, 8, 16, 8), np.int32))
        assert decoder.write_flight_record(tmp_path / "flight.npz")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def run(command: str | list[str], workspace: Path) -> subprocess.CompletedProcess[str]:
    # Those that import torch; a build from a bundle does not.
    if isinstance(command, str) and re.match(r"python (export|calibration|rfsq_ref)/(?!.*--from-bundle)", command):
        return run_warm(shlex.split(command)[1:], workspace, environment())
    return subprocess.run(
        command, shell=isinstance(command, str), cwd=workspace, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_shows_runs(path: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shown = BEFORE.get(path.name, "")
    for block in blocks(path):
        where = f"{path.name}:{block.line}"
        if block.language in ("bash", "console"):
            for command in commands(block):
                if reason(command) is None:
                    check(command, workspace, where, tmp_path_factory)
        elif block.language == "python" and not any(line in block.text for line in PYTHON_NOT_RUN):
            shown += block.text
        elif block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "c":
            source = f'#include "build/bundle/engines/c/rfsq_tokenizer.h"\n{block.text}'
            (workspace / "shown.c").write_text(source)
            done = run("cc -std=c11 -Wall -Wextra -Werror -fsyntax-only shown.c", workspace)
            assert done.returncode == 0, f"{where}: {done.stderr}"
    # Behind the commands, whose files some of it reads, and in one process: blocks go on from those before.
    done = run([sys.executable, "-c", shown], workspace)
    assert done.returncode == 0, f"{path.name}: {done.stderr}"


def check(command: str, workspace: Path, where: str, factory: pytest.TempPathFactory) -> None:
    """A command whose compiler or emulator is missing is not run. Its comment may name another status than 0."""
    tool = command.split()[0]
    if tool.startswith(("aarch64-", "qemu-")) and not (shutil.which(tool) and shutil.which("aarch64-linux-gnu-gcc")):
        return
    if "-march=x86-64-v3" in command and " avx2 " not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return
    if "build_engine.py" in command and "--from-bundle" not in command:
        output = workspace / output_of(command)
        assert "--overwrite" in quickened(command) or not output.exists(), f"{where}: {command}"
        bundle = bundle_of(command, workspace, factory)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(bundle, output)
        return
    status = re.search(r"#.*exit status (\d)", command)
    done = run(quickened(command), workspace)
    assert done.returncode == (int(status[1]) if status else 0), f"{where}: {command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_what_it_is(path: Path) -> None:
    assert [block.line for block in blocks(path) if block.language not in LANGUAGES] == []
    assert path.read_text(encoding="utf-8").count("\n```") % 2 == 0


def test_the_readme_lists_every_command_with_its_script() -> None:
    listed = re.findall(r"\| `(\w+)` \| `(\w+/\w+\.py)` ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert dict(listed) == {name: entry.script for name, entry in COMMANDS.items()}


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    shown = [block for path in DOCUMENTS for block in blocks(path)]
    lines = [line for block in shown if block.language in ("bash", "console") for line in commands(block)]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []
    code = "".join(block.text for block in shown if block.language == "python")
    assert [line for line in PYTHON_NOT_RUN if line not in code] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


# Both spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_both_spellings_of_a_command_explain_themselves_alike(name: str) -> None:
    script = COMMANDS[name].script
    # Wide, so that the length of the name moves no line end.
    there, here = (
        subprocess.run(
            [sys.executable, *start, "--help"], cwd=ROOT, env={**environment(), "COLUMNS": "2000"}, capture_output=True,
            text=True, check=False,
        )
        for start in (["-m", "rfsq", name], [script])
    )  # fmt: skip
    assert (there.returncode, there.stderr) == (here.returncode, here.stderr) == (0, "")
    assert there.stdout.startswith(f"usage: rfsq {name} ")
    assert there.stdout.replace(f"rfsq {name}", Path(script).name) == here.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("inspect", ["BUNDLE"]),
        ("selftest", ["BUNDLE", "--backend", "c"]),
        ("compat", ["BUNDLE", "BUNDLE", "--data", "rfsq_ref/assets/demonstrations.npz"]),
        ("selftest", ["nowhere"]),
        ("build", ["--key", "actions"]),
        ("train", ["--data", "nowhere.npz"]),
        ("calibrate", ["--key", "actions"]),
        ("replay", ["BUNDLE", "nowhere.npz"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_both_spellings_of_a_command_do_the_same(name: str, arguments: list[str], built: Path) -> None:
    given = [str(built) if argument == "BUNDLE" else argument for argument in arguments]
    there, here = (
        run([sys.executable, *start, *given], ROOT) for start in (["-m", "rfsq", name], [COMMANDS[name].script])
    )
    said = [re.sub(r"\d+\.\d+ s\b", "… s", done.stdout) for done in (there, here)]
    assert (there.returncode, said[0], there.stderr) == (here.returncode, said[1], here.stderr)
