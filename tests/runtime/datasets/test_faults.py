"""Whatever call on a file the system refuses: a message, no traceback, no wrong dataset, and the next run goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.datasets.command import ROOT, arguments, run
from tests.runtime.datasets.samples import LAYOUTS, random_episodes, write_layout, write_npz

ERRORS = [errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EIO, errno.EROFS, errno.ENOENT]
#: Set to 1 to have every single call fail, which takes minutes.
EVERY = int(os.environ.get("RFSQ_FAULTS_EVERY", "23"))

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler, to refuse system calls"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "faulty_files.so"
    code = ROOT / "tests/runtime/datasets/faulty_files.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, code, "-ldl"], check=True)
    return library


def survive(shim: Path, *, output: Path, faulty: Path, given: list[str], before: Path, **more: Any) -> int:
    """How many calls there are."""
    output.parent.mkdir()
    settings = {"arguments": given, "output": str(output), "faulty": str(faulty), "before": str(before), **more}
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = [sys.executable, str(ROOT / "tests/runtime/datasets/faulty_runs.py"), json.dumps(settings)]
    result = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [
        ("x.parquet", [False, True]),
        ("x.zarr", [True, False]),
        ("x.parquet replaced", [True, False]),
        ("x.npz", [False, True]),
        ("x.hdf5", [True, False]),
    ],
)
def test_a_refused_call_on_the_output_is_survived(
    name: str, goes_on: list[bool], shim: Path, c_bundle: Path, tmp_path: Path
) -> None:
    source, options = write_npz(tmp_path / "source.npz", random_episodes([9000, 50])), ["--workers", "1"]
    output = tmp_path / "out" / name.split()[0]
    if name in ("x.npz", "x.hdf5"):
        run(source, tmp_path / "tokens.parquet", c_bundle)
        source, options = tmp_path / "tokens.parquet", ["--decode"]
    before = tmp_path / "nothing"
    if "replaced" in name:
        before = tmp_path / "old.parquet"
        run(write_npz(tmp_path / "old.npz", random_episodes([40])), before, c_bundle)
        options.append("--overwrite")
    given = arguments(source, output, c_bundle, *options)
    calls = survive(
        shim,
        output=output,
        faulty=output.parent,
        given=given,
        before=before,
        errors=ERRORS,
        every=EVERY,
        goes_on=goes_on,
    )
    assert calls > 20


@pytest.mark.parametrize("layout", [*LAYOUTS, "tokens"])
def test_a_refused_call_on_the_source_is_survived(layout: str, shim: Path, c_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    options = ["--workers", "1"]
    source = write_layout("stored.npz" if layout == "tokens" else layout, folder, random_episodes([9000, 50]))
    if layout == "tokens":
        run(source, folder / "tokens.parquet", c_bundle)
        source, options = folder / "tokens.parquet", [*options, "--decode"]
    output = tmp_path / "out/x.parquet"
    calls = survive(
        shim,
        output=output,
        faulty=folder,
        given=arguments(source, output, c_bundle, *options),
        before=tmp_path / "nothing",
        errors=[errno.ESTALE, errno.EIO, errno.EACCES, errno.ENOENT],
        every=max(EVERY // 2, 1),
        goes_on=[False],
    )
    assert calls > 10
