"""Whether one bundle can stand in for another: what the manifests prove, what is measured, and what is concluded."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.runtime import ActionTokenizer, IncompatibleTokensError, require_compatible
from rfsq.runtime.bundle.compatibility import compare_manifests
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.manifest import MANIFEST_NAME, Manifest, manifest_text
from rfsq.runtime.datasets import episodes
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.qualification import agreement, compat
from rfsq.runtime.qualification.agreement import Comparison, Kind, compare
from tests.bundles import SMALL, Deployed, Recipe, deploy, random_actions, write_bundle
from tests.runtime.datasets.samples import write_robomimic

ROOT = Path(__file__).parents[3]
BundleOf = Callable[[Recipe], Path]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 steps: no whole number of chunks."""
    path = tmp_path_factory.mktemp("data") / "episodes.npz"
    np.savez(path, actions=random_actions(Recipe(), 31).reshape(-1, 3)[:61])
    return path


def manifest_of(folder: Path) -> Manifest:
    return open_bundle(folder).manifest


def rewritten(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the bundle, its manifest changed and signed again."""
    target.mkdir()
    for file in folder.rglob("*"):
        if file.is_file():
            copied = target / file.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())
    text = manifest_text(replace(manifest_of(folder), **changes))
    (target / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return target


def built_from(sha256: str = "ab" * 32, **tensors: str) -> dict[str, Any]:
    """The provenance of a bundle from this checkpoint; tensors: hashes that differ from the usual."""
    names = [
        f"{part}.{index}.{kind}" for part in ("encoder", "decoder") for index in (0, 2) for kind in ("weight", "bias")
    ]
    hashes = dict.fromkeys(names, "cd" * 32) | {name.replace("_", "."): value for name, value in tensors.items()}
    return {"checkpoint": {"checkpoint_sha256": sha256, "tensors": hashes}}


def unquantised_by_constants(recipe: Recipe, scale: float = 1) -> Deployed:
    """`calibrated`, with the constants that naive tokens have: mean 0 and scale 1."""
    naive = deploy(recipe).reference
    shape = (recipe.config.num_layers, recipe.config.latent_dim)
    constants = ConditioningConstants(torch.zeros(shape), torch.full(shape, scale))
    model = ActionAutoencoder(recipe.config, Conditioning.CALIBRATED, constants=constants, normaliser=naive.normaliser)
    model.load_state_dict(naive.state_dict())
    model.double().eval().requires_grad_(False)
    return Deployed(replace(recipe, mode=DeployMode.CALIBRATED), model, model)


def run(old: Path, new: Path, data: Path, *flags: str) -> tuple[Kind, Comparison]:
    """The verdict, and what it is based on; the statuses of the command are checked."""
    status = compat.main([str(old), str(new), "--data", str(data), *flags])
    found = compare(old, new, open_source(data), force="--force" in flags)
    assert status == (0 if found.verdict.kind is Kind.INTERCHANGEABLE else 1)
    return found.verdict.kind, found


# --- what the manifests prove -----------------------------------------------------------------------------------------


def test_a_bundle_is_interchangeable_with_itself(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, found = run(bundle, bundle, data)
    assert kind is Kind.INTERCHANGEABLE
    assert found.measurement.equal == (1.0, 1.0, 1.0)
    assert (found.measurement.steps, found.measurement.differing, found.measurement.remarks) == (61, 0, ())
    fingerprint = manifest_of(bundle).fingerprint[:16]
    assert f"✓ interchangeable (proven: the same fingerprint, {fingerprint})" in capsys.readouterr().out


def test_the_recovered_decoder_replaces_the_published_one(
    bundle_of: BundleOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamic, recovered = (bundle_of(Recipe(mode=mode)) for mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED))
    old = rewritten(dynamic, tmp_path / "old", provenance=built_from())
    new = rewritten(recovered, tmp_path / "new", provenance=built_from())
    kind, found = run(old, new, data)
    assert kind is Kind.DECODER
    assert found.measurement.equal == (1.0, 1.0, 1.0)
    printed = capsys.readouterr().out
    assert "both have published robust tokens of the same checkpoint: sha256 abababab" in printed
    assert f"expect_fingerprint={manifest_of(new).fingerprint[:16]!r}" in printed
    assert "the tokens of NEW have no such stats: OLD does not decode them" in printed
    crossed = found.measurement.crossed("OLD")
    assert [entry.layers for entry in crossed] == [2, 3]
    assert found.measurement.crossed("NEW") == []
    # The way back: a policy emits no stats.
    kind, found = run(new, old, data)
    assert kind is Kind.INCOMPATIBLE
    assert "NEW cannot decode for this policy: the new bundle needs mean and sigma" in found.verdict.text
    assert "its tokens are the same" in found.verdict.text
    with pytest.raises(IncompatibleTokensError, match="needs mean and sigma"):
        require_compatible(manifest_of(new), manifest_of(old), force=True)


def test_the_same_encoder_weights_prove_published_tokens_the_same(
    bundle_of: BundleOf, data: Path, tmp_path: Path
) -> None:
    """A file with fitted decoders in it has another hash than the checkpoint it was made from."""
    folders = [bundle_of(Recipe(mode=mode)) for mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED)]
    old = rewritten(folders[0], tmp_path / "old", provenance=built_from("11" * 32))
    same = rewritten(folders[1], tmp_path / "same", provenance=built_from("22" * 32, decoder_0_weight="ef" * 32))
    assert require_compatible(manifest_of(old), manifest_of(same)).proof.endswith("of the same encoder weights")
    assert run(old, same, data)[0] is Kind.DECODER
    other = rewritten(folders[1], tmp_path / "other", provenance=built_from("22" * 32, encoder_2_bias="ef" * 32))
    with pytest.raises(IncompatibleTokensError, match=r"encoders have other weights \(encoder.2.bias\)"):
        require_compatible(manifest_of(old), manifest_of(other))


def test_naive_tokens_are_refused_unless_the_constants_prove_equal(
    bundle_of: BundleOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    naive = bundle_of(Recipe(mode=DeployMode.NONE))
    kind, found = run(naive, bundle_of(Recipe()), data)
    assert kind is Kind.INCOMPATIBLE
    assert "not compatible, retrain the policy" in found.verdict.text
    assert "the old has naive tokens, the new calibrated tokens" in found.verdict.text
    assert "--force" not in found.verdict.text
    assert "docs/integration.md" in capsys.readouterr().out
    equal = write_bundle(tmp_path / "equal", unquantised_by_constants(Recipe(mode=DeployMode.NONE)))
    kind, found = run(naive, equal, data)
    assert kind is Kind.INTERCHANGEABLE
    assert "proven: the same encoder, to the last constant: sha256" in found.verdict.text


def test_a_refusal_names_both_bundles_and_the_ways_from_here(bundle_of: BundleOf) -> None:
    old, new = manifest_of(bundle_of(Recipe(mode=DeployMode.NONE))), manifest_of(bundle_of(Recipe()))
    with pytest.raises(IncompatibleTokensError) as caught:
        require_compatible(old, new)
    text = str(caught.value)
    assert text.startswith(f"tokens of the bundle {old.fingerprint[:16]} (none) are not to be decoded by")
    for part in (new.fingerprint[:16], "pass force=True", "\n(A) ", "\n(B) ", "\n(C) "):
        assert part in text
    forced = require_compatible(old, new, force=True)
    assert (forced.proof, forced.common_prefixes) == ("", (2, 3))
    assert not forced.is_proven


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": replace(SMALL, num_levels=7)}, "K is 5 in the old and 7 in the new bundle"),
        ({"config": replace(SMALL, latent_dim=5)}, "D is 4 in the old and 5 in the new bundle"),
        ({"config": replace(SMALL, action_dim=4)}, "A is 3 in the old and 4 in the new bundle"),
        ({"config": replace(SMALL, num_layers=1), "prefixes": ()}, "2 and 3 layers and the new 1: none in common"),
        ({"mode": DeployMode.DYNAMIC}, "needs mean and sigma of every layer"),
    ],
)
def test_what_cannot_be_decoded_is_refused_even_if_forced(
    changes: dict[str, Any], message: str, bundle_of: BundleOf
) -> None:
    old, new = manifest_of(bundle_of(Recipe())), manifest_of(bundle_of(replace(Recipe(), **changes)))
    assert compare_manifests(old, new).common_prefixes == ((2, 3) if "mode" in changes else ())
    for force in (False, True):
        with pytest.raises(IncompatibleTokensError, match=message):
            require_compatible(old, new, force=force)


@pytest.mark.parametrize("changed", ["sha256", "units", "layers", "mode", "constants"])
def test_the_same_checkpoint_proves_nothing_where_more_goes_into_the_tokens(changed: str, bundle_of: BundleOf) -> None:
    old = replace(manifest_of(bundle_of(Recipe(mode=DeployMode.DYNAMIC))), provenance=built_from())
    new = replace(manifest_of(bundle_of(Recipe(mode=DeployMode.RECOVERED))), provenance=built_from())
    assert compare_manifests(old, new).is_proven
    if changed == "sha256":
        new = replace(new, provenance={"checkpoint": {"checkpoint_sha256": "12" * 32}})
    elif changed == "units":
        new = replace(new, model=replace(new.model, action_units=(1.0, 2.0, 3.0)))
    elif changed == "layers":
        new = replace(new, model=replace(new.model, num_layers=2, prefixes=(2,)), graphs=_of_two_layers(new))
    else:
        # Constants are fitted: the checkpoint says nothing about them.
        calibrated = manifest_of(bundle_of(Recipe()))
        model = replace(calibrated.model, action_units=old.model.action_units, action_offset=old.model.action_offset)
        new = replace(calibrated, model=model, provenance=built_from())
        if changed == "constants":
            other = manifest_of(bundle_of(Recipe(chunk_length=3)))
            old = replace(other, model=replace(model, chunk_length=3), provenance=built_from())
    found = compare_manifests(old, new)
    assert not found.is_proven
    assert found.differences


def _of_two_layers(manifest: Manifest) -> tuple[Any, ...]:
    return tuple(replace(graph, prefix=2) if graph.role == "encoder" else graph for graph in manifest.graphs)


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_steps", [7, 61, 1000])
def test_the_figures_are_those_that_the_tokenizers_give(
    batch_steps: int, bundle_of: BundleOf, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes, "_SLICE_STEPS", batch_steps)
    old, new = bundle_of(Recipe()), bundle_of(Recipe(seed=1))
    _, found = run(old, new, data)
    actions = np.load(data)["actions"]
    chunks = np.concatenate((actions, actions[-1:])).reshape(-1, 2, 3)
    with ActionTokenizer.load(old) as first, ActionTokenizer.load(new) as second:
        units = np.array(first.model.action_units)
        tokens = {"OLD": first.encode(chunks), "NEW": second.encode(chunks)}
        decoders = {"OLD": first, "NEW": second}
        differs = (tokens["OLD"] != tokens["NEW"]).reshape(62, 4, 3)[:61]
        assert found.measurement.equal == pytest.approx(tuple(1 - differs.mean(axis=(0, 1))))
        assert found.measurement.differing == differs.any(axis=(1, 2)).sum()
        assert {(entry.tokens, entry.decoder, entry.layers) for entry in found.measurement.decodings} == {
            (one, other, layers) for one in tokens for other in tokens for layers in (2, 3)
        }
        for entry in found.measurement.decodings:
            part = tokens[entry.tokens][..., : entry.layers]
            decoded = decoders[entry.decoder].decode(part).reshape(-1, 3)[:61].astype(np.float64)
            own = decoders[entry.tokens].decode(part).reshape(-1, 3)[:61].astype(np.float64)
            errors = np.abs(decoded - actions)
            # Another batch may round otherwise.
            assert entry.mse == pytest.approx(np.square(errors / units).mean(), rel=1e-4)
            assert entry.largest == pytest.approx((errors / units).max(), rel=1e-4)
            assert entry.mse_units == pytest.approx(np.square(errors).mean(), rel=1e-4)
            assert entry.largest_units == pytest.approx(errors.max(), rel=1e-4)
            assert entry.from_own == pytest.approx((np.abs(decoded - own) / units).max(), rel=1e-4, abs=1e-6)


def test_two_dynamic_bundles_are_decoded_crosswise_with_the_stats_of_the_encoder(
    bundle_of: BundleOf, data: Path
) -> None:
    old, new = (bundle_of(Recipe(mode=DeployMode.DYNAMIC, seed=seed)) for seed in (0, 1))
    _, found = run(old, new, data)
    actions = np.load(data)["actions"][:60].reshape(-1, 2, 3)
    with ActionTokenizer.load(old) as first, ActionTokenizer.load(new) as second:
        decoded = second.decode(*first.encode_with_stats(actions))
    largest = np.abs((decoded - actions) / np.array(manifest_of(old).model.action_units)).max()
    assert found.measurement.crossed("OLD")[-1].largest >= largest * (1 - 1e-4)
    assert len(found.measurement.crossed("OLD")) == len(found.measurement.crossed("NEW")) == 2


def test_the_measurement_decides_when_it_is_forced(bundle_of: BundleOf, data: Path, tmp_path: Path) -> None:
    """Constants a millionth apart: the same tokens in an encoder with other bytes."""
    old = bundle_of(Recipe(mode=DeployMode.NONE))
    new = write_bundle(tmp_path / "near", unquantised_by_constants(Recipe(mode=DeployMode.NONE), scale=1 + 1e-6))
    kind, found = run(old, new, data)
    assert kind is Kind.INCOMPATIBLE
    assert "But all tokens agree on 61 steps; --force takes that for enough" in found.verdict.text
    kind, found = run(old, new, data, "--force")
    assert kind is Kind.INTERCHANGEABLE
    assert "interchangeable (not proven, the same on 61 steps)" in found.verdict.text
    dynamic, recovered = (bundle_of(Recipe(mode=mode)) for mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED))
    assert run(dynamic, recovered, data)[0] is Kind.INCOMPATIBLE
    assert run(dynamic, recovered, data, "--force")[0] is Kind.DECODER
    # It does not decide against what it finds.
    naive = Recipe(mode=DeployMode.NONE)
    assert run(bundle_of(naive), bundle_of(Recipe()), data, "--force")[0] is Kind.INCOMPATIBLE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 3}, "it takes chunks of 3 steps, not of 2 (--chunk-length)"),
        ({"prefixes": ()}, "it does not decode 2 layers (--prefixes)"),
    ],
)
def test_a_bundle_that_refuses_what_the_policy_sends_does_not_stand_in(
    changes: dict[str, Any], message: str, bundle_of: BundleOf, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its tokens mean."""
    old, new = bundle_of(Recipe()), bundle_of(replace(Recipe(), **changes))
    kind, found = run(old, new, data, "--force")
    assert kind is Kind.INCOMPATIBLE
    assert found.verdict.text.startswith(f"build NEW again before it stands in for OLD: {message}. Its tokens are the")
    assert ("T is 2 in OLD, 3 in NEW: compared step by step" in capsys.readouterr().out) == ("chunk_length" in changes)
    # Prefixes that NEW decodes beside are welcome.
    assert run(new, old, data, "--force")[0] is (Kind.INTERCHANGEABLE if "prefixes" in changes else Kind.INCOMPATIBLE)


def test_other_tokens_of_a_few_steps_are_not_taken_for_rounding(bundle_of: BundleOf, tmp_path: Path) -> None:
    one_step = tmp_path / "one.npz"
    np.savez(one_step, actions=random_actions(Recipe(), 1).reshape(-1, 3)[:1])
    kind, found = run(bundle_of(Recipe()), bundle_of(Recipe(seed=1)), one_step, "--force")
    assert (kind, found.measurement.differing) == (Kind.INCOMPATIBLE, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38, 1e30])
def test_an_illegal_action_is_refused_with_file_episode_and_step(
    value: float, bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = random_actions(Recipe(), 10).reshape(-1, 3)
    actions[5, 2] = value
    np.savez(tmp_path / "bad.npz", actions=actions, episode_ends=[4, len(actions)])
    bundle = str(bundle_of(Recipe()))
    assert compat.main([bundle, bundle, "--data", str(tmp_path / "bad.npz")]) == 2
    said = f"error: bad.npz, episode 1, step 1, dimension 2: {np.float32(value)}; expected finite numbers of at most "
    assert said in capsys.readouterr().err


def test_a_layer_that_one_has_alone_is_no_agreement(bundle_of: BundleOf, data: Path) -> None:
    """Without constants, the same seed gives the same encoder, whatever the number of layers."""
    naive = Recipe(mode=DeployMode.NONE)
    kind, found = run(bundle_of(naive), bundle_of(replace(naive, config=replace(SMALL, num_layers=2))), data, "--force")
    assert found.measurement.equal == (1.0, 1.0)
    assert kind is Kind.INCOMPATIBLE
    assert "L is 3 in the old and 2 in the new bundle" in found.verdict.text


def test_a_fingerprint_that_the_tokens_contradict_is_not_believed(
    bundle_of: BundleOf, data: Path, tmp_path: Path
) -> None:
    old = bundle_of(Recipe())
    new = rewritten(bundle_of(Recipe(seed=1)), tmp_path / "new", fingerprint=manifest_of(old).fingerprint)
    for flags in ([], ["--force"]):
        kind, found = run(old, new, data, *flags)
        assert kind is Kind.INCOMPATIBLE
        assert "contradiction: the manifests have the same fingerprint" in found.verdict.text
        assert "of 61 steps have other tokens" in found.verdict.text


@pytest.mark.parametrize(
    ("changes", "remarks", "decodings"),
    [
        ({"config": replace(SMALL, num_levels=7)}, ["K is 5 in OLD, 7 in NEW"], 4),
        ({"config": replace(SMALL, latent_dim=5)}, ["D is 4 in OLD, 5 in NEW"], 4),
        ({"config": replace(SMALL, action_dim=4)}, ["A is 3 in OLD, 4 in NEW: actions of different robots"], 0),
        ({"prefixes": (1,)}, ["OLD decodes 2, 3 layers, NEW 1, 3"], 2 + 2 + 1 + 1),
        (
            {"config": replace(SMALL, num_layers=2)},
            ["L is 3 in OLD, 2 in NEW", "OLD decodes 2, 3 layers, NEW 2"],
            2 + 1 + 1 + 1,
        ),
        ({"has_normaliser": False}, ["their normalisers differ: normalised units are those of OLD"], 8),
    ],
)
def test_what_can_be_compared_is_and_what_cannot_is_said(
    changes: dict[str, Any],
    remarks: list[str],
    decodings: int,
    bundle_of: BundleOf,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, found = run(bundle_of(Recipe()), bundle_of(replace(Recipe(), **changes)), data)
    printed = capsys.readouterr().out
    for remark in remarks:
        assert [line for line in found.measurement.remarks if line.startswith(remark)], remark
    assert all(f"  – {line}" in printed for line in found.measurement.remarks)
    assert len(found.measurement.decodings) == decodings
    assert len(found.measurement.equal) == (2 if "L is" in remarks[0] else 3 if decodings > 4 else 0)
    if "prefixes" not in changes:
        assert kind is Kind.INCOMPATIBLE


def test_rounding_at_the_edge_of_a_bin_makes_no_other_token() -> None:
    def measured(steps: int, differing: int, *equal: float, spare: int = 0) -> bool:
        return agreement.Measurement(steps, equal, differing, (), ()).has_same_tokens(spare=spare)

    assert measured(10_000, 50, 0.999)
    assert not measured(10_000, 51, 0.999)
    assert not measured(10, 1, 0.999)
    assert measured(10, 1, 0.999, spare=1)
    assert not measured(10, 2, 0.999, spare=1)
    assert not measured(0, 0)


# --- the script -------------------------------------------------------------------------------------------------------


def test_everything_as_json(bundle_of: BundleOf, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = bundle_of(Recipe(mode=DeployMode.NONE)), bundle_of(Recipe())
    status = compat.main([str(old), str(new), "--data", str(data), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert status == 1
    assert content["verdict"]["kind"] == "incompatible"
    assert content["old"]["fingerprint"] == manifest_of(old).fingerprint
    assert content["new"]["model"]["mode"] == "calibrated"
    assert content["compatibility"]["proof"] == ""
    assert content["measurement"]["steps"] == 61
    assert {entry["decoder"] for entry in content["measurement"]["decodings"]} == {"OLD", "NEW"}


def test_a_script_may_take_another_decoder_for_enough(
    bundle_of: BundleOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamic, recovered = (bundle_of(Recipe(mode=mode)) for mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED))
    old = rewritten(dynamic, tmp_path / "old", provenance=built_from())
    new = rewritten(recovered, tmp_path / "new", provenance=built_from())
    given = [str(old), str(new), "--data", str(data)]
    assert compat.main(given) == 1
    assert "--accept decoder makes it 0" in capsys.readouterr().out
    assert compat.main([*given, "--accept", "decoder"]) == 0
    assert "--accept" not in capsys.readouterr().out
    assert compat.main([str(new), str(old), *given[2:], "--accept", "decoder"]) == 1


def test_robot_units_are_shown_where_there_is_a_normaliser(
    bundle_of: BundleOf, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = bundle_of(Recipe(has_normaliser=False))
    compat.main([str(plain), str(plain), "--data", str(data)])
    assert "MSE, robot units²" not in capsys.readouterr().out
    compat.main([str(plain), str(bundle_of(Recipe())), "--data", str(data)])
    assert "MSE, robot units²" in capsys.readouterr().out


def test_without_an_answer_the_status_is_2(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, wide, empty = tmp_path / "model.pt", tmp_path / "wide.npz", tmp_path / "empty.npz"
    checkpoint.write_bytes(b"x")
    np.savez(wide, actions=np.zeros((5, 7), np.float32))
    np.savez(empty, actions=np.zeros((0, 3), np.float32))
    bad = tmp_path / "bad.npz"
    np.savez(bad, actions=np.full((5, 3), np.nan, np.float32))
    for arguments, message in (
        ([checkpoint, bundle, "--data", data], f"--checkpoint {checkpoint} --conditioning MODE"),
        ([bundle, tmp_path / "none", "--data", data], "no bundle at"),
        ([bundle, bundle, "--data", wide], "7 action dimensions; the bundle's model has 3"),
        ([bundle, bundle, "--data", empty], "error: "),
        ([bundle, bundle, "--data", bad], "error: "),
        ([bundle, bundle, "--data", tmp_path / "none.npz"], "does not exist"),
        ([bundle, bundle, "--data", data, "--key", "poses"], "poses"),
    ):
        assert compat.main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    with pytest.raises(SystemExit) as caught:
        compat.main([str(bundle)])
    assert caught.value.code == 2


@pytest.mark.slow
def test_an_unforeseen_failure_is_no_verdict(bundle: Path, data: Path) -> None:
    """Python ends with status 1 where nothing catches an error, and 1 is a verdict here."""
    script = ROOT / "runtime" / "compat.py"
    code = (
        "import runpy, sys, runtime.bundle.compatibility\n"
        "runtime.bundle.compatibility.compare_manifests = None\n"
        f"sys.argv = {[str(script), str(bundle), str(bundle), '--data', str(data)]}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


@pytest.mark.parametrize("suffix", ["npy", "hdf5", "parquet"])
def test_every_format_of_demonstrations_is_read(suffix: str, bundle: Path, data: Path, tmp_path: Path) -> None:
    actions, path = np.load(data)["actions"], tmp_path / f"episodes.{suffix}"
    if suffix == "npy":
        np.save(path, actions)
    elif suffix == "hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            file["data/demo_0/actions"], file["data/demo_1/actions"] = actions[:40], actions[40:]
    else:
        import pyarrow
        import pyarrow.parquet

        columns = {"action": list(actions), "episode_index": np.zeros(61, np.int64), "frame_index": np.arange(61)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    expected = compare(bundle, bundle, open_source(data))
    found = compare(bundle, bundle, open_source(path))
    assert found.measurement.steps == 61
    assert found.measurement.decodings[0].mse == pytest.approx(expected.measurement.decodings[0].mse, rel=1e-6)


def test_the_episodes_of_a_filter_key_are_compared_on(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = np.load(data)["actions"]
    path = write_robomimic(tmp_path / "a.hdf5", [actions[:40], actions[40:]], valid=[1])
    command = [str(bundle), str(bundle), "--data", str(path), "--filter-key"]
    assert compat.main([*command, "valid"]) == 0
    assert "steps with a token that differs  0 of 21" in capsys.readouterr().out
    assert compat.main([*command, "train"]) == 2
    assert "has no filter key 'train'; found valid" in capsys.readouterr().err


def test_each_bundle_has_a_verdict_and_errors_have_their_units(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights alone know nothing of actions; with a fitted last layer they do, if poorly."""
    known, unknown = bundle_of(Recipe(knows_actions=True)), bundle_of(Recipe())
    path = tmp_path / "data.npz"
    np.savez(path, actions=random_actions(Recipe(), 30).reshape(-1, 3))
    compat.main([str(unknown), str(known), "--data", str(path), "-v"])
    printed = capsys.readouterr().out
    old, new = printed.split("OLD, its own tokens, 3 layers  ")[1].split("NEW, its own tokens, 3 layers  ")
    units = [line.split("  ")[0] for line in old.splitlines()[1:4]]
    assert units == [f"dimension {index}, robot units" for index in range(3)]
    assert re.search(r"^dimension \d, robot units .* worthless$", old, re.MULTILINE)
    assert "WARNING: the tokens are worthless: " in old
    assert re.search(r"^dimension \d, robot units .* poor$", new, re.MULTILINE)
    assert "WARNING: the tokens are poor: decoded actions lose more than 1% of the variance in " in new
    assert "worthless" not in new
    (heads,) = (line for line in printed.splitlines() if line.startswith("tokens of"))
    assert [head for head in re.split("  +", heads) if "MSE" in head or "largest" in head] == [
        "action MSE, normalised units²", "largest error, normalised", "MSE, robot units²", "largest, robot units",
    ]  # fmt: skip


@pytest.mark.slow
def test_it_runs_from_any_folder_and_imports_neither_torch_nor_onnx(bundle: Path, data: Path, tmp_path: Path) -> None:
    absent = ("torch", "onnx", "export", "rfsq_ref", "h5py", "pyarrow")
    blocked = f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\n"
    given = [str(bundle), str(bundle), "--data", str(data)]
    code = f"{blocked}from rfsq.runtime.qualification.compat import main\nsys.exit(main({given}))"
    script = [str(ROOT / "runtime" / "compat.py"), *given]
    for arguments, folder in ((["-c", code], ROOT), (script, tmp_path)):
        result = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0
        # This bundle has no C engine, and that is all there is to say.
        assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
            "onnxruntime takes the place of the C engine, which is faster"
        ] * 2
        assert "✓ interchangeable" in result.stdout
