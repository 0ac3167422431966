"""The part of CoordinatorService that holds the sessions of engines and gateways, and performs the effects of the state."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from services.coordinator import checks, messages
from services.coordinator.effects import (
    BudgetCrossing,
    Effects,
    Ending,
    EngineCommand,
    TellLimits,
)
from services.coordinator.gateway_outbox import GatewayOutbox
from services.coordinator.limits import SILENT_INTERVALS_MAX
from services.coordinator.lists import CoordinatorLists
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.outbox import Outbox
from services.coordinator.refusals import DRAINING_RETRY_S
from services.coordinator.routes import Answer, Routes
from services.coordinator.state import CoordinatorState
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all
from services.runtime.telemetry import Tracing

_LOG = logging.getLogger(__name__)
Request = TypeVar("Request")


class CoordinatorSessions(CoordinatorLists):
    """Streams of engines and gateways. Whatever changes the state gives its effects to `perform`."""

    def __init__(
        self,
        state: CoordinatorState,
        metrics: CoordinatorMetrics,
        tracing: Tracing,
        clock: Clock,
        ids: IdSource,
    ) -> None:
        super().__init__(state, clock)
        self._metrics = metrics
        self._routes = Routes(state, metrics, tracing, clock, ids, perform=self.perform)
        self._outboxes: dict[int, Outbox[EngineCommand] | GatewayOutbox] = {}

    async def JoinEngine(
        self,
        request_iterator: AsyncIterator[pb.JoinEngineRequest],
        context: grpc.aio.ServicerContext[pb.JoinEngineRequest, pb.JoinEngineResponse],
    ) -> AsyncIterator[pb.JoinEngineResponse]:
        first = await self._first(request_iterator)
        registration = checks.checked_registration(first)
        session, effects = self._state.join_engine(
            registration.engine_id,
            registration.address,
            registration.model,
            registration.load,
            now=self._clock.monotonic(),
            wall=self._clock.wall(),
            incarnation=registration.incarnation,
            revision=registration.revision,
        )
        outbox = Outbox[EngineCommand]()
        self._open(session, outbox, effects)
        _LOG.info("engine %s joined as session %d", registration.engine_id, session)

        def take(request: pb.JoinEngineRequest) -> None:
            report = checks.checked_report(request)
            model = report.model if report.HasField("model") else None
            now = self._clock.monotonic()
            self.perform(
                self._state.report_engine(
                    session,
                    model,
                    report.load,
                    now,
                    report.requests,
                    spend=report.spend,
                    limits=report.limits,
                )
            )

        leave = partial(self._leave, session, registration.engine_id)
        reader = asyncio.create_task(_read(request_iterator, take, outbox, leave))
        try:
            welcome = pb.EngineWelcome(report_interval=self._interval())
            yield pb.JoinEngineResponse(welcome=welcome)
            async for command in outbox:
                yield self._to_response(command)
        finally:
            leave()
            await cancel_all([reader])

    def _to_response(self, command: EngineCommand) -> pb.JoinEngineResponse:
        if isinstance(command, TellLimits):
            counters = self._state.rates.shared.told(command.session)
            return pb.JoinEngineResponse(limits=pb.LimitsCommand(counters=counters))
        return messages.to_command(command)

    async def JoinGateway(
        self,
        request_iterator: AsyncIterator[pb.JoinGatewayRequest],
        context: grpc.aio.ServicerContext[pb.JoinGatewayRequest, pb.JoinGatewayResponse],
    ) -> AsyncIterator[pb.JoinGatewayResponse]:
        first = await self._first(request_iterator)
        gateway_id = checks.checked_id("gateway_id", first.gateway_id)
        checks.check_join(first)
        now = self._clock.monotonic()
        held = [checks.checked_held(told, gateway_id, now) for told in first.held]
        session, effects = self._state.join_gateway(gateway_id, now, held)
        outbox = GatewayOutbox(self._interval())
        self._open(session, outbox, effects)
        taken = [lease.lease_id for lease in effects.adopted]
        _LOG.info(
            "gateway %s joined as session %d; leases taken: %d of %d",
            gateway_id,
            session,
            len(taken),
            len(held),
        )

        def take(message: pb.JoinGatewayRequest) -> None:
            checks.check_later(message)
            self._state.hear_gateway(session, self._clock.monotonic())
            for release in message.releases:
                self._routes.release(release)
            for route in message.routes:
                tell = partial(self._tell, session, route.request_id)
                self._routes.ask(route, gateway_id, route.trace.items(), tell)
            if not message.releases and not message.routes:
                # Every heartbeat is answered, so that a gateway notices a coordinator that hangs.
                outbox.put_heartbeat()

        leave = partial(self._leave, session, gateway_id)
        reader = asyncio.create_task(_read(request_iterator, take, outbox, leave))
        try:
            yield pb.JoinGatewayResponse(heartbeat_interval=self._interval(), taken_lease_ids=taken)
            async for answer in outbox:
                yield answer
        finally:
            leave()
            await cancel_all([reader])

    async def _first(self, requests: AsyncIterator[Request]) -> Request:
        """The first message of a stream. Raises CaravanError where it does not come."""
        wait_s = SILENT_INTERVALS_MAX * self._state.limits.interval_s
        try:
            async with asyncio.timeout(wait_s):
                first = await anext(requests, None)
        except TimeoutError:
            raise CaravanError(
                "DEADLINE_EXCEEDED", f"No first message came within {wait_s:g} s."
            ) from None
        if first is None:
            raise CaravanError("MISSING_FIELD", "The stream ended before its first message.")
        return first

    def _tell(self, session: int, request_id: str, answer: Answer) -> None:
        """Answers a route of a gateway's session. Of a session that has ended meanwhile the state has swept what was granted."""
        outbox = self._outboxes.get(session)
        if isinstance(outbox, GatewayOutbox):
            told = messages.to_answer(request_id, answer)
            if not outbox.put(told):
                self._end_deaf(session, outbox)

    def _open(
        self, session: int, outbox: Outbox[EngineCommand] | GatewayOutbox, effects: Effects
    ) -> None:
        self._outboxes[session] = outbox
        self.perform(effects)

    def _leave(self, session: int, peer_id: str) -> None:
        """The stream of a session is over, as its reader notices or its handler; nothing happens for the second of them."""
        outbox = self._outboxes.pop(session, None)
        if outbox is None:
            return
        outbox.close()
        effects = self._state.end_session(session, self._clock.monotonic())
        _LOG.info("session %d of %s ended; leases swept: %d", session, peer_id, len(effects.swept))
        self.perform(effects)

    def perform(self, effects: Effects) -> None:
        """Does what the state asks for: commands to engines, ends of sessions, answers to routes that waited."""
        self._metrics.count_effects(effects)
        for command in effects.commands:
            self._send(command)
        for grant in effects.grants:
            self._routes.answer(grant.lease.request_id, grant)
        for refusal in effects.refusals:
            self._routes.answer(refusal.request_id, refusal.error)
        # After the answers, which may be meant for a session that ends.
        for ending in effects.endings:
            level = logging.INFO if ending.why is Ending.DRAINING else logging.WARNING
            _LOG.log(
                level, "session %d of %s: %s", ending.session, ending.peer_id, ending.why.value
            )
            ending_box = self._outboxes.get(ending.session)
            if ending_box is not None:  # None where its stream ended in this very moment.
                ending_box.close(_ending_error(ending.peer_id, ending.why))
        for lease in effects.written_off:
            _LOG.warning("engine %s did not end request %s", lease.engine_id, lease.request_id)
        for crossing in effects.crossings:
            _tell_crossing(crossing)

    def _send(self, command: EngineCommand) -> None:
        outbox = self._outboxes.get(command.session)
        # None where the session ended by an earlier one of these commands.
        if isinstance(outbox, Outbox) and not outbox.put(command):
            self._end_deaf(command.session, outbox)

    def _end_deaf(self, session: int, outbox: Outbox[EngineCommand] | GatewayOutbox) -> None:
        """Ends the session of a peer that does not read what it is sent."""
        _LOG.warning("session %d does not read: ended", session)
        outbox.close(CaravanError("SESSION_UNKNOWN", "Too many messages wait for you."))
        self.perform(self._state.end_session(session, self._clock.monotonic()))

    def expire(self) -> None:
        """Ends the sessions of silent peers and refuses who has waited too long; to be called at least once per interval."""
        self.perform(self._state.expire(self._clock.monotonic()))

    def drain(self) -> None:
        """Takes no new work and ends all sessions, so that engines and gateways join the next coordinator."""
        self.perform(self._state.drain(self._clock.monotonic()))

    def _interval(self) -> Duration:
        return messages.to_duration(self._state.limits.interval_s)


async def _read(
    requests: AsyncIterator[Request],
    take: Callable[[Request], None],
    outbox: Outbox[EngineCommand] | GatewayOutbox,
    leave: Callable[[], None],
) -> None:
    """Takes the messages of a peer until its stream ends; the end, and an error, close the outbox and end the session.

    A handler whose call breaks while it writes runs its `finally` late; by then others would have waited for the places.
    """
    try:
        async for request in requests:
            take(request)
    except Exception as error:
        outbox.close(error)  # The handler of the stream raises it.
    else:
        outbox.close()
    leave()


def _tell_crossing(crossing: BudgetCrossing) -> None:
    whose = crossing.deployment
    if crossing.tenant is not None:
        whose = f"{crossing.deployment}, tenant {crossing.tenant!r}"
    if crossing.is_over:
        _LOG.warning(
            "the budget of %s is spent: %s; %s", whose, crossing.limit, crossing.policy.value
        )
    else:
        _LOG.info("the budget of %s is not spent any more: %s", whose, crossing.limit)


def _ending_error(peer_id: str, why: Ending) -> CaravanError:
    if why is Ending.DRAINING:
        return CaravanError(
            "DRAINING", f"The session ended: {why.value}.", retry_after_s=DRAINING_RETRY_S
        )
    return CaravanError("SESSION_UNKNOWN", f"The session ended: {why.value}.", session_id=peer_id)
