"""The policy's side: a process that answers what the robot sees with a chunk of tokens, and misbehaves when told to."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rfsq.runtime import ActionTokenizer, TokenizerError

#: What is seen -> actions float32 [T, A], from the moment of seeing on.
Planner = Callable[[Any], npt.NDArray[np.float32]]


class Policy(Protocol):
    """Sent to the process, where it is called once with T to load what it needs."""

    @property
    def period_s(self) -> float: ...
    def __call__(self, chunk_length: int) -> Planner: ...


HANG_S = 1.0
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Question:
    """asked_ns: on the monotonic clock, one for all processes of a machine. fault: to be made with the answer."""

    asked_ns: int
    seen: Any
    fault: str


@dataclass(frozen=True)
class Chunk:
    """tokens of the smallest type: so short a message comes whole or not at all, even from a process just killed."""

    sequence: int
    observed_ns: int
    tokens: npt.NDArray[Any]
    stats: npt.NDArray[np.float32] | None


class Link:
    """The loop's end. One question at a time: a policy that hangs must not fill the pipe, for then `ask` would wait.

    Messages are pickled, as between processes of one program; from another machine take plain bytes.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._pending_ns, self.is_open = connection, 0, True

    def ask(self, observe: Callable[[], Any], fault: str = "") -> bool:
        """Unless an answer is awaited; whether a question went out."""
        if self._pending_ns or not self.is_open:
            return False
        self._pending_ns = time.monotonic_ns()
        try:
            self._connection.send(Question(self._pending_ns, observe(), fault))
        except OSError:
            self.is_open = False
        return self.is_open

    def receive(self) -> Chunk | None:
        """What has come, or None; never waits."""
        try:
            if not self.is_open or not self._connection.poll():
                return None
            chunk: Chunk = self._connection.recv()
        except (EOFError, OSError):
            self.is_open = False
            return None
        if chunk.observed_ns == self._pending_ns:
            self._pending_ns = 0
        return chunk


@contextmanager
def policy_process(bundle: Path, policy: Policy) -> Iterator[tuple[BaseProcess, Connection]]:
    """Started, and not ready yet: see `wait_until_ready`."""
    here, there = multiprocessing.Pipe()
    # Spawned: a forked process would share the simulator's native state, and a lock that a thread holds.
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(there, bundle, policy), daemon=True)
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()


def wait_until_ready(process: BaseProcess, connection: Connection) -> Link:
    """Raises TokenizerError where the policy has ended or takes too long."""
    try:
        if connection.poll(START_TIMEOUT_S):
            connection.recv()
            return Link(connection)
    except (EOFError, OSError):
        process.join(1.0)
        raise TokenizerError(
            f"the policy's process has ended with exit code {process.exitcode}; see its message above"
        ) from None
    raise TokenizerError(f"the policy's process is not ready after {START_TIMEOUT_S:g} s; see what it waits for")


def serve(connection: Connection, bundle: Path, policy: Policy) -> None:
    """See, plan, encode, answer, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loop, which ends this process
    with ActionTokenizer.load(bundle) as tokenizer:
        model, number = tokenizer.model, 0
        planner = policy(model.chunk_length)
        small = np.dtype(np.uint8 if model.token_grid else np.uint16)
        if model.vocabulary > np.iinfo(small).max:
            small = np.dtype(np.int32)
        connection.send("ready")
        while True:
            try:
                question = connection.recv()
            except (EOFError, OSError):
                return
            actions = planner(question.seen)[np.newaxis]
            tokens, stats = (
                tokenizer.encode_with_stats(actions) if model.has_stats else (tokenizer.encode(actions), None)
            )
            number += 1
            chunks = [Chunk(number, question.asked_ns, tokens.astype(small), stats)]
            if question.fault == "bad":
                chunks[0].tokens.flat[0] = model.vocabulary
            elif question.fault == "late":
                time.sleep(1.25 * model.chunk_length * policy.period_s)
            elif question.fault == "hang":
                time.sleep(HANG_S)
            elif question.fault == "duplicate":
                chunks *= 2
            elif question.fault == "reordered":
                number += 1
                chunks.insert(0, replace(chunks[0], sequence=number))
            for chunk in chunks:
                connection.send(chunk)
