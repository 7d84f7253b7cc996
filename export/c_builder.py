"""Compiles the generated C source with this machine's compiler, for each level of its architecture."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rfsq.export.errors import EngineBuildError
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE

HEADER_NAME, SOURCE_NAME = (PurePosixPath(file).name for file in (C_HEADER, C_SOURCE))
#: Flags that the source is exact and fast with. No sum is reordered and no value changes by them, but for a product and
#: a sum that round once instead of twice; the others promise that nobody reads errno or floating-point exceptions.
C_FLAGS = ("-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")

NO_COMPILER = "no C compiler is here: install gcc or clang, or name one in the environment as CC"

_COMPILERS = ("cc", "gcc", "clang")
_WARNINGS = ("-Wall", "-Wextra", "-Wpedantic")
_TIMEOUT_S = 300


@dataclass(frozen=True)
class CLibrary:
    """A shared library. compiler: what it says of itself."""

    compiler: str
    content: bytes


def find_compiler() -> list[str] | None:
    """`CC` from the environment, else the first C compiler on the path."""
    wanted = shlex.split(os.environ.get("CC", ""))
    if wanted:
        # A launcher such as ccache may stand in front.
        return wanted if shutil.which(wanted[0]) else None
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    return None if found is None else [found]


def compile_c(header: str, source: str, target: str) -> CLibrary:
    """Compile for one target, such as `x86-64-v3`. Raises EngineBuildError."""
    compiler = find_compiler()
    if compiler is None:
        raise EngineBuildError(NO_COMPILER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / HEADER_NAME).write_text(header, encoding="utf-8")
        (folder / SOURCE_NAME).write_text(source, encoding="utf-8")
        output = folder / "library.so"
        machine = [f"-march={target}"] if target.startswith("x86-64") else []
        command = [*compiler, *C_FLAGS, *_WARNINGS, *machine, "-fPIC", "-shared", SOURCE_NAME, "-o", output.name]
        _run(command, folder)
        return CLibrary(_version(compiler), output.read_bytes())


def _version(compiler: list[str]) -> str:
    lines = _run([*compiler, "--version"], Path.cwd()).splitlines()
    return lines[0].strip() if lines else Path(compiler[0]).name


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineBuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise EngineBuildError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
