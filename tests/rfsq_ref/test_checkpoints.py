"""What `rfsq_ref.checkpoints` promises: our own format is lossless, and whatever is not a whole checkpoint is refused.

How published files are read stands in test_published_model.py.
"""

import errno
import hashlib
import json
import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfsq.export.graph_builder import LinearForm
from rfsq.export.graphs import encoder_graph
from rfsq.export.plan import DeployMode, plan_encoder
from rfsq.rfsq_ref import own_format
from rfsq.rfsq_ref.autoencoder import ModelConfig, Readout, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import (
    FORMAT,
    Checkpoint,
    checkpoint_of,
    load_checkpoint,
    save_checkpoint,
)
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.rfsq_ref.models import configs, make_model, random_actions, shrinking_constants, some_normaliser
from tests.rfsq_ref.published_model import ActionRFSQAE

SMALL = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=3, num_levels=5)


def recovered_for(config: ModelConfig, *prefixes: int) -> dict[int, RecoveredDecoder]:
    generator = torch.Generator().manual_seed(0)
    latent_dim = config.latent_dim
    return {
        prefix: RecoveredDecoder(
            torch.randn(latent_dim, latent_dim * prefix, generator=generator, dtype=torch.float64),
            torch.randn(latent_dim, generator=generator, dtype=torch.float64),
        )
        for prefix in prefixes
    }


def readout_for(config: ModelConfig) -> Readout:
    generator = torch.Generator().manual_seed(1)
    shape = (config.action_dim, config.hidden_width)
    return Readout(torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator))


def fitted(config: ModelConfig = SMALL) -> Checkpoint:
    """A checkpoint that carries all there is."""
    model = make_model(config, Conditioning.DYNAMIC, normaliser=some_normaliser(config.action_dim))
    return checkpoint_of(model, {"epoch": 3, "training": {"seed": 0}}).with_fit(
        constants=shrinking_constants(config.num_layers, config.latent_dim, config.num_levels),
        readout=readout_for(config),
        recovered=recovered_for(config, 1, config.num_layers),
        provenance={"calibration": "made up"},
    )


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.config == expected.config
    assert found.trained_with is expected.trained_with
    assert found.normaliser == expected.normaliser
    assert found.remarks == ()
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor)
        assert found.weights[name].dtype is torch.float32
    assert (found.constants is None) == (expected.constants is None)
    if found.constants is not None and expected.constants is not None:
        assert torch.equal(found.constants.mean, expected.constants.mean)
        assert torch.equal(found.constants.scale, expected.constants.scale)
    assert (found.readout is None) == (expected.readout is None)
    if found.readout is not None and expected.readout is not None:
        assert torch.equal(found.readout.weight, expected.readout.weight)
        assert torch.equal(found.readout.bias, expected.readout.bias)
    assert found.recovered.keys() == expected.recovered.keys()
    for prefix, decoder in expected.recovered.items():
        assert found.recovered[prefix].matrix.dtype is torch.float64
        assert torch.equal(found.recovered[prefix].matrix, decoder.matrix)
        assert torch.equal(found.recovered[prefix].offset, decoder.offset)


# Our own format ------------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    checkpoint = fitted()
    save_checkpoint(checkpoint, tmp_path / "new folder" / "model.safetensors")
    found = load_checkpoint(tmp_path / "new folder" / "model.safetensors")
    assert_same(found, checkpoint)
    assert found.provenance == {
        "epoch": 3,
        "training": {"seed": 0},
        "calibration": "made up",
        "checkpoint_sha256": hashlib.sha256((tmp_path / "new folder" / "model.safetensors").read_bytes()).hexdigest(),
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs(), st.sampled_from([Conditioning.NONE, Conditioning.DYNAMIC]), st.booleans())
def test_every_size_comes_back(
    tmp_path: Path, config: ModelConfig, conditioning: Conditioning, normalised: bool
) -> None:
    normaliser = some_normaliser(config.action_dim) if normalised else None
    checkpoint = checkpoint_of(make_model(config, conditioning, normaliser=normaliser), {})
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    assert_same(load_checkpoint(tmp_path / "model.safetensors"), checkpoint)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_checkpoint(fitted(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_follow_the_umask_like_any_other(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_checkpoint(fitted(), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_saving_replaces_an_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_checkpoint(fitted(), tmp_path / "model.safetensors")
    newer = checkpoint_of(make_model(SMALL, Conditioning.NONE, seed=9), {})
    save_checkpoint(newer, tmp_path / "model.safetensors")
    assert_same(load_checkpoint(tmp_path / "model.safetensors"), newer)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_interrupted_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(fitted(), tmp_path / "model.safetensors")
    old = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device; choose a writable folder"):
        save_checkpoint(checkpoint_of(make_model(SMALL), {}), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("place", ["file/model.safetensors", "file/deeper/model.safetensors", "a.safetensors"])
def test_an_unwritable_place_is_refused_and_left_as_it_was(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "a.safetensors" / "full").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(fitted(), tmp_path / place)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a.safetensors", "a.safetensors/full", "file"]


@pytest.mark.parametrize("name", ["model.pt", "model", "model.safetensors.bak"])
def test_a_name_under_which_it_could_not_be_read_again_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not end with '.safetensors'.*expected a name like"):
        save_checkpoint(fitted(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_and_hash_are_of_the_same_file_even_where_it_is_replaced_meanwhile(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(published_content(), path)
    else:
        save_checkpoint(fitted(), path)
    whole = path.read_bytes()
    reads = []

    def read_and_replace(file: Path, most: int) -> bytes:
        assert len(whole) < most
        reads.append(file)
        with file.open("r+b") as stream:
            content = stream.read()
            stream.truncate(10)
        return content

    monkeypatch.setattr(own_format, "read_file", read_and_replace)
    assert load_checkpoint(path).provenance["checkpoint_sha256"] == hashlib.sha256(whole).hexdigest()
    assert reads == [path]


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save_checkpoint(fitted(), tmp_path / "model.safetensors")
    # Not by the file's mode, which root may ignore.
    monkeypatch.setattr(own_format, "read_file", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*check its permissions"):
        load_checkpoint(tmp_path / "model.safetensors")


# What a checkpoint makes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", [Conditioning.DYNAMIC, Conditioning.CALIBRATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_of_a_loaded_checkpoint_are_the_same(
    conditioning: Conditioning, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = fitted()
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    before = checkpoint.model(conditioning, dtype=dtype)
    after = load_checkpoint(tmp_path / "model.safetensors").model(conditioning, dtype=dtype)
    assert not after.training
    actions = random_actions(50, 3).to(dtype)
    assert torch.equal(before.encode(actions)[0], after.encode(actions)[0])
    tokens = after.encode(actions)[0]
    assert torch.equal(before.decode(tokens), after.decode(tokens))
    assert after.decode(tokens).dtype is dtype


def test_calibrated_needs_constants_and_the_message_names_the_command() -> None:
    with pytest.raises(CheckpointError, match=r"python calibration/fit\.py --checkpoint"):
        checkpoint_of(make_model(SMALL, Conditioning.DYNAMIC), {}).model(Conditioning.CALIBRATED)


@pytest.mark.parametrize(
    ("trained", "wanted"),
    [(Conditioning.NONE, Conditioning.DYNAMIC), (Conditioning.DYNAMIC, Conditioning.NONE)],
)
def test_a_model_does_not_run_as_what_it_was_not_trained_for(trained: Conditioning, wanted: Conditioning) -> None:
    with pytest.raises(CheckpointError, match=f"trained with conditioning {trained.value!r}"):
        checkpoint_of(make_model(SMALL, trained), {}).model(wanted)


def test_a_later_fit_replaces_only_what_it_gives() -> None:
    first = fitted()
    constants = shrinking_constants(3, 4, 5, seed=7)
    second = first.with_fit(constants=constants, provenance={"calibration": "again"})
    assert second.constants is constants
    assert second.recovered is first.recovered
    assert second.readout is first.readout
    assert second.provenance == {**first.provenance, "calibration": "again"}
    assert first.with_fit(recovered={}).recovered == {}


def test_the_readout_serves_the_calibrated_conditioning_alone() -> None:
    checkpoint = fitted()
    assert checkpoint.readout is not None
    calibrated, dynamic = (checkpoint.model(mode) for mode in (Conditioning.CALIBRATED, Conditioning.DYNAMIC))
    assert torch.equal(calibrated.state_dict()["decoder.2.weight"], checkpoint.readout.weight)
    assert torch.equal(calibrated.state_dict()["decoder.2.bias"], checkpoint.readout.bias)
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(dynamic.state_dict()[name], tensor)


# Damaged files of our own --------------------------------------------------------------------------------------------


def rewritten(
    folder: Path,
    change_tensors: Callable[[dict[str, Tensor]], Any] = lambda _: None,
    change_header: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> Path:
    """A valid file whose tensors and header were changed by hand."""
    path = folder / "model.safetensors"
    save_checkpoint(fitted(), path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    # As in files from before it was kept: what these tests look at lies behind it.
    del header["sha256"]
    change_tensors(tensors)
    change_header(header)
    safetensors.torch.save_file(tensors, path, metadata={FORMAT: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.2.bias"), "lacks the tensor 'encoder.2.bias'"),
        (lambda t: t.pop("calibrated.mean"), "lacks the tensor 'calibrated.mean'"),
        (lambda t: t.pop("recovered.1.offset"), "lacks the tensor 'recovered.1.offset'"),
        (lambda t: t.update({"encoder.4.bias": torch.zeros(3)}), "does not know: .*encoder.4.bias"),
        (lambda t: t.update({"recovered.all.matrix": torch.zeros(3)}), "does not know: .*recovered.all.matrix"),
        (lambda t: t.update({"recovered.03.matrix": t.pop("recovered.3.matrix")}), "lacks the tensor 'recovered.3.m"),
        (lambda t: t.update({"recovered.٣.matrix": torch.zeros(4, 12)}), "does not know"),
        (lambda t: t.update({"recovered.4.matrix": torch.zeros(4, 16)}), "decoder for 4 layers; the model has 3"),
        (lambda t: t["decoder.0.weight"].fill_(torch.nan), "32 values that are NaN or infinite"),
        (lambda t: t["recovered.3.matrix"][0].fill_(torch.inf), "12 values that are NaN or infinite"),
        (lambda t: t["calibrated.scale"].zero_(), "every scale positive"),
        (lambda t: t.update({"encoder.0.bias": torch.zeros(9)}), r"shape \(9,\); expected \(8,\)"),
        (lambda t: t.update({"encoder.0.bias": torch.zeros(8, dtype=torch.int32)}), "expected floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewritten(tmp_path, change_tensors=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=99), "format version 99; this code reads 1"),
        (lambda h: h.pop("version"), "broken header"),
        (lambda h: h.pop("config"), "broken header"),
        (lambda h: h["config"].update(latent_dim=5), "expected"),
        (lambda h: h["config"].update(latent_dim=0), "broken header"),
        (lambda h: h["config"].update(num_layers=3.0), "broken header"),
        (lambda h: h["config"].update(heads=2), "broken header"),
        (lambda h: h.update(trained_with="calibrated"), "expected 'none' or 'dynamic'"),
        (lambda h: h.update(trained_with="mostly"), "broken header"),
        (lambda h: h["normaliser"].update(kind="none"), "broken header"),
        (lambda h: h["normaliser"].update(offset=[0.0] * 4, scale=[1.0] * 4), "normaliser for 4 dimensions"),
        (lambda h: h.update(provenance=["a fact"]), "broken header"),
        (lambda h: h.update(version=[99]), "format version"),
        (lambda h: h.update(version="1"), "format version '1'; this code reads 1"),
        (lambda h: h.update(version=True), "format version True; this code reads 1"),
        (lambda h: h.update(version=1.0), "format version 1.0; this code reads 1"),
        (
            lambda h: h["config"].update(num_layers=10**9),
            "num_layers is 1000000000; expected an integer from 1 to 1024",
        ),
        (lambda h: h["config"].update(num_levels=10**30), f"num_levels is {10**30}; expected an integer from 2 to"),
        (lambda h: h["config"].update(hidden_width=2**16 + 1), "hidden_width is 65537; expected an integer from 1 to"),
        (lambda h: h["config"].update(num_layers=True), "num_layers is True; expected an integer from 1 to"),
        (lambda h: h.update(normaliser={}), "broken header.*normaliser needs"),
        (lambda h: h["normaliser"].update(offset="123"), "offset is .*123.*; expected a list"),
        (
            lambda h: h["normaliser"].update(offset=[10**400] * 3),
            r"list of float32 numbers; found: it.offset\[0\] is 100",
        ),
        (lambda h: h["provenance"].update(loss=float("inf")), "broken header.*Infinity is no JSON number"),
        (lambda h: h["provenance"].update(name="\ud800"), "broken header.*surrogates not allowed"),
    ],
)
def test_headers_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewritten(tmp_path, change_header=change))


def test_numbers_that_json_turns_infinite_are_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path, change_header=lambda h: h["provenance"].update(loss=0.125))
    path.write_bytes(path.read_bytes().replace(b"0.125", b"1e999"))
    with pytest.raises(CheckpointError, match=r"broken header.*Out of range float values"):
        load_checkpoint(path)


def test_provenance_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in its provenance, NaN is no JSON number; leave that out"):
        save_checkpoint(fitted().with_fit(provenance={"loss": float("nan")}), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_of_somebody_else_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"not an RFSQ autoencoder.*found \['weight'\]"):
        load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', "tensors of type 'F4', which torch lacks"),
        (
            '{"__metadata__": null, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
            "not an RFSQ autoencoder",
        ),
    ],
)
def test_unusual_safetensors_are_refused(header: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_header_of_bottomless_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={FORMAT: "[" * 100_000})
    with pytest.raises(CheckpointError, match="broken header"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 1, 8, 9, 500, -1])
def test_a_truncated_file_of_our_own_is_refused(kept: int, tmp_path: Path) -> None:
    save_checkpoint(fitted(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_the_caller_may_not_contradict_the_file(tmp_path: Path) -> None:
    save_checkpoint(fitted(), tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path / "model.safetensors", use_layernorm=True).trained_with is Conditioning.DYNAMIC
    with pytest.raises(CheckpointError, match="drop the argument"):
        load_checkpoint(tmp_path / "model.safetensors", use_layernorm=False)


# Damaged and malicious torch files -----------------------------------------------------------------------------------


def published_content(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ActionRFSQAE(use_layernorm=True)
    return {"model_state_dict": model.state_dict(), "epoch": 1, "config": model.config} | changes


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.witness, "executed")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("inside", ["alone", "beside the weights"])
def test_a_malicious_pickle_is_refused_and_not_executed(writer: str, inside: str, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "witness")
    content = payload if inside == "alone" else published_content(optimizer=payload)
    path = tmp_path / "model.pt"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=r"refused: it is not a plain weights file.*[Uu]nsupported"):
        load_checkpoint(path, use_layernorm=True)
    assert not payload.witness.exists()
    # The payload does work, so that the check above can fail.
    pickle.loads(pickle.dumps(payload))  # noqa: S301
    assert payload.witness.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02", b"PK\x03\x04", bytes(1000)])
def test_files_that_are_no_checkpoints_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint torch can read; expected a file|Reason: "
    ) as refused:
        load_checkpoint(tmp_path / "model.pt", use_layernorm=True)
    # What people read names no class of Python's.
    assert "Error" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("written", ["plain", "compressed", "array", "hdf5", "onnx"])
def test_a_file_of_another_kind_is_called_what_it_is(written: str, suffix: str, tmp_path: Path) -> None:
    path, actions = tmp_path / f"model{suffix}", np.zeros((900, 7), np.float32)
    with path.open("wb") as file:
        if written == "onnx":
            plan = plan_encoder(make_model(ModelConfig(), Conditioning.NONE, dtype=torch.float64), DeployMode.NONE, 8)
            file.write(encoder_graph(plan, LinearForm.GEMM))
        elif written == "hdf5":
            with h5py.File(file, "w") as content:
                content["actions"] = actions
        elif written == "array":
            np.save(file, actions)
        else:
            (np.savez if written == "plain" else np.savez_compressed)(file, actions=actions)
    kind = {"array": r"\.npy file", "hdf5": "HDF5 file", "onnx": "ONNX graph"}.get(written, r"\.npz file")
    with pytest.raises(CheckpointError, match=rf"is no checkpoint but an {kind}.*; (recorded actions|give the)"):
        load_checkpoint(path, use_layernorm=True)


def test_the_message_names_what_a_malicious_pickle_asked_for(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("false",)

    with pytest.raises(CheckpointError, match=r"Reason: .*[Uu]nsupported GLOBAL \w+.system") as refused:
        load_checkpoint(saved(published_content(optimizer=Command()), tmp_path))
    assert "\n" not in str(refused.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_torch_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.pt"
    legacy = data.draw(st.booleans())
    torch.save(published_content(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.pt", "."])
def test_a_missing_file_is_named_and_the_message_names_the_command(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*python rfsq_ref/train\.py"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_pipes_devices_and_files_without_end_are_not_read(suffix: str, tmp_path: Path) -> None:
    pipe, device, sparse = (tmp_path / f"{name}{suffix}" for name in ("pipe", "device", "sparse"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with sparse.open("wb") as file:
        file.truncate(2**43)
    for path in (pipe, device):
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*: it is not a regular file; train one with"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="it has 8796093022208 bytes; expected at most"):
        load_checkpoint(sparse)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "holds a list; expected a state dict"),
        (torch.zeros(3), "holds a Tensor; expected a state dict"),
        ({"epoch": 3}, "no state dict of tensors; found the keys"),
        ({0: torch.zeros(3)}, "no state dict of tensors; found the keys"),
        ({"model": 3}, "no state dict of tensors"),
        ({"weight": torch.zeros(3)}, "not an RFSQ autoencoder"),
        ({"encoder.0.weight": torch.zeros(3), "encoder.2.weight": torch.zeros(3)}, "not matrices"),
        (published_content(config=7), "config of type int"),
    ],
)
def test_torch_files_that_hold_something_else_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved(content, tmp_path), use_layernorm=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["encoder.2.weight"][3].fill_(torch.nan), "'encoder.2.weight' has 64 values that are NaN"),
        (lambda t: t["decoder.2.bias"].fill_(torch.inf), "'decoder.2.bias' has 7 values that are NaN or infinite"),
        (lambda t: t.pop("decoder.0.weight"), "lacks the tensor 'decoder.0.weight'"),
        (lambda t: t.pop("encoder.2.weight"), "not an RFSQ autoencoder"),
        (lambda t: t.pop("rfsq.layers.7.boundaries"), "config says num_layers = 8, its tensors have 7"),
        (lambda t: t.pop("rfsq.layers.2.boundaries"), r"quantiser layers \[0, 1, 3, .*without gaps"),
        (lambda t: [t.pop(f"rfsq.layers.{n}.boundaries") for n in range(8)], r"quantiser layers \[\]"),
        (lambda t: t["rfsq.layers.1.boundaries"].mul_(1.01), "grid of layer 1 is off by 0.01"),
        (lambda t: t["rfsq.layers.0.boundaries"].fill_(torch.nan), "grid of layer 0 is off by nan"),
        (
            lambda t: t.update({"rfsq.layers.3.boundaries": torch.linspace(-1, 1, 9)}),
            r"grid of layer 3 is of shape \(9",
        ),
        (
            lambda t: t.update({"rfsq.layers.3.boundaries": torch.arange(7)}),
            r"grid of layer 3 is of .* type torch.int64",
        ),
        (lambda t: t.update({"rfsq.layers.01.boundaries": t.pop("rfsq.layers.1.boundaries")}), "without gaps"),
        (lambda t: t.update({"rfsq.layers.٣.boundaries": t.pop("rfsq.layers.3.boundaries")}), "without gaps"),
        (lambda t: t.update({"rfsq.layers.00.boundaries": t["rfsq.layers.0.boundaries"]}), "does not know"),
        (lambda t: t.update({f"rfsq.layers.{'9' * 5000}.boundaries": torch.zeros(7)}), "does not know"),
        (lambda t: t.update({"decoder.0.bias": t["decoder.0.bias"].to("meta")}), "'decoder.0.bias' is a meta tensor"),
        (lambda t: t.update({"decoder.0.bias": t["decoder.0.bias"].to_sparse()}), "is a torch.sparse_coo tensor"),
        (lambda t: t.update({"decoder.0.bias": t["decoder.0.bias"].cfloat()}), "expected floating point"),
        (
            lambda t: t.update({"encoder.0.weight": torch.zeros(1).expand(2**28, 7)}),
            r"shape \(268435456, 7\), more numbers than the file holds",
        ),
        (lambda t: t.update({"rfsq.layers.0.boundaries": torch.zeros(1).expand(2**40)}), "more numbers than the file"),
        (lambda t: t.update({"rfsq.layers.0.boundaries": torch.zeros(1)}), "num_levels is 1"),
        (lambda t: t.update({"head.weight": torch.zeros(3)}), r"does not know: \['head.weight'\]"),
        (lambda t: t.update({"decoder.2.bias": torch.zeros(8)}), r"shape \(8,\); expected \(7,\)"),
        (lambda t: t.update({"decoder.2.bias": torch.zeros(7).long()}), "expected floating point"),
        (
            lambda t: t.update({"decoder.2.bias": torch.tensor([1e300, -2e300, 0, 0, 0, 0, 0], dtype=torch.float64)}),
            "'decoder.2.bias' has 2 values beyond torch.float32, up to 2e\\+300, which torch.float64 can hold",
        ),
        (
            lambda t: t.update({"decoder.2.bias": torch.full((7,), torch.inf, dtype=torch.float64)}),
            "'decoder.2.bias' has 7 values that are NaN or infinite; the training diverged",
        ),
        (
            lambda t: t.update({"decoder.2.bias": torch.zeros(7, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}),
            "has type torch.float4_e2m1fn_x2, which torch does not compute with; save it as float32",
        ),
        (
            lambda t: t.update({"encoder.0.bias": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
            "'encoder.0.bias' is a nested tensor; expected plain numbers",
        ),
    ],
)
def test_published_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    content = published_content()
    change(content["model_state_dict"])
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.tensor(8), "Tensor"), (torch.tensor([8, 8]), "Tensor"), (None, "NoneType"), ("8", "str"), (8.0, "float")],
)
def test_a_config_value_that_is_no_integer_is_refused(value: Any, found: str, tmp_path: Path) -> None:
    content = published_content()
    content["config"] = content["config"] | {"num_layers": value}
    with pytest.raises(CheckpointError, match=f"config has a {found} as num_layers; expected the integer 8"):
        load_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("action_dim", 6), ("hidden_dim", 8), ("num_layers", 9), ("num_levels", 5)]
)
def test_a_config_that_contradicts_the_tensors_is_refused(name: str, value: int, tmp_path: Path) -> None:
    content = published_content()
    content["config"] = content["config"] | {name: value}
    with pytest.raises(CheckpointError, match=f"config says {name} = {value}, its tensors have"):
        load_checkpoint(saved(content, tmp_path))


def test_a_config_that_does_not_clearly_say_how_it_was_trained_is_refused(tmp_path: Path) -> None:
    content = published_content()
    content["config"] = content["config"] | {"use_layernorm": "False"}
    with pytest.raises(CheckpointError, match="use_layernorm = 'False'; expected True or False"):
        load_checkpoint(saved(content, tmp_path))
    content["config"] = content["config"] | {"use_layernorm": torch.tensor(True)}
    with pytest.raises(CheckpointError, match="use_layernorm = a Tensor; expected True or False"):
        load_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_two_states_of_which_one_is_no_plain_tensors_are_refused(
    change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    content = published_content()
    content["model"] = {name: change(tensor) for name, tensor in content["model_state_dict"].items()}
    with pytest.raises(CheckpointError, match="they differ"):
        load_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_types_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    content = published_content()
    state = content["model_state_dict"]
    # The whole model, its grid included.
    content["model_state_dict"] = {name: tensor.to(dtype) for name, tensor in state.items()}
    weights = load_checkpoint(saved(content, tmp_path)).weights
    assert all(torch.equal(tensor, state[name].to(dtype).float()) for name, tensor in weights.items())
    content["model_state_dict"]["rfsq.layers.2.boundaries"][1] += 0.01
    with pytest.raises(CheckpointError, match="grid of layer 2 is off by"):
        load_checkpoint(saved(content, tmp_path))


def test_a_published_checkpoint_can_be_saved_as_our_own(tmp_path: Path) -> None:
    published = load_checkpoint(saved(published_content(), tmp_path))
    save_checkpoint(published, tmp_path / "model.safetensors")
    assert_same(load_checkpoint(tmp_path / "model.safetensors"), replace(published, remarks=()))


@pytest.mark.parametrize("number", [10**600, True, 7.0])
def test_a_config_of_no_plain_numbers_is_refused(number: object, tmp_path: Path) -> None:
    content = published_content()
    content["config"] = {**content["config"], "action_dim": number}
    with pytest.raises(CheckpointError, match=r"its config .* action_dim"):
        load_checkpoint(saved(content, tmp_path))


def test_facts_that_json_cannot_keep_are_left_out(tmp_path: Path) -> None:
    content = published_content(epoch=10**600, train_mse=float("nan"), mse=0.5)
    provenance = load_checkpoint(saved(content, tmp_path)).provenance
    assert {name: provenance.get(name) for name in ("epoch", "train_mse", "mse")} == {
        "epoch": None,
        "train_mse": None,
        "mse": 0.5,
    }
