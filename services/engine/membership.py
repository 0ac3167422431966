"""The engine's session with the coordinator: it registers, reports, obeys, and joins again for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import engine_service_pb2

_LOG = logging.getLogger(__name__)
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MOST_S: Final = 5.0
REPORTS_APART_S: Final = 0.05
REPORT_INTERVAL_S: Final = 1.0
REQUESTS_MOST: Final = 1024
"""Requests in one report; those that come between are told without."""


class Member(Protocol):
    """What the session needs of the engine."""

    def model(self) -> engine_service_pb2.ModelInfo:
        """What it is."""
        ...

    def load(self) -> engine_service_pb2.EngineLoad:
        """What it does."""
        ...

    def requests(self, most: int | None = None) -> list[engine_service_pb2.InflightRequest]:
        """Its requests in flight, oldest first."""
        ...

    def cancel(self, request_id: str) -> bool:
        """Ends a request."""
        ...

    def drain(self, grace_s: float, *, stop: bool = False) -> None:
        """Takes no more requests; what still runs after the grace moves, and with `stop` the process ends then."""
        ...

    def undrain(self) -> None:
        """Takes requests again."""
        ...


class Shared(Protocol):
    """What an engine tells the coordinator beside its load, and hears from others through it."""

    def extend(self, report: pb.EngineReport) -> None:
        """Adds what is told once an interval."""
        ...

    def merge(self, command: pb.LimitsCommand) -> None:
        """Learns what others have used of limits."""
        ...


def backoff_s(attempt: int, share: float) -> float:
    """Seconds before attempt `attempt` (from 0): doubling, bounded, between half and whole by `share` in [0, 1)."""
    whole: float = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(attempt, 16))
    return whole * (0.5 + 0.5 * share)


class Membership:
    """Runs until it is cancelled; the engine serves as well without a coordinator.

    `registration` says who the engine is; model and load are added when it joins. `shared` is there for engines that share
    limits or spend money.
    """

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        member: Member,
        registration: pb.EngineRegistration,
        jitter: Callable[[], float],
        shared: Shared | None = None,
    ) -> None:
        self._shared = shared
        self._stub = stub
        self._member = member
        self._registration = registration
        self._jitter = jitter
        self._change = asyncio.Event()
        self._welcomed = False
        self._leaving = False
        self._interval_s = REPORT_INTERVAL_S

    def changed(self) -> None:
        """The engine has begun or ceased to take requests: report soon. What else its phases say can wait for its turn."""
        self._change.set()

    def leave(self) -> None:
        """Ends the session, and `run`, after a last report: what has been spent since the one before is told too."""
        self._leaving = True
        self._change.set()

    async def run(self) -> None:
        """Joins, and joins again whenever the session ends, until it is to leave."""
        attempt = 0
        while not self._leaving:
            self._welcomed = False
            try:
                await self._session()
                why = "it ended the session"
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
            if self._leaving:
                return
            if self._welcomed:
                attempt = 0
            pause = backoff_s(attempt, self._jitter())
            attempt += 1
            _LOG.warning("coordinator: %s; joining again in %.1f s", why, pause)
            await asyncio.sleep(pause)

    async def _session(self) -> None:
        call = self._stub.JoinEngine(self._messages())
        try:
            async for response in call:
                self._obey(response)
        finally:
            call.cancel()

    def _obey(self, response: pb.JoinEngineResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "welcome":
            self._welcomed = True
            told = response.welcome.report_interval.ToMilliseconds() / 1000
            if told > 0:
                self._interval_s = told
            _LOG.info("joined the coordinator; reporting every %g s", self._interval_s)
        elif kind == "cancel":
            self._member.cancel(response.cancel.request_id)
        elif kind == "drain":
            grace_s = response.drain.grace.ToMilliseconds() / 1000
            _LOG.info("told to drain within %g s", grace_s)
            self._member.drain(grace_s, stop=response.drain.stop)
        elif kind == "undrain":
            _LOG.info("told to take requests again")
            self._member.undrain()
        elif kind == "limits" and self._shared is not None:
            self._shared.merge(response.limits)

    async def _messages(self) -> AsyncIterator[pb.JoinEngineRequest]:
        self._change.clear()
        register = pb.EngineRegistration()
        register.CopyFrom(self._registration)
        register.model.CopyFrom(self._member.model())
        register.load.CopyFrom(self._member.load())
        yield pb.JoinEngineRequest(register=register)
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval_s
        is_last = False
        while not is_last:
            try:
                async with asyncio.timeout_at(due):
                    await self._change.wait()
                    if not self._leaving:
                        # Changes that come together are told together.
                        await asyncio.sleep(REPORTS_APART_S)
            except TimeoutError:
                pass
            self._change.clear()
            is_last = self._leaving
            report = pb.EngineReport(model=self._member.model(), load=self._member.load())
            if is_last or loop.time() >= due:
                due = loop.time() + self._interval_s
                report.requests.extend(self._member.requests(REQUESTS_MOST))
                if self._shared is not None:
                    self._shared.extend(report)
            yield pb.JoinEngineRequest(report=report)
