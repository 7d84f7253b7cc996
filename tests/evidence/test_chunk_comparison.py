"""Chunk tokens beside other codecs of chunks: at equal bits, on tasks of the fit and others, and as tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rfsq.calibration.chunk_fitting import fit_chunk_tokens
from rfsq.calibration.chunk_normaliser import chunk_normaliser
from rfsq.calibration.settings import ChunkConfig, ChunkNormaliser
from rfsq.calibration.tables import Table
from rfsq.evidence import chunk_jobs
from rfsq.evidence.chunk_codec import FAMILY, chunk_codecs, fit_chunk_model, sizes_for
from rfsq.evidence.chunk_comparison import ChunkComparisonConfig, compare_chunks
from rfsq.evidence.chunk_jobs import bins_job, chunk_job
from rfsq.evidence.chunk_results import CHUNKS_JSON, ChunkComparison, findings, parts, per_step, read_beside
from rfsq.evidence.compare_chunks import _parser, _work, main
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.faster import FasterConfig
from rfsq.evidence.judging import Trial
from rfsq.evidence.networks import NetworkRecipe
from rfsq.evidence.oat import OatConfig
from rfsq.evidence.report import write_report
from rfsq.evidence.results import Comparison, metrics_of
from rfsq.evidence.schemes import BinCodec, BinRange, fit_bins
from rfsq.evidence.train_peers import PeerJob, PeerResults, train_peers
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.normaliser import fit_normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.errors import OutputExistsError
from tests.evidence.conftest import fork_workers, robot_dataset, write_npz
from tests.once import once

_BUDGETS = (5.0, 12.5, 20.0)
_CONFIG = ChunkComparisonConfig(seeds=(0, 1), chunk_length=4, multiples=(1,), vocabularies=(1024,), workers=1)


@pytest.fixture(scope="module")
def trial() -> Trial:
    data = robot_dataset(episodes=20)
    dataset = ActionDataset(data.episodes, data.names, ("lift", "door") * 10, data.source)
    return Trial(dataset, budgets=_BUDGETS)


@pytest.fixture(scope="module")
def trained(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> PeerResults:
    sizes = {"width": 16, "heads": 2, "chunk_length": 4}
    networks = {
        "OAT": OatConfig(prefixes=(1, 4), encoder_depth=1, decoder_depth=1, **sizes),  # type: ignore[arg-type]
        "FASTerVQ": FasterConfig(span=4, groups=(3, 1), layers=2, depth=1, codebook_size=16, **sizes),  # type: ignore[arg-type]
    }
    jobs = [
        PeerJob(name, network, NetworkRecipe(steps=4, checks=1, batch_size=16)) for name, network in networks.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        fork_workers(patch)
        path = once(tmp_path_factory, "peers.json", lambda path: train_peers(jobs, trial, ["cpu"], path))
    return PeerResults.read(path)


@pytest.fixture(scope="module")
def found(trial: Trial, trained: PeerResults, tmp_path_factory: pytest.TempPathFactory) -> ChunkComparison:
    def compare(path: Path) -> None:
        results = compare_chunks(trial, _CONFIG, trained)
        results.write(path)
        assert ChunkComparison.read(path) == results

    return ChunkComparison.read(once(tmp_path_factory, "chunks.json", compare))


def test_every_family_is_there_at_the_budgets(found: ChunkComparison) -> None:
    families = {report.family for report in found.reports}
    assert families == {FAMILY, "FAST", "BEAST", "bins", "OAT", "FASTerVQ"}
    ours = [report for report in found.reports if report.family == FAMILY]
    assert [report.bits for report in ours] == list(_BUDGETS)
    assert [report.mse for report in ours] == sorted((report.mse for report in ours), reverse=True)
    for report in found.reports:
        assert len(report.metrics["action_mse"].values) == (2 if report.family == FAMILY else 1), report.name
        if report.family == "FAST":
            assert min(abs(report.bits - bits) / bits for bits in _BUDGETS) < 0.2


def test_tasks_that_were_left_out_are_judged_too(found: ChunkComparison) -> None:
    assert set(found.unseen) == {"lift", "door"}
    for reports in found.unseen.values():
        assert {report.family for report in reports} == {FAMILY, "FAST", "BEAST"}


def test_a_wrong_token_at_every_place_of_what_a_policy_emits(found: ChunkComparison) -> None:
    errors = found.wrong_tokens["chunk tokens, 8 of 8"]

    assert len(errors) == 8
    assert errors[0].mean > errors[-1].mean
    assert any(name.startswith("FAST") for name in found.wrong_tokens)
    assert {"OAT", "FASTerVQ"} <= set(found.wrong_tokens)


def test_the_bound_of_one_gaussian_falls_by_what_bits_are_worth(found: ChunkComparison) -> None:
    assert list(found.gaussian) == sorted(found.gaussian, reverse=True)
    bins = min((report for report in found.reports if report.family == "bins"), key=lambda report: report.mse)
    assert found.gaussian[-1] < bins.mse


def test_tables_have_a_row_for_each_family_and_a_column_for_each_budget(found: ChunkComparison) -> None:
    shown = parts(found)
    for name, rows in (("action_mse", 7), ("max_error", 6), ("unseen action_mse", 6), ("unlike", 18)):
        table = shown[f"chunks {name}"]
        assert isinstance(table, Table)
        assert table.header == ("tokenizer", "5", "12.5", "20")
        assert len(table.rows) == rows
    wrong = shown["chunks wrong tokens"]
    assert isinstance(wrong, Table)
    assert wrong.rows[-1][0] == "FASTerVQ"
    # The robot has no millimetres.
    assert "chunks position_mm_p99" not in shown


def test_claims_are_computed_from_the_figures(found: ChunkComparison) -> None:
    def ruined(report):  # type: ignore[no-untyped-def]
        return replace(report, metrics=report.metrics | metrics_of({"action_mse": 1e9}))

    worse = tuple(ruined(report) if report.family == FAMILY else report for report in found.reports)
    better = tuple(report if report.family == FAMILY else ruined(report) for report in found.reports)
    seen = [claim.holds for claim in findings(replace(found, reports=worse)) if "in the fit" not in claim.claim]
    assert seen
    assert not any(seen)
    assert all(claim.holds for claim in findings(replace(found, reports=better)) if "in the fit" not in claim.claim)
    assert any("without door in the fit" in claim.claim for claim in findings(found))


def test_tokens_of_single_steps_stand_beside_them(found: ChunkComparison, comparison: Comparison) -> None:
    others = per_step(comparison)

    assert {report.family for report in others} == {"per-step tokens, calibrated"}
    assert [report.partial for report in others] == [True] * 7 + [False]
    table = parts(found, others)["chunks action_mse"]
    assert isinstance(table, Table)
    # A step of them takes 45 bits: more than these budgets.
    assert ("per-step tokens, calibrated", "–", "–", "–") in table.rows


def test_the_report_shows_what_was_found_on_the_same_demonstrations(
    found: ChunkComparison, comparison: Comparison, tmp_path: Path
) -> None:
    path = tmp_path / CHUNKS_JSON
    assert read_beside(comparison, path) is None
    found.write(path)
    assert read_beside(comparison, path) is None
    same = replace(found, sha256=comparison.data.sha256)
    same.write(path)
    assert read_beside(comparison, path) == (same, ())
    replace(same, judged="test").write(path)
    assert read_beside(comparison, path) == (replace(same, judged="test"), per_step(comparison))

    write_report(comparison, [], tmp_path)

    assert "<h2>Chunk tokens</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "chunk-tokens.svg").is_file()


def test_peers_that_were_judged_on_others_are_left_out(trial: Trial, trained: PeerResults) -> None:
    config = replace(_CONFIG, seeds=(0,), unseen=False)
    found = compare_chunks(trial, config, replace(trained, judged="test"))

    assert not {"OAT", "FASTerVQ"} & {report.family for report in found.reports}
    assert len(found.remarks) == 1
    assert not found.unseen


def test_bins_of_the_whole_range_have_that_of_chunk_tokens(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: dict[BinRange, np.ndarray] = {}

    def recorded(steps: np.ndarray, kind: BinRange, bits: int) -> BinCodec:
        fitted[kind] = steps
        return fit_bins(steps, kind, bits)

    monkeypatch.setattr(chunk_jobs, "fit_bins", recorded)
    bins_job(trial)
    normaliser, _ = chunk_normaliser(trial.dataset, ChunkNormaliser.AUTO)
    assert normaliser is not None
    low, high = fitted[BinRange.FULL]
    np.testing.assert_allclose(high - low, 2 * np.array(normaliser.scale), rtol=1e-5)
    assert (trial.dataset.steps() >= low).all()
    assert (trial.dataset.steps() <= high).all()
    assert len(fitted[BinRange.QUANTILE]) == trial.parts().fitted.num_steps


# The codec ------------------------------------------------------------------------------------------------------------


def test_chunk_tokens_of_a_robot_in_odd_units_decode_from_every_prefix(trial: Trial) -> None:
    parts_ = trial.parts()
    normaliser = fit_normaliser(parts_.train.steps(), NormaliserKind.MIN_MAX, untouched=())
    sizes = ChunkSizes(4, 4, num_classes=8, num_tokens=8)
    model = fit_chunk_model(parts_.train, parts_.calibration, sizes, normaliser, seed=0)
    chunks = parts_.judged.episodes[0][:8].reshape(2, 4, 4)

    codecs = chunk_codecs(model, (2.5, 10.0, 20.0))

    assert [codec.prefix for codec in codecs] == [1, 4, 8]
    for codec in codecs:
        assert codec.tokens(chunks).shape == (2, codec.prefix)
        np.testing.assert_array_equal(codec.decode(codec.tokens(chunks), 4), codec.reconstruct(chunks))
    error = (codecs[-1].reconstruct(chunks) - chunks) / trial.units
    assert np.square(error).mean() < 1e-3


def test_a_chunk_has_as_many_tokens_as_the_bits_have_room_for() -> None:
    assert sizes_for(56.0, 7, 8).num_tokens == 45
    assert sizes_for(50.0, 26, 16).num_tokens == 80
    # A single value of 18 bits, and a class of 6, are two tokens.
    assert sizes_for(56.0, 1, 1).num_tokens == 2


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_compares_and_says_what_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "robot.npz", robot_dataset(episodes=12))
    output = tmp_path / "chunks.json"
    command = ["--data", str(tmp_path / "robot.npz"), "--output", str(output), "--seeds", "0", "--budgets", "5", "20"]
    command += ["--chunk-length", "4", "--multiples", "1", "--workers", "1", "--trained", str(tmp_path / "none.json")]

    assert main(command) in (0, 1)
    shown = capsys.readouterr().out
    assert "claims hold; wrote" in shown
    assert "chunk tokens" in shown
    found = ChunkComparison.read(output)
    assert found.budgets == (5.0, 20.0)
    assert {report.series.split(",")[1] for report in found.reports if report.family == "FAST"} == {" 4 steps"}
    assert main(command) == 2
    assert main([*command, "--overwrite", "--budgets", "20", "5"]) == 2
    assert "expected rising" in capsys.readouterr().err


def test_a_comparison_of_other_data_leaves_the_documents_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the result is there already, the command ends at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/chunks.json").touch()
    with pytest.raises(OutputExistsError, match=r"build/chunks\.json"):
        _work(_parser().parse_args(["--data", "nowhere.npz"]))
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/chunks.json").touch()
    with pytest.raises(OutputExistsError, match=r"docs/results/chunks\.json"):
        _work(_parser().parse_args([]))


def test_seeds_are_different_ones() -> None:
    with pytest.raises(EvidenceError, match="expected different ones"):
        ChunkComparisonConfig(seeds=(1, 1))


@pytest.mark.parametrize("multiples", [(), (0, 1)])
def test_multiples_are_numbers_from_one(multiples: tuple[int, ...]) -> None:
    with pytest.raises(EvidenceError, match="expected numbers from 1"):
        ChunkComparisonConfig(multiples=multiples)


def test_chunk_tokens_are_compared_in_the_range_that_a_build_gives_them() -> None:
    data = robot_dataset(episodes=20)
    trial = Trial(ActionDataset(data.episodes, data.names, data.tasks, data.source), budgets=(20.0,))
    checkpoint = fit_chunk_tokens(trial.dataset, ChunkConfig(chunk_length=4, tokens=8))
    (built,) = chunk_codecs(checkpoint.model(dtype=torch.float64), trial.budgets)

    (report,) = chunk_job(trial, 4, seed=0).reports

    assert report.metrics == trial.report(built, trial.parts().judged, 4).metrics
