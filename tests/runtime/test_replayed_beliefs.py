"""Golden beliefs are replayed once, before the first belief is decoded; a load does not wait for them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, InvalidInputError, SelfTestError, TokenizerError
from rfsq.runtime.backends.beliefs import BeliefAnswer, BeliefQuestion
from rfsq.runtime.backends.gpu import belief_arrays
from rfsq.runtime.backends.onnxruntime import OrtBackend
from rfsq.runtime.bundle.golden_beliefs import NUM_BELIEFS
from tests.runtime.backends.gpu.fake_gpu import FakeArray

LOGITS = np.random.default_rng(0).standard_normal((3, 2, 4, 3, 5)).astype(np.float32)


class Calls:
    """How many chunks each call of a backend had; off: what is added to its actions."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.off = 0.0

    @property
    def replays(self) -> float:
        """Whole golden sets: of two prefixes in two modes, as logits and probabilities, and certain in two modes."""
        return self.batches.count(NUM_BELIEFS) / (2 * 2 * 2 + 2 * 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, decode = Calls(), OrtBackend.decode_belief_into

    def counted(backend: OrtBackend, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        found.batches.append(question.batch)
        decode(backend, question, answer)
        answer.actions[...] += np.float32(found.off)

    monkeypatch.setattr(OrtBackend, "decode_belief_into", counted)
    return found


def loaded(bundle: Path, **options: Any) -> ActionTokenizer:
    return ActionTokenizer.load(bundle, backend="onnxruntime", **options)


def test_a_load_decodes_no_belief_and_the_first_call_all_golden_ones(bundle: Path, calls: Calls) -> None:
    tokenizer = loaded(bundle)
    assert calls.batches == []
    tokenizer.decode_logits(LOGITS)
    assert calls.replays == 1
    # The answer comes last.
    assert calls.batches[-1] == 3
    tokenizer.decode_logits(LOGITS)
    assert calls.replays == 1


def test_a_warmup_decodes_them_before_a_loop_begins_where_it_is_asked_to(bundle: Path, calls: Calls) -> None:
    tokenizer = loaded(bundle)
    tokenizer.warmup(3)
    assert calls.batches == []
    tokenizer.warmup(3, beliefs=True)
    assert calls.replays == 1
    # Once for each number of layers.
    assert calls.batches.count(3) == 2
    calls.batches.clear()
    tokenizer.decode_logits(LOGITS)
    assert calls.batches == [3]


def test_a_warmup_of_chunk_tokens_runs_their_graph(chunk_bundle: Path, calls: Calls) -> None:
    loaded(chunk_bundle).warmup(5, beliefs=True)
    assert calls.batches[-1] == 5


def test_a_warmup_of_more_logits_than_memory_holds_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, zeros = loaded(bundle), np.zeros

    def refuse(shape: tuple[int, ...], *rest: Any) -> Any:
        if len(shape) == 5:
            raise MemoryError("Unable to allocate")
        return zeros(shape, *rest)

    monkeypatch.setattr(np, "zeros", refuse)
    with pytest.raises(InvalidInputError, match="batch is 7, of more logits than memory holds here: Unable"):
        tokenizer.warmup(7, beliefs=True)


def test_a_warmup_of_beliefs_needs_a_bundle_that_has_some(dynamic_tokenizer: ActionTokenizer) -> None:
    dynamic_tokenizer.warmup()
    with pytest.raises(InvalidInputError, match="no policy predicts"):
        dynamic_tokenizer.warmup(beliefs=True)


def test_without_verifying_nothing_is_replayed(bundle: Path, calls: Calls) -> None:
    loaded(bundle, verify=False).decode_logits(LOGITS)
    assert calls.batches == [3]


ASKED: dict[str, Callable[[ActionTokenizer, Any], object]] = {
    "decode_logits": lambda tokenizer, _: tokenizer.decode_logits(LOGITS),
    "a sample": lambda tokenizer, _: tokenizer.decode_logits(LOGITS, mode="sample"),
    "into": lambda tokenizer, out: tokenizer.decode_logits_into(LOGITS, out),
    "probabilities": lambda tokenizer, _: tokenizer.decode_probabilities(np.full_like(LOGITS, 0.2)),
}


@pytest.mark.parametrize("how", ASKED)
def test_a_backend_whose_beliefs_are_wrong_answers_none_of_them(bundle: Path, calls: Calls, how: str) -> None:
    calls.off = 1e-3
    tokenizer, out = loaded(bundle), np.zeros((3, 2, 3), np.float32)
    tokens = np.zeros((1, 2, 4, 3), np.int32)
    for _ in range(3):
        with pytest.raises(SelfTestError, match=r"onnxruntime .* golden vectors of .*bundle.*\n.*✗ beliefs, batch 1: "):
            ASKED[how](tokenizer, out)
        # Tokens are decoded as ever.
        assert np.isfinite(tokenizer.decode(tokens)).all()
    # No loop waits for a second replay.
    assert calls.replays == 1
    assert 3 not in calls.batches
    assert not out.any()


def test_a_warmup_replays_again_what_was_refused(bundle: Path, calls: Calls) -> None:
    calls.off = 1e-3
    tokenizer = loaded(bundle)
    for replays in (1, 2):
        with pytest.raises(SelfTestError):
            tokenizer.warmup(beliefs=True)
        assert calls.replays == replays
    calls.off = 0.0
    with pytest.raises(SelfTestError):
        tokenizer.decode_logits(LOGITS)
    tokenizer.warmup(beliefs=True)
    tokenizer.decode_logits(LOGITS)
    assert calls.replays == 3


def test_so_are_arrays_of_the_gpu(bundle: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Stub:
        """Of the calls on such arrays."""

        def __init__(self, *_: object) -> None:
            self.decode = self.decode_into = self.bind = lambda *_, **__: asked.append(calls.replays)

    monkeypatch.setattr(belief_arrays, "GpuBeliefCalls", Stub)
    given = FakeArray(np.zeros((1, 2, 4, 3, 5), np.float32))
    ways: tuple[Callable[[ActionTokenizer], object], ...] = (
        lambda tokenizer: tokenizer.decode_logits(given),
        lambda tokenizer: tokenizer.decode_probabilities_into(given, given),
        lambda tokenizer: tokenizer.bind_decode_logits(given, given),
    )
    for decode in ways:
        decode(loaded(bundle))
    assert asked == [1, 2, 3]
    calls.off = 1e-3
    for decode in ways:
        with pytest.raises(SelfTestError):
            decode(loaded(bundle))
    assert len(asked) == 3


def test_a_copy_of_a_refused_one_is_judged_for_itself(bundle: Path, calls: Calls) -> None:
    calls.off = 1e-3
    tokenizer = loaded(bundle)
    with pytest.raises(SelfTestError):
        tokenizer.decode_logits(LOGITS)
    calls.off = 0.0
    pickle.loads(pickle.dumps(tokenizer)).decode_logits(LOGITS)  # noqa: S301  # of this test
    with pytest.raises(SelfTestError):
        tokenizer.decode_logits(LOGITS)


def test_threads_that_come_at_once_are_all_answered_after_a_replay(bundle: Path, calls: Calls) -> None:
    expected = loaded(bundle).decode_logits(LOGITS).actions
    calls.batches.clear()
    tokenizer, start = loaded(bundle), threading.Barrier(4)

    def ask(_: int) -> Any:
        start.wait()
        return tokenizer.decode_logits(LOGITS).actions

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ask, range(4)):
            np.testing.assert_array_equal(found, expected)
    assert calls.batches.index(3) >= calls.batches.index(NUM_BELIEFS)
    assert 1 <= calls.replays <= 4


def test_a_closed_tokenizer_replays_nothing(bundle: Path, calls: Calls) -> None:
    tokenizer = loaded(bundle)
    tokenizer.close()
    with pytest.raises(TokenizerError, match="was closed"):
        tokenizer.warmup(beliefs=True)
    assert calls.batches == []


def test_a_replay_that_is_broken_off_is_made_again(bundle: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decode = loaded(bundle), OrtBackend.decode_belief_into

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OrtBackend, "decode_belief_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode_logits(LOGITS)
    monkeypatch.setattr(OrtBackend, "decode_belief_into", decode)
    tokenizer.decode_logits(LOGITS)
    assert calls.replays == 1
