"""One session with the coordinator: what is written to its stream, and who waits for what comes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final, TypeAlias

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.gateway.releases import Releases
from services.runtime.errors import CaravanError, from_status

ROUTES_MAX: Final = 256
"""Most routes in one message: the coordinator decides on all of them before it turns to anybody else."""
RELEASE_GATHER_S: Final = 0.005
"""How long a release waits for a route that takes it along. Clients that ask again at once make half the messages, and a place that
is free a little later delays only requests of other gateways."""

Call: TypeAlias = grpc.aio.StreamStreamCall[pb.JoinGatewayRequest, pb.JoinGatewayResponse]
Answer: TypeAlias = pb.RouteResponse | CaravanError
"""What becomes of a route."""


def coordinator_down() -> CaravanError:
    """No session with the coordinator, or no answer from it."""
    return CaravanError(
        "SERVICE_UNAVAILABLE",
        "The coordinator cannot be reached.",
        retry_after_s=1.0,
        service="coordinator",
    )


class Session:
    """One session. Who waits for a route is answered at its end: nobody knows any more what was asked.

    What is added within one turn of the event loop, or while a message is being written, travels in one message. `releases`
    outlive the session. `succeeds_another`: the gateway was joined before. `joined_at` is in monotonic seconds.
    """

    def __init__(self, gateway_id: str, releases: Releases, *, succeeds_another: bool) -> None:
        self.gateway_id = gateway_id
        self.succeeds_another = succeeds_another
        self.joined_at = 0.0
        self.ended = False
        self._releases = releases
        self._routes: list[pb.RouteRequest] = []
        self._beat_due = False
        self._some_due = asyncio.Event()
        self._asked: dict[str, asyncio.Future[Answer]] = {}
        self._beat_answered = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None

    def ask(self, request: pb.RouteRequest) -> asyncio.Future[Answer]:
        """Asks for a lease. A future that is cancelled must be followed: see `follow`."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self.ended:
            future.set_result(coordinator_down())
        else:
            self._asked[request.request_id] = future
            self._routes.append(request)
            self._some_due.set()
        return future

    def follow(
        self, request_id: str, left: asyncio.Future[Answer]
    ) -> asyncio.Future[Answer] | None:
        """Another future for the answer to a route, whose asker has `left` the first one.

        The same one where it had come in that very moment (W61); None where none comes any more.
        """
        if not left.cancelled():
            return left
        if request_id not in self._asked:
            return None
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[request_id] = future
        return future

    def write_soon(self) -> None:
        """There are releases to be written: with the next route or shortly, but at once where routes wait for places."""
        if self._asked:
            self._some_due.set()
        elif self._gathering is None:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(RELEASE_GATHER_S, self._some_due.set)

    def beat(self) -> None:
        """A heartbeat is due."""
        self._beat_due = True
        self._some_due.set()

    async def beat_answered(self) -> None:
        """Writes a heartbeat and returns when one is answered, or the session has ended."""
        self._beat_answered.clear()
        if not self.ended:
            self.beat()
            await self._beat_answered.wait()

    def end(self) -> None:
        """The coordinator is gone, or has forgotten this gateway."""
        self.ended = True
        for future in self._asked.values():
            if not future.done():
                future.set_result(coordinator_down())
        self._asked.clear()
        self._beat_answered.set()
        self._stop_gathering()

    # --- the stream ----------------------------------------------------------------------------------------------

    async def write(self, call: Call) -> None:
        """Writes what is due, until the call ends or this is cancelled."""
        # Why a call has ended is known by whoever reads it.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._some_due.wait()
                self._some_due.clear()
                while (message := self._next()) is not None:
                    await call.write(message)

    def _next(self) -> pb.JoinGatewayRequest | None:
        # A heartbeat first: under load there are always routes, and without its answer the session would count as silent.
        if self._beat_due:
            self._beat_due = False
            self._releases.beat()
            return pb.JoinGatewayRequest()
        if self._routes or self._releases.some_waiting:
            self._stop_gathering()
            routes, self._routes = self._routes[:ROUTES_MAX], self._routes[ROUTES_MAX:]
            return pb.JoinGatewayRequest(routes=routes, releases=self._releases.take())
        return None

    def _stop_gathering(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None

    def take(self, response: pb.JoinGatewayResponse) -> None:
        """Takes a message of the coordinator, after its first."""
        if response.HasField("heartbeat_interval"):
            self._releases.confirm()
            self._beat_answered.set()
        for told in response.routes:
            answer = _answer_of(told)
            future = self._asked.pop(told.request_id, None)
            if future is not None and not future.done():
                future.set_result(answer)
            elif isinstance(answer, pb.RouteResponse):
                # Nobody waits for it any more (I6).
                lease_id = answer.lease.lease_id
                self._releases.add(
                    pb.ReleaseRequest(lease_id=lease_id, outcome=pb.OUTCOME_CANCELLED)
                )
                self._some_due.set()


def _answer_of(told: pb.RouteAnswer) -> Answer:
    if told.WhichOneof("answer") == "granted":
        return told.granted
    error = from_status(told.refused, service="coordinator")
    # One that is going has a successor, which can be asked.
    return coordinator_down() if error.reason == "DRAINING" else error
