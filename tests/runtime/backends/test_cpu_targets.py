"""Which compiled engines a processor runs, from what the machine says of itself."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from rfsq.runtime.backends import cpu_targets

V3 = "fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"

TargetsOf = Callable[[str, str], tuple[str, ...]]


@pytest.fixture
def targets_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TargetsOf:
    """For a machine and the flags of its processor."""

    def get(machine: str, flags: str) -> tuple[str, ...]:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nflags\t\t: none\n", encoding="utf-8")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(cpu_targets, "Path", lambda _path: tmp_path / "cpuinfo")
        return cpu_targets.host_targets.__wrapped__()

    return get


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_a_processor_with_all_instructions_of_a_level_runs_it_and_what_is_below(
    machine: str, targets_of: TargetsOf
) -> None:
    assert targets_of(machine, V3) == ("x86-64-v3", "x86-64")


def test_avx512_is_a_level_of_its_own(targets_of: TargetsOf) -> None:
    assert targets_of("x86_64", V4) == ("x86-64-v4", "x86-64-v3", "x86-64")


@pytest.mark.parametrize("missing", V3.split()[2:])
def test_where_one_instruction_is_missing_the_level_is_not_tried(missing: str, targets_of: TargetsOf) -> None:
    flags = " ".join(flag for flag in V3.split() if flag != missing)
    assert targets_of("x86_64", flags) == ("x86-64",)


@pytest.mark.parametrize(("machine", "target"), [("aarch64", "aarch64"), ("arm64", "aarch64"), ("riscv64", "riscv64")])
def test_other_architectures_have_one_target(machine: str, target: str, targets_of: TargetsOf) -> None:
    assert targets_of(machine, V3) == (target,)


def test_where_nothing_tells_the_flags_only_the_baseline_is_certain(
    targets_of: TargetsOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    targets_of("x86_64", V3)
    monkeypatch.setattr(cpu_targets, "Path", lambda _path: tmp_path / "missing")
    assert cpu_targets.host_targets.__wrapped__() == ("x86-64",)
