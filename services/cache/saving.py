"""Saves: who may write a block where, until its copy is available or given up (S2.24 to S2.29, W34, W36)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from services.cache.core import Core
from services.cache.dropping import Dropping
from services.cache.effects import Effects, Reply, ReserveOutcome, Settle, WaitOutcome
from services.cache.places import Place
from services.cache.reservations import HELD, End, Event, Reservation, Stage, step
from services.cache.rows import Copy, CopyState, Facts
from services.cache.sessions import Session
from services.runtime.errors import CaravanError


class Saving:
    """All that happens to reservations."""

    def __init__(self, core: Core, dropping: Dropping) -> None:
        self._core = core
        self._dropping = dropping

    # --- what writers ask ----------------------------------------------------------------------------------------

    def reserve(
        self,
        session: Session,
        place: Place,
        facts: Facts,
        *,
        token: str,
        now: float,
        effects: Effects,
    ) -> ReserveOutcome | None:
        """Answers a wish to save; None: the answer follows under the token, or the caller gives up."""
        core = self._core
        copy = core.index.find(facts.key, place)
        if copy is not None and copy.state is CopyState.WRITING:
            before = core.reservations.of(copy)
            if before.stage in HELD and before.expires <= now:
                self.lose(before, now, effects)
                copy = core.index.find(facts.key, place)
        if copy is not None:
            core.counters.duplicates += 1
            present = copy.state is CopyState.AVAILABLE
            return ReserveOutcome.ALREADY_PRESENT if present else ReserveOutcome.CONFLICT
        if facts.size > place.ledger.quota:
            return self._refuse()
        if len(core.index) >= core.limits.rows_max and facts.key not in core.index.rows:
            self._dropping.drop_one(place, effects)
            return self._refuse()
        copy = core.index.add(facts, place, CopyState.WRITING, seen=core.epoch, size=0, now=now)
        reservation = Reservation(
            token, session.session_id, copy, facts.size, now + core.limits.reservation_ttl_s
        )
        core.reservations.add(reservation)
        place.waiting[reservation] = None
        place.ledger.wanted += reservation.size
        if place.inventoried:
            if not self._dropping.make_room(place, effects, session):
                self._drop(reservation, effects)
                return self._refuse()
            if len(place.waiting) == 1 and place.ledger.fits(reservation.size):
                self._grant(reservation, now)
                return ReserveOutcome.GRANTED
        return None

    def give_up(self, session_id: str, token: str, effects: Effects) -> bool:
        """The caller does not wait for room any longer; False where it has been answered."""
        reservation = self._core.reservations.held(token, session_id)
        if reservation is None or reservation.stage is not Stage.WAITING:
            return False
        self._drop(reservation, effects)
        self._refuse()
        return True

    def renew(
        self, session: Session, tokens: Sequence[str], now: float, effects: Effects
    ) -> list[str]:
        """Prolongs reservations; returns the tokens that do not hold."""
        return [
            token
            for token in tokens
            if self._advance(session, token, Event.RENEW, now, effects) is None
        ]

    def check(self, session: Session, token: str, now: float, effects: Effects) -> bool:
        """Whether the writer may give the file its name."""
        return self._advance(session, token, Event.CHECK, now, effects) is not None

    def mark(self, session: Session, token: str, now: float, effects: Effects) -> bool:
        """The file has its name; whether the reservation still holds."""
        return self._advance(session, token, Event.MARK, now, effects) is not None

    def announce(
        self, session: Session, token: str, facts: Facts, now: float, effects: Effects
    ) -> bool:
        """The block is saved; whether the reservation still held. Raises CaravanError: INVALID_VALUE."""
        reservation = self._core.reservations.held(token, session.session_id)
        if reservation is not None:
            if facts.key != reservation.copy.row.key:
                raise CaravanError(
                    "INVALID_VALUE", "The token is of another block.", param="block.key"
                )
            if facts.size > reservation.size:
                raise CaravanError(
                    "INVALID_VALUE",
                    f"'block.size_bytes' is above the {reservation.size} that were reserved.",
                    param="block.size_bytes",
                )
        reservation = self._advance(session, token, Event.ANNOUNCE, now, effects)
        if reservation is None:
            return False
        self._publish(reservation, facts, now, effects)
        self._core.counters.saves[facts.reason] += 1
        return True

    def cancel(self, session: Session, token: str, now: float, effects: Effects) -> bool:
        """The writer gives up; whether the reservation was held. Those who wait are told at once, also if a file is there."""
        reservation = self._advance(session, token, Event.CANCEL, now, effects)
        if reservation is None:
            return False
        if reservation.stage is Stage.UNSETTLED:
            self._fail_waiters(reservation.copy.row.key, effects)
            self._ask(reservation, now, effects)
        else:
            self._drop(reservation, effects)
        return True

    # --- what engines find ---------------------------------------------------------------------------------------

    def settled(
        self,
        session: Session,
        place: Place,
        key: bytes,
        facts: Facts | None,
        *,
        now: float,
        effects: Effects,
    ) -> None:
        """The engine that was asked has looked: `facts` of a good file, None for none. Others are not believed."""
        copy = self._core.index.find(key, place)
        if copy is None or copy.state is not CopyState.WRITING:
            return
        reservation = self._core.reservations.of(copy)
        event = Event.BAD if facts is None else Event.GOOD
        if reservation.owner != session.session_id or step(reservation.stage, event) is None:
            return
        if facts is None:
            place.note_gone(key)
            self._drop(reservation, effects)
            return
        self._core.counters.adopted += 1
        self._publish(reservation, facts, now, effects)
        self._dropping.shrink(place, effects)

    def found(self, copy: Copy, facts: Facts, now: float, effects: Effects) -> None:
        """An inventory names the file of a block that somebody is saving or wants to."""
        reservation = self._core.reservations.of(copy)
        following = step(reservation.stage, Event.FOUND)
        if following is End.PUBLISHED:
            effects.replies.append(Reply(reservation.token, ReserveOutcome.ALREADY_PRESENT))
            self._core.counters.duplicates += 1
            self._leave_queue(reservation)
            self._publish(reservation, facts, now, effects)
        elif isinstance(following, Stage):
            reservation.stage = following

    # --- losses --------------------------------------------------------------------------------------------------

    def lose(self, reservation: Reservation, now: float, effects: Effects) -> None:
        """Who writes, or was asked to look, is lost: nothing can be there, or somebody has to look."""
        settling = reservation.stage is Stage.SETTLING
        following = step(reservation.stage, Event.SETTLER_LOST if settling else Event.LOST)
        if following is Stage.UNSETTLED:
            reservation.stage = following
            self._ask(reservation, now, effects)
        else:
            self._drop(reservation, effects)

    def end_session(self, session: Session, now: float, effects: Effects) -> None:
        """A session ended, and no place knows it any more: what it wrote is lost, what it looked at is asked of others."""
        for reservation in self._core.reservations.of_session(session.session_id):
            if reservation.stage is Stage.WAITING:
                effects.replies.append(Reply(reservation.token, unknown_session(session)))
            self.lose(reservation, now, effects)

    def expire(self, now: float, effects: Effects) -> None:
        """Gives up what was not renewed in time, and asks again what was not answered in time."""
        for reservation in self._core.reservations.expired(now):
            if reservation.stage is Stage.WAITING:
                effects.replies.append(Reply(reservation.token, self._refuse()))
            self.lose(reservation, now, effects)

    # --- room ----------------------------------------------------------------------------------------------------

    def admit(self, place: Place, now: float, effects: Effects) -> None:
        """Grants those that wait and fit now, in the order in which they came."""
        while place.waiting and place.inventoried:
            reservation = next(iter(place.waiting))
            if not place.ledger.fits(reservation.size):
                return
            self._grant(reservation, now)
            effects.replies.append(Reply(reservation.token, ReserveOutcome.GRANTED))

    def reconsider(self, place: Place, effects: Effects) -> None:
        """The contents or the quota of a place became known: makes room for those that wait, or refuses the last ones."""
        if not place.inventoried:
            return
        while place.waiting and not self._dropping.make_room(place, effects, None):
            last = next(reversed(place.waiting))
            effects.replies.append(Reply(last.token, self._refuse()))
            self._drop(last, effects)

    def ask_about_unsettled(self, place: Place, now: float, effects: Effects) -> None:
        """Somebody is there again who can look."""
        for reservation in tuple(place.unsettled):
            del place.unsettled[reservation]
            self._ask(reservation, now, effects)

    # --- what becomes available ------------------------------------------------------------------------------------

    def tell_waiters(self, copy: Copy, effects: Effects) -> None:
        """A copy is available: answers those of its waiters who can reach it."""
        for waiter in self._core.waiters.of_key(copy.row.key):
            session = self._core.sessions.find(waiter.session_id)
            if session is not None and session.reach(copy.place) is not None:
                self._core.waiters.remove(waiter.waiter_id)
                effects.replies.append(Reply(waiter.waiter_id, WaitOutcome.AVAILABLE))

    def supersede(self, copy: Copy, effects: Effects) -> None:
        """Drops what a copy makes superfluous in its root: blocks of which it holds all tokens and more, or itself."""
        if not copy.row.tokens or not copy.place.root_id:
            return
        superfluous = list(self._core.index.superseded_by(copy))
        for other in superfluous:
            other.superseded = True
        self._dropping.drop_all(superfluous, effects)

    # --- how -----------------------------------------------------------------------------------------------------

    def _advance(
        self, session: Session, token: str, event: Event, now: float, effects: Effects
    ) -> Reservation | None:
        """Takes one step of a save that its writer holds and prolongs it; None where it does not hold.

        A step that ends the save leaves its stage to the caller, which removes it.
        """
        reservation = self._core.reservations.held(token, session.session_id)
        if reservation is None:
            return None
        if reservation.expires <= now:
            self.lose(reservation, now, effects)
            return None
        following = step(reservation.stage, event)
        if following is None:
            return None
        reservation.expires = now + self._core.limits.reservation_ttl_s
        if isinstance(following, Stage):
            reservation.stage = following
        return reservation

    def _grant(self, reservation: Reservation, now: float) -> None:
        place = reservation.copy.place
        self._leave_queue(reservation)
        self._core.index.resize(reservation.copy, reservation.size)
        reservation.stage = Stage.PRE_LINK
        reservation.expires = now + self._core.limits.reservation_ttl_s
        assert not place.ledger.is_over

    def _leave_queue(self, reservation: Reservation) -> None:
        if reservation.stage is Stage.WAITING:
            place = reservation.copy.place
            del place.waiting[reservation]
            place.ledger.wanted -= reservation.size

    def _refuse(self) -> ReserveOutcome:
        self._core.counters.refused += 1
        return ReserveOutcome.NO_ROOM

    def _publish(
        self, reservation: Reservation, facts: Facts, now: float, effects: Effects
    ) -> None:
        core, copy = self._core, reservation.copy
        core.reservations.remove(reservation)
        core.index.publish(copy, facts, seen=core.epoch, now=now)
        core.appeared(copy, effects)
        self.tell_waiters(copy, effects)
        self.supersede(copy, effects)

    def _drop(self, reservation: Reservation, effects: Effects) -> None:
        """There will be no copy. Those who wait for the block are told at once, unless somebody else is saving it (W34)."""
        key = reservation.copy.row.key
        self._leave_queue(reservation)
        self._core.reservations.remove(reservation)
        self._core.remove(reservation.copy, effects)
        row = self._core.index.rows.get(key)
        if row is None or all(copy.state is not CopyState.WRITING for copy in row.copies):
            self._fail_waiters(key, effects)

    def _fail_waiters(self, key: bytes, effects: Effects) -> None:
        for waiter in self._core.waiters.of_key(key):
            self._core.waiters.remove(waiter.waiter_id)
            effects.replies.append(Reply(waiter.waiter_id, WaitOutcome.FAILED))

    def _ask(self, reservation: Reservation, now: float, effects: Effects) -> None:
        """Has a live session look at the file; with nobody there, waits until somebody is."""
        assert reservation.stage is Stage.UNSETTLED
        place = reservation.copy.place
        self._core.reservations.take_from_writer(reservation)
        writer = place.writer()
        if writer is None:
            reservation.owner, reservation.expires = "", math.inf
            place.unsettled[reservation] = None
            return
        following = step(reservation.stage, Event.ASK)
        assert isinstance(following, Stage)
        reservation.stage, reservation.owner = following, writer.session_id
        reservation.expires = now + self._core.limits.reservation_ttl_s
        effects.settles.append(Settle(writer, place, reservation.copy.row.key))


def unknown_session(session: Session) -> CaravanError:
    """The answer to calls of a session that ended."""
    return CaravanError(
        "SESSION_UNKNOWN",
        f"The session '{session.session_id}' has ended: join again.",
        session_id=session.session_id,
    )
