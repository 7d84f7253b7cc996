"""Flight records replayed: what the decoder did comes out again, and what it did not do is found, with its tick."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, Status
from rfsq.runtime.bundle.arrays import Codes
from rfsq.runtime.control.errors import FlightRecordError
from rfsq.runtime.control.recorder import HELD, LATCHED, RESET, FlightRecord, read_record, write_record
from rfsq.runtime.qualification.flights import replay_flight
from rfsq.runtime.qualification.replay_flight import main
from rfsq.runtime.qualification.soak import chunks_of
from tests.bundles import Recipe
from tests.runtime.control.loops import PERIOD_NS, Clock, fails, loop, switched

STRATEGIES = pytest.mark.parametrize("strategy", ["latest_only", "weighted_average", "temporal_ensemble"])


class Flight:
    """A loop under way, by a clock of its own; `record()` is what it leaves."""

    def __init__(self, tokenizer: ActionTokenizer, folder: Path, **changes: Any) -> None:
        self.tokenizer, self.path = tokenizer, folder / "flight.npz"
        self.tokens, self.stats, _ = chunks_of(tokenizer, 16)
        self.takes_beliefs = "beliefs" in changes
        self.rng, self.clock, self.sequence = np.random.default_rng(0), Clock(), 0
        broken, self.backend = switched(tokenizer)
        self.decoder = loop(broken, clock=self.clock, **{"record_ticks": 400, **changes})
        self.decoder.warmup()

    def tick(self, *arguments: Any, passed: float = 1.0, **options: Any) -> Status:
        self.clock.now += round(passed * PERIOD_NS)
        return self.decoder.step(*arguments, **options).status

    def chunk(self, layers: int = 0, delay: float = 0.0, **options: Any) -> Status:
        """The next one, of as many layers; 0 for all."""
        index = int(self.rng.integers(16))
        self.sequence += 1
        return self._send(index, layers, {"sequence": self.sequence, "observed_ns": self._observed(delay), **options})

    def believe(self, doubt: float = 0.0, **options: Any) -> Status:
        """The next chunk, as logits; doubt: 0 for what is certain, 1 for nothing known."""
        index, model = int(self.rng.integers(16)), self.tokenizer.model
        self.sequence += 1
        logits = 50 * (1 - doubt) * (np.arange(model.vocabulary) == self.tokens[index][..., None])
        options = {"sequence": self.sequence, "observed_ns": self._observed(0), **options}
        return self.tick(logits=logits.astype(np.float32), **options)

    def swap(self) -> tuple[Status, Status]:
        """A draft, and on the next tick its full decode."""
        index, draft = int(self.rng.integers(16)), self.tokenizer.prefixes[0]
        self.sequence += 1
        options = {"sequence": self.sequence, "observed_ns": self._observed(0)}
        return self._send(index, draft, options), self._send(index, 0, options)

    def _send(self, index: int, layers: int, options: dict[str, Any]) -> Status:
        tokens, stats = self.tokens[index], self.stats[index]
        layers = layers or tokens.shape[-1]
        self.sent = Codes(tokens, stats).prefix(layers)
        return self.tick(self.sent.tokens, **{"stats": self.sent.stats, **options})

    def _observed(self, delay: float) -> int:
        return self.clock.now + round((1 - delay) * PERIOD_NS)

    def fault(self) -> None:
        """One of many, each once and again."""
        index = int(self.rng.integers(16))
        tokens, stats = self.tokens[index], self.stats[index]
        wrong: list[Callable[[], object]] = [
            lambda: self.tick(tokens - self.tokenizer.model.vocabulary, stats=stats),
            lambda: self.tick(tokens.astype(np.float32), stats=stats),
            lambda: self.tick(tokens.astype(np.int16), stats=stats),
            lambda: self.tick(tokens.astype(">i4"), stats=stats),
            lambda: self.tick(tokens[0], stats=stats),
            lambda: self.tick(tokens.tolist(), stats=stats),
            lambda: self.tick(tokens, stats="stats"),
            lambda: self.tick(tokens, stats=stats, sequence=1.5),
            lambda: self.tick(tokens, stats=stats, observed_ns="now"),
            lambda: self.chunk(delay=-5.0),
            lambda: self.chunk(delay=100.0),
            lambda: self.chunk(sequence=self.sequence - 2),
            lambda: self.chunk(sequence=self.sequence),
            lambda: self.tick(passed=-3.0),
            lambda: self.tick(passed=4.2),
            lambda: self.tick(passed=500.0),
            lambda: self.chunk(deadline_us="soon"),
            lambda: self.tick(deadline_us=-1.0),
            lambda: self.backend_fails(fails),
            lambda: self.backend_fails(lambda actions: actions.fill(np.nan)),
            lambda: self.backend_fails(self.take_long),
            self.clock_fails,
            self.decoder.reset,
        ]
        if self.takes_beliefs:
            wrong += [
                self.believe,
                lambda: self.believe(1.0),
                lambda: self.believe(0.96),
                lambda: self.believe(np.nan),
                lambda: self.believe(sequence=self.sequence - 2),
                lambda: self.tick(tokens, probabilities=tokens),
                lambda: self.tick(logits=tokens),
                lambda: self.belief_fails(fails),
                lambda: self.belief_fails(lambda actions: actions.fill(np.nan)),
                lambda: self.belief_fails(lambda actions: actions.fill(1e6)),
            ] * 2
        wrong[int(self.rng.integers(len(wrong)))]()

    def backend_fails(self, act: Callable[[Any], None]) -> None:
        self.backend.act = act
        self.chunk()
        self.backend.act = None

    def belief_fails(self, act: Callable[[Any], None]) -> None:
        self.backend.act = act
        self.believe()
        self.backend.act = None

    def take_long(self, actions: Any) -> None:
        """Until the chunk is too old."""
        self.clock.now += 10**10
        actions[...] = self.tokenizer.decode(*self.sent)

    def clock_fails(self) -> None:
        self.clock.error = RuntimeError("injected")
        self.chunk()
        self.clock.error = None

    def record(self) -> FlightRecord:
        assert self.decoder.write_flight_record(self.path)
        self.decoder.close()
        return read_record(self.path)


def _altered(record: FlightRecord, index: int, by: float = 0.01) -> FlightRecord:
    actions = record.actions.copy()
    actions[index, 0] += by
    return replace(record, actions=actions)


def _limits_that_some_chunks_exceed(tokenizer: ActionTokenizer) -> dict[str, tuple[float, ...]]:
    tokens, _, _ = chunks_of(tokenizer, 16)
    limit = float(np.quantile([np.abs(tokenizer.decode(chunk)).max() for chunk in tokens], 0.7))
    size = tokenizer.model.action_dim
    # So little that some of them are refused still, and others are brought to the limit.
    return {"action_low": (-limit,) * size, "action_high": (limit,) * size, "range_tolerance": (0.001,) * size}


def _ticks(record: FlightRecord) -> int:
    """Rows that are ticks."""
    return int(((record.columns["flags"] & RESET) == 0).sum())


@STRATEGIES
@pytest.mark.parametrize("mode", ["calibrated", "dynamic", "chunk"])
def test_every_tick_from_the_start_on_is_compared(
    mode: str,
    tokenizer: ActionTokenizer,
    dynamic_tokenizer: ActionTokenizer,
    chunk_tokenizer: ActionTokenizer,
    tmp_path: Path,
    strategy: str,
) -> None:
    given = {"calibrated": tokenizer, "dynamic": dynamic_tokenizer, "chunk": chunk_tokenizer}[mode]
    flight = Flight(given, tmp_path, strategy=strategy)
    for _ in range(30):
        assert flight.chunk() is Status.OK
        assert flight.swap() == (Status.OK, Status.OK)
        assert flight.chunk(delay=1.2) is Status.OK
        flight.tick()
    record = flight.record()
    assert (record.stats.size > 0) is (mode == "dynamic")
    assert replay_flight(record, flight.tokenizer) == (150, [])


def test_a_tick_without_a_clock_right_after_a_start_counts_for_those_after_it(
    tokenizer: ActionTokenizer, tmp_path: Path
) -> None:
    flight = Flight(tokenizer, tmp_path)
    flight.clock_fails()
    assert flight.chunk() is Status.OK
    # Its second action, and not the third.
    assert flight.tick() is Status.OK
    assert replay_flight(flight.record(), tokenizer) == (3, [])


@STRATEGIES
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_of_range": "limit", "beliefs": {"least_mode_probability": 0.9, "leave_ticks": 3}},
        {
            "beliefs": {
                "mode": "likeliest mode",
                "std_limit": 1e-3,
                "least_mode_probability": 0.3,
                "when_uncertain": "slow",
            }
        },
        {"on_fault": "stop"},
        {"max_consecutive_faults": 2, "beliefs": {"least_mode_probability": 0.9, "when_uncertain": "ask"}},
    ],
)
@pytest.mark.parametrize("has_chunk_tokens", [False, True])
def test_a_flight_with_faults_of_every_kind_is_replayed(
    bundle_of: Any,
    chunk_bundle: Path,
    tmp_path: Path,
    strategy: str,
    changes: dict[str, Any],
    has_chunk_tokens: bool,
) -> None:
    with ActionTokenizer.load(chunk_bundle if has_chunk_tokens else bundle_of(Recipe(chunk_length=5))) as tokenizer:
        limits = _limits_that_some_chunks_exceed(tokenizer)
        flight = Flight(tokenizer, tmp_path, strategy=strategy, stale_after_s=0.02, **limits, **changes)
        statuses = set()
        for number in range(350):
            if number % 3 == 2:
                flight.fault()
            elif number % 3 == 1:
                flight.swap()
            else:
                flight.chunk(delay=float(flight.rng.uniform(0, 3)))
            statuses.add(flight.decoder.result.status)
            if flight.decoder.result.is_latched and number % 5 == 0:
                flight.decoder.reset()
        # More ticks than the ring holds: it begins in the middle of a chunk.
        assert sum(flight.decoder.health.statuses) > 400
        record = flight.record()
        compared, differences = replay_flight(record, tokenizer)
    assert differences == []
    # All that were asked for; those before serve to fill the queue.
    assert compared >= 400 - int(((record.columns["flags"] & RESET) != 0).sum())
    if changes.keys() <= {"beliefs"}:
        assert statuses == set(Status) - ({Status.UNCERTAIN} if not changes else set())
    if "beliefs" in changes:
        assert Status.UNCERTAIN in statuses
    assert bool((record.columns["flags"] & LATCHED).any()) is bool(
        {"on_fault", "max_consecutive_faults"} & changes.keys()
    )


def test_a_record_without_a_tolerance_is_replayed_without_one(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    limits = {**_limits_that_some_chunks_exceed(tokenizer), "range_tolerance": 0.0}
    flight = Flight(tokenizer, tmp_path, **limits)
    statuses = [flight.chunk() for _ in range(40)]
    assert {Status.OK, Status.OUT_OF_RANGE} == set(statuses)
    record = flight.record()
    settings = record.meta["config"]
    assert settings.pop("range_tolerance") == 0
    assert replay_flight(record, tokenizer) == (40, [])
    # That the settings of a record decide, is seen where they are others.
    settings["range_tolerance"] = 1.0
    assert len(replay_flight(record, tokenizer)[1]) == statuses.count(Status.OUT_OF_RANGE)


def test_the_first_ticks_of_a_ring_that_has_wrapped_serve_to_fill_the_queue(bundle_of: Any, tmp_path: Path) -> None:
    with ActionTokenizer.load(bundle_of(Recipe(chunk_length=5))) as tokenizer:
        flight = Flight(tokenizer, tmp_path, record_ticks=20, strategy="weighted_average")
        for _ in range(60):
            flight.chunk()
            flight.tick()
        record = flight.record()
        assert len(record) == 20 + 5
        assert replay_flight(record, tokenizer) == (20, [])
        ticks = record.columns["tick"]
        # One that was altered is found among those compared, the first as well as the last.
        for index in (5, 15, len(record) - 1):
            compared, differences = replay_flight(_altered(record, index), tokenizer)
            assert compared == 20
            assert differences[0].startswith(f"tick {ticks[index]}: recorded OK")
        with pytest.raises(FlightRecordError, match="nothing can be compared"):
            replay_flight(_first(record, 5), tokenizer)


def test_a_ring_that_has_wrapped_keeps_the_latch(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    flight = Flight(tokenizer, tmp_path, record_ticks=20, on_fault="stop")
    flight.chunk()
    flight.tick(flight.tokens[0] - 100)
    for _ in range(60):
        flight.chunk()
    assert replay_flight(flight.record(), tokenizer) == (20, [])


def _first(record: FlightRecord, count: int) -> FlightRecord:
    columns, beliefs = (
        {name: rows[:count] for name, rows in named.items()} for named in (record.columns, record.beliefs)
    )
    arrays = record.actions[:count], record.tokens[:count], record.stats[:count]
    return FlightRecord(record.meta, columns, *arrays, beliefs)


def _arrays(record: FlightRecord) -> dict[str, Any]:
    """As a file has them."""
    named = {"actions": record.actions, "tokens": record.tokens, "stats": record.stats}
    return {**record.columns, **named, **record.beliefs}


@pytest.mark.parametrize("kind", ["refused chunk", "late", "backend", "clock", "run out", "latched"])
def test_a_tick_on_which_the_robot_stood_still_is_compared_too(
    tokenizer: ActionTokenizer, tmp_path: Path, kind: str
) -> None:
    flight = Flight(tokenizer, tmp_path, on_fault="stop" if kind == "latched" else "hold_last")
    for _ in range(10):
        flight.chunk()
    if kind == "refused chunk":
        flight.tick(flight.tokens[0] - 100)
    elif kind == "late":
        flight.chunk(deadline_us=-1.0)
    elif kind == "backend":
        flight.backend_fails(fails)
    elif kind == "clock":
        flight.clock_fails()
    elif kind == "run out":
        flight.tick(passed=3.0)
    else:
        flight.tick(flight.tokens[0] - 100)
        flight.tick()
    status = flight.decoder.result.status
    record = flight.record()
    index = len(record) - 1
    assert record.columns["flags"][index] & HELD
    assert replay_flight(record, tokenizer) == (_ticks(record), [])
    altered = replay_flight(_altered(record, index), tokenizer)[1]
    assert [text.partition(" [")[0] for text in altered] == [
        f"tick {record.columns['tick'][index]}: recorded {status.name}, held,"
    ]


def test_a_backend_that_gave_something_else_is_found(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    flight = Flight(tokenizer, tmp_path)
    flight.chunk()
    flight.backend_fails(lambda actions: actions.fill(1e9))
    flight.chunk()
    (difference,) = replay_flight(flight.record(), tokenizer)[1]
    assert difference.startswith("tick 2: recorded OUT_OF_RANGE, held, ")
    assert "; replayed OK [" in difference


@pytest.mark.parametrize("when_uncertain", ["hold", "slow", "ask"])
def test_beliefs_are_judged_again_from_what_they_decoded_to(
    either_tokenizer: ActionTokenizer, tmp_path: Path, when_uncertain: str
) -> None:
    beliefs = {"least_mode_probability": 0.9, "when_uncertain": when_uncertain, "leave_ticks": 3, "temperature": 0.5}
    flight = Flight(either_tokenizer, tmp_path, beliefs=beliefs)
    uncertain = [flight.believe(doubt) is Status.UNCERTAIN for doubt in (0, 1, 0, 0, 0, 0, 1)]
    assert uncertain == [False, True, True, True, False, False, True]
    model, record = either_tokenizer.model, flight.record()
    assert replay_flight(record, either_tokenizer) == (7, [])
    # As wide as what came: 0 for the mode of the first, and nothing is known of the last.
    assert record.beliefs["chunks"].shape == (8, model.chunk_length * model.action_dim)
    np.testing.assert_allclose(record.beliefs["mode_probability"][[1, 3]], 1, atol=1e-3)
    assert (record.beliefs["mode_probability"][[2, 7]] < 0.9).all()
    assert (record.beliefs["std"][1] < record.beliefs["std"][2]).all()
    whole = either_tokenizer.encode(either_tokenizer.decode(flight.tokens[0]))
    assert record.beliefs["mode"].shape[1] == (
        np.prod(whole.shape[1:-1]) * model.prefixes[0] if model.token_grid else 1
    )
    # With more doubt before it, it would have been uncertain.
    columns = {name: column.copy() for name, column in record.columns.items()}
    columns["doubt"][4] = 3
    (difference,) = replay_flight(replace(record, columns=columns), either_tokenizer)[1]
    assert difference.startswith("tick 5: recorded OK")
    assert "; replayed UNCERTAIN" in difference


def test_a_record_of_a_loop_that_knew_no_beliefs_is_replayed(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    flight = Flight(tokenizer, tmp_path)
    for _ in range(10):
        flight.chunk()
    record = flight.record()
    names = {"doubt", *record.beliefs}
    arrays = {name: rows for name, rows in _arrays(record).items() if name not in names}
    write_record(tmp_path / "before.npz", arrays, {**record.meta, "schema": 2})
    assert replay_flight(read_record(tmp_path / "before.npz"), tokenizer) == (10, [])


def test_statuses_that_were_altered_are_found(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    flight = Flight(tokenizer, tmp_path)
    for _ in range(10):
        flight.chunk()
    record = flight.record()
    for status in (Status.BAD_TOKEN, Status.STALE, Status.NONFINITE):
        columns = {name: column.copy() for name, column in record.columns.items()}
        columns["status"][5] = status
        (difference,) = replay_flight(replace(record, columns=columns), tokenizer)[1]
        assert difference.startswith(f"tick 5: recorded {status.name} ")


def test_the_command_says_what_differs(
    tokenizer: ActionTokenizer,
    bundle: Path,
    bundle_of: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flight = Flight(tokenizer, tmp_path)
    for _ in range(10):
        flight.chunk()
    flight.tick(flight.tokens[0] - 100)
    record = flight.record()
    assert main([str(bundle), str(flight.path)]) == 0
    assert (
        capsys.readouterr().out
        == "✓ onnxruntime: 11 of 12 rows compared, 0 differ (the others are starts, or only say what was before)\n"
    )
    altered = tmp_path / "altered.npz"
    found = _altered(record, 7)
    write_record(altered, _arrays(found), found.meta)
    assert main([str(bundle), str(altered)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("tick 7: recorded OK")
    assert "✗ onnxruntime: 11 of 12 rows compared, " in out
    np.savez(tmp_path / "data.npz", actions=np.zeros((2, 3)))
    for arguments, message in (
        ([bundle, tmp_path / "none.npz"], "is no flight record"),
        ([bundle, tmp_path / "data.npz"], "data.npz is no flight record: it has no 'meta'; pass"),
        ([bundle, bundle], "is no flight record: it is not a regular file"),
        (
            [bundle_of(Recipe(seed=5)), flight.path],
            "flight.npz; give the bundle that flew\n",
        ),
        ([flight.path, bundle], "give the bundle first: python runtime/replay_flight.py BUNDLE RECORD"),
    ):
        assert main(list(map(str, arguments))) == 2
        assert message in capsys.readouterr().err


def test_a_record_of_another_robot_is_refused(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    flight = Flight(tokenizer, tmp_path)
    flight.chunk()
    record = flight.record()
    with pytest.raises(FlightRecordError, match="expected some, with 3 dimensions"):
        replay_flight(replace(record, actions=record.actions[:, :2]), tokenizer)
