"""Runs `tokenize_dataset.py` as a person would, on small data in several parts."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import TokenizerError
from rfsq.runtime.datasets import conversion
from rfsq.runtime.datasets import tokenize as tokenize_dataset

ROOT = Path(__file__).parents[3]
#: The smallest parts that there are, so that little data makes several.
PART = 8192
LENGTHS = (9000, 1, 4000, 7000)


def arguments(source: Path, output: Path, bundle: Path, *options: str) -> list[str]:
    given = [str(bundle), "--data", str(source), "--output", str(output)]
    return [*given, "--steps-per-file", str(PART), *options]


def run(source: Path, output: Path, bundle: Path, *options: str) -> None:
    assert tokenize_dataset.main(arguments(source, output, bundle, *options)) == 0


def interrupt_at_the_end(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is made; then somebody presses Ctrl-C."""

    def interrupted(*_given: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "complete", interrupted)
        assert tokenize_dataset.main(given) == 130


def open_once(given: list[str]) -> None:
    """For a process whose forked children run the command again and again: none of them disturbs the bundle."""
    tokenizer = ActionTokenizer.load(given[0])

    def load(*_: object, **__: object) -> ActionTokenizer:
        return tokenizer

    conversion.ActionTokenizer.load = load  # type: ignore[method-assign, assignment]


def refusal(*given: str, kind: type[TokenizerError]) -> str:
    """The message; the exit status and the error's type are checked."""
    with pytest.raises(kind) as caught:
        conversion.convert(tokenize_dataset.parser().parse_args(given))
    assert tokenize_dataset.main(given) == 2
    return str(caught.value)


def files(folder: Path) -> dict[str, str]:
    """Hashes by name, of everything in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(*given: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "runtime/tokenize_dataset.py"), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
