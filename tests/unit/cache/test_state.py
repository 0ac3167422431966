"""Decisions that need more than one part: room, inventories, quotas, limits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from services.cache.core import Limits
from services.cache.effects import Effects, ReserveOutcome
from services.cache.integrity import check_integrity
from services.cache.pressure import INTERVAL_S
from services.cache.rows import CopyState, Facts
from services.cache.sessions import RootDeclaration, Session
from services.cache.state import CacheState
from services.runtime.errors import CaravanError
from tests.support.cache_values import DISK, TMPFS, disk, facts, key, registration

SIZE = 100
GIB = 1 << 30


def small(blocks: int) -> RootDeclaration:
    """A disk that holds so many blocks."""
    return replace(DISK, quota=blocks * SIZE)


@dataclass
class Service:
    """A state, and what it asked for."""

    limits: Limits = field(default_factory=Limits)
    now: float = 0.0
    drops: list[tuple[str, list[bytes]]] = field(default_factory=list)
    replies: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = CacheState(self.limits)

    def take(self, effects: Effects) -> None:
        """Remembers what was asked and answered."""
        self.drops += [(drop.session.engine_id, list(drop.keys)) for drop in effects.drops]
        self.replies.update({reply.call_id: reply.answer for reply in effects.replies})
        check_integrity(self.state.core)

    def join(self, name: str, *roots: RootDeclaration) -> Session:
        """An engine that has not told what its roots hold."""
        session, effects = self.state.join(
            registration(name, *roots), session_id=f"session of {name}", now=self.now
        )
        self.take(effects)
        return session

    def tell(self, session: Session, *held: Facts, complete: bool = True) -> None:
        """An inventory of its disk."""
        self.take(
            self.state.take_inventory(session, disk(session), held, complete=complete, now=self.now)
        )

    def reserve(self, session: Session, name: str, size: int = SIZE) -> ReserveOutcome | None:
        """A wish to save a block; its token is its name."""
        outcome, effects = self.state.reserve(
            session.session_id, "disk", facts(name, size=size), token=name, now=self.now
        )
        self.take(effects)
        return outcome

    def states(self) -> dict[bytes, CopyState]:
        """Every copy."""
        rows = self.state.core.index.rows.values()
        return {row.key: copy.state for row in rows for copy in row.copies}


def test_nothing_is_dropped_when_not_enough_can_be() -> None:
    """A block in front of a pinned one stays, so there is no room; and then the others stay as well."""
    service = Service()
    session = service.join("e", small(3))
    service.tell(
        session,
        facts("a", size=SIZE),
        facts("b", "a", end=512, size=SIZE),
        facts("x", size=SIZE),
    )
    service.state.acquire(session.session_id, key("b"), 0, b"", b"", claim_id="c", now=service.now)
    assert service.reserve(session, "big", 2 * SIZE) is ReserveOutcome.NO_ROOM
    assert set(service.states().values()) == {CopyState.AVAILABLE}
    assert service.drops == []
    assert service.reserve(session, "y") is None
    assert service.drops == [("e", [key("x")])]


def test_only_who_was_told_to_drop_is_believed() -> None:
    """A confirmation of another engine frees nothing."""
    service = Service()
    first, second = service.join("first", small(1)), service.join("second", small(1))
    for session in (first, second):
        service.tell(session, facts("a", size=SIZE))
    assert service.reserve(first, "b") is None
    assert service.drops == [("first", [key("a")])]
    service.take(service.state.dropped(second, disk(second), [key("a")], service.now))
    assert service.states()[key("a")] is CopyState.EVICTING
    service.take(service.state.dropped(first, disk(first), [key("a"), key("?")], service.now))
    assert service.replies == {"b": ReserveOutcome.GRANTED}


def test_nothing_is_granted_before_the_contents_are_known() -> None:
    """After a restart of the service the files that lie there count, before anything is written to them."""
    service = Service()
    session = service.join("e", small(2))
    assert service.reserve(session, "new") is None
    service.tell(session, facts("a", size=SIZE), complete=False)
    assert service.replies == {}
    service.tell(session, facts("b", size=SIZE))
    assert len(service.drops) == 1
    (victim,) = service.drops[0][1]
    service.take(service.state.dropped(session, disk(session), [victim], service.now))
    assert service.replies == {"new": ReserveOutcome.GRANTED}


def test_a_wait_for_the_contents_ends_when_they_leave_no_room() -> None:
    """What cannot be granted after all is refused at once, the last comer first."""
    service = Service()
    session = service.join("e", small(1))
    assert service.reserve(session, "first") is None
    assert service.reserve(session, "second") is None
    service.tell(session)
    assert service.replies == {
        "first": ReserveOutcome.GRANTED,
        "second": ReserveOutcome.NO_ROOM,
    }


def test_listings_that_overlap_remove_nothing_that_either_names() -> None:
    """Which of two was made later nobody knows; a file without a row would be worse than a row without a file."""
    service = Service()
    early = service.join("early", DISK)
    late = service.join("late", DISK)
    service.tell(early, facts("a"))
    service.tell(late)
    assert service.states() == {key("a"): CopyState.AVAILABLE}


def test_a_listing_does_not_bring_back_what_was_deleted_for_one_who_waits() -> None:
    """A save that waits for room is not answered with a file that was deleted after the listing was made."""
    service = Service()
    first = service.join("first", small(1))
    service.tell(first, facts("a", size=SIZE))
    second = service.join("second", small(1))
    service.take(service.state.withdraw(disk(first), [key("a")], corrupt=True, now=service.now))
    assert service.reserve(first, "full") is ReserveOutcome.GRANTED
    service.state.announce(first.session_id, "full", facts("full", size=SIZE), service.now)
    assert service.reserve(first, "a") is None
    service.tell(second, facts("a", size=SIZE), facts("full", size=SIZE))
    assert service.states()[key("a")] is CopyState.WRITING
    assert service.replies == {}


def test_a_root_may_move_to_another_tier_when_nobody_else_has_it() -> None:
    """The living say where it is; two who contradict each other are not taken."""
    service = Service()
    service.join("first", DISK)
    moved = replace(TMPFS, root_id="disk")
    with pytest.raises(CaravanError) as refusal:
        service.join("second", moved)
    assert refusal.value.param == "register.roots[0].tier"
    session = service.join("first", moved)
    assert disk(session).tier is moved.tier


def test_pressure_is_relieved_once_in_a_while() -> None:
    """What is being dropped must show in the next report before more is dropped."""
    service = Service()
    session = service.join("e", TMPFS)
    added = [facts(n, size=10 * GIB) for n in range(9)]
    service.take(service.state.change_ram(session, added, [], service.now))

    def short() -> int:
        before = len(service.drops)
        service.take(service.state.heartbeat(session, 95 * GIB, 100 * GIB, service.now))
        return sum(len(keys) for _, keys in service.drops[before:])

    assert short() == 2
    assert short() == 0
    service.now += INTERVAL_S
    assert short() == 0  # The 20 GiB that are on their way are enough.
    for _, keys in service.drops:
        service.take(service.state.dropped(session, session.ram, keys, service.now))
    service.now += INTERVAL_S
    assert short() == 2


def test_the_least_worth_of_all_places_goes_first() -> None:
    """Whatever was dropped before from one place or the other: what nobody used goes before what somebody did."""
    service = Service()
    session = service.join("e", DISK, TMPFS)
    for root_id in ("disk", "tmpfs"):
        place = session.roots[root_id]
        blocks = [facts((root_id, n), hits=n) for n in range(4)]
        service.take(
            service.state.take_inventory(session, place, blocks, complete=True, now=service.now)
        )
    order = []
    for _ in range(8):
        (copies, _), effects = service.state.evict(1, frozenset(), "")
        assert copies == 1
        service.take(effects)
        order.append(service.drops[-1][1][0])
    expected = [{key((root_id, n)) for root_id in ("disk", "tmpfs")} for n in range(4)]
    assert [set(order[at : at + 2]) for at in range(0, 8, 2)] == expected


def test_a_reader_of_a_root_is_not_told_to_delete() -> None:
    """With nobody who can write, nothing can be dropped, and what must be dropped waits for somebody who can."""
    service = Service()
    writer = service.join("writer", small(1))
    service.tell(writer, facts("a", size=SIZE))
    reader = service.join("reader", replace(small(1), writable=False))
    service.tell(reader, facts("a", size=SIZE))
    assert service.reserve(writer, "b") is None
    service.take(service.state.end_session(writer.session_id, service.now))
    assert service.drops == [("writer", [key("a")])]
    assert service.state.evict(1, frozenset(), "")[0] == (0, 0)
    service.join("later", small(1))
    assert service.drops[1:] == [("later", [key("a")])]


def test_nobody_is_judged_after_the_process_stood_still() -> None:
    """What engines said meanwhile still waits in the sockets."""
    service = Service()
    service.join("e")
    service.take(service.state.expire(0.0))
    assert not service.state.expire(100.0).endings
    assert len(service.state.expire(100.5).endings) == 1


def test_a_draining_service_takes_no_engine() -> None:
    """All sessions end, and new ones are sent away with a time to come back."""
    service = Service()
    service.join("e")
    assert len(service.state.drain(service.now).endings) == 1
    with pytest.raises(CaravanError) as refusal:
        service.join("e")
    assert (refusal.value.reason, refusal.value.retry_after_s) == ("DRAINING", 1.0)
