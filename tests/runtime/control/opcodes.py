"""Exceptions that break in before any bytecode that is chosen, one after another."""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from rfsq import runtime

#: Where exceptions break in. An Event or Condition of threading is broken for good by one: a tick is to use none.
_WATCHED = str(Path(runtime.__file__).parent), threading.__file__


def in_a_thread(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a thread of its own, whose end takes along what Python keeps of exceptions at such odd places.

    A thread remembers what it was handling: tests that came later would see it behind all their exceptions.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(test, *args, **kwargs).result()

    return run


class Breaker:
    """Raises `error` before the bytecode number `at[0]` that runs in `runtime`, before the `at[1]`-th after it, ...

    A function that was given to sys.settrace and raises is taken out. So each frame holds it with a `_Return`, whose
    end, when it is taken out, puts another one in its place. places: where it has raised, as code and offset.
    """

    def __init__(self, at: Sequence[int], error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self._error, self._is_on = list(at), error, False
        self.places: list[tuple[str, int]] = []
        self._raised_in: FrameType | None = None

    def run(self, call: Callable[[], Any]) -> BaseException | None:
        """What has left `call`."""
        before, self._is_on = sys.gettrace(), True
        # Python 3.12 watches bytecodes only if a frame has asked for it before the function is set.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._enter)
        try:
            call()
        except BaseException as error:
            return error
        finally:
            self._is_on = False
            sys.settrace(before)
        return None

    def _enter(self, frame: FrameType, _event: str, _: object) -> Any:
        return self._watch(frame) if frame.f_code.co_filename.startswith(_WATCHED) else None

    def _watch(self, frame: FrameType) -> Any:
        # In this order: Python 3.13 watches the bytecodes of a frame that has its function already.
        frame.f_trace = watch = partial(_look, _Return(self, frame))
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return watch

    def go_on(self, frame: FrameType) -> None:
        # Not of one that has come to its own end.
        if frame is not self._raised_in:
            return
        self._raised_in = None
        if self._is_on and self.left:
            sys.settrace(self._enter)
            self._watch(frame)

    def is_due(self, frame: FrameType) -> bool:
        if not self.left:
            return False
        self.left[0] -= 1
        if self.left[0] > 0:
            return False
        del self.left[0]
        self._raised_in = frame
        self.places.append((frame.f_code.co_name, frame.f_lasti))
        return True

    def error(self) -> BaseException:
        return self._error(f"number {len(self.places)}")


class Survey(Breaker):
    """Breaks nothing off. seen: what ran, bytecode by bytecode."""

    def __init__(self) -> None:
        super().__init__([1])
        self.seen: list[tuple[CodeType, int]] = []

    @property
    def has_threading(self) -> bool:
        return any(code.co_filename == threading.__file__ for code, _ in self.seen)

    def is_due(self, frame: FrameType) -> bool:
        self.seen.append((frame.f_code, frame.f_lasti))
        return False

    def numbers(self, rounds: int) -> list[int]:
        """Of bytecodes, from 1 on; of those that ran again and again, the first `rounds` times.

        With those beside them: the next time it may be one more or less.
        """
        times, chosen = Counter[tuple[CodeType, int]](), set[int]()
        for number, place in enumerate(self.seen, start=1):
            times[place] += 1
            if times[place] <= rounds:
                chosen.update((number - 1, number, number + 1))
        return sorted(chosen - {0})


class _Return:
    def __init__(self, breaker: Breaker, frame: FrameType) -> None:
        self.breaker, self._frame = breaker, frame

    def __del__(self) -> None:
        self.breaker.go_on(self._frame)


def _look(token: _Return, frame: FrameType, event: str, _: object) -> Any:
    if event == "opcode" and token.breaker.is_due(frame):
        error = token.breaker.error()
        # Else the traceback keeps it.
        del token
        raise error
    return frame.f_trace
