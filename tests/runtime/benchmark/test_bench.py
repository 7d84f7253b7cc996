"""The benchmark: statistics, tables and files, and what it does where something is missing. No time is judged."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.evidence import bench_peers as torch_peers
from rfsq.export.plan import DeployMode
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.benchmark import command as bench
from rfsq.runtime.benchmark import run as bench_run
from rfsq.runtime.benchmark.beliefs import belief_figures
from rfsq.runtime.benchmark.processes import Start, StartError, measure_start, open_peers
from rfsq.runtime.benchmark.report import (
    SCHEMA_VERSION,
    Report,
    report_json,
    report_png,
    report_text,
    write_report,
)
from rfsq.runtime.benchmark.timing import (
    ARITHMETIC,
    BANDWIDTH,
    CALLS_PER_ROUND,
    Arithmetic,
    Bandwidth,
    Figure,
    Row,
    arithmetic_of,
    bandwidths_of,
    copies_name,
    host_figures,
    measure,
    operations_of,
    percentile,
    random_batch,
    summarise,
    time_calls,
)
from rfsq.runtime.bundle.errors import BackendUnavailableError, InferenceError, InvalidInputError
from rfsq.runtime.bundle.folder import open_bundle
from tests.backends import offer
from tests.bundles import SMALL, Recipe, deploy, make_manifest, write_bundle
from tests.chunk_bundles import SMALL as CHUNK_SIZES
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.rfsq_ref import published_model

ROOT = Path(__file__).parents[3]
BACKEND_NAMES = ("cuda", "c", "tensorrt-rtx", "tensorrt", "onnxruntime", "onnxruntime-cuda")


def constant(microseconds: float) -> Callable[[int], np.ndarray]:
    return lambda calls: np.full(calls, microseconds)


def figure(
    take: Callable[[int], np.ndarray], operation: str = "decode", path: Any = "host", batch: int = 1, **more: Any
) -> Figure:
    return Figure(more.pop("backend", "ours"), operation, path, batch, take, **more)


def row(**changes: Any) -> Row:
    known = Row("ours", "decode", "host", 1, 1000, 10.0, 11.0, 14.0, 20.0, 30.0, 4.0, steps_per_second=8e5)
    return replace(known, **changes)


REPORT = Report(
    machine={"CPU": "a processor", "GPU": "a card", "date": "2026-01-02 03:04 UTC"},
    bundle={"bundle": "/some/folder"},
    backends={"ours": "Ours 1.0"},
    starts=(Start("ours", 5, 0.5, 0.1, 0.2, 0.15, 0.1, 0.0002, 70_000_000, None),),
    rows=(
        row(backend="floor", operation="trivial kernel", path="floor", p50=8.0, steps_per_second=None),
        row(path="device", floor="trivial kernel", times_floor=1.25),
        row(batch=4096, calls=50, p99=None, p999=None, jitter=None, bandwidth_share=0.5, roofline_share=0.75),
    ),
    bandwidths=(Bandwidth("device to device", 4096, 4e12),),
    arithmetic=(Arithmetic(4096, 65e12),),
    missing={"theirs": "not installed; install it"},
    remarks=("a remark",),
)


# --- statistics -------------------------------------------------------------------------------------------------------


@given(st.integers(1000, 3000), st.integers(0, 2**32 - 1), st.sampled_from([50, 90, 99, 99.9]))
def test_percentiles_are_those_of_numpy(calls: int, seed: int, percent: float) -> None:
    samples = np.random.default_rng(seed).lognormal(3, 1, calls)
    assert percentile(samples, percent) == np.percentile(samples, percent)


@pytest.mark.parametrize(("percent", "least"), [(50, 2), (90, 10), (99, 100), (99.9, 1000)])
def test_a_percentile_that_so_few_calls_cannot_tell_is_none(percent: float, least: int) -> None:
    assert percentile(np.arange(float(least)), percent) is not None
    assert percentile(np.arange(least - 1.0), percent) is None


def test_a_row_has_the_statistics_of_all_calls_of_all_rounds() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 1001.0))
    rounds = iter(samples.reshape(10, 100))
    # The first call of all only finds out how long a call takes.
    taken, failed = measure([figure(lambda calls: np.ones(calls) if calls == 3 else next(rounds))], rounds=10)
    [found] = summarise(taken, chunk_length=8)
    assert failed == {}
    assert (found.calls, found.p50, found.max) == (1000, 500.5, 1000.0)
    assert (found.p90, found.p99, found.p999) == tuple(np.percentile(samples, [90, 99, 99.9]))
    assert found.jitter == found.p99 - found.p50
    assert found.steps_per_second == pytest.approx(8 / 500.5e-6)


def test_figures_are_timed_in_turns() -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[int], np.ndarray]:
        def take(calls: int) -> np.ndarray:
            if calls == CALLS_PER_ROUND:
                order.append(name)
            return np.ones(calls)

        return take

    measure([figure(noting("a"), "a"), figure(noting("b"), "b")], rounds=3)
    assert order == ["a", "b"] * 3


def test_slow_calls_are_fewer_in_a_round_and_at_least_one() -> None:
    figures = [figure(constant(1e3), "fast"), figure(constant(5e3), "slow"), figure(constant(1e9), "very slow")]
    taken, _ = measure(figures, rounds=2)
    assert [len(samples) for samples in taken.values()] == [100, 20, 2]


def test_a_figure_that_fails_is_left_out_with_its_reason_and_the_others_go_on() -> None:
    def fail(_calls: int) -> np.ndarray:
        raise InferenceError("the GPU is out of memory")

    good = figure(constant(1))
    taken, failed = measure([figure(fail, "encode"), good], rounds=2)
    assert list(taken) == [good]
    assert failed == {"ours, encode, host, batch 1": "the GPU is out of memory"}


def test_the_ratio_is_between_medians_and_of_the_same_batch() -> None:
    figures = [
        figure(constant(4), "trivial kernel", "floor", 1),
        figure(constant(8), "trivial kernel", "floor", 64),
        figure(lambda calls: np.r_[10.0, np.full(calls - 2, 12.0), 1e9], path="device", floor="trivial kernel"),
        figure(constant(12), path="device", batch=64, floor="trivial kernel"),
        figure(constant(12), "encode", floor="copies of encode"),
        figure(constant(12), "encode", path="unchecked"),
    ]
    rows = summarise(measure(figures, rounds=1)[0], chunk_length=8)
    assert [found.times_floor for found in rows] == [None, None, 3.0, 1.5, None, None]
    # A floor does no steps, and a ratio to one that was not measured names none.
    assert [found.floor for found in rows] == ["", "", "trivial kernel", "trivial kernel", "", ""]
    assert [found.steps_per_second is None for found in rows] == [True, True, False, False, False, False]


def test_the_share_of_bandwidth_is_the_time_of_the_bytes_alone_over_the_median() -> None:
    copies = {"device to device": (10.0, 4000), "host to device": (10.0, 500), "device to host": (10.0, 200)}
    figures = [
        figure(constant(us), way, "floor", 64, backend=BANDWIDTH, bytes_in=size) for way, (us, size) in copies.items()
    ]
    calls = {
        "device": figure(constant(10), path="device", batch=64, bytes_in=600, bytes_out=200),
        "slow result": figure(constant(10), batch=64, floor="copies of decode", bytes_in=100, bytes_out=100),
        "slow input": figure(constant(10), batch=64, floor="copies of decode", bytes_in=400, bytes_out=20),
        "processor": figure(constant(10), batch=64, bytes_in=400, bytes_out=20),
        "other batch": figure(constant(10), path="device", batch=1, bytes_in=400, bytes_out=20),
    }
    taken, _ = measure([*figures, *calls.values()], rounds=1)
    assert [entry.bytes_per_second for entry in bandwidths_of(taken)] == pytest.approx([4e8, 5e7, 2e7])
    rows = summarise(taken, chunk_length=8)
    shares = dict(zip(calls, (found.bandwidth_share for found in rows), strict=True))
    assert shares == {
        "device": pytest.approx(0.2),
        "slow result": pytest.approx(0.5),
        "slow input": pytest.approx(0.8),
        "processor": None,
        "other batch": None,
    }
    assert {found.roofline_share for found in rows} == {None}


def test_the_share_of_the_roofline_is_the_larger_of_bytes_and_operations_over_the_median() -> None:
    floors = [
        figure(constant(10.0), "device to device", "floor", 64, backend=BANDWIDTH, bytes_in=4000),
        figure(constant(2.0), "multiply and add", "floor", 64, backend=ARITHMETIC, operations=1000),
    ]
    calls = {
        "bytes": figure(constant(10), path="device", batch=64, bytes_in=600, bytes_out=200, operations=500),
        "operations": figure(constant(10), path="device", batch=64, bytes_in=600, bytes_out=200, operations=4000),
        "not counted": figure(constant(10), path="device", batch=64, bytes_in=600, bytes_out=200),
        "host": figure(constant(10), batch=64, bytes_in=600, operations=4000),
        "other batch": figure(constant(10), path="device", batch=1, bytes_in=600, operations=4000),
    }
    taken, _ = measure([*floors, *calls.values()], rounds=1)
    assert [(entry.batch, entry.operations_per_second) for entry in arithmetic_of(taken)] == [(64, pytest.approx(5e8))]
    shares = dict(zip(calls, (row.roofline_share for row in summarise(taken, chunk_length=8)), strict=True))
    assert shares == {
        "bytes": pytest.approx(0.2),
        "operations": pytest.approx(0.8),
        "not counted": None,
        "host": None,
        "other batch": None,
    }


def test_operations_are_those_of_the_layers_and_of_every_token() -> None:
    model = replace(
        make_manifest(deploy(Recipe())).model, action_dim=7, latent_dim=16, hidden_width=64, num_layers=8, num_levels=7
    )
    layers = 2 * (7 * 64 + 64 * 16) + 8 * 64
    assert operations_of(model, None) == layers + 16 * 20 + 128 * 5
    assert operations_of(model, 8) == layers + 2 * 128
    assert operations_of(model, 3) == layers + 2 * 48
    assert operations_of(replace(model, mode="recovered"), 3) == layers + 2 * 48 * 16


def test_timing_calls_once_for_every_figure_and_warms_up_before() -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    taken = time_calls(count, 20)
    assert taken.shape == (20,)
    assert (taken > 0).all()
    assert calls == 20 + 3


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.DYNAMIC])
def test_encoding_and_every_decoder_are_measured_with_and_without_checks(
    mode: DeployMode, bundle_of: Callable[[Recipe], Path]
) -> None:
    with ActionTokenizer.load(bundle_of(Recipe(mode=mode))) as tokenizer:
        batch = random_batch(tokenizer, 5)
        figures = list(host_figures(tokenizer, batch, has_copies=False))
        for found in figures:
            found.take(1)
    assert [(found.path, found.operation) for found in figures] == [
        (path, operation) for path in ("host", "unchecked") for operation in ("encode", "decode", "decode l2")
    ]
    assert {found.floor for found in figures} == {""}
    steps, stats = 5 * 2, {2: 2 * 2 * 4, 3: 3 * 2 * 4} if mode.has_stats else {2: 0, 3: 0}
    expected = {
        "encode": (steps * 3 * 4, steps * (4 * 3 * 4 + stats[3])),
        "decode": (steps * (4 * 3 * 4 + stats[3]), steps * 3 * 4),
        "decode l2": (steps * (4 * 2 * 4 + stats[2]), steps * 3 * 4),
    }
    assert {found.operation: (found.bytes_in, found.bytes_out) for found in figures} == expected


def test_of_chunk_tokens_few_all_and_the_first_of_budgets_are_decoded(tmp_path: Path) -> None:
    folder = write_chunk_bundle(tmp_path / "bundle", ChunkRecipe())
    with ActionTokenizer.load(folder) as tokenizer:
        figures = list(host_figures(tokenizer, random_batch(tokenizer, 5), has_copies=False))
        for found in figures:
            found.take(1)
    operations = ("encode", "decode", "decode 5 tokens", "decode 1 token")
    assert [(found.path, found.operation) for found in figures] == [
        (path, operation) for path in ("host", "unchecked") for operation in operations
    ]
    assert {found.operation: (found.bytes_in, found.bytes_out) for found in figures} == {
        "encode": (5 * 4 * 3 * 4, 5 * 9 * 4),
        **{name: (5 * tokens * 4, 5 * 4 * 3 * 4) for name, tokens in zip(operations[1:], (9, 5, 1), strict=True)},
    }


BELIEFS = ("probabilities", "probabilities, std", "logits", "logits, std")


@pytest.mark.parametrize(
    ("write", "values", "chunk"),
    [
        (lambda root: write_bundle(root, Recipe()), 2 * 4 * 3 * 5, 2 * 3),
        (lambda root: write_chunk_bundle(root, ChunkRecipe()), 9 * 2**CHUNK_SIZES.token_bits, 4 * 3),
    ],
    ids=["per-step", "chunk"],
)
def test_distributions_of_one_chunk_are_measured_with_and_without_std(
    write: Callable[[Path], Path], values: int, chunk: int, tmp_path: Path
) -> None:
    with ActionTokenizer.load(write(tmp_path / "bundle"), backend="onnxruntime") as tokenizer:
        figures = list(belief_figures(tokenizer))
        for found in figures:
            found.take(1)
    assert [(found.path, found.operation) for found in figures] == [
        (path, operation) for path in ("host", "unchecked") for operation in BELIEFS
    ]
    assert {(found.batch, found.compared, found.bytes_in) for found in figures} == {(1, "decode", values * 4)}
    written = {found.operation: found.bytes_out for found in figures}
    assert written == dict(zip(BELIEFS, (chunk * 4, (2 * chunk + 1) * 4) * 2, strict=True))


def test_what_decodes_no_distributions_has_no_figures_of_them(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", Recipe(DeployMode.DYNAMIC))
    with ActionTokenizer.load(folder, backend="onnxruntime") as tokenizer:
        assert list(belief_figures(tokenizer)) == []


def test_distributions_are_held_against_decoding_by_the_same_path(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", Recipe())
    report = bench_run.bench(bench_run.Config(folder, ("onnxruntime",), batches=(1, 2), rounds=1, starts=0))
    medians = {(found.path, found.batch): found.p50 for found in report.rows if found.operation == "decode"}
    ratios = {(found.operation, found.path, found.batch): found for found in report.rows if found.times_decode}
    assert set(ratios) == {(operation, path, 1) for operation in BELIEFS for path in ("host", "unchecked")}
    for found in ratios.values():
        assert found.times_decode == pytest.approx(found.p50 / medians[found.path, 1])


def test_peers_of_chunk_tokens_are_missing_with_the_reason(tmp_path: Path) -> None:
    folder = write_chunk_bundle(tmp_path / "bundle", ChunkRecipe())
    report = bench_run.bench(
        bench_run.Config(folder, ("onnxruntime",), batches=(1,), rounds=1, starts=0, has_peers=True)
    )
    assert (
        report.missing["peers"] == "comparing with peers takes per-step tokens alone, and this bundle has chunk tokens"
    )
    assert {found.backend for found in report.rows} == {"onnxruntime"}


def test_another_bundle_is_measured_in_turn_for_the_same_chunks(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = replace(CHUNK_SIZES, action_dim=SMALL.action_dim, chunk_length=2)
    folder = write_chunk_bundle(tmp_path / "chunk", ChunkRecipe(sizes))
    config = bench_run.Config(folder, ("onnxruntime",), batches=(1,), rounds=1, starts=0, beside=bundle)
    report = bench_run.bench(config)
    medians = {(found.backend, found.operation, found.path): found.p50 for found in report.rows}
    ratios = {(found.operation, found.path): found.times_beside for found in report.rows if found.times_beside}
    # Prefixes of two kinds are not each other's.
    assert ratios == {
        (operation, path): pytest.approx(
            medians["onnxruntime", operation, path] / medians["onnxruntime beside", operation, path]
        )
        for operation in ("encode", "decode")
        for path in ("host", "unchecked")
    }
    assert report.bundle["beside"] == f"{bundle}, calibrated, {open_bundle(bundle).manifest.model.sizes_text}"
    given = ["--backends", "onnxruntime", "--batch", "1", "--rounds", "1", "--starts", "0"]
    assert bench.main([str(folder), *given, "--beside", str(bundle)]) == 0
    assert re.search(r"encode \S+ µs, \S+ times that of the bundle beside, decode", capsys.readouterr().out)
    other = write_chunk_bundle(tmp_path / "other", ChunkRecipe())
    assert bench.main([str(other), *given, "--beside", str(bundle)]) == 2
    assert "chunks [T, A] are [2, 3] in" in capsys.readouterr().err


def test_calls_that_go_to_a_gpu_are_held_against_their_copies(tokenizer: ActionTokenizer) -> None:
    figures = host_figures(tokenizer, random_batch(tokenizer, 1), has_copies=True)
    assert all(found.floor == copies_name(found.operation) for found in figures)


def test_the_measured_actions_lie_in_the_range_of_the_model(tokenizer: ActionTokenizer) -> None:
    batch, model = random_batch(tokenizer, 50), tokenizer.model
    normalised = (batch.actions - np.array(model.action_offset)) / np.array(model.action_units)
    assert np.abs(normalised).max() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(batch.codes.tokens, tokenizer.encode(batch.actions))


# --- cold start -------------------------------------------------------------------------------------------------------


def test_cold_start_is_taken_apart_in_new_processes(bundle: Path) -> None:
    found = measure_start(bundle, "onnxruntime", 1)
    parts = found.import_numpy + found.import_runtime + found.load + found.first_decode
    # The rest is the interpreter's own start.
    assert 0 < parts < found.first_result
    assert min(found.import_numpy, found.import_runtime, found.load, found.load_hashed, found.first_decode) > 0
    assert found.host_memory is not None
    assert 1e6 < found.host_memory < 1e10


def test_a_process_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"(?s)new process with onnxruntime ended with status 1: .*is not a bundle"):
        measure_start(tmp_path, "onnxruntime", 1)


# --- reports ----------------------------------------------------------------------------------------------------------


def read_report(text: str) -> Report:
    """The inverse of `report_json`."""
    content = json.loads(text)
    assert content.pop("schema_version") == SCHEMA_VERSION
    parts = {"starts": Start, "rows": Row, "bandwidths": Bandwidth, "arithmetic": Arithmetic}
    listed = {name: tuple(kind(**entry) for entry in content[name]) for name, kind in parts.items()}
    return Report(**{**content, **listed, "remarks": tuple(content["remarks"])})


def test_a_report_survives_json() -> None:
    assert read_report(report_json(REPORT)) == REPORT


def test_the_json_has_this_form() -> None:
    content = json.loads(report_json(REPORT))
    assert content["schema_version"] == 4
    assert set(content) == {
        "schema_version", "machine", "bundle", "backends", "starts", "rows", "bandwidths", "arithmetic", "missing",
        "remarks",
    }  # fmt: skip
    assert set(content["rows"][0]) == {
        "backend", "operation", "path", "batch", "calls", "p50", "p90", "p99", "p999", "max", "jitter", "floor",
        "times_floor", "times_beside", "times_decode", "steps_per_second", "bandwidth_share", "roofline_share",
    }  # fmt: skip
    assert content["rows"][2]["p999"] is None


def test_the_table_has_one_line_for_each_figure_and_its_columns_are_aligned() -> None:
    lines = report_text(REPORT).splitlines()
    start = lines.index("1 chunk a call, microseconds, figures taken in turns")
    head, rule, floor, device = lines[start + 1 : start + 5]
    assert head.split() == [
        "backend",
        "call",
        "path",
        "calls",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "max",
        "jitter",
        "x",
        "floor",
        "steps/s",
    ]
    assert set(rule) == {"-"}
    assert floor.split() == [
        "floor",
        "trivial",
        "kernel",
        "floor",
        "1,000",
        "8.0",
        "11.0",
        "14.0",
        "20.0",
        "30.0",
        "4.0",
        "–",
        "–",
    ]
    assert device.split() == [
        "ours",
        "decode",
        "device",
        "1,000",
        "10.0",
        "11.0",
        "14.0",
        "20.0",
        "30.0",
        "4.0",
        "1.25",
        "800,000",
    ]
    assert len(head) == len(rule) == len(floor) == len(device)


def test_a_column_with_nothing_to_say_is_left_out_and_a_gap_is_a_dash() -> None:
    text = report_text(REPORT)
    large = text[text.index("4096 chunks a call") :].splitlines()
    heads = ["backend", "call", "path", "calls", "p50", "p90", "max", "steps/s", "bandwidth", "roofline"]
    assert large[1].split() == heads
    assert large[4] == "copy bandwidth measured in the same rounds: device to device 4000.0 GB/s"
    assert large[5] == "fp32 rate measured in the same rounds: 65.0 TFLOP/s"
    [cold] = [line for line in text.splitlines() if line.startswith("ours ") and "0.500" in line]
    assert cold.split() == ["ours", "0.500", "0.100", "0.200", "0.150", "0.100", "0.0002", "70"]


def test_the_text_names_what_is_missing_what_was_measured_and_what_jitter_means() -> None:
    text = report_text(REPORT)
    for part in ("not measured: theirs: not installed", "/some/folder", "a processor", "p99 - p50", "- a remark"):
        assert part in text


def test_the_text_obeys_no_control_characters() -> None:
    text = report_text(replace(REPORT, missing={"theirs": "\x1b[2J\nnot measured: forged"}))
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert [line for line in text.splitlines() if line.startswith("not measured")] == [
        r"not measured: theirs: \x1b[2J not measured: forged"
    ]


def test_files_are_written_whole_beside_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    said = write_report(REPORT, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png", "bench.txt"]
    assert said == [f"wrote {folder / name}" for name in ("bench.json", "bench.txt", "bench.png")]
    assert read_report((folder / "bench.json").read_text(encoding="utf-8")) == REPORT
    assert (folder / "bench.txt").read_text(encoding="utf-8") == report_text(REPORT)
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(REPORT, tmp_path)
    before = (tmp_path / "bench.json").read_bytes()

    def fail(_path: Path, _target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InvalidInputError, match=r"cannot write .*bench\.png: no space left"):
        write_report(replace(REPORT, remarks=()), tmp_path)
    assert (tmp_path / "bench.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_without_matplotlib_there_is_no_picture_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    said = write_report(REPORT, tmp_path)
    assert said[0].startswith("no bench.png: ")
    assert "pip install matplotlib" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.txt"]


def test_a_picture_of_floors_alone_and_of_many_bars_can_be_drawn() -> None:
    floors = replace(REPORT, rows=(row(backend="floor", operation="trivial kernel", path="floor"),))
    many = replace(
        REPORT,
        rows=tuple(row(backend=f"b{n}", batch=b, p50=10.0**n, p99=2 * 10.0**n) for b in (1, 64) for n in range(9)),
    )
    for report in (floors, many):
        assert report_png(report).startswith(b"\x89PNG")


# --- the command ------------------------------------------------------------------------------------------------------


def test_every_backend_is_measured_or_listed_with_the_reason(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However slow a call is here, none is left out.
    monkeypatch.setattr("rfsq.runtime.benchmark.timing._ROUND_US", 1e12)
    report = bench_run.bench(bench_run.Config(bundle, batches=(1, 3), rounds=1, starts=0))
    assert "onnxruntime" in report.backends
    assert {*report.backends, *report.missing} >= set(BACKEND_NAMES)
    assert "has no C engine" in report.missing["c"]
    measured = {(found.backend, found.operation, found.path, found.batch) for found in report.rows}
    assert measured >= {
        ("onnxruntime", operation, path, batch)
        for operation in ("encode", "decode", "decode l2")
        for path in ("host", "unchecked")
        for batch in (1, 3)
    }
    assert {"date", "CPU", "versions", "system"} <= report.machine.keys()
    assert f"numpy {np.__version__}" in report.machine["versions"]
    assert all(found.calls == CALLS_PER_ROUND for found in report.rows if found.batch == 1)


def test_a_backend_with_wrong_answers_is_not_measured(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rfsq.runtime.backends import onnxruntime as ort_backend

    class Wrong(ort_backend.OrtBackend):
        def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
            super().decode_into(tokens, stats, actions)
            actions += 1

    offer(monkeypatch, {"onnxruntime": Wrong}, alone=True)
    assert bench.main([str(bundle), "--rounds", "1"]) == 2
    assert "does not give the reference's answers" in capsys.readouterr().err


def test_where_every_call_fails_nothing_was_measured(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_tokenizer: object, _size: int) -> None:
        raise InferenceError("the library failed")

    monkeypatch.setattr("rfsq.runtime.benchmark.timing.random_batch", fail)
    assert bench.main([str(bundle), "--batch", "2", "--starts", "0"]) == 2
    assert "onnxruntime, batch 2: the library failed" in capsys.readouterr().err


def test_the_command_prints_and_writes_the_same_report(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundle), "--backends", "onnxruntime", "--batch", "2", "--rounds", "1", "--starts", "1"]
    assert bench.main([*arguments, "--output", str(tmp_path), "-v"]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "bench.txt").read_text(encoding="utf-8")
    assert printed.startswith(written)
    assert report_text(read_report((tmp_path / "bench.json").read_text(encoding="utf-8"))) == written
    assert "2 chunks a call" in written
    assert "cold start, medians of 1 new processes" in written


def test_it_says_first_what_it_does_and_how_long_that_takes_and_then_how_far_it_is(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody looks at a terminal; that it is there before anything is measured is what counts."""
    said: list[str] = []

    def start(_folder: Path, backend: str, processes: int) -> Start:
        said.append(capsys.readouterr().err)
        return replace(REPORT.starts[0], backend=backend, processes=processes)

    monkeypatch.setattr(bench_run, "measure_start", start)
    assert bench.main([str(bundle), "--batch", "1", "2", "--rounds", "20", "--starts", "3"]) == 0
    assert said == [
        "measuring onnxruntime: 7 new processes, then 20 rounds of 6 figures with 1 chunk and 2 chunks a call, and "
        "8 figures of distributions: about 26 s where nothing else runs; --quick takes a tenth\n"
    ]


def test_how_long_the_rest_takes_is_told_from_the_rounds_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    now = iter([100.0, 103.0, 106.0])
    monkeypatch.setattr("rfsq.runtime.benchmark.run.time.monotonic", lambda: next(now))
    progress = bench_run.Progress()
    monkeypatch.setattr(progress, "show", shown.append)
    for number in range(3):
        progress.show_round("1 chunk a call", number, 5)
    assert shown == [
        "1 chunk a call: round 1 of 5",
        "1 chunk a call: round 2 of 5, about 12 s left",
        "1 chunk a call: round 3 of 5, about 9 s left",
    ]


@pytest.mark.parametrize(
    ("arguments", "rounds", "starts"),
    [
        ([], 100, 5),
        (["--quick"], 10, 1),
        (["--quick", "--rounds", "3"], 3, 1),
        (["--quick", "--starts", "0"], 10, 0),
    ],
)
def test_a_first_look_has_fewer_rounds_and_starts(
    arguments: list[str], rounds: int, starts: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bench_run.Config] = []

    def measured(config: bench_run.Config, _progress: object) -> Report:
        asked.append(config)
        return REPORT

    monkeypatch.setattr(bench_run, "bench", measured)
    assert bench.main([str(bundle), *arguments]) == 0
    assert [(config.rounds, config.starts) for config in asked] == [(rounds, starts)]


def test_the_command_returns_2_where_nothing_can_be_measured(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert bench.main([str(bundle), "--backends", "c", "cuda"]) == 2
    assert "no backend can be measured" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert bench.main([str(bundle), "--output", str(tmp_path / "file")]) == 2
    assert "file is no writable folder; choose a writable folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--rounds", "0"], ["--starts", "-1"], ["--backends", "x"]])
def test_senseless_arguments_are_refused(arguments: list[str], bundle: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([str(bundle), *arguments])
    assert caught.value.code == 2


def test_the_script_runs_from_any_folder_without_torch_and_matplotlib_and_on_any_terminal(
    bundle: Path, tmp_path: Path
) -> None:
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'onnx', 'matplotlib', 'rfsq_ref', 'evidence', 'export', 'cuda'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv[1:] = [{str(bundle)!r}, '--rounds', '1', '--batch', '1', '--starts', '0', '--output', 'out']\n"
        f"runpy.run_path({str(ROOT / 'runtime' / 'bench.py')!r}, run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    said = (
        b"measuring onnxruntime: 1 round of 6 figures with 1 chunk a call, and 8 figures of distributions: "
        b"less than 1 s where nothing else runs\n"
    )
    assert (result.returncode, result.stderr) == (0, said)
    assert b"no bench.png" in result.stdout
    assert (tmp_path / "out" / "bench.json").is_file()


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that are started."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("no_gpu")
def test_peers_are_measured_in_turn_with_ours_and_this_process_stays_free_of_torch(bundle: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rfsq.runtime.benchmark.run import Config, bench\n"
        "from rfsq.runtime.benchmark.report import report_json\n"
        f"config = Config(Path({str(bundle)!r}), ('onnxruntime',), (2,), rounds=1, starts=0, has_peers=True)\n"
        "report = bench(config)\n"
        "assert 'torch' not in sys.modules\n"
        "print(report_json(report))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    report = read_report(result.stdout)
    peers = [found for found in report.rows if found.backend == "torch eager"]
    assert [(found.operation, found.path, found.batch) for found in peers] == [
        (operation, "host", 2) for operation in ("encode", "decode", "decode l2")
    ]
    assert all(found.p50 > 0 and 1 <= found.calls <= CALLS_PER_ROUND for found in peers)
    assert "torch finds no GPU" in report.missing["torch.compile"]
    assert any("random weights" in remark for remark in report.remarks)
    assert f"torch {torch.__version__}" in report.machine["versions"]


def test_peers_that_do_not_start_are_missing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "peers.py"
    script.write_text("raise ModuleNotFoundError('No module named torch')", encoding="utf-8")
    config = bench_run.Config(bundle, ("onnxruntime",), (1,), rounds=1, starts=0, has_peers=True)
    monkeypatch.setattr("rfsq.runtime.benchmark.processes._SCRIPT", script)
    assert "status 1: ModuleNotFoundError: No module named torch" in bench_run.bench(config).missing["peers"]
    monkeypatch.setattr("rfsq.runtime.benchmark.processes._SCRIPT", tmp_path / "nothing.py")
    assert "the whole repository" in bench_run.bench(config).missing["peers"]


def test_peers_that_fail_or_end_on_the_way_are_left_out(
    tokenizer: ActionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"peer": "p", "prefix": None, "path": "device", "batch": 1, "on_gpu": True, "bytes_in": 1, "bytes_out": 1}
    offered = {"versions": {}, "figures": [entry, {**entry, "path": "host", "prefix": 2}], "unavailable": {}}
    script = tmp_path / "peers.py"
    script.write_text(
        f"import json\nprint({json.dumps({**offered, 'remarks': []})!r}, flush=True)\n"
        "input()\nprint(json.dumps('out of memory'), flush=True)\ninput()\nraise SystemExit('crashed')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("rfsq.runtime.benchmark.processes._SCRIPT", script)
    with open_peers(tokenizer.model, [1], "trivial kernel") as peers:
        assert [found.floor for found in peers.figures] == ["trivial kernel", "copies of decode l2"]
        taken, failed = measure(peers.figures, rounds=1)
        # The pipe of a process that has ended is not written to: as a script, that would end this one.
        with pytest.raises(InferenceError, match="ended with status 1: crashed"):
            peers.figures[0].take(1)
    assert taken == {}
    assert failed == {
        "p, encode, device, batch 1": "out of memory",
        "p, decode l2, host, batch 1": "the peers' process ended with status 1: crashed",
    }


@pytest.mark.parametrize("is_robust", [True, False])
def test_the_peer_computes_what_the_published_model_computes(is_robust: bool) -> None:
    torch.manual_seed(0)
    theirs = published_model.ActionRFSQAE(3, 4, 3, 5, use_layernorm=is_robust, width=8).eval()
    ours = torch_peers.PublishedModel(SMALL, is_robust=is_robust).eval()
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("rfsq")}
    ours.load_state_dict(weights)
    actions = torch.randn(50, 2, 3)
    tokens = theirs.encode(actions)
    assert torch.equal(ours.encode(actions), tokens)
    assert torch.equal(ours.decode(tokens), theirs.decode_from_indices(tokens))
    theirs.rfsq.layers = theirs.rfsq.layers[:2]
    assert torch.equal(ours.decode(tokens[..., :2]), theirs.decode_from_indices(tokens[..., :2]))


def test_the_peer_has_the_embedded_weights_where_they_fit(robust: Any) -> None:
    names = ("action_dim", "latent_dim", "hidden_width", "num_layers", "num_levels")
    sizes = {name: getattr(robust.config, name) for name in names} | {"mode": "calibrated"}
    model, remark = torch_peers.published_model(sizes)
    assert "embedded robust checkpoint" in remark
    assert all(torch.equal(model.state_dict()[name], value) for name, value in robust.weights.items())
    model, remark = torch_peers.published_model({**sizes, "hidden_width": 32})
    assert "random weights" in remark
    assert model.encoder[0].out_features == 32


# --- the GPU, on the processor ----------------------------------------------------------------------------------------


class HostCuda:
    """Stands in for `runtime.backends.gpu.driver`: memory of the processor, work at once, graphs that do it again."""

    def __init__(self) -> None:
        self.is_open: dict[str, list[object]] = {}
        self.copies: list[tuple[str, int]] = []
        self.synchronised = 0
        self.closed: list[str] = []
        cuda = self

        class Resource:
            def close(self) -> None:
                cuda.is_open[type(self).__name__].remove(self)
                cuda.closed.append(type(self).__name__)

            def _open(self) -> None:
                cuda.is_open.setdefault(type(self).__name__, []).append(self)

        class Stream(Resource):
            handle = 7

            def __init__(self) -> None:
                self._open()

            def synchronize(self) -> None:
                cuda.synchronised += 1

        class DeviceMemory(Resource):
            def __init__(self, num_bytes: int) -> None:
                self.num_bytes, self.array = num_bytes, np.zeros(num_bytes, np.uint8)
                self.address = self.array.ctypes.data
                self._open()

        class PinnedArray(Resource):
            def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
                self.array = np.zeros(shape, dtype)
                self.address, self.num_bytes = self.array.ctypes.data, self.array.nbytes
                self._open()

        class Graph(Resource):
            def __init__(self, work: Callable[[], None]) -> None:
                self.work = work
                self._open()

            def launch(self, stream: int) -> None:
                assert stream == Stream.handle
                self.work()

        self.Stream, self.DeviceMemory, self.PinnedArray = Stream, DeviceMemory, PinnedArray
        self.capture = lambda _stream, work: Graph(work)
        self.copy_to_device = functools.partial(self._copy, "to device")
        self.copy_to_host = functools.partial(self._copy, "to host")

    def _copy(self, way: str, target: int, source: int, num_bytes: int, _stream: int) -> None:
        self.copies.append((way, num_bytes))
        ctypes.memmove(target, source, num_bytes)

    def call(self, _function: object, target: int, source: int, num_bytes: int, kind: Any, stream: int) -> None:
        self._copy(kind.name.removeprefix("cudaMemcpy"), target, source, num_bytes, stream)

    def open_device(self) -> Any:
        return SimpleNamespace(compute_capability="9.0", multiprocessors=3)

    @property
    def num_open(self) -> int:
        return sum(map(len, self.is_open.values()))


@pytest.fixture
def bench_gpu() -> Any:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")
    return importlib.import_module("rfsq.runtime.benchmark.gpu")


@pytest.fixture
def cuda(bench_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    fake = HostCuda()
    monkeypatch.setattr(bench_gpu, "cuda_api", fake)
    return fake


def test_the_floor_of_host_calls_is_their_copies_alone(
    bench_gpu: Any, cuda: HostCuda, dynamic_tokenizer: ActionTokenizer
) -> None:
    batch = random_batch(dynamic_tokenizer, 5)
    with contextlib.ExitStack() as scope:
        figures = list(bench_gpu.floor_figures(scope, dynamic_tokenizer.model, batch))
        assert cuda.copies == []
        for found in figures:
            found.take(1)
    steps = 5 * 2
    assert [found.operation for found in figures] == [f"copies of {name}" for name in ("encode", "decode", "decode l2")]
    actions, tokens, stats = steps * 3 * 4, steps * 4 * 4, steps * 2 * 4
    expected = [
        [("to device", actions), ("to host", 3 * tokens), ("to host", 3 * stats)],
        [("to device", 3 * tokens), ("to device", 3 * stats), ("to host", actions)],
        [("to device", 2 * tokens), ("to device", 2 * stats), ("to host", actions)],
    ]
    # One call to warm up, one that is timed.
    assert cuda.copies == [copy for copies in expected for copy in copies * 2]
    assert cuda.synchronised == 6
    assert cuda.num_open == 0


@dataclass
class FakeBound:
    """A bound call that notes what happens to it."""

    cuda: HostCuda
    launches: int = 0

    def __call__(self) -> None:
        self.launches += 1

    def close(self) -> None:
        self.cuda.closed.append("bound call")


class FakeTokenizer:
    """What `device_figures` asks of a tokenizer; arrays are noted with their content."""

    def __init__(self, tokenizer: ActionTokenizer, cuda: HostCuda, most: int = 100) -> None:
        self.model, self.backend, self._cuda, self._most = tokenizer.model, tokenizer.backend, cuda, most
        self.bound: list[tuple[str, list[np.ndarray | None], int, FakeBound]] = []

    def bind_encode(self, actions: Any, out: Any, stats_out: Any, *, stream: int) -> FakeBound:
        return self._bind("encode", [actions, out, stats_out], stream)

    def bind_decode(self, tokens: Any, out: Any, stats: Any, *, stream: int) -> FakeBound:
        return self._bind("decode", [tokens, out, stats], stream)

    def _bind(self, role: str, arrays: list[Any], stream: int) -> FakeBound:
        if arrays[0].shape[0] > self._most:
            raise InferenceError("so many chunks cannot be bound at once")
        content = [None if array is None else self._content(array) for array in arrays]
        call = FakeBound(self._cuda)
        self.bound.append((role, content, stream, call))
        return call

    @staticmethod
    def _content(array: Any) -> np.ndarray:
        return np.frombuffer(ctypes.string_at(array.address, array.num_bytes), array.dtype).reshape(array.shape)


@pytest.mark.parametrize("fixture", ["tokenizer", "dynamic_tokenizer"])
def test_device_calls_are_bound_to_arrays_that_lie_on_the_gpu(
    fixture: str, bench_gpu: Any, cuda: HostCuda, request: pytest.FixtureRequest
) -> None:
    real = request.getfixturevalue(fixture)
    batch, fake = random_batch(real, 5), FakeTokenizer(real, cuda)
    with contextlib.ExitStack() as scope:
        figures = list(bench_gpu.device_figures(scope, fake, batch))
        before = cuda.synchronised
        for found in figures:
            found.take(10)
        # Every launch is waited for.
        assert cuda.synchronised - before == sum(bound[3].launches for bound in fake.bound) == 3 * 12
        assert cuda.is_open["PinnedArray"] == []
    assert [(found.operation, found.path, found.floor) for found in figures] == [
        (name, "device", "trivial kernel") for name in ("encode", "decode", "decode l2")
    ]
    assert [(bound[0], bound[2]) for bound in fake.bound] == [("encode", 7), ("decode", 7), ("decode", 7)]
    np.testing.assert_array_equal(fake.bound[0][1][0], batch.actions)
    for (_, arrays, _, _), prefix in zip(fake.bound[1:], (3, 2), strict=True):
        np.testing.assert_array_equal(arrays[0], batch.codes.prefix(prefix).tokens)
        assert (arrays[2] is None) == (batch.codes.stats is None)
        if arrays[2] is not None:
            np.testing.assert_array_equal(arrays[2], batch.codes.prefix(prefix).stats)
    host = {found.operation: found for found in host_figures(real, batch, has_copies=True)}
    for found in figures:
        assert (found.bytes_in, found.bytes_out) == (host[found.operation].bytes_in, host[found.operation].bytes_out)
    assert cuda.num_open == 0
    # A bound call uses arrays and stream until it is closed.
    last = max(index for index, name in enumerate(cuda.closed) if name == "bound call")
    assert cuda.closed.index("Stream") > last


class FakeLibrary:
    """Stands in for `KernelLibrary`: kernels that note their launches."""

    def __init__(self, cuda: HostCuda) -> None:
        self.cuda, self.launches = cuda, list[tuple[Any, ...]]()
        self.is_closed = False

    def __call__(self, image: bytes) -> FakeLibrary:
        assert image == b"an image"
        return self

    def kernel(self, name: str) -> Any:
        def launch(blocks: int, arguments: Any, stream: int) -> None:
            assert not self.is_closed
            [memory] = self.cuda.is_open["DeviceMemory"]
            # The launch gets the address of the address of the first argument.
            pointer = ctypes.c_void_p.from_address(arguments.address).value
            assert ctypes.c_uint64.from_address(pointer).value == memory.address
            self.launches.append((name, blocks, memory.num_bytes, stream))

        return SimpleNamespace(launch=launch)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def library(bench_gpu: Any, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary(cuda)

    def compile_kernels(source: str, _name: str, compute_capability: str) -> bytes:
        assert "void __launch_bounds__(32) trivial(float *x)" in source
        assert compute_capability == "9.0"
        return b"an image"

    monkeypatch.setattr(bench_gpu, "compile_kernels", compile_kernels)
    monkeypatch.setattr(bench_gpu, "KernelLibrary", fake)
    return fake


def test_a_kernel_of_one_block_is_launched_once_and_captured(
    bench_gpu: Any, cuda: HostCuda, library: FakeLibrary
) -> None:
    with contextlib.ExitStack() as scope:
        call = bench_gpu.trivial_kernel(scope)
        assert library.launches == [("trivial", 1, 32 * 4, 7)]
        call()
        assert library.launches == [("trivial", 1, 32 * 4, 7)] * 2
    assert library.is_closed
    assert cuda.num_open == 0


def test_the_rate_of_arithmetic_counts_two_operations_for_each_sum_of_each_thread(
    bench_gpu: Any, cuda: HostCuda, library: FakeLibrary
) -> None:
    with contextlib.ExitStack() as scope:
        found = bench_gpu.arithmetic_figure(scope, 64)
        found.take(1)
        blocks = 3 * 8
        assert library.launches == [("multiply_add", blocks, 8 * 4, 7)] * 2
        assert (found.backend, found.path, found.batch) == (ARITHMETIC, "floor", 64)
        assert found.operations == blocks * 256 * 8 * 32 * 1024 * 2
    assert cuda.num_open == 0


def test_the_kernels_that_are_measured_compile(bench_gpu: Any) -> None:
    from rfsq.runtime.backends.gpu.kernels import KernelError, compile_kernels, nvrtc_version

    try:
        nvrtc_version()
    except KernelError as error:
        pytest.skip(str(error))
    image = compile_kernels(bench_gpu._SOURCE, "floor.cu", "9.0")
    assert b"multiply_add" in image


def test_bandwidth_counts_bytes_read_and_written(
    bench_gpu: Any, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "_COPY_BYTES", 1000)
    with contextlib.ExitStack() as scope:
        figures = list(bench_gpu.copy_figures(scope, 64))
        for found in figures:
            found.take(1)
    assert [(found.backend, found.operation, found.batch, found.bytes_in) for found in figures] == [
        (BANDWIDTH, "device to device", 64, 2000),
        (BANDWIDTH, "host to device", 64, 1000),
        (BANDWIDTH, "device to host", 64, 1000),
    ]
    ways = ["DeviceToDevice", "HostToDevice", "DeviceToHost"]
    assert cuda.copies == [(way, 1000) for way in ways for _ in range(2)]
    assert cuda.num_open == 0


@pytest.fixture
def gpu_backend(bench_gpu: Any, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`tensorrt-rtx` that is ONNX Runtime in truth, on the GPU that is the processor."""
    from rfsq.runtime.backends import onnxruntime as ort_backend

    class Borrowed(ort_backend.OrtBackend):
        name = "tensorrt-rtx"

    class Tokenizer(ActionTokenizer):
        def bind_encode(self, actions: Any, *_arguments: Any, **_options: Any) -> Any:
            return self._bound(actions)

        def bind_decode(self, tokens: Any, *_arguments: Any, **_options: Any) -> Any:
            return self._bound(tokens)

        @staticmethod
        def _bound(source: Any) -> FakeBound:
            if source.shape[0] > 64:
                raise InferenceError("so many chunks cannot be bound at once")
            return FakeBound(cuda)

    device = SimpleNamespace(memory=8e10, driver="13.0", compute_capability="9.0", multiprocessors=3)
    monkeypatch.setattr(cuda, "open_device", lambda: device)
    monkeypatch.setattr(bench_run, "ActionTokenizer", Tokenizer)
    monkeypatch.setattr(bench_gpu, "_COPY_BYTES", 10_000)
    monkeypatch.setattr(bench_gpu, "_launch", lambda *_arguments: lambda: None)
    offer(monkeypatch, {"tensorrt-rtx": Borrowed, "onnxruntime": ort_backend.OrtBackend}, alone=True)
    yield bench_gpu
    assert cuda.num_open == 0


def test_gpu_calls_stand_beside_their_floors(gpu_backend: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "trivial_kernel", lambda _scope: lambda: None)
    report = bench_run.bench(bench_run.Config(bundle, batches=(1, 64), rounds=1, starts=0))
    assert list(report.backends) == ["tensorrt-rtx", "onnxruntime"]
    for batch in (1, 64):
        # Of distributions no copies are measured alone.
        rows = [found for found in report.rows if found.batch == batch and found.times_decode is None]
        assert [found.operation for found in rows if found.path == "floor"] == [
            "trivial kernel", "copies of encode", "copies of decode", "copies of decode l2",
        ]  # fmt: skip
        medians = {found.operation: found.p50 for found in rows if found.path == "floor"}
        for found in rows:
            expected = {"host": f"copies of {found.operation}", "unchecked": f"copies of {found.operation}"}
            if found.backend == "tensorrt-rtx":
                assert found.floor == expected.get(found.path, "trivial kernel")
                assert found.times_floor == pytest.approx(found.p50 / medians[found.floor])
                assert (found.bandwidth_share is None) == (batch == 1)
            else:
                assert (found.floor, found.times_floor, found.bandwidth_share) == ("", None, None)
    assert {(entry.way, entry.batch) for entry in report.bandwidths} == {
        (way, 64) for way in ("device to device", "host to device", "device to host")
    }
    assert "driver" in report.machine
    assert "x floor" in report_text(report)


def test_a_floor_that_cannot_be_measured_is_said_plainly(
    gpu_backend: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_scope: object) -> None:
        raise InferenceError("NVRTC cannot be used")

    monkeypatch.setattr(gpu_backend, "trivial_kernel", fail)
    report = bench_run.bench(bench_run.Config(bundle, batches=(1,), rounds=1, starts=0))
    assert report.missing["floor: a captured graph with one trivial kernel"] == "NVRTC cannot be used"
    device = [found for found in report.rows if found.path == "device"]
    assert len(device) == 3
    assert {(found.floor, found.times_floor) for found in device} == {("", None)}


def test_a_batch_too_large_to_bind_is_measured_from_the_host_alone(
    gpu_backend: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_backend, "trivial_kernel", lambda _scope: lambda: None)
    report = bench_run.bench(bench_run.Config(bundle, batches=(65,), rounds=1, starts=0))
    assert "cannot be bound" in report.missing["tensorrt-rtx, device, batch 65"]
    assert {found.path for found in report.rows if found.backend == "tensorrt-rtx"} == {"host", "unchecked"}


def test_no_gpu_is_a_reason_and_no_failure(bench_gpu: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BackendUnavailableError("CUDA finds no usable GPU here")

    monkeypatch.setattr(bench_gpu, "open_device", fail)
    monkeypatch.setattr(bench_run, "GPU_BACKENDS", ("onnxruntime",))
    report = bench_run.bench(bench_run.Config(bundle, ("onnxruntime",), (1,), rounds=1, starts=0))
    assert report.missing == {"floor and bandwidth of the GPU": "CUDA finds no usable GPU here"}
    assert {found.times_floor for found in report.rows} == {None}
