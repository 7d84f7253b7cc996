"""A decoder that has not begun is copied as it was made, one that has begun is refused; each says what it is."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rfsq.runtime import ActionTokenizer, CannotCopyError, ControlDecoder, Status
from tests.processes import PATIENCE
from tests.runtime.control.driven import serve
from tests.runtime.control.loops import loop
from tests.runtime.test_copies import COPIERS, Copier, chunks, loaded

__all__ = ["chunks", "loaded"]  # Fixtures.


@COPIERS
@pytest.mark.parametrize("changes", [{}, {"strategy": "temporal_ensemble", "use_worker": True, "deadline_us": 1e6}])
def test_a_decoder_before_warmup_is_copied_as_it_was_made(
    copier: Copier, changes: dict[str, Any], loaded: ActionTokenizer, chunks: Any
) -> None:
    tokens = loaded.encode(chunks[:1] * 0.1)
    original = loop(loaded, fallbacks=(loaded,), **changes)
    original.reset((0.0, 0.0, 0.25))
    copied = copier(original)
    assert type(copied) is ControlDecoder
    assert copied.config == original.config
    sent = []
    for decoder in (original, copied):
        with decoder:
            decoder.warmup()
            held = decoder.step().actions.tolist()
            served = decoder.step(tokens)
            sent.append((held, served.status, served.actions.tolist()))
            assert decoder.snapshot().ticks == 2
    assert sent[0] == sent[1]
    assert sent[0][0][2] == 0.25
    assert sent[0][1] is Status.OK


@pytest.mark.slow
def test_a_decoder_before_warmup_works_in_a_spawned_process_as_it_was_made(c_bundle: Path, chunks: Any) -> None:
    changes: dict[str, Any] = {"strategy": "temporal_ensemble", "use_worker": True, "deadline_us": 60e6}
    with (
        ActionTokenizer.load(c_bundle, backend="c") as main,
        ActionTokenizer.load(c_bundle, backend="onnxruntime") as spare,
    ):
        decoder = loop(main, fallbacks=(spare,), **changes)
        decoder.reset((0.0, 0.0, 0.25))
        tokens = main.encode(chunks[:1] * 0.1)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            sent = pool.submit(serve, decoder, tokens).result(PATIENCE)
        assert sent == serve(decoder, tokens)
    _, _, held, status, _ = sent
    assert held[2] == 0.25
    assert status is Status.OK


@COPIERS
def test_a_decoder_that_has_begun_is_refused(copier: Copier, loaded: ActionTokenizer) -> None:
    decoder = loop(loaded)
    with decoder:
        decoder.warmup()
        with pytest.raises(CannotCopyError, match=r"warmed up.*make another one, or copy it before warmup\(\)"):
            copier(decoder)
    with pytest.raises(CannotCopyError, match="warmed up"):
        copier(decoder)


def test_a_decoder_says_what_it_does(loaded: ActionTokenizer, chunks: Any) -> None:
    decoder = loop(loaded, fallbacks=(loaded,))
    parts = f"latest_only, {loaded!r}, {loaded!r})"
    assert repr(decoder) == f"ControlDecoder(not warm, {parts}"
    with decoder:
        decoder.warmup()
        assert repr(decoder) == f"ControlDecoder(tick 0, NOT_READY, {parts}"
        decoder.step(loaded.encode(chunks[:1] * 0.1))
        assert repr(decoder) == f"ControlDecoder(tick 1, OK, {parts}"
    assert repr(decoder) == f"ControlDecoder(closed, {parts}"


@COPIERS
def test_a_copy_has_the_same_backends_in_the_same_order(copier: Copier, c_bundle: Path) -> None:
    with (
        ActionTokenizer.load(c_bundle, backend="c") as main,
        ActionTokenizer.load(c_bundle, backend="onnxruntime") as spare,
    ):
        original = loop(main, fallbacks=(spare,))
        assert repr(copier(original)) == repr(original)
