"""The state against a naive model of it: sets of what is available where, and lists of what is open."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.cache.core import Limits
from services.cache.effects import Effects, ReserveOutcome, WaitOutcome
from services.cache.integrity import check_integrity
from services.cache.reservations import Stage
from services.cache.rows import Tier
from services.cache.sessions import Session
from services.cache.state import CacheState
from services.runtime.clock import CountingIds, ManualClock
from tests.support.cache_model import (
    BLOCKS,
    CHAIN,
    ENGINES,
    NAMES,
    PLACE,
    QUOTA,
    ROOTS,
    TOKENS,
    Peer,
    place_id,
)
from tests.support.cache_values import key, registration
from tests.support.refusals import attempt

LIMITS = Limits(
    heartbeat_s=1.0, reservation_ttl_s=5.0, claim_ttl_s=8.0, rows_max=12, claims_per_session_max=3
)
BLOCK = st.sampled_from(sorted(BLOCKS))
ENGINE = st.sampled_from(sorted(ENGINES))


class CacheMachine(RuleBasedStateMachine):
    """Does the same to both; after each step they agree."""

    @initialize()
    def start(self) -> None:
        self.clock, self.ids = ManualClock(), CountingIds()
        self.state = CacheState(LIMITS)
        self.peers: dict[str, Peer] = {}
        self.available: dict[PLACE, set[str]] = {}
        self.answered: dict[str, object] = {}
        for engine in ENGINES:
            self.join(engine)

    # --- effects -------------------------------------------------------------------------------------------------

    def take(self, effects: Effects) -> None:
        """Carries the effects over into the model."""
        for drop in effects.drops:
            place, names = place_id(drop.place), {NAMES[name] for name in drop.keys}
            pinned = {at for peer in self.peers.values() for c in peer.claims.values() for at in c}
            assert not {(place, name) for name in names} & pinned, "a pinned copy is dropped"
            self.available[place] -= names
            self.peer_of(drop.session).drops.append(drop)
        for settle in effects.settles:
            self.peer_of(settle.session).settles.append(settle)
        for reply in effects.replies:
            assert reply.call_id not in self.answered, "answered twice"
            self.answered[reply.call_id] = reply.answer
            for peer in self.peers.values():
                if reply.call_id in peer.waiting:
                    wanted = peer.waiting.pop(reply.call_id)
                    if reply.answer is ReserveOutcome.GRANTED:
                        peer.tokens[reply.call_id] = wanted
                peer.waiters.pop(reply.call_id, None)

    def peer_of(self, session: Session) -> Peer:
        """The engine of a session."""
        peer = self.peers.get(session.engine_id)
        if peer is None or peer.session is not session:
            return Peer(session)  # It ended in the same moment: nobody hears.
        return peer

    # --- sessions ------------------------------------------------------------------------------------------------

    @rule(engine=ENGINE)
    def join(self, engine: str) -> None:
        """An engine joins, perhaps again, and its roots hold what is known."""
        self.forget(engine)
        session, effects = self.state.join(
            registration(engine, *(ROOTS[name] for name in ENGINES[engine])),
            session_id=self.ids("session"),
            now=self.clock.now,
        )
        self.peers[engine] = Peer(session)
        self.available[("", engine)] = set()
        self.take(effects)
        for root_id in ENGINES[engine]:
            held = self.available.setdefault((root_id, ""), set())
            blocks = [BLOCKS[name] for name in sorted(held)]
            place = session.roots[root_id]
            self.take(
                self.state.take_inventory(session, place, blocks, complete=True, now=self.clock.now)
            )

    def forget(self, engine: str) -> None:
        """The model of an engine's end."""
        peer = self.peers.pop(engine, None)
        if peer is not None:
            self.available[("", engine)].clear()

    @rule(engine=ENGINE)
    def leave(self, engine: str) -> None:
        """The stream of an engine ends."""
        peer = self.peers.get(engine)
        if peer is not None:
            self.forget(engine)
            self.take(self.state.end_session(peer.session.session_id, self.clock.now))
            for waiter in [*peer.waiters, *peer.waiting]:
                assert getattr(self.answered[waiter], "reason", "") == "SESSION_UNKNOWN"

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]), heard=st.booleans())
    def tick(self, seconds: float, *, heard: bool) -> None:
        """Time goes by, with everybody heard or nobody."""
        target = self.clock.now + seconds
        while self.clock.now < target:
            self.clock.advance(0.5)
            for peer in self.peers.values():
                if heard:
                    self.state.hear(peer.session.session_id, self.clock.now)
            effects = self.state.expire(self.clock.now)
            for ending in effects.endings:
                self.forget(ending.session.engine_id)
            for peer in self.peers.values():
                alive = {t for t in peer.tokens if self.holds(peer, t)}
                peer.tokens = {t: wanted for t, wanted in peer.tokens.items() if t in alive}
                peer.claims = {
                    c: held for c, held in peer.claims.items() if c in peer.session.claims._claims
                }
            self.take(effects)

    def holds(self, peer: Peer, token: str) -> bool:
        return self.state.core.reservations.held(token, peer.session.session_id) is not None

    # --- saves ---------------------------------------------------------------------------------------------------

    @rule(engine=ENGINE, root_id=st.sampled_from(sorted(ROOTS)), name=BLOCK)
    def reserve(self, engine: str, root_id: str, name: str) -> None:
        """An engine wants to save a block."""
        peer = self.peers.get(engine)
        if peer is None or root_id not in ENGINES[engine]:
            return
        token = self.ids("save")
        present = name in self.available[(root_id, "")]
        outcome, effects = self.state.reserve(
            peer.session.session_id, root_id, BLOCKS[name], token=token, now=self.clock.now
        )
        assert (outcome is ReserveOutcome.ALREADY_PRESENT) == present
        if outcome is None:
            peer.waiting[token] = (root_id, name)
        elif outcome is ReserveOutcome.GRANTED:
            peer.tokens[token] = (root_id, name)
        self.take(effects)

    @rule(data=st.data(), what=st.sampled_from(["check", "mark", "announce", "announce", "cancel"]))
    def go_on(self, data: st.DataObject, what: str) -> None:
        """A writer takes one step; what it holds in the model holds in the state."""
        writers = [(p, t) for p in self.peers.values() for t in p.tokens]
        if not writers:
            return
        peer, token = data.draw(st.sampled_from(writers))
        root_id, name = peer.tokens[token]
        session_id, now = peer.session.session_id, self.clock.now
        if what == "announce":
            held, effects = self.state.announce(session_id, token, BLOCKS[name], now)
            del peer.tokens[token]
            self.available[(root_id, "")].add(name)
        elif what == "cancel":
            held, effects = self.state.cancel(session_id, token, now)
            del peer.tokens[token]
        else:
            call = self.state.check if what == "check" else self.state.mark
            held, effects = call(session_id, token, now)
        assert held
        self.take(effects)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A call does not wait for room any longer."""
        waiting = [(p, t) for p in self.peers.values() for t in p.waiting]
        if waiting:
            peer, token = data.draw(st.sampled_from(waiting))
            del peer.waiting[token]
            given_up, effects = self.state.give_up(peer.session.session_id, token, self.clock.now)
            assert given_up
            self.take(effects)

    @rule(engine=ENGINE)
    def confirm(self, engine: str) -> None:
        """An engine carries its oldest Drop out."""
        peer = self.peers.get(engine)
        if peer is not None and peer.drops:
            drop = peer.drops.pop(0)
            self.take(self.state.dropped(peer.session, drop.place, drop.keys, self.clock.now))

    @rule(engine=ENGINE, good=st.booleans())
    def settle(self, engine: str, *, good: bool) -> None:
        """An engine answers what became of a lost writer's file."""
        peer = self.peers.get(engine)
        if peer is not None and peer.settles:
            asked = peer.settles.pop(0)
            name = NAMES[asked.key]
            copy = self.state.core.index.find(asked.key, asked.place)
            open_ = copy is not None and copy in {r.copy for r in self.state.core.reservations}
            stage = self.state.core.reservations.of(copy).stage if open_ and copy else None
            if good and stage is Stage.SETTLING:
                self.available[place_id(asked.place)].add(name)
            self.take(
                self.state.settled(
                    peer.session,
                    asked.place,
                    asked.key,
                    BLOCKS[name] if good else None,
                    self.clock.now,
                )
            )

    # --- lookups -------------------------------------------------------------------------------------------------

    def reachable(self, peer: Peer, name: str) -> set[PLACE]:
        """Where an engine gets a block."""
        live_roots = {root for engine in self.peers for root in ENGINES[engine]}
        live = {(root, "") for root in live_roots} | {("", engine) for engine in self.peers}
        return {place for place in live if name in self.available.get(place, ())}

    @rule(engine=ENGINE, skip=st.integers(0, 2), tail=st.sampled_from([(), (1, 2), (1, 2, 3, 4)]))
    def acquire(self, engine: str, skip: int, tail: tuple[int, ...]) -> None:
        """The chain is the longest that the model knows; a tail is looked for after c0."""
        peer = self.peers.get(engine)
        if peer is None:
            return
        names = ["c0"] if tail else CHAIN
        claim_id = self.ids("claim")
        found, reason = attempt(
            lambda: self.state.acquire(
                peer.session.session_id,
                b"".join(key(name) for name in names),
                min(skip, len(names)),
                key("empty"),
                b"".join(token.to_bytes(4, "big") for token in tail),
                claim_id=claim_id,
                now=self.clock.now,
            )
        )
        if found is None:
            assert (reason, len(peer.claims)) == ("CAPACITY_EXHAUSTED", 3)
            return
        expected = []
        for name in names[skip:]:
            if not self.reachable(peer, name):
                break
            expected.append(name)
        assert [NAMES[copy.row.key] for copy in found.copies] == expected
        pinned = [(place_id(copy.place), NAMES[copy.row.key]) for copy in found.copies]
        assert all(place in self.reachable(peer, name) for place, name in pinned)
        own = {(root, "") for root in ENGINES[engine]}
        for place, name in pinned:
            assert place in own or not own & self.reachable(peer, name), "its own roots come first"
        whole = tail and len(expected) == len(names[skip:])
        matches = {
            name: min(len(TOKENS[name]), len(tail))
            for name in TOKENS
            if whole and self.reachable(peer, name)
        }
        assert (found.partial.matched if found.partial else 0) == max(matches.values(), default=0)
        if found.partial:
            copy = found.partial.copy
            pinned.append((place_id(copy.place), NAMES[copy.row.key]))
        assert found.claim_id == (claim_id if pinned else "")
        if pinned:
            peer.claims[claim_id] = pinned

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A claim is given back, and again."""
        held = [(p, c) for p in self.peers.values() for c in p.claims]
        if held:
            peer, claim_id = data.draw(st.sampled_from(held))
            del peer.claims[claim_id]
            found, effects = self.state.release(peer.session.session_id, claim_id)
            assert found
            self.take(effects)
            assert not self.state.release(peer.session.session_id, claim_id)[0]

    @rule(engine=ENGINE, name=BLOCK)
    def wait(self, engine: str, name: str) -> None:
        """An engine waits for a block."""
        peer = self.peers.get(engine)
        if peer is not None:
            waiter = self.ids("waiter")
            outcome = self.state.wait(peer.session.session_id, key(name), waiter)
            assert (outcome is WaitOutcome.AVAILABLE) == bool(self.reachable(peer, name))
            if outcome is None:
                peer.waiters[waiter] = name

    # --- what engines and operators do -----------------------------------------------------------------------------

    @rule(engine=ENGINE, name=BLOCK, there=st.booleans())
    def change_ram(self, engine: str, name: str, *, there: bool) -> None:
        """A block comes into an engine's RAM, or goes, pinned or not."""
        peer = self.peers.get(engine)
        if peer is None:
            return
        rows = self.state.core.index.rows
        place = ("", engine)
        dropping = key(name) in {c.row.key for c in peer.session.dropping if not c.place.root_id}
        if there and not dropping and (len(rows) < LIMITS.rows_max or key(name) in rows):
            self.available[place].add(name)
        if not there:
            self.available[place].discard(name)
            self.unpin(place, name)
        self.take(
            self.state.change_ram(
                peer.session,
                [BLOCKS[name]] if there else [],
                [] if there else [key(name)],
                self.clock.now,
            )
        )

    @rule(engine=ENGINE, name=BLOCK)
    def withdraw(self, engine: str, name: str) -> None:
        """A file turns out to be bad."""
        peer = self.peers.get(engine)
        if peer is not None and "disk" in ENGINES[engine]:
            self.available[("disk", "")].discard(name)
            self.unpin(("disk", ""), name)
            place = peer.session.roots["disk"]
            self.take(self.state.withdraw(place, [key(name)], corrupt=True, now=self.clock.now))

    def unpin(self, place: PLACE, name: str) -> None:
        """What is gone is not pinned any more, whoever claims it."""
        for peer in self.peers.values():
            for claim in peer.claims.values():
                claim[:] = [at for at in claim if at != (place, name)]

    @rule(wanted=st.sampled_from([1, 100, 10**9]), tiers=st.sets(st.sampled_from(Tier)))
    def evict(self, wanted: int, tiers: set[Tier]) -> None:
        """An operator drops bytes."""
        (copies, freed), effects = self.state.evict(wanted, frozenset(tiers), "")
        assert sum(len(drop.keys) for drop in effects.drops) == copies
        assert freed >= 60 * copies
        self.take(effects)

    # --- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def everything_adds_up(self) -> None:
        """The recounts, the quotas, the sets of available copies, and nobody waits for what nobody saves."""
        core = self.state.core
        check_integrity(core)
        for place in core.places:
            if place.root_id:
                assert place.ledger.held <= place.ledger.quota == QUOTA
            known = {NAMES[c.row.key] for c in place.copies if c.state.name == "AVAILABLE"}
            assert known == self.available[place_id(place)]
        for peer in self.peers.values():
            for name in peer.waiters.values():
                row = core.index.rows[key(name)]
                assert any(copy.state.name == "WRITING" for copy in row.copies)
        assert len(core.sessions) == len(self.peers)
        assert sum(len(s.claims) for s in core.sessions) == sum(
            len(peer.claims) for peer in self.peers.values()
        )
        assert len(core.waiters) == sum(len(peer.waiters) for peer in self.peers.values())

    def teardown(self) -> None:
        """When all sessions end, nothing that belonged to one is left (I6)."""
        if not hasattr(self, "state"):
            return
        for engine in list(self.peers):
            self.leave(engine)
        core = self.state.core
        check_integrity(core)
        assert all(one.stage is Stage.UNSETTLED for one in core.reservations)
        assert len(core.waiters) == len(core.sessions) == 0
        assert all(not copy.claims for row in core.index.rows.values() for copy in row.copies)


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestCacheMachine = CacheMachine.TestCase
