"""The main job, end to end: from a checkpoint to a bundle that a robot can use, or to nothing at all."""

import contextlib
import copy
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from rfsq.calibration.fitting import calibrate
from rfsq.calibration.readout import held_out_warning
from rfsq.calibration.settings import CalibrationConfig, ReadoutChoice, ReadoutConfig, RecoveredConfig
from rfsq.export import engines, pipeline, sources, step_tokens
from rfsq.export.build_config import BuildConfig
from rfsq.export.build_engine import config_of, main, parser, verdict
from rfsq.export.c_builder import find_compiler
from rfsq.export.engines import Profile
from rfsq.export.errors import GateError
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm
from rfsq.export.parity import closing_tables
from rfsq.export.pipeline import build
from rfsq.export.plan import DecoderPlan, DeployMode
from rfsq.export.reference import AS_TRAINED, REFITTED
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.data import EpisodeSplit, chunk, load_actions
from rfsq.rfsq_ref.fingerprint import fingerprint
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.checkpoint_layouts import recorded_hashes, weight_hashes
from rfsq.runtime.bundle.decoding import StepDecoding
from rfsq.runtime.bundle.fidelity import Grade, fidelity
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, MANIFEST_NAME, Manifest, ParityEntry
from tests.backends import without_packages
from tests.bundles import bundle_files, graph_file
from tests.calibration.small_fits import hardly_trained
from tests.export.machine import needs_no_gpu, needs_rtx
from tests.rfsq_ref.published_model import ActionRFSQAE
from tests.rfsq_ref.units import normalise, restore

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "export" / "build_engine.py"
STEPS = 4000


def config(output: Path, **options: object) -> BuildConfig:
    return BuildConfig(**{"output": output, "backends": ("onnxruntime",), "parity_steps": STEPS, **options})


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), "--backends", "onnxruntime", *map(str, arguments)]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As a person would from any folder."""
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, check=False)


def tree(folder: Path) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in bundle_files(folder)}


def published(path: Path, model: ActionRFSQAE, **extra: object) -> Path:
    """The file that research code writes."""
    torch.save({"model_state_dict": model.state_dict(), "epoch": 1, "config": model.config, **extra}, path)
    return path


def write_episodes(path: Path, action_dim: int, *, episodes: int = 12, steps: int = 60, seed: int = 0) -> Path:
    """Smooth random motion in [-1, 1]."""
    random = np.random.default_rng(seed)
    time = np.arange(steps)[:, None] / steps
    arrays = {
        f"episode_{n}": np.sin(
            2 * np.pi * (random.uniform(0.5, 3, action_dim) * time + random.uniform(size=action_dim))
        )
        for n in range(episodes)
    }
    np.savez(path, **{name: array.astype(np.float32) for name, array in arrays.items()})
    return path


# --- the embedded checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    """What the build of `built` says."""
    return io.StringIO()


@dataclass(frozen=True)
class Built:
    """A bundle and what the build returned."""

    output: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def built(printed: io.StringIO, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The default: the embedded robust checkpoint, calibrated."""
    output = tmp_path_factory.mktemp("calibrated") / "bundle"
    with contextlib.redirect_stdout(printed):
        return Built(output, build(config(output)))


@pytest.fixture(scope="module")
def tokenizer(built: Built) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(built.output) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActionTokenizer]:
    output = tmp_path_factory.mktemp("recovered") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        # Without searching for the best: that takes 15 seconds, and calibration's own tests judge it.
        patch.setattr(sources, "RecoveredConfig", lambda: RecoveredConfig(ridge=1e-6, refine_steps=2))
        build(config(output, conditioning=DeployMode.RECOVERED, parity_steps=1))
    with ActionTokenizer.load(output) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActionTokenizer]:
    output = tmp_path_factory.mktemp("dynamic") / "bundle"
    build(config(output, conditioning=DeployMode.DYNAMIC, parity_steps=1))
    with ActionTokenizer.load(output) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def naive_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActionTokenizer]:
    output = tmp_path_factory.mktemp("naive") / "bundle"
    build(config(output, checkpoint=NAIVE_CHECKPOINT, parity_steps=1))
    with ActionTokenizer.load(output) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def chunks(split: EpisodeSplit) -> np.ndarray:
    """Held-out episodes, float32 [N, 8, 7]."""
    return np.concatenate([chunk(episode, 8) for episode in split.test.episodes])


@pytest.fixture(scope="module")
def author(robust: Checkpoint) -> ActionRFSQAE:
    """The embedded robust checkpoint in the published model, an implementation of its own."""
    model = ActionRFSQAE(use_layernorm=True)
    grids = {f"rfsq.layers.{layer}.boundaries": torch.linspace(-1, 1, 7) for layer in range(8)}
    model.load_state_dict({**robust.weights, **grids})
    return model.eval()


def mse(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean((found.astype(np.float64) - expected) ** 2))


def mse_of_prefix(author: ActionRFSQAE, actions: np.ndarray, layers: int) -> float:
    """The published forward pass with its side information, cut off after some layers; 0: not quantised at all."""
    with torch.no_grad():
        latents = author.encoder(torch.from_numpy(actions))
        residual, total = latents, torch.zeros_like(latents)
        for layer in author.rfsq.layers[:layers]:
            quantised, _ = layer(residual)
            total, residual = total + quantised, residual - quantised
        return mse(author.decoder(total if layers else latents).numpy(), actions)


def test_the_default_build_makes_a_bundle_that_a_robot_can_load(built: Built, tokenizer: ActionTokenizer) -> None:
    manifest = built.manifest
    graphs = [
        graph_file(name, form) for name in ("encoder.onnx", "decoder.onnx", "decoder_l3.onnx") for form in LinearForm
    ]
    graphs += [graph_file(name, form) for name in ("belief.onnx", "belief_l3.onnx") for form in BELIEF_FORMS]
    others = [C_HEADER, C_SOURCE, CUDA_SOURCE, "golden.npz", "decoding.npz", MANIFEST_NAME]
    assert bundle_files(built.output) == sorted([*graphs, *others])
    assert (manifest.model.mode, manifest.model.chunk_length, tokenizer.prefixes) == ("calibrated", 8, (3, 8))
    assert manifest.engines == ()
    assert tokenizer.fingerprint == manifest.fingerprint
    assert {"python", "numpy", "torch", "onnx", "onnxruntime", "polygraphy"} == manifest.tools.keys()
    assert os.listdir(built.output.parent) == ["bundle"]  # noqa: PTH208


def test_every_gate_is_in_the_manifest_and_green(built: Built) -> None:
    parity = built.manifest.parity
    assert [entry.gate for entry in parity] == [
        "encode: wrong tokens",
        "encode: near-tie flips",
        "decode 3 layers: action error",
        "decode 8 layers: action error",
        "beliefs: action error",
        "beliefs: std error",
        "beliefs: mode probability error",
        "beliefs: certain ones that differ",
    ]
    assert all(entry.value <= entry.limit for entry in parity)
    # Beliefs of 64 chunks.
    assert all(entry.steps >= (512 if entry.gate.startswith("beliefs") else STEPS) for entry in parity)
    assert [entry.limit for entry in parity[3:]] == [1e-5, 1e-5, 1e-4, 1e-5, 0]
    assert parity[0].limit == 0


def test_provenance_tells_where_everything_came_from_without_a_path(built: Built, robust: Checkpoint) -> None:
    provenance = built.manifest.provenance
    assert provenance["checkpoint"]["file"] == "robust.safetensors"
    assert provenance["checkpoint"]["checkpoint_sha256"] == robust.provenance["checkpoint_sha256"]
    assert provenance["checkpoint"]["calibrated"]["data"]["source"] == "demonstrations.npz"
    assert provenance["action_mse"].keys() == {AS_TRAINED, REFITTED, "tokens of 3 layers", "tokens of 8 layers"}
    text = (built.output / MANIFEST_NAME).read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


def test_the_hash_of_every_tensor_of_the_checkpoint_is_in_the_manifest(built: Built, robust: Checkpoint) -> None:
    recorded = recorded_hashes(built.manifest)
    assert recorded is not None
    weights = weight_hashes({name: tensor.numpy() for name, tensor in robust.weights.items()})
    assert {name: recorded[name] for name in weights} == weights
    # What this build fitted stands beside.
    assert recorded.keys() - weights.keys() == {
        "calibrated.mean",
        "calibrated.scale",
        "readout.weight",
        "readout.bias",
    }


def test_tokens_alone_are_within_five_percent_of_not_quantising(
    tokenizer: ActionTokenizer, author: ActionRFSQAE, chunks: np.ndarray
) -> None:
    error = mse(tokenizer.decode(tokenizer.encode(chunks)), chunks)
    assert error <= 1.05 * mse_of_prefix(author, chunks, 0)


def test_coarse_tokens_are_five_times_better_than_the_published_coarse_pass(
    tokenizer: ActionTokenizer, author: ActionRFSQAE, chunks: np.ndarray
) -> None:
    error = mse(tokenizer.decode(np.ascontiguousarray(tokenizer.encode(chunks)[..., :3])), chunks)
    assert 5 * error <= mse_of_prefix(author, chunks, 3)


def test_naive_is_beaten_by_more_than_thirty_percent(
    tokenizer: ActionTokenizer, naive_tokenizer: ActionTokenizer, chunks: np.ndarray
) -> None:
    assert naive_tokenizer.model.mode == "none"
    of_naive = mse(naive_tokenizer.decode(naive_tokenizer.encode(chunks)), chunks)
    assert mse(tokenizer.decode(tokenizer.encode(chunks)), chunks) < 0.7 * of_naive


def test_any_action_in_the_range_has_latents_within_a_thousandth(
    tokenizer: ActionTokenizer, calibrated: Checkpoint
) -> None:
    """Everywhere, not only where the demonstrations are."""
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (5000, 8, 7)).astype(np.float32)
    actions[:1000] = np.sign(actions[:1000])
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64)
    with torch.no_grad():
        latents = model.encode_latents(torch.from_numpy(actions).double())
        decoded = model.dequantize(torch.from_numpy(tokenizer.encode(actions)).long())
    assert float((latents - decoded).abs().max()) < 1e-3


def test_the_quality_that_a_build_reports_is_the_quality_that_it_has(
    built: Built, tokenizer: ActionTokenizer, author: ActionRFSQAE, calibrated: Checkpoint, split: EpisodeSplit
) -> None:
    steps = split.test.steps()
    # By the published code, with the one layer that calibration refits.
    assert calibrated.readout is not None
    author = copy.deepcopy(author)
    author.decoder[2].load_state_dict({"weight": calibrated.readout.weight, "bias": calibrated.readout.bias})
    assert built.manifest.provenance["action_mse"]["readout refitted, no quantiser"] == pytest.approx(
        mse_of_prefix(author, steps, 0), rel=1e-4
    )
    whole = steps[: len(steps) // 8 * 8].reshape(-1, 8, 7)
    tokens = tokenizer.encode(whole)
    for prefix in (3, 8):
        error = mse(tokenizer.decode(np.ascontiguousarray(tokens[..., :prefix])), whole)
        # But for the few steps that fill no chunk.
        assert built.manifest.provenance["action_mse"][f"tokens of {prefix} layers"] == pytest.approx(error, rel=0.02)


def test_recovered_tokens_are_the_published_encoders(
    recovered: ActionTokenizer, author: ActionRFSQAE, chunks: np.ndarray
) -> None:
    """So that a policy trained on them keeps working. Compared outside near-ties, which float32 decides either way."""
    assert recovered.model.mode == "recovered"
    tokens = recovered.encode(chunks)
    of_author = author.encode(torch.from_numpy(chunks)).numpy()
    of_float64 = author.double().encode(torch.from_numpy(chunks).double()).numpy()
    author.float()
    # Where the author's own model says the same in both precisions, so do we, but for a step in some thousand.
    steady = (of_author == of_float64).all((-1, -2))
    assert steady.mean() > 0.99
    assert (tokens == of_author)[steady].all((-1, -2)).mean() > 0.999
    np.testing.assert_array_equal(tokens[..., 0][steady], of_author[..., 0][steady])


def test_recovered_actions_are_worth_the_published_tokens(
    recovered: ActionTokenizer, author: ActionRFSQAE, chunks: np.ndarray
) -> None:
    tokens = author.encode(torch.from_numpy(chunks))
    error = mse(recovered.decode(tokens.numpy()), chunks)
    assert error <= 10 * (mse_of_prefix(author, chunks, 8) + mse_of_prefix(author, chunks, 0))
    assert 10_000 * error <= mse(author.decode_from_indices(tokens).numpy(), chunks)


def test_dynamic_tokens_decode_with_their_statistics(
    dynamic: ActionTokenizer, author: ActionRFSQAE, chunks: np.ndarray
) -> None:
    tokens, stats = dynamic.encode_with_stats(chunks)
    for prefix in (3, 8):
        part = np.ascontiguousarray(tokens[..., :prefix])
        error = mse(dynamic.decode(part, np.ascontiguousarray(stats[..., :prefix, :])), chunks)
        assert error == pytest.approx(mse_of_prefix(author, chunks, prefix), rel=1e-3)
    assert "encode: stats error" in [entry.gate for entry in dynamic._manifest.parity]


def test_the_four_modes_are_four_tokenizers(
    tokenizer: ActionTokenizer, recovered: ActionTokenizer, dynamic: ActionTokenizer, naive_tokenizer: ActionTokenizer
) -> None:
    assert len({each.fingerprint for each in (tokenizer, recovered, dynamic, naive_tokenizer)}) == 4


def test_the_default_arguments_are_those_of_make_engine() -> None:
    defaults = config_of(parser().parse_args([]))
    assert defaults == BuildConfig()
    assert (defaults.checkpoint, defaults.folder) == (None, Path("build/bundle"))
    assert defaults.parity_steps >= 100_000
    assert (defaults.conditioning, defaults.prefixes, defaults.backends) == (None, None, None)


def test_a_person_sees_a_line_per_step_and_a_table(built: Built, printed: io.StringIO) -> None:
    output = printed.getvalue()
    titles = re.findall(r"^✓ ([a-zA-Z -]+?)  ", output, re.MULTILINE)
    assert titles == [
        "load checkpoint",
        "load action data",
        "calibrate",
        "export ONNX",
        "generate C",
        "generate CUDA",
        "write golden vectors",
        "cross-check graphs",
        "parity gates",
    ]
    assert re.search(r"^✓ onnxruntime \(.*?\), decode 8 layers: action error +\S+ +1e-05 +\d+$", output, re.MULTILINE)
    assert re.search(r"^tokens of 8 layers +\d\.\d{3}e-06$", output, re.MULTILINE)
    done, worth = verdict(built.output, built.manifest).splitlines()
    assert done.endswith(f"is built and validated, fingerprint {built.manifest.fingerprint[:16]}")
    assert worth.startswith("what the tokens are worth: good; in robot units: RMS error at most ")


# --- other checkpoints ------------------------------------------------------------------------------------------------

OTHER = ModelConfig(action_dim=4, latent_dim=6, hidden_width=24, num_layers=5, num_levels=5)
#: In physical units of this robot: metres, radians, and a gripper from 0 to 1.
NORMALISER = Normaliser(NormaliserKind.MIN_MAX, (0.5, -2.0, 0.0, 0.5), (0.25, 3.0, 100.0, 0.5))


def other_model(*, use_layernorm: bool = True, seed: int = 0, gain: float = 2.0) -> ActionRFSQAE:
    torch.manual_seed(seed)
    model = ActionRFSQAE(4, 6, 5, 5, use_layernorm, width=24)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter *= gain
    return model.eval()


def write_other(folder: Path, model: ActionRFSQAE, normaliser: Normaliser = NORMALISER) -> list[str]:
    """A checkpoint, its normaliser and its data; the arguments that name them."""
    np.savez(
        folder / "episodes.npz",
        **{
            name: restore(normaliser, actions).astype(np.float32)
            for name, actions in np.load(write_episodes(folder / "normalised.npz", 4)).items()
        },
    )
    (folder / "normaliser.json").write_text(json.dumps(normaliser.to_json()), encoding="utf-8")
    published(folder / "model.pt", model)
    return [
        "--checkpoint", str(folder / "model.pt"),
        "--normaliser", str(folder / "normaliser.json"),
        "--calibration-data", str(folder / "episodes.npz"),
    ]  # fmt: skip


OTHER_FLAGS = ("--chunk-length", "3", "--prefixes", "2", "4", "--readout", "on")


@pytest.fixture(scope="module")
def other_printed() -> io.StringIO:
    """What the build of `other` says."""
    return io.StringIO()


@pytest.fixture(scope="module")
def other(other_printed: io.StringIO, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a robust model of other sizes, its data in units of its robot, and the bundle built from both."""
    folder = tmp_path_factory.mktemp("other")
    with contextlib.redirect_stdout(other_printed):
        assert main([*build_arguments(folder / "bundle"), *write_other(folder, other_model()), *OTHER_FLAGS, "-v"]) == 0
    return folder


def test_a_model_of_other_sizes_and_units_builds_from_its_published_file(
    other: Path, other_printed: io.StringIO
) -> None:
    model, output = other_model(), other_printed.getvalue()
    assert "readout refitted, no quantiser" in output
    assert "A 4, D 6, L 5, K 5, hidden 24; deployed as 'calibrated'" in output

    with ActionTokenizer.load(other / "bundle") as tokenizer:
        assert tokenizer.prefixes == (2, 4, 5)
        assert tokenizer.model.action_units == NORMALISER.scale
        assert tokenizer.model.action_offset == NORMALISER.offset
        normalised = np.random.default_rng(3).uniform(-1, 1, (500, 3, 4))
        actions = restore(NORMALISER, normalised).astype(np.float32)
        tokens = tokenizer.encode(actions)
        assert tokens.shape == (500, 3, 6, 5)
        fitted = calibrate(
            replace(load_checkpoint(other / "model.pt"), normaliser=NORMALISER),
            load_actions(other / "episodes.npz"),
            CalibrationConfig(),
            ReadoutConfig(ReadoutChoice.ON),
        )
        assert fitted.readout is not None
        model.decoder[2].load_state_dict({"weight": fitted.readout.weight, "bias": fitted.readout.bias})
        with torch.no_grad():
            unquantised = model.decoder(model.encoder(torch.from_numpy(normalise(NORMALISER, actions)).float())).numpy()
        errors = [
            mse(normalise(NORMALISER, tokenizer.decode(np.ascontiguousarray(tokens[..., :prefix]))), unquantised)
            for prefix in tokenizer.prefixes
        ]
    # What five layers of five levels can tell, in normalised units; and more layers tell more.
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_builds_from_two_folders_write_the_same_bytes(other: Path, tmp_path: Path) -> None:
    """By another process, started in another folder: fitted on data, judged, and with golden vectors chosen from it."""
    here = tmp_path / "another folder"
    here.mkdir()
    inputs = write_other(here, other_model())
    finished = run("--output", "some/bundle", "--parity-steps", STEPS, *inputs, *OTHER_FLAGS, cwd=here)
    assert finished.returncode == 0, finished.stderr
    first, second = tree(other / "bundle"), tree(here / "some" / "bundle")
    assert first.keys() == second.keys()
    for file in first:
        assert first[file] == second[file], file


#: Joints that rest at 0, 20, 100 and 1,000 times what they move by.
FAR = Normaliser(NormaliserKind.MIN_MAX, (0.0, -60.0, 25.0, 100.0), (2.0, 3.0, 0.25, 0.1))


@pytest.mark.usefixtures("one_target")
def test_a_robot_whose_joints_rest_far_from_zero_builds(tmp_path: Path) -> None:
    arguments = write_other(tmp_path, other_model(), FAR)
    backends = ["onnxruntime", *(["c"] if find_compiler() else [])]
    output = tmp_path / "bundle"
    assert main([*arguments, "--output", str(output), "--parity-steps", str(STEPS), "--backends", *backends]) == 0
    parity = open_bundle(output).manifest.parity
    assert {entry.backend for entry in parity} == set(backends)
    assert {entry.value for entry in parity if entry.gate == "encode: wrong tokens"} == {0}
    # The robot's own check of it, on its own golden vectors.
    with ActionTokenizer.load(output) as tokenizer:
        assert tokenizer.model.action_offset == tuple(map(float, np.float32(FAR.offset)))


@pytest.mark.parametrize("mode", [DeployMode.DYNAMIC, DeployMode.RECOVERED, DeployMode.CALIBRATED])
def test_every_mode_builds_for_a_robust_model_of_other_sizes(
    mode: DeployMode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_other(tmp_path, other_model())
    manifest = build(
        config(
            tmp_path / "bundle",
            checkpoint=tmp_path / "model.pt",
            normaliser=tmp_path / "normaliser.json",
            data=tmp_path / "episodes.npz",
            conditioning=mode,
            chunk_length=1,
            prefixes=(1,),
        )
    )
    assert manifest.model.mode == mode.value
    # Whether a refit wins here is another test's.
    assert manifest.provenance["action_mse"].keys() - {"readout refitted, no quantiser"} == {
        "autoencoder as trained, no quantiser", "tokens of 1 layers", "tokens of 5 layers"
    }  # fmt: skip
    with ActionTokenizer.load(tmp_path / "bundle") as tokenizer:
        assert tokenizer.prefixes == (1, 5)
    # Nobody trained this model: it is built, and people are told.
    output = capsys.readouterr().out
    assert "action MSE, normalised units²" in output
    assert re.search(r"^dimension 3, robot units +\S+ +\S+ +\S+ +\S+% +(poor|worthless)$", output, re.MULTILINE)
    # After the line that says that all went well, which else would be the last word.
    tick, line, warning = verdict(tmp_path / "bundle", manifest).splitlines()
    assert tick.startswith("✓ ")
    quality = manifest.quality
    assert quality is not None
    assert line == f"what the tokens are worth: {quality.line}"
    assert quality.fidelity.grade is not Grade.GOOD
    assert warning == quality.fidelity.warning_in(manifest.model.mode)
    assert quality.source == "episodes.npz"
    # Which engine has the flips.
    assert re.search(r"^onnxruntime \(CPU\), encode: near-tie flips: L0 to L4: ", output, re.MULTILINE)


def test_a_red_gate_of_worthless_tokens_says_first_what_they_are_worth() -> None:
    actions = np.random.default_rng(0).normal(size=(100, 2))
    worthless = fidelity(actions, -actions, [1.0, 1.0], [0.0, 0.0])
    said = r"(?s)^WARNING: the tokens are worthless.*units.*\nred"
    with pytest.raises(GateError, match=said), pipeline._worth_first(worthless, "calibrated"):
        raise GateError("red")
    with pytest.raises(GateError, match=r"^red"), pipeline._worth_first(None, "calibrated"):
        raise GateError("red")


def test_the_closing_tables_name_the_engines_of_a_remark_and_a_refit_that_lost() -> None:
    flips = ParityEntry("c", "encode: near-tie flips", 8, 3, 9, "L0 to L1: 2 1", "x86-64-v3")
    parity = (flips, replace(flips, device="x86-64"), replace(flips, detail="L0 to L1: 3 0", device="x86-64-v4"))
    text = closing_tables(parity, {AS_TRAINED: 5.279e-2, REFITTED: 5.344e-2}, None, "held-out episodes")
    assert "\nc (x86-64-v3), c (x86-64), encode: near-tie flips: L0 to L1: 2 1\n" in text
    assert "\nc (x86-64-v4), encode: near-tie flips: L0 to L1: 3 0\n" in text
    assert text.endswith(held_out_warning(5.279e-2, 5.344e-2, "held-out episodes", "normalised units²"))
    won = closing_tables(parity, {AS_TRAINED: 2.0, REFITTED: 1.0}, None, "held-out episodes")
    assert "lost on" not in won


def test_a_readout_is_refused_where_nothing_is_calibrated(tmp_path: Path) -> None:
    published(tmp_path / "naive.pt", other_model(use_layernorm=False))
    with pytest.raises(ValueError, match="readout 'off' is asked for, but nothing is calibrated here"):
        build(config(tmp_path / "bundle", checkpoint=tmp_path / "naive.pt", readout=ReadoutChoice.OFF))
    assert not (tmp_path / "bundle").exists()


def test_the_command_takes_a_readout() -> None:
    arguments = config_of(parser().parse_args(["--readout", "on"]))
    assert isinstance(arguments, BuildConfig)
    assert arguments.readout is ReadoutChoice.ON
    with pytest.raises(SystemExit):
        config_of(parser().parse_args(["--readout", "always"]))


def test_a_naive_published_file_builds_without_any_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path / "naive.pt", other_model(use_layernorm=False))
    manifest = build(config(tmp_path / "bundle", checkpoint=tmp_path / "naive.pt"))
    assert manifest.model.mode == "none"
    assert manifest.provenance["action_mse"] == {}
    output = capsys.readouterr().out
    assert "none given: gates run on random actions alone" in output
    assert re.search(r"^– calibrate .* nothing to fit$", output, re.MULTILINE)
    assert "held-out episodes, decoded from" not in output


def test_a_bare_state_dict_builds_when_it_is_said_how_it_was_trained(tmp_path: Path) -> None:
    torch.save(other_model().state_dict(), tmp_path / "bare.pt")
    manifest = build(
        config(
            tmp_path / "b",
            checkpoint=tmp_path / "bare.pt",
            use_layernorm=True,
            conditioning=DeployMode.DYNAMIC,
            parity_steps=1,
        )
    )
    assert manifest.model.mode == "dynamic"


def test_the_weights_that_are_asked_for_are_built_and_it_is_said_what_was_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, average = other_model(), other_model(seed=1)
    published(tmp_path / "trained.pt", model, ema=average.state_dict())
    arguments = ["--checkpoint", str(tmp_path / "trained.pt"), "--conditioning", "dynamic", "--parity-steps", "1"]
    assert main([*build_arguments(tmp_path / "bundle"), *arguments, "--weights", "ema"]) == 0
    said = "weights taken: 'ema'; not taken: 'model_state_dict'; --weights model_state_dict takes those"
    assert said in capsys.readouterr().out
    hashes = recorded_hashes(open_bundle(tmp_path / "bundle").manifest)
    assert hashes
    tensors = {name: tensor.numpy() for name, tensor in average.state_dict().items() if name in hashes}
    assert weight_hashes(tensors).items() <= hashes.items()


@pytest.fixture(scope="module")
def fitted(other: Path) -> Checkpoint:
    """The checkpoint of `other` with the constants of its build."""
    checkpoint = replace(load_checkpoint(other / "model.pt"), normaliser=NORMALISER)
    actions = load_actions(other / "episodes.npz")
    return calibrate(checkpoint, actions, CalibrationConfig(), ReadoutConfig(ReadoutChoice.ON))


def test_constants_that_a_checkpoint_brings_are_kept(
    fitted: Checkpoint, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other ones than a fit would give, where there is data to fit them to."""
    assert fitted.constants is not None
    constants = ConditioningConstants(fitted.constants.mean, fitted.constants.scale * 1.25)
    brought = replace(fitted, constants=constants)
    save_checkpoint(brought, tmp_path / "brought.safetensors")
    data = {"checkpoint": tmp_path / "brought.safetensors", "data": other / "episodes.npz"}
    manifest = build(config(tmp_path / "bundle", **data, parity_steps=1))
    assert "nothing to fit" in capsys.readouterr().out
    of_fit = open_bundle(other / "bundle").manifest.fingerprint
    assert manifest.fingerprint == fingerprint(brought, DeployMode.CALIBRATED) != of_fit


def test_chunk_length_and_prefixes_do_not_change_the_fingerprint(
    fitted: Checkpoint, other: Path, tmp_path: Path
) -> None:
    save_checkpoint(fitted, tmp_path / "fitted.safetensors")
    options = {"checkpoint": tmp_path / "fitted.safetensors", "parity_steps": 1}
    manifest = build(config(tmp_path / "bundle", **options, chunk_length=50, prefixes=(1, 3)))
    assert manifest.fingerprint == open_bundle(other / "bundle").manifest.fingerprint
    assert manifest.model.chunk_length == 50
    assert manifest.model.prefixes == (1, 3, 5)


def test_a_model_that_was_hardly_trained_builds_with_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The readout takes no weights that the gates would then refuse."""
    checkpoint, data = hardly_trained()
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    np.savez(tmp_path / "data.npz", actions=data.steps(), episode_ends=np.arange(100, 4001, 100))
    given = ["--checkpoint", str(tmp_path / "model.safetensors"), "--data", str(tmp_path / "data.npz")]
    assert main([*build_arguments(tmp_path / "bundle"), *given]) == 0, capsys.readouterr().err
    assert "the decoder's last layer is refitted" in capsys.readouterr().out


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A naive checkpoint that needs no data."""
    return published(tmp_path_factory.mktemp("small") / "naive.pt", other_model(use_layernorm=False))


def check_engines(manifest: Manifest, folder: Path, profile: tuple[int, int, int], target: str) -> None:
    graphs = manifest.every_graph_of("reduce")
    assert [engine.source for engine in manifest.engines] == [graph.file for graph in graphs]
    for graph, engine in zip(graphs, manifest.engines, strict=True):
        # Nothing here has run it: that is said, and not a word more.
        assert engine.status == "built"
        assert (engine.precision, engine.device, engine.kernel_cache) == ("not measured", "", "")
        assert re.fullmatch(r"inspected \((engine|network|none)\), not run", engine.detail)
        # Beliefs come from numpy in slices.
        assert engine.profile == ((1, 1, 32) if graph.role == "belief" else profile)
        assert engine.source_sha256 == manifest.files[engine.source].sha256
        stem = engine.source.removeprefix("reduce/").removesuffix(".onnx")
        expected = f"engines/{engine.backend}-{engine.version}-{target}/{stem}-{engine.source_sha256[:12]}.engine"
        assert engine.file == expected
        assert (folder / engine.file).stat().st_size == manifest.files[engine.file].size > 1000
    assert {entry.backend for entry in manifest.parity} == {"onnxruntime"}


@needs_rtx
@needs_no_gpu
def test_engines_are_built_and_reported_as_not_run(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"backends": ("tensorrt-rtx",), "profile": Profile(1, 4, 64), "parity_steps": 500}
    manifest = build(config(tmp_path / "bundle", checkpoint=small, **options))
    check_engines(manifest, tmp_path / "bundle", (1, 4, 64), "default")
    assert {engine.targets for engine in manifest.engines} == {()}
    output = capsys.readouterr().out
    assert re.search(r"built for tensorrt-rtx \S+, target default$", output, re.MULTILINE)
    assert re.search(r"^ +NOT run: tensorrt-rtx: \S", output, re.MULTILINE)
    ActionTokenizer.load(tmp_path / "bundle").close()


@needs_rtx
@needs_no_gpu
def test_engines_for_chosen_gpus_carry_them_in_their_names(small: Path, tmp_path: Path) -> None:
    options = {
        "backends": ("tensorrt-rtx",),
        "compute_capabilities": ("8.9", "12.0"),
        "prefixes": (5,),
        "parity_steps": 500,
    }
    manifest = build(config(tmp_path / "bundle", checkpoint=small, **options))
    check_engines(manifest, tmp_path / "bundle", (1, 1, 4096), "sm89-sm120")
    assert {engine.targets for engine in manifest.engines} == {("8.9", "12.0")}


@needs_rtx
@pytest.mark.usefixtures("one_target")
def test_without_a_choice_engines_are_built_for_what_is_installed_and_it_is_said_what_did_not_run(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    manifest = build(config(tmp_path / "bundle", checkpoint=small, backends=None, parity_steps=500))
    assert "tensorrt-rtx" in {engine.backend for engine in manifest.engines}
    assert "onnxruntime-cuda" not in {entry.backend for entry in manifest.parity}
    assert "NOT run: onnxruntime-cuda: ONNX Runtime " in capsys.readouterr().out


def test_c_is_compiled_for_every_target_of_this_processor_and_passes_every_gate(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build(config(tmp_path / "bundle", checkpoint=small, backends=("c",), parity_steps=500))
    assert [engine.targets for engine in manifest.engines] == [(target,) for target in host_targets()]
    for engine in manifest.engines:
        assert (engine.backend, engine.source, engine.status, engine.precision) == ("c", C_SOURCE, "validated", "fp32")
        assert engine.source_sha256 == manifest.files[C_SOURCE].sha256
        assert engine.device == engine.targets[0]
    gates = {entry.gate for entry in manifest.parity if entry.backend == "onnxruntime"}
    beliefs = {gate for gate in gates if gate.startswith("beliefs")}
    gates -= beliefs
    # Values are checked in C itself; for ONNX Runtime the host does so.
    calls = ("encode", *(f"decode {prefix} layers" for prefix in manifest.model.prefixes))
    gates |= {f"{call}: illegal values accepted" for call in calls}
    output = capsys.readouterr().out
    for target in host_targets():
        own = [entry for entry in manifest.parity if (entry.backend, entry.device) == ("c", target)]
        # Generated C promises to refuse what is illegal, too.
        refusals = {f"{gate.partition(':')[0]}: illegal values accepted" for gate in gates}
        assert {entry.gate for entry in own} - beliefs == gates | refusals
        assert re.search(rf"^✓ c \({target}\), encode: wrong tokens +0 ", output, re.MULTILINE)
    with ActionTokenizer.load(tmp_path / "bundle") as tokenizer:
        assert tokenizer.backend.name == "c"
    header = (tmp_path / "bundle" / C_HEADER).read_text(encoding="utf-8")
    assert f'"{manifest.fingerprint}"' in header


def test_without_a_compiler_the_source_goes_along_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "find_compiler", lambda: None)
    without_packages(monkeypatch, "tensorrt")
    manifest = build(config(tmp_path / "bundle", checkpoint=small, backends=None, parity_steps=500))
    assert "c" not in {engine.backend for engine in manifest.engines}
    assert C_SOURCE in manifest.files
    assert "no C compiler is here: compile the generated C on the robot, with --from-bundle" in capsys.readouterr().out


def test_c_asked_for_without_a_compiler_is_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no compiler"))
    arguments = ["--checkpoint", str(small), "--output", str(tmp_path / "bundle"), "--parity-steps", "500"]
    assert main([*arguments, "--backends", "c"]) == 2
    assert "no C compiler is here: install gcc or clang" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_target")
def test_c_that_leaves_the_reference_turns_the_gates_red(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = step_tokens.c_tokenizer

    def wrong(encoder, decoders, *stated):
        return generate(crooked(encoder), [lean(decoder) for decoder in decoders], *stated)

    monkeypatch.setattr(step_tokens, "c_tokenizer", wrong)
    arguments = ["--checkpoint", str(small), "--output", str(tmp_path / "bundle"), "--parity-steps", str(STEPS)]
    assert main([*arguments, "--backends", "c"]) == 1
    captured = capsys.readouterr()
    for gate in ("encode: wrong tokens", "decode 3 layers: action error", "decode 5 layers: action error"):
        assert re.search(rf"^  c, {gate}: \S+ over \d+ steps; expected at most", captured.err, re.MULTILINE)
        assert re.search(rf"^✓ onnxruntime \(.*?\), {gate} ", captured.out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_an_engine_that_is_not_what_was_asked_for_ends_the_build(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncated(*arguments):
        engine = build_one(*arguments)
        return replace(engine, serialized=engine.serialized[: len(engine.serialized) // 2])

    build_one = engines.build_engine
    monkeypatch.setattr(engines, "build_engine", truncated)
    with pytest.raises(GateError, match=r"tensorrt-rtx, reduce/encoder\.onnx: .* refuses the engine"):
        build(config(tmp_path / "bundle", checkpoint=small, backends=("tensorrt-rtx",), parity_steps=500))
    assert list(tmp_path.iterdir()) == []


@needs_no_gpu
def test_generated_cuda_without_a_gpu_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "bundle"), "--backend", "c", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: no NVIDIA GPU is here, and cuda needs one (")


@needs_rtx
def test_a_gpu_that_tensorrt_does_not_know_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(small), "--output", str(tmp_path / "bundle"), "--parity-steps", "500"]
    assert main([*arguments, "--backends", "tensorrt-rtx", "--compute-capabilities", "9.9"]) == 2
    assert re.search(r"error: .*'9\.9'.*valid are", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


# --- red gates --------------------------------------------------------------------------------------------------------


def lean(plan):
    """A decoder whose first action is off by 1e-4, ten times what is allowed."""
    bias = plan.second.bias.copy()
    bias[0] += 1e-4
    return replace(plan, second=replace(plan.second, bias=bias))


def crooked(plan):
    """An encoder whose first weight is off by a thousandth."""
    weight = plan.first.weight.copy()
    weight[0, 0] += 1e-3
    return replace(plan, first=replace(plan.first, weight=weight))


@pytest.fixture
def perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder = step_tokens.encoder_graph, step_tokens.decoder_graph
    monkeypatch.setattr(step_tokens, "encoder_graph", lambda plan, form: encoder(crooked(plan), form))
    monkeypatch.setattr(step_tokens, "decoder_graph", lambda plan, form: decoder(lean(plan), form))


def build_arguments(output: Path) -> list[str]:
    return ["--output", str(output), "--backends", "onnxruntime", "--parity-steps", str(STEPS)]


@pytest.mark.usefixtures("perturbed")
def test_red_gates_are_all_shown_and_leave_no_bundle(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The check of graphs would find it first.
    monkeypatch.setattr(pipeline, "cross_check", lambda *_: [])
    assert main([*build_arguments(tmp_path / "bundle"), "--checkpoint", str(small)]) == 1
    captured = capsys.readouterr()

    assert re.search(r"^✗ parity gates .*$", captured.out, re.MULTILINE)
    assert re.search(r"^ +\d+ steps against PyTorch float64: \d+ gates are red$", captured.out, re.MULTILINE)
    for gate in ("encode: wrong tokens", "decode 3 layers: action error", "decode 5 layers: action error"):
        assert re.search(rf"^✗ onnxruntime \(.*?\), {gate} ", captured.out, re.MULTILINE)
        assert re.search(rf"^  onnxruntime, {gate}: \S+ over \d+ steps; expected at most", captured.err, re.MULTILINE)
    assert re.search(r"^✓ onnxruntime \(.*?\), encode: near-tie flips ", captured.out, re.MULTILINE)
    assert "golden vectors: ✗ encode, batch 1: wrong tokens" in captured.err
    assert captured.err.startswith("error: these checks failed, so nothing was written:")
    assert "is built and validated" not in captured.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("perturbed")
def test_a_graph_that_leaves_the_reference_is_found_before_any_gate(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*build_arguments(tmp_path / "bundle"), "--checkpoint", str(small)]) == 1
    captured = capsys.readouterr()
    assert re.search(r"^✗ cross-check graphs ", captured.out, re.MULTILINE)
    assert "parity gates" not in captured.out
    assert re.search(r"^  encoder\.onnx on ONNX Runtime: \d+ wrong tokens", captured.err, re.MULTILINE)
    assert re.search(r"^  encoder\.onnx on onnx reference evaluator: ", captured.err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_cross_checked", [True, False])
def test_a_graph_of_beliefs_that_leaves_the_definition_ends_the_build(
    is_cross_checked: bool,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = step_tokens.belief_graph
    monkeypatch.setattr(step_tokens, "belief_graph", lambda plan, form: right(lean(plan), form))
    if not is_cross_checked:
        monkeypatch.setattr(pipeline, "cross_check", lambda *_: [])
    assert main([*build_arguments(tmp_path / "bundle"), "--checkpoint", str(small)]) == 1
    said = capsys.readouterr().err
    if is_cross_checked:
        assert re.search(r"^  belief_l3\.onnx on ONNX Runtime: action error ", said, re.MULTILINE)
        assert re.search(r"^  belief_l3\.onnx on onnx reference evaluator: action error ", said, re.MULTILINE)
    else:
        assert re.search(
            r"^  onnxruntime, beliefs: action error: \S+ over \d+ steps; expected at most", said, re.MULTILINE
        )
        assert "golden vectors: ✗ beliefs, batch 1: action error" in said
    assert list(tmp_path.iterdir()) == []


def test_constants_of_decoding_that_leave_the_definition_end_the_build(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = step_tokens.step_decoding

    def wrong(plans: Sequence[DecoderPlan]) -> StepDecoding:
        found = right(plans)
        assert found is not None
        return replace(found, first_bias=found.first_bias + np.float32(1e-3))

    monkeypatch.setattr(step_tokens, "step_decoding", wrong)
    assert main([*build_arguments(tmp_path / "bundle"), "--checkpoint", str(small)]) == 1
    assert re.search(r"^  beliefs that decoding\.npz decodes are off by ", capsys.readouterr().err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("perturbed")
def test_red_gates_leave_the_bundle_that_was_there(built: Built, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    before = copy_bundle(built.output, output)
    with pytest.raises(GateError):
        build(config(output, overwrite=True, checkpoint=small))
    assert tree(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def copy_bundle(source: Path, target: Path) -> dict[str, bytes]:
    content = tree(source)
    for file, data in content.items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(data)
    return content


# --- input that cannot be used ----------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._marker,)


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        model = other_model()
        state = model.state_dict()
        change(state)
        torch.save({"model_state_dict": state, "config": model.config}, folder / "broken.pt")
        return ["--checkpoint", str(folder / "broken.pt")]

    return write


def garbage(folder: Path) -> list[str]:
    (folder / "notes.pt").write_text("not a checkpoint", encoding="utf-8")
    return ["--checkpoint", str(folder / "notes.pt")]


def empty(folder: Path) -> list[str]:
    (folder / "empty.safetensors").write_bytes(b"")
    return ["--checkpoint", str(folder / "empty.safetensors")]


def truncated(folder: Path) -> list[str]:
    content = published(folder / "whole.pt", other_model()).read_bytes()
    (folder / "half.pt").write_bytes(content[: len(content) // 2])
    return ["--checkpoint", str(folder / "half.pt")]


def malicious(folder: Path) -> list[str]:
    published(folder / "evil.pt", other_model(), extra=Malicious(folder / "code ran"))
    return ["--checkpoint", str(folder / "evil.pt")]


def plain_pickle(folder: Path) -> list[str]:
    (folder / "evil.pkl").write_bytes(pickle.dumps(Malicious(folder / "code ran")))
    return ["--checkpoint", str(folder / "evil.pkl")]


def bare(folder: Path) -> list[str]:
    torch.save(other_model().state_dict(), folder / "bare.pt")
    return ["--checkpoint", str(folder / "bare.pt")]


def bad_data(folder: Path) -> list[str]:
    actions = np.zeros((100, 7), np.float32)
    actions[50, 3] = np.nan
    np.savez(folder / "nan.npz", actions=actions)
    return ["--calibration-data", str(folder / "nan.npz")]


def other_data(folder: Path) -> list[str]:
    return ["--calibration-data", str(write_episodes(folder / "four.npz", 4))]


def stranger(folder: Path) -> list[str]:
    return ["--checkpoint", str(published(folder / "stranger.pt", other_model()))]


def bad_normaliser(folder: Path) -> list[str]:
    (folder / "n.json").write_text('{"kind": "min-max", "offset": [0, 0], "scale": [1, 1]}', encoding="utf-8")
    return ["--normaliser", str(folder / "n.json")]


def bottomless_normaliser(folder: Path) -> list[str]:
    (folder / "n.json").write_text("[" * 100_000, encoding="utf-8")
    return ["--normaliser", str(folder / "n.json")]


def huge_normaliser(folder: Path) -> list[str]:
    (folder / "n.json").write_text(json.dumps({"kind": "min-max", "offset": [10**400], "scale": [1]}))
    return ["--normaliser", str(folder / "n.json")]


def damaged(folder: Path) -> list[str]:
    model = other_model()
    path = published(folder / "damaged.pt", model)
    content = bytearray(path.read_bytes())
    content[content.index(model.state_dict()["decoder.2.weight"].numpy().tobytes()) + 3] ^= 2
    path.write_bytes(content)
    return ["--checkpoint", str(path)]


def tiny_normaliser(folder: Path) -> list[str]:
    fields = {"kind": "min-max", "offset": [0] * 4, "scale": [1, 1, 1, 1e-40]}
    (folder / "n.json").write_text(json.dumps(fields), encoding="utf-8")
    published(folder / "naive.pt", other_model(use_layernorm=False))
    return ["--checkpoint", str(folder / "naive.pt"), "--normaliser", str(folder / "n.json")]


def fixed(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda _folder: list(arguments)


BAD_INPUT = {
    "checkpoint missing": (fixed("--checkpoint", "missing.pt"), r"no checkpoint at missing\.pt; train one"),
    "checkpoint a folder": (fixed("--checkpoint", "/"), "no checkpoint at /"),
    "not a checkpoint": (garbage, r"notes\.pt is (refused|not a checkpoint)"),
    "empty file": (empty, r"empty\.safetensors is not a whole safetensors file"),
    "truncated": (truncated, r"half\.pt is (refused|not a checkpoint)"),
    "damaged": (damaged, r"damaged\.pt is damaged: the checksum of '\w+/data/\d+' in it is wrong"),
    "normaliser without end": (
        fixed("--normaliser", "/dev/zero"),
        r"/dev/zero is not a readable JSON file: it is not a",
    ),
    "bottomless normaliser": (bottomless_normaliser, r"n\.json is not a readable JSON file: it nests deeper than 32"),
    "huge normaliser": (huge_normaliser, r"each a list of float32 numbers; found: it\.offset\["),
    "malicious": (malicious, r"evil\.pt is refused: it is not a plain weights file"),
    "plain pickle": (plain_pickle, r"evil\.pkl is refused"),
    "NaN weights": (
        with_weights(lambda state: state["encoder.2.weight"][0].fill_(torch.nan)),
        "'encoder.2.weight' has 24 values that are NaN or infinite",
    ),
    "infinite bias": (
        with_weights(lambda state: state["decoder.2.bias"][0].fill_(torch.inf)),
        "'decoder.2.bias' has 1 values that are NaN or infinite",
    ),
    "missing layer": (with_weights(lambda state: state.pop("decoder.2.weight")), "lacks the tensor 'decoder.2.weight'"),
    "missing quantiser": (
        with_weights(lambda state: state.pop("rfsq.layers.2.boundaries")),
        r"has the quantiser layers \[0, 1, 3, 4\]",
    ),
    "unknown layer": (
        with_weights(lambda state: state.update({"decoder.4.weight": torch.zeros(1)})),
        r"tensors this code does not know: \['decoder.4.weight'\]",
    ),
    "bare state dict": (bare, r"bare\.pt does not say .*--use-layernorm or --no-use-layernorm"),
    "contradiction": (fixed("--no-use-layernorm"), "says use_layernorm = True, the caller says False"),
    "naive mode of a robust model": (fixed("--conditioning", "none"), "cannot be deployed as 'none'; choose"),
    "stranger without data": (stranger, r"not trained on the embedded demonstrations .*--data FILE"),
    "data missing": (fixed("--calibration-data", "missing.npz"), r"missing\.npz does not exist"),
    "data with NaN": (bad_data, r"nan\.npz, .* step 50, dimension 3: nan; expected finite"),
    "data of another robot": (other_data, r"four\.npz has 4 action dimensions, the checkpoint 7"),
    "wrong key": (lambda folder: [*other_data(folder), "--key", "x"], r"four\.npz.*'?x'?"),
    "normaliser of another robot": (bad_normaliser, r"n\.json is for 2 dimensions, .* has 7"),
    "normaliser of nothing": (tiny_normaliser, r"dimension 3 lies around 0, within 1e-40; .* use other units"),
    "prefix 9": (fixed("--prefixes", "9"), r"prefixes \[9\] are not between 1 and the model's 8 layers"),
    "prefix 0": (fixed("--prefixes", "3", "0"), r"prefixes \[0\] are not between 1"),
    "unknown backend": (
        fixed("--backends", "openvino"),
        r"invalid choice: 'openvino' \(choose from '?c'?, '?cuda",
    ),
    "unknown conditioning": (fixed("--conditioning", "layernorm"), "--conditioning: invalid .*'layernorm'"),
    "profile out of order": (fixed("--profile", "5", "1", "1"), "expected 1 <= minimum <= optimum <= maximum"),
    "profile of endless batches": (fixed("--profile", "1", "1", "9" * 20), "<= maximum <= 2147483647"),
    "endless parity": (fixed("--parity-steps", "9" * 20), "parity_steps is 9+; expected at most 1000000000"),
    "profile of zero": (fixed("--profile", "0", "1", "1"), "expected 1 <= minimum"),
    "no steps to judge": (fixed("--parity-steps", "0"), "parity_steps is 0; expected at least 1"),
    "endless chunks": (fixed("--chunk-length", "100000"), "chunk_length is 100000; expected at most 1024"),
    "no compute capability": (
        fixed("--compute-capabilities", "7.5x"),
        "'7.5x'. are none; expected numbers",
    ),
    "compute capability for nothing": (
        fixed("--compute-capabilities", "8.9", "--backends", "onnxruntime"),
        "only onnxruntime is asked for; leave one of the two flags out",
    ),
    "empty chunks": (fixed("--chunk-length", "0"), "chunk_length is 0; expected at least 1"),
    "unknown argument": (fixed("--precision", "fp8"), "unrecognized arguments"),
}


def exit_status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_a_message_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD_INPUT[case]
    given, output = tmp_path / "given", tmp_path / "out" / "bundle"
    given.mkdir()
    arguments = make(given)
    before = tree(given)

    assert exit_status(["--output", str(output), *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors.replace("\n", " ")), errors
    assert "Traceback" not in errors
    assert bundle_files(tmp_path / "out") == []
    assert tree(given) == before, "something was written, or code in the checkpoint ran"


def test_the_malicious_file_would_have_run_code(tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    plain_pickle(tmp_path)
    pickle.loads((tmp_path / "evil.pkl").read_bytes())  # noqa: S301
    assert (tmp_path / "code ran").exists()
    (tmp_path / "code ran").unlink()
    malicious(tmp_path)
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "code ran").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_backend_that_is_not_installed_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(small), "--output", str(tmp_path / "bundle"), "--parity-steps", "500"]
    assert main([*arguments, "--backends", "tensorrt"]) == 2
    assert re.search(r"error: .*tensorrt.*install", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime has CUDA here"
)
def test_onnxruntime_without_cuda_is_refused_where_it_was_asked_for(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for by name; a build that takes what there is goes on without it."""
    arguments = ["--checkpoint", str(small), "--output", str(tmp_path / "bundle"), "--parity-steps", "500"]
    assert main([*arguments, "--backends", "onnxruntime-cuda"]) == 2
    assert re.search(r"^error: .*built without CUDA; install onnxruntime-gpu", capsys.readouterr().err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_kept_unless_told_otherwise(
    built: Built, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    before = copy_bundle(built.output, output)
    arguments = [*build_arguments(output), "--checkpoint", str(small)]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert re.search(r"already holds a bundle; .*--overwrite", captured.err)
    # Said at once, not after all the work.
    assert captured.out == ""
    assert tree(output) == before

    assert main([*arguments, "--overwrite"]) == 0
    assert open_bundle(output).manifest.model.mode == "none"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious", encoding="utf-8")
    assert main(["--output", str(tmp_path / "home"), "--overwrite"]) == 2
    assert "not empty and no bundle" in capsys.readouterr().err
    assert bundle_files(tmp_path) == ["home/thesis.tex"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Below a file nobody can write, whoever runs this.
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert main(["--output", str(tmp_path / "file" / "bundle")]) == 2
    captured = capsys.readouterr()
    assert re.search(r"error: .*file.*choose another --output", captured.err)
    assert captured.out == ""
    assert bundle_files(tmp_path) == ["file"]


# --- builds that end in the middle ------------------------------------------------------------------------------------


def start(output: Path, checkpoint: Path) -> subprocess.Popen[str]:
    """A build far larger than the test is patient, stopped at a moment when files are written already."""
    arguments = ("--output", output, "--overwrite", "--checkpoint", checkpoint, "--parity-steps", 1_000_000)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("✓ export ONNX"):
            return process
    raise AssertionError(f"the build ended by itself: {process.communicate()[1]}")


def test_a_build_that_is_killed_leaves_the_old_bundle_and_the_next_one_clears_up(
    built: Built, small: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    before = copy_bundle(built.output, output)
    process = start(output, small)
    (staged,) = tmp_path.glob(".bundle.staged-*")
    assert "encoder.onnx" in bundle_files(staged / "new")
    process.kill()
    process.communicate()

    assert process.returncode == -signal.SIGKILL
    assert tree(output) == before
    ActionTokenizer.load(output).close()
    # Who is killed cannot clear up; nobody takes what is left for a bundle.
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", staged.name}

    build(config(output, overwrite=True, checkpoint=small, parity_steps=1))
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}
    assert open_bundle(output).manifest.model.mode == "none"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("is_there", [True, False], ids=["over an old bundle", "where there was none"])
def test_a_build_that_is_told_to_end_leaves_everything_as_it_was(
    number: signal.Signals,
    is_there: bool,
    built: Built,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told at a moment when files are written already."""
    output = tmp_path / "bundle"
    before = copy_bundle(built.output, output) if is_there else {}

    def told_to_end(*_: object) -> None:
        (staged,) = tmp_path.glob(".bundle.staged-*")
        assert "encoder.onnx" in bundle_files(staged / "new")
        signal.raise_signal(number)

    def missed(*_: object) -> None:
        pytest.fail(f"the build does not take {number.name}")

    monkeypatch.setattr(pipeline, "golden_vectors", told_to_end)
    # Where the tests run in the background of a shell, they find it ignored.
    earlier = signal.signal(number, missed)
    try:
        try:
            ended = main([*build_arguments(output), "--checkpoint", str(small), "--overwrite"])
        except SystemExit as error:
            ended = int(error.code or 0)
        assert signal.getsignal(number) is missed
    finally:
        signal.signal(number, earlier)
    assert ended == 128 + number
    said = "interrupted; --output is as it was" if number == signal.SIGINT else f"ended by {number.name}"
    assert said in capsys.readouterr().err
    assert tree(tmp_path) == {f"bundle/{file}": content for file, content in before.items()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_that_the_caller_ignores_stay_ignored(
    number: signal.Signals, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nohup and shells with background jobs ask for: the build goes on, and leaves them ignored."""
    choose, came = pipeline.golden_vectors, []

    def told_to_end(*given: Any) -> Golden:
        signal.raise_signal(number)
        came.append(signal.getsignal(number))
        return choose(*given)

    monkeypatch.setattr(pipeline, "golden_vectors", told_to_end)
    earlier = signal.signal(number, signal.SIG_IGN)
    try:
        assert main([*build_arguments(tmp_path / "bundle"), "--checkpoint", str(small)]) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, earlier)
    assert came == [signal.SIG_IGN]
    assert open_bundle(tmp_path / "bundle").manifest.model.mode == "none"


def test_the_published_files_used_here_are_read_as_what_they_are(small: Path) -> None:
    checkpoint = load_checkpoint(small)
    assert checkpoint.config == OTHER
    assert checkpoint.trained_with is Conditioning.NONE
