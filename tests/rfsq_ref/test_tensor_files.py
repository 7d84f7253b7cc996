"""What is damaged in a file of tensors is seen wherever the file itself can tell."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.checkpoints import checkpoint_of, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.data import load_actions
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.tensor_files import DamagedFileError, hash_tensors, load_torch
from tests.rfsq_ref.models import make_model
from tests.rfsq_ref.published_model import ActionRFSQAE

ACTIONS = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))


def written(content: Any, **arguments: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **arguments)
    return stream.getvalue()


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


WHOLE = written({"actions": ACTIONS})
#: Where the largest exponent bit but one of the first number lies.
PLACE = WHOLE.index(ACTIONS.numpy().tobytes()) + 3


def test_one_bit_of_a_weight_makes_a_torch_checkpoint_damaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = ActionRFSQAE(use_layernorm=True).state_dict()
    whole = written({"model": state, "config": {"use_layernorm": True}})
    path = tmp_path / "model.pt"
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path).weights["decoder.2.weight"], state["decoder.2.weight"])
    path.write_bytes(flipped(whole, whole.index(state["decoder.2.weight"].numpy().tobytes()) + 3, 1))
    with pytest.raises(
        CheckpointError, match=r"model\.pt is damaged: the checksum of '\w+/data/\d+' in it is wrong; copy"
    ):
        load_checkpoint(path)


def test_one_bit_of_an_action_makes_a_torch_data_file_damaged(tmp_path: Path) -> None:
    path = tmp_path / "actions.pt"
    path.write_bytes(WHOLE)
    np.testing.assert_array_equal(load_actions(path).steps(), ACTIONS.numpy())
    path.write_bytes(flipped(WHOLE, PLACE, 3))
    with pytest.raises(DataError, match=r"the checksum of '\w+/data/0' in it is wrong\); expected an undamaged file"):
        load_actions(path)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7))
def test_no_bit_of_a_torch_file_changes_its_numbers_unseen(place: int, bit: int) -> None:
    try:
        content = load_torch(io.BytesIO(flipped(WHOLE, place, bit)))
    # The parsers raise nearly anything.
    except Exception:
        return
    assert torch.equal(content["actions"], ACTIONS)


def test_a_torch_file_without_checksums_is_read() -> None:
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        bare = written({"actions": ACTIONS})
    finally:
        torch.serialization.set_crc32_options(computes)
    for content in (bare, written({"actions": ACTIONS}, _use_new_zipfile_serialization=False)):
        assert torch.equal(load_torch(io.BytesIO(content))["actions"], ACTIONS)


def test_an_archive_that_unpacks_to_more_than_it_takes_is_not_unpacked() -> None:
    stream, whole = io.BytesIO(), zipfile.ZipFile(io.BytesIO(written(torch.zeros(100_000))))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(DamagedFileError, match=r"unpack to 400\d+ bytes, more than the \d+ of the file"):
        load_torch(stream)


# Our own format, since safetensors have no checksums ------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("own") / "model.safetensors"
    model = make_model(ModelConfig(action_dim=2, latent_dim=2, hidden_width=2, num_layers=2), Conditioning.NONE)
    save_checkpoint(checkpoint_of(model, {"epoch": 3, "by number": {9: "nine", 10: "ten"}}), path)
    return path, path.read_bytes()


def facts(path: Path) -> tuple[Any, ...]:
    found = load_checkpoint(path)
    kept = {name: value for name, value in found.provenance.items() if name != "checkpoint_sha256"}
    return found.config, found.trained_with, found.normaliser, kept, hash_tensors(found.weights)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_bit_of_our_own_file_changes_what_it_says_unseen(own: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = own
    path.write_bytes(whole)
    expected = facts(path)
    path.write_bytes(flipped(whole, data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))))
    try:
        found = facts(path)
    except CheckpointError:
        return
    assert found == expected


def test_a_bit_of_our_own_weights_or_sizes_is_called_damage(own: tuple[Path, bytes]) -> None:
    path, whole = own
    for changed in (
        flipped(whole, len(whole) - 1, 1),
        whole.replace(b'num_levels\\": 7', b'num_levels\\": 5'),
    ):
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="is damaged: its numbers have another SHA-256 than it states itself"):
            load_checkpoint(path)


def test_our_own_file_without_a_hash_is_read(own: tuple[Path, bytes]) -> None:
    path, whole = own
    assert whole.count(b"sha256") == 1
    path.write_bytes(whole.replace(b"sha256", b"others"))
    assert load_checkpoint(path).config.num_layers == 2


def test_the_hash_covers_names_types_and_shapes() -> None:
    tensors: list[dict[str, Tensor]] = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(8, dtype=torch.bfloat16)},
        {"a": torch.tensor(0.0)},
    ]
    assert len(set(map(hash_tensors, tensors))) == len(tensors)
