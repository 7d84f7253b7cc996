"""What compilers make of the generated C: no warning, no undefined behaviour, vector instructions, few of them."""

import ctypes
import functools
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.export.c_builder import C_FLAGS, SOURCE_NAME
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.comparison import action_errors
from tests.bundles import Deployed, Recipe, deploy, random_actions, reference_decode
from tests.export.c_library import FOLDER, compile_program, run, without_checks, write_code
from tests.export.plan_numpy import CODES, check_tokens

WARNINGS = ("-Wall", "-Wextra", "-Wpedantic")
V3, V4 = "-march=x86-64-v3", "-march=x86-64-v4"


def needs(program: str, package: str) -> pytest.MarkDecorator:
    reason = f"{program} is not installed: apt-get install {package}"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


needs_v3 = pytest.mark.skipif("x86-64-v3" not in host_targets(), reason=f"not an x86-64-v3: {platform.machine()}")
COMPILERS = [pytest.param("gcc", marks=needs("gcc", "gcc")), pytest.param("clang", marks=needs("clang", "clang"))]


def default_sizes(mode: DeployMode = DeployMode.CALIBRATED) -> Recipe:
    return Recipe(mode, ModelConfig(), chunk_length=8, prefixes=(3,), has_engine=False)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[DeployMode, tuple[Deployed, Path]]:
    """The default sizes in every mode with a code of its own: the model, and the folder with its code."""
    models = {mode: deploy(default_sizes(mode)) for mode in CODES}
    return {mode: (model, write_code(tmp_path_factory.mktemp(mode.value), model)) for mode, model in models.items()}


Codes = dict[DeployMode, tuple[Deployed, Path]]
#: The baseline of this machine, and where they can be compiled for, the levels above it.
MACHINES: list[tuple[str, ...]] = [(), (V3,), (V4,)] if platform.machine() == "x86_64" else [()]
#: (compiler, mode, machine): each compiler with each mode and each machine, and each mode with each machine. V3, where
#: instructions are read, is with all of them; gcc is with all modes where they are read of V4.
BUILDS = [
    (compiler, mode, machine)
    for compiler in ("gcc", "clang")
    for mode in CODES
    for machine in MACHINES
    if machine == MACHINES[-1] == ()
    or machine == (V3,)
    or (machine == (V4,) and (compiler == "gcc" or mode is DeployMode.DYNAMIC))
    or (machine == () and (compiler == "gcc") == (mode is DeployMode.DYNAMIC))
]


@pytest.fixture(scope="module")
def objects(codes: Codes) -> Callable[[str, DeployMode, tuple[str, ...]], tuple[Path, str]]:
    """Object file and what the compiler said, for a compiler, a mode and a machine."""

    @functools.cache
    def get(compiler: str, mode: DeployMode, machine: tuple[str, ...]) -> tuple[Path, str]:
        folder = codes[mode][1]
        output = folder / f"{compiler}{''.join(machine)}.o"
        return output, run([compiler, *C_FLAGS, *WARNINGS, *machine, "-fPIC", "-c", SOURCE_NAME, "-o", output], folder)

    return get


Objects = Callable[[str, DeployMode, tuple[str, ...]], tuple[Path, str]]

# --- languages --------------------------------------------------------------------------------------------------------


def machines_of(compiler: str, mode: DeployMode) -> list[tuple[str, ...]]:
    return [machine for own_compiler, own_mode, machine in BUILDS if (own_compiler, own_mode) == (compiler, mode)]


@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_compiler_has_anything_to_say(compiler: str, mode: DeployMode, objects: Objects) -> None:
    machines = machines_of(compiler, mode)
    assert machines
    assert [objects(compiler, mode, machine)[1] for machine in machines] == [""] * len(machines)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    "config", [ModelConfig(1, 1, 1, 1, 2), ModelConfig(7, 16, 64, 8, 8), ModelConfig(9, 17, 65, 1, 3)], ids=str
)
def test_nor_has_it_of_other_sizes(config: ModelConfig, compiler: str, tmp_path: Path) -> None:
    deployed = deploy(Recipe(config=config, chunk_length=1, prefixes=(), has_engine=False))
    folder = write_code(tmp_path, deployed)
    assert run([compiler, *C_FLAGS, *WARNINGS, "-c", SOURCE_NAME], folder) == ""


@pytest.mark.parametrize(("compiler", "plus"), [("gcc", "g++"), ("clang", "clang++")])
def test_a_program_in_cpp17_includes_and_links_it(compiler: str, plus: str, codes: Codes) -> None:
    for program in (compiler, plus):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install {program}")
    folder = codes[DeployMode.CALIBRATED][1]
    objects = folder / f"{compiler}.o"
    run([compiler, *C_FLAGS, "-c", SOURCE_NAME, "-o", objects], folder)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-DDECODE=rfsq_decode_l8", "-I."]
    assert run([plus, *flags, FOLDER / "plus.cpp", objects, "-o", "plus"], folder) == ""
    assert run([folder / "plus"], folder) == ""


# --- undefined behaviour ----------------------------------------------------------------------------------------------

SANITIZERS = ("-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")


@needs("gcc", "gcc")
@pytest.mark.parametrize(("mode", "chunk_length"), [*((mode, 3) for mode in CODES), (DeployMode.DYNAMIC, 8)])
def test_sanitizers_find_nothing(mode: DeployMode, chunk_length: int, tmp_path: Path) -> None:
    """In arrays of exactly their size, whole blocks and last steps, legal values and illegal ones.

    Up to 29 chunks of 3 steps: every number of last steps stands behind whole blocks. Chunks of 8 have none.
    """
    recipe = Recipe(mode, chunk_length=chunk_length)
    folder = write_code(tmp_path, deploy(recipe))
    program = compile_program(folder, FOLDER / "misuse.c", recipe, flags=("-std=c11", "-O1", *SANITIZERS))
    assert run([program], folder) == "nothing found\n"


@needs("gcc", "gcc")
@pytest.mark.parametrize("mode", CODES)
def test_nothing_is_broken_by_values_that_change_after_they_were_checked(mode: DeployMode, tmp_path: Path) -> None:
    recipe = Recipe(mode, chunk_length=3)
    folder = write_code(tmp_path, deploy(recipe))
    without_checks(folder)
    program = compile_program(folder, FOLDER / "unchecked.c", recipe, flags=("-std=c11", "-O1", *SANITIZERS))
    assert run([program], folder) == "nothing found\n"


@needs("gcc", "gcc")
def test_the_sanitizers_work(tmp_path: Path) -> None:
    """Or the test above would prove nothing: one step too many, and they say so."""
    recipe = Recipe()
    folder = write_code(tmp_path, deploy(recipe))
    source = (folder / SOURCE_NAME).read_text(encoding="utf-8")
    broken = source.replace("const size_t steps = num_chunks * T;", "const size_t steps = num_chunks * T + 1;")
    assert broken != source
    (folder / SOURCE_NAME).write_text(broken, encoding="utf-8")
    program = compile_program(folder, FOLDER / "misuse.c", recipe, flags=("-std=c11", "-O1", *SANITIZERS))
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


# --- instructions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_nothing_is_called_but_memcpy_and_the_like(compiler: str, mode: DeployMode, objects: Objects) -> None:
    """No libm, no allocator: what a real-time thread can be sure of."""
    for machine in machines_of(compiler, mode):
        output = objects(compiler, mode, machine)[0]
        undefined = {line.split()[-1] for line in run(["nm", "--undefined-only", output], output.parent).splitlines()}
        assert undefined <= {"memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}


@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_nothing_that_it_holds_can_be_written(compiler: str, mode: DeployMode, objects: Objects) -> None:
    """No global state: what could change has no byte."""
    output = objects(compiler, mode, machines_of(compiler, mode)[0])[0]
    lines = map(str.split, run(["size", "-A", output], output.parent).splitlines())
    sizes = {parts[0]: int(parts[1]) for parts in lines if len(parts) == 3 and parts[0].startswith(".")}
    assert sizes[".text"] > 0
    assert (sizes.get(".data", 0), sizes.get(".bss", 0)) == (0, 0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason=f"reads x86-64 instructions; this is {platform.machine()}")
@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_layers_are_packed_multiply_adds_of_eight_steps(compiler: str, mode: DeployMode, objects: Objects) -> None:
    output = objects(compiler, mode, (V3,))[0]
    text = run(["objdump", "--disassemble", "--no-show-raw-insn", output], output.parent)
    packed = len(re.findall(r"\bvfn?madd\d+ps .*%ymm", text))
    scalar = len(re.findall(r"\bvfn?madd\d+ss\b", text))
    # The sums of a layer side by side, in two layers of the encoder and two of a decoder.
    assert packed >= 4 * 8
    # What is left for one step at a time; clang takes a latent's own tokens so.
    assert scalar <= (packed / 8 if compiler == "gcc" else 2 * packed), f"{scalar} scalar, {packed} packed"


@pytest.mark.skipif(platform.machine() != "x86_64", reason=f"reads x86-64 instructions; this is {platform.machine()}")
@needs("gcc", "gcc")
@pytest.mark.parametrize("mode", CODES)
def test_where_vectors_are_twice_as_long_all_of_their_length_is_used(mode: DeployMode, objects: Objects) -> None:
    output = objects("gcc", mode, (V4,))[0]
    text = run(["objdump", "--disassemble", "--no-show-raw-insn", output], output.parent)
    wide = len(re.findall(r"\bvfn?madd\d+ps .*%zmm", text))
    narrow = len(re.findall(r"\bvfn?madd\d+ps .*%[xy]mm", text))
    assert wide >= 4 * 8
    assert narrow <= wide / 4, f"{narrow} narrow, {wide} wide"


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(), (V3,), (V4,)], ids=["baseline", "x86-64-v3", "x86-64-v4"])
def functions(request: pytest.FixtureRequest, codes: Codes) -> ctypes.CDLL:
    for flag in request.param:
        level = flag.removeprefix("-march=")
        if level not in host_targets():
            pytest.skip(f"not an {level}: {platform.machine()}")
    folder = codes[DeployMode.CALIBRATED][1]
    name = f"functions{''.join(request.param)}.so"
    run(
        ["gcc", *C_FLAGS, *request.param, "-I.", "-fPIC", "-shared", FOLDER / "functions.c", "-o", name],
        folder,
    )
    return ctypes.CDLL(str(folder / name))


def every_size(largest: float) -> np.ndarray:
    """Both signs, dense where functions bend, and all powers down to the smallest subnormal."""
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    powers = np.geomspace(smallest, largest, 200_000)
    dense = np.linspace(0, 30, 200_000)
    values = np.concatenate((powers, dense)).astype(np.float32)
    return np.concatenate((values, -values))


def ulps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance in units of float32's spacing at the expected value."""
    return np.abs(found - expected) / np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)


def call(function: object, values: np.ndarray) -> np.ndarray:
    """In blocks of 64, the last one filled up."""
    found = np.pad(values, (0, -len(values) % 64))
    function(len(found) // 64, ctypes.c_void_p(found.ctypes.data))
    return found[: len(values)]


def mish_float64(values: np.ndarray) -> np.ndarray:
    exact = values.astype(np.float64)
    return exact * np.tanh(np.logaddexp(0, exact))


def test_tanh_is_right_to_a_few_units_in_the_last_place(functions: ctypes.CDLL) -> None:
    """Measured: at most 2.5; the limit leaves room for compilers that round differently."""
    values = every_size(1e38)
    found = call(functions.tanh_of, values)
    assert np.isfinite(found).all()
    worst = ulps(found, np.tanh(values.astype(np.float64))).max()
    assert worst <= 4


def test_mish_is_right_to_a_few_units_in_the_last_place(functions: ctypes.CDLL) -> None:
    """Below zero to as many more as x is below it: what exp loses by the rounding of its argument, of a tiny number.

    Measured: 2.9 above zero, and 1.02 for every 1 below; the limits leave room for compilers that round differently.
    """
    values = every_size(1e38)
    values = values[values >= -80]
    worst = ulps(call(functions.mish_of, values), mish_float64(values)) / (5 + 1.25 * np.maximum(-values, 0))
    assert worst.max() <= 1, (values[worst.argmax()], worst.max())


def test_mish_of_what_is_far_below_zero_is_zero(functions: ctypes.CDLL) -> None:
    """Down to where float32 ends: with what is left of exp(-87), a large number would be one again."""
    found = call(functions.mish_of, -np.geomspace(80, 3.4e38, 100_000).astype(np.float32))
    assert (np.abs(found) <= 2e-33).all(), found[np.abs(found).argmax()]


# --- another processor ------------------------------------------------------------------------------------------------


def run_driver(command: list[object], folder: Path, deployed: Deployed) -> tuple[np.ndarray, ...]:
    """Tokens, statistics where there are any, and actions that the driver writes."""
    recipe, config = deployed.recipe, deployed.recipe.config
    output = folder / "output"
    run([*command, folder / "actions", output, 1, 1], folder)
    steps = (-1, recipe.chunk_length)
    chunk_bytes = (
        4
        * recipe.chunk_length
        * np.array(
            [config.latent_dim * config.num_layers, config.num_layers * 2 * recipe.mode.has_stats, config.action_dim]
        )
    )
    content = output.read_bytes()
    chunks = len(content) // int(chunk_bytes.sum())
    ends = np.cumsum(chunks * chunk_bytes)
    tokens, stats, actions = (
        content[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    )  # fmt: skip
    return (
        np.frombuffer(tokens, np.int32).reshape(*steps, config.latent_dim, config.num_layers),
        np.frombuffer(stats, np.float32),
        np.frombuffer(actions, np.float32).reshape(*steps, config.action_dim),
    )


@needs("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
@needs("qemu-aarch64", "qemu-user")
@pytest.mark.parametrize("mode", CODES)
def test_an_arm_processor_gives_the_same_answers(mode: DeployMode, codes: Codes) -> None:
    deployed, folder = codes[mode]
    actions = random_actions(deployed.recipe, 101)
    (folder / "actions").write_bytes(actions.tobytes())
    # Linked statically: the emulator needs no libraries of that processor.
    program = compile_program(
        folder, FOLDER / "driver.c", deployed.recipe, compiler="aarch64-linux-gnu-gcc", flags=(*C_FLAGS, "-static")
    )
    tokens, stats, decoded = run_driver(["qemu-aarch64", program], folder, deployed)
    assert tokens.shape == (101, 8, 16, 8)
    check_tokens(deployed, actions, tokens)
    sides = torch.from_numpy(stats.reshape(101, 8, 8, 2).copy()) if mode.has_stats else None
    expected = reference_decode(deployed.reference, torch.from_numpy(tokens.copy()), sides)
    assert action_errors(expected, decoded, deployed.reference.units.numpy()).value <= 1e-6

    here = compile_program(folder, FOLDER / "driver.c", deployed.recipe, flags=(*C_FLAGS, "-O1"))
    own_tokens, _, own_decoded = run_driver([here], folder, deployed)
    steady = (own_tokens == tokens).all(axis=(-1, -2))
    assert (own_tokens == tokens).mean() > 0.99
    assert action_errors(own_decoded[steady], decoded[steady], deployed.reference.units.numpy()).value <= 1e-6


# --- how many instructions --------------------------------------------------------------------------------------------

#: Instructions for one chunk of the default sizes, by the major version of gcc, at most 10 % above what was measured
#: with -march=x86-64-v3. For a version that is not there, the test skips and says in its reason what it measured (-rs).
BUDGETS: dict[str, dict[str, dict[str, int]]] = json.loads((FOLDER / "budgets.json").read_text(encoding="utf-8"))

#: Whether a call has logits, and whether it wants standard deviations.
BELIEFS = {"probabilities": (0, 0), "probabilities, std": (0, 1), "logits": (1, 0), "logits, std": (1, 1)}


def count(program: Path, folder: Path, encodes: int, decodes: int, *beliefs: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program]
    printed = run([*command, folder / "actions", folder / "counted", encodes, decodes, *beliefs], folder)
    found = re.search(r"Collected : (\d+)", printed)
    assert found is not None, printed
    return int(found[1])


@needs_v3
@needs("valgrind", "valgrind")
@needs("gcc", "gcc")
@pytest.mark.parametrize("mode", CODES)
def test_a_chunk_takes_no_more_instructions_than_its_budget(mode: DeployMode, codes: Codes) -> None:
    """Counted, not timed: the same on a busy machine."""
    version = run(["gcc", "-dumpversion"], Path.cwd()).strip().partition(".")[0]
    deployed, folder = codes[mode]
    (folder / "actions").write_bytes(random_actions(deployed.recipe, 1).tobytes())
    program = compile_program(folder, FOLDER / "driver.c", deployed.recipe, flags=(*C_FLAGS, V3))
    once = count(program, folder, 1, 1)
    found = {
        "encode": (count(program, folder, 201, 1) - once) / 200,
        "decode": (count(program, folder, 1, 201) - once) / 200,
    }
    for name, way in BELIEFS.items() if not mode.has_stats else ():
        found[name] = (count(program, folder, 1, 1, *way, 200) - once) / 200
    if version not in BUDGETS:
        pytest.skip(
            f"no budget for gcc {version}, which takes {found} instructions; add 10 % and record it in "
            f"{FOLDER.name}/budgets.json"
        )
    for what, budget in BUDGETS[version][mode.value].items():
        assert found[what] <= budget, (
            f"{what} takes {found[what]:.0f} instructions with gcc {version}, budget {budget}: make it faster, or "
            f"record {found[what] * 1.1:.0f} in tests/export/c/budgets.json and say why"
        )
