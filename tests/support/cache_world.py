"""Engines, their files and their streams around the pure state of the cache service, in virtual time.

Streams keep the order of their messages and lose what is under way when they break; calls may lose their answers. What engines
want, and what goes wrong, is for the simulation that builds on it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, cast

from services.cache.core import Limits
from services.cache.effects import Effects
from services.cache.rows import CopyState, Facts, Tier
from services.cache.sessions import Registration, RootDeclaration, Session
from services.cache.state import CacheState
from services.runtime.clock import CountingIds
from services.runtime.errors import CaravanError
from tests.support.cache_values import facts, registration
from tests.support.refusals import attempt

TTL_S = 3.0
LIMITS = Limits(heartbeat_s=1.0, reservation_ttl_s=TTL_S, claim_ttl_s=5.0)
ROOM_WAIT_S = 0.5
FAULTS_END_S = 6.0
SETTLED_S = 16.0
SIZE = 100
QUOTA = 3 * SIZE
ROOTS = {
    "shared": RootDeclaration("shared", Tier.DISK, QUOTA, writable=True),
    "own": RootDeclaration("own", Tier.RAM_FILE, QUOTA, writable=True),
}
ENGINES = {"first": ("shared",), "second": ("own", "shared")}
CHAIN = ("a", "b", "c", "d")
BLOCKS: dict[str, Facts] = {
    name: facts(name, CHAIN[at - 1] if at else "empty", size=SIZE, end=256 * (at + 1))
    for at, name in enumerate(CHAIN)
}
NAMES = {told.key: name for name, told in BLOCKS.items()}
KEYS = b"".join(BLOCKS[name].key for name in CHAIN)


@dataclass
class Stream:
    """A session's stream; `open` falls once. Messages keep their order: none arrives before `busy_until`."""

    service: int
    session: Session | None = None
    open: bool = True
    busy_until: dict[str, float] = field(default_factory=dict)


@dataclass
class Engine:
    """An engine process; `life` counts its starts."""

    engine_id: str
    life: int = 0
    stream: Stream | None = None


Answer = Callable[[Any], None]


class World:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.order, self.ids = itertools.count(), CountingIds()
        self.service = 0
        self.state = CacheState(LIMITS)
        self.engines = [Engine(name) for name in ENGINES]
        self.files: dict[str, dict[str, bool]] = {root: {} for root in ROOTS}  # name -> good
        # Files that their writers named after their reservations were lost: until an inventory finds them, they have no row,
        # and until they are deleted, they may be more than the quota.
        self.late: set[tuple[str, str]] = set()
        self.surplus: set[tuple[str, str]] = set()
        # Rows whose files went or rotted behind the back of the service.
        self.missing: set[tuple[str, str]] = set()
        self.calls: dict[str, Answer] = {}
        self.seen: Counter[str] = Counter()

    # --- time and messages -----------------------------------------------------------------------------------------

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        """Schedules an action."""
        heapq.heappush(self.events, (self.now + delay_s, next(self.order), action))

    def delay(self) -> float:
        """Of a message or a disk: mostly short, sometimes very long."""
        if self.faulty and self.random.random() < 0.05:
            return self.random.uniform(0.5, 4.0)
        return self.random.uniform(0.0, 0.05)

    @property
    def faulty(self) -> bool:
        return self.now < FAULTS_END_S

    def along(self, stream: Stream, way: str, action: Callable[[], object]) -> None:
        """A message along a stream, in order; lost if the stream breaks before it arrives."""
        at = max(self.now + self.delay(), stream.busy_until.get(way, 0.0))
        stream.busy_until[way] = at
        self.after(at - self.now, lambda: action() if stream.open else None)

    def call(self, engine: Engine, what: Callable[[Session, Answer], None], then: Answer) -> None:
        """A call of an engine: `what` answers now or later; `then` gets None where it was refused or got lost."""
        life, service, stream = engine.life, self.service, engine.stream

        def answer(result: Any) -> None:
            self.after(self.delay(), lambda: then(result) if engine.life == life else None)

        def arrive() -> None:
            session = stream.session if stream is not None else None
            lost = service != self.service or session is None
            if lost or attempt(lambda: what(cast(Session, session), answer))[1] is not None:
                answer(None)

        self.after(self.delay(), arrive)

    # --- sessions ------------------------------------------------------------------------------------------------

    def registration(self, engine_id: str) -> Registration:
        return registration(engine_id, *(ROOTS[name] for name in ENGINES[engine_id]))

    def join(self, engine: Engine) -> None:
        """The engine opens a stream; the service takes it some time later."""
        stream = engine.stream = Stream(self.service)
        self.along(stream, "up", lambda: self.take_join(engine, stream))

    def take_join(self, engine: Engine, stream: Stream) -> None:
        if stream.service != self.service:
            return self.break_stream(engine, stream)
        stream.session, effects = self.state.join(
            self.registration(engine.engine_id), session_id=self.ids("session"), now=self.now
        )
        self.take(effects)
        for root_id in ENGINES[engine.engine_id]:
            self.along(stream, "down", partial(self.scan, stream, root_id))
        self.beat(stream)
        return None

    def scan(self, stream: Stream, root_id: str) -> None:
        """After the welcome: reads the folder, and tells it in two parts."""
        found = list(self.files[root_id])
        half = len(found) // 2
        for part, complete in ((found[:half], False), (found[half:], True)):
            self.along(stream, "up", partial(self.told, stream, root_id, part, complete=complete))

    def told(self, stream: Stream, root_id: str, names: list[str], *, complete: bool) -> None:
        if self.hears(stream):
            assert stream.session is not None
            self.take(
                self.state.take_inventory(
                    stream.session,
                    stream.session.roots[root_id],
                    [BLOCKS[name] for name in names],
                    complete=complete,
                    now=self.now,
                )
            )

    def hears(self, stream: Stream) -> bool:
        """Whether the service still knows the session; a message counts as a sign of life."""
        session = stream.session
        if stream.service != self.service or session is None:
            return False
        return attempt(lambda: self.state.hear(session.session_id, self.now))[0] is not None

    def beat(self, stream: Stream) -> None:
        """A heartbeat each second while the stream lives."""
        if stream.open:
            self.along(stream, "up", partial(self.hears, stream))
            self.after(1.0, lambda: self.beat(stream))

    def break_stream(self, engine: Engine, stream: Stream) -> None:
        """The engine sees its stream end now, and joins again; the service sees the end later."""
        if not stream.open:
            return
        stream.open = False

        def end() -> None:
            if stream.session is not None and stream.service == self.service:
                self.take(self.state.end_session(stream.session.session_id, self.now))

        self.after(self.delay(), end)
        if engine.stream is stream:
            life = engine.life
            self.after(
                self.random.uniform(0.1, 0.5),
                lambda: self.join(engine) if engine.life == life else None,
            )

    def sweep(self) -> None:
        self.take(self.state.expire(self.now))
        self.after(0.5, self.sweep)

    def take(self, effects: Effects) -> None:
        """Carries out what the service decided."""
        self.seen["drop"] += len(effects.drops)
        self.seen["settle"] += len(effects.settles)
        self.seen.update(ending.why.name for ending in effects.endings)
        for reply in effects.replies:
            self.seen[getattr(reply.answer, "name", "SESSION_UNKNOWN")] += 1
            then = self.calls.pop(reply.call_id, None)
            if then is not None:
                answer = reply.answer
                then(None if isinstance(answer, CaravanError) else (answer, reply.call_id))
        streams = {e.stream.session: (e, e.stream) for e in self.engines if e.stream is not None}
        for drop in effects.drops:
            if drop.session in streams:
                engine, stream = streams[drop.session]
                for name in drop.keys:
                    action = partial(self.drop, engine, stream, drop.place.root_id, NAMES[name])
                    self.along(stream, "down", action)
        for settle in effects.settles:
            if settle.session in streams:
                engine, stream = streams[settle.session]
                action = partial(
                    self.settle, engine, stream, settle.place.root_id, NAMES[settle.key]
                )
                self.along(stream, "down", action)
        for ending in effects.endings:
            if ending.session in streams:
                engine, stream = streams[ending.session]
                self.after(self.delay(), partial(self.break_stream, engine, stream))

    # --- files -----------------------------------------------------------------------------------------------------

    def delete(self, root_id: str, name: str) -> None:
        """A file goes. Where the service did not mean this one, its row may be wrong until somebody reads it."""
        at = (root_id, name)
        if self.files[root_id].pop(name, None) is not None:
            self.late.discard(at)
            self.surplus.discard(at)
        place = self.state.core.places.root(root_id)
        copy = None if place is None else self.state.core.index.find(BLOCKS[name].key, place)
        if copy is not None and copy.state is not CopyState.EVICTING:
            self.missing.add(at)

    def link(self, root_id: str, name: str, *, held: bool) -> None:
        """A file gets its name, unless a good one has it; a bad one is replaced (S2.28)."""
        at = (root_id, name)
        if name not in self.files[root_id] and not held:
            self.seen["late"] += 1
            self.late.add(at)
            self.surplus.add(at)
        self.files[root_id][name] = True
        self.missing.discard(at)

    def disk(self, engine: Engine, action: Callable[[], None]) -> None:
        """Something that takes a while in an engine, and does not happen if it dies before."""
        life = engine.life
        self.after(self.delay(), lambda: action() if engine.life == life else None)

    def drop(self, engine: Engine, stream: Stream, root_id: str, name: str) -> None:
        def done() -> None:
            self.delete(root_id, name)
            self.along(stream, "up", tell)

        def tell() -> None:
            if self.hears(stream):
                assert stream.session is not None
                place = stream.session.roots[root_id]
                keys = [BLOCKS[name].key]
                self.take(self.state.dropped(stream.session, place, keys, self.now))

        self.disk(engine, done)

    def settle(self, engine: Engine, stream: Stream, root_id: str, name: str) -> None:
        def done() -> None:
            good = self.files[root_id].get(name, False)
            if not good:
                self.delete(root_id, name)
            self.along(stream, "up", partial(tell, good=good))

        def tell(*, good: bool) -> None:
            if self.hears(stream):
                assert stream.session is not None
                place, told = stream.session.roots[root_id], BLOCKS[name]
                found = told if good else None
                self.take(self.state.settled(stream.session, place, told.key, found, self.now))

        self.disk(engine, done)
