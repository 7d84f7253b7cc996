"""The manifest is read back only exactly as it was written."""

import hashlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.manifest import ParityEntry, graph_tensors, manifest_text, parse_manifest
from tests.bundles import Recipe, deploy, engine_entry, make_manifest, quality_of
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

MANIFEST = make_manifest(deploy(Recipe()))
TEXT = manifest_text(MANIFEST)


def test_reading_gives_what_was_written() -> None:
    assert parse_manifest(TEXT) == MANIFEST


def test_a_model_is_shown_in_one_line() -> None:
    assert repr(MANIFEST.model) == "StepModel(calibrated, T 2, A 3, D 4, L 3, K 5, hidden 8, decodes 2, 3 layers)"
    chunk = deployed_chunk_tokens(ChunkRecipe()).model
    assert repr(chunk) == "ChunkModel(chunk, T 4, A 3, 9 tokens of 256, 6 classes, decodes any first of 9 tokens)"


def test_what_the_tokens_are_worth_is_read_back_and_may_be_missing() -> None:
    assert "quality" not in json.loads(TEXT)
    rated = replace(MANIFEST, quality=quality_of(MANIFEST))
    assert parse_manifest(manifest_text(rated)) == rated


def test_what_the_tokens_are_worth_says_by_what_it_is_known() -> None:
    quality = quality_of(MANIFEST)
    measured = replace(quality, fidelity=replace(quality.fidelity, steps=12_345))
    assert re.fullmatch(r"good; in robot units: .*, on 12,345 steps of own\.npz \(held-out episodes\)", measured.line)


def test_the_manifest_states_the_hash_of_all_its_other_lines() -> None:
    text = manifest_text(replace(MANIFEST, provenance={"operator": "Jürgen"}))
    (stated,) = re.findall('^ "manifest_sha256": "(.*)",$', text, re.MULTILINE)
    assert text.endswith("\n}\n")
    rest = text.replace(f' "manifest_sha256": "{stated}",\n', "").removesuffix("\n")
    assert hashlib.sha256(rest.encode()).hexdigest() == stated


def test_counts_are_numbers_like_any_other() -> None:
    entry = ParityEntry("onnxruntime", "wrong tokens", 8, 0, 0, "", "CPU")
    assert parse_manifest(manifest_text(replace(MANIFEST, parity=(entry,)))).parity == (entry,)


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_no_character_can_change_unnoticed(position: int, character: str) -> None:
    changed = TEXT[:position] + character + TEXT[position + 1 :]
    if changed != TEXT:
        with pytest.raises(BundleError):
            parse_manifest(changed)


@pytest.mark.slow
def test_no_digit_can_change_unnoticed() -> None:
    for match in re.finditer(r"\d", TEXT):
        digit = str((int(match[0]) + 1) % 10)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            parse_manifest(TEXT[: match.start()] + digit + TEXT[match.end() :])


def test_truncation_anywhere_is_refused() -> None:
    for length in range(0, len(TEXT), 7):
        with pytest.raises(BundleError, match=r"manifest\.json"):
            parse_manifest(TEXT[:length])


def with_content(**changes: Any) -> str:
    return json.dumps({**json.loads(TEXT), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_content(quality=None), r"quality is None; expected an object"),
        (with_content(surprise=1), r"unknown keys \['surprise'\]"),
        (with_content(schema_version=1), r"schema version 1; this runtime reads 2: build the bundle again with this"),
        (with_content(schema_version=2.0), "schema_version is 2.0; expected an integer"),
        (with_content(fingerprint=7), r"manifest\.json\.fingerprint is 7; expected text"),
        (
            with_content(graphs={}),
            r"manifest\.json\.graphs is {}; expected a list",
        ),
        (with_content(model=None), r"manifest\.json\.model is None; expected an object"),
        (with_content(schema_version=True), "schema version True"),
        (
            TEXT.replace('"chunk_length": 2', '"chunk_length": true'),
            r"model\.chunk_length is True; expected an integer",
        ),
        (TEXT.replace('"num_levels": 5', '"num_levels": 5.0'), r"model\.num_levels is 5\.0; expected an integer"),
        (with_content(parity=[1]), r"parity\[0\] is 1; expected an object"),
        (with_content(tools=[]), r"tools is \[\]; expected an object"),
        (with_content(tools={"numpy": 2}), r"tools\['numpy'\] is 2; expected text"),
        (with_content(files={"encoder.onnx": {"size": 1}}), r"files\['encoder.onnx'\] lacks the keys \['sha256'\]"),
        (with_content(), "was altered after it was written"),
        ("[]", "schema version 'list'"),
        (with_content(provenance={"deep": json.loads("[" * 600 + "]" * 600)}), "nests deeper than 32 levels"),
        (with_content(schema_version=json.loads("[" * 900 + "]" * 900)), "nests deeper than 32 levels"),
        (with_content(schema_version=[7] * 1000), r"schema version \[7, 7, .{180,200}… *; this runtime reads 2"),
        ("[" * 100_000, "is not JSON"),
        ('{"schema_version": 2, "schema_version": NaN}', "NaN is no JSON number"),
        (with_content(provenance={"half": "\ud800"}), "holds what no build writes"),
        (TEXT.replace(f"{MANIFEST.model.action_limit}", "1e999"), "holds what no build writes"),
    ],
)
def test_other_content_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_manifest(text)


def test_provenance_may_nest_as_deep_as_the_limit() -> None:
    # The manifest itself and the provenance are two levels; what is empty has none.
    deepest = json.loads("[" * 30 + "]" * 30)
    manifest = replace(MANIFEST, provenance={"deep": deepest})
    assert parse_manifest(manifest_text(manifest)) == manifest
    with pytest.raises(BundleError, match="nests deeper"):
        parse_manifest(manifest_text(replace(MANIFEST, provenance={"deep": [deepest]})))


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BundleError, match=r"model\.mode is 'guessed'; expected one of none, dynamic"):
        parse_manifest(TEXT.replace('"calibrated"', '"guessed"'))


def test_the_graph_of_a_prefix_is_found_or_missed_by_name() -> None:
    assert MANIFEST.graph("decoder", 2).file == "decoder_l2.onnx"
    assert MANIFEST.graph("decoder", 2, "reduce").file == "reduce/decoder_l2.onnx"
    with pytest.raises(BundleError, match="no decoder for 1 layers in the form 'gemm'"):
        MANIFEST.graph("decoder", 1)
    lacking = replace(MANIFEST, graphs=tuple(entry for entry in MANIFEST.graphs if entry.form != "reduce"))
    with pytest.raises(BundleError, match="no decoder for 3 layers in the form 'reduce'"):
        lacking.graph("decoder", 3, "reduce")


@pytest.mark.parametrize(("form", "folder"), [("gemm", ""), ("gemm_marked", "gemm_marked/"), ("reduce", "reduce/")])
def test_the_graphs_of_a_form_come_in_one_order_whatever_the_manifests(form: str, folder: str) -> None:
    names = [f"{folder}{name}.onnx" for name in ("encoder", "decoder_l2", "decoder")]
    for graphs in (MANIFEST.graphs, MANIFEST.graphs[::-1]):
        assert [entry.file for entry in replace(MANIFEST, graphs=graphs).graphs_of(form)] == names


def test_a_form_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BundleError, match=r"graphs\[0\]\.form is 'sparse'; expected one of gemm, gemm_marked, reduce"):
        parse_manifest(TEXT.replace('"form": "gemm"', '"form": "sparse"', 1))


def test_stats_belong_to_dynamic_models_alone() -> None:
    model = MANIFEST.model
    names = [tensor.name for side in graph_tensors(model, "decoder", 2) for tensor in side]
    assert names == ["tokens", "actions"]
    inputs, outputs = graph_tensors(replace(model, mode="dynamic"), "decoder", 2)
    assert [(tensor.name, tensor.shape) for tensor in (*inputs, *outputs)] == [
        ("tokens", (-1, 2, 4, 2)),
        ("stats", (-1, 2, 2, 2)),
        ("actions", (-1, 2, 3)),
    ]


@pytest.mark.parametrize("profile", [[], [1, 2], [1, 2, 3, 4]])
def test_a_tuple_of_another_length_is_refused(profile: list[int]) -> None:
    with_engine = json.loads(manifest_text(replace(MANIFEST, engines=(engine_entry(b""),))))
    with_engine["engines"][0]["profile"] = profile
    with pytest.raises(BundleError, match=r"engines\[0\]\.profile is .*; expected a list of 3"):
        parse_manifest(json.dumps(with_engine))
