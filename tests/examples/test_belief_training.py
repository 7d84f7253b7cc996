"""examples/belief_training.py: what is learnt from, and a quick run as a user runs it."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="bundles are built with .[export]")

from examples.belief_policies import BelievingPolicy
from examples.belief_training import Judged, main, policy_for, spread, table
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer
from tests.bundles import Recipe, write_bundle
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.once import once
from tests.processes import PATIENCE

ROOT = Path(__file__).parents[2]
STEPS = Recipe(config=ModelConfig(), chunk_length=8, prefixes=(3,))
CHUNKS = ChunkRecipe(ChunkSizes(action_dim=7, chunk_length=8))


@pytest.fixture(scope="module", params=["steps", "chunk"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "steps":
        return once(tmp_path_factory, "belief training steps", lambda path: write_bundle(path, STEPS))
    return once(tmp_path_factory, "belief training chunk", lambda path: write_chunk_bundle(path, CHUNKS))


@pytest.fixture(scope="module")
def policy(bundle: Path) -> BelievingPolicy:
    torch.manual_seed(0)
    kind = ActionRFSQAE if "steps" in bundle.name else ChunkTokenizer
    return policy_for(kind.from_bundle(bundle), 5, 4).eval()


@pytest.fixture(scope="module")
def context() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def test_both_losses_reach_the_policy_and_nothing_else(policy: BelievingPolicy, context: torch.Tensor) -> None:
    adapter = policy.tokenizer
    codes = adapter.encode(torch.zeros(6, 8, 7))
    entropy, belief = policy.losses(context, codes)
    for loss in (entropy, belief.actions.square().mean()):
        policy.zero_grad()
        loss.backward(retain_graph=True)
        assert any(part.grad is not None and bool(part.grad.any()) for part in policy.parameters())
    assert not [name for name, _ in policy.named_parameters() if "tokenizer" in name]


def test_the_likeliest_tokens_are_those_that_decode_to_what_is_compared(
    policy: BelievingPolicy, context: torch.Tensor
) -> None:
    """Of a policy that is certain there is no difference to what it believes."""
    with torch.no_grad():
        for part in policy.parameters():
            part.mul_(1 + 40 * (part.ndim == 2))
        believed = policy.believe(context)
        likeliest = policy.likeliest(context)
    is_certain = (believed.std.flatten(1) < 1e-3).all(1)
    assert is_certain.any()
    torch.testing.assert_close(believed.actions[is_certain], likeliest[is_certain], rtol=0, atol=1e-3)


def test_a_table_has_a_row_for_each_way_of_training() -> None:
    found = {"one": [Judged(0.1, 0.2, 0.5), Judged(0.3, 0.2, 0.7)], "other": [Judged(0.25, math.nan, math.nan)]}
    assert table(found)[1:] == [
        ["one", "0.2000 ± 0.1000", "0.2000 ± 0.0000", "60.0 ± 10.0"],
        ["other", "0.2500", "", ""],
    ]
    assert spread([0.123456], 3) == "0.123"


@pytest.mark.slow
def test_a_quick_run_trains_and_judges_all_of_them(bundle: Path) -> None:
    command = [sys.executable, "examples/belief_training.py", str(bundle), "--quick", "--weights", "10"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "no claim about a large one" in found.stdout
    for kind, columns in (("tokens alone", 3), ("tokens, and 10 x action error", 3), ("the actions themselves", 1)):
        (row,) = re.findall(rf"^{kind} +(.+)$", found.stdout, re.MULTILINE)
        values = [float(value) for value in row.split()]
        assert len(values) == columns
        assert all(math.isfinite(value) and value > 0 for value in values)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [(Recipe(), "has 3 action dimensions"), (Recipe(mode=DeployMode.DYNAMIC, config=ModelConfig()), "dynamic tokens")],
)
def test_a_bundle_that_does_not_fit_is_refused(
    recipe: Recipe, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_bundle(tmp_path / "bundle", recipe)
    monkeypatch.setattr(sys, "argv", ["belief_training.py", str(path)])
    assert main() == 2
    assert word in capsys.readouterr().err
