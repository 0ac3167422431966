"""Virtual time for simulations, and messages that take some of it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random


class Time:
    """The order of what happens. Most messages are fast, some very late."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 0.0
        self.calm = False
        """Whether no message is late any more."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Schedules an action."""
        self.at(self.now + delay_s, action)

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Schedules an action; those of one time happen in the order in which they were scheduled."""
        heapq.heappush(self._events, (when, next(self._order), action))

    def delay_s(self) -> float:
        """Time of a message on its way."""
        slow = not self.calm and self.random.random() < 0.03
        return self.random.uniform(0.5, 3.0) if slow else self.random.uniform(0, 0.03)

    def soon(self, action: Callable[[], None]) -> None:
        """Schedules the arrival of a message."""
        self.after(self.delay_s(), action)

    def step(self, until_s: float) -> bool:
        """Does what is next; false where that is not before `until_s`."""
        if not self._events or self._events[0][0] >= until_s:
            return False
        self.now, _, action = heapq.heappop(self._events)
        action()
        return True


class Wire:
    """Messages in one direction: they keep their order, and those on their way are lost with it."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self._last = 0.0
        self.cut = False

    def send(self, action: Callable[[], None]) -> None:
        """`action` happens at the other end."""
        self._last = max(self._last, self._time.now + self._time.delay_s())
        self._time.at(self._last, lambda: None if self.cut else action())
