"""Loops for tests: a clock that stands until it is moved, backends that obey until told to fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, ControlDecoder
from rfsq.runtime.backends.beliefs import BeliefAnswer, BeliefQuestion
from rfsq.runtime.bundle.arrays import Float32Array, Int32Array
from rfsq.runtime.bundle.errors import InferenceError
from rfsq.runtime.bundle.manifest import SCHEMA_VERSION, Manifest
from rfsq.runtime.control.config import ControlConfig
from rfsq.runtime.control.result import ControlResult
from rfsq.runtime.control.worker import DecodeWorker, WarmTokenizer
from rfsq.runtime.qualification.soak import chunks_of, config_for
from tests.bundles import Recipe, deploy, make_manifest
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens
from tests.processes import PATIENCE

PERIOD_NS = 2_000_000


class Clock:
    """Monotonic nanoseconds, moved by hand; `error` is raised in place of the time.

    readings: what it gives next, before it goes on as it was; an error there is raised.
    """

    def __init__(self) -> None:
        self.now = 10**12
        self.error: BaseException | None = None
        self.readings: list[int | BaseException] = []

    def __call__(self) -> int:
        if self.readings:
            found = self.readings.pop(0)
            if isinstance(found, BaseException):
                raise found
            return found
        if self.error is not None:
            raise self.error
        return self.now


class SwitchedBackend:
    """`backend`, until `act` is set, which then runs in its place with the array to be filled; of beliefs likewise."""

    def __init__(self, backend: Any, name: str = "") -> None:
        self._backend, self.name = backend, name or backend.name
        self.act: Callable[[Float32Array], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        if self.act is None:
            self._backend.decode_into(tokens, stats, actions)
        else:
            self.act(actions)

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        if self.act is None:
            self._backend.decode_belief_into(question, answer)
        else:
            self.act(answer.actions)


def hurry(monkeypatch: pytest.MonkeyPatch, hangs: Callable[[WarmTokenizer], bool]) -> list[float]:
    """Who waits for a backend that hangs has waited long enough at once; for others there is no hurry on any machine.

    How many seconds each of the former was given is appended to the list.
    """
    wait, given = DecodeWorker.wait_until, list[float]()

    def wait_until(worker: DecodeWorker, end_s: float) -> bool:
        if not hangs(worker.warm):
            return wait(worker, time.monotonic() + PATIENCE)
        given.append(end_s - time.monotonic())
        return wait(worker, 0.0)

    monkeypatch.setattr(DecodeWorker, "wait_until", wait_until)
    return given


class ScriptedBackend:
    """Its tokens are zeros, and its actions whatever `rows` says; an error there is raised.

    Of beliefs likewise, with `std`, one number or as many as actions, and `mode_probability`.
    """

    name = description = device = "scripted"
    checked_steps = 0

    def __init__(self, shape: tuple[int, int]) -> None:
        self.rows: Any = np.zeros(shape)
        self.std: Any = 0.0
        self.mode_probability = 1.0

    def encode_into(self, actions: Float32Array, tokens: Int32Array, stats: Float32Array | None) -> None:
        assert len(actions) == len(tokens)
        assert stats is None
        tokens[...] = 0

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        assert tokens.dtype == np.int32
        assert stats is None
        if isinstance(self.rows, BaseException):
            raise self.rows
        actions[0] = self.rows

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        assert question.batch == 1
        if isinstance(self.rows, BaseException):
            raise self.rows
        answer.actions[0] = self.rows
        for array, value in (
            (answer.std, self.std),
            (answer.mode_probability, self.mode_probability),
            (answer.mode, 1),
        ):
            assert array is not None
            array[0] = value

    def close(self) -> None:
        """Nothing is held."""


def switched(tokenizer: ActionTokenizer, name: str = "") -> tuple[ActionTokenizer, SwitchedBackend]:
    backend: Any = SwitchedBackend(tokenizer.backend, name)
    return ActionTokenizer(tokenizer.manifest, backend, tokenizer.golden), backend


def scripted(recipe: Recipe | ChunkRecipe) -> tuple[ActionTokenizer, ScriptedBackend]:
    manifest = chunk_manifest(recipe) if isinstance(recipe, ChunkRecipe) else make_manifest(deploy(recipe))
    backend: Any = ScriptedBackend((manifest.model.chunk_length, manifest.model.action_dim))
    return ActionTokenizer(manifest, backend), backend


def chunk_manifest(recipe: ChunkRecipe) -> Manifest:
    """Of a bundle in which there is nothing yet."""
    tokens = deployed_chunk_tokens(recipe)
    return Manifest(SCHEMA_VERSION, tokens.fingerprint, tokens.model, (), (), (), {}, {}, {})


def fails(_: Float32Array) -> None:
    raise InferenceError("injected")


def config_of(tokenizer: ActionTokenizer, **changes: Any) -> ControlConfig:
    return config_for(tokenizer, chunks_of(tokenizer, 16)[2], **changes)


def loop(
    tokenizer: ActionTokenizer,
    *,
    fallbacks: tuple[ActionTokenizer, ...] = (),
    clock: Callable[[], int] | None = None,
    **changes: Any,
) -> ControlDecoder:
    """Not warm yet."""
    config = config_of(tokenizer, **changes)
    options: dict[str, Any] = {} if clock is None else {"clock": clock}
    return ControlDecoder(tokenizer, config, fallbacks=fallbacks, position=(0.0,) * config.action_dim, **options)


def check_safe(result: ControlResult, before: Float32Array, config: ControlConfig) -> None:
    """Inside limits and slew, in float64."""
    sent = result.actions.astype(np.float64)
    assert (sent >= config.action_low).all()
    assert (sent <= config.action_high).all()
    assert (np.abs(sent - before) <= config.max_relative_step).all()


class ScriptedLoop:
    """A warm decoder whose backend makes of a chunk what `tick` is told: three deltas, four actions, no slew limit.

    recipe: of a bundle with these sizes.
    """

    LENGTH, DRAFT, FULL = 4, 2, 3

    def __init__(
        self,
        *,
        fallbacks: int = 0,
        recipe: Recipe | ChunkRecipe | None = None,
        position: tuple[float, ...] | None = None,
        **changes: Any,
    ) -> None:
        recipe = recipe or Recipe(chunk_length=self.LENGTH)
        tokenizer, self.backend = scripted(recipe)
        self.model = tokenizer.model
        self.spares = [scripted(recipe) for _ in range(fallbacks)]
        self.clock = Clock()
        values: dict[str, Any] = {
            **{"period_s": PERIOD_NS / 1e9, "stale_after_s": 10 * PERIOD_NS / 1e9, "retry_after_s": 1e5},
            **{"action_low": (-1.0,) * 3, "action_high": (1.0,) * 3, "max_relative_step": (float("inf"),) * 3},
            **{"action_kind": ("delta",) * 3, **changes},
        }
        self.config = ControlConfig(**values)
        spares = tuple(spare for spare, _ in self.spares)
        self.decoder = ControlDecoder(tokenizer, self.config, fallbacks=spares, position=position, clock=self.clock)
        self.decoder.warmup()

    def __enter__(self) -> ScriptedLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.decoder.close()

    def tick(
        self,
        rows: Any = None,
        *,
        passed: float = 1.0,
        layers: int = FULL,
        fails: bool = False,
        std: Any = None,
        mode_probability: float = 1.0,
        **options: Any,
    ) -> ControlResult:
        """rows: of the chunk that arrives, or a number for all of them, or an error to be raised; None for no chunk.

        fails: the first backend does, and the others do not. std: of a chunk that comes as logits; None for tokens.
        """
        self.clock.now += round(passed * PERIOD_NS)
        if rows is None:
            return self.decoder.step(**options)
        for backend in (self.backend, *(backend for _, backend in self.spares)):
            backend.rows = rows if isinstance(rows, BaseException) else np.multiply(rows, np.ones((self.LENGTH, 3)))
            backend.std, backend.mode_probability = 0.0 if std is None else std, mode_probability
        if fails:
            self.backend.rows = InferenceError("injected")
        if std is not None:
            return self.decoder.step(logits=self.logits(layers), **options)
        return self.decoder.step(np.zeros(self.model.tokens_shape(1, layers), np.int32), **options)

    def logits(self, layers: int = FULL) -> Float32Array:
        """Of one chunk, of tokens that nobody knows anything of."""
        return np.zeros((*self.model.tokens_shape(1, layers), self.model.vocabulary), np.float32)

    def wrong(self, **options: Any) -> ControlResult:
        """Tokens that are none."""
        self.clock.now += PERIOD_NS
        return self.decoder.step("tokens", **options)


def first_of(result: ControlResult) -> float:
    """The first number of the action."""
    return float(result.actions[0])
