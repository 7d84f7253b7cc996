"""examples/speculative_decoding.py: the rule of acceptance, what the models see, and a quick run as a user runs it."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="bundles are built with .[export]")

from examples.speculative_acceptance import Speculation
from examples.speculative_arrivals import arrivals
from examples.speculative_data import Eyes, cut_windows
from examples.speculative_decoding import main
from examples.speculative_models import Size, TokenModel
from rfsq.calibration.constants import fit_constants
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.policy.adapter import ActionRFSQAE
from tests.bundles import Deployed, Recipe, write_bundle
from tests.processes import PATIENCE

ROOT = Path(__file__).parents[2]
RANDOM = Recipe(config=ModelConfig(), chunk_length=8, prefixes=(3,), has_engine=False)
LAYERS, STEPS, LATENTS = RANDOM.config.num_layers, RANDOM.chunk_length, RANDOM.config.latent_dim
EYES = Eyes(STEPS, np.ones(7, np.float32), np.zeros(7, np.float32), ("Door", "Lift"))
WITHOUT_MODEL = ("last chunk once more", "most frequent", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speculative")


@pytest.fixture(scope="module")
def adapter(folder: Path) -> ActionRFSQAE:
    """Of random weights: the rule does not care what an action is good for."""
    return ActionRFSQAE.from_bundle(write_bundle(folder / "random", RANDOM))


@pytest.fixture(scope="module")
def speculation(adapter: ActionRFSQAE) -> Speculation:
    torch.manual_seed(5)
    model, size = adapter.tokenizer.model, Size(width=16, depth=1, epochs=1)
    models = [TokenModel(EYES.size, model, layers, size).eval() for layers in (3, LAYERS)]
    for made in models:
        torch.nn.init.normal_(made.own)
    return Speculation(adapter, models[0], models[1], torch.ones(7), tolerance=0.5)


@pytest.fixture(scope="module")
def context() -> torch.Tensor:
    return torch.randn((12, EYES.size), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def fitting(folder: Path, robust: Checkpoint, split: EpisodeSplit) -> Path:
    """A bundle of the embedded checkpoint, which really encodes the demonstrations."""
    calibrated = robust.with_fit(constants=fit_constants(robust, split.calibration))
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)
    return write_bundle(folder / "bundle", Deployed(RANDOM, model, model), overwrite=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The example in this process, which has torch already; its exit status."""

    def in_this_process(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["speculative_decoding.py", *map(str, arguments)])
        return main()

    return in_this_process


def row(output: str, name: str) -> list[float]:
    """The numbers of the one line that begins with `name`."""
    (line,) = re.findall(rf"^{re.escape(name)}  +(.*)$", output, re.MULTILINE)
    return [float(number) for number in re.findall(r"-?[\d.]+(?:e[-+]\d+)?", line)]


# The rule ------------------------------------------------------------------------------------------------------------


def test_judging_is_one_pass_of_what_a_pass_for_each_layer_says(
    speculation: Speculation, context: torch.Tensor
) -> None:
    proposed = speculation.propose(context)
    tokens = speculation.main.silence(len(context))
    tokens[..., :3] = proposed
    said = speculation.main.judge(context, proposed)
    for layer in range(3):
        logits = speculation.main(context, tokens, torch.full((len(context),), layer))
        assert torch.equal(said[..., layer], logits.argmax(dim=-1))


def test_what_the_main_model_would_say_itself_is_accepted_whole(
    speculation: Speculation, context: torch.Tensor
) -> None:
    alone = speculation.alone(context)
    verdict = speculation.verify(context, alone[..., :3])
    assert verdict.agreed == verdict.rate == 1
    assert torch.equal(verdict.early, alone[..., :3])
    assert torch.equal(speculation.finish(context, verdict), alone)
    assert speculation.passes(STEPS) == 1 + LAYERS - 3


def test_after_a_refusal_the_main_model_goes_on_as_if_there_were_no_draft(
    speculation: Speculation, context: torch.Tensor
) -> None:
    """And with no more passes."""
    refusing = Speculation(speculation.tokenizer, speculation.draft, speculation.main, torch.ones(7), tolerance=-1)
    verdict = refusing.verify(context, refusing.propose(context))
    assert verdict.rate == 0
    assert torch.equal(refusing.finish(context, verdict), refusing.alone(context))
    assert refusing.passes(0) == LAYERS


def test_the_longest_run_of_first_steps_is_accepted(speculation: Speculation, context: torch.Tensor) -> None:
    """Place by place, against a second writing of the rule."""
    proposed = speculation.propose(context)
    said, verdict = speculation.main.judge(context, proposed), speculation.verify(context, proposed)
    corrected = proposed.clone()
    for place in np.ndindex(proposed.shape[:-1]):
        for layer in range(3):
            if said[(*place, layer)] != proposed[(*place, layer)]:
                corrected[(*place, layer)] = said[(*place, layer)]
                corrected[(*place, slice(layer + 1, None))] = 3
                break
    decode = speculation.tokenizer.decode_from_indices
    far = (decode(proposed) - decode(corrected)).abs().amax(dim=-1)
    assert torch.equal(far, verdict.difference)
    lengths = [next((step for step in range(STEPS) if steps[step] > 0.5), STEPS) for steps in far]
    assert verdict.accepted.tolist() == lengths
    assert len(set(lengths)) > 2  # the rule had something to decide
    for row_number, length in enumerate(lengths):
        assert torch.equal(verdict.early[row_number, :length], proposed[row_number, :length])
        assert torch.equal(verdict.early[row_number, length:], corrected[row_number, length:])
    whole = speculation.finish(context, verdict)
    assert torch.equal(whole[..., :3][verdict.kept], proposed[verdict.kept])


def test_a_chunk_is_never_late_for_its_successor(speculation: Speculation, split: EpisodeSplit) -> None:
    coming = arrivals(speculation, EYES, split.test.episodes[0], "Lift", with_draft=True)
    assert any(chunk.is_early for chunk in coming)
    for before, after in pairwise(coming):
        assert (before.observed, before.tick) < (after.observed, after.tick)
        assert before.tick < after.tick
    for chunk in coming:
        assert chunk.tokens.shape == (1, STEPS, LATENTS, 3 if chunk.is_early else LAYERS)
        assert chunk.accepted > 0 or not chunk.is_early


# What is seen --------------------------------------------------------------------------------------------------------


def test_no_window_sees_what_comes_after_it(adapter: ActionRFSQAE, split: EpisodeSplit) -> None:
    episode, task = split.train.episodes[0], split.train.tasks[0]
    other = episode.copy()
    other[40:] = -other[40:]
    seen, altered = (
        cut_windows(ActionDataset((actions,), ("0",), (task,), "x"), EYES, adapter, every=1)
        for actions in (episode, other)
    )
    assert torch.equal(seen.context[:41], altered.context[:41])
    assert not torch.equal(seen.context[41], altered.context[41])
    assert torch.equal(seen.codes, adapter.encode(seen.actions))


def test_held_out_episodes_are_not_learnt(split: EpisodeSplit) -> None:
    learnt = {episode.tobytes() for episode in split.train.episodes}
    assert learnt.isdisjoint(episode.tobytes() for episode in split.test.episodes)


# The whole example ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_accepts_serves_early_stays_inside_and_its_models_are_better_than_what_needs_none(
    fitting: Path,
) -> None:
    """In one test, for the run takes many seconds."""
    command = [sys.executable, "examples/speculative_decoding.py", str(fitting), "--quick", "-v"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "✗" not in found.stdout
    assert "no claim about a large one" in found.stdout
    _, table = found.stdout.split("\nproposed by ")
    table = table.split("\n\n")[0]
    rates = {name: row(table, name)[-2] for name in ("draft", "demonstrator", *WITHOUT_MODEL)}
    assert all(0 <= rate <= 100 for rate in rates.values())
    assert rates["draft"] > max(rates[name] for name in WITHOUT_MODEL)
    assert re.search(r"^✓ 0 of [1-9]\d+ actions outside limits or slew$", found.stdout, re.MULTILINE)
    alone, early = row(found.stdout, "first action after, ticks")
    assert early < alone
    (lead,) = re.findall(r"^✓ [1-9]\d* chunks served early, ([\d.]+) ticks before", found.stdout, re.MULTILINE)
    assert float(lead) >= 1

    output = found.stdout
    usual = row(output, "most frequent token at each place")[0]
    again = re.findall(r"^last chunk once more +([\d.]+) ", output, re.MULTILINE)[0]
    draft, coarse, whole = (row(output, name)[0] for name in ("draft, L0–L2", "main, L0–L2", "main, all layers"))
    own = row(output, "demonstrator's own tokens, all")[0]
    assert own < whole < draft < float(again) < usual
    assert coarse < draft


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(
    fitting: Path,
    split: EpisodeSplit,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for those that were measured with a clock; of a sixth of the episodes, for seeds do not know how many."""
    few = replace(
        split, train=split.train.select(range(0, len(split.train.episodes), 6)), test=split.test.select(range(5))
    )
    monkeypatch.setattr("examples.speculative_decoding.split_episodes", lambda _: few)
    monkeypatch.setattr("examples.speculative_decoding.latency_table", lambda *_, **__: [("none",)])

    def numbers() -> str:
        run(fitting, "--quick", "--epochs", 1, "-v")
        output = capsys.readouterr().out
        assert "chunks served early" in output
        return re.sub(r" in \d+ s,", "", output)

    assert numbers() == numbers()


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (Recipe(mode=DeployMode.DYNAMIC, config=ModelConfig(), chunk_length=8, prefixes=(3,)), "--conditioning"),
        (Recipe(config=ModelConfig(), chunk_length=8, prefixes=(2,)), "--prefixes 3"),
        (Recipe(config=ModelConfig(), chunk_length=2, prefixes=(3,)), "--chunk-length 8"),
        (Recipe(), "7 action dimensions"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(
    tmp_path: Path, recipe: Recipe, word: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write_bundle(tmp_path / "bundle", recipe)) == 2
    assert word in capsys.readouterr().err


def test_what_cannot_be_run_is_said(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, word in (([tmp_path], "manifest.json"), ([tmp_path, "--epochs", 0], "--epochs is 0")):
        assert run(*arguments) == 2
        assert word in capsys.readouterr().err
