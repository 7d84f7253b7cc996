"""Files that say otherwise than the manifest beside them are seen before anything is loaded, right hashes or not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.folder import check_contents
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, Manifest
from tests.bundles import Recipe, deploy, export_graphs, generate_c, generate_cuda, make_manifest
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

OTHER = "de" * 32
GRAPHS = ["encoder.onnx", "gemm_marked/encoder.onnx", "reduce/encoder.onnx"]


@dataclass
class Parts:
    manifest: Manifest
    contents: dict[str, bytes]

    def check(self) -> None:
        check_contents(self.manifest, self.contents)

    def edit(self, file: str, old: str, new: str) -> None:
        text = self.contents[file].decode()
        assert old in text
        self.contents[file] = text.replace(old, new).encode()

    def change_model(self, **changes: object) -> None:
        self.manifest = replace(self.manifest, model=replace(self.manifest.model, **changes))  # type: ignore[arg-type]


def parts_of(mode: DeployMode = DeployMode.CALIBRATED) -> Parts:
    deployed = deploy(Recipe(mode=mode))
    generated = generate_c(deployed)
    sources = {
        C_HEADER: generated.header.encode(),
        C_SOURCE: generated.source.encode(),
        CUDA_SOURCE: generate_cuda(deployed).encode(),
    }
    return Parts(make_manifest(deployed), {**export_graphs(deployed), **sources})


@pytest.mark.parametrize("mode", list(DeployMode))
def test_what_a_build_writes_does_not_contradict_itself(mode: DeployMode) -> None:
    parts_of(mode).check()


def test_nor_does_what_it_writes_of_chunk_tokens_and_other_sizes_are_seen() -> None:
    deployed = deployed_chunk_tokens(ChunkRecipe())
    generated = deployed.c_source()
    graphs = {entry.file: content for entry, content in deployed.graphs()}
    sources = {C_HEADER: generated.header, C_SOURCE: generated.source, CUDA_SOURCE: deployed.cuda_source()}
    contents = {**graphs, **{file: text.encode() for file, text in sources.items()}}
    manifest = replace(make_manifest(deploy(Recipe())), model=deployed.model, fingerprint=deployed.fingerprint)
    Parts(manifest, contents).check()
    for old, new in (
        ("T = 4, A = 3, L = 9;", "T = 3, A = 4, L = 9;"),
        ("CLASSES = 5, ", "CLASSES = 6, "),
        ("TOKEN_BITS = 8, ", "TOKEN_BITS = 9, "),
        (" decode_l9_uint16_few(", " decode_l8_uint16_few("),
    ):
        parts = Parts(manifest, dict(contents))
        parts.edit(CUDA_SOURCE, old, new)
        with pytest.raises(BundleError, match=rf"{CUDA_SOURCE} has no `"):
            parts.check()


@pytest.mark.parametrize("file", [C_HEADER, C_SOURCE, CUDA_SOURCE])
def test_another_fingerprint_is_seen_in_every_source(file: str) -> None:
    parts = parts_of()
    parts.edit(file, parts.manifest.fingerprint, OTHER)
    with pytest.raises(BundleError, match=rf"{file} has .*{OTHER}.*, the manifest .*{parts.manifest.fingerprint}"):
        parts.check()


@pytest.mark.parametrize("file", [C_HEADER, C_SOURCE, CUDA_SOURCE])
def test_a_manifest_with_another_fingerprint_is_seen_by_each_source_alone(file: str) -> None:
    parts = parts_of()
    parts.manifest = replace(parts.manifest, fingerprint=OTHER)
    graphs = {name: content for name, content in parts.contents.items() if name.endswith(".onnx")}
    parts.contents = {**graphs, file: parts.contents[file]}
    with pytest.raises(BundleError, match=rf"{file} has .*, the manifest .*{OTHER}"):
        parts.check()


@pytest.mark.parametrize(
    ("true", "stated"),
    [
        (true, stated)
        for true in DeployMode
        for stated in DeployMode
        if true is not stated and true.has_stats == stated.has_stats
    ],
)
def test_another_mode_is_seen_in_the_header(true: DeployMode, stated: DeployMode) -> None:
    parts = parts_of(true)
    parts.change_model(mode=stated.value)
    with pytest.raises(BundleError, match=f'has RFSQ_MODE "{true.value}", the manifest "{stated.value}"'):
        parts.check()


@pytest.mark.parametrize("file", [*GRAPHS, C_SOURCE, CUDA_SOURCE])
@pytest.mark.parametrize(
    ("true", "stated", "found"),
    [
        (DeployMode.CALIBRATED, DeployMode.RECOVERED, "constants"),
        (DeployMode.NONE, DeployMode.RECOVERED, "constants"),
        (DeployMode.RECOVERED, DeployMode.CALIBRATED, "the statistics of every step"),
    ],
)
def test_the_other_kind_of_quantiser_is_seen_in_every_encoder(
    file: str, true: DeployMode, stated: DeployMode, found: str
) -> None:
    right, wrong = parts_of(stated), parts_of(true)
    right.contents[file] = wrong.contents[file]
    with pytest.raises(BundleError, match=f"{file} normalises by {found}, which no '{stated.value}' encoder does"):
        right.check()


@pytest.mark.parametrize(
    "changes",
    [{"chunk_length": 5}, {"action_dim": 4}, {"latent_dim": 5}, {"num_layers": 4}, {"num_levels": 6}],
    ids=str,
)
def test_other_sizes_are_seen_in_the_header(changes: dict[str, int]) -> None:
    parts = parts_of()
    ((name, value),) = changes.items()
    true = getattr(parts.manifest.model, name)
    parts.change_model(**changes)
    with pytest.raises(BundleError, match=f"has RFSQ_{name.upper()} {true}, the manifest {value}"):
        parts.check()


def test_other_sizes_are_seen_in_the_cuda_source() -> None:
    parts = parts_of()
    parts.edit(CUDA_SOURCE, "H = 8;", "H = 9;")
    with pytest.raises(BundleError, match="has no `A = 3, D = 4, L = 3, K = 5, H = 8;`"):
        parts.check()


def test_sources_without_an_encoder_or_a_decoder_are_seen() -> None:
    parts = parts_of()
    parts.contents[C_SOURCE] = b"int rfsq_encode(void){return 0;}\n"
    parts.edit(CUDA_SOURCE, "decode_l2_int32_few(", "decode_l1_int32_few(")
    with pytest.raises(BundleError) as refused:
        parts.check()
    assert f"{C_SOURCE} has no `int rfsq_decode_l2(`, no `int rfsq_decode_l3(`" in str(refused.value)
    assert f"{CUDA_SOURCE} has no `decode_l2_int32_few(`" in str(refused.value)


def test_a_header_that_states_nothing_is_none() -> None:
    parts = parts_of()
    parts.contents[C_HEADER] = b"\xff"
    with pytest.raises(BundleError, match="has RFSQ_FINGERPRINT nowhere"):
        parts.check()


def test_sources_that_were_generated_before_they_said_so_are_good() -> None:
    parts = parts_of()
    parts.edit(C_HEADER, '#define RFSQ_MODE "calibrated"\n', "")
    for file in (C_SOURCE, CUDA_SOURCE):
        parts.edit(file, f"; fingerprint {parts.manifest.fingerprint}.", ".")
    parts.check()
