"""ResidualFSQ and ResidualVQ: the library's own decoding, greedy search written out, a cache that trusts nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch

from rfsq.evidence import peers
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.peers import (
    FORMAT,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFamily,
    cached_residual_path,
    residual_codecs,
    train_residual,
    trained_residual,
)
from rfsq.evidence.schemes import Codec
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from tests.evidence.conftest import robot_dataset

_FSQ = ResidualConfig(ResidualFamily.FSQ, num_quantizers=3, epochs=4, batch_size=64)
_VQ = ResidualConfig(
    ResidualFamily.VQ, num_quantizers=3, codebook_size=16, epochs=2, unquantised_epochs=4, batch_size=64
)
_BOTH = pytest.mark.parametrize("config", [_FSQ, _VQ], ids=["fsq", "vq"])


@pytest.fixture(scope="module")
def models(robot: ActionDataset) -> dict[ResidualFamily, ResidualAutoencoder]:
    return {config.family: train_residual(robot, config) for config in (_FSQ, _VQ)}


def _chunks(dataset: ActionDataset) -> FloatArray:
    steps = split_episodes(dataset).test.steps()
    return steps[: len(steps) // 5 * 5].reshape(-1, 5, dataset.action_dim)


def _mse(codec: Codec, chunks: FloatArray, units: npt.NDArray[np.float32]) -> float:
    return float(np.mean(((codec.reconstruct(chunks) - chunks) / units) ** 2))


# What a codec is -----------------------------------------------------------------------------------------------------


def test_groups_as_a_sequence_are_the_librarys_grouped_quantiser() -> None:
    from vector_quantize_pytorch import GroupedResidualFSQ

    latents = 2 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    model = ResidualAutoencoder(replace(_FSQ, num_quantizers=4), action_dim=7).eval()
    grouped = GroupedResidualFSQ(dim=16, groups=4, levels=[7] * 4, num_quantizers=4).eval()

    quantized, indices, _ = model.quantize(latents)
    expected, expected_indices = grouped(latents[None])

    torch.testing.assert_close(quantized, expected[0])
    torch.testing.assert_close(indices, expected_indices[:, 0].transpose(0, 1), check_dtype=False)


@_BOTH
def test_decoding_all_quantisers_from_tokens_is_the_forward_pass(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset, config: ResidualConfig
) -> None:
    model, chunks = models[config.family], _chunks(robot)

    with torch.no_grad():
        expected = model(torch.from_numpy(chunks.reshape(-1, 4)))[0].numpy().reshape(chunks.shape)

    units = model.units.numpy()
    np.testing.assert_allclose(residual_codecs(model)[-1].reconstruct(chunks) / units, expected / units, atol=1e-5)


@_BOTH
def test_every_prefix_is_a_codec_with_its_share_of_the_bits(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset, config: ResidualConfig
) -> None:
    chunks = _chunks(robot)
    codecs = residual_codecs(models[config.family])

    per_quantizer = {ResidualFamily.FSQ: 16 * math.log2(7), ResidualFamily.VQ: 4.0}[config.family]
    assert [codec.bits_per_step(chunks) for codec in codecs] == pytest.approx([n * per_quantizer for n in (1, 2, 3)])
    assert [codec.partial for codec in codecs] == [True, True, False]
    assert {codec.family for codec in codecs} == {config.family.value}
    assert len({codec.name for codec in codecs}) == 3
    for count, codec in enumerate(codecs, start=1):
        assert isinstance(codec, Codec)
        assert codec.tokens(chunks).shape[-1] == count
        assert codec.reconstruct(chunks).dtype == np.float32
        assert codec.reconstruct(chunks).shape == chunks.shape


def test_vq_tokens_are_the_nearest_entries_one_residual_after_the_other(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset
) -> None:
    model, chunks = models[ResidualFamily.VQ], _chunks(robot)
    with torch.no_grad():
        residual = model.encode_latents(torch.from_numpy(chunks.reshape(-1, 4))).numpy().astype(np.float64)
    found = residual_codecs(model)[-1].tokens(chunks)[:, 0].numpy()

    for layer in range(3):
        codebook = model.state_dict()[f"quantizer.layers.{layer}._codebook.embed"][0].numpy().astype(np.float64)
        distance = np.linalg.norm(residual[:, None] - codebook, axis=-1)
        chosen = distance[np.arange(len(residual)), found[:, layer]]
        np.testing.assert_allclose(chosen, distance.min(axis=1), rtol=1e-3, atol=1e-4)
        residual = residual - codebook[found[:, layer]]


def test_a_step_is_coded_on_its_own_whatever_the_chunk_length(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset
) -> None:
    chunks = _chunks(robot)
    for model in models.values():
        codec = residual_codecs(model)[1]
        np.testing.assert_allclose(
            codec.reconstruct(chunks.reshape(-1, 1, 4)).reshape(chunks.shape) / model.units.numpy(),
            codec.reconstruct(chunks) / model.units.numpy(),
            atol=1e-5,
        )


# Training ------------------------------------------------------------------------------------------------------------


@_BOTH
def test_training_makes_it_better_than_the_mean_action(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset, config: ResidualConfig
) -> None:
    model, chunks = models[config.family], _chunks(robot)
    units = model.units.numpy()
    mean = split_episodes(robot).train.steps().mean(axis=0)

    assert _mse(residual_codecs(model)[-1], chunks, units) < 0.5 * float(np.mean(((chunks - mean) / units) ** 2))


@_BOTH
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset, config: ResidualConfig
) -> None:
    first = models[config.family].state_dict()
    again = train_residual(robot, config).state_dict()
    other = train_residual(robot, replace(config, seed=1)).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.0.weight"], other["encoder.0.weight"])


def test_actions_beyond_one_are_normalised_by_their_range_and_others_are_not(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset, demonstrations: ActionDataset
) -> None:
    steps = split_episodes(robot).train.steps()
    model = models[ResidualFamily.FSQ]

    np.testing.assert_allclose(model.units[:-1], (np.ptp(steps, axis=0) / 2)[:-1], rtol=1e-5)
    assert float(model.units[-1]) == 1
    few = demonstrations.select(range(8))
    assert torch.equal(train_residual(few, replace(_FSQ, epochs=1)).units, torch.ones(7))


@_BOTH
def test_fourteen_dimensions_with_one_that_never_moves(config: ResidualConfig) -> None:
    dataset = robot_dataset(action_dim=14, episodes=8)

    model = train_residual(dataset, replace(config, epochs=1, unquantised_epochs=0))

    assert all(np.isfinite(codec.reconstruct(_chunks(dataset))).all() for codec in residual_codecs(model))


def test_fine_tuning_that_only_does_harm_leaves_the_codebooks_of_k_means(
    robot: ActionDataset, models: dict[ResidualFamily, ResidualAutoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_FINE_TUNING_SHARE", 1e4)

    found, tuned = train_residual(robot, _VQ), models[ResidualFamily.VQ]

    chunks, units = _chunks(robot), found.units.numpy()
    assert _mse(residual_codecs(found)[-1], chunks, units) < 3 * _mse(residual_codecs(tuned)[-1], chunks, units)


def test_a_training_that_diverges_says_so(robot: ActionDataset) -> None:
    with pytest.raises(EvidenceError, match="diverged"):
        train_residual(robot, replace(_FSQ, epochs=1, learning_rate=1e30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"epochs": 0}, "epochs is 0"), ({"num_quantizers": 0}, "num_quantizers is 0"), ({"levels": (7, 7, 7)}, "groups")],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        replace(_FSQ, **changes)  # type: ignore[arg-type]


# Cache ---------------------------------------------------------------------------------------------------------------


@_BOTH
def test_a_cached_model_is_the_trained_one_and_is_not_trained_again(
    models: dict[ResidualFamily, ResidualAutoencoder], robot: ActionDataset, config: ResidualConfig, tmp_path: Path
) -> None:
    trained_residual(robot, config, tmp_path)
    path = cached_residual_path(robot, config, tmp_path)
    written = path.stat().st_mtime_ns

    loaded = trained_residual(robot, config, tmp_path)

    assert path.stat().st_mtime_ns == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    chunks = _chunks(robot)
    for first, second in zip(residual_codecs(models[config.family]), residual_codecs(loaded), strict=True):
        np.testing.assert_array_equal(first.reconstruct(chunks), second.reconstruct(chunks))


def test_a_file_says_which_versions_made_it(cached: Path) -> None:
    with safetensors.safe_open(cached, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])

    assert header["made_with"]["torch"] == torch.__version__
    assert header["made_with"].keys() == {"torch", "vector-quantize-pytorch"}


def test_a_recipe_that_changed_for_one_family_leaves_the_others_files_valid(
    robot: ActionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [cached_residual_path(robot, config, Path("cache")) for config in (_FSQ, _VQ)]
    monkeypatch.setitem(peers.RECIPES, ResidualFamily.VQ, 1000)
    after = [cached_residual_path(robot, config, Path("cache")) for config in (_FSQ, _VQ)]

    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


def test_the_name_tells_data_settings_and_seeds_apart(robot: ActionDataset) -> None:
    cache = Path("cache")
    other_data = robot_dataset(seed=1)
    paths = {
        cached_residual_path(dataset, config, cache)
        for dataset in (robot, other_data)
        for config in (_FSQ, _VQ, replace(_FSQ, seed=1), replace(_FSQ, epochs=5))
    }

    assert len(paths) == 8


@pytest.fixture
def cached(robot: ActionDataset, tmp_path: Path) -> Path:
    config = replace(_FSQ, epochs=1)
    trained_residual(robot, config, tmp_path)
    return cached_residual_path(robot, config, tmp_path)


def _is_refused(path: Path, robot: ActionDataset, message: str) -> None:
    with pytest.raises(EvidenceError, match=message) as caught:
        trained_residual(robot, replace(_FSQ, epochs=1), path.parent)
    assert path.name in str(caught.value)
    assert "Error(" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_changed_byte_is_found_wherever_it_is(cached: Path, robot: ActionDataset, place: int) -> None:
    content = bytearray(cached.read_bytes())
    content[place] ^= 0x10
    cached.write_bytes(content)

    _is_refused(cached, robot, "delete it")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_half_a_file_is_refused(cached: Path, robot: ActionDataset, kept: int) -> None:
    cached.write_bytes(cached.read_bytes()[:kept])

    _is_refused(cached, robot, "no whole file")


def test_a_file_of_something_else_is_refused(cached: Path, robot: ActionDataset) -> None:
    cached.write_bytes(safetensors.torch.save({"weight": torch.zeros(3)}))

    _is_refused(cached, robot, FORMAT)


def test_another_peers_file_under_this_name_is_refused(cached: Path, robot: ActionDataset, tmp_path: Path) -> None:
    other = replace(_FSQ, epochs=1, seed=1)
    trained_residual(robot, other, tmp_path)
    cached_residual_path(robot, other, tmp_path).replace(cached)

    _is_refused(cached, robot, "another peer")


def test_a_folder_that_cannot_be_written_is_named(robot: ActionDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(EvidenceError, match="writable folder"):
        trained_residual(robot, replace(_FSQ, epochs=1), tmp_path / "file")
