"""The fault campaign: faults of every kind are answered rightly, and a decoder that answers wrongly is found out."""

import mmap
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime import ActionTokenizer, ControlDecoder, Status
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.errors import BackendUnavailableError, InferenceError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.control.belief_config import WhenUncertain
from rfsq.runtime.control.beliefs import BeliefJudge
from rfsq.runtime.control.config import OnFault, Strategy
from rfsq.runtime.control.guard import ActionGuard
from rfsq.runtime.control.queue import ActionQueue
from rfsq.runtime.control.tick_log import Reporter
from rfsq.runtime.control.worker import Retrier
from rfsq.runtime.qualification import campaign as fault_campaign
from rfsq.runtime.qualification import system as fault_system
from rfsq.runtime.qualification.campaign import SETUPS, main, nan_backends_of, run_campaign
from rfsq.runtime.qualification.fault_report import FaultReport
from rfsq.runtime.qualification.injection import Fault, faulty, weight_tables, with_nan_weights
from rfsq.runtime.qualification.kinds import BELIEF_KINDS, KINDS, kinds_with
from rfsq.runtime.qualification.rig import Setup
from rfsq.runtime.qualification.system import run_system_faults
from rfsq.runtime.qualification.token_faults import LEGAL_TOKENS
from tests.bundles import Recipe
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.runtime.control.loops import hurry

#: About fifty in each setup, so that each of these sees most kinds.
FAULTS = 4400
DOCUMENT = Path(__file__).parents[3] / "docs" / "control_loop.md"
Sabotage = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def both(bundle_of: Callable[[Recipe], Path]) -> Path:
    """A bundle with two backends."""
    return bundle_of(Recipe(chunk_length=5, c_targets=host_targets()[:1]))


@pytest.fixture(scope="module")
def main_one(both: Path) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(both, backend="c") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def fallback(both: Path) -> Iterator[ActionTokenizer]:
    with ActionTokenizer.load(both, backend="onnxruntime") as loaded:
        yield loaded


def test_the_document_counts_what_there_is() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    # And one more kind for each backend whose weights can be made NaN.
    assert f"10000 faults of {len(KINDS) + len(BELIEF_KINDS) + 2} kinds in {len(SETUPS)} setups" in text


def test_faults_of_every_kind_in_every_setup_are_answered_rightly(
    both: Path, main_one: ActionTokenizer, fallback: ActionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kind as many as tell; the command injects 10,000."""
    hurry(monkeypatch, lambda warm: warm.tokenizer.backend.fault == Fault.HANGS)
    report = run_campaign(main_one, FAULTS, fallback=fallback, nan_backends=nan_backends_of(both))
    print(report)
    assert report.holds, str(report)
    assert report.faults == FAULTS
    assert report.answered.keys() == {
        *(kind.name for kind in KINDS + BELIEF_KINDS),
        "NaN weights in c",
        "NaN weights in onnxruntime",
    }
    common = {kind.name for kind in KINDS + BELIEF_KINDS if not kind.is_slow}
    assert min(sum(report.answered[name].values()) for name in common) > 30
    assert min(sum(answers.values()) for answers in report.answered.values()) >= 10
    # Each status was seen, but that of a decoder without a chunk.
    seen = {answer.split()[0] for answers in report.answered.values() for answer in answers}
    assert seen == {status.name for status in Status} - {"NOT_READY"}


@pytest.mark.parametrize("backend", ["c", "onnxruntime"])
def test_faults_of_every_kind_are_answered_rightly_with_chunk_tokens(
    chunk_bundle: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, lambda warm: warm.tokenizer.backend.fault == Fault.HANGS)
    other = {"c": "onnxruntime", "onnxruntime": "c"}[backend]
    with (
        ActionTokenizer.load(chunk_bundle, backend=backend) as first,
        ActionTokenizer.load(chunk_bundle, backend=other) as second,
    ):
        nan_backends = nan_backends_of(chunk_bundle)
        report = run_campaign(first, 1200, fallback=second, nan_backends=nan_backends, setups=SETUPS[::3])
        kinds = kinds_with(nan_backends, first.model, takes_beliefs=True)
    assert report.holds, str(report)
    assert report.answered.keys() == {kind.name for kind in kinds}
    # What nobody can tell from good tokens is served.
    assert all(report.answered[name].keys() == {"OK"} for name in LEGAL_TOKENS)


@pytest.mark.parametrize("has_chunk_tokens", [False, True])
def test_chunks_of_one_action_are_answered_rightly_too(
    bundle_of: Callable[[Recipe], Path], tmp_path: Path, has_chunk_tokens: bool
) -> None:
    """Nothing is left of one when the next comes. One chunk token is all there is, and no uint16 is too high for it."""
    if has_chunk_tokens:
        sizes = ChunkSizes(action_dim=2, chunk_length=1, num_classes=4, token_bits=16, num_tokens=1)
        path = write_chunk_bundle(tmp_path / "bundle", ChunkRecipe(sizes))
    else:
        path = bundle_of(Recipe(chunk_length=1))
    with ActionTokenizer.load(path, backend="onnxruntime") as loaded:
        report = run_campaign(loaded, 500, nan_backends=nan_backends_of(path), setups=SETUPS[::9])
    assert report.holds, str(report)


def test_statistics_that_are_wrong_are_refused_as_tokens_are(dynamic_tokenizer: ActionTokenizer) -> None:
    setups = [Setup(), Setup(use_worker=True, has_fallback=True), Setup(on_fault=OnFault.STOP)]
    report = run_campaign(dynamic_tokenizer, 600, setups=setups)
    assert dynamic_tokenizer.model.mode == DeployMode.DYNAMIC
    assert report.holds, str(report)
    assert set(report.answered["stats missing, NaN or of another bundle"]) <= {
        "BAD_TOKEN is_held",
        "BAD_TOKEN is_held is_latched",
    }


def test_equal_seeds_inject_equal_faults(main_one: ActionTokenizer) -> None:
    first, again, other = (run_campaign(main_one, 120, setups=SETUPS[:2], seed=seed) for seed in (5, 5, 6))
    assert first.answered == again.answered
    assert first.facts["ticks"] == again.facts["ticks"]
    assert first.facts["ticks"] != other.facts["ticks"] or first.answered != other.answered


# --- it can fail ------------------------------------------------------------------------------------------------------


def _answering(change: Callable[[Any], None]) -> Sabotage:
    """A decoder whose results are changed before they leave."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        step = ControlDecoder.step

        def changed(self: ControlDecoder, *arguments: Any, **options: Any) -> Any:
            result = step(self, *arguments, **options)
            change(result)
            return result

        patch.setattr(ControlDecoder, "step", changed)

    return sabotage


def _set(name: str, value: object, when: Callable[[Any], bool] = lambda _: True) -> Sabotage:
    return _answering(lambda result: setattr(result.shown, name, value) if when(result) else None)


def _with(kind: type, name: str, replacement: Any) -> Sabotage:
    return lambda patch: patch.setattr(kind, name, replacement)


def _pass_on(self: Any, action: Any) -> bool:
    """A guard that is bypassed."""
    self.values, self.actions = action.tolist(), action.copy()
    return False


def _spoil(result: Any) -> None:
    if result.is_held:
        result.actions[-1] = np.nan


def _exceed(result: Any) -> None:
    if not result.is_held:
        result.actions[0] = 1e6


def _drift(result: Any) -> None:
    if not result.is_held:
        result.actions[0] *= 0.99


@pytest.mark.parametrize(
    ("sabotage", "setup", "found"),
    [
        (_with(ActionGuard, "limit", _pass_on), Setup(), "further than the slew limit"),
        (_with(ActionGuard, "check_chunk", lambda *_: Status.OK), Setup(), "expected NONFINITE"),
        (_with(ActionGuard, "hold", lambda *_: None), Setup(), "not standing still"),
        (_with(ActionQueue, "clear", lambda *_: None), Setup(), "the tick after it: OK"),
        (_answering(_exceed), Setup(), "outside the limits"),
        (_answering(_spoil), Setup(), "not finite"),
        (_answering(_drift), Setup(), "not the action of this tick"),
        (_answering(_drift), Setup(Strategy.TEMPORAL_ENSEMBLE), "not the action of this tick"),
        (_set("status", Status.OK), Setup(), "expected BAD_TOKEN is_held"),
        (_set("status", Status.BAD_TOKEN, lambda result: result.is_held), Setup(), "expected STALE is_held"),
        (_set("fell_back", False), Setup(has_fallback=True), "expected OK fell_back"),
        (_set("is_latched", False), Setup(on_fault=OnFault.STOP), "expected BAD_TOKEN is_held is_latched"),
        (_with(ControlDecoder, "reset", lambda *_: None), Setup(on_fault=OnFault.STOP), "no service after it"),
        (_with(BeliefJudge, "doubt_after", lambda *_: 0), Setup(), "OK, expected UNCERTAIN is_held"),
        (_with(BeliefJudge, "doubt_after", lambda *_: 1), Setup(), "before it: UNCERTAIN is_held"),
        (
            _with(ActionGuard, "slow", lambda guard, action, _: guard.limit(action)),
            Setup(when_uncertain=WhenUncertain.SLOW),
            "not the action of this tick",
        ),
        (_with(Retrier, "_succeeds", lambda *_: False), Setup(has_fallback=True), "what had failed was not taken back"),
    ],
)
def test_what_a_decoder_does_wrong_is_found(
    sabotage: Sabotage,
    setup: Setup,
    found: str,
    main_one: ActionTokenizer,
    fallback: ActionTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fault_campaign, "_RECOVERY_S", 0.04)
    monkeypatch.setattr(fault_campaign, "_THREAD_S", 0.01)
    sabotage(monkeypatch)
    report = run_campaign(main_one, 60, fallback=fallback, setups=[setup])
    assert not report.holds
    assert any(found in problem for problem in report.problems), str(report)


# --- processes, files, disks ------------------------------------------------------------------------------------------


def test_killed_producers_lost_files_and_full_disks_leave_the_loop_alone(both: Path) -> None:
    report = run_system_faults(both, 2)
    print(report)
    assert report.holds, str(report)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"faults of {len(report.answered)} kinds with real processes" in text
    assert all(answers == {"right": 2} for answers in report.answered.values())


def test_they_leave_a_loop_of_chunk_tokens_alone(chunk_bundle: Path) -> None:
    """Of which many fit into a pipe."""
    report = run_system_faults(chunk_bundle, 1)
    assert report.holds, str(report)


def test_where_no_file_system_can_be_mounted_files_are_limited(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def refuse(command: list[str], **options: Any) -> Any:
        return run(["false"], **options) if command[0] == "mount" else run(command, **options)

    monkeypatch.setattr(subprocess, "run", refuse)
    report = run_system_faults(both, 1)
    assert "RLIMIT_FSIZE" in report.facts["disk"]
    assert report.holds, str(report)


def test_a_record_that_was_never_written_is_found(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "write", lambda *_: True)
    report = run_system_faults(both, 1)
    assert any("records failed and written is (0, 0)" in problem for problem in report.problems), str(report)


def test_a_file_of_the_bundle_that_is_mapped_is_found(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, kept = ActionTokenizer.load, []

    def mapping(path: Path, **options: Any) -> ActionTokenizer:
        with (Path(path) / "decoder.onnx").open("rb") as file:
            kept.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return load(path, **options)

    trial = fault_system._Trial(1, random.Random(0))
    monkeypatch.setattr(fault_system, "_DAMAGES", fault_system._DAMAGES[:1])
    monkeypatch.setattr(ActionTokenizer, "load", mapping)
    folder = both.parent / "mapped"
    with pytest.raises(FileNotFoundError):
        # The third opening is of files that were removed.
        fault_system._damage_bundles(trial, both, folder, "c")
    assert any("what is mapped of it" in problem for problem in trial.report.problems)


# --- the tools --------------------------------------------------------------------------------------------------------


def test_a_backend_fails_as_it_is_told(tokenizer: ActionTokenizer) -> None:
    pauses: list[float] = []
    broken, backend = faulty(tokenizer, pause=pauses.append, delay_s=0.25)
    tokens = tokenizer.encode(np.zeros((1, tokenizer.model.chunk_length, tokenizer.model.action_dim), np.float32))
    expected = tokenizer.decode(tokens)
    for fault, error in (
        (Fault.RAISES, InferenceError),
        (Fault.RAISES_UNKNOWN, RuntimeError),
        (Fault.OUT_OF_MEMORY, MemoryError),
        (Fault.WRONG_SHAPE, ValueError),
    ):
        backend.fault = fault
        with pytest.raises(error):
            broken.decode(tokens)
    for fault, is_wrong in (
        (Fault.NAN, np.isnan),
        (Fault.INF, np.isinf),
        (Fault.HUGE, lambda values: values > 1e29),
    ):
        backend.fault = fault
        assert is_wrong(broken.decode(tokens)).any()
    out = np.full_like(expected, 3)
    backend.fault = Fault.WRITES_NOTHING
    broken.decode_into(tokens, out)
    assert (out == 3).all()
    for backend.fault in (Fault.SLOW, Fault.NONE):
        np.testing.assert_array_equal(broken.decode(tokens), expected)
    assert pauses == [0.25]


def test_what_hangs_goes_on_when_it_is_released(tokenizer: ActionTokenizer) -> None:
    broken, backend = faulty(tokenizer)
    tokens = tokenizer.encode(np.zeros((1, tokenizer.model.chunk_length, tokenizer.model.action_dim), np.float32))
    backend.fault = Fault.HANGS
    for _ in range(2):
        answers: list[Any] = []
        thread = threading.Thread(target=lambda answers=answers: answers.append(broken.decode(tokens)))
        thread.start()
        while not backend.hanging:
            thread.join(0.001)
        assert thread.is_alive()
        assert not answers
        backend.release()
        thread.join()
        np.testing.assert_array_equal(answers[0], tokenizer.decode(tokens))
    assert backend.hanging == 0


@pytest.mark.parametrize("has_chunk_tokens", [False, True])
@pytest.mark.parametrize("name", ["onnxruntime", "c"])
def test_weights_are_nan_in_the_copy_alone(
    name: str,
    has_chunk_tokens: bool,
    both: Path,
    chunk_bundle: Path,
    main_one: ActionTokenizer,
    chunk_tokenizer: ActionTokenizer,
) -> None:
    bundle = open_bundle(chunk_bundle if has_chunk_tokens else both)
    tokenizer = chunk_tokenizer if has_chunk_tokens else main_one
    model = tokenizer.model
    # Of chunk tokens the first one names the class, and the last class has no weights.
    tokens = np.zeros(model.tokens_shape(5), np.int32)
    if has_chunk_tokens:
        tokens[:, 0] = np.arange(5) * (model.vocabulary // 8)
    expected = tokenizer.decode(tokens)
    backend = with_nan_weights(bundle, name)
    for prefix in model.prefixes:
        actions = np.zeros(model.actions_shape(5), np.float32)
        backend.decode_into(np.ascontiguousarray(tokens[..., :prefix]), None, actions)
        assert np.isnan(actions).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(tokenizer.decode(tokens), expected)
    assert weight_tables(bundle.content("decoder.onnx"))
    with pytest.raises(BackendUnavailableError, match="expected onnxruntime or c"):
        with_nan_weights(bundle, "cuda")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_how_many_of_each_group_and_each_kind_with_v(
    both: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(both), "--faults", "160", "--system", "1", "--fallback", "onnxruntime"]
    for option in ([], ["-v"]):
        assert main([*arguments, *option]) == 0
        printed = capsys.readouterr().out
        assert "160 faults of" in printed
        assert ("producer killed in the middle of a message (SIGKILL)" in printed) == bool(option)
        assert (len(printed.splitlines()) <= 24) != bool(option)
        assert printed.count("✓ 0 things were wrong") == 2


def test_the_command_fails_where_something_was_wrong(
    both: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = FaultReport()
    wrong.add("due OK", "another fault", "OK", [])
    for _ in range(9):
        wrong.add("due STALE", "a fault", "OK", ["it was not noticed"])
    monkeypatch.setattr(fault_campaign, "run_campaign", lambda *_, **__: wrong)
    assert main([str(both), "--system", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    # What failed comes first.
    assert [line.split()[:3] for line in lines[2:4]] == [["✗", "due", "STALE"], ["✓", "due", "OK"]]
    assert "✗ 9 things were wrong" in lines
    assert lines.count("a fault: it was not noticed") == 8
    assert "… and 1 more; -v shows them all" in lines


def test_the_command_without_a_bundle_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "no bundle at" in capsys.readouterr().err
    assert main([str(tmp_path), "--faults", "0", "--system", "0"]) == 2
