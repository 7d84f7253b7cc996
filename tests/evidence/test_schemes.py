"""The five schemes, row by row, against the independent published model and against plain sums."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rfsq.calibration.fitting import calibrate, recover
from rfsq.calibration.settings import CalibrationConfig, RecoveredConfig
from rfsq.evidence.results import SchemeReport
from rfsq.evidence.schemes import Calibrated, Dynamic, Judge, Naive, Published, Recovered, label
from rfsq.evidence.settings import OscPose
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.rfsq_ref.published_model import ActionRFSQAE


@pytest.fixture(scope="module")
def judge(split: EpisodeSplit) -> Judge:
    return Judge(split.test.steps(), split.calibration.steps(), np.ones(7), OscPose())


@pytest.fixture(scope="module")
def calibrated(robust: Checkpoint, demonstrations: ActionDataset) -> Checkpoint:
    return calibrate(robust, demonstrations, CalibrationConfig())


@pytest.fixture(scope="module")
def result(judge: Judge, calibrated: Checkpoint) -> SchemeReport:
    return judge.report(Calibrated(calibrated))


def test_rows_are_every_prefix_and_three_groups(result: SchemeReport) -> None:
    assert [row.label for row in result.prefixes[:3]] == ["L0", "L0–L1", "L0–L2"]
    assert [row.label for row in result.groups] == ["L0–L2", "L3–L7", "L0–L7"]
    assert result.groups[0].metrics["action_mse"] == result.prefixes[2].metrics["action_mse"]
    assert result.groups[2].metrics["action_mse"] == result.prefixes[-1].metrics["action_mse"]
    assert label(3, 8) == "L3–L7"


def test_a_layer_is_given_what_the_prefix_before_it_left(result: SchemeReport) -> None:
    """For calibrated tokens the error of a prefix is the residual about its mean, and the mean is nearly nothing."""
    for row, after in zip(result.prefixes[:3], result.prefixes[1:4], strict=True):
        assert row.metrics["latent_mse"].mean ** 0.5 == pytest.approx(after.metrics["residual_std"].mean, rel=0.05)


def test_entropy_of_a_group_is_that_of_its_layers(result: SchemeReport) -> None:
    bits = [row.metrics["entropy_bits"].mean for row in result.prefixes]

    assert result.groups[2].metrics["entropy_bits"].mean == pytest.approx(sum(bits))
    assert max(bits) <= 16 * np.log2(7)
    assert result.bits_per_layer == pytest.approx(16 * np.log2(7))


def test_the_embedded_checkpoints_have_the_errors_that_were_measured_at_every_build(
    result: SchemeReport, judge: Judge, naive: Checkpoint, robust: Checkpoint
) -> None:
    """A change here is a change of what users get."""
    found = {scheme.name: judge.report(scheme) for scheme in (Naive(naive), Dynamic(robust), Published(robust))}
    errors = {name: rows.groups[-1].metrics["action_mse"].mean for name, rows in found.items()}

    assert errors == pytest.approx({"naive": 1.003e-3, "dynamic": 4.905e-6, "published": 12.92}, rel=1e-3)
    assert result.groups[-1].metrics["action_mse"].mean == pytest.approx(2.578e-6, rel=2e-3)
    assert result.groups[0].metrics["action_mse"].mean == pytest.approx(4.635e-6, rel=2e-3)


def test_level_shares_add_up_to_one(result: SchemeReport) -> None:
    for row in result.prefixes + result.groups:
        assert sum(share.mean for share in row.level_share) == pytest.approx(1.0)


def test_fine_layers_alone_say_next_to_nothing(result: SchemeReport, judge: Judge) -> None:
    """With the coarse layers at their mean, what is left is about the spread of the actions themselves."""
    spread = float(((judge.judged - judge.judged.mean(axis=0)) ** 2).mean())

    assert result.groups[1].metrics["action_mse"].mean == pytest.approx(spread, rel=0.3)


def test_naive_layers_behind_the_first_do_nothing(judge: Judge, naive: Checkpoint) -> None:
    errors = [row.metrics["action_mse"].mean for row in judge.report(Naive(naive)).prefixes]

    assert errors == pytest.approx([errors[0]] * len(errors), rel=1e-9)


def test_dynamic_and_published_rows_equal_the_published_code(judge: Judge, robust: Checkpoint) -> None:
    """The forward pass with side information, and `decode_from_indices`, by an implementation of its own."""
    published = ActionRFSQAE(use_layernorm=True)
    published.load_state_dict(dict(robust.weights), strict=False)
    actions = torch.from_numpy(judge.judged)
    with torch.no_grad():
        forward, tokens = published(actions)
        decoded = published.decode_from_indices(tokens)

    def mse(found: torch.Tensor) -> float:
        return float((found.double() - actions.double()).square().mean())

    assert judge.report(Dynamic(robust)).groups[-1].metrics["action_mse"].mean == pytest.approx(mse(forward), rel=1e-3)
    assert judge.report(Published(robust)).groups[-1].metrics["action_mse"].mean == pytest.approx(
        mse(decoded), rel=1e-3
    )


def test_published_is_worse_than_zeros_and_recovered_is_not(
    judge: Judge, robust: Checkpoint, demonstrations: ActionDataset
) -> None:
    fitted = recover(robust, demonstrations, (1, 2, 3), RecoveredConfig(refine_steps=1))
    # Three layers are a model of their own here, so that fitting takes a second.
    sizes = replace(fitted.config, num_layers=3)
    three = replace(fitted, config=sizes)

    recovered = judge.report(Recovered(three)).groups[-1].metrics["action_mse"].mean
    published = judge.report(Published(three)).groups[-1].metrics["action_mse"].mean
    zeros = float((judge.judged.astype(np.float64) ** 2).mean())

    assert published > zeros > 100 * recovered


def test_the_unquantised_autoencoder_is_the_model_without_its_quantiser(judge: Judge, robust: Checkpoint) -> None:
    model = robust.model(Conditioning.DYNAMIC)
    with torch.no_grad():
        decoded = model.decoder(model.encoder(torch.from_numpy(judge.judged)))
    expected = float(((decoded.numpy() - judge.judged) ** 2).mean())

    assert judge.unquantised(robust.model(dtype=torch.float64))["action_mse"].mean == pytest.approx(expected, rel=1e-4)
