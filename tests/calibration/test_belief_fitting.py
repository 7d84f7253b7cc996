"""`python calibration/fit.py --beliefs`, from a policy's logits to settings and a report."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.calibration.fit import main
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.checkpoints import checkpoint_of, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.chunk_checkpoint import save_chunk_checkpoint
from rfsq.rfsq_ref.fingerprint import chunk_fingerprint, fingerprint
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.runtime.bundle.belief_settings import load_belief_settings
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.bundle.manifest import MANIFEST_NAME, manifest_text, parse_manifest
from tests.bundles import Recipe, random_model, write_bundle
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint, random_chunks, write_chunk_bundle
from tests.once import once

COUNT = 24


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "chunk.safetensors"
    save_chunk_checkpoint(chunk_checkpoint(ChunkRecipe()), path)
    return path


@pytest.fixture(scope="session")
def chunk_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return once(tmp_path_factory, "bundle of beliefs", lambda path: write_chunk_bundle(path, ChunkRecipe()))


@pytest.fixture
def said() -> dict[str, np.ndarray]:
    """What a policy said that knows the recorded tokens, and is not sure."""
    model = chunk_checkpoint(ChunkRecipe()).model(dtype=torch.float64)
    actions = random_chunks(model, COUNT)
    tokens = model.encode(torch.from_numpy(actions).double())
    random = np.random.default_rng(0)

    def noise(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    logits = 3 * np.eye(256, dtype=np.float32)[tokens] + noise((COUNT, 9, 256))
    bits = model.code.bits(tokens)
    return {
        "actions": actions,
        "episode": np.arange(COUNT) // 6,
        "logits": logits,
        "class_logits": np.eye(6, dtype=np.float32)[model.code.classes(bits)] + noise((COUNT, 6)),
        "bit_logits": 2 * bits[:, model.sizes.class_bits :].numpy().astype(np.float32) - 1 + noise((COUNT, 69)),
    }


def run(folder: Path, arrays: dict[str, Any], *arguments: object) -> int:
    np.savez(folder / "logits.npz", **arrays)
    places = (
        "--beliefs",
        folder / "logits.npz",
        "--output",
        folder / "beliefs.json",
        "--report-dir",
        folder / "report",
    )
    return main([*map(str, (*places, *arguments))])


@pytest.fixture
def of_chunks(checkpoint: Path, chunk_bundle: Path) -> tuple[object, ...]:
    """What says whose tokens they are."""
    return "--kind", "chunk", "--checkpoint", checkpoint, "--for-bundle", chunk_bundle


@pytest.mark.parametrize(("names", "choices"), [(("logits",), 9), (("class_logits", "bit_logits"), 70)])
def test_settings_and_a_report_are_written(
    tmp_path: Path, of_chunks: tuple[object, ...], said: dict[str, np.ndarray], names: tuple[str, ...], choices: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arrays = {name: said[name] for name in ("actions", "episode", *names)}
    assert run(tmp_path, arrays, *of_chunks, "-v") == 0
    printed = capsys.readouterr().out
    assert "of 4 episodes, each judged by a fit that leaves it out, 4 fits" in printed
    settings = load_belief_settings(tmp_path / "beliefs.json")
    assert len(settings.temperature) == choices
    form = "tokens" if names == ("logits",) else "classes and bits"
    fingerprint = chunk_fingerprint(chunk_checkpoint(ChunkRecipe()))
    assert settings.kind == BeliefKind(fingerprint, form, 9, 0)
    assert {mode: len(scale) for mode, scale in settings.std_scale.items()} == {"expected": 3, "likeliest mode": 3}
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert len(report["choices"]) == choices
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    # A second time nothing is replaced unasked.
    assert run(tmp_path, arrays, *of_chunks) == 2


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no episodes": ({"episode": None}, "lacks episode; expected the recorded chunks and the episode of each"),
    "episodes of other chunks": ({"episode": np.arange(3)}, "expected an integer for each of 24 chunks"),
    "a value that is no number": ({"logits": np.full((COUNT, 9, 256), np.nan, np.float32)}, "no NaN, no +inf"),
    "nothing that can be": ({"logits": np.full((COUNT, 9, 256), -np.inf, np.float32)}, "a finite logit in each"),
    "another vocabulary": ({"logits": np.zeros((COUNT, 9, 100), np.float32)}, "expected [N, 9, 256]"),
    "more tokens than there are": ({"logits": np.zeros((COUNT, 10, 256), np.float32)}, "expected [N, 9, 256]"),
    "actions of another robot": ({"actions": np.zeros((COUNT, 4, 5), np.float32)}, "expected [N, 4, 3]"),
    "whole numbers": ({"logits": np.zeros((COUNT, 9, 256), np.int64)}, "expected floating-point numbers"),
    "no logits": ({"logits": None}, "has no logits; expected logits [N, l, V], or class_logits"),
    "actions that are not finite": ({"actions": np.full((COUNT, 4, 3), np.inf, np.float32)}, "leave these chunks out"),
    "no tokens": ({"logits": np.zeros((COUNT, 0, 256), np.float32)}, "must have one row"),
    "one axis": ({"logits": np.zeros(COUNT, np.float32)}, "must have one row"),
    "no words": ({"logits": np.zeros((COUNT, 9, 0), np.float32)}, "must have one row"),
    "numbers of episodes that no type holds": ({"episode": np.full(COUNT, 2**63, np.uint64)}, "expected an integer"),
    "one episode": ({"episode": np.zeros(COUNT, np.int64)}, "expected two at least"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_fitted_to_is_named(
    tmp_path: Path,
    of_chunks: tuple[object, ...],
    said: dict[str, np.ndarray],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed, message = BROKEN[name]
    arrays = {key: said[key] for key in ("actions", "episode", "logits")} | changed
    kept = {key: value for key, value in arrays.items() if value is not None}
    assert run(tmp_path, kept, *of_chunks) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "beliefs.json").exists()


def test_bits_are_those_of_whole_tokens(
    tmp_path: Path, of_chunks: tuple[object, ...], said: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: said[name] for name in ("actions", "episode", "class_logits")}
    # Forbidden bits are allowed: each is 1 or 0.
    arrays["bit_logits"] = np.full((COUNT, 13), -np.inf, np.float32)
    assert run(tmp_path, arrays, *of_chunks) == 0
    for count in (0, 12, 14):
        arrays["bit_logits"] = np.zeros((COUNT, count), np.float32)
        assert run(tmp_path, arrays, *of_chunks, "--overwrite") == 2
        assert "bit_logits" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY\x01\x00"])
def test_damaged_files_are_named(
    tmp_path: Path, of_chunks: tuple[object, ...], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logits.npz"
    path.write_bytes(content)
    assert main(["--beliefs", str(path), *map(str, of_chunks), "--output", str(tmp_path / "beliefs.json")]) == 2
    assert "is no .npz of arrays" in capsys.readouterr().err


def test_an_array_alone_is_no_archive(
    tmp_path: Path, of_chunks: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "logits.npy", np.zeros(3))
    assert (
        main(
            [
                "--beliefs",
                str(tmp_path / "logits.npy"),
                *map(str, of_chunks),
                "--output",
                str(tmp_path / "beliefs.json"),
            ]
        )
        == 2
    )
    assert "is no .npz of arrays" in capsys.readouterr().err


def test_a_file_that_is_no_archive_is_named(
    tmp_path: Path, of_chunks: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logits.npz"
    path.write_text("no archive")
    assert main(["--beliefs", str(path), *map(str, of_chunks), "--output", str(tmp_path / "beliefs.json")]) == 2
    assert "is no .npz of arrays" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--beliefs needs the tokenizer that the policy speaks, --checkpoint F, and the bundle that was built"),
        (["--for-bundle", "a"], "--beliefs needs the tokenizer that the policy speaks"),
        (["--checkpoint", "a"], "--beliefs needs the tokenizer that the policy speaks"),
        (["--classes", "8"], "--classes given, which --beliefs does not use"),
        (["--method", "recovered"], "--method given, which --beliefs does not use"),
    ],
)
def test_what_beliefs_do_not_use_is_refused(
    tmp_path: Path, said: dict[str, np.ndarray], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, said, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_is_for_beliefs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--for-bundle", str(tmp_path), "--output", str(tmp_path / "a.safetensors")]) == 2
    assert "--for-bundle given, which --beliefs alone uses; drop it" in capsys.readouterr().err


#: Of steps of three dimensions, with decoders of one, two and three layers.
RECIPES = {mode: Recipe(mode=mode, prefixes=(1, 2)) for mode in DeployMode}


@dataclass(frozen=True)
class Steps:
    """A checkpoint of per-step tokens, and the bundle that was built from it."""

    checkpoint: Path
    bundle: Path
    fingerprint: str

    @property
    def arguments(self) -> tuple[object, ...]:
        return "--checkpoint", self.checkpoint, "--for-bundle", self.bundle


def steps_of(mode: DeployMode, folder: Path) -> Steps:
    model = random_model(RECIPES[mode])
    whole = replace(checkpoint_of(model, {}), recovered=dict(model.recovered))
    if mode is DeployMode.CALIBRATED:
        constants = ConditioningConstants(model.quantizer.mean.float(), model.quantizer.scale.float())
        whole = replace(whole, trained_with=Conditioning.DYNAMIC, constants=constants)
    save_checkpoint(whole, folder / "steps.safetensors")
    identity = fingerprint(load_checkpoint(folder / "steps.safetensors"), mode)
    bundle = write_bundle(folder / "bundle", RECIPES[mode])
    manifest = bundle / MANIFEST_NAME
    stated = replace(parse_manifest(manifest.read_text(encoding="utf-8")), fingerprint=identity)
    manifest.write_text(manifest_text(stated), encoding="utf-8")
    return Steps(folder / "steps.safetensors", bundle, identity)


def step_arrays(length: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "actions": random.uniform(-0.5, 0.5, (8, 4, 3)).astype(np.float32),
        "episode": np.arange(8) // 2,
        "logits": random.standard_normal((8, 4, 4, length, 5)).astype(np.float32),
    }


@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.RECOVERED, DeployMode.NONE])
def test_per_step_tokens_are_fitted_to_as_the_bundle_decodes_them(
    tmp_path: Path, mode: DeployMode, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = steps_of(mode, tmp_path)
    for length in (2, 3):
        assert run(tmp_path, step_arrays(length), *steps.arguments, "--overwrite") == 0
        assert f"layer {length - 1}" in capsys.readouterr().out
        settings = load_belief_settings(tmp_path / "beliefs.json")
        assert len(settings.temperature) == length
        # The bundle's fewest layers are the mode, and not those of another.
        assert settings.kind == BeliefKind(steps.fingerprint, "tokens", length, 1)
    assert run(tmp_path, step_arrays(3) | {"logits": np.zeros((8, 4, 4, 3, 4), np.float32)}, *steps.arguments) == 2
    capsys.readouterr()
    arrays = step_arrays(3) | {"logits": np.zeros((8, 4, 4, 4, 5), np.float32)}
    assert run(tmp_path, arrays, *steps.arguments, "--overwrite") == 2
    assert "expected [N, 4, 4, 3, 5]" in capsys.readouterr().err


def test_a_bundle_of_another_checkpoint_is_refused(
    tmp_path: Path, checkpoint: Path, chunk_bundle: Path, said: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    steps = steps_of(DeployMode.CALIBRATED, tmp_path)
    other = write_bundle(tmp_path / "other", RECIPES[DeployMode.RECOVERED])
    of_steps = "--checkpoint", steps.checkpoint, "--for-bundle"
    of_chunks = "--kind", "chunk", "--checkpoint", checkpoint, "--for-bundle"
    for arrays, arguments in (
        (step_arrays(3), (*of_steps, other)),
        (step_arrays(3), (*of_steps, chunk_bundle)),
        (said, (*of_chunks, steps.bundle)),
    ):
        assert run(tmp_path, arrays, *arguments) == 2
        assert "was not built from this checkpoint; give the one that it was built from" in capsys.readouterr().err
    dynamic = steps_of(DeployMode.DYNAMIC, tmp_path / "dynamic")
    assert run(tmp_path, step_arrays(3), *dynamic.arguments) == 2
    assert "dynamic tokens do not decode alone" in capsys.readouterr().err
