"""A loop of chunk tokens: any first few of them are a draft, and what is wrong with them is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, Status
from rfsq.runtime.control.recorder import read_record
from rfsq.runtime.control.worker import WarmTokenizer
from rfsq.runtime.qualification.trial_inputs import chunks_of
from tests.chunk_bundles import ChunkRecipe
from tests.processes import PATIENCE
from tests.runtime.control.loops import ScriptedLoop, fails, first_of, loop, switched

WORKER: dict[str, Any] = {"use_worker": True, "deadline_us": PATIENCE * 1e6}
FREE: dict[str, Any] = {"max_relative_step": (float("inf"),) * 3}


@pytest.fixture(params=["c", "onnxruntime"])
def tokenizer(request: pytest.FixtureRequest, chunk_bundle: Path) -> Any:
    with ActionTokenizer.load(chunk_bundle, backend=request.param) as loaded:
        yield loaded


def test_more_tokens_of_a_chunk_take_the_place_of_fewer() -> None:
    with ScriptedLoop(recipe=ChunkRecipe()) as made:
        for layers, value in ((1, 0.1), (4, 0.2), (9, 0.3)):
            result = made.tick(value, layers=layers, sequence=1)
            assert (result.status, result.sequence, first_of(result)) == (Status.OK, 1, pytest.approx(value))
        # Of four actions the third tick has served the third.
        assert first_of(made.tick()) == pytest.approx(0.3)
        assert made.tick().status is Status.STALE


def test_no_fewer_tokens_of_a_chunk_take_the_place_of_more() -> None:
    with ScriptedLoop(recipe=ChunkRecipe()) as made:
        made.tick(0.3, layers=8, sequence=1)
        for layers in (8, 5):
            result = made.tick(0.9, layers=layers, sequence=1)
            assert (result.status, result.is_held, first_of(result)) == (Status.STALE, False, pytest.approx(0.3))
        assert made.tick(0.5, layers=1, sequence=2).status is Status.OK


@pytest.mark.parametrize("changes", [{}, WORKER])
def test_any_first_few_tokens_are_served_as_they_decode(tokenizer: ActionTokenizer, changes: dict[str, Any]) -> None:
    chunks, _, _ = chunks_of(tokenizer, 1)
    with loop(tokenizer, **FREE, **changes) as decoder:
        decoder.warmup()
        for prefix in tokenizer.prefixes:
            tokens = chunks[0][:, :prefix]
            for given in (tokens, tokens.astype(np.int64), tokens.astype(np.uint16)):
                result = decoder.step(given)
                assert result.status is Status.OK
                np.testing.assert_array_equal(result.actions, tokenizer.decode(tokens)[0, 0])


@pytest.mark.parametrize("changes", [{}, WORKER])
@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda tokens: tokens[0], r"tokens have shape \[9\]; expected \[1\] and from 1 to 9 tokens"),
        (lambda tokens: tokens[:, :0], r"tokens have shape \[1, 0\]; expected \[1\] and from 1 to 9 tokens"),
        (lambda tokens: np.hstack((tokens, tokens)), r"tokens have shape \[1, 18\]; expected \[1\] and from 1 to 9"),
        (lambda _: np.zeros((1, 4, 4, 3), np.int32), r"tokens have shape \[1, 4, 4, 3\]; expected \[1\] and from 1"),
        (lambda tokens: tokens.astype(np.uint8), "tokens have type uint8; expected int32, int64 or uint16"),
        (lambda tokens: tokens.astype(np.float32), "tokens have type float32; expected int32, int64 or uint16"),
        (lambda tokens: np.full_like(tokens, 256), r"tokens\[0, 0\] is 256; expected 0 ... 255"),
        (lambda tokens: np.full_like(tokens, -1), r"tokens\[0, 0\] is -1; expected 0 ... 255"),
        (lambda tokens: np.full_like(tokens, 256, np.uint16), "0 ... 255"),
        (lambda tokens: tokens.astype(np.int64) + 2**32, "0 ... 255"),
    ],
)
def test_what_is_no_chunk_of_tokens_is_refused(
    chunk_tokenizer: ActionTokenizer, changes: dict[str, Any], change: Callable[[Any], Any], detail: str
) -> None:
    chunks, _, _ = chunks_of(chunk_tokenizer, 1)
    with loop(chunk_tokenizer, **changes) as decoder:
        decoder.warmup()
        result = decoder.step(change(chunks[0]))
        assert (result.status, result.is_held) == (Status.BAD_TOKEN, True)
        assert re.search(detail, result.detail)
        assert decoder.step(chunks[0]).status is Status.OK


@pytest.mark.parametrize("changes", [{}, WORKER])
def test_stats_are_of_per_step_tokens_alone(chunk_tokenizer: ActionTokenizer, changes: dict[str, Any]) -> None:
    chunks, _, _ = chunks_of(chunk_tokenizer, 1)
    with loop(chunk_tokenizer, **changes) as decoder:
        decoder.warmup()
        stats = np.ones(chunk_tokenizer.model.stats_shape(1), np.float32)
        assert decoder.step(chunks[0], stats=stats).status is Status.BAD_TOKEN
        assert decoder.step(chunks[0]).status is Status.OK


@pytest.mark.parametrize("changes", [{}, WORKER])
def test_a_type_of_the_other_kind_is_refused_with_a_worker_too(
    dynamic_tokenizer: ActionTokenizer, changes: dict[str, Any]
) -> None:
    chunks, stats, _ = chunks_of(dynamic_tokenizer, 1)
    with loop(dynamic_tokenizer, **changes) as decoder:
        decoder.warmup()
        assert decoder.step(chunks[0].astype(np.uint16), stats=stats[0]).status is Status.BAD_TOKEN
        assert decoder.step(chunks[0].astype(np.uint8), stats=stats[0]).status is Status.OK


@pytest.mark.parametrize("changes", [{}, WORKER])
def test_a_fallback_decodes_a_draft_that_the_first_backend_fails_on(
    chunk_bundle: Path, chunk_tokenizer: ActionTokenizer, changes: dict[str, Any]
) -> None:
    draft = chunks_of(chunk_tokenizer, 1)[0][0][:, :2]
    broken, backend = switched(chunk_tokenizer)
    with (
        ActionTokenizer.load(chunk_bundle, backend="onnxruntime") as spare,
        loop(broken, fallbacks=(spare,), **FREE, **changes) as decoder,
    ):
        decoder.warmup()
        backend.act = fails
        result = decoder.step(draft)
        assert (result.status, result.fell_back, result.backend) == (Status.OK, True, "onnxruntime")
        np.testing.assert_array_equal(result.actions, spare.decode(draft)[0, 0])


# --- is a backend right again? ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_golden", [True, False])
@pytest.mark.parametrize("wrong", ["short", "whole"])
def test_a_backend_that_is_wrong_of_short_or_of_whole_chunks_alone_does_not_work(
    chunk_tokenizer: ActionTokenizer, has_golden: bool, wrong: str
) -> None:
    backend: Any = _WrongOf(chunk_tokenizer)
    golden = chunk_tokenizer.golden if has_golden else None
    warm = WarmTokenizer(ActionTokenizer(chunk_tokenizer.manifest, backend, golden), 0)
    assert warm.works()
    backend.wrong = {"short": 1, "whole": chunk_tokenizer.model.depth}[wrong]
    assert not warm.works()


def test_probes_take_no_more_calls_than_graphs_need(chunk_tokenizer: ActionTokenizer) -> None:
    """Other threads may have to wait meanwhile: neither each prefix nor each chunk is decoded by itself."""
    backend: Any = _WrongOf(chunk_tokenizer)
    warm = WarmTokenizer(ActionTokenizer(chunk_tokenizer.manifest, backend), 0)
    backend.asked.clear()
    assert warm.works()
    assert backend.asked == [1, chunk_tokenizer.model.depth]


class _WrongOf:
    """The backend of a tokenizer, but for what it makes of `wrong` tokens; `asked` has how many tokens came."""

    def __init__(self, tokenizer: ActionTokenizer) -> None:
        self._backend, self.wrong, self.asked = tokenizer.backend, 0, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
        self.asked.append(tokens.shape[-1])
        self._backend.decode_into(tokens, stats, actions)
        if tokens.shape[-1] == self.wrong:
            actions += 0.01


def test_a_flight_record_has_as_many_tokens_as_came(chunk_tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    chunks, _, _ = chunks_of(chunk_tokenizer, 3)
    with loop(chunk_tokenizer) as decoder:
        decoder.warmup()
        sent: list[Any] = [chunks[0], chunks[1][:, :4], chunks[2].astype(np.uint16)]
        for tokens in (*sent, chunks[0].astype(np.uint8)):
            decoder.step(tokens)
        assert decoder.write_flight_record(tmp_path / "flight.npz")
    record = read_record(tmp_path / "flight.npz")
    assert record.meta["token_shape"] == [9]
    # Before them the start.
    for index, tokens in enumerate(sent, start=1):
        np.testing.assert_array_equal(record.tokens_of(index), tokens)
    # The type that is refused is not in the record, or a replay would decode it.
    assert record.tokens_of(4) is None
    assert record.columns["layers"].tolist() == [0, 9, 4, 9, 0]
