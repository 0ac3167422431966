"""The decisions of the cache service, composed: sessions, saves, lookups, drops.

Pure. The time (monotonic seconds) and ids are arguments, and what has to be done outside comes back as `Effects`. Answers that
come later are replies under the id that the caller gave: a waiter's, or a reservation's token.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.cache.core import Core, Limits
from services.cache.dropping import Dropping
from services.cache.effects import Effects, Ending, EndSession, ReserveOutcome, WaitOutcome
from services.cache.joining import Joining
from services.cache.lookup import Found, Lookup
from services.cache.places import Place
from services.cache.rows import Facts, Tier
from services.cache.saving import Saving
from services.cache.sessions import Registration, Session
from services.runtime.errors import CaravanError

SILENT_HEARTBEATS_MAX = 3
"""Heartbeats without a word after which an engine is taken for dead."""
DRAINING_RETRY_S = 1.0


class CacheState:
    """Everything that the service knows. Methods that belong to a session raise SESSION_UNKNOWN where it has ended."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.core = Core(limits)
        self.draining = False
        self._dropping = Dropping(self.core)
        self._saving = Saving(self.core, self._dropping)
        self._lookup = Lookup(self.core, self._dropping)
        self._joining = Joining(self.core, self._dropping, self._saving)
        self._expired_at: float | None = None

    # --- sessions ------------------------------------------------------------------------------------------------

    def join(
        self, registration: Registration, *, session_id: str, now: float
    ) -> tuple[Session, Effects]:
        """Begins a session. Raises CaravanError: DRAINING, CAPACITY_EXHAUSTED, INVALID_VALUE."""
        if self.draining:
            raise CaravanError(
                "DRAINING", "The cache service is shutting down.", retry_after_s=DRAINING_RETRY_S
            )
        effects = Effects()
        session = self._joining.join(registration, session_id, now, effects)
        return session, self._admitted(effects, now)

    def hear(self, session_id: str, now: float) -> Session:
        """The engine spoke. Raises CaravanError: SESSION_UNKNOWN."""
        session = self.session(session_id)
        session.heard_at = now
        return session

    def heartbeat(
        self, session: Session, memory_used: int, memory_total: int, now: float
    ) -> Effects:
        """The engine lives; drops from the memory of its host if that is short. Bytes; 0 where unknown."""
        effects = Effects()
        self._dropping.relieve(session, memory_used, memory_total, now, effects)
        return effects

    def take_inventory(
        self, session: Session, place: Place, blocks: Sequence[Facts], *, complete: bool, now: float
    ) -> Effects:
        """A part of the contents of a root."""
        effects = Effects()
        self._joining.take_inventory(
            session, place, blocks, complete=complete, now=now, effects=effects
        )
        return self._admitted(effects, now)

    def change_ram(
        self, session: Session, added: Sequence[Facts], removed: Sequence[bytes], now: float
    ) -> Effects:
        """What changed in an engine's RAM."""
        effects = Effects()
        self._joining.change_ram(session, added, removed, now, effects)
        return effects

    def withdraw(
        self, place: Place, keys: Sequence[bytes], *, corrupt: bool, now: float
    ) -> Effects:
        """Copies turned out to be gone or bad."""
        effects = Effects()
        self._dropping.withdraw(place, keys, effects, corrupt=corrupt)
        return self._admitted(effects, now)

    def dropped(self, session: Session, place: Place, keys: Sequence[bytes], now: float) -> Effects:
        """A Drop was carried out."""
        effects = Effects()
        self._dropping.confirm(session, place, keys, effects)
        return self._admitted(effects, now)

    def settled(
        self, session: Session, place: Place, key: bytes, facts: Facts | None, now: float
    ) -> Effects:
        """A Settle was carried out; `facts` of the file if it is good."""
        effects = Effects()
        self._saving.settled(session, place, key, facts, now=now, effects=effects)
        return self._admitted(effects, now)

    def end_session(self, session_id: str, now: float) -> Effects:
        """The stream of a session ended. Nothing where the session is over already."""
        effects = Effects()
        session = self.core.sessions.find(session_id)
        if session is not None:
            self._joining.leave(session, now, effects)
        return self._admitted(effects, now)

    def expire(self, now: float) -> Effects:
        """Ends silent sessions, lost saves and old claims; to be called at least once per heartbeat.

        Where the last call is longer ago than a heartbeat, it was this process that stood still: what engines said meanwhile
        still waits in the sockets, so nobody is judged until the next call.
        """
        effects = Effects()
        last, self._expired_at = self._expired_at, now
        if last is not None and now - last > self.limits.heartbeat_s:
            return effects
        then = now - SILENT_HEARTBEATS_MAX * self.limits.heartbeat_s
        for session in self.core.sessions:
            if session.heard_at <= then:
                self._joining.leave(session, now, effects)
                effects.endings.append(EndSession(session, Ending.SILENT))
        self._saving.expire(now, effects)
        self._lookup.expire(now, effects)
        return self._admitted(effects, now)

    def drain(self, now: float) -> Effects:
        """Takes no new sessions and ends all."""
        self.draining = True
        effects = Effects()
        for session in self.core.sessions:
            self._joining.leave(session, now, effects)
            effects.endings.append(EndSession(session, Ending.DRAINING))
        return effects

    # --- lookups -------------------------------------------------------------------------------------------------

    def acquire(
        self,
        session_id: str,
        keys: bytes,
        skip: int,
        root_key: bytes,
        tail: bytes,
        *,
        claim_id: str,
        now: float,
    ) -> Found:
        """Pins the longest chain, and the best partly matching block after it. See Lookup.acquire."""
        session = self.session(session_id)
        return self._lookup.acquire(session, keys, skip, root_key, tail, claim_id=claim_id, now=now)

    def release(self, session_id: str, claim_id: str) -> tuple[bool, Effects]:
        """Gives a claim back; whether it was held."""
        effects = Effects()
        return self._lookup.release(self.session(session_id), claim_id, effects), effects

    def wait(self, session_id: str, key: bytes, waiter_id: str) -> WaitOutcome | None:
        """Waits for a block; None: the answer is a reply, or `stop_waiting` ends it. Raises CAPACITY_EXHAUSTED."""
        return self._lookup.wait(self.session(session_id), key, waiter_id)

    def stop_waiting(self, waiter_id: str) -> bool:
        """A waiter does not wait any longer; False where it has been answered."""
        return self.core.waiters.remove(waiter_id)

    # --- saves ---------------------------------------------------------------------------------------------------

    def reserve(
        self, session_id: str, root_id: str, facts: Facts, *, token: str, now: float
    ) -> tuple[ReserveOutcome | None, Effects]:
        """Asks to save a block; None: the answer is a reply, or `give_up` ends the wait for room. Raises INVALID_VALUE."""
        session = self.session(session_id)
        place = self.root(session, root_id)
        if not place.readers[session]:
            raise CaravanError(
                "INVALID_VALUE", f"The root '{root_id}' is not writable.", param="root_id"
            )
        effects = Effects()
        outcome = self._saving.reserve(session, place, facts, token=token, now=now, effects=effects)
        return outcome, self._admitted(effects, now)

    def give_up(self, session_id: str, token: str, now: float) -> tuple[bool, Effects]:
        """A wait for room is over; False where it has been answered."""
        effects = Effects()
        given_up = self._saving.give_up(session_id, token, effects)
        return given_up, self._admitted(effects, now)

    def renew(
        self, session_id: str, tokens: Sequence[str], now: float
    ) -> tuple[list[str], Effects]:
        """Prolongs reservations; returns the tokens that do not hold."""
        effects = Effects()
        lost = self._saving.renew(self.session(session_id), tokens, now, effects)
        return lost, self._admitted(effects, now)

    def check(self, session_id: str, token: str, now: float) -> tuple[bool, Effects]:
        """Whether the file may get its final name."""
        effects = Effects()
        valid = self._saving.check(self.session(session_id), token, now, effects)
        return valid, self._admitted(effects, now)

    def mark(self, session_id: str, token: str, now: float) -> tuple[bool, Effects]:
        """The file has its final name; whether the reservation holds."""
        effects = Effects()
        valid = self._saving.mark(self.session(session_id), token, now, effects)
        return valid, self._admitted(effects, now)

    def announce(
        self, session_id: str, token: str, facts: Facts, now: float
    ) -> tuple[bool, Effects]:
        """The block is saved; whether the reservation still held. Raises INVALID_VALUE."""
        effects = Effects()
        valid = self._saving.announce(self.session(session_id), token, facts, now, effects)
        return valid, self._admitted(effects, now)

    def cancel(self, session_id: str, token: str, now: float) -> tuple[bool, Effects]:
        """The writer gives up; whether the reservation was held."""
        effects = Effects()
        found = self._saving.cancel(self.session(session_id), token, now, effects)
        return found, self._admitted(effects, now)

    # --- drops ---------------------------------------------------------------------------------------------------

    def evict(
        self, wanted: int, tiers: frozenset[Tier], root_id: str
    ) -> tuple[tuple[int, int], Effects]:
        """Drops `wanted` bytes, or what one call may; returns how many copies and bytes. Call again for the rest."""
        effects = Effects()
        return self._dropping.evict(self._places(tiers, root_id), wanted, effects), effects

    def evict_keys(
        self, keys: Sequence[bytes], tiers: frozenset[Tier], root_id: str
    ) -> tuple[tuple[int, int], Effects]:
        """Drops copies of these keys; returns how many copies and bytes."""
        effects = Effects()
        return self._dropping.evict_keys(self._places(tiers, root_id), keys, effects), effects

    # --- how -----------------------------------------------------------------------------------------------------

    def session(self, session_id: str) -> Session:
        """A live session. Raises CaravanError: SESSION_UNKNOWN."""
        session = self.core.sessions.find(session_id)
        if session is None:
            raise CaravanError(
                "SESSION_UNKNOWN",
                f"The session '{session_id}' is not known: join again.",
                session_id=session_id,
            )
        return session

    def root(self, session: Session, root_id: str) -> Place:
        """A root of a session. Raises CaravanError: INVALID_VALUE."""
        place = session.roots.get(root_id)
        if place is None:
            raise CaravanError(
                "INVALID_VALUE",
                f"The session did not declare the root '{root_id}'.",
                param="root_id",
            )
        return place

    def _places(self, tiers: frozenset[Tier], root_id: str) -> list[Place]:
        return [
            place
            for place in self.core.places
            if (not tiers or place.tier in tiers) and (not root_id or place.root_id == root_id)
        ]

    def _admitted(self, effects: Effects, now: float) -> Effects:
        """Whatever was decided may have made room: those that wait for it are granted."""
        for place in self.core.places:
            if place.waiting:
                self._saving.admit(place, now, effects)
        return effects
