"""A gateway in virtual time: the pure decisions of its sessions, and requests that are asked through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Final

from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.checks import checked_held
from services.coordinator.effects import Effects, EngineCommand, Grant
from services.coordinator.leases import Lease
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.gateway import routes
from services.gateway.answer import Answer
from services.gateway.held import HeldLeases
from services.gateway.migration import Loss, Migration
from tests.support.chaos_coordinator import Coordinator, Stream
from tests.support.chaos_engine import Call, Engine, token_at
from tests.support.chaos_time import Time, Wire

MOVES_MAX: Final = 5
STALL_S: Final = 2.0
PATIENCE_S: Final = 5.0
ASKED_MAX: Final = 6
_AGAIN: Final = {"SERVICE_UNAVAILABLE", "SESSION_UNKNOWN", "DRAINING"}


class Gateway:
    """A gateway process; `life` counts its starts, `session_id` is None while the coordinator does not know it."""

    def __init__(
        self, time: Time, coordinator: Coordinator, engines: Mapping[str, Engine], name: str
    ) -> None:
        self.time = time
        self.coordinator = coordinator
        self.engines = engines
        self.name = name
        self.life = 0
        self.session_id: str | None = None
        self.held = HeldLeases()
        self.requests: set[Request] = set()
        self.unreleased: list[str] = []
        self._joins = itertools.count(1)
        self.stream = coordinator.join(self)

    # --- the coordinator -----------------------------------------------------------------------------------------

    def register(self, state: CoordinatorState) -> tuple[int, Effects]:
        gateway_id = f"{self.name}/{self.life}/{next(self._joins)}"
        now = self.time.now
        held = [checked_held(told, gateway_id, now) for told in self.held.messages(now)]
        self._registered = gateway_id
        return state.join_gateway(gateway_id, now, held)

    def beat(self, state: CoordinatorState, session: int) -> Effects:
        state.hear_gateway(session, self.time.now)
        return Effects()

    def joined(self, stream: Stream) -> None:
        if self.stream is stream:
            self.session_id = self._registered
            unreleased, self.unreleased = self.unreleased, []
            for lease_id in unreleased:
                self.release(lease_id)

    def parted(self, stream: Stream) -> None:
        life = self.life
        self.session_id = None
        for request in list(self.requests):
            request.session_ended()
        self.time.after(self.time.random.uniform(0.1, 1.0), lambda: self._rejoin(stream, life))

    def _rejoin(self, parted: Stream, life: int) -> None:
        if self.life == life and self.stream is parted:
            self.stream = self.coordinator.join(self)

    def obey(self, command: EngineCommand) -> None:
        raise AssertionError(f"a gateway was told {command}")

    def release(self, lease_id: str, then: Callable[[], None] | None = None) -> None:
        """Ends a lease, once the coordinator is there; `then` follows the first try."""
        life = self.life

        def arrive() -> None:
            if self.life == life:
                if not self.coordinator.release(lease_id):
                    self.unreleased.append(lease_id)
                if then is not None:
                    self.time.soon(then)

        self.time.soon(arrive)

    def restart(self) -> None:
        """kill -9, and a start: its clients see their connections break."""
        self.life += 1
        self.session_id = None
        self.held = HeldLeases()
        self.unreleased = []
        for request in list(self.requests):
            request.die()
        self.coordinator.part(self.stream)
        self.stream = self.coordinator.join(self)


class Asking:
    """One call of Route, to the coordinator of this moment."""

    def __init__(self, request: Request, coordinator: Coordinator, want: Want) -> None:
        self.request = request
        self.want = want
        self._coordinator = coordinator
        self._life = coordinator.life
        self._wire = Wire(request.time)
        self._wire.send(lambda: coordinator.route(self, self._life))

    def hang_up(self) -> None:
        """The call is over without an answer."""
        self._wire.send(lambda: self._coordinator.forget(self, self._life))

    def granted(self, grant: Grant) -> None:
        self.request.granted(self, grant)

    def refused(self, reason: str) -> None:
        self.request.refused(self, reason)


class Request:
    """One request, and its client. `told` are the tokens that the client has been given, `ends` its terminal events."""

    def __init__(self, gateway: Gateway, request_id: str, model: str, length: int) -> None:
        self.gateway = gateway
        self.time = gateway.time
        self.request_id = request_id
        self.model = model
        self.length = length
        self.seed = self.time.random.getrandbits(32)
        self.told: list[int] = []
        self.starts: list[int] = []
        """The cached tokens of each start that the client saw."""
        self.ends: list[str] = []
        self.finished: engine_pb.Finished | None = None
        self.moves = 0
        self._answer = Answer()
        self._migration = Migration(MOVES_MAX)
        self._call: Call | None = None
        self._began = False
        self._lease: routes.Lease | None = None
        self._last_event = 0.0
        self._asking: Asking | None = None
        self._asked = 0
        self._asking_since = self.time.now
        gateway.requests.add(self)
        self._ask()

    @property
    def over(self) -> bool:
        """Whether its client has seen its end."""
        return bool(self.ends)

    def _end(self, how: str) -> None:
        self.ends.append(how)
        self.gateway.requests.discard(self)

    # --- a lease -------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self.over:
            return None
        coordinator, gateway_id = self.gateway.coordinator, self.gateway.session_id
        if gateway_id is None:
            if self.time.now - self._asking_since > PATIENCE_S:
                return self._end("SERVICE_UNAVAILABLE")
            return self.time.after(0.1, self._ask)
        self._asked += 1
        want = Want(
            self.request_id,
            gateway_id,
            self.model,
            coordinator.ids("lease"),
            self.time.now,
            wait_s=6.0,
            avoid=frozenset(self._migration.avoided),
            resumed=self._migration.has_moved,
        )
        self._asking = Asking(self, coordinator, want)
        return None

    def granted(self, asking: Asking, grant: Grant) -> None:
        """A lease has come; one that nobody wants any more is given back."""
        if asking is not self._asking:
            return
        self._asking = None
        if self.over:
            self.gateway.release(grant.lease.lease_id)
            return
        self._asked = 0
        lease = grant.lease
        # As its gateway keeps it, and tells it to a coordinator that has started anew.
        self._lease = routes.Lease(
            lease.lease_id,
            lease.engine_id,
            grant.address,
            lease.incarnation,
            lease.model,
            grant.idempotent,
            scheduling_pb2.PRIORITY_NORMAL,
        )
        wanted = routes.Wanted(self.request_id, self.model)
        self.gateway.held.add(self._lease, wanted, asking.want.arrived_at)
        self._generate(lease)

    def refused(self, asking: Asking, reason: str) -> None:
        """No lease has come."""
        if asking is not self._asking:
            return
        self._asking = None
        if self.over:
            return
        again = reason in _AGAIN or (reason == "DUPLICATE_REQUEST" and self._asked > 1)
        if again and self._asked < ASKED_MAX:
            self._ask_again()
        else:
            self._end(reason)

    def session_ended(self) -> None:
        """The coordinator is away, or does not know the gateway any more."""
        if self._asking is not None:
            self._asking.hang_up()
            self._asking = None
            self._ask_again()

    def _ask_again(self) -> None:
        self._asking_since = self.time.now
        self.time.after(0.1 * 2**self._asked, self._ask)

    # --- an engine -----------------------------------------------------------------------------------------------

    def _generate(self, lease: Lease) -> None:
        self._began = False
        call = Call(self.time, self, lease, self.seed, self.length, self._answer.tokens)
        self._call = call
        self._last_event = self.time.now
        engine = self.gateway.engines[lease.engine_id]
        self.time.soon(lambda: engine.generate(call))
        self._watch(call)

    def _watch(self, call: Call) -> None:
        if self._call is not call:
            return
        if self.time.now - self._last_event > STALL_S:
            self.lost(call, "ENGINE_STALLED")
        else:
            self.time.after(STALL_S / 4, lambda: self._watch(call))

    def heard(self, call: Call, event: engine_pb.GenerateResponse) -> None:
        if self._call is not call:
            return
        self._last_event = self.time.now
        self._began = True
        kind = event.WhichOneof("event")
        if not self._answer.take(event, kind):
            return
        assert not self.over
        if kind == "started":
            self.starts.append(event.started.cached_tokens)
        elif kind == "delta":
            self.told.extend(event.delta.token_ids)
            assert self.told[-1] == token_at(self.seed, len(self.told) - 1)
        else:
            self.finished = event.finished
            self._give_back(call)
            self._end("finished")

    def lost(self, call: Call, reason: str) -> None:
        if self._call is not call:
            return None
        assert self._lease is not None
        delay_s = self._migration.after(
            Loss(reason, self._lease.incarnation, self._began),
            idempotent=self._lease.idempotent,
            remaining_s=None,
            fraction=self.time.random.random(),
        )
        if delay_s is None:
            self._give_back(call)
            return self._end(reason)
        self.moves += 1

        def go_on() -> None:
            self._asking_since = self.time.now
            self.time.after(delay_s, self._ask)

        # The id of the request is free for the next lease only after the release.
        return self._give_back(call, go_on)

    def _give_back(self, call: Call, then: Callable[[], None] | None = None) -> None:
        """Ends the call of the engine, which learns of it later, and the lease."""
        self._call = None
        call.open = False
        engine = self.gateway.engines[call.lease.engine_id]
        self.time.soon(lambda: engine.end(call))
        assert self._lease is not None
        self.gateway.held.discard(self._lease)
        self.gateway.release(call.lease.lease_id, then)

    # --- its client ----------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The client goes."""
        if self.over:
            return
        if self._call is not None:
            self._give_back(self._call)
        elif self._asking is not None:
            # The cancel makes the answer come at once; a grant that crosses it is given back.
            self.time.soon(lambda: self.gateway.coordinator.cancel(self.request_id))
        self._end("left")

    def die(self) -> None:
        """Its gateway was killed: the client sees its connection break, and so do the engine and the coordinator."""
        call, asking = self._call, self._asking
        self._call = self._asking = None
        if call is not None:
            call.open = False
            engine = self.gateway.engines[call.lease.engine_id]
            self.time.soon(lambda: engine.end(call))
        if asking is not None:
            asking.hang_up()
        self._end("broken")
