"""On the GPU the engines are the reference: every gate, over a million steps; and a TF32 engine turns them red."""

import os
from pathlib import Path

import pytest

from rfsq.export import step_tokens
from rfsq.export.build_config import BuildConfig
from rfsq.export.errors import GateError
from rfsq.export.graph_builder import LinearForm
from rfsq.export.parity import batches, judges_of
from rfsq.export.pipeline import build
from rfsq.export.plan import DeployMode
from rfsq.export.proving import failures, opened_backends
from rfsq.export.reference import Reference, parity_sections
from rfsq.export.sources import fit_for, load_build_data, open_checkpoint
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT
from rfsq.runtime.backends.registry import create_backend
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from tests.gpu.conftest import ENGINES, TENSORRT

STEPS = 1_000_000
#: Other steps: ten processes side by side, each with another seed, judge ten million.
SEED = int(os.environ.get("RFSQ_PARITY_SEED", "0"))


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Reference:
    checkpoint = open_checkpoint(ROBUST_CHECKPOINT, use_layernorm=None, normaliser_file=None)
    prefixes = bundle.manifest.model.prefixes
    data = load_build_data(checkpoint, None, key=None, is_needed=True)
    assert data.dataset is not None
    return Reference(
        fit_for(checkpoint, DeployMode.CALIBRATED, prefixes, data.dataset), DeployMode.CALIBRATED, prefixes
    )


def test_every_backend_passes_every_gate_over_a_million_steps(
    bundle: Bundle, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """All at once, because the reference in float64 takes longer than all of them."""
    checkpoint = open_checkpoint(ROBUST_CHECKPOINT, use_layernorm=None, normaliser_file=None)
    held_out = load_build_data(checkpoint, None, key=None, is_needed=True).held_out
    model = bundle.manifest.model
    sections = parity_sections(
        reference.model,
        held_out,
        chunk_length=model.chunk_length,
        limit=model.action_limit,
        num_steps=STEPS,
        seed=SEED,
    )
    with opened_backends(bundle, None) as (backends, absent):
        judges = judges_of(backends, reference, model, seed=SEED)
        for answers in batches(reference, sections):
            for judge in judges:
                judge.judge(answers)
        entries = [entry for judge in judges for entry in judge.entries()]
    with capsys.disabled():
        print()
        for entry in entries:
            print(f"  {entry.backend}, {entry.gate}: {entry.value:.4g} <= {entry.limit:.4g}, {entry.steps} steps")
            if entry.detail:
                print(f"    {entry.detail}")
        for name, reason in absent.items():
            print(f"  not run: {name}: {reason}")
    assert {backend.name for backend in backends} >= {"onnxruntime", "onnxruntime-cuda", *ENGINES}
    assert all(entry.steps >= STEPS for entry in entries)
    assert failures(entries) == []


@pytest.mark.parametrize("mode", DeployMode)
def test_every_mode_and_other_sizes_build_and_pass_on_this_gpu(mode: DeployMode, tmp_path: Path) -> None:
    checkpoint = None
    if mode is DeployMode.NONE:
        from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT

        checkpoint = NAIVE_CHECKPOINT
    manifest = build(
        BuildConfig(
            **({} if checkpoint is None else {"checkpoint": checkpoint}),
            output=tmp_path / "bundle",
            conditioning=mode,
            prefixes=(1, 5),
            chunk_length=3,
            backends=("onnxruntime", *ENGINES),
            parity_steps=30_000,
        )
    )
    engines = manifest.engines
    assert len(engines) == 4 * len(TENSORRT) + 1
    assert {(engine.status, engine.precision) for engine in engines} == {("validated", "fp32")}
    assert {entry.backend for entry in manifest.parity} == {"onnxruntime", *ENGINES}


@pytest.mark.skipif("tensorrt-rtx" not in TENSORRT, reason="TensorRT obeys its TF32 flag; only TensorRT-RTX does not")
def test_an_engine_that_computes_in_tf32_turns_the_gates_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products, which TensorRT-RTX computes in TF32 although it is told not to."""
    encoder, decoder = step_tokens.encoder_graph, step_tokens.decoder_graph
    monkeypatch.setattr(step_tokens, "encoder_graph", lambda plan, _form: encoder(plan, LinearForm.GEMM))
    monkeypatch.setattr(step_tokens, "decoder_graph", lambda plan, _form: decoder(plan, LinearForm.GEMM))
    config = BuildConfig(output=tmp_path / "bundle", backends=("onnxruntime", "tensorrt-rtx"), parity_steps=10_000)
    with pytest.raises(GateError) as caught:
        build(config)
    assert "tensorrt-rtx, encode: wrong tokens" in str(caught.value)
    assert "tensorrt-rtx, decode 8 layers: action error" in str(caught.value)
    assert "\n  onnxruntime," not in str(caught.value)
    assert not config.output.exists()


def test_the_manifest_says_what_was_measured_and_where(bundle: Bundle) -> None:
    from rfsq.runtime.backends.gpu.driver import open_device

    for engine in bundle.manifest.engines:
        assert (engine.status, engine.precision, engine.device) == ("validated", "fp32", str(open_device()))
        assert engine.kernel_cache in (*bundle.manifest.files, "")
    gates = {(entry.backend, entry.gate) for entry in bundle.manifest.parity}
    for name in ENGINES:
        assert (name, "encode: wrong tokens") in gates


def test_what_is_built_from_a_sealed_bundle_opens_like_it(bundle_path: Path) -> None:
    for name in ENGINES:
        create_backend(name, open_bundle(bundle_path)).close()
