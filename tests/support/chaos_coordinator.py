"""A coordinator in virtual time: its own pure state, and the streams and calls of its peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from services.coordinator.deployment import Deployment
from services.coordinator.effects import Effects, EngineCommand, Grant
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import CountingIds
from tests.support.chaos_time import Time, Wire
from tests.support.refusals import attempt

INTERVAL_S: Final = 1.0
SWEEP_S: Final = 0.5
ONCE: Final = "once"
"""A model whose requests must not be begun twice."""
DEPLOYMENTS: Final = (
    Deployment("demo", "scripted:"),
    Deployment(ONCE, "scripted:", idempotent=False),
)
"""What every life of the coordinator knows from its file."""


class Peer(Protocol):
    """A process that joins the coordinator."""

    def register(self, state: CoordinatorState) -> tuple[int, Effects]:
        """The first message of its stream."""
        ...

    def beat(self, state: CoordinatorState, session: int) -> Effects:
        """What it says each second."""
        ...

    def joined(self, stream: Stream) -> None:
        """Its registration was taken."""
        ...

    def parted(self, stream: Stream) -> None:
        """Its stream has ended, and it is to join again."""
        ...

    def obey(self, command: EngineCommand) -> None:
        """A command of the coordinator; for engines only."""
        ...


@dataclass(eq=False)
class Stream:
    """A session's stream. `session` is None until the coordinator has taken the join; `open` falls once."""

    peer: Peer
    to_coordinator: Wire
    to_peer: Wire
    coordinator: int
    session: int | None = None
    open: bool = True
    silent: bool = False


class Asker(Protocol):
    """Who waits for the answer to a route."""

    want: Want

    def granted(self, grant: Grant) -> None:
        """It has a lease."""
        ...

    def refused(self, reason: str) -> None:
        """It has none."""
        ...


class Coordinator:
    """The process around the pure state; `life` counts its starts."""

    def __init__(self, time: Time, limits: Limits) -> None:
        self._time = time
        self._limits = limits
        self.life = 0
        self.up = True
        self.touched = False
        """Whether the state may have changed since somebody looked."""
        self.adopted = 0
        """Leases that were taken over from a coordinator or session before."""
        self.ids = CountingIds()
        self._streams: dict[int, Stream] = {}
        self._asking: dict[str, Asker] = {}
        self.state = self._new_state(0.0)
        time.after(SWEEP_S, self._sweep)

    def _new_state(self, down_s: float) -> CoordinatorState:
        learning_until = self._time.now + down_s + self._limits.rejoin_s
        state = CoordinatorState(self._limits, learning_until=learning_until)
        for deployment in DEPLOYMENTS:
            state.set_rules(deployment.name, deployment, self._time.now, self._time.now)
        return state

    def crash(self, down_s: float) -> None:
        """kill -9; it is back after `down_s` seconds, and knows nothing."""
        self.life += 1
        self.up = False
        streams, self._streams = self._streams, {}
        asking, self._asking = self._asking, {}
        for stream in streams.values():
            self._time.soon(lambda s=stream: self.part(s))  # type: ignore[misc]
        for asker in asking.values():
            self._time.soon(lambda a=asker: a.refused("SERVICE_UNAVAILABLE"))  # type: ignore[misc]
        self.state = self._new_state(down_s)
        self._time.after(down_s, self._start)

    def _start(self) -> None:
        self.up = True

    # --- sessions ------------------------------------------------------------------------------------------------

    def join(self, peer: Peer) -> Stream:
        """A peer opens a stream and registers."""
        stream = Stream(peer, Wire(self._time), Wire(self._time), self.life)
        stream.to_coordinator.send(lambda: self._take_join(stream))
        return stream

    def _lives(self, stream: Stream) -> bool:
        return stream.open and self.up and stream.coordinator == self.life

    def _take_join(self, stream: Stream) -> None:
        if not self._lives(stream):
            return self.part(stream)
        joined, _ = attempt(lambda: stream.peer.register(self.state))
        if joined is None:
            return self.part(stream)
        stream.session, effects = joined
        self._streams[stream.session] = stream
        stream.to_peer.send(lambda: stream.peer.joined(stream))
        self.perform(effects)
        return self._time.after(INTERVAL_S, lambda: self._speak(stream))

    def _speak(self, stream: Stream) -> None:
        if stream.open:
            if not stream.silent:
                stream.to_coordinator.send(lambda: self._hear(stream))
            self._time.after(INTERVAL_S, lambda: self._speak(stream))

    def _hear(self, stream: Stream) -> None:
        session = stream.session
        assert session is not None
        if not self._lives(stream):
            return self.part(stream)
        effects, reason = attempt(lambda: stream.peer.beat(self.state, session))
        if effects is None:
            assert reason == "SESSION_UNKNOWN"
            return self.part(stream)
        return self.perform(effects)

    def part(self, stream: Stream) -> None:
        """The peer sees its stream end now; the coordinator sees the end later."""
        if not stream.open:
            return
        stream.open = False
        stream.to_coordinator.cut = stream.to_peer.cut = True
        self._time.soon(lambda: self._take_end(stream))
        stream.peer.parted(stream)

    def _take_end(self, stream: Stream) -> None:
        if stream.session is not None and stream.coordinator == self.life and self.up:
            self._streams.pop(stream.session, None)
            self.perform(self.state.end_session(stream.session, self._time.now))

    def _sweep(self) -> None:
        if self.up:
            self.perform(self.state.expire(self._time.now))
        self._time.after(SWEEP_S, self._sweep)

    # --- requests ------------------------------------------------------------------------------------------------

    def route(self, asker: Asker, life: int) -> None:
        """A call arrives that was made to the coordinator of this life."""
        if not self.up or life != self.life:
            return self._time.soon(lambda: asker.refused("SERVICE_UNAVAILABLE"))
        self.touched = True
        grant, reason = attempt(lambda: self.state.route(asker.want))
        if grant is not None:
            return self._time.soon(lambda: asker.granted(grant))
        if reason is not None:
            return self._time.soon(lambda: asker.refused(reason))
        self._asking[asker.want.request_id] = asker
        return None

    def forget(self, asker: Asker, life: int) -> None:
        """The call of a route is over, because its gateway is gone."""
        if self.up and life == self.life:
            if self._asking.get(asker.want.request_id) is asker:
                del self._asking[asker.want.request_id]
            self.perform(self.state.leave(asker.want, self._time.now))

    def cancel(self, request_id: str) -> None:
        """Somebody asks to end a request."""
        if self.up:
            effects, reason = attempt(lambda: self.state.cancel(request_id, self._time.now))
            assert reason in {None, "REQUEST_NOT_FOUND"}
            self.perform(effects or Effects())

    def release(self, lease_id: str) -> bool:
        """Ends a lease; false where there is no coordinator to tell."""
        if not self.up:
            return False
        self.perform(self.state.release(lease_id, self._time.now) or Effects())
        return True

    def perform(self, effects: Effects) -> None:
        """Does what the state asks for."""
        self.touched = True
        self.adopted += len(effects.adopted)
        for command in effects.commands:
            stream = self._streams[command.session]
            stream.to_peer.send(lambda s=stream, c=command: s.peer.obey(c))  # type: ignore[misc]
        for ending in effects.endings:
            ended = self._streams.pop(ending.session, None)
            if ended is not None:
                self._time.soon(lambda s=ended: self.part(s))  # type: ignore[misc]
        for grant in effects.grants:
            asker = self._asking.pop(grant.lease.request_id)
            self._time.soon(lambda a=asker, g=grant: a.granted(g))  # type: ignore[misc]
        for refusal in effects.refusals:
            asker = self._asking.pop(refusal.request_id)
            reason = refusal.error.reason
            self._time.soon(lambda a=asker, r=reason: a.refused(r))  # type: ignore[misc]
