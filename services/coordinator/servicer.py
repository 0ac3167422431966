"""CoordinatorService over gRPC: translates, performs the effects of the state, maps errors."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from services.coordinator import messages
from services.coordinator.effects import Effects, Ending, Grant
from services.coordinator.lists import CoordinatorLists
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.outbox import Outbox
from services.coordinator.refusals import DRAINING_RETRY_S
from services.coordinator.state import SILENT_INTERVALS_MAX, CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all
from services.runtime.telemetry import Tracing

_LOG = logging.getLogger(__name__)
_HEARTBEAT: Final = "heartbeat"
Request = TypeVar("Request")


class CoordinatorServicer(CoordinatorLists):
    """The coordinator at the edge. All its methods run on one event loop, so the state needs no lock."""

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
        self._tracing = tracing
        self._ids = ids
        self._outboxes: dict[int, Outbox] = {}
        self._routes: dict[str, asyncio.Future[Grant | CaravanError]] = {}

    # --- sessions ------------------------------------------------------------------------------------------------

    async def JoinEngine(
        self,
        request_iterator: AsyncIterator[pb.JoinEngineRequest],
        context: grpc.aio.ServicerContext[pb.JoinEngineRequest, pb.JoinEngineResponse],
    ) -> AsyncIterator[pb.JoinEngineResponse]:
        first = await self._first(request_iterator)
        registration = messages.checked_registration(first)
        session, effects = self._state.join_engine(
            registration.engine_id,
            registration.address,
            registration.model,
            registration.load,
            now=self._clock.monotonic(),
            wall=self._clock.wall(),
        )
        outbox = self._open(session, effects)
        _LOG.info("engine %s joined as session %d", registration.engine_id, session)

        def take(request: pb.JoinEngineRequest) -> None:
            report = messages.checked_report(request)
            model = report.model if report.HasField("model") else None
            now = self._clock.monotonic()
            self._perform(self._state.report_engine(session, model, report.load, now))

        reader = asyncio.create_task(_read(request_iterator, take, outbox))
        try:
            welcome = pb.EngineWelcome(report_interval=self._interval())
            yield pb.JoinEngineResponse(welcome=welcome)
            async for request_id in outbox:
                yield pb.JoinEngineResponse(cancel=pb.CancelCommand(request_id=request_id))
        finally:
            self._leave(session, registration.engine_id)
            await cancel_all([reader])

    async def JoinGateway(
        self,
        request_iterator: AsyncIterator[pb.JoinGatewayRequest],
        context: grpc.aio.ServicerContext[pb.JoinGatewayRequest, pb.JoinGatewayResponse],
    ) -> AsyncIterator[pb.JoinGatewayResponse]:
        first = await self._first(request_iterator)
        gateway_id = messages.checked_id("gateway_id", first.gateway_id)
        session, effects = self._state.join_gateway(gateway_id, self._clock.monotonic())
        outbox = self._open(session, effects)
        _LOG.info("gateway %s joined as session %d", gateway_id, session)

        def take(_: pb.JoinGatewayRequest) -> None:
            self._state.hear_gateway(session, self._clock.monotonic())
            # Every heartbeat is answered, so that a gateway notices a coordinator that hangs.
            outbox.put(_HEARTBEAT)

        reader = asyncio.create_task(_read(request_iterator, take, outbox))
        try:
            yield pb.JoinGatewayResponse(heartbeat_interval=self._interval())
            async for _ in outbox:
                yield pb.JoinGatewayResponse(heartbeat_interval=self._interval())
        finally:
            self._leave(session, gateway_id)
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

    def _open(self, session: int, effects: Effects) -> Outbox:
        outbox = self._outboxes[session] = Outbox()
        self._perform(effects)
        return outbox

    def _leave(self, session: int, peer_id: str) -> None:
        self._outboxes.pop(session).close()
        effects = self._state.end_session(session, self._clock.monotonic())
        _LOG.info("session %d of %s ended; leases swept: %d", session, peer_id, len(effects.swept))
        self._perform(effects)

    def _perform(self, effects: Effects) -> None:
        self._metrics.count_effects(effects)
        for cancel in effects.cancels:
            outbox = self._outboxes[cancel.session]
            if not outbox.put(cancel.request_id):
                _LOG.warning("engine session %d does not read: ended", cancel.session)
                outbox.close(CaravanError("SESSION_UNKNOWN", "Too many messages wait for you."))
                self._perform(self._state.end_session(cancel.session, self._clock.monotonic()))
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
        for grant in effects.grants:
            self._answer(grant.lease.request_id, grant)
        for refusal in effects.refusals:
            self._answer(refusal.request_id, refusal.error)

    def _answer(self, request_id: str, answer: Grant | CaravanError) -> None:
        future = self._routes.pop(request_id, None)
        # A call that was cancelled in this moment is about to say so, and gives back what it was granted.
        if future is not None and not future.done():
            future.set_result(answer)

    def expire(self) -> None:
        """Ends the sessions of silent peers and refuses who has waited too long; to be called at least once per interval."""
        self._perform(self._state.expire(self._clock.monotonic()))

    def drain(self) -> None:
        """Takes no new work and ends all sessions, so that engines and gateways join the next coordinator."""
        self._perform(self._state.drain(self._clock.monotonic()))

    # --- requests ------------------------------------------------------------------------------------------------

    async def Route(
        self,
        request: pb.RouteRequest,
        context: grpc.aio.ServicerContext[pb.RouteRequest, pb.RouteResponse],
    ) -> pb.RouteResponse:
        span = self._tracing.start(
            "route",
            context.invocation_metadata(),
            gen_ai__request__model=request.model,
            caravan__request_id=request.request_id,
        )
        failure: str | None = "CANCELLED"
        try:
            grant = await self._route(
                messages.checked_want(
                    request,
                    lease_id=self._ids("lease"),
                    queue_s=self._state.limits.queue_s,
                    now=self._clock.monotonic(),
                )
            )
            failure = None
            span.set(
                caravan__engine_id=grant.lease.engine_id, caravan__lease_id=grant.lease.lease_id
            )
        except CaravanError as error:
            failure = error.reason
            self._metrics.count_refusal(failure)
            raise
        finally:
            span.end(failure)
        self._metrics.count_grant(grant.lease.granted_at - grant.lease.arrived_at)
        return messages.to_route(grant)

    async def _route(self, want: Want) -> Grant:
        """A lease, at once or when its turn comes. Raises CaravanError."""
        granted = self._state.route(want)
        if granted is not None:
            return granted
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Grant | CaravanError] = loop.create_future()
        self._routes[want.request_id] = future
        wait_s = min(want.wait_s, self._state.limits.queue_s)
        timer = loop.call_later(wait_s, self._expire_waiting)
        try:
            answer = await future
        except asyncio.CancelledError:
            # The call is gone, perhaps in the moment of its grant, which is given back then (W61).
            if self._routes.get(want.request_id) is future:
                del self._routes[want.request_id]
            self._perform(self._state.leave(want, self._clock.monotonic()))
            raise
        finally:
            timer.cancel()
        if isinstance(answer, CaravanError):
            raise answer
        return answer

    def _expire_waiting(self) -> None:
        self._perform(self._state.expire_waiting(self._clock.monotonic()))

    async def Release(
        self,
        request: pb.ReleaseRequest,
        context: grpc.aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse],
    ) -> pb.ReleaseResponse:
        lease_id = messages.checked_id("lease_id", request.lease_id)
        effects = self._state.release(lease_id, self._clock.monotonic())
        if effects is None:
            return pb.ReleaseResponse(released=False)
        self._metrics.count_release(request.outcome)
        self._perform(effects)
        return pb.ReleaseResponse(released=True)

    async def Cancel(
        self,
        request: pb.CancelRequest,
        context: grpc.aio.ServicerContext[pb.CancelRequest, pb.CancelResponse],
    ) -> pb.CancelResponse:
        request_id = messages.checked_id("request_id", request.request_id)
        self._perform(self._state.cancel(request_id, self._clock.monotonic()))
        return pb.CancelResponse()

    async def CancelTenant(
        self,
        request: pb.CancelTenantRequest,
        context: grpc.aio.ServicerContext[pb.CancelTenantRequest, pb.CancelTenantResponse],
    ) -> pb.CancelTenantResponse:
        tenant = messages.checked_optional_id("tenant", request.tenant)
        requests, effects = self._state.cancel_tenant(tenant, self._clock.monotonic())
        self._perform(effects)
        return pb.CancelTenantResponse(requests=requests)

    def _interval(self) -> Duration:
        return messages.to_duration(self._state.limits.interval_s)


async def _read(
    requests: AsyncIterator[Request], take: Callable[[Request], None], outbox: Outbox
) -> None:
    """Takes the messages of a peer until its stream ends; the end, and an error, close the outbox."""
    try:
        async for request in requests:
            take(request)
    except Exception as error:
        outbox.close(error)  # The handler of the stream raises it.
    else:
        outbox.close()


def _ending_error(peer_id: str, why: Ending) -> CaravanError:
    if why is Ending.DRAINING:
        return CaravanError(
            "DRAINING", f"The session ended: {why.value}.", retry_after_s=DRAINING_RETRY_S
        )
    return CaravanError("SESSION_UNKNOWN", f"The session ended: {why.value}.", session_id=peer_id)
