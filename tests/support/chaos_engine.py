"""Engines in virtual time: the token at each place of an answer follows from the request's seed and the place alone, as with
sampling noise that is keyed by position.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.effects import (
    CancelRequest,
    DrainEngine,
    Effects,
    EngineCommand,
    UndrainEngine,
)
from services.coordinator.leases import Lease
from services.coordinator.state import CoordinatorState
from tests.support.chaos_coordinator import Coordinator, Stream
from tests.support.chaos_time import Time, Wire

CAPACITY: Final = 3
PROMPT_TOKENS: Final = 7


def token_at(seed: int, place: int) -> int:
    """The token at a place of an answer."""
    return zlib.crc32(place.to_bytes(4, "little"), seed) & 0xFFFF


class Caller(Protocol):
    """Who called an engine."""

    def heard(self, call: Call, event: engine_pb.GenerateResponse) -> None:
        """An event of the answer."""
        ...

    def lost(self, call: Call, reason: str) -> None:
        """The call ended with an error."""
        ...


class Call:
    """One call of Generate. `resumed` are the tokens that its client has already; `length` those of the whole answer."""

    def __init__(
        self,
        time: Time,
        caller: Caller,
        lease: Lease,
        seed: int,
        length: int,
        resumed: Sequence[int],
    ) -> None:
        self.time = time
        self.caller = caller
        self.lease = lease
        self.seed = seed
        self.length = length
        self.tokens = list(resumed)
        self.cached = 0
        self.wire = Wire(time)
        self.open = True
        """Whether the caller listens."""

    def send(self, event: engine_pb.GenerateResponse) -> None:
        """An event on its way to the caller."""
        self.wire.send(lambda: self.caller.heard(self, event) if self.open else None)

    def fail(self, reason: str) -> None:
        """An error after the events."""
        self.wire.send(lambda: self.caller.lost(self, reason) if self.open else None)

    def break_off(self) -> None:
        """The connection breaks: what is under way does not arrive."""
        self.wire.cut = True
        self.time.soon(lambda: self.caller.lost(self, "ENGINE_LOST") if self.open else None)


class Engine:
    """An engine process; `life` counts its starts."""

    def __init__(self, time: Time, coordinator: Coordinator, engine_id: str, model: str) -> None:
        self._time = time
        self._coordinator = coordinator
        self.engine_id = engine_id
        self.model = model
        self.life = 0
        self.hung = False
        self.draining = False
        self.calls: dict[str, Call] = {}
        self._inbox: list[Callable[[], None]] = []
        self.begun: list[str] = []
        """Ids of the requests that were begun here, once for each time."""
        self.stream = coordinator.join(self)

    @property
    def incarnation(self) -> str:
        """Id of this life."""
        return f"{self.engine_id}/{self.life}"

    # --- the coordinator -----------------------------------------------------------------------------------------

    def register(self, state: CoordinatorState) -> tuple[int, Effects]:
        model = engine_pb.ModelInfo(name=self.model, max_sequences=CAPACITY)
        now = self._time.now
        return state.join_engine(
            self.engine_id,
            f"{self.engine_id}:1",
            model,
            self._load(),
            now=now,
            wall=now,
            incarnation=self.incarnation,
        )

    def beat(self, state: CoordinatorState, session: int) -> Effects:
        return state.report_engine(session, None, self._load(), self._time.now)

    def joined(self, stream: Stream) -> None:
        stream.silent = self.hung

    def parted(self, stream: Stream) -> None:
        life = self.life
        self._time.after(self._time.random.uniform(0.1, 1.0), lambda: self._rejoin(stream, life))

    def _rejoin(self, parted: Stream, life: int) -> None:
        if self.life == life and self.stream is parted:
            self.stream = self._coordinator.join(self)

    def obey(self, command: EngineCommand) -> None:
        if isinstance(command, DrainEngine):
            self.drain(command.grace_s)
        elif isinstance(command, UndrainEngine):
            self.undrain()
        elif isinstance(command, CancelRequest):
            self._when_awake(lambda: self._cancel(command.request_id))

    def _load(self) -> engine_pb.EngineLoad:
        draining, idle = engine_pb.ENGINE_PHASE_DRAINING, engine_pb.ENGINE_PHASE_IDLE
        return engine_pb.EngineLoad(phase=draining if self.draining else idle)

    # --- what happens to it --------------------------------------------------------------------------------------

    def restart(self) -> None:
        """kill -9, and a start."""
        self.life += 1
        self.hung = self.draining = False
        self._inbox.clear()
        for call in self.calls.values():
            call.break_off()
        self.calls.clear()
        self._coordinator.part(self.stream)
        self.stream = self._coordinator.join(self)

    def hang(self, hung: bool) -> None:
        """SIGSTOP or SIGCONT."""
        self.hung = self.stream.silent = hung
        inbox, self._inbox = self._inbox, []
        for action in inbox:
            action()

    def drain(self, finish_s: float) -> None:
        """Takes no new requests; those that still run after `finish_s` seconds are ended, to be moved."""
        self._when_awake(lambda: self._drain(finish_s))

    def _drain(self, finish_s: float) -> None:
        self.draining = True
        life = self.life
        self._time.after(finish_s, lambda: self._move_on() if self.life == life else None)

    def undrain(self) -> None:
        """Takes requests again."""
        self._when_awake(self._undrain)

    def _undrain(self) -> None:
        self.draining = False

    def _when_awake(self, action: Callable[[], None]) -> None:
        """A process that stands still does nothing, and then everything that has come, in order."""
        if self.hung:
            self._inbox.append(action)
        else:
            action()

    def _move_on(self) -> None:
        if not self.draining:
            return
        for call in self.calls.values():
            call.fail("DRAINING")
        self.calls.clear()

    # --- requests ------------------------------------------------------------------------------------------------

    def _cancel(self, request_id: str) -> None:
        call = self.calls.pop(request_id, None)
        if call is not None:
            reason = generation_pb2.FINISH_REASON_CANCELLED
            call.send(engine_pb.GenerateResponse(finished=engine_pb.Finished(reason=reason)))

    def end(self, call: Call) -> None:
        """The caller has ended its call."""
        self._when_awake(lambda: self._forget(call))

    def _forget(self, call: Call) -> None:
        if self.calls.get(call.lease.request_id) is call:
            del self.calls[call.lease.request_id]

    def generate(self, call: Call) -> None:
        """A call arrives."""
        if call.lease.incarnation != self.incarnation:
            call.break_off()
        else:
            self._when_awake(lambda: self._take(call))

    def _take(self, call: Call) -> None:
        if not call.open:
            return None
        if self.draining:
            return call.fail("DRAINING")
        if len(self.calls) >= CAPACITY:
            return call.fail("CAPACITY_EXHAUSTED")
        request_id = call.lease.request_id
        if request_id in self.calls:
            return call.fail("DUPLICATE_REQUEST")
        # What the client was given is what any engine would have said.
        assert call.tokens == [token_at(call.seed, place) for place in range(len(call.tokens))]
        self.calls[request_id] = call
        self.begun.append(request_id)
        call.cached = self._time.random.randint(0, PROMPT_TOKENS)
        started = engine_pb.Started(prompt_tokens=PROMPT_TOKENS, cached_tokens=call.cached)
        call.send(engine_pb.GenerateResponse(started=started))
        return self._time.after(self._time.random.uniform(0.01, 0.1), lambda: self._step(call))

    def _step(self, call: Call) -> None:
        if self.calls.get(call.lease.request_id) is not call:
            return None
        if not self.hung:
            more = min(self._time.random.randint(1, 4), call.length - len(call.tokens))
            tokens = [token_at(call.seed, len(call.tokens) + index) for index in range(more)]
            if tokens:
                call.tokens += tokens
                call.send(engine_pb.GenerateResponse(delta=engine_pb.Delta(token_ids=tokens)))
            if len(call.tokens) == call.length:
                return self._finish(call)
        return self._time.after(self._time.random.uniform(0.05, 0.3), lambda: self._step(call))

    def _finish(self, call: Call) -> None:
        del self.calls[call.lease.request_id]
        usage = generation_pb2.Usage(
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=len(call.tokens),
            cached_tokens=call.cached,
        )
        reason = generation_pb2.FINISH_REASON_STOP
        finished = engine_pb.Finished(reason=reason, usage=usage)
        call.send(engine_pb.GenerateResponse(finished=finished))
