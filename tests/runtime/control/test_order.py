"""Which chunk is used, to the nanosecond: every limit is met, and missed by one."""

from typing import Any

import numpy as np
import pytest
import torch

from rfsq.runtime.control.config import ControlConfig
from rfsq.runtime.control.order import ChunkOrder, as_number, nanoseconds, stamp
from rfsq.runtime.control.result import NO_NUMBER, NO_SERVICE, WRONG_NUMBER, InService
from tests.bundles import Recipe, deploy, make_manifest
from tests.runtime.control.test_guard import VALUES

T, P, STALE = 4, 1000, 3400
NOW = 10**6
OBSERVED = NOW - 3 * P
SERVED: InService = 7, OBSERVED, 2, 90
NONE = NO_NUMBER


@pytest.fixture(scope="module")
def order() -> ChunkOrder:
    config = ControlConfig.from_values({**VALUES, "period_s": P / 1e9, "stale_after_s": STALE / 1e9})
    return ChunkOrder(config, make_manifest(deploy(Recipe(chunk_length=T))).model)


@pytest.mark.parametrize(
    ("passed", "ticks"), [(0, 1), (1, 1), (1000, 1), (1500, 1), (1501, 2), (2500, 2), (2501, 3), (9000, 9)]
)
def test_ticks_are_missed_from_one_and_a_half_periods_on(order: ChunkOrder, passed: int, ticks: int) -> None:
    assert order.next_tick(NOW + passed, (100, NOW), None) == 100 + ticks


@pytest.mark.parametrize(("late", "expected"), [(-P, 101), (0, 101), (P - 1, 101), (P, 102), (3 * P - 1, 103)])
def test_no_row_is_served_a_whole_period_late(order: ChunkOrder, late: int, expected: int) -> None:
    # Row 11 of the chunk is due on tick 101.
    service = (1, NOW - 11 * P - late, 1, 90)
    assert order.next_tick(NOW, (100, NOW - P), service) == expected


def _place(order: ChunkOrder, number: int, observed: int, *, layers: int = 2, **changes: Any) -> Any:
    options = {"service": SERVED, "is_drained": False, **changes}
    return order.place(NOW, 100, layers, options["service"], (number, observed), options["is_drained"])


@pytest.mark.parametrize(
    ("age", "start"),
    [(-P, 100), (-P // 2, 100), (0, 100), (499, 100), (500, 99), (1499, 99), (1500, 98), (3400, 97)],
)
def test_a_chunk_begins_where_its_observation_was(order: ChunkOrder, age: int, start: int) -> None:
    observed = NOW - age
    found = _place(order, 5, observed, service=NO_SERVICE)
    assert found == (5, observed, 2, start)


@pytest.mark.parametrize(("age", "reason"), [(-P - 1, "s from now"), (STALE + 1, "s ago; expected at most 3.4e-06")])
def test_one_from_another_time_is_not_used(order: ChunkOrder, age: int, reason: str) -> None:
    assert reason in _place(order, 5, NOW - age, service=NO_SERVICE)


def test_one_of_which_nothing_is_left_is_not_used() -> None:
    config = ControlConfig.from_values({**VALUES, "period_s": P / 1e9, "stale_after_s": 1.0})
    order = ChunkOrder(config, make_manifest(deploy(Recipe(chunk_length=T))).model)
    assert _place(order, 5, NOW - 3499, service=NO_SERVICE) == (5, NOW - 3499, 2, 97)
    assert "comes 4 ticks after" in _place(order, 5, NOW - 3500, service=NO_SERVICE)
    # The full decode of a draft lies where that lies.
    late = (7, NOW - 3500, 2, 90)
    assert "comes 4 ticks after" in _place(order, 7, NONE, layers=3, service=late)


@pytest.mark.parametrize(
    ("number", "observed", "changes", "expected"),
    [
        (NONE, NONE, {}, (8, NOW, 2, 100)),
        (8, NOW, {}, (8, NOW, 2, 100)),
        (8, OBSERVED, {}, (8, OBSERVED, 2, 97)),
        (8, OBSERVED - 1, {}, "was observed before chunk 7"),
        (7, NOW, {}, "chunk 7 comes again; expected above 7"),
        (6, NOW, {}, "chunk 6 comes after a newer one"),
        # A draft's full decode: dated alike, or not dated; not with as few layers, and not after something else.
        (7, NONE, {"layers": 3}, (7, OBSERVED, 3, 90)),
        (7, OBSERVED, {"layers": 3}, (7, OBSERVED, 3, 90)),
        (7, OBSERVED + 1, {"layers": 3}, "comes again"),
        (7, NONE, {"layers": 2}, "comes again"),
        (7, NONE, {"layers": 3, "service": (7, OBSERVED, 0, 90)}, "comes again"),
        # A policy that counts from its beginning: when nothing is left, dated, and later.
        (0, NOW, {"is_drained": True}, (0, NOW, 2, 100)),
        (7, NOW, {"is_drained": True, "layers": 3}, (7, NOW, 3, 100)),
        (0, OBSERVED, {"is_drained": True}, "after a newer one"),
        (0, NONE, {"is_drained": True}, "after a newer one"),
        (-3, NOW, {"service": NO_SERVICE}, (-3, NOW, 2, 100)),
        # Where none has come before, the first has the number 0, or whatever it has.
        (NONE, NONE, {"service": NO_SERVICE}, (0, NOW, 2, 100)),
        (-1, NONE, {"service": NO_SERVICE}, (-1, NOW, 2, 100)),
        # A draft may have one layer.
        (7, NONE, {"layers": 2, "service": (7, OBSERVED, 1, 90)}, (7, OBSERVED, 2, 90)),
    ],
)
def test_chunks_come_in_order(
    order: ChunkOrder, number: int, observed: int, changes: dict[str, Any], expected: Any
) -> None:
    found = _place(order, number, observed, **changes)
    if isinstance(expected, str):
        assert expected in found
    else:
        assert found == expected


def test_numbers_are_below_2_to_the_62() -> None:
    most = 2**62
    assert [as_number(value) for value in (most - 1, 1 - most)] == [most - 1, 1 - most]
    assert {as_number(value) for value in (most, -most, 1.0, True, None, "1")} == {WRONG_NUMBER}
    assert stamp(None) == NO_NUMBER
    assert [nanoseconds(value) for value in (1, 2.5, 1e300, 0, -1, float("inf"), "1")] == [
        *(1000, 2500, 10**12),
        *(-1, -1, -1, -1),
    ]


class _Wordy:
    """No array, and not to be asked."""


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (_Wordy(), "_Wordy; expected a numpy.ndarray"),
        (
            np.zeros((T, 4, 3), np.int32),
            "tokens have shape [4, 4, 3]; expected [1, 4, 4] and one of the layers [2, 3]: send what the policy "
            "gives for one chunk",
        ),
        (
            np.zeros((1, T, 4, 1), np.int32),
            "tokens have shape [1, 4, 4, 1]; expected [1, 4, 4] and one of the layers [2, 3]: send what the policy "
            "gives for one chunk",
        ),
        (
            np.zeros((1, T, 4, 3), np.float32),
            "tokens have type float32; expected int32, int64 or uint8: send what encoding gives",
        ),
    ],
)
def test_tokens_that_are_none_are_named(order: ChunkOrder, tokens: Any, found: str) -> None:
    assert found in order.wrong_form(tokens, None, None)


def test_how_another_array_becomes_one_of_tokens_is_said(order: ChunkOrder) -> None:
    found = order.wrong_form(torch.zeros((1, T, 4, 3)), None, None)
    assert found == "tokens is a torch.Tensor; expected a numpy.ndarray: pass tokens.detach().cpu().numpy()"
    found = order.wrong_form([[0]], None, None)
    assert found == "tokens is a builtins.list; expected a numpy.ndarray: pass np.asarray(tokens)"
