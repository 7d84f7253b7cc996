"""Bundles of chunk tokens: fitted and built in one go, or built from the file of a fit; the same gates judge them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.calibration.settings import BitOrder, ChunkConfig
from rfsq.export import chunk_c_source, chunk_tokens, pipeline
from rfsq.export.build_config import BuildConfig
from rfsq.export.build_engine import config_of, parser
from rfsq.export.chunk_plan import ChunkPlan
from rfsq.export.errors import BuildInputError, ExportError, GateError, SourceTooLargeError
from rfsq.export.on_target import TargetConfig, add_engines
from rfsq.export.pipeline import build
from rfsq.rfsq_ref.chunk_checkpoint import load_chunk_checkpoint, save_chunk_checkpoint
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.fingerprint import chunk_fingerprint
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.errors import UnbuiltPrefixError
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE
from rfsq.runtime.bundle.models import ChunkModel
from tests.calibration.test_chunk import smooth_episodes
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint, random_chunks

FEW = ChunkConfig(classes=8, tokens=12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded demonstrations, in one go."""
    output = tmp_path_factory.mktemp("chunk") / "bundle"
    backends = ("onnxruntime", "c")
    build(BuildConfig(kind=TokenKind.CHUNK, output=output, chunk=FEW, backends=backends, parity_steps=500))
    return output


def test_one_command_fits_builds_and_proves(bundle: Path) -> None:
    for backend in ("onnxruntime", "c"):
        with ActionTokenizer.load(bundle, backend=backend) as tokenizer:
            model = tokenizer.model
            assert isinstance(model, ChunkModel)
            assert (model.num_classes, model.num_tokens, model.vocabulary) == (8, 12, 1024)
            assert tokenizer.manifest.quality is not None
            actions = np.zeros((3, 8, 7), np.float32)
            tokens = tokenizer.encode(actions)
            assert tokens.shape == (3, 12)
            errors = [
                float(np.abs(tokenizer.decode(np.ascontiguousarray(tokens[:, :length])) - actions).max())
                for length in (1, 12)
            ]
            assert errors[1] < 0.1
            with pytest.raises(UnbuiltPrefixError, match="this bundle decodes from 1 to 12"):
                tokenizer.decode(np.zeros((1, 13), np.int32))


def test_the_manifest_says_what_each_number_of_tokens_is_worth(bundle: Path) -> None:
    content = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    errors = content["provenance"]["action_mse"]
    by_length = [errors.pop(f"{length} of 12 tokens") for length in (1, 2, 4, 8, 12)]
    assert not errors
    assert by_length == sorted(by_length, reverse=True)
    gates = {entry["gate"] for entry in content["parity"]}
    assert {"encode: wrong tokens", "decode 12 tokens: action error", "decode fewer tokens: action error"} <= gates


@pytest.mark.parametrize("has_normaliser", [False, True])
def test_what_calibrate_wrote_is_built_and_its_kind_is_known(tmp_path: Path, has_normaliser: bool) -> None:
    checkpoint, output = tmp_path / "chunk.safetensors", tmp_path / "bundle"
    content = chunk_checkpoint(ChunkRecipe(has_normaliser=has_normaliser))
    save_chunk_checkpoint(content, checkpoint)
    manifest = build(BuildConfig(checkpoint=checkpoint, output=output, backends=("onnxruntime",), parity_steps=200))
    assert manifest.fingerprint == chunk_fingerprint(load_chunk_checkpoint(checkpoint))
    with ActionTokenizer.load(output) as tokenizer:
        model = content.model(dtype=torch.float64)
        actions = random_chunks(model, 20)
        expected = model.encode(torch.from_numpy(actions).double()).numpy()
        assert (tokenizer.encode(actions) == expected).mean() > 0.99
        decoded = model.decode(torch.from_numpy(expected[:, :3])).numpy()
        np.testing.assert_allclose(
            tokenizer.decode(np.ascontiguousarray(expected[:, :3].astype(np.int32))), decoded, atol=2e-5
        )


def test_any_constant_is_in_the_fingerprint() -> None:
    content = chunk_checkpoint(ChunkRecipe())
    constants = content.constants
    others = [
        replace(content, normaliser=None),
        replace(content, constants=replace(constants, budgets=(1, 4, 9))),
        *(
            replace(content, constants=replace(constants, **{name: getattr(constants, name).flip(0)}))
            for name in ("mean", "basis", "scale", "gain", "order", "weights")
        ),
    ]
    assert len({chunk_fingerprint(part) for part in (content, *others)}) == 1 + len(others)


@pytest.mark.parametrize("has_beliefs", [True, False])
def test_a_wrong_constant_in_the_engines_turns_the_gates_red(
    has_beliefs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "chunk.safetensors"
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), checkpoint)
    planned = chunk_tokens.plan_chunk_code

    def faulty(tokenizer: ChunkTokenizer) -> ChunkPlan:
        right = planned(tokenizer)
        return replace(right, mean=right.mean * np.float32(1.001))

    monkeypatch.setattr(chunk_tokens, "plan_chunk_code", faulty)
    found = r"belief.onnx on ONNX Runtime: action error 0\.000"
    if not has_beliefs:
        # These reach every class, and so are the first to find it.
        monkeypatch.setattr(pipeline, "belief_vectors", lambda *_: None)
        found = r"onnxruntime, decode 9 tokens: action error: 0\.000"
    with pytest.raises(GateError, match=found):
        build(BuildConfig(checkpoint=checkpoint, output=tmp_path / "out", backends=("onnxruntime",), parity_steps=200))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_that_is_too_large_for_c_has_its_other_engines(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = tmp_path / "chunk.safetensors", tmp_path / "out"
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), checkpoint)
    monkeypatch.setattr(chunk_c_source, "MOST_NUMBERS", 100)
    monkeypatch.setattr(pipeline, "compilable", lambda **_: (("c",), {}))
    config = BuildConfig(checkpoint=checkpoint, output=output, backends=("c",) if asked else None, parity_steps=200)
    if asked:
        with pytest.raises(
            SourceTooLargeError, match=r"would have [\d,]+ numbers, for 6 classes .* the backend c has room for 100:"
        ):
            build(config)
        return
    build(config)
    assert re.search(r"^– generate C .* left out: its tables would have", capsys.readouterr().out, re.MULTILINE)
    with ActionTokenizer.load(output) as tokenizer:
        assert tokenizer.backend.name == "onnxruntime"
    with pytest.raises(ExportError, match=f"c: the bundle has no {C_HEADER}: its model was too large for one"):
        add_engines(TargetConfig(output, ("c",)))


def test_engines_are_added_on_another_machine_and_proven_there(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "chunk.safetensors", tmp_path / "out"
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), checkpoint)
    build(BuildConfig(checkpoint=checkpoint, output=output, backends=("onnxruntime",), parity_steps=200))
    manifest, backends = add_engines(TargetConfig(output, ("c",)))
    assert backends == ("c",)
    gates = [entry.gate for entry in manifest.parity if (entry.backend, entry.device) == ("c", host_targets()[0])]
    for batch in (1, 2):
        for decoder in ("9 tokens", "fewer tokens"):
            assert f"golden vectors, decode {decoder}, batch {batch}: max |action error|" in gates
    with ActionTokenizer.load(output, backend="c") as tokenizer:
        assert tokenizer.backend.name == "c"


def test_a_fit_is_kept_where_the_build_that_made_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "lab.npz", tmp_path / "out"
    episodes = [5 * one for one in smooth_episodes(3, [50] * 10, seed=0)]
    np.savez(data, actions=np.concatenate(episodes).astype(np.float32), episode_ends=50 * np.arange(1, 11))

    def failing(*_: object) -> None:
        raise ExportError("no room")

    monkeypatch.setattr(pipeline, "_export", failing)
    with pytest.raises(ExportError, match="no room"):
        build(BuildConfig(TokenKind.CHUNK, output=output, data=data, chunk=ChunkConfig(classes=6), chunk_length=4))
    kept, printed = tmp_path / "out-fit.safetensors", capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"lab.npz", "out-fit.safetensors"}
    assert f"the fit is kept in {kept}: build it with python export/build_engine.py --checkpoint {kept}" in printed
    # What calibrate says of a fit, a build says too.
    assert "fitted on 7 episodes (350 steps) for the classes and 2 episodes (100 steps) for scales" in printed
    assert "the range is 1.2 times that of all 10 episodes" in printed
    assert "classes: " in printed
    monkeypatch.undo()
    build(BuildConfig(checkpoint=kept, output=output, data=data, backends=("onnxruntime",), parity_steps=200))
    # What was fitted before is there already.
    monkeypatch.setattr(pipeline, "_export", failing)
    kept.unlink()
    with pytest.raises(ExportError, match="no room"):
        build(BuildConfig(checkpoint=chunk_file(tmp_path), output=tmp_path / "other"))
    assert not list(tmp_path.glob("*-fit.safetensors"))


def chunk_file(folder: Path) -> Path:
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), folder / "chunk.safetensors")
    return folder / "chunk.safetensors"


def test_settings_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildInputError, match=r"--prefixes given, which kind 'chunk' does not use; drop it"):
        build(BuildConfig(kind=TokenKind.CHUNK, prefixes=(3,)))
    with pytest.raises(BuildInputError, match=r"--classes, --tokens given, which kind 'step' does not use; drop it"):
        build(BuildConfig(chunk=FEW))
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), tmp_path / "fit.safetensors")
    options = "--chunk-length, --classes, --normaliser, --tokens"
    config = BuildConfig(checkpoint=tmp_path / "fit.safetensors", chunk=FEW, chunk_length=4, normaliser=Path("min-max"))
    with pytest.raises(BuildInputError, match=f"{options} given, which a fit that is done does not use"):
        build(config)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        build(BuildConfig(checkpoint=tmp_path / "none.safetensors"))


def test_the_command_reads_all_settings_of_a_fit() -> None:
    given = "--kind chunk --classes 16 --vocabulary 64 --tokens 75 --order shared --chunk-length 4 --output x"
    config = config_of(parser().parse_args(given.split()))
    assert isinstance(config, BuildConfig)
    assert config.chunk == ChunkConfig(classes=16, vocabulary=64, tokens=75, order=BitOrder.SHARED)
    assert (config.kind, config.chunk_length, config.folder) == (TokenKind.CHUNK, 4, Path("x"))
    assert BuildConfig(kind=TokenKind.CHUNK).folder == Path("build/chunk")


@pytest.mark.parametrize("choice", ["auto", "none", "min-max", "limits.json"])
def test_a_build_takes_the_normalisers_that_calibrate_takes(choice: str) -> None:
    config = config_of(parser().parse_args(["--kind", "chunk", "--normaliser", choice, "--chunk-length", "4"]))
    assert isinstance(config, BuildConfig)
    assert config.token_kind is TokenKind.CHUNK
    assert chunk_tokens._fit_config(config) == ChunkConfig(chunk_length=4, normaliser=choice)


def test_the_generated_c_stands_beside_the_graphs(bundle: Path) -> None:
    assert "int rfsq_decode(" in (bundle / C_SOURCE).read_text(encoding="utf-8")
