"""Beliefs in torch on the GPU: the CPU's values and gradients, without waiting, and recorded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfsq.runtime.bundle.beliefs import BELIEF_MODES, Belief
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer
from tests.bundles import Recipe, write_bundle
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle

FORMS = ("steps", "words", "pair")
Logits = tuple[Tensor, ...]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActionRFSQAE | ChunkTokenizer]:
    """By form. The engine does not matter: torch decodes."""
    folder: Path = tmp_path_factory.mktemp("beliefs")
    steps = ActionRFSQAE.from_bundle(write_bundle(folder / "steps", Recipe()), backend="onnxruntime")
    chunk = ChunkTokenizer.from_bundle(write_chunk_bundle(folder / "chunk", ChunkRecipe()), backend="onnxruntime")
    return {"steps": steps, "words": chunk, "pair": chunk}


@pytest.fixture(autouse=True)
def without_waiting_later() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def logits_for(adapter: ActionRFSQAE | ChunkTokenizer, form: str, count: int = 64) -> Logits:
    """On the GPU, with gradients."""
    model, generator = adapter.tokenizer.model, torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(*model.tokens_shape(count), model.vocabulary)]
    if form == "pair":
        entry = adapter.tokenizer.manifest.model
        shapes = [(count, entry.num_classes), (count, entry.code_bits)]  # type: ignore[union-attr]
    return tuple((2 * torch.randn(shape, generator=generator)).cuda().requires_grad_() for shape in shapes)


def decoded(adapter: ActionRFSQAE | ChunkTokenizer, logits: Logits, **options: object) -> Belief[Tensor]:
    return adapter.decode_logits(logits[0] if len(logits) == 1 else logits, **options)  # type: ignore[arg-type]


def total(belief: Belief[Tensor]) -> Tensor:
    return belief.actions.square().sum() + belief.std.sum() + belief.mode_probability.sum()


@pytest.mark.parametrize("mode", ["expected", "likeliest mode"])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_the_cpus(
    form: str, mode: str, adapters: dict[str, ActionRFSQAE | ChunkTokenizer]
) -> None:
    adapter = adapters[form]
    logits = logits_for(adapter, form)
    found, expected = decoded(adapter, logits, mode=mode), decoded(adapter, tuple(p.cpu() for p in logits), mode=mode)
    assert all(part.is_cuda for part in vars(found).values())
    assert torch.equal(found.mode.cpu(), expected.mode)
    torch.testing.assert_close(found.actions.cpu(), expected.actions, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.std.cpu(), expected.std, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(total(found), logits)
    for part, other in zip(gradients, torch.autograd.grad(total(expected), logits), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", BELIEF_MODES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_gpu(form: str, mode: str, adapters: dict[str, ActionRFSQAE | ChunkTokenizer]) -> None:
    adapter = adapters[form]
    logits = logits_for(adapter, form)
    # Constants are copied at the first call.
    total(decoded(adapter, logits, mode=mode)).backward()
    torch.cuda.set_sync_debug_mode("error")
    total(decoded(adapter, logits, mode=mode, temperature=1.5)).backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_training_can_be_recorded(form: str, adapters: dict[str, ActionRFSQAE | ChunkTokenizer]) -> None:
    adapter = adapters[form]
    logits = logits_for(adapter, form)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            expected = torch.autograd.grad(total(decoded(adapter, logits)), logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(total(decoded(adapter, logits)), logits)
    graph.replay()
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form: str, adapters: dict[str, ActionRFSQAE | ChunkTokenizer]) -> None:
    adapter = adapters[form]
    logits = logits_for(adapter, form)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = decoded(adapter, logits)
    assert torch.equal(found.actions, decoded(adapter, logits).actions)


@pytest.mark.parametrize("form", FORMS)
def test_a_policy_is_compiled_with_it(form: str, adapters: dict[str, ActionRFSQAE | ChunkTokenizer]) -> None:
    adapter = adapters[form]
    logits = logits_for(adapter, form)
    expected = torch.autograd.grad(total(decoded(adapter, logits)), logits)
    compiled = torch.compile(lambda *parts: total(decoded(adapter, parts)), fullgraph=True)
    for part, other in zip(torch.autograd.grad(compiled(*logits), logits), expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-4)


def test_illegal_logits_mark_their_chunk(adapters: dict[str, ActionRFSQAE | ChunkTokenizer]) -> None:
    for form in FORMS:
        logits = logits_for(adapters[form], form, 4)
        with torch.no_grad():
            logits[0][(2,) + (0,) * (logits[0].ndim - 1)] = torch.nan
        found = decoded(adapters[form], logits).actions
        assert found.isnan().flatten(1).any(1).tolist() == [False, False, True, False]
