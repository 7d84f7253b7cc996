"""What is copied, pickled or handed to another process is the same thing there, or refused in words."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from rfsq import runtime
from rfsq.runtime import (
    ActionTokenizer,
    BackendUnavailableError,
    BeliefSettings,
    BundleError,
    CannotCopyError,
    ChunkVocabulary,
    ControlConfig,
    ControlDecoder,
    ControlResult,
    FingerprintError,
    PartialTokens,
    RealtimeConfig,
    RfsqError,
    Status,
    TokenizerError,
    TokenVocabulary,
    Watchdog,
)
from rfsq.runtime import tokenizer as tokenizer_module
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.bundle.errors import SequenceTooShortError
from rfsq.runtime.control.config import ActionKind
from rfsq.runtime.control.result import BrokenOff, TickOutcome
from tests.backends import offer
from tests.bundles import Recipe, random_actions, write_bundle
from tests.runtime.control.loops import scripted
from tests.runtime.policy.worker_datasets import Refusals, Tokens, stacked

ROOT = Path(__file__).parents[2]
ROOMS = ("runtime", "rfsq_ref", "calibration", "evidence", "export")

Copier = Callable[[Any], Any]


def pickled(value: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Any:
    return pickle.loads(pickle.dumps(value, protocol))  # noqa: S301  written right here


#: Every way that code copies an object in its own process.
COPIERS = pytest.mark.parametrize("copier", [pickled, copy.deepcopy, copy.copy])


@pytest.fixture(params=["c", "onnxruntime"])
def loaded(request: pytest.FixtureRequest, c_bundle: Path) -> Iterator[ActionTokenizer]:
    """On each backend of this machine."""
    with ActionTokenizer.load(c_bundle, backend=request.param) as tokenizer:
        yield tokenizer


@pytest.fixture
def chunks() -> Any:
    return random_actions(Recipe(), 6)


# --- every public class -----------------------------------------------------------------------------------------------

CONFIG = ControlConfig(0.002, (-1.0,), (1.0,), (0.5,), (ActionKind.DELTA,))
VOCABULARY = TokenVocabulary(3, 5, 4, 2, offset=100, special_ids=(("eos", 1),))
CHUNK_VOCABULARY = ChunkVocabulary(4, 16, offset=100, special_ids=(("eos", 1),))


def outcome(*values: float) -> TickOutcome:
    made = TickOutcome([*values])
    made.status, made.detail, made.tick = Status.STALE, "too old", 7
    return made


def result() -> ControlResult:
    return ControlResult(outcome(1, 2, 3))


def told(made: ControlResult) -> list[Any]:
    """All that a result says."""
    names = sorted(name for name, value in vars(ControlResult).items() if isinstance(value, property))
    return [value.tolist() if name == "actions" else value for name in names for value in [getattr(made, name)]]


#: What each public class says of itself, once for the original and once for the copy.
SAMPLES: dict[type[Any], tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    BeliefSettings: (
        lambda: BeliefSettings(BeliefKind("0" * 64, "tokens", 2, 1), (1.5, 2.0), {"expected": (0.5,)}),
        lambda settings: (settings, settings.text()),
    ),
    ChunkVocabulary: (
        lambda: CHUNK_VOCABULARY,
        lambda found: (found, found.to_ids(np.ones((1, 4), int)).tolist()),
    ),
    ControlConfig: (lambda: CONFIG, lambda config: config),
    ControlResult: (result, told),
    PartialTokens: (
        lambda: VOCABULARY.to_tokens(VOCABULARY.to_ids(np.ones((2, 2, 4, 3), np.int32))[:, :16], partial="prefix"),
        lambda part: (part.tokens.tolist(), part.whole.tolist(), part.used),
    ),
    RealtimeConfig: (lambda: RealtimeConfig(cpus=(0,)), lambda config: config),
    Status: (lambda: Status.STALE, lambda status: (status, type(status))),
    TokenVocabulary: (lambda: VOCABULARY, lambda found: (found, found.to_ids(np.ones((1, 2, 4, 3), int)).tolist())),
}
#: These have tests of their own below.
PROCESS_BOUND = {ActionTokenizer, ControlDecoder, Watchdog}


def test_no_public_class_is_left_out_here() -> None:
    public = {getattr(runtime, name) for name in runtime.__all__ if inspect.isclass(getattr(runtime, name))}
    errors = {kind for kind in public if issubclass(kind, Exception)}
    assert public - errors == SAMPLES.keys() | PROCESS_BOUND
    assert errors <= {kind for kind in error_types() if kind.__module__.startswith("rfsq.runtime.")}


@COPIERS
@pytest.mark.parametrize("kind", SAMPLES)
def test_a_copy_says_the_same(kind: type[Any], copier: Copier) -> None:
    make, said = SAMPLES[kind]
    sample = make()
    assert isinstance(sample, kind)
    copied = copier(sample)
    assert type(copied) is kind
    assert said(copied) == said(sample)


@pytest.mark.parametrize("copier", [pickled, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("is_broken", [False, True])
def test_a_copied_result_outlives_the_next_tick(copier: Copier, is_broken: bool) -> None:
    live = result()
    if is_broken:
        live.shown = BrokenOff(lambda values: [value / 2 for value in values], outcome(2, 4, 6))
    said = told(live)
    kept = copier(live)
    if isinstance(live.shown, TickOutcome):
        live.shown.values, live.shown.actions, live.shown.tick = [0, 0, 0], np.zeros(3, np.float32), 9
    live.shown = outcome(0, 0, 0)
    assert told(kept) == said
    assert kept.actions.tolist() == [1, 2, 3]


def test_a_watchdog_is_refused_in_words() -> None:
    watchdog = Watchdog(lambda: 0, 1.0, print)
    for copier in (pickled, copy.deepcopy, copy.copy):
        with pytest.raises(CannotCopyError, match="make one in the process of the loop"):
            copier(watchdog)


# --- errors -----------------------------------------------------------------------------------------------------------


def error_types() -> list[type[Exception]]:
    """Every exception that a room defines."""
    found = []
    for room in ROOMS:
        for file in sorted((ROOT / room).glob("**/*.py")):
            names = re.findall(r"^class (\w+)\(.*(?:Error|Exception)\)", file.read_text(), re.MULTILINE)
            module = (
                importlib.import_module(".".join(("rfsq", *file.relative_to(ROOT).with_suffix("").parts)))
                if names
                else None
            )
            found += [getattr(module, name) for name in names]
    return found


@pytest.mark.parametrize("kind", error_types(), ids=lambda kind: kind.__name__)
def test_every_error_has_the_one_base(kind: type[Exception]) -> None:
    """Whoever uses this project can tell its errors from all others."""
    # No error: it tells workers that another one has one.
    assert issubclass(kind, RfsqError) or kind.__name__ == "Stopped"


@pytest.mark.parametrize("kind", error_types(), ids=lambda kind: kind.__name__)
def test_an_error_reaches_another_process_as_it_was(kind: type[Exception]) -> None:
    """Whoever hands one on makes it of its message alone (DataLoader), or of its arguments and attributes (pickle)."""
    beside = kind.__init__.__code__.co_argcount - 2 if inspect.isfunction(kind.__init__) else 0
    for error in (kind("the message"), kind("the message", *range(3, 3 + beside))):
        error.add_note("said on the way")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            again = pickled(error, protocol)
            assert type(again) is kind
            assert (str(again), again.args, vars(again)) == ("the message", error.args, vars(error))


def test_a_dataloader_raises_what_its_worker_raised() -> None:
    loader = DataLoader(Refusals(SequenceTooShortError("sequence 3 has 5 ids", 3, 5)), num_workers=1)
    with pytest.raises(SequenceTooShortError, match="sequence 3 has 5 ids"):
        next(iter(loader))


# --- tokenizers -------------------------------------------------------------------------------------------------------


@COPIERS
def test_a_copied_tokenizer_is_the_same_on_the_same_backend_and_is_closed_for_itself(
    copier: Copier, loaded: ActionTokenizer, chunks: Any
) -> None:
    tokens = loaded.encode(chunks)
    with copier(loaded) as copied:
        assert (copied.fingerprint, copied.backend.name) == (loaded.fingerprint, loaded.backend.name)
        assert copied.manifest == loaded.manifest
        np.testing.assert_array_equal(copied.encode(chunks), tokens)
        np.testing.assert_array_equal(copied.decode(tokens), loaded.decode(tokens))
        again = copier(copied)
    assert "closed" in repr(copied)
    assert "closed" not in repr(loaded)
    np.testing.assert_array_equal(loaded.encode(chunks), tokens)
    np.testing.assert_array_equal(again.encode(chunks), tokens)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_protocol_will_do(protocol: int, loaded: ActionTokenizer, chunks: Any) -> None:
    np.testing.assert_array_equal(pickled(loaded, protocol).encode(chunks), loaded.encode(chunks))


def test_a_pickle_is_small_whatever_the_bundle_is(loaded: ActionTokenizer) -> None:
    assert len(pickle.dumps(loaded)) < 1000


def test_what_was_one_tokenizer_is_one_afterwards(loaded: ActionTokenizer) -> None:
    first, second = pickled((loaded, loaded))
    assert first is second


def test_a_relative_path_is_one_of_the_place_where_it_was_loaded(
    c_bundle: Path, chunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(c_bundle.parent)
    with ActionTokenizer.load(c_bundle.name) as tokenizer:
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(pickled(tokenizer).encode(chunks), tokenizer.encode(chunks))


@pytest.mark.parametrize("verify", [True, False])
def test_a_copy_replays_the_golden_vectors_where_the_original_did(
    verify: bool, c_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ActionTokenizer.load(c_bundle, verify=verify) as tokenizer:
        replayed: list[bool] = []
        select = tokenizer_module.select_backend

        def spy(name: str, bundle: Any, golden: Any) -> Any:
            replayed.append(golden is not None)
            return select(name, bundle, golden)

        monkeypatch.setattr(tokenizer_module, "select_backend", spy)
        pickled(pickled(tokenizer))
    assert replayed == [verify, verify]


class Named(ActionTokenizer):
    """A subclass with something of its own."""

    name = ""
    seen: list[int]


@COPIERS
def test_a_subclass_keeps_what_it_has_added(copier: Copier, c_bundle: Path, chunks: Any) -> None:
    with Named.load(c_bundle) as tokenizer:
        tokenizer.name, tokenizer.seen = "left arm", [1, 2]
        copied = copier(tokenizer)
        assert type(copied) is Named
        assert (copied.name, copied.seen) == ("left arm", [1, 2])
        np.testing.assert_array_equal(copied.encode(chunks), tokenizer.encode(chunks))


def test_a_bundle_that_is_gone_is_an_error_that_names_it(altered: Path) -> None:
    content = pickle.dumps(ActionTokenizer.load(altered))
    shutil.rmtree(altered)
    with pytest.raises(BundleError, match=rf"opens its bundle again, {altered} .*found nothing"):
        pickle.loads(content)  # noqa: S301  written right here


def test_another_bundle_in_its_place_is_refused_with_both_fingerprints(altered: Path) -> None:
    tokenizer = ActionTokenizer.load(altered)
    content = pickle.dumps(tokenizer)
    write_bundle(altered, Recipe(seed=1), overwrite=True)
    with ActionTokenizer.load(altered) as other, pytest.raises(FingerprintError) as caught:
        pickle.loads(content)  # noqa: S301  written right here
    assert tokenizer.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)


def test_another_backend_is_no_substitute(c_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token at a near-tie could be another one there."""

    def missing(_: Any) -> Any:
        raise BackendUnavailableError("no C engine for this processor")

    content = pickle.dumps(ActionTokenizer.load(c_bundle, backend="c"))
    offer(monkeypatch, {"c": missing})
    with pytest.raises(BackendUnavailableError, match=r"on 'c', and it cannot be opened here: no C engine"):
        pickle.loads(content)  # noqa: S301  written right here


@COPIERS
def test_a_closed_tokenizer_is_refused(copier: Copier, bundle: Path) -> None:
    tokenizer = ActionTokenizer.load(bundle)
    tokenizer.close()
    with pytest.raises(CannotCopyError, match=r"was closed.*load the bundle again"):
        copier(tokenizer)


@COPIERS
def test_a_tokenizer_around_a_backend_is_refused(copier: Copier) -> None:
    tokenizer, _ = scripted(Recipe())
    with pytest.raises(CannotCopyError, match=r"expected one that ActionTokenizer\.load has opened"):
        copier(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_of_processes_encodes_and_refuses_as_this_one_does(
    method: str, loaded: ActionTokenizer, chunks: Any
) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        tokens = pool.submit(loaded.encode, chunks).result()
        refused = pool.submit(loaded.encode, chunks * np.nan).exception()
    np.testing.assert_array_equal(tokens, loaded.encode(chunks))
    with pytest.raises(TokenizerError, match=re.escape(str(refused))):
        loaded.encode(chunks * np.nan)


def test_forked_workers_of_a_dataloader_encode(loaded: ActionTokenizer, chunks: Any) -> None:
    """They have the memory of this process, and nothing is pickled."""
    tokens = loaded.encode(chunks)
    loader = DataLoader(
        Tokens(loaded, chunks), batch_size=3, num_workers=2, multiprocessing_context="fork", collate_fn=stacked
    )
    np.testing.assert_array_equal(np.concatenate(list(loader)), tokens)


@pytest.mark.slow
def test_spawned_workers_of_a_dataloader_encode(c_bundle: Path, chunks: Any) -> None:
    with ActionTokenizer.load(c_bundle) as tokenizer:
        loader = DataLoader(
            Tokens(tokenizer, chunks), batch_size=3, num_workers=1, multiprocessing_context="spawn", collate_fn=stacked
        )
        np.testing.assert_array_equal(np.concatenate(list(loader)), tokenizer.encode(chunks))


# --- what they say of themselves --------------------------------------------------------------------------------------


def test_a_tokenizer_says_what_it_is(c_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(c_bundle.parent)
    tokenizer = Named.load(c_bundle.name, backend="c")
    said = repr(tokenizer)
    assert said == (
        f"Named({str(c_bundle)!r}, calibrated, fingerprint {tokenizer.fingerprint[:16]}, T 2, A 3, D 4, L 3, "
        "K 5, hidden 8, decodes 2, 3 layers, backend c)"
    )
    tokenizer.close()
    assert repr(tokenizer) == f"{said[:-1]}, closed)"
    assert repr(scripted(Recipe())[0]).startswith("ActionTokenizer(no bundle, calibrated, ")


@pytest.mark.parametrize("status", Status)
def test_a_status_is_a_word_where_it_is_written_and_a_number_where_it_is_counted(status: Status) -> None:
    name = status.name
    assert [str(status), f"{status}", f"{status:>15}".strip(), "%s" % status, f"{status!s}"] == [name] * 5  # noqa: UP031
    assert repr(status) == f"<Status.{name}: {int(status)}>"
    assert [f"{status:d}", f"{status:02x}"[-1], "%d" % status] == [str(int(status))] * 3  # noqa: UP031
    counts = np.zeros(len(Status), np.int64)
    counts[status] += 1
    assert np.flatnonzero(counts).tolist() == [status]
