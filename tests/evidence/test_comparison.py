"""Everything from a dataset to a comparison, on a robot that the project has never seen."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.calibration.settings import ReadoutChoice, ReadoutConfig
from rfsq.evidence.comparison import compare
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.findings import REFITTED
from rfsq.evidence.jobs import trained_checkpoint
from rfsq.evidence.judging import judge_codec, padded_chunks
from rfsq.evidence.metrics import units_of
from rfsq.evidence.results import Comparison
from rfsq.evidence.schemes import Codec, RawCodec, RfsqCodec
from rfsq.evidence.settings import ComparisonConfig, OscPose
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit, split_episodes
from rfsq.rfsq_ref.errors import CheckpointError, DataError
from tests.evidence.conftest import fork_workers, robot_dataset


def test_every_scheme_is_there_with_a_value_for_each_seed(comparison: Comparison) -> None:
    assert [report.scheme for report in comparison.schemes] == [
        "naive", "dynamic", "published", "recovered", "calibrated"
    ]  # fmt: skip
    for report in comparison.schemes:
        assert len(report.checkpoints) == 2
        for row in report.prefixes + report.groups:
            assert all(len(spread.values) == 2 for spread in row.metrics.values())
            assert len(row.level_share) == 7


def test_units_that_are_not_osc_pose_get_no_millimetres(comparison: Comparison) -> None:
    assert comparison.data.physical is None
    assert "position_mm" not in comparison.schemes[0].groups[0].metrics


def test_it_says_what_it_was_made_from(comparison: Comparison, robot: ActionDataset) -> None:
    assert comparison.data.sha256 == robot.sha256
    assert sum(comparison.data.episodes.values()) == len(robot.episodes)
    assert set(comparison.checkpoints) == {"naive seed 0", "naive seed 1", "robust seed 0", "robust seed 1"}
    assert {len(sha256) for sha256 in comparison.checkpoints.values()} == {64}
    assert comparison.versions["torch"] == torch.__version__


def test_rows_of_a_seed_are_those_of_its_checkpoint(
    comparison: Comparison, robot: ActionDataset, small_config: ComparisonConfig
) -> None:
    """The naive row again, by hand, from the checkpoint in the cache."""
    training = small_config.training(use_layernorm=False, seed=1)
    checkpoint, history = trained_checkpoint(robot, training, small_config.cache)
    judged = split_episodes(robot).test.steps()
    model = checkpoint.model()
    with torch.no_grad():
        decoded = model(torch.from_numpy(judged)).numpy()
    expected = np.mean(((decoded - judged) / units_of(robot.steps())) ** 2)

    assert comparison.scheme("naive").groups[-1].metrics["action_mse"].values[1] == pytest.approx(expected, rel=1e-4)
    assert comparison.curves["naive seed 1"].validation == tuple(epoch.validation_mse for epoch in history.epochs)


def test_shares_of_the_errors_add_up(comparison: Comparison) -> None:
    for report in comparison.schemes:
        assert sum(report.error_share) == pytest.approx(1.0)


def test_given_checkpoints_are_used_instead_of_trained_ones(
    robot: ActionDataset, small_config: ComparisonConfig
) -> None:
    """Of another training than this comparison's seeds, so trained anew they would have another hash."""
    other = replace(small_config, epochs=2)
    given = [
        trained_checkpoint(robot, other.training(use_layernorm=robust, seed=7), small_config.cache)[0]
        for robust in (False, True)
    ]

    found = compare(robot, small_config, naive=given[:1], robust=given[1:])

    assert set(found.checkpoints.values()) == {checkpoint.provenance["checkpoint_sha256"] for checkpoint in given}
    assert found.scheme("naive").groups[-1].metrics["action_mse"].deviation == 0.0
    assert not found.curves


@pytest.mark.slow
def test_a_refitted_readout_has_a_row_beside_the_autoencoder_as_trained(
    small_config: ComparisonConfig, robot: ActionDataset
) -> None:
    found = {}
    for choice in (ReadoutChoice.ON, ReadoutChoice.OFF):
        config = replace(small_config, seeds=(0,), readout=ReadoutConfig(choice))
        found[choice] = compare(robot, config)
        assert found[choice].settings["readout"] == choice.value
    on, off = found.values()
    assert list(on.unquantised) == ["naive autoencoder", "robust autoencoder", "robust autoencoder, readout refitted"]
    assert list(off.unquantised) == ["naive autoencoder", "robust autoencoder"]
    assert on.unquantised["robust autoencoder"] == off.unquantised["robust autoencoder"]
    assert on.unquantised[REFITTED]["action_mse"] != on.unquantised["robust autoencoder"]["action_mse"]


def test_more_processes_change_nothing(
    robot: ActionDataset, quick_config: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With caches of their own, so that they train anew."""
    fork_workers(monkeypatch)
    one, two = (
        compare(robot, replace(quick_config, workers=workers, cache=tmp_path / str(workers))) for workers in (1, 2)
    )
    assert two == one


def test_too_few_steps_for_a_recovered_decoder_leave_the_rest(quick_config: ComparisonConfig) -> None:
    found = compare(robot_dataset(episodes=8), replace(quick_config, seeds=(0,)))

    assert [report.scheme for report in found.schemes] == ["naive", "dynamic", "published", "calibrated"]
    (missing,) = (remark for remark in found.remarks if "no recovered decoder" in remark)
    assert "give more calibration data" in missing


def test_a_scheme_that_one_checkpoint_lacks_is_left_out_of_all(
    small_config: ComparisonConfig, robot: ActionDataset
) -> None:
    """Not averaged with another scheme in its place."""
    few = robot_dataset(episodes=8)
    at_home, abroad = (
        trained_checkpoint(data, small_config.training(use_layernorm=True, seed=0), small_config.cache)[0]
        for data in (few, robot)
    )

    both, alone = (compare(few, small_config, robust=given) for given in ([at_home, abroad], [abroad]))

    assert "recovered" in {report.scheme for report in alone.schemes}
    assert "recovered" not in {report.scheme for report in both.schemes}
    assert both.remarks
    values = both.scheme("calibrated").groups[-1].metrics["action_mse"].values
    assert values[1:] == alone.scheme("calibrated").groups[-1].metrics["action_mse"].values


def test_one_layer_has_no_groups_and_no_claim_about_others(
    robot: ActionDataset, quick_config: ComparisonConfig
) -> None:
    given = {
        robust: trained_checkpoint(
            robot, replace(quick_config.training(use_layernorm=robust, seed=0), num_layers=1), quick_config.cache
        )[0]
        for robust in (False, True)
    }

    found = compare(robot, quick_config, naive=[given[False]], robust=[given[True]])

    assert [row.label for row in found.scheme("calibrated").groups] == ["L0"]
    assert found.seeds == ()
    # So few levels are not enough, and it is said of which checkpoint.
    label = f"calibrated tokens of {given[True].provenance['checkpoint_sha256'][:12]}, all layers"
    (line,) = (remark for remark in found.remarks if remark.startswith(f"{label}, "))
    (warning,) = (remark for remark in found.remarks if remark.startswith(f"{label}: "))
    assert re.search(", (poor|worthless); in robot units: RMS error at most ", line)
    assert re.search(": WARNING: the tokens are (poor|worthless): ", warning)


def test_checkpoints_that_cannot_stand_in_one_row_are_refused(
    robot: ActionDataset, quick_config: ComparisonConfig
) -> None:
    training = quick_config.training(use_layernorm=True, seed=0)
    eight, four = (
        trained_checkpoint(robot, replace(training, num_layers=layers), quick_config.cache)[0] for layers in (8, 4)
    )

    with pytest.raises(CheckpointError, match=r"num_layers=8.*num_layers=4.*compare them one by one"):
        compare(robot, quick_config, robust=[eight, four])
    with pytest.raises(CheckpointError, match="given twice"):
        compare(robot, quick_config, robust=[eight, eight])


def test_swapped_checkpoints_are_refused(robust: Checkpoint, demonstrations: ActionDataset) -> None:
    with pytest.raises(CheckpointError, match=r"given as naive was trained.*'dynamic'.*swap --naive and --robust"):
        compare(demonstrations, ComparisonConfig(), naive=[robust])


def test_checkpoints_of_another_robot_are_refused(
    robust: Checkpoint, naive: Checkpoint, small_config: ComparisonConfig, robot: ActionDataset
) -> None:
    with pytest.raises(DataError, match="4 action dimensions, the checkpoint 7"):
        compare(robot, small_config, naive=[naive], robust=[robust])


def test_osc_pose_units_need_seven_dimensions(small_config: ComparisonConfig, robot: ActionDataset) -> None:
    with pytest.raises(EvidenceError, match="4 action dimensions are no OSC_POSE actions"):
        compare(robot, replace(small_config, physical=OscPose()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "different"),
        ({"epochs": 0}, "epochs"),
        ({"workers": 0}, "workers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        replace(ComparisonConfig(), **change)


def test_too_few_episodes_are_refused_with_what_is_needed(small_config: ComparisonConfig) -> None:
    with pytest.raises(DataError, match="2 episodes; 4 are needed"):
        compare(robot_dataset(episodes=2), small_config)


# Codecs --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12))
def test_filled_chunks_hold_every_step_and_repeat_the_last(steps: int, length: int) -> None:
    episode = np.arange(2.0 * steps, dtype=np.float32).reshape(steps, 2)

    chunks = padded_chunks(episode, length)

    assert chunks.shape[1] == length
    flat = chunks.reshape(-1, 2)
    assert np.array_equal(flat[:steps], episode)
    assert (flat[steps:] == episode[-1]).all()


def test_no_tokens_make_no_error(split: EpisodeSplit) -> None:
    found = judge_codec(RawCodec(), split.test, 8, np.ones(7), OscPose())

    assert found.metrics["max_error"].mean == 0.0
    assert found.metrics["bits_per_step"].mean == 7 * 32


def test_filling_is_not_judged() -> None:
    """An episode shorter than a chunk counts with its own steps alone."""

    class SpoilsTheEnd(RawCodec):
        def reconstruct(self, chunks: np.ndarray) -> np.ndarray:
            spoilt = chunks.copy()
            spoilt[:, 5:] = 1e3
            return spoilt

    short = ActionDataset((np.zeros((5, 3), np.float32),), ("short",), ("",), "short.npz")

    assert judge_codec(SpoilsTheEnd(), short, 8, np.ones(3), None).metrics["max_error"].mean == 0.0


def test_a_codec_is_the_model_that_is_deployed(naive: Checkpoint, split: EpisodeSplit) -> None:
    model = naive.model()
    codec = RfsqCodec("naive", model, 8)
    chunks = padded_chunks(split.test.episodes[0], 8)
    with torch.no_grad():
        expected = model(torch.from_numpy(chunks)).numpy()

    assert isinstance(codec, Codec)
    assert np.abs(codec.reconstruct(chunks) - expected).max() < 1e-5
    assert codec.bits_per_step(chunks) == pytest.approx(8 * 16 * np.log2(7))
    assert RfsqCodec("published", model, 3, published=True).bits_per_step(chunks) == pytest.approx(48 * np.log2(7))
