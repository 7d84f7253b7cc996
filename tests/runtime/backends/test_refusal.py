"""Engines whose checks are missing, or miss something, are told from those that keep their promise."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.export import c_builder, c_tables
from rfsq.export.build_engine import main as build_engine
from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer, SelfTestError
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.refusal import judge_refusal
from rfsq.runtime.backends.registry import PREFERENCE, create_backend
from rfsq.runtime.bundle.errors import InferenceError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.gates import missing_gates, promised_refusal
from rfsq.runtime.bundle.models import ModelEntry
from rfsq.runtime.qualification import selftest
from tests.bundles import Recipe, deploy, write_bundle
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.once import once

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here: apt-get install gcc")

#: T 3: calls of 1 to 21 chunks are checked by the engine, and 3, 6, 9 … steps leave every remainder of a vector.
RECIPE = Recipe(mode=DeployMode.DYNAMIC, chunk_length=3, c_targets=(host_targets()[-1],), has_engine=False)


def without(old: str, new: str, count: int = 1) -> Callable[[str], str]:
    def alter(source: str) -> str:
        assert source.count(old) == count, old
        return source.replace(old, new)

    return alter


TOKEN_CHECK = "illegal |= (uint32_t)tokens[i] >= (uint32_t)K;"
ACTION_CHECK = "illegal |= !(actions[i] <= RFSQ_ACTION_LIMIT) | !(actions[i] >= -RFSQ_ACTION_LIMIT);"
STATS_CHECK = (
    "illegal |= !(stats[2 * i] >= -STATS_LIMIT) | !(stats[2 * i] <= STATS_LIMIT) | !(stats[2 * i + 1] > 0)\n"
    "            | !(stats[2 * i + 1] <= STATS_LIMIT);"
)
ENCODED_STEPS = "(left < CHECKED_STEPS ? left : CHECKED_STEPS) * A"
#: What is wrong with the checks: how the source is altered, and the gate that has to say so.
FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "tokens: not at all": (without(TOKEN_CHECK, "(void)tokens;"), "decode 3 layers"),
    "tokens: negative ones pass": (without(TOKEN_CHECK, "illegal |= tokens[i] >= K;"), "decode 3 layers"),
    "tokens: too large ones pass": (without(TOKEN_CHECK, "illegal |= tokens[i] < 0;"), "decode 3 layers"),
    "tokens: K passes": (without(TOKEN_CHECK, "illegal |= (uint32_t)tokens[i] > (uint32_t)K;"), "decode 2 layers"),
    "tokens: as bytes": (without(TOKEN_CHECK, "illegal |= (uint8_t)tokens[i] >= (uint32_t)K;"), "decode 2 layers"),
    "tokens: of one layer": (
        without("are_legal_tokens(count * D * layers,", "are_legal_tokens(count * D,"),
        "decode 3 layers",
    ),
    "tokens: not the last vector": (
        without("are_legal_tokens(count * D * layers,", "are_legal_tokens(count * D * layers / 8 * 8,"),
        "decode 3 layers",
    ),
    "tokens: not the last steps": (
        without("are_legal_tokens(count * D * layers,", "are_legal_tokens(count / STEPS * STEPS * D * layers,"),
        "decode 2 layers",
    ),
    "tokens: of the first block": (
        without("if (!are_legal_tokens(", "if (step == 0 && !are_legal_tokens("),
        "decode 3 layers",
    ),
    "stats: not at all": (without(STATS_CHECK, "(void)stats;"), "decode 3 layers"),
    "stats: a sigma of zero passes": (
        without("!(stats[2 * i + 1] > 0)", "!(stats[2 * i + 1] >= 0)"),
        "decode 2 layers",
    ),
    "stats: a sigma that is no number passes": (
        without("!(stats[2 * i + 1] > 0)\n            | !(stats[2 * i + 1] <= STATS_LIMIT)", "(stats[2 * i + 1] <= 0)"),
        "decode 2 layers",
    ),
    "stats: a little beyond the limit passes": (
        without("!(stats[2 * i] <= STATS_LIMIT)", "!(stats[2 * i] <= STATS_LIMIT * 1.000001f)"),
        "decode 3 layers",
    ),
    "actions: not at all": (without(ACTION_CHECK, "(void)actions;"), "encode"),
    "actions: what is no number passes": (
        without(ACTION_CHECK, "illegal |= (actions[i] > RFSQ_ACTION_LIMIT) | (actions[i] < -RFSQ_ACTION_LIMIT);"),
        "encode",
    ),
    "actions: one unit beyond the limit passes": (
        without("!(actions[i] <= RFSQ_ACTION_LIMIT)", "!(actions[i] <= RFSQ_ACTION_LIMIT * 1.0000001f)"),
        "encode",
    ),
    "actions: minus infinity passes": (without(" | !(actions[i] >= -RFSQ_ACTION_LIMIT)", ""), "encode"),
    "actions: not the last one": (without(ENCODED_STEPS, f"{ENCODED_STEPS} - 1"), "encode"),
    "actions: checked as they are reached": (
        without(
            f"step % CHECKED_STEPS == 0\n            && !are_legal_actions({ENCODED_STEPS}",
            "step % STEPS == 0\n            && !are_legal_actions((left < STEPS ? left : STEPS) * A",
        ),
        "encode",
    ),
}


@pytest.fixture
def compiles_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is not in the source is missing whatever a compiler makes of it: a third of the time."""
    assert "-O3" in c_builder.C_FLAGS
    flags = tuple("-O1" if flag == "-O3" else flag for flag in c_builder.C_FLAGS)
    monkeypatch.setattr(c_builder, "C_FLAGS", flags)


def red(folder: Path, name: str = "c", *, is_thorough: bool = False) -> dict[str, str]:
    """By gate, what was accepted first."""
    bundle = open_bundle(folder)
    backend = create_backend(name, bundle)
    checks = judge_refusal(bundle.manifest.model, backend, is_thorough=is_thorough)
    return {check.gate: check.detail for check in checks if check.value}


@needs_compiler
@pytest.mark.parametrize("is_thorough", [False, True])
@pytest.mark.parametrize("mode", list(DeployMode))
def test_the_generated_engine_keeps_its_promise(
    mode: DeployMode, is_thorough: bool, bundle_of: Callable[[Recipe], Path]
) -> None:
    bundle = open_bundle(bundle_of(Recipe(mode=mode, c_targets=(host_targets()[0],))))
    checks = judge_refusal(bundle.manifest.model, create_backend("c", bundle), is_thorough=is_thorough)
    assert [(check.gate, check.value, check.detail) for check in checks] == [
        (f"{call}: illegal values accepted", 0, "") for call in ("encode", "decode 2 layers", "decode 3 layers")
    ]


@needs_compiler
@pytest.mark.usefixtures("compiles_fast")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_missing_check_is_found_at_load(fault: str, tmp_path: Path) -> None:
    alter, gate = FAULTS[fault]
    deployed = deploy(RECIPE)
    deployed.alter_c = alter
    found = red(write_bundle(tmp_path / "bundle", deployed))
    assert f"{gate}: illegal values accepted" in found, found
    # What is checked as before stays green.
    assert all(name.startswith("encode") == (gate == "encode") for name in found)


@needs_compiler
@pytest.mark.usefixtures("compiles_fast")
def test_an_engine_without_checks_fails_load_and_selftest_which_name_what_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployed = deploy(Recipe(c_targets=(host_targets()[0],)))
    deployed.alter_c = lambda source: without(ACTION_CHECK, "(void)actions;")(
        without(TOKEN_CHECK, "(void)tokens;")(source)
    )
    folder = write_bundle(tmp_path / "bundle", deployed)
    # The attack works where nothing is done about it.
    backend = create_backend("c", open_bundle(folder))
    actions = np.zeros((1, 2, 3), np.float32)
    backend.decode_into(np.full((1, 2, 4, 3), 10**6, np.int32), None, actions)
    assert np.abs(actions).max() > 100
    with pytest.raises(SelfTestError, match=r"✗ encode: illegal values accepted: \d+ > 0 \(nan at \[0, 0, 0\] of"):
        ActionTokenizer.load(folder, backend="c")
    assert selftest.main([str(folder), "--backend", "c", "-v"]) == 1
    printed = capsys.readouterr().out
    assert "✗ decode 3 layers: illegal values accepted:" in printed
    assert "(-2147483648 at [0, 0, 0, 0] of [1, 2, 4, 3] was accepted and became " in printed


@needs_compiler
@pytest.mark.usefixtures("compiles_fast")
def test_a_build_of_an_engine_without_checks_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = shutil.copytree(c_tables._TEMPLATES, tmp_path / "templates")
    template = templates / c_builder.SOURCE_NAME
    altered = without(TOKEN_CHECK, "(void)tokens;")(template.read_text(encoding="utf-8"))
    template.write_text(altered, encoding="utf-8")
    monkeypatch.setattr(c_tables, "_TEMPLATES", templates)
    monkeypatch.setattr("rfsq.export.engines.host_targets", lambda: host_targets()[-1:])
    output = tmp_path / "bundles" / "bundle"
    assert build_engine(["--output", str(output), "--backends", "c", "--parity-steps", "500"]) == 1
    error = capsys.readouterr().err
    assert "  c, decode 3 layers: illegal values accepted: " in error
    assert "  c, golden vectors: ✗ decode 8 layers: illegal values accepted: " in error
    assert list(output.parent.iterdir()) == []


# --- backends that mark -----------------------------------------------------------------------------------------------


@dataclass
class Marking:
    """What a GPU makes of illegal values, in numpy; `spoil` gets illegal rows and may let some pass."""

    right: Backend
    model: ModelEntry
    token_types: tuple[np.dtype[Any], ...] = (np.dtype(np.int32),)
    spoil: Callable[[str, np.ndarray], np.ndarray] = lambda _role, illegal: illegal
    name, description, device, checked_steps = "marking", "a GPU played in numpy", "this test", 0

    def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
        illegal = self.spoil("encode", ~(np.abs(actions) <= np.float32(self.model.action_limit)))
        self.right.encode_into(np.where(illegal, np.float32(0), actions), tokens, stats)
        is_marked = illegal.any(-1 if self.model.token_grid else (-2, -1))
        tokens[is_marked] = np.array(-1).astype(self.token_types[0])

    def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
        given = tokens.astype(self.token_types[0])
        illegal = self.spoil("decode", (given < 0) | (given >= self.model.vocabulary))
        self.right.decode_into(np.where(illegal, 0, given).astype(np.int32), stats, actions)
        actions[illegal.any((-2, -1) if self.model.token_grid else -1)] = np.nan

    def close(self) -> None:
        self.right.close()


@pytest.fixture
def marking(bundle: Path) -> Marking:
    opened = open_bundle(bundle)
    return Marking(create_backend("onnxruntime", opened), opened.manifest.model)


def gates_of(backend: Marking) -> dict[str, str]:
    checks = judge_refusal(backend.model, backend)
    assert [check.gate.split(":")[0] for check in checks] == ["encode", "decode 2 layers", "decode 3 layers"]
    return {check.gate: check.detail for check in checks if check.value}


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_manifest_is_asked_for_what_the_backend_is_judged_by(name: str, marking: Marking) -> None:
    """As far as the classes tell without a GPU."""
    modules = {"cuda": "cuda.CudaBackend", "onnxruntime-cuda": "onnxruntime_cuda.OrtCudaBackend"}
    modules |= dict.fromkeys(("tensorrt", "tensorrt-rtx"), "tensorrt.TrtBackend")
    modules |= {"c": "c.CBackend", "onnxruntime": "onnxruntime.OrtBackend"}
    module, _, kind = modules[name].partition(".")
    backend_type = getattr(pytest.importorskip(f"rfsq.runtime.backends.{module}"), kind)
    promised = promised_refusal(name, marking.model.chunk_length)
    assert hasattr(backend_type, "token_types") == (promised == "illegal values not marked")
    if hasattr(backend_type, "token_types"):
        asked = missing_gates((), marking.model.decoders, has_stats=False, refusal=promised)
        judged = [check.gate for check in judge_refusal(marking.model, marking)]
        assert [gate for gate in asked if "illegal" in gate] == judged


@pytest.mark.parametrize("token_type", [np.int32, np.uint8])
def test_a_backend_that_marks_is_judged_by_its_marks(token_type: type, marking: Marking) -> None:
    marking.token_types = (np.dtype(token_type),)
    assert gates_of(marking) == {}


def only(role: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda found, illegal: change(illegal.copy()) if found == role else illegal


def clear(*index: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(illegal: np.ndarray) -> np.ndarray:
        illegal[index] = False
        return illegal

    return change


@pytest.mark.parametrize(
    ("role", "change", "first"),
    [
        ("encode", clear(...), "not marked"),
        ("encode", clear(slice(None), slice(None), -1), "not marked"),
        ("encode", clear(-1), "not marked"),
        ("decode", clear(...), "not marked"),
        ("decode", clear(..., -1), "not marked"),
        ("decode", clear(slice(None), -1), "not marked"),
        ("decode", lambda illegal: illegal | illegal.any(axis=1, keepdims=True), "was marked"),
        ("encode", lambda illegal: illegal | illegal.any(axis=1, keepdims=True), "was marked"),
    ],
)
def test_missing_marks_and_marks_of_others_are_found(
    role: str, change: Callable[[np.ndarray], np.ndarray], first: str, marking: Marking
) -> None:
    marking.spoil = only(role, change)
    found = gates_of(marking)
    assert found
    assert all(gate.startswith(role) for gate in found)
    assert all(first in text for text in found.values())


@pytest.mark.parametrize("token_type", [np.int32, np.uint16])
def test_of_chunk_tokens_whole_chunks_are_marked(token_type: type, tmp_path_factory: pytest.TempPathFactory) -> None:
    opened = open_bundle(once(tmp_path_factory, "chunks", lambda path: write_chunk_bundle(path, ChunkRecipe())))
    marking = Marking(create_backend("onnxruntime", opened), opened.manifest.model, (np.dtype(token_type),))
    checks = judge_refusal(marking.model, marking)
    assert [check.gate.split(":")[0] for check in checks] == ["encode", "decode fewer tokens", "decode 9 tokens"]
    assert all(check.passed for check in checks)
    for role, change, count in (("encode", clear(..., -1), 1), ("decode", clear(..., -1), 2), ("decode", clear(-1), 2)):
        marking.spoil = only(role, change)
        failed = [check for check in judge_refusal(marking.model, marking) if not check.passed]
        assert len(failed) == count
        assert all("not marked" in check.detail for check in failed)


def test_the_host_judges_what_a_backend_leaves_to_it(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert judge_refusal(opened.manifest.model, create_backend("onnxruntime", opened)) == ()


def test_another_error_than_the_promised_one_is_no_refusal(c_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arrays: Any) -> None:
        raise InferenceError("out of memory")

    opened = open_bundle(c_bundle)
    backend = create_backend("c", opened)
    monkeypatch.setattr(backend, "decode_into", fail)
    encode, *decoders = judge_refusal(opened.manifest.model, backend)
    assert encode.value == 0
    assert all("raised InferenceError: out of memory" in decoder.detail for decoder in decoders)
