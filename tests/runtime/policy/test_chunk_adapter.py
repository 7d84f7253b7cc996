"""Chunk tokens for policies of torch: the tokenizer's own answers, for any leading axes, frozen and known by name."""

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rfsq.runtime import ActionTokenizer, FingerprintError, InvalidInputError, UnbuiltPrefixError
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer
from tests.bundles import Recipe
from tests.chunk_bundles import SMALL, ChunkRecipe, deployed_chunk_tokens, random_chunks, write_chunk_bundle
from tests.once import once

T, A, L = SMALL.chunk_length, SMALL.action_dim, SMALL.num_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "chunk bundle", lambda path: write_chunk_bundle(path, ChunkRecipe()))


@pytest.fixture(scope="module")
def adapter(folder: Path) -> ChunkTokenizer:
    return ChunkTokenizer.from_bundle(folder)


@pytest.fixture(scope="module")
def chunks() -> np.ndarray:
    """[6, T, A]"""
    return random_chunks(deployed_chunk_tokens(ChunkRecipe()).reference.model, 6)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (3, 1, 2), (0,), (2, 0)])
@pytest.mark.parametrize("prefix", [1, 4, L])
def test_any_leading_axes_give_what_the_tokenizer_gives(
    leading: tuple[int, ...], prefix: int, adapter: ChunkTokenizer, chunks: np.ndarray
) -> None:
    count = int(np.prod(leading))
    given = torch.from_numpy(chunks[:count].copy()).reshape(*leading, T, A)
    tokens = adapter.encode(given)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (*leading, L))
    actions = adapter.decode(tokens[..., :prefix])
    assert (actions.dtype, actions.shape) == (torch.float32, (*leading, T, A))
    expected = adapter.tokenizer.encode(chunks[:count])
    np.testing.assert_array_equal(tokens.reshape(-1, L).numpy(), expected)
    np.testing.assert_array_equal(
        actions.reshape(-1, T, A).numpy(), adapter.tokenizer.decode(np.ascontiguousarray(expected[:, :prefix]))
    )


def test_called_it_gives_the_actions_of_the_tokens_and_the_tokens(adapter: ChunkTokenizer, chunks: np.ndarray) -> None:
    x = torch.from_numpy(chunks).reshape(2, 3, T, A)
    actions, tokens = adapter(x)
    assert torch.equal(tokens, adapter.encode(x))
    assert torch.equal(actions, adapter.decode(tokens))


WIDE = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("kind", WIDE)
def test_tokens_of_any_integer_type_that_holds_them_decode(
    kind: torch.dtype, adapter: ChunkTokenizer, chunks: np.ndarray
) -> None:
    tokens = adapter.encode(torch.from_numpy(chunks))
    assert torch.equal(adapter.decode(tokens.to(kind)), adapter.decode(tokens))


def test_a_type_that_cannot_hold_the_vocabulary_is_refused(adapter: ChunkTokenizer) -> None:
    """What was larger has wrapped around in it, to a legal token."""
    message = "type torch.int8, which holds no more than 127, and this bundle's go up to 255: .* were chosen"
    with pytest.raises(InvalidInputError, match=message):
        adapter.decode(torch.zeros(2, L, dtype=torch.int8))


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("kind", WIDE[1:3])
def test_a_wrong_value_is_named_by_its_place_in_what_was_given(
    kind: torch.dtype, leading: tuple[int, ...], adapter: ChunkTokenizer
) -> None:
    tokens, x = torch.zeros(*leading, L, dtype=kind), torch.zeros(*leading, T, A)
    tokens.view(-1)[-2], x.view(-1)[-1] = 256, torch.nan
    last = [size - 1 for size in leading]
    with pytest.raises(InvalidInputError, match=re.escape(f"tokens{[*last, L - 2]} is 256; expected 0 ... 255")):
        adapter.decode(tokens)
    with pytest.raises(InvalidInputError, match=re.escape(f"actions{[*last, T - 1, A - 1]} is nan")):
        adapter.encode(x)


def test_what_is_wrong_is_refused(adapter: ChunkTokenizer) -> None:
    x, tokens = torch.zeros(2, T, A), torch.zeros(2, L, dtype=torch.int64)
    calls: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: adapter.encode(x[:, 1:]), rf"x has shape \[2, 3, 3\]; expected actions \[\.\.\., {T}, {A}\]"),
        (lambda: adapter.encode(x.double()), "expected torch.float32"),
        (lambda: adapter.encode(x * torch.nan), "expected finite numbers"),
        (lambda: adapter.encode(x.numpy()), "expected a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: adapter(x.numpy())[0], "expected a torch.Tensor"),
        (lambda: adapter.decode(tokens + 256), r"tokens\[0, 0\] is 256; expected 0 \.\.\. 255"),
        (lambda: adapter.decode(tokens.float()), r"expected integers, tokens 0 \.\.\. 255"),
        (lambda: adapter.decode(tokens[0, 0]), r"expected tokens \[\.\.\., l\]"),
    ]
    for call, message in calls:
        with pytest.raises(InvalidInputError, match=message):
            call()
    with pytest.raises(UnbuiltPrefixError):
        adapter.decode(torch.zeros(2, L + 1, dtype=torch.int64))


def test_no_gradient_flows_and_nothing_can_be_trained(adapter: ChunkTokenizer, chunks: np.ndarray) -> None:
    x = torch.from_numpy(chunks).requires_grad_()
    assert not adapter.decode(adapter.encode(x)).requires_grad
    with pytest.raises(InvalidInputError, match="x requires a gradient, and a bundle has none"):
        adapter(x)
    with torch.no_grad():
        assert not adapter(x)[0].requires_grad
    policy = nn.ModuleDict({"tokenizer": adapter, "head": nn.Linear(2, 2)})
    assert [name for name, _ in policy.named_parameters()] == ["head.weight", "head.bias"]
    with pytest.raises(InvalidInputError, match="cannot be trained"):
        adapter.requires_grad_(True)


def test_a_policy_says_which_tokenizer_it_learnt(folder: Path, adapter: ChunkTokenizer, tmp_path: Path) -> None:
    policy = nn.ModuleDict({"tokenizer": adapter})
    state = policy.state_dict()
    assert set(state) == {"tokenizer.tokenizer_fingerprint"}
    other = ChunkTokenizer.from_bundle(write_chunk_bundle(tmp_path / "other", ChunkRecipe(seed=1)))
    nn.ModuleDict({"tokenizer": ChunkTokenizer.from_bundle(folder)}).load_state_dict(state)
    with pytest.raises(RuntimeError, match=f"saved with the tokenizer {adapter.fingerprint}"):
        nn.ModuleDict({"tokenizer": other}).load_state_dict(state)
    with pytest.raises(FingerprintError, match="open the bundle that the policy was trained with"):
        other.load_state_dict(adapter.state_dict())
    with pytest.raises(FingerprintError, match="it lacks tokenizer_fingerprint"):
        adapter.load_state_dict({})
    with pytest.raises(FingerprintError):
        ChunkTokenizer.from_bundle(folder, expect_fingerprint=other.fingerprint)


def test_copies_are_the_same_tokenizer(adapter: ChunkTokenizer, chunks: np.ndarray) -> None:
    x = torch.from_numpy(chunks)
    for made in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):  # noqa: S301  # made here
        assert torch.equal(made.half().encode(x), adapter.encode(x))


def test_each_kind_of_tokens_has_its_class(bundle_of: Callable[[Recipe], Path], folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"open it with ActionRFSQAE\.from_bundle"):
        ChunkTokenizer.from_bundle(bundle_of(Recipe()))
    with pytest.raises(InvalidInputError, match=r"open it with ChunkTokenizer\.from_bundle"):
        ActionRFSQAE.from_bundle(folder)
    with pytest.raises(InvalidInputError, match=r"ChunkTokenizer\.from_bundle\(PATH\); demonstrations become one by"):
        ChunkTokenizer(dataclasses.replace(SMALL))


def test_the_tokenizer_of_numpy_arrays_is_at_hand(adapter: ChunkTokenizer) -> None:
    assert isinstance(adapter.tokenizer, ActionTokenizer)
    assert (adapter.chunk_length, adapter.action_dim, adapter.num_tokens, adapter.vocabulary) == (T, A, L, 256)
