"""Taking an engine out of service, and back into it. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Drain:
    """Serving, then draining, then moving; `undo` leads back.

    While an engine drains it takes no new requests, and those that run may finish. After the grace those that are left move:
    they end with DRAINING, so that their gateways send them to another engine. With `stop` the process ends when none is left.
    A drain for good, as the process ends anyway, is neither undone nor changed.
    """

    def __init__(self, move: Callable[[], None]) -> None:
        self.draining = False
        """Whether new requests are refused."""
        self.moving = False
        """Whether those that were taken before are refused too."""
        self.stop = False
        """Whether the process ends when no request is left."""
        self._for_good = False
        self._move = move
        self._timer: asyncio.TimerHandle | None = None

    def start(self, grace_s: float, *, stop: bool, for_good: bool) -> None:
        """Drains; what is left after `grace_s` seconds moves. Starting again sets a new grace; `stop` stays once it was told."""
        if self._for_good:
            return
        self._cancel_timer()
        self.draining = True
        self._for_good = for_good
        self.stop = self.stop or stop
        if grace_s > 0:
            self._timer = asyncio.get_running_loop().call_later(grace_s, self._begin_to_move)
        else:
            self._begin_to_move()

    def undo(self) -> None:
        """Requests are taken again. Those that have moved stay away."""
        if self._for_good:
            return
        self._cancel_timer()
        self.draining = self.moving = self.stop = False

    def _begin_to_move(self) -> None:
        self._timer = None
        self.moving = True
        self._move()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
