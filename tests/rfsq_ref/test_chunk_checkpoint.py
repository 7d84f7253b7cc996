"""What `rfsq_ref.chunk_checkpoint` promises: chunk tokens come back as they were, and no other file passes for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, load_checkpoint
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint, load_chunk_checkpoint, save_chunk_checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.data import DEMONSTRATIONS
from rfsq.rfsq_ref.errors import CheckpointError, SettingsError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.own_format import FORMATS, token_kind
from rfsq.rfsq_ref.settings import NormaliserKind, TokenKind
from tests.chunk_bundles import random_constants
from tests.rfsq_ref.models import some_normaliser
from tests.rfsq_ref.test_chunk_code import any_sizes

SIZES = ChunkSizes(action_dim=3, chunk_length=4, num_classes=5, num_tokens=12)


def fitted(sizes: ChunkSizes = SIZES, seed: int = 0) -> ChunkCheckpoint:
    normaliser = some_normaliser(sizes.action_dim) if seed % 2 == 0 else None
    return ChunkCheckpoint(sizes, random_constants(sizes, seed), normaliser, {"config": {"seed": seed}})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_sizes(), st.integers(0, 2**32))
def test_chunk_tokens_of_every_size_come_back(tmp_path: Path, sizes: ChunkSizes, seed: int) -> None:
    checkpoint, path = fitted(sizes, seed), tmp_path / "chunk.safetensors"
    save_chunk_checkpoint(checkpoint, path)
    found = load_chunk_checkpoint(path)
    assert (found.sizes, found.normaliser) == (checkpoint.sizes, checkpoint.normaliser)
    assert {**checkpoint.provenance, "checkpoint_sha256": found.provenance["checkpoint_sha256"]} == found.provenance
    for name, value in vars(checkpoint.constants).items():
        other = getattr(found.constants, name)
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value
        assert not isinstance(value, Tensor) or other.dtype is value.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_of_a_file_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = fitted()
    save_chunk_checkpoint(checkpoint, tmp_path / "chunk.safetensors")
    before, after = (
        found.model(dtype=dtype) for found in (checkpoint, load_chunk_checkpoint(tmp_path / "chunk.safetensors"))
    )
    actions = torch.rand(20, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = after.encode(actions)
    assert torch.equal(before.encode(actions), tokens)
    assert torch.equal(before.decode(tokens), after.decode(tokens))
    assert after.decode(tokens).dtype is dtype
    assert not after.training


def test_the_same_fit_gives_the_same_bytes_and_the_order_takes_two_each(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_chunk_checkpoint(fitted(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert fitted().tensors()["order"].dtype is torch.int16


def test_a_file_says_what_tokens_it_is_of(tmp_path: Path) -> None:
    chunk, published = tmp_path / "chunk.safetensors", tmp_path / "published.pt"
    save_chunk_checkpoint(fitted(), chunk)
    torch.save({}, published)
    assert [token_kind(path) for path in (chunk, ROBUST_CHECKPOINT, published)] == [
        TokenKind.CHUNK, TokenKind.STEP, TokenKind.STEP,
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="holds chunk tokens; expected a model of per-step tokens"):
        load_checkpoint(chunk)
    for other in (ROBUST_CHECKPOINT, published):
        with pytest.raises(CheckpointError, match=r"holds no chunk tokens.*python calibration/fit\.py --kind chunk"):
            load_chunk_checkpoint(other)


@pytest.mark.parametrize("read", [token_kind, load_chunk_checkpoint])
def test_what_is_no_checkpoint_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 100)
    for path, message in (
        (tmp_path / "nowhere.safetensors", "no checkpoint at"),
        (DEMONSTRATIONS, "no checkpoint but an .npz file"),
        (tmp_path / "damaged.safetensors", "not a whole safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(path)


def rewritten(
    folder: Path,
    change_tensors: Callable[[dict[str, Tensor]], Any] = lambda _: None,
    change_header: Callable[[dict[str, Any]], Any] = lambda header: header.pop("sha256"),
) -> Path:
    """A valid file whose tensors and header were changed by hand, without a hash unless the change leaves it."""
    path, name = folder / "chunk.safetensors", FORMATS[TokenKind.CHUNK]
    save_chunk_checkpoint(fitted(), path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[name])
    change_tensors(tensors)
    change_header(header)
    safetensors.torch.save_file(tensors, path, metadata={name: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gain"), "lacks the tensor 'gain'"),
        (lambda t: t.pop("basis"), "lacks the tensor 'basis'"),
        (lambda t: t.pop("order"), "has no order"),
        (lambda t: t.update(more=torch.zeros(1)), "does not know: .*more"),
        (lambda t: t.update(order=t["order"].float()), r"order of type torch\.float32; expected torch\.int16"),
        (lambda t: t.update(order=t["order"][:, 1:].contiguous()), r"order has shape \(4, 116\); expected \(4, 117\)"),
        (lambda t: t["order"].fill_(0), "each at most 18 times"),
        (lambda t: t["scale"].zero_(), "every scale and gain must be positive"),
        (lambda t: t["mean"].fill_(torch.nan), "'mean' has 48 values that are NaN"),
        (lambda t: t.update(basis=torch.zeros(())), r"'basis' has shape \(\); expected"),
        (lambda t: t.update(weights=torch.ones(1)), r"'weights' has shape \(1,\); expected \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_chunk_checkpoint(rewritten(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "format version 2; this code reads 1"),
        (lambda h: h.pop("sizes"), "broken header.*lacks the keys"),
        (lambda h: h["sizes"].update(num_tokens="12"), "broken header.*num_tokens is '12'"),
        (lambda h: h["sizes"].update(num_classes=1), "broken header.*num_classes is 1; expected"),
        (lambda h: h["sizes"].update(chunk_length=5), "chunk.safetensors: 'mean' has shape"),
        (lambda h: h.update(budgets=[12, 6, 1]), "chunk.safetensors: budgets are"),
        (lambda h: h.update(normaliser={"kind": "min-max", "offset": [0.0], "scale": [1.0]}), "for 1 dimensions"),
        (lambda h: h["normaliser"].update(scale=[0.0] * 3), "broken header.*every scale positive"),
    ],
)
def test_headers_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    def changed(header: dict[str, Any]) -> None:
        del header["sha256"]
        change(header)

    with pytest.raises(CheckpointError, match=message):
        load_chunk_checkpoint(rewritten(tmp_path, change_header=changed))


@pytest.mark.parametrize("part", ["mean", "basis", "scale", "gain", "order", "weights", "budgets", "provenance"])
def test_one_changed_number_is_damage(part: str, tmp_path: Path) -> None:
    def change_tensors(tensors: dict[str, Tensor]) -> None:
        if part in tensors:
            first = tensors[part].flatten()[:1]
            tensors[part].view(-1)[:1] = 1 - first if part == "order" else first * 1.0001

    def change_header(header: dict[str, Any]) -> None:
        header.update({"budgets": {"budgets": [2, 6, 12]}, "provenance": {"provenance": {}}}.get(part, {}))

    with pytest.raises(CheckpointError, match="is damaged"):
        load_chunk_checkpoint(rewritten(tmp_path, change_tensors, change_header))


def test_a_normaliser_of_another_robot_is_refused() -> None:
    checkpoint = ChunkCheckpoint(SIZES, random_constants(SIZES, 0), Normaliser(NormaliserKind.MIN_MAX, (0.0,), (1.0,)))
    with pytest.raises(SettingsError, match="normaliser for 1 dimensions, code for 3"):
        checkpoint.model()
