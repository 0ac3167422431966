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

from services.gateway.held import HeldLeases
from services.gateway.releases import Releases
from services.gateway.session_stream import Call, Session, coordinator_down
from services.runtime.clock import Clock, IdSource
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)
_BACKOFF_MIN_S: Final = 0.1
_BACKOFF_MAX_S: Final = 2.0
_SILENT_INTERVALS_MAX: Final = 3
_OUR_FAULT: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL})


class Membership:
    """Holds one session at a time. Each has an id of its own, so that leases of an older one cannot be mixed up with it.

    The coordinator learns `held` at each join, and is told `releases` for as long as it may not have taken them. `timeout_s` is the
    longest wait for the answer to a join, in seconds.
    """

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        clock: Clock,
        ids: IdSource,
        held: HeldLeases,
        releases: Releases,
        *,
        timeout_s: float,
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._stub = stub
        self._clock = clock
        self._ids = ids
        self._timeout_s = timeout_s
        self._held = held
        self._releases = releases
        self._on_change = on_change
        self._joined = asyncio.Event()
        self._renewing = False
        self._current = Session("", releases, succeeds_another=False)
        self._was_joined = False
        self._hearing: asyncio.Task[None] | None = None
        self._heard_at = 0.0
        self._interval_s = timeout_s

    async def session(self, within_s: float) -> Session:
        """The session, as soon as there is one. Raises SERVICE_UNAVAILABLE after `within_s` seconds without."""
        if not self._joined.is_set():
            try:
                async with asyncio.timeout(within_s):
                    await self._joined.wait()
            except TimeoutError:
                raise coordinator_down() from None
        return self._current

    def release(self, release: pb.ReleaseRequest) -> None:
        """Ends a lease: at once where there is a session, else in the next one. Before any route that is asked for later."""
        self._releases.add(release)
        self._current.write_soon()

    async def settle(self, within_s: float) -> None:
        """Returns when the coordinator has taken all releases, or is away, and after `within_s` seconds at the latest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._joined.is_set() and len(self._releases):
                    await self._current.beat_answered()

    def renew(self, unknown: Session) -> None:
        """The coordinator does not know this session: joins again at once, unless that has happened since."""
        if self._joined.is_set() and self._current is unknown:
            self._joined.clear()
            self._renewing = True
            unknown.end()
            if self._hearing is not None:
                self._hearing.cancel()  # And with it the call.

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
        self._current = Session(
            self._ids("gateway"), self._releases, succeeds_another=self._was_joined
        )
        call = self._stub.JoinGateway()
        try:
            first = pb.JoinGatewayRequest(
                gateway_id=self._current.gateway_id,
                held=self._held.messages(self._clock.monotonic()),
            )
            await call.write(first)
            async with asyncio.timeout(self._timeout_s):
                joined = await self._hear(call) is not None
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
            self._current.end()
        return joined

    async def _stay(self, call: Call) -> None:
        """Beats until the session ends."""
        session = self._current
        _LOG.info("joined the coordinator as %s", session.gateway_id)
        self._renewing = False
        self._was_joined = True
        session.joined_at = self._clock.monotonic()
        self._releases.begin()
        session.write_soon()
        self._joined.set()
        hearing = self._hearing = asyncio.create_task(self._keep_hearing(call))
        writing = asyncio.create_task(session.write(call))
        try:
            await self._on_change(self._joined.is_set())
            while True:
                await asyncio.wait({hearing}, timeout=self._interval_s)
                silent_s = self._clock.monotonic() - self._heard_at
                for task in (hearing, writing):
                    if task.done() and not task.cancelled():
                        task.result()  # Raises what was a defect; the end of the call is none.
                if hearing.done():
                    break
                if silent_s > _SILENT_INTERVALS_MAX * self._interval_s:
                    _LOG.warning("the coordinator has been silent for %.1f s", silent_s)
                    break
                session.beat()
        finally:
            self._joined.clear()
            session.end()
            await cancel_all([hearing, writing])
            self._releases.end()
            await self._on_change(self._joined.is_set())

    async def _keep_hearing(self, call: Call) -> None:
        try:
            while (response := await self._hear(call)) is not None:
                self._current.take(response)
            _LOG.warning("the coordinator ended the session %s", self._current.gateway_id)
        except grpc.aio.AioRpcError as error:
            _LOG.warning("the session with the coordinator broke: %s", _why(error))
            if error.code() in _OUR_FAULT:
                self._releases.forget()

    async def _hear(self, call: Call) -> pb.JoinGatewayResponse | None:
        """One message of the coordinator; None at the end of the session. Only what answers heartbeats counts as a sign of life."""
        response: Any = await call.read()
        if response is grpc.aio.EOF:
            return None
        message: pb.JoinGatewayResponse = response
        if message.HasField("heartbeat_interval"):
            self._heard_at = self._clock.monotonic()
            self._interval_s = max(0.01, message.heartbeat_interval.ToMilliseconds() / 1000)
        return message


def _why(error: Exception) -> object:
    return error.details() if isinstance(error, grpc.aio.AioRpcError) else error
