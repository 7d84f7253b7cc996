"""A bundle is opened whole and unaltered, or not at all; `load` and `selftest` refuse alike."""

import hashlib
import itertools
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer, BundleError, InvalidInputError, SelfTestError
from rfsq.runtime.bundle import reading
from rfsq.runtime.bundle.errors import TokenizerError
from rfsq.runtime.bundle.folder import check_manifest, open_bundle, unlisted_files
from rfsq.runtime.bundle.manifest import (
    DECODING_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    manifest_text,
    parse_manifest,
)
from rfsq.runtime.bundle.models import ModelEntry
from rfsq.runtime.qualification import selftest
from tests.bundles import (
    Recipe,
    bundle_files,
    c_entry,
    deploy,
    engine_entry,
    export_graphs,
    generate_c,
    make_manifest,
    proven,
    without_beliefs,
    write_bundle,
)

FILES = (
    "belief.onnx",
    "belief_l2.onnx",
    "decoder.onnx",
    "decoder_l2.onnx",
    DECODING_NAME,
    "encoder.onnx",
    "engines/tensorrt-rtx-1.6.1.120-sm89/decoder.engine",
    "gemm_marked/decoder.onnx",
    "gemm_marked/decoder_l2.onnx",
    "gemm_marked/encoder.onnx",
    "golden.npz",
    MANIFEST_NAME,
    "reduce/belief.onnx",
    "reduce/belief_l2.onnx",
    "reduce/decoder.onnx",
    "reduce/decoder_l2.onnx",
    "reduce/encoder.onnx",
)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def refuse(folder: Path, message: str, error: type[TokenizerError] = BundleError) -> None:
    """`load` raises `error`, and `selftest` fails with the same words."""
    with pytest.raises(error, match=message):
        ActionTokenizer.load(folder)


def selftest_refuses(folder: Path, message: str, capsys: pytest.CaptureFixture[str], status: int = 2) -> None:
    capsys.readouterr()
    assert selftest.main([str(folder), "-v"]) == status
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def rewrite(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """A manifest that is consistent with itself, as a builder with a fault, or with bad intent, would write it."""
    path = folder / MANIFEST_NAME
    path.write_text(manifest_text(change(parse_manifest(path.read_text(encoding="utf-8")))), encoding="utf-8")


def rehash(folder: Path) -> None:
    """State the hashes of the files as they are now."""

    def entry(file: str) -> FileEntry:
        content = (folder / file).read_bytes()
        return FileEntry(hashlib.sha256(content).hexdigest(), len(content))

    def change(manifest: Manifest) -> Manifest:
        files = {file: entry(file) for file in manifest.files}
        engines = tuple(replace(engine, source_sha256=files[engine.source].sha256) for engine in manifest.engines)
        return replace(manifest, files=files, engines=engines)

    rewrite(folder, change)


def test_a_bundle_holds_these_files_and_opens(bundle: Path) -> None:
    assert tuple(bundle_files(bundle)) == FILES
    opened = open_bundle(bundle)
    for file in set(FILES) - {MANIFEST_NAME}:
        assert opened.content(file) == (bundle / file).read_bytes()
    # Without the bytes, which may be hundreds of megabytes.
    assert repr(opened) == f"Bundle(folder={bundle!r}, manifest={opened.manifest!r})"


# --- altered files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_byte_in_any_file_is_refused(file: str, altered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = (altered / file).read_bytes()
    for position in (0, len(original) // 3, len(original) // 2, len(original) - 1):
        damaged = bytearray(original)
        damaged[position] ^= 1
        (altered / file).write_bytes(damaged)
        refuse(altered, file)
    selftest_refuses(altered, file, capsys)
    (altered / file).write_bytes(original)
    ActionTokenizer.load(altered).close()


@pytest.mark.parametrize("file", FILES)
def test_truncated_and_lengthened_files_are_refused(
    file: str, altered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = (altered / file).read_bytes()
    for content in (b"", original[: len(original) // 2], original[:-1], original + b"\0"):
        (altered / file).write_bytes(content)
        refuse(altered, file)
    selftest_refuses(altered, file, capsys)


@pytest.mark.parametrize("file", FILES)
def test_missing_files_are_refused(file: str, altered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (altered / file).unlink()
    refuse(altered, file)
    selftest_refuses(altered, file, capsys)


def test_the_message_states_what_was_found_and_expected(altered: Path) -> None:
    size = (altered / "encoder.onnx").stat().st_size
    (altered / "encoder.onnx").write_bytes(b"x")
    refuse(
        altered, f"encoder.onnx in .* has 1 bytes, the manifest states {size}: it is truncated.*copy the bundle again"
    )
    (altered / "encoder.onnx").write_bytes(b"x" * size)
    refuse(altered, f"encoder.onnx in .* has sha256 {hashlib.sha256(b'x' * size).hexdigest()}, the manifest states")


def test_swapped_files_are_refused(altered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = altered / "decoder.onnx", altered / "encoder.onnx"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    refuse(altered, r"decoder\.onnx.*truncated or was altered")
    selftest_refuses(altered, "decoder.onnx", capsys)


def test_nothing_is_deserialised_before_everything_is_hashed(altered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        pytest.fail("deserialised")

    (altered / "golden.npz").write_bytes(b"x")
    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    monkeypatch.setattr("zipfile.ZipFile", fail)
    refuse(altered, r"golden\.npz")


def test_what_runs_is_what_was_hashed_whatever_happens_on_disk_later(altered: Path) -> None:
    opened = open_bundle(altered)
    content = opened.content("encoder.onnx")
    (altered / "encoder.onnx").write_bytes(b"replaced after it was hashed")
    assert opened.content("encoder.onnx") is content
    assert hashlib.sha256(content).hexdigest() == opened.manifest.files["encoder.onnx"].sha256


# --- altered manifests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"latent_dim": 4', '"latent_dim": 5', "altered after it was written"),
        ('"schema_version": 2', '"schema_version": 1', "schema version 1; this runtime reads 2"),
        ("{\n", '{\n "surprise": 1,\n', r"unknown keys \['surprise'\]"),
    ],
)
def test_altered_manifests_are_refused(
    old: str, new: str, message: str, altered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = altered / MANIFEST_NAME
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    refuse(altered, message)
    selftest_refuses(altered, MANIFEST_NAME, capsys)


def test_a_manifest_in_another_encoding_or_with_other_line_ends_is_refused(altered: Path) -> None:
    path = altered / MANIFEST_NAME
    text = path.read_text(encoding="utf-8")
    path.write_bytes(text.encode("utf-16"))
    refuse(altered, "not UTF-8")
    path.write_bytes(text.replace("\n", "\r\n").encode())
    refuse(altered, "altered after it was written")


def change_model(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, model=replace(manifest.model, **changes))


def change_engine(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, engines=(replace(manifest.engines[0], **changes),))


def change_parity(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, parity=(replace(manifest.parity[0], **changes), *manifest.parity[1:]))


def without_form(form: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, graphs=tuple(entry for entry in manifest.graphs if entry.form != form))


def with_form(old: str, new: str) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        return replace(
            manifest,
            graphs=tuple(replace(entry, form=new if entry.form == old else entry.form) for entry in manifest.graphs),
        )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_model(chunk_length=0), "chunk_length is 0"),
        (change_model(num_levels=2**70), "num_levels is 1180591620717411303424, not from 2 to 16777216"),
        (change_model(prefixes=(3, 2)), r"prefixes are \[3, 2\] for 3 layers"),
        (change_model(prefixes=(2,)), r"prefixes are \[2\] for 3 layers"),
        (change_model(action_units=(1.0, 0.0, 1.0)), "not all between 1e-12 and 1e"),
        (change_model(action_units=(1e30, 1.0, 1.0)), r"action_units are \[1e\+30, 1.0, 1.0\], not all between"),
        (change_model(action_units=(1e12, 1e12, 1.1e12)), "not all between"),
        (
            change_model(action_units=(1e12, 1e3, 1.0)),
            "golden.npz has actions that do not span the model's action_units",
        ),
        (
            change_model(action_units=(1.0, 1.0, 30.0)),
            "golden.npz has actions that do not span the model's action_units",
        ),
        (
            change_model(action_units=(1.0, 1.0, 1.0), action_offset=(0.0, 0.0, 2.0**24 + 1)),
            "where float32 does not tell units apart",
        ),
        (change_model(action_limit=1.0), "action_limit is 1.0, not beyond the range of the units"),
        (change_model(action_units=(1.0,)), r"action_units are \[1.0\] for 3 dimensions"),
        (change_model(action_units=(1.0, -1.0, 1.0)), "not all between"),
        (change_model(action_offset=(0.0, 0.0)), r"action_offset are \[0.0, 0.0\] for 3 dimensions"),
        (change_model(prefixes=(0, 3)), r"prefixes are \[0, 3\] for 3 layers"),
        (change_model(prefixes=(2, 2, 3)), r"prefixes are \[2, 2, 3\] for 3 layers"),
        (change_model(action_limit=0.0), "action_limit is 0.0"),
        (change_model(action_limit=np.nextafter(FLOAT32_MAX, np.inf)), r"action_limit is 3.40282346638528\d+e\+38"),
        (change_model(action_dim=2**62, action_units=(), action_offset=()), "for 4611686018427387904 dimensions"),
        (lambda manifest: replace(manifest, fingerprint="zz"), "the fingerprint is 'zz', not 64 lowercase"),
        (lambda manifest: replace(manifest, fingerprint="A" * 64), "not 64 lowercase"),
        (lambda manifest: replace(manifest, fingerprint="0" * 64 + "\n"), "not 64 lowercase"),
        (lambda manifest: replace(manifest, parity=()), "onnxruntime on CPU lacks the gates encode: wrong tokens, "),
        (
            change_parity(value=5.0),
            "the gate 'encode: wrong tokens' of onnxruntime did not pass: 5 of 0, where at most 0",
        ),
        (change_parity(value=-1.0), "did not pass: -1 of 0"),
        (change_parity(limit=1.0), "did not pass: 0 of 1, where at most 0 may be allowed"),
        (change_parity(device="a toaster"), "onnxruntime on CPU lacks the gates encode: wrong tokens; build"),
        (change_parity(backend="c"), "onnxruntime on CPU lacks the gates encode: wrong tokens; build"),
        (
            change_parity(gate="encode: all is well"),
            "'encode: all is well' of onnxruntime, over 120000 steps, is no gate",
        ),
        (change_parity(gate="encode: near-tie flips", limit=1e30), r"did not pass: 0 of 1e\+30, where at most 792035"),
        (change_parity(gate="uint8 tokens, decode 3 layers: action error", limit=1.1e-5), r"at most 1e-05 may be"),
        (
            change_parity(gate="golden vectors, decode 3 layers, batch 2: max |action error|", limit=1.0),
            "at most 1e-05",
        ),
        (change_parity(gate="encode: stats error", limit=1.0), "at most 1e-05 may be"),
        (
            change_parity(
                gate="golden vectors, encode and decode, batch 2: max |action error| of 3 steps with a near-tie flip",
                limit=1e30,
            ),
            "at most 10 may be",
        ),
        (change_parity(steps=0), "over 0 steps, is no gate"),
        (change_parity(gate="x" * 40 + ": wrong tokens", limit=1e30), "at most 0 may be"),
        (
            change_engine(status="validated", precision="fp32", device="H100"),
            "tensorrt-rtx on H100 lacks the gates enc",
        ),
        (change_engine(profile=(0, 1, 64)), r"tuned for batches \[0, 1, 64\], not 1 or more and ascending"),
        (change_engine(profile=(1, 128, 64)), r"tuned for batches \[1, 128, 64\]"),
        (change_model(latent_dim=5), r"states the tensors"),
        (change_model(mode="dynamic"), r"states the tensors"),
        (change_model(num_levels=3), r"states the tensors .*'probabilities'"),
        (lambda manifest: replace(manifest, graphs=manifest.graphs[1:]), "lists the graphs"),
        (without_form("gemm"), r"lists the graphs \[.*\]; the model needs \[.*\('encoder', 3, 'gemm'\)"),
        (without_form("gemm_marked"), r"lists the graphs .*; the model needs .*'gemm_marked'\)"),
        (without_form("reduce"), r"lists the graphs .*; the model needs .*'reduce'\)"),
        (with_form("reduce", "gemm"), "lists the graphs"),
        (change_engine(status="validated"), "is 'validated' with precision 'not measured' on the GPU ''"),
        (change_engine(status="validated", precision="fp32"), "is 'validated' with precision 'fp32' on the GPU ''"),
        (
            change_engine(status="validated", device="H100"),
            "is 'validated' with precision 'not measured' on the GPU 'H",
        ),
        (change_engine(precision="fp32"), "is 'built' with precision 'fp32' on the GPU ''"),
        (change_engine(device="H100"), "is 'built' with precision 'not measured' on the GPU 'H100'"),
        (
            change_engine(status="validated", precision="fp32", device="H100", kernel_cache="engines/x.kernels"),
            r"refers to engines/x\.kernels but lists no hash",
        ),
        (change_engine(kernel_cache="golden.npz"), r"has kernels in golden\.npz, compiled for no GPU that is named"),
        (change_engine(source="nowhere.onnx"), "graph and engine do not belong together"),
        (change_engine(backend="c", targets=()), r"is C for the targets \[\], not for one"),
        (change_engine(backend="c", targets=("x86-64", "x86-64-v3")), "not for one"),
        (change_engine(source="decoder.onnx"), "graph and engine do not belong together"),
        (lambda manifest: replace(manifest, graphs=(*manifest.graphs, manifest.graphs[0])), "lists the graphs"),
        (
            change_engine(source_sha256="0" * 64),
            "graph and engine do not belong together",
        ),
        (
            change_engine(file="elsewhere.engine"),
            r"refers to elsewhere\.engine but lists no hash",
        ),
        (
            lambda manifest: replace(
                manifest, files={name: entry for name, entry in manifest.files.items() if name != "golden.npz"}
            ),
            r"refers to golden\.npz but lists no hash",
        ),
    ],
)
def test_consistent_manifests_of_impossible_bundles_are_refused(
    change: Callable[[Manifest], Manifest], message: str, altered: Path
) -> None:
    rewrite(altered, change)
    refuse(altered, message)


def test_a_validated_engine_with_its_device_and_kernels_is_accepted(altered: Path) -> None:
    kernels = "engines/decoder.engine.kernels"
    (altered / kernels).write_bytes(b"kernels")
    entry = FileEntry(hashlib.sha256(b"kernels").hexdigest(), 7)
    change = change_engine(status="validated", precision="fp32", device="H100", kernel_cache=kernels)
    rewrite(
        altered,
        lambda manifest: replace(
            change(manifest),
            files={**manifest.files, kernels: entry},
            parity=(*manifest.parity, *proven("tensorrt-rtx", "H100", manifest.model)),
        ),
    )
    opened = open_bundle(altered)
    assert opened.content(opened.manifest.engines[0].kernel_cache) == b"kernels"


def c_engine(chunk_length: int = 2, device: str = "x86-64") -> Manifest:
    """As a build writes it that has run the engine."""
    manifest = complete_manifest(chunk_length)
    entry = replace(c_entry(generate_c(deploy(Recipe())), "x86-64"), device=device)
    if not device:
        entry = replace(entry, status="built", precision="not measured")
    files = {entry.source: FileEntry(entry.source_sha256, 1), entry.file: FileEntry("1" * 64, 1)}
    return replace(
        manifest,
        engines=(entry,),
        files={**manifest.files, **files},
        parity=(*manifest.parity, *proven("c", "x86-64", manifest.model)),
    )


def marking_engine(backend: str) -> Manifest:
    """As a build writes it that has run the engine on a GPU."""
    manifest = complete_manifest()
    source = manifest.graphs[0].file
    entry = replace(
        engine_entry(b""),
        backend=backend,
        source=source,
        source_sha256=manifest.files[source].sha256,
        status="validated",
        precision="fp32",
        device="H100",
    )
    return replace(
        manifest,
        engines=(entry,),
        files={**manifest.files, entry.file: FileEntry("1" * 64, 1)},
        parity=(*manifest.parity, *proven(backend, "H100", manifest.model)),
    )


def without_gates(manifest: Manifest, part: str) -> Manifest:
    parity = tuple(entry for entry in manifest.parity if part not in entry.gate)
    assert len(parity) < len(manifest.parity)
    return replace(manifest, parity=parity)


def test_graphs_of_beliefs_that_were_not_tested_are_refused_and_so_are_some_of_them() -> None:
    manifest = complete_manifest()
    with pytest.raises(BundleError, match=r"onnxruntime on CPU lacks the gates beliefs: action error, beliefs: std"):
        check_manifest(without_gates(manifest, "beliefs"), is_proven=True)
    # Bundles that were built before there were any have neither.
    check_manifest(without_gates(without_beliefs(manifest), "beliefs"), is_proven=True)
    fewer = tuple(entry for entry in manifest.graphs if entry.file != "belief_l2.onnx")
    with pytest.raises(BundleError, match=r"lists the graphs .*; the model needs .*\('belief', 2, 'gemm'\)"):
        check_manifest(replace(manifest, graphs=fewer), is_proven=True)


def test_graphs_of_beliefs_may_be_for_the_processor_alone() -> None:
    """As they were at first. What runs on a GPU has passed no gates of beliefs then."""
    manifest = marking_engine("tensorrt-rtx")
    older = tuple(entry for entry in manifest.graphs if (entry.role, entry.form) != ("belief", "reduce"))
    untested = replace(
        manifest,
        parity=tuple(entry for entry in manifest.parity if (entry.device, entry.gate[:7]) != ("H100", "beliefs")),
    )
    check_manifest(replace(untested, graphs=older), is_proven=True)
    check_manifest(manifest, is_proven=True)
    with pytest.raises(BundleError, match="tensorrt-rtx on H100 lacks the gates beliefs: action error"):
        check_manifest(untested, is_proven=True)


def test_an_engine_whose_refusal_was_not_tested_is_refused() -> None:
    check_manifest(c_engine(), is_proven=True)
    with pytest.raises(BundleError, match=r"c on x86-64 lacks the gates encode: illegal values accepted, decode 2 lay"):
        check_manifest(without_gates(c_engine(), "illegal values"), is_proven=True)
    with pytest.raises(BundleError, match=r"c on x86-64 lacks the gates decode 3 layers: illegal values accepted; bui"):
        check_manifest(without_gates(c_engine(), "3 layers: illegal values"), is_proven=True)


def test_no_refusal_is_asked_for_of_chunks_that_the_validator_checks() -> None:
    """The generated C checks calls of up to 64 steps."""
    assert not any("illegal" in entry.gate for entry in c_engine(chunk_length=65).parity)
    check_manifest(c_engine(chunk_length=65), is_proven=True)
    with pytest.raises(BundleError, match="lacks the gates encode: illegal values accepted"):
        check_manifest(without_gates(c_engine(chunk_length=64), "illegal values"), is_proven=True)


@pytest.mark.parametrize("backend", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_an_engine_whose_marks_were_not_tested_is_refused(backend: str) -> None:
    check_manifest(marking_engine(backend), is_proven=True)
    with pytest.raises(BundleError, match=rf"{backend} on H100 lacks the gates encode: illegal values not marked, dec"):
        check_manifest(without_gates(marking_engine(backend), "illegal values"), is_proven=True)


@pytest.mark.parametrize("device", ["x86-64", ""])
def test_a_c_engine_that_passed_no_gate_is_refused_whatever_it_says_of_itself(device: str) -> None:
    manifest = c_engine(device=device)
    check_manifest(manifest, is_proven=True)
    bare = replace(manifest, parity=tuple(entry for entry in manifest.parity if entry.backend != "c"))
    check_manifest(bare, is_proven=False)
    with pytest.raises(BundleError, match="c on x86-64 lacks the gates encode: wrong tokens, encode: near-tie flips"):
        check_manifest(bare, is_proven=True)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("chunk_length", 1, 65_536),
        ("action_dim", 1, 65_536),
        ("latent_dim", 1, 65_536),
        ("hidden_width", 1, 65_536),
        ("num_layers", 1, 1_024),
        ("num_levels", 2, 16_777_216),
    ],
)
def test_sizes_that_no_model_has_are_refused(name: str, least: int, most: int) -> None:
    for wrong in (least - 1, most + 1):
        with pytest.raises(BundleError, match=f"{name} is {wrong}, not from {least} to {most}"):
            check_manifest(change_model(**{name: wrong})(complete_manifest()), is_proven=True)


@pytest.mark.parametrize("num_levels", [2, 2**24])
def test_levels_may_be_as_few_and_as_many_as_float32_tells_apart(num_levels: int) -> None:
    check_manifest(change_model(num_levels=num_levels)(without_beliefs(complete_manifest())), is_proven=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"action_units": (1e-12, 1e12, 1.0), "action_offset": (0.0, 0.0, 2.0**24)},
        {"action_offset": (0.0, 0.0, -(2.0**24)), "action_units": (1.0, 1.0, 1.0)},
        {"action_limit": 3.0, "action_offset": (-2.0, 0.0, 1.0), "action_units": (1.0, 3.0, 2.0)},
    ],
)
def test_units_offset_and_limit_may_be_at_their_limits(changes: dict[str, Any]) -> None:
    check_manifest(change_model(**changes)(complete_manifest()), is_proven=True)


@pytest.mark.parametrize(
    "changes",
    [{"targets": ()}, {"targets": ("8.9", "9.0")}, {"profile": (1, 1, 1)}, {"profile": (64, 64, 64)}],
    ids=str,
)
def test_engines_may_be_for_any_number_of_gpus_and_for_a_single_batch_size(
    changes: dict[str, Any], altered: Path
) -> None:
    rewrite(altered, change_engine(**changes))
    (engine,) = open_bundle(altered).manifest.engines
    assert engine == replace(engine, **changes)


def test_what_has_not_passed_its_gates_opens_only_to_run_them(altered: Path) -> None:
    rewrite(altered, lambda manifest: replace(manifest, parity=()))
    assert open_bundle(altered, is_proven=False).manifest.parity == ()
    refuse(altered, "calls proven what is not")


@pytest.mark.parametrize(
    "change",
    [
        change_parity(gate="encode: near-tie flips", value=792_000.0, limit=792_000.0),
        change_parity(gate="uint8 tokens, decode 2 layers: action error", value=1e-5, limit=1e-5),
        change_parity(gate="golden vectors, decode 2 layers: illegal values accepted"),
        change_parity(steps=1),
    ],
)
def test_gates_may_be_as_wide_as_this_projects(change: Callable[[Manifest], Manifest]) -> None:
    manifest = complete_manifest()
    check_manifest(replace(manifest, parity=(*change(manifest).parity[:1], *manifest.parity)), is_proven=True)


def complete_manifest(chunk_length: int = 2) -> Manifest:
    manifest = make_manifest(deploy(Recipe(chunk_length=chunk_length)))
    names = ["golden.npz", *(entry.file for entry in manifest.graphs)]
    return replace(manifest, files=dict.fromkeys(names, FileEntry("0" * 64, 1)))


def test_a_manifest_is_read_up_to_four_mebibytes(altered: Path) -> None:
    sparse(altered / MANIFEST_NAME, 4 * 1024**2)
    refuse(altered, "is not JSON")
    sparse(altered / MANIFEST_NAME, 4 * 1024**2 + 1)
    refuse(altered, "has 4194305 bytes, more than any manifest")


def test_the_action_limit_may_be_all_that_float32_holds(altered: Path) -> None:
    rewrite(altered, change_model(action_limit=FLOAT32_MAX))
    ActionTokenizer.load(altered).close()


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "./encoder.onnx", "a//b", "", "a\\b", "C:x"]
)
def test_names_that_may_lead_outside_are_refused(name: str, altered: Path) -> None:
    (altered.parent / "outside").write_bytes(b"secret")
    entry = FileEntry(hashlib.sha256(b"secret").hexdigest(), 6)
    rewrite(altered, lambda manifest: replace(manifest, files={**manifest.files, name: entry}))
    refuse(altered, "may lie outside the bundle")


@pytest.mark.parametrize("has_folders", [True, False], ids=["opened relative to a folder", "opened by path"])
def test_no_link_in_a_bundle_is_followed(
    has_folders: bool, altered: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_HAS_FOLDERS", has_folders)
    ActionTokenizer.load(altered).close()
    shutil.move(altered / "encoder.onnx", altered / "renamed.onnx")
    (altered / "encoder.onnx").symlink_to("renamed.onnx")
    refuse(altered, r"encoder\.onnx in .* cannot be read: encoder\.onnx is a link, .*copy the bundle again")
    (altered / "encoder.onnx").unlink()
    shutil.move(altered / "renamed.onnx", altered / "encoder.onnx")
    shutil.rmtree(altered / "reduce")
    (altered / "reduce").symlink_to(bundle / "reduce")
    refuse(altered, r"reduce/\w+\.onnx in .* cannot be read: reduce is a link, which may lead anywhere")


@pytest.mark.parametrize("file", [MANIFEST_NAME, "golden.npz"])
@pytest.mark.parametrize("has_folders", [True, False], ids=["opened relative to a folder", "opened by path"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(
    has_folders: bool, file: str, altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_HAS_FOLDERS", has_folders)
    (altered / file).unlink()
    os.mkfifo(altered / file)
    refuse(altered, "is not a regular file")


def test_a_pipe_that_comes_between_looking_and_opening_does_not_hang(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For systems that cannot open relative to a folder: the file is looked at first."""
    monkeypatch.setattr(reading, "_HAS_FOLDERS", False)
    open_file, target = os.open, altered / "golden.npz"

    def swap_then_open(path: Any, flags: int, **options: Any) -> int:
        if path == target and target.is_file():
            target.rename(altered / "aside")
            os.mkfifo(target)
        return open_file(path, flags, **options)

    monkeypatch.setattr(os, "open", swap_then_open)
    refuse(altered, "it was replaced while it was opened")


def sparse(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def test_a_file_of_terabytes_is_refused_unread(altered: Path) -> None:
    sparse(altered / "encoder.onnx", 2**43)
    refuse(altered, rf"encoder\.onnx in .* has {2**43} bytes, the manifest states")
    sparse(altered / MANIFEST_NAME, 2**43)
    refuse(altered, rf"has {2**43} bytes, more than any manifest")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([2**29 + 1], f"the largest of {2**29 + 1}; expected at most 1000, {2**30} and {2**29}"),
        ([2**43], f"the largest of {2**43}"),
        ([2**29, 2**29], rf"lists 18 files of 1\d+ bytes, the largest of {2**29};"),
        ([-1], "lists 17 files"),
        ([1] * 1000, "lists 1016 files"),
    ],
)
def test_no_more_is_read_than_a_machine_can_hold(sizes: list[int], message: str, altered: Path) -> None:
    entries = {f"engines/{number}": FileEntry("0" * 64, size) for number, size in enumerate(sizes)}
    rewrite(altered, lambda manifest: replace(manifest, files={**manifest.files, **entries}))
    for file in (altered / "encoder.onnx", altered / "decoder.onnx"):
        file.unlink()
    refuse(altered, message)


def test_as_much_as_is_allowed_is_allowed() -> None:
    manifest = make_manifest(deploy(Recipe()))
    listed = {
        "golden.npz": FileEntry("0" * 64, 2**29),
        **{
            entry.file: FileEntry("0" * 64, 2**29 // 9 if entry is manifest.graphs[0] else 0)
            for entry in manifest.graphs
        },
    }
    more = {f"engines/{number}": FileEntry("0" * 64, 0) for number in range(1000 - len(listed))}
    rest = FileEntry("0" * 64, 2**30 - sum(entry.size for entry in listed.values()))
    check_manifest(replace(manifest, files={**listed, **more, "engines/0": rest}), is_proven=True)


def test_the_same_content_under_many_names_takes_its_room_once(altered: Path) -> None:
    content = (altered / "golden.npz").read_bytes()
    names = [f"engines/{number}" for number in range(5)]
    for name in names:
        os.link(altered / "golden.npz", altered / name)
    entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    rewrite(altered, lambda manifest: replace(manifest, files={**manifest.files, **dict.fromkeys(names, entry)}))
    opened = open_bundle(altered)
    assert len({id(opened.content(name)) for name in (*names, "golden.npz")}) == 1


def test_three_hundred_links_to_one_file_take_no_more_memory_than_one(altered: Path) -> None:
    """Each is read and hashed, as it may be another file by then, and forgotten before the next."""
    content = bytes(2**18)
    names = [f"engines/{number}" for number in range(300)]
    (altered / names[0]).write_bytes(content)
    for name in names[1:]:
        os.link(altered / names[0], altered / name)
    entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))

    def peak_with(*listed: str) -> int:
        files = dict.fromkeys(listed, entry)
        rewrite(altered, lambda manifest: replace(manifest, files={**manifest.files, **files}))
        tracemalloc.start()
        try:
            open_bundle(altered)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    one, all_of_them = peak_with(names[0]), peak_with(*names)
    # Of 300 files: the one that is read while another is kept, and the entries of a longer manifest.
    assert all_of_them - one < 10 * len(content)


def test_a_bundle_that_is_itself_behind_a_link_opens(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    ActionTokenizer.load(tmp_path / "current").close()


# --- what is no bundle ------------------------------------------------------------------------------------------------


def test_what_is_no_bundle_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "found nothing"),
        ("file", "found a file, not a folder"),
        ("empty", "is not a bundle: it has no file manifest.json"),
    ):
        refuse(tmp_path / name, message)
        selftest_refuses(tmp_path / name, message, capsys)
    with pytest.raises(InvalidInputError, match="the bundle is ''; expected the name of a file or folder"):
        open_bundle("")


def test_files_that_are_none_are_refused_unread(altered: Path) -> None:
    path = altered / "encoder.onnx"
    path.unlink()
    path.mkdir()
    refuse(altered, r"encoder\.onnx in .* is not a regular file")
    path.rmdir()
    os.mkfifo(path)
    refuse(altered, r"encoder\.onnx in .* is not a regular file")


def test_links_in_a_circle_are_refused(altered: Path) -> None:
    path = altered / "encoder.onnx"
    path.unlink()
    path.symlink_to("encoder.onnx")
    refuse(altered, r"encoder\.onnx")


@pytest.mark.parametrize("file", FILES)
def test_unreadable_files_are_refused(file: str, altered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is played."""
    open_file = os.open

    def refuse_one(path: Any, flags: int, **options: Any) -> int:
        if "dir_fd" in options and str(path) == file.rpartition("/")[2]:
            raise PermissionError(13, "Permission denied")
        return open_file(path, flags, **options)

    monkeypatch.setattr(os, "open", refuse_one)
    refuse(altered, "cannot be read: .*Permission denied; check its permissions")


def test_a_folder_that_cannot_be_opened_is_refused(altered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_all(*_arguments: Any, **_options: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse_all)
    refuse(altered, f"{altered} cannot be read: .*Permission denied; check its permissions")


def test_unlisted_files_are_shown_and_never_read(altered: Path) -> None:
    os.mkfifo(altered / "blocks.whoever.reads.it")
    (altered / "engines" / "extra.engine").write_bytes(b"x")
    opened = open_bundle(altered)
    assert unlisted_files(opened.folder, opened.manifest.files) == ("blocks.whoever.reads.it", "engines/extra.engine")
    with pytest.raises(BundleError, match=r"lists no file 'engines/extra\.engine'"):
        opened.content("engines/extra.engine")


# --- wrong weights in consistent bundles ------------------------------------------------------------------------------


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Rounded to TF32's 10 explicit bits of mantissa, to nearest."""
    bits = values.view(np.uint32).astype(np.uint64) + 0x1000
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def edit_weights(onnx_bytes: bytes, edit: Callable[[str, np.ndarray], np.ndarray]) -> bytes:
    """`edit` gets every float32 weight by name and returns what takes its place."""
    model = onnx.load_model_from_string(onnx_bytes)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name.endswith((".weight", ".bias")):
            tensor.CopyFrom(numpy_helper.from_array(edit(tensor.name, values.copy()), tensor.name))
    return bytes(model.SerializeToString(deterministic=True))


def perturb_one(layer: str) -> Callable[[str, np.ndarray], np.ndarray]:
    def edit(name: str, values: np.ndarray) -> np.ndarray:
        if name == f"{layer}.weight":
            values[0, 0] += 1e-3
        return values

    return edit


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(DeployMode))
@pytest.mark.parametrize("file", ["encoder.onnx", "decoder.onnx", "decoder_l2.onnx"])
@pytest.mark.parametrize(
    "edit",
    [perturb_one("inner"), perturb_one("outer"), lambda _name, values: to_tf32(values)],
    ids=["inner weight off by 1e-3", "outer weight off by 1e-3", "tf32"],
)
def test_wrong_weights_are_found_by_replay_though_every_hash_is_right(
    mode: DeployMode,
    file: str,
    edit: Callable[[str, np.ndarray], np.ndarray],
    bundle_of: Callable[[Recipe], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What a single weight does to tokens shows where latents are close to an edge.
    folder = Path(shutil.copytree(bundle_of(Recipe(mode=mode, num_chunks=64, pool=1000)), tmp_path / "bundle"))
    (folder / file).write_bytes(edit_weights((folder / file).read_bytes(), edit))
    rehash(folder)
    gate = {
        "encoder.onnx": "wrong tokens",
        "decoder.onnx": "decode 3 layers",
        "decoder_l2.onnx": "decode 2 layers",
    }[file]
    open_bundle(folder)
    refuse(folder, f"✗ .*{gate}", SelfTestError)
    selftest_refuses(folder, "do not use it", capsys, status=1)


@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.RECOVERED])
def test_swapped_layers_are_found_by_replay(
    mode: DeployMode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployed = deploy(Recipe(mode=mode))

    def swap(name: str, values: np.ndarray) -> np.ndarray:
        if name != "inner.weight":
            return values
        layers = values.reshape(len(values), -1, 3)
        return np.ascontiguousarray(layers[..., [1, 0, 2]]).reshape(values.shape)

    deployed.graphs["decoder.onnx"] = edit_weights(export_graphs(deployed)["decoder.onnx"], swap)
    folder = write_bundle(tmp_path / "bundle", deployed)
    refuse(folder, "✗ decode 3 layers", SelfTestError)
    selftest_refuses(folder, "✗ decode 3 layers", capsys, status=1)


def test_swapped_conditioning_constants_are_found_by_replay(tmp_path: Path) -> None:
    deployed = deploy(Recipe())
    quantizer = deployed.exported.quantizer
    for constants in (quantizer.mean, quantizer.scale):
        constants[[0, 1]] = constants[[1, 0]]
    refuse(write_bundle(tmp_path / "bundle", deployed), "✗ encode.*wrong tokens", SelfTestError)


def test_another_model_in_a_consistent_bundle_is_found_by_replay(tmp_path: Path) -> None:
    deployed = deploy(Recipe(seed=0))
    deployed.exported = deploy(Recipe(seed=1)).reference
    refuse(write_bundle(tmp_path / "bundle", deployed), "✗ encode.*wrong tokens", SelfTestError)


@pytest.mark.parametrize(
    "file", ["engines/c/rfsq_tokenizer.h", "engines/c/rfsq_tokenizer.c", "engines/cuda/rfsq_tokenizer.cu"]
)
def test_a_source_that_contradicts_the_manifest_is_refused(file: str, altered: Path) -> None:
    (altered / file).parent.mkdir()
    (altered / file).write_bytes(b"of no model")
    entry = FileEntry("", 0)
    rewrite(altered, lambda manifest: replace(manifest, files={**manifest.files, file: entry}))
    rehash(altered)
    refuse(altered, f"the manifest and the files beside it are not of one bundle: {file} has ")


def test_a_graph_of_other_sizes_is_refused(altered: Path) -> None:
    other = export_graphs(deploy(Recipe(chunk_length=5)))
    (altered / "encoder.onnx").write_bytes(other["encoder.onnx"])
    rehash(altered)
    refuse(altered, r"encoder\.onnx has the tensors", TokenizerError)


def test_a_graph_that_is_none_is_refused(altered: Path) -> None:
    (altered / "encoder.onnx").write_bytes(b"not a graph")
    rehash(altered)
    refuse(altered, r"ONNX Runtime .* refuses encoder\.onnx", TokenizerError)


def test_a_manifest_without_files_is_refused(altered: Path) -> None:
    rewrite(altered, lambda manifest: replace(manifest, files={}))
    refuse(altered, "lists no hash for them")


def test_the_model_entry_says_which_modes_have_stats(bundle: Path) -> None:
    model = open_bundle(bundle).manifest.model
    assert isinstance(model, ModelEntry)
    facts = {
        mode.value: (replace(model, mode=mode.value).has_stats, replace(model, mode=mode.value).is_step_coupled)
        for mode in DeployMode
    }
    assert facts == {
        "none": (False, False),
        "dynamic": (True, True),
        "calibrated": (False, False),
        "recovered": (False, True),
    }


@pytest.mark.parametrize("way", ["copied over", "renamed over", "the same bundle anew"])
def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(
    way: str, bundle_of: Callable[[Recipe], Path], bundle: Path, altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build renames whole folders; a reader opens file by file."""
    other, reads = bundle if way == "the same bundle anew" else bundle_of(Recipe(seed=7)), []
    opened = reading.OpenFolder.opened

    def replace_then_open(self: Any, name: str) -> Any:
        reads.append(name)
        if reads.count("golden.npz") == 1 and name == "golden.npz":
            if way == "copied over":
                shutil.copytree(other, altered, dirs_exist_ok=True)
            else:
                shutil.rmtree(altered)
                shutil.copytree(other, altered)
        return opened(self, name)

    monkeypatch.setattr(reading.OpenFolder, "opened", replace_then_open)
    found = open_bundle(altered)
    assert reads.count("golden.npz") == 2
    assert found.manifest == open_bundle(other).manifest
    assert found.content("golden.npz") == (other / "golden.npz").read_bytes()


def test_a_folder_that_is_swapped_while_it_is_read_does_not_mix(
    bundle_of: Callable[[Recipe], Path], altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever takes its name, the folder that was opened is read to its end."""
    original, other = open_bundle(altered), bundle_of(Recipe(seed=7))
    opened = reading.OpenFolder.opened

    def swap_then_open(self: Any, name: str) -> Any:
        if name == "golden.npz":
            altered.rename(altered.with_name("aside"))
            shutil.copytree(other, altered)
        return opened(self, name)

    monkeypatch.setattr(reading.OpenFolder, "opened", swap_then_open)
    found = open_bundle(altered)
    assert found.manifest == original.manifest
    assert all(found.content(name) == original.content(name) for name in found.manifest.files)


def test_a_bundle_that_is_replaced_all_the_time_is_given_up(
    bundle_of: Callable[[Recipe], Path], altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = itertools.cycle([bundle_of(Recipe(seed=7)), bundle_of(Recipe())])
    opened = reading.OpenFolder.opened

    def replace_then_open(self: Any, name: str) -> Any:
        if name == "golden.npz":
            shutil.copytree(next(others), altered, dirs_exist_ok=True)
        return opened(self, name)

    monkeypatch.setattr(reading.OpenFolder, "opened", replace_then_open)
    with pytest.raises(BundleError, match="was replaced 4 times while it was read"):
        open_bundle(altered)
