"""The protocol of a save, row by row (S2.24 to S2.31): first the table, then the state that follows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from services.cache.core import Limits
from services.cache.effects import Effects, ReserveOutcome, WaitOutcome
from services.cache.integrity import check_integrity
from services.cache.reservations import End, Event, Stage, step
from services.cache.rows import CopyState
from services.cache.sessions import Session
from services.cache.state import CacheState
from tests.support.cache_values import DISK, disk, facts, key, registration

TTL_S = 10.0
SIZE = 100

# Stage by stage, the events that it takes; all others are refused.
EXPECTED: dict[Stage, dict[Event, Stage | End]] = {
    Stage.WAITING: {
        Event.ROOM: Stage.PRE_LINK,
        Event.FOUND: End.PUBLISHED,
        Event.CANCEL: End.DROPPED,
        Event.LOST: End.DROPPED,
    },
    Stage.PRE_LINK: {
        Event.RENEW: Stage.PRE_LINK,
        Event.FOUND: Stage.POST_LINK,
        Event.CHECK: Stage.LINKING,
        Event.MARK: Stage.POST_LINK,
        Event.ANNOUNCE: End.PUBLISHED,
        Event.CANCEL: End.DROPPED,
        Event.LOST: End.DROPPED,
    },
    Stage.LINKING: {
        Event.RENEW: Stage.LINKING,
        Event.FOUND: Stage.POST_LINK,
        Event.CHECK: Stage.LINKING,
        Event.MARK: Stage.POST_LINK,
        Event.ANNOUNCE: End.PUBLISHED,
        Event.CANCEL: End.DROPPED,
        Event.LOST: Stage.UNSETTLED,
    },
    Stage.POST_LINK: {
        Event.RENEW: Stage.POST_LINK,
        Event.FOUND: Stage.POST_LINK,
        Event.CHECK: Stage.POST_LINK,
        Event.MARK: Stage.POST_LINK,
        Event.ANNOUNCE: End.PUBLISHED,
        Event.CANCEL: Stage.UNSETTLED,
        Event.LOST: Stage.UNSETTLED,
    },
    Stage.UNSETTLED: {Event.ASK: Stage.SETTLING},
    Stage.SETTLING: {
        Event.SETTLER_LOST: Stage.UNSETTLED,
        Event.GOOD: End.PUBLISHED,
        Event.BAD: End.DROPPED,
    },
}


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("event", Event)
def test_the_table_says_what_every_event_does(stage: Stage, event: Event) -> None:
    """Each pair leads where it should, or is refused."""
    assert step(stage, event) == EXPECTED[stage].get(event)


@dataclass
class Save:
    """A save of block `a` by one engine, with another engine of the root that waits for the block."""

    now: float = 1000.0
    state: CacheState = field(
        default_factory=lambda: CacheState(Limits(reservation_ttl_s=TTL_S, heartbeat_s=60.0))
    )
    replies: dict[str, object] = field(default_factory=dict)
    settles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = self.join("writer")
        self.other = self.join("other")

    def join(self, name: str) -> Session:
        """An engine of the root, which holds what is known."""
        session, effects = self.state.join(
            registration(name, DISK), session_id=f"session of {name}", now=self.now
        )
        self.take(effects)
        place = disk(session)
        held = [facts(copy.row.key) for copy in place.copies if copy.size == SIZE]
        self.take(self.state.take_inventory(session, place, held, complete=True, now=self.now))
        return session

    def take(self, effects: Effects) -> None:
        """Remembers what was answered and asked."""
        for reply in effects.replies:
            assert reply.call_id not in self.replies, "answered twice"
            self.replies[reply.call_id] = reply.answer
        self.settles += [settle.session.engine_id for settle in effects.settles]
        check_integrity(self.state.core)

    def bring_to(self, stage: Stage) -> None:
        """Takes the save to a stage, with a waiter for its block."""
        if stage is Stage.WAITING:
            disk(self.writer).ledger.quota = SIZE
            outcome, effects = self.state.reserve(
                self.writer.session_id, "disk", facts("full", size=SIZE), token="t0", now=self.now
            )
            self.state.announce(self.writer.session_id, "t0", facts("full", size=SIZE), self.now)
        outcome, effects = self.state.reserve(
            self.writer.session_id, "disk", facts("a", size=SIZE), token="token", now=self.now
        )
        self.take(effects)
        assert outcome is (None if stage is Stage.WAITING else ReserveOutcome.GRANTED)
        assert self.state.wait(self.other.session_id, key("a"), "waiter") is None
        if stage in {Stage.LINKING, Stage.POST_LINK, Stage.UNSETTLED, Stage.SETTLING}:
            self.held(Event.CHECK)
        if stage in {Stage.POST_LINK, Stage.UNSETTLED, Stage.SETTLING}:
            self.held(Event.MARK)
        if stage is Stage.UNSETTLED:
            # Nobody may be there: the one who waits reaches the root, but cannot write it.
            place = disk(self.other)
            place.leave(self.other)
            place.enter(self.other, place.ledger.quota, writable=False)
        if stage in {Stage.UNSETTLED, Stage.SETTLING}:
            self.die(self.writer)

    def held(self, event: Event) -> bool:
        """The writer does something under its token; whether it holds."""
        call = {Event.CHECK: self.state.check, Event.MARK: self.state.mark}.get(event)
        writer = self.writer.session_id
        if call is not None:
            held, effects = call(writer, "token", self.now)
        elif event is Event.RENEW:
            lost, effects = self.state.renew(writer, ["token"], self.now)
            held = not lost
        elif event is Event.CANCEL:
            held, effects = self.state.cancel(writer, "token", self.now)
        else:
            assert event is Event.ANNOUNCE
            held, effects = self.state.announce(writer, "token", facts("a", size=SIZE), self.now)
        self.take(effects)
        return held

    def die(self, session: Session) -> None:
        """The stream of a session ends."""
        self.take(self.state.end_session(session.session_id, self.now))

    def settled(self, session: Session, *, good: bool) -> None:
        """A session answers what it found."""
        found = facts("a", size=SIZE) if good else None
        self.take(self.state.settled(session, disk(session), key("a"), found, self.now))

    def at(self) -> Stage | CopyState:
        """How far the save is, or what the copy is."""
        row = self.state.core.index.rows.get(key("a"))
        if row is None:
            return CopyState.GONE
        (copy,) = row.copies
        if copy.state is CopyState.WRITING:
            return self.state.core.reservations.of(copy).stage
        return copy.state

    @property
    def waiter(self) -> object:
        """What the waiter was told; None if it still waits."""
        return self.replies.get("waiter")


HOLDS = [
    (stage, event)
    for stage in (Stage.PRE_LINK, Stage.LINKING, Stage.POST_LINK)
    for event in (Event.RENEW, Event.CHECK, Event.MARK, Event.ANNOUNCE, Event.CANCEL)
]


@pytest.mark.parametrize(("stage", "event"), HOLDS)
def test_what_the_writer_does_moves_the_save(stage: Stage, event: Event) -> None:
    """The state follows the table; waiters hear of the end at once (W34)."""
    save = Save()
    save.bring_to(stage)
    assert save.held(event)
    following = EXPECTED[stage][event]
    if following is End.PUBLISHED:
        assert (save.at(), save.waiter) == (CopyState.AVAILABLE, WaitOutcome.AVAILABLE)
    elif following is End.DROPPED:
        assert (save.at(), save.waiter) == (CopyState.GONE, WaitOutcome.FAILED)
    elif following is Stage.UNSETTLED:
        assert (save.at(), save.waiter) == (Stage.SETTLING, WaitOutcome.FAILED)
    else:
        assert (save.at(), save.waiter) == (following, None)


@pytest.mark.parametrize("stage", [Stage.PRE_LINK, Stage.LINKING, Stage.POST_LINK])
@pytest.mark.parametrize("how", ["died", "too late", "too late, then a token", "too late, reserve"])
def test_a_lost_writer(stage: Stage, how: str) -> None:
    """However it is noticed: nothing can be there, or the other engine is asked to look (S2.26)."""
    save = Save()
    save.bring_to(stage)
    if how == "died":
        save.die(save.writer)
    else:
        save.now += TTL_S
    if how == "too late":
        save.take(save.state.expire(save.now))
    elif how == "too late, then a token":
        assert not save.held(Event.RENEW)
    elif how == "too late, reserve":
        outcome, effects = save.state.reserve(
            save.other.session_id, "disk", facts("a", size=SIZE), token="again", now=save.now
        )
        save.take(effects)
        granted = stage is Stage.PRE_LINK
        assert outcome is (ReserveOutcome.GRANTED if granted else ReserveOutcome.CONFLICT)
    if stage is Stage.PRE_LINK:
        assert save.waiter is WaitOutcome.FAILED
        assert save.settles == []
    else:
        assert (save.at(), save.waiter) == (Stage.SETTLING, None)
        asked = "other" if how == "died" else "writer"
        assert save.settles == [asked]


@pytest.mark.parametrize("good", [True, False])
def test_the_engine_that_was_asked_settles(good: bool) -> None:
    """A good file is adopted, a bad one forgotten; who was not asked is not believed."""
    save = Save()
    save.bring_to(Stage.SETTLING)
    stranger = save.join("stranger")
    save.settled(stranger, good=not good)
    assert save.at() is Stage.SETTLING
    save.settled(save.other, good=good)
    assert save.at() is (CopyState.AVAILABLE if good else CopyState.GONE)
    assert save.waiter is (WaitOutcome.AVAILABLE if good else WaitOutcome.FAILED)
    assert save.state.core.counters.adopted == good
    save.settled(save.other, good=not good)
    assert save.at() is (CopyState.AVAILABLE if good else CopyState.GONE)


@pytest.mark.parametrize("how", ["died", "silent"])
def test_another_engine_is_asked_when_the_one_that_was_is_lost(how: str) -> None:
    """A settlement that is not answered goes to whoever is left; with nobody left it waits."""
    save = Save()
    save.bring_to(Stage.SETTLING)
    if how == "silent":
        save.now += TTL_S
        save.take(save.state.expire(save.now))
        assert save.settles == ["other", "other"]
    third = save.join("third")
    save.die(save.other)
    assert save.settles[-1] == "third"
    save.die(third)
    assert save.at() is Stage.UNSETTLED
    fourth = save.join("fourth")
    assert (save.at(), save.settles[-1]) == (Stage.SETTLING, "fourth")
    save.settled(fourth, good=True)
    assert save.at() is CopyState.AVAILABLE


def test_a_file_that_nobody_can_look_at_waits() -> None:
    """Its key is in conflict meanwhile: nothing is written over what may be good."""
    save = Save()
    save.bring_to(Stage.UNSETTLED)
    assert (save.at(), save.settles) == (Stage.UNSETTLED, [])
    save.now += 5 * TTL_S
    save.take(save.state.expire(save.now))
    assert save.at() is Stage.UNSETTLED
    later = save.join("later")
    save.settled(later, good=True)
    assert save.waiter is WaitOutcome.AVAILABLE


@pytest.mark.parametrize("stage", [Stage.WAITING, Stage.PRE_LINK, Stage.LINKING, Stage.POST_LINK])
def test_a_file_that_was_there_before(stage: Stage) -> None:
    """An inventory that names it ends a wait for room, and keeps a save from being forgotten with its writer."""
    save = Save()
    save.bring_to(stage)
    session, effects = save.state.join(
        registration("third", replace(DISK, quota=2 * SIZE - 1)), session_id="third", now=save.now
    )
    save.take(effects)
    held = [facts(name, size=SIZE) for name in ("full", "a")]
    save.take(save.state.take_inventory(session, disk(session), held, complete=True, now=save.now))
    if stage is Stage.WAITING:
        assert save.replies["token"] is ReserveOutcome.ALREADY_PRESENT
        assert (save.at(), save.waiter) == (CopyState.AVAILABLE, WaitOutcome.AVAILABLE)
    else:
        assert save.at() is Stage.POST_LINK
        save.die(save.writer)
        assert save.at() is Stage.SETTLING


@pytest.mark.parametrize("how", ["give up", "died", "dropped"])
def test_a_save_that_waits_for_room(how: str) -> None:
    """It is granted when the drop is confirmed, or leaves nothing behind."""
    save = Save()
    save.bring_to(Stage.WAITING)
    if how == "give up":
        given_up, effects = save.state.give_up(save.writer.session_id, "token", save.now)
        save.take(effects)
        assert given_up
        assert save.at() is CopyState.GONE
    elif how == "died":
        save.die(save.writer)
        assert save.at() is CopyState.GONE
        assert getattr(save.replies["token"], "reason", "") == "SESSION_UNKNOWN"
    else:
        place = disk(save.writer)
        save.take(save.state.dropped(save.writer, place, [key("full")], save.now))
        assert (save.at(), save.replies["token"]) == (Stage.PRE_LINK, ReserveOutcome.GRANTED)
        assert not save.state.give_up(save.writer.session_id, "token", save.now)[0]


@pytest.mark.parametrize(
    ("state_of_copy", "outcome"),
    [
        (CopyState.GONE, WaitOutcome.ABSENT),
        (CopyState.WRITING, None),
        (CopyState.AVAILABLE, WaitOutcome.AVAILABLE),
        (CopyState.EVICTING, WaitOutcome.ABSENT),
    ],
)
def test_waiting_depends_on_the_copy(state_of_copy: CopyState, outcome: WaitOutcome | None) -> None:
    """Available: now. Being saved: parked. Anything else: no (S2.31)."""
    save = Save()
    if state_of_copy is not CopyState.GONE:
        save.bring_to(Stage.POST_LINK)
    if state_of_copy in {CopyState.AVAILABLE, CopyState.EVICTING}:
        save.held(Event.ANNOUNCE)
    if state_of_copy is CopyState.EVICTING:
        save.take(save.state.evict(1, frozenset(), "")[1])
    assert save.state.wait(save.other.session_id, key("a"), "second") is outcome
    assert save.state.stop_waiting("second") == (outcome is None)
    assert not save.state.stop_waiting("second")
