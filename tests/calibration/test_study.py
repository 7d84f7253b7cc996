"""The study measures what it says it measures, on episodes that nothing was fitted to."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.calibration import constants, study_bench
from rfsq.calibration import study as module
from rfsq.calibration.constants import fit_constants
from rfsq.calibration.data import calibration_episodes, episode_folds, judging_episodes, reference_actions
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.fitting import calibrate
from rfsq.calibration.readout import fit_readout
from rfsq.calibration.report import CalibrationReport, report_calibrated
from rfsq.calibration.settings import DEFAULT_READOUT, READOUT_OFF, CalibrationConfig, ReadoutChoice, ReadoutConfig
from rfsq.calibration.study import main, study
from rfsq.calibration.study_report import draw_study, format_study, parts
from rfsq.calibration.study_result import Spread, StudyResult, result_from_json, result_to_json, spread
from rfsq.calibration.tables import as_markdown
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.checkpoints import Checkpoint, checkpoint_of, save_checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import Conditioning

DOCS = Path(__file__).resolve().parents[2] / "docs"
TASKS = ("Door", "Lift")
RIDGES = (1e-8, 1e-4, 1e-2)


@pytest.fixture(scope="module")
def other(robust: Checkpoint) -> Checkpoint:
    """A second training seed, so to speak: the first one with weights that are a little off."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in robust.weights.items()
    }
    return replace(robust, weights=weights)


@pytest.fixture(scope="module")
def dataset(demonstrations: ActionDataset) -> ActionDataset:
    """Seven short episodes of each of two tasks."""
    chosen = [
        index for task in TASKS for index in [i for i, name in enumerate(demonstrations.tasks) if name == task][:7]
    ]
    return _shortened(demonstrations.select(chosen), 30)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_bench, "_RANDOM_ACTIONS", 20)
        patch.setattr(module, "RIDGES", RIDGES)
        # No test looks at how well `mse` converges.
        patch.setattr(constants, "_MSE_ITERATIONS", 3)
        # Nor at which ridge `auto` chooses.
        patch.setattr("rfsq.calibration.readout.RIDGES", (1e-4, 1e-2))
        yield


@pytest.fixture(scope="module")
def result(robust: Checkpoint, other: Checkpoint, dataset: ActionDataset) -> StudyResult:
    return study([robust, other], dataset, subsets=2)


@pytest.fixture(scope="module")
def reports(robust: Checkpoint, other: Checkpoint, dataset: ActionDataset) -> list[CalibrationReport]:
    """What users get by default, judged by the module that every build uses."""
    return _reports([robust, other], dataset, DEFAULT_READOUT)


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about something else."""
    monkeypatch.setattr(module, "_CHANGES", module._COMPARED)


has_few_settings = pytest.mark.usefixtures("few_settings")


def _reports(
    checkpoints: Sequence[Checkpoint], dataset: ActionDataset, readout: ReadoutConfig
) -> list[CalibrationReport]:
    return [
        report_calibrated(
            calibrate(checkpoint, dataset, CalibrationConfig(), readout), judging_episodes(checkpoint, dataset)
        )
        for checkpoint in checkpoints
    ]


@pytest.fixture(scope="module")
def shipped() -> StudyResult:
    return result_from_json((DOCS / "results" / "calibration.json").read_text(encoding="utf-8"))


def markdown(result: StudyResult) -> dict[str, str]:
    return {name: as_markdown(part) for name, part in parts(result).items()}


def _shortened(dataset: ActionDataset, steps: int) -> ActionDataset:
    return ActionDataset(
        tuple(episode[:steps] for episode in dataset.episodes), dataset.names, dataset.tasks, dataset.source
    )


def _tiny(dataset_dim: int = 3, num_layers: int = 2, seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    return checkpoint_of(ActionAutoencoder(ModelConfig(dataset_dim, 4, 8, num_layers, 5), Conditioning.DYNAMIC), {})


def _random_episodes(tasks: Sequence[str], steps: int = 12, dim: int = 3) -> ActionDataset:
    generator = np.random.default_rng(0)
    episodes = tuple(generator.uniform(-1, 1, (steps, dim)).astype(np.float32) for _ in tasks)
    return ActionDataset(episodes, tuple(f"episode {index}" for index in range(len(tasks))), tuple(tasks), "random")


def _of_task(episodes: ActionDataset, task: str) -> ActionDataset:
    return episodes.select(index for index, name in enumerate(episodes.tasks) if name == task)


def _of_ridge(ridge: float | None) -> ReadoutConfig:
    return READOUT_OFF if ridge is None else ReadoutConfig(ReadoutChoice.ON, ridge)


def _mse(
    checkpoint: Checkpoint, fitted: ActionDataset, tested: ActionDataset, prefix: int | None, config: ReadoutConfig
) -> float:
    """Action MSE of constants and readout fitted to these episodes, by the public functions alone; prefix None: without
    the quantiser."""
    calibrated = checkpoint.with_fit(constants=fit_constants(checkpoint, fitted))
    calibrated = calibrated.with_fit(readout=fit_readout(calibrated, fitted, config).readout)
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64)
    actions = reference_actions(checkpoint, tested)
    with torch.no_grad():
        latents = model.encode_latents(actions)
        if prefix is not None:
            latents = model.dequantize(model.encode(actions)[0][..., :prefix])
        return float((model.decode_latents(latents) - actions).square().mean())


# What is measured ----------------------------------------------------------------------------------------------------


def test_default_setting_has_the_numbers_of_the_calibration_report(
    result: StudyResult, reports: list[CalibrationReport]
) -> None:
    default = result.settings[0]
    assert default.setting == "default"
    for layer in range(8):
        for measured, name in ((default.action_mse, "action_mse"), (default.worst_case, "worst_case")):
            values = [getattr(report.layers[layer], name) for report in reports]
            assert measured[layer].mean == pytest.approx(np.mean(values), rel=1e-5, abs=1e-15)
            assert measured[layer].deviation == pytest.approx(np.std(values, ddof=1), rel=1e-5, abs=1e-12)
            assert (measured[layer].low, measured[layer].high) == pytest.approx((min(values), max(values)), rel=1e-5)
        used = [report.layers[layer].levels_used for report in reports]
        assert result.layers[layer].levels_used.mean == pytest.approx(np.mean(used), rel=1e-5)
    assert result.unquantised.mean == pytest.approx(np.mean([report.autoencoder_mse for report in reports]), rel=1e-5)
    with_readout = np.array([report.readout_mse for report in reports], dtype=float)
    assert result.unquantised_readout.mean == pytest.approx(with_readout.mean(), rel=1e-5)


def test_readout_off_is_the_decoder_as_it_was_trained(
    result: StudyResult, robust: Checkpoint, other: Checkpoint, dataset: ActionDataset
) -> None:
    trained = _reports([robust, other], dataset, READOUT_OFF)
    row = result.settings[-1]
    assert row.setting == "readout off"
    for layer in range(8):
        values = np.array([report.layers[layer].action_mse for report in trained], dtype=float)
        assert row.action_mse[layer].mean == pytest.approx(values.mean(), rel=1e-5)


def test_a_fitted_checkpoint_gives_the_same_numbers(robust: Checkpoint, dataset: ActionDataset) -> None:
    """Its own constants and readout are not used, for what is called `as trained` least of all."""
    fitted = calibrate(robust, dataset, CalibrationConfig(headroom=1.0), ReadoutConfig(ReadoutChoice.ON, 1e-2))
    first, second = (study_bench.benches_of([checkpoint], dataset) for checkpoint in (robust, fitted))
    with torch.no_grad():
        for setting in module._settings(module._COMPARED):
            assert module._setting_row(first, setting) == module._setting_row(second, setting)
        assert module._readout_row(first, None, TASKS) == module._readout_row(second, None, TASKS)


def test_errors_lie_in_their_order(result: StudyResult) -> None:
    for row in result.settings:
        for mse, largest in zip(row.action_mse, row.max_error, strict=True):
            assert math.sqrt(mse.low) <= largest.high


def test_every_choice_of_the_configuration_is_varied(result: StudyResult) -> None:
    names = [row.setting for row in result.settings]
    assert len(set(names)) == len(names)
    for field in fields(CalibrationConfig):
        assert any(field.name.replace("_", " ") in name for name in names), field.name
    settings = module._settings(module._CHANGES)
    assert settings[0].config == CalibrationConfig()
    # The last one is the default without a readout.
    assert len({setting.config for setting in settings}) == len(settings) - 1 == len(names) - 1


def test_the_three_compared_settings_are_fitted_to_few_episodes_and_to_single_tasks(result: StudyResult) -> None:
    expected = ["default", "granularity latent, headroom 0.25", "granularity latent, headroom 0.5", "readout off"]
    assert [row.setting for row in result.tasks] == expected
    assert list(dict.fromkeys(row.setting for row in result.episodes)) == expected
    assert set(expected) <= {row.setting for row in result.settings}
    assert (CalibrationConfig().granularity, CalibrationConfig().headroom) == ("layer", 0.1)


def test_narrow_coverage_misses_the_largest_actions(result: StudyResult) -> None:
    largest = {row.setting: row.max_error[2].mean for row in result.settings}
    assert largest["coverage 0.9"] > 2 * largest["default"]


def test_bound_follows_the_setting(result: StudyResult) -> None:
    rows = {row.setting: row for row in result.settings}
    assert rows["default"].worst_case[-1].high <= CalibrationConfig().worst_case * 1.001
    assert rows["worst case off"].worst_case[-1].high > 10 * rows["default"].worst_case[-1].high


def test_all_episodes_are_the_setting_itself(result: StudyResult, robust: Checkpoint, dataset: ActionDataset) -> None:
    total = len(calibration_episodes(robust, dataset).episodes)
    settings = {row.setting: row for row in result.settings}
    of_default = [row for row in result.episodes if row.setting == "default"]
    assert [row.num_episodes for row in of_default] == [1, 2, 4, 8, total]
    assert [row.action_mse[0].count for row in of_default] == [4, 4, 4, 4, 2]
    for row in result.episodes:
        if row.num_episodes == total:
            assert row.action_mse == settings[row.setting].action_mse


def test_tasks_are_seen_or_left_out_or_alone(
    result: StudyResult, robust: Checkpoint, other: Checkpoint, dataset: ActionDataset
) -> None:
    """Of two tasks, all but one is the other, which is the only one besides."""
    for row, config in ((result.tasks[0], DEFAULT_READOUT), (result.tasks[-1], READOUT_OFF)):
        for prefix in (3, 8):
            seen, unseen = [], []
            for checkpoint in (robust, other):
                calibration, test = calibration_episodes(checkpoint, dataset), judging_episodes(checkpoint, dataset)
                for tested, fitted in (TASKS, TASKS[::-1]):
                    judged = _of_task(test, tested)
                    floor = _mse(checkpoint, calibration, judged, None, config)
                    seen.append(_mse(checkpoint, calibration, judged, prefix, config) / floor)
                    unseen.append(_mse(checkpoint, _of_task(calibration, fitted), judged, prefix, config) / floor)
            assert row.seen[prefix - 1].mean == pytest.approx(np.mean(seen), rel=1e-5)
            assert row.unseen[prefix - 1].mean == pytest.approx(np.mean(unseen), rel=1e-5)
            assert row.other[prefix - 1] == row.unseen[prefix - 1]
            assert row.other[prefix - 1].high == pytest.approx(max(unseen), rel=1e-5)


@torch.no_grad()
def test_other_tasks_alone_are_all_pairs(robust: Checkpoint, demonstrations: ActionDataset) -> None:
    short = _shortened(demonstrations, 20)
    tasks = sorted(set(short.tasks))
    row = module._task_row(study_bench.benches_of([robust], short), study_bench.DEFAULT, tasks)
    assert row.seen[0].count == row.unseen[0].count == len(tasks) == 5
    assert row.other[0].count == 5 * 4


def test_readouts_are_judged_on_episodes_that_they_were_not_fitted_to(
    result: StudyResult, robust: Checkpoint, other: Checkpoint, dataset: ActionDataset
) -> None:
    assert [row.ridge for row in result.readout] == [None, *RIDGES]
    for row in result.readout:
        errors, alone = [], []
        for checkpoint in (robust, other):
            calibration, test = calibration_episodes(checkpoint, dataset), judging_episodes(checkpoint, dataset)
            errors.append(_mse(checkpoint, calibration, test, None, _of_ridge(row.ridge)))
            for tested, fitted in (TASKS, TASKS[::-1]):
                parts = _of_task(calibration, fitted), _of_task(test, tested)
                refitted, trained = (_mse(checkpoint, *parts, None, _of_ridge(each)) for each in (row.ridge, None))
                alone.append(refitted / trained)
        assert row.test.mean == pytest.approx(np.mean(errors), rel=1e-5)
        assert row.other is not None
        assert row.other.mean == pytest.approx(np.mean(alone), rel=1e-5)
        assert row.other == row.unseen
    first = result.readout[0]
    assert first.test == result.unquantised
    assert (first.random.mean, first.unseen, first.other) == (1, Spread(1, 0, 1, 1, 4), Spread(1, 0, 1, 1, 4))


@torch.no_grad()
def test_cross_validation_leaves_out_every_episode_once(robust: Checkpoint, dataset: ActionDataset) -> None:
    calibration = calibration_episodes(robust, dataset)
    indices = episode_folds(len(calibration.episodes), module._FOLDS)
    folds = [(calibration.select(kept), calibration.select(left_out)) for kept, left_out in indices]
    assert len(folds) == 5
    assert sorted(name for _, held_out in folds for name in held_out.names) == sorted(calibration.names)
    for kept, held_out in folds:
        assert sorted((*kept.names, *held_out.names)) == sorted(calibration.names)
    row = module._readout_row(study_bench.benches_of([robust], dataset), 1e-6, ())
    assert row.cross_validated is not None
    # Of episodes of one length, the mean over folds weighted by their episodes.
    weights = [len(held_out.episodes) for _, held_out in folds]
    errors = [_mse(robust, kept, held_out, None, _of_ridge(1e-6)) for kept, held_out in folds]
    assert row.cross_validated.mean == pytest.approx(np.average(errors, weights=weights), rel=1e-5)


def test_layers_cost_bits_and_bring_what_lies_between_prefixes(result: StudyResult) -> None:
    default = result.settings[0]
    for row in result.layers:
        assert row.bits == pytest.approx((row.layer + 1) * 16 * math.log2(7), rel=1e-5)
    assert result.layers[0].gain is None
    # One checkpoint's factors multiply up; the means of two nearly do.
    gains = [row.gain.mean for row in result.layers if row.gain is not None]
    assert math.prod(gains) == pytest.approx(default.action_mse[0].mean / default.action_mse[-1].mean, rel=0.2)
    bounds = [row.worst_case_gain.mean for row in result.layers]
    assert math.prod(bounds) == pytest.approx(1 / default.worst_case[-1].mean, rel=0.2)


def test_a_layer_pays_where_its_share_says_so(result: StudyResult) -> None:
    for row in result.layers:
        assert row.pays_in_worst_case == (row.worst_case_gain.mean >= 2)
        assert row.pays_on_data == (row.gain is None or row.gain.mean >= 1 / 0.95)


@given(st.lists(st.integers(-(10**9), 10**9).map(lambda number: number / 1000), min_size=2, max_size=20))
def test_spread_is_that_of_numpy(values: list[float]) -> None:
    found = spread(values)
    assert (found.low, found.high) == pytest.approx((min(values), max(values)), rel=1e-5)
    assert found.count == len(values)
    # Where the values cancel, the mean is known no better than they are.
    size = np.abs(values).max()
    assert found.mean == pytest.approx(np.mean(values), rel=1e-5, abs=1e-12 * size)
    assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-5, abs=1e-7 * size)


def test_one_value_has_no_deviation() -> None:
    assert spread([2.0]) == Spread(2.0, None, 2.0, 2.0, 1)


@given(st.integers(2, 500))
def test_numbers_of_episodes_go_from_one_to_all(total: int) -> None:
    counts = module._episode_counts(total)
    assert (counts[0], counts[-1]) == (1, total)
    assert counts == sorted(set(counts))


# What cannot be measured ---------------------------------------------------------------------------------------------


@has_few_settings
def test_without_tasks_their_section_says_why() -> None:
    result = study([_tiny()], _random_episodes([""] * 8), subsets=1)
    assert result.tasks == ()
    assert "unnamed" in result.omitted["tasks"]
    assert all(row.unseen is None and row.other is None for row in result.readout)
    assert result.episodes
    assert markdown(result)["tasks"].startswith("Not measured: ")
    assert "tasks: not measured" in format_study(result)
    draw_study(result)


@has_few_settings
def test_with_one_calibration_episode_there_are_no_fewer() -> None:
    tiny, episodes = _tiny(), _random_episodes([""] * 4)
    recorded = {"data": {"sha256": episodes.sha256}}
    result = study([replace(tiny, provenance=recorded)], episodes)
    assert result.calibration_episodes == result.test_episodes == 1
    assert result.episodes == ()
    assert "one calibration episode" in result.omitted["episodes"]
    assert all(row.cross_validated is None for row in result.readout)
    assert result.settings[0].action_mse[0].deviation is None
    assert markdown(result)["episodes"].startswith("Not measured: ")
    draw_study(result)


@has_few_settings
def test_only_tasks_with_calibration_and_test_episodes_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _random_episodes(["a", "b", "c"] * 2), _random_episodes(["b", "c", "d"])
    monkeypatch.setattr(study_bench, "calibration_episodes", lambda *_: parts[0])
    monkeypatch.setattr(study_bench, "judging_episodes", lambda *_: parts[1])
    result = study([_tiny()], _random_episodes([""] * 8), subsets=1)
    assert result.tasks[0].seen[0].count == result.tasks[0].other[0].count == 2


@has_few_settings
def test_an_episode_of_one_step_cannot_be_fitted_to_alone() -> None:
    result = study([_tiny()], _random_episodes(["a", "b"] * 8, steps=1), subsets=1)
    assert set(result.omitted) == {"episodes", "tasks"}
    assert "1 steps" in result.omitted["episodes"]


def test_data_without_episodes_to_hold_back_are_refused() -> None:
    with pytest.raises(DataError, match="has 3 episodes; expected 4 or more"):
        study([_tiny()], _random_episodes([""] * 3))


def test_checkpoints_must_be_there_and_alike(dataset: ActionDataset, robust: Checkpoint) -> None:
    with pytest.raises(CalibrationError, match="no checkpoint"):
        study([], dataset)
    with pytest.raises(CalibrationError, match="checkpoints of 2 sizes"):
        study([_tiny(num_layers=2), _tiny(num_layers=3)], _random_episodes([""] * 8))
    elsewhere = replace(robust, provenance={})
    with pytest.raises(CalibrationError, match="cannot share"):
        study([replace(robust, provenance={"data": {"sha256": dataset.sha256}}), elsewhere], dataset)


# What is written -----------------------------------------------------------------------------------------------------


def test_json_gives_back_the_result(result: StudyResult) -> None:
    text = result_to_json(result)
    assert result_from_json(text) == result
    assert json.loads(text)["settings"][0]["action_mse"][7]["mean"] == result.settings[0].action_mse[7].mean


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 1}', '{"source": "x"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="no result of the calibration study"):
        result_from_json(text)


def test_tables_are_rectangular_and_show_the_numbers(result: StudyResult) -> None:
    tables = markdown(result)
    defaults = tables.pop("defaults")
    assert f"headroom `{CalibrationConfig().headroom}`" in defaults
    assert f"readout `{DEFAULT_READOUT.choice.value}`" in defaults
    assert list(tables) == ["settings", "readout", "episodes", "tasks", "layers"]
    for table in tables.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1
    whole = result.settings[0].action_mse[-1]
    cells = _first_row(tables["settings"])
    assert cells[0] == "default"
    mean, deviation = map(float, cells[4].split(" ± "))
    assert mean == pytest.approx(whole.mean, rel=5e-3)
    assert deviation == pytest.approx(whole.deviation, rel=5e-3)
    coarse = result.tasks[0].other[2]
    shown = re.fullmatch(r"(.*)x \(worst (.*)x\)", _first_row(tables["tasks"])[3])
    assert shown is not None
    assert [float(shown[1]), float(shown[2])] == pytest.approx([coarse.mean, coarse.high], abs=5e-3)


def test_every_table_has_a_caption_and_columns_of_its_own(result: StudyResult) -> None:
    captions = {name: part.title for name, part in parts(result).items() if not isinstance(part, str)}
    assert captions.keys() | {"defaults"} == markdown(result).keys()
    assert len(set(captions.values())) == len(captions)
    for name, table in markdown(result).items():
        header = table.splitlines()[0].split(" | ")
        assert len(set(header)) == len(header), name
        # The text for the terminal has the caption above the table.
        assert name == "defaults" or f"{captions[name]}\n" in format_study(result)
    assert "over 2 checkpoints" in captions["settings"]


def _first_row(table: str) -> list[str]:
    return table.splitlines()[2].strip("| ").split(" | ")


def test_text_names_what_was_measured(result: StudyResult) -> None:
    text = format_study(result)
    assert text.startswith("2 checkpoints, fitted on ")
    for row in result.settings:
        assert row.setting in text
    assert "; MSE in robot units²\n" in text
    trained, refitted = (
        f"{found.mean:.2e}".replace("e-0", "e-") for found in (result.unquantised, result.unquantised_readout)
    )
    assert re.search(rf"^autoencoder as trained, no quantiser, action MSE +{trained} ± ", text, re.MULTILINE)
    assert re.search(rf"^readout refitted, no quantiser +{refitted} ± ", text, re.MULTILINE)


@has_few_settings
def test_command_writes_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = _random_episodes(["a", "b"] * 3)
    data = tmp_path / "episodes.npz"
    ends = np.cumsum([len(episode) for episode in episodes.episodes])
    np.savez(data, actions=episodes.steps(), episode_ends=ends)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(_tiny(), path)
    folder = tmp_path / "out"
    assert main(["--checkpoint", str(path), "--data", str(data), "--output", str(folder), "-v"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["calibration.json", "calibration.png"]
    written = result_from_json((folder / "calibration.json").read_text(encoding="utf-8"))
    assert all(re.fullmatch(r"checkpoint \d, sha256 [0-9a-f]{64}", label) for label in written.checkpoints)
    assert matplotlib.image.imread(folder / "calibration.png").std() > 0
    assert "Settings, each with one choice" in capsys.readouterr().out


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none.safetensors")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


# What the project says about itself ----------------------------------------------------------------------------------


def test_document_shows_the_shipped_result(shipped: StudyResult) -> None:
    text = (DOCS / "calibration.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- results: calibration (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))
    assert blocks == {name: table for name, table in markdown(shipped).items() if name in blocks}
    assert set(blocks) == set(markdown(shipped))


def test_every_number_in_the_documents_prose_is_measured(shipped: StudyResult) -> None:
    """Numbers with a unit of error (1.2e-5) or a factor (1.23x), as the tables show them."""
    text = (DOCS / "calibration.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- results: .*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    tables = "\n".join((format_study(shipped), *markdown(shipped).values()))
    known = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", tables)}
    quoted = [float(number) for number in re.findall(r"\b\d[\d.]*e-\d+|\b\d+\.\d+(?=x)", prose)]
    assert quoted
    assert [number for number in quoted if number not in known] == []


def test_shipped_result_is_of_these_defaults_and_data(shipped: StudyResult, demonstrations: ActionDataset) -> None:
    assert shipped.default == {**asdict(CalibrationConfig()), "readout": DEFAULT_READOUT.choice.value}
    assert shipped.data_sha256 == demonstrations.sha256
    assert len(shipped.checkpoints) == 3
    assert shipped.omitted == {}


def test_shipped_result_bears_out_the_defaults(shipped: StudyResult) -> None:
    default = shipped.tasks[0]
    assert default.setting == "default"
    # The 5 %, of the autoencoder with the same readout, and far below the one without.
    assert default.seen[-1].high < 1.05
    assert shipped.settings[0].action_mse[-1].high < shipped.unquantised.low / 3
    assert shipped.settings[0].worst_case[-1].high <= CalibrationConfig().worst_case * 1.001
    # Tasks that nothing was fitted to lose least in the default.
    assert all(default.other[2].high < row.other[2].high for row in shipped.tasks[1:-1])
    # What cross-validation chooses is no worse than any single ridge by much, and better than none.
    readouts = [row.test.mean for row in shipped.readout if row.ridge is not None]
    assert min(readouts) <= shipped.unquantised_readout.mean <= 2 * min(readouts)
    assert shipped.unquantised_readout.mean < shipped.unquantised.mean / 3
