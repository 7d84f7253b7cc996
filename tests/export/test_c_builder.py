"""The compiler of this machine: found or asked for, and refused with what it says of the source."""

import ctypes
import shutil
import stat
from pathlib import Path

import pytest

from rfsq.export.c_builder import compile_c, find_compiler
from rfsq.export.errors import EngineBuildError
from rfsq.runtime.backends.cpu_targets import host_targets
from tests.bundles import Recipe, deploy, generate_c

HOST = host_targets()[-1]
HEADER, SOURCE = "int answer(void);\n", '#include "rfsq_tokenizer.h"\nint answer(void)\n{\n    return 42;\n}\n'


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)


def script(path: Path, text: str) -> Path:
    """A program that does what a shell script says."""
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_library_has_the_functions_of_the_source_and_names_its_compiler(tmp_path: Path) -> None:
    library = compile_c(HEADER, SOURCE, HOST)
    (tmp_path / "library.so").write_bytes(library.content)
    assert ctypes.CDLL(str(tmp_path / "library.so")).answer() == 42
    assert any(character.isdigit() for character in library.compiler)
    assert "\n" not in library.compiler


def test_the_same_source_gives_the_same_library() -> None:
    """No path and no time is in it."""
    generated = generate_c(deploy(Recipe()))
    first, second = (compile_c(generated.header, generated.source, HOST) for _ in range(2))
    assert first == second
    assert b"/tmp/" not in first.content


@pytest.mark.skipif(len(host_targets()) < 2, reason=f"only {HOST} runs here")
def test_each_target_has_code_of_its_own() -> None:
    generated = generate_c(deploy(Recipe()))
    libraries = [compile_c(generated.header, generated.source, target) for target in host_targets()]
    assert len({library.content for library in libraries}) == len(libraries)


def test_the_one_named_in_the_environment_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_compiler()
    assert real is not None
    own = script(tmp_path / "own-cc", f'test "$1" = --version && echo "own compiler 1.0" || exec {real[0]} "$@"')
    monkeypatch.setenv("CC", str(own))
    assert find_compiler() == [str(own)]
    assert compile_c(HEADER, SOURCE, HOST).compiler == "own compiler 1.0"
    monkeypatch.setenv("CC", "missing-cc")
    assert find_compiler() is None


def test_a_launcher_may_stand_in_front_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_compiler()
    assert real is not None
    launcher = script(tmp_path / "launcher", 'exec "$@"')
    monkeypatch.setenv("CC", f"{launcher} {real[0]}")
    assert find_compiler() == [str(launcher), real[0]]
    assert compile_c(HEADER, SOURCE, HOST).content


def test_without_any_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    with pytest.raises(EngineBuildError, match=r"no C compiler is here: install gcc or clang, or name one .* as CC"):
        compile_c(HEADER, SOURCE, HOST)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_any_of_the_usual_names_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcc").symlink_to(shutil.which("gcc") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() == [str(tmp_path / "gcc")]


@pytest.mark.parametrize(("body", "said"), [("return missing", "missing"), ("return 42 +", "expected")])
def test_a_source_that_does_not_compile_is_refused_and_the_compiler_quoted(body: str, said: str) -> None:
    with pytest.raises(EngineBuildError) as caught:
        compile_c(HEADER, SOURCE.replace("return 42", body), HOST)
    message = str(caught.value)
    assert "-O3" in message
    assert "ended with status 1:\n" in message
    assert "rfsq_tokenizer.c:4" in message
    assert said in message


def test_what_a_compiler_merely_warns_of_is_no_reason_to_refuse_it() -> None:
    """One on a robot may be newer than any that we know; that those we know are silent is tested for themselves."""
    assert compile_c(HEADER, SOURCE.replace("return 42", "int unused; return 42"), HOST).content


def test_what_is_no_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_bytes(b"\x00\x01")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(EngineBuildError, match="broken-cc cannot be run: "):
        compile_c(HEADER, SOURCE, HOST)
    monkeypatch.setenv("CC", str(script(tmp_path / "failing-cc", "echo out of luck >&2; exit 7")))
    with pytest.raises(EngineBuildError, match=r"(?s)failing-cc .* ended with status 7:\nout of luck"):
        compile_c(HEADER, SOURCE, HOST)


def test_nothing_is_left_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compile_c(HEADER, SOURCE, HOST)
    with pytest.raises(EngineBuildError):
        compile_c(HEADER, "no C", HOST)
    assert list(tmp_path.iterdir()) == []
