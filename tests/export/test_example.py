"""examples/decode_tokens.c, compiled as its first lines say and run as on a robot."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rfsq.export.c_builder import C_FLAGS, find_compiler
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime import ActionTokenizer
from tests.bundles import Recipe, random_actions, write_bundle

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "decode_tokens.c"
RECIPE = Recipe(config=ModelConfig(), chunk_length=8, prefixes=(3,), c_targets=(), has_engine=False)


def build_line() -> list[str]:
    """As it stands in the file."""
    (line,) = re.findall(r"^ \*     (cc .*?-o \w+)$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return shlex.split(line.replace("\\\n *", ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the root of the repository after a build, with the program."""
    root = tmp_path_factory.mktemp("root")
    (root / "examples").symlink_to(EXAMPLE.parent)
    write_bundle(root / "build" / "bundle", RECIPE)
    assert set(C_FLAGS) <= set(build_line())
    command = [*(find_compiler() or ["cc"]), "-Wpedantic", "-Werror", *build_line()[1:]]
    subprocess.run(command, cwd=root, check=True)
    return root


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["./decode_tokens", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> np.ndarray:
    with ActionTokenizer.load(folder / "build" / "bundle", backend="onnxruntime") as tokenizer:
        return tokenizer.encode(random_actions(RECIPE, 150))


@pytest.fixture(scope="module")
def actions(folder: Path, tokens: np.ndarray) -> np.ndarray:
    with ActionTokenizer.load(folder / "build" / "bundle", backend="onnxruntime") as tokenizer:
        return tokenizer.decode(tokens)


def test_it_writes_the_tokenizers_actions(
    folder: Path, tokens: np.ndarray, actions: np.ndarray, tmp_path: Path
) -> None:
    for count in (1, 64, 65, 150):
        tokens[:count].tofile(tmp_path / "tokens.bin")
        finished = run(folder, tmp_path / "tokens.bin", tmp_path / "actions.bin")
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
        found = np.fromfile(tmp_path / "actions.bin", np.float32).reshape(-1, 8, 7)
        np.testing.assert_allclose(found, actions[:count], rtol=0, atol=2e-6)


def test_it_prints_the_first_chunk(folder: Path, tokens: np.ndarray, actions: np.ndarray, tmp_path: Path) -> None:
    tokens.tofile(tmp_path / "tokens.bin")
    finished = run(folder, tmp_path / "tokens.bin")
    assert (finished.returncode, finished.stderr) == (0, "")
    found = np.array([line.split() for line in finished.stdout.splitlines()], float)
    np.testing.assert_allclose(found, actions[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [-1, 7, 2**31 - 1])
def test_an_illegal_token_anywhere_leaves_no_actions(
    value: int, folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    wrong = tokens.copy()
    wrong[-1, -1, -1, -1] = value
    wrong.tofile(tmp_path / "tokens.bin")
    for arguments in ([tmp_path / "tokens.bin", tmp_path / "actions.bin"], [tmp_path / "tokens.bin"]):
        finished = run(folder, *arguments)
        assert (finished.returncode, finished.stdout) == (1, "")
        assert "not all tokens are 0 ... 6: this is no file of tokens, or one of another model" in finished.stderr
    assert not (tmp_path / "actions.bin").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "is empty"),
        (1, "1 bytes follow after 0 whole chunks; expected 4096 bytes (int32[8][16][8]) a chunk"),
        (4095, "4095 bytes follow after 0 whole chunks"),
        (3 * 4096 + 4, "4 bytes follow after 3 whole chunks"),
    ],
)
def test_a_file_that_is_cut_short_leaves_no_actions(size: int, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(bytes(size))
    finished = run(folder, tmp_path / "tokens.bin", tmp_path / "actions.bin")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert message in finished.stderr
    assert not (tmp_path / "actions.bin").exists()


def test_files_that_cannot_be_opened_are_named(folder: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    finished = run(folder, tmp_path / "missing.bin")
    assert finished.returncode == 1
    assert "missing.bin: No such file" in finished.stderr
    tokens.tofile(tmp_path / "tokens.bin")
    finished = run(folder, tmp_path / "tokens.bin", tmp_path / "no folder" / "actions.bin")
    assert finished.returncode == 1
    assert "actions.bin: No such file" in finished.stderr
    if Path("/dev/full").exists():
        finished = run(folder, tmp_path / "tokens.bin", "/dev/full")
        assert finished.returncode == 1
        assert "/dev/full: cannot be written" in finished.stderr


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"]])
def test_a_wrong_command_line_shows_the_right_one(arguments: list[str], folder: Path) -> None:
    finished = run(folder, *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "usage: ./decode_tokens TOKENS [ACTIONS]\n"
