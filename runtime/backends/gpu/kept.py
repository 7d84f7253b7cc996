"""What is made once and kept ready for calls to come, without a lock."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

#: Shapes of arrays, and streams of callers, for which everything is kept ready; a robot uses one or two.
_KEPT = 4
_T = TypeVar("_T")


class Kept(Generic[_T]):
    """Idle objects by key, for the last few keys.

    Takes no lock: a signal handler may come while its own thread is in here. Whoever finds nothing idle makes
    another; the list operations in between are atomic.
    """

    def __init__(self, make: Callable[[Any], _T], close: Callable[[_T], None]) -> None:
        self._make, self._close = make, close
        self._idle: OrderedDict[Hashable, list[_T]] = OrderedDict()
        self._latest: Hashable = None

    @contextlib.contextmanager
    def borrowed(self, key: Hashable) -> Any:
        item = self.take(key)
        try:
            yield item
        except BaseException:
            # In an unknown state: work of it may still be under way.
            self._close(item)
            raise
        self.give_back(key, item)

    def take(self, key: Hashable) -> _T:
        item = _popped(self._idle.get(key))
        if item is not None:
            return item
        item = self._make(key)
        self._idle.setdefault(key, [])
        while len(self._idle) > _KEPT:
            self._close_idle(self._idle.popitem(last=False)[1])
        return item

    def give_back(self, key: Hashable, item: _T) -> None:
        idle = self._idle.get(key)
        if idle is None:
            self._close(item)
            return
        idle.append(item)
        if key != self._latest:
            self._latest = key
            with contextlib.suppress(KeyError):
                # What is used stays; the shapes of a control loop are used all the time.
                self._idle.move_to_end(key)
        if self._idle.get(key) is not idle:
            # Another call has dropped the list meanwhile, and may have been through with it.
            self._close_idle(idle)

    def close(self) -> None:
        while self._idle:
            self._close_idle(self._idle.popitem()[1])

    def _close_idle(self, items: list[_T]) -> None:
        # Taken out one by one: another call may have found the list before it was dropped.
        while (item := _popped(items)) is not None:
            self._close(item)


def _popped(items: list[_T] | None) -> _T | None:
    """The last one, taken out; None where there is none, or another thread was faster."""
    try:
        return items.pop() if items else None
    except IndexError:
        return None
