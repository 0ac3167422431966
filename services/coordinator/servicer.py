"""CoordinatorService over gRPC: translates, performs the effects of the state, maps errors."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from google.protobuf.duration_pb2 import Duration

from services.coordinator import messages
from services.coordinator.effects import Effects, Ending
from services.coordinator.metrics import GRANTED, CoordinatorMetrics
from services.coordinator.outbox import Outbox
from services.coordinator.state import DRAINING_RETRY_S, SILENT_INTERVALS_MAX, CoordinatorState
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all
from services.runtime.telemetry import Tracing

_LOG = logging.getLogger(__name__)
_HEARTBEAT: Final = "heartbeat"
Request = TypeVar("Request")


class CoordinatorServicer(pb_grpc.CoordinatorServiceServicer):
    """The coordinator at the edge. All its methods run on one event loop, so the state needs no lock."""

    def __init__(
        self,
        state: CoordinatorState,
        metrics: CoordinatorMetrics,
        tracing: Tracing,
        clock: Clock,
        ids: IdSource,
    ) -> None:
        self._state = state
        self._metrics = metrics
        self._tracing = tracing
        self._clock = clock
        self._ids = ids
        self._outboxes: dict[int, Outbox] = {}

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

    def expire(self) -> None:
        """Ends the sessions of silent peers; to be called at least once per interval."""
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
        try:
            grant = self._state.route(
                messages.checked_id("request_id", request.request_id),
                messages.checked_id("gateway_id", request.gateway_id),
                messages.checked_id("model", request.model),
                lease_id=self._ids("lease"),
                now=self._clock.monotonic(),
            )
        except CaravanError as error:
            self._metrics.count_route(error.reason)
            span.end(error.reason)
            raise
        self._metrics.count_route(GRANTED)
        span.set(caravan__engine_id=grant.lease.engine_id, caravan__lease_id=grant.lease.lease_id)
        span.end()
        return pb.RouteResponse(lease=messages.to_lease(grant))

    async def Release(
        self,
        request: pb.ReleaseRequest,
        context: grpc.aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse],
    ) -> pb.ReleaseResponse:
        lease_id = messages.checked_id("lease_id", request.lease_id)
        released = self._state.release(lease_id, self._clock.monotonic())
        if released:
            self._metrics.count_release(request.outcome)
        return pb.ReleaseResponse(released=released)

    async def Cancel(
        self,
        request: pb.CancelRequest,
        context: grpc.aio.ServicerContext[pb.CancelRequest, pb.CancelResponse],
    ) -> pb.CancelResponse:
        self._perform(self._state.cancel(messages.checked_id("request_id", request.request_id)))
        return pb.CancelResponse()

    # --- lists ---------------------------------------------------------------------------------------------------

    async def ListInflight(
        self,
        request: pb.ListInflightRequest,
        context: grpc.aio.ServicerContext[pb.ListInflightRequest, pb.ListInflightResponse],
    ) -> pb.ListInflightResponse:
        now = self._clock.monotonic()
        requests = [messages.to_inflight(lease, now) for lease in self._state.leases]
        return pb.ListInflightResponse(requests=requests)

    async def ListEngines(
        self,
        request: pb.ListEnginesRequest,
        context: grpc.aio.ServicerContext[pb.ListEnginesRequest, pb.ListEnginesResponse],
    ) -> pb.ListEnginesResponse:
        now = self._clock.monotonic()
        leases = self._state.leases
        engines = sorted(self._state.engines, key=lambda engine: engine.engine_id)
        return pb.ListEnginesResponse(
            engines=[messages.to_engine(e, leases.on_engine(e.engine_id), now) for e in engines]
        )

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        models = [messages.to_model(model) for model in self._state.models]
        return pb.ListModelsResponse(models=models)

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
