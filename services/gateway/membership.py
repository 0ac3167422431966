"""The session of this gateway with the coordinator: joins, beats, and joins again for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)
_BACKOFF_MIN_S: Final = 0.1
_BACKOFF_MAX_S: Final = 2.0
_SILENT_INTERVALS_MAX: Final = 3
_Call = grpc.aio.StreamStreamCall[pb.JoinGatewayRequest, pb.JoinGatewayResponse]


def coordinator_down() -> CaravanError:
    """No session with the coordinator, or no answer from it."""
    return CaravanError(
        "SERVICE_UNAVAILABLE",
        "The coordinator cannot be reached.",
        retry_after_s=1.0,
        service="coordinator",
    )


class Membership:
    """Holds one session at a time. Each has an id of its own, so that leases of an older one cannot be mixed up with it."""

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        clock: Clock,
        ids: IdSource,
        timeout_s: float,
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._stub = stub
        self._clock = clock
        self._ids = ids
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._joined = asyncio.Event()
        self._renewing = False
        self._gateway_id = ""
        self._hearing: asyncio.Task[None] | None = None
        self._heard_at = 0.0
        self._interval_s = timeout_s

    @property
    def is_joined(self) -> bool:
        """Whether there is a session, or one is being renewed."""
        return self._joined.is_set() or self._renewing

    async def gateway_id(self) -> str:
        """The id of the session; waits only while a session is being renewed. Raises SERVICE_UNAVAILABLE."""
        if self._renewing:
            await self._wait_joined()
        if not self._joined.is_set():
            raise coordinator_down()
        return self._gateway_id

    async def renew(self, unknown_id: str) -> str:
        """The coordinator does not know `unknown_id`: the id of the session after it. Raises SERVICE_UNAVAILABLE."""
        if self._joined.is_set() and self._gateway_id == unknown_id:
            self._joined.clear()
            self._renewing = True
            if self._hearing is not None:
                # Not the call: a write to it that is under way would be cancelled, and with it the task of run().
                self._hearing.cancel()
        return await self.gateway_id()

    async def _wait_joined(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._joined.wait()
        except TimeoutError:
            raise coordinator_down() from None

    async def run(self) -> None:
        """Joins, and joins again after each end, until cancelled."""
        backoff_s = _BACKOFF_MIN_S
        while True:
            was_joined = await self._session()
            backoff_s = _BACKOFF_MIN_S if was_joined else min(2 * backoff_s, _BACKOFF_MAX_S)
            if was_joined and self._renewing:
                continue
            self._renewing = False
            await asyncio.sleep(backoff_s)

    async def _session(self) -> bool:
        """One session, to its end; whether it was joined at all."""
        self._gateway_id = self._ids("gateway")
        call = self._stub.JoinGateway()
        try:
            await call.write(pb.JoinGatewayRequest(gateway_id=self._gateway_id))
            async with asyncio.timeout(self._timeout_s):
                joined = await self._hear(call)
            if joined:
                await self._stay(call)
        except TimeoutError:
            _LOG.warning("the coordinator does not answer")
            return False
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            _LOG.warning("no session with the coordinator: %s", _why(error))
            return False
        finally:
            call.cancel()
        return joined

    async def _stay(self, call: _Call) -> None:
        """Beats until the session ends."""
        _LOG.info("joined the coordinator as %s", self._gateway_id)
        self._renewing = False
        self._joined.set()
        await self._on_change(self._joined.is_set())
        hearing = self._hearing = asyncio.create_task(self._keep_hearing(call))
        try:
            while True:
                await asyncio.wait({hearing}, timeout=self._interval_s)
                silent_s = self._clock.monotonic() - self._heard_at
                if hearing.done():
                    break
                if silent_s > _SILENT_INTERVALS_MAX * self._interval_s:
                    _LOG.warning("the coordinator has been silent for %.1f s", silent_s)
                    break
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # A call that has ended is noticed by hearing, which knows why.
                    await call.write(pb.JoinGatewayRequest())
        finally:
            self._joined.clear()
            await cancel_all([hearing])
            await self._on_change(self._joined.is_set())

    async def _keep_hearing(self, call: _Call) -> None:
        try:
            while await self._hear(call):
                pass
            _LOG.warning("the coordinator ended the session %s", self._gateway_id)
        except grpc.aio.AioRpcError as error:
            _LOG.warning("the session with the coordinator broke: %s", _why(error))

    async def _hear(self, call: _Call) -> bool:
        """One answer of the coordinator; false at the end of the session."""
        response: Any = await call.read()
        if response is grpc.aio.EOF:
            return False
        self._heard_at = self._clock.monotonic()
        self._interval_s = max(0.01, response.heartbeat_interval.ToMilliseconds() / 1000)
        return True


def _why(error: Exception) -> object:
    return error.details() if isinstance(error, grpc.aio.AioRpcError) else error
