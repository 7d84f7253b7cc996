"""Chunk tokens beside others: what is compared, and that two kinds of tokens are never taken for each other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle import compatibility
from rfsq.runtime.bundle.compatibility import compare_manifests
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.manifest import Manifest
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.qualification import compat
from rfsq.runtime.qualification.agreement import FLIPPED_CHUNKS, Kind, Measurement, compare
from tests.bundles import Recipe
from tests.chunk_bundles import SMALL, ChunkRecipe, write_chunk_bundle
from tests.once import once
from tests.runtime.datasets.samples import random_episodes, write_npz

#: No whole number of chunks of 4; one shorter than a chunk.
LENGTHS = (30, 3, 28)
T, L = SMALL.chunk_length, SMALL.num_tokens


@pytest.fixture(scope="module")
def episodes() -> list[np.ndarray]:
    return random_episodes(LENGTHS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, episodes: list[np.ndarray]) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "episodes.npz", episodes)


@pytest.fixture(scope="module")
def chunk_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "chunk bundle", lambda path: write_chunk_bundle(path, ChunkRecipe()))


def test_chunk_tokens_are_interchangeable_with_themselves(
    chunk_bundle: Path, data: Path, episodes: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compat.main([str(chunk_bundle), str(chunk_bundle), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "✓ interchangeable (proven: the same fingerprint" in printed
    assert "equal tokens  token 0 100.000%  token 4 100.000%  token 8 100.000%" in printed
    assert "chunks with a token that differs  0 of 16" in printed
    measured = compare(chunk_bundle, chunk_bundle, open_source(data)).measurement
    assert (measured.steps, measured.chunks, measured.equal) == (61, 8 + 1 + 7, (1.0,) * L)
    # By hand: each episode is cut from its first step on, and its last step fills up the last chunk.
    errors = {1: [], 5: [], L: []}
    with ActionTokenizer.load(chunk_bundle) as tokenizer:
        for actions in episodes:
            filled = np.concatenate([actions, np.repeat(actions[-1:], -len(actions) % T, axis=0)]).reshape(-1, T, 3)
            tokens = tokenizer.encode(filled)
            for prefix, found in errors.items():
                found.append(tokenizer.decode(tokens[:, :prefix]).reshape(-1, 3)[: len(actions)] - actions)
        units = np.array(tokenizer.model.action_units)
    assert [entry.layers for entry in measured.crossed("OLD")] == [1, 5, L]
    for entry in measured.decodings:
        expected = np.square(np.concatenate(errors[entry.layers]).astype(float) / units).mean()
        assert entry.mse == pytest.approx(expected, rel=1e-6)
        assert entry.from_own == 0


@pytest.mark.parametrize("is_old", [True, False])
def test_two_kinds_of_tokens_are_never_each_others(
    is_old: bool,
    bundle_of: Callable[[Recipe], Path],
    chunk_bundle: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = (chunk_bundle, bundle_of(Recipe())) if is_old else (bundle_of(Recipe()), chunk_bundle)
    for flags in ([], ["--force"], ["--verbose"]):
        assert compat.main([*map(str, pair), "--data", str(data), *flags]) == 1
        assert "other numbers of other things" in capsys.readouterr().out
    found = compare(*pair, open_source(data), force=True)
    assert found.verdict.kind is Kind.INCOMPATIBLE
    assert found.measurement.equal == ()
    # Each is judged all the same, by its own tokens.
    judged = {(entry.tokens, entry.decoder, entry.layers) for entry in found.measurement.decodings}
    chunk, step = ("OLD", "NEW") if is_old else ("NEW", "OLD")
    assert judged == {(chunk, chunk, 1), (chunk, chunk, 5), (chunk, chunk, L), (step, step, 2), (step, step, 3)}


def test_other_constants_are_other_tokens(chunk_bundle: Path, data: Path, tmp_path: Path) -> None:
    other = write_chunk_bundle(tmp_path / "other", ChunkRecipe(seed=1))
    found = compare(chunk_bundle, other, open_source(data), force=True)
    assert found.verdict.kind is Kind.INCOMPATIBLE
    assert found.measurement.differing > 1
    assert len(found.measurement.crossed("OLD")) == 3


def fitted(manifest: Manifest, fingerprint: str, source: str, sha256: str, **config: object) -> Manifest:
    """The bundle as of a fit to these demonstrations with these settings."""
    checkpoint = {"data": {"source": source, "sha256": sha256}, "config": config}
    return replace(manifest, fingerprint=fingerprint * 64, provenance={"checkpoint": checkpoint})


def test_what_sets_two_fits_apart_is_said(chunk_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_bundle(chunk_bundle).manifest
    # Each fit writes an encoder of its own.
    monkeypatch.setattr(compatibility, "_encoder_hashes", lambda manifest: {manifest.fingerprint})
    old = fitted(manifest, "a", "cups.npz", "1", seed=0, order="own")
    own = "each has the constants of its own fit, to "
    for new, said in (
        (fitted(manifest, "b", "pans.npz", "2", seed=0, order="own"), "cups.npz and to pans.npz"),
        (
            fitted(manifest, "b", "moved.npz", "1", seed=3, order="own", tokens=16),
            "the same demonstrations (cups.npz), with other settings: seed 0 and 3, tokens default and 16",
        ),
        (
            fitted(manifest, "b", "cups.npz", "1", seed=0, order="own"),
            "the same demonstrations (cups.npz) with the same settings, by other versions of the fit or on other "
            "machines",
        ),
        (
            replace(manifest, fingerprint="b" * 64, provenance={"checkpoint": {"data": 7}}),
            "cups.npz and to unknown demonstrations",
        ),
    ):
        assert compare_manifests(old, new).differences == (own + said,)
    shallow = replace(old, model=replace(old.model, num_tokens=6), fingerprint="b" * 64)
    assert "L is 9 in the old and 6 in the new bundle" in compare_manifests(old, shallow).differences


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (replace(SMALL, chunk_length=2), "T is 4 in OLD, 2 in NEW: no token of one corresponds"),
        (replace(SMALL, token_bits=7), "the vocabulary is 256 in OLD, 128 in NEW: no token of one corresponds"),
        (replace(SMALL, num_tokens=6), "L is 9 in OLD, 6 in NEW: tokens are compared as far as both have them"),
    ],
)
def test_what_cannot_be_compared_is_said(
    sizes: object, said: str, chunk_bundle: Path, data: Path, tmp_path: Path
) -> None:
    other = write_chunk_bundle(tmp_path / "other", ChunkRecipe(sizes))  # type: ignore[arg-type]
    found = compare(chunk_bundle, other, open_source(data))
    assert found.verdict.kind is Kind.INCOMPATIBLE
    assert any(said in line for line in found.measurement.remarks)
    assert len(found.measurement.whole()) == 2


def test_rounding_makes_other_tokens_of_few_chunks_alone() -> None:
    def measured(differing: int) -> bool:
        return Measurement(80_000, (0.99,), differing, (), (), chunks=10_000).has_same_tokens()

    most = int(10_000 * FLIPPED_CHUNKS)
    assert measured(most)
    assert not measured(most + 1)
