"""Performs what the state asks for: commands to engines, answers to calls that wait, changes to watchers."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, TypeAlias

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache import messages
from services.cache.effects import Effects, Ending, EndSession, ReserveOutcome, WaitOutcome
from services.cache.metrics import CacheMetrics
from services.cache.outbox import Outbox
from services.cache.sessions import Session
from services.cache.state import DRAINING_RETRY_S, CacheState
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)
COMMANDS_MAX: Final = 4_096
"""Commands that wait for an engine that does not read; one more ends its session."""

Answer: TypeAlias = WaitOutcome | ReserveOutcome
SessionOutbox: TypeAlias = Outbox[pb.JoinResponse]
WatchOutbox: TypeAlias = Outbox[pb.WatchResponse]


class Edge:
    """The streams and calls that are open. On the event loop only."""

    def __init__(
        self,
        state: CacheState,
        metrics: CacheMetrics,
        clock: Clock,
        *,
        watchers_max: int,
        changes_max: int,
    ) -> None:
        self._state = state
        self._metrics = metrics
        self._clock = clock
        self._watchers_max = watchers_max
        self._changes_max = changes_max
        self._sessions: dict[str, SessionOutbox] = {}
        self._watches: dict[WatchOutbox, None] = {}
        self._calls: dict[str, asyncio.Future[Answer]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no stream and no waiting call is open."""
        return not (self._sessions or self._watches or self._calls)

    # --- streams -------------------------------------------------------------------------------------------------

    def open_session(self, session: Session) -> SessionOutbox:
        """What is sent to an engine."""
        outbox = self._sessions[session.session_id] = SessionOutbox(COMMANDS_MAX)
        return outbox

    def close_session(self, session: Session) -> None:
        """Its stream ended: ends the session."""
        self._sessions.pop(session.session_id).close()
        self._end(session.session_id)

    def open_watch(self) -> WatchOutbox:
        """What is sent to a watcher. Raises CaravanError: CAPACITY_EXHAUSTED."""
        if len(self._watches) >= self._watchers_max:
            raise CaravanError(
                "CAPACITY_EXHAUSTED",
                f"There are {self._watchers_max} watches, and no more are taken.",
                retry_after_s=1.0,
                active=str(len(self._watches)),
                capacity=str(self._watchers_max),
            )
        outbox = WatchOutbox(self._changes_max)
        self._watches[outbox] = None
        self._state.core.watched = True
        return outbox

    def close_watch(self, outbox: WatchOutbox) -> None:
        """Its stream ended."""
        self._watches.pop(outbox, None)
        self._state.core.watched = bool(self._watches)

    def close_watches(self, error: CaravanError) -> None:
        """Ends all watches."""
        for outbox in self._watches:
            outbox.close(error)

    # --- calls that wait -----------------------------------------------------------------------------------------

    def expect(self, call_id: str) -> asyncio.Future[Answer]:
        """The answer that a reply will give. To be asked for before the effects that may hold it are performed."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        return answer

    def forget(self, call_id: str) -> None:
        """Nobody waits for the reply any more."""
        self._calls.pop(call_id).cancel()

    # --- effects -------------------------------------------------------------------------------------------------

    def perform(self, effects: Effects) -> None:
        """Sends what the state decided."""
        for reply in effects.replies:
            call = self._calls.get(reply.call_id)
            if call is None or call.done():
                continue  # The call ended in this very moment.
            if isinstance(reply.answer, CaravanError):
                call.set_exception(reply.answer)
            else:
                call.set_result(reply.answer)
        for drop in effects.drops:
            self._send(drop.session, messages.to_drop(drop))
        for settle in effects.settles:
            self._send(settle.session, messages.to_settle(settle))
        for change in effects.changes:
            self._tell_watchers(messages.to_change(change))
        for ending in effects.endings:
            self._end_stream(ending)

    def _send(self, session: Session, command: pb.JoinResponse) -> None:
        outbox = self._sessions.get(session.session_id)
        if outbox is not None and not outbox.put(command):
            _LOG.warning("%s does not read: ended", session.session_id)
            outbox.close(CaravanError("SESSION_UNKNOWN", "Too many commands wait for you."))
            self._end(session.session_id)

    def _tell_watchers(self, change: pb.WatchResponse) -> None:
        for outbox in tuple(self._watches):
            if not outbox.put(change):
                _LOG.warning("a watcher fell %d changes behind: ended", self._changes_max)
                outbox.close(
                    CaravanError(
                        "CAPACITY_EXHAUSTED",
                        "The watch fell too far behind: watch again, with what is present.",
                        retry_after_s=0.0,
                        active=str(self._changes_max),
                        capacity=str(self._changes_max),
                    )
                )
                self.close_watch(outbox)

    def _end(self, session_id: str) -> None:
        self.perform(self._state.end_session(session_id, self._clock.monotonic()))

    def _end_stream(self, ending: EndSession) -> None:
        session, why = ending.session, ending.why
        self._metrics.count_ending(why)
        level = logging.INFO if why is Ending.DRAINING else logging.WARNING
        _LOG.log(level, "%s of %s: %s", session.session_id, session.engine_id, why.value)
        outbox = self._sessions.get(session.session_id)
        if outbox is not None:  # None where its stream ended in this very moment.
            outbox.close(_ending_error(session, why))


def _ending_error(session: Session, why: Ending) -> CaravanError:
    text = f"The session ended: {why.value}."
    if why is Ending.DRAINING:
        return CaravanError("DRAINING", text, retry_after_s=DRAINING_RETRY_S)
    return CaravanError("SESSION_UNKNOWN", text, session_id=session.session_id)
