"""Sessions of engines: what they bring when they join, what they tell, and what becomes of it when they end (I6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.cache.core import Core
from services.cache.dropping import Dropping
from services.cache.effects import Drop, Effects, Ending, EndSession, Reply
from services.cache.places import Place, address_reach, root_reach
from services.cache.rows import CopyState, Facts, Tier
from services.cache.saving import Saving, unknown_session
from services.cache.sessions import Registration, Session
from services.runtime.errors import CaravanError

FULL_RETRY_S = 1.0


class Joining:
    """The beginning and the end of sessions, and inventories."""

    def __init__(self, core: Core, dropping: Dropping, saving: Saving) -> None:
        self._core = core
        self._dropping = dropping
        self._saving = saving

    def join(
        self, registration: Registration, session_id: str, now: float, effects: Effects
    ) -> Session:
        """Begins a session; the one before of the same engine ends.

        Raises CaravanError: CAPACITY_EXHAUSTED; INVALID_VALUE where others have declared a root with another tier.
        """
        core = self._core
        before = core.sessions.of_engine(registration.engine_id)
        if before is None and len(core.sessions) >= core.limits.sessions_max:
            raise CaravanError(
                "CAPACITY_EXHAUSTED",
                f"There are {core.limits.sessions_max} sessions, and no more are taken.",
                retry_after_s=FULL_RETRY_S,
                active=str(len(core.sessions)),
                capacity=str(core.limits.sessions_max),
            )
        self._check_tiers(registration, before)
        if before is not None:
            self.leave(before, now, effects)
            effects.endings.append(EndSession(before, Ending.REPLACED))
        core.epoch += 1
        ram = core.places.open_ram(registration.engine_id, registration.ram_quota)
        session = Session(
            session_id,
            registration.engine_id,
            registration.address,
            ram,
            epoch=core.epoch,
            now=now,
        )
        session.own[ram] = address_reach(Tier.RAM, session.address, own=True)
        ram.enter(session, registration.ram_quota, writable=True)
        core.sessions.add(session)
        for root in registration.roots:
            place = core.places.open_root(root.root_id, root.tier, root.quota)
            place.tier = (
                root.tier
            )  # An empty folder, or a restart on another file system: it is as the living say.
            session.roots[root.root_id] = place
            session.own[place] = root_reach(root.tier, root.root_id)
            session.scanning[place] = None
            place.scans += 1
            place.enter(session, root.quota, writable=root.writable)
            self._take_up(place, now, effects)
        return session

    def leave(self, session: Session, now: float, effects: Effects) -> None:
        """Ends a session: its claims are released, its RAM is gone, what it wrote or was to do is settled or asked of others."""
        core = self._core
        core.sessions.remove(session)
        for place in session.scanning:
            self._end_scan(place)
        for place in session.own:
            place.leave(session)
        for claim in session.claims:
            self._dropping.drop_all(core.index.unpin(claim.copies), effects)
        for waiter in core.waiters.of_session(session.session_id):
            core.waiters.remove(waiter.waiter_id)
            effects.replies.append(Reply(waiter.waiter_id, unknown_session(session)))
        self._saving.end_session(session, now, effects)
        for copy in tuple(session.ram.copies):
            core.remove(copy, effects)
        for copy in session.dropping:
            if copy.state is CopyState.EVICTING:
                core.command_drops(copy.place, [copy], effects)
        for place in session.own:
            core.places.forget_if_empty(place)

    # --- what they tell ------------------------------------------------------------------------------------------

    def take_inventory(
        self,
        session: Session,
        place: Place,
        blocks: Sequence[Facts],
        *,
        complete: bool,
        now: float,
        effects: Effects,
    ) -> None:
        """A part of what a root holds; after the last one, rows that were there before and are not any more go."""
        if place not in session.scanning:
            return  # Told twice.
        excess = []
        for facts in blocks:
            copy = self._core.index.find(facts.key, place)
            if copy is not None:
                # Not the session's epoch: which of two listings that overlap is the later one, nobody knows.
                copy.seen = self._core.epoch
                if copy.state is CopyState.AVAILABLE:
                    self._core.appeared(copy, effects)  # For one more engine.
                elif copy.state is CopyState.WRITING and facts.key not in place.gone:
                    self._saving.found(copy, facts, now, effects)
            elif facts.key in place.gone:
                continue  # Removed after the folder was listed.
            elif not self._add(place, facts, now, effects):
                excess.append(facts.key)
        if excess and place.readers[session]:
            # The index is full: files that it does not know would lie there beyond the quota for ever.
            effects.drops.append(Drop(session, place, tuple(excess)))
        if complete:
            self._complete(session, place, effects)

    def change_ram(
        self,
        session: Session,
        added: Iterable[Facts],
        removed: Iterable[bytes],
        now: float,
        effects: Effects,
    ) -> None:
        """What an engine's RAM holds from now on; what it no longer holds is taken first, so that bytes do not count twice."""
        for key in removed:
            copy = self._core.index.find(key, session.ram)
            if copy is not None:
                session.dropping.pop(copy, None)
                self._core.remove(copy, effects)
        for facts in added:
            if self._core.index.find(facts.key, session.ram) is None:
                self._add(session.ram, facts, now, effects)

    # --- how -----------------------------------------------------------------------------------------------------

    def _add(self, place: Place, facts: Facts, now: float, effects: Effects) -> bool:
        core = self._core
        if len(core.index) >= core.limits.rows_max and facts.key not in core.index.rows:
            return False
        copy = core.index.add(
            facts, place, CopyState.AVAILABLE, seen=core.epoch, size=facts.size, now=now
        )
        core.appeared(copy, effects)
        self._saving.tell_waiters(copy, effects)
        self._saving.supersede(copy, effects)
        return True

    def _complete(self, session: Session, place: Place, effects: Effects) -> None:
        for copy in tuple(place.copies):
            if copy.seen < session.epoch and copy.state is CopyState.AVAILABLE:
                self._core.remove(copy, effects)
        del session.scanning[place]
        self._end_scan(place)
        place.inventoried = True
        self._dropping.shrink(place, effects)
        self._saving.reconsider(place, effects)

    def _end_scan(self, place: Place) -> None:
        place.scans -= 1
        if not place.scans:
            place.gone.clear()

    def _take_up(self, place: Place, now: float, effects: Effects) -> None:
        """Somebody reaches a root: what nobody could be asked to do is asked now; a smaller quota is enforced."""
        stranded, place.stranded = list(place.stranded), {}
        self._core.command_drops(
            place, [copy for copy in stranded if copy.state is CopyState.EVICTING], effects
        )
        self._saving.ask_about_unsettled(place, now, effects)
        self._dropping.shrink(place, effects)
        self._saving.reconsider(place, effects)

    def _check_tiers(self, registration: Registration, before: Session | None) -> None:
        for number, root in enumerate(registration.roots):
            place = self._core.places.root(root.root_id)
            if place is None or place.tier is root.tier:
                continue
            if any(reader is not before for reader in place.readers):
                param = f"register.roots[{number}].tier"
                raise CaravanError(
                    "INVALID_VALUE",
                    f"Others declare the root '{root.root_id}' with the tier {place.tier.name}.",
                    param=param,
                )
