"""What the report says is what is so."""

import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from rfsq.calibration.constants import worst_case_errors
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.report import (
    CalibrationReport,
    draw_calibration,
    format_report,
    recovered_latent_reach,
    report_calibrated,
    report_recovered,
    report_to_json,
    staged_report,
)
from rfsq.calibration.settings import RecoveredConfig
from rfsq.rfsq_ref.autoencoder import RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.errors import CheckpointError
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.calibration.small_fits import fit_recovered


@pytest.fixture(scope="module")
def report(calibrated: Checkpoint, split: EpisodeSplit) -> CalibrationReport:
    return report_calibrated(calibrated, split.test)


@pytest.fixture(scope="module")
def coarse(robust: Checkpoint, split: EpisodeSplit) -> Checkpoint:
    """Only two layers of eight can be decoded."""
    return robust.with_fit(recovered=fit_recovered(robust, split.calibration, [2], RecoveredConfig(refine_steps=1)))


def test_errors_are_those_of_decoding(
    report: CalibrationReport, calibrated: Checkpoint, test_actions: torch.Tensor
) -> None:
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)
    tokens, _ = model.encode(test_actions)
    for row in report.layers:
        error = model.decode(tokens[..., : row.layer + 1]) - test_actions
        assert row.action_mse == pytest.approx(float(error.square().mean()))
    assert report.num_steps == len(test_actions)
    assert report.num_episodes == 19


def test_comparisons_are_those_the_design_names(report: CalibrationReport) -> None:
    assert report.autoencoder_mse == pytest.approx(1.527e-5, rel=1e-3)
    assert report.trained_mse[-1] == pytest.approx(4.905e-6, rel=1e-3)
    assert report.trained_mse[2] == pytest.approx(8.183e-4, rel=1e-3)
    assert report.published_mse == pytest.approx(12.92, rel=1e-3)


def test_rows_of_calibrated_carry_the_bound_and_the_noise(report: CalibrationReport, calibrated: Checkpoint) -> None:
    assert calibrated.constants is not None
    bound = worst_case_errors(calibrated.constants, 7).tolist()
    assert [row.worst_case for row in report.layers] == bound
    for row in report.layers:
        assert row.noise_bound is not None
        # Its bins are far wider than what float32 can move.
        assert 0 < row.noise_bound < 0.01
        assert row.bin_width == pytest.approx(2 * float(calibrated.constants.scale[row.layer].min()) / 6)
        assert row.residual_low < 0 < row.residual_high
        assert 0 <= row.clipped < 0.01
        assert 1 / 7 <= row.levels_used <= 1


def test_clipped_share_counts_what_lies_beyond_the_outermost_bins(calibrated: Checkpoint, split: EpisodeSplit) -> None:
    assert calibrated.constants is not None
    constants = calibrated.constants
    narrow = replace(constants, scale=torch.cat((constants.scale[:1] / 4, constants.scale[1:])))
    row = report_calibrated(calibrated.with_fit(constants=narrow), split.test).layers[0]
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64).requires_grad_(False)
    latents = model.encode_latents(torch.from_numpy(split.test.steps()).double()).numpy()
    reach = narrow.scale[0].double().numpy() * 7 / 6
    assert row.clipped == pytest.approx((np.abs(latents - narrow.mean[0].double().numpy()) > reach).mean())
    assert row.clipped > 0.1


def test_rows_without_a_recovered_decoder_have_no_errors(coarse: Checkpoint, split: EpisodeSplit) -> None:
    rows = report_recovered(coarse, split.test).layers
    for row in rows:
        is_fitted = row.layer == 1
        assert (row.action_mse is not None) is is_fitted
        assert (row.latent_mse is not None) is is_fitted
        assert (row.worst_case is not None) is is_fitted
        assert row.levels_used > 0.8
    assert rows[1].worst_case == 1 + recovered_latent_reach(coarse.recovered[2], 7)


def test_recovered_reach_is_attained_by_some_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = RecoveredDecoder(
        torch.randn(2, 4, generator=generator, dtype=torch.float64), torch.randn(2, generator=generator).double()
    )
    corners = torch.cartesian_prod(*[torch.tensor([0, 6])] * 4).reshape(-1, 2, 2)
    assert recovered_latent_reach(decoder, 7) == pytest.approx(float(decoder.latents(corners).abs().max()))


def test_table_has_a_line_per_layer_and_marks_what_does_not_apply(coarse: Checkpoint, split: EpisodeSplit) -> None:
    lines = format_report(report_recovered(coarse, split.test)).splitlines()
    rows = [line.split() for line in lines if line.lstrip().startswith("L")]
    assert [row[0] for row in rows] == [f"L{layer}" for layer in range(8)]
    assert rows[0].count("–") == 3
    assert rows[1].count("–") == 0


def test_json_is_strict_and_whole(report: CalibrationReport, coarse: Checkpoint, split: EpisodeSplit) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for judged in (report, report_recovered(coarse, split.test)):
        content = json.loads(report_to_json(judged, {"method": judged.method}), parse_constant=refuse)
        assert content["provenance"] == {"method": judged.method}
        assert len(content["layers"]) == 8
        assert content["layers"][1]["action_mse"] == judged.layers[1].action_mse


def test_json_refuses_what_is_no_number(report: CalibrationReport) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_to_json(replace(report, published_mse=math.nan))


def test_files_are_written_into_a_new_folder_and_repeat(report: CalibrationReport, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        with staged_report(report, tmp_path / "reports" / folder, draw_calibration):
            pass
    first, second = (tmp_path / "reports" / folder for folder in ("first", "second"))
    assert sorted(path.name for path in first.iterdir()) == ["report.json", "report.png"]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    picture = matplotlib.image.imread(first / "report.png")
    assert picture.shape[1] > 1000
    # Four bytes of a pixel as one number: rows take seconds to sort.
    assert len(np.unique(np.round(255 * picture).astype(np.uint8).view(np.uint32))) > 50


def test_a_folder_that_cannot_be_made_is_an_error(report: CalibrationReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(CalibrationError, match=r"cannot write .*report\.json: .*choose a writable folder"),
        staged_report(report, tmp_path / "file" / "folder", draw_calibration),
    ):
        raise AssertionError("not reached")


def test_a_checkpoint_that_cannot_be_written_leaves_no_report(report: CalibrationReport, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_report(report, tmp_path, draw_calibration):
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_unfitted_checkpoints_are_refused(robust: Checkpoint, naive: Checkpoint, split: EpisodeSplit) -> None:
    with pytest.raises(CheckpointError, match="carries no conditioning constants"):
        report_calibrated(robust, split.test)
    for checkpoint in (robust, naive):
        with pytest.raises(CalibrationError, match="has 0 recovered decoders"):
            report_recovered(checkpoint, split.test)
