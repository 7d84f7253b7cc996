"""A fingerprint changes with the meaning of a token and with nothing else."""

import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig, Readout, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint, checkpoint_of, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.fingerprint import fingerprint
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.settings import NormaliserKind
from tests.bundles import Recipe, random_model
from tests.export.plan_numpy import MODES

SIZES = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=3, num_levels=5)
NORMALISER = Normaliser(NormaliserKind.MIN_MAX, (0.5, 0.0, 0.25), (2.0, 1.0, 3.0))


def make_checkpoint(sizes: ModelConfig = SIZES) -> Checkpoint:
    """A robust checkpoint with everything that can be fitted."""
    model = random_model(Recipe(mode=DeployMode.RECOVERED, config=sizes, prefixes=(2,), has_normaliser=False))
    checkpoint = checkpoint_of(model, {})
    shape = (sizes.num_layers, sizes.latent_dim)
    torch.manual_seed(0)
    constants = ConditioningConstants(torch.randn(shape), torch.rand(shape) + 0.5)
    readout = Readout(torch.randn(sizes.action_dim, sizes.hidden_width), torch.randn(sizes.action_dim))
    return replace(
        checkpoint, constants=constants, readout=readout, recovered=dict(model.recovered), normaliser=NORMALISER
    )


CHECKPOINT = make_checkpoint()
NAIVE = replace(CHECKPOINT, trained_with=Conditioning.NONE)
MODES_OF = [(NAIVE if mode is DeployMode.NONE else CHECKPOINT, mode) for mode in MODES]


def flip_last_bit(tensor: torch.Tensor, index: int) -> torch.Tensor:
    array = tensor.numpy().copy()
    bits = array.view(np.uint64 if array.itemsize == 8 else np.uint32).reshape(-1)
    bits[index % bits.size] ^= 1
    return torch.from_numpy(array)


@pytest.mark.parametrize(("checkpoint", "mode"), MODES_OF)
def test_a_fingerprint_is_64_hexadecimal_digits_and_always_the_same(checkpoint: Checkpoint, mode: DeployMode) -> None:
    found = fingerprint(checkpoint, mode)
    assert len(found) == 64
    assert set(found) <= set(string.hexdigits.lower())
    again = make_checkpoint()
    assert fingerprint(replace(again, trained_with=checkpoint.trained_with), mode) == found


@pytest.mark.parametrize(("checkpoint", "mode"), MODES_OF)
def test_a_saved_and_loaded_checkpoint_keeps_its_fingerprint(
    checkpoint: Checkpoint, mode: DeployMode, tmp_path
) -> None:
    save_checkpoint(checkpoint, tmp_path / "saved.safetensors")
    assert fingerprint(load_checkpoint(tmp_path / "saved.safetensors"), mode) == fingerprint(checkpoint, mode)


def test_the_scheme_does_not_change_by_accident() -> None:
    """Another scheme would part every policy from the tokenizer that it was trained with."""
    sizes = ModelConfig(action_dim=2, latent_dim=2, hidden_width=2, num_layers=2, num_levels=3)
    weights = {
        f"{part}.{layer}.{kind}": torch.arange(4.0 if kind == "weight" else 2.0).reshape(-1, *[2] * (kind == "weight"))
        for part in ("encoder", "decoder")
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }
    constants = ConditioningConstants(torch.zeros(2, 2), torch.ones(2, 2))
    normaliser = Normaliser(NormaliserKind.MIN_MAX, (0.0, 0.0), (1.0, 2.0))
    checkpoint = Checkpoint(sizes, Conditioning.DYNAMIC, weights, constants, normaliser=normaliser)
    assert fingerprint(checkpoint, DeployMode.CALIBRATED).startswith("99ad08f8df28e2a75189030d836cbea9")


@given(name=st.sampled_from(sorted(CHECKPOINT.weights)), index=st.integers(0, 200), which=st.sampled_from(MODES_OF))
def test_every_bit_of_every_weight_counts(name: str, index: int, which: tuple[Checkpoint, DeployMode]) -> None:
    checkpoint, mode = which
    weights = {**checkpoint.weights, name: flip_last_bit(checkpoint.weights[name], index)}
    assert fingerprint(replace(checkpoint, weights=weights), mode) != fingerprint(checkpoint, mode)


@given(index=st.integers(0, 11), name=st.sampled_from(["mean", "scale"]))
def test_every_bit_of_every_constant_counts_where_it_is_used(index: int, name: str) -> None:
    constants = replace(CHECKPOINT.constants, **{name: flip_last_bit(getattr(CHECKPOINT.constants, name), index)})
    other = replace(CHECKPOINT, constants=constants)
    assert fingerprint(other, DeployMode.CALIBRATED) != fingerprint(CHECKPOINT, DeployMode.CALIBRATED)
    for mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED):
        assert fingerprint(other, mode) == fingerprint(CHECKPOINT, mode)


@given(index=st.integers(0, 47), name=st.sampled_from(["matrix", "offset"]))
def test_every_bit_of_the_recovered_decoder_counts_where_it_is_used(index: int, name: str) -> None:
    full = CHECKPOINT.recovered[3]
    changed = replace(full, **{name: flip_last_bit(getattr(full, name), index)})
    other = replace(CHECKPOINT, recovered={**CHECKPOINT.recovered, 3: changed})
    assert fingerprint(other, DeployMode.RECOVERED) != fingerprint(CHECKPOINT, DeployMode.RECOVERED)
    for mode in (DeployMode.DYNAMIC, DeployMode.CALIBRATED):
        assert fingerprint(other, mode) == fingerprint(CHECKPOINT, mode)


def test_the_grid_counts() -> None:
    other = replace(CHECKPOINT, config=replace(SIZES, num_levels=6))
    assert other.weights is CHECKPOINT.weights
    for mode in (DeployMode.DYNAMIC, DeployMode.CALIBRATED, DeployMode.RECOVERED):
        assert fingerprint(other, mode) != fingerprint(CHECKPOINT, mode)


def test_the_number_of_layers_counts_where_no_tensor_tells_it() -> None:
    other = replace(CHECKPOINT, config=replace(SIZES, num_layers=4))
    assert fingerprint(other, DeployMode.DYNAMIC) != fingerprint(CHECKPOINT, DeployMode.DYNAMIC)


def test_the_mode_counts() -> None:
    found = {fingerprint(checkpoint, mode) for checkpoint, mode in MODES_OF}
    assert len(found) == len(MODES)


@pytest.mark.parametrize(
    "normaliser",
    [
        None,
        replace(NORMALISER, offset=(0.5, 0.0, float(np.nextafter(np.float32(0.25), np.float32(1))))),
        replace(NORMALISER, scale=(2.0, 1.0, 3.5)),
    ],
)
@pytest.mark.parametrize(("checkpoint", "mode"), MODES_OF)
def test_the_normaliser_counts(checkpoint: Checkpoint, mode: DeployMode, normaliser: Normaliser | None) -> None:
    assert fingerprint(replace(checkpoint, normaliser=normaliser), mode) != fingerprint(checkpoint, mode)


@pytest.mark.parametrize(("checkpoint", "mode"), MODES_OF)
def test_provenance_and_remarks_do_not_count(checkpoint: Checkpoint, mode: DeployMode) -> None:
    other = replace(checkpoint, provenance={"epoch": 7}, remarks=("read from another layout",))
    assert fingerprint(other, mode) == fingerprint(checkpoint, mode)


def test_recovered_decoders_of_prefixes_do_not_count_neither_added_nor_dropped_nor_fitted_anew() -> None:
    """A policy keeps its tokens whatever becomes of these, so they part no policy from its tokenizer."""
    shape = (SIZES.latent_dim, SIZES.latent_dim)
    one_more = {**CHECKPOINT.recovered, 1: RecoveredDecoder(torch.zeros(shape).double(), torch.zeros(4).double())}
    other_two = {**CHECKPOINT.recovered, 2: replace(CHECKPOINT.recovered[2], offset=torch.ones(4).double())}
    for recovered in (one_more, other_two, {3: CHECKPOINT.recovered[3]}):
        other = replace(CHECKPOINT, recovered=recovered)
        assert fingerprint(other, DeployMode.RECOVERED) == fingerprint(CHECKPOINT, DeployMode.RECOVERED)


def test_the_order_of_weights_and_their_layout_in_memory_do_not_count() -> None:
    weights = {
        name: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor
        for name, tensor in reversed(CHECKPOINT.weights.items())
    }
    assert not all(tensor.is_contiguous() for tensor in weights.values())
    other = replace(CHECKPOINT, weights=weights)
    assert fingerprint(other, DeployMode.CALIBRATED) == fingerprint(CHECKPOINT, DeployMode.CALIBRATED)


@given(st.sampled_from(["weight", "bias"]), st.integers(0, 1000))
def test_the_readout_counts_where_it_decodes(name: str, index: int) -> None:
    readout = replace(CHECKPOINT.readout, **{name: flip_last_bit(getattr(CHECKPOINT.readout, name), index)})
    other = replace(CHECKPOINT, readout=readout)
    for mode in (DeployMode.CALIBRATED, DeployMode.DYNAMIC, DeployMode.RECOVERED):
        same = fingerprint(other, mode) == fingerprint(CHECKPOINT, mode)
        assert same == (mode is not DeployMode.CALIBRATED)
