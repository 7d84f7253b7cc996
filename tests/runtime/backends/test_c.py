"""The C engine behind the tokenizer: which library is called, with which arrays, and what it leaves alone."""

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer, BackendUnavailableError, InferenceError, InvalidInputError
from rfsq.runtime.backends import c as c_backend
from rfsq.runtime.backends.c import CBackend
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.registry import create_backend
from rfsq.runtime.bundle.errors import IllegalValueError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.manifest import C_HEADER
from tests.bundles import Recipe, random_actions
from tests.processes import ends_well

BEST, LEAST = host_targets()[0], host_targets()[-1]
RECIPE = Recipe(c_targets=(BEST,))

BundleOf = Callable[[Recipe], Path]


@pytest.fixture(scope="module")
def opened(bundle_of: BundleOf) -> Bundle:
    return open_bundle(bundle_of(RECIPE))


@pytest.fixture(scope="module")
def backend(opened: Bundle) -> CBackend:
    return CBackend(opened)


@pytest.fixture(scope="module")
def tokenizer(bundle_of: BundleOf) -> ActionTokenizer:
    return ActionTokenizer.load(bundle_of(RECIPE), backend="c")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(DeployMode))
def test_auto_takes_it_first_and_it_passes_the_golden_vectors(mode: DeployMode, bundle_of: BundleOf) -> None:
    with ActionTokenizer.load(bundle_of(replace(RECIPE, mode=mode))) as tokenizer:
        assert tokenizer.backend.name == "c"
        assert tokenizer.backend.description == f"generated C for {BEST}, a compiler"
    with ActionTokenizer.load(bundle_of(Recipe(mode=mode))) as tokenizer:
        assert tokenizer.backend.name == "onnxruntime"


@pytest.mark.parametrize("mode", list(DeployMode))
def test_its_answers_are_onnx_runtimes(mode: DeployMode, bundle_of: BundleOf) -> None:
    recipe = replace(RECIPE, mode=mode)
    actions = random_actions(recipe, 50)
    with (
        ActionTokenizer.load(bundle_of(recipe), backend="c") as own,
        ActionTokenizer.load(bundle_of(recipe), backend="onnxruntime") as other,
    ):
        if mode.has_stats:
            (tokens, stats), (expected, _) = own.encode_with_stats(actions), other.encode_with_stats(actions)
            np.testing.assert_array_equal(own.encode(actions), tokens)
        else:
            tokens, stats, expected = own.encode(actions), None, other.encode(actions)
        assert (tokens == expected).mean() > 0.99
        for prefix in (2, 3):
            part = np.ascontiguousarray(tokens[..., :prefix])
            side = None if stats is None else np.ascontiguousarray(stats[..., :prefix, :])
            np.testing.assert_allclose(own.decode(part, side), other.decode(part, side), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(BEST == LEAST, reason=f"only {LEAST} runs here")
def test_a_lesser_target_can_be_asked_for_and_says_so(bundle_of: BundleOf) -> None:
    opened = open_bundle(bundle_of(replace(RECIPE, c_targets=(LEAST, BEST))))
    for target, expected in ((None, BEST), (BEST, BEST), (LEAST, LEAST)):
        backend = CBackend(opened, target)
        assert (backend.name, backend.device, backend.engines_in_use[0].entry.targets) == ("c", expected, (expected,))
    with ActionTokenizer.load(bundle_of(replace(RECIPE, c_targets=(LEAST,)))) as tokenizer:
        assert (tokenizer.backend.name, tokenizer.backend.device) == ("c", LEAST)


def test_values_are_refused_by_their_place_as_anywhere(tokenizer: ActionTokenizer) -> None:
    actions, tokens = random_actions(RECIPE, 3), np.zeros((3, 2, 4, 3), np.int32)
    out_tokens, out = np.full_like(tokens, 77), np.full_like(actions, 77)
    for value in (np.nan, np.inf, -1e38):
        wrong = actions.copy()
        wrong[1, 0, 2] = value
        with pytest.raises(InvalidInputError, match=r"\[1, 0, 2\]"):
            tokenizer.encode_into(wrong, out_tokens)
    for value in (-1, 5, 2**31 - 1):
        wrong = tokens.copy()
        wrong[2, 1, 3, 0] = value
        with pytest.raises(InvalidInputError, match=r"\[2, 1, 3, 0\]"):
            tokenizer.decode_into(wrong, out)
    assert (out_tokens == 77).all()
    assert (out == 77).all()


def test_of_a_long_batch_with_an_illegal_value_nothing_is_written_either(tokenizer: ActionTokenizer) -> None:
    """Longer than what the engine checks before it writes."""
    actions, tokens = random_actions(RECIPE, 100), np.zeros((100, 2, 4, 3), np.int32)
    assert 100 * 2 > tokenizer.backend.checked_steps > 0
    out_tokens, out = np.full_like(tokens, 77), np.full_like(actions, 77)
    actions[-1, -1, -1], tokens[-1, -1, -1, -1] = np.nan, 5
    with pytest.raises(InvalidInputError, match=r"\[99, 1, 2\]"):
        tokenizer.encode_into(actions, out_tokens)
    with pytest.raises(InvalidInputError, match=r"\[99, 1, 3, 2\]"):
        tokenizer.decode_into(tokens, out)
    assert (out_tokens == 77).all()
    assert (out == 77).all()


def test_it_checks_as_many_steps_as_its_header_says(opened: Bundle, backend: CBackend) -> None:
    header = opened.content(C_HEADER).decode()
    assert f"#define RFSQ_CHECKED_STEPS {backend.checked_steps}\n" in header


def test_without_a_tokenizer_in_front_the_engine_itself_refuses_them(backend: CBackend) -> None:
    tokens, out = np.full((1, 2, 4, 3), 5, np.int32), np.full((1, 2, 3), 77, np.float32)
    with pytest.raises(InferenceError, match="the C engine refuses the tokens"):
        backend.decode_into(tokens, None, out)
    assert (out == 77).all()
    actions, tokens = np.full((1, 2, 3), np.nan, np.float32), np.full((1, 2, 4, 3), 77, np.int32)
    with pytest.raises(InferenceError, match="the C engine refuses the actions"):
        backend.encode_into(actions, tokens, None)
    assert (tokens == 77).all()


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_read_only_arrays_are_read(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(RECIPE, 3)
    expected = tokenizer.encode(actions)
    decoded = tokenizer.decode(expected)
    actions.flags.writeable = False
    tokens = tokenizer.encode(actions)
    np.testing.assert_array_equal(tokens, expected)
    tokens.flags.writeable = False
    np.testing.assert_array_equal(tokenizer.decode(tokens), decoded)


def test_no_chunks_at_all_are_none(tokenizer: ActionTokenizer, backend: CBackend) -> None:
    tokens = tokenizer.encode(np.empty((0, 2, 3), np.float32))
    assert tokens.shape == (0, 2, 4, 3)
    assert tokenizer.decode(tokens).shape == (0, 2, 3)
    backend.encode_into(np.empty((0, 2, 3), np.float32), tokens, None)


def test_parts_of_larger_arrays_are_written_and_nothing_beside_them(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(RECIPE, 5)
    tokens, out = np.full((7, 2, 4, 3), 77, np.int32), np.full((7, 2, 3), 77, np.float32)
    tokenizer.encode_into(actions, tokens[1:6])
    tokenizer.decode_into(tokens[1:6], out[1:6])
    np.testing.assert_array_equal(tokens[1:6], tokenizer.encode(actions))
    for array in (tokens, out):
        assert (array[[0, 6]] == 77).all()


def test_calls_leave_nothing_behind(tokenizer: ActionTokenizer) -> None:
    actions, tokens = random_actions(RECIPE, 3), np.empty((3, 2, 4, 3), np.int32)
    out = np.empty_like(actions)

    def call() -> None:
        tokenizer.encode_into(actions, tokens)
        tokenizer.decode_into(tokens, out)

    for _ in range(100):
        call()
    before = sys.getallocatedblocks()
    for _ in range(10_000):
        call()
    # One object of any kind for each call would be 10,000 blocks; what else this process does makes a few hundred.
    assert sys.getallocatedblocks() - before < 5000


# --- the same arrays again: arguments are made once -------------------------------------------------------------------


@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def test_the_same_arrays_again_are_read_anew(mode: DeployMode, bundle_of: BundleOf) -> None:
    recipe = replace(RECIPE, mode=mode)
    backend = CBackend(open_bundle(bundle_of(recipe)))
    has_stats = mode is DeployMode.DYNAMIC
    actions, tokens, out = np.empty((3, 2, 3), np.float32), np.empty((3, 2, 4, 3), np.int32), np.empty((3, 2, 3), "f4")
    stats = np.empty((3, 2, 3, 2), np.float32) if has_stats else None
    for seed in range(6):
        actions[...] = random_actions(recipe, 3, seed=seed)
        backend.encode_into(actions, tokens, stats)
        backend.decode_into(tokens, stats, out)
        # Through other arrays, which have never come before.
        other, fresh = np.empty_like(tokens), None if stats is None else np.empty_like(stats)
        backend.encode_into(actions.copy(), other, fresh)
        again = np.empty_like(out)
        backend.decode_into(other, fresh, again)
        assert (tokens == other).all()
        np.testing.assert_array_equal(out, again)
        if stats is not None:
            np.testing.assert_array_equal(stats, fresh)
            # Without statistics it is another call, though actions and tokens are the same.
            backend.encode_into(actions, tokens, None)


def test_arrays_take_turns(backend: CBackend) -> None:
    """As the two of a double buffer do, or those of two robots."""
    sets = [(random_actions(RECIPE, 2, seed=seed), np.empty((2, 2, 4, 3), np.int32)) for seed in range(3)]
    expected = []
    for actions, _ in sets:
        fresh = np.empty((2, 2, 4, 3), np.int32)
        backend.encode_into(actions.copy(), fresh, None)
        expected.append(fresh)
    for turn in (0, 0, 0, 1, 1, 0, 2, 1, 1, 1, 0, 2, 2, 2, 0):
        actions, tokens = sets[turn]
        tokens.fill(-7)
        backend.encode_into(actions, tokens, None)
        assert (tokens == expected[turn]).all()


def test_an_array_that_changes_its_shape_is_another_call(backend: CBackend) -> None:
    """48 tokens are two chunks of all layers, or three of the first two."""
    tokens, out = np.zeros((2, 2, 4, 3), np.int32), np.empty((3, 2, 3), np.float32)
    tokens[...] = np.random.default_rng(0).integers(5, size=tokens.shape)
    for _ in range(3):
        backend.decode_into(tokens, None, out)
    whole = out.copy()
    tokens.shape = (3, 2, 4, 2)
    backend.decode_into(tokens, None, out)
    expected = np.empty_like(out)
    backend.decode_into(tokens.copy(), None, expected)
    np.testing.assert_array_equal(out, expected)
    assert not np.array_equal(out[:2], whole[:2])


def test_what_is_held_keeps_no_array_alive_and_lets_none_move(backend: CBackend) -> None:
    tokens, out = np.zeros((1, 2, 4, 3), np.int32), np.empty((1, 2, 3), np.float32)
    for _ in range(3):
        backend.decode_into(tokens, None, out)
    with pytest.raises(ValueError, match="cannot resize"):
        tokens.resize((1000, 2, 4, 3), refcheck=False)
    watched = weakref.ref(tokens)
    del tokens
    gc.collect()
    assert watched() is None
    # Another may come to lie where it lay, under its identity.
    for _ in range(50):
        later = np.full((1, 2, 4, 3), 1, np.int32)
        backend.decode_into(later, None, out)
        expected = np.empty_like(out)
        backend.decode_into(later, None, expected)
        np.testing.assert_array_equal(out, expected)
        del later


def test_illegal_values_are_refused_the_third_time_too(backend: CBackend) -> None:
    tokens, out = np.zeros((1, 2, 4, 3), np.int32), np.empty((1, 2, 3), np.float32)
    for _ in range(3):
        backend.decode_into(tokens, None, out)
    tokens[0, 1, 2, 0] = 99
    out.fill(77)
    for _ in range(3):
        with pytest.raises(IllegalValueError):
            backend.decode_into(tokens, None, out)
    assert (out == 77).all()


# --- libraries --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bundles_in_one_process_keep_to_their_own_libraries(bundle_of: BundleOf) -> None:
    """The loader takes a library for the one that it has loaded under the same name, and descriptors come again."""
    recipes = [replace(RECIPE, seed=seed) for seed in range(3)]
    actions = random_actions(RECIPE, 20)
    expected = []
    for recipe in recipes:
        with ActionTokenizer.load(bundle_of(recipe), backend="onnxruntime") as other:
            expected.append(other.encode(actions))
    assert (expected[0] != expected[1]).mean() > 0.1
    loaded = [ActionTokenizer.load(bundle_of(recipe), backend="c") for recipe in recipes]
    for tokenizer, tokens in zip(loaded, expected, strict=True):
        assert (tokenizer.encode(actions) == tokens).mean() > 0.99


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list descriptors")
def test_loading_leaves_no_descriptor_open_and_loads_each_library_once(bundle_of: BundleOf) -> None:
    opened = open_bundle(bundle_of(replace(RECIPE, seed=8)))

    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def mappings() -> int:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count("rfsq_tokenizer")

    before = descriptors()
    CBackend(opened)
    once = mappings()
    for _ in range(5):
        CBackend(opened)
    assert descriptors() == before
    assert mappings() == once > 0


@pytest.mark.slow
def test_the_bytes_that_were_hashed_are_what_runs(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Whatever becomes of the file afterwards."""
    recipe = replace(RECIPE, seed=7)
    opened = open_bundle(bundle_of(recipe))
    moved = replace(opened, folder=tmp_path / "no such folder")
    actions = random_actions(RECIPE, 5)
    first, second = np.empty((2, 5, 2, 4, 3), np.int32)
    CBackend(opened).encode_into(actions, first, None)
    c_backend._load.cache_clear()
    CBackend(moved).encode_into(actions, second, None)
    np.testing.assert_array_equal(first, second)


def test_where_no_file_can_be_kept_in_memory_one_on_disk_will_do(
    opened: Bundle, backend: CBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    c_backend._load.cache_clear()
    actions = random_actions(RECIPE, 5)
    first, second = np.empty((2, 5, 2, 4, 3), np.int32)
    backend.encode_into(actions, first, None)
    CBackend(opened).encode_into(actions, second, None)
    np.testing.assert_array_equal(first, second)
    assert list(tmp_path.iterdir()) == []


def with_library(opened: Bundle, content: bytes) -> Bundle:
    (file,) = (entry.file for entry in opened.manifest.engines if entry.backend == "c")
    return replace(opened, _contents=MappingProxyType({**opened._contents, file: content}))


def test_what_is_no_library_is_refused_with_its_cure(opened: Bundle) -> None:
    for content in (b"not a library", b"", b"\x7fELF" + bytes(1000)):
        with pytest.raises(BackendUnavailableError, match=r"(?s)librfsq_tokenizer\.so does not load .*--from-bundle"):
            CBackend(with_library(opened, content))


@pytest.mark.parametrize("name", [b"rfsq_encode", b"rfsq_decode_l2"])
def test_a_library_that_lacks_a_function_is_refused(name: bytes, opened: Bundle) -> None:
    content = opened.content(f"engines/c/{BEST}/librfsq_tokenizer.so")
    assert name in content
    with pytest.raises(BackendUnavailableError, match=f"the C engine has no function {name.decode()}"):
        CBackend(with_library(opened, content.replace(name, name[:-1] + b"_")))


def test_a_bundle_without_an_engine_for_this_machine_says_how_to_compile_one(bundle_of: BundleOf) -> None:
    for recipe in (Recipe(), replace(RECIPE, c_targets=())):
        opened = open_bundle(bundle_of(recipe))
        with pytest.raises(BackendUnavailableError) as caught:
            create_backend("c", opened)
        assert f"has no C engine for {' or '.join(host_targets())}; " in str(caught.value)
        assert str(caught.value).endswith(f"python export/build_engine.py --from-bundle {opened.folder}")


def test_engines_for_other_machines_are_named_and_not_tried(opened: Bundle) -> None:
    engines = tuple(
        replace(entry, targets=("riscv64",)) if entry.backend == "c" else entry for entry in opened.manifest.engines
    )
    strange = replace(opened, manifest=replace(opened.manifest, engines=engines))
    with pytest.raises(BackendUnavailableError, match=", but engines for riscv64; build engines"):
        CBackend(strange)


# --- threads, forks and signals ---------------------------------------------------------------------------------------


def test_threads_share_it_and_do_not_wait_for_each_other(backend: CBackend) -> None:
    batches = [random_actions(RECIPE, 200, seed=seed) for seed in range(8)]

    def encode(actions: np.ndarray) -> np.ndarray:
        tokens = np.empty((len(actions), 2, 4, 3), np.int32)
        backend.encode_into(actions, tokens, None)
        return tokens

    expected = [encode(actions) for actions in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            for found, tokens in zip(pool.map(encode, batches), expected, strict=True):
                np.testing.assert_array_equal(found, tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_child_forked_while_other_threads_encode_encodes_too(tokenizer: ActionTokenizer) -> None:
    actions = random_actions(RECIPE, 20)
    expected = tokenizer.encode(actions)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            tokenizer.encode(actions)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(0 if (tokenizer.encode(actions) == expected).all() else 1)
                finally:
                    os._exit(2)
            assert ends_well(pid)
    finally:
        stop.set()
        thread.join()


def test_who_closes_it_harms_nobody_who_still_encodes(opened: Bundle) -> None:
    backend = CBackend(opened)
    actions, tokens = random_actions(RECIPE, 3), np.empty((3, 2, 4, 3), np.int32)
    backend.encode_into(actions, tokens, None)
    expected = tokens.copy()
    backend.close()
    backend.encode_into(actions, tokens, None)
    np.testing.assert_array_equal(tokens, expected)
