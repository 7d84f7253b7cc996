"""What each `BackendSpec` promises is what the backend keeps; `tests/gpu` asks the same of those on a GPU."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.contract import engines_of
from rfsq.runtime.bundle.backend_specs import BACKENDS, BackendSpec
from rfsq.runtime.bundle.errors import InferenceError
from tests.bundles import Recipe, random_actions
from tests.processes import ends_well
from tests.runtime.backends.interrupts import check_decoding_in_signal_handlers

ROOT = Path(__file__).parents[3]
#: By what engines are compiled from, the fixture with a bundle that has them. A new source needs one of its own.
BUNDLES = {None: "c_bundle", "c": "c_bundle"}
ON_HOST = [spec for spec in BACKENDS.values() if not spec.is_on_gpu]


@pytest.fixture(params=ON_HOST, ids=lambda spec: spec.name)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[BackendSpec, ActionTokenizer]]:
    spec: BackendSpec = request.param
    bundle: Path = request.getfixturevalue(BUNDLES[spec.engine_source])
    with ActionTokenizer.load(bundle, backend=spec.name) as tokenizer:
        yield spec, tokenizer


def test_listing_backends_imports_none() -> None:
    code = (
        "import sys, rfsq.runtime.backends.registry\n"
        "print(*sorted(name for name in sys.modules if name.startswith(('rfsq.runtime.backends.', 'onnxruntime'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name.rpartition(".")[2] for name in done.stdout.split()] == ["contract", "registry"]


@pytest.mark.parametrize("spec", BACKENDS.values(), ids=lambda spec: spec.name)
def test_a_backend_has_the_methods_that_its_promises_need(spec: BackendSpec) -> None:
    if spec.is_on_gpu:
        pytest.importorskip("cuda.bindings")
    module, name = spec.factory
    backend = getattr(importlib.import_module(f"rfsq.runtime.backends.{module}"), name)
    for method in ("encode_on_gpu", "decode_on_gpu", "bind_encode", "bind_decode"):
        assert hasattr(backend, method) == spec.is_on_gpu
    assert hasattr(backend, "token_types") == spec.is_on_gpu
    assert hasattr(backend, "engines_in_use") == (spec.engine_source is not None)
    assert hasattr(backend, "decode_belief_into") == spec.decodes_beliefs
    # What nobody checks on the host is marked; nobody does both.
    assert not (spec.checked_steps and spec.is_on_gpu)


def test_a_backend_is_what_it_is_listed_as(opened: tuple[BackendSpec, ActionTokenizer]) -> None:
    spec, tokenizer = opened
    assert (tokenizer.backend.name, tokenizer.backend.checked_steps) == (spec.name, spec.checked_steps)
    found = {engine.entry.backend for engine in engines_of(tokenizer.backend)}
    assert found == (set() if spec.engine_source is None else {spec.name})


def test_threads_may_call_it_at_once(opened: tuple[BackendSpec, ActionTokenizer]) -> None:
    _, tokenizer = opened
    batches = [random_actions(Recipe(), size) for size in (1, 3, 7, 64)]
    expected = [tokenizer.encode(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, right in zip(pool.map(tokenizer.encode, batches), expected, strict=True):
                np.testing.assert_array_equal(found, right)


def test_a_signal_handler_may_call_it(opened: tuple[BackendSpec, ActionTokenizer]) -> None:
    check_decoding_in_signal_handlers(opened[1])


def test_a_child_of_fork_may_call_it_or_is_told_as_promised(opened: tuple[BackendSpec, ActionTokenizer]) -> None:
    spec, tokenizer = opened
    actions = random_actions(Recipe(), 3)
    expected = tokenizer.encode(actions)
    child = os.fork()
    if child == 0:
        is_kept = False
        try:
            is_kept = np.array_equal(tokenizer.encode(actions), expected) and spec.survives_fork
        except InferenceError:
            is_kept = not spec.survives_fork
        finally:
            os._exit(0 if is_kept else 1)
    assert ends_well(child)
