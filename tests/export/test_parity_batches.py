"""How much is judged at once, what travels as golden vectors, and under which name a result is kept."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfsq.export.parity import batches, golden_vectors, judges_of
from rfsq.export.reference import EDGES, Answers, Section
from rfsq.runtime.bundle.comparison import TokenComparison
from rfsq.runtime.bundle.errors import IllegalValueError
from rfsq.runtime.bundle.gates import GATES
from rfsq.runtime.bundle.models import StepModel


def section(chunks: int, chunk_length: int, name: str = "some") -> Section:
    return Section(name, np.arange(chunks * chunk_length * 2, dtype=np.float32).reshape(chunks, chunk_length, 2))


class Recorder:
    """Stands in for the reference: keeps what it is asked, and says how far float32 decodes from it."""

    def __init__(self, *, has_stats: bool = False, round_trip: Any = None, flipped: Any = None) -> None:
        self.asked: list[np.ndarray] = []
        self._has_stats, self._round_trip, self._flipped = has_stats, round_trip, flipped

    def answer(self, actions: np.ndarray) -> Any:
        self.asked.append(actions)
        expected = SimpleNamespace(actions=actions, stats=actions if self._has_stats else None)
        if not self._has_stats:
            return SimpleNamespace(expected=expected)
        return Answers(expected, SimpleNamespace(flipped=self._flipped), self._round_trip)  # type: ignore[arg-type]

    @staticmethod
    def golden(expected: Any) -> Any:
        return expected


@pytest.mark.parametrize(
    ("chunks", "chunk_length", "expected"),
    [
        (2 * 8192 + 1, 1, [8192, 8192, 1]),
        (2731, 3, [2730, 1]),
        (3, 5000, [1, 1, 1]),
        (2, 8193, [1, 1]),
        (2, 8192, [1, 1]),
    ],
)
def test_a_few_thousand_steps_are_answered_at_a_time_and_at_least_a_chunk(
    chunks: int, chunk_length: int, expected: list[int]
) -> None:
    reference: Any = Recorder()
    given = section(chunks, chunk_length)
    assert len(list(batches(reference, [given]))) == len(expected)
    assert [len(actions) for actions in reference.asked] == expected
    np.testing.assert_array_equal(np.concatenate(reference.asked), given.actions)


@pytest.mark.parametrize(("chunk_length", "expected"), [(1, 192), (7, 27), (192, 1), (193, 1), (1000, 1)])
def test_of_a_section_travel_some_steps_and_at_least_a_chunk(chunk_length: int, expected: int) -> None:
    reference: Any = Recorder()
    given, edges = section(400, chunk_length), section(400, chunk_length, EDGES)
    assert golden_vectors(reference, [given]).actions.shape[0] == expected
    np.testing.assert_array_equal(
        golden_vectors(reference, [given, edges]).actions, np.concatenate([given.actions[:expected], edges.actions])
    )


def test_where_float32_decodes_otherwise_than_by_a_flip_a_chunk_does_not_travel() -> None:
    """A quarter of the gate is what torch float32 may use; the worst step of a chunk decides."""
    limit = GATES.action_error / 4
    round_trip = np.array([[0, limit], [0, 1.01 * limit], [1.01 * limit, 0], [0, 0]])
    flipped = np.array([[False, False], [False, False], [True, False], [False, False]])
    given = section(4, 2, EDGES)
    reference: Any = Recorder(has_stats=True, round_trip=round_trip, flipped=flipped)
    np.testing.assert_array_equal(golden_vectors(reference, [given]).actions, given.actions[[0, 2, 3]])
    assert len(reference.asked) == 2
    # With all of them good, none is asked about twice; without statistics, nothing is to be left out.
    reference = Recorder(has_stats=True, round_trip=round_trip * 0, flipped=flipped)
    assert len(golden_vectors(reference, [given]).actions) == 4
    assert len(reference.asked) == 1
    reference = Recorder(round_trip=round_trip, flipped=flipped)
    assert len(golden_vectors(reference, [given]).actions) == 4


@pytest.mark.parametrize("place", [3, 4, 5])
def test_a_build_tries_illegal_values_everywhere_also_within_a_chunk(place: int) -> None:
    """A robot tries one of these three places."""

    class Blind:
        name = device = "blind in one place"
        checked_steps = 3

        def encode_into(self, actions: np.ndarray, _tokens: np.ndarray, _stats: None) -> None:
            if not (np.abs(np.delete(actions, place)) <= 1).all():
                raise IllegalValueError

        def decode_into(self, *_arrays: Any) -> None:
            raise IllegalValueError

    model = StepModel(
        mode="calibrated",
        chunk_length=3,
        action_dim=3,
        latent_dim=1,
        hidden_width=1,
        num_layers=2,
        num_levels=3,
        prefixes=(2,),
        action_limit=1.0,
        action_units=(1.0,) * 3,
        action_offset=(0.0,) * 3,
    )
    backend: Any = Blind()
    reference: Any = Recorder()
    (judge,) = judges_of([backend], reference, model)
    counts = np.zeros(2, np.int64)
    judge.found = judge.float32 = [TokenComparison(counts, counts, counts, np.zeros(3, bool), None)]
    _, _, encoding, decoding = judge.entries()
    assert (encoding.gate, encoding.value) == ("encode: illegal values accepted", 1)
    assert f"at [0, 1, {place - 3}] of [1, 3, 3] was accepted" in encoding.detail
    assert (decoding.gate, decoding.value) == ("decode 2 layers: illegal values accepted", 0)


def test_a_variant_of_a_backend_is_judged_by_itself_and_named() -> None:
    class Plain:
        name = device = "plain"
        #: It leaves the values to the host.
        checked_steps = 0

    class Varied(Plain):
        variants = {"bytes": Plain()}  # noqa: RUF012

    plain, varied, model = Plain(), Varied(), SimpleNamespace(depth=2, decoders=(), has_stats=False, chunk_length=1)
    backends: Any = [plain, varied]
    reference: Any = Recorder()
    judges = judges_of(backends, reference, model, seed=3)  # type: ignore[arg-type]
    expected = [(plain, "", 3), (varied, "", 3), (Varied.variants["bytes"], "bytes", 3)]
    assert [(judge.backend, judge.variant, judge.seed) for judge in judges] == expected
    assert {judge.seed for judge in judges_of(backends, reference, model)} == {0}  # type: ignore[arg-type]
    for judge, prefix in zip(judges, ("", "", "bytes, "), strict=True):
        counts = np.zeros(2, np.int64)
        judge.found = judge.float32 = [TokenComparison(counts, counts, counts, np.zeros(4, bool), None)]
        wrong, flips = judge.entries()
        assert (wrong.gate, flips.gate) == (f"{prefix}encode: wrong tokens", f"{prefix}encode: near-tie flips")
        assert (wrong.value, wrong.limit, wrong.detail, wrong.backend) == (0, 0, "", "plain")
        assert (flips.value, flips.limit, flips.detail) == (0, 0, "L0 to L1: 0 0; torch float32: 0 0")
