"""Asks for one lease, and asks again while coordinators come and go."""

from __future__ import annotations

import asyncio
from typing import Final

from services.gateway.membership import Membership
from services.gateway.routes import Headers, Lease, Wanted
from services.gateway.session_stream import Answer, Session, coordinator_down
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_FORGOTTEN_MAX: Final = 2
"""Times that a coordinator may say that it does not know the session that it has just taken."""
_PAUSE_S: Final = 0.1
_PAUSE_MOST_S: Final = 0.5
_NOT_LEARNED: Final = frozenset({"MODEL_NOT_FOUND", "NO_ENGINE"})


class Asking:
    """One lease on its way. `patience_s` is the longest time without a coordinator that can answer, in seconds."""

    def __init__(
        self, wanted: Wanted, membership: Membership, clock: Clock, patience_s: float
    ) -> None:
        self.wanted = wanted
        self.asked_at = clock.monotonic()
        self.left: asyncio.Future[Answer] | None = None
        """An answer that comes though the asker was cancelled, and may be a grant."""
        self._membership = membership
        self._clock = clock
        self._patience_s = patience_s
        self._forgotten = 0
        self._troubled_at: float | None = None
        """Since when no coordinator has been able to answer; None: one has, or has not been asked yet."""

    async def lease(self, headers: Headers) -> Lease:
        """The lease, when it is the turn of the request. Where this is cancelled, see `left`."""
        pause_s = _PAUSE_S
        while True:
            session = await self._membership.session(self._patience_s)
            began = self._clock.monotonic()
            asked = session.ask(self.wanted.request(headers))
            try:
                answer = await asked
            except asyncio.CancelledError:
                self.left = session.follow(self.wanted.request_id, asked)
                raise
            if not isinstance(answer, CaravanError):
                return Lease.of(answer)
            self._check(answer, session, began)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MOST_S)

    def _check(self, error: CaravanError, session: Session, began: float) -> None:
        """Returns where asking again may help. Raises the error, or SERVICE_UNAVAILABLE."""
        if error.reason == "SESSION_UNKNOWN":
            self._forgotten += 1
            if self._forgotten == _FORGOTTEN_MAX:
                raise coordinator_down()
            self._membership.renew(session)
            return
        now = self._clock.monotonic()
        # A lease of this request may live on at a coordinator that has not noticed the end of its session, or missed its release.
        asked_before = self._troubled_at is not None or self.wanted.asked_before
        own_ghost = error.reason == "DUPLICATE_REQUEST" and asked_before
        # A coordinator that has just started anew hears of its engines when they have noticed that it is there.
        young = session.succeeds_another and now - session.joined_at < self._patience_s
        not_learned = error.reason in _NOT_LEARNED and young
        if error.reason != "SERVICE_UNAVAILABLE" and not own_ghost and not not_learned:
            raise error
        if self._troubled_at is None or now - began > self._patience_s:
            # Until now the request has waited for its turn, which may take longer than this patience.
            self._troubled_at = now
        if now - self._troubled_at >= self._patience_s:
            raise error
