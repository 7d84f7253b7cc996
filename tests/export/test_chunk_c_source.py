"""The generated C of chunk tokens: the reference's answers for any size and prefix, and nothing where it refuses."""

import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.calibration.chunk import fit_chunk_code
from rfsq.export import chunk_c_source
from rfsq.export.c_builder import C_FLAGS, HEADER_NAME, SOURCE_NAME
from rfsq.export.chunk_c_source import c_chunk_tokenizer
from rfsq.export.chunk_plan import ACTION_LIMIT, plan_chunk_code
from rfsq.export.errors import BuildInputError, SourceTooLargeError
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.backend_specs import BACKENDS
from tests.export.c_library import FOLDER, ILLEGAL_VALUE, OK, UNTOUCHED, Array, run, without_checks
from tests.export.chunk_c_library import (
    FINGERPRINT,
    Library,
    check_actions,
    check_decoder,
    check_encoder,
    check_tokens,
    random_actions,
    random_tokenizer,
    random_tokens,
    write_code,
)
from tests.export.test_c_compilers import COMPILERS, MACHINES, SANITIZERS, V3, WARNINGS, needs
from tests.export.test_c_source import NATIVE
from tests.rfsq_ref.test_chunk_code import any_sizes, random_constants

#: Steps of a call that is refused as a whole.
CHECKED_STEPS = BACKENDS["c"].checked_steps


# --- answers ----------------------------------------------------------------------------------------------------------


@given(
    sizes=any_sizes(),
    seed=st.integers(0, 2**32),
    num_chunks=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.01, 0.2, 3.0]),
)
@settings(max_examples=25)
def test_a_code_of_any_size_gives_the_references_answers(
    sizes: ChunkSizes, seed: int, num_chunks: int, spread: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = Library(tmp_path_factory.mktemp("code"), random_tokenizer(sizes, seed))
    check_encoder(library, random_actions(library.tokenizer, num_chunks, spread, seed))
    for length in {1, (sizes.num_tokens + 1) // 2, sizes.num_tokens}:
        check_decoder(library, random_tokens(sizes, num_chunks, length, seed))


@pytest.mark.parametrize(
    "sizes",
    [
        ChunkSizes(1, 1, num_classes=2, token_bits=4, num_tokens=1),
        ChunkSizes(1, 1, num_classes=2, token_bits=16, num_tokens=1),
        ChunkSizes(2, 64, num_classes=3, token_bits=16, num_tokens=5),
        ChunkSizes(3, 1, num_classes=256, token_bits=9, num_tokens=4),
        ChunkSizes(64, 1, num_classes=3, token_bits=9, num_tokens=40),
        ChunkSizes(5, 1, num_classes=5, token_bits=10, num_tokens=9),
        # More tokens than latents can use, and as many as escape can.
        ChunkSizes(3, 5, num_classes=4, token_bits=8, num_tokens=33),
    ],
    ids=str,
)
def test_the_ends_of_what_sizes_may_be(sizes: ChunkSizes, tmp_path: Path) -> None:
    library = Library(tmp_path, random_tokenizer(sizes, seed=1))
    check_encoder(library, random_actions(library.tokenizer, 20, 0.1, seed=2))
    for length in range(1, sizes.num_tokens + 1):
        check_decoder(library, random_tokens(sizes, 40, length, seed=3))


@pytest.fixture(scope="module")
def fitted(split: EpisodeSplit) -> ChunkTokenizer:
    """To some of the demonstrations, with few classes: eight steps of seven dimensions, 45 tokens."""
    training, calibration = (
        [np.asarray(episode, np.float64) for episode in part.episodes[:count]]
        for part, count in ((split.train, 30), (split.calibration, 10))
    )
    sizes = ChunkSizes(action_dim=7, chunk_length=8, num_classes=16)
    return ChunkTokenizer(sizes, fit_chunk_code(training, calibration, sizes)).double()


@pytest.fixture(scope="module")
def library(fitted: ChunkTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("fitted"), fitted, NATIVE)


@pytest.fixture(scope="module")
def held_out(split: EpisodeSplit) -> Array:
    """Chunks of episodes that the fit has not seen: float32 [B, 8, 7]."""
    chunks = [episode[: len(episode) // 8 * 8].reshape(-1, 8, 7) for episode in split.validation.episodes]
    return np.concatenate(chunks).astype(np.float32)


def test_what_was_fitted_has_the_references_tokens(library: Library, held_out: Array) -> None:
    assert not check_encoder(library, held_out).any()
    expected = library.tokenizer.encode(torch.from_numpy(held_out).double()).numpy()
    # The others are within rounding of another cell.
    assert (library.encode(held_out)[1] == expected).mean() > 0.999


def test_what_is_far_from_all_demonstrations_is_coded_by_escape(library: Library) -> None:
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (100, 8, 7)).astype(np.float32)
    assert check_encoder(library, actions).all()
    _, tokens = library.encode(actions)
    error = np.abs(library.decode(tokens)[1] - actions.clip(-1, 1)).max()
    assert error <= library.tokenizer.code.bound(45) + 1e-6


@pytest.mark.parametrize("length", range(1, 46))
def test_every_prefix_decodes_as_the_references(length: int, library: Library) -> None:
    """Of any tokens, not only of those that an encoder gives."""
    check_decoder(library, random_tokens(library.sizes, 400, length, seed=length))


def test_of_classes_that_cost_the_same_the_first_is_sent(tmp_path: Path) -> None:
    sizes = ChunkSizes(2, 3, num_classes=5, num_tokens=6)
    constants = vars(random_constants(sizes, seed=4))
    for name in ("mean", "basis", "scale", "gain", "order"):
        constants[name] = constants[name][:1].expand_as(constants[name]).clone()
    library = Library(tmp_path, ChunkTokenizer(sizes, ChunkConstants(**constants)).double())
    status, tokens = library.encode(random_actions(library.tokenizer, 50, 0, seed=5))
    assert status == OK
    found = set((tokens[:, 0] >> 7).tolist())
    assert 0 in found
    assert found <= {0, sizes.escape}


def test_a_latent_has_cells_as_far_out_as_tanh_tells_them_apart(tmp_path: Path) -> None:
    """One latent of 17 bits, in every cell to the last; so narrow that escape is no better anywhere."""
    sizes = ChunkSizes(1, 1, num_classes=2, token_bits=9, num_tokens=2)
    constants = ChunkConstants(
        mean=torch.zeros(1, 1),
        basis=torch.ones(1, 1, 1),
        scale=torch.full((1, 1), 5e-4),
        gain=torch.ones(1, 1, MOST_BITS + 1),
        order=torch.zeros(1, 17, dtype=torch.long),
        budgets=(2,),
        weights=torch.ones(1),
    )
    library = Library(tmp_path, ChunkTokenizer(sizes, constants).double())
    reach = 6.5 * WIDTH * 5e-4
    actions = np.linspace(-reach, reach, 20_001, dtype=np.float32).reshape(-1, 1, 1)
    assert not check_encoder(library, actions).any()
    _, tokens = library.encode(actions)
    assert tokens[[0, -1]].tolist() == [[0, 0], [255, 511]]


def test_the_largest_legal_actions_are_coded_as_the_ends(tmp_path: Path) -> None:
    library = Library(tmp_path, random_tokenizer(ChunkSizes(2, 3, num_classes=5, num_tokens=10), seed=3))
    signs = np.random.default_rng(0).choice([-1, 1], (20, 3, 2)).astype(np.float32)
    ends = (signs * library.tokenizer.units.numpy() * 2 + library.tokenizer.offset.numpy()).astype(np.float32)
    status, tokens = library.encode(signs * np.float32(ACTION_LIMIT))
    assert status == OK
    np.testing.assert_array_equal(tokens, library.encode(ends)[1])


# --- batches and refusals ---------------------------------------------------------------------------------------------


def test_a_chunk_has_the_same_bits_whatever_stands_beside_it(library: Library, held_out: Array) -> None:
    actions = held_out[:21]
    _, tokens = library.encode(actions)
    _, decoded = library.decode(tokens)
    for chunk in range(len(actions)):
        np.testing.assert_array_equal(library.encode(actions[chunk : chunk + 1])[1][0], tokens[chunk])
        np.testing.assert_array_equal(library.decode(tokens[chunk : chunk + 1])[1][0], decoded[chunk])


def test_a_batch_may_be_empty(library: Library) -> None:
    assert library.encode(np.empty((0, 8, 7), np.float32))[0] == OK
    assert library.decode(np.empty((0, 45), np.int32))[0] == OK


@pytest.mark.parametrize("place", [0, 55, 8 * 56 - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.nextafter(np.float32(ACTION_LIMIT), np.float32(np.inf))])
def test_actions_that_no_number_holds_are_refused_untouched(value: float, place: int, library: Library) -> None:
    actions = np.zeros((CHECKED_STEPS // 8, 8, 7), np.float32)
    actions.flat[place] = value
    status, tokens = library.encode(actions)
    assert status == ILLEGAL_VALUE
    assert (tokens == UNTOUCHED).all()


@pytest.mark.parametrize("place", [0, 44, 8 * 45 - 1])
@pytest.mark.parametrize("value", [-1, 1024, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_vocabulary_are_refused_untouched(value: int, place: int, library: Library) -> None:
    tokens = np.zeros((CHECKED_STEPS // 8, 45), np.int32)
    tokens.flat[place] = value
    status, actions = library.decode(tokens)
    assert status == ILLEGAL_VALUE
    assert (actions == UNTOUCHED).all()


@pytest.mark.parametrize("length", [0, 46])
def test_numbers_of_tokens_that_no_chunk_has_are_refused_untouched(length: int, library: Library) -> None:
    status, actions = library.decode(np.zeros((2, length), np.int32))
    assert status == ILLEGAL_VALUE
    assert (actions == UNTOUCHED).all()


def test_a_longer_call_writes_whole_chunks_in_front_of_an_illegal_value(library: Library, held_out: Array) -> None:
    checked = CHECKED_STEPS // 8
    actions = held_out[: 3 * checked].copy()
    _, expected = library.encode(actions)
    actions[2 * checked - 1, 7, 6] = np.nan
    status, tokens = library.encode(actions)
    assert status == ILLEGAL_VALUE
    np.testing.assert_array_equal(tokens[:checked], expected[:checked])
    assert (tokens[checked:] == UNTOUCHED).all()


# --- what compilers make of it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def code(fitted: ChunkTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code(tmp_path_factory.mktemp("code"), fitted)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_compiler_has_anything_to_say_and_little_is_called(
    compiler: str, machine: tuple[str, ...], code: Path
) -> None:
    """No libm, no allocator, and nothing that can be written: what a real-time thread can be sure of."""
    output = code / f"{compiler}{''.join(machine)}.o"
    command = [compiler, *C_FLAGS, *WARNINGS, "-Wconversion", *machine, "-fPIC", "-c", SOURCE_NAME, "-o", output]
    assert run(command, code) == ""
    undefined = {line.split()[-1] for line in run(["nm", "--undefined-only", output], code).splitlines()}
    assert undefined <= {"memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}
    lines = map(str.split, run(["size", "-A", output], code).splitlines())
    sizes = {parts[0]: int(parts[1]) for parts in lines if len(parts) == 3 and parts[0].startswith(".")}
    assert sizes[".text"] > 0
    assert (sizes.get(".data", 0), sizes.get(".bss", 0)) == (0, 0)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("sizes", [ChunkSizes(1, 1, 2, 4, 1), ChunkSizes(3, 7, 9, 12, 8)], ids=str)
def test_nor_has_it_of_other_sizes(sizes: ChunkSizes, compiler: str, tmp_path: Path) -> None:
    write_code(tmp_path, random_tokenizer(sizes, seed=0))
    assert run([compiler, *C_FLAGS, *WARNINGS, "-Wconversion", "-c", SOURCE_NAME], tmp_path) == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason=f"reads x86-64 instructions; this is {platform.machine()}")
@needs("gcc", "gcc")
def test_costs_are_packed_multiply_adds(code: Path) -> None:
    run(["gcc", *C_FLAGS, V3, "-c", SOURCE_NAME, "-o", "packed.o"], code)
    text = run(["objdump", "--disassemble", "--no-show-raw-insn", "packed.o"], code)
    packed = len(re.findall(r"\bvfn?m(?:add|sub)\d+p[sd] .*%ymm", text))
    scalar = len(re.findall(r"\bvfn?m(?:add|sub)\d+s[sd]\b", text))
    assert packed >= 100
    assert scalar <= packed / 8, f"{scalar} scalar, {packed} packed"


@needs("gcc", "gcc")
@pytest.mark.parametrize("sizes", [ChunkSizes(2, 3, 5, 6, 9), ChunkSizes(3, 16, 3, 10, 4)], ids=str)
def test_sanitizers_find_nothing(sizes: ChunkSizes, tmp_path: Path) -> None:
    """In arrays of exactly their size, legal values and illegal ones."""
    write_code(tmp_path, random_tokenizer(sizes, seed=1))
    flags = ("-std=c11", "-O1", *SANITIZERS)
    run(["gcc", *flags, "-I.", FOLDER / "chunk_misuse.c", SOURCE_NAME, "-lm", "-o", "misuse"], tmp_path)
    assert run([tmp_path / "misuse"], tmp_path) == "nothing found\n"


@needs("gcc", "gcc")
@pytest.mark.parametrize(
    "sizes", [ChunkSizes(2, 3, 5, 6, 9), ChunkSizes(3, 1, 256, 9, 4), ChunkSizes(1, 1, 2, 16, 1)], ids=str
)
def test_nothing_is_broken_by_values_that_change_after_they_were_checked(sizes: ChunkSizes, tmp_path: Path) -> None:
    """Nor where the classes do not fill the bits of their number."""
    write_code(tmp_path, random_tokenizer(sizes, seed=1))
    without_checks(tmp_path)
    flags = ("-std=c11", "-O1", *SANITIZERS)
    run(["gcc", *flags, "-I.", FOLDER / "chunk_unchecked.c", SOURCE_NAME, "-lm", "-o", "unchecked"], tmp_path)
    assert run([tmp_path / "unchecked"], tmp_path) == "nothing found\n"


@pytest.mark.parametrize("target", [target for target in host_targets() if target.startswith("x86-64")])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_target_gives_the_references_answers(
    compiler: str, target: str, fitted: ChunkTokenizer, held_out: Array, tmp_path: Path
) -> None:
    library = Library(tmp_path, fitted, (*C_FLAGS, f"-march={target}"), compiler)
    check_encoder(library, held_out[:200])
    check_decoder(library, random_tokens(library.sizes, 400, 45, seed=1))


@needs("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
@needs("qemu-aarch64", "qemu-user")
def test_an_arm_processor_gives_the_references_answers(code: Path, fitted: ChunkTokenizer, held_out: Array) -> None:
    actions = held_out[:100]
    # Linked statically: the emulator needs no libraries of that processor.
    command = ["aarch64-linux-gnu-gcc", *C_FLAGS, "-static", "-I.", FOLDER / "chunk_driver.c", SOURCE_NAME, "-o", "arm"]
    assert run(command, code) == ""
    done = subprocess.run(["qemu-aarch64", code / "arm"], input=actions.tobytes(), capture_output=True, check=True)
    size = len(actions) * 45 * 4
    tokens = np.frombuffer(done.stdout[:size], np.int32).reshape(-1, 45).copy()
    assert not check_tokens(fitted, actions, tokens).any()
    check_actions(fitted, tokens, np.frombuffer(done.stdout[size:], np.float32).reshape(-1, 8, 7))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_the_header_says_what_the_code_is(tmp_path: Path) -> None:
    header = (write_code(tmp_path, random_tokenizer(ChunkSizes(2, 3, 5, 6, 9), seed=0)) / HEADER_NAME).read_text()
    said = dict(re.findall(r"^#define RFSQ_(\w+) (.+)$", header, re.MULTILINE))
    assert said == {
        "FINGERPRINT": f'"{FINGERPRINT}"',
        "MODE": '"chunk"',
        "CHUNK_LENGTH": "3",
        "ACTION_DIM": "2",
        "NUM_TOKENS": "9",
        "VOCABULARY": "64",
        "NUM_CLASSES": "5",
        "ACTION_LIMIT": "0x1.0000000000000p+126f",
        "CHECKED_STEPS": str(CHECKED_STEPS),
    }


@pytest.mark.parametrize("compiler", COMPILERS)
def test_large_tables_are_strings_of_the_same_numbers(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = random_tokenizer(ChunkSizes(5, 3, num_classes=7, token_bits=9, num_tokens=12), seed=3)
    spelled = Library(tmp_path / "spelled", tokenizer, compiler=compiler)
    monkeypatch.setattr(chunk_c_source, "MOST_SPELLED", 64)
    packed = Library(tmp_path / "packed", tokenizer, compiler=compiler)
    assert "BASIS_BYTES" in (tmp_path / "packed" / SOURCE_NAME).read_text(encoding="utf-8")
    assert run([compiler, *C_FLAGS, *WARNINGS, "-c", SOURCE_NAME], tmp_path / "packed") == ""
    actions = random_actions(tokenizer, 200, 0.1, seed=4)
    tokens = spelled.encode(actions)[1]
    assert np.array_equal(packed.encode(actions)[1], tokens)
    assert np.array_equal(packed.decode(tokens)[1], spelled.decode(tokens)[1])


def test_tables_that_are_too_large_for_a_source_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_chunk_code(random_tokenizer(ChunkSizes(2, 3, 5, 6, 9), seed=0))
    monkeypatch.setattr(chunk_c_source, "MOST_NUMBERS", 100)
    with pytest.raises(SourceTooLargeError, match=r"5 classes of 6 values .* has room for 100: .* fewer"):
        c_chunk_tokenizer(plan, FINGERPRINT)


def test_constants_that_no_float_holds_are_refused() -> None:
    plan = plan_chunk_code(random_tokenizer(ChunkSizes(2, 3, 5, 6, 9), seed=0))
    infinite = np.full_like(plan.inverse_width, np.inf)
    with pytest.raises(BuildInputError, match="which float32 does not hold"):
        c_chunk_tokenizer(replace(plan, inverse_width=infinite), FINGERPRINT)
